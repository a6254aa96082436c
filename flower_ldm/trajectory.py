"""Denoising paths, interpolations and guidance sweeps of any `FlowerLDMPipeline`, and pictures and films of the paths.

A path holds the states that the pipeline's own steps went through. Nothing is noised again for show.

Shapes: T steps, S states = T + 1, Z latent channels, (h, w) latent positions, (H, W) pixels.
"""

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from . import FlowerLDMPipeline
from .files import write_whole
from .latent_maps import LatentPlane
from .lettering import drawable, pillow_font, save_figure
from .pipelines.pipeline_flower_ldm import NUM_INFERENCE_STEPS
from .sampling import decode, draw, same_seed, seeded_noise

PANEL = 192  # width and height of an image in an animation, in pixels
MAX_GIF_BYTES = 2_000_000
MAX_FRAMES = 30  # of an animation; a longer path is shown by this many states, evenly spread
MILLISECONDS = {"first": 600, "between": 120, "last": 2400}  # how long a frame is shown
PATH_COLUMNS = 9  # states in the picture of a path


# --- recording -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trajectory:
    """The states of one sample, from pure noise (state 0) to the image (state T).

    Attributes:
        label, name: its class.
        noise_levels: `(S,)`, the share of noise in each state: 1 is pure noise, 0 the sample.
        noisy_latents: `(S, Z, h, w)` float32, normalized to unit variance with every scheduler.
        denoised_latents: `(S, Z, h, w)` float32, the clean latents predicted from each state. The last is the sample.
        noisy_images, denoised_images: `(S, H, W, 3)` uint8, the same latents decoded.
    """

    label: int
    name: str
    noise_levels: np.ndarray
    noisy_latents: np.ndarray
    denoised_latents: np.ndarray
    noisy_images: np.ndarray
    denoised_images: np.ndarray

    def __len__(self) -> int:
        return len(self.noise_levels)


def record_trajectory(
    pipeline: FlowerLDMPipeline,
    label: int | str,
    seed: int = 0,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
    **options,
) -> Trajectory:
    """Draw one image of a class and keep every state on its way.

    The last state is bit for bit the image that the pipeline returns for the same options and the generator
    `torch.Generator("cpu").manual_seed(seed)`. A scheduler of second order (Heun) makes two states a step.

    Args:
        options: options of the pipeline's call: `guidance_scale`, `guidance_interval`, `eta`.

    Raises:
        ValueError: the pipeline refuses the label or an option.
    """
    (label,) = pipeline.get_label_ids(label)
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = seeded_noise(pipeline, generator)
    noisy, denoised, noise_levels = [noise], [], [1.0]

    def keep(_, step_index: int, timestep: torch.Tensor, tensors: dict) -> dict:
        denoised.append(tensors["denoised_latents"])
        timesteps = pipeline.scheduler.timesteps
        if step_index + 1 == len(timesteps):
            noisy.append(tensors["latents"])
            noise_levels.append(0.0)
        else:
            next_timestep = timesteps[step_index + 1]
            noisy.append(pipeline.scheduler.scale_model_input(tensors["latents"], next_timestep))
            noise_levels.append(pipeline.signal_and_noise(next_timestep)[1])
        return {}

    (sample,) = pipeline(
        label,
        num_inference_steps=num_inference_steps,
        generator=generator,
        latents=noise,
        output_type="latent",
        return_dict=False,
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=("latents", "denoised_latents"),
        **options,
    )
    noisy_latents, denoised_latents = torch.cat(noisy), torch.cat([*denoised, sample])
    return Trajectory(
        label=label,
        name=pipeline.class_names[label],
        noise_levels=np.array(noise_levels),
        noisy_latents=noisy_latents.float().cpu().numpy(),
        denoised_latents=denoised_latents.float().cpu().numpy(),
        noisy_images=decode(pipeline, noisy_latents, batch_size=1),
        denoised_images=decode(pipeline, denoised_latents, batch_size=1),
    )


# --- interpolation and guidance --------------------------------------------------------------------------------------


def slerp(start: torch.Tensor, end: torch.Tensor, fraction: float) -> torch.Tensor:
    """Spherical interpolation from `start` to `end` (Shoemake 1985, "Animating rotation", section 3.3).

    Points on the straight line between two draws of Gaussian noise are shorter than either, and denoise to flat
    images. Points on the arc keep the length. Vectors in the same or opposite directions define no arc: there the
    straight line is used.
    """
    cosine = torch.dot(start.flatten(), end.flatten()) / (start.norm() * end.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle.sin().abs() < 1e-3:  # below float32's precision
        return torch.lerp(start, end, fraction)
    return (torch.sin((1 - fraction) * angle) * start + torch.sin(fraction * angle) * end) / torch.sin(angle)


def interpolate_seeds(
    pipeline: FlowerLDMPipeline, label: int | str, seeds: tuple[int, int], num_images: int = 8, **options
) -> np.ndarray:
    """Images `(num_images, H, W, 3)` uint8 of one class, from one seed's noise to the other's by `slerp`."""
    start, end = (seeded_noise(pipeline, torch.Generator("cpu").manual_seed(seed)) for seed in seeds)
    noises = torch.cat([slerp(start, end, float(fraction)) for fraction in np.linspace(0, 1, num_images)])
    generators = same_seed(seeds[0], num_images)  # for schedulers that add noise
    return draw(pipeline, label, num_images_per_label=num_images, latents=noises, generator=generators, **options)


def interpolate_classes(
    pipeline: FlowerLDMPipeline, start: int | str, end: int | str, num_images: int = 8, seed: int = 0, **options
) -> np.ndarray:
    """Images `(num_images, H, W, 3)` uint8 from one class to another, all from the same noise.

    The weight moves from the first class embedding to the second.

    Raises:
        ValueError: the unet doesn't take mixtures of classes.
    """
    first, last = pipeline.get_label_ids([start, end])
    one_hot = torch.eye(pipeline.num_classes)
    shares = [i / max(1, num_images - 1) for i in range(num_images)]
    weights = torch.stack([torch.lerp(one_hot[first], one_hot[last], share) for share in shares])
    return draw(pipeline, weights, generator=same_seed(seed, num_images), **options)


def sweep_guidance(
    pipeline: FlowerLDMPipeline, labels: Sequence[int | str], scales: Sequence[float], seed: int = 0, **options
) -> np.ndarray:
    """Images `(len(labels), len(scales), H, W, 3)` uint8. Each label has the same noise at every guidance scale."""
    columns = [
        draw(pipeline, labels, generator=same_seed(seed, len(labels)), **options | {"guidance_scale": scale})
        for scale in scales
    ]
    return np.stack(columns, axis=1)


# --- pictures of a path ----------------------------------------------------------------------------------------------


def save_denoising_path(trajectory: Trajectory, plane: LatentPlane, path: Path) -> None:
    """Decoded noisy latents above the clean images predicted from them, and beside both the path in the plane."""
    states = np.unique(np.linspace(0, len(trajectory) - 1, PATH_COLUMNS).round().astype(int))
    height, side, gap = 3.5, 1.2, 0.06  # inches: the figure's height, an image's side, the space between two
    strip = (side + gap) * len(states) - gap
    width = 0.7 + strip + 0.85 + 4.2 + 0.15
    figure = Figure(figsize=(width, height))
    figure.text(0.7 / width, 0.92, f"{drawable(trajectory.name)}: from noise to image", fontsize=12)
    box = (strip / width, side / height)
    upper, lower = (figure.add_axes((0.7 / width, bottom / height, *box)) for bottom in (0.35 + side + gap, 0.35))
    centers = draw_strip(upper, trajectory.noisy_images[states], gap / side)
    draw_strip(lower, trajectory.denoised_images[states], gap / side)
    upper.set_xticks(centers, [f"{100 * level:.0f} % noise" for level in trajectory.noise_levels[states]])
    lower.set_xticks(centers, [f"step {state}" for state in states])
    upper.xaxis.tick_top()
    upper.set_ylabel("noisy latents,\ndecoded", fontsize=9)
    lower.set_ylabel("predicted\nclean image", fontsize=9)
    left = 0.7 + strip + 0.85
    draw_path(figure.add_axes((left / width, 0.45 / height, 4.2 / width, 2.4 / height)), trajectory, plane)
    save_figure(figure, path)


def draw_strip(axis: Axes, images: np.ndarray, gap: float) -> np.ndarray:
    """Draw images `(n, H, W, 3)` uint8 in a row, with `gap` times their width between them. Returns their centers.

    They are joined to one picture first, since matplotlib is slow with many.
    """
    scale = -(-100 // images.shape[2])  # so that the gap is a whole number of pixels
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    width = images.shape[2]
    gap = round(gap * width)
    apart = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)  # (n, H, W + gap, 3)
    axis.imshow(np.concatenate(apart, axis=1)[:, :-gap], interpolation="nearest", aspect="auto")
    axis.tick_params(length=0, labelsize=8)
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    return np.arange(len(images)) * (width + gap) + (width - 1) / 2


def draw_path(axis: Axes, trajectory: Trajectory, plane: LatentPlane) -> None:
    """Draw a trajectory and its predicted clean latents in the plane, over the points of the classes."""
    own = plane.labels == trajectory.label
    axis.scatter(*plane.points[~own].T, s=5, color="#d3d3d3", linewidths=0, label="other classes")
    axis.scatter(*plane.points[own].T, s=12, color="#44AA99", linewidths=0, label=drawable(trajectory.name, 24))
    for latents, color, label in (
        (trajectory.denoised_latents, "#CC6677", "predicted clean latents"),
        (trajectory.noisy_latents, "#332288", "noisy latents"),
    ):
        axis.plot(*plane.project(latents).T, ".-", color=color, markersize=4, linewidth=1.2, label=label)
    noise, sample = plane.project(trajectory.noisy_latents[[0, -1]])
    axis.plot(*noise, "o", color="white", markeredgecolor="#332288", markersize=7, label="noise")
    axis.plot(*sample, "*", color="#DDCC77", markeredgecolor="black", markersize=13, label="sample")
    shares = plane.pca.explained_variance_ratio_
    axis.set_xlabel(f"1st principal component ({shares[0]:.0%} of variance)", fontsize=8)
    axis.set_ylabel(f"2nd ({shares[1]:.0%})", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 1.0), frameon=False)


# --- animations ------------------------------------------------------------------------------------------------------


def animation_frames(trajectory: Trajectory) -> list[np.ndarray]:
    """Frames `(240, 400, 3)` uint8: a decoded state, the clean image predicted from it, and the noise level."""
    states = np.unique(np.linspace(0, len(trajectory) - 1, MAX_FRAMES).round().astype(int))
    margin, gap = 4, 8
    width, bar = 2 * PANEL + gap + 2 * margin, PANEL + margin + 20
    name = drawable(trajectory.name, 32)
    font, name_font = ImageFont.load_default(size=12), pillow_font(name, 12)
    frames = []
    for state in states:
        frame = Image.new("RGB", (width, 240), "white")
        draw = ImageDraw.Draw(frame)
        for left, images, caption, caption_font in (
            (margin, trajectory.noisy_images, name, name_font),
            (margin + PANEL + gap, trajectory.denoised_images, "predicted clean image", font),
        ):
            image = Image.fromarray(images[state]).resize((PANEL, PANEL), Image.Resampling.BICUBIC)
            frame.paste(image, (left, margin))
            draw.text((left + PANEL / 2, margin + PANEL + 2), caption, "black", caption_font, anchor="ma")
        level = float(trajectory.noise_levels[state])
        right = width - margin - 84
        draw.rectangle((margin, bar, right, bar + 8), fill="#e4e4e4")
        if level > 0:
            draw.rectangle((margin, bar, margin + level * (right - margin), bar + 8), fill="#332288")
        draw.text((width - margin, bar + 4), f"{100 * level:.0f} % noise", "black", font, anchor="rm")
        frames.append(np.asarray(frame))
    return frames


def to_palette(frame: np.ndarray, dither: Image.Dither) -> Image.Image:
    """The frame in 256 colors, by octree. Median cut takes half a second for a noisy frame and looks no better."""
    image = Image.fromarray(frame)
    return image.quantize(palette=image.quantize(256, Image.Quantize.FASTOCTREE), dither=dither)


def save_animation(trajectory: Trajectory, path: Path) -> list[Path]:
    """Write a GIF to `path`, and an MP4 beside it if imageio-ffmpeg is installed. The last frame stays longest.

    Returns:
        the files written.
    """
    frames = animation_frames(trajectory)
    durations = [MILLISECONDS["first"], *[MILLISECONDS["between"]] * (len(frames) - 2), MILLISECONDS["last"]]
    for dither in (Image.Dither.FLOYDSTEINBERG, Image.Dither.NONE):  # without dithering noise compresses better
        pages, gif = [to_palette(frame, dither) for frame in frames], io.BytesIO()
        pages[0].save(gif, "GIF", save_all=True, append_images=pages[1:], duration=durations, loop=0)
        if gif.tell() < MAX_GIF_BYTES:
            break
    write_whole(path, lambda unfinished: unfinished.write_bytes(gif.getvalue()))
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        return [path]
    repeats = [round(duration / MILLISECONDS["between"]) for duration in durations]
    film = np.repeat(np.stack(frames), repeats, axis=0)
    video = path.with_suffix(".mp4")
    write_whole(video, lambda unfinished: save_film(film, unfinished))
    return [path, video]


def save_film(film: np.ndarray, path: Path) -> None:
    """Write frames `(n, H, W, 3)` uint8 as MP4, also to a file name without the ending `.mp4`.

    Raises:
        OSError: it can't be written. ffmpeg itself reports no error then, so the film is opened as a check.
    """
    fps = 1000 / MILLISECONDS["between"]
    by_ffmpeg = {"plugin": "FFMPEG", "extension": ".mp4"}
    imageio.imwrite(path, film, **by_ffmpeg, fps=fps, codec="libx264", output_params=["-f", "mp4"])
    try:
        imageio.improps(path, **by_ffmpeg)
    except OSError:
        raise OSError("ffmpeg wrote no whole film: the disk is probably full") from None
