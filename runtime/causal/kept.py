"""Keys and values that a stream keeps apart from where attention reads them: each once, and read layer by layer.

That is how they are kept if they are codes of 8 bits, or if later chunks see them at other times.
"""

from dataclasses import dataclass

from wanforge.configs.causal import CachePolicy
from wanforge.configs.model import HEAD_DIM, DiTConfig
from wanforge.engines.bundle.shapes import Dim, Size
from wanforge.plugins.recall import GROUP
from wanforge.runtime.dtypes import PortType
from wanforge.runtime.graphs import Port
from wanforge.runtime.reference.causal.kv_codes import KVFormat

RECALL = "recall"
"""What reads a layer's keys and values, as `plugins.recall` defines it, to where attention in all layers reads them."""

PORT_TYPES: dict[KVFormat, PortType] = {"native": "compute", "int8": "int8", "fp8": "float8_e4m3fn"}


@dataclass(frozen=True)
class KeptApart:
    """How a stream keeps keys and values.

    Attributes:
        form: The format of the numbers.
        chunks: The most chunks that are kept at the same time.
    """

    form: KVFormat
    chunks: int

    def groups(self, tokens: int) -> int:
        """The groups of 64 rows in which the keys of chunks of so many tokens lie."""
        return self.chunks * -(-tokens // GROUP)

    def nbytes(self, dit: DiTConfig, tokens: int, itemsize: int) -> int:
        """The bytes of all layers' keys and values.

        Args:
            tokens: Of the longest chunk.
            itemsize: Bytes of one element of the compute type.
        """
        numbers = 2 * dit.num_layers * GROUP * self.groups(tokens) * dit.dim
        return numbers * itemsize if self.form == "native" else numbers + numbers // GROUP


def kept_apart(policy: CachePolicy, form: KVFormat, num_chunks: int | None) -> KeptApart | None:
    """How a video keeps keys and values apart from where attention reads them; None if it reads them where they are.

    Args:
        num_chunks: Of the video; None if it has no end, which only a policy that forgets allows.
    """
    if form == "native" and not policy.moves:
        return None
    # The bank of a sink outlives the window, and the last chunk is not remembered.
    most = [policy.capacity + policy.recent * policy.has_bank] if policy.capacity else []
    most += [] if num_chunks is None else [num_chunks - 1]
    return KeptApart(form, max(1, min(most)))


@dataclass(frozen=True)
class Recall:
    """The ports of what reads the keys and values of one layer.

    Attributes:
        kept: The names of the inputs that are kept for each layer. The others are the same for all of them.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    kept: tuple[str, ...]


def recall_of(kept: KeptApart, dim: int) -> Recall:
    """The ports of what reads keys and values that are kept in some way; those of `Recall.kept` are, in this order,
    `reference.KeptRows`.

    Args:
        dim: The model's width.
    """
    past, groups = Size(("past_tokens",)), Size(("kept_groups",))
    rows, dtype = groups * GROUP, PORT_TYPES[kept.form]

    def port(name: str, height: Dim, width: int, dtype: PortType) -> Port:
        return Port(name, (height, width), dtype)

    ports = [port("kept_keys", rows, dim, dtype), port("kept_values", rows, dim, dtype)]
    if kept.form != "native":
        ports.append(port("key_scale", groups, dim, "float8_e4m3fn"))
        ports.append(port("value_scale", rows, dim // GROUP, "float8_e4m3fn"))
    angles = [port(name, past, HEAD_DIM // 2, "float32") for name in ("past_cos", "past_sin")]
    outputs = [Port(name, (1, past, dim // HEAD_DIM, HEAD_DIM)) for name in ("past_keys", "past_values")]
    names = tuple(each.name for each in ports)
    return Recall((*ports, Port("places", (past,), "int32"), *angles), tuple(outputs), names)
