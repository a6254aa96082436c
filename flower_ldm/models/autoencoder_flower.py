"""FlowerAutoencoderKL: images -> spatial latents -> images, with a classifier head on the latents.

This file goes to the Hub with the weights, so it imports only the standard library, torch and diffusers.

Shapes: B images, (H, W) pixels, (h, w) = (H, W) / downsample_factor, C channels of a block, Z latent channels,
K classes.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

# A config beyond these bounds is a mistake or an attack. They keep a model from filling the memory when it is built.
BOUNDS = {
    "in_channels": (1, 2**10), "latent_channels": (1, 2**14), "patch_size": (1, 2**6), "layers_per_block": (0, 100),
    "decoder_layers_per_block": (0, 100), "num_classes": (0, 10**6), "head_channels": (1, 2**16),
    "sample_size": (1, 2**16),
}  # fmt: skip
MOST_WEIGHTS = 1e11


@dataclass
class FlowerAutoencoderOutput(BaseOutput):
    """What one pass through the autoencoder gives.

    Attributes:
        sample (`torch.Tensor` `(B, 3, H, W)`): the reconstruction, about in [-1, 1]; the decoder may overshoot.
        posterior (`DiagonalGaussianDistribution`): over raw latents `(B, Z, h, w)`.
        class_logits (`torch.Tensor` `(B, K)` or `None`): from the posterior's mean; `None` where `num_classes=0`.
        class_features (`torch.Tensor` `(B, head_channels)` or `None`): the logits are a linear map of these.
    """

    sample: torch.Tensor
    posterior: DiagonalGaussianDistribution | None = None
    class_logits: torch.Tensor | None = None
    class_features: torch.Tensor | None = None


class LayerNorm2d(nn.LayerNorm):
    """Layer normalization over the *channels* at each position (Ba et al. 2016, as in ConvNeXt, Liu et al. 2022).

    Statistics never mix positions, so they don't depend on the size of the image. In channels-last memory both
    permutations cost nothing.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelAttention(nn.Module):
    """A gate for each channel, from the image's mean activations (squeeze and excitation, Hu et al. 2018)."""

    def __init__(self, channels: int, reduction: int = 8):
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        pooled = hidden_states.mean(dim=(2, 3))                                           # (B, C)
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(pooled))))
        return gate[:, :, None, None]                                                     # (B, C, 1, 1)


class SpatialAttention(nn.Module):
    """A gate for each position, from a learned mixture of its channels (spatial squeeze, Roy et al. 2018, eq. 4)."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix = nn.Linear(channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.mix(hidden_states.permute(0, 2, 3, 1)))                 # (B, H, W, 1)
        return gate.permute(0, 3, 1, 2)                                                   # (B, 1, H, W)


class ResidualBlock(nn.Module):
    """norm -> conv -> Swish -> conv, gated by channel and by spatial attention, added to its input.

    The gates act concurrently (scSE, Roy et al. 2018). The branch is multiplied by their sum in one pass over memory.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        self.channel_attention = ChannelAttention(channels)
        self.spatial_attention = SpatialAttention(channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        branch = self.conv_out(F.silu(self.conv_in(self.norm(hidden_states))))            # (B, C, H, W)
        gate = self.channel_attention(branch) + self.spatial_attention(branch)            # (B, C, H, W)
        return torch.addcmul(hidden_states, branch, gate)                                 # (B, C, H, W)


class Encoder(nn.Module):
    """Images `(B, 3, H, W)` -> moments of the posterior `(B, 2 Z, h, w)`."""

    def __init__(
        self, in_channels: int, latent_channels: int, patch_size: int, block_out_channels: tuple, num_blocks: int
    ):
        super().__init__()
        self.patch_size = patch_size
        self.gradient_checkpointing = False
        first, last = block_out_channels[0], block_out_channels[-1]
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, first, 3, padding=1)
        self.layers = nn.ModuleList()
        for level, channels in enumerate(block_out_channels):
            if level > 0:
                self.layers.append(nn.Conv2d(block_out_channels[level - 1], channels, 3, stride=2, padding=1))
            self.layers.extend(ResidualBlock(channels) for _ in range(num_blocks))
        self.norm_out = LayerNorm2d(last)
        self.conv_out = nn.Conv2d(last, 2 * latent_channels, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(F.pixel_unshuffle(images, self.patch_size))          # (B, C, H/p, W/p)
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(layer, hidden_states)
            else:
                hidden_states = layer(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))                        # (B, 2 Z, h, w)


class Decoder(nn.Module):
    """Raw latents `(B, Z, h, w)` -> images `(B, 3, H, W)`."""

    def __init__(
        self, out_channels: int, latent_channels: int, patch_size: int, block_out_channels: tuple, num_blocks: int
    ):
        super().__init__()
        self.patch_size = patch_size
        self.gradient_checkpointing = False
        channels_in = block_out_channels[-1]
        self.conv_in = nn.Conv2d(latent_channels, channels_in, 3, padding=1)
        self.layers = nn.ModuleList()
        for level, channels in enumerate(reversed(block_out_channels)):
            if level > 0:
                self.layers.append(Upsample(channels_in, channels))
            self.layers.extend(ResidualBlock(channels) for _ in range(num_blocks))
            channels_in = channels
        self.norm_out = LayerNorm2d(channels_in)
        self.conv_out = nn.Conv2d(channels_in, out_channels * patch_size**2, 3, padding=1)

    def forward(self, raw_latents: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(raw_latents)                                         # (B, C, h, w)
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(layer, hidden_states)
            else:
                hidden_states = layer(hidden_states)
        hidden_states = self.conv_out(F.silu(self.norm_out(hidden_states)))               # (B, 3 p p, H/p, W/p)
        return F.pixel_shuffle(hidden_states, self.patch_size)                            # (B, 3, H, W)


class Upsample(nn.Module):
    """Doubles the size by a sub-pixel convolution (Shi et al. 2016). The residual blocks after it do the smoothing."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4 * out_channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(self.conv(hidden_states), 2)                               # (B, C', 2 H, 2 W)


class ClassifierHead(nn.Module):
    """Raw latents `(B, Z, h, w)` -> class features `(B, head_channels)` and logits `(B, K)`.

    Only training uses them: the center loss pulls the features of a class together.
    """

    def __init__(self, latent_channels: int, head_channels: int, num_classes: int):
        super().__init__()
        self.conv = nn.Conv2d(latent_channels, head_channels, 3, padding=1)
        self.norm = LayerNorm2d(head_channels)
        self.classifier = nn.Linear(head_channels, num_classes)

    def forward(self, raw_latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = F.silu(self.norm(self.conv(raw_latents))).mean(dim=(2, 3))             # (B, head_channels)
        return features, self.classifier(features)                                        # (B, K)


def _is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


class FlowerAutoencoderKL(ModelMixin, AutoencoderMixin, ConfigMixin):
    """A convolutional variational autoencoder with spatial latents (Kingma & Welling 2014; Rombach et al. 2022).

    It has residual blocks with Swish, channel and spatial attention, layer normalization over channels, and a
    classifier head on the latents. A latent position stands for `downsample_factor` pixels a side, where
    `downsample_factor = patch_size * 2 ** (len(block_out_channels) - 1)`.

    Args:
        in_channels: channels of the images.
        latent_channels: Z, channels of the latents.
        patch_size: pixels a side that the first layer folds into channels; 1 keeps the full resolution.
        block_out_channels: channels at each resolution. Each resolution is half the one before.
        layers_per_block: residual blocks at each resolution of the encoder.
        decoder_layers_per_block: residual blocks at each resolution of the decoder.
        num_classes: K; 0 builds the model without the classifier head.
        head_channels: width of the class features.
        sample_size: height and width of the training images, a hint for pipelines. The model accepts every multiple
            of `downsample_factor`.
        latents_mean, latents_std: per channel, of the training split's latents, measured at the end of stage 1.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 16,
        patch_size: int = 2,
        block_out_channels: tuple = (128, 256, 256),
        layers_per_block: int = 1,
        decoder_layers_per_block: int = 2,
        num_classes: int = 0,
        head_channels: int = 128,
        sample_size: int = 64,
        latents_mean: list | None = None,
        latents_std: list | None = None,
    ):
        super().__init__()
        self.use_slicing = False  # after `enable_slicing()`: one image at a time, which takes less memory
        self._check_config()
        block_out_channels = tuple(block_out_channels)
        shape = (latent_channels, patch_size, block_out_channels)
        self.encoder = Encoder(in_channels, *shape, layers_per_block)
        self.decoder = Decoder(in_channels, *shape, decoder_layers_per_block)
        self.head = ClassifierHead(latent_channels, head_channels, num_classes) if num_classes > 0 else None
        self.register_buffer("channel_mean", torch.zeros(1, latent_channels, 1, 1), persistent=False)
        self.register_buffer("channel_std", torch.ones(1, latent_channels, 1, 1), persistent=False)
        if latents_mean is not None or latents_std is not None:
            self.set_latents_statistics(latents_mean, latents_std)

    def _check_config(self) -> None:
        config = self.config
        for name, (least, most) in BOUNDS.items():
            value = config[name]
            if not _is_whole(value) or not least <= value <= most:
                raise ValueError(f"{name} must be a whole number from {least} to {most:,}, got {value!r:.40}")
        blocks = config.block_out_channels
        if (
            not isinstance(blocks, (list, tuple))
            or not 1 <= len(blocks) <= 12
            or not all(_is_whole(channels) and 8 <= channels <= 2**14 for channels in blocks)
        ):
            raise ValueError(
                f"block_out_channels must be 1 to 12 whole numbers from 8 to {2**14:,}, got {blocks!r:.40}"
            )
        weights = 18 * sum(channels**2 for channels in blocks)  # of a block's two convolutions
        weights *= config.layers_per_block + config.decoder_layers_per_block + 1
        weights += 18 * max(blocks) * config.in_channels * config.patch_size**2
        if config.num_classes > 0:
            weights += config.head_channels * (9 * config.latent_channels + config.num_classes)
        if weights > MOST_WEIGHTS:
            raise ValueError(f"the config asks for {weights:.0e} weights, more than {MOST_WEIGHTS:.0e}")

    @property
    def downsample_factor(self) -> int:
        """Pixels a side that one latent position stands for."""
        return self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def hidden_layers(self) -> tuple[nn.Module, ...]:
        """All between first and last layer, of the encoder and of the decoder. Muon may train their matrices."""
        return (self.encoder.layers, self.decoder.layers)

    @apply_forward_hook
    def encode(
        self, images: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Images `(B, 3, H, W)` in [-1, 1] -> posterior over raw latents `(B, Z, h, w)`.

        Raises:
            ValueError: height or width is not a multiple of `downsample_factor`.
        """
        factor = self.downsample_factor
        if images.shape[-2] % factor or images.shape[-1] % factor:
            raise ValueError(
                f"images of {images.shape[-2]} x {images.shape[-1]} can't be encoded: height and width must be "
                f"multiples of {factor}"
            )
        posterior = DiagonalGaussianDistribution(self._sliced(self.encoder, images))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, raw_latents: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Raw latents `(B, Z, h, w)` -> images `(B, 3, H, W)`, about in [-1, 1]."""
        sample = self._sliced(self.decoder, raw_latents)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _sliced(self, module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if not self.use_slicing:
            return module(batch)
        return torch.cat([module(row) for row in batch.split(1)])

    def forward(
        self,
        images: torch.Tensor,
        noise: torch.Tensor | None = None,
        return_dict: bool = True,
        noise_levels: torch.Tensor | None = None,
    ) -> FlowerAutoencoderOutput | tuple:
        """Reconstruct from a sample of the posterior, and classify from its mean.

        Args:
            images: `(B, 3, H, W)` in [-1, 1].
            noise: `(B, Z, h, w)` standard normal, which makes the sample: mean + std * noise (reparameterization,
                Kingma & Welling 2014, eq. 4). Without it the mean is decoded.
            return_dict: `False` gives a plain tuple of the output's four fields.
            noise_levels: `(B,)`, the standard deviations of further noise, relative to that of the batch's latents.
                It is meant to make a decoder draw well from the inexact latents of a denoiser (Zheng et al. 2025,
                "Diffusion Transformers with Representation Autoencoders").
        """
        posterior = self.encode(images).latent_dist
        raw_latents = posterior.mean
        if noise is not None:
            std = posterior.std
            if noise_levels is not None:  # the sum of both noises is normal too
                spread = posterior.mean.detach().float().std()
                std = (std.square() + (spread * noise_levels).square()[:, None, None, None]).sqrt()
            raw_latents = torch.addcmul(posterior.mean, std, noise)
        sample = self.decode(raw_latents).sample                                          # (B, 3, H, W)
        features, logits = (None, None) if self.head is None else self.head(posterior.mean)
        if not return_dict:
            return sample, posterior, logits, features
        return FlowerAutoencoderOutput(
            sample=sample, posterior=posterior, class_logits=logits, class_features=features
        )

    def set_latents_statistics(self, latents_mean: list[float], latents_std: list[float]) -> None:
        """Set the per-channel mean and standard deviation of the training split's raw latents, also in the config.

        Raises:
            ValueError: they are not one finite number for each channel, or a `latents_std` is not above 0.
        """
        latent_channels = self.config.latent_channels
        for values in (latents_mean, latents_std):
            if not isinstance(values, (list, tuple)) or len(values) != latent_channels:
                raise ValueError(
                    f"latents_mean and latents_std must have {latent_channels} values each, one for each channel"
                )
            if not all(isinstance(value, (int, float)) and -1e30 < value < 1e30 for value in values):
                raise ValueError("latents_mean and latents_std must hold finite numbers")
        if min(latents_std) < 1e-30:  # float32 can't divide by less
            raise ValueError(f"latents_std must hold numbers above 0, got {min(latents_std)}")
        self.register_to_config(latents_mean=list(latents_mean), latents_std=list(latents_std))
        self.channel_mean.copy_(torch.tensor(latents_mean).view(1, -1, 1, 1))
        self.channel_std.copy_(torch.tensor(latents_std).view(1, -1, 1, 1))

    @apply_forward_hook
    def normalize(self, raw_latents: torch.Tensor) -> torch.Tensor:
        """Raw latents, from the encoder -> latents of unit variance, for the denoiser."""
        return (raw_latents - self.channel_mean) / self.channel_std

    @apply_forward_hook
    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalize`."""
        return latents * self.channel_std + self.channel_mean

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save a folder that loads without this package too: diffusers' files, this file, an entry for `AutoModel`.

        It loads by `AutoModel.from_pretrained(folder, trust_remote_code=True)`. With `push_to_hub=True` the model is
        saved once more to a temporary folder and uploaded from there: other files in `save_directory` stay private.
        """
        hub_names = ("repo_id", "commit_message", "private", "token", "create_pr")
        hub_options = {name: kwargs.pop(name) for name in hub_names if name in kwargs}
        super().save_pretrained(
            save_directory, is_main_process, save_function, safe_serialization, variant, max_shard_size, **kwargs
        )
        if not is_main_process:
            return
        folder, source = Path(save_directory), Path(__file__)
        (folder / source.name).write_bytes(source.read_bytes())
        config_file = folder / self.config_name
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # a path on this machine
        config["auto_map"] = {"AutoModel": f"{source.stem}.{type(self).__name__}"}
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if push_to_hub:
            repo_id = hub_options.pop("repo_id", folder.name)
            self.push_to_hub(repo_id, safe_serialization=safe_serialization, variant=variant, **hub_options)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """diffusers' method, but strict: that invents missing weights, and ignores those it doesn't know.

        Raises:
            ValueError: the weights don't fit the config.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for kind in ("missing", "unexpected"):
            if names := sorted(info[f"{kind}_keys"]):
                raise ValueError(
                    f"the weights don't fit the config of {cls.__name__}: {len(names)} are {kind}, such as {names[0]}"
                )
        return (model, info) if output_loading_info else model

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs: Any) -> tuple[dict, dict, dict]:
        # The entry for `AutoModel` is no argument of the model. diffusers would warn that it is unknown.
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)
