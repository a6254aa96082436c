"""Image files from outside: which formats are read, up to what size, and how they become small arrays."""

import io
import math
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from .pipelines.pipeline_flower_ldm import upright_srgb

# The formats that are read, by Pillow's names, with their file endings. Pillow reads more, but some are dangerous: it
# gives an EPS file of any name to Ghostscript, which runs the program in it.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MAX_IMAGE_PIXELS = 89_000_000  # just below the size of which Pillow warns
PNG_HEAD, JPEG_HEAD = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
TIFF_TILE_SIZE = (0x0142, 0x0143)
LARGEST_REPAIR = 2**26  # bytes of a file that are read to leave out broken metadata
PIXELS_IN_MEMORY = MAX_IMAGE_PIXELS  # of all images that are decoded at the same time; a pixel takes up to 16 bytes

Image.init()  # load all readers: some are loaded at their first use only
_READABLE = [name for name in FORMATS if name in Image.OPEN]  # older versions of Pillow don't read AVIF
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `open_image` refuses such images


def open_image(file: str | Path | BinaryIO, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Open an image without decoding it, from a regular file or a stream. The whole project opens images here.

    Raises:
        OSError: there is no such file.
        ValueError: it is not a regular file, no image of these formats, or has more than `max_pixels`.
    """
    if isinstance(file, (str, Path)) and not stat.S_ISREG(Path(file).stat().st_mode):
        raise ValueError("it is not a regular file")  # opening a FIFO would wait for ever
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's limit for the whole process; it refuses twice as many
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    too_large = f"it has more than {max_pixels:,} pixels (--max_image_pixels allows more)"
    try:
        image = _open(file)
    except UnidentifiedImageError:
        raise ValueError(f"it is no image of the formats {', '.join(_READABLE)}, or its header is damaged") from None
    except Image.DecompressionBombError:
        raise ValueError(too_large) from None
    tags = getattr(image, "tag_v2", {})  # a TIFF is decoded by tiles, which may be larger than the image
    tile = [tags[tag] for tag in TIFF_TILE_SIZE if isinstance(tags.get(tag), int)]
    if max(image.width * image.height, math.prod(tile)) > max_pixels:
        image.close()
        raise ValueError(too_large)
    return image


def _open(file: str | Path | BinaryIO) -> Image.Image:
    """Pillow's `open` for these formats. Where it fails on the metadata of a PNG or JPEG, try without them."""
    try:
        return Image.open(file, formats=_READABLE)
    except Image.DecompressionBombError:
        raise
    except (OSError, ValueError):
        with nullcontext(file) if hasattr(file, "read") else open(file, "rb") as stream:
            stream.seek(0)
            if not stream.read(len(PNG_HEAD)).startswith((PNG_HEAD, JPEG_HEAD)):
                raise
            stream.seek(0)
            content = _without_metadata(stream.read(LARGEST_REPAIR))
        return Image.open(io.BytesIO(content), formats=_READABLE)


def _without_metadata(content: bytes) -> bytes:
    """A PNG or JPEG file with only the chunks that its pixels need, and its EXIF."""
    if content.startswith(PNG_HEAD):
        kept, position = [PNG_HEAD], len(PNG_HEAD)
        while content[position + 4 : position + 8].isalpha():  # the name of a chunk
            end = position + 12 + int.from_bytes(content[position : position + 4], "big")
            kind = content[position + 4 : position + 8]
            if kind[:1].isupper() or kind in (b"tRNS", b"eXIf"):  # a capital letter marks critical chunks
                kept.append(content[position:end])
            position = end
        return b"".join(kept)
    kept, position = [JPEG_HEAD], len(JPEG_HEAD)
    while re.match(rb"\xff[^\xda]", content[position : position + 2], re.DOTALL):
        end = position + 2 + max(2, int.from_bytes(content[position + 2 : position + 4], "big"))
        segment = content[position:end]
        application = 0xE0 <= segment[1] <= 0xEF or segment[1] == 0xFE  # or a comment
        adobe = segment[4:9] == b"Adobe" and len(segment) >= 16  # says how the colors are stored
        if not application or adobe or segment[4:10] == b"Exif\0\0":
            kept.append(segment)
        position = end
    return b"".join([*kept, content[position:]])


class _PixelBudget:
    """Bounds the pixels that threads decode at the same time. A larger image is decoded alone."""

    def __init__(self, pixels: int) -> None:
        self._all = self._free = pixels
        self._turn = threading.Lock()  # first come, first served: else a large image would wait for all small ones
        self._freed = threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait until so many pixels are free, and take them for as long as the context lasts."""
        pixels = min(pixels, self._all)
        with self._turn, self._freed:
            self._freed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._freed:
                self._free += pixels
                self._freed.notify_all()


_budget = _PixelBudget(PIXELS_IN_MEMORY)


def resize_short_side(image: Image.Image, resolution: int) -> Image.Image:
    """Scale the short side to `resolution`, antialiased. The aspect ratio stays; beyond 2:1 both ends are cut off."""
    width, height = image.size
    short = min(width, height)
    cut_x, cut_y = max(0, width - 2 * short) / 2, max(0, height - 2 * short) / 2
    box = (cut_x, cut_y, width - cut_x, height - cut_y)
    size = tuple(round(side * resolution / short) for side in (width - 2 * cut_x, height - 2 * cut_y))
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def small_pixels(image: Image.Image, resolution: int) -> np.ndarray:
    """Decode an opened image to `(height, width, 3)` uint8, upright, with the short side equal to `resolution`.

    Threads wait here for each other, so that their memory is bounded.
    """
    whole = image.width * image.height
    image.draft(None, (3 * resolution, 3 * resolution))  # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size
    decoded = whole if "progressive" in image.info else image.width * image.height  # progressive ones at full size
    with _budget.taken(decoded):
        return np.array(resize_short_side(upright_srgb(image), resolution))
