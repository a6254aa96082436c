"""Pictures of a run: image grids, reconstructions beside their originals, loss curves.

Its neighbours: both training scripts call it; it reads images as `(B, 3, H, W)` in [-1, 1] and logs as
`training.read_log` gives them.
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """`(B, 3, H, W)` in [-1, 1] -> `(B, H, W, 3)` uint8, rounded, what lies outside clipped."""
    scaled = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def image_grid(images: np.ndarray, num_columns: int, gap: int = 2, min_pixels: int = 64) -> Image.Image:
    """`(B, H, W, 3)` uint8, row by row, on white; small images are enlarged by whole factors to be seen."""
    enlarge = max(1, -(-min_pixels // images.shape[1]))
    images = images.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    num_images, height, width, _ = images.shape
    num_rows = -(-num_images // num_columns)
    grid = np.full((num_rows * (height + gap) + gap, num_columns * (width + gap) + gap, 3), 255, dtype=np.uint8)
    for number, image in enumerate(images):
        top, left = number // num_columns * (height + gap) + gap, number % num_columns * (width + gap) + gap
        grid[top : top + height, left : left + width] = image
    return Image.fromarray(grid)


def save_reconstructions(
    images: torch.Tensor, reconstructions: torch.Tensor, path: Path, num_columns: int = 8
) -> None:
    """Rows of originals, each above the row of its reconstructions. Both `(B, 3, H, W)` in [-1, 1]."""
    num_columns = min(num_columns, len(images))
    pairs = np.stack([to_uint8(images), to_uint8(reconstructions)])  # (2, B, H, W, 3)
    blank = np.full_like(pairs[:, :1], 255).repeat(-len(images) % num_columns, axis=1)
    rows = np.concatenate([pairs, blank], axis=1).reshape(2, -1, num_columns, *pairs.shape[2:]).swapaxes(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(rows.reshape(-1, *pairs.shape[2:]), num_columns).save(path)


def class_grid(images: np.ndarray, names: list[str], title: str | None = None) -> plt.Figure:
    """`(num_classes, images_per_class, H, W, 3)` uint8 -> one column a class, its name under it."""
    num_classes, images_per_class = images.shape[:2]
    figure, axes = plt.subplots(
        images_per_class,
        num_classes,
        figsize=(1.25 * num_classes, 1.25 * images_per_class + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for column, name in enumerate(names):
        for row in range(images_per_class):
            axes[row, column].imshow(images[column, row], interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[])
            axes[row, column].spines[:].set_visible(False)
        axes[-1, column].set_xlabel(_two_lines(name), fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _two_lines(name: str, width: int = 14) -> str:
    """Break a class name at the space or hyphen nearest its middle, where it's too wide for a column."""
    breaks = [index for index, letter in enumerate(name) if letter in " -"]
    if len(name) <= width or not breaks:
        return name
    middle = min(breaks, key=lambda index: abs(index - len(name) / 2))
    return name[: middle + (name[middle] == "-")] + "\n" + name[middle + 1 :]


def save_class_grid(images: np.ndarray, names: list[str], path: Path, title: str | None = None) -> None:
    """`class_grid` as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = class_grid(images, names, title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_loss_curves(lines: list[dict], names: list[str], path: Path) -> None:
    """Each logged scalar over steps, one panel a name; held-out values, logged as `val_<name>`, are its points."""
    panels = [name for name in names if any(name in line for line in lines)]
    num_columns = min(3, max(1, len(panels)))
    num_rows = max(1, -(-len(panels) // num_columns))
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=(4.2 * num_columns, 2.7 * num_rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, panels, strict=False):
        for key, style, label in ((name, "-", "training"), (f"val_{name}", "o-", "held out")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axis.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1.2, label=label)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel("optimizer updates", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if len(axis.lines) > 1:
            axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_diffusion_loss(lines: list[dict], path: Path) -> None:
    """The denoiser's loss over steps, and by timestep: how the first, a middle and the last log line had it."""
    figure, (over_steps, by_timestep) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for key, style, label in (("loss", "-", "training"), ("val_loss", "o-", "held out, averaged weights")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            over_steps.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1.2, label=label)
    over_steps.set(title="loss, min-SNR weighted", xlabel="optimizer updates", yscale="log")
    binned = [line for line in lines if "loss_by_timestep" in line]
    for line in [binned[index] for index in sorted({0, len(binned) // 2, len(binned) - 1}) if binned]:
        points = [((low + high) / 2, mean) for low, high, mean in line["loss_by_timestep"] if mean is not None]
        by_timestep.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1.2, label=f"update {line['step']}")
    by_timestep.set(title="loss by timestep, unweighted", xlabel="timestep (0 = clean)", ylim=(0, None))
    for axis in (over_steps, by_timestep):
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
