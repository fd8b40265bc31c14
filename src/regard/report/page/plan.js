// What each head was given: a grid of small maps, and the head chosen with its candidates.

const header = JSON.parse($("regard-header").textContent);
const { layers, options } = header;
const roles = new Map(header.roles.map((r) => [r.id, r]));
const heads = layers.flatMap((l) => l.heads.map((h, head) => ({ ...h, layer: l.index, module: l.name, head, key: `${l.index}.${head}` })));
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const ms = (s) => (s === null || s === undefined ? "–" : `${num(1e3 * s)} ms`);
let wanted = null;
let shown = heads[0];

/** The map of an option in a role's colour; a route, which decides while running, is hatched. */
function paint(canvas, option, role) {
  const n = header.cells;
  const rows = option.map ? option.map.split("/") : null;
  canvas.width = rows ? rows[0].length : n;
  canvas.height = rows ? rows.length : n;
  const pen = canvas.getContext("2d");
  pen.fillStyle = css("--map-zero");
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = (role && css(`--role-${role}`)) || css("--ink");
  for (let y = 0; y < canvas.height; y++) {
    for (let x = 0; x < canvas.width; x++) {
      const level = rows ? Number(rows[y][x]) : x <= y && (x + y) % 4 === 0 ? 2 : 0;
      if (!level) continue;
      pen.globalAlpha = level === 2 ? 1 : 0.5;
      pen.fillRect(x, y, 1, 1);
    }
  }
  pen.globalAlpha = 1;
}

function map(option, role, cls) {
  const canvas = el("canvas", { class: cls, "aria-hidden": "true" });
  themed(() => paint(canvas, option, role));
  paint(canvas, option, role);
  return canvas;
}

function cell(h) {
  const option = options[h.option];
  const role = roles.get(h.role);
  const button = el("button", { type: "button", class: "cell", "data-key": h.key, "aria-pressed": String(h === shown), tabindex: h === heads[0] ? 0 : -1,
    "aria-label": `Layer ${h.layer}, head ${h.head}: ${option.name}${role ? `, ${role.label}` : ""}`, style: { "--role": h.role ? `var(--role-${h.role})` : null }, onclick: () => show(h) },
    map(option, h.role, "thumb"),
    el("span", { class: "cell-label" }, el("span", { text: h.key }), role && el("span", { class: "code", text: role.code })),
    el("span", { class: "given", text: option.name, title: option.name }),
    typeof h.mass === "number" && el("span", { class: "kept", title: `${percent(h.mass)} of the mass kept` }, el("span", { style: { width: `${100 * h.mass}%` } })));
  return button;
}

function drawGrid() {
  $("grid").style.setProperty("--cell", "74px");
  $("grid").replaceChildren(...layers.map((l) => el("div", { class: "layer-row" },
    el("span", { class: "layer-label", title: l.name }, el("span", { class: "layer-word", text: "Layer " }), String(l.index)),
    el("div", { class: "cells" }, ...heads.filter((h) => h.layer === l.index).map(cell)))));
  filter();
}

function filter() {
  let n = 0;
  for (const button of document.querySelectorAll("#legend button")) button.setAttribute("aria-pressed", String(Number(button.dataset.option) === wanted));
  for (const h of heads) {
    const on = wanted === null || h.option === wanted;
    n += on;
    document.querySelector(`.cell[data-key="${h.key}"]`).classList.toggle("dim", !on);
  }
  $("count").textContent = wanted === null ? `${heads.length} heads, ${options.length} options` : `${n} of ${heads.length} heads: ${options[wanted].name}, ${options[wanted].length}`;
}

function drawLegend() {
  const order = options.map((o, i) => i).sort((a, b) => options[b].heads - options[a].heads);
  $("legend").replaceChildren(...order.map((i) => el("button", { type: "button", "data-option": i, "aria-pressed": "false", onclick: () => { wanted = wanted === i ? null : i; filter(); } },
    map(options[i], null, "swatch"), el("span", { text: `${options[i].name} ` }), el("span", { class: "n", text: String(options[i].heads) }))));
}

function show(h) {
  shown = h;
  for (const button of document.querySelectorAll(".cell")) button.setAttribute("aria-pressed", String(button.dataset.key === h.key));
  const option = options[h.option];
  const role = roles.get(h.role);
  const box = $("detail");
  box.style.setProperty("--role", h.role ? `var(--role-${h.role})` : "var(--ink)");
  const table = h.candidates.length ? el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, ...["candidate", "time", "mass kept", "worst", "error", "worst"].map((t, i) => el("th", { text: t, class: i ? "figure" : null })))),
    el("tbody", {}, ...h.candidates.map((c) => el("tr", { class: c.name === h.given ? "chosen" : null },
      el("th", { scope: "row", text: c.name }), ...[ms(c.seconds), percent(c.mass), percent(c.least_mass), num(c.error, 2), num(c.worst_error, 2)].map((t) => el("td", { class: "figure", text: t }))))))) : el("p", { class: "fine", text: "This plan holds no record of what else was tried." });
  const canvas = map(option, h.role, "");
  box.replaceChildren(
    el("div", { class: "map-line" }, canvas, el("div", {},
      el("h3", { text: `Layer ${h.layer}, head ${h.head}` }), el("p", { class: "fine mono", text: h.module }),
      role && el("p", { class: "role" }, el("span", { class: "code", text: role.code }), role.label),
      el("p", {}, el("strong", { text: option.name })), el("p", { class: "fine", text: option.kind === "route" ? "Decided from queries and keys while running; the map is no picture of it." : option.length }))),
    h.why ? el("p", { text: `${h.why[0].toUpperCase()}${h.why.slice(1)}.` }) : el("span"),
    table);
}

drawLegend();
drawGrid();
show(shown);
roving($("grid"), () => [...document.querySelectorAll(".cell")], () => layers[0].heads.length);
queueMicrotask(() => { document.documentElement.dataset.ready = "true"; });
