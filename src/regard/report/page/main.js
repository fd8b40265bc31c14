// Start: sections, hash.

startGrid();
startLayers();
startTokens();

function followHash() {
  const h = headByKey.get(decodeURIComponent(location.hash.slice(1)));
  if (h) openHead(h);
  else if (dialog.open) closeHead();
}
addEventListener("hashchange", followHash);
followHash();
document.documentElement.dataset.ready = "true";
