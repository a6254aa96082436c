"""Draw from a pipeline: load it, draw and decode, and draw many images so that an interruption costs no drawn one."""

import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub.errors import RemoteEntryNotFoundError
from torch import nn

from . import FlowerLDMPipeline
from .errors import InputError, one_line, refusals_of_input
from .files import CACHE_REFUSED, UnusableCacheError, read_tensors, tensors_digest, write_tensors
from .pipelines.pipeline_flower_ldm import SCHEDULERS
from .progress_bars import bar_options, is_terminal, progress_bar
from .runs import DRAWN_SAMPLES, MODEL_CONFIG, PIPELINE_INDEX, WEIGHTS

SCHEDULER_HELP = "unset: the pipeline's own; for distilled models only: " + ", ".join(
    name for name, facts in SCHEDULERS.items() if facts.only_distilled
)


# --- loading ---------------------------------------------------------------------------------------------------------


def load_pipeline(
    name: str, scheduler: str | None, device: str, dtype: str, guide: str | None = None
) -> FlowerLDMPipeline:
    """Load a pipeline from a folder or the Hub, with another scheduler, or another pipeline's unet as its guide, where
    one is named.

    Raises:
        InputError: where there is no such pipeline or no such device, or the guide doesn't fit.
    """
    pipe = _from_pretrained("--pipeline", name)
    if guide is not None:
        pipe.guide = _from_pretrained("--guide", guide).unet
    if scheduler is not None:
        pipe.scheduler = pipe.make_scheduler(SCHEDULERS[scheduler].scheduler_class)
    try:
        pipe.to(torch.device(device))
        if dtype != "float32":  # what it is loaded as
            pipe.to(getattr(torch, dtype))
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise InputError(f"--device {device} can't be used: {str(error).splitlines()[0]}") from error
    return pipe


def _from_pretrained(flag: str, name: str) -> FlowerLDMPipeline:
    if os.path.exists(name) and not PIPELINE_INDEX.path(name).is_file():
        raise InputError(f"{flag} {name} is not the folder of a pipeline: it has no {PIPELINE_INDEX.name}")
    if not is_terminal():
        diffusers.utils.logging.disable_progress_bar()  # the bar of the loading, which is always redrawn in place
    try:
        return FlowerLDMPipeline.from_pretrained(name)
    except Exception as error:  # of files, of the network, of the Hub: they have no common base
        reason = one_line(error, 300)
        if isinstance(error, RemoteEntryNotFoundError) and PIPELINE_INDEX.name in reason:
            raise InputError(f"{flag} {name} is no pipeline: there is no {PIPELINE_INDEX.name} on the Hub") from error
        if Path(name).is_dir():
            raise InputError(f"{flag} {name} can't be loaded: {missing_file(Path(name)) or reason}") from error
        raise InputError(f"{flag} {name} is neither a folder nor a Hub id that can be loaded: {reason}") from error


def missing_file(folder: Path) -> str | None:
    """What a pipeline's folder lacks, in words: diffusers names the last of several files that it has looked for."""
    try:
        index = FlowerLDMPipeline.load_config(folder)
    except Exception:  # it has a message of its own
        return None
    parts = [name for name in ("vae", "unet", "guide") if isinstance(index.get(name), list) and index[name][0]]
    for part, file in itertools.product(parts, (MODEL_CONFIG, WEIGHTS[0])):
        if not any((folder / part).glob(file)) and not any((folder / part).glob("*.bin")):
            return f"{part}/{file.replace('*', '')} is missing"
    return None


def check_sampling(pipe: FlowerLDMPipeline, num_labels: int, options: dict) -> None:
    """Refuse options of the pipeline's call, by name, that it or its scheduler can't take.

    Raises:
        InputError: for the first of them.
    """
    with refusals_of_input():
        pipe.check_inputs(num_labels=num_labels, **options)


# --- one call --------------------------------------------------------------------------------------------------------


def seeded_noise(pipeline: FlowerLDMPipeline, generator: torch.Generator) -> torch.Tensor:
    """The noise `(1, Z, h, w)` that the pipeline would start one image from with this generator, float32."""
    return randn_tensor((1, *pipeline.latents_shape), generator, pipeline.device, torch.float32)


@torch.no_grad()
def decode(pipeline: FlowerLDMPipeline, latents: torch.Tensor, batch_size: int = 32) -> np.ndarray:
    """Latents `(B, Z, h, w)` -> images `(B, H, W, 3)` uint8; one at a time as the pipeline decodes one, to the bit."""
    images = np.concatenate([pipeline.decode_latents(some, "np") for some in latents.split(batch_size)])
    return (images * 255).round().astype(np.uint8)


def draw_classes(
    pipeline: FlowerLDMPipeline, labels: Sequence[int], seed: int = 0, images_per_class: int = 10, **options
) -> torch.Tensor:
    """Latents `(len(labels) * images_per_class, Z, h, w)`, class by class, always from the same noise: those of one
    image are the same however many are drawn of a class.
    """
    numbers = np.arange(images_per_class) * len(labels) + np.arange(len(labels))[:, None]  # by class and image
    return pipeline(
        labels,
        num_images_per_label=images_per_class,
        generator=[torch.Generator("cpu").manual_seed(seed + number) for number in numbers.flatten().tolist()],
        output_type="latent",
        **options,
    ).images


def same_seed(seed: int, count: int) -> list[torch.Generator]:
    """As many generators, all at the same place."""
    return [torch.Generator("cpu").manual_seed(seed) for _ in range(count)]


def draw(pipeline: FlowerLDMPipeline, labels, **options) -> np.ndarray:
    """The pipeline's images as `(B, H, W, 3)` uint8."""
    return (pipeline(labels, output_type="np", **options).images * 255).round().astype(np.uint8)


# --- many images -----------------------------------------------------------------------------------------------------


def sample_labels(num_samples: int, num_classes: int) -> torch.Tensor:
    """The class of each sample `(N,)`: one of each class in turn, so that more samples begin with the same ones."""
    return torch.arange(num_samples) % num_classes


class Sampler:
    """Draws from a pipeline, keeps every batch in a folder of its own settings, and goes on where it was stopped.

    Image i is of class i mod K and has a generator with the seed `seed + i`, so it depends neither on the batch size
    nor on how many are drawn.
    """

    def __init__(self, pipe: FlowerLDMPipeline, cache_dir: str | Path, *, seed: int = 0, batch_size: int = 64):
        self.pipe = pipe
        self.cache_dir = Path(cache_dir)
        self.seed = seed
        self.batch_size = batch_size
        self.digest = pipeline_digest(pipe)

    def draw(self, num_samples: int, **options) -> tuple[np.ndarray, float]:
        """`(N, H, W, 3)` uint8, and the seconds that drawing them took, now or earlier.

        Args:
            options: `guidance_scale`, `guidance_interval` and `num_inference_steps` of the pipeline's call.
        """
        about = json.dumps([self.digest, self.seed, options], sort_keys=True, default=list)
        key = hashlib.sha256(about.encode()).hexdigest()
        folder = self.cache_dir / f"{DRAWN_SAMPLES}{key[:16]}"
        images, seconds = self._kept(folder, key, num_samples)
        missing = [number for number in range(num_samples) if number not in images]
        self.pipe.set_progress_bar_config(**bar_options(desc="denoising", leave=False))
        with progress_bar(total=num_samples, initial=len(images), desc="sampling", unit=" images") as progress:
            for start in range(0, len(missing), self.batch_size):
                numbers = missing[start : start + self.batch_size]
                started = time.perf_counter()
                try:
                    batch = self._draw_batch(numbers, options)
                except KeyboardInterrupt:
                    progress.close()
                    kept = f"{len(images)} of {num_samples} images are kept in {folder}"
                    print(f"stopped: {kept}; the same command goes on from there", file=sys.stderr)
                    raise SystemExit(130) from None
                spent = time.perf_counter() - started
                tensors = {"images": torch.from_numpy(batch), "numbers": torch.tensor(numbers)}
                path = folder / f"{numbers[0]:06d}-{numbers[-1]:06d}.safetensors"
                write_tensors(path, tensors, key, CACHE_REFUSED, seconds=str(spent))
                images |= dict(zip(numbers, batch, strict=True))
                seconds += spent
                progress.update(len(numbers))
        return np.stack([images[number] for number in range(num_samples)]), seconds

    def _draw_batch(self, numbers: list[int], options: dict) -> np.ndarray:
        labels = [number % self.pipe.num_classes for number in numbers]
        generators = [torch.Generator("cpu").manual_seed(self.seed + number) for number in numbers]
        with refusals_of_input():  # what comes of so few steps shows when they are done
            return np.ascontiguousarray(draw(self.pipe, labels, generator=generators, **options))

    def _kept(self, folder: Path, key: str, num_samples: int) -> tuple[dict[int, np.ndarray], float]:
        """The images that are there already, by number, and the seconds they took; what is damaged is drawn again."""
        images: dict[int, np.ndarray] = {}
        seconds = 0.0
        for path in sorted(folder.glob("*.safetensors")):
            try:
                tensors, metadata = read_tensors(path, key)
            except UnusableCacheError as reason:
                print(f"samples {path} {reason}: drawing them again", flush=True)
                path.unlink()
                continue
            wanted = [row for row, number in enumerate(tensors["numbers"].tolist()) if number < num_samples]
            images |= {tensors["numbers"][row].item(): tensors["images"][row].numpy() for row in wanted}
            seconds += float(metadata["seconds"]) * len(wanted) / len(tensors["numbers"])
        return images, seconds


def pipeline_digest(pipe: FlowerLDMPipeline) -> str:
    """Hex digest of all in a pipeline that its images depend on: weights, configs, scheduler and precision."""

    def config_of(component) -> dict:
        return {name: value for name, value in dict(component.config).items() if not name.startswith("_")}

    parts = {name: part for name, part in pipe.components.items() if hasattr(part, "config")}
    about = [[name, type(part).__name__, config_of(part)] for name, part in parts.items()] + [str(pipe.dtype)]
    models = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    weights = {f"{name}.{key}": value for name, part in models.items() for key, value in part.state_dict().items()}
    return tensors_digest(weights, json.dumps(about, sort_keys=True, default=str))
