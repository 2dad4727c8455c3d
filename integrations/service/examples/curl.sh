#!/bin/sh
# Submits a video, shows what happens to it until it is done, and downloads it to clip.mp4.
set -eu
url=${WANFORGE_URL:-http://127.0.0.1:8000}
key=${WANFORGE_API_KEY:-}

ask() {
    curl --silent --show-error --fail-with-body ${key:+--header "Authorization: Bearer $key"} "$@"
}

video=$(ask "$url/v1/videos" --form prompt='a red circle moving right' --form seed=7 | sed 's/.*"id":"\([^"]*\)".*/\1/')
ask --no-buffer "$url/v1/videos/$video/events"
ask "$url/v1/videos/$video/content" --output clip.mp4
ask "$url/v1/videos/$video"
