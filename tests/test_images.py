"""flower_ldm/images.py and upright_srgb: files of every kind become upright sRGB pixels, or are refused."""

import io
import itertools
import os
import resource
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from flower_ldm import images
from flower_ldm.pipelines.pipeline_flower_ldm import upright_srgb

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def block_picture() -> np.ndarray:
    """24 x 16 pixels that no turn and no flip leaves as they are: gray, and the same after any compression."""
    pixels = np.full((16, 24, 3), 80, dtype=np.uint8)
    pixels[:8, :8], pixels[8:, 16:], pixels[:8, 16:] = 200, 20, 140
    return pixels


def turned(upright: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera stores of an upright picture, by the EXIF standard's table of the first row and column."""
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, 3),
    }[orientation]


def saved(image: Image.Image, name: str, folder: Path, **options) -> Path:
    image.save(folder / name, **options)
    return folder / name


def upright(path: Path) -> np.ndarray:
    with images.open_image(path) as image:
        return np.asarray(upright_srgb(image)).astype(int)


# --- orientation x format x bit depth x photometric interpretation ---------------------------------------------------


def in_mode(mode: str, pixels: np.ndarray) -> Image.Image:
    gray = pixels[..., 0]
    if mode in ("I;16", "I;16B"):
        return Image.fromarray((gray * np.uint16(257)).astype("<u2" if mode == "I;16" else ">u2"))
    if mode == "I":
        return Image.fromarray(gray.astype(np.int32) * 257)
    if mode == "inverted 16":
        return Image.fromarray(((255 - gray) * np.uint16(257)).astype("<u2"))
    if mode == "P":
        return Image.fromarray(pixels).quantize(16)
    if mode == "CMYK":
        return Image.merge("CMYK", [Image.fromarray(255 - gray)] * 3 + [Image.new("L", gray.shape[::-1])])
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(Image.fromarray(pixels), *profiles, outputMode="LAB")
    if mode == "half clear":  # 2 x (v - 128) at half opacity on white is v
        alpha = Image.fromarray(np.where(gray == 200, 128, 255).astype(np.uint8))
        image = Image.fromarray(np.where(pixels == 200, 145, pixels).astype(np.uint8))
        image.putalpha(alpha)
        return image
    return Image.fromarray(pixels).convert(mode)


WHITE_IS_ZERO = {"tiffinfo": {262: 0}}
KINDS = {  # file name -> mode, options of `save`
    "rgb.jpg": ("RGB", {"quality": 95}),
    "gray.jpg": ("L", {"quality": 95}),
    "cmyk.jpg": ("CMYK", {"quality": 95}),
    "progressive.jfif": ("RGB", {"quality": 95, "progressive": True}),
    "rgb.png": ("RGB", {}),
    "gray.png": ("L", {}),
    "sixteen.png": ("I;16", {}),
    "palette.png": ("P", {}),
    "alpha.png": ("half clear", {}),
    "rgb.webp": ("RGB", {"lossless": True}),
    "alpha.webp": ("half clear", {"lossless": True}),
    "rgb.avif": ("RGB", {"quality": 95}),
    "rgb.tif": ("RGB", {}),
    "alpha.tif": ("half clear", {}),
    "gray.tif": ("L", {}),
    "palette.tif": ("P", {}),
    "sixteen.tif": ("I;16", {}),
    "sixteen_big_endian.tif": ("I;16B", {}),
    "thirty_two.tif": ("I", {}),
    "cmyk.tif": ("CMYK", {}),
    "lab.tif": ("LAB", {}),
    "lzw.tif": ("RGB", {"compression": "tiff_lzw"}),
    "sixteen_lzw.tif": ("I;16", {"compression": "tiff_lzw"}),
    "jpeg.tif": ("RGB", {"compression": "jpeg", "quality": 95}),
    "ycbcr.tif": ("YCbCr", {"compression": "tiff_lzw"}),
    "white_is_zero.tif": ("L", WHITE_IS_ZERO),
    "white_is_zero_lzw.tif": ("L", {"compression": "tiff_lzw", **WHITE_IS_ZERO}),
    "white_is_zero_16.tif": ("inverted 16", WHITE_IS_ZERO),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_in_every_orientation(name: str, tmp_path: Path) -> None:
    if name.endswith(".avif") and "AVIF" not in Image.OPEN:
        pytest.skip("this Pillow reads no AVIF")
    mode, options = KINDS[name]
    expected = block_picture().astype(int)
    for orientation in range(1, 9):
        image = in_mode(mode, np.ascontiguousarray(turned(block_picture(), orientation)))
        if name.endswith(".tif"):
            tags = {**options.get("tiffinfo", {}), 0x0112: orientation}
            path = saved(image, name, tmp_path, **(options | {"tiffinfo": tags}))
        else:
            exif = Image.Exif()
            exif[0x0112] = orientation
            path = saved(image, name, tmp_path, exif=exif, **options)
        pixels = upright(path)
        assert pixels.shape == expected.shape, orientation
        assert abs(pixels - expected).max() <= 5, orientation
        with images.open_image(path) as opened:
            once = upright_srgb(opened)
            small = images.small_pixels(opened, 16) if opened.format != "TIFF" else expected
        assert np.array_equal(upright_srgb(once), once), orientation  # nothing is turned twice
        assert small.shape == (16, 24, 3) and abs(small.astype(int) - expected).max() <= 5, orientation


def test_an_orientation_in_xmp_counts_where_exif_has_none(tmp_path: Path) -> None:
    image = Image.fromarray(np.ascontiguousarray(turned(block_picture(), 6)))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    path = saved(image, "xmp.webp", tmp_path, lossless=True, xmp=xmp)
    assert np.array_equal(upright(path), block_picture())


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


MODES = {  # file name -> image, color of its left half, color of its right half
    "bits.png": (Image.new("1", (16, 16), 1), WHITE, WHITE),
    "cmyk.jpg": (Image.new("CMYK", (16, 16), (55, 195, 225, 0)), (200, 60, 30), (200, 60, 30)),
    "gray_alpha.png": (half_transparent("LA", (90, 255), (10, 0)), (90,) * 3, WHITE),
    "gray_alpha.tif": (half_transparent("LA", (90, 255), (10, 0)), (90,) * 3, WHITE),
    "half_alpha.png": (Image.new("RGBA", (16, 16), (0, 0, 0, 128)), (127,) * 3, (127,) * 3),
    "rgb_alpha.png": (half_transparent("RGBA", (*RED, 255), (*GREEN, 0)), RED, WHITE),
    "palette.gif": (Image.new("RGB", (16, 16), GREEN).quantize(4), GREEN, GREEN),
    "palette_clear.png": (palette_half_transparent(), RED, WHITE),
    "palette_clear.gif": (palette_half_transparent(), RED, WHITE),
    "bits.pbm": (Image.new("1", (16, 16), 1), WHITE, WHITE),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_gives_its_colors(name: str, tmp_path: Path) -> None:
    image, left, right = MODES[name]
    with images.open_image(saved(image, name, tmp_path, quality=95)) as opened:
        pixels = images.small_pixels(opened, 16).astype(int)
    assert pixels.shape == (16, 16, 3)
    assert abs(pixels[:, :8] - left).max() <= 4
    assert abs(pixels[:, 8:] - right).max() <= 4


def png_chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(size: tuple[int, int], bits: int, color_type: int, compressed: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", *size, bits, color_type, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header), extra, png_chunk(b"IDAT", compressed), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("color_type", "row", "clear"),
    [(0, (51400, 771), (51400,)), (2, (65535, 0, 0, 771, 771, 771), (65535, 0, 0)), (4, (51400, 0, 771, 65535), None)],
    ids=["gray", "colors", "gray with alpha"],
)
def test_transparency_of_16_bits(color_type: int, row: tuple, clear: tuple | None) -> None:
    extra = png_chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) if clear else b""
    content = png((2, 1), 16, color_type, zlib.compress(struct.pack(f">x{len(row)}H", *row)), extra)
    assert np.asarray(upright_srgb(images.open_image(io.BytesIO(content)))).tolist() == [[[255] * 3, [3] * 3]]


def test_twelve_bits(tmp_path: Path) -> None:
    values = [4095, 0, 2048, 1024]
    packed = sum(value << 12 * (3 - place) for place, value in enumerate(values)).to_bytes(6, "big")
    entries = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 6)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in entries)
    (tmp_path / "twelve.tif").write_bytes(b"II*\0" + struct.pack("<I", 14) + packed + directory + bytes(4))
    assert upright(tmp_path / "twelve.tif")[0, :, 0].tolist() == [255, 0, 128, 64]


@pytest.mark.parametrize(
    "values", [np.float32([[0.5]]), np.float32([[np.nan]]), np.int32([[70000]]), np.int32([[-1]])], ids=str
)
def test_pixels_of_unknown_range_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="range 0 to 65535|are floats, whose value for white is unknown"):
        upright_srgb(Image.fromarray(values))


def test_integers_that_may_be_of_8_bits_are_refused() -> None:
    """As `datasets` makes them of 2-D arrays: scaled by 257 they would be black."""
    with pytest.raises(ValueError, match="none above 255, have 8 bits or are nearly black"):
        upright_srgb(Image.fromarray(np.int32([[0, 255]])))
    assert np.asarray(upright_srgb(Image.fromarray(np.int32([[0, 0]])))).max() == 0


# --- color profiles --------------------------------------------------------------------------------------------------

# Primaries adapted to D50, as profiles have them: rows X, Y, Z, columns red, green, blue.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
PRIMARIES = {
    "Display P3": np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]),
    "Adobe RGB": np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]),
}
GAMMA = 563 / 256  # Adobe RGB's


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(values: np.ndarray) -> np.ndarray:
    values = values.clip(0, 1)
    return np.where(values <= 0.0031308, 12.92 * values, 1.055 * values ** (1 / 2.4) - 0.055)


def s15(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def icc_profile(name: str) -> bytes:
    """A profile of version 2, as in the ICC's specification: a header, a table of tags, the tags."""
    primaries = (PRIMARIES | {"another sRGB": SRGB}).get(name)
    gamma = b"curv" + struct.pack(">IIHH", 0, 1, round(GAMMA * 256), 0)
    as_srgb = b"para" + struct.pack(">IHH", 0, 3, 0) + s15(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    curve = gamma if name in ("Adobe RGB", "gray") else as_srgb
    tags = {b"wtpt": b"XYZ \0\0\0\0" + s15(0.9642, 1, 0.8249)}
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        tags |= {color + b"TRC": curve for color in (b"r", b"g", b"b")}
        columns = zip((b"r", b"g", b"b"), primaries.T, strict=True)
        tags |= {color + b"XYZ": b"XYZ \0\0\0\0" + s15(*column) for color, column in columns}
    offset, table, contents = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", offset + len(contents), len(content))
        contents += content
    header = (
        struct.pack(">I4xI", offset + len(contents), 0x02400000)
        + b"mntr"
        + (b"RGB " if primaries is not None else b"GRAY")
    )
    header += b"XYZ " + bytes(12) + b"acsp" + bytes(28) + s15(0.9642, 1, 0.8249) + bytes(48)
    return header + table + contents


COLORS = np.array(list(itertools.product((0, 60, 130, 200, 255), repeat=3)), np.uint8).reshape(5, 25, 3)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg", "avif"])
@pytest.mark.parametrize("name", PRIMARIES)
def test_a_profile_is_converted(name: str, suffix: str, tmp_path: Path) -> None:
    if suffix == "avif" and "AVIF" not in Image.OPEN:
        pytest.skip("this Pillow reads no AVIF")
    linear = srgb_to_linear(COLORS / 255) if name == "Display P3" else (COLORS / 255) ** GAMMA
    expected = 255 * linear_to_srgb(linear @ PRIMARIES[name].T @ np.linalg.inv(SRGB).T)
    assert abs(expected - COLORS).max() > 20
    large = Image.fromarray(COLORS).resize((400, 80), Image.Resampling.NEAREST)  # JPEG blurs between blocks of 16
    lossy = {"jpg": {"quality": 100, "subsampling": 0}, "avif": {"quality": 100, "subsampling": "4:4:4"}}
    options = lossy.get(suffix, {"lossless": True} if suffix == "webp" else {})
    path = saved(large, f"colors.{suffix}", tmp_path, icc_profile=icc_profile(name), **options)
    differences = abs(upright(path)[8::16, 8::16] - expected)
    if suffix in lossy:  # one level of a dark color is many when it has been converted
        assert differences.mean() < 1 and differences.max() < 20
    else:
        assert differences.max() <= 2
    with images.open_image(path) as opened:
        once = upright_srgb(opened)
    assert np.array_equal(upright_srgb(once), once)  # not twice


def test_a_profile_keeps_transparency_and_orientation(tmp_path: Path) -> None:
    image = Image.fromarray(np.rot90(COLORS)).convert("RGBA")
    image.putpixel((0, 24), (*COLORS[0, 0].tolist(), 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif, "icc_profile": icc_profile("Adobe RGB")}
    turned_pixels = upright(saved(image, "all.png", tmp_path, **options))
    plain = upright(saved(Image.fromarray(COLORS), "plain.png", tmp_path, icc_profile=icc_profile("Adobe RGB")))
    assert turned_pixels[0, 0].tolist() == [255] * 3
    plain[0, 0] = 255
    assert np.array_equal(turned_pixels, plain)


def test_a_profile_of_gray(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8)[None]
    path = saved(Image.fromarray(ramp), "gray.png", tmp_path, icc_profile=icc_profile("gray"))
    expected = 255 * linear_to_srgb((ramp / 255) ** GAMMA)
    assert abs(expected - ramp).max() > 5
    assert abs(upright(path) - expected[..., None]).max() < 1.5


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        icc_profile("another sRGB"),
        b"junk",
        b"",
        icc_profile("Adobe RGB")[:200],
        icc_profile("gray"),
    ],
    ids=["sRGB", "another sRGB", "junk", "empty", "torn", "of gray"],
)
def test_a_profile_that_is_srgb_or_of_no_use_changes_no_bit(profile: bytes, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), "noise.png", tmp_path, icc_profile=profile)
    assert np.array_equal(upright(path), noise)


# --- metadata that are broken ----------------------------------------------------------------------------------------

PNG_PIXELS = zlib.compress(bytes([0, 7, 9, 1, 2, 3, 4]))
BROKEN_CHUNKS = {
    "checksum": png_chunk(b"tEXt", b"a\0b", checksum=0),
    "exif": png_chunk(b"eXIf", b"junk"),
    "exif as text": png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  4\nzz"),
    "profile": png_chunk(b"iCCP", b"x\0\0junk"),
    "huge profile": png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2 << 20))),
    "huge text": png_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2 << 20))),
    "gamma": png_chunk(b"gAMA", b"x"),
    "size": png_chunk(b"pHYs", b"x"),
}


@pytest.mark.parametrize("kind", BROKEN_CHUNKS)
def test_broken_metadata_of_a_png_do_not_cost_its_pixels(kind: str, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(png((2, 1), 8, 2, PNG_PIXELS, BROKEN_CHUNKS[kind]))
    assert upright(tmp_path / "broken.png").tolist() == [[[7, 9, 1], [2, 3, 4]]]


BROKEN_SEGMENTS = {
    "exif": (0xE1, b"Exif\0\0junk"),
    "exif's length": (0xE1, b"Exif\0\0"),
    "xmp": (0xE1, b'http://ns.adobe.com/xap/1.0/\0\xff\xfe tiff:Orientation="9"'),
    "profile": (0xE2, b"ICC_PROFILE\0\1\1" + b"x" * 300),
    "profile's length": (0xE2, b"ICC_PROFILE\0"),
    "several pictures": (0xE2, b"MPF\0" + b"x" * 30),
    "photoshop": (0xED, b"Photoshop 3.0\0008BIM\x03"),
    "jfif": (0xE0, b"JFIF"),
    "adobe": (0xEE, b"Adobe"),
}


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO file")
@pytest.mark.parametrize("kind", BROKEN_SEGMENTS)
def test_broken_metadata_of_a_jpeg_do_not_cost_its_pixels(kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.ascontiguousarray(turned(block_picture(), 6)))
    whole = saved(stored, "whole.jpg", tmp_path, exif=exif).read_bytes()
    marker, content = BROKEN_SEGMENTS[kind]
    broken = whole[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + whole[2:]
    (tmp_path / "broken.jpg").write_bytes(broken)
    pixels, expected = upright(tmp_path / "broken.jpg"), block_picture().astype(int)
    if kind.startswith("exif"):  # its own comes after the broken one
        pixels = pixels if pixels.shape == expected.shape else np.rot90(pixels, 3)
    assert abs(pixels - expected).max() <= 5


@pytest.mark.parametrize("head", [b"", images.JPEG_HEAD, images.PNG_HEAD], ids=["none", "jpeg", "png"])
def test_a_large_file_that_is_no_image_is_not_kept_in_memory(head: bytes, tmp_path: Path) -> None:
    class Counted(io.FileIO):
        taken = 0

        def read(self, size: int = -1) -> bytes:
            content = super().read(size)
            self.taken += len(content)
            return content

    (tmp_path / "x.jpg").write_bytes(head)
    os.truncate(tmp_path / "x.jpg", 2**29)
    with Counted(tmp_path / "x.jpg") as file:
        with pytest.raises(ValueError, match="no image of the formats"):
            images.open_image(file)
        assert file.taken < 1.1 * images.LARGEST_REPAIR * bool(head) + 2**16


def test_torn_pixels_are_refused(tmp_path: Path) -> None:
    noise = Image.effect_noise((64, 64), 80)
    for name, options in {"a.png": {}, "a.jpg": {}, "a.tif": {"compression": "tiff_lzw"}, "a.webp": {}}.items():
        whole = saved(noise, name, tmp_path, **options).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises((OSError, ValueError)):
            upright(tmp_path / name)


# --- what is opened --------------------------------------------------------------------------------------------------


def test_other_formats_are_refused_whatever_they_are_called(tmp_path: Path) -> None:
    """Pillow hands an EPS to Ghostscript, which runs the program in it."""
    image, refused = Image.new("RGB", (16, 16), RED), []
    for other in ("EPS", "PCX", "TGA", "ICO", "SGI", "IM", "DDS", "JPEG2000"):
        try:
            image.save(tmp_path / "x.png", other)
        except (OSError, KeyError):  # this Pillow can't
            continue
        with pytest.raises(ValueError, match="no image of the formats JPEG, PNG, .*PPM, or its header is damaged"):
            images.open_image(tmp_path / "x.png")
        refused.append(other)
    assert "EPS" in refused and len(refused) > 4


def test_files_are_known_by_what_is_in_them(tmp_path: Path) -> None:
    for suffixes in images.FORMATS.values():
        assert set(suffixes) <= set(images.IMAGE_SUFFIXES)
    assert np.array_equal(upright(saved(Image.new("RGB", (4, 4), RED), "x.jfif", tmp_path, format="PNG"))[0, 0], RED)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    {"fifo": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](path)
    errors = []

    def open_it() -> None:
        try:
            images.open_image(path)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=open_it, daemon=True)  # a FIFO is waited on for ever
    thread.start()
    thread.join(10)
    assert [str(error) for error in errors] == ["it is not a regular file"]


# --- bombs -----------------------------------------------------------------------------------------------------------


def compressed_zeros(count: int) -> bytes:
    """zlib's of very many bytes of 0, made without making them: each megabyte is compressed to the same bytes."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = compressor.compress(bytes(1 << 20)) + compressor.flush(zlib.Z_FULL_FLUSH)
    blocks = count // (1 << 20) + 1
    return b"\x78\x9c" + block * blocks + b"\3\0" + struct.pack(">HH", (blocks << 20) % 65521, 1)


def png_bomb() -> bytes:
    return png((13300, 13300), 8, 6, compressed_zeros(13300 * 13301 * 4))


def tiff_bomb() -> bytes:
    """16 x 16 pixels in a tile of 26,000 x 26,000."""
    tile = compressed_zeros(26000 * 26000)
    entries = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, 26000), (323, 26000), (324, 8),
               (325, len(tile))]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(tile)) + tile + directory + bytes(4)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest forgets the filter of images.py
@pytest.mark.parametrize("bomb", [png_bomb, tiff_bomb])
def test_a_bomb_is_refused_before_it_is_decoded(bomb, tmp_path: Path) -> None:
    (tmp_path / "bomb").write_bytes(bomb())
    assert (tmp_path / "bomb").stat().st_size < 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"more than 89,000,000 pixels \(--max_image_pixels allows more\)"):
        upright(tmp_path / "bomb")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "gif", "bmp", "ppm"])
def test_the_limit_is_on_width_times_height(suffix: str, tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (100, 50), RED), f"x.{suffix}", tmp_path)
    with images.open_image(path, max_pixels=5000) as image:
        assert images.small_pixels(image, 8).shape == (8, 16, 3)
    with pytest.raises(ValueError, match="more than 4,999 pixels"):
        images.open_image(path, max_pixels=4999)


def test_a_limit_above_pillows_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = saved(Image.new("RGB", (100, 50), RED), "x.png", tmp_path)
    with pytest.raises(ValueError, match="more than 900 pixels"):
        images.open_image(path, max_pixels=900)
    assert images.open_image(path, max_pixels=5000).size == (100, 50)


def test_threads_have_a_bounded_number_of_pixels_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_budget", images._PixelBudget(10_000))
    decoding, most, lock = [], [], threading.Lock()

    def counted(image: Image.Image) -> Image.Image:
        with lock:
            decoding.append(image.width * image.height)
            most.append(sum(decoding))
        try:
            return upright_srgb(image)
        finally:
            with lock:
                decoding.remove(image.width * image.height)

    monkeypatch.setattr(images, "upright_srgb", counted)
    sizes = [(40, 40), (100, 99), (20, 20), (300, 300)] * 16  # the last is larger than the budget: it is decoded alone
    threads = [
        threading.Thread(target=images.small_pixels, args=(Image.new("RGB", size), 8), daemon=True) for size in sizes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert len(most) == len(sizes) and {total for total in most if total > 10_000} <= {90_000}


# --- small pixels ----------------------------------------------------------------------------------------------------


def test_the_short_side_is_scaled_and_nothing_is_squashed() -> None:
    image = Image.new("RGB", (96, 64), GREEN)
    image.paste(RED, (32, 16, 64, 48))  # a centered square of half the height
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
