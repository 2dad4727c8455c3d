"""Bundles of published size without weights: each weights file is a header followed by a hole. That is enough to export
and to compile, because neither reads weights that are inputs of their graphs."""

import hashlib
from pathlib import Path

import numpy as np

from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.bundle import TOKENIZER, Bundle, components, weights_name
from wanforge.engines.bundle.manifest import FileRecord
from wanforge.engines.bundle.tensorfile import encode_header, sha256_of
from wanforge.exporter.checkpoint.layout import layout
from wanforge.exporter.checkpoint.synthetic.tokenizer import train_tokenizer
from wanforge.whole_file import write_atomically


def skeleton(root: Path, model: ModelConfig, recipe: Recipe, *, has_vae: bool = False) -> Bundle:
    """Make a bundle of a model's size without its weights.

    Args:
        has_vae: Fill the VAE, whose graphs do read their weights, with small random numbers.
    """
    files = {}
    for component in components(model):
        name, tensors = weights_name(component), layout(component, model, recipe)
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        is_filled = component == "vae" and has_vae
        size = sum(spec.nbytes for spec in tensors.values())
        with path.open("wb") as file:
            file.write(header := encode_header(tensors, {}))
            if is_filled:
                assert {spec.dtype for spec in tensors.values()} == {"F32"}
                file.write(np.random.default_rng(0).normal(0, 0.02, size // 4).astype("<f4").tobytes())
            file.truncate(len(header) + size)
        # A hole is never verified, and reading it would take long.
        digest = sha256_of(path) if is_filled else hashlib.sha256(header).hexdigest()
        files[name] = FileRecord(digest, path.stat().st_size)
    tokenizer = train_tokenizer(model.text_encoder.vocab_size).to_str().encode()
    write_atomically(root / TOKENIZER, tokenizer)
    files[TOKENIZER] = FileRecord(hashlib.sha256(tokenizer).hexdigest(), len(tokenizer))
    return Bundle.create(root, model, recipe, files)
