"""Procedural flowers: a data set that needs no download. An image depends on (seed, class, index) only.

A class is a form (petal count and outline, whorls, disc) in a palette. Position, size, tilt, rotation, light and the
blurred background vary from image to image.

Units: the frame spans [-1, 1] in both directions, y downwards. On the flower, 1 is the length of an outer petal.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from .errors import InputError

MIN_RESOLUTION, MAX_RESOLUTION = 16, 512
BACKGROUND_SIZE = 64  # the background is out of focus: drawn at this size and enlarged
PROFILE_STEPS = 1024  # entries of the tables along a petal
SHADOW_LENGTH = 0.93  # of a petal: the outline that casts its shadow has a blunt end, so that distances are easy


@dataclass(frozen=True)
class Form:
    """What a class looks like apart from its colors. Lengths are in units of the outer petals."""

    noun: str
    petals: int  # in each whorl
    half_width: float  # of a petal, where it is widest
    base: float  # exponents of the outline t^base (1 - t)^tip. A large base makes a narrow claw.
    tip: float  # A tip below 0.5 makes a blunt end, one above 0.8 a pointed end.
    disc: str  # one of DISCS
    disc_radius: float
    whorls: int = 1
    decay: float = 0.75  # length of a whorl relative to that of the whorl around it
    turn: float = 0.5  # rotation of a whorl against the one around it, in petals
    curl: float = 0.0  # rotation of a petal's tip against its base, in radians
    notch: float = 0.0  # depth of the cleft in the tip, in petal lengths
    fringe: float = 0.0  # depth of the teeth at the tip, in petal lengths
    rib: float = 0.1  # darkness of the mid-rib and veins
    overlap_shadow: float = 0.4  # darkness of the shadow that a petal casts on the next one


@dataclass(frozen=True)
class Palette:
    """The colors of a class as `#rrggbb`: along the petal from throat to tip, then disc and its dots or rim."""

    adjective: str
    throat: str
    body: str
    tip: str
    disc: str
    accent: str


# Class i has form i mod 13 and palette i mod 17. These numbers have no common factor, so no pair comes twice, and 13
# classes in a row share neither form nor palette. Neighbors in both lists look different.
FORMS = (
    Form("daisy", 15, 0.135, 0.7, 0.38, "seeds", 0.27),
    Form("poppy", 4, 0.68, 0.75, 0.36, "stamens", 0.24, fringe=0.022, overlap_shadow=0.5),
    Form("dahlia", 11, 0.17, 0.9, 0.75, "bud", 0.13, whorls=4, decay=0.77, rib=0.16),
    Form("lily", 3, 0.27, 0.75, 0.95, "stamens", 0.30, whorls=2, decay=0.95, curl=0.15, rib=0.2),
    Form("cherry", 5, 0.43, 0.9, 0.36, "stamens", 0.27, notch=0.17),
    Form("sunwheel", 19, 0.12, 0.35, 0.95, "seeds", 0.50, whorls=2, decay=0.93, rib=0.15),
    Form("trillium", 3, 0.47, 0.95, 0.95, "bud", 0.12, rib=0.2),
    Form("pinwheel", 5, 0.30, 1.0, 0.55, "star", 0.26, curl=0.75),
    Form("rose", 5, 0.66, 0.55, 0.32, "bud", 0.14, whorls=5, decay=0.79, turn=0.38, rib=0.03, overlap_shadow=0.5),
    Form("daffodil", 6, 0.33, 0.75, 0.62, "trumpet", 0.42),
    Form("spidermum", 13, 0.08, 1.6, 0.32, "seeds", 0.17, whorls=2, decay=0.74, curl=0.25),
    Form("clematis", 8, 0.27, 0.9, 0.62, "star", 0.22, rib=0.35),
    Form("carnation", 8, 0.36, 1.1, 0.25, "bud", 0.10, whorls=4, decay=0.76, fringe=0.055, overlap_shadow=0.5),
)
PALETTES = (
    Palette("amber", "#e0700e", "#ffab1c", "#ffd257", "#4a2410", "#9a5a1c"),
    Palette("scarlet", "#3a0610", "#d8151f", "#f5483a", "#1d1420", "#e6d8a4"),
    Palette("violet", "#3d1480", "#7a35c8", "#b37cf0", "#f2c544", "#fff0a8"),
    Palette("ivory", "#b9cf74", "#f6f2e2", "#fffdf6", "#7d9c35", "#d97a12"),
    Palette("blush", "#d22a6c", "#f78fb6", "#ffcadb", "#c23568", "#ffe08a"),
    Palette("cobalt", "#0d1a66", "#2449d6", "#5b86f5", "#ecd35a", "#8a5a14"),
    Palette("lemon", "#b7c02c", "#f8ea3c", "#fff9a0", "#86a02a", "#e8f0a0"),
    Palette("fuchsia", "#6b0550", "#d41894", "#f560c2", "#fff3c9", "#f7b32b"),
    Palette("peach", "#e2563f", "#fba582", "#ffd9bf", "#c9482f", "#ffe9b8"),
    Palette("azure", "#e9f6ff", "#58bdf0", "#9fe0ff", "#f8a81e", "#ffdf70"),
    Palette("burgundy", "#1d0309", "#650f26", "#97233f", "#e0a52c", "#fbe09a"),
    Palette("jade", "#3e8f4b", "#a5d67a", "#e3f5b0", "#3f6d2c", "#f3f2b6"),
    Palette("lavender", "#8a6fd0", "#c3b1f2", "#e9e1ff", "#6a4bb5", "#f8e79a"),
    Palette("flame", "#ffe14a", "#fb8a1a", "#d92416", "#5b1a0c", "#ffd447"),
    Palette("candy", "#ffffff", "#fff1f4", "#ea2f68", "#8fb04a", "#f6e27a"),
    Palette("copper", "#571d08", "#b1541e", "#e09348", "#2e160c", "#c98a3a"),
    Palette("indigo", "#ffffff", "#5a42b8", "#2a1a78", "#fff6d0", "#f0b429"),
)
NUM_CLASSES = 102
CLASS_NAMES: tuple[str, ...] = tuple(
    f"{PALETTES[i % len(PALETTES)].adjective} {FORMS[i % len(FORMS)].noun}" for i in range(NUM_CLASSES)
)

# Backgrounds, all out of focus: colors above, below, and of the discs of light.
SCENES = (
    ("#6f9c4a", "#2c5a2a", "#c9dd7c"),  # meadow
    ("#27482f", "#132a1d", "#5f8f55"),  # forest
    ("#9cc7e6", "#86a872", "#e8f4fb"),  # sky over a field
    ("#6c5a86", "#3a3350", "#e7a987"),  # dusk
    ("#8b7355", "#4a3b2a", "#c9b08a"),  # earth
    ("#d8c78a", "#7f8a4a", "#fff0c2"),  # late sun
    ("#a9b9b4", "#6d857a", "#dfe9e4"),  # mist
)


@dataclass(frozen=True)
class View:
    """What varies from image to image, apart from the background and the petals' small irregularities."""

    center: tuple[float, float]  # in the frame
    radius: float  # of the flower, in half frames
    rotation: float  # radians
    tilt: tuple[float, float, float]  # direction (x, y), and how much the flower is foreshortened along it
    light: tuple[float, float]  # towards the light; its length is the contrast
    tone: np.ndarray  # (3,), multiplies the petals' colors
    tint: np.ndarray  # (3,), multiplies every color


def synthetic_flower(class_index: int, index: int, *, seed: int = 0, resolution: int = 64) -> np.ndarray:
    """Draw flower number `index` of a class: the same flower for the same arguments, at every resolution.

    Args:
        class_index: 0 to 101, see `CLASS_NAMES`.
        index: number of the flower within the class, from 0 and without an upper limit.
        seed: another seed gives another data set of the same classes.
        resolution: pixels a side, 16 to 512.

    Returns:
        (resolution, resolution, 3) uint8 RGB.

    Raises:
        InputError: an argument is out of range.
    """
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
        raise InputError(f"resolution {resolution}: synthetic flowers are {MIN_RESOLUTION} to {MAX_RESOLUTION} pixels")
    if index < 0 or seed < 0:
        raise InputError(f"synthetic flower index {index}, seed {seed}: both must be 0 or more")
    form, palette = flower_design(class_index)
    # Not the kind of generator that `data.image_rng` is, so that crops and noise never repeat these numbers.
    rng = np.random.default_rng([seed, class_index, index])
    view = _draw_view(rng)
    background = _draw_background(rng, view)
    supersampling = max(2, 128 // resolution)
    size = supersampling * resolution
    canvas = np.asarray(background.resize((size, size), Image.Resampling.BICUBIC), np.float32).reshape(-1, 3) / 255
    _paint_flower(canvas, size, form, palette, view, rng)
    canvas *= view.tint
    np.clip(canvas, 0, 1, out=canvas)
    canvas = (canvas * 255 + 0.5).astype(np.uint8).reshape(size, size, 3)
    return np.asarray(Image.fromarray(canvas).reduce(supersampling))


def flower_design(class_index: int) -> tuple[Form, Palette]:
    """The form and the palette of a class (0 to 101). Raises `InputError` for any other index."""
    if not 0 <= class_index < NUM_CLASSES:
        raise InputError(f"class {class_index}: synthetic flowers have classes 0 to {NUM_CLASSES - 1}")
    return FORMS[class_index % len(FORMS)], PALETTES[class_index % len(PALETTES)]


def _draw_view(rng: np.random.Generator) -> View:
    radius = rng.uniform(0.68, 0.93)
    room = 0.05 + 0.6 * (1 - radius)
    tilt_angle = rng.uniform(0, math.pi)
    light_angle = rng.uniform(-math.pi, 0)  # from above
    contrast = rng.uniform(0.35, 1.0)
    warmth = rng.uniform(-0.05, 0.05)
    return View(
        center=(rng.uniform(-room, room), rng.uniform(-room, room)),
        radius=radius,
        rotation=rng.uniform(0, 2 * math.pi),
        tilt=(math.cos(tilt_angle), math.sin(tilt_angle), rng.uniform(0, 0.22)),
        light=(contrast * math.cos(light_angle), contrast * math.sin(light_angle)),
        tone=rng.uniform(0.95, 1.05, 3).astype(np.float32),
        tint=np.array([1 + warmth, 1.0, 1 - warmth], np.float32) * np.float32(rng.uniform(0.92, 1.08)),
    )


def _draw_background(rng: np.random.Generator, view: View) -> Image.Image:
    """A gradient of two colors, discs of light, and the flower's stem and leaves, all out of focus."""
    x, y = _pixel_grid(BACKGROUND_SIZE)
    above, below, glow = (_rgb(color) for color in SCENES[rng.integers(len(SCENES))])
    slope, wave_x, wave_y, phase_x, phase_y = rng.uniform((-0.3, 2, 1, 0, 0), (0.3, 6, 3, 6.3, 6.3)).tolist()
    height = 0.5 - 0.5 * y - slope * x + 0.12 * np.sin(wave_x * x + phase_x) * np.cos(wave_y * y + phase_y)
    canvas = _mix(below, above, np.clip(height, 0, 1))
    for disc_x, disc_y, size, strength in rng.uniform((-1, -1, 0.12, 0.08), (1, 1, 0.4, 0.32), (7, 4)).tolist():
        distance = np.sqrt((x - disc_x) ** 2 + (y - disc_y) ** 2)
        canvas = _mix(canvas, glow, strength * np.clip((size - distance) / 0.12 + 0.5, 0, 1))
    canvas *= rng.uniform(0.8, 1.1)
    canvas = _draw_leaves(canvas, x - view.center[0], y - view.center[1], view.radius, rng)
    pixels = np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels.reshape(BACKGROUND_SIZE, BACKGROUND_SIZE, 3))


def _draw_leaves(
    canvas: np.ndarray, x: np.ndarray, y: np.ndarray, radius: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw a bent stem and two leaves over `canvas` (N, 3). x and y, each (N,), start at the flower's center."""
    green = _rgb("#3f7a35") * rng.uniform(0.75, 1.25) * rng.uniform(0.9, 1.1, 3).astype(np.float32)
    stem = np.clip((0.055 - np.abs(x - rng.uniform(-0.35, 0.35) * y**2)) / 0.04 + 0.5, 0, 1) * (y > 0)
    canvas = _mix(canvas, green * 0.85, stem)
    angle = rng.uniform(0, 2 * math.pi)
    for _ in range(2):
        angle += rng.uniform(1.6, 3.2)
        along = (x * math.cos(angle) + y * math.sin(angle)) / (1.3 * radius)
        side = (y * math.cos(angle) - x * math.sin(angle)) / radius
        leaf = np.clip((0.9 * np.maximum(along * (1 - along), 0) - np.abs(side)) / 0.1, 0, 1)
        canvas = _mix(canvas, green * (1 + np.clip(4 * side, -0.22, 0.22))[:, None], leaf)
    return canvas


def _paint_flower(
    canvas: np.ndarray, size: int, form: Form, palette: Palette, view: View, rng: np.random.Generator
) -> None:
    """Paint the whorls, outermost first, and then the disc onto `canvas` (size * size, 3), in place."""
    x, y = _pixel_grid(size)
    x, y = (x - np.float32(view.center[0])) / view.radius, (y - np.float32(view.center[1])) / view.radius
    tilt_x, tilt_y, foreshortening = view.tilt
    along = (x * tilt_x + y * tilt_y) * foreshortening
    x, y = x + along * tilt_x, y + along * tilt_y
    radius_squared = x * x + y * y
    pixels = np.flatnonzero(radius_squared < 1.1)
    x, y, radius = x[pixels], y[pixels], np.sqrt(radius_squared[pixels]) + np.float32(1e-6)
    angle = np.arctan2(y, x)
    light_out = (view.light[0] * x + view.light[1] * y) / radius  # component of the light along the radius
    light_across = (view.light[1] * x - view.light[0] * y) / radius  # component along the angle
    polar = np.stack([radius, angle, light_out, light_across])
    pixel = 2 / (size * view.radius)

    tables = _petal_tables(form, palette, view.tone)
    flower = np.zeros((len(pixels), 4), np.float32)
    for whorl in range(form.whorls):
        inside = slice(None) if whorl == 0 else np.flatnonzero(radius < 1.1 * form.decay**whorl)
        flower[inside] = _paint_whorl(flower[inside], polar[:, inside], form, tables, view, whorl, pixel, rng)
    inside = np.flatnonzero(radius < 1.25 * form.disc_radius)
    flower[inside] = _paint_disc(flower[inside], polar[:, inside], form, palette, view, pixel)
    canvas[pixels] = canvas[pixels] * (1 - flower[:, 3:]) + flower[:, :3]


class PetalTables(NamedTuple):
    """What a petal is like at `PROFILE_STEPS` places from base to tip."""

    half_width: np.ndarray  # (steps,), relative to the widest place
    shadow_width: np.ndarray  # (steps,), the same for the outline that casts the shadow; its end is blunt
    color: np.ndarray  # (steps, 3)


def _paint_whorl(
    flower: np.ndarray,
    polar: np.ndarray,
    form: Form,
    tables: PetalTables,
    view: View,
    whorl: int,
    pixel: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Paint one ring of petals over `flower` (N, 4) at `polar` (4, N), with the outlines and colors of `tables`.

    A pixel lies between the mid-ribs of two petals, and can only be on one of these two. So two petals are evaluated
    for every pixel, as (2, N). The first of the two always lies on top: every petal overlaps the next.
    """
    radius, angle, light_out, light_across = polar
    length, sector = form.decay**whorl, 2 * math.pi / form.petals
    lengths = length * rng.uniform(0.94, 1.0, form.petals + 1).astype(np.float32)
    lean = rng.uniform(-0.09, 0.09, form.petals + 1).astype(np.float32)
    lengths[-1], lean[-1] = lengths[0], lean[0]

    turn = view.rotation + whorl * form.turn * sector
    position = (angle - np.float32(turn) - np.float32(form.curl / length) * radius) * np.float32(1 / sector)
    petal = np.floor(position)
    position -= petal
    petal = petal.astype(np.int32) % form.petals
    petal = np.stack([petal, petal + 1])
    offset = (np.stack([position, position - 1]) + lean[petal]) * np.float32(sector)
    petal_length = lengths[petal]
    side = radius * np.sin(offset) / (form.half_width * petal_length)  # -1 to 1 where the petal is widest
    along = radius * np.cos(offset) / petal_length
    if form.notch:
        along *= 1 + form.notch / (1 + (side / 0.3) ** 2)
    if form.fringe:
        along *= 1 + form.fringe * np.cos(13 * side)
    step = np.clip(along * PROFILE_STEPS, 0, PROFILE_STEPS - 1).astype(np.int32)
    half_width, from_rib = tables.half_width[step], np.abs(side)
    edge = np.minimum((half_width - from_rib) * form.half_width, 1 - along) * petal_length
    cover = np.clip(edge / np.float32(pixel) + 0.5, 0, 1)
    beside, beyond = np.maximum(from_rib - tables.shadow_width[step], 0), np.maximum(along - SHADOW_LENGTH, 0)
    gap = np.sqrt((beside * form.half_width) ** 2 + beyond**2) * petal_length  # from a petal to its shadow

    across = side / (half_width + 0.05)
    rib = form.rib * (1 / (1 + (across * 9) ** 2) + 0.25 * np.cos(across * 14) * along)
    light = 1 + light_out * (0.45 * along - 0.2) + 0.3 * light_across * across - rib - 0.1 * across**2
    light *= 0.72 + 0.34 * np.minimum(along * 1.6, 1)
    light[1] *= 1 - form.overlap_shadow / (1 + (gap[0] * (18 / length)) ** 2)

    if whorl > 0:  # a shadow on the whorl below, darker on the side away from the light
        depth = (0.5 - 0.25 * light_out) * np.maximum(1 - (9 / length) * gap.min(axis=0), 0) ** 2
        flower[:, :3] *= (1 - depth)[:, None]
    light *= 1 - 0.05 * (form.whorls - 1 - whorl)
    for which in (1, 0):
        # Light shines through petals: in the shade a color becomes deeper, not gray.
        color = tables.color[step[which]]
        color *= 1 + (1.5 * (light[which] - 1))[:, None] * (1 - 0.65 * color)
        _paint_over(flower, color, cover[which])
    return flower


def _petal_tables(form: Form, palette: Palette, tone: np.ndarray) -> PetalTables:
    t = (np.arange(PROFILE_STEPS, dtype=np.float32) + 0.5) / PROFILE_STEPS
    width = t**form.base * (1 - t) ** form.tip
    width /= width.max()
    shadow_width = np.where(t < SHADOW_LENGTH, width, width[int(SHADOW_LENGTH * PROFILE_STEPS)])
    stops = np.stack([_rgb(palette.throat), _rgb(palette.body), _rgb(palette.tip)])
    color = np.stack([np.interp(t, (0.18, 0.48, 0.95), stops[:, channel]) for channel in range(3)], axis=1)
    return PetalTables(width, shadow_width, color.astype(np.float32) * tone)


def _paint_disc(
    flower: np.ndarray, polar: np.ndarray, form: Form, palette: Palette, view: View, pixel: float
) -> np.ndarray:
    """Paint the flower's center, and its shadow on the petals, over `flower` (N, 4) at `polar` (4, N)."""
    radius, angle, light_out, _ = polar
    radius = radius / form.disc_radius
    disc = DISCS[form.disc](radius, angle - np.float32(view.rotation), form.disc_radius / pixel)
    light = disc.light * (1 + 0.4 * light_out * np.minimum(radius, 1))
    shadow = 0.22 * np.clip((1.25 - radius) * 4, 0, 1) ** 2
    color = _mix(_rgb(palette.disc), _rgb(palette.accent), disc.accent) * light[:, None]
    flower[:, :3] *= (1 - shadow)[:, None]
    _paint_over(flower, color, disc.cover)
    return flower


class Disc(NamedTuple):
    """A flower's center at N pixels: its opacity, the share of the accent color, and the light, each (N,)."""

    cover: np.ndarray
    accent: np.ndarray
    light: np.ndarray


# Each of these takes the radius (N,), which is 1 at the rim, the angle (N,), and the pixels per unit of radius.


def _seeds(radius: np.ndarray, angle: np.ndarray, sharpness: float) -> Disc:
    """A dome of florets along two families of spirals, like the seeds of a sunflower."""
    florets = np.cos(13 * angle + 17 * radius) * np.cos(21 * angle - 12 * radius) * radius
    blend = np.clip(1.1 * radius**2 - 0.25 + 0.35 * florets, 0, 1)
    return Disc(np.clip((1 - radius) * sharpness + 0.5, 0, 1), blend, 1.08 - 0.25 * radius**4 + 0.15 * florets)


def _stamens(radius: np.ndarray, angle: np.ndarray, sharpness: float) -> Disc:
    """Filaments that carry anthers, around a small dome."""
    offset = (np.mod(angle * (10 / (2 * math.pi)), 1) - 0.5) * (2 * math.pi / 10)
    side, along = radius * np.sin(offset), radius * np.cos(offset)
    filament = np.minimum(0.05 - np.abs(side), 0.9 - radius)
    anther = 0.17 - np.sqrt((along - 0.88) ** 2 + side**2)
    dome = 0.36 - radius
    cover = np.clip(np.maximum(np.maximum(filament, anther), dome) * sharpness + 0.5, 0, 1)
    light = 1.05 - 0.3 * np.clip(radius / 0.36, 0, 1) ** 4 * (radius < 0.36)
    return Disc(cover, np.clip((radius - 0.36) * 9, 0, 1), light)


def _star(radius: np.ndarray, angle: np.ndarray, sharpness: float) -> Disc:
    """A pale star with a bright center."""
    rim = 0.72 + 0.28 * np.cos(5 * angle)
    cover = np.clip((rim - radius) * sharpness + 0.5, 0, 1)
    return Disc(cover, np.clip((0.42 - radius) * 8 + 0.5, 0, 1), 1.0 - 0.15 * radius)


def _trumpet(radius: np.ndarray, angle: np.ndarray, sharpness: float) -> Disc:
    """A deep cup with a bright, ruffled rim."""
    rim = 0.94 + 0.06 * np.cos(9 * angle)
    depth = radius / rim
    cover = np.clip((rim - radius) * sharpness + 0.5, 0, 1)
    light = 0.45 + 0.6 * depth**2 + 0.05 * np.cos(18 * angle) * depth
    return Disc(cover, np.clip(depth * 2.6 - 1.7, 0, 1), light)


def _bud(radius: np.ndarray, angle: np.ndarray, sharpness: float) -> Disc:
    """A center without an edge towards the petals."""
    cover = np.clip(1.25 - radius, 0, 1) ** 0.7
    return Disc(cover, np.clip(0.5 + 0.5 * np.cos(3 * angle + 9 * radius), 0, 1) * radius * 0.6, 0.9 + 0 * radius)


DISCS = {"seeds": _seeds, "stamens": _stamens, "star": _star, "trumpet": _trumpet, "bud": _bud}


def _pixel_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y, each (size * size,), of the pixels' centers in the frame."""
    line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    return np.tile(line, size), np.repeat(line, size)


def _rgb(color: str) -> np.ndarray:
    """`#rrggbb` as (3,) float32 in [0, 1]."""
    return np.frombuffer(bytes.fromhex(color[1:]), np.uint8).astype(np.float32) / 255


def _mix(first: np.ndarray, second: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Colors (N, 3) between `first` and `second`, each (3,) or (N, 3), by `amount` (N,) in [0, 1]."""
    return first + amount[:, None] * (second - first)


def _paint_over(flower: np.ndarray, color: np.ndarray, cover: np.ndarray) -> None:
    """Paint `color` (N, 3) with opacity `cover` (N,) over `flower` (N, 4), premultiplied RGB and opacity, in place."""
    flower *= (1 - cover)[:, None]
    flower[:, :3] += cover[:, None] * color
    flower[:, 3] += cover
