// Plays an mp4 that grows, in a video element.

const KEPT_SECONDS = 30;
const BEHIND_SECONDS = 4, EDGE_SECONDS = 1;

export class Player {
  constructor(element) {
    this.element = element;
    this.source = new MediaSource();
    this.url = URL.createObjectURL(this.source);
    this.head = new Uint8Array();
    this.isReady = new Promise((resolve) => this.source.addEventListener("sourceopen", resolve, { once: true }));
    element.src = this.url;
  }

  // Takes the next bytes, and waits until they can be played.
  async append(bytes) {
    await this.isReady;
    if (this.buffer) await this.#change(() => this.buffer.appendBuffer(bytes));
    else await this.#begin(bytes);
    await this.#follow();
  }

  // Lets the video end after what has come.
  end() {
    if (this.source.readyState === "open") this.source.endOfStream();
  }

  close() {
    URL.revokeObjectURL(this.url);
    this.element.removeAttribute("src");
    this.element.load();
  }

  // How the frames are coded stands in the head of the file, and has to be known before it is taken.
  async #begin(bytes) {
    this.head = joined(this.head, bytes);
    const codec = codecOf(this.head);
    if (!codec) return;
    this.buffer = this.source.addSourceBuffer(`video/mp4; codecs="${codec}"`);
    await this.#change(() => this.buffer.appendBuffer(this.head));
    this.element.play().catch(() => {});
  }

  // Catches up with a stream that has run ahead, and forgets what was seen long ago.
  async #follow() {
    const { buffered, currentTime } = this.element;
    if (!buffered.length) return;
    const end = buffered.end(buffered.length - 1), oldest = currentTime - KEPT_SECONDS;
    if (end - currentTime > BEHIND_SECONDS) this.element.currentTime = end - EDGE_SECONDS;
    if (oldest - buffered.start(0) > KEPT_SECONDS) await this.#change(() => this.buffer.remove(0, oldest));
  }

  async #change(act) {
    const changed = new Promise((resolve) => this.buffer.addEventListener("updateend", resolve, { once: true }));
    act();
    await changed;
  }
}

function joined(one, other) {
  const whole = new Uint8Array(one.length + other.length);
  whole.set(one);
  whole.set(other, one.length);
  return whole;
}

// The codec as MediaSource names it: profile, constraints and level follow the name of the box avcC and its version.
function codecOf(head) {
  const place = new TextDecoder("latin1").decode(head).indexOf("avcC");
  if (place < 0 || head.length < place + 8) return "";
  const digits = [...head.slice(place + 5, place + 8)].map((byte) => byte.toString(16).padStart(2, "0"));
  return `avc1.${digits.join("")}`;
}
