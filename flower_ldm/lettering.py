"""Names of classes in pictures: drawn as they are spelled, whatever they hold, in fonts that have their letters."""

import textwrap
import unicodedata
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text
from PIL import ImageFont

from .errors import printable
from .files import write_whole
from .progress_bars import write_line

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

# No name is a formula, `a$b$` neither, whatever a matplotlibrc says.
matplotlib.rcParams.update({"text.parse_math": False, "text.usetex": False, "axes.formatter.use_mathtext": False})
LONGEST_NAME = 48  # letters; of a longer name the beginning is drawn
TOLD: set[str] = set()  # letters that no font has, and that it has been said of


class Font(NamedTuple):
    """A face in a font file, and how matplotlib calls its family."""

    path: str
    index: int
    family: str


def drawable(name: str, longest: int = LONGEST_NAME) -> str:
    """A name as it may be drawn: on one line, not too long, without what no font can show."""
    name = printable(name.strip())
    if len(name) > longest:
        name = name[: longest - 1].rstrip() + "…"
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves it out of legends otherwise


def wrapped(name: str, width: int) -> str:
    """A name on lines of at most `width` letters, of which a Chinese one and the like counts as two."""
    filler = "\u2060"  # behind each wide letter, as it were its other half
    wide = (letter + filler * (unicodedata.east_asian_width(letter) in "WF") for letter in name.strip())
    return "\n".join(textwrap.wrap("".join(wide), max(1, width))).replace(filler, "")


# --- fonts -----------------------------------------------------------------------------------------------------------


@cache
def letters_of(font: Font) -> frozenset[str]:
    """What a font has a glyph for; nothing where it can't be read."""
    try:
        return frozenset(map(chr, get_font(font.path).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()


@cache
def default_font() -> Font:
    """The one that matplotlib takes unless it is told otherwise."""
    path = str(findfont(FontProperties()))
    return next((font for font in _installed() if font.path == path), Font(path, 0, "sans-serif"))


def _installed() -> list[Font]:
    """Every upright font that matplotlib knows of, those of a regular weight first."""
    entries = [one for one in fontManager.ttflist if one.style == "normal" and not one.name.startswith("Last Resort")]
    entries.sort(key=lambda one: (abs(_weight(one.weight) - 400), "Sans" not in one.name, one.name))
    return [Font(str(one.fname), getattr(one, "index", 0), one.name) for one in entries]


def _weight(weight: object) -> int:
    return weight if isinstance(weight, int) else 400


@cache
def font_with(letter: str) -> Font | None:
    """An installed font that draws this letter."""
    return next((font for font in _installed() if letter in letters_of(font) and _inks(font, letter)), None)


def _inks(font: Font, letter: str) -> bool:
    """Whether it comes out: of fonts of colored bitmaps it doesn't."""
    try:
        return ImageFont.truetype(font.path, 12, index=font.index).getmask(letter).getbbox() is not None
    except OSError:
        return False


def fonts_for(text: Iterable[str]) -> list[Font]:
    """The default font, and those that have the letters that it lacks; says once which letters no font has."""
    fonts, lacking = [default_font()], set()
    for letter in sorted(set(text)):
        if letter.isspace() or any(letter in letters_of(font) for font in fonts):
            continue
        found = font_with(letter)
        fonts += [found] if found else []
        lacking |= set() if found else {letter}
    if new := sorted(lacking - TOLD):
        TOLD.update(new)
        some = " ".join(new[:20]) + (f" and {len(new) - 20} more letters" if len(new) > 20 else "")
        way_out = "pictures show boxes in their place; install one that has, such as Noto Sans CJK"
        write_line(f"no font here has {some}: {way_out}")
    return fonts


def spell_out(figure: Figure) -> None:
    """Have a figure's texts drawn in fonts that have their letters."""
    texts = [text for text in figure.findobj(Text) if not text.get_text().isascii()]
    fonts = fonts_for("".join(text.get_text() for text in texts))
    for text in texts if len(fonts) > 1 else ():
        text.set_fontfamily([*text.get_fontfamily(), *(font.family for font in fonts[1:])])


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, its names spelled out, and let go of it; the folder is made where there is none."""
    try:
        spell_out(figure)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # `fonts_for` has said it
            write_whole(path, lambda unfinished: figure.savefig(unfinished, dpi=110, format="png"))
    finally:
        plt.close(figure)


def pillow_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """One font for a text that Pillow draws: its own where that has every letter, else the one that has most."""
    own = ImageFont.load_default(size)
    if text.isascii() or not isinstance(own, ImageFont.FreeTypeFont):  # Pillow without FreeType has one font of ASCII
        return own
    letters = set(text)
    font = max(fonts_for(text), key=lambda one: len(letters & letters_of(one)))
    return ImageFont.truetype(font.path, size, index=font.index)
