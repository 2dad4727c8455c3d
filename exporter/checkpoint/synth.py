"""Checkpoint files in the published formats with random weights, for any model at any size.

A file is laid out first, without data, and its tensors are then filled in one by one, so a 28 GB checkpoint needs
little memory. Several threads draw, and one writes. A sparse file is left without data and takes almost no disk space.
"""

import math
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from wanforge.configs.model import ModelConfig
from wanforge.engines.bundle.bundle import dit_component
from wanforge.errors import CheckpointError, ResourceError, join_names
from wanforge.exporter.checkpoint.layout import Layout, layout, published_recipe
from wanforge.exporter.checkpoint.synthetic.torch_file import write_torch_file
from wanforge.exporter.checkpoint.synthetic.weights import random_tensors
from wanforge.host.capacity import free_disk_bytes
from wanforge.progress import ByteCount, Progress, silent
from wanforge.whole_file import write_atomically

VAE_FILE = "Wan2.1_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FILE = "google/umt5-xxl/tokenizer.json"


# Enough text to train a small vocabulary on; what it says does not matter.
CORPUS = (
    "A red kite turns slowly over a windy beach at dusk while the camera follows it from below.",
    "Two children run through tall yellow grass towards a white house under a bright blue sky.",
    "A black cat jumps from the window onto a wooden table, knocks over a glass and looks away.",
    "Close-up of rain falling on dark green leaves, with soft light and a shallow depth of field.",
    "An old steam train crosses a stone bridge in the mountains, smoke drifting to the left.",
    "A large circle moves right, a small square moves up, a blue triangle turns in the middle.",
    "The astronaut walks across grey dust, her visor reflecting the earth; slow motion, wide shot.",
    "Waves break on the rocks again and again; gulls cry; the sun sets behind a distant ship.",
)


def file_names(model: ModelConfig) -> dict[str, str]:
    """The names of the published files, by part: ``dit``, ``dit-quant`` (per expert), ``vae`` and so on."""
    names = {}
    for expert in model.experts:
        stem = model.checkpoint.format(expert=expert)
        names[dit_component(expert)] = f"{stem}.pth"
        names[dit_component(expert) + "-quant"] = f"{stem}-quant.pth"
    return names | {"vae": VAE_FILE, "text_encoder": TEXT_ENCODER_FILE, "tokenizer": TOKENIZER_FILE}


def write_checkpoint(
    model: ModelConfig,
    out: Path,
    *,
    parts: set[str] | None = None,
    sparse: bool = False,
    seed: int = 0,
    replace: bool = False,
    progress: Progress = silent,
) -> list[Path]:
    """Write a model's files; the same seed gives the same bytes.

    Args:
        parts: The parts to write, as in `file_names`; None writes all. Quantised denoisers hold the same weights as the
            unquantised ones, quantised.
        sparse: Write full-size files of zeros that take no disk space.
        replace: Write over files that are there already.

    Returns:
        The files written.

    Raises:
        CheckpointError: There are such files, and `replace` is not set. Nothing was written.
        ResourceError: The disk is too small. Nothing was written.
    """
    files = {part: out / name for part, name in file_names(model).items() if parts is None or part in parts}
    layouts = {part: published_layout(model, part) for part in files if part != "tokenizer"}
    check_free(out, list(files.values()), replace)
    if not sparse:
        check_disk(out, sum(spec.nbytes for specs in layouts.values() for spec in specs.values()))
    for part, path in files.items():
        if part == "tokenizer":
            write_atomically(path, train_tokenizer(model.text_encoder.vocab_size).to_str().encode())
            continue
        specs = layouts[part]
        count = ByteCount(progress, path.name, sum(spec.nbytes for spec in specs.values()))
        if sparse:
            write_torch_file(path, specs, None, count)
            continue
        with random_tensors(part.removesuffix("-quant"), specs, seed) as values:
            write_torch_file(path, specs, values, count)
    return list(files.values())


def published_layout(model: ModelConfig, part: str) -> Layout:
    """The tensors of a part, as in `file_names`."""
    return layout(part.removesuffix("-quant"), model, published_recipe(part.endswith("-quant"), has_sla=True))


def check_free(out: Path, files: list[Path], replace: bool) -> None:
    """Refuse to write over files unless it is asked for.

    Raises:
        CheckpointError: Some of the files are there already.
    """
    there = [str(path.relative_to(out)) for path in files if path.exists() or path.is_symlink()]
    if there and not replace:
        raise CheckpointError(
            f"{out}: already holds {join_names(there)}; choose another folder, or replace them (--replace)"
        )


def check_disk(out: Path, needed: int) -> None:
    """Refuse to begin if the disk cannot hold the files.

    Raises:
        ResourceError: It cannot.
    """
    if needed > (free := free_disk_bytes(out)):
        raise ResourceError(
            f"{out}: {needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; make room, choose another "
            "folder, or write files of zeros that take no space (--sparse)"
        )


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """A small tokenizer of umT5's kind: unigram pieces, ``<pad>`` 0, ``</s>`` 1, ``<unk>`` 2."""
    special = ["<pad>", "</s>", "<unk>"]
    words = [f"\u2581{word}" for sentence in CORPUS for word in sentence.split()]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-"
    counts = Counter(word[i:j] for word in words for i in range(len(word)) for j in range(i + 2, len(word) + 1))
    common = sorted((piece for piece in counts if counts[piece] > 1), key=lambda p: (-counts[p] * len(p), p))
    singles = sorted({"\u2581", *letters, *"".join(words)})
    pieces = [*special, *singles, *common][: min(vocab_size, 384)]
    tokenizer = Tokenizer(models.Unigram([(piece, math.log(counts[piece] or 1) - 8) for piece in pieces], unk_id=2))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer
