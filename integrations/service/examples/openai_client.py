"""Makes a video with OpenAI's client and downloads it to clip.mp4."""

import os

from openai import OpenAI, RateLimitError

client = OpenAI(
    base_url=os.environ.get("WANFORGE_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("WANFORGE_API_KEY", "none"),
)
try:
    # What OpenAI's API does not know, such as a seed, goes into extra_body.
    video = client.videos.create_and_poll(prompt="a red circle moving right", extra_body={"seed": 7, "steps": 2})
except RateLimitError as error:
    raise SystemExit(f"The server is busy; try again later ({error.code}).") from None
if video.status != "completed":
    raise SystemExit(f"The video is {video.status}: {video.error}")
client.videos.download_content(video.id).write_to_file("clip.mp4")
print(video.id, video.status, video.model_extra["timings"])
