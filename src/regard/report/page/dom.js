// Elements are made here and nowhere else; text only ever enters through textContent.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attrs, children) {
  for (const [name, value] of Object.entries(attrs)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.entries(value).forEach(([k, v]) => node.style.setProperty(k, v));
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined && c !== false));
  return node;
}
const el = (tag, attrs = {}, ...children) => fill(document.createElement(tag), attrs, children);
const svg = (tag, attrs = {}, ...children) => fill(document.createElementNS(SVG, tag), attrs, children);
const $ = (id) => document.getElementById(id);

/** A figure for people: three significant digits, never in exponent form above 1e-4. */
function num(x, digits = 3) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  const a = Math.abs(x);
  if (a !== 0 && a < 1e-4) return x.toExponential(1);
  if (a >= 1000) return Math.round(x).toLocaleString("en");
  return String(Number(x.toPrecision(digits)));
}
/** A share in percent, to a tenth. */
const percent = (x) => (x === null || Number.isNaN(x) ? "–" : x > 0 && x < 0.0005 ? "< 0.1%" : `${(100 * x).toFixed(1)}%`);
const weightText = (w) => (w > 0 ? num(w) : `< ${num(header.quant.floor)}`);
const headText = (h) => `Layer ${layers[h.layer].index}, head ${h.head}`;

/** Left, right, up, down ... on a set of elements of which one is in the tab order. */
function roving(container, items, columns, onmove) {
  const list = () => items();
  container.addEventListener("keydown", (event) => {
    const all = list();
    const at = all.indexOf(document.activeElement);
    if (at < 0) return;
    const width = columns();
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -width, ArrowDown: width, Home: -at, End: all.length - 1 - at }[event.key];
    if (step === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const next = all[Math.min(all.length - 1, Math.max(0, at + step))];
    all[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    onmove?.(next);
  });
}

/** Call draw(width) now and whenever the box's width changes. */
function onWidth(box, draw) {
  let last = 0;
  new ResizeObserver(() => {
    const width = Math.floor(box.clientWidth);
    if (width && Math.abs(width - last) > 1) { last = width; draw(width); }
  }).observe(box);
}

const redraws = new Set();
/** Things that must be painted again when the theme changes. */
function themed(draw) { redraws.add(draw); return draw; }
