"""From a picture to the channels that the network is conditioned on.

Source: TurboDiffusion, inference/wan2.2_i2v_infer.py (docs/sources.md).
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MASK_CHANNELS = 4


def to_pixels(image: Image.Image, width_px: int, height_px: int) -> Tensor:
    """Stretch an image to exactly the video's size and scale it to [-1, 1], float32 ``[1, 3, H, W]``.

    Resizing is bilinear with antialiasing and rounds to 8 bits before scaling, as upstream does. The aspect ratio is
    not kept.
    """
    resized = image.resize((width_px, height_px), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1.0


def condition(latents_BCFHW: Tensor) -> Tensor:
    """The 20 channels that accompany the noise: a mask that is one on the first latent frame, then the latents of a
    clip whose first frame is the image and whose other frames are grey."""
    batch, _, frames, height, width = latents_BCFHW.shape
    mask = latents_BCFHW.new_zeros(batch, MASK_CHANNELS, frames, height, width)
    mask[:, :, 0] = 1.0
    return torch.cat((mask, latents_BCFHW), 1)
