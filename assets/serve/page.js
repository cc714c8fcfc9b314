"use strict";
// The search page. What comes from captions, paths and queries is set as text, never as markup.

const PAGE_HITS = 60;
const at = (id) => document.getElementById(id);
const fields = { text: at("text"), minus: at("minus"), within: at("within"), min: at("min") };
const hits = at("hits");
let like = ""; // number of an image of the collection
let image = null; // an image dropped, pasted or chosen: a Blob
let shown = new Set();
let search = 0; // number of the newest search: answers to earlier ones are dropped
let hasMore = false;
let isLoading = false;

function words() {
  const found = new URLSearchParams();
  for (const [name, field] of Object.entries(fields)) if (field.value.trim()) found.set(name, field.value.trim());
  if (like) found.set("like", like);
  return found;
}

function say(text, isError = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", isError);
}

function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function card(hit) {
  const item = make("li");
  const button = make("button");
  button.type = "button";
  button.title = "Find images like this one";
  button.addEventListener("click", () => searchLike(String(hit.id)));
  const thumbnail = make("img");
  thumbnail.loading = "lazy";
  thumbnail.alt = hit.caption || hit.path.split("/").pop();
  thumbnail.addEventListener("error", () => button.replaceChildren("image cannot be read"));
  thumbnail.src = `thumbnails/${hit.id}`;
  button.append(thumbnail);
  const below = make("div", "words");
  const place = make("div", "place");
  place.append(make("span", "", hit.rank), make("span", "", hit.score.toFixed(3)));
  const link = make("a", "", hit.path);
  link.href = `images/${hit.id}`;
  link.target = "_blank";
  link.rel = "noopener";
  below.append(place);
  if (hit.caption) below.append(make("p", "", hit.caption));
  below.append(link);
  item.append(button, below);
  return item;
}

async function load(number) {
  isLoading = true;
  const asked = words();
  asked.set("k", PAGE_HITS);
  asked.set("offset", shown.size);
  try {
    const sent = image ? { method: "POST", body: image } : {};
    const response = await fetch(`search?${asked}`, sent);
    const answer = await response.json();
    if (number !== search) return;
    if (!response.ok) throw new Error(answer.error);
    const fresh = answer.hits.filter((hit) => !shown.has(hit.id));
    fresh.forEach((hit) => shown.add(hit.id));
    hits.append(...fresh.map(card));
    hasMore = answer.hits.length === PAGE_HITS && fresh.length > 0;
    const [within, all] = [answer.num_within, answer.num_indexed].map((count) => count.toLocaleString("en"));
    const among = within === all ? all : `${within} (all: ${all})`;
    say(`${shown.size.toLocaleString("en")} of ${among} images shown, ${answer.seconds.toFixed(2)} s`);
    at("hint").textContent = shown.size ? "" : "No image has such a score.";
  } catch (error) {
    if (number !== search) return;
    hasMore = false;
    say(error.message === "Failed to fetch" ? "declip has ended; start it again" : error.message, true);
  } finally {
    if (number === search) isLoading = false;
  }
  if (number === search) requestAnimationFrame(loadMore);
}

function loadMore() {
  const isNear = at("hint").getBoundingClientRect().top < 2 * window.innerHeight;
  if (hasMore && !isLoading && isNear) load(search);
}

function begin() {
  search += 1;
  shown = new Set();
  hasMore = false;
  hits.replaceChildren();
  showExample();
  at("hint").textContent = "";
  const asked = words();
  if (!asked.has("text") && !like && !image) {
    isLoading = false;
    say("");
    at("hint").append("Type what to look for or drop an image; select an image that was found to see others like it. ",
      make("kbd", "", "/"), " goes to the text, arrow keys move among images, ", make("kbd", "", "Esc"), " starts over.");
    return;
  }
  say("Searching…");
  load(search);
}

function showExample() {
  at("example").hidden = !like && !image;
  if (at("example-image").src.startsWith("blob:")) URL.revokeObjectURL(at("example-image").src);
  if (image) at("example-image").src = URL.createObjectURL(image);
  else if (like) at("example-image").src = `thumbnails/${like}`;
  at("example-name").textContent = image ? `Images like ${image.name || "this one"}` : "Images like this one";
}

// Each search has an address of its own, so that "back" leads to the one before; a dropped image has none.
function remember() {
  history.pushState(null, "", `?${words()}`);
  begin();
}

function restore() {
  const asked = new URLSearchParams(location.search);
  for (const [name, field] of Object.entries(fields)) field.value = asked.get(name) || "";
  like = asked.get("like") || "";
  image = null;
  begin();
}

function searchLike(number) {
  like = number;
  image = null;
  fields.text.value = fields.minus.value = "";
  window.scrollTo(0, 0);
  remember();
}

function searchImage(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) return say(`${file.name} is not an image`, true);
  image = file;
  like = "";
  remember();
}

function clear() {
  for (const field of Object.values(fields)) field.value = "";
  like = "";
  image = null;
  remember();
  fields.text.focus();
}

function moveFocus(event) {
  const buttons = [...hits.querySelectorAll("button")];
  const here = buttons.indexOf(document.activeElement);
  if (here < 0) {
    if (event.key === "ArrowDown" && document.activeElement === fields.text && buttons.length) {
      event.preventDefault();
      buttons[0].focus();
    }
    return;
  }
  const columns = getComputedStyle(hits).gridTemplateColumns.split(" ").length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  if (here + step < 0) fields.text.focus();
  else (buttons[here + step] || buttons[buttons.length - 1]).focus();
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); remember(); });
for (const field of [fields.within, fields.min]) field.addEventListener("change", remember);
at("file").addEventListener("change", (event) => { searchImage(event.target.files[0]); event.target.value = ""; });
at("example-clear").addEventListener("click", () => { like = ""; image = null; remember(); });
document.addEventListener("keydown", (event) => {
  const isTyping = document.activeElement instanceof HTMLInputElement;
  if (event.key === "/" && !isTyping) { event.preventDefault(); fields.text.focus(); fields.text.select(); }
  else if (event.key === "Escape") clear();
  else moveFocus(event);
});
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  searchImage(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => searchImage(event.clipboardData.files[0]));
window.addEventListener("scroll", loadMore, { passive: true });
window.addEventListener("resize", loadMore);
window.addEventListener("popstate", restore);

fetch("info").then((response) => response.json()).then((info) => {
  document.title = `${info.collection} – declip search`;
  fields.text.placeholder = `Describe an image among ${info.num_indexed.toLocaleString("en")}`;
  at("folders").append(...info.folders.map((folder) => new Option("", folder)));
});
restore();
