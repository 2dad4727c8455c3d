// A live stream of the page: received and played while it is made, and steered on the way.

import { ask, askJson } from "./api.js";
import { at, cardOf, tell } from "./gallery.js";
import { Player } from "./player.js";

const LOOK_MS = 1000, LOOKS = 20;
const JSON_TYPE = { "Content-Type": "application/json" };

let stream = null; // the one that is shown

const isRunning = () => stream !== null && !stream.isOver;

// Starts a stream and shows it until it ends.
export async function watchLive(fields) {
  if (isRunning()) return;
  if (!window.MediaSource) {
    throw new Error("This browser cannot play a video that grows; use another one, or submit a video as a whole.");
  }
  const leaving = new AbortController();
  const options = { method: "POST", body: JSON.stringify(fields), headers: JSON_TYPE, signal: leaving.signal };
  const response = await ask("v1/streams", options);
  let mine = null;
  try {
    stream?.player.close();
    mine = { id: response.headers.get("Video-Id"), player: new Player(at("live-video")), isPaused: false };
    stream = mine;
    open(fields.prompt);
    show(mine);
    const reader = response.body.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      if (!mine.hasBegun) say("Live");
      mine.hasBegun = true;
      await mine.player.append(value);
    }
    mine.player.end();
    finish(mine, "Ended. It stays among your videos.");
  } catch (error) {
    leaving.abort(); // or else the server would wait for this page to read on
    if (!mine) throw error;
    finish(mine, "Broken off");
    explain(mine, error);
  }
}

function open(prompt) {
  at("live").hidden = false;
  at("live-error").textContent = "";
  at("live-video").setAttribute("aria-label", `Live stream: ${prompt}`);
  at("live-shown").textContent = "";
  at("live-prompt").value = "";
  say("Waiting for a worker");
  enable(true);
  at("live-prompt").focus();
}

function enable(isOn) {
  for (const each of at("live-form").elements) each.disabled = !isOn;
  at("live-pause").textContent = "Pause";
  at("watch").disabled = isOn;
}

// The state is told to those who do not see it, too.
function say(words) {
  if (at("live-state").textContent !== words) at("live-state").textContent = words;
}

// Shows how far a stream is, until it ends, and its card in the gallery.
async function show(mine) {
  askJson(`v1/videos/${mine.id}`).then(cardOf).catch(() => {}); // later looks find it, too
  while (!mine.isOver) {
    try {
      const { shown_prompt: shown, prompt } = await askJson(`v1/streams/${mine.id}`);
      if (mine.isOver) return;
      const next = prompt !== shown && shown ? `; next: ${prompt}` : "";
      const words = shown ? `Shown: ${shown}${next}` : "";
      if (at("live-shown").textContent !== words) at("live-shown").textContent = words;
    } catch {} // it has just ended
    await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
  }
}

function finish(mine, words) {
  mine.isOver = true;
  const hadFocus = at("live-form").contains(document.activeElement);
  enable(false);
  say(words);
  if (hadFocus) at("live").focus();
}

// Says why a stream has broken off, as its video tells a moment later.
async function explain(mine, error) {
  for (let looks = 0; looks < LOOKS; looks += 1) {
    const video = await askJson(`v1/videos/${mine.id}`).catch(() => null);
    if (video && video.status !== "in_progress" && video.status !== "queued") {
      if (video.error) at("live-error").textContent = video.error.message;
      else if (video.status === "cancelled") say("Cancelled");
      else at("live-error").textContent = error.message;
      return;
    }
    await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
  }
  at("live-error").textContent = error.message;
}

async function wish(fields) {
  at("live-error").textContent = "";
  try {
    await askJson(`v1/streams/${stream.id}`, { method: "POST", body: JSON.stringify(fields), headers: JSON_TYPE });
    return true;
  } catch (error) {
    if (isRunning()) at("live-error").textContent = error.message;
    return false;
  }
}

async function change(cut) {
  const prompt = at("live-prompt").value.trim();
  if (!prompt && !cut) return;
  if (!(await wish({ cut, ...(prompt ? { prompt } : {}) }))) return;
  at("live-prompt").value = "";
  tell(cut ? "A new scene begins soon." : "It changes soon.");
}

async function pause() {
  const mine = stream;
  if (!(await wish({ paused: !mine.isPaused }))) return;
  mine.isPaused = !mine.isPaused;
  at("live-pause").textContent = mine.isPaused ? "Go on" : "Pause";
  say(mine.isPaused ? "Paused" : "Live");
}

async function stop() {
  say("Ending");
  await wish({ stop: true });
}

export function openLive() {
  at("live-form").addEventListener("submit", (event) => {
    event.preventDefault();
    change(false);
  });
  at("live-cut").addEventListener("click", () => change(true));
  at("live-pause").addEventListener("click", pause);
  at("live-stop").addEventListener("click", stop);
  enable(false);
}
