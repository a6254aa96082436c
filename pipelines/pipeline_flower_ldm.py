"""FlowerLDMPipeline: class labels -> noise -> guided denoising -> images.

Travels to the Hub at the root of each repository that it saves, so it imports the standard library, torch and
diffusers only. It knows its parts by what they do, never by class: `FlowerAutoencoderKL` and `FlowerUNet2DModel`, or
diffusers' own `AutoencoderKL` and `UNet2DModel`, with any of diffusers' schedulers.

Shapes: L labels, B = L x images per label, K classes, Z latent channels, (h, w) latent positions, (H, W) pixels.
"""

import difflib
import inspect
import json
import math
import operator
import os
import sys
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class FlowerLDMPipeline(DiffusionPipeline):
    """Draws images of the classes that it is asked for (latent diffusion, Rombach et al. 2022).

    Args:
        vae: decodes raw latents `(B, Z, h, w)` to images `(B, 3, H, W)` in [-1, 1].
        unet: `unet(noisy_latents, timesteps, class_labels).sample`, on latents `(B, Z, h, w)` of unit variance. Its
            config has `num_classes` (K; label K is the null label) or `num_class_embeds` (the last label is).
        scheduler: one of diffusers' schedulers.
        id2label: name of each label `0..K-1`, each once. Kept in the config with strings as keys, as JSON has them.

    Raises:
        ValueError: where the unet takes no class labels, or `id2label` doesn't name each of its classes once.
    """

    model_cpu_offload_seq = "unet->vae"
    _callback_tensor_inputs = ["latents", "denoised_latents"]

    def __init__(
        self,
        vae: torch.nn.Module,
        unet: torch.nn.Module,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        if id2label is not None:
            names = {int(label): str(name) for label, name in id2label.items()}
            if sorted(names) != list(range(self.num_classes)) or len(set(names.values())) != len(names):
                raise ValueError(
                    f"id2label must name each of the labels 0 to {self.num_classes - 1} once, each with a name of its "
                    f"own, got {len(names)} labels and {len(set(names.values()))} names"
                )
            id2label = {str(label): names[label] for label in sorted(names)}
        self.register_to_config(id2label=id2label)
        self._interrupt = False

    @property
    def null_label(self) -> int:
        """The label that means "any class"; the labels below it are the classes."""
        config = self.unet.config
        if config.get("num_classes") is not None:
            return config.num_classes
        if config.get("num_class_embeds") is not None:
            return config.num_class_embeds - 1
        raise ValueError("the unet takes no class labels: its config has neither num_classes nor num_class_embeds")

    @property
    def num_classes(self) -> int:
        return self.null_label

    @property
    def class_names(self) -> list[str]:
        """The name of each label in order; the labels themselves where there is no `id2label`."""
        id2label = self.config.id2label or {}
        return [id2label.get(str(label), str(label)) for label in range(self.num_classes)]

    @property
    def interrupt(self) -> bool:
        """Whether to stop: with `pipe._interrupt = True` from a callback the images are decoded as they are."""
        return self._interrupt

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """`(Z, h, w)` of one image's latents."""
        config = self.unet.config
        size = config.sample_size
        return (config.in_channels, *((size, size) if isinstance(size, int) else size))

    @torch.no_grad()
    def __call__(
        self,
        labels: str | int | Sequence[str | int] | torch.Tensor,
        num_images_per_label: int = 1,
        guidance_scale: float = 3.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 25,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draw `num_images_per_label` images of each label, label by label.

        Args:
            labels: a name, an index, or several of either; or mixtures of classes, a float tensor `(L, K)` of weights
                that sum to 1 in each row, where the unet takes them (`FlowerUNet2DModel` does).
            guidance_scale: classifier-free guidance (Ho & Salimans 2022, eq. 6 with scale = 1 + w); 1 means off.
            guidance_interval: from where to where guidance acts, in fractions of the trajectory: 0 is pure noise, 1
                the clean image (Kynkäänniemi et al. 2024). Outside, a step costs half.
            eta: share of DDIM's noise (Song et al. 2021, eq. 16); schedulers without it ignore it.
            generator: one, or a list of B: with a list an image doesn't depend on the others in the batch.
            latents: `(B, Z, h, w)` standard normal noise to start from, in place of noise drawn here.
            output_type: "pil"; "np" `(B, H, W, 3)` or "pt" `(B, 3, H, W)` float32 in [0, 1]; "latent" `(B, Z, h, w)`,
                normalised to unit variance as the unet sees them.
            callback_on_step_end: called as `(pipe, step_index, timestep, {"latents": latents})` after each step;
                latents that it returns in a dict take the place of these.
            callback_on_step_end_tensor_inputs: what that dict holds: "latents" after the step, as the scheduler scales
                them; "denoised_latents", the clean ones that the step aimed at (`predict_denoised_latents`).

        Returns:
            `ImagePipelineOutput` with `images`, or `(images,)` where `return_dict=False`.

        Raises:
            ValueError: for each argument that can't be right, before anything is computed.
        """
        class_labels = self.prepare_class_labels(labels)  # (L,) or (L, K + 1)
        self.check_inputs(
            len(class_labels), num_images_per_label, guidance_scale, guidance_interval, num_inference_steps, eta,
            generator, latents, output_type, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        device = self._execution_device
        class_labels = class_labels.to(device).repeat_interleave(num_images_per_label, dim=0)  # (B,) or (B, K + 1)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        latents = self.prepare_latents(len(class_labels), generator, latents, device)  # (B, Z, h, w)
        step_options = self.prepare_extra_step_kwargs(generator, eta)
        begin, end = guidance_interval
        self._interrupt = False

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step_index, timestep in enumerate(timesteps):
                if self.interrupt:
                    break
                guided = guidance_scale != 1 and begin <= step_index / len(timesteps) < end
                prediction = self.predict(latents, timestep, class_labels, guidance_scale if guided else 1)
                given = {}
                if callback_on_step_end is not None and "denoised_latents" in callback_on_step_end_tensor_inputs:
                    given["denoised_latents"] = self.predict_denoised_latents(prediction, latents, timestep)
                latents = self.scheduler.step(prediction, timestep, latents, **step_options).prev_sample
                if callback_on_step_end is not None:
                    if "latents" in callback_on_step_end_tensor_inputs:
                        given["latents"] = latents
                    latents = (callback_on_step_end(self, step_index, timestep, given) or {}).get("latents", latents)
                progress_bar.update()

        images = latents if output_type == "latent" else self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, guidance_scale: float = 1
    ) -> torch.Tensor:
        """The unet's prediction for the scheduler's step, guided where `guidance_scale` isn't 1, `(B, Z, h, w)`.

        With guidance, one pass over a batch of `2 B`: with the labels, and with the null label in their place.
        """
        noisy_latents = self.scheduler.scale_model_input(latents, timestep)
        if guidance_scale != 1:
            noisy_latents = torch.cat([noisy_latents, noisy_latents])  # (2 B, Z, h, w)
            class_labels = torch.cat([class_labels, self._null_labels(class_labels)])  # (2 B,) or (2 B, K + 1)
        timesteps = timestep.expand(len(noisy_latents))
        prediction = self.unet(noisy_latents.to(self.unet.dtype), timesteps, class_labels).sample.to(latents.dtype)
        if guidance_scale == 1:
            return prediction
        conditional, unconditional = prediction.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def predict_denoised_latents(
        self, prediction: torch.Tensor, latents: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """The clean latents `(B, Z, h, w)`, normalised, that a prediction at this step stands for, nothing clipped.

        The noisy latents are alpha x clean + sigma x noise; the prediction is one of the two, or the velocity
        alpha x noise - sigma x clean (Salimans & Ho 2022). To be asked before the scheduler makes its step.

        Raises:
            ValueError: where the scheduler's `prediction_type` is none of the three.
        """
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "sample":
            return prediction
        alpha, sigma = self.signal_and_noise(timestep)
        # Of unit variance whatever the scheduler: those that let the noise grow scale them for the unet.
        noisy_latents = self.scheduler.scale_model_input(latents, timestep)
        if prediction_type == "epsilon":
            return (noisy_latents - sigma * prediction) / alpha
        if prediction_type == "v_prediction":
            return alpha * noisy_latents - sigma * prediction
        raise ValueError(f"prediction_type must be epsilon, sample or v_prediction, got {prediction_type!r}")

    def signal_and_noise(self, timestep: torch.Tensor | float) -> tuple[float, float]:
        """`(alpha, sigma)`, the shares of clean latents and of noise in noisy latents; their squares sum to 1.

        Between two timesteps sigma / alpha is interpolated, as in the schedulers whose timesteps are fractions.
        """
        timestep = float(timestep)
        alphas_cumprod = self.scheduler.alphas_cumprod
        lower = min(max(math.floor(timestep), 0), len(alphas_cumprod) - 1)
        variance = float(alphas_cumprod[lower])  # of the signal
        fraction = timestep - lower
        if fraction > 0 and lower + 1 < len(alphas_cumprod):
            following = float(alphas_cumprod[lower + 1])
            if following == 0:  # pure noise: the ratio has no bound
                return math.sqrt(variance), math.sqrt(1 - variance)
            low, high = math.sqrt(1 / variance - 1), math.sqrt(1 / following - 1)
            variance = 1 / (1 + (low + fraction * (high - low)) ** 2)
        return math.sqrt(variance), math.sqrt(1 - variance)

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Noise `(B, Z, h, w)` as strong as the scheduler starts from, float32 or wider.

        Between steps the latents keep that precision whatever the unet's: rounded to bfloat16 after each of many small
        steps they would drift. Drawn in float32, the same seed is the same noise for every dtype.
        """
        if latents is None:
            latents = randn_tensor((batch_size, *self.latents_shape), generator, device, torch.float32)
        latents = latents.to(device, torch.promote_types(self.unet.dtype, torch.float32))
        return latents * self.scheduler.init_noise_sigma

    def prepare_extra_step_kwargs(self, generator: torch.Generator | list[torch.Generator] | None, eta: float) -> dict:
        """`eta` and `generator` for the schedulers whose step takes them."""
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in {"generator": generator, "eta": eta}.items() if name in accepted}

    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Normalised latents `(B, Z, h, w)` -> images of `output_type` "pil", "np" or "pt"."""
        raw_latents = self._denormalize(latents).to(self.vae.dtype)
        images = self.vae.decode(raw_latents).sample.float()  # (B, 3, H, W) in [-1, 1]
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
        return images if output_type == "np" else self.numpy_to_pil(images)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] -> the mean of their latents `(B, Z, h, w)`, normalised, float32."""
        raw_latents = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist.mean.float()
        if hasattr(self.vae, "normalize"):
            return self.vae.normalize(raw_latents)
        shift, scale = self._statistics(raw_latents)
        return (raw_latents - shift) / scale

    def _denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        if hasattr(self.vae, "denormalize"):
            return self.vae.denormalize(latents)
        shift, scale = self._statistics(latents)
        return latents * scale + shift

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Shift and scale of diffusers' own autoencoders: one factor for all channels, or statistics on top of it."""
        config = self.vae.config
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return config.get("shift_factor") or 0.0, 1 / config.scaling_factor
        mean, std = (latents.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        return mean, std / config.scaling_factor

    def prepare_class_labels(self, labels: str | int | Sequence[str | int] | torch.Tensor) -> torch.Tensor:
        """What the unet is given: labels `(L,)` int64, or of mixtures the weights `(L, K + 1)` of each embedding row.

        Raises:
            ValueError: for a label that there isn't, for weights that are no mixture, and for a mixture where the unet
                knows single classes only.
        """
        if not (isinstance(labels, torch.Tensor) and labels.is_floating_point() and labels.ndim == 2):
            return torch.tensor(self.get_label_ids(labels))
        if not getattr(self.unet, "takes_class_mixtures", False):
            kind = type(getattr(self.unet, "_orig_mod", self.unet)).__name__
            raise ValueError(f"labels are mixtures of classes, but {kind} takes single ones: give names or indices")
        if labels.shape[0] == 0 or labels.shape[1] != self.num_classes:
            raise ValueError(
                f"labels as mixtures must have the shape (L, {self.num_classes}), a weight for each class, "
                f"got {tuple(labels.shape)}"
            )
        if not ((labels >= 0).all() and ((labels.sum(dim=1) - 1).abs() < 1e-2).all()):
            raise ValueError("labels as mixtures must hold weights of at least 0 that sum to 1 in each row")
        return torch.nn.functional.pad(labels, (0, 1))  # no share of the null label

    def _null_labels(self, class_labels: torch.Tensor) -> torch.Tensor:
        """As many null labels in the same form: indices `(B,)` or weights `(B, K + 1)`."""
        if not class_labels.is_floating_point():
            return torch.full_like(class_labels, self.null_label)
        weights = torch.zeros_like(class_labels)
        weights[:, self.null_label] = 1
        return weights

    def get_label_ids(self, labels: str | int | Sequence[str | int] | torch.Tensor) -> list[int]:
        """Names and indices -> indices. A string is looked up as a name first, then read as an index.

        Raises:
            ValueError: for an unknown name (it offers the nearest), a label out of range, or no label at all.
        """
        if hasattr(labels, "tolist"):  # tensors and arrays
            labels = labels.tolist()
        if not isinstance(labels, (list, tuple, range)):
            labels = [labels]
        if len(labels) == 0:
            raise ValueError("labels is empty: give at least one class name or index")
        return [self._label_id(label) for label in labels]

    def _label_id(self, label: str | int) -> int:
        names = self.class_names
        if isinstance(label, str):
            if label in names:
                return names.index(label)
            try:
                index = int(label)
            except ValueError:
                by_lower_case = {name.lower(): name for name in reversed(names)}
                nearest = difflib.get_close_matches(label.lower(), by_lower_case, n=3, cutoff=0.0)
                offer = ", ".join(repr(by_lower_case[name]) for name in nearest)
                raise ValueError(f"unknown label {label!r}: the nearest names are {offer}") from None
        else:
            try:
                index = operator.index(label)
            except TypeError:
                index = None
            if index is None or isinstance(label, bool):
                raise ValueError(f"label {label!r} is neither a class name nor an index")
        if not 0 <= index < self.num_classes:
            raise ValueError(f"label {label!r} is out of range: the labels are 0 to {self.num_classes - 1}")
        return index

    def check_inputs(
        self,
        num_labels: int,
        num_images_per_label: int = 1,
        guidance_scale: float = 3.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 25,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> None:
        """Raise a `ValueError` of one line for the first argument of `__call__` that can't be right."""
        counts = {"num_images_per_label": num_images_per_label, "num_inference_steps": num_inference_steps}
        for name, value in counts.items():
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not _is_finite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number (1 means off), got {guidance_scale!r}")
        if not _is_finite(eta) or eta < 0:
            raise ValueError(f"eta must be a finite number of at least 0, got {eta!r}")
        interval = guidance_interval if isinstance(guidance_interval, (list, tuple)) else ()
        if len(interval) != 2 or not all(map(_is_finite, interval)) or not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(
                "guidance_interval must be two fractions of the trajectory (begin, end) with 0 <= begin < end <= 1, "
                f"got {guidance_interval!r}"
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        batch_size = num_labels * num_images_per_label
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"a generator list must have one for each of {batch_size} images, got {len(generator)}")
        generators = generator if isinstance(generator, list) else [generator] * (generator is not None)
        if not all(isinstance(one, torch.Generator) for one in generators):
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {generator!r}")
        shape = (batch_size, *self.latents_shape)
        if latents is not None and not (isinstance(latents, torch.Tensor) and latents.is_floating_point()):
            raise ValueError(f"latents must be a tensor of floats of the shape {shape}, got {type(latents).__name__}")
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {unknown}"
            )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save a folder that loads anywhere: the stock one, and the source of each class that isn't diffusers' own.

        With `push_to_hub=True` the same is saved again to a temporary folder and uploaded from there, so that nothing
        else that lies in `save_directory` goes along.
        """
        hub_names = ("repo_id", "commit_message", "private", "token", "create_pr")
        hub_options = {name: kwargs.pop(name) for name in hub_names if name in kwargs}
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size, **kwargs)
        folder = Path(save_directory)
        index = _read_json(folder / self.config_name)
        index["_class_name"] = _copy_source(type(self), folder)
        for name, component in self.components.items():
            component_class = type(getattr(component, "_orig_mod", component))  # torch.compile wraps the module
            if index[name][0] == component_class.__module__:  # else the entry is a library, such as "diffusers"
                index[name] = _copy_source(component_class, folder / name)
            for config_file in (folder / name).glob("*config.json"):
                _write_json(config_file, _read_json(config_file))
        _write_json(folder / self.config_name, index)
        if push_to_hub:
            repo_id = hub_options.pop("repo_id", folder.name)
            self.push_to_hub(repo_id, safe_serialization=safe_serialization, variant=variant, **hub_options)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """The stock one, but a class that the installed `flower_ldm` has is taken from there, and needs no trust."""
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, entry in index.items():
            if isinstance(entry, list) and len(entry) == 2 and entry[0] not in (None, "diffusers"):
                installed = getattr(sys.modules.get("flower_ldm"), str(entry[1]), None)
                if isinstance(installed, type):
                    index[name] = [installed.__module__, installed.__name__]
        return loaded

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        # Asked through this class, the pipeline is this class: the copy in the repository need be neither fetched nor
        # trusted. Its components are still looked up by their entries.
        index = super()._dict_from_json_file(json_file)
        return {**index, "_class_name": cls.__name__} if "_class_name" in index else index


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _copy_source(source_class: type, folder: Path) -> list[str]:
    """Copy the file that defines a class into a folder; its entry in `model_index.json`, `[module, class name]`."""
    source = Path(inspect.getfile(source_class))
    (folder / source.name).write_bytes(source.read_bytes())
    return [source.stem, source_class.__name__]


def _read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def _write_json(file: Path, config: dict) -> None:
    """Write a config without `_name_or_path`, which tells where on this machine it was loaded from."""
    config = {name: value for name, value in config.items() if name != "_name_or_path"}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
