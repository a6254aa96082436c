"""flower_ldm/images.py: pixels of every kind of file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from flower_ldm import images

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def palette_half_transparent() -> Image.Image:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([*RED, *GREEN])
    image.paste(1, (8, 0, 16, 16))
    image.info["transparency"] = 1
    return image


def half_transparent(mode: str, opaque: tuple[int, ...], clear: tuple[int, ...]) -> Image.Image:
    image = Image.new(mode, (16, 16), opaque)
    image.paste(clear, (8, 0, 16, 16))
    return image


def sixteen_bits(mode: str) -> Image.Image:
    values = np.full((16, 16), 200 * 257, dtype={"I;16": "<u2", "I;16B": ">u2", "I": "i4"}[mode])
    values[:, 8:] = 3 * 257
    return Image.fromarray(values)


MODES = {  # file name -> image, colour of its left half, colour of its right half
    "grey.jpg": (Image.new("L", (16, 16), 90), (90,) * 3, (90,) * 3),
    "bits.png": (Image.new("1", (16, 16), 1), WHITE, WHITE),
    "cmyk.jpg": (Image.new("CMYK", (16, 16), (55, 195, 225, 0)), (200, 60, 30), (200, 60, 30)),
    "grey_alpha.png": (half_transparent("LA", (90, 255), (10, 0)), (90,) * 3, WHITE),
    "half_alpha.png": (Image.new("RGBA", (16, 16), (0, 0, 0, 128)), (127,) * 3, (127,) * 3),
    "rgb_alpha.png": (half_transparent("RGBA", (*RED, 255), (*GREEN, 0)), RED, WHITE),
    "palette.gif": (Image.new("RGB", (16, 16), GREEN).quantize(4), GREEN, GREEN),
    "palette_clear.png": (palette_half_transparent(), RED, WHITE),
    "palette_clear.gif": (palette_half_transparent(), RED, WHITE),
    "sixteen.png": (sixteen_bits("I;16"), (200,) * 3, (3,) * 3),
    "sixteen.tif": (sixteen_bits("I;16B"), (200,) * 3, (3,) * 3),
    "thirty_two.tif": (sixteen_bits("I"), (200,) * 3, (3,) * 3),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_gives_its_colours(name: str, tmp_path: Path) -> None:
    image, left, right = MODES[name]
    image.save(tmp_path / name, quality=95)
    with Image.open(tmp_path / name) as opened:
        pixels = images.small_pixels(opened, 16).astype(int)
    assert pixels.shape == (16, 16, 3)
    assert abs(pixels[:, :8] - left).max() <= 4
    assert abs(pixels[:, 8:] - right).max() <= 4


@pytest.mark.parametrize("values", [np.float32([[0.5]]), np.int32([[70000]]), np.int32([[-1]])], ids=str)
def test_pixels_of_unknown_range_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="range 0 to 65535"):
        images.upright_srgb(Image.fromarray(values))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "image.png", exif=exif)
    with Image.open(tmp_path / "image.png") as opened:
        upright = np.asarray(ImageOps.exif_transpose(opened))
        assert np.array_equal(images.small_pixels(opened, 8), upright)
    assert upright.shape == ((8, 12, 3) if orientation <= 4 else (12, 8, 3))


def test_the_short_side_is_scaled_and_nothing_is_squashed() -> None:
    image = Image.new("RGB", (96, 64), GREEN)
    image.paste(RED, (32, 16, 64, 48))  # a centred square of half the height
    pixels = images.small_pixels(image, 16)
    assert pixels.shape == (16, 24, 3)
    is_red = pixels[..., 0] > 127
    assert is_red.any(axis=0).sum() == is_red.any(axis=1).sum() == 8
    assert images.small_pixels(image.rotate(90, expand=True), 16).shape == (24, 16, 3)
    assert images.small_pixels(image, 128).shape == (128, 192, 3)  # enlarged, too


@pytest.mark.parametrize("size", [(100, 20), (20, 100)])
def test_beyond_two_to_one_the_ends_are_cut_off_evenly(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, RED)
    width, height = min(size[0], 40), min(size[1], 40)
    image.paste(
        GREEN, ((size[0] - width) // 2, (size[1] - height) // 2, (size[0] + width) // 2, (size[1] + height) // 2)
    )
    pixels = images.small_pixels(image, 10)
    assert pixels.shape == ((10, 20, 3) if size[0] > size[1] else (20, 10, 3))
    assert (pixels[..., 1] > 230).all()  # next to the cut, antialiasing looks a little beyond it
    assert abs(pixels.astype(int) - pixels[::-1, ::-1]).max() <= 1


def test_scaling_is_antialiased() -> None:
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert abs(images.small_pixels(Image.fromarray(board), 16).astype(int) - 127).max() <= 4


def test_a_large_jpeg_is_decoded_small(tmp_path: Path) -> None:
    image = Image.new("RGB", (1600, 1200), RED)
    image.paste(GREEN, (800, 0, 1600, 1200))
    image.save(tmp_path / "large.jpg", quality=95)
    with Image.open(tmp_path / "large.jpg") as opened:
        pixels = images.small_pixels(opened, 48).astype(int)
        assert opened.size == (200, 150)  # 1/8 of it was decoded, which is still three times what is wanted
    assert pixels.shape == (48, 64, 3)
    assert abs(pixels[:, :31] - RED).max() <= 8
    assert abs(pixels[:, 33:] - GREEN).max() <= 8
