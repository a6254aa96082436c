"""Pictures of a run: image grids, reconstructions beside their originals, loss curves, maps of the latents.

    python -m flower_ldm.visualization --pipeline results/flower-ldm --output pictures

draws every picture of a pipeline, or with `--autoencoder` of stage 1's folder. Images are `(B, 3, H, W)` in [-1, 1].
Logs are the lists of lines that `runs.read_log` returns.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from . import FlowerAutoencoderKL, FlowerLDMPipeline, trajectory
from .data import DataOptions, ImageDataset, to_uint8, uint8_images
from .errors import InputError, exit_on_input_error, one_line, refusals_of_input
from .files import file_path, file_safe_name, fresh_folder, path_text, write_whole
from .flags import FlagParser
from .formatting import is_finite
from .latent_maps import LatentPlane, LatentSet, encode_for_map, named_classes, save_latent_maps
from .lettering import drawable, save_figure, wrapped
from .memorization import MEMORIZED_RATIO, TrainingNeighbors, memorized
from .pipelines.pipeline_flower_ldm import NUM_INFERENCE_STEPS
from .progress_bars import bar_options, progress_bar
from .runs import (
    ANIMATION,
    ARGS_FILE,
    AUTOENCODER_LOSSES,
    CLASS_GRID,
    DENOISING_PATH,
    DIFFUSION_LOSS,
    GUIDANCE_SWEEP,
    INTERPOLATION,
    LATENT_MAP,
    LATENT_MAPS,
    LOG_FILE,
    NEAREST_NEIGHBORS,
    SIDE_BY_SIDE,
    is_bin,
    read_flags,
    read_log,
)
from .sampling import check_sampling, decode, draw_classes, load_pipeline

SUSPECTS = 8  # columns of the picture of nearest neighbors
# Stage 1's losses and scores, as its curves show them.
AUTOENCODER_CURVES = ["pixel_loss", "perceptual_loss", "kl_loss", "adversarial_loss", "discriminator_loss",
                      "classification_loss", "center_loss", "repulsion_loss", "psnr", "ssim"]  # fmt: skip


def image_grid(images: np.ndarray, num_columns: int, gap: int = 2, min_pixels: int = 64) -> Image.Image:
    """Images `(B, H, W, 3)` uint8 in rows on white. Small images are enlarged by a whole factor."""
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
    """Save rows of originals, each above the row of its reconstructions. Both `(B, 3, H, W)` in [-1, 1]."""
    num_columns = min(num_columns, len(images))
    pairs = np.stack([to_uint8(images), to_uint8(reconstructions)])  # (2, B, H, W, 3)
    blank = np.full_like(pairs[:, :1], 255).repeat(-len(images) % num_columns, axis=1)
    rows = np.concatenate([pairs, blank], axis=1).reshape(2, -1, num_columns, *pairs.shape[2:]).swapaxes(0, 1)
    grid = image_grid(rows.reshape(-1, *pairs.shape[2:]), num_columns)
    write_whole(path, lambda unfinished: grid.save(unfinished, "PNG"))


def class_grid(images: np.ndarray, names: list[str], title: str | None = None) -> plt.Figure:
    """Images `(num_classes, images_per_class, H, W, 3)` uint8, one class a column, with its name below."""
    return picture_table(images.swapaxes(0, 1), names, title=title)


def picture_table(
    images: np.ndarray,
    column_names: Sequence[str] = (),
    row_names: Sequence[str] = (),
    title: str | None = None,
) -> plt.Figure:
    """Images `(num_rows, num_columns, H, W, 3)` uint8 as a table with names below columns and left of rows."""
    num_rows, num_columns = images.shape[:2]
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(1.25 * num_columns + (0.6 if row_names else 0), 1.25 * num_rows + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for row, column in np.ndindex(num_rows, num_columns):
        axis = axes[row, column]
        axis.imshow(images[row, column], interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for column, name in enumerate(column_names):
        axes[-1, column].set_xlabel(_two_lines(name), fontsize=9)
    for row, name in enumerate(row_names):
        axes[row, 0].set_ylabel(_two_lines(name), fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _two_lines(name: str, width: int = 14) -> str:
    """A class name as it is drawn. If too wide, it is broken at the blank, hyphen or underscore nearest its middle.

    Lines that are still too wide are broken again, so that none runs into the next column's name.
    """
    name = drawable(name).strip()
    breaks = [index for index, letter in enumerate(name) if index and letter in " -_"]
    if len(name) > width and breaks:
        middle = min(breaks, key=lambda index: abs(index - len(name) / 2))
        name = name[: middle + (name[middle] != " ")] + "\n" + name[middle + 1 :]
    return "\n".join(wrapped(line, width) for line in name.split("\n"))


def save_class_grid(images: np.ndarray, names: list[str], path: Path, title: str | None = None) -> None:
    """Save a `class_grid`."""
    save_figure(class_grid(images, names, title), path)


def save_picture_table(images: np.ndarray, path: Path, **names) -> Path:
    """Save a `picture_table` with these names. Returns its path."""
    save_figure(picture_table(images, **names), path)
    return path


def save_nearest_neighbors(
    samples: np.ndarray,
    names: Sequence[str],
    train: ImageDataset | np.ndarray,
    found: dict[str, torch.Tensor],
    path: Path,
) -> None:
    """Save the samples most like copies, above their two nearest training images, in feature and pixel space.

    Args:
        samples: `(N, H, W, 3)` uint8.
        names: the class of each.
        train: the training images that the keys in `found` index.
        found: the result of `TrainingNeighbors.search` for the samples. Each of its spaces gets a panel.
    """
    num_columns = min(SUSPECTS, len(samples))
    spaces = [space for space in ("feature", "pixel") if f"{space}_keys" in found]
    size = 1.35 * num_columns + 1.2, 5.1 * len(spaces)
    figure, axes = plt.subplots(len(spaces), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, space in zip(axes[:, 0], spaces, strict=True):
        distances, keys = found[f"{space}_distances"], found[f"{space}_keys"]
        ratios = distances[:, 0] / distances[:, 1].clamp(min=1e-12)
        suspects = ratios.argsort()[:num_columns]
        rows = [samples[suspects.numpy()], *(uint8_images(train, keys[suspects, rank].tolist()) for rank in (0, 1))]
        grid = np.asarray(image_grid(np.concatenate(rows), num_columns, gap=4, min_pixels=96))
        axis.imshow(grid)
        width, height = grid.shape[1] / num_columns, grid.shape[0] / len(rows)
        captions = [f"{drawable(names[i], 20)}\nratio {ratios[i]:.2f}" for i in suspects]
        axis.set_xticks([(column + 0.5) * width for column in range(num_columns)], captions, fontsize=8)
        row_names = ("sample", "nearest\ntraining\nimage", "second\nnearest")
        axis.set_yticks([(row + 0.5) * height for row in range(len(rows))], row_names, fontsize=9)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        for caption, copied in zip(axis.get_xticklabels(), memorized(distances[suspects]).tolist(), strict=True):
            if copied:
                caption.set(color="#c1272d", fontweight="bold")
        axis.set_title(
            f"Most likely copies in {space} space. Memorized (ratio of distances at most {MEMORIZED_RATIO:.2f}): "
            f"{memorized(distances).sum()} of {len(samples):,} samples",
            fontsize=10,
        )
    save_figure(figure, path)


def _values(lines: list[dict], key: str) -> list[tuple[int, float]]:
    """The finite values logged under a key, each with its step."""
    return [(line["step"], line[key]) for line in lines if is_finite(line.get(key))]


def _by_timestep(line: dict) -> list[tuple[float, float]]:
    """The center of each range of timesteps in a log line, with the mean loss there."""
    bins = line.get("loss_by_timestep")
    bins = [one for one in bins if is_bin(one) and is_finite(one[2])] if isinstance(bins, list) else []
    return [((low + high) / 2, mean) for low, high, mean in bins]


def save_loss_curves(lines: list[dict], names: list[str], path: Path) -> None:
    """Save one panel a name: the logged values over steps as a line, those of `val_<name>` (held out) as points."""
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
            if points := _values(lines, key):
                axis.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1.2, label=label)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel("optimizer updates", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if len(axis.lines) > 1:
            axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def save_diffusion_loss(lines: list[dict], path: Path) -> None:
    """Save the denoiser's loss over steps, and its loss by timestep in the first, a middle and the last log line."""
    figure, (over_steps, by_timestep) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for key, style, label in (("loss", "-", "training"), ("val_loss", "o-", "held out, averaged weights")):
        if points := _values(lines, key):
            over_steps.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1.2, label=label)
    over_steps.set(title="loss, min-SNR weighted", xlabel="optimizer updates")
    binned = [(line["step"], points) for line in lines if (points := _by_timestep(line))]
    for step, points in [binned[index] for index in sorted({0, len(binned) // 2, len(binned) - 1}) if binned]:
        by_timestep.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1.2, label=f"update {step}")
    by_timestep.set(title="loss by timestep, unweighted", xlabel="timestep (0 = clean)", ylim=(0, None))
    for axis in (over_steps, by_timestep):
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


# --- the command's flags ---------------------------------------------------------------------------------------------

NO_IMAGES = "none"  # the value of --dataset that loads no images
MAP_IMAGES = 10  # generated images of each class in the latent maps


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = FlagParser(
        prog="python -m flower_ldm.visualization",
        description="Draw every picture of a pipeline, or of an autoencoder.",
    )
    # the model and its images
    parser.add_argument("--pipeline", type=path_text, help="folder of a pipeline, or its id on the Hub")
    parser.add_argument("--autoencoder", type=path_text, help="stage 1's output folder")
    parser.add_argument(
        "--labels", nargs="+", help="classes shown in detail, such as their denoising (default: 3, spread over all)"
    )
    DataOptions.add_flags_of_run(parser, f"; {NO_IMAGES}: only pictures that need no images")
    # how it is drawn
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_inference_steps", "--steps", type=int, default=NUM_INFERENCE_STEPS)
    parser.add_argument("--guidance_scale", type=float, help="1 means off; unset: the pipeline's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--output",
        type=file_path,
        default=Path("pictures"),
        help="output folder; if it isn't empty, NAME-2, NAME-3 ... is created instead",
    )
    args = parser.parse_args(argv)
    if (args.pipeline is None) == (args.autoencoder is None):
        raise InputError("give either --pipeline (a folder or Hub id) or --autoencoder (stage 1's folder)")
    return args


def data_options(args: argparse.Namespace, folder: str) -> DataOptions | None:
    """The images to compare with: from the flags, or else from the run in `folder`. `None` if neither names any."""
    options = DataOptions.from_run(read_flags(Path(folder)), args, unnamed=NO_IMAGES)
    return None if options.dataset == NO_IMAGES else options


def by_name(images: tuple[ImageDataset, ImageDataset]) -> dict[str, ImageDataset]:
    """Training and held-out images under the names that the latent maps use."""
    return dict(zip(("training", "held out"), images, strict=True))


# --- the pictures of a pipeline --------------------------------------------------------------------------------------

GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
GRID_IMAGES = 4  # generated images of each class in the class grid
PATH_CLASSES = 3  # classes whose denoising is drawn


def draw_samples(pipe: FlowerLDMPipeline, seed: int, images_per_class: int = GRID_IMAGES, **options) -> LatentSet:
    """Latents of up to 10 classes, spread over all of them, class by class. The noise is always the same.

    Args:
        options: options of the pipeline's call, here and below. Without guidance options, the pipeline's own apply.
    """
    labels = named_classes(pipe.num_classes)
    latents = draw_classes(pipe, labels, seed, images_per_class, **options)
    return LatentSet(latents.cpu().numpy(), np.repeat(labels, images_per_class))


def first_images(pipe: FlowerLDMPipeline, generated: LatentSet, count: int) -> tuple[list[int], np.ndarray]:
    """The labels in `generated`, and the first images of each, `(len(labels), count, H, W, 3)` uint8."""
    labels, starts = np.unique(generated.labels, return_index=True)
    latents = torch.from_numpy(generated.latents[(starts[:, None] + np.arange(count)).flatten()])
    images = decode(pipe, latents.to(pipe.device))
    return labels.tolist(), images.reshape(len(labels), count, *images.shape[1:])


def save_samples_grid(pipe: FlowerLDMPipeline, generated: LatentSet, path: Path) -> None:
    """Save the first images of each class in `generated`, one class a column."""
    labels, images = first_images(pipe, generated, GRID_IMAGES)
    save_class_grid(images, [pipe.class_names[label] for label in labels], path)


def save_pipeline_pictures(
    pipe: FlowerLDMPipeline,
    folder: Path,
    generated: LatentSet,
    encoded: dict[str, LatentSet],
    held_out: ImageDataset | None,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    guard: Callable[[str], AbstractContextManager] = nullcontext,
    **options,
) -> list[Path]:
    """Save the pictures at the end of a run, which the command draws too.

    They are latent maps, denoising paths and animations, held-out images beside reconstructions and samples, the
    guidance sweep, and interpolations.

    Args:
        generated: the result of `draw_samples`.
        encoded: normalized latents of images, "training" and "held out". If empty, no maps are drawn.
        held_out: the held-out images. None: no comparison is drawn.
        labels: the classes of paths, sweep and interpolations. None: three, spread over all.
        guard: makes a context manager for each kind of picture from its name. With `training.optional` a picture that
            fails is left out.

    Returns:
        the files written.
    """
    labels = named_classes(pipe.num_classes, PATH_CLASSES) if labels is None else labels
    written: list[Path] = []
    with guard("latent maps and denoising paths"):
        if encoded:
            plane = save_latent_maps({**encoded, "generated": generated}, pipe.class_names, folder)
            written += [LATENT_MAP.path(folder, method) for method in LATENT_MAPS]
        else:
            plane = LatentPlane.fit(generated.latents, generated.labels)
        written += save_denoising(pipe, labels, plane, folder, seed, **options)
    with guard(SIDE_BY_SIDE.name):
        if held_out is not None:
            columns, images = first_images(pipe, generated, 1)
            written += save_side_by_side(pipe, held_out, columns, images[:, 0], folder)
    with guard(GUIDANCE_SWEEP.name):
        written += save_guidance_sweep(pipe, labels, folder, seed, **options)
    with guard("interpolations"):
        written += save_interpolations(pipe, labels, folder, seed, **options)
    return written


def save_guidance_sweep(
    pipe: FlowerLDMPipeline, labels: Sequence[int], folder: Path, seed: int = 0, **options
) -> list[Path]:
    """Save `guidance_sweep.png`: a row for each label, from the same noise at every guidance scale.

    It is left out for a model without guidance. Returns the files written.
    """
    if not pipe.can_guide:
        print(f"left out {GUIDANCE_SWEEP.name}: this model takes no guidance")
        return []
    path = save_picture_table(
        trajectory.sweep_guidance(pipe, labels, GUIDANCE_SCALES, seed, **options),
        GUIDANCE_SWEEP.path(folder),
        column_names=[f"{scale:g}" for scale in GUIDANCE_SCALES],
        row_names=[pipe.class_names[label] for label in labels],
        title="guidance scale (1 is off), each row from the same noise",
    )
    return [path]


def save_denoising(
    pipe: FlowerLDMPipeline, labels: Sequence[int], plane: LatentPlane, folder: Path, seed: int = 0, **options
) -> list[Path]:
    """Save `denoising_path_<class>.png` and `diffusion_animation_<class>.gif` of each label. Returns the files."""
    stems: dict[int, str] = {}
    for label in labels:
        stem = file_safe_name(pipe.class_names[label])
        # Some file systems don't distinguish "Rose" from "rose".
        taken = stem.lower() in [other.lower() for other in stems.values()]
        stems[label] = f"{stem}_{label}" if taken else stem
    pictures, animations = [], []
    for label, stem in progress_bar(stems.items(), desc="denoising paths", leave=False):
        recorded = trajectory.record_trajectory(pipe, label, seed, **options)
        pictures.append(DENOISING_PATH.path(folder, stem))
        trajectory.save_denoising_path(recorded, plane, pictures[-1])
        animations += trajectory.save_animation(recorded, ANIMATION.path(folder, stem))
    return pictures + animations


def save_interpolations(
    pipe: FlowerLDMPipeline, labels: Sequence[int], folder: Path, seed: int = 0, num_images: int = 8, **options
) -> list[Path]:
    """Save `interpolation_seeds.png`, a row for each label, and `interpolation_classes.png`, a row for each pair.

    The second needs two labels and a unet that takes mixtures of classes. Otherwise a line says that it is left out.
    Returns the files written.
    """
    rows = [trajectory.interpolate_seeds(pipe, label, (seed, seed + 1), num_images, **options) for label in labels]
    names = [pipe.class_names[label] for label in labels]
    title = f"one class, from the noise of seed {seed} to that of seed {seed + 1} along the arc"
    seeds, classes = INTERPOLATION.path(folder, "seeds"), INTERPOLATION.path(folder, "classes")
    written = [save_picture_table(np.stack(rows), seeds, row_names=names, title=title)]
    if len(labels) < 2:
        print(f"left out {classes.name}: it needs two classes")
        return written
    pairs = list(zip(labels, [*labels[1:], labels[0]], strict=True))[: 1 if len(labels) == 2 else None]
    try:
        rows = [trajectory.interpolate_classes(pipe, *pair, num_images, seed, **options) for pair in pairs]
    except ValueError as error:
        print(f"left out {classes.name}: {error}")
        return written
    between = save_picture_table(
        np.stack(rows),
        classes,
        row_names=[
            f"{drawable(pipe.class_names[start], 20)} to {drawable(pipe.class_names[end], 20)}" for start, end in pairs
        ],
        title="from class to class, each row from the same noise",
    )
    return [*written, between]


def save_side_by_side(
    pipe: FlowerLDMPipeline, images: ImageDataset, labels: Sequence[int], generated: np.ndarray, folder: Path
) -> list[Path]:
    """Save `original_reconstructed_generated.png`: for each class a held-out image, its reconstruction and a sample.

    Classes without a held-out image are left out. If no class has one, the picture is left out.

    Args:
        generated: a sample of each label, `(len(labels), H, W, 3)` uint8.

    Returns:
        the files written.
    """
    first = {label: torch.nonzero(images.labels == label)[:1].flatten().tolist() for label in labels}
    columns = [index for index, label in enumerate(labels) if first[label]]
    if not columns:
        print(f"left out {SIDE_BY_SIDE.name}: none of these classes has a held-out image")
        return []
    originals = images.__getitems__([first[labels[index]][0] for index in columns])["images"]
    reconstructed = decode(pipe, pipe.encode_images(originals))
    path = save_picture_table(
        np.stack([to_uint8(originals), reconstructed, generated[columns]]),
        SIDE_BY_SIDE.path(folder),
        column_names=[pipe.class_names[labels[index]] for index in columns],
        row_names=["held out", "reconstructed", "generated"],
    )
    return [path]


# --- the command -----------------------------------------------------------------------------------------------------


def draw_pipeline(
    args: argparse.Namespace, pipe: FlowerLDMPipeline, datasets: dict[str, ImageDataset], folder: Path
) -> None:
    """Save every picture of a pipeline. Without images, the comparisons with images are left out."""
    pipe.set_progress_bar_config(**bar_options(desc="denoising", leave=False))
    labels = pipe.get_label_ids(args.labels) if args.labels else None
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    generated = draw_samples(pipe, args.seed, MAP_IMAGES, **options)
    save_samples_grid(pipe, generated, CLASS_GRID.path(folder))
    encoded = encode_for_map(pipe.encode_images, datasets, pipe.device)
    save_pipeline_pictures(
        pipe, folder, generated, encoded, datasets.get("held out"), labels, args.seed, **options
    )  # fmt: skip
    if datasets:
        columns, images = first_images(pipe, generated, 1)
        names = [pipe.class_names[label] for label in columns]
        found = TrainingNeighbors(datasets["training"]).search(images[:, 0])
        save_nearest_neighbors(images[:, 0], names, datasets["training"], found, NEAREST_NEIGHBORS.path(folder))


def draw_autoencoder(vae: FlowerAutoencoderKL, datasets: dict[str, ImageDataset], folder: Path) -> None:
    """Save reconstructions of held-out images, and the maps of the latents."""
    held_out = datasets["held out"]
    keys = np.linspace(0, len(held_out) - 1, min(16, len(held_out))).astype(int).tolist()
    originals = held_out.__getitems__(keys)["images"].to(vae.device)
    with torch.no_grad():
        save_reconstructions(originals, vae(originals).sample, folder / "reconstructions.png")
    save_latent_maps(encode_for_map(vae_encoder(vae), datasets, vae.device), held_out.class_names, folder)


def vae_encoder(vae: FlowerAutoencoderKL) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from images `(B, 3, H, W)` to normalized latents `(B, Z, h, w)`, the posterior's mean."""
    return lambda images: vae.normalize(vae.encode(images).latent_dist.mean)


def load_autoencoder(name: str, device: str) -> FlowerAutoencoderKL:
    """Load stage 1's autoencoder.

    Raises:
        InputError: it can't be loaded, or the device can't be used.
    """
    try:
        vae = FlowerAutoencoderKL.from_pretrained(name).eval()
    except Exception as error:  # errors of files, network and Hub have no common base class
        raise InputError(f"--autoencoder {name} can't be loaded: {one_line(error)}") from error
    try:
        return vae.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise InputError(f"--device {device} can't be used: {one_line(error)}") from error


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.autoencoder is not None:
        vae = load_autoencoder(args.autoencoder, args.device)
        options = data_options(args, args.autoencoder)
        if options is None:
            raise InputError(
                f"--autoencoder {args.autoencoder} has no {ARGS_FILE.name}: name the images to encode by --dataset"
            )
        options = options.at_resolution(vae.config.sample_size, f"--autoencoder {args.autoencoder}")
        datasets = by_name(options.load())
        folder = fresh_folder(args.output)
        draw_autoencoder(vae, datasets, folder)
        if (log := LOG_FILE.path(args.autoencoder)).is_file():
            save_loss_curves(read_log(log), AUTOENCODER_CURVES, AUTOENCODER_LOSSES.path(folder))
    else:
        pipe = load_pipeline(args.pipeline, None, args.device, "float32")
        with refusals_of_input():
            pipe.get_label_ids(args.labels or 0)
        check_sampling(
            pipe, 1, {"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps}
        )
        options = data_options(args, args.pipeline)
        datasets = by_name(options.load_for(pipe, args.pipeline)) if options else {}
        folder = fresh_folder(args.output)
        draw_pipeline(args, pipe, datasets, folder)
        if (log := LOG_FILE.path(args.pipeline)).is_file():
            save_diffusion_loss(read_log(log), DIFFUSION_LOSS.path(folder))
    print(f"{len(list(folder.iterdir()))} pictures are in {folder}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
