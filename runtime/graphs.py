"""The graphs that a request is made of: small pieces of the reference networks with their weights as inputs.

A single graph `block` serves every layer, both experts and every LoRA: the runtime binds each layer's tensors to it.
Graphs with a side path have two more weights beside each quantised linear, the factors of a product of low rank, whose
rank is known only at run time. The exporter turns each graph into an ONNX file; the torch backend runs it directly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from wanforge.configs.clip import PATCH, SPATIAL_STRIDE, TEMPORAL_STRIDE
from wanforge.configs.model import HEAD_DIM, ModelConfig, VAEConfig
from wanforge.configs.recipe import Recipe, VAEFormat
from wanforge.engines.bundle.bundle import dit_component
from wanforge.engines.bundle.shapes import Shape, Size
from wanforge.plugins.low_rank import DOWN, LORA_RANK, RANKS, SIDE_PATH, is_factor
from wanforge.runtime.dtypes import PortType
from wanforge.runtime.reference.causal.network import KeysValues, Past, run_chunk_block
from wanforge.runtime.reference.dit import Block, DiT, TextKeys, add_side_paths, block_arguments
from wanforge.runtime.reference.preview import PreviewDecoder
from wanforge.runtime.reference.text_encoder import TextEncoder
from wanforge.runtime.reference.vae import VAE, Decoder, Encoder, Rows
from wanforge.runtime.reference.vae_caches import kept

FIRST_PREFIXES = {**dict.fromkeys(("text_block", "block", "chunk_block", "cross_kv"), "blocks.0."), "head": "head."}


@dataclass(frozen=True)
class Port:
    """One input or output of a graph."""

    name: str
    shape: Shape
    dtype: PortType = "compute"


@dataclass(frozen=True)
class Graph:
    """One piece of a network.

    Attributes:
        inputs, outputs: Its ports, without the weights.
        owner: The reference module it belongs to, on the meta device.
        call: Runs the piece: ``(owner, *inputs) -> output or outputs``.
        weights: Names of the owner's tensors that it reads.
        has_constants: Whether its ONNX file refers to the weights of the bundle instead of taking them as inputs.
    """

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    owner: nn.Module
    call: Callable[..., Any]
    weights: tuple[str, ...]
    has_constants: bool = False

    @property
    def prefix(self) -> str:
        """The prefix of the graph's weight names in the component; that of the first layer if there are several."""
        return FIRST_PREFIXES.get(self.name.removesuffix(SIDE_PATH), "")

    @property
    def factors(self) -> dict[str, Shape]:
        """The shapes of the weights that are factors of products of low rank, whose rank is known only at run time."""
        state, rank = self.owner.state_dict(), Size((LORA_RANK,))
        return {
            name: (rank, state[name].shape[1]) if name.endswith(DOWN) else (state[name].shape[0], rank)
            for name in self.weights
            if is_factor(name)
        }

    @property
    def has_side_path(self) -> bool:
        """Whether products of low rank are computed beside its linears."""
        return self.name.endswith(SIDE_PATH)

    def component(self, model: ModelConfig) -> str:
        """The component that the graph belongs to; if there are two denoisers, the one that is used first."""
        match self.name.partition("_")[0]:
            case "text":
                return "text_encoder"
            case "vae" | "preview" as component:
                return component
        return dit_component(model.experts[0])

    def run(self, weights: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the piece in PyTorch with these weights, named as in the attribute `weights`."""
        state = {f"owner.{name}": weights[name] for name in self.weights}
        result = torch.func.functional_call(_Piece(self.owner, self.call), state, tuple(inputs))
        return (result,) if isinstance(result, Tensor) else tuple(_flatten(result))


class _Piece(nn.Module):
    def __init__(self, owner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.owner, self.call = owner, call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.owner, *inputs)


def _flatten(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [leaf for part in result for leaf in _flatten(part)]


def _graph(
    name: str,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    owner: nn.Module,
    call: Callable[..., Any],
    uses: Callable[[str], bool] = lambda name: True,
    *,
    has_constants: bool = False,
) -> Graph:
    weights = tuple(name for name in owner.state_dict() if uses(name))
    return Graph(name, tuple(inputs), tuple(outputs), owner, call, weights, has_constants)


@cache
def graphs(model: ModelConfig, recipe: Recipe, *, side_path: bool = False) -> dict[str, Graph]:
    """Every graph of a model by its place in a request, in the order of a request. The result is cached: callers must
    not change it.

    Args:
        side_path: Whether products of low rank are computed beside the quantised linears. The graphs that have such
            linears then have other names, at the same places.
    """
    with torch.device("meta"):
        text_encoder, dit = TextEncoder(model.text_encoder), DiT(model.dit, recipe)
        preview = [PreviewDecoder(model.preview)] if model.preview else []
        if side_path:
            add_side_paths(dit, RANKS[0])
    found = [*_text_graphs(text_encoder), *_denoiser_graphs(dit, is_causal=bool(model.causal))]
    found += _vae_graphs(model.vae, recipe.vae, has_encoder=model.takes_image)
    found += [_preview_graph(decoder) for decoder in preview]
    return {graph.name: _named(graph) for graph in found}


def side_graphs(model: ModelConfig, recipe: Recipe) -> list[Graph]:
    """The graphs with a side path; none if the recipe quantises no linears."""
    return [graph for graph in graphs(model, recipe, side_path=True).values() if graph.has_side_path]


def _named(graph: Graph) -> Graph:
    """A graph under the name that tells whether it has a side path."""
    return replace(graph, name=graph.name + SIDE_PATH) if any(map(is_factor, graph.weights)) else graph


def _text_graphs(encoder: TextEncoder) -> list[Graph]:
    length, width = Size(("prompt_tokens",)), encoder.config.dim
    ids = Port("ids", (1, length), "int64")
    hidden, hidden_out = (Port(name, (1, length, width)) for name in ("hidden", "hidden_out"))
    buckets = Port("buckets", (length, length), "int64")
    embedding = Port("embedding", (1, length, width))
    return [
        _graph("text_embed", [ids], [hidden], encoder, _embed_ids, lambda name: name.startswith("token_embedding.")),
        _graph("text_block", [hidden, buckets], [hidden_out], encoder.blocks[0], _forward),
        _graph("text_final", [hidden], [embedding], encoder, _final_norm, lambda name: name.startswith("norm.")),
    ]


def _denoiser_graphs(dit: DiT, *, is_causal: bool) -> list[Graph]:
    config, block = dit.config, dit.blocks[0]
    dim, rows, layers = config.dim, config.text_rows, config.num_layers
    tokens, keys_kept, num_selected = Size(("tokens",)), Size(("context_rows",)), Size(("num_selected",))
    area = PATCH * PATCH

    patches = Port("patches", (1, tokens, area * config.in_channels))
    hidden, hidden_out = (Port(name, (1, tokens, dim)) for name in ("hidden", "hidden_out"))
    velocity = Port("velocity", (1, tokens, area * config.out_channels), "float32")
    text, context = Port("text", (1, rows, config.text_dim)), Port("context", (1, rows, dim))
    kept = Port("kept_rows", (keys_kept,), "int64")
    keys, values = (Port(name, (1, keys_kept, dim)) for name in ("keys", "values"))
    key_bias = Port("key_bias", (keys_kept,), "float32")
    cos, sin = (Port(name, (tokens, HEAD_DIM // 2), "float32") for name in ("cos", "sin"))
    sinusoid = Port("sinusoid", (1, config.frequency_dim), "float32")
    all_modulation = Port("layers", (layers, 1, 6, dim), "float32")
    modulation, head_modulation = (
        Port("modulation", (1, 6, dim), "float32"),
        Port("head", (1, 2, dim), "float32"),
    )
    selection = Port("selection", (num_selected,), "int32")

    return [
        _graph("context", [text], [context], dit, _embed_text, lambda name: name.startswith("text_embedding.")),
        _graph("cross_kv", [context, kept], [keys, values], block, _cross_keys_values, _is_cross_kv),
        _graph("time", [sinusoid], [all_modulation, head_modulation], dit, DiT.embed_time, _is_time),
        _graph("stem", [patches], [hidden], dit, _embed_patches, lambda name: name.startswith("patch_embedding.")),
        _chunk_graph(block, [hidden, modulation, keys, values, key_bias, cos, sin], hidden_out)
        if is_causal
        else _graph(
            "block",
            [hidden, modulation, keys, values, key_bias, cos, sin, selection],
            [hidden_out],
            block,
            _run_block,
            _is_of_block,
        ),
        _graph("head", [hidden, head_modulation], [velocity], dit.head, _forward, lambda name: name != "modulation"),
    ]


def _chunk_graph(block: nn.Module, inputs: Sequence[Port], hidden_out: Port) -> Graph:
    """The graph ``chunk_block``: a layer at one chunk, which sees keys and values of earlier chunks as well. The caller
    keeps those; how many of them there are is said by a bias of minus infinity on the others."""
    _, tokens, dim = hidden_out.shape
    assert isinstance(dim, int)
    past, seen = Size(("past_tokens",)), Size(("seen_tokens",))
    heads = (dim // HEAD_DIM, HEAD_DIM)
    earlier = [Port(name, (1, past, *heads)) for name in ("past_keys", "past_values")]
    own = [Port(name, (1, tokens, *heads)) for name in ("own_keys", "own_values")]
    ports = [*inputs, *earlier, Port("seen_bias", (seen,), "float32")]
    return _graph("chunk_block", ports, [hidden_out, *own], block, _run_chunk_block, _is_of_block)


def _vae_graphs(config: VAEConfig, form: VAEFormat, *, has_encoder: bool) -> list[Graph]:
    """The graphs of a VAE of their own: a module holds the weights that it runs with, so threads must not share it."""
    with torch.device("meta"):
        vae = VAE(config, form)
    rows, columns = Size(("latent_height",)), Size(("latent_width",))
    channels = vae.config.latent_channels
    latent = Port("latent", (1, channels, 1, rows, columns))
    tall, wide = rows * SPATIAL_STRIDE, columns * SPATIAL_STRIDE
    frame, frames = (Port("pixels", (1, 3, n, tall, wide)) for n in (1, TEMPORAL_STRIDE))

    def is_decoder(name: str) -> bool:
        return name.startswith(("decoder.", "conv2."))

    def is_encoder(name: str) -> bool:
        return name.startswith(("encoder.", "conv1."))

    past, later = _cache_ports(vae.decoder, rows, columns)
    found = [
        _graph("vae_decode_first", [latent], [frame, *later], vae, VAE.decode_first, is_decoder, has_constants=True),
        _graph("vae_decode_next", [latent, *past], [frames, *later], vae, _decode_next, is_decoder, has_constants=True),
    ]
    if has_encoder:
        past, later = _cache_ports(vae.encoder, rows, columns)
        found += [
            _graph(
                "vae_encode_first", [frame], [latent, *later], vae, VAE.encode_first, is_encoder, has_constants=True
            ),
            _graph(
                "vae_encode_next", [frames, *past], [latent, *later], vae, _encode_next, is_encoder, has_constants=True
            ),
        ]
    return found


def _preview_graph(preview: PreviewDecoder) -> Graph:
    rows, columns = Size(("latent_height",)), Size(("latent_width",))
    latent = Port("latent", (1, preview.config.latent_channels, 1, rows, columns))
    pictures = Port("pictures", (1, 3, TEMPORAL_STRIDE, rows * SPATIAL_STRIDE, columns * SPATIAL_STRIDE))
    past, kept = (
        [Port(f"state_{at}{end}", (1, dim, rows * n, columns * n)) for at, (dim, n) in enumerate(preview.states())]
        for end in ("", "_out")
    )
    return _graph("preview_next", [latent, *past], [pictures, *kept], preview, _decode_next, has_constants=True)


def _cache_ports(half: Encoder | Decoder, rows: Size, columns: Size) -> tuple[list[Port], list[Port]]:
    """The ports of a VAE half's caches, in and out, sized by the latent's rows and columns."""
    past = [
        Port(
            f"cache_{slot:02}",
            (1, cache.channels, cache.frames, rows * cache.scale, columns * cache.scale),
            "int8" if cache.is_int8 else "compute",
        )
        for slot, cache in enumerate(kept(half))
    ]
    return past, [replace(port, name=f"{port.name}_out") for port in past]


def _is_cross_kv(name: str) -> bool:
    return name.startswith(("cross_attn.k.", "cross_attn.v.", "cross_attn.norm_k."))


def _is_of_block(name: str) -> bool:
    return not _is_cross_kv(name) and name != "modulation"


def _is_time(name: str) -> bool:
    return name.startswith("time_") or name.endswith("modulation")


def _forward(owner: nn.Module, *inputs: Tensor) -> Any:
    return owner(*inputs)


def _run_block(block: Block, *inputs: Tensor) -> Tensor:
    return block(*block_arguments(inputs))


def _run_chunk_block(block: Block, *inputs: Tensor) -> tuple[Tensor, KeysValues]:
    hidden, modulation, keys, values, key_bias, cos, sin, past_keys, past_values, seen_bias = inputs
    text, past = TextKeys(keys, values, key_bias), Past(KeysValues(past_keys, past_values), seen_bias)
    return run_chunk_block(block, hidden, modulation, text, (cos, sin), past)


def _embed_ids(encoder: TextEncoder, ids_BT: Tensor) -> Tensor:
    return encoder.token_embedding(ids_BT)


def _final_norm(encoder: TextEncoder, hidden_BTE: Tensor) -> Tensor:
    return encoder.norm(hidden_BTE)


def _embed_text(dit: DiT, text_BTE: Tensor) -> Tensor:
    return dit.text_embedding(text_BTE)


def _embed_patches(dit: DiT, patches_BLC: Tensor) -> Tensor:
    return dit.patch_embedding(patches_BLC)


def _cross_keys_values(block: Block, context_BTD: Tensor, kept_rows: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = block.cross_attn.keys_values(context_BTD)
    return keys.index_select(1, kept_rows), values.index_select(1, kept_rows)


def _decode_next(decoder: Any, latent: Tensor, *past: Tensor, **rows: Rows) -> tuple[Tensor, list[Tensor]]:
    return decoder.decode_next(latent, past, **rows)


def _encode_next(vae: VAE, pixels: Tensor, *caches: Tensor, **rows: Rows) -> tuple[Tensor, list[Tensor]]:
    return vae.encode_next(pixels, caches, **rows)
