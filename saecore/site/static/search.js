"use strict";
// Latents by word or number, images by name: in the report's own list, or asked of the explorer.

const MOST = 60; // of each are shown, and answered by the explorer
const box = document.getElementById("search");
const NOTHING = document.getElementById("found").textContent;
const live = "live" in document.documentElement.dataset;

// {latents: [[number, name, other words, images]], images: [[number, name]], targets: [[place, name]]}, the best first.
async function find(text) {
  if (live) return (await fetch(`search.json?q=${encodeURIComponent(text)}`)).json();
  const wanted = text.toLowerCase();
  const named = (latent) => latent[1].toLowerCase();
  const latents = window.searchIndex.latents.filter(
    (latent) => String(latent[0]) === wanted || named(latent).includes(wanted) || latent[2].some((word) => word.toLowerCase().includes(wanted)),
  );
  const place = (latent) => (String(latent[0]) === wanted ? 0 : named(latent) === wanted ? 1 : named(latent).includes(wanted) ? 2 : 3);
  latents.sort((a, b) => place(a) - place(b) || b[3] - a[3]);
  const [images, targets] = [window.searchIndex.images, window.searchIndex.targets].map((named) => named.filter(([, name]) => name.toLowerCase().includes(wanted)));
  return { latents, images, targets };
}

function item(address, words, more) {
  const link = Object.assign(document.createElement("a"), { href: address, textContent: words });
  const note = Object.assign(document.createElement("span"), { className: "quiet", textContent: more });
  const found = document.createElement("li");
  found.append(link, " ", note);
  return found;
}

function list(title, items) {
  if (!items.length) return [];
  const heading = Object.assign(document.createElement("h2"), { textContent: title });
  const shown = Object.assign(document.createElement("ul"), { className: "results" });
  shown.append(...items.slice(0, MOST));
  return [heading, shown];
}

const count = (items, word) => `${items.length.toLocaleString("en")}${live && items.length === MOST ? " or more" : ""} ${word}${items.length === 1 ? "" : "s"}`;

let asked = 0;
async function show() {
  const text = box.value.trim();
  const turn = ++asked;
  const address = new URL(location.href);
  address.searchParams.set("q", text);
  history.replaceState(null, "", address);
  const found = text ? await find(text) : { latents: [], images: [], targets: [] };
  if (turn !== asked) return; // an answer to what was typed before
  const matching = (words) => words.filter((word) => word.toLowerCase().includes(text.toLowerCase()));
  const also = (words) => (matching(words).length ? `; also ${matching(words).join(", ")}` : "");
  const latents = found.latents.map(([number, name, words, images]) =>
    item(`latents/${number}.html`, name ? `latent ${number}, ${name}` : `latent ${number}`, `${images.toLocaleString("en")} image${images === 1 ? "" : "s"}${also(words)}`),
  );
  const images = found.images.map(([number, name]) => item(`images/${number}.html`, name, `image ${number}`));
  const targets = found.targets.map(([place, name]) => item(`targets/${place}.html`, name, ""));
  document.getElementById("results").replaceChildren(...list("Latents", latents), ...list("Texts and concepts", targets), ...list("Images", images));
  const counts = `${count(latents, "latent")}, ${targets.length ? `${count(targets, "target")}, ` : ""}${count(images, "image")}`;
  document.getElementById("found").textContent = text ? `${counts} for “${text}”` : NOTHING;
}

box.value = new URLSearchParams(location.search).get("q") ?? "";
box.addEventListener("input", show);
box.form.addEventListener("submit", (event) => {
  event.preventDefault();
  document.querySelector("#results a")?.focus();
});
box.focus();
show();
