"""Procedural flowers: a data set that needs no download, drawn from nothing but (seed, class, index).

A class is a form (petal count and outline, whorls, disc) in a palette; position, size, tilt, rotation, light and the
blurred background vary from image to image. Its neighbor `data` serves it as `--dataset synthetic`.

Units: the frame spans [-1, 1] in both directions, y downwards; on the flower, 1 is the length of an outer petal.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .errors import InputError

MIN_RESOLUTION, MAX_RESOLUTION = 16, 512
BACKGROUND_SIZE = 64  # the background is out of focus: drawn at this size and enlarged
PROFILE_STEPS = 1024  # entries of the tables along a petal
SHADOW_LENGTH = 0.93  # of a petal: what casts its shadow has a blunt end, from which distance is easily measured


@dataclass(frozen=True)
class Form:
    """What a class looks like apart from its colors. Lengths are in units of the outer petals."""

    noun: str
    petals: int  # in each whorl
    half_width: float  # of a petal, where it is widest
    base: float  # exponents of the outline t^base (1 - t)^tip: a large base makes a narrow claw,
    tip: float  # a tip below 0.5 a blunt end, above 0.8 a pointed one
    disc: str  # one of DISCS
    disc_radius: float
    whorls: int = 1
    decay: float = 0.75  # length of a whorl over that of the whorl around it
    turn: float = 0.5  # of a whorl against the one around it, in petals
    curl: float = 0.0  # radians by which a petal's tip is turned against its base
    notch: float = 0.0  # depth of the cleft in the tip, in petal lengths
    fringe: float = 0.0  # depth of the teeth at the tip, in petal lengths
    rib: float = 0.1  # darkness of the mid-rib and veins
    overlap_shadow: float = 0.4  # that a petal casts on the next one


@dataclass(frozen=True)
class Palette:
    """The colors of a class as `#rrggbb`: along the petal from throat to tip, then disc and its dots or rim."""

    adjective: str
    throat: str
    body: str
    tip: str
    disc: str
    accent: str


# 13 forms and 17 palettes have no common factor: class i takes form i mod 13 and palette i mod 17. No pair comes
# twice, and 13 classes in a row share neither form nor palette. Neighbors in both lists are chosen to be unlike.
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

# (above, below, bokeh), each out of focus behind any flower
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
        index: which flower of the class, from 0; there is no last one.
        seed: another seed, another data set of the same classes.
        resolution: pixels a side, 16 to 512.

    Returns:
        (resolution, resolution, 3) uint8 RGB.

    Raises:
        InputError: an argument out of range.
    """
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
        raise InputError(f"resolution {resolution}: synthetic flowers are {MIN_RESOLUTION} to {MAX_RESOLUTION} pixels")
    if index < 0 or seed < 0:
        raise InputError(f"synthetic flower index {index}, seed {seed}: both must be 0 or more")
    form, palette = flower_design(class_index)
    # A stream of its own, so that no crop or noise that `data` draws for a training sample can repeat it.
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
    """The form and the palette that a class (0 to 101) is made of. Raises `InputError` for any other index."""
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
    """Two colors melting into each other, discs of light, and the flower's own stem and leaves, all out of focus."""
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
    """A bent stem and two leaves over `canvas` (N, 3); x and y, each (N,), are measured from the flower's center."""
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
    """Paint whorl after whorl, outermost first, then the disc, onto `canvas` (size * size, 3) in place."""
    x, y = _pixel_grid(size)
    x, y = (x - np.float32(view.center[0])) / view.radius, (y - np.float32(view.center[1])) / view.radius
    tilt_x, tilt_y, foreshortening = view.tilt
    along = (x * tilt_x + y * tilt_y) * foreshortening
    x, y = x + along * tilt_x, y + along * tilt_y
    radius_squared = x * x + y * y
    pixels = np.flatnonzero(radius_squared < 1.1)
    x, y, radius = x[pixels], y[pixels], np.sqrt(radius_squared[pixels]) + np.float32(1e-6)
    angle = np.arctan2(y, x)
    light_out = (view.light[0] * x + view.light[1] * y) / radius  # the light's share along the radius,
    light_across = (view.light[1] * x - view.light[0] * y) / radius  # and along the angle
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


def _paint_whorl(
    flower: np.ndarray,
    polar: np.ndarray,
    form: Form,
    tables: tuple[np.ndarray, np.ndarray, np.ndarray],
    view: View,
    whorl: int,
    pixel: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """One ring of petals over `flower` (N, 4) at `polar` (4, N), cut and colored by `tables`.

    A pixel lies between the mid-ribs of two petals and can only be on one of these, so each is evaluated once for all
    pixels, as (2, N). The first of the two always lies on top: every petal overlaps the next, as in real flowers.
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
    width, reach, gradient = tables
    step = np.clip(along * PROFILE_STEPS, 0, PROFILE_STEPS - 1).astype(np.int32)
    half_width, from_rib = width[step], np.abs(side)
    edge = np.minimum((half_width - from_rib) * form.half_width, 1 - along) * petal_length
    cover = np.clip(edge / np.float32(pixel) + 0.5, 0, 1)
    beside, beyond = np.maximum(from_rib - reach[step], 0), np.maximum(along - SHADOW_LENGTH, 0)
    gap = np.sqrt((beside * form.half_width) ** 2 + beyond**2) * petal_length  # from a petal to what it shades

    across = side / (half_width + 0.05)
    rib = form.rib * (1 / (1 + (across * 9) ** 2) + 0.25 * np.cos(across * 14) * along)
    light = 1 + light_out * (0.45 * along - 0.2) + 0.3 * light_across * across - rib - 0.1 * across**2
    light *= 0.72 + 0.34 * np.minimum(along * 1.6, 1)
    light[1] *= 1 - form.overlap_shadow / (1 + (gap[0] * (18 / length)) ** 2)

    if whorl > 0:  # a shadow on the whorl below, deeper on the side away from the light
        depth = (0.5 - 0.25 * light_out) * np.maximum(1 - (9 / length) * gap.min(axis=0), 0) ** 2
        flower[:, :3] *= (1 - depth)[:, None]
    light *= 1 - 0.05 * (form.whorls - 1 - whorl)
    for which in (1, 0):
        # Light falls through petals: in the shade a color deepens rather than turns gray.
        color = gradient[step[which]]
        color *= 1 + (1.5 * (light[which] - 1))[:, None] * (1 - 0.65 * color)
        _paint_over(flower, color, cover[which])
    return flower


def _petal_tables(form: Form, palette: Palette, tone: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Along a petal from base to tip: half-width relative to the widest, (steps,); the same for the shadow's outline,
    which stays blunt where the petal closes, (steps,); and color, (steps, 3)."""
    t = (np.arange(PROFILE_STEPS, dtype=np.float32) + 0.5) / PROFILE_STEPS
    width = t**form.base * (1 - t) ** form.tip
    width /= width.max()
    reach = np.where(t < SHADOW_LENGTH, width, width[int(SHADOW_LENGTH * PROFILE_STEPS)])
    stops = np.stack([_rgb(palette.throat), _rgb(palette.body), _rgb(palette.tip)])
    color = np.stack([np.interp(t, (0.18, 0.48, 0.95), stops[:, channel]) for channel in range(3)], axis=1)
    return width, reach, color.astype(np.float32) * tone


def _paint_disc(
    flower: np.ndarray, polar: np.ndarray, form: Form, palette: Palette, view: View, pixel: float
) -> np.ndarray:
    """The flower's center, and its shadow on the petals, over `flower` (N, 4) at `polar` (4, N)."""
    radius, angle, light_out, _ = polar
    radius = radius / form.disc_radius
    cover, blend, light = DISCS[form.disc](radius, angle - np.float32(view.rotation), form.disc_radius / pixel)
    light = light * (1 + 0.4 * light_out * np.minimum(radius, 1))
    shadow = 0.22 * np.clip((1.25 - radius) * 4, 0, 1) ** 2
    color = _mix(_rgb(palette.disc), _rgb(palette.accent), blend) * light[:, None]
    flower[:, :3] *= (1 - shadow)[:, None]
    _paint_over(flower, color, cover)
    return flower


# Each disc takes radius (N,), 1 at its rim, angle (N,) and the pixels in a unit of radius,
# and returns, each (N,), its cover, the share of the accent color and the light.


def _seeds(radius: np.ndarray, angle: np.ndarray, sharpness: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A dome of florets along two families of spirals, as a sunflower sets its seeds."""
    florets = np.cos(13 * angle + 17 * radius) * np.cos(21 * angle - 12 * radius) * radius
    blend = np.clip(1.1 * radius**2 - 0.25 + 0.35 * florets, 0, 1)
    return np.clip((1 - radius) * sharpness + 0.5, 0, 1), blend, 1.08 - 0.25 * radius**4 + 0.15 * florets


def _stamens(radius: np.ndarray, angle: np.ndarray, sharpness: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Filaments that carry anthers, around a small dome."""
    offset = (np.mod(angle * (10 / (2 * math.pi)), 1) - 0.5) * (2 * math.pi / 10)
    side, along = radius * np.sin(offset), radius * np.cos(offset)
    filament = np.minimum(0.05 - np.abs(side), 0.9 - radius)
    anther = 0.17 - np.sqrt((along - 0.88) ** 2 + side**2)
    dome = 0.36 - radius
    cover = np.clip(np.maximum(np.maximum(filament, anther), dome) * sharpness + 0.5, 0, 1)
    return cover, np.clip((radius - 0.36) * 9, 0, 1), 1.05 - 0.3 * np.clip(radius / 0.36, 0, 1) ** 4 * (radius < 0.36)


def _star(radius: np.ndarray, angle: np.ndarray, sharpness: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A pale star with a bright heart."""
    rim = 0.72 + 0.28 * np.cos(5 * angle)
    cover = np.clip((rim - radius) * sharpness + 0.5, 0, 1)
    return cover, np.clip((0.42 - radius) * 8 + 0.5, 0, 1), 1.0 - 0.15 * radius


def _trumpet(radius: np.ndarray, angle: np.ndarray, sharpness: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A deep cup with a bright, ruffled rim."""
    rim = 0.94 + 0.06 * np.cos(9 * angle)
    depth = radius / rim
    cover = np.clip((rim - radius) * sharpness + 0.5, 0, 1)
    return cover, np.clip(depth * 2.6 - 1.7, 0, 1), 0.45 + 0.6 * depth**2 + 0.05 * np.cos(18 * angle) * depth


def _bud(radius: np.ndarray, angle: np.ndarray, sharpness: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A heart that melts into the petals."""
    cover = np.clip(1.25 - radius, 0, 1) ** 0.7
    return cover, np.clip(0.5 + 0.5 * np.cos(3 * angle + 9 * radius), 0, 1) * radius * 0.6, 0.9 + 0 * radius


DISCS = {"seeds": _seeds, "stamens": _stamens, "star": _star, "trumpet": _trumpet, "bud": _bud}


def _pixel_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y, each (size * size,), of the pixels' centers in the frame."""
    line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    return np.tile(line, size), np.repeat(line, size)


def _rgb(color: str) -> np.ndarray:
    """`#rrggbb` as (3,) float32 in [0, 1]."""
    return np.frombuffer(bytes.fromhex(color[1:]), np.uint8).astype(np.float32) / 255


def _mix(first: np.ndarray, second: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """From `first` to `second`, (3,) or (N, 3), by `amount` (N,) in [0, 1]: (N, 3)."""
    return first + amount[:, None] * (second - first)


def _paint_over(flower: np.ndarray, color: np.ndarray, cover: np.ndarray) -> None:
    """Lay `color` (N, 3) with `cover` (N,) over `flower` (N, 4), premultiplied RGB and cover, in place."""
    flower *= (1 - cover)[:, None]
    flower[:, :3] += cover[:, None] * color
    flower[:, 3] += cover
