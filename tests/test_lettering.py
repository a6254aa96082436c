"""flower_ldm/lettering.py: names of every kind through everything that draws them, and letters that fonts lack."""

import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from PIL import Image

from flower_ldm import lettering
from flower_ldm.latent_maps import LatentPlane, latent_map
from flower_ldm.lettering import drawable, fonts_for, pillow_font, save_figure, wrapped
from flower_ldm.sample import label_grid
from flower_ldm.trajectory import Trajectory, animation_frames, save_denoising_path
from flower_ldm.visualization import class_grid, save_class_grid, save_picture_table

NAMES = ["Ca$$h", "a$b$", r"$\frac{$", "$", "_rose", "foto-\udce9", "red\nrose\t\x1b[31m", "x" * 300, "", " ",
         "牡丹", "🌹", "100 % {rose} \\ ^_ #"]  # fmt: skip


@pytest.fixture
def forget(monkeypatch):
    """Fonts are looked for anew, and what they lack is said again."""

    def clear() -> None:
        lettering.letters_of.cache_clear()
        lettering.font_with.cache_clear()

    monkeypatch.setattr(lettering, "REPORTED_LETTERS", set())
    clear()
    yield
    clear()


@pytest.fixture
def peony_font(tmp_path, monkeypatch, forget) -> Path:
    """An installed font with a black square for 牡, 丹 and a, and nothing else."""
    pen = TTGlyphPen(None)
    for step, corner in enumerate([(0, 0), (0, 900), (900, 900), (900, 0)]):
        (pen.lineTo if step else pen.moveTo)(corner)
    pen.closePath()
    square, nothing = pen.glyph(), TTGlyphPen(None).glyph()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "square"])
    font.setupCharacterMap({ord(letter): "square" for letter in "牡丹a"})
    font.setupGlyf({".notdef": nothing, "square": square})
    font.setupHorizontalMetrics(dict.fromkeys((".notdef", "square"), (1000, 0)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": "Peony", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "peony.ttf")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(fontManager, "ttflist", list(fontManager.ttflist))
    fontManager.addfont(str(tmp_path / "peony.ttf"))
    broken = dataclasses.replace(fontManager.ttflist[-1], fname=str(tmp_path / "broken.ttf"), name="Broken Sans")
    fontManager.ttflist.insert(0, broken)
    return tmp_path / "peony.ttf"


def texts(figure: plt.Figure) -> list[str]:
    """On one line each: wide names are broken."""
    return [text.get_text().replace("\n", "") for text in figure.findobj(Text)]


def test_every_name_is_drawn_as_it_is_spelled(tmp_path, figures):
    """In each kind of picture that shows names."""
    images = np.zeros((len(NAMES), 1, 8, 8, 3), np.uint8)
    save_class_grid(images, NAMES, tmp_path / "grid.png")
    save_picture_table(images, tmp_path / "table.png", row_names=NAMES)
    rng = np.random.default_rng(0)
    labels = np.arange(len(NAMES)).repeat(4)
    latents = rng.normal(size=(len(labels), 2, 2, 2)).astype(np.float32)
    figure, axis = plt.subplots()
    latent_map(axis, {"training": latents[:, 0, 0]}, {"training": labels}, NAMES)
    save_figure(figure, tmp_path / "map.png")
    for name in NAMES:
        states = rng.normal(size=(3, 2, 2, 2)).astype(np.float32)
        seen = np.zeros((3, 8, 8, 3), np.uint8)
        path = Trajectory(0, name, np.array([1.0, 0.5, 0.0]), states, states, seen, seen)
        if name in ("a$b$", "foto-\udce9"):
            save_denoising_path(path, LatentPlane.fit(latents, labels), tmp_path / "path.png")
        assert len(animation_frames(path)) == 3
        label_grid([[Image.new("RGB", (32, 32))]], [name]).verify()
    for figure in figures[:2]:
        assert {"Ca$$h", "a$b$", r"$\frac{$", "_rose", r"foto-\udce9", r"red\nrose\t\x1b[31m"} <= set(texts(figure))
        assert not any(text.get_parse_math() for text in figure.findobj(Text) if text.get_text())
    assert " _rose" in [text.get_text() for text in axis.get_legend().get_texts()]


def test_names_stay_below_their_own_columns(tmp_path, figures):
    names = [
        "_hidden`[x](http:evil)`*b*",
        "photographsofmeadowsinautumn" * 2,
        "a bishop of llandaffandmore",
        "rose",
        "牡丹" * 20,
        "x-" * 30,
    ]
    save_class_grid(np.zeros((len(names), 1, 8, 8, 3), np.uint8), names, tmp_path / "grid.png")
    extents = [axis.xaxis.label.get_window_extent() for axis in figures[0].axes]
    for label, (left, right) in enumerate(zip(extents, extents[1:], strict=False)):
        assert left.x1 < right.x0 + 2, names[label]


@pytest.mark.parametrize(
    ("name", "lines"),
    [(" init__ 🌻", "init__ 🌻"), ("牡丹" * 4, "牡丹牡丹牡\n丹牡丹"), ("bishop of llandaff", "bishop of\nllandaff"),
     ("abcdefghijklm", "abcdefghij\nklm"), ("", "")],
)  # fmt: skip
def test_wrapped(name, lines):
    assert wrapped(name, 10) == lines


@pytest.mark.parametrize(
    ("name", "lines"),
    [("_hidden`[x](http:evil)`*b*", "_hidden`[x](ht\ntp:evil)`*b*"), ("african_elephant", "african_\nelephant"),
     ("globe-flower", "globe-flower"), ("prince of wales feathers", "prince of\nwales feathers")],
)  # fmt: skip
def test_names_of_columns_are_broken_where_one_reads_them_best(name, lines):
    figure = class_grid(np.zeros((1, 1, 8, 8, 3), np.uint8), [name])
    assert figure.axes[0].get_xlabel() == lines
    plt.close(figure)


def test_a_dollar_is_drawn():
    """Not taken for the sign that begins a formula: two pictures of `a$b$` and `ab` differ."""
    drawn = []
    for name in ("a$b$", "ab", "ab"):
        figure = plt.figure(figsize=(1, 1))
        figure.text(0.1, 0.5, name)
        figure.canvas.draw()
        drawn.append(np.asarray(figure.canvas.buffer_rgba()).copy())
        plt.close(figure)
    assert np.array_equal(drawn[1], drawn[2]) and not np.array_equal(drawn[0], drawn[1])


def test_a_matplotlibrc_cannot_bring_formulas_back():
    assert not any(plt.rcParams[name] for name in ("text.parse_math", "text.usetex", "axes.formatter.use_mathtext"))


@pytest.mark.parametrize(
    ("name", "drawn"),
    [("rose ", "rose"), ("y" * 60, "y" * 47 + "…"), ("_", " _"), ("a\nb", r"a\nb"), ("\ud83c", r"\ud83c")],
)
def test_drawable(name, drawn):
    assert drawable(name) == drawn and len(drawn) <= 49


def test_letters_come_from_a_font_that_has_them(peony_font, tmp_path, figures, capsys, recwarn):
    assert [font.path for font in fonts_for("Rose 牡丹")][1:] == [str(peony_font)]
    assert pillow_font("牡丹", 12).path == str(peony_font)
    assert pillow_font("Rose, ßé", 12).path != str(peony_font)
    save_class_grid(np.zeros((2, 1, 8, 8, 3), np.uint8), ["牡丹", "rose"], tmp_path / "grid.png")
    [name] = [text for text in figures[0].findobj(Text) if text.get_text() == "牡丹"]
    assert name.get_fontfamily()[-1] == "Peony"
    grid = np.asarray(label_grid([[Image.new("RGB", (96, 96), "white")]], ["牡丹"]))
    assert (grid == 0).all(axis=2).sum() > 2 * 90  # two squares of 12 pixels, less their smooth edges
    assert capsys.readouterr().err == "" and not [one for one in recwarn if "Glyph" in str(one.message)]


def test_letters_that_no_font_has_are_named_once(forget, tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.setattr(fontManager, "ttflist", [one for one in fontManager.ttflist if "DejaVu" in one.name])
    for _ in range(2):
        save_class_grid(np.zeros((2, 1, 8, 8, 3), np.uint8), ["牡丹", "rose"], tmp_path / "grid.png")
        label_grid([[Image.new("RGB", (96, 96))]], ["牡丹 Rose"])
    assert not recwarn.list  # matplotlib doesn't say it too
    assert capsys.readouterr().err == (
        "no installed font has 丹 牡: pictures show boxes in their place; install a font that has them, "
        "such as Noto Sans CJK\n"
    )
    fonts_for(map(chr, range(0x4E00, 0x4E00 + 50)))
    assert " and 30 more letters: " in capsys.readouterr().err
