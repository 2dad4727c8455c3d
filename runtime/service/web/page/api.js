// Requests to the server, with the API key if this browser has one.

export class ApiError extends Error {
  constructor(message, param, code, status) {
    super(message);
    Object.assign(this, { param, code, status });
  }
}

let onUnknown = () => {};

// Calls `act` when the server wants a key, or another one.
export function whenKeyIsWanted(act) {
  onUnknown = act;
}

export const keyOf = () => localStorage.getItem("key") || "";

export async function ask(path, options = {}) {
  const key = keyOf() ? { Authorization: `Bearer ${keyOf()}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...key, ...options.headers } });
  } catch {
    throw new ApiError("The server cannot be reached.", null, "unreachable", 0);
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({ error: { message: response.statusText } }));
  if (response.status === 401) onUnknown();
  throw new ApiError(error.message, error.param, error.code, response.status);
}

export const askJson = async (path, options) => (await ask(path, options)).json();

// An address for elements of the page, which send no key. With a key, the file is fetched whole.
export async function contentUrl(video, variant = "video") {
  const path = `v1/videos/${video.id}/content?variant=${variant}`;
  return keyOf() ? URL.createObjectURL(await (await ask(path)).blob()) : path;
}

// Calls `take` with each event of a video, until it has ended. A stream that breaks off is taken up again.
export async function follow(id, take) {
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
