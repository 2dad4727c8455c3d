// Makes a video with fetch, shows how far it is, and downloads it to clip.mp4: node javascript.mjs
import { writeFile } from "node:fs/promises";

const url = process.env.WANFORGE_URL ?? "http://127.0.0.1:8000";
const key = process.env.WANFORGE_API_KEY ?? "none";

async function ask(path, options = {}) {
  const headers = { Authorization: `Bearer ${key}`, "Content-Type": "application/json" };
  const response = await fetch(`${url}/v1/videos${path}`, { headers, ...options });
  if (response.ok) return response;
  const { error } = await response.json();
  throw new Error(`${error.code}: ${error.message}`);
}

const body = JSON.stringify({ prompt: "a red circle moving right", seed: 7 });
let video = await (await ask("", { method: "POST", body })).json();
while (video.status === "queued" || video.status === "in_progress") {
  const response = await ask(`/${video.id}`);
  video = await response.json();
  console.log(video.status, `${video.progress} %`, video.stage ?? "");
  // The server says when it is worth looking again.
  await new Promise((resolve) => setTimeout(resolve, Number(response.headers.get("openai-poll-after-ms") ?? 1000)));
}
if (video.status !== "completed") throw new Error(`${video.status}: ${video.error?.message}`);
const content = await ask(`/${video.id}/content`);
await writeFile("clip.mp4", Buffer.from(await content.arrayBuffer()));
console.log(video.id, video.status, video.timings);
