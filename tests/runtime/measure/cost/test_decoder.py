"""What the decoder costs: as many operations as the reference's convolutions, apart from those that folding saves, and
far fewer bytes."""

from itertools import product
from typing import get_args

import pytest
import torch

from tools.pages.kernels import SMALL
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.configs.recipe import VAEFormat, load_recipe
from wanforge.configs.tiles import tiled_architectures
from wanforge.runtime.backends.decoder import FIRST, NEXT
from wanforge.runtime.backends.decoder.recorded import recorded
from wanforge.runtime.graphs import graphs
from wanforge.runtime.measure.cost.decoder import decoder_chunk, decoder_clip, reference_chunk
from wanforge.runtime.measure.cost.eager import Operations
from wanforge.runtime.measure.cost.prediction import packaged_profiles
from wanforge.runtime.measure.cost.stages import operations
from wanforge.runtime.measure.machine_code.rates import load_rates

MODEL = load_model("tiny-t2v")
SHAPE = ClipShape(64, 48, 9)


def saved_by_folding(frames: tuple[int, int, int]) -> int:
    """Operations of the 3x3 convolutions of doubled pixels, less those of the 2x2 convolutions, with so many frames."""
    height, width, dim, saved = SHAPE.latent_height, SHAPE.latent_width, MODEL.vae.dim, 0
    for count, inputs in zip(frames, (4, 4, 2), strict=True):
        weights = inputs * dim * inputs // 2 * dim
        saved += 2 * count * weights * (9 * 4 * height * width - 16 * (height + 1) * (width + 1))
        height, width = 2 * height, 2 * width
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("form", get_args(VAEFormat))
@pytest.mark.parametrize(("graph", "frames"), [(FIRST, (1, 1, 1)), (NEXT, (2, 4, 4))])
def test_operations_are_the_references(graph: str, frames: tuple[int, int, int], form: VAEFormat) -> None:
    found = sum(cost.total_flops for cost in decoder_chunk(MODEL, SHAPE, is_first=graph == FIRST, form=form))
    sizes = {"latent_height": SHAPE.latent_height, "latent_width": SHAPE.latent_width}
    expected = operations(graphs(MODEL, load_recipe("bf16"))[graph], sizes)
    assert found == expected - saved_by_folding(frames)


def test_a_clip_is_its_chunks() -> None:
    first, later = (decoder_chunk(MODEL, SHAPE, is_first=is_first) for is_first in (True, False))
    assert decoder_clip(MODEL, SHAPE) == [*first, *later, *later]


@pytest.mark.parametrize("form", get_args(VAEFormat))
def test_programs_are_those_of_every_architecture(form: VAEFormat) -> None:
    runs = [cost.run for cost in decoder_chunk(MODEL, SHAPE, is_first=False, form=form) if cost.run]
    for sm in tiled_architectures():
        grids = [launch.grid for launch in recorded(MODEL, sm, SHAPE, is_first=False, form=form).launches]
        assert [run.programs for run in runs] == [x * y * z for x, y, z in grids]


def test_a_quarter_of_the_references_bytes_are_moved() -> None:
    model = load_model(SMALL)
    before, after = reference_chunk(model, model.video.clip), decoder_chunk(model, model.video.clip, is_first=False)
    assert sum(cost.total_bytes for cost in before) == pytest.approx(108.8e9, rel=1e-3)
    assert sum(cost.total_bytes for cost in after) == pytest.approx(24.8e9, rel=2e-3)
    assert (len(before), len(after)) == (416, 75)


@pytest.mark.slow
def test_int8_moves_two_thirds_of_the_bytes() -> None:
    """The past and the inputs of convolutions have half their size, and no branch is written beside the stream."""
    model = load_model(SMALL)
    chunk = decoder_chunk(model, model.video.clip, is_first=False, form="int8")
    assert sum(cost.total_bytes for cost in chunk) == pytest.approx(17.4e9, rel=3e-3)
    convolutions = [cost for cost in chunk if "int8" in cost.flops]
    assert len(convolutions) == 29
    assert sum(cost.total_flops for cost in convolutions) > 0.94 * sum(cost.total_flops for cost in chunk)


def test_views_move_nothing_and_what_is_changed_in_place_is_only_written() -> None:
    with torch.device("meta"):
        x, y = torch.zeros(4, 8), torch.zeros(8, 4)
        with Operations() as made:
            x.T.reshape(2, 16).float()
            x.half()
            y.copy_(x.T)
    assert [(each.bytes_read, each.bytes_written) for each in made.found] == [
        (x.nbytes, x.nbytes),
        (x.nbytes, x.nbytes // 2),
        (x.nbytes, x.nbytes),
    ]


def test_profiles_cover_every_launch() -> None:
    model = load_model(SMALL)
    for gpu in load_rates().gpus:
        for is_first, form in product((True, False), get_args(VAEFormat)):
            for cost in decoder_chunk(model, model.video.clip, is_first=is_first, form=form):
                if cost.run is not None:
                    assert len(packaged_profiles()[gpu]["96"][cost.name].parts) == 1 + len(cost.run.trips)
