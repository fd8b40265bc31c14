// Colours, maps on canvas, and small charts in SVG.

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const roleColour = (id) => css(`--role-${id}`) || css("--role-mixed");

const ramps = new Map();
/** 256 colours from the surface to the role's colour; the strongest end goes a little past it. */
function ramp(role) {
  const key = `${role}/${isDark()}`;
  if (!ramps.has(key)) {
    const low = rgb(css("--map-zero"));
    const mid = rgb(roleColour(role));
    const high = mid.map((v) => (isDark() ? v + (255 - v) * 0.55 : v * 0.45));
    const table = new Uint8ClampedArray(256 * 3);
    for (let i = 0; i < 256; i++) {
      const t = i / 255;
      for (let c = 0; c < 3; c++) {
        table[i * 3 + c] = t < 0.7 ? low[c] + ((mid[c] - low[c]) * t) / 0.7 : mid[c] + ((high[c] - mid[c]) * (t - 0.7)) / 0.3;
      }
    }
    ramps.set(key, table);
  }
  return ramps.get(key);
}

const SCALES = {
  root: (v, max) => Math.sqrt(v / max),
  linear: (v, max) => v / max,
  log: (v, max) => (v <= header.quant.floor ? 0 : 1 - Math.log(v / max) / Math.log(header.quant.floor / max)),
};

/** Paint a map one pixel a cell; CSS enlarges it without smoothing. */
function paintMap(canvas, map, role, scale = "root") {
  canvas.width = map.cols;
  canvas.height = map.rows;
  const ctx = canvas.getContext("2d");
  const image = ctx.createImageData(map.cols, map.rows);
  const table = ramp(role);
  const blank = rgb(css("--map-void"));
  let max = 0;
  for (const v of map.values) if (v > max) max = v;
  const f = SCALES[scale];
  map.values.forEach((v, i) => {
    const p = i * 4;
    if (Number.isNaN(v)) {
      for (let c = 0; c < 3; c++) image.data[p + c] = blank[c];
    } else {
      const t = Math.round(255 * Math.min(1, max > 0 ? f(v, max) : 0)) * 3;
      for (let c = 0; c < 3; c++) image.data[p + c] = table[t + c];
    }
    image.data[p + 3] = 255;
  });
  ctx.putImageData(image, 0, 0);
  return max;
}

/** Round tick values covering [lo, hi]. */
function ticks(lo, hi, count = 4) {
  if (!(hi > lo)) return [lo];
  const raw = (hi - lo) / count;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * unit).find((s) => s >= raw);
  const out = [];
  for (let v = Math.ceil(lo / step - 1e-9) * step; v <= hi + step * 1e-6; v += step) out.push(Math.abs(v) < step * 1e-6 ? 0 : v);
  return out;
}

/** An empty chart with axes: returns the svg and the two scales. xTicks may be [[value, label], ...]. */
function frame(width, height, { x, y, xLabel, yLabel, xTicks, yTicks, label, left = 62 }) {
  const box = { l: left, r: 12, t: 10, b: 38 };
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": label });
  const X = (v) => box.l + ((v - x[0]) / (x[1] - x[0] || 1)) * (width - box.l - box.r);
  const Y = (v) => height - box.b - ((v - y[0]) / (y[1] - y[0] || 1)) * (height - box.t - box.b);
  for (const v of yTicks ?? ticks(y[0], y[1])) {
    root.append(svg("line", { class: "grid", x1: box.l, x2: width - box.r, y1: Y(v), y2: Y(v) }));
    root.append(svg("text", { class: "tick", x: box.l - 6, y: Y(v) + 3.5, "text-anchor": "end", text: num(v) }));
  }
  const xs = xTicks ?? ticks(x[0], x[1], Math.max(2, Math.round(width / 90))).map((v) => [v, num(v)]);
  for (const [v, text] of xs) root.append(svg("text", { class: "tick", x: X(v), y: height - box.b + 15, "text-anchor": "middle", text }));
  root.append(svg("line", { class: "axis", x1: box.l, x2: width - box.r, y1: height - box.b, y2: height - box.b }));
  root.append(svg("text", { class: "axis-label", x: (box.l + width - box.r) / 2, y: height - 5, "text-anchor": "middle", text: xLabel }));
  const mid = (height - box.b + box.t) / 2;
  root.append(svg("text", { class: "axis-label", x: 11, y: mid, "text-anchor": "middle", transform: `rotate(-90 11 ${mid})`, text: yLabel }));
  return { root, X, Y };
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
