// The text as tokens: pick a query, see where a head (or the mean of a role, or of all heads) looks.

const view = { query: null, source: "all", span: null };
const PAGE = 4096; // tokens put into the document at once

/** Heads whose queries and keys are the tokens shown here (in an encoder-decoder: the encoder's). */
const textHeads = heads.filter((h) => windowsOf(h).length && layers[h.layer].q_axis === 0 && layers[h.layer].k_axis === 0);

function tokenHeads() {
  const list = textHeads;
  if (view.source === "all") return list;
  if (view.source.startsWith("role:")) return list.filter((h) => h.role === view.source.slice(5));
  return list.filter((h) => h.key === view.source.slice(5));
}
const tokenRole = () => (view.source.startsWith("role:") ? view.source.slice(5) : view.source.startsWith("head:") ? headByKey.get(view.source.slice(5)).role : "all");

/** Positions whose rows are exact: [first, last + 1] of each window. */
const exactRows = [...new Map(textHeads.flatMap((h) => windowsOf(h).map((w) => [w.rows.join(), w.rows]))).values()].sort((a, b) => a[0] - b[0]);
const isExact = (i) => exactRows.some(([a, b]) => i >= a && i < b);

/** Mean row of the heads chosen: weight inside the window, and a lower bound outside it from each head's heaviest keys. */
function meanRow(list, i) {
  const inside = new Map();
  const outside = new Map();
  let n = 0;
  let window = null;
  for (const h of list) {
    const row = rowOf(h, i);
    if (!row) continue;
    n += 1;
    window = row.window;
    row.weights.forEach((v, k) => inside.set(k, (inside.get(k) ?? 0) + v));
    row.outside.forEach(([k, v]) => outside.set(k, (outside.get(k) ?? 0) + v));
  }
  const scale = (m) => [...m].map(([k, v]) => [k, v / n]);
  return { n, window, inside: scale(inside), outside: scale(outside) };
}

function sourceOptions(select) {
  const all = textHeads;
  select.append(el("option", { value: "all", text: `Mean of all ${all.length} heads` }));
  const present = header.roles.filter((r) => all.some((h) => h.role === r.id));
  select.append(el("optgroup", { label: "Mean of a role" }, ...present.map((r) => el("option", { value: `role:${r.id}`, text: `${r.label} (${all.filter((h) => h.role === r.id).length})` }))));
  select.append(el("optgroup", { label: "One head" }, ...all.map((h) => el("option", { value: `head:${h.key}`, text: `${h.key} ${roles.get(h.role).label}` }))));
}

/** Shades of weights `t` (0..1) over the surface; light enough that ink stays readable on it. */
function shades(role) {
  const colour = roleColour(role);
  const most = isDark() ? 46 : 50;
  return (t) => (t > 0 ? `color-mix(in srgb, ${colour} ${Math.round(4 + most * t)}%, transparent)` : "");
}

function drawQuery() {
  const i = view.query;
  const axis = header.axes[0];
  const row = meanRow(tokenHeads(), i);
  const role = tokenRole();
  const all = [...row.inside, ...row.outside].sort((a, b) => b[1] - a[1]);
  const max = all[0]?.[1] ?? 1;
  $("query-name").textContent = axis ? `“${tokenAt(axis, i)}” at ${i}` : `position ${i}`;
  $("query-at").value = i;
  $("token-view").style.setProperty("--role", `var(--role-${role})`);
  paintTokens(i, new Map(all), max, role, row);
  const sum = (list) => list.reduce((a, [, v]) => a + v, 0);
  const w = row.window;
  $("query-note").textContent = w.covers
    ? `All ${num(w.keys[1] - w.keys[0])} keys are exact.`
    : `Exact for keys ${w.keys[0]}–${w.keys[1] - 1}: ${percent(sum(row.inside))} of the mass. Keys outside come from the ${w.top} heaviest of each head${row.n > 1 ? ", so their means are lower bounds" : ", exact too"}: ${percent(sum(row.outside))}.`;
  $("top-keys").replaceChildren(...all.slice(0, 12).map(([k, v]) => keyLine(axis, k, v, max)));
  drawLooks(i);
}

/** Every head's heaviest keys for this query. */
function drawLooks(i) {
  const axis = header.axes[0];
  const list = textHeads.map((h) => [h, rowOf(h, i)]).filter((x) => x[1]);
  const best = list.map(([h, row]) => [h, [...row.weights, ...row.outside].sort((a, b) => b[1] - a[1]).slice(0, 3)]);
  if ($("looks-order").value === "weight") best.sort((a, b) => (b[1][0]?.[1] ?? 0) - (a[1][0]?.[1] ?? 0) || a[0].n - b[0].n);
  $("looks").replaceChildren(...best.map(([h, keys]) => el("li", {},
    el("button", { type: "button", class: "look", "aria-pressed": String(view.source === `head:${h.key}`), style: { "--role": `var(--role-${h.role})` },
      onclick: () => { view.source = view.source === `head:${h.key}` ? "all" : `head:${h.key}`; $("token-source").value = view.source; drawQuery(); } },
      el("span", { class: "code", text: roles.get(h.role).code }), el("span", { class: "look-name", text: h.key }),
      ...keys.map(([k, v]) => el("span", { class: "look-key" }, el("span", { class: "tok", text: tokenAt(axis, k) || "key" }), el("span", { class: "pos", text: k }), el("span", { class: "number", text: num(v, 2) })))))));
}

// ---- text ----------------------------------------------------------------------------------------------------

let tokenNodes = new Map();
let painted = new Map(); // weights last shown
function drawSpan() {
  const axis = header.axes[0];
  const [a, b] = view.span;
  tokenNodes = new Map();
  const box = $("tokens");
  // Word pieces carry no white space: keep them apart. Short texts can be larger.
  box.classList.toggle("words", axis.filter((t) => /\s/.test(t)).length < axis.length / 50);
  box.classList.toggle("short", axis.length <= 160);
  const nodes = [];
  for (let i = a; i < b; i++) {
    const text = axis[i];
    const node = el("span", { class: isExact(i) ? "t" : "t off", id: `t${i}`, role: "option", "aria-selected": "false", text: visible(text) });
    node.dataset.i = i;
    tokenNodes.set(i, node);
    nodes.push(node);
    if (text.includes("\n")) nodes.push(el("br"));
    else nodes.push(el("wbr"));
  }
  box.replaceChildren(...nodes);
  $("span-box").hidden = axis.length <= PAGE;
  $("span-name").textContent = `tokens ${a}–${b - 1} of ${axis.length}`;
}

function paintTokens(i, weights, max, role) {
  painted = weights;
  if (header.picture) { paintPicture(i, weights, max, role); return; }
  if (i < view.span[0] || i >= view.span[1]) {
    const a = Math.floor(i / PAGE) * PAGE;
    view.span = [a, Math.min(header.axes[0].length, a + PAGE)];
    drawSpan();
  }
  const causal = layers[textHeads[0].layer].causal;
  const shade = shades(role);
  tokenNodes.forEach((node, k) => {
    const v = weights.get(k) ?? 0;
    node.style.backgroundColor = shade(Math.sqrt(v / max));
    node.classList.toggle("on", v > max / 80); // shaded tokens are never dimmed
    node.classList.toggle("later", causal && k > i);
    const on = k === i;
    if (on !== node.classList.contains("query")) {
      node.classList.toggle("query", on);
      node.setAttribute("aria-selected", String(on));
    }
  });
  $("tokens").setAttribute("aria-activedescendant", `t${i}`);
}

function moveQuery(i, scroll = true) {
  const rows = exactRows;
  const last = rows.at(-1)[1] - 1;
  let to = Math.min(last, Math.max(rows[0][0], i));
  if (!isExact(to)) to = i > view.query ? rows.find(([a]) => a > view.query)?.[0] ?? last : [...rows].reverse().find(([, b]) => b <= view.query)?.[1] - 1;
  view.query = to;
  drawQuery();
  const node = tokenNodes.get(to);
  const box = $("tokens");
  if (scroll && node) {
    const top = node.offsetTop; // the box is its offset parent
    if (top < box.scrollTop || top > box.scrollTop + box.clientHeight - 40) box.scrollTop = Math.max(0, top - box.clientHeight / 2);
  }
}

function startTokens() {
  const rows = exactRows;
  if (!rows.length || !(header.axes[0] || header.picture)) {
    $("token-view").hidden = true;
    $("nav-tokens").hidden = true;
    return;
  }
  sourceOptions($("token-source"));
  $("token-source").addEventListener("change", (e) => { view.source = e.target.value; drawQuery(); });
  $("looks-order").addEventListener("change", () => drawLooks(view.query));
  $("query-at").min = rows[0][0];
  $("query-at").max = rows.at(-1)[1] - 1;
  $("query-at").addEventListener("change", (e) => moveQuery(Number(e.target.value) || rows[0][0]));
  view.query = header.query ?? rows.at(-1)[1] - 1;
  if (header.picture) startPicture();
  else startText(rows);
  themed(drawQuery);
  moveQuery(view.query);
}

function startText(rows) {
  const length = header.axes[0].length;
  const whole = rows.length === 1 && rows[0][0] === 0 && rows[0][1] >= length;
  $("exact-note").textContent = whole
    ? `Every token can be the query: all weights of this text are exact.${header.axes.length > 1 ? " Shown are the encoder’s heads; the decoder’s are in their own panels." : ""}`
    : `Queries can be picked in tokens ${rows.map(([a, b]) => `${a}–${b - 1}`).join(" and ")}, whose weights this page holds exactly; the rest of the ${num(length)} tokens is dimmed.`;
  const a = Math.floor(view.query / PAGE) * PAGE;
  view.span = [a, Math.min(length, a + PAGE)];
  drawSpan();
  const box = $("tokens");
  box.addEventListener("pointerover", (e) => {
    const k = Number(e.target.dataset?.i);
    if (!Number.isNaN(k)) e.target.title = `${k}${painted.has(k) ? `: ${num(painted.get(k))}` : ""}`;
  });
  box.addEventListener("click", (e) => {
    const i = Number(e.target.dataset?.i);
    if (Number.isNaN(i)) return;
    if (isExact(i)) moveQuery(i, false);
    else $("query-note").textContent = `Token ${i} lies outside the exact windows: its row is not on this page.`;
  });
  box.addEventListener("keydown", (e) => {
    const line = (sign) => {
      // The token above or below the current one on the screen.
      const here = tokenNodes.get(view.query).getBoundingClientRect();
      let best = null;
      for (const [i, node] of tokenNodes) {
        if (!isExact(i) || Math.sign(i - view.query) !== sign) continue;
        const r = node.getBoundingClientRect();
        if (sign * (r.top - here.top) < here.height / 2) continue;
        const cost = Math.abs(r.top - here.top) * 100 + Math.abs(r.left - here.left);
        if (!best || cost < best[0]) best = [cost, i];
      }
      return best ? best[1] : view.query;
    };
    const to = { ArrowLeft: () => view.query - 1, ArrowRight: () => view.query + 1, ArrowUp: () => line(-1), ArrowDown: () => line(1), Home: () => rows[0][0], End: () => rows.at(-1)[1] - 1 }[e.key];
    if (!to || e.ctrlKey || e.metaKey || e.altKey) return;
    e.preventDefault();
    moveQuery(to());
  });
  const page = (step) => {
    const start = Math.min(Math.floor((length - 1) / PAGE) * PAGE, Math.max(0, view.span[0] + step * PAGE));
    view.span = [start, Math.min(length, start + PAGE)];
    drawSpan();
    if (view.query >= view.span[0] && view.query < view.span[1]) drawQuery();
  };
  $("span-prev").addEventListener("click", () => page(-1));
  $("span-next").addEventListener("click", () => page(1));
}
