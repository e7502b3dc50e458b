"use strict";
// Finds latents by word or number, texts and concepts by word, images by file name: in the report's list, or with the explorer.

const MOST = 60; // of each kind are shown; saecore/report/explorer.py answers with as many
const PAUSE = 120; // ms after the last key until the explorer is asked
const box = document.getElementById("search");
const NOTHING = document.getElementById("found").textContent;
const live = "live" in document.documentElement.dataset;
const EMPTY = { latents: [], images: [], targets: [] };

// ---- The rule, as in saecore/query/search.py and saecore/query/finding.py.

const INSIDE = 4; // the rank of a word that occurs only inside another

const split = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);
const wordsOf = (text) => [...split(text), ...(text.toLowerCase().match(/[\p{L}\p{N}_]+/gu) ?? [])];

function rankOfWord(word, name, others) {
  const own = wordsOf(name);
  const more = others.flatMap(wordsOf);
  const begins = (one) => one.startsWith(word);
  const occurs = [own.includes(word), more.includes(word), own.some(begins), more.some(begins), [name, ...others].some((text) => text.toLowerCase().includes(word))];
  return occurs.includes(true) ? occurs.indexOf(true) : Infinity;
}

// The worst rank of a query's words; infinite if one of them does not occur.
const rank = (words, name, others) => Math.max(...words.map((word) => rankOfWord(word, name, others)));

// The items with a rank, the best first. Items with the rank INSIDE count only if no item has a better one.
function matching(items, rankOf, order = () => 0) {
  const ranked = items.map((item) => [rankOf(item), item]).filter(([rank]) => rank < Infinity);
  const outside = ranked.some(([rank]) => rank < INSIDE);
  const kept = ranked.filter(([rank]) => rank < INSIDE || !outside);
  return kept.sort(([a, one], [b, other]) => a - b || order(one, other)).map(([, item]) => item);
}

// In a file's name everything but letters and digits separates words. Two tests: the word is whole, or a word begins with it.
function fileWord(word) {
  const literal = word.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
  return ["$|[^\\p{L}\\p{N}]", ""].map((end) => new RegExp(`(^|[^\\p{L}\\p{N}])${literal}(${end})`, "u"));
}

function rankOfFile(words, [number, name], text) {
  if (String(number) === text) return -1;
  const lower = name.toLowerCase();
  const ranks = words.map(([word, [whole, begins]]) => (!lower.includes(word) ? Infinity : whole.test(lower) ? 0 : begins.test(lower) ? 1 : 2));
  return Math.max(...ranks);
}

// {latents: [[number, name, other words, images, valid, score, strongest image]], images: [[number, name]], targets: [[place, words]],
// missing: images without a picture, in a written report}, the best first.
async function find(text) {
  if (live) return (await fetch(`search.json?q=${encodeURIComponent(text)}`)).json();
  const { latents, images, targets, missing } = window.searchIndex;
  const words = split(text);
  const fileWords = words.map((word) => [word, fileWord(word)]);
  return {
    latents: matching(
      latents,
      (one) => (String(one[0]) === text ? -1 : rank(words, one[1], one[2])),
      (a, b) => b[4] - a[4] || b[5] - a[5] || a[0] - b[0],
    ),
    images: images
      .map((one) => [rankOfFile(fileWords, one, text), one])
      .filter(([rank]) => rank < Infinity)
      .sort(([a, one], [b, other]) => a - b || one[0] - other[0])
      .map(([, one]) => one),
    targets: matching(targets, (one) => rank(words, one[1], [])),
    missing,
  };
}

// ---- What is shown.

function element(tag, className, ...content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

function thumbnail(number, missing) {
  const address = missing.includes(number) ? "static/no-picture.svg" : `pictures/${number}.webp`;
  return Object.assign(new Image(48, 48), { loading: "lazy", alt: "", src: address });
}

// A link, with a picture before it if there is one, and with more words after it.
function item(address, picture, words, more) {
  const link = Object.assign(element("a", "", ...words), { href: address });
  const text = element("span", "", link, " ", element("span", "quiet", more));
  return picture ? element("li", "found", picture, text) : element("li", "", text);
}

function latentItem([number, name, others, images, valid, , strongest], words, missing) {
  const sign = element("span", "", " ?");
  sign.setAttribute("aria-hidden", "true");
  const unsure = [sign, element("span", "hidden", " (not certain)")];
  const called = name ? [", ", element("span", valid ? "" : "unsure", name, ...(valid ? [] : unsure))] : [];
  const least = rank(words, name, others) < INSIDE ? INSIDE : Infinity; // “checkered” is no reason to show if “red” itself fits
  const also = rank(words, name, []) < least ? [] : others.filter((other) => words.some((word) => rankOfWord(word, other, []) < least));
  const more = `${images.toLocaleString("en")} image${images === 1 ? "" : "s"}${also.length ? `; also ${also.join(", ")}` : ""}`;
  return item(`latents/${number}.html`, strongest === null ? null : thumbnail(strongest, missing), [`latent ${number}`, ...called], more);
}

function list(title, items) {
  return items.length ? [element("h2", "", title), element("ul", "results", ...items.slice(0, MOST))] : [];
}

const count = (items, word) => `${items.length.toLocaleString("en")}${live && items.length === MOST ? " or more" : ""} ${word}${items.length === 1 ? "" : "s"}`;

let asked = 0;
async function show() {
  const text = box.value.trim();
  const turn = ++asked;
  const address = new URL(location.href);
  address.searchParams.set("q", text);
  history.replaceState(null, "", address);
  const found = text ? await find(text) : EMPTY;
  if (turn !== asked) return; // the answer to an earlier text
  const [words, missing] = [split(text), found.missing ?? []];
  const latents = found.latents.slice(0, MOST).map((one) => latentItem(one, words, missing));
  const targets = found.targets.slice(0, MOST).map(([place, name]) => item(`targets/${place}.html`, null, [name], ""));
  const images = found.images.slice(0, MOST).map(([number, name]) => item(`images/${number}.html`, thumbnail(number, missing), [name], ""));
  document.getElementById("results").replaceChildren(...list("Latents", latents), ...list("Texts and concepts", targets), ...list("Images", images));
  const others = found.targets.length ? `${found.targets.length} ${found.targets.length === 1 ? "text or concept" : "texts and concepts"}, ` : "";
  const counts = `${count(found.latents, "latent")}, ${others}${count(found.images, "image")}`;
  document.getElementById("found").textContent = text ? `${counts} for “${text}”` : NOTHING;
}

let waiting;
function showSoon() {
  clearTimeout(waiting);
  waiting = setTimeout(show, live ? PAUSE : 0);
}

// Arrow keys go from the box through the results and back.
function step(event) {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const stops = [box, ...document.querySelectorAll("#results a")];
  const place = stops.indexOf(document.activeElement);
  if (!by || place < 0 || !stops[place + by]) return;
  event.preventDefault();
  stops[place + by].focus();
}

box.value = new URLSearchParams(location.search).get("q") ?? "";
box.addEventListener("input", showSoon);
box.form.addEventListener("submit", (event) => {
  event.preventDefault();
  document.querySelector("#results a")?.focus();
});
document.addEventListener("keydown", step);
box.focus();
show();
