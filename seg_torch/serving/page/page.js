// The page of `seg-torch serve` and `seg-torch app`. The server keeps nothing: an image is sent to
// /view, and all that is shown of it afterwards is in that answer.
const find = selector => document.querySelector(selector);
const UNKNOWN = 255, UNKNOWN_COLOUR = [224, 224, 192]; // as in the files
const SHORTEST = 200, LARGEST = 4; // of narrow images: pixels of the shorter side, enlargement
const OUTPUTS = {mask: "png", overlay: "jpg", polygons: "geojson"};

let model = null; // what /info tells
const items = []; // {file, state: waiting, working, done or failed, card, ...} for each image
let chosen = null; // the item that is looked at
let alone = null; // the class that is shown alone
let line = 0.5; // where input and overlay meet, as a part of what is seen of the image

function make(parent, tag, text = "", settings = {}) {
  const child = Object.assign(document.createElement(tag), {textContent: text}, settings);
  parent.append(child);
  return child;
}
const swatch = (parent, colour) => make(parent, "i").style.background = `rgb(${colour})`;
const percent = share =>
  share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
const stem = name => name.replace(/(.)\.[^.]*$/, "$1");
const decode = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));

// ---- The server

async function ask(path, settings = {}) {
  const key = sessionStorage.getItem("key") ?? "";
  const answer = await fetch(path, {...settings, headers: {"X-API-Key": key}}).catch(error => {
    throw error.name === "AbortError" ? error : new Error("the server cannot be reached");
  });
  if (answer.ok) return answer.json();
  if (answer.status === 401) {
    const entered = prompt("This server asks for a key:");
    if (entered) {
      sessionStorage.setItem("key", entered);
      return ask(path, settings);
    }
  }
  const reason = await answer.json().then(content => content.detail, () => null);
  throw new Error(reason ?? `the server answers ${answer.status}`);
}

async function segment(item) {
  mark(item, "working");
  item.start = performance.now();
  item.abort = new AbortController();
  try {
    const limit = model.limits.max_megabytes, megabytes = item.file.size / 1e6;
    if (megabytes > limit) {
      throw new Error(`${item.file.name}: ${megabytes.toFixed(1)} MB; the limit is ${limit} MB`);
    }
    const body = new FormData();
    body.append("file", item.file);
    const answer = await ask("view", {method: "POST", body, signal: item.abort.signal});
    const packed = new Blob([decode(answer.files.pixels)]).stream();
    const plain = packed.pipeThrough(new DecompressionStream("gzip"));
    // Class ids, and then confidences in steps of 1/255.
    answer.pixels = new Uint8Array(await new Response(plain).arrayBuffer());
    for (const [name, content] of Object.entries(answer.files)) {
      answer.files[name] = URL.createObjectURL(new Blob([decode(content)]));
    }
    const total = answer.counts.reduce((sum, count) => sum + count); // of pixels with data
    const colours = [...model.palette.entries(), [UNKNOWN, UNKNOWN_COLOUR]];
    answer.classes = colours
      .map(([id, colour]) =>
        ({id, colour, name: model.names[id] ?? "unknown", share: answer.counts[id] / total}))
      .filter(c => c.share)
      .sort((a, b) => b.share - a.share);
    item.answer = answer;
    item.card.querySelector("img").src = answer.files.image;
    mark(item, "done");
  } catch (error) {
    item.reason = error.message;
    mark(item, "failed");
  }
}

let working = false;
async function work() { // one image at a time: other users wait for one of ours, not for all
  if (working || !model) return;
  working = true;
  for (let item; (item = items.find(i => i.state === "waiting")); ) await segment(item);
  working = false;
}

// ---- The list of images

function add(files) {
  const first = items.length;
  for (const file of files) {
    const item = {file, url: URL.createObjectURL(file)};
    item.card = make(find(".gallery"), "li");
    const button = make(item.card, "button", "", {className: "choose", title: file.name});
    button.onclick = () => show(item);
    const picture = make(button, "span", "", {className: "picture"});
    make(picture, "img", "", {alt: "", src: item.url, onerror() { this.hidden = true; }});
    make(button, "span", file.name, {className: "name"});
    make(button, "span", "", {className: "state"});
    const cross = make(item.card, "button", "×", {className: "remove"});
    cross.ariaLabel = `remove ${file.name}`;
    cross.onclick = () => remove(item);
    items.push(item);
    mark(item, "waiting");
  }
  if (items[first]) show(items[first]);
  work();
}

function mark(item, state) {
  item.state = state;
  item.card.className = `is-${state}`;
  const size = item.answer?.size.join(" × ");
  const texts = {waiting: "waiting", working: "segmenting", done: size, failed: "failed"};
  item.card.querySelector(".state").textContent = texts[state];
  item.card.querySelector("img").hidden &&= state !== "done";
  if (!items.includes(item)) return; // it was removed meanwhile
  if (state === "done") find(".news").textContent = `${item.file.name} is segmented`;
  if (state === "failed") find(".news").textContent = `${item.file.name} failed: ${item.reason}`;
  if (item === chosen) show(item);
}

function remove(item) {
  const place = items.indexOf(item);
  items.splice(place, 1);
  item.abort?.abort();
  item.card.remove();
  for (const url of [item.url, ...Object.values(item.answer?.files ?? {})]) URL.revokeObjectURL(url);
  if (item === chosen) show(items[place] ?? items[place - 1] ?? null);
  (items[place]?.card.querySelector(".remove") ?? find(".drop input")).focus();
}

function tick() { // what shows that something goes on
  const item = items.find(i => i.state === "working");
  if (!item) return;
  const seconds = `${Math.floor((performance.now() - item.start) / 1000)} s`;
  item.card.querySelector(".state").textContent = `segmenting, ${seconds}`;
  if (item === chosen) find(".what").textContent = `${item.file.name}: segmenting, ${seconds}`;
}
setInterval(tick, 500);

// ---- The image that is looked at

function show(item) {
  chosen = item;
  document.body.classList.toggle("empty", !items.length);
  for (const {card} of items) {
    card.querySelector(".choose").ariaPressed = String(card === item?.card);
  }
  const section = {waiting: ".pending", working: ".pending", done: ".view", failed: ".failed"};
  for (const name of [".start", ".pending", ".failed", ".view"]) {
    find(name).hidden = name !== (item ? section[item.state] : ".start");
  }
  if (item?.state === "done") showAnswer(item);
  if (item?.state === "failed") find(".why").textContent = item.reason;
  if (item?.state === "waiting" || item?.state === "working") {
    const what = item.state === "waiting" ? "waiting" : "segmenting";
    find(".what").textContent = `${item.file.name}: ${what}`;
    const image = find(".pending img");
    image.hidden = true;
    image.onload = () => image.hidden = false;
    image.src = item.url;
  }
}

const canvas = find("canvas"), scroll = find(".scroll"), viewer = find(".viewer");
const probe = find(".probe"), spot = find(".spot");

function showAnswer({file, answer}) {
  [canvas.width, canvas.height] = answer.view;
  find(".stage img").src = answer.files.image;
  // All of an image is in the window, small ones enlarged; of a panorama or a tower a part is, so
  // that its shorter side can be seen.
  const [width, height] = answer.view, ratio = width / height;
  const least = `${width * Math.min(SHORTEST / Math.min(width, height), LARGEST)}px`;
  const fitted = `min(100%, ${75 * ratio}svh, ${Math.max(width, 640)}px)`;
  viewer.style.width = `min(100%, max(${fitted}, ${least}))`;
  find(".ends").style.width = `min(100%, max(${fitted}, ${least}, 360px))`;
  find(".stage").style.aspectRatio = ratio; // before the image is there
  find(".stage").style.width = ratio > 1 ? `max(100%, ${least})` : "100%";
  alone = null;
  legend();
  downloads(file);
  draw();
  unprobe();
  scroll.scrollLeft = (scroll.scrollWidth - scroll.clientWidth) / 2;
  scroll.scrollTop = 0;
  const all = scroll.scrollWidth <= scroll.clientWidth && scroll.scrollHeight <= scroll.clientHeight;
  find(".about").textContent =
    `${file.name}, ${answer.size.join(" × ")}, mean confidence ${percent(answer.confidence)}`
    + (all ? "" : "; scroll to see all of it");
  placeLine();
}

function draw() {
  const {pixels, classes} = chosen.answer;
  const table = new Uint32Array(256); // bytes A, B, G, R; the input shows through zeros
  for (const {id, colour: [r, g, b]} of classes) {
    if (id !== UNKNOWN && (alone === null || id === alone)) {
      table[id] = (255 << 24 | b << 16 | g << 8 | r) >>> 0;
    }
  }
  const image = new ImageData(canvas.width, canvas.height);
  const colours = new Uint32Array(image.data.buffer);
  for (let i = 0; i < colours.length; i++) colours[i] = table[pixels[i]];
  canvas.getContext("2d").putImageData(image, 0, 0);
  for (const button of find(".legend").children) {
    button.ariaPressed = String(button.value === String(alone ?? "all"));
  }
}

function legend() {
  const list = find(".legend");
  list.replaceChildren();
  const choose = id => {
    alone = id === alone ? null : id;
    draw();
  };
  for (const {id, name, colour, share} of chosen.answer.classes) {
    const button = make(list, "button", "", {value: id, onclick: () => choose(id)});
    swatch(button, colour);
    make(button, "span", name);
    make(button, "b", percent(share));
  }
  make(list, "button", "all classes", {value: "all", onclick: () => choose(null)});
}

function downloads(file) {
  const list = find(".downloads");
  list.replaceChildren();
  for (const [name, suffix] of Object.entries(OUTPUTS)) {
    const href = chosen.answer.files[name]; // polygons of noise and huge overlays are left out
    if (href) make(list, "a", `↓ ${name}`, {href, download: `${stem(file.name)}.${suffix}`});
  }
}

// ---- The line between input and overlay; class and probability at the cursor

function placeLine() {
  const x = line * scroll.clientWidth;
  find(".handle").style.left = `${x}px`;
  canvas.style.clipPath = `inset(0 0 0 ${100 * (scroll.scrollLeft + x) / canvas.clientWidth}%)`;
  const input = find(".divider");
  input.value = 100 * line;
  input.ariaValueText = `${Math.round(100 * line)} % input`;
}

function probeAt(event) {
  const box = canvas.getBoundingClientRect(), seen = scroll.getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left) / box.width * canvas.width);
  const row = Math.floor((event.clientY - box.top) / box.height * canvas.height);
  const inside = column >= 0 && column < canvas.width && row >= 0 && row < canvas.height;
  if (!inside) return unprobe();
  const {pixels, classes} = chosen.answer, pixel = row * canvas.width + column;
  const label = classes.find(c => c.id === pixels[pixel]);
  if (!label) return unprobe(); // a class of less than a pixel of the view
  const confidence = pixels[canvas.width * canvas.height + pixel] / 255;
  probe.replaceChildren();
  swatch(probe, label.colour);
  probe.append(`${label.name} ${Math.round(100 * confidence)} %`);
  probe.hidden = false;
  const x = event.clientX - seen.left, y = event.clientY - seen.top;
  const right = x > seen.width / 2; // so that it stays inside
  probe.style.left = right ? "auto" : `${x + 14}px`;
  probe.style.right = right ? `${seen.width - x + 14}px` : "auto";
  probe.style.top = `${Math.min(y + 10, seen.height - 30)}px`;
  spot.hidden = event.pointerType === "mouse";
  spot.style.left = `${x}px`;
  spot.style.top = `${y}px`;
}
const unprobe = () => probe.hidden = spot.hidden = true;

let grip = null; // how far from the line it is held while it is dragged
viewer.onpointerdown = event => {
  const isLine = event.target === find(".handle");
  // A mouse takes the line to where it is pressed. A finger scrolls there, or asks for the class.
  if (event.button || !(isLine || (event.pointerType === "mouse" && event.target === canvas))) return;
  const x = event.clientX - scroll.getBoundingClientRect().left;
  grip = isLine ? x - line * scroll.clientWidth : 0;
  viewer.setPointerCapture(event.pointerId);
  viewer.onpointermove(event);
};
viewer.onpointermove = event => {
  if (event.pointerType === "mouse") probeAt(event);
  if (grip === null) return;
  const x = event.clientX - grip - scroll.getBoundingClientRect().left;
  line = Math.min(1, Math.max(0, x / scroll.clientWidth));
  placeLine();
};
viewer.onpointerup = viewer.onpointercancel = () => grip = null;
viewer.onclick = event => probeAt(event); // no click ends a drag of a finger or its scrolling
viewer.onpointerleave = event => event.pointerType === "mouse" && unprobe();
scroll.onscroll = () => {
  unprobe();
  placeLine();
};
find(".divider").oninput = event => {
  line = event.target.value / 100;
  placeLine();
};
new ResizeObserver(placeLine).observe(scroll);

find(".opacity input").oninput = event => {
  canvas.style.opacity = event.target.value / 100;
  find(".opacity output").textContent = `${event.target.value} %`;
};
find(".opacity input").dispatchEvent(new Event("input"));

// ---- The place for images

find(".drop input").onchange = event => {
  add(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
};
find(".again").onclick = () => {
  mark(chosen, "waiting");
  work();
};
document.ondragover = event => {
  event.preventDefault();
  document.body.classList.add("over");
};
document.ondragleave = event => event.relatedTarget || document.body.classList.remove("over");
document.ondrop = event => {
  event.preventDefault();
  document.body.classList.remove("over");
  add(event.dataTransfer.files);
};

async function start() {
  try {
    model = (await ask("info")).model;
  } catch (error) {
    find(".model").textContent = error.message;
    return;
  }
  document.title = `${model.model}: semantic segmentation`;
  find(".model").textContent = `${model.model}, ${model.names.length} classes`;
  const {max_megabytes, max_pixels} = model.limits, megapixels = max_pixels / 1e6;
  find(".takes").textContent = `${model.formats.join(", ")}, up to ${max_megabytes} MB and `
    + `${megapixels < 1 ? megapixels : Math.floor(megapixels)} megapixels. `
    + "Images are sent to this server alone, which does not keep them.";
  model.names.forEach((name, id) => {
    const entry = make(find(".classes"), "li");
    swatch(entry, model.palette[id]);
    entry.append(name);
  });
  find(".start").hidden = items.length > 0;
  work();
}
start();
