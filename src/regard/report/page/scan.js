// What a task's answers cost without each head: a heat map for every task, the head chosen, and the ranking.

const header = JSON.parse($("regard-header").textContent);
const { scans } = header;
const shared = new Set(header.shared);
const grids = scans.map((s) => ({ ...s, byKey: new Map(s.heads.map((h, rank) => [h.key, { ...h, rank }])) }));
const first = scans[0].heads[0]?.key;
let shown = first;

const signed = (x) => (x > 0 ? `+${num(x)}` : num(x).replace("-", "−"));
/** As much of a figure as fits under a square. */
const brief = (x) => (x !== 0 && Math.abs(x) < 1e-3 ? `${x < 0 ? "−" : "+"}${Math.abs(x).toExponential(0)}` : signed(Number(x.toPrecision(2))));
const interval = (h) => `${signed(h.low)} to ${signed(h.high)}`;
const where = (key) => { const [layer, head] = key.split("."); return `Layer ${layer}, head ${head}`; };

function cell(scan, index, layer, head) {
  const key = `${layer}.${head}`;
  const h = scan.byKey.get(key);
  if (!h) return el("span", { class: "cell nothing", "aria-hidden": "true" }, el("span", { class: "square" }));
  // Square roots, so that the many small effects beside a few large ones can be seen.
  const level = scan.most > 0 ? Math.sqrt(Math.abs(h.increase) / scan.most) : 0;
  return el("button", { type: "button", class: `cell${h.increase < 0 ? " helps" : ""}${shared.has(key) ? " shared" : ""}`, "data-key": key, "data-scan": index, "aria-pressed": String(key === shown), tabindex: key === first ? 0 : -1,
    "aria-label": `${where(key)}: loss ${signed(h.increase)} nat without it${shared.has(key) ? ", in both circuits" : ""}`, style: { "--v": level.toFixed(4) }, onclick: () => show(key) },
    el("span", { class: "square" }), el("span", { class: "value", text: brief(h.increase) }));
}

function heat(scan, index) {
  const rows = Array.from({ length: scan.layers }, (_, layer) => el("div", { class: "layer-row" },
    el("span", { class: "layer-label" }, el("span", { class: "layer-word", text: "Layer " }), String(layer)),
    el("div", { class: "cells" }, ...Array.from({ length: scan.width }, (_, head) => cell(scan, index, layer, head)))));
  const names = el("div", { class: "layer-row", "aria-hidden": "true" }, el("span", {}), el("div", { class: "cells" }, ...Array.from({ length: scan.width }, (_, head) => el("span", { class: "head-label", text: String(head) }))));
  const grid = el("div", { class: "heat", role: "group", "aria-label": `Heads by their need for ${scan.task}; arrow keys move, Enter shows one`, style: { "--heads": scan.width } }, names, ...rows);
  roving(grid, () => [...grid.querySelectorAll("button.cell")], () => scan.width);
  const most = num(scan.most);
  return el("section", { class: "card" }, el("h3", { text: `${scan.task}, heads taken out by ${scan.kind}` }), grid,
    el("div", { class: "scale" }, el("span", { text: `−${most} nat` }), el("span", { class: "scale-bar", "aria-hidden": "true" }), el("span", { text: `+${most} nat` }), el("span", { text: "loss without the head, by square roots" })));
}

function show(key) {
  shown = key;
  for (const button of document.querySelectorAll("button.cell")) button.setAttribute("aria-pressed", String(button.dataset.key === key));
  for (const row of document.querySelectorAll("#ranking tr[data-key]")) row.classList.toggle("chosen", row.dataset.key === key);
  const rows = grids.filter((s) => s.byKey.has(key)).map((s) => {
    const h = s.byKey.get(key);
    return el("tr", {}, el("th", { scope: "row", text: s.task }), el("td", { class: "figure", text: signed(h.increase) }), el("td", { class: "figure", text: interval(h) }), el("td", { class: "figure", text: `${h.rank + 1} of ${s.heads.length}` }));
  });
  $("detail").replaceChildren(el("h3", { text: where(key) }),
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...["task", "loss without it, nat", "95%", "need"].map((t, i) => el("th", { text: t, class: i ? "figure" : null })))), el("tbody", {}, ...rows))),
    shared.has(key) ? el("p", { text: "In both circuits." }) : el("span"));
}

$("maps").replaceChildren(...grids.map(heat));
if (first) show(first);
queueMicrotask(() => { document.documentElement.dataset.ready = "true"; });
