"""How near the clips of tinywan-i2v come to a last frame that they are given, which it was not trained for.

    python -m tools.tinywan.i2v.ends FOLDER [EVERY]

Each held-out shot is asked for three times: with its first frame alone, with its own last frame as well, and with a
last frame in which the shape is somewhere else. The table has the RMS difference, in values from 0 to 255, between the
clips' last frames and each of these two, between their first frames and the picture that was given, and between
neighbouring frames, so that it tells what a seam would look like where another clip goes on from the picture.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.exporter.checkpoint.embedded import embedded
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.export import export
from wanforge.runtime.continuation.chain import Frame, difference
from wanforge.runtime.measure.parity.comparison import Contender
from wanforge.runtime.measure.quality.shots import Shot, frames_of, held_out_shots
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request

MODEL = load_model("tinywan-i2v")
GIVEN = ("none", "its own", "another")
"""The last frames that are given."""


@dataclass(frozen=True)
class Ends:
    """RMS differences of a clip, see the module."""

    to_own: float
    to_other: float
    first: float
    inside: float


def pictures_of(model: ModelConfig, shot: Shot) -> tuple[Frame, Frame, Frame]:
    """The first and the last frame of a shot, and a last frame in which the shape is on the other side."""
    width, height = size = model.video.size_wh
    frames = frames_of(shot, size, model.video.frames).round().astype(np.uint8)
    x, y = shot.centre(model.video.frames - 1)
    mirrored = replace(shot, start_xy=(width - x, height - y))
    return frames[0], frames[-1], frames_of(mirrored, size, 1)[0].round().astype(np.uint8)


def ends_of(pipeline: Pipeline, shots: Sequence[tuple[str, Shot]], given: str) -> Ends:
    """The medians of all shots."""
    found = []
    for seed, (text, shot) in enumerate(shots):
        first, own, other = pictures_of(pipeline.model, shot)
        last = {"none": None, "its own": own, "another": other}[given]
        request = Request(text, pipeline.model.video.clip, Image.fromarray(first), seed)
        if last is not None:
            request = replace(request, last_image=Image.fromarray(last))
        frames = pipeline.make(request).frames
        steps = [difference(one, next_one) for one, next_one in pairwise(frames)]
        ends = (difference(frames[-1], own), difference(frames[-1], other), difference(frames[0], first))
        found.append((*ends, float(np.median(steps))))
    return Ends(*(float(each) for each in np.median(found, 0)))


def main(folder: Path, every: int) -> None:
    """Measure, and print a row as soon as it is complete."""
    shots = held_out_shots(MODEL.video.size_wh, MODEL.video.frames)[::every]
    bundle = import_checkpoint(MODEL, embedded(MODEL), folder, recipe=load_recipe("w8a8"), replace=True)
    export(bundle, ("fp32",))
    pipeline = Contender("ort").pipeline(Bundle.open(bundle.root))
    print(f"{len(shots)} shots, medians", flush=True)
    print("| last frame given | last to the shot's own | last to the other | first to the one given | inside |")
    print("|---|" + "--:|" * 4)
    for given in GIVEN:
        found = ends_of(pipeline, shots, given)
        print(f"| {given} | " + " | ".join(f"{each:.1f}" for each in vars(found).values()) + " |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int((*sys.argv[2:], "3")[0]))
