"""The denoiser's blocks and the VAE's decoder as kernels, everything else as in the reference.

If there is a GPU, the backend uses it, in bfloat16. Otherwise the kernels of the blocks run in Triton's interpreter,
which is slow but shows that they are correct. The decoder has too many positions for that, so it runs as in the
reference there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ConfigError
from wanforge.plugins.block_quantiser.fused import FourBitMatrix
from wanforge.plugins.denoiser_block.fused import (
    BlockObserver,
    FusedBlock,
    Input,
    Linears,
    StreamMoments,
    check_kernels,
    recipe_for,
)
from wanforge.plugins.launching.launch import Launch, architecture_of
from wanforge.plugins.nvfp4_linear import INPUT_SCALE
from wanforge.plugins.nvfp4_linear import reference as nvfp4
from wanforge.plugins.quantiser.fused import Quantised
from wanforge.plugins.quantiser.reference import dequantise
from wanforge.plugins.row_moments.fused import KnownRows, measure, measured
from wanforge.runtime.backends.block_launches import DividedBlock, launches_of_unknown_rows
from wanforge.runtime.backends.block_launches import launches as block_launches
from wanforge.runtime.backends.decoder import FIRST, NEXT
from wanforge.runtime.backends.decoder.decoder import NOT_DIVIDED, channels_last, decoder_of
from wanforge.runtime.backends.decoder.recorded import launches as decoder_launches
from wanforge.runtime.backends.decoder.weights import laid_out
from wanforge.runtime.backends.fused_chunk_block import FusedChunkBlock, chunk_launches
from wanforge.runtime.backends.passed_moments import AFTER, BEFORE, with_moments
from wanforge.runtime.backends.planned import Planned
from wanforge.runtime.backends.recalling import FORMS, Recalling, recall_launches
from wanforge.runtime.backends.taps import Taps
from wanforge.runtime.backends.torch import Runner, TorchBackend, gpu_or_host
from wanforge.runtime.causal.kept import KeptApart
from wanforge.runtime.graphs import Graph
from wanforge.runtime.memory.arena import FixedTensors, Runnable
from wanforge.runtime.memory.device import Device
from wanforge.runtime.reference.ranks.exchange import Alone, Exchange
from wanforge.runtime.reference.ranks.shares import Division
from wanforge.runtime.reference.ranks.strips import Strip
from wanforge.runtime.schedule import GraphRun, Schedule

QUANTISED = ("self_attn.q.in", "self_attn.o.in", "norm3", "cross_attn.o.in", "ffn.0.in", "ffn.2.in")
"""The taps at the inputs of the linears."""
EXCHANGING = ("block", "vae_")
"""How the names of graphs begin in which several GPUs exchange tensors."""


class CudaBackend(TorchBackend):
    """The reference with the denoiser's blocks and the VAE's decoder replaced by kernels.

    Attributes:
        fuses_decoder: Whether the decoder is. Its caches then lie with their channels last.
        strip: The rows of pictures that this process has in the VAE; None before the first clip is divided.

    Args:
        exchange: How this process exchanges tensors with those on the other GPUs, if a clip is divided among several.
    """

    name = "cuda"

    def __init__(
        self,
        bundle: Bundle,
        dtype: torch.dtype | None,
        budget: float | None = None,
        on: Device | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__(bundle, dtype, budget, on or gpu_or_host())
        recipe = bundle.recipe
        if self.device.type == "cuda":
            sm = architecture_of(self.device)
            check_kernels(recipe, sm)
            recipe = recipe_for(recipe, sm)
        self.exchange = exchange or Alone()
        if self.exchange.ranks > 1 and recipe.vae == "int8":
            raise ConfigError(NOT_DIVIDED)
        self.recalling = Recalling(by_kernel=True)
        self.block = FusedBlock(bundle.model.dit, recipe)
        self.planned, self.planned_moments = Planned(self.run_block), Planned(measure_rows)
        self.chunk_block = FusedChunkBlock(bundle.model.dit, recipe)
        self.planned_chunk = Planned(self.run_chunk_block)
        self.fuses_decoder = self.device.type == "cuda"
        self.strip: Strip | None = None
        self.decoder = decoder_of(self.graphs[NEXT])
        self.planned_decoder = Planned(self.run_decoder)
        self._decoder_weights = FixedTensors()
        self._divided: ClipShape | None = None
        # The kernel before a quantised linear quantises its input; attention rounds and selects.
        self.rounds_at = ("self_attn.o.in",) if recipe.linear == "bf16" else QUANTISED

    def prepare(self, clip: ClipShape, kept: KeptApart | None = None) -> None:
        """Get ready for clips of this size and length, and divide them if there are several GPUs.

        Raises:
            ShapeError: The clip is too small to be divided among so many GPUs.
        """
        super().prepare(clip, kept)
        if self.exchange.ranks == 1 or clip == self._divided:
            return
        dit, recipe = self.bundle.model.dit, self.block.recipe
        division = Division(self.exchange, clip.tokens, dit.num_heads, recipe.rows_per_scale)
        self.strip = Strip(self.exchange, clip.latent_height)
        # What was planned for another clip exchanges other shapes, even if this rank has as many tokens and rows.
        self.block, self.decoder = DividedBlock(dit, recipe, division), decoder_of(self.graphs[NEXT], self.strip)
        self.planned, self.planned_decoder = Planned(self.run_block), Planned(self.run_decoder)
        self._divided = clip

    def ported(self, graphs: Mapping[str, Graph]) -> Mapping[str, Graph]:
        return with_moments(graphs, self.bundle.recipe) if self.weights.side_rank == 0 else graphs

    def can_record(self, graph_run: GraphRun) -> bool:
        return self.exchange.ranks == 1 or not graph_run.graph.startswith(EXCHANGING)

    def runner(self, graph: Graph) -> Runner:
        if self.strip is None or not graph.name.startswith("vae_"):
            return super().runner(graph)
        return replace(graph, call=partial(graph.call, rows=self.strip)).run

    def buffers(self, schedule: Schedule) -> Mapping[str, Tensor]:
        found = super().buffers(schedule)
        if schedule.stage not in ("decode", "stream") or not self.fuses_decoder:
            return found
        return {
            name: channels_last(found[name]) if name.removeprefix("decode.").startswith("cache_") else found[name]
            for name in schedule.buffers
        }

    def bind_graph(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        graph = self.graphs[graph_run.graph]
        tensors = self._by_port(graph_run, inputs, outputs)
        if graph_run.graph == "stem" and BEFORE in tensors:
            return self._bind_stem(graph_run, inputs, outputs)
        if graph_run.graph == "block":
            return self._bind_block(graph_run, tensors, self.planned)
        if graph_run.graph == "chunk_block":
            return self._bind_block(graph_run, tensors, self.planned_chunk)
        if graph.name in (FIRST, NEXT) and self.fuses_decoder:
            return self._bind_decoder(graph_run, tensors)
        return super().bind_graph(graph_run, inputs, outputs)

    def _by_port(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors of a graph run by the names of its ports; those of moments may be left out together."""
        ported, plain = (each[graph_run.graph] for each in (self.ported(self.graphs), self.graphs))
        bound = ported if len(outputs) == len(ported.outputs) else plain
        pairs = (*zip(bound.inputs, inputs, strict=True), *zip(bound.outputs, outputs, strict=True))
        return {port.name: tensor for port, tensor in pairs}

    def _bind_stem(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        hidden_BLD, moments_2TL = outputs
        embed = super().bind_graph(graph_run, inputs, [hidden_BLD])

        def run() -> None:
            embed()
            with torch.inference_mode():
                self.planned_moments({"hidden": hidden_BLD, BEFORE: moments_2TL})

        return run

    def _bind_block(self, graph_run: GraphRun, tensors: Mapping[str, Tensor], planned: Planned) -> Runnable:
        weights = self.memory.weights(graph_run, self.graphs[graph_run.graph].weights)

        def run() -> None:
            with torch.inference_mode():
                planned(tensors, weights)

        return run

    def _bind_decoder(self, graph_run: GraphRun, tensors: Mapping[str, Tensor]) -> Runnable:
        stored = self.memory.weights(graph_run, self.graphs[graph_run.graph].weights)

        def run() -> None:
            with torch.inference_mode():
                if not self._decoder_weights:  # what is stored is in place only now
                    self._decoder_weights = FixedTensors(laid_out(stored, self.dtype))
                self.planned_decoder(tensors, self._decoder_weights)

        return run

    def run_decoder(self, tensors: Mapping[str, Tensor]) -> None:
        """Decode a chunk of its inputs, its outputs and its weights, by their names in the graph."""
        graph = self.graphs[NEXT]
        past = [tensors[port.name] for port in graph.inputs[1:] if port.name in tensors]
        kept = [tensors[port.name] for port in graph.outputs[1:]]
        self.decoder.run(tensors, tensors["latent"], past or None, tensors["pixels"], kept)

    def run_block(self, tensors: Mapping[str, Tensor]) -> None:
        """Compute a block of its inputs, its output and its weights, by their names in the graph."""
        graph = self.graphs["block"]
        inputs = [tensors[port.name] for port in graph.inputs]
        self.block.run(tensors, inputs, tensors[graph.outputs[0].name], moments_of(tensors))

    def run_chunk_block(self, tensors: Mapping[str, Tensor]) -> None:
        """Compute a causal model's block of its inputs, its outputs and its weights, by their names in the graph."""
        graph = self.graphs["chunk_block"]
        inputs, outputs = ([tensors[port.name] for port in ports] for ports in (graph.inputs, graph.outputs))
        self.chunk_block.run_chunk(tensors, inputs, outputs, moments_of(tensors))

    def taps(self, graph_run: GraphRun, inputs: Sequence[Tensor], forced: Mapping[str, Tensor] | None = None) -> Taps:
        observer, hidden_out = ForcedTaps(forced or {}, self.dtype), torch.empty_like(inputs[0])
        with torch.inference_mode():
            self.block.run(self.own_state(graph_run), inputs, hidden_out, observer=observer)
        return {**observer.found, "hidden_out": hidden_out}


def moments_of(tensors: Mapping[str, Tensor]) -> StreamMoments:
    """The moments of the residual stream among tensors by port. A graph run that stays apart from others has none,
    because what it reads may have been written by anyone."""
    return StreamMoments(tensors.get(BEFORE), tensors.get(AFTER))


def measure_rows(tensors: Mapping[str, Tensor]) -> None:
    """Find the moments that the first block reads."""
    measure(tensors["hidden"][0], tensors[BEFORE])


def launches(model: ModelConfig, recipe: Recipe, sm: int, shape: ClipShape | None = None) -> list[Launch]:
    """Every kernel launch of a block, with a side path for LoRAs and without, and of the decoder on an architecture, in
    bfloat16; see `block_launches.launches` and `launches_of_unknown_rows`, `chunk_launches`, `recall_launches` and
    `decoder.recorded.launches`."""
    of_block = chunk_launches if model.causal else block_launches
    beside = of_block(model, recipe, sm, shape, side_path=True) if recipe.linear != "bf16" else []
    read = [each for form in FORMS for each in recall_launches(model, form, sm, shape)] if model.causal else []
    own = [*of_block(model, recipe, sm, shape), *launches_of_unknown_rows(model, recipe, sm, shape)]
    return [*own, *beside, *read, *decoder_launches(model, sm, shape, recipe.vae)]


class ForcedTaps(BlockObserver):
    """Records the values that the kernels compute, and replaces them by those of the reference."""

    def __init__(self, forced: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.forced, self.dtype = forced, dtype
        self.found: Taps = {}

    def wanted(self, name: str, like_LD: Tensor) -> Tensor:
        """A copy of the reference's value in the shape and type and on the device of the kernels' value."""
        return self.forced[name].to(like_LD).reshape(like_LD.shape).clone()

    def value(self, name: str, x_LD: Tensor) -> Tensor:
        if name not in self.forced:
            return x_LD
        self.found[name] = x_LD.view(self.forced[name].shape)
        return self.wanted(name, x_LD)

    def stream(self, name: str, x: KnownRows) -> KnownRows:
        self.found[name] = x.x_LD.clone().view(self.forced[name].shape)
        x.x_LD.copy_(self.wanted(name, x.x_LD))
        return x if x.moments_2TL is None else measured(x.x_LD)

    def input(self, name: str, x: Input, layers: Linears) -> Input:
        if name not in self.forced:
            return x
        expected = self.forced[name]
        if isinstance(x, Tensor):
            return self.value(name, x)
        computed_LD = represented(x)
        taken = layers.pack(expected.to(computed_LD.device, self.dtype).reshape(computed_LD.shape))
        assert not isinstance(taken, Tensor)
        # The reference's value is not quantised here. Therefore both are compared after quantising, and what differs is
        # added to the reference's value.
        apart = computed_LD - represented(taken)
        self.found[name] = expected.to(apart) + apart.view(expected.shape)
        return taken


def represented(x: Quantised | FourBitMatrix) -> Tensor:
    """The values that a quantised matrix represents, float32 ``[M, K]``."""
    if isinstance(x, Quantised):
        return dequantise(x.steps_MK, x.scale)
    return nvfp4.dequantise(x.fp4_MP, x.scale_MB, x.fp4_MP.new_full((), INPUT_SCALE, dtype=torch.float32))
