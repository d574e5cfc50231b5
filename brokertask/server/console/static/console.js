// What every page does beside being read: keys, theme, countdowns, and staying up to date.
import { follow } from "./live.js";

const THEME = "brokertask_theme";

function themeSwitch(button) {
  const order = ["", "light", "dark"];
  const words = { "": "Theme: system", light: "Theme: light", dark: "Theme: dark" };
  const root = document.documentElement;
  const show = () => { button.textContent = words[root.dataset.theme ?? ""]; };
  button.hidden = false;
  button.addEventListener("click", () => {
    const next = order[(order.indexOf(root.dataset.theme ?? "") + 1) % order.length];
    if (next) root.dataset.theme = next; else delete root.dataset.theme;
    document.cookie = `${THEME}=${next}; path=/; max-age=31536000; samesite=strict`;
    show();
  });
  show();
}

function countdowns() {
  for (const place of document.querySelectorAll("[data-until]")) {
    const left = Math.round((Number(place.dataset.until) - Date.now()) / 1000);
    place.textContent = left > 0 ? `in ${left} s` : "";
  }
}

function rows() {
  return [...document.querySelectorAll("[data-rows] tr")];
}

function step(by) {
  const all = rows();
  if (!all.length) return;
  const now = all.findIndex((row) => row.hasAttribute("data-here"));
  const next = all[Math.min(all.length - 1, Math.max(0, now + by))];
  all[now]?.removeAttribute("data-here");
  next.setAttribute("data-here", "");
  next.scrollIntoView({ block: "nearest" });
}

function keys() {
  let going = false;
  const help = document.querySelector("[data-keys]");
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    if (event.target.closest("input, textarea, select, [contenteditable]")) return;
    const here = document.querySelector("[data-here]");
    if (going) {
      going = false;
      document.querySelector(`nav a[data-key="${CSS.escape(event.key)}"]`)?.click();
    } else if (event.key === "g") {
      going = true;
    } else if (event.key === "/") {
      event.preventDefault();
      document.querySelector("[data-find]")?.focus();
    } else if (event.key === "j" || event.key === "k") {
      step(event.key === "j" ? 1 : -1);
    } else if (event.key === "x") {
      here?.querySelector("input[type=checkbox]")?.click();
    } else if (event.key === "Enter" && event.target === document.body) {
      here?.querySelector("a")?.click();
    } else if (event.key === "?") {
      help.showModal();
    }
  });
}

const button = document.querySelector("[data-theme-switch]");
if (button) themeSwitch(button);
keys();
countdowns();
setInterval(countdowns, 1000);
const main = document.querySelector("main[data-live]");
if (main) follow(main);
