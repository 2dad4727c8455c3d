// The page of wanforge's server: it submits videos, follows them, and shows what they have become.

const PAGE_SIZE = 24;
const ACTIVE = new Set(["queued", "in_progress"]);
const WORDS = {
  queued: "Waiting", in_progress: "Being made", completed: "Done", failed: "Failed", cancelled: "Cancelled", expired: "Expired",
};

const at = (id) => document.getElementById(id);
const cards = new Map(); // what is shown of each video, by its id
let models = [];

class ApiError extends Error {
  constructor(message, param, code, status) {
    super(message);
    Object.assign(this, { param, code, status });
  }
}

// ---- the API

function keyHeaders() {
  const key = localStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...keyHeaders(), ...options.headers } });
  } catch {
    throw new ApiError("The server cannot be reached.", null, "unreachable", 0);
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({ error: { message: response.statusText } }));
  if (response.status === 401) askForKey();
  throw new ApiError(error.message, error.param, error.code, response.status);
}

const askJson = async (path, options) => (await ask(path, options)).json();

async function contentUrl(video, variant = "video") {
  const path = `v1/videos/${video.id}/content?variant=${variant}`;
  if (!localStorage.getItem("key")) return path;
  return URL.createObjectURL(await (await ask(path)).blob());
}

// Calls `take` with each event of a video, until it has ended. A stream that breaks off is taken up again.
async function follow(id, take) {
  let last = "", pause = 500;
  for (;;) {
    try {
      const headers = last ? { "Last-Event-ID": last } : {};
      const response = await ask(`v1/videos/${id}/events`, { headers });
      for await (const event of eventsOf(response.body)) {
        pause = 500;
        last = event.id || last;
        take(event);
      }
      return;
    } catch (error) {
      if (error.status >= 400 && error.status < 500 && error.status !== 429) return;
      await new Promise((resolve) => setTimeout(resolve, pause));
      pause = Math.min(10000, pause * 2);
    }
  }
}

async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const fields = Object.fromEntries(part.split("\n").filter((line) => !line.startsWith(":")).map((line) => {
        const colon = line.indexOf(": ");
        return [line.slice(0, colon), line.slice(colon + 2)];
      }));
      if (fields.data) yield { id: fields.id, kind: fields.event, data: JSON.parse(fields.data) };
    }
  }
}

// ---- cards

function cardOf(video, { atEnd = false } = {}) {
  let card = cards.get(video.id);
  if (!card) {
    const item = at("card").content.cloneNode(true).querySelector("li");
    card = { item, video, find: (name) => item.querySelector(name) };
    cards.set(video.id, card);
    connect(card);
    if (atEnd) at("gallery").append(item);
    else at("gallery").prepend(item);
    if (ACTIVE.has(video.status)) follow(video.id, () => refresh(video.id)).then(() => refresh(video.id));
  }
  show(card, video);
  at("empty").hidden = cards.size > 0;
  return card;
}

function connect(card) {
  card.find(".cancel").addEventListener("click", () => act(card, "cancel"));
  card.find(".delete").addEventListener("click", () => remove(card));
  card.find(".retry").addEventListener("click", () => retry(card));
  card.find(".remix").addEventListener("click", () => remix(card));
  card.find(".choose input").addEventListener("change", choose);
}

function show(card, video) {
  const before = card.video.status;
  card.video = video;
  const active = ACTIVE.has(video.status);
  card.item.className = `card ${video.status}`;
  card.find(".prompt").textContent = video.prompt;
  card.find(".facts").textContent =
    `${video.model}, ${video.size}, ${video.frames} frames, ${video.steps} steps, seed ${video.seed}`;
  card.find(".times").textContent = timesOf(video);
  card.find(".status").textContent = video.error ? `${WORDS[video.status]}: ${video.error.message}` : WORDS[video.status];
  card.find("progress").hidden = !active;
  card.find("progress").value = video.progress;
  card.find("progress").setAttribute("aria-label", `Progress of ${video.prompt}`);
  card.find(".stage").textContent = active ? stageOf(video) : "";
  card.find(".cancel").hidden = !active;
  card.find(".delete").hidden = video.status === "in_progress";
  card.find(".retry").hidden = active || video.status === "completed";
  card.find(".choose").hidden = video.status !== "completed";
  for (const [name, word] of [[".cancel", "Cancel"], [".retry", "Retry"], [".remix", "Remix"], [".delete", "Delete"]])
    card.find(name).setAttribute("aria-label", `${word}: ${video.prompt}`);
  if (video.status === "completed" && !card.isShown) showVideo(card);
  if (before !== video.status && !ACTIVE.has(video.status)) tell(`${WORDS[video.status]}: ${video.prompt}`);
}

function stageOf(video) {
  if (video.status === "queued") {
    const place = video.queue_position === null ? "" : video.queue_position === 0 ? "next" : `${video.queue_position} before it`;
    return [place, leftOf(video)].filter(Boolean).join(", ");
  }
  return [`${video.progress} %`, video.stage, leftOf(video)].filter(Boolean).join(", ");
}

const leftOf = (video) => (!video.estimated_seconds || video.estimated_seconds < 1 ? "" : `about ${Math.ceil(video.estimated_seconds)} s left`);

function timesOf(video) {
  if (!video.timings) return "";
  const each = Object.entries(video.timings).map(([stage, seconds]) => `${stage} ${seconds.toFixed(2)} s`);
  return `${each.join(", ")}; ${video.backend}, ${video.recipe}`;
}

async function showVideo(card) {
  card.isShown = true;
  const { video } = card;
  const player = card.find("video"), link = card.find(".download");
  try {
    const source = await contentUrl(video);
    player.poster = await contentUrl(video, "thumbnail");
    player.src = source;
    player.setAttribute("aria-label", video.prompt);
    player.hidden = false;
    card.find(".waiting").hidden = true;
    link.href = source;
    link.download = `${video.id}.mp4`;
    link.hidden = false;
    link.setAttribute("aria-label", `Download: ${video.prompt}`);
  } catch (error) {
    card.isShown = false;
    card.find(".stage").textContent = error.message;
  }
}

const refreshing = new Set();
async function refresh(id) {
  if (refreshing.has(id)) return;
  refreshing.add(id);
  try {
    show(cards.get(id), await askJson(`v1/videos/${id}`));
  } catch (error) {
    if (error.status === 404) forget(id);
  } finally {
    refreshing.delete(id);
  }
}

async function act(card, action) {
  try {
    show(card, await askJson(`v1/videos/${card.video.id}/${action}`, { method: "POST" }));
  } catch (error) {
    tell(error.message);
  }
}

async function remove(card) {
  try {
    await ask(`v1/videos/${card.video.id}`, { method: "DELETE" });
    forget(card.video.id);
    at("gallery").focus();
  } catch (error) {
    tell(error.message);
  }
}

function forget(id) {
  cards.get(id)?.item.remove();
  cards.delete(id);
  at("empty").hidden = cards.size > 0;
  choose();
}

async function retry(card) {
  const { prompt, model, size, frames, seed, steps, topk } = card.video;
  if (modelOf(model)?.task === "i2v") return remix(card);
  const wanted = { prompt, model, size, frames, seed, steps, ...(topk === null ? {} : { topk }) };
  try {
    const headers = { "Content-Type": "application/json" };
    cardOf(await askJson("v1/videos", { method: "POST", headers, body: JSON.stringify(wanted) }));
  } catch (error) {
    tell(error.message);
    at("form-error").textContent = error.message;
  }
}

function remix(card) {
  const { prompt, model, size, frames, seed, steps } = card.video;
  for (const [id, value] of Object.entries({ prompt, model, size, frames, seed, steps })) at(id).value = value;
  modelChanged();
  at("prompt").focus();
}

// ---- side by side

function chosen() {
  return [...cards.values()].filter((card) => card.find(".choose input").checked && card.video.status === "completed");
}

function choose() {
  at("compare").disabled = chosen().length !== 2;
}

async function compare() {
  const pair = at("pair");
  pair.replaceChildren();
  for (const { video } of chosen()) {
    const figure = document.createElement("figure");
    const player = document.createElement("video");
    const words = document.createElement("figcaption");
    Object.assign(player, { muted: true, loop: true, controls: true, playsInline: true, src: await contentUrl(video) });
    player.setAttribute("aria-label", video.prompt);
    words.textContent = `${video.model}, ${video.recipe}, seed ${video.seed}, ${video.steps} steps: ${video.prompt}`;
    figure.append(player, words);
    pair.append(figure);
  }
  at("compare-dialog").showModal();
}

function playBoth() {
  const players = [...at("pair").querySelectorAll("video")];
  const paused = players.some((player) => player.paused);
  for (const player of players) {
    if (paused) {
      player.currentTime = 0;
      player.play();
    } else player.pause();
  }
  at("compare-play").textContent = paused ? "Pause both" : "Play both";
}

// ---- the form

const modelOf = (id) => models.find((model) => model.id === id);

function modelChanged() {
  const model = modelOf(at("model").value);
  if (!model) return;
  at("picture-field").hidden = model.task !== "i2v";
  at("size").placeholder = model.size;
  at("frames").placeholder = model.frames;
  at("steps").placeholder = model.steps;
  at("frames-hint").textContent = `4n+1; ${model.fps} a second`;
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
  for (const name of ["prompt", "model", "size", "frames", "steps", "seed"]) {
    const value = at(name).value.trim();
    if (value) data.set(name, value);
  }
  const picture = at("picture").files[0];
  if (picture && !at("picture-field").hidden) data.set("input_reference", picture);
  return data;
}

async function submit(event) {
  event.preventDefault();
  clearProblems();
  at("submit").disabled = true;
  try {
    const first = wanted();
    const made = [await askJson("v1/videos", { method: "POST", body: first })];
    const versus = at("versus").value;
    if (versus) {
      const second = wanted();
      if (versus === "seed") second.set("seed", (made[0].seed + 1) % 2 ** 32);
      else {
        second.set("model", versus);
        second.set("seed", made[0].seed);
      }
      made.push(await askJson("v1/videos", { method: "POST", body: second }));
    }
    for (const video of made) {
      const card = cardOf(video);
      if (made.length === 2) card.find(".choose input").checked = true;
    }
    tell(made.length === 2 ? "Two videos are submitted." : "The video is submitted.");
  } catch (error) {
    showProblem(error);
  } finally {
    at("submit").disabled = false;
    choose();
  }
}

function pictureChanged() {
  const picture = at("picture").files[0];
  at("preview").hidden = !picture;
  if (picture) at("preview").src = URL.createObjectURL(picture);
}

function takePicture(files) {
  if (!files.length || at("picture-field").hidden) return;
  at("picture").files = files;
  pictureChanged();
}

// ---- the whole page

function tell(words) {
  at("news").textContent = words;
}

function askForKey() {
  at("key").value = localStorage.getItem("key") || "";
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
  const health = at("health");
  try {
    const found = await (await fetch("readyz")).json();
    health.className = `health ${found.ready ? "well" : "ill"}`;
    health.textContent = found.ready ? "Ready" : found.reasons.join("; ");
  } catch {
    health.className = "health ill";
    health.textContent = "The server cannot be reached";
  }
}

async function loadPage(after) {
  const page = await askJson(`v1/videos?limit=${PAGE_SIZE}${after ? `&after=${after}` : ""}`);
  for (const video of page.data) cardOf(video, { atEnd: true });
  at("more").hidden = !page.has_more;
  at("more").onclick = () => loadPage(page.last_id);
}

async function begin() {
  at("form").addEventListener("submit", submit);
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
  });
  at("model").addEventListener("change", modelChanged);
  at("picture").addEventListener("change", pictureChanged);
  at("drop").addEventListener("dragover", (event) => {
    event.preventDefault();
    at("drop").classList.add("over");
  });
  at("drop").addEventListener("dragleave", () => at("drop").classList.remove("over"));
  at("drop").addEventListener("drop", (event) => {
    event.preventDefault();
    at("drop").classList.remove("over");
    takePicture(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => takePicture(event.clipboardData.files));
  at("key-button").addEventListener("click", askForKey);
  at("key-dialog").addEventListener("close", keyGiven);
  at("compare").addEventListener("click", compare);
  at("compare-play").addEventListener("click", playBoth);
  at("compare-close").addEventListener("click", () => at("compare-dialog").close());
  at("compare-dialog").addEventListener("close", () => at("pair").replaceChildren());
  checkHealth();
  setInterval(checkHealth, 10000);
  try {
    models = (await askJson("v1/models")).data;
    at("model").replaceChildren(...models.map((model) => new Option(model.id)));
    modelChanged();
    await loadPage();
  } catch (error) {
    at("form-error").textContent = error.message;
  }
}

begin();
