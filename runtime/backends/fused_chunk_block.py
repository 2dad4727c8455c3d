"""One layer of a causal denoiser as kernels: computes the same as `runtime.reference.causal.network.run_chunk_block`.

What earlier chunks left and the chunk's own keys and values are never brought together: attention reads each where it
lies, values where the projection wrote them as an output.
"""

from collections.abc import Sequence

from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.errors import ConfigError
from wanforge.plugins.denoiser_block.fused import (
    UNKNOWN,
    FusedBlock,
    Input,
    Linears,
    StreamMoments,
    Weights,
    check_kernels,
    recipe_for,
)
from wanforge.plugins.dense_attention.fused import Own, chunk_attention, chunk_attention_into
from wanforge.plugins.launching.launch import Launch
from wanforge.plugins.rms_norm_rope.fused import rms_norm_rotate
from wanforge.runtime.backends.block_launches import recorded_launches
from wanforge.runtime.backends.passed_moments import with_moments
from wanforge.runtime.graphs import graphs

QKV = ("self_attn.q", "self_attn.k", "self_attn.v")


class FusedChunkBlock(FusedBlock):
    """One layer of a causal denoiser as kernels, with the arguments of `FusedBlock`."""

    def run_chunk(
        self,
        weights: Weights,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        moments: StreamMoments = UNKNOWN,
    ) -> None:
        """Compute the graph ``chunk_block``.

        Args:
            weights: The layer's tensors, named as in the graph, on the device of the inputs.
            inputs: The inputs of one sample, in the order of the graph's ports.
            outputs: Receive ``hidden_out``, ``own_keys`` and ``own_values``, contiguous. None of them may be an input.
            moments: As in `FusedBlock.around`.

        Raises:
            ShapeError: As in `FusedBlock.around`.
        """
        *_, cos_LP, sin_LP, past_keys, past_values, seen_bias = inputs
        out_BLD, own_keys, own_values = outputs
        # What is written must be the tensor itself, not a copy of it, and so must what a plan of launches reads.
        past_keys_PD, past_values_PD, plain_LD, v_LD = (
            each[0].view(-1, self.config.dim) for each in (past_keys, past_values, own_keys, own_values)
        )

        def attend(layers: Linears, a: Input) -> Input:
            q_LD, k_LD, _ = layers.project(a, QKV, v_LD)
            rms_norm_rotate([q_LD, k_LD], self.norms(weights), self.config.eps, (cos_LP, sin_LP), plain_LD)
            own, y = Own(k_LD, v_LD), layers.packed(q_LD)
            if y is None:
                return layers.pack(chunk_attention(q_LD, (past_keys_PD, past_values_PD), own, seen_bias))
            chunk_attention_into(y, (q_LD, past_keys_PD, past_values_PD), own, seen_bias)
            return y

        self.around(weights, inputs[:5], out_BLD, attend, moments)


def chunk_launches(
    model: ModelConfig,
    recipe: Recipe,
    sm: int,
    shape: ClipShape | None = None,
    text_rows: int | None = None,
    *,
    side_path: bool = False,
) -> list[Launch]:
    """Every kernel launch of one layer of a causal model at its longest chunk, on an architecture and in bfloat16;
    nothing is run. The arguments are those of `block_launches.launches`.

    Args:
        shape: Of a video whose last chunk sees as much as any; by default of the model's own.

    Raises:
        ConfigError: The model makes whole clips, or there are no kernels for the linears' format on the architecture.
    """
    check_kernels(recipe, sm)
    if not model.causal:
        raise ConfigError(f"{model.name} makes whole clips; this is for models that make a video chunk by chunk")
    runs, live = model.fitted(recipe_for(recipe, sm)), shape or model.video.clip
    known = graphs(model, runs, side_path=side_path)
    plain, block = (each["chunk_block"] for each in (known, with_moments(known, runs)))
    frame, chunk = live.tokens // live.latent_frames, model.causal.longest
    past = max(1, model.causal.past_frames(live.latent_frames))
    sizes = {
        "tokens": frame * chunk,
        "past_tokens": frame * past,
        "seen_tokens": frame * (past + chunk),
        "context_rows": text_rows or model.dit.text_rows,
    }
    fused, (read, written) = FusedChunkBlock(model.dit, runs), (len(plain.inputs), len(plain.outputs))

    def run(weights: Weights, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        moments = StreamMoments(*inputs[read:], *outputs[written:])
        fused.run_chunk(weights, inputs[:read], outputs[:written], moments)

    return recorded_launches(block, sizes, sm, run)
