"""HuggingFace diffusers' transformer and VAE with a bundle's weights, in our sampling loop: a baseline to beat, not
a way to serve requests. diffusers is imported when this backend is created and need not be installed otherwise."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from wanforge.configs.clip import MAX_POSITIONS, PATCH, ClipShape
from wanforge.configs.model import HEAD_DIM, DiTConfig, VAEConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.bundle import Bundle, dit_component
from wanforge.errors import ResourceError
from wanforge.host.capacity import available_bytes
from wanforge.requirements import install_package
from wanforge.runtime.backends.base import Session
from wanforge.runtime.backends.torch import TorchBackend, gpu_or_host
from wanforge.runtime.causal.kept import KeptApart
from wanforge.runtime.memory.arena import Runnable
from wanforge.runtime.reference.dit import patchify, unpatchify
from wanforge.runtime.reference.names import match_names
from wanforge.runtime.reference.quantised_weights import WEIGHTS, dequantised
from wanforge.runtime.reference.vae import latent_statistics
from wanforge.runtime.schedule import GraphRun, Ref, Schedule

TRANSFORMER = "transformer"
"""The one graph run of a step, in place of the denoiser's graphs."""


def wan_classes() -> tuple[Any, Any]:
    """diffusers' classes of the transformer and the VAE.

    Raises:
        ImportError, RuntimeError: diffusers is not installed, too old, or broken.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own and its dependencies' deprecations
        from diffusers import AutoencoderKLWan, WanTransformer3DModel
    return WanTransformer3DModel, AutoencoderKLWan


def missing() -> str | None:
    """Why this baseline cannot run here, or None."""
    try:
        wan_classes()
    except (ImportError, RuntimeError) as error:
        return f"diffusers' Wan networks cannot be imported ({error}); run: {install_package('diffusers')}"
    return None


class DiffusersBackend(TorchBackend):
    """The denoiser and the VAE as diffusers computes them and the text encoder as the reference does, in bfloat16 on a
    GPU and in float32 without one.

    A step is one call of the whole transformer, which recomputes the modulation and the keys and values of the text
    every time. The VAE is called chunk by chunk, as its own `decode` does.

    Raises:
        ResourceError: There is too little memory for the weights, which are held in the compute type.
    """

    name = "diffusers"

    def __init__(self, bundle: Bundle, dtype: torch.dtype | None) -> None:
        super().__init__(bundle, dtype, on=gpu_or_host())
        model = bundle.model
        self.note = note(bundle.recipe)
        self.networks = {dit_component(expert): transformer(model.dit) for expert in model.experts}
        self.networks["vae"] = vae(model.vae)
        self._check_memory()
        for component, network in self.networks.items():
            load(network, component, self.weights.component(component), self.dtype)
            network.to(self.device)

    def _check_memory(self) -> None:
        sizes = (p.numel() for network in self.networks.values() for p in network.parameters())
        needed = sum(sizes) * self.dtype.itemsize
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else available_bytes()
        if needed > free:
            raise ResourceError(
                f"diffusers holds its weights in {self.dtype}, which takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} "
                "GB are free; leave out this baseline"
            )

    def prepare(self, clip: ClipShape, kept: KeptApart | None = None) -> None:
        self.grid = clip.grid

    def session(self, schedule: Schedule) -> Session:
        return super().session(merged(schedule))

    def bind(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        network = self.networks.get(graph_run.component)
        if network is None:
            return super().bind(graph_run, inputs, outputs)
        if graph_run.graph == TRANSFORMER:
            compute = partial(velocity, network, grid=self.grid)
        else:
            _, half, chunk = graph_run.graph.split("_")
            compute = partial(HALVES[half], network, is_first=chunk == "first")
        (output,) = outputs

        def run() -> None:
            with torch.inference_mode():
                output.copy_(compute(*inputs))

        return run


def note(recipe: Recipe) -> str:
    """What this backend computes, and where it departs from a recipe."""
    said = [
        f"transformer and VAE of diffusers {version('diffusers')} in this sampling loop, text encoder of the reference"
    ]
    if recipe.is_sparse:
        said.append("dense attention in place of sparse-linear attention, whose linear branch it lacks")
    if recipe.linear != "bf16":
        said.append("quantised weights dequantised, activations not rounded")
    if recipe.compat == "upstream":
        said.append("layer norms without upstream's fault")
    return "; ".join(said)


def transformer(config: DiTConfig) -> Any:
    """diffusers' transformer without weights. Its timestep input is the sinusoid ``[S]``: diffusers would compute that
    in float32, which is off by up to 6e-5."""
    make, _ = wan_classes()
    with torch.device("meta"):
        network = make(
            num_attention_heads=config.num_heads,
            attention_head_dim=HEAD_DIM,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            text_dim=config.text_dim,
            freq_dim=config.frequency_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            eps=config.eps,
        )
    # The RoPE tables are not weights, so they are computed here, outside of the meta device.
    network.rope = type(network.rope)(HEAD_DIM, network.config.patch_size, MAX_POSITIONS)
    network.condition_embedder.timesteps_proj = nn.Unflatten(0, (1, -1))
    return network.eval()


def vae(config: VAEConfig) -> Any:
    """diffusers' VAE without weights."""
    _, make = wan_classes()
    with torch.device("meta"):
        return make(base_dim=config.dim, z_dim=config.latent_channels).eval()


def load(network: Any, component: str, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Load a network's weights in the compute type, or in float32 where diffusers requires it."""
    wanted = network.state_dict()
    names, _ = match_names(component, weights, wanted)
    exact: Collection[str] = network._keep_in_fp32_modules or ()
    state = {}
    for name, theirs in names.items():
        value = dequantised(weights, name) if name.endswith(WEIGHTS) else weights[name]
        kept = torch.float32 if any(part in exact for part in theirs.split(".")) else dtype
        state[theirs] = value.to(kept).reshape(wanted[theirs].shape)
    network.load_state_dict(state, assign=True)


def merged(schedule: Schedule) -> Schedule:
    """A schedule whose steps are one graph run each, with nothing before them, and whose VAE keeps its own caches."""
    if schedule.stage == "text":
        return schedule
    if schedule.stage != "denoise":
        programs = {
            name: tuple(replace(each, inputs=each.inputs[:1], outputs=each.outputs[:1]) for each in graph_runs)
            for name, graph_runs in schedule.programs.items()
        }
        return replace(schedule, programs=programs)
    programs = dict.fromkeys(schedule.programs, ())
    for index, name in enumerate(schedule.steps()):
        inputs = Ref("patches"), Ref(f"sinusoid.{index}"), Ref("text")
        component = schedule.programs[name][0].component
        programs[name] = (GraphRun(TRANSFORMER, inputs, (Ref("velocity"),), component),)
    return replace(schedule, programs=programs)


def velocity(
    network: Any, patches_BLC: Tensor, sinusoid_BS: Tensor, text_BTE: Tensor, *, grid: tuple[int, int, int]
) -> Tensor:
    """The velocity's tokens, channel last within a token, from the latents' tokens, channel first within a token."""
    latents_BCFHW = unpatchify(channel_last(patches_BLC), grid)
    (velocity_BCFHW,) = network(latents_BCFHW, sinusoid_BS[0], text_BTE, return_dict=False)
    return channel_last(patchify(velocity_BCFHW))


def channel_last(tokens_BLC: Tensor) -> Tensor:
    """Tokens reordered from channel first to channel last within a token."""
    return tokens_BLC.unflatten(-1, (-1, PATCH * PATCH)).transpose(-1, -2).flatten(-2)


def decode(network: Any, latent_BCTHW: Tensor, *, is_first: bool) -> Tensor:
    """The next chunk of a clip's pixels."""
    if is_first:
        network.clear_cache()
    mean, std = latent_statistics(latent_BCTHW)
    x = network.post_quant_conv(latent_BCTHW / (1.0 / std) + mean)
    return network.decoder(x, feat_cache=network._feat_map, feat_idx=[0], first_chunk=is_first)


def encode(network: Any, pixels_BCTHW: Tensor, *, is_first: bool) -> Tensor:
    """The next chunk of a clip's normalised latents."""
    if is_first:
        network.clear_cache()
    x = network.quant_conv(network.encoder(pixels_BCTHW, feat_cache=network._enc_feat_map, feat_idx=[0]))
    mean, std = latent_statistics(x)
    return (x.chunk(2, 1)[0] - mean) * (1.0 / std)


HALVES = {"decode": decode, "encode": encode}
