"""FlowerLDMPipeline: class labels -> noise, or a noisy image -> guided denoising -> images.

This file is saved at the root of each repository on the Hub. It therefore imports only the standard library, torch,
diffusers, and Pillow, which comes with diffusers. It never asks for the class of its models. They may be
`FlowerAutoencoderKL` and `FlowerUNet2DModel`, or diffusers' own `AutoencoderKL` and `UNet2DModel`. The scheduler may
be any of diffusers' that has `alphas_cumprod`.

Shapes: L labels, B = L x images per label, K classes, Z latent channels, (h, w) latent positions, (H, W) pixels.
"""

import difflib
import functools
import inspect
import io
import itertools
import json
import math
import operator
import os
import re
import sys
import threading
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from copy import copy
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ImagePipelineOutput,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageChops, ImageCms, ImageOps

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
# Measured with the CPU recipe of Oxford 102 Flowers, 25 steps, n = 256. Scales 1, 2, 3 and 4 have Frechet distances of
# 399, 380, 374 and 385, and KIDs of 0.433, 0.380, 0.336 and 0.328.
GUIDANCE_SCALE = 3.0
NUM_INFERENCE_STEPS = 25
STRENGTH = 0.8  # of drawing over an image


class SchedulerFacts(NamedTuple):
    """How one of diffusers' schedulers works in this pipeline.

    The class's signatures say the rest: which options it has, and whether its step takes `eta` or a generator.
    """

    title: str  # as users see it
    scheduler_class: type[SchedulerMixin]
    # With these predictions its first step from pure noise is unbounded, so it starts one step later ("leading").
    unbounded_from_pure_noise: tuple[str, ...] = ()
    prediction_types: tuple[str, ...] = PREDICTION_TYPES
    starts_from_images: bool = True  # False: from pure noise only
    largest_eta: float = math.inf
    only_distilled: bool = False  # images of other models would have too little variance


EPSILON_OR_V = ("epsilon", "v_prediction")
# The keys are the names on the command line.
SCHEDULERS = {
    "dpm++": SchedulerFacts("DPM-Solver++", DPMSolverMultistepScheduler),
    "unipc": SchedulerFacts("UniPC", UniPCMultistepScheduler),
    "ddim": SchedulerFacts("DDIM", DDIMScheduler),
    "euler": SchedulerFacts("Euler", EulerDiscreteScheduler),
    "euler_ancestral": SchedulerFacts(
        "Euler, ancestral", EulerAncestralDiscreteScheduler, prediction_types=EPSILON_OR_V
    ),
    "heun": SchedulerFacts("Heun", HeunDiscreteScheduler, unbounded_from_pure_noise=PREDICTION_TYPES),
    "pndm": SchedulerFacts(  # its first steps differ from the others, so it can't start in the middle
        "PNDM", PNDMScheduler, unbounded_from_pure_noise=("epsilon",), prediction_types=EPSILON_OR_V,
        starts_from_images=False,
    ),
    "ddpm": SchedulerFacts("DDPM", DDPMScheduler),
    "lcm": SchedulerFacts("LCM, for distilled models", LCMScheduler, only_distilled=True),
    "tcd": SchedulerFacts("TCD", TCDScheduler, largest_eta=1.0),  # at most 50 steps; with eta 0 it equals DDIM
}  # fmt: skip
# Every other scheduler that follows training's noise levels works too, but no command offers it. These two can't draw
# in few steps. With a mask, they can't keep the original exactly as noisy as the rest.
OTHER_SCHEDULERS = (
    SchedulerFacts("DPM2", KDPM2DiscreteScheduler, prediction_types=EPSILON_OR_V),
    SchedulerFacts("DPM2, ancestral", KDPM2AncestralDiscreteScheduler, prediction_types=EPSILON_OR_V),
)
# The values of these scheduler options with which latents follow the distribution that the unet has learned. Other
# values clip them, leave training's noise schedule, or need another kind of unet (tests/test_schedulers.py).
HARMLESS_OPTIONS = {
    "use_flow_sigmas": (False,),
    "clip_sample": (False,),
    "thresholding": (False,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "snr_shift_scale": (1.0,),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", None),
}
# With these values a scheduler steps by the predicted noise. From pure noise, that multiplies its error without bound.
STEPS_BY_NOISE = {"algorithm_type": ("dpmsolver", "sde-dpmsolver"), "predict_x0": (False,)}
# No real model or scheduler exceeds these. A config that does is a mistake, or an attempt to exhaust the memory.
MOST_LAYERS = 1001
LARGEST_SIZE = 2**13  # of latents
LARGEST_NUMBERS = {"sample_size": 2**16, "num_train_timesteps": 10**5}  # an autoencoder's sample_size is in pixels
LARGEST_NUMBER = 10**6
_DRAWING: set[int] = set()  # ids of the pipelines and schedulers that are in a call
_DRAWING_LOCK = threading.Lock()

UPRIGHT = {  # EXIF orientation -> the operation that turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_ORIENTATION = 0x0112
TIFF_BITS_PER_SAMPLE, TIFF_PHOTOMETRIC = 0x0102, 0x0106


class Original(NamedTuple):
    """The image that each image to be drawn starts from. Without a mask the last two are None."""

    pixels: torch.Tensor  # (B, 3, H, W) in [0, 1]
    latents: torch.Tensor  # (B, Z, h, w), normalized
    mask: torch.Tensor | None  # (B, 1, H, W) bool, True where the image is redrawn
    latents_mask: torch.Tensor | None  # (B, 1, h, w) bool, True if any of the position's pixels is redrawn


def _one_at_a_time(call: Callable) -> Callable:
    """Refuse a call while another call uses the same pipeline or scheduler.

    Both have state during a call, so the calls would spoil each other's images.
    """

    @functools.wraps(call)
    def alone(self, *args: Any, **kwargs: Any) -> Any:
        holders = {id(self), id(self.scheduler)}
        with _DRAWING_LOCK:
            if holders & _DRAWING:
                raise ValueError(
                    "this pipeline, or another with its scheduler, is drawing already: give each thread or "
                    "callback its own by FlowerLDMPipeline.from_pipe(pipe, "
                    "scheduler=pipe.make_scheduler(type(pipe.scheduler)))"
                )
            _DRAWING.update(holders)
        try:
            return call(self, *args, **kwargs)
        finally:
            with _DRAWING_LOCK:
                _DRAWING.difference_update(holders)

    return alone


class FlowerLDMPipeline(DiffusionPipeline):
    """Class-conditional latent diffusion (Rombach et al. 2022): draws images of given classes.

    Args:
        vae: decodes raw latents `(B, Z, h, w)` to images `(B, 3, H, W)` in [-1, 1].
        unet: `unet(noisy_latents, timesteps, class_labels).sample`, on latents `(B, Z, h, w)` of unit variance. Its
            config has `num_classes` (K; label K is the null label) or `num_class_embeds` (the last label is).
        scheduler: one of diffusers' schedulers with a table `alphas_cumprod`, the noise schedule of training.
        id2label: the name of each label `0..K-1`, each once. The config keeps it with strings as keys, as in JSON.
        guide: a worse unet for the same latents and classes, with fewer updates or parameters. Guidance then leads
            away from the guide instead of the null label (autoguidance, Karras et al. 2024, "Guiding a Diffusion Model
            with a Bad Version of Itself").
        guidance_scale, guidance_interval: the defaults of a call, which the config keeps.
        takes_guidance: False if the unet's null label was never trained, or if guidance was distilled into the unet.
            Then only a `guide` can guide it.

    Raises:
        ValueError: the unet takes no class labels, `id2label` doesn't name each of its classes once, the guide is for
            other latents or classes, or a guidance argument is invalid.
    """

    model_cpu_offload_seq = "unet->vae"  # the guide runs in turns with the unet and isn't offloaded
    _optional_components = ["guide"]
    _callback_tensor_inputs = ["latents", "denoised_latents"]

    def __init__(
        self,
        vae: torch.nn.Module,
        unet: torch.nn.Module,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        guide: torch.nn.Module | None = None,
        guidance_scale: float | int = GUIDANCE_SCALE,
        guidance_interval: list | tuple = (0.0, 1.0),
        takes_guidance: bool = True,
    ):
        super().__init__()
        _check_models(vae, unet, guide)
        for name, model in {"vae": vae, "unet": unet, "guide": guide}.items():
            _check_weights(name, model)
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler, guide=guide)
        if id2label is not None:
            id2label = _check_names(id2label, self.num_classes)
        _check_guidance(guidance_scale, guidance_interval)
        if not isinstance(takes_guidance, bool):
            raise ValueError(f"takes_guidance must be true or false, got {_shown(takes_guidance)}")
        self.register_to_config(
            id2label=id2label, guidance_scale=float(guidance_scale),
            guidance_interval=[float(fraction) for fraction in guidance_interval], takes_guidance=takes_guidance,
        )  # fmt: skip
        self._interrupt = False
        self._num_timesteps = 0
        self._guidance_scale = self.default_guidance_scale

    @property
    def null_label(self) -> int:
        """The label that means "any class". The labels below it are the classes."""
        return _null_label(self.unet)

    @property
    def num_classes(self) -> int:
        return self.null_label

    @property
    def class_names(self) -> list[str]:
        """The name of each label in order. Without `id2label`, the labels as text."""
        id2label = self.config.id2label or {}
        return [id2label.get(str(label), str(label)) for label in range(self.num_classes)]

    @property
    def interrupt(self) -> bool:
        """Whether to stop early. After a callback sets `pipe._interrupt = True`, the present latents are decoded."""
        return self._interrupt

    @property
    def can_guide(self) -> bool:
        """Whether a call may have a `guidance_scale` other than 1, by the null label or by a guide."""
        return self.config.takes_guidance or self.guide is not None

    @property
    def default_guidance_scale(self) -> float:
        """The scale of a call that gives none."""
        return self.config.guidance_scale if self.can_guide else 1.0

    @property
    def guidance_scale(self) -> float:
        """The scale of the following steps. A callback can change it by `pipe._guidance_scale = 2.0`.

        1 turns guidance off, not 0 as in text-to-image pipelines. Each call begins with its own argument.
        """
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps of the latest call. With an `image` these are only the scheduler's last ones."""
        return self._num_timesteps

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """`(Z, h, w)` of one image's latents."""
        return _latents_shape(self.unet)

    @property
    def image_size(self) -> tuple[int, int]:
        """`(H, W)` of an image in pixels."""
        factor = getattr(self.vae, "downsample_factor", None) or 2 ** (len(self.vae.config.block_out_channels) - 1)
        _, height, width = self.latents_shape
        return factor * height, factor * width

    @torch.no_grad()
    @_one_at_a_time
    def __call__(
        self,
        labels: str | int | dict | Sequence[str | int | dict] | torch.Tensor,
        num_images_per_label: int = 1,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: int = NUM_INFERENCE_STEPS,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_rescale: float = 0.0,
        image: Any = None,
        strength: float = STRENGTH,
        mask_image: Any = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw `num_images_per_label` images of each label, label by label.

        Args:
            labels: a name, an index, or several of either. If the unet takes sums of class embeddings, as
                `FlowerUNet2DModel` does, a label may also be a dict of names or indices and their weights. Weights may
                be negative and sum to 1: `{"rose": 1, "tulip": 0.5, "daisy": -0.5}`. All weights may also be given as
                a float tensor `(L, K)`.
            guidance_scale: classifier-free guidance (Ho & Salimans 2022, eq. 6 with scale = 1 + w); 1 means off. With
                a `guide`, autoguidance (Karras et al. 2024, eq. 3). None: the model's own, `default_guidance_scale`.
            guidance_interval: the part of the trajectory in which guidance acts, as two fractions: 0 is pure noise, 1
                the clean image (Kynkäänniemi et al. 2024). Outside it a step costs half. None: the model's own.
            num_inference_steps: number of steps from pure noise. With an `image` there are `strength` times as many.
            eta: share of DDIM's noise (Song et al. 2021, eq. 16). Schedulers without it ignore it.
            generator: one generator, or a list of B. With a list, an image doesn't depend on the others in its batch.
            latents: `(B, Z, h, w)` standard normal noise to start from. None: noise from `generator`.
            output_type: "pil"; "np" `(B, H, W, 3)` or "pt" `(B, 3, H, W)` float32 in [0, 1]; "latent" `(B, Z, h, w)`,
                normalized to unit variance as the unet sees them.
            callback_on_step_end: called as `(pipe, step_index, timestep, {"latents": latents})` after each step. If it
                returns a dict with "latents", they replace the present ones.
            callback_on_step_end_tensor_inputs: the keys of that dict: "latents" after the step, as the scheduler
                scales them; "denoised_latents", the clean latents predicted in the step (`predict_denoised_latents`).
            guidance_rescale: high scales increase the standard deviation of a prediction. This is the share of the
                increase that is undone, from 0 to 1 (Lin et al. 2023, eq. 15 and 16, who use 0.7).
            image: one image to start from, or one for each label. PIL images may have any mode and size: they are
                converted by `upright_srgb` and cropped to the center. Or outputs of this call of the type "np" or
                "pt", as one batch or a list of batches.
            strength: the share of the steps that is run from `image`, in (0, 1]. Near 0 the image hardly changes; with
                1 nothing of it is left, apart from what a mask keeps.
            mask_image: white where the image is redrawn, black or transparent where each pixel is kept. It has the
                size of `image`, or is a float tensor `(1, H, W)` or `(H, W)` of the size that is drawn.

        Returns:
            `ImagePipelineOutput` with `images`, or `(images,)` with `return_dict=False`.

        Raises:
            ValueError: an argument is invalid, which is found before anything is computed. Or this pipeline or its
                scheduler is in another call, in another thread or around a callback.
        """
        class_labels = self.prepare_class_labels(labels)  # (L,) or (L, K + 1)
        self.check_inputs(
            num_labels=len(class_labels), num_images_per_label=num_images_per_label, guidance_scale=guidance_scale,
            guidance_interval=guidance_interval, num_inference_steps=num_inference_steps, eta=eta,
            generator=generator, latents=latents, output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            guidance_rescale=guidance_rescale, image=image, strength=strength, mask_image=mask_image,
        )  # fmt: skip
        device = self._execution_device
        class_labels = class_labels.to(device).repeat_interleave(num_images_per_label, dim=0)  # (B,) or (B, K + 1)
        original = self.prepare_original(image, mask_image, len(class_labels), device)
        timesteps = self.prepare_timesteps(num_inference_steps, 1 if original is None else strength, device)
        noise = self.prepare_noise(len(class_labels), generator, latents, device)  # (B, Z, h, w)
        latents = self.prepare_latents(noise, original, strength, timesteps)  # (B, Z, h, w)
        step_options = self.prepare_extra_step_kwargs(generator, eta)
        self._guidance_scale, (begin, end) = self.resolve_guidance(guidance_scale, guidance_interval)
        self._num_timesteps, self._interrupt = len(timesteps), False
        num_skipped = len(self.scheduler.timesteps) - len(timesteps)
        watched = () if callback_on_step_end is None else callback_on_step_end_tensor_inputs

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step_index, timestep in enumerate(timesteps):
                if self.interrupt:
                    break
                progress = (num_skipped + step_index) / len(self.scheduler.timesteps)
                scale = self.guidance_scale if begin <= progress < end else 1
                prediction = self.predict(latents, timestep, class_labels, scale, guidance_rescale)
                tensors = {}
                if "denoised_latents" in watched:
                    tensors["denoised_latents"] = self.predict_denoised_latents(prediction, latents, timestep)
                latents = self.scheduler.step(prediction, timestep, latents, **step_options).prev_sample
                if original is not None and original.mask is not None:
                    latents = self.keep_original(latents, original, noise, timesteps[step_index + 1 : step_index + 2])
                if "latents" in watched:
                    tensors["latents"] = latents
                if callback_on_step_end is not None:
                    latents = (callback_on_step_end(self, step_index, timestep, tensors) or {}).get("latents", latents)
                progress_bar.update()

        images = self._to_images(latents, output_type, original, num_inference_steps)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def make_scheduler(self, scheduler_class: type[SchedulerMixin]) -> SchedulerMixin:
        """Make another of diffusers' schedulers for this unet, to replace `scheduler`.

        It is the result of `from_config`, with one exception. Heun's method and PNDM must start one step below pure
        noise, so their `timestep_spacing` is "leading". Schedulers made from those start at pure noise again.
        """
        spacing = {}
        if _facts(scheduler_class).unbounded_from_pure_noise:
            spacing = {"timestep_spacing": "leading"}
        elif _facts(type(self.scheduler)).unbounded_from_pure_noise:
            spacing = {"timestep_spacing": "trailing"}
        return scheduler_class.from_config(self.scheduler.config, **spacing)

    def resolve_guidance(
        self, scale: float | None = None, interval: Sequence[float] | None = None
    ) -> tuple[float, Sequence[float]]:
        """Guidance scale and interval of a call. The model's own replace None."""
        return (
            self.default_guidance_scale if scale is None else scale,
            self.config.guidance_interval if interval is None else interval,
        )

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        guidance_scale: float = 1,
        guidance_rescale: float = 0.0,
    ) -> torch.Tensor:
        """The unet's prediction `(B, Z, h, w)` for the scheduler's step, guided unless `guidance_scale` is 1.

        Guidance takes one pass over a batch of `2 B`: half with the labels, half with the null label. With a `guide`,
        unet and guide take one pass each over `B`, both with the labels.
        """
        noisy_latents = self.scheduler.scale_model_input(latents, timestep)
        if guidance_scale == 1:
            return _run(self.unet, noisy_latents, timestep, class_labels)
        if self.guide is not None:
            conditional = _run(self.unet, noisy_latents, timestep, class_labels)
            worse = _run(self.guide, noisy_latents, timestep, class_labels)
        else:
            noisy_latents = torch.cat([noisy_latents, noisy_latents])  # (2 B, Z, h, w)
            class_labels = torch.cat([class_labels, self._null_labels(class_labels)])  # (2 B,) or (2 B, K + 1)
            conditional, worse = _run(self.unet, noisy_latents, timestep, class_labels).chunk(2)
        scale = float(guidance_scale)  # torch takes no whole number beyond 64 bits
        guided = worse + scale * (conditional - worse)
        if guidance_rescale == 0:
            return guided
        excess = guided.std(dim=(1, 2, 3), keepdim=True) / conditional.std(dim=(1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
        return guidance_rescale * guided / excess + (1 - guidance_rescale) * guided

    def predict_denoised_latents(
        self, prediction: torch.Tensor, latents: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """The normalized clean latents `(B, Z, h, w)` that follow from a prediction at this step, without clipping.

        The noisy latents are alpha x clean + sigma x noise. The prediction is the clean latents, the noise, or the
        velocity alpha x noise - sigma x clean (Salimans & Ho 2022). Call this before the scheduler's step.

        Raises:
            ValueError: the scheduler's `prediction_type` is none of the three.
        """
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "sample":
            return prediction
        alpha, sigma = self.signal_and_noise(timestep)
        # They have unit variance with every scheduler, since this scales those whose variance grows with the noise.
        noisy_latents = self.scheduler.scale_model_input(latents, timestep)
        if prediction_type == "epsilon":
            return (noisy_latents - sigma * prediction) / alpha
        if prediction_type == "v_prediction":
            return alpha * noisy_latents - sigma * prediction
        raise ValueError(f"prediction_type must be epsilon, sample or v_prediction, got {_shown(prediction_type)}")

    def signal_and_noise(self, timestep: torch.Tensor | float) -> tuple[float, float]:
        """`(alpha, sigma)`, the shares of clean latents and of noise in noisy latents. Their squares sum to 1.

        Between two timesteps sigma / alpha is interpolated, as in the schedulers with fractional timesteps.
        """
        timestep = float(timestep)
        alphas_cumprod = self.scheduler.alphas_cumprod
        lower = min(max(math.floor(timestep), 0), len(alphas_cumprod) - 1)
        variance = float(alphas_cumprod[lower])  # of the signal
        fraction = timestep - lower
        if fraction > 0 and lower + 1 < len(alphas_cumprod):
            next_variance = float(alphas_cumprod[lower + 1])
            if next_variance == 0:  # pure noise: the ratio is infinite
                return math.sqrt(variance), math.sqrt(1 - variance)
            low, high = math.sqrt(1 / variance - 1), math.sqrt(1 / next_variance - 1)
            variance = 1 / (1 + (low + fraction * (high - low)) ** 2)
        return math.sqrt(variance), math.sqrt(1 - variance)

    def prepare_timesteps(self, num_inference_steps: int, strength: float, device: torch.device) -> torch.Tensor:
        """The scheduler's timesteps: all with `strength` 1, or else the last share `strength`, at least one step."""
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        begin = num_inference_steps - max(1, round(strength * num_inference_steps))
        begin *= self.scheduler.order  # a step of Heun's method has two timesteps
        if hasattr(self.scheduler, "set_begin_index"):  # or it finds its place by the timestep, which may repeat
            self.scheduler.set_begin_index(begin)
        return self.scheduler.timesteps[begin:]

    def prepare_noise(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Standard normal noise `(B, Z, h, w)` in float32 or wider, or the given `latents`.

        Latents keep this precision between steps with every dtype of the unet. In bfloat16 they would drift, since
        each small step would be rounded. Noise is drawn in float32, so a seed gives the same noise for all dtypes.
        """
        if latents is None:
            latents = randn_tensor((batch_size, *self.latents_shape), generator, device, torch.float32)
        return latents.to(device, torch.promote_types(self.unet.dtype, torch.float32))

    def prepare_latents(
        self, noise: torch.Tensor, original: Original | None, strength: float, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The first latents `(B, Z, h, w)`: the noise, or an original with the noise of the first timestep."""
        if original is None or strength == 1:
            return noise * self.scheduler.init_noise_sigma
        return self.scheduler.add_noise(original.latents, noise, timesteps[:1])

    def prepare_original(self, image: Any, mask_image: Any, batch_size: int, device: torch.device) -> Original | None:
        """Pixels and latents of `image` and its mask, repeated for the batch. None without an image."""
        if image is None:
            return None
        pixels = self._to_pixels(image, "image").to(device)  # (1 or L, 3, H, W)
        latents = self.encode_images(2 * pixels - 1).to(device, torch.promote_types(self.unet.dtype, torch.float32))
        mask = latents_mask = None
        if mask_image is not None:
            mask = self._to_pixels(mask_image, "mask_image").to(device)  # (1 or L, 1, H, W)
            latents_mask = torch.nn.functional.adaptive_max_pool2d(mask, latents.shape[2:])
            mask, latents_mask = mask >= 0.5, latents_mask >= 0.5
        tensors = (pixels, latents, mask, latents_mask)
        return Original(
            *(None if one is None else one.repeat_interleave(batch_size // len(one), 0) for one in tensors)
        )

    def _to_pixels(self, images: Any, name: str) -> torch.Tensor:
        """One image or several -> `(L, 3, H, W)` float32 in [0, 1]. Masks -> `(L, 1, H, W)`.

        Raises:
            ValueError: an image is neither a PIL image nor floats in [0, 1] of the shape that is drawn.
        """
        height, width = self.image_size
        channels, mode = (1, "L") if name == "mask_image" else (3, "RGB")
        processor = VaeImageProcessor()
        pixels = []
        for image in _as_list(images):
            if isinstance(image, Image.Image):
                image = upright_srgb(image, "black" if name == "mask_image" else "white").convert(mode)
                image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
                image = processor.numpy_to_pt(processor.pil_to_numpy(image))[0]
            elif hasattr(image, "__array_interface__"):  # numpy's
                image = torch.as_tensor(image)
                image = image.movedim(-1, 0) if image.ndim == 3 else image
            if getattr(image, "ndim", 0) == 2:  # a mask without channels
                image = image[None]
            if not (isinstance(image, torch.Tensor) and image.is_floating_point()):
                raise ValueError(f"{name} must be a PIL image or an array or tensor of floats, got {_kind(image)}")
            if image.shape != (channels, height, width):
                raise ValueError(
                    f"{name} as a tensor must have the shape {(channels, height, width)}, as an array "
                    f"{(height, width, channels)}, got a tensor of {tuple(image.shape)}"
                )
            if not ((image >= 0) & (image <= 1)).all():
                raise ValueError(f"{name} must hold floats in [0, 1]")
            pixels.append(image.float())
        return torch.stack(pixels)

    def keep_original(
        self, latents: torch.Tensor, original: Original, noise: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """Replace the latents by the original's where its mask is False.

        `timestep` is the next one, `(1,)`: the original gets its noise. After the last step it is empty, `(0,)`, and
        the original stays clean.
        """
        kept = original.latents
        if len(timestep) > 0:
            kept = self.scheduler.add_noise(kept, noise, timestep)
        return torch.where(original.latents_mask, latents, kept)

    def prepare_extra_step_kwargs(self, generator: torch.Generator | list[torch.Generator] | None, eta: float) -> dict:
        """`eta` and `generator`, if the scheduler's step takes them."""
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in {"generator": generator, "eta": eta}.items() if name in accepted}

    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil", original: Original | None = None) -> Any:
        """Normalized latents `(B, Z, h, w)` -> images of `output_type` "pil", "np" or "pt".

        Where an original's mask is False, its own pixels are pasted in. They stay the same bit for bit, unlike
        pixels that the autoencoder reconstructs.
        """
        raw_latents = self._denormalize(latents).to(self.vae.dtype)
        images = self.vae.decode(raw_latents).sample.float()  # (B, 3, H, W) in [-1, 1]
        images = (images / 2 + 0.5).clamp(0, 1)
        if original is not None and original.mask is not None:
            images = torch.where(original.mask, images, original.pixels)
        return self._to_arrays(images, output_type)

    def check_weights(self) -> None:
        """Raise `ValueError` if a weight of a model is not finite, as in a damaged file."""
        _check_finite(vae=self.vae, unet=self.unet, guide=self.guide)

    def _to_arrays(self, images: torch.Tensor, output_type: str) -> Any:
        """Images `(B, 3, H, W)` in [0, 1] as PIL images or arrays `(B, H, W, 3)`. Other types get them unchanged."""
        if output_type not in ("np", "pil"):
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        return images if output_type == "np" else self.numpy_to_pil(images)

    def _to_images(
        self, latents: torch.Tensor, output_type: str, original: Original | None, num_inference_steps: int
    ) -> Any:
        """The images of a call from its last latents. NaN and infinity, which would look black, are refused."""
        images = latents if output_type == "latent" else self.decode_latents(latents, "pt", original)
        self.maybe_free_model_hooks()
        if not images.isfinite().all():
            self.check_weights()
            raise ValueError(
                f"{_kind(self.scheduler)} gave numbers that are not finite in {num_inference_steps} steps: take "
                "another number of steps, another scheduler, or a wider dtype"
            )
        return self._to_arrays(images, output_type)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] -> the means of their latents `(B, Z, h, w)`, normalized, float32."""
        images = images.to(self._execution_device, self.vae.dtype)  # an offloaded autoencoder moves there, too
        raw_latents = self.vae.encode(images).latent_dist.mean.float()
        mean, std = self._latents_statistics(raw_latents)
        return (raw_latents - mean) / std

    def _denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._latents_statistics(latents)
        return latents * std + mean

    def _latents_statistics(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """The autoencoder's `latents_statistics`, mean and std, as tensors `(1, Z, 1, 1)` like the latents."""
        return [latents.new_tensor(values).view(1, -1, 1, 1) for values in latents_statistics(self.vae)]

    def prepare_class_labels(
        self, labels: str | int | dict | Sequence[str | int | dict] | torch.Tensor
    ) -> torch.Tensor:
        """Labels for the unet: indices `(L,)` int64, or for sums of classes the weights `(L, K + 1)` of embeddings.

        Raises:
            ValueError: a label is unknown, weights don't sum to 1, or there is a sum of classes but the unet takes
                single classes only.
        """
        if any(isinstance(label, dict) for label in _as_list(labels)):
            labels = self._weights(_as_list(labels))
        if not (isinstance(labels, torch.Tensor) and labels.is_floating_point() and labels.ndim == 2):
            return torch.tensor(self.get_label_ids(labels))
        for unet in (self.unet, self.guide):
            if unet is not None and not getattr(unet, "takes_class_mixtures", False):
                raise ValueError(
                    f"labels are mixtures of classes, but {_kind(unet)} takes single ones: give names or indices"
                )
        if labels.shape[0] == 0 or labels.shape[1] != self.num_classes:
            raise ValueError(
                f"labels as mixtures must have the shape (L, {self.num_classes}), a weight for each class, "
                f"got {tuple(labels.shape)}"
            )
        if not (labels.isfinite().all() and ((labels.sum(dim=1) - 1).abs() < 1e-2).all()):
            raise ValueError("labels as mixtures must hold finite weights that sum to 1 in each row")
        return torch.nn.functional.pad(labels, (0, 1))  # no share of the null label

    def _weights(self, labels: Sequence[str | int | dict]) -> torch.Tensor:
        """Labels and dicts of labels with their weights -> weights `(L, K)`."""
        shares = [
            (row, name, weight)
            for row, label in enumerate(labels)
            for name, weight in (label.items() if isinstance(label, dict) else [(label, 1.0)])
        ]
        for _, name, weight in shares:
            if not _is_finite(weight):
                raise ValueError(f"the weight of {_shown(name)} must be a finite number, got {weight!r}")
        indices = find_classes([name for _, name, _ in shares], self.class_names)
        weights = torch.zeros(len(labels), self.num_classes)
        for (row, _, weight), index in zip(shares, indices, strict=True):
            weights[row, index] += weight
        return weights

    def _null_labels(self, class_labels: torch.Tensor) -> torch.Tensor:
        """The same number of null labels in the same form: indices `(B,)` or weights `(B, K + 1)`."""
        if not class_labels.is_floating_point():
            return torch.full_like(class_labels, self.null_label)
        weights = torch.zeros_like(class_labels)
        weights[:, self.null_label] = 1
        return weights

    def get_label_ids(self, labels: str | int | Sequence[str | int] | torch.Tensor) -> list[int]:
        """Names and indices -> indices, by `find_classes`.

        Raises:
            ValueError: a name is unknown (the message offers the nearest), a label is out of range, or there is none.
        """
        if hasattr(labels, "tolist"):  # tensors and arrays
            labels = labels.tolist()
        if not isinstance(labels, (list, tuple, range)):
            labels = [labels]
        if len(labels) == 0:
            raise ValueError("labels is empty: give at least one class name or index")
        return find_classes(labels, self.class_names)

    def check_inputs(self, *, num_labels: int, **options: Any) -> None:
        """Check arguments of `__call__`, without any change to the pipeline.

        Args:
            num_labels: the number of labels.
            options: other arguments of `__call__`, by name. The others have their defaults.

        Raises:
            ValueError: an argument is invalid. One line names the first.
        """
        bound = inspect.signature(self.__call__).bind(labels=None, **options)
        bound.apply_defaults()
        call = SimpleNamespace(**bound.arguments)
        _check_models(self.vae, self.unet, self.guide)
        self._check_scheduler()
        for name in ("num_images_per_label", "num_inference_steps"):
            value = getattr(call, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {_shown(value)}")
        self._check_timesteps(call.num_inference_steps)
        self._check_guidance(call.guidance_scale, call.guidance_interval, call.guidance_rescale)
        largest_eta = _facts(type(self.scheduler)).largest_eta
        if not _is_finite(call.eta) or not 0 <= call.eta <= largest_eta:
            most = f" and at most {largest_eta:g} with {_kind(self.scheduler)}" if largest_eta < math.inf else ""
            raise ValueError(f"eta must be a finite number of at least 0{most}, got {_shown(call.eta)}")
        if call.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {_shown(call.output_type)}")
        self._check_noise(num_labels * call.num_images_per_label, call.generator, call.latents)
        names = call.callback_on_step_end_tensor_inputs
        if not isinstance(names, (list, tuple)) or any(name not in self._callback_tensor_inputs for name in names):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {_shown(names)}"
            )
        self._check_original(num_labels, call.image, call.strength, call.mask_image)

    def _check_guidance(self, scale: Any, interval: Any, rescale: Any) -> None:
        scale, interval = self.resolve_guidance(scale, interval)
        _check_guidance(scale, interval)
        if scale != 1 and not self.can_guide:
            raise ValueError(
                f"guidance_scale must be 1, got {scale:g}: this model takes no guidance, since its null label was not "
                "trained or guidance was distilled into it; only a guide could guide it"
            )
        if not _is_finite(rescale) or not 0 <= rescale <= 1:
            raise ValueError(f"guidance_rescale must be from 0 (off) to 1, got {_shown(rescale)}")

    def _check_noise(self, batch_size: int, generator: Any, latents: Any) -> None:
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"a generator list must have one for each of {batch_size} images, got {len(generator)}")
        generators = generator if isinstance(generator, list) else [generator] * (generator is not None)
        if not all(isinstance(one, torch.Generator) for one in generators):
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {_shown(generator)}")
        if latents is None:
            return
        shape = (batch_size, *self.latents_shape)
        if not (isinstance(latents, torch.Tensor) and latents.is_floating_point()):
            raise ValueError(f"latents must be a tensor of floats of the shape {shape}, got {type(latents).__name__}")
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}")
        if not latents.isfinite().all():
            raise ValueError("latents must hold finite numbers")

    def _check_original(self, num_labels: int, image: Any, strength: float, mask_image: Any) -> None:
        if not _is_finite(strength) or not 0 < strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {_shown(strength)}")
        if image is None:
            if mask_image is not None:
                raise ValueError("mask_image needs an image: give the image that it masks")
            return
        if strength < 1 and not _facts(type(self.scheduler)).starts_from_images:
            raise ValueError(
                f"{_kind(self.scheduler)} can't start from an image: take another scheduler, or strength 1"
            )
        images, masks = _as_list(image), _as_list(mask_image)
        for name, given in {"image": images, "mask_image": masks}.items():
            if len(given) not in (1, num_labels):
                raise ValueError(f"{name} must be one or one for each of {num_labels} labels, got {len(given)}")
        self._to_pixels(image, "image")
        if mask_image is None:
            return
        self._to_pixels(mask_image, "mask_image")
        for index in range(max(len(images), len(masks))):
            one, mask = images[index % len(images)], masks[index % len(masks)]
            if not isinstance(mask, Image.Image):  # floats are of the size that is drawn
                continue
            size = _upright_size(one) if isinstance(one, Image.Image) else self.image_size[::-1]
            if (given := _upright_size(mask)) != size:
                raise ValueError(f"mask_image must have the image's size, {size} in width and height, got {given}")

    def _check_timesteps(self, num_inference_steps: int) -> None:
        """Refuse a number of steps whose timesteps don't start at pure noise.

        Only the scheduler knows its timesteps, and only after setting them, so a copy sets them.
        """
        scheduler = copy(self.scheduler)
        kind, most = _kind(scheduler), scheduler.config.num_train_timesteps
        if num_inference_steps > most:
            raise ValueError(
                f"num_inference_steps must be at most {most}, as many as training has, got {num_inference_steps}"
            )
        try:
            scheduler.set_timesteps(num_inference_steps)
            first, highest = int(scheduler.timesteps[0]), int(scheduler.timesteps.max())
        except Exception as error:  # too few or too many for this scheduler, or a damaged config
            reason = " ".join(str(error).split())
            raise ValueError(f"{kind} can't take {num_inference_steps} steps: {reason}") from None
        if highest >= most:
            raise ValueError(f"{kind} goes to timestep {highest}, beyond training's {most - 1}: check steps_offset")
        signal = scheduler.alphas_cumprod[first]  # its share of the variance
        # "leading" timesteps start one step below pure noise, or far more if their number doesn't divide training's.
        if signal > 0.1 or (signal > 0.01 and most - 1 - first > 2 * most / num_inference_steps):
            raise ValueError(
                f"{kind} can't take {num_inference_steps} steps: with so many it starts at timestep {first}, far "
                "below pure noise: take another number, or timestep_spacing='trailing'"
            )

    def _check_scheduler(self) -> None:
        """Refuse settings with which diffusers' schedulers draw wrong images silently, or fail in the middle."""
        kind, config = _kind(self.scheduler), self.scheduler.config
        if (
            not hasattr(self.scheduler, "alphas_cumprod")  # it has noise levels of its own
            or kind.endswith("InverseScheduler")  # from images to noise
            or not self._can_step()
        ):
            raise ValueError(f"{kind} can't follow the noise schedule of training: take another scheduler")
        levels, most = self.scheduler.alphas_cumprod, config.num_train_timesteps
        falls = levels[1:] <= levels[:-1] + 1e-6  # some schedulers replace a last 0 by such a number
        if not 0 < len(levels) == most or not ((levels >= 0) & (levels <= 1)).all() or not falls.all():
            raise ValueError(
                f"{kind} has no noise schedule of {most} betas from 0 to 1: check trained_betas and the others"
            )
        known = inspect.signature(type(self.scheduler).__init__).parameters  # `from_config` keeps unknown options, too
        for name, harmless in HARMLESS_OPTIONS.items():
            if name in known and config.get(name) not in harmless:
                raise ValueError(
                    f"{kind} with {name}={_shown(config.get(name))} doesn't follow the noise schedule of training: "
                    f"take {kind}.from_config(pipe.scheduler.config, {name}={harmless[0]!r}), or set {name} so in "
                    "scheduler/scheduler_config.json"
                )
        if "use_beta_sigmas" in known and config.use_beta_sigmas and levels[-1] < 1e-3:
            raise ValueError(f"{kind} with use_beta_sigmas=True spends its steps on nearly pure noise: take False")
        self._check_prediction_type()

    def _can_step(self) -> bool:
        """Whether the scheduler's step needs no more than the prediction, the timestep and the latents."""
        if not (hasattr(self.scheduler, "step") and hasattr(self.scheduler, "order")):
            return False
        parameters = inspect.signature(self.scheduler.step).parameters.values()
        return sum(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters) <= 3

    def _check_prediction_type(self) -> None:
        kind, config = _kind(self.scheduler), self.scheduler.config
        prediction_type = config.get("prediction_type")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {_shown(prediction_type)}"
            )
        facts = _facts(type(self.scheduler))
        if prediction_type not in facts.prediction_types:
            raise ValueError(f"{kind} can't follow a unet that predicts the {prediction_type}: take another scheduler")
        from_pure_noise = self.scheduler.alphas_cumprod[-1] < 1e-6  # the signal's share of the variance
        unbounded = prediction_type in facts.unbounded_from_pure_noise
        if unbounded and config.timestep_spacing != "leading" and from_pure_noise:
            raise ValueError(f"{kind} can't start from pure noise: take pipe.make_scheduler({kind})")
        for name, steps_by_noise in STEPS_BY_NOISE.items():
            if config.get(name) in steps_by_noise and from_pure_noise:
                raise ValueError(
                    f"{kind} with {name}={_shown(config[name])} can't start from pure noise: take its default"
                )
        if not config.get("rescale_betas_zero_snr"):  # `from_config` keeps it even if the scheduler doesn't know it
            return
        if "rescale_betas_zero_snr" not in inspect.signature(type(self.scheduler).__init__).parameters:
            raise ValueError(
                f"{kind} knows no zero terminal SNR, with which the unet was trained: take another scheduler"
            )
        if prediction_type == "epsilon":
            raise ValueError(
                "zero terminal SNR can't go with prediction_type epsilon, which is undefined at pure noise"
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
        """Save a folder that loads anywhere: diffusers' own, and the source of each class that isn't in diffusers.

        With `push_to_hub=True` it is saved to a temporary folder, too, and uploaded from there. Other files in
        `save_directory` are never uploaded.
        """
        hub_names = ("repo_id", "commit_message", "private", "token", "create_pr")
        hub_options = {name: kwargs.pop(name) for name in hub_names if name in kwargs}
        self.register_modules(guide=self.guide)  # diffusers would still save a guide as None that was None at first
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size, **kwargs)
        folder = Path(save_directory)
        index = _read_json(folder / self.config_name)
        index["_class_name"] = _copy_source(type(self), folder)
        for name, component in self.components.items():
            component_class = _class_of(component)
            brings_source = index[name][0] == component_class.__module__  # else a library, such as "diffusers"
            if brings_source:
                index[name] = _copy_source(component_class, folder / name)
            for config_file in (folder / name).glob("*config.json"):
                config = _read_json(config_file)
                if brings_source and isinstance(component, torch.nn.Module):  # `AutoModel` finds it by this
                    config["auto_map"] = {"AutoModel": ".".join(index[name])}
                _write_json(config_file, config)
        _write_json(folder / self.config_name, index)
        if push_to_hub:
            repo_id = hub_options.pop("repo_id", folder.name)
            self.push_to_hub(repo_id, safe_serialization=safe_serialization, variant=variant, **hub_options)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "FlowerLDMPipeline":
        """As in diffusers, which takes over models of exactly the annotated types only. Here all are taken over."""
        models = {name: model for name, model in pipeline.components.items() if name in ("vae", "unet", "guide")}
        return super().from_pipe(pipeline, **(models | kwargs))

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, but classes of the installed `flower_ldm` are used, which needs no trust_remote_code."""
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        if args and os.path.isdir(args[0]):  # a downloaded repository, before its models are built
            _check_configs(Path(args[0]), index)
        for name, entry in index.items():
            if isinstance(entry, list) and len(entry) == 2 and entry[0] not in (None, "diffusers"):
                installed = getattr(sys.modules.get("flower_ldm"), str(entry[1]), None)
                if isinstance(installed, type):
                    index[name] = [installed.__module__, installed.__name__]
        return loaded

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        # `FlowerLDMPipeline.from_pretrained` always loads this class, so that the copy in the repository is neither
        # downloaded nor trusted. The components are still found by their entries.
        index = super()._dict_from_json_file(json_file)
        return {**index, "_class_name": cls.__name__} if "_class_name" in index else index


def upright_srgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Any image as 8-bit sRGB, as a good viewer shows it. Pixels that are 8-bit sRGB already stay the same.

    The image is turned by its EXIF orientation and converted from its color profile. 16 bits are scaled to 8.
    Transparent pixels show `background`. Unreadable metadata is ignored.

    Raises:
        ValueError: the range of the pixels is unknown.
    """
    orientation = _orientation(image)
    colors, alpha = _eight_bits(image)
    colors = _from_profile(colors, image.info.get("icc_profile"))
    if alpha is not None:
        colors.putalpha(alpha)
        colors = Image.alpha_composite(Image.new("RGBA", colors.size, background), colors).convert("RGB")
    if orientation in UPRIGHT:
        colors = colors.transpose(UPRIGHT[orientation])
    colors.info = {}  # otherwise orientation and profile would be applied twice
    return colors


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8. This loads the image."""
    filename = getattr(image, "filename", "")
    if hasattr(image, "tag_v2"):
        image.filename = ""  # or Pillow maps the TIFF into memory by its name and scrambles orientations 5 to 8
    image.load()  # first, since here Pillow turns TIFFs, and only these, and removes their orientation
    if filename:
        image.filename = filename
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # broken metadata raises SyntaxError, struct.error, ValueError and more
        return 1
    return orientation if orientation in UPRIGHT else 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as `upright_srgb` gives them."""
    return image.size[::-1] if _orientation(image) > 4 else image.size


def _eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colors of a loaded image in mode L, RGB or CMYK, and its alpha in mode L or None."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.has_transparency_data:
        transparent = image.info.get("transparency")
        if isinstance(transparent, tuple) and max(transparent) > 255:  # 16-bit; of pixels Pillow keeps 8
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
        rgba = image.convert("RGBA")
        gray = image.mode in ("1", "L", "LA")
        return rgba.getchannel("R") if gray else rgba.convert("RGB"), rgba.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _from_16_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """`_eight_bits` for gray of 16 bits, or of 12 bits in some TIFF files.

    Arrays of integers have mode I, too. If all are below 256, they may be nearly black or have 8 bits: refused.
    """
    if image.mode == "F":
        raise ValueError("pixels of mode F are floats, whose value for white is unknown: store them as uint8")
    tags = getattr(image, "tag_v2", {})
    white = 4095 if tags.get(TIFF_BITS_PER_SAMPLE) == (12,) else 65535
    integers = image.convert("I")
    low, high = integers.getextrema()
    if not 0 <= low <= high <= white:
        raise ValueError(f"pixels of mode {image.mode} are not in the range 0 to {white}")
    if image.mode == "I" and 0 < high < 256:
        raise ValueError(f"pixels of mode I, none above {high}, have 8 bits or are nearly black: store them as uint8")
    white_is_zero = tags.get(TIFF_PHOTOMETRIC) == 0  # Pillow handles this for 8 bits only
    alpha, transparent = None, image.info.get("transparency")
    if isinstance(transparent, int):
        alpha = integers.point([255 * (value != transparent) for value in range(65536)], "L")
    return integers.point(_to_8_bits(white, white_is_zero), "L"), alpha


@functools.cache
def _to_8_bits(white: int, white_is_zero: bool) -> list[int]:
    """The 8-bit level of each of 65,536 levels of gray."""
    table = [round(min(value, white) * 255 / white) for value in range(65536)]
    return [255 - value for value in table] if white_is_zero else table


def _from_profile(colors: Image.Image, profile: Any) -> Image.Image:
    """Colors of mode L, RGB or CMYK -> sRGB, a new image. A profile for another mode is ignored."""
    for mode in ("L", "RGB") if colors.mode == "L" else (colors.mode,):
        transform = _srgb_transform(profile, mode) if isinstance(profile, bytes) else None
        if transform is not None:
            return ImageCms.applyTransform(colors.convert(mode), transform)
    return colors.convert("RGB")


@functools.lru_cache(maxsize=32)  # photographs of one camera share their profile
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB. None if the profile is broken, is for another mode, or changes nothing.

    Changes by one level count as rounding. Otherwise every variant of the sRGB profile would change pixels slightly.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except ImportError:
        warnings.warn("this Pillow has no littlecms: color profiles are ignored, colors taken as sRGB", stacklevel=2)
        return None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    levels = range(0, 256, 15)
    probe = bytes(itertools.chain.from_iterable(itertools.product(levels, repeat=len(mode))))
    probe = Image.frombytes(mode, (len(probe) // len(mode), 1), probe)
    changes = ImageChops.difference(ImageCms.applyTransform(probe, transform), probe.convert("RGB")).getextrema()
    return transform if max(high for _, high in changes) > 1 else None


def plain_name(name: str) -> str:
    """A class name in the form that data sets keep: Unicode's NFC, with single blanks between words only.

    Bytes that are no UTF-8, as in file names from old archives, are written as escapes.
    """
    text = name.encode("utf-8", "backslashreplace").decode()
    return " ".join(unicodedata.normalize("NFC", text).split())


def find_classes(labels: Sequence[Any], names: Sequence[str]) -> list[int]:
    """The index of each class by name or index. All comparisons of class names use this function.

    Text is a name in its exact spelling. Failing that, it is the only name that differs just in blanks, Unicode
    normalization or case. Failing that, it is an index in the digits 0 to 9.

    Raises:
        ValueError: a label is none of these (the message offers the nearest names), or matches several names.
    """
    exact: dict[str, int] = {}
    alike: dict[str, list[int]] = {}
    for index, name in enumerate(names if any(isinstance(label, str) for label in labels) else ()):
        exact.setdefault(name, index)
        alike.setdefault(plain_name(name).casefold(), []).append(index)
    found = []
    for label in labels:
        index = exact.get(label) if isinstance(label, str) else _as_index(label)
        found.append(_find_alike(label, names, alike) if index is None else index)
        if not 0 <= found[-1] < len(names):
            raise ValueError(f"label {_shown(label)} is out of range: the labels are 0 to {len(names) - 1}")
    return found


def _find_alike(label: str, names: Sequence[str], alike: dict[str, list[int]]) -> int:
    """Text that is not the exact spelling of a name -> index, which may be out of range."""
    plain = plain_name(label)
    indices = alike.get(plain.casefold(), [])
    indices = [index for index in indices if plain_name(names[index]) == plain] or indices  # the same case wins
    if len(indices) == 1:
        return indices[0]
    shown = repr(label[:100])
    if indices:
        meant = ", ".join(repr(names[index][:100]) for index in indices[:5])
        raise ValueError(f"label {shown} may be any of {meant}: spell it as one of these")
    if re.fullmatch("-?[0-9]{1,18}", plain):
        return int(plain)
    nearest = difflib.get_close_matches(plain.casefold()[:100], alike, n=3, cutoff=0.3)
    offer = ", ".join(repr(names[alike[name][0]][:100]) for name in nearest)
    known = f"the nearest names are {offer}" if offer else f"names are such as {names[0][:100]!r}"
    raise ValueError(f"unknown label {shown}: {known}")


def _as_index(label: Any) -> int:
    try:
        index = operator.index(label)
    except TypeError:
        index = None
    if index is None or isinstance(label, bool) or getattr(label, "dtype", None) == torch.bool:
        raise ValueError(f"label {_shown(label)} is neither a class name nor an index")
    return index


def _check_names(id2label: dict, num_classes: int) -> dict[str, str]:
    """Check `id2label` and return it in order, with labels as text, as in JSON."""
    try:
        names = {int(label) if isinstance(label, str) else operator.index(label): str(name)
                 for label, name in id2label.items()}  # fmt: skip
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"id2label must be a dict of labels and their names, got {str(id2label)[:80]}") from None
    if (
        len(names) != len(id2label)
        or sorted(names) != list(range(num_classes))
        or len(set(names.values())) != num_classes
    ):
        raise ValueError(
            f"id2label must name each of the labels 0 to {num_classes - 1} once, each with a name of its own, "
            f"got {len(id2label)} labels and {len(set(names.values()))} names"
        )
    return {str(label): names[label] for label in sorted(names)}


def _facts(scheduler_class: type) -> SchedulerFacts:
    """The facts about a scheduler. One that is in no table gets the defaults."""
    rows = (row for row in (*SCHEDULERS.values(), *OTHER_SCHEDULERS) if row.scheduler_class is scheduler_class)
    return next(rows, SchedulerFacts(scheduler_class.__name__, scheduler_class))


def _check_guidance(scale: Any, interval: Any) -> None:
    """Refuse an invalid scale or interval of guidance."""
    if not _is_finite(scale):
        raise ValueError(f"guidance_scale must be a finite number (1 means off), got {_shown(scale)}")
    fractions = interval if isinstance(interval, (list, tuple)) else ()
    if len(fractions) != 2 or not all(map(_is_finite, fractions)) or not 0 <= fractions[0] < fractions[1] <= 1:
        raise ValueError(
            "guidance_interval must be two fractions of the trajectory (begin, end) with 0 <= begin < end <= 1, "
            f"got {_shown(interval)}"
        )


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _class_of(value: Any) -> type:
    return type(getattr(value, "_orig_mod", value))  # torch.compile wraps the module


def _shown(value: Any) -> str:
    """Any value as text for an error message: one line of limited length."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python refuses to format integers of more than 4,300 digits
        return f"a {_kind(value)}"
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _kind(value: Any) -> str:
    return _class_of(value).__name__


def _as_list(values: Any) -> list[Any]:
    """One value, several, or batches (tensors and arrays of 4 dimensions) as a list of single values."""
    values = values if isinstance(values, (list, tuple)) else [values]
    return [one for value in values for one in (value if getattr(value, "ndim", 0) == 4 else [value])]


def _null_label(unet: torch.nn.Module) -> int:
    _check_not_wrapped("unet", unet)
    if unet.config.get("num_classes") is not None:
        return unet.config.num_classes
    if unet.config.get("num_class_embeds") is not None:
        return unet.config.num_class_embeds - 1
    raise ValueError("the unet takes no class labels: its config has neither num_classes nor num_class_embeds")


def _latents_shape(unet: torch.nn.Module) -> tuple[int, int, int]:
    size = unet.config.sample_size
    return (unet.config.in_channels, *(size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)))


def _check_not_wrapped(name: str, model: torch.nn.Module) -> None:
    """Refuse a wrapper that hides a model's config, such as `DataParallel` or `DistributedDataParallel`."""
    if not hasattr(model, "config") and hasattr(getattr(model, "module", None), "config"):
        raise ValueError(f"{name} is wrapped in {_kind(model)}: give {name}.module, the model itself")


def _check_models(vae: torch.nn.Module, unet: torch.nn.Module, guide: torch.nn.Module | None) -> None:
    for name, model in {"vae": vae, "unet": unet, "guide": guide}.items():
        _check_not_wrapped(name, model)
    shape = _latents_shape(unet)
    if not all(isinstance(size, int) and 1 <= size <= LARGEST_SIZE for size in shape):
        raise ValueError(f"the unet's in_channels and sample_size must be from 1 to {LARGEST_SIZE:,}, got {shape}")
    latents_statistics(vae)  # raises if an entry is invalid
    if guide is None:
        return
    if not (isinstance(guide, torch.nn.Module) and hasattr(guide, "config")):
        raise ValueError(f"guide must be a denoiser, such as another pipeline's unet, got {_kind(guide)}")
    classes = [f"{_null_label(one)} classes" for one in (unet, guide)]
    latents = [f"latents of {_latents_shape(one)}" for one in (unet, guide)]
    for unets, guides in (classes, latents):
        if unets != guides:
            raise ValueError(f"guide must be for {unets} as the unet is, but is for {guides}")


def _check_weights(name: str, model: torch.nn.Module | None) -> None:
    """Refuse a model with weights that its files lack. diffusers leaves such weights without values."""
    for prefix, module in () if model is None else model.named_modules():
        if hasattr(module, "_hf_hook"):  # accelerate loads its weights on use
            continue
        for parameter, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                raise ValueError(
                    f"the weights of {name} lack {prefix}.{parameter}: its file is damaged or of another model"
                )


def _check_finite(**models: torch.nn.Module | None) -> None:
    for name, model in models.items():
        for parameter, weight in () if model is None else model.named_parameters():
            if not weight.is_meta and not weight.isfinite().all():
                raise ValueError(f"the weights of {name} are damaged: {parameter} holds numbers that are not finite")


def latents_statistics(vae: torch.nn.Module) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of an autoencoder's raw latents from its config, one value a channel.

    Normalized latents are (raw_latents - mean) / std. The configs of diffusers' own autoencoders have a
    `scaling_factor`, by which latents are multiplied. Before that, `shift_factor` is subtracted, or `latents_mean` and
    `latents_std` normalize. A config without a number of channels gives one value for all channels.

    Raises:
        ValueError: an entry is null, 0 or no number, so that the pipeline could draw nothing.
    """
    config = getattr(vae, "config", {})
    factor, shift = config.get("scaling_factor", 1.0), config.get("shift_factor")
    if not _is_finite(factor) or factor == 0:
        raise ValueError(f"the vae's scaling_factor must be a number other than 0, got {_shown(factor)}")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        if shift is not None and not _is_finite(shift):
            raise ValueError(f"the vae's shift_factor must be a finite number, got {_shown(shift)}")
        channels = config.get("latent_channels", 1)
        return [shift or 0.0] * channels, [1 / factor] * channels
    for name, values in {"latents_mean": mean, "latents_std": std}.items():
        if (
            not isinstance(values, (list, tuple))
            or len(values) != config.get("latent_channels", len(values))
            or not all(_is_finite(value) and (name == "latents_mean" or value > 0) for value in values)
        ):
            allowed = "numbers" if name == "latents_mean" else "numbers above 0"
            raise ValueError(f"the vae's {name} must be finite {allowed}, one a channel, got {values!r:.60}")
    return list(mean), [value / factor for value in std]


def _check_configs(folder: Path, index: dict) -> None:
    """Refuse configs with absurd numbers before a model is built, which could take unlimited memory or time."""
    for name in (name for name, entry in index.items() if isinstance(entry, list)):
        for file in sorted((folder / name).glob("*config.json")):
            try:
                config = _read_json(file)
            except (ValueError, RecursionError):
                config = None
            if not isinstance(config, dict):
                raise ValueError(f"{name}/{file.name} is damaged: it must hold one JSON object")
            for key, value in config.items():
                most = MOST_LAYERS if "layers" in key else LARGEST_NUMBERS.get(key, LARGEST_NUMBER)
                if not _is_bounded(value, most):
                    raise ValueError(f"{name}/{file.name} is damaged: {key} must hold numbers, none above {most:,}")
            timesteps = config.get("num_train_timesteps")  # None in diffusers' unet
            if timesteps is not None and (type(timesteps) is not int or timesteps < 1):
                raise ValueError(f"{name}/{file.name} is damaged: num_train_timesteps must be a whole number above 0")


def _is_bounded(value: Any, most: int, levels: int = 10) -> bool:
    """Whether a config's value holds no NaN, no integer above `most`, and no list longer than `most`.

    Lists may be nested in at most `levels` levels.
    """
    if isinstance(value, (list, tuple)):
        return levels > 0 and len(value) <= most and all(_is_bounded(one, most, levels - 1) for one in value)
    return not (isinstance(value, float) and math.isnan(value)) and not (isinstance(value, int) and abs(value) > most)


def _run(
    unet: torch.nn.Module, noisy_latents: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
) -> torch.Tensor:
    """A unet's prediction `(B, Z, h, w)`, computed in the unet's dtype and returned in the latents'."""
    timesteps = timestep.expand(len(noisy_latents))
    return unet(noisy_latents.to(unet.dtype), timesteps, class_labels).sample.to(noisy_latents.dtype)


def _copy_source(source_class: type, folder: Path) -> list[str]:
    """Copy the file that defines a class into a folder.

    Returns:
        the class's entry in `model_index.json`, `[module, class name]`.
    """
    source = Path(inspect.getfile(source_class))
    (folder / source.name).write_bytes(source.read_bytes())
    return [source.stem, source_class.__name__]


def _read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def _write_json(file: Path, config: dict) -> None:
    """Write a config without `_name_or_path`, which names a path on this machine."""
    config = {name: value for name, value in config.items() if name != "_name_or_path"}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
