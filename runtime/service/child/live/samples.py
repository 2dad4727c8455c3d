"""Some frames of a video whose length is not known, for its pictures."""

from pathlib import Path
from typing import Any

from torch import Tensor

from wanforge.runtime.service.child.pictures import MOST_TILES, Pictures


class Samples:
    """Keeps frames at equal distances, uint8 ``[H, W, 3]``. When there are too many, every other one is dropped, so
    that a long video takes no more memory than a short one."""

    def __init__(self) -> None:
        self._kept = list[tuple[int, Tensor]]()
        self._every, self.count = 1, 0

    def __call__(self, frame: Tensor) -> None:
        """Take the next frame."""
        if self.count % self._every == 0:
            self._kept.append((self.count, frame.clone()))  # it may be a view of a whole chunk
        if len(self._kept) > 2 * MOST_TILES:
            self._kept, self._every = self._kept[::2], 2 * self._every
        self.count += 1

    def draw(self, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        """Draw the pictures of the video. Returns their names by variant, and where each frame of the sheet is."""
        pictures = Pictures(folder, len(self._kept))
        try:
            for _, frame in self._kept:
                pictures(frame)
            files = pictures.finish()
        except BaseException:
            pictures.close()
            raise
        return files, {**pictures.layout, "frames": [self._kept[place][0] for place in pictures.chosen]}
