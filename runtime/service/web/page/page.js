// The page of wanforge's server: the form that submits videos, the API key, and the server's state.

import { ApiError, askJson, keyOf, whenKeyIsWanted } from "./api.js";
import { at, cardOf, chooseThese, openGallery, tell, whenPressed } from "./gallery.js";
import { openLive, watchLive } from "./live.js";

const HEALTH_MS = 10000;
const FIELDS = ["prompt", "model", "size", "frames", "steps", "seed"];

let models = [];
const modelOf = (id) => models.find((model) => model.id === id);

// ---- the form

function modelChanged() {
  const model = modelOf(at("model").value);
  if (!model) return;
  at("picture-field").hidden = model.task !== "i2v" && !model.live;
  at("steps").disabled = model.live; // such models have steps of their own
  at("watch").hidden = !model.live;
  at("size").placeholder = model.size;
  at("frames").placeholder = model.frames;
  at("steps").placeholder = model.steps;
  at("frames-hint").textContent = `4n + 1, at ${model.fps} a second`;
  const sizes = [model.size, ...model.sizes];
  at("sizes").replaceChildren(...[...new Set(sizes)].map((size) => new Option(size)));
  const others = models.filter((other) => other.id !== model.id && other.task === model.task);
  const options = [["", "nothing"], ["seed", "another seed"], ...others.map((other) => [other.id, other.id])];
  at("versus").replaceChildren(...options.map(([value, words]) => new Option(words, value)));
}

function showProblem(error) {
  const field = error.param && at(`${error.param}-error`);
  (field || at("form-error")).textContent = error.message;
  const input = error.param && document.querySelector(`[name="${error.param}"]`);
  if (field && input) {
    input.setAttribute("aria-invalid", "true");
    input.focus();
  }
}

function clearProblems() {
  for (const each of document.querySelectorAll(".error")) each.textContent = "";
  for (const each of document.querySelectorAll("[aria-invalid]")) each.removeAttribute("aria-invalid");
}

function wanted() {
  const data = new FormData();
  for (const name of FIELDS) {
    const value = at(name).disabled ? "" : at(name).value.trim();
    if (value) data.set(name, value);
  }
  const picture = at("picture").files[0];
  if (picture && !at("picture-field").hidden) data.set("input_reference", picture);
  return data;
}

const LIVE_FIELDS = ["prompt", "model", "size", "seed"];

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// A number as JSON can hold it; JavaScript would round a larger one, and a text that is none is told as the server does.
function wholeNumber(name, text) {
  const number = Number(text);
  if (Number.isSafeInteger(number)) return number;
  throw new ApiError(`${name} is ${text}; give a whole number up to ${Number.MAX_SAFE_INTEGER}`, name, "invalid_value", 400);
}

async function watch() {
  clearProblems();
  at("watch").disabled = true;
  try {
    const fields = {};
    for (const name of LIVE_FIELDS) {
      const value = at(name).value.trim();
      if (value) fields[name] = name === "seed" ? wholeNumber(name, value) : value;
    }
    const picture = at("picture").files[0];
    if (picture) fields.input_reference = await dataUrl(picture);
    await watchLive(fields);
  } catch (error) {
    showProblem(error);
  } finally {
    at("watch").disabled = false;
  }
}

const post = (body, headers = {}) => askJson("v1/videos", { method: "POST", body, headers });

async function submit(event) {
  event.preventDefault();
  clearProblems();
  at("submit").disabled = true;
  try {
    const first = cardOf(await post(wanted()));
    if (at("versus").value) {
      const second = wanted();
      second.set("seed", at("seed").value.trim() || first.video.seed);
      if (at("versus").value === "seed") second.set("seed", (first.video.seed + 1) % 2 ** 32);
      else second.set("model", at("versus").value);
      chooseThese([first, cardOf(await post(second))]);
      tell("Two videos are submitted.");
    } else tell("The video is submitted.");
  } catch (error) {
    showProblem(error);
  } finally {
    at("submit").disabled = false;
  }
}

async function retry(video) {
  const known = modelOf(video.model);
  if (known?.task === "i2v" || video.live) return remix(video);
  const { prompt, model, size, frames, seed, steps, topk } = video;
  const more = { ...(topk === null ? {} : { topk }), ...(known?.live ? {} : { steps }) };
  const body = JSON.stringify({ prompt, model, size, frames, seed, ...more });
  cardOf(await post(body, { "Content-Type": "application/json" }));
}

function remix(video) {
  clearProblems();
  if (modelOf(video.model)) at("model").value = video.model;
  modelChanged();
  for (const name of FIELDS) if (name !== "model") at(name).value = video[name];
  const wantsPicture = modelOf(at("model").value)?.task === "i2v" && !at("picture").files.length;
  if (wantsPicture) at("input_reference-error").textContent = "Choose the picture again; the server does not give it back.";
  at(wantsPicture ? "picture" : "prompt").focus();
}

// ---- the picture

let preview = "";

function pictureChanged() {
  const picture = at("picture").files[0];
  URL.revokeObjectURL(preview);
  preview = picture ? URL.createObjectURL(picture) : "";
  at("preview").hidden = !picture;
  if (picture) at("preview").src = preview;
  at("input_reference-error").textContent = "";
}

function takePicture(files) {
  if (!files.length || at("picture-field").hidden) return;
  at("picture").files = files;
  pictureChanged();
}

// A picture that misses the field by a little would otherwise be opened in place of the page.
function takeDroppedPictures() {
  const over = (isOver) => at("drop").classList.toggle("over", isOver);
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    over(true);
  });
  document.addEventListener("dragleave", (event) => over(event.relatedTarget !== null));
  document.addEventListener("drop", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    over(false);
    takePicture(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => takePicture(event.clipboardData.files));
}

// ---- the key and the server's state

function askForKey() {
  at("key").value = keyOf();
  at("key-dialog").returnValue = "";
  if (!at("key-dialog").open) at("key-dialog").showModal();
}

function keyGiven() {
  if (at("key-dialog").returnValue !== "save") return;
  const key = at("key").value.trim();
  if (key) localStorage.setItem("key", key);
  else localStorage.removeItem("key");
  location.reload();
}

async function checkHealth() {
  let isWell = false, words = "The server cannot be reached";
  try {
    const { ready, reasons } = await (await fetch("readyz")).json();
    isWell = ready;
    words = ready ? "Ready" : reasons.join("; ");
  } catch {}
  at("health").className = `health ${isWell ? "well" : "ill"}`;
  if (at("health").textContent !== words) at("health").textContent = words;
}

async function begin() {
  at("form").addEventListener("submit", submit);
  at("form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
  });
  at("model").addEventListener("change", modelChanged);
  at("picture").addEventListener("change", pictureChanged);
  takeDroppedPictures();
  at("watch").addEventListener("click", watch);
  openLive();
  at("key-button").addEventListener("click", askForKey);
  at("key-dialog").addEventListener("close", keyGiven);
  whenKeyIsWanted(askForKey);
  whenPressed({ remix, retry });
  checkHealth();
  setInterval(checkHealth, HEALTH_MS);
  try {
    models = (await askJson("v1/models")).data;
    at("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
    modelChanged();
    await openGallery();
  } catch (error) {
    at("form-error").textContent = error.message;
  }
}

begin();
