"""Helpers that write checkpoint files in various forms and check what an import makes of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import Recipe, load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.tensorfile import TensorSpec, read_header
from wanforge.errors import CheckpointError
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.checkpoint.reader import INDEX
from wanforge.runtime.reference.names import aliases

T2V, I2V = load_model("tiny-t2v"), load_model("tiny-i2v")
W8A8, BY_ROW, SLA, DENSE = (load_recipe(name) for name in ("w8a8", "w8a8-row", "bf16-sla", "bf16"))
FP8, FP4 = load_recipe("fp8-row"), load_recipe("nvfp4")
PATCH = "patch_embedding.weight"
State = dict[str, Tensor]


def contents(bundle: Bundle, component: str) -> tuple[list[tuple[str, TensorSpec]], bytes]:
    """A component's tensors in file order, and all their bytes."""
    header = read_header(bundle.weights(component))
    data = header.path.read_bytes()
    return list(header.tensors.items()), data[len(data) - header.nbytes :]


def write_pth(state: State, folder: Path) -> Path:
    torch.save(state, folder / "a.pth")
    return folder / "a.pth"


def write_safetensors(state: State, folder: Path) -> Path:
    save_file(state, folder / "a.safetensors")
    return folder / "a.safetensors"


def write_shards(state: State, folder: Path) -> Path:
    names = sorted(state)
    shards = {
        "a-1-of-3.safetensors": names[::3],
        "a-2-of-3.safetensors": names[1::3],
        "a-3-of-3.safetensors": names[2::3],
    }
    for file, inside in shards.items():
        save_file({name: state[name] for name in inside}, folder / file)
    index = {"weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (folder / f"a{INDEX}").write_text(json.dumps(index))
    return folder / f"a{INDEX}"


def spelt(component: str, state: State, spelling: int = 1) -> State:
    """The same tensors under the names of diffusers, transformers or another wrapper."""
    return {aliases(component, name)[spelling]: tensor for name, tensor in state.items()}


def wider(state: State, dtype: torch.dtype = torch.float32) -> State:
    """The same tensors, with float tensors converted to a type that holds all their values."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def as_conv(state: State) -> State:
    return {name: t.unflatten(1, (-1, 1, 2, 2)) if name == PATCH else t for name, t in state.items()}


def without(state: State, part: str) -> State:
    return {name: tensor for name, tensor in state.items() if part not in name}


def assert_refused(
    out: Path, model: ModelConfig, sources: Sources, complaint: str, recipe: Recipe | None = None, link: bool = False
) -> str:
    """Assert that an import is refused and writes nothing; return the message."""
    with pytest.raises(CheckpointError, match=complaint) as caught:
        import_checkpoint(model, sources, out, recipe=recipe, link=link)
    assert not out.exists(), [str(path.relative_to(out)) for path in out.rglob("*")]
    return str(caught.value)
