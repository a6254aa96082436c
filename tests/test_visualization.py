"""`flower_ldm.visualization`: every picture shows what it was given, where it should."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from flower_ldm.visualization import (
    class_grid,
    image_grid,
    save_class_grid,
    save_diffusion_loss,
    save_loss_curves,
    save_reconstructions,
    to_uint8,
)

SIZE, GAP = 64, 2  # of images that need no enlarging


def plain_images(values: list[float]) -> torch.Tensor:
    """One image of a single grey for each value in [-1, 1]."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE)


def cells(grid: Image.Image) -> list[list[int]]:
    """The grey in the middle of each cell of a grid, row by row."""
    middles = np.asarray(grid)[GAP + SIZE // 2 :: SIZE + GAP, GAP + SIZE // 2 :: SIZE + GAP]
    return middles[..., 0].tolist()


@pytest.fixture
def figures(monkeypatch) -> list[plt.Figure]:
    """The figures that were saved and closed, still to be looked at."""
    closed = []
    close = plt.close
    monkeypatch.setattr(plt, "close", closed.append)
    yield closed
    for figure in closed:
        close(figure)


# Images


def test_to_uint8_maps_rounds_and_clips():
    values = torch.tensor([-1.0, 0.0, 1.0, -1.5, 1.5, 0.5])
    pixels = to_uint8(values.view(-1, 1, 1, 1).expand(-1, 3, 2, 2).requires_grad_())
    assert pixels.shape == (6, 2, 2, 3) and pixels.dtype == np.uint8
    assert pixels[:, 0, 0, 0].tolist() == [0, 128, 255, 0, 255, 191]


def test_to_uint8_gives_every_level_back():
    levels = torch.arange(256)
    images = (levels / 127.5 - 1).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert to_uint8(images)[0, :, :, 2].flatten().tolist() == levels.tolist()


def test_to_uint8_takes_bf16_and_keeps_the_channels_order():
    images = torch.tensor([1.0, -1.0, 0.0], dtype=torch.bfloat16).view(1, 3, 1, 1)
    assert to_uint8(images).tolist() == [[[[255, 0, 128]]]]


def test_grid_goes_row_by_row_on_white():
    grid = image_grid(to_uint8(plain_images([-1.0, -0.5, 0.0, 0.5, -1.0])), num_columns=3)
    assert grid.size == (3 * (SIZE + GAP) + GAP, 2 * (SIZE + GAP) + GAP)
    assert cells(grid) == [[0, 64, 128], [191, 0, 255]]
    assert (np.asarray(grid)[:GAP] == 255).all() and (np.asarray(grid)[:, SIZE + GAP : SIZE + 2 * GAP] == 255).all()


def test_small_images_are_enlarged_by_a_whole_factor():
    image = np.random.default_rng(0).integers(0, 256, size=(1, 24, 24, 3), dtype=np.uint8)
    enlarged = np.asarray(image_grid(image, num_columns=1))[GAP:-GAP, GAP:-GAP]
    assert enlarged.shape == (72, 72, 3)
    for row in range(3):
        assert (enlarged[row::3, row::3] == image[0]).all()


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [
        (2, [[0, 64], [128, 191]]),
        (4, [[0, 64, 0], [128, 191, 128], [64, 255, 255], [191, 255, 255]]),
        (6, [[0, 64, 0], [128, 191, 128], [64, 0, 64], [191, 128, 191]]),
    ],
)
def test_reconstructions_stand_under_their_originals(tmp_path, num_images, expected):
    images = plain_images([-1.0, -0.5] * (num_images // 2))
    reconstructions = plain_images([0.0, 0.5] * (num_images // 2))
    save_reconstructions(images, reconstructions, tmp_path / "new" / "grid.png", num_columns=3)
    assert cells(Image.open(tmp_path / "new" / "grid.png")) == expected


def test_class_grid_has_a_named_column_a_class():
    images = np.arange(6, dtype=np.uint8).reshape(3, 2, 1, 1, 1).repeat(8, 2).repeat(8, 3).repeat(3, 4)
    names = ["rose", "bird of paradise", "love-in-the-mist"]
    figure = class_grid(images, names, title="step 3")
    axes = np.array(figure.axes).reshape(2, 3)
    for row, column in np.ndindex(2, 3):
        assert axes[row, column].images[0].get_array()[0, 0, 0] == images[column, row, 0, 0, 0]
    assert [axis.get_xlabel() for axis in axes[1]] == ["rose", "bird of\nparadise", "love-in-\nthe-mist"]
    assert figure.get_suptitle() == "step 3"
    plt.close(figure)


def test_save_class_grid_writes_a_picture_and_leaves_no_figure_open(tmp_path):
    path = tmp_path / "samples" / "grid.png"
    save_class_grid(np.zeros((2, 1, 8, 8, 3), dtype=np.uint8), ["rose", "daisy"], path)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > picture.height
    assert not plt.get_fignums()


# Curves


def points(axis: plt.Axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axis.lines}


def test_loss_curves_have_a_panel_a_loss_with_its_held_out_values(tmp_path, figures):
    lines = [
        {"step": 1, "pixel_loss": 0.5},
        {"step": 2, "pixel_loss": 0.25, "center_loss": 1.0},
        {"step": 2, "val_pixel_loss": 0.3, "psnr": 20.0},
    ]
    path = tmp_path / "losses.png"
    save_loss_curves(lines, ["pixel_loss", "perceptual_loss", "center_loss", "psnr"], path)
    panels = {axis.get_title(): points(axis) for axis in figures[0].axes if axis.axison}
    assert panels == {
        "pixel loss": {"training": [(1, 0.5), (2, 0.25)], "held out": [(2, 0.3)]},
        "center loss": {"training": [(2, 1.0)]},
        "psnr": {"training": [(2, 20.0)]},
    }
    assert Image.open(path).format == "PNG"


def test_loss_curves_of_an_empty_log(tmp_path):
    save_loss_curves([], ["pixel_loss"], tmp_path / "losses.png")
    assert (tmp_path / "losses.png").is_file()
    assert not plt.get_fignums()


def test_diffusion_loss_over_steps_and_by_timestep(tmp_path, figures):
    lines = [
        {"step": step, "loss": 1 / step, "loss_by_timestep": [[0, 500, 2 / step], [500, 1000, None]]}
        for step in range(1, 6)
    ]
    save_diffusion_loss([*lines, {"step": 5, "val_loss": 0.25}], tmp_path / "loss.png")
    over_steps, by_timestep = map(points, figures[0].axes)
    assert list(over_steps.values()) == [[(step, 1 / step) for step in range(1, 6)], [(5, 0.25)]]
    assert by_timestep == {"update 1": [(250, 2)], "update 3": [(250, 2 / 3)], "update 5": [(250, 2 / 5)]}
    assert Image.open(tmp_path / "loss.png").format == "PNG"


def test_diffusion_loss_of_a_run_without_a_log_line(tmp_path: Path):
    save_diffusion_loss([{"step": 0, "val_loss": 1.0}], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").is_file()
