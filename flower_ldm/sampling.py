"""Draw from a pipeline: load it, draw and decode, and draw many images with a cache that survives interruptions."""

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
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub.errors import RemoteEntryNotFoundError
from torch import nn

from . import FlowerLDMPipeline
from .errors import InputError, one_line, refusals_of_input
from .files import CACHE_REFUSED, UnusableCacheError, read_tensors, tensors_digest, write_tensors
from .memory import keep_freed_memory
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
    """Load a pipeline from a folder or the Hub.

    Args:
        scheduler: a name in `SCHEDULERS`. None: the pipeline's own.
        guide: another pipeline, whose unet becomes the guide. None: the pipeline's own guide, if any.

    Raises:
        InputError: the pipeline can't be loaded, the device can't be used, or the guide doesn't fit.
    """
    pipe = _from_pretrained("--pipeline", name)
    if guide is not None:
        pipe.guide = _from_pretrained("--guide", guide).unet
    if scheduler is not None:
        pipe.scheduler = pipe.make_scheduler(SCHEDULERS[scheduler].scheduler_class)
    try:
        pipe.to(torch.device(device))
        if dtype != "float32":  # a pipeline is loaded in float32
            pipe.to(getattr(torch, dtype))
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise InputError(f"--device {device} can't be used: {str(error).splitlines()[0]}") from error
    if pipe.device.type == "cpu":
        keep_freed_memory()
    return pipe


def _from_pretrained(flag: str, name: str) -> FlowerLDMPipeline:
    if os.path.exists(name) and not PIPELINE_INDEX.path(name).is_file():
        raise InputError(f"{flag} {name} is not the folder of a pipeline: it has no {PIPELINE_INDEX.name}")
    if not is_terminal():
        diffusers.utils.logging.disable_progress_bar()  # diffusers' loading bar is always redrawn in place
    try:
        pipe = FlowerLDMPipeline.from_pretrained(name)
    except Exception as error:  # errors of files, network and Hub have no common base class
        reason = one_line(error, 300)
        if isinstance(error, RemoteEntryNotFoundError) and PIPELINE_INDEX.name in reason:
            raise InputError(f"{flag} {name} is no pipeline: there is no {PIPELINE_INDEX.name} on the Hub") from error
        if Path(name).is_dir():
            raise InputError(f"{flag} {name} can't be loaded: {missing_file(Path(name)) or reason}") from error
        raise InputError(f"{flag} {name} is neither a folder nor a Hub id that can be loaded: {reason}") from error
    try:
        pipe.check_weights()
    except ValueError as error:  # from here on nobody knows the name any more
        raise InputError(f"{error}: {flag} {name}") from error
    return pipe


def missing_file(folder: Path) -> str | None:
    """Which file a pipeline's folder lacks, or `None`. diffusers names only the last of the files that it tried."""
    try:
        index = FlowerLDMPipeline.load_config(folder)
    except Exception:  # a damaged index has its own message
        return None
    models = [name for name in ("vae", "unet", "guide") if isinstance(index.get(name), list) and index[name][0]]
    for model, file in itertools.product(models, (MODEL_CONFIG, WEIGHTS[0])):
        if not any((folder / model).glob(file)) and not any((folder / model).glob("*.bin")):
            return f"{model}/{file.replace('*', '')} is missing"
    return None


def check_sampling(pipe: FlowerLDMPipeline, num_labels: int, options: dict) -> None:
    """Check options of the pipeline's call, by name.

    Raises:
        InputError: the pipeline or its scheduler can't take one of them.
    """
    with refusals_of_input():
        pipe.check_inputs(num_labels=num_labels, **options)


# --- one call --------------------------------------------------------------------------------------------------------


def seeded_noise(pipeline: FlowerLDMPipeline, generator: torch.Generator) -> torch.Tensor:
    """The noise `(1, Z, h, w)` float32 from which the pipeline starts one image with this generator."""
    return randn_tensor((1, *pipeline.latents_shape), generator, pipeline.device, torch.float32)


@torch.no_grad()
def decode(pipeline: FlowerLDMPipeline, latents: torch.Tensor, batch_size: int = 32) -> np.ndarray:
    """Latents `(B, Z, h, w)` -> images `(B, H, W, 3)` uint8.

    With a batch size of 1 each is bit for bit the image that the pipeline draws alone.
    """
    images = np.concatenate([pipeline.decode_latents(batch, "np") for batch in latents.split(batch_size)])
    return (images * 255).round().astype(np.uint8)


def draw_classes(
    pipeline: FlowerLDMPipeline, labels: Sequence[int], seed: int = 0, images_per_class: int = 10, **options
) -> torch.Tensor:
    """Latents `(len(labels) * images_per_class, Z, h, w)`, class by class, always from the same noise.

    The noise of an image doesn't depend on `images_per_class`.
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
    """`count` generators, all with the same seed."""
    return [torch.Generator("cpu").manual_seed(seed) for _ in range(count)]


def draw(pipeline: FlowerLDMPipeline, labels: int | str | Sequence | torch.Tensor, **options) -> np.ndarray:
    """The pipeline's images of these labels as `(B, H, W, 3)` uint8."""
    return (pipeline(labels, output_type="np", **options).images * 255).round().astype(np.uint8)


# --- many images -----------------------------------------------------------------------------------------------------


def sample_labels(num_samples: int, num_classes: int) -> torch.Tensor:
    """The class `(N,)` of each sample. Classes take turns, so a larger number begins with the same samples."""
    return torch.arange(num_samples) % num_classes


class Sampler:
    """Draws many images from a pipeline, caches every batch, and resumes after an interruption.

    Image i is of class i mod K, from a generator with the seed `seed + i`. It depends neither on the batch size nor on
    the number of images. Each combination of settings has its own cache folder.
    """

    def __init__(self, pipe: FlowerLDMPipeline, cache_dir: str | Path, *, seed: int = 0, batch_size: int = 64):
        self.pipe = pipe
        self.cache_dir = Path(cache_dir)
        self.seed = seed
        self.batch_size = batch_size
        self.digest = pipeline_digest(pipe)

    def draw(self, num_samples: int, **options) -> tuple[np.ndarray, float]:
        """Images `(N, H, W, 3)` uint8, and the seconds that drawing them took, now or earlier.

        Args:
            options: `guidance_scale`, `guidance_interval` and `num_inference_steps` of the pipeline's call.
        """
        settings = json.dumps([self.digest, self.seed, options], sort_keys=True, default=list)
        key = hashlib.sha256(settings.encode()).hexdigest()
        folder = self.cache_dir / f"{DRAWN_SAMPLES}{key[:16]}"
        images, seconds = self._read_cache(folder, key, num_samples)
        missing = [number for number in range(num_samples) if number not in images]
        self.pipe.set_progress_bar_config(**bar_options(desc="denoising", leave=False))
        with progress_bar(total=num_samples, initial=len(images), desc="sampling", unit=" images") as progress:
            try:
                for start in range(0, len(missing), self.batch_size):
                    numbers = missing[start : start + self.batch_size]
                    started = time.perf_counter()
                    batch = self._draw_batch(numbers, options)
                    spent = time.perf_counter() - started
                    tensors = {"images": torch.from_numpy(batch), "numbers": torch.tensor(numbers)}
                    path = folder / f"{numbers[0]:06d}-{numbers[-1]:06d}.safetensors"
                    write_tensors(path, tensors, key, CACHE_REFUSED, seconds=str(spent))
                    images |= dict(zip(numbers, batch, strict=True))
                    seconds += spent
                    progress.update(len(numbers))
            except KeyboardInterrupt:  # in the middle of drawing or of writing
                progress.close()
                kept = len(self._read_cache(folder, key, num_samples)[0])
                cached = f"{kept} of {num_samples} images are kept in {folder}"
                print(f"stopped: {cached}; run the same command again to continue", file=sys.stderr)
                raise SystemExit(130) from None
        return np.stack([images[number] for number in range(num_samples)]), seconds

    def _draw_batch(self, numbers: list[int], options: dict) -> np.ndarray:
        labels = [number % self.pipe.num_classes for number in numbers]
        generators = [torch.Generator("cpu").manual_seed(self.seed + number) for number in numbers]
        with refusals_of_input():  # some schedulers fail only at the end, with too few steps
            return np.ascontiguousarray(draw(self.pipe, labels, generator=generators, **options))

    def _read_cache(self, folder: Path, key: str, num_samples: int) -> tuple[dict[int, np.ndarray], float]:
        """The cached images by number, and the seconds that they took. Damaged files are removed."""
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
    """Hex digest of everything that a pipeline's images depend on: weights, configs, scheduler and precision."""

    def config_of(component: nn.Module | SchedulerMixin) -> dict:
        return {name: value for name, value in dict(component.config).items() if not name.startswith("_")}

    components = {name: component for name, component in pipe.components.items() if hasattr(component, "config")}
    configs = [[name, type(component).__name__, config_of(component)] for name, component in components.items()]
    models = {name: component for name, component in components.items() if isinstance(component, nn.Module)}
    weights = {f"{name}.{key}": value for name, model in models.items() for key, value in model.state_dict().items()}
    return tensors_digest(weights, json.dumps([*configs, str(pipe.dtype)], sort_keys=True, default=str))
