// The model by layer: one dot a head, the line through the layers' means; role counts as stacked bars.

const BY_LAYER = [
  ["sink", "Sinks", "mass on the first token"],
  ["distance_norm", "Distance", "mean distance / longest possible"],
  ["entropy", "Entropy", "mean entropy (nats)"],
];

function drawDots(box, width, name, yLabel) {
  const points = heads.map((h) => ({ h, v: measureOf(name, h) })).filter((p) => p.v !== null);
  const max = Math.max(...points.map((p) => p.v), 1e-6);
  const last = layers.length - 1;
  const { root, X, Y } = frame(width, 220, { x: [-0.5, last + 0.5], y: [0, max * 1.04], xLabel: "layer", yLabel, label: `${yLabel} of every head by layer`,
    xTicks: layerTicks(width) });
  const means = layers.map((_, l) => {
    const of = points.filter((p) => p.h.layer === l);
    return of.length ? [X(l), Y(of.reduce((a, p) => a + p.v, 0) / of.length)] : null;
  }).filter(Boolean);
  root.append(svg("path", { class: "line mean", d: path(means) }));
  const room = Math.min(26, (width - 60) / layers.length) * 0.7;
  for (const { h, v } of points) {
    const n = layers[h.layer].heads;
    const dot = svg("circle", { class: "head-dot", cx: X(h.layer) + (n > 1 ? (h.head / (n - 1) - 0.5) * room : 0), cy: Y(v), r: 3.6, style: { "--role": `var(--role-${h.role})` }, onclick: () => openHead(h) });
    dot.append(svg("title", { text: `${headText(h)}, ${roles.get(h.role).label}: ${num(v)}` }));
    root.append(dot);
  }
  box.replaceChildren(root);
}

function layerTicks(width) {
  const every = Math.ceil(layers.length / Math.max(2, Math.floor((width - 60) / 26)));
  return layers.map((l, i) => [i, String(l.index)]).filter((_, i) => i % every === 0);
}

function drawCounts(box, width) {
  const most = Math.max(...layers.map((l) => l.heads));
  const { root, X, Y } = frame(width, 220, { x: [-0.5, layers.length - 0.5], y: [0, most], xLabel: "layer", yLabel: "heads", label: "Roles by layer", xTicks: layerTicks(width) });
  const w = Math.min(34, ((width - 60) / layers.length) * 0.72);
  layers.forEach((layer, l) => {
    let y = 0;
    for (const r of header.roles) {
      const n = header.roleOf[l].filter((x) => x === r.id).length;
      if (!n) continue;
      const height = Y(y) - Y(y + n);
      const rect = svg("rect", { class: "role-bar", x: X(l) - w / 2, y: Y(y + n) + 0.5, width: w, height: Math.max(0.5, height - 1), style: { "--role": `var(--role-${r.id})` } });
      rect.append(svg("title", { text: `Layer ${layer.index}: ${n} ${r.label}` }));
      root.append(rect);
      if (height > 13 && w > 15) root.append(svg("text", { class: "bar-code", x: X(l), y: Y(y + n / 2) + 3.5, "text-anchor": "middle", text: r.code }));
      y += n;
    }
  });
  box.replaceChildren(root);
}

function startLayers() {
  const figure = (title, note, draw) => {
    const box = el("div", { class: "chart-box" });
    $("layer-plots").append(el("figure", { class: "card" }, el("figcaption", {}, el("strong", { text: title }), note && el("span", { text: note })), box));
    onWidth(box, (width) => draw(box, width));
  };
  for (const [name, title, yLabel] of BY_LAYER) {
    if (heads.some((h) => measureOf(name, h) !== null)) figure(title, yLabel, (box, width) => drawDots(box, width, name, yLabel));
  }
  figure("Roles", "heads of each role", drawCounts);
}
