"use strict";
// Relevance maps over the pictures they explain, as saecore/report/display.py draws them: orange adds, blue takes away, no colour is zero.

const POSITIVE = [226, 88, 12];
const NEGATIVE = [24, 90, 219];
const MOST_OPAQUE = 0.8;
const GROUND = 228; // grey under the pale picture, as in style.css

const page = JSON.parse(document.getElementById("maps").textContent);
const [ROWS, COLUMNS] = page.grid;
// Activations of tokens are one number for each patch, and stand beside the maps of their causes: neither is smoothed unasked.
const DEFAULTS = { method: page.methods[0], scale: 50, sign: 0, shown: true, smooth: !page.beside, mask: false };
const STORED = page.beside ? "token-maps" : "maps";
const choice = { ...DEFAULTS, ...recall(STORED) };
if (!page.methods.includes(choice.method)) choice.method = DEFAULTS.method;

// ---- Numbers.

// int8 in base64 and the value of one step -> the patches' values, row-major.
function decode([text, scale]) {
  return Float32Array.from(atob(text), (letter) => ((letter.charCodeAt(0) << 24) >> 24) * scale);
}

// Gives each sink the value of the nearest other patch, so that interpolation does not spread the sink's own value.
function without(values, sinks) {
  const masked = new Set(sinks);
  if (masked.size === values.length) return new Float32Array(values.length);
  return values.map((value, place) => {
    if (!masked.has(place)) return value;
    const distance = (other) => (Math.floor(place / COLUMNS) - Math.floor(other / COLUMNS)) ** 2 + ((place % COLUMNS) - (other % COLUMNS)) ** 2;
    let nearest = null;
    values.forEach((_, other) => {
      if (!masked.has(other) && (nearest === null || distance(other) < distance(nearest))) nearest = other;
    });
    return values[nearest];
  });
}

// Monotone cubics (Fritsch and Butland 1984) through patch centres that are 1 apart; constant beyond the outermost.
function along(line, pixels) {
  const n = line.length;
  const slope = (k) => {
    const [before, after] = [line[k] - line[k - 1], line[k + 1] - line[k]];
    return k > 0 && k < n - 1 && before * after > 0 ? (2 * before * after) / (before + after) : 0;
  };
  const slopes = Array.from(line, (_, k) => slope(k));
  return Float32Array.from({ length: pixels }, (_, pixel) => {
    const x = Math.min(Math.max(((pixel + 0.5) * n) / pixels - 0.5, 0), n - 1);
    const k = Math.min(Math.floor(x), Math.max(n - 2, 0));
    const t = x - k;
    const next = Math.min(k + 1, n - 1);
    return line[k] * (2 * t ** 3 - 3 * t ** 2 + 1) + slopes[k] * (t ** 3 - 2 * t ** 2 + t) + line[next] * (3 * t ** 2 - 2 * t ** 3) + slopes[next] * (t ** 3 - t ** 2);
  });
}

// A patch grid at every pixel, row-major: down, then across.
function interpolate(values, height, width) {
  const columns = Array.from({ length: COLUMNS }, (_, column) => along(values.filter((_, place) => place % COLUMNS === column), height));
  const spread = new Float32Array(height * width);
  for (let y = 0; y < height; y++) spread.set(along(columns.map((column) => column[y]), width), y * width);
  return spread;
}

function patchAt(y, x, height, width) {
  return Math.floor(((y + 0.5) * ROWS) / height) * COLUMNS + Math.floor(((x + 0.5) * COLUMNS) / width);
}

// ---- Colours.

// Values at every pixel -> colour and opacity; `hatched` says whether a pixel belongs to a masked patch.
function paint(canvas, spread, limit, hatched = () => false) {
  const { width, height } = canvas;
  const image = new ImageData(width, height);
  const period = Math.max(6, height / ROWS / 4);
  spread.forEach((value, pixel) => {
    const hidden = value * choice.sign < 0;
    let colour = value > 0 ? POSITIVE : NEGATIVE;
    let opacity = hidden ? 0 : MOST_OPAQUE * Math.min(Math.abs(value) / Math.max(limit, 1e-30), 1);
    if (hatched(pixel)) {
      const phase = (((pixel % width) + Math.floor(pixel / width)) % period) / Math.max(1, period / 8);
      colour = phase < 1 ? [40, 40, 40] : [235, 235, 235];
      opacity = phase < 2 ? 1 : 0;
    }
    image.data.set([...colour, Math.round(255 * opacity)], 4 * pixel);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// The method of a map or a legend: its own, or the one that is chosen.
const methodOf = (element) => element.dataset.method ?? choice.method;
const limitOf = (section, method) => (page.sections[section].limits[method] ?? 0) * (choice.scale / 100);

function drawMap(canvas, one, method) {
  const given = one.by[method];
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  if (!given || !choice.shown) return;
  const { width, height } = canvas;
  const masked = choice.mask ? new Set(one.sinks) : new Set();
  const values = masked.size ? without(decode(given), one.sinks) : decode(given);
  const patch = (pixel) => patchAt(Math.floor(pixel / width), pixel % width, height, width);
  const spread = choice.smooth ? interpolate(values, height, width) : Float32Array.from({ length: width * height }, (_, pixel) => values[patch(pixel)]);
  paint(canvas, spread, limitOf(one.section, method), masked.size ? (pixel) => masked.has(patch(pixel)) : undefined);
}

// Writes numbers as saecore/report/captions.py does.
function format(value) {
  const size = Math.abs(value);
  const decimals = size >= 100 || !size ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  return `${value < 0 ? "−" : value > 0 ? "+" : ""}${size >= 0.1 || !size ? size.toFixed(decimals) : size.toPrecision(2)}`;
}

function drawLegend(legend) {
  const section = Number(legend.dataset.section);
  const { meanings } = page.sections[section];
  const method = methodOf(legend);
  const signed = page.signed.includes(method);
  const limit = limitOf(section, method);
  const canvas = legend.querySelector("canvas");
  const ramp = Float32Array.from({ length: canvas.width * canvas.height }, (_, pixel) => {
    const share = (pixel % canvas.width) / (canvas.width - 1);
    return signed ? 2 * share - 1 : share;
  });
  paint(canvas, ramp, 1);
  const beyond = choice.scale < 100; // values beyond the limit have full colour too
  legend.querySelector(".low").textContent = signed ? `${beyond ? "≤ " : ""}${format(-limit)}` : "0";
  legend.querySelector(".zero").textContent = signed ? "0" : "";
  legend.querySelector(".high").textContent = `${beyond ? "≥ " : ""}${format(limit)}`;
  legend.querySelector("p").textContent = meanings[method] ?? "";
}

// ---- The page.

function drawPage() {
  document.querySelectorAll("button.map").forEach((button) => {
    const one = page.maps[button.dataset.map];
    const method = methodOf(button);
    const given = one.by[method];
    const canvas = button.querySelector("canvas");
    canvas.setAttribute("aria-label", given ? given[2] : `no map by ${method}`);
    const words = button.closest("figure").querySelector(".words");
    if (words && !button.dataset.method) words.textContent = given ? given[3] : `no map by ${method}`;
    drawMap(canvas, one, method);
  });
  document.querySelectorAll(".legend").forEach(drawLegend);
  document.documentElement.classList.toggle("plain-pictures", !choice.shown);
}

function controls(form) {
  for (const field of form.elements) {
    if (!(field.name in choice)) continue;
    if (field.type === "checkbox") field.checked = choice[field.name];
    else field.value = choice[field.name];
  }
  const hasSinks = page.maps.some((one) => one.sinks.length);
  form.elements.mask.disabled = !hasSinks;
  form.elements.mask.closest("label").title = hasSinks ? "" : "no image here has patches of outlying norm";
  const read = () => {
    choice.scale = Number(form.elements.scale.value);
    choice.sign = Number(form.elements.sign.value);
    for (const name of ["shown", "smooth", "mask"]) choice[name] = form.elements[name].checked;
    if (form.elements.method) choice.method = form.elements.method.value;
    form.querySelector("output").textContent = `${choice.scale} %`;
    remember(STORED, choice);
    drawPage();
  };
  form.addEventListener("input", read);
  form.addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", (event) => {
    if (event.key !== "m" || event.target.closest("input, select") || event.ctrlKey || event.metaKey) return;
    form.elements.shown.click();
  });
  form.hidden = false;
  form.querySelector("output").textContent = `${choice.scale} %`;
}

// ---- One map, large, with the value of each patch.

function enlarge(button) {
  const one = page.maps[button.dataset.map];
  const method = methodOf(button);
  const given = one.by[method];
  if (!given) return;
  const values = decode(given);
  const picture = button.querySelector("img");
  const dialog = document.createElement("dialog");
  dialog.setAttribute("aria-label", given[2]);
  dialog.innerHTML = '<form method="dialog"><p class="title"></p><button>Close</button></form><div class="pair"></div><p class="readout" role="status"></p><p class="quiet hint">Move over the map, or with the arrow keys, to read its patches.</p>';
  dialog.querySelector(".title").textContent = given[2];
  const large = document.createElement("div");
  large.className = "map large";
  large.tabIndex = 0;
  large.setAttribute("role", "img");
  large.setAttribute("aria-label", given[2]);
  const canvas = Object.assign(document.createElement("canvas"), { width: 384, height: 384 });
  const marker = Object.assign(document.createElement("canvas"), { width: 384, height: 384 });
  large.append(picture.cloneNode(), canvas, marker);
  dialog.querySelector(".pair").append(picture.cloneNode(), large);
  // Begins at the strongest patch, as in saecore/query/maps.py; if no patch adds to the target, at the strongest against it.
  const most = Math.max(...values);
  let place = values.indexOf(most > 0 ? most : Math.min(...values));
  const read = () => {
    const [row, column] = [Math.floor(place / COLUMNS), place % COLUMNS];
    const sink = one.sinks.includes(place) ? ", a sink" : "";
    dialog.querySelector(".readout").textContent = `row ${row + 1}, column ${column + 1}: ${format(values[place])} ${page.sections[one.section].units[method]}${sink}`;
    const context = marker.getContext("2d");
    const [height, width] = [marker.height / ROWS, marker.width / COLUMNS];
    context.clearRect(0, 0, marker.width, marker.height);
    for (const [colour, line] of [["#fff", 5], ["#000", 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = line;
      context.strokeRect(column * width, row * height, width, height);
    }
  };
  large.addEventListener("pointermove", (event) => {
    const area = large.getBoundingClientRect();
    const [y, x] = [event.clientY - area.top, event.clientX - area.left];
    if (y < 0 || x < 0 || y >= area.height || x >= area.width) return;
    place = Math.floor((y * ROWS) / area.height) * COLUMNS + Math.floor((x * COLUMNS) / area.width);
    read();
  });
  dialog.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    if (!down && !right) return;
    event.preventDefault();
    const row = Math.min(Math.max(Math.floor(place / COLUMNS) + down, 0), ROWS - 1);
    const column = Math.min(Math.max((place % COLUMNS) + right, 0), COLUMNS - 1);
    place = row * COLUMNS + column;
    read();
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => {
    dialog.remove();
    button.focus();
  });
  document.body.append(dialog);
  drawMap(canvas, one, method);
  read();
  dialog.showModal();
  large.focus();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button.map");
  if (button) enlarge(button);
});
const form = document.getElementById("controls");
if (form) {
  controls(form);
  drawPage();
}
