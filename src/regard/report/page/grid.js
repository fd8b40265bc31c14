// All heads: the grid of thumbnails and the table, one filter and one order for both.

const state = { view: "grid", roles: new Set(), measure: "", order: "layer", min: null, max: null, search: "" };

function matches(h) {
  if (state.roles.size && !state.roles.has(h.role)) return false;
  if (state.measure) {
    const v = measureOf(state.measure, h);
    if (state.min !== null && !(v >= state.min)) return false;
    if (state.max !== null && !(v <= state.max)) return false;
  }
  const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  const about = `${h.key} l${layers[h.layer].index}h${h.head} layer${layers[h.layer].index} head${h.head} ${layers[h.layer].name} ${roles.get(h.role).label} ${h.kind}`.toLowerCase();
  return words.every((w) => (/^\d+$/.test(w) ? layers[h.layer].index === Number(w) : about.includes(w)));
}

/** Heads shown, in the order shown. Missing values go last, whatever the direction. */
function shown() {
  const list = heads.filter(matches);
  if (state.order === "role") {
    const rank = new Map(header.roles.map((r, i) => [r.id, i]));
    return list.sort((a, b) => rank.get(a.role) - rank.get(b.role) || a.n - b.n);
  }
  if (state.order !== "layer" && state.measure) {
    const sign = state.order === "down" ? -1 : 1;
    return list.sort((a, b) => {
      const x = measureOf(state.measure, a);
      const y = measureOf(state.measure, b);
      if (x === null || y === null) return (x === null) - (y === null) || a.n - b.n;
      return sign * (x - y) || a.n - b.n;
    });
  }
  return list;
}

const thumbs = new Map();
const thumbLevel = header.maps[0];
function thumbnail(h) {
  const role = roles.get(h.role);
  const canvas = el("canvas", { class: "thumb", "aria-hidden": "true" });
  const button = el(
    "button",
    { type: "button", class: "cell", tabindex: "-1", "data-key": h.key, onclick: () => openHead(h) },
    canvas,
    el("span", { class: "cell-label" },
      el("span", { class: "cell-name", text: h.key }),
      el("span", { class: "code", style: { "--role": `var(--role-${h.role})` }, text: role.code }),
    ),
    el("span", { class: "cell-value" }),
  );
  const paint = themed(() => {
    if (thumbLevel?.layers[h.layer]) paintMap(canvas, openBlocks(h, thumbLevel), h.role);
  });
  paint();
  return button;
}

function describe(h) {
  const value = state.measure ? `, ${measures.get(state.measure).label} ${num(measureOf(state.measure, h))}` : "";
  return `${headText(h)}, ${roles.get(h.role).label}${h.kind === "cross" ? ", cross-attention" : ""}${value}`;
}

let gridColumns = 1;
function drawGrid(list) {
  const grid = $("grid");
  const focused = document.activeElement?.dataset?.key;
  const cells = list.map((h) => {
    if (!thumbs.has(h.key)) thumbs.set(h.key, thumbnail(h));
    const cell = thumbs.get(h.key);
    cell.tabIndex = -1;
    cell.setAttribute("aria-label", describe(h));
    cell.title = describe(h);
    cell.lastChild.textContent = state.measure ? num(measureOf(state.measure, h), 2) : "";
    return cell;
  });
  grid.classList.toggle("with-value", Boolean(state.measure));
  grid.replaceChildren();
  if (state.order === "layer") {
    let at = -1;
    let row = null;
    list.forEach((h, i) => {
      if (h.layer !== at) {
        at = h.layer;
        row = el("div", { class: "cells" });
        const layer = layers[at];
        grid.append(el("div", { class: "layer-row" },
          el("div", { class: "layer-label", title: layer.name },
            el("span", { class: "layer-word", text: "Layer " }), el("span", { class: "layer-number", text: layer.index }),
            layer.kind === "cross" && el("span", { class: "layer-kind", text: "cross" })),
          row));
      }
      row.append(cells[i]);
    });
  } else {
    grid.append(el("div", { class: "cells flat" }, ...cells));
  }
  const first = cells.find((c) => c.dataset.key === focused) ?? cells[0];
  if (first) first.tabIndex = 0;
}

/** Cells a visual row holds, read from the layout, so that up and down go where the eye goes. */
function columnsOf(grid) {
  const cells = [...grid.querySelectorAll(".cell")];
  const top = cells[0]?.offsetTop;
  gridColumns = Math.max(1, cells.filter((c) => c.offsetTop === top).length);
  return gridColumns;
}

function drawTable(list) {
  const box = $("table");
  const columns = header.measures;
  const sortable = (name, label, title) => {
    const active = name === "layer" ? state.order === "layer" : name === "role" ? state.order === "role" : state.measure === name && ["up", "down"].includes(state.order);
    const direction = active ? (state.order === "down" ? "descending" : "ascending") : null;
    return el("th", { scope: "col", "aria-sort": direction },
      el("button", { type: "button", class: "sort", title, text: label + (direction ? (direction === "descending" ? " ↓" : " ↑") : ""), "data-sort": name,
        onclick: () => {
          if (name === "layer" || name === "role") state.order = name;
          else {
            state.order = state.measure === name && state.order === "down" ? "up" : "down";
            state.measure = name;
          }
          sync();
          update();
          box.querySelector(`[data-sort="${name}"]`).focus();
        } }));
  };
  const head = el("tr", {}, sortable("layer", "Head", "layer.head"), sortable("role", "Role", "primary role"),
    ...columns.map((m) => sortable(m.name, m.label, m.title)));
  const rows = list.map((h) => el("tr", {},
    el("th", { scope: "row" }, el("button", { type: "button", class: "link", text: h.key, "aria-label": `Open ${describe(h)}`, onclick: () => openHead(h) })),
    el("td", {}, roleChip(h.role)),
    ...columns.map((m) => el("td", { class: `number${m.name === state.measure ? " on" : ""}`, text: num(measureOf(m.name, h)) }))));
  box.replaceChildren(el("table", {}, el("caption", { class: "hidden", text: "Heads and their measures" }), el("thead", {}, head), el("tbody", {}, ...rows)));
}

function roleChip(id) {
  const r = roles.get(id);
  return el("span", { class: "role", style: { "--role": `var(--role-${id})` } }, el("span", { class: "code", text: r.code }), el("span", { text: r.label }));
}

function update() {
  const list = shown();
  $("count").textContent = list.length === heads.length ? `${heads.length} heads` : `${list.length} of ${heads.length} heads`;
  $("grid").hidden = state.view !== "grid";
  $("table").hidden = state.view !== "table";
  if (state.view === "grid") drawGrid(list);
  else drawTable(list);
  $("none").hidden = list.length > 0;
  const m = measures.get(state.measure);
  $("measure-note").textContent = m ? `${m.title}${m.formula ? ` · ${m.formula}` : ""}${m.paper ? ` · ${m.paper}` : ""}` : "";
}

/** Put the state back into the controls (after a change that came from elsewhere). */
function sync() {
  $("measure").value = state.measure;
  $("order").value = state.order;
  $("min").disabled = $("max").disabled = !state.measure;
  for (const option of $("order").options) if (["up", "down"].includes(option.value)) option.disabled = !state.measure;
  for (const b of $("legend").querySelectorAll("button")) b.setAttribute("aria-pressed", String(state.roles.has(b.dataset.role)));
  for (const b of document.querySelectorAll("[data-view]")) b.setAttribute("aria-pressed", String(b.dataset.view === state.view));
  $("clear").hidden = !(state.roles.size || state.search || state.min !== null || state.max !== null);
}

function startGrid() {
  const counts = new Map();
  heads.forEach((h) => counts.set(h.role, (counts.get(h.role) ?? 0) + 1));
  for (const r of header.roles.filter((x) => counts.has(x.id))) {
    $("legend").append(el("button", { type: "button", class: "role", "data-role": r.id, "aria-pressed": "false", title: r.rule, style: { "--role": `var(--role-${r.id})` },
      onclick: () => { state.roles.has(r.id) ? state.roles.delete(r.id) : state.roles.add(r.id); sync(); update(); } },
      el("span", { class: "code", text: r.code }), el("span", { text: r.label }), el("span", { class: "n", text: counts.get(r.id) })));
  }
  for (const m of header.measures) $("measure").append(el("option", { value: m.name, text: m.label }));
  const number = (id) => { const v = $(id).value.trim(); return v === "" || Number.isNaN(Number(v)) ? null : Number(v); };
  $("measure").addEventListener("change", (e) => {
    state.measure = e.target.value;
    if (!state.measure && state.order !== "role") state.order = "layer";
    $("min").value = $("max").value = "";
    state.min = state.max = null;
    const values = heads.map((h) => measureOf(state.measure, h)).filter((v) => v !== null);
    $("min").placeholder = values.length ? `min ${num(Math.min(...values), 2)}` : "min";
    $("max").placeholder = values.length ? `max ${num(Math.max(...values), 2)}` : "max";
    sync(); update();
  });
  $("order").addEventListener("change", (e) => { state.order = e.target.value; sync(); update(); });
  for (const id of ["min", "max"]) $(id).addEventListener("input", () => { state[id] = number(id); sync(); update(); });
  $("search").addEventListener("input", (e) => { state.search = e.target.value; sync(); update(); });
  for (const b of document.querySelectorAll("[data-view]")) b.addEventListener("click", () => { state.view = b.dataset.view; sync(); update(); });
  $("clear").addEventListener("click", () => {
    state.roles.clear();
    state.search = $("search").value = $("min").value = $("max").value = "";
    state.min = state.max = null;
    sync(); update();
    $("search").focus();
  });
  $("grid").classList.toggle("no-maps", !thumbLevel);
  // As many heads as fit in a row; layers of few heads stand side by side.
  const most = Math.max(...layers.map((l) => l.heads));
  const cell = most <= 5 ? 116 : Math.round(Math.min(164, Math.max(76, 1380 / most - 9)));
  $("grid").style.setProperty("--cell", `${cell}px`);
  $("grid").style.setProperty("--row", `${44 + most * (cell + 9)}px`);
  roving($("grid"), () => [...$("grid").querySelectorAll(".cell")], () => columnsOf($("grid")));
  sync();
  update();
}
