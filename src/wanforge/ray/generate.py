"""A stage for pipelines of Ray Data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from wanforge.api import load
from wanforge.errors import RequestError
from wanforge.keywords import with_settings
from wanforge.runtime.backends import AUTO
from wanforge.runtime.request import Settings, request_for
from wanforge.whole_file import temporary_folder

PROMPT, IMAGE, SEED, VIDEO, SECONDS = "prompt", "image", "seed", "video", "seconds"
"""The columns that are read, of which only the first has to be there, and those that are added."""

Columns = Mapping[str, NDArray[Any]]


class Generate:
    """Makes a clip for each row: ``dataset.map_batches(Generate, fn_constructor_kwargs={"bundle": folder}, …)``.

    Ray makes one of these in each actor, so the bundle is loaded once for each.

    Args:
        bundle: The bundle's folder, which every machine must see under this path.
        backend: As of `wanforge.load`, like `memory`.
        settings: What holds for every row, see `Settings`; a column ``seed`` takes the place of the setting.

    Raises:
        BundleError: The folder is not a bundle, or a file of it is missing or damaged.
        ConfigError: There is no such backend, or memory is no number above 0.
    """

    @with_settings(Settings)
    def __init__(
        self, bundle: str, backend: str = AUTO, memory: float | None = None, **settings: Unpack[Settings]
    ) -> None:
        self.pipeline = load(bundle, backend, memory)
        self.settings = settings

    def __call__(self, rows: Columns) -> dict[str, Any]:
        """Make the clips of some rows.

        Args:
            rows: A column ``prompt``; there may be ``seed`` and, for models that start from a picture, ``image``, the
                path of its file.

        Returns:
            All columns, with ``video``, the bytes of an mp4 file, and ``seconds``, the time that the request took.

        Raises:
            RequestError, ConfigError: A request does not make sense for this model.
        """
        if PROMPT not in rows:
            raise RequestError(f"there is no column {PROMPT}, only {', '.join(rows) or 'none'}; name it so")
        videos, seconds = [], []
        for place in range(len(rows[PROMPT])):
            row = {name: column[place] for name, column in rows.items()}
            made, took = self._made(row)
            videos.append(made)
            seconds.append(took)
        return {**rows, VIDEO: np.array(videos, dtype=object), SECONDS: np.array(seconds)}

    def _made(self, row: Mapping[str, Any]) -> tuple[bytes, float]:
        """The video of a row, and the time that it took."""
        settings = Settings(**self.settings)
        if row.get(SEED) is not None:
            settings["seed"] = int(row[SEED])
        image = row.get(IMAGE)
        request = request_for(self.pipeline.model, str(row[PROMPT]), None if image is None else str(image), settings)
        with temporary_folder() as folder:
            path = Path(folder) / "clip.mp4"
            timings = self.pipeline.write_video(self.pipeline.check(request), path)
            return path.read_bytes(), timings.total
