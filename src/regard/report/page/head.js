// One head: its map at every level, profiles, receivers, evidence and what window + sinks would lose.

const panel = { head: null, level: null, scale: "root", cursor: [0, 0], map: null, opener: null };
const dialog = $("head");

/** The address follows the open head; where a page may not change it (an embedded one), it stays. */
function setHash(hash) {
  try { history.replaceState(null, "", hash || location.pathname + location.search); } catch { /* nothing depends on it */ }
}

function openHead(h, { focus = true } = {}) {
  const before = panel.head;
  if (!dialog.open) {
    panel.opener = document.activeElement;
    dialog.showModal();
    document.documentElement.classList.add("locked");
  }
  panel.head = h;
  if (location.hash !== `#${h.key}`) setHash(`#${h.key}`);
  drawHead(h);
  if (!before) dialog.querySelector(".sheet").scrollTop = 0;
  if (focus && !before) $("head-title").focus();
}

function closeHead() {
  if (dialog.open) dialog.close();
}
dialog.addEventListener("close", () => {
  const key = panel.head?.key;
  panel.head = null;
  document.documentElement.classList.remove("locked");
  setHash("");
  const cell = key && $("grid").querySelector(`[data-key="${key}"]`);
  const target = cell && !$("grid").hidden ? cell : panel.opener;
  if (cell) { $("grid").querySelectorAll('.cell[tabindex="0"]').forEach((c) => { c.tabIndex = -1; }); cell.tabIndex = 0; }
  target?.focus?.();
});
dialog.addEventListener("click", (e) => { if (e.target === dialog) closeHead(); });

/** Left and right: the previous and the next head shown; up and down: the same head one layer off. */
function moveHead(step, byLayer = false) {
  const h = panel.head;
  if (byLayer) {
    const l = h.layer + step;
    if (layers[l]) openHead(heads.find((x) => x.layer === l && x.head === Math.min(h.head, layers[l].heads - 1)));
    return;
  }
  const list = shown().includes(h) ? shown() : heads;
  openHead(list[(list.indexOf(h) + step + list.length) % list.length]);
}
dialog.addEventListener("keydown", (e) => {
  if (e.ctrlKey || e.metaKey || e.altKey || e.target.closest("select, input, #map, .chart-box, [role=radiogroup]")) return;
  const act = { ArrowLeft: () => moveHead(-1), ArrowRight: () => moveHead(1), ArrowUp: () => moveHead(-1, true), ArrowDown: () => moveHead(1, true) }[e.key];
  if (act) { e.preventDefault(); act(); }
});

function drawHead(h) {
  const layer = layers[h.layer];
  const role = roles.get(h.role);
  dialog.style.setProperty("--role", `var(--role-${h.role})`);
  $("head-title").textContent = headText(h);
  $("head-role").replaceChildren(roleChip(h.role));
  $("head-module").textContent = `${layer.name}${h.kind === "cross" ? " · cross-attention" : ""}`;
  const also = header.rules.filter((r, i) => header.holds[h.layer][h.head][i] && r.role !== h.role).map((r) => roles.get(r.role).label);
  const judged = !header.holds[h.layer][h.head].includes(null);
  $("head-why").textContent = h.role === "mixed" ? `Mixed: none of the roles ${judged ? "" : "that could be judged here "}holds.` : `${role.label[0].toUpperCase()}${role.label.slice(1)}: ${role.rule}.${also.length ? ` Also holds: ${also.join(", ")}.` : ""}`;
  drawLevels(h);
  drawFacts(h);
  drawEvidence(h);
  drawBudgets(h);
  drawReceived(h);
  drawOffsets(h);
  drawEntropy(h);
}

// ---- the map -------------------------------------------------------------------------------------------------

function drawLevels(h) {
  const levels = levelsOf(h);
  const box = $("levels");
  box.replaceChildren();
  for (const part of dialog.querySelectorAll(".map-tools, #map-box, .scale-line")) part.hidden = !levels.length;
  if (!levels.length) { $("readout").textContent = "This atlas holds no block map for this head."; return; }
  if (!levels.some((x) => x.id === panel.level)) {
    const covers = levels.find((x) => x.exact && x.window.covers);
    panel.level = (covers ?? levels[0]).id;
  }
  for (const level of levels) {
    box.append(el("button", { type: "button", role: "radio", "aria-checked": String(level.id === panel.level), tabindex: level.id === panel.level ? "0" : "-1", "data-level": level.id, text: level.label,
      title: level.exact ? "every weight of the window" : "mass each block of queries gives to each block of keys",
      onclick: () => { panel.level = level.id; drawLevels(h); $("levels").querySelector('[aria-checked="true"]').focus(); } }));
  }
  const level = levels.find((x) => x.id === panel.level);
  panel.map = level.open();
  panel.cursor = panel.cursor.map((v, i) => Math.min(v, (i ? panel.map.cols : panel.map.rows) - 1));
  drawMap(h);
}
roving($("levels"), () => [...$("levels").children], () => 1, (b) => b.click());

function drawMap(h) {
  const canvas = $("map");
  const max = paintMap(canvas, panel.map, h.role, panel.scale);
  canvas.setAttribute("aria-label", `Attention map of ${headText(h)}, ${panel.map.exact ? "exact weights" : "blocks"}; queries down, keys across. Arrow keys move the readout.`);
  drawMapAxes(h);
  const scale = $("scale-bar");
  scale.width = 256;
  scale.height = 1;
  const ctx = scale.getContext("2d");
  const table = ramp(h.role);
  for (let i = 0; i < 256; i++) { ctx.fillStyle = `rgb(${table[i * 3]},${table[i * 3 + 1]},${table[i * 3 + 2]})`; ctx.fillRect(i, 0, 1, 1); }
  $("scale-low").textContent = panel.scale === "log" ? `≤ ${num(header.quant.floor)}` : "0";
  $("scale-high").textContent = `${num(max)} ${panel.map.exact ? "weight" : "share of mass"}`;
  readout(h);
}

/** Queries and keys of one cell, as positions [first, last]. */
function cellSpan(r, c) {
  const m = panel.map;
  if (m.exact) return { q: [m.q0 + r, m.q0 + r], k: [m.k0 + c, m.k0 + c] };
  return {
    q: [blockStart(r, m.qLen, m.rows), blockStart(r + 1, m.qLen, m.rows) - 1],
    k: [blockStart(c, m.kLen, m.cols), blockStart(c + 1, m.kLen, m.cols) - 1],
  };
}
function spanText([a, b], axis) {
  if (b < a) return "no token";
  const say = (i) => (tokenAt(axis, i) ? `“${tokenAt(axis, i)}” ` : "");
  if (header.relative) return `${a}–${b + 1}%`;
  return a === b ? `${say(a)}${a}` : `${a}–${b}`;
}
function readout(h) {
  const [r, c] = panel.cursor;
  const v = panel.map.values[r * panel.map.cols + c];
  const span = cellSpan(r, c);
  const q = spanText(span.q, axisOf(h, "q"));
  const k = spanText(span.k, axisOf(h, "k"));
  $("readout").replaceChildren(
    el("span", { class: "r-part" }, el("span", { class: "r-name", text: "query" }), el("span", { class: "r-tok", text: q })),
    el("span", { class: "r-part" }, el("span", { class: "r-name", text: "key" }), el("span", { class: "r-tok", text: k })),
    el("span", { class: "r-part" }, el("span", { class: "r-name", text: panel.map.exact ? "weight" : "share" }),
      el("span", { class: "r-val", text: Number.isNaN(v) ? "not allowed by the mask" : weightText(v) })));
  const cross = $("cross");
  cross.style.setProperty("--x", `${((c + 0.5) / panel.map.cols) * 100}%`);
  cross.style.setProperty("--y", `${((r + 0.5) / panel.map.rows) * 100}%`);
  cross.style.setProperty("--w", `${100 / panel.map.cols}%`);
  cross.style.setProperty("--h", `${100 / panel.map.rows}%`);
}

function drawMapAxes(h) {
  const m = panel.map;
  const total = { q: m.exact ? m.rows : m.qLen, k: m.exact ? m.cols : m.kLen };
  const start = { q: m.exact ? m.q0 : 0, k: m.exact ? m.k0 : 0 };
  for (const side of ["q", "k"]) {
    const marks = ticks(start[side], start[side] + total[side], 4).filter((v) => v >= start[side] && v < start[side] + total[side]);
    $(`axis-${side}`).replaceChildren(...marks.map((v) => {
      const at = `${((v - start[side] + (m.exact ? 0.5 : 0)) / total[side]) * 100}%`;
      return el("span", { style: side === "q" ? { top: at } : { left: at }, text: num(v) + (header.relative ? "%" : "") });
    }));
  }
  // Where the exact windows lie on a block map.
  const marks = m.exact ? [] : windowsOf(h).filter((w) => !w.covers).map((w) => el("button", { type: "button", class: "window-mark", tabindex: "-1", title: `${w.label}: open the exact weights`,
    style: { left: `${(w.keys[0] / m.kLen) * 100}%`, top: `${(w.rows[0] / m.qLen) * 100}%`, width: `${((w.keys[1] - w.keys[0]) / m.kLen) * 100}%`, height: `${((w.rows[1] - w.rows[0]) / m.qLen) * 100}%` },
    "aria-hidden": "true", onclick: () => { panel.level = w.id; drawLevels(h); } }));
  $("marks").replaceChildren(...marks);
}

{
  const stage = $("stage");
  const move = (e) => {
    const box = $("map").getBoundingClientRect();
    const c = Math.floor(((e.clientX - box.left) / box.width) * panel.map.cols);
    const r = Math.floor(((e.clientY - box.top) / box.height) * panel.map.rows);
    if (r < 0 || c < 0 || r >= panel.map.rows || c >= panel.map.cols) return;
    panel.cursor = [r, c];
    readout(panel.head);
  };
  stage.addEventListener("pointermove", move);
  stage.addEventListener("pointerdown", move);
  $("map").addEventListener("keydown", (e) => {
    const [r, c] = panel.cursor;
    const far = e.shiftKey ? 8 : 1;
    const to = { ArrowLeft: [r, c - far], ArrowRight: [r, c + far], ArrowUp: [r - far, c], ArrowDown: [r + far, c], PageUp: [r - 16, c], PageDown: [r + 16, c], Home: [r, 0], End: [r, panel.map.cols - 1] }[e.key];
    if (!to) return;
    e.preventDefault();
    panel.cursor = [Math.min(panel.map.rows - 1, Math.max(0, to[0])), Math.min(panel.map.cols - 1, Math.max(0, to[1]))];
    readout(panel.head);
  });
  $("scale").addEventListener("change", (e) => { panel.scale = e.target.value; drawMap(panel.head); });
  $("prev").addEventListener("click", () => moveHead(-1));
  $("next").addEventListener("click", () => moveHead(1));
  $("close").addEventListener("click", closeHead);
}
themed(() => { if (panel.head) drawHead(panel.head); });

// ---- figures beside the map ----------------------------------------------------------------------------------

function drawFacts(h) {
  $("facts").replaceChildren(...header.measures.map((m) => el("div", {}, el("dt", { text: m.label, title: m.title }), el("dd", { text: num(measureOf(m.name, h)) }))));
}

/** One row a condition; a role's first row carries its name and whether the role as a whole holds. */
function drawEvidence(h) {
  const SIGN = { true: ["pass", "✓", "holds"], false: ["fail", "✗", "does not hold"], null: ["unknown", "–", "not measured"] };
  const sign = (v) => { const [name, mark, say] = SIGN[String(v)]; return el("span", { class: `mark ${name}` }, el("span", { "aria-hidden": "true", text: mark }), el("span", { class: "hidden", text: say })); };
  const rows = [];
  let at = 0;
  for (const [i, rule] of header.rules.entries()) {
    const holds = header.holds[h.layer][h.head][i];
    rule.conditions.forEach((c, n) => {
      const value = header.scores[h.layer][h.head][at++];
      const passes = value === null ? null : { ">=": value >= c.threshold, ">": value > c.threshold, "<=": value <= c.threshold, "<": value < c.threshold }[c.op];
      const last = n === rule.conditions.length - 1;
      rows.push(el("tr", { class: `${rule.role === h.role ? "primary " : ""}${last ? "" : "cont"}` },
        el("th", { scope: "row" }, n === 0 ? roleChip(rule.role) : el("span", { class: "hidden", text: roles.get(rule.role).label })),
        el("td", {}, n === 0 ? sign(holds) : null),
        el("td", { class: "what", text: c.label }),
        el("td", { class: "number", text: num(value) }),
        el("td", { class: "needs" }, `${n && rule.combine === "any" ? "or " : ""}${{ ">=": "≥", "<=": "≤" }[c.op] ?? c.op} ${num(c.threshold)} `, rule.conditions.length > 1 ? sign(passes) : null),
        el("td", { class: "source", text: c.from })));
    });
  }
  $("evidence").replaceChildren(el("thead", {}, el("tr", {}, ...["Role", "", "Score", "Value", "Needs", "Threshold from"].map((t) => el("th", { scope: "col", text: t })))), el("tbody", {}, ...rows));
}

function bar(value, max = 1) {
  return el("span", { class: "bar", "aria-hidden": "true" }, el("span", { style: { width: `${Math.min(100, Math.max(0, (100 * value) / max))}%` } }));
}

/** One key with its weight. Where tokens are single characters, a few around it say which one it is. */
function keyLine(axis, pos, value, max) {
  const around = axis && axis.small ? 5 : 0;
  const part = (a, b) => Array.from({ length: Math.max(0, b - a) }, (_, i) => tokenAt(axis, a + i)).join("");
  const tok = around
    ? el("span", { class: "tok near" }, part(Math.max(0, pos - around), pos), el("b", { text: tokenAt(axis, pos) }), part(pos + 1, Math.min(axis.length, pos + 1 + around)))
    : el("span", { class: "tok", text: tokenAt(axis, pos) || "key" });
  return el("li", {}, tok, el("span", { class: "pos", text: pos }), bar(value, max), el("span", { class: "number", text: num(value) }));
}

function drawBudgets(h) {
  const list = header.budgets.map((b) => ({ ...b, kept: b.recall[h.layer][h.head] })).filter((b) => b.kept !== null);
  $("budgets-box").hidden = !list.length;
  $("budgets").replaceChildren(...list.map((b) => el("div", { class: "budget" },
    el("div", { class: "budget-top" }, el("span", { text: b.label }), el("strong", { text: `loses ${percent(1 - b.kept)}` })),
    bar(b.kept), el("div", { class: "fine", text: `keeps ${percent(b.kept)} of the mass, on ${percent(b.share[h.layer][h.head])} of what a query may see` }))));
}

function drawReceived(h) {
  const list = header.received?.top[h.layer]?.[h.head] ?? [];
  const max = Math.max(...list.map((r) => r[1]), 1e-12);
  $("received-box").hidden = !list.length;
  $("received").replaceChildren(...list.map(([pos, mass]) => keyLine(axisOf(h, "k"), pos, mass, max)));
}

function drawOffsets(h) {
  const spec = header.offsets;
  const near = spec && array("near");
  const box = $("offsets");
  const width = box.clientWidth || 320;
  $("offsets-box").hidden = !near;
  if (!near) return;
  const count = spec.offsets.length;
  const codes = near.subarray(h.n * count, (h.n + 1) * count); // 65535: nothing counted
  const points = spec.offsets.map((o, i) => [o, codes[i] / 65534]).filter((p, i) => codes[i] !== 65535);
  $("offsets-box").hidden = !points.length;
  if (!points.length) return;
  const max = Math.max(...points.map((p) => p[1]), 1e-9);
  const { root, X, Y } = frame(width, 190, { x: [spec.offsets[0], spec.offsets[count - 1]], y: [0, max], xLabel: "offset, query − key (tokens)", yLabel: "mean weight", label: `Offset profile of ${headText(h)}` });
  root.append(svg("path", { class: "area", d: `${path(points.map(([o, v]) => [X(o), Y(v)]))}L${X(points.at(-1)[0])} ${Y(0)}L${X(points[0][0])} ${Y(0)}Z` }));
  root.append(svg("path", { class: "line", d: path(points.map(([o, v]) => [X(o), Y(v)])) }));
  const top = [...points].sort((a, b) => b[1] - a[1])[0];
  root.append(svg("circle", { class: "dot", cx: X(top[0]), cy: Y(top[1]), r: 3 }));
  box.replaceChildren(root);
  const kept = spec.widths.map((w, i) => [w, header.window?.[h.layer]?.[h.head]?.[i]]).filter((x) => x[1] !== null && x[1] !== undefined);
  const half = kept.find((x) => x[1] >= 0.5);
  $("offsets-note").textContent = `Highest at offset ${top[0]} (${num(top[1])}).` + (half ? ` Half of the mass lies within |offset| < ${half[0]}.` : "");
}

function drawEntropy(h) {
  const values = header.entropyAt?.[h.layer]?.[h.head]?.map((v, i) => [i, v]).filter((p) => p[1] !== null) ?? [];
  $("entropy-box").hidden = !values.length;
  if (!values.length) return;
  const bins = header.entropyAt[h.layer][h.head].length;
  const length = header.queryLength[h.layer];
  const at = (i) => ((i + 0.5) / bins) * length;
  const bound = (i) => header.relative ? 0 : Math.log(Math.max(1, layers[h.layer].causal ? at(i) : header.keyLength[h.layer]));
  const max = Math.max(...values.map(([i, v]) => Math.max(v, bound(i))), 0.1);
  const box = $("entropy");
  const { root, X, Y } = frame(box.clientWidth || 320, 190, { x: [0, length], y: [0, max], xLabel: header.relative ? "query position (% of the length)" : "query position (tokens)", yLabel: "entropy (nats)", label: `Entropy over position, ${headText(h)}` });
  $("entropy-note").hidden = header.relative;
  if (!header.relative) root.append(svg("path", { class: "line bound", d: path(values.map(([i]) => [X(at(i)), Y(bound(i))])) }));
  root.append(svg("path", { class: "line", d: path(values.map(([i, v]) => [X(at(i)), Y(v)])) }));
  box.replaceChildren(root);
}
onWidth($("figures"), () => { if (panel.head) { drawOffsets(panel.head); drawEntropy(panel.head); } });
