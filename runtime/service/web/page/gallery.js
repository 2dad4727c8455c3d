// The videos of the page: each is a card that follows its video until that has ended.

import { ask, askJson, contentUrl, follow, keyOf } from "./api.js";

const PAGE_SIZE = 24;
const ACTIVE = new Set(["queued", "in_progress"]);
const WORDS = {
  queued: "Waiting", in_progress: "Being made", completed: "Done", failed: "Failed", cancelled: "Cancelled", expired: "Expired",
};
// A browser opens six connections to a server at most, and the page needs some of them for everything else.
const MOST_STREAMS = 3;
const LOOK_MS = 2000, GAP_MS = 100;

export const at = (id) => document.getElementById(id);
const cards = new Map(); // what is shown of each video, by its id
const streams = new Set(); // ids of the videos whose events are being read
let remix = () => {}, retry = () => {};

// What to do with the video of a card when its buttons are pressed.
export function whenPressed(actions) {
  ({ remix, retry } = actions);
}

// Says something to those who do not see the page.
export function tell(words) {
  at("news").textContent = words;
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// ---- following videos

function watch() {
  for (const card of active()) {
    const { id } = card.video;
    if (streams.size >= MOST_STREAMS) return;
    if (streams.has(id)) continue;
    streams.add(id);
    follow(id, (event) => take(card, event)).then(async () => {
      await refresh(id);
      streams.delete(id);
      if (!ACTIVE.has(card.video.status)) watch(); // and otherwise later, since its events cannot be read now
    });
  }
}

// The cards of videos that have not ended, in about the order in which they will.
function active() {
  const found = [...cards.values()].filter((card) => ACTIVE.has(card.video.status));
  const rank = ({ video }) => [video.status === "queued", video.queue_position ?? 0, video.created_at];
  return found.sort((a, b) => {
    const left = rank(a), right = rank(b);
    const place = left.findIndex((value, index) => value !== right[index]);
    return place < 0 ? 0 : left[place] - right[place];
  });
}

// Looks again and again at the videos whose events are not read, and at places in the queue, which are no events.
async function lookAround() {
  for (;;) {
    await pause(LOOK_MS);
    for (const { video } of active()) {
      if (streams.has(video.id) && video.status !== "queued") continue;
      await refresh(video.id);
      await pause(GAP_MS);
    }
    watch();
  }
}

function take(card, { kind, data }) {
  if (kind === "started") card.stages = new Map();
  if (kind === "progress" && data.stage) {
    const latest = [...card.stages.values()].at(-1);
    if (latest) latest.to = data.at; // a stage lasts until the next one is heard of
    if (!card.stages.has(data.stage)) card.stages.set(data.stage, { from: data.at, to: data.at });
  }
  refresh(card.video.id);
}

// Asks for a video. What changes while the answer is on its way is asked for once more.
async function refresh(id) {
  const card = cards.get(id);
  if (!card) return;
  card.isStale = true;
  if (card.isAsking) return;
  card.isAsking = true;
  try {
    while (card.isStale) {
      card.isStale = false;
      show(card, await askJson(`v1/videos/${id}`));
    }
  } catch (error) {
    if (error.status === 404) forget(id);
  } finally {
    card.isAsking = false;
  }
}

// ---- cards

// The card of a video, at the front of the gallery if it is new.
export function cardOf(video, { atEnd = false } = {}) {
  let card = cards.get(video.id);
  if (!card) {
    const item = at("card").content.cloneNode(true).querySelector("li");
    card = { item, video, stages: new Map(), find: (name) => item.querySelector(name) };
    cards.set(video.id, card);
    connect(card);
    if (atEnd) at("gallery").append(item);
    else at("gallery").prepend(item);
  }
  show(card, video);
  at("empty").hidden = cards.size > 0;
  watch();
  return card;
}

function connect(card) {
  card.find(".play").addEventListener("click", () => play(card));
  card.find(".download").addEventListener("click", (event) => download(card, event));
  card.find(".cancel").addEventListener("click", () => act(card, () => cancel(card)));
  card.find(".delete").addEventListener("click", () => act(card, () => remove(card)));
  card.find(".retry").addEventListener("click", () => act(card, () => retry(card.video)));
  card.find(".remix").addEventListener("click", () => remix(card.video));
  card.find(".choose input").addEventListener("change", choose);
}

function show(card, video) {
  const before = card.video.status;
  card.video = video;
  const isActive = ACTIVE.has(video.status), isDone = video.status === "completed";
  card.item.className = `card ${video.status}`;
  card.find(".prompt").textContent = video.prompt;
  card.find(".prompt").title = video.prompt;
  const length = video.live && isActive ? "live" : `${video.frames} frames`;
  card.find(".facts").textContent =
    `${video.model}, ${video.size}, ${length}, ${video.steps} ${video.steps === 1 ? "step" : "steps"}, seed ${video.seed}`;
  card.find(".times").textContent = timesOf(card);
  card.find(".status").textContent = WORDS[video.status];
  card.find(".why").textContent = video.error ? video.error.message : "";
  card.find("progress").hidden = !isActive || (video.live && video.status === "in_progress"); // whose end nobody knows
  card.find("progress").value = video.progress;
  card.find("progress").setAttribute("aria-label", `Progress of ${video.prompt}`);
  card.find(".stage").textContent = isActive ? stageOf(video) : "";
  card.find(".cancel").hidden = !isActive;
  card.find(".delete").hidden = video.status === "in_progress";
  card.find(".retry").hidden = isActive || isDone;
  card.find(".choose").hidden = card.find(".download").hidden = !isDone;
  card.find(".download").href = `v1/videos/${video.id}/content`;
  card.find(".download").download = `${video.id}.mp4`;
  for (const name of ["download", "cancel", "retry", "remix", "delete"]) {
    const button = card.find(`.${name}`);
    button.setAttribute("aria-label", `${button.textContent}: ${video.prompt}`);
  }
  card.find(".choose input").setAttribute("aria-label", `Compare: ${video.prompt}, seed ${video.seed}`);
  showPreview(card);
  if (isDone && !card.isShown) showPoster(card);
  if (!isDone && card.isShown) hidePoster(card);
  if (before !== video.status) {
    if (!isActive) tell(`${WORDS[video.status]}: ${video.prompt}`);
    choose();
  }
}

function stageOf(video) {
  if (video.status === "queued") {
    const place = video.queue_position === null ? "" : video.queue_position === 0 ? "next" : `${video.queue_position} before it`;
    return [place, leftOf(video)].filter(Boolean).join(", ");
  }
  if (video.live) return "live";
  return [`${video.progress} %`, video.stage, leftOf(video)].filter(Boolean).join(", ");
}

const leftOf = (video) => (!video.estimated_seconds || video.estimated_seconds < 1 ? "" : `about ${Math.ceil(video.estimated_seconds)} s left`);

// The times of the stages: as they were measured, or so far as the events tell them.
function timesOf({ video, stages }) {
  const words = (entries) => entries.map(([stage, seconds]) => `${stage} ${seconds.toFixed(2)} s`).join(", ");
  const lora = video.loras?.length ? `LoRA ${video.lora} (${[...new Set(video.loras.flatMap(({ ways }) => ways))].join(", ") || "not used"})` : "";
  if (video.timings) return [words(Object.entries(video.timings)), `${video.backend}, ${video.recipe}`, lora].filter(Boolean).join("; ");
  if (video.status !== "in_progress") return "";
  return words([...stages].map(([stage, { from, to }]) => [stage, to - from]).filter(([, seconds]) => seconds > 0));
}

async function showPoster(card) {
  card.isShown = true;
  card.find(".waiting").hidden = true;
  card.find(".play").hidden = false;
  card.find(".play").setAttribute("aria-label", `Play: ${card.video.prompt}`);
  try {
    card.find(".poster").src = await contentUrl(card.video, "thumbnail");
  } catch (error) {
    if (error.code !== "not_ready") card.find(".why").textContent = error.message;
  }
}

// The latest picture of what a video is going to be, if its bundle has a preview decoder.
async function showPreview(card) {
  const step = card.video.status === "in_progress" ? previewedStep(card.video) : 0;
  if (step === (card.step ?? 0)) return;
  card.step = step;
  const picture = card.find(".preview");
  if (!step) picture.hidden = true;
  else {
    try {
      const url = await contentUrl(card.video, `preview&step=${step}`);
      const loaded = new Image();
      loaded.onload = () => {
        if (card.step !== step) return;
        picture.src = url;
        picture.hidden = false;
      };
      loaded.src = url;
    } catch {} // there is none
  }
}

function previewedStep({ stage, steps }) {
  const [name, number] = (stage || "").split(" ");
  if (name === "preview") return Number(number);
  if (name === "step") return number - 1;
  return ["decode", "transfer", "write"].includes(name) ? steps : 0;
}

function hidePoster(card) {
  card.isShown = false;
  card.find("video").removeAttribute("src");
  card.find(".waiting").hidden = false;
  card.find(".play").hidden = card.find("video").hidden = true;
}

// Clips are fetched when they are played, and not with the page.
async function play(card) {
  await act(card, async () => {
    const player = card.find("video");
    player.src = await contentUrl(card.video);
    player.setAttribute("aria-label", card.video.prompt);
    player.hidden = false;
    card.find(".play").hidden = true;
    player.focus();
    await player.play().catch(() => {});
  });
}

// With an API key, the link alone would be refused, so the clip is fetched first.
async function download(card, event) {
  if (!keyOf()) return;
  event.preventDefault();
  await act(card, async () => {
    const link = document.createElement("a");
    link.href = await contentUrl(card.video);
    link.download = `${card.video.id}.mp4`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  });
}

async function act(card, action) {
  card.find(".why").textContent = "";
  try {
    await action();
  } catch (error) {
    card.find(".why").textContent = error.message;
    tell(error.message);
  }
}

async function cancel(card) {
  show(card, await askJson(`v1/videos/${card.video.id}/cancel`, { method: "POST" }));
}

async function remove(card) {
  await ask(`v1/videos/${card.video.id}`, { method: "DELETE" });
  const next = card.item.nextElementSibling || card.item.previousElementSibling;
  forget(card.video.id);
  (next?.querySelector(".remix") || at("gallery")).focus();
}

function forget(id) {
  cards.get(id)?.item.remove();
  cards.delete(id);
  at("empty").hidden = cards.size > 0;
  choose();
}

// ---- side by side

const boxOf = (card) => card.find(".choose input");
const chosen = () => [...cards.values()].filter((card) => boxOf(card).checked && card.video.status === "completed");

function choose() {
  const count = chosen().length;
  at("compare").disabled = count !== 2;
  at("compare-hint").textContent = count === 2 ? "" : count > 2 ? `${count} are chosen; leave two.` : "Choose two videos to compare them.";
}

// Chooses these videos, and no others, to be compared once they are done.
export function chooseThese(those) {
  for (const card of cards.values()) boxOf(card).checked = those.includes(card);
  choose();
}

async function compare() {
  const pair = at("pair");
  pair.replaceChildren();
  at("compare-play").textContent = "Play both";
  at("compare-dialog").showModal();
  for (const { video } of chosen()) {
    const figure = document.createElement("figure");
    const player = document.createElement("video");
    const words = document.createElement("figcaption");
    Object.assign(player, { muted: true, loop: true, controls: true, playsInline: true });
    player.setAttribute("aria-label", `${video.prompt}, seed ${video.seed}, ${video.recipe}`);
    words.textContent = `Seed ${video.seed}, ${video.model}, ${video.recipe}, ${video.size}, ${video.steps} steps: ${video.prompt}`;
    figure.append(player, words);
    pair.append(figure);
    try {
      player.src = await contentUrl(video);
    } catch (error) {
      words.textContent = error.message;
    }
  }
}

function playBoth() {
  const players = [...at("pair").querySelectorAll("video")];
  const arePaused = players.some((player) => player.paused);
  for (const player of players) {
    if (arePaused) {
      player.currentTime = 0;
      player.play().catch(() => {});
    } else player.pause();
  }
  at("compare-play").textContent = arePaused ? "Pause both" : "Play both";
}

function endComparison() {
  for (const player of at("pair").querySelectorAll("video")) URL.revokeObjectURL(player.src);
  at("pair").replaceChildren();
}

// ---- the whole gallery

async function loadPage(after) {
  const page = await askJson(`v1/videos?limit=${PAGE_SIZE}${after ? `&after=${after}` : ""}`);
  for (const video of page.data) cardOf(video, { atEnd: true });
  at("more").hidden = !page.has_more;
  at("more").onclick = () => loadPage(page.last_id).catch((error) => tell(error.message));
}

// Shows the latest videos, and keeps them up to date.
export async function openGallery() {
  at("compare").addEventListener("click", compare);
  at("compare-play").addEventListener("click", playBoth);
  at("compare-close").addEventListener("click", () => at("compare-dialog").close());
  at("compare-dialog").addEventListener("close", endComparison);
  choose();
  await loadPage();
  lookAround();
}
