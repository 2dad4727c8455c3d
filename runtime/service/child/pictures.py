"""The pictures that go with a clip: one frame from its middle, and a sheet of frames from all of it."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from wanforge.whole_file import temporary_file

COLUMNS, MOST_TILES, TILE_WIDTH = 4, 16, 160
THUMBNAIL, SHEET = "thumbnail.webp", "spritesheet.jpg"
"""The files, in the formats that clients of OpenAI's API expect."""
QUICK = 0
"""WebP's quickest method, because clients wait for the pictures as well."""


class Pictures:
    """Collects frames as they are decoded, and draws pictures in a thread.

    Args:
        folder: Where the pictures are written.
        frames: The number of frames that will come.
    """

    def __init__(self, folder: Path, frames: int) -> None:
        self.folder, self.middle, count = folder, frames // 2, min(MOST_TILES, frames)
        self.chosen = [(2 * place + 1) * frames // (2 * count) for place in range(count)]
        self._next, self._tiles = 0, list[Image.Image]()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._drawn: list[Future[None]] = []

    def __call__(self, frame: Tensor) -> None:
        """Take the next frame."""
        if self._next == self.middle:
            self._drawn.append(self._pool.submit(self._save_thumbnail, frame))
        if self._next in self.chosen:
            self._drawn.append(self._pool.submit(self._add_tile, frame))
        self._next += 1

    def finish(self) -> dict[str, str]:
        """Wait for the pictures. Returns their names by variant."""
        self._drawn.append(self._pool.submit(self._save_sheet))
        self.close()
        for each in self._drawn:
            each.result()
        return {"thumbnail": THUMBNAIL, "spritesheet": SHEET}

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=False)

    @property
    def layout(self) -> dict[str, Any]:
        """Where each frame of the sheet is: the number of columns, the size of a tile, and the frames row by row."""
        width, height = self._tiles[0].size
        return {"columns": COLUMNS, "tile_width_px": width, "tile_height_px": height, "frames": self.chosen}

    def _add_tile(self, frame: Tensor) -> None:
        picture = Image.fromarray(frame.numpy())
        width = min(TILE_WIDTH, picture.width)
        height = max(1, round(picture.height * width / picture.width))
        self._tiles.append(picture.resize((width, height), Image.Resampling.BILINEAR))

    def _save_sheet(self) -> None:
        width, height = self._tiles[0].size
        rows = -(-len(self._tiles) // COLUMNS)
        sheet = Image.new("RGB", (min(COLUMNS, len(self._tiles)) * width, rows * height))
        for place, tile in enumerate(self._tiles):
            sheet.paste(tile, (place % COLUMNS * width, place // COLUMNS * height))
        self._write(SHEET, sheet)

    def _save_thumbnail(self, frame: Tensor) -> None:
        self._write(THUMBNAIL, Image.fromarray(frame.numpy()), method=QUICK)

    def _write(self, name: str, picture: Image.Image, **options: Any) -> None:
        path = self.folder / name
        with temporary_file(path) as temporary:
            picture.save(temporary, **options)
            temporary.replace(path)
