"""Names of classes in pictures: drawn as they are spelled, in fonts that have their letters."""

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

# A name such as `a$b$` is no formula, whatever a matplotlibrc says.
matplotlib.rcParams.update({"text.parse_math": False, "text.usetex": False, "axes.formatter.use_mathtext": False})
LONGEST_NAME = 48  # letters; a longer name is cut
REPORTED_LETTERS: set[str] = set()  # letters without a font, which the user has been told of


class Font(NamedTuple):
    """A face in a font file, and matplotlib's name of its family."""

    path: str
    index: int
    family: str


def drawable(name: str, longest: int = LONGEST_NAME) -> str:
    """A name as it is drawn: on one line, cut to `longest` letters, with control characters as visible escapes."""
    name = printable(name.strip())
    if len(name) > longest:
        name = name[: longest - 1].rstrip() + "…"
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves names that begin with _ out of legends


def wrapped(name: str, width: int) -> str:
    """A name on lines of at most `width` letters. A wide letter, such as a Chinese one, counts as two."""
    filler = "\u2060"  # an invisible character that stands for the second half of a wide letter
    wide = (letter + filler * (unicodedata.east_asian_width(letter) in "WF") for letter in name.strip())
    return "\n".join(textwrap.wrap("".join(wide), max(1, width))).replace(filler, "")


# --- fonts -----------------------------------------------------------------------------------------------------------


@cache
def letters_of(font: Font) -> frozenset[str]:
    """The letters that a font has glyphs for; none where the font can't be read."""
    try:
        return frozenset(map(chr, get_font(font.path).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()


@cache
def default_font() -> Font:
    """The font that matplotlib uses by default."""
    path = str(findfont(FontProperties()))
    return next((font for font in _installed() if font.path == path), Font(path, 0, "sans-serif"))


def _installed() -> list[Font]:
    """Every upright font that matplotlib knows of, those of regular weight first."""
    upright = (entry for entry in fontManager.ttflist if entry.style == "normal")
    entries = [entry for entry in upright if not entry.name.startswith("Last Resort")]
    entries.sort(key=lambda entry: (abs(_weight(entry.weight) - 400), "Sans" not in entry.name, entry.name))
    return [Font(str(entry.fname), getattr(entry, "index", 0), entry.name) for entry in entries]


def _weight(weight: object) -> int:
    """A weight as a number; names of weights count as regular."""
    return weight if isinstance(weight, int) else 400


@cache
def font_with(letter: str) -> Font | None:
    """An installed font that draws this letter."""
    return next((font for font in _installed() if letter in letters_of(font) and _inks(font, letter)), None)


def _inks(font: Font, letter: str) -> bool:
    """Whether Pillow can draw the letter in this font. It can't in fonts of colored bitmaps."""
    try:
        return ImageFont.truetype(font.path, 12, index=font.index).getmask(letter).getbbox() is not None
    except OSError:
        return False


def fonts_for(text: Iterable[str]) -> list[Font]:
    """The default font, and fonts for the letters that it lacks. Letters without a font are reported once."""
    fonts, lacking = [default_font()], set()
    for letter in sorted(set(text)):
        if letter.isspace() or any(letter in letters_of(font) for font in fonts):
            continue
        found = font_with(letter)
        fonts += [found] if found else []
        lacking |= set() if found else {letter}
    if new := sorted(lacking - REPORTED_LETTERS):
        REPORTED_LETTERS.update(new)
        letters = " ".join(new[:20]) + (f" and {len(new) - 20} more letters" if len(new) > 20 else "")
        write_line(
            f"no installed font has {letters}: pictures show boxes in their place; install a font that has them, "
            "such as Noto Sans CJK"
        )
    return fonts


def spell_out(figure: Figure) -> None:
    """Give a figure's texts fonts that have their letters."""
    texts = [text for text in figure.findobj(Text) if not text.get_text().isascii()]
    fonts = fonts_for("".join(text.get_text() for text in texts))
    for text in texts if len(fonts) > 1 else ():
        text.set_fontfamily([*text.get_fontfamily(), *(font.family for font in fonts[1:])])


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, with fonts for all its letters, and close it. The folder is made where there is none."""
    try:
        spell_out(figure)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # `fonts_for` reports it
            write_whole(path, lambda unfinished: figure.savefig(unfinished, dpi=110, format="png"))
    finally:
        plt.close(figure)


def pillow_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """One font for a text that Pillow draws: its own, or the one that has most of the letters."""
    own = ImageFont.load_default(size)
    if text.isascii() or not isinstance(own, ImageFont.FreeTypeFont):  # without FreeType Pillow has one ASCII font
        return own
    letters = set(text)
    font = max(fonts_for(text), key=lambda candidate: len(letters & letters_of(candidate)))
    return ImageFont.truetype(font.path, size, index=font.index)
