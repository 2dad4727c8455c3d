"""Pictures are resized as upstream resizes them, and files that are not pictures are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import golden
from wanforge.errors import RequestError
from wanforge.runtime.image import condition, open_image, to_pixels


@pytest.mark.parametrize("name", ["image_down", "image_up", "image_grey"])
def test_pixels_are_within_one_level_of_upstreams(name: str, tmp_path: Path) -> None:
    case = golden.load(name)
    source = case.tensors.get("input:pixels_L", case["input:rgb_u8_H_W_3"]).numpy()
    Image.fromarray(source).save(path := tmp_path / "image.png")
    pixels = to_pixels(open_image(path), *case.arguments["target_wh"])
    difference = (pixels - case["output:image_1_3_H_W"]) * 127.5
    # Pillow and torchvision round to 8 bits by different fixed-point arithmetic: under 1 % of values differ by a level.
    assert float(difference.abs().max()) < 1.001
    assert float((difference.abs() > 0.5).float().mean()) < 0.01
    assert abs(float(difference.mean())) < 1e-3 * 127.5


def test_pixels_span_minus_one_to_one() -> None:
    image = Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8))
    assert to_pixels(image, 2, 1)[0, :, 0].tolist() == [[-1.0, 1.0]] * 3


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_every_kind_of_picture_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("picture.tiff" if mode in ("CMYK", "I;16") else "picture.png")
    Image.new(mode, (20, 10)).save(path)
    assert open_image(path).mode == "RGB"


def test_the_condition_is_a_mask_and_the_latents() -> None:
    latents = torch.randn(1, 16, 3, 4, 5)
    made = condition(latents)
    assert made.shape == (1, 20, 3, 4, 5)
    assert made[:, :4, 0].eq(1).all()
    assert made[:, :4, 1:].eq(0).all()
    assert torch.equal(made[:, 4:], latents)


def test_refuses_what_is_missing_or_no_picture(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such image"):
        open_image(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(RequestError, match="not an image"):
        open_image(tmp_path / "text.png")
    with pytest.raises(RequestError, match="image"):
        open_image(tmp_path)


def test_refuses_a_truncated_picture(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RequestError, match="damaged"):
        open_image(path)


def test_refuses_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (400, 300)).save(tmp_path / "bomb.png")
    for limit in (100_000, 50_000):  # the picture exceeds Pillow's limit a little, and more than twice over
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(RequestError, match="unpacks to more"):
            open_image(tmp_path / "bomb.png")
