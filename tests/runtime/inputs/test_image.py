"""Pictures are resized as upstream resizes them, and files that are not pictures are refused."""

import os
import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import golden
from wanforge.errors import RequestError
from wanforge.runtime.inputs.condition import condition, to_pixels
from wanforge.runtime.inputs.image import open_image


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


def test_refuses_what_is_missing_or_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    for name, complaint in {
        "absent.png": "absent.png: no such file",
        "text.png": "text.png: not an image",
        "empty.png": "empty.png: is empty",
        "pipe.png": "pipe.png: is a pipe",
        ".": "is a folder",
        "/dev/zero": "is a device",
    }.items():
        with pytest.raises(RequestError, match=complaint):
            open_image(tmp_path / name)

    def locked(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", locked)
    with pytest.raises(RequestError, match=r"text.png: this user may not read the file"):
        open_image(tmp_path / "text.png")


def levels(image: Image.Image) -> list[object]:
    """The pixels of a picture, row by row."""
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


@pytest.mark.parametrize("kind", [np.uint16, np.dtype(">u2"), np.int32])
def test_greys_of_sixteen_bits_keep_their_shades(kind: np.dtype, tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 128, 257, 32768, 65278, 65535]], kind))
    expected = [(grey, grey, grey) for grey in (0, 0, 1, 128, 254, 255)]
    assert levels(open_image(image)) == expected
    path = tmp_path / ("grey.tiff" if image.mode == "I" else "grey.png")
    image.save(path)
    assert levels(open_image(path)) == expected


def test_values_of_unknown_scale_are_refused() -> None:
    with pytest.raises(RequestError, match="greys go from -1 to 65536, a scale that is not known"):
        open_image(Image.fromarray(np.array([[-1, 65536]], np.int32)))
    with pytest.raises(RequestError, match="floating-point numbers of unknown scale"):
        open_image(Image.new("F", (2, 2)))
    with pytest.raises(RequestError, match="has no pixels; its size is 0x4"):
        open_image(Image.new("RGB", (0, 4)))
    with pytest.raises(RequestError, match=r"the image: damaged image \(conversion from La"):
        open_image(Image.new("La", (2, 2)))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff", "a.webp"])
def test_a_picture_is_turned_as_a_viewer_shows_it(name: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image.save(tmp_path / name, exif=exif)
    turned = open_image(tmp_path / name)
    assert turned.size == (8, 16)
    assert min(turned.getpixel((4, 2))) > 240  # type: ignore[type-var,arg-type]
    assert max(turned.getpixel((4, 13))) < 15  # type: ignore[type-var,arg-type]
    with Image.open(tmp_path / name) as opened:
        assert open_image(opened).size == (8, 16)


def test_transparent_parts_lie_on_white(tmp_path: Path) -> None:
    hidden, half, seen = (200, 0, 0, 0), (0, 0, 0, 128), (10, 20, 30, 255)
    image = Image.new("RGBA", (3, 1))
    for x, colour in enumerate((hidden, half, seen)):
        image.putpixel((x, 0), colour)
    expected = [(255, 255, 255), (127, 127, 127), (10, 20, 30)]
    assert levels(open_image(image)) == expected
    image.save(tmp_path / "a.png")
    assert levels(open_image(tmp_path / "a.png")) == expected
    assert levels(open_image(image.convert("LA"))) == [(255, 255, 255), (127, 127, 127), (18, 18, 18)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "b.gif", transparency=0)
    assert levels(open_image(tmp_path / "b.gif")) == [(255, 255, 255), (0, 0, 200)]
    palette.save(tmp_path / "b.png", transparency=0)
    assert levels(open_image(tmp_path / "b.png")) == [(255, 255, 255), (0, 0, 200)]


def test_opaque_pictures_are_what_upstream_makes_of_them() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 4), np.uint8)
    pixels[..., 3] = 255
    for image in (Image.fromarray(pixels), Image.fromarray(pixels).convert("P"), Image.fromarray(pixels, "CMYK")):
        assert np.array_equal(np.array(open_image(image)), np.array(image.convert("RGB")))


def test_inverted_cmyk_of_jpeg_files_has_its_colours(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert open_image(tmp_path / "a.jpg").getpixel((8, 8)) == (255, 0, 0)


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_of_an_animation_the_first_frame_counts(name: str, tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    red.save(tmp_path / name, save_all=True, append_images=[blue], lossless=True)
    assert open_image(tmp_path / name).getpixel((8, 8)) == (255, 0, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_whatever_the_decoder_says(tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "a"
    for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"):
        Image.effect_noise((40, 50), 90).convert("RGB").save(path, form)
        whole = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(draw.choice([1, 2, 8])):
                damaged[draw.randrange(min(len(whole), draw.choice([60, 300, 10**6])))] = draw.randrange(256)
            path.write_bytes(damaged)
            with suppress(RequestError):
                assert open_image(path).mode == "RGB"


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
