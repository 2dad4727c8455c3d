"""The clips that trials ask for, and what they are when nothing disturbs their making."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from tests.usage.serving.maker import POISON
from tests.usage.serving.server import Server
from wanforge.runtime.service.client.connection import Connection

PROMPT = "a red circle moving right"
VARIANTS = ("video", "thumbnail", "spritesheet")


@dataclass(frozen=True)
class Clip:
    """What is asked for."""

    seed: int
    prompt: str = PROMPT
    size: str = "128x128"
    frames: int = 5
    steps: int = 1

    def submit(self, connection: Connection) -> str:
        """Submit it, again and again until the server has accepted it, and return its id."""
        found = connection.submit(self.fields)
        return str(found["id"])

    @property
    def fields(self) -> dict[str, object]:
        """It as the fields of a request."""
        return asdict(self)


USUAL = tuple(Clip(seed) for seed in range(3))
LARGE = Clip(0, size="256x256", frames=21)
"""A clip that takes more memory than a child has that has only made usual ones."""
POISONED = Clip(0, f"{POISON} in a green bottle")

Digests = dict[Clip, dict[str, str]]
"""The SHA-256 of each file of a clip."""


def undisturbed(server: Server, clips: Iterable[Clip]) -> Digests:
    """Make clips before anything goes wrong."""
    found = {}
    for clip in clips:
        video = clip.submit(server.connection)
        status = server.connection.wait(video)["status"]
        if status != "completed":
            raise RuntimeError(f"without any fault, {clip} is {status}: {server.log[-2000:]}")
        found[clip] = digests(server.connection, video)
    return found


def digests(connection: Connection, video: str) -> dict[str, str]:
    """The SHA-256 of each file that a video has, as they are downloaded."""
    found = {}
    for variant in VARIANTS:
        response = connection.http.get(f"/v1/videos/{video}/content", params={"variant": variant})
        found[variant] = hashlib.sha256(response.content).hexdigest() if response.status_code == 200 else response.text
    return found
