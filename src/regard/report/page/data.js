// The page's data: a JSON header and one gzip blob of typed arrays. Nothing here touches the document's markup.

const header = JSON.parse(document.getElementById("regard-header").textContent);

async function inflate(base64) {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser has no DecompressionStream (needs 2023 or later)");
  const text = atob(base64);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

const blob = await inflate(document.getElementById("regard-arrays").textContent.trim());

const VIEWS = { u8: Uint8Array, u16: Uint16Array, u32: Uint32Array, f32: Float32Array };

const opened = new Map();
/** A typed view of one packed array, or null when the atlas did not hold it. */
function array(name) {
  const a = header.arrays[name];
  if (!a) return null;
  if (!opened.has(name)) opened.set(name, new VIEWS[a.dtype](blob, a.offset, a.length));
  return opened.get(name);
}

/** Codes of the log quantiser: 0 stands for "below the floor", 255 for 1. */
const weightOf = (() => {
  const { floor, levels } = header.quant;
  const table = new Float32Array(256);
  for (let c = 1; c <= levels; c++) table[c] = floor * (1 / floor) ** ((c - 1) / (levels - 1));
  return table;
})();

const layers = header.layers;
const heads = [];
layers.forEach((layer, l) => {
  for (let h = 0; h < layer.heads; h++) {
    heads.push({ n: heads.length, layer: l, head: h, key: `${layer.index}.${h}`, role: header.roleOf[l][h], kind: layer.kind });
  }
});
const headByKey = new Map(heads.map((h) => [h.key, h]));
const roles = new Map(header.roles.map((r) => [r.id, r]));
const measures = new Map(header.measures.map((m) => [m.name, m]));
const measureOf = (name, h) => measures.get(name)?.values[h.layer][h.head] ?? null;

/** The tokens a layer's queries or keys stand for: null when only positions are known. */
const axisOf = (h, side) => header.axes[layers[h.layer][side === "q" ? "q_axis" : "k_axis"]] ?? null;

for (const axis of header.axes) axis.small = !header.picture && axis.reduce((n, t) => n + t.length, 0) < 1.6 * axis.length;

const VISIBLE = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "⍽", "\u2028": "⏎", "\u2029": "⏎" };
/** White space made visible; control characters become their picture. */
function visible(text) {
  return Array.from(text, (c) => {
    if (VISIBLE[c]) return VISIBLE[c];
    const code = c.codePointAt(0);
    if (code < 32) return String.fromCodePoint(0x2400 + code);
    if (code === 127) return "␡";
    if ((code >= 0x200b && code <= 0x200f) || (code >= 0x202a && code <= 0x202e) || (code >= 0x2066 && code <= 0x2069) || code === 0xfeff) {
      return `⟨${code.toString(16).toUpperCase()}⟩`; // invisible and direction-changing characters
    }
    return c;
  }).join("") || "∅";
}
const tokenAt = (axis, i) => (axis && i < axis.length ? visible(axis[i]) : "");

/** First position of block b when `length` positions are cut into `count` blocks, as the recorder cuts them. */
const blockStart = (b, length, count) => Math.ceil((b * length) / count);

/** Copy one packed map (lower triangle or full) to a dense Float32Array; NaN marks pairs the mask forbids. */
function dense(codes, offset, rows, cols, tri) {
  const out = new Float32Array(rows * cols);
  let at = offset;
  for (let r = 0; r < rows; r++) {
    const seen = tri ? r + 1 : cols;
    for (let c = 0; c < cols; c++) out[r * cols + c] = c < seen ? weightOf[codes[at + c]] : NaN;
    at += seen;
  }
  return out;
}

function openBlocks(h, maps) {
  const spec = maps.layers[h.layer];
  const cells = spec.tri ? (maps.size * (maps.size + 1)) / 2 : maps.size ** 2;
  const values = dense(array(maps.array), spec.offset + h.head * cells, maps.size, maps.size, spec.tri);
  return { rows: maps.size, cols: maps.size, values, exact: false, qLen: spec.q_len, kLen: spec.kv_len };
}

/** Levels of one head's map, coarse to fine; open() gives {rows, cols, values, exact, ...}. */
function levelsOf(h) {
  const out = [];
  const block = (size, open) => out.push({ id: String(size), label: `${size} × ${size}`, exact: false, open });
  for (const maps of header.maps) {
    if (!maps.layers[h.layer]) continue;
    // Between 32 and 128 lies 64: pooled from the finer one, exactly.
    if (out.length && maps.size === 128) block(64, () => pool(openBlocks(h, maps)));
    block(maps.size, () => openBlocks(h, maps));
  }
  for (const w of windowsOf(h)) out.push({ id: w.id, label: w.label, exact: true, window: w, open: () => openWindow(h, w) });
  return out;
}

/** Halve a block map: masses add over keys and average over queries (blocks of queries may differ by one row). */
function pool(map) {
  const rows = map.rows / 2;
  const cols = map.cols / 2;
  const values = new Float32Array(rows * cols);
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < cols; c++) {
      let sum = 0;
      let seen = false;
      let queries = 0;
      for (let dr = 0; dr < 2; dr++) {
        const n = blockStart(2 * r + dr + 1, map.qLen, map.rows) - blockStart(2 * r + dr, map.qLen, map.rows);
        queries += n;
        for (let dc = 0; dc < 2; dc++) {
          const v = map.values[(2 * r + dr) * map.cols + 2 * c + dc];
          if (!Number.isNaN(v)) { sum += n * v; seen = true; }
        }
      }
      values[r * cols + c] = seen ? sum / Math.max(1, queries) : NaN;
    }
  }
  return { ...map, rows, cols, values };
}

/** Exact windows that hold this head. */
const windowsByLayer = layers.map((_, l) => header.windows.filter((w) => w.layers[l]).map((w) => {
  const spec = w.layers[l];
  const span = ([a, b]) => `${a}–${b - 1}`;
  const label = `exact ${span(spec.rows)}${spec.rows.join() === spec.keys.join() ? "" : ` × ${span(spec.keys)}`}`;
  return { id: w.id, array: w.array, top_weights: w.top_weights, top_keys: w.top_keys, ...spec, label };
}));
const windowsOf = (h) => windowsByLayer[h.layer];

function openWindow(h, w) {
  const rows = w.rows[1] - w.rows[0];
  const cols = w.keys[1] - w.keys[0];
  const cells = w.tri ? (rows * (rows + 1)) / 2 : rows * cols;
  const values = dense(array(w.array), w.offset + h.head * cells, rows, cols, w.tri);
  return { rows, cols, values, exact: true, q0: w.rows[0], k0: w.keys[0], window: w };
}

/** Row `i` (absolute) of a head: weights inside the window and its heaviest keys anywhere. null outside every window. */
function rowOf(h, i) {
  for (const w of windowsOf(h)) {
    if (i < w.rows[0] || i >= w.rows[1]) continue;
    const r = i - w.rows[0];
    const rows = w.rows[1] - w.rows[0];
    const cols = w.keys[1] - w.keys[0];
    const cells = w.tri ? (rows * (rows + 1)) / 2 : rows * cols;
    const start = w.offset + h.head * cells + (w.tri ? (r * (r + 1)) / 2 : r * cols);
    const seen = w.tri ? r + 1 : cols;
    const codes = array(w.array);
    const weights = new Map();
    for (let c = 0; c < seen; c++) {
      const v = weightOf[codes[start + c]];
      if (v > 0) weights.set(w.keys[0] + c, v);
    }
    const outside = [];
    if (w.top) {
      const at = w.top_offset + (h.head * rows + r) * w.top;
      const keys = array(w.top_keys);
      const top = array(w.top_weights);
      for (let t = 0; t < w.top; t++) {
        const v = weightOf[top[at + t]];
        const key = keys[at + t];
        if (v > 0 && (key < w.keys[0] || key >= w.keys[1])) outside.push([key, v]);
      }
    }
    return { weights, outside, window: w };
  }
  return null;
}
