// The picture under a ViT's patches: pick a patch as the query, see the weights over the picture.

function patchOf(i) {
  const [rows, cols] = header.picture.grid;
  const p = i - header.picture.prefix;
  return p >= 0 && p < rows * cols ? [Math.floor(p / cols), p % cols] : null;
}

function startPicture() {
  const { src, grid, prefix, size } = header.picture;
  const [rows, cols] = grid;
  $("text-box").hidden = true;
  $("picture-box").hidden = false;
  $("exact-note").textContent = "Pick a patch as the query; the colour over the picture is the weight each patch gets from it.";
  $("picture").src = src;
  $("picture").width = size[0];
  $("picture").height = size[1];
  for (let i = 0; i < prefix; i++) {
    $("prefix").append(el("button", { type: "button", class: "t", "data-i": i, text: header.axes[0]?.[i] ?? String(i), onclick: () => moveQuery(i) }));
  }
  const overlay = $("overlay");
  overlay.addEventListener("pointerdown", (e) => {
    const box = overlay.getBoundingClientRect();
    const c = Math.min(cols - 1, Math.max(0, Math.floor(((e.clientX - box.left) / box.width) * cols)));
    const r = Math.min(rows - 1, Math.max(0, Math.floor(((e.clientY - box.top) / box.height) * rows)));
    moveQuery(prefix + r * cols + c);
  });
  overlay.addEventListener("keydown", (e) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -cols, ArrowDown: cols }[e.key];
    if (!step || e.ctrlKey || e.metaKey || e.altKey) return;
    e.preventDefault();
    const to = view.query + step;
    if (to >= 0 && to < prefix + rows * cols) moveQuery(to);
  });
  $("opacity").addEventListener("input", () => { overlay.style.opacity = $("opacity").value; });
  overlay.style.opacity = $("opacity").value;
}

function paintPicture(i, weights, max, role) {
  const [rows, cols] = header.picture.grid;
  const overlay = $("overlay");
  overlay.width = cols;
  overlay.height = rows;
  const ctx = overlay.getContext("2d");
  const image = ctx.createImageData(cols, rows);
  const table = ramp(role);
  for (let p = 0; p < rows * cols; p++) {
    const t = Math.sqrt((weights.get(header.picture.prefix + p) ?? 0) / max);
    const at = Math.round(255 * Math.min(1, t)) * 3;
    for (let c = 0; c < 3; c++) image.data[p * 4 + c] = table[at + c];
    image.data[p * 4 + 3] = Math.round(60 + 195 * Math.min(1, t));
  }
  ctx.putImageData(image, 0, 0);
  const patch = patchOf(i);
  const mark = $("patch");
  mark.hidden = !patch;
  if (patch) {
    mark.style.left = `${(100 * patch[1]) / cols}%`;
    mark.style.top = `${(100 * patch[0]) / rows}%`;
    mark.style.width = `${100 / cols}%`;
    mark.style.height = `${100 / rows}%`;
  }
  overlay.setAttribute("aria-label", `Weights over the picture for query ${header.axes[0]?.[i] ?? i}. Arrow keys move the query patch.`);
  const shade = shades(role);
  for (const b of $("prefix").children) {
    const k = Number(b.dataset.i);
    const v = weights.get(k) ?? 0;
    b.classList.toggle("query", k === i);
    b.setAttribute("aria-pressed", String(k === i));
    b.style.backgroundColor = shade(Math.sqrt(v / max));
    b.title = num(v);
  }
}
