"""What the decoder of the VAE would gain, and lose, by other ways to compute it: ``python -m tools.vae_formats``.

Two tables predict the time of decoding, with several latent frames at once and with 3x3x3 convolutions in other number
formats. A third has the PSNR of pixels against those in float32, of TinyWan's trained VAE and of one with random
weights and the published width. Convolutions in int8 are those of a recipe with ``vae = "int8"``, in bfloat16 and fp16
otherwise; their time is that of this package's kernel.

Letters: as in `vae`.
"""

from collections.abc import Callable, Sequence

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tools.pages.kernels import SMALL, TITLES, fused
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig, VAEConfig, load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import Target, load_targets
from wanforge.engines.bundle.shapes import concrete
from wanforge.exporter.checkpoint.embedded import embedded
from wanforge.plugins.launching.launch import INTERPRETED_SM, recording
from wanforge.runtime.backends.decoder import NEXT
from wanforge.runtime.backends.decoder.decoder import channels_last, decoder_of
from wanforge.runtime.backends.decoder.recorded import COMPUTE
from wanforge.runtime.backends.decoder.weights import laid_out
from wanforge.runtime.graphs import Port, graphs
from wanforge.runtime.measure.cost.decoder import chunk_costs, decoder_chunk, decoder_clip
from wanforge.runtime.measure.cost.launches import LaunchCost, peak
from wanforge.runtime.measure.cost.prediction import SHARES, predicted, predicted_seconds
from wanforge.runtime.measure.parity.metrics import psnr
from wanforge.runtime.measure.tables import markdown_table, number
from wanforge.runtime.reference.quantised_weights import quantised_vae
from wanforge.runtime.reference.vae import VAE, Conv

GPUS = ("rtx4090", "rtx5090", "l40s", "h100", "h200", "b200")
TOGETHER = (1, 2, 4, 20)
"""How many latent frames are decoded at once."""
PRODUCTS = 16
"""Products that a tensor core adds up before it rounds a sum to fp16."""
DOUBLE_RATE = (86, 89, 120)
"""Architectures of GeForce, which multiply fp16 at twice the rate if the sums are in fp16."""

Convolution = Callable[[Conv, Tensor], Tensor]
"""Computes a layer at its input."""


# Predictions.


def several_frames(model: ModelConfig, shape: ClipShape, count: int) -> tuple[LaunchCost, ...]:
    """The launches that decode so many latent frames at once, after the first."""
    graph = graphs(model, load_recipe("bf16"))[NEXT]
    sizes = {"latent_height": shape.latent_height, "latent_width": shape.latent_width}

    def blank(port: Port, times: int = 1) -> Tensor:
        batch, channels, frames, *space = concrete(port.shape, sizes)
        return torch.empty(batch, channels, times * frames, *space, dtype=COMPUTE, device="meta")

    (latents, *past), (pixels, *kept) = graph.inputs, graph.outputs
    state = graph.owner.state_dict()
    weights = laid_out({name: state[name] for name in graph.weights}, COMPUTE)
    with recording(INTERPRETED_SM) as found, torch.device("meta"):
        before, after = ([channels_last(blank(port)) for port in ports] for ports in (past, kept))
        decoder_of(graph).run(weights, blank(latents, count), before, blank(pixels, count), after)
    return chunk_costs(found, model)


def frames_table(model: ModelConfig, shape: ClipShape) -> str:
    first, more = decoder_chunk(model, shape, is_first=True), shape.latent_frames - 1
    later = {count: several_frames(model, shape, count) for count in TOGETHER}
    rows = []
    for target in map(load_targets().__getitem__, GPUS):
        times = [
            predicted_seconds(first, target) + more / count * predicted_seconds(costs, target)
            for count, costs in later.items()
        ]
        rows.append([target.title, number(times[0]), *(f"{number(t)} ({times[0] / t:.3f} x)" for t in times[1:])])
    return markdown_table(["latent frames at once", *map(str, TOGETHER)], rows)


def in_format(launches: Sequence[LaunchCost], target: Target, rate: float, narrower: int) -> float:
    """Seconds of the decoder if its 3x3x3 convolutions run at a rate, in operations per second.

    Args:
        narrower: How many times fewer bytes each of their inputs has.
    """
    seconds = 0.0
    for launch, known in zip(launches, predicted(launches, target), strict=True):
        if launch.name == "convolve":
            saved = launch.bytes_read * (1 - 1 / narrower) / launch.total_bytes
            seconds += max(launch.total_flops / rate, known.dram_seconds * (1 - saved))
        else:
            seconds += known.seconds
    return seconds


def formats_table(model: ModelConfig, shape: ClipShape) -> str:
    launches, rows = decoder_clip(model, shape), []
    for target in map(load_targets().__getitem__, GPUS):
        sixteen = peak(target, "fp16") * SHARES["fp16"]
        now = predicted_seconds(launches, target)
        half = in_format(
            launches, target, sixteen * (2 if target.sm in DOUBLE_RATE and "GeForce" in target.title else 1), 1
        )
        eight = predicted_seconds(decoder_clip(model, shape, "int8"), target)
        rows.append([target.title, number(now), *(f"{number(t)} ({now / t:.2f} x)" for t in (half, eight))])
    return markdown_table(["3x3x3 convolutions in", "bf16", "fp16, fp16 sums", "int8"], rows)


# Quality.


def plain(conv: Conv, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution in float32."""
    convolve = F.conv3d if weight.ndim == 5 else F.conv2d
    return convolve(x, weight, bias, conv.stride, conv.padding)


def rounded_to(dtype: torch.dtype) -> Convolution:
    """Input, weight and result in a type, and sums in float32."""

    def convolution(conv: Conv, x: Tensor) -> Tensor:
        given = (each.to(dtype).float() for each in (x, conv.weight, conv.bias))
        return plain(conv, *given).to(dtype).float()

    return convolution


in_fp16 = rounded_to(torch.float16)


def fp16_sums(conv: Conv, x: Tensor) -> Tensor:
    """Sums that are rounded to fp16 after every few products, in 3x3x3 convolutions."""
    if conv.weight.shape[2:] != (3, 3, 3):
        return in_fp16(conv, x)
    x, weight = x.half().float(), conv.weight.half().float()
    total = torch.zeros(())
    for tap in range(27):
        is_tap = (torch.arange(27) == tap).view(3, 3, 3)
        for x_part, weight_part in zip(x.split(PRODUCTS, 1), weight.split(PRODUCTS, 1), strict=True):
            total = (total + plain(conv, x_part, weight_part * is_tap, None)).half().float()
    return (total + conv.bias.view(-1, 1, 1, 1)).half().float()


FORMATS: dict[str, Convolution] = {
    "bf16": rounded_to(torch.bfloat16),
    "fp16": in_fp16,
    "fp16, fp16 sums": fp16_sums,
}
NAMES = (*FORMATS, "int8")


@torch.inference_mode()
def decoded(vae: VAE, latents_BCTHW: Tensor, convolution: Convolution | None = None) -> Tensor:
    """Pixels, with each convolution of the decoder computed in a number format; in float32 if it is None."""
    layers = [layer for layer in vae.decoder.modules() if isinstance(layer, Conv)] if convolution else []
    try:
        for layer in layers:
            layer.forward = lambda x, layer=layer: convolution(layer, x)  # type: ignore
        return vae.decode(latents_BCTHW)
    finally:
        for layer in layers:
            del layer.forward


@torch.inference_mode()
def decoded_in_int8(vae: VAE, latents_BCTHW: Tensor) -> Tensor:
    """Pixels, with the convolutions behind a norm in int8 and everything else in bfloat16."""
    narrow, state = VAE(vae.config, "int8"), vae.state_dict()
    narrow.load_state_dict(quantised_vae(state, narrow.state_dict()))
    return narrow.decode(latents_BCTHW.bfloat16()).float()


def trained() -> VAE:
    """TinyWan's VAE, in float32."""
    model = load_model("tinywan")
    vae = VAE(model.vae)
    vae.load_state_dict({name: each.float() for name, each in load_file(embedded(model).weights["vae"]).items()})
    return vae


def drawn(dim: int) -> VAE:
    """A VAE with random weights, whose activations keep their size."""
    vae, generator = VAE(VAEConfig(dim=dim)), torch.Generator().manual_seed(dim)
    for name, weight in vae.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        is_gain, is_bias = name.endswith(".gamma"), name.endswith(".bias")
        weight.copy_(1 + 0.2 * values if is_gain else 0.3 * values if is_bias else values / weight[0].numel() ** 0.5)
    return vae


def circles(frames: int, height: int, width: int) -> Tensor:
    """Two circles that move over a plain background, ``[1, 3, T, H, W]`` in [-1, 1]."""
    y_HW, x_HW = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    pictures = []
    for frame in range(frames):
        red = ((x_HW - 30 - 4 * frame) ** 2 + (y_HW - height / 2) ** 2 < 20**2).float()
        green = ((x_HW - 90) ** 2 + (y_HW - 30 - 3 * frame) ** 2 < 14**2).float()
        pictures.append(torch.stack((0.1 + 0.8 * red, 0.1 + 0.7 * green, 0.15 + 0.3 * red + 0.3 * green)))
    return 2 * torch.stack(pictures, 1)[None] - 1


def psnr_of(vae: VAE, latents_BCTHW: Tensor) -> list[float]:
    """PSNR by format, in dB of the range of the pixels in float32."""
    exact = decoded(vae, latents_BCTHW)
    span = float(exact.max() - exact.min())
    found = [*(decoded(vae, latents_BCTHW, each) for each in FORMATS.values()), decoded_in_int8(vae, latents_BCTHW)]
    return [psnr(float((each - exact).square().mean()), span) for each in found]


def quality_table() -> str:
    tiny, generator = trained(), torch.Generator().manual_seed(1)
    with torch.inference_mode():
        latents = tiny.encode(circles(9, 112, 128))
    cases = {
        "TinyWan's, moving circles": (tiny, latents),
        "random weights of the published width": (drawn(96), torch.randn(1, 16, 2, 3, 4, generator=generator)),
    }
    rows = [[name, *(f"{each:.1f}" for each in psnr_of(*case))] for name, case in cases.items()]
    return markdown_table(["PSNR in dB", *NAMES], rows)


def main() -> None:
    w = fused(SMALL)
    print(f"Decoding in seconds, predicted, {TITLES[SMALL]}\n\n{frames_table(w.model, w.shape)}\n")
    print(f"{formats_table(w.model, w.shape)}\n\n{quality_table()}")


if __name__ == "__main__":
    main()
