// The page below the place for the files. `props.value` is what `_segment` of app.py returns, an
// image each; everything from choosing an image to the class at the cursor happens here.
const find = selector => element.querySelector(selector);
const stage = find(".stage"), canvas = find("canvas"), probe = find(".probe");
const UNKNOWN = 255;
let shown = null; // the entry
let pixels = null; // its class ids, and then its confidences in steps of 1/255
let alone = null; // the class that is shown alone

const make = (parent, tag, text = "", settings = {}) => {
  const child = Object.assign(document.createElement(tag), {textContent: text}, settings);
  parent.append(child);
  return child;
};
const swatch = (parent, colour) => make(parent, "i").style.background = `rgb(${colour})`;
const percent = share =>
  share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;

function draw() {
  const image = new ImageData(canvas.width, canvas.height);
  const colours = new Map(shown.classes.map(c => [c.id, c.colour]));
  for (let i = 0; i < canvas.width * canvas.height; i++) {
    const id = pixels[i];
    if (id === UNKNOWN || (alone !== null && id !== alone)) continue; // the input shows through
    image.data.set(colours.get(id), 4 * i);
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function choose(id) {
  alone = id === alone ? null : id;
  for (const button of find(".legend").children) {
    button.ariaPressed = String(button.value === String(alone ?? "all"));
  }
  draw();
}

function legend() {
  const list = find(".legend");
  list.replaceChildren();
  for (const {id, name, colour, share} of shown.classes) {
    const button = make(list, "button", "", {value: id, onclick: () => choose(id)});
    swatch(button, colour);
    make(button, "span", name);
    make(button, "b", percent(share));
  }
  make(list, "button", "all classes", {value: "all", onclick: () => choose(null)});
}

function links() {
  const list = find(".downloads");
  list.replaceChildren();
  for (const [name, href] of Object.entries(shown.downloads)) {
    make(list, "a", `↓ ${name}`, {href, download: ""});
  }
}

async function show(entry) {
  shown = entry;
  for (const button of find(".gallery").children) {
    button.ariaPressed = String(button.value === entry?.pixels);
  }
  find(".view").hidden = true;
  if (!entry) return;
  const response = await fetch(entry.pixels);
  const plain = response.body.pipeThrough(new DecompressionStream("gzip"));
  const content = new Uint8Array(await new Response(plain).arrayBuffer());
  if (shown !== entry) return; // another one was chosen meanwhile
  pixels = content;
  [canvas.width, canvas.height] = entry.view;
  find(".stage img").src = entry.image;
  const [width, height] = entry.view; // small images are enlarged, and all of it is in the window
  find(".frame").style.width = `min(100%, ${76 * width / height}vh, ${Math.max(width, 640)}px)`;
  find(".about").textContent =
    `${entry.name}, ${entry.size.join(" × ")}, mean confidence ${percent(entry.confidence)}`;
  alone = null;
  legend();
  links();
  choose(null);
  find(".view").hidden = false;
}

function gallery() {
  const entries = Array.isArray(props.value) ? props.value : [];
  const list = find(".gallery");
  list.hidden = entries.length < 2;
  list.replaceChildren();
  for (const entry of entries) {
    const settings = {value: entry.pixels, title: entry.name, onclick: () => show(entry)};
    const button = make(list, "button", "", settings);
    make(button, "img", "", {src: entry.image, alt: ""});
    make(button, "span", entry.name);
  }
  // While further images arrive, the one that is looked at stays.
  const same = entries.find(entry => entry.pixels === shown?.pixels);
  if (!same) return show(entries[0] ?? null);
  for (const button of list.children) button.ariaPressed = String(button.value === same.pixels);
}

stage.onpointermove = event => {
  const box = canvas.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const column = Math.floor(x / box.width * canvas.width);
  const row = Math.floor(y / box.height * canvas.height);
  probe.hidden = !(column >= 0 && column < canvas.width && row >= 0 && row < canvas.height);
  if (probe.hidden) return;
  const place = row * canvas.width + column;
  const label = shown.classes.find(c => c.id === pixels[place]);
  const confidence = pixels[canvas.width * canvas.height + place] / 255;
  probe.replaceChildren();
  swatch(probe, label.colour);
  probe.append(`${label.name} ${Math.round(100 * confidence)} %`);
  const right = x > box.width / 2; // so that it stays inside
  probe.style.left = right ? "auto" : `${x + 14}px`;
  probe.style.right = right ? `${box.width - x + 14}px` : "auto";
  probe.style.top = `${Math.min(y + 10, box.height - 28)}px`;
};
stage.onpointerleave = () => probe.hidden = true;

find(".divider").oninput = event => {
  find(".handle").style.left = `${event.target.value}%`;
  canvas.style.clipPath = `inset(0 0 0 ${event.target.value}%)`;
};
find(".opacity input").oninput = event => {
  canvas.style.opacity = event.target.value / 100;
  find(".opacity output").textContent = `${event.target.value} %`;
};
for (const input of [find(".divider"), find(".opacity input")]) {
  input.dispatchEvent(new Event("input"));
}
watch("value", gallery);
gallery();
