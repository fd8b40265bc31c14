// Light or dark: as the reader's system has it, or as they chose on this page.

const isDark = () => document.documentElement.dataset.theme === "dark";
function setTheme(theme, remember) {
  document.documentElement.dataset.theme = theme;
  $("theme").setAttribute("aria-label", theme === "dark" ? "Switch to light" : "Switch to dark");
  $("theme-name").textContent = theme === "dark" ? "Light" : "Dark";
  if (remember) try { localStorage.setItem("regard-theme", theme); } catch { /* a page without storage still works */ }
  redraws.forEach((draw) => draw());
}
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
let chosen = null;
try { chosen = localStorage.getItem("regard-theme"); } catch { /* no storage */ }
setTheme(chosen === "dark" || chosen === "light" ? chosen : prefersDark.matches ? "dark" : "light", false);
prefersDark.addEventListener("change", (e) => { if (!chosen) setTheme(e.matches ? "dark" : "light", false); });
$("theme").addEventListener("click", () => { chosen = isDark() ? "light" : "dark"; setTheme(chosen, true); });

// Paper is light whatever the screen is.
let screenTheme = null;
addEventListener("beforeprint", () => { screenTheme = document.documentElement.dataset.theme; setTheme("light", false); });
addEventListener("afterprint", () => { if (screenTheme) setTheme(screenTheme, false); });
