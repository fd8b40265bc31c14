// Text whose colour has less than 4.5 : 1 against what lies behind it (WCAG AA): a list of element, text, ratio.
() => {
  const parse = (colour) => {
    const [r, g, b, alpha = 1] = colour.match(/[\d.]+/g).map(Number);
    return colour.startsWith("color(") ? [r * 255, g * 255, b * 255, alpha] : [r, g, b, alpha];
  };
  const linear = (v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0) layers.push(colour);
      if (colour[3] >= 1) break;
    }
    const over = (under, top) => [0, 1, 2].map((i) => under[i] * (1 - top[3]) + top[i] * top[3]);
    return layers.reverse().reduce(over, [255, 255, 255]);
  };
  const bad = [];
  const scope = document.querySelector("dialog[open]") ?? document.body;
  for (const e of scope.querySelectorAll("*")) {
    const hasText = [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.textContent.trim());
    if (!hasText || !e.checkVisibility() || e.disabled || e.closest("svg, script, style, option, canvas")) continue;
    const a = luminance(parse(getComputedStyle(e).color));
    const b = luminance(behind(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push(`${e.tagName}.${e.className} ${e.textContent.slice(0, 20)} ${ratio.toFixed(2)}`);
  }
  return bad;
}
