"""How much memory a request takes on a CPU, roughly and before it starts, and how much there is."""

import math
from pathlib import Path

import psutil

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe

OVERHEAD = 600_000_000
"""Bytes of the libraries and of what is not counted below."""
VAE_LIVE = 6
"""Full-resolution activations alive at once in the VAE's last level."""

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_bytes() -> float:
    """What this process can still take: the machine's free memory, or less in a container that is allowed less."""
    return min([psutil.virtual_memory().available, *map(control_group_bytes, control_groups())])


def control_groups() -> list[Path]:
    """The folders of the control groups that limit this process's memory, its own and those around it."""
    folders: list[Path] = []
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else ():
        _, controllers, path = line.split(":", 2)
        root = {"": CONTROL_GROUPS, "memory": CONTROL_GROUPS / "memory"}.get(controllers)  # version 2 and version 1
        if root is not None:
            folder = root / path.lstrip("/")
            folders += [around for around in (folder, *folder.parents) if around.is_relative_to(root)]
    return folders


def control_group_bytes(folder: Path) -> float:
    """Limit less use of one group, infinite where it has no limit. Cached files are no use: they make room."""
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            most, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if most != "max":
            # Version 1 counts the groups inside under names of their own.
            cached = sum(int(counts.get(f"total_{n}", counts.get(n, 0))) for n in ("active_file", "inactive_file"))
            return max(0, int(most) - taken + cached)
    return math.inf


def needed_bytes(model: ModelConfig, recipe: Recipe, shape: ClipShape, itemsize: int) -> int:
    """The larger of denoising and decoding, weights apart: those are mapped, and the system may drop them.

    Args:
        itemsize: bytes of one element of the compute type.
    """
    return OVERHEAD + max(denoise_bytes(model, recipe, shape, itemsize), decode_bytes(model, shape, itemsize))


def denoise_bytes(model: ModelConfig, recipe: Recipe, shape: ClipShape, itemsize: int) -> int:
    """Residual stream, queries, keys, values and the widest hidden layer with its float32 copy; logits of whole rows
    where attention is dense."""
    dit, tokens = model.dit, shape.tokens
    widest = tokens * (8 * dit.dim + 2 * dit.ffn_dim) * max(4, itemsize)
    rows = tokens if recipe.attention == "dense" else recipe.block_k
    context = dit.num_layers * len(model.experts) * 2 * dit.text_rows * dit.dim * itemsize
    return widest + dit.num_heads * tokens * rows * 4 + context


def decode_bytes(model: ModelConfig, shape: ClipShape, itemsize: int) -> int:
    """Both sets of caches and the activations of one chunk of four frames at full resolution."""
    pixels = shape.width_px * shape.height_px
    latent_pixels = shape.latent_height * shape.latent_width
    caches = 2 * 151_328 * latent_pixels * model.vae.dim // 96
    return (caches + VAE_LIVE * 2 * 4 * model.vae.dim * pixels) * itemsize
