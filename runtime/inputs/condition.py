"""From a picture to the channels that the network is conditioned on.

Source: TurboDiffusion, inference/wan2.2_i2v_infer.py; for a last frame, diffusers,
pipelines/wan/pipeline_wan_i2v.py (docs/sources.md).
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.runtime.inputs.image import open_image

MASK_CHANNELS = 4


def to_pixels(image: Image.Image, width_px: int, height_px: int) -> Tensor:
    """Stretch an image to exactly the video's size and scale it to [-1, 1], float32 ``[1, 3, H, W]``.

    Resizing is bilinear with antialiasing and rounds to 8 bits before scaling, as upstream does. The aspect ratio is
    not kept.
    """
    resized = image.resize((width_px, height_px), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1.0


def pixels_of(image: Path | Image.Image | None, shape: ClipShape) -> Tensor:
    """A picture that was checked as a frame of a clip; see `to_pixels`."""
    assert image is not None
    return to_pixels(open_image(image), shape.width_px, shape.height_px)


def condition(latents_BCFHW: Tensor, *, has_last: bool = False) -> Tensor:
    """The 20 channels that accompany the noise: a mask that is one on the first latent frame, then the latents of a
    clip whose first frame is the image and whose other frames are grey.

    Args:
        has_last: Whether the last frame of that clip is a picture, too. The mask's channels are the four frames of a
            latent frame, so the fourth is then one on the last latent frame.
    """
    batch, _, frames, height, width = latents_BCFHW.shape
    mask = latents_BCFHW.new_zeros(batch, MASK_CHANNELS, frames, height, width)
    mask[:, :, 0] = 1.0
    if has_last:
        mask[:, -1, -1] = 1.0
    return torch.cat((mask, latents_BCFHW), 1)
