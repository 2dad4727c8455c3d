"""Whether the disks that videos are written to have room for them."""

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from wanforge.configs.clip import ClipShape
from wanforge.runtime.output.video import most_bytes

log = logging.getLogger(__name__)


def check_disks(places: Sequence[Path], clips: Sequence[ClipShape]) -> None:
    """Warn if a disk may be too small for the videos."""
    needed = Counter[Path]()
    for place, clip in zip(places, clips, strict=True):
        needed[place.parent] += most_bytes(clip.width_px, clip.height_px, clip.frames)
    for folder, most in needed.items():
        free = shutil.disk_usage(folder).free
        if free < most:
            log.warning(
                "%s: %.1f MB are free; videos of noise would take %.1f MB, and most take far less",
                *(folder, free / 1e6, most / 1e6),
                extra={"folder": folder, "free_bytes": free, "most_bytes": most},
            )
