"use strict";
// For every page: the theme, the keys, tables that sort. Runs before the page is drawn, so that the theme does not flash.

// The browser keeps what a person chose. Where it keeps nothing, a choice holds for one page.
function recall(name) {
  try {
    return JSON.parse(localStorage.getItem(`saecore-${name}`));
  } catch {
    return null;
  }
}

function remember(name, value) {
  try {
    localStorage.setItem(`saecore-${name}`, JSON.stringify(value));
  } catch {
    // A private window keeps nothing.
  }
}

document.documentElement.classList.add("js");
if (["light", "dark"].includes(recall("theme"))) document.documentElement.dataset.theme = recall("theme");

document.addEventListener("DOMContentLoaded", () => {
  themeButton(document.getElementById("theme"));
  document.querySelectorAll("table.sortable").forEach(sortable);
});

function themeButton(button) {
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
  const say = () => (button.textContent = isDark() ? "Light" : "Dark");
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    remember("theme", document.documentElement.dataset.theme);
    say();
  });
  prefersDark.addEventListener("change", say);
  button.hidden = false;
  say();
}

document.addEventListener("keydown", (event) => {
  const writes = event.target.closest("input, select, textarea, dialog");
  if (writes || event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const step = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  const link = step && document.querySelector(`a[rel=${step}]`);
  if (link) link.click();
  if (event.key === "/") {
    event.preventDefault();
    document.getElementById("search").select();
  }
});

// Each heading becomes a button. It sorts numbers with the largest first, and words by the alphabet; empty cells come last.
function sortable(table) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    if (heading.classList.contains("still")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const valueOf = (row) => row.cells[column].dataset.value;
      const isNumber = heading.classList.contains("number");
      const order = heading.getAttribute("aria-sort");
      const rising = order ? order === "descending" : !isNumber;
      const compare = (a, b) => (isNumber || !Number.isNaN(a * b) ? a - b : a.localeCompare(b)) * (rising ? 1 : -1);
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [valueOf(a), valueOf(b)];
        return x === "" || y === "" ? (x === "") - (y === "") : compare(x, y);
      });
      table.querySelectorAll("[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
      body.append(...rows);
    });
  });
}
