"""Files from outside that hold images: which are read, up to what size, and how they become small pixels."""

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

# What is read, by Pillow's name, with the endings of its files. Not all that Pillow reads: it gives an EPS of any name
# to Ghostscript, which runs what is in it.
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
MAX_IMAGE_PIXELS = 89_000_000  # a little less than what Pillow warns of
PNG_HEAD, JPEG_HEAD = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
TIFF_TILE_SIZE = (0x0142, 0x0143)
LARGEST_REPAIR = 2**26  # bytes of a file that are kept at once to leave out broken metadata
PIXELS_IN_MEMORY = MAX_IMAGE_PIXELS  # of all images that are decoded at once; a pixel takes up to 16 bytes

Image.init()  # all readers: some are imported at their first use only
_READABLE = [name for name in FORMATS if name in Image.OPEN]  # older Pillows read no AVIF
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `open_image` refuses them instead


def open_image(file: str | Path | BinaryIO, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Open an image without decoding it: a regular file, or the bytes of one. Nothing else in the project does.

    Raises:
        OSError: where there is no such file.
        ValueError: for what is no file, or no image of these formats, or has more than `max_pixels`.
    """
    if isinstance(file, (str, Path)) and not stat.S_ISREG(Path(file).stat().st_mode):
        raise ValueError("it is not a regular file")  # a FIFO would be waited on for ever
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit, for the whole process, refuses twice as many
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    too_large = f"it has more than {max_pixels:,} pixels (--max_image_pixels allows more)"
    try:
        image = _open(file)
    except UnidentifiedImageError:
        raise ValueError(f"it is no image of the formats {', '.join(_READABLE)}, or its head is damaged") from None
    except Image.DecompressionBombError:
        raise ValueError(too_large) from None
    tags = getattr(image, "tag_v2", {})  # a TIFF is decoded by tiles, which may be larger than it is
    tile = [tags[tag] for tag in TIFF_TILE_SIZE if isinstance(tags.get(tag), int)]
    if max(image.width * image.height, math.prod(tile)) > max_pixels:
        image.close()
        raise ValueError(too_large)
    return image


def _open(file: str | Path | BinaryIO) -> Image.Image:
    """Pillow's `open` for these formats; where metadata are in its way, without them."""
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
    """A PNG or JPEG without the parts that its pixels can do without, but for its EXIF."""
    if content.startswith(PNG_HEAD):
        kept, position = [PNG_HEAD], len(PNG_HEAD)
        while content[position + 4 : position + 8].isalpha():  # else no part begins here
            end = position + 12 + int.from_bytes(content[position : position + 4], "big")
            kind = content[position + 4 : position + 8]
            if kind[:1].isupper() or kind in (b"tRNS", b"eXIf"):  # an upper case letter: critical
                kept.append(content[position:end])
            position = end
        return b"".join(kept)
    kept, position = [JPEG_HEAD], len(JPEG_HEAD)
    while re.match(rb"\xff[^\xda]", content[position : position + 2], re.DOTALL):
        end = position + 2 + max(2, int.from_bytes(content[position + 2 : position + 4], "big"))
        segment = content[position:end]
        application = 0xE0 <= segment[1] <= 0xEF or segment[1] == 0xFE  # or a comment
        adobe = segment[4:9] == b"Adobe" and len(segment) >= 16  # how the colors are stored
        if not application or adobe or segment[4:10] == b"Exif\0\0":
            kept.append(segment)
        position = end
    return b"".join([*kept, content[position:]])


class _Room:
    """Lets threads in while their images have no more pixels together than there is room for; a larger one, alone."""

    def __init__(self, pixels: int) -> None:
        self._all = self._free = pixels
        self._turn = threading.Lock()  # first come, first served: else small images would keep a large one waiting
        self._left = threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self._all)
        with self._turn, self._left:
            self._left.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._left:
                self._free += pixels
                self._left.notify_all()


_room = _Room(PIXELS_IN_MEMORY)


def resize_short_side(image: Image.Image, resolution: int) -> Image.Image:
    """Scale the short side to `resolution`, antialiased and not squashed; what is beyond 2:1 is cut off evenly."""
    width, height = image.size
    short = min(width, height)
    cut_x, cut_y = max(0, width - 2 * short) / 2, max(0, height - 2 * short) / 2
    box = (cut_x, cut_y, width - cut_x, height - cut_y)
    size = tuple(round(side * resolution / short) for side in (width - 2 * cut_x, height - 2 * cut_y))
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def small_pixels(image: Image.Image, resolution: int) -> np.ndarray:
    """Decode an opened image to `(height, width, 3)` uint8, upright, with the short side equal to `resolution`.

    Threads wait here for each other, so that the memory they take has a bound, however many they are.
    """
    whole = image.width * image.height
    image.draft(None, (3 * resolution, 3 * resolution))  # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size
    decoded = whole if "progressive" in image.info else image.width * image.height  # progressive: whole, then scaled
    with _room.taken(decoded):
        return np.array(resize_short_side(upright_srgb(image), resolution))
