"""Open the file of a network in any container, whoever quantised its weights."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from wanforge.engines.bundle.tensorfile import read_header
from wanforge.exporter.checkpoint.formats.gguf_file import open_gguf
from wanforge.exporter.checkpoint.formats.layouts import with_values
from wanforge.exporter.checkpoint.formats.quantised_tensor import QuantisedTensor
from wanforge.exporter.checkpoint.reader import Contents, StoredTensor, open_checkpoint
from wanforge.runtime.reference.names import is_quantised

NEAREST = "w8a8-row"
"""The linear of the recipe for weights that no recipe holds exactly: of those that quantise, the one that adds the
smallest error."""


def open_weights(path: Path) -> Contents:
    """The table of contents of a checkpoint, see `open_checkpoint`. Weights that another project than TurboDiffusion
    quantised stand in it as float32, a `QuantisedTensor` each.

    Raises:
        CheckpointError: The file is missing, truncated or damaged, or holds weights in a layout that is not imported.
    """
    if path.suffix == ".gguf":
        return open_gguf(path)
    contents = open_checkpoint(path)
    files = sorted({stored.path for stored in contents.values() if stored.path.suffix == ".safetensors"})
    metadata: dict[str, str] = {}
    for file in files:
        metadata |= read_header(file).metadata
    return with_values(contents, metadata)


def quantised_weights(contents: Mapping[str, StoredTensor]) -> list[QuantisedTensor]:
    """The weights of a file that another project quantised."""
    return [stored for stored in contents.values() if isinstance(stored, QuantisedTensor)]


def holds_quantised(contents: Mapping[str, StoredTensor]) -> bool:
    """Whether a file holds quantised weights, whoever quantised them."""
    return is_quantised(contents) or bool(quantised_weights(contents))


def layout_name(contents: Mapping[str, StoredTensor]) -> str:
    """The layouts of a file's quantised weights; empty if it has none."""
    return " and ".join(sorted({weight.layout for weight in quantised_weights(contents)}))


def native_linear(contents: Mapping[str, StoredTensor]) -> str:
    """The linear of the recipe that holds most of a file's quantised weights exactly, or that comes nearest; empty if
    it has none."""
    counts = Counter(weight.encoding.linear for weight in quantised_weights(contents))
    return counts.most_common(1)[0][0] or NEAREST if counts else ""
