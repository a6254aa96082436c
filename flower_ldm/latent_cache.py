"""What stage 2 trains on: the autoencoder's posteriors of every image and of its horizontal flip, encoded once.

The cache is one safetensors file. Its key stands for autoencoder, data and size. A file with another key, or a torn
one, is never used. The cache holds mean and std, not samples: `LatentDataset` draws a new sample in each epoch, as
EDM2 does.

Shapes: N images, B of them in a batch; C latent channels of h x w; axis 1 of (N, 2, C, h, w) is image, flipped image.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .data import ImageDataset, image_rng, keep_batch
from .errors import InputError, one_line
from .files import UnusableCacheError, read_tensors, tensors_digest, write_tensors
from .progress_bars import progress_bar

FORMAT_VERSION = "1"
NOT_ENCODER_CONFIG = ("latents_mean", "latents_std")  # measured on the latents, so the latents don't depend on them


@dataclass(frozen=True)
class LatentCache:
    """The posteriors of a data set's raw latents.

    Attributes:
        mean, std (`torch.Tensor` `(N, 2, C, h, w)` float16): of the raw latents, as the autoencoder gives them.
        labels (`torch.Tensor` `(N,)` int64): classes of the images.
        class_names (`list[str]`): the name of each class.
    """

    mean: torch.Tensor
    std: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the cache file, by name."""
        return {"mean": self.mean, "std": self.std, "labels": self.labels}


def cache_key(vae: torch.nn.Module, dataset: ImageDataset) -> str:
    """Hex digest of what the latents depend on: the autoencoder's config and weights, the data and their size."""
    config = {
        name: value
        for name, value in dict(vae.config).items()
        if not name.startswith("_") and name not in NOT_ENCODER_CONFIG
    }
    description = [FORMAT_VERSION, type(vae).__name__, config, dataset.fingerprint, dataset.resolution]
    return tensors_digest(vae.state_dict(), json.dumps(description, sort_keys=True, default=str))


def cache_path(cache_dir: str | Path, dataset: ImageDataset) -> Path:
    """The cache file. Each combination of data set and splits has its own."""
    name = "-".join([dataset.name, "+".join(dataset.splits)])
    return Path(cache_dir) / f"{re.sub(r'[^A-Za-z0-9_.+-]+', '-', name).strip('-.')}.safetensors"


def load_or_build_latent_cache(
    vae: torch.nn.Module,
    dataset: ImageDataset,
    cache_dir: str | Path,
    *,
    device: torch.device | str,
    batch_size: int = 64,
    autocast_dtype: torch.dtype | None = None,
    num_workers: int = 0,
) -> LatentCache:
    """Read the cache of `dataset`'s latents in `cache_dir`. Without a usable one encode the images and write it.

    With several processes call it within `accelerator.main_process_first()`: the others then find the file.

    Args:
        vae: anything with diffusers' `encode(images).latent_dist`, on `device` and in evaluation mode.
        dataset: images `(B, 3, H, W)` in [-1, 1]. They are read by plain indices, so center-cropped and not flipped.
        batch_size: images encoded at a time, each together with its flip.
        autocast_dtype: `torch.bfloat16`, `torch.float16`, or `None` to encode in the precision of the weights. It is
            not part of the key: a cache made in another precision is used.
        num_workers: processes that decode images ahead. 0 suits a data set that is held in memory.

    Raises:
        InputError: latents are not finite or too large for 16 bits, or the folder can't be written.
    """
    path = cache_path(cache_dir, dataset)
    key = cache_key(vae, dataset)
    if path.is_file():  # reading a pipe would wait for ever
        try:
            cache = read_latent_cache(path, key)
            if not torch.equal(cache.labels, dataset.labels) or cache.class_names != list(dataset.class_names):
                raise UnusableCacheError("has other labels")
            return cache
        except UnusableCacheError as reason:
            print(f"latent cache {path} {reason}: encoding the images again", flush=True)
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=keep_batch, num_workers=num_workers)
    cache = _encode(vae, loader, torch.device(device), autocast_dtype)
    write_tensors(path, cache.tensors(), key, class_names=json.dumps(cache.class_names))
    return cache


def read_latent_cache(path: Path, key: str) -> LatentCache:
    """Read a cache file.

    Raises:
        UnusableCacheError: the key differs, the file is damaged, or latents are not finite.
    """
    tensors, metadata = read_tensors(path, key)
    try:
        names = json.loads(metadata["class_names"])
        cache = LatentCache(tensors["mean"], tensors["std"], tensors["labels"], names)
    except (LookupError, ValueError, RecursionError) as error:
        raise UnusableCacheError(f"can't be read ({one_line(error)})") from error
    if cache.mean.shape != cache.std.shape or cache.mean.shape[:2] != (len(cache), 2) or cache.mean.ndim != 5:
        raise UnusableCacheError("has shapes that don't belong to a cache of latents")
    if not _is_finite(cache.mean, cache.std):
        raise UnusableCacheError("holds latents that are not finite")
    return cache


class LatentDataset(Dataset):
    """Normalized latents and all random numbers of a denoising step, which depend on (seed, epoch, image index) only.

    A key is `(epoch, index)`. An item is the same in every batch, process and worker. Use it with
    `data.TrainingSampler` and `collate_fn=data.keep_batch`.

    Args:
        cache: the posteriors.
        latents_mean, latents_std: per channel, C of each, from the autoencoder's config.
        seed: the seed of the run.
    """

    def __init__(self, cache: LatentCache, latents_mean: Sequence[float], latents_std: Sequence[float], seed: int):
        channels = cache.mean.shape[2]
        self.cache = cache
        self.latents_mean = torch.tensor(latents_mean, dtype=torch.float32).view(channels, 1, 1)
        self.latents_std = torch.tensor(latents_std, dtype=torch.float32).view(channels, 1, 1)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.cache)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """The items of a batch, each tensor already batched.

        Returns:
            "latents" `(B, C, h, w)`: a sample of the posterior of the image or its flip, normalized.
            "noise" `(B, C, h, w)`: standard normal, for the diffusion.
            "uniforms" `(B, 2)` in [0, 1): for the timestep and for label dropout.
            "class_labels" and "index" `(B,)` int64. All the others are float32.
        """
        shape = (len(keys), *self.cache.mean.shape[2:])
        posterior_noise, noise = np.empty(shape, np.float32), np.empty(shape, np.float32)
        uniforms = np.empty((len(keys), 3), np.float32)
        for row, (epoch, index) in enumerate(keys):
            rng = image_rng(self.seed, epoch, index)
            rng.random(out=uniforms[row], dtype=np.float32)
            rng.standard_normal(out=posterior_noise[row], dtype=np.float32)
            rng.standard_normal(out=noise[row], dtype=np.float32)
        index = torch.tensor([index for _, index in keys])
        uniforms = torch.from_numpy(uniforms)
        flip = (uniforms[:, 0] < 0.5).long()
        mean, std = self.cache.mean[index, flip].float(), self.cache.std[index, flip].float()  # (B, C, h, w)
        raw_latents = torch.addcmul(mean, std, torch.from_numpy(posterior_noise))
        return {
            "latents": (raw_latents - self.latents_mean) / self.latents_std,
            "class_labels": self.cache.labels[index],
            "index": index,
            "noise": torch.from_numpy(noise),
            "uniforms": uniforms[:, 1:],
        }

    def posterior_means(self, indices: Sequence[int]) -> torch.Tensor:
        """The normalized posterior means of these images, not flipped: `(B, C, h, w)` float32."""
        return (self.cache.mean[torch.as_tensor(indices), 0].float() - self.latents_mean) / self.latents_std

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        """The item of one key, without the batch dimension."""
        return {name: value[0] for name, value in self.__getitems__([key]).items()}


def _encode(
    vae: torch.nn.Module, loader: DataLoader, device: torch.device, autocast_dtype: torch.dtype | None
) -> LatentCache:
    """The posteriors of all images and their flips, in float16 on the CPU.

    Raises:
        InputError: float16 can't hold them.
    """
    dataset = loader.dataset
    autocast = torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None)
    means, stds = [], []
    with progress_bar(total=len(dataset), desc="Encoding images", unit=" images") as progress:
        for batch in loader:
            images = batch["images"].to(device)
            pairs = torch.stack([images, images.flip(-1)], dim=1).flatten(0, 1)  # (2 B, 3, H, W)
            with torch.inference_mode(), autocast:
                posterior = vae.encode(pairs.contiguous(memory_format=torch.channels_last)).latent_dist
            for batches, moments in ((means, posterior.mean), (stds, posterior.std)):
                batches.append(moments.half().cpu().contiguous().unflatten(0, (-1, 2)))  # (B, 2, C, h, w)
            if not _is_finite(means[-1], stds[-1]):
                raise InputError(
                    f"--autoencoder: its latents of images {progress.n} to {progress.n + len(images) - 1} of "
                    f"{dataset.name} are not finite or too large for 16 bits; try --mixed_precision no, or train it "
                    "with a larger --kl_weight"
                )
            progress.update(len(images))
    return LatentCache(torch.cat(means), torch.cat(stds), dataset.labels, list(dataset.class_names))


def _is_finite(*tensors: torch.Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
