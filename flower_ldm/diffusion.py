"""The diffusion process in training, one function for each step: timesteps, label dropout, target, weights, loss.

Everything runs on the device of its inputs and never makes the host wait.

Shapes: B batch, C channels, H W latent height and width, T num_train_timesteps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from .errors import InputError
from .pipelines.pipeline_flower_ldm import PREDICTION_TYPES

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TIMESTEP_DENSITIES = ("uniform", "lognormal")
# An SNR below this counts as this. Min-SNR weights vanish with the SNR, which is 2e-9 at the end of the cosine
# schedule: the noisiest steps, from which sampling starts, would never be trained.
SNR_FLOOR = 0.01


def check_schedule(prediction_type: str, beta_schedule: str, zero_terminal_snr: bool) -> None:
    """Refuse a combination that cannot work.

    Raises:
        InputError: an unknown name, or noise prediction where the last step holds (almost) nothing but noise. The
            model would learn to copy its input there, and sampling would divide by a signal of zero (Lin et al. 2023).
    """
    if prediction_type not in PREDICTION_TYPES:
        raise InputError(f"--prediction_type must be one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}.")
    if beta_schedule not in BETA_SCHEDULES:
        raise InputError(f"--beta_schedule must be one of {', '.join(BETA_SCHEDULES)}, not {beta_schedule!r}.")
    if zero_terminal_snr and prediction_type == "epsilon":
        raise InputError(
            "--zero_terminal_snr cannot be used with --prediction_type epsilon, which is undefined at pure noise; "
            "choose --prediction_type v_prediction or sample."
        )
    if beta_schedule == "squaredcos_cap_v2" and prediction_type == "epsilon":
        raise InputError(
            "--prediction_type epsilon cannot be used with --beta_schedule squaredcos_cap_v2, whose first step would "
            "multiply the model's error by 20,000; choose --beta_schedule linear or scaled_linear, or "
            "--prediction_type v_prediction or sample."
        )


def make_noise_scheduler(
    prediction_type: str, beta_schedule: str, zero_terminal_snr: bool, num_train_timesteps: int = 1000
) -> DDPMScheduler:
    """The scheduler for training. The pipeline's schedulers are made from its config.

    Nothing is clipped, since latents have no bounds. Timesteps are spaced from the end backwards ("trailing"), so that
    sampling starts at the noisiest step the model was trained on (Lin et al. 2023, section 3.3).

    Raises:
        InputError: see `check_schedule`.
    """
    check_schedule(prediction_type, beta_schedule, zero_terminal_snr)
    # scaled_linear has the betas of Stable Diffusion, linear those of Ho et al. 2020. The cosine schedule needs none.
    beta_start, beta_end = (0.00085, 0.012) if beta_schedule == "scaled_linear" else (0.0001, 0.02)
    # All are explicit: `from_config` leaves out defaults, and other schedulers have other defaults.
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def sample_timesteps(uniforms: torch.Tensor, num_train_timesteps: int) -> torch.Tensor:
    """Map `uniforms` `(B,)` in [0, 1) evenly to timesteps `(B,)` int64 from 0 to T - 1."""
    timesteps = (uniforms * num_train_timesteps).long()
    return timesteps.clamp(max=num_train_timesteps - 1)  # a float64 just below 1 becomes 1 in float32


def sample_lognormal_timesteps(
    scheduler: DDPMScheduler, uniforms: torch.Tensor, mean: float, std: float
) -> torch.Tensor:
    """Map `uniforms` `(B,)` in [0, 1) to timesteps `(B,)` int64 whose noise-to-signal ratio is log-normal.

    The ratio sigma/alpha is the noise level of EDM (Karras et al. 2022, table 1, "Training"). There the velocity's
    squared error has the weight of its loss exactly, so all timesteps weigh the same: `mean` and `std` alone say which
    noise levels matter.

    Args:
        mean, std: of the ratio's natural logarithm.
    """
    alphas_cumprod = on_device_of(uniforms, scheduler)
    log_ratios = ((1 - alphas_cumprod) / alphas_cumprod).log() / 2  # (T,), rising
    wanted = mean + std * torch.special.ndtri(uniforms)
    return torch.searchsorted(log_ratios, wanted).clamp(max=len(log_ratios) - 1)


def on_device_of(tensor: torch.Tensor, scheduler: DDPMScheduler) -> torch.Tensor:
    """The scheduler's `alphas_cumprod` `(T,)` on the device of a tensor.

    The copy makes the host wait, so the scheduler keeps it, as `add_noise` does too. Later steps copy nothing.
    """
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(tensor.device)
    return scheduler.alphas_cumprod


def drop_labels(
    class_labels: torch.Tensor, uniforms: torch.Tensor, label_dropout: float, null_label: int
) -> torch.Tensor:
    """Replace the labels `(B,)` whose uniform `(B,)` in [0, 1) is below `label_dropout` by `null_label`.

    So the model also learns the unconditional prediction, which classifier-free guidance needs (Ho & Salimans 2022).
    """
    return torch.where(uniforms < label_dropout, null_label, class_labels)


def diffusion_target(
    scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the model must predict, `(B, C, H, W)`: the noise, the latents, or their velocity (Salimans & Ho 2022).

    Raises:
        ValueError: the scheduler has another `prediction_type`.
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}.")


def min_snr_weights(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """Loss weights `(B,)` that keep any one noise level from dominating (Hang et al. 2023, "Min-SNR", section 3.4).

    A model that predicts the latents has the weight min(SNR, gamma). The squared error of the noise is SNR times that
    of the latents, and the squared error of the velocity SNR + 1 times. So their weights are divided by that factor.
    An SNR below `SNR_FLOOR` counts as `SNR_FLOOR`, which is not in the paper. `gamma=None` gives all the weight 1.

    Raises:
        ValueError: the scheduler has another `prediction_type`.
    """
    if gamma is None:
        return torch.ones_like(timesteps, dtype=torch.float32)
    on_device_of(timesteps, scheduler)  # where `compute_snr` then finds it
    snr = compute_snr(scheduler, timesteps).clamp(min=SNR_FLOOR)
    weights = snr.clamp(max=gamma)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return weights / snr
    if prediction_type == "sample":
        return weights
    if prediction_type == "v_prediction":
        return weights / (snr + 1)
    raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}.")


def denoising_loss(prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean squared error `(B,)` float32 of predictions and targets `(B, C, H, W)`, with weights `(B,)`."""
    if prediction.shape != target.shape:  # torch would broadcast, with a warning
        raise ValueError(f"the prediction has shape {tuple(prediction.shape)}, but its target {tuple(target.shape)}")
    squared_error = F.mse_loss(prediction.float(), target.float(), reduction="none")
    return squared_error.mean(dim=(1, 2, 3)) * weights


class TimestepBin(NamedTuple):
    """The mean loss of the timesteps from `first` to `last`; `None` where there was none."""

    first: int
    last: int
    mean: float | None


class LossByTimestep:
    """Mean loss in equal bins of the timestep. The sums stay on the device until they are read."""

    def __init__(self, num_train_timesteps: int, num_bins: int = 10, device: torch.device | str = "cpu") -> None:
        self.num_train_timesteps = num_train_timesteps
        self.sums = torch.zeros(num_bins, device=device)  # float32, since Apple's GPUs have no float64
        self.counts = torch.zeros(num_bins, device=device)

    def update(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Add the `losses` `(B,)` of `timesteps` `(B,)`. The host does not wait."""
        bins = timesteps * len(self.sums) // self.num_train_timesteps
        losses = losses.detach().float()
        self.sums.index_add_(0, bins, losses)
        self.counts.index_add_(0, bins, torch.ones_like(losses))

    def read_and_reset(
        self, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    ) -> list[TimestepBin]:
        """The bins since the last reading. The host waits for the device.

        Args:
            reduce: sums a tensor over all processes, as `accelerator.reduce` does.
        """
        sums, counts = reduce(self.sums).tolist(), reduce(self.counts).tolist()
        num_bins = len(sums)
        # The first timestep of bin b is the ceiling of b T / num_bins.
        starts = [-(-b * self.num_train_timesteps // num_bins) for b in range(num_bins + 1)]
        means = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
        self.sums.zero_()
        self.counts.zero_()
        return [TimestepBin(starts[b], starts[b + 1] - 1, means[b]) for b in range(num_bins)]
