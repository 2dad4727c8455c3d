"""A LoRA that changes the style: what is trained, what is written, and that the shipped one does it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.tinywan import scenes
from tools.tinywan.style.low_rank import ALPHA, PREFIX, RANK, adapt, merged, write_lora
from tools.tinywan.style.outlines import filling, outline, outlined
from tools.tinywan.style.quality import StyleScore, right_clip
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.embedded import FOLDER, embedded
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.runtime.measure.parity.comparison import Contender
from wanforge.runtime.measure.quality.figures import SHAPES, coverage
from wanforge.runtime.measure.quality.held_out import Rates, held_out_prompts
from wanforge.runtime.measure.quality.meter import read
from wanforge.runtime.reference.dit import DiT

MODEL = load_model("tinywan")
LORA = FOLDER.parent / "loras" / "outlines.safetensors"


def clip_of(cover: object, shape: str) -> np.ndarray:
    assert callable(cover)
    frames = [cover(shape, (60.0 + frame, 56.0), 18.0, (128, 112)) for frame in range(3)]
    return np.stack([np.repeat(22 + 200 * frame[..., None], 3, 2) for frame in frames]).astype(np.uint8)


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
def test_outlines_are_told_from_filled_shapes(shape: str) -> None:
    assert filling(clip_of(coverage, shape)) == 1
    assert filling(clip_of(outline, shape)) == 0


def test_a_ring_is_an_outline_already() -> None:
    assert np.allclose(outline("ring", (64, 56), 18, (128, 112)), coverage("ring", (64, 56), 18, (128, 112)))


def test_scenes_are_outlined_inside_the_context_only() -> None:
    scene = scenes.draw_scene(np.random.default_rng(1), (128, 112), 21)
    plain = scenes.render(scene, 21, range(1))
    with outlined:
        drawn = scenes.render(scene, 21, range(1))
    assert (scenes.render(scene, 21, range(1)) == plain).all()
    assert (drawn != plain).any() or all(thing.subject.shape == "ring" for thing in scene.things)
    assert set(SHAPES) == {"circle", "square", "triangle", "ring"}


def small() -> DiT:
    torch.manual_seed(0)
    dit = DiT(MODEL.dit, load_recipe("bf16-sla"))
    for parameter in dit.parameters():
        parameter.data.normal_(0, 0.05)
    return dit


def test_what_is_written_is_what_was_trained(tmp_path: Path) -> None:
    """Merged into the plain weights, the file does what the changes did while they were trained."""
    dit = small()
    plain = {name: value.clone() for name, value in dit.state_dict().items()}
    changes = adapt(dit)
    with torch.no_grad():
        for change in changes.parameters():
            change.normal_(0, 0.02)
    write_lora(changes, tmp_path / "lora.safetensors")
    lora = load_file(tmp_path / "lora.safetensors")
    down = lora[f"{PREFIX}blocks.0.self_attn.q.lora_down.weight"]
    assert down.shape == (RANK, MODEL.dit.dim)
    assert float(lora[f"{PREFIX}blocks.0.self_attn.q.alpha"]) == ALPHA
    assert len(lora) == 3 * 10 * MODEL.dit.num_layers
    inputs = torch.randn(1, 16, 2, 4, 4), torch.tensor([900.0]), torch.randn(1, 64, 64)
    trained = dit(*inputs)
    again = DiT(MODEL.dit, load_recipe("bf16-sla"))
    again.load_state_dict(plain)
    before = again(*inputs)
    again.load_state_dict(merged(plain, lora))
    assert error(again(*inputs), trained) < 0.05 * error(before, trained)


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().square().mean().sqrt())


@pytest.mark.slow
def test_the_shipped_lora_draws_outlines(tmp_path: Path) -> None:
    """Without it the middle of a square is filled, and with it it is not; colour and direction stay what was asked."""
    sources, lora = embedded(MODEL), load_file(LORA)
    assert LORA.stat().st_size < 500_000
    weights = load_file(sources.weights["dit"])
    found = {}
    for name, strength in (("plain", 0.0), ("outlined", 1.0)):
        path = tmp_path / f"{name}.safetensors"
        save_file({k: v.bfloat16() for k, v in merged(weights, lora, strength).items()}, path)
        changed = Sources({**sources.weights, "dit": path}, sources.tokenizer)
        bundle = import_checkpoint(MODEL, changed, tmp_path / name, recipe=load_recipe("bf16-sla"))
        frames = Contender("torch").pipeline(bundle).generate("a large cyan square moving right", seed=1).frames
        (thing,) = read(frames.transpose(0, 3, 1, 2)).things
        assert (thing.colour, thing.direction) == ("cyan", "right")
        found[name] = filling(frames)
    assert found["plain"] == 1
    assert found["outlined"] < 0.3


def test_the_right_clip_of_a_prompt_is_filled_or_outlined() -> None:
    prompt = next(each for each in held_out_prompts() if each.text.startswith("a large red square"))
    plain, styled = (right_clip(MODEL, prompt, in_style=in_style) for in_style in (False, True))
    assert (filling(plain.astype(np.uint8)), filling(styled.astype(np.uint8))) == (1, 0)


def test_a_row_says_what_was_not_asked_for() -> None:
    rates = Rates(2, 1.0, 0.5, 0.5, None, 0.5)
    assert str(StyleScore("w8a8", "merged", rates, 0.25, 7.0, 12.25)) == (
        "| w8a8 | merged | 100.0% | 50.0% | - | 25.0% | 7.00 | 12.25 |"
    )
