"""Images from outside: which files are images, and any of them -> 8-bit RGB, upright, short side = resolution."""

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")

_UPRIGHT = {  # EXIF orientation -> what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB: 16-bit grey is scaled and not clipped, transparency lies on white.

    Raises:
        ValueError: for pixels without a known range (floats, or integers beyond 16 bits).
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode} are not in the range 0 to 65535")
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_short_side(image: Image.Image, resolution: int) -> Image.Image:
    """Scale the short side to `resolution`, antialiased and not squashed; what is beyond 2:1 is cut off evenly."""
    width, height = image.size
    short = min(width, height)
    cut_x, cut_y = max(0, width - 2 * short) / 2, max(0, height - 2 * short) / 2
    box = (cut_x, cut_y, width - cut_x, height - cut_y)
    size = tuple(round(side * resolution / short) for side in (width - 2 * cut_x, height - 2 * cut_y))
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def small_pixels(image: Image.Image, resolution: int) -> np.ndarray:
    """Decode an opened image to `(height, width, 3)` uint8, upright, with the short side equal to `resolution`."""
    image.draft(None, (3 * resolution, 3 * resolution))  # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size
    orientation = image.getexif().get(_EXIF_ORIENTATION)
    image = resize_short_side(to_rgb(image), resolution)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return np.array(image)
