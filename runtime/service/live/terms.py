"""What a job says of the live stream that it is."""

from typing import Literal

from wanforge.configs.causal import PolicyName
from wanforge.configs.loading import Record

LIVE = "live"
"""The stage of a job whose video is being watched."""


class LiveTerms(Record, frozen=True, kw_only=True):
    """A live stream, as its job asks for it.

    Attributes:
        screen: The name under which the server expects it; nobody can guess it.
        chunks: How many chunks are made at most.
        cache: Which chunks are remembered.
        kv: How keys and values are remembered.
        is_paced: Whether the video is made no faster than it is watched.
        seconds: How long it may hold its worker, from its first chunk on.
        pause_seconds: How long it may be paused at a time.
        megabytes: How large the video may become.
    """

    screen: str
    chunks: int
    cache: PolicyName = "infinity_rope"
    kv: Literal["native", "int8", "fp8"] = "native"
    is_paced: bool = True
    seconds: float = 600.0
    pause_seconds: float = 300.0
    megabytes: float = 1000.0
