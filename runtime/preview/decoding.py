"""Decode latents with the preview decoder, between two steps of the denoiser or after the last."""

from collections.abc import Iterator

import torch
from torch import Tensor

from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import RequestError
from wanforge.runtime.backends.base import Session
from wanforge.runtime.reference.preview import DROPPED
from wanforge.runtime.schedule import PREVIEW


def check_preview(bundle: Bundle) -> None:
    """Refuse a bundle without a preview decoder.

    Raises:
        RequestError: It has none.
    """
    if not bundle.model.preview:
        raise RequestError(
            f"{bundle.root}: has no preview decoder; import the model again with --preview taew2_1.safetensors and "
            "--replace, or leave out --preview"
        )


def preview_frames(session: Session, latents_BCTHW: Tensor) -> Iterator[Tensor]:
    """Decode latents and yield each frame as uint8 ``[H, W, 3]`` on the CPU.

    Args:
        session: The denoiser's, whose schedule has the programs of the preview decoder (`schedule.with_preview`).
        latents_BCTHW: Clean latents, for instance those that a step predicts, of any float type.
    """
    (first,) = session.schedule.programs["preview.0"]
    assert first.graph == PREVIEW
    for state in first.inputs[1:]:
        session[state.buffer].zero_()
    for index in range(latents_BCTHW.shape[2]):
        session["preview_latent"].copy_(latents_BCTHW[:, :, index : index + 1])
        session.run(f"preview.{index % 2}")
        pictures = session["pictures"][0].float().clamp(0, 1)
        images = (pictures * 255 + 0.5).to(torch.uint8).permute(1, 2, 3, 0).cpu().contiguous()
        yield from images if index else images[DROPPED:]
