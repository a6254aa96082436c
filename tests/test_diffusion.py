"""The diffusion process against its closed forms: schedules, targets, min-SNR weights, timesteps, label dropout."""

import itertools

import pytest
import torch

from flower_ldm.diffusion import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    LossByTimestep,
    check_schedule,
    denoising_loss,
    diffusion_target,
    drop_labels,
    make_noise_scheduler,
    min_snr_weights,
    sample_lognormal_timesteps,
    sample_timesteps,
)
from flower_ldm.errors import InputError


def snr_by_hand(scheduler) -> torch.Tensor:
    alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    return alphas_cumprod / (1 - alphas_cumprod)


# Schedules


IMPOSSIBLE = ("epsilon", "squaredcos_cap_v2")
POSSIBLE = [pair for pair in itertools.product(PREDICTION_TYPES, BETA_SCHEDULES) if pair != IMPOSSIBLE]


@pytest.mark.parametrize(("prediction_type", "beta_schedule"), POSSIBLE)
def test_scheduler_config(prediction_type, beta_schedule):
    scheduler = make_noise_scheduler(prediction_type, beta_schedule, zero_terminal_snr=False)
    assert scheduler.config.beta_schedule == beta_schedule
    assert scheduler.config.prediction_type == prediction_type
    assert scheduler.config.num_train_timesteps == 1000
    assert scheduler.config.clip_sample is False
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999  # sampling starts where training ends
    assert scheduler.alphas_cumprod[-1] > 0


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_zero_terminal_snr_ends_in_pure_noise(beta_schedule):
    scheduler = make_noise_scheduler("v_prediction", beta_schedule, zero_terminal_snr=True)
    latents, noise = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scheduler.add_noise(latents, noise, torch.tensor([999])), noise)
    assert not torch.equal(scheduler.add_noise(latents, noise, torch.tensor([900])), noise)


def test_impossible_schedules_are_refused():
    for prediction_type in ("sample", "v_prediction"):
        check_schedule(prediction_type, "linear", zero_terminal_snr=True)
    with pytest.raises(InputError, match="--zero_terminal_snr cannot be used with --prediction_type epsilon"):
        make_noise_scheduler("epsilon", "linear", zero_terminal_snr=True)
    with pytest.raises(InputError, match="--prediction_type must be one of .*, not 'noise'"):
        make_noise_scheduler("noise", "linear", zero_terminal_snr=False)
    with pytest.raises(InputError, match="--beta_schedule must be one of linear"):
        make_noise_scheduler("epsilon", "cosine", zero_terminal_snr=False)
    with pytest.raises(InputError, match="epsilon cannot be used with --beta_schedule squaredcos_cap_v2.*choose"):
        make_noise_scheduler("epsilon", "squaredcos_cap_v2", zero_terminal_snr=False)


# What a sample draws


@pytest.mark.parametrize("num_train_timesteps", [7, 1000])
def test_timesteps_cover_the_range_evenly(num_train_timesteps):
    uniforms = (torch.arange(20 * num_train_timesteps) + 0.5) / (20 * num_train_timesteps)
    timesteps = sample_timesteps(uniforms, num_train_timesteps)
    assert timesteps.dtype == torch.int64
    assert torch.equal(timesteps.bincount(), torch.full((num_train_timesteps,), 20))


def test_a_uniform_rounded_up_to_one_stays_in_range():
    uniforms = torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64).float()
    assert uniforms[1] == 1
    assert sample_timesteps(uniforms, 1000).tolist() == [0, 999]


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize(("mean", "std"), [(-0.4, 1.0), (0.5, 0.6)])
def test_lognormal_timesteps_have_the_density_of_edm(beta_schedule, mean, std):
    """Of the logarithm of sigma/alpha, of which every schedule has values enough around the mean."""
    scheduler = make_noise_scheduler("v_prediction", beta_schedule, zero_terminal_snr=False)
    uniforms = (torch.arange(20_000) + 0.5) / 20_000
    timesteps = sample_lognormal_timesteps(scheduler, uniforms, mean, std)
    log_ratios = -snr_by_hand(scheduler)[timesteps].log() / 2
    assert log_ratios.mean().item() == pytest.approx(mean, abs=0.02)
    assert log_ratios.std().item() == pytest.approx(std, abs=0.02)


def test_lognormal_timesteps_stay_in_range():
    for zero_terminal_snr in (False, True):
        scheduler = make_noise_scheduler("v_prediction", "squaredcos_cap_v2", zero_terminal_snr)
        timesteps = sample_lognormal_timesteps(scheduler, torch.tensor([0.0, 0.5, 1 - 2**-24, 1.0]), 0.0, 9.0)
        assert timesteps.dtype == torch.int64 and timesteps[0] == 0 and timesteps[-1] == 999
        assert (timesteps.diff() >= 0).all()


def test_labels_are_dropped_at_the_given_rate():
    uniforms = (torch.arange(1000) + 0.5) / 1000
    class_labels = torch.arange(1000) % 5
    dropped = drop_labels(class_labels, uniforms, 0.1, null_label=5)
    assert torch.equal(dropped == 5, uniforms < 0.1)
    assert torch.equal(dropped[100:], class_labels[100:])
    assert dropped.dtype == torch.int64
    assert torch.equal(drop_labels(class_labels, uniforms * 0, 0.0, null_label=5), class_labels)


# Targets


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_latents_follow_from_noisy_latents_and_target(prediction_type):
    scheduler = make_noise_scheduler(prediction_type, "scaled_linear", zero_terminal_snr=False)
    latents, noise = torch.randn(2, 5, 4, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    timesteps = torch.tensor([0, 10, 300, 700, 999])
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    target = diffusion_target(scheduler, latents, noise, timesteps)
    alpha_squared = scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
    alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
    reconstructed = {
        "epsilon": lambda: (noisy_latents - sigma * target) / alpha,
        "sample": lambda: target,
        "v_prediction": lambda: alpha * noisy_latents - sigma * target,
    }[prediction_type]()
    torch.testing.assert_close(reconstructed, latents, rtol=1e-5, atol=1e-5)


def test_unknown_prediction_type():
    scheduler = make_noise_scheduler("epsilon", "linear", zero_terminal_snr=False)
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type must be one of .*, not 'flow'"):
        diffusion_target(scheduler, torch.zeros(1), torch.zeros(1), torch.tensor([0]))
    with pytest.raises(ValueError, match="prediction_type must be one of .*, not 'flow'"):
        min_snr_weights(scheduler, torch.tensor([0]), 5.0)


# Weights


@pytest.mark.parametrize(("prediction_type", "beta_schedule"), POSSIBLE)
def test_min_snr_weights_by_hand(prediction_type, beta_schedule):
    scheduler = make_noise_scheduler(prediction_type, beta_schedule, zero_terminal_snr=False)
    timesteps = torch.tensor([0, 100, 500, 999])
    for timestep, weight in zip(timesteps, min_snr_weights(scheduler, timesteps, 5.0), strict=True):
        snr = max(snr_by_hand(scheduler)[timestep].item(), 0.01)
        error_ratio = {"epsilon": snr, "sample": 1.0, "v_prediction": snr + 1}[prediction_type]
        assert weight.item() == pytest.approx(min(snr, 5.0) / error_ratio, rel=2e-3)


def test_all_prediction_types_weigh_the_same_error_alike():
    """A model that errs by `error` in the denoised latents has one loss, whatever it predicts."""
    latents, noise, error = torch.randn(3, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    timesteps = torch.tensor([100, 300, 500])  # where the SNR is above the floor
    losses = []
    for prediction_type in PREDICTION_TYPES:
        scheduler = make_noise_scheduler(prediction_type, "linear", zero_terminal_snr=False)
        alpha_squared = scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
        alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        implied_noise = (noisy_latents - alpha * (latents + error)) / sigma
        prediction = diffusion_target(scheduler, latents + error, implied_noise, timesteps)
        target = diffusion_target(scheduler, latents, noise, timesteps)
        losses.append(denoising_loss(prediction, target, min_snr_weights(scheduler, timesteps, 5.0)))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_the_last_timestep_is_trained_whatever_the_schedule(prediction_type, beta_schedule, zero_terminal_snr):
    scheduler = make_noise_scheduler(prediction_type, beta_schedule, zero_terminal_snr)
    weights = min_snr_weights(scheduler, torch.arange(1000), 5.0)
    assert weights.isfinite().all()
    assert weights[500:].min() > 0.009
    clear = snr_by_hand(scheduler)[:500]
    expected = clear.clamp(max=5.0) / (clear + 1 if prediction_type == "v_prediction" else 1)
    torch.testing.assert_close(weights[:500].double(), expected, rtol=2e-3, atol=1e-6)


def test_loss_of_unequal_shapes_is_refused():
    with pytest.raises(ValueError, match=r"the prediction has shape \(2, 1, 4, 4\), but its target \(2, 3, 4, 4\)"):
        denoising_loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4), torch.ones(2))


def test_no_gamma_weighs_all_alike():
    scheduler = make_noise_scheduler("v_prediction", "linear", zero_terminal_snr=True)
    weights = min_snr_weights(scheduler, torch.tensor([0, 999]), None)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [1.0, 1.0]


# Loss


def test_denoising_loss_is_per_sample_and_float32():
    prediction = torch.zeros(2, 4, 2, 2, dtype=torch.bfloat16)
    target = torch.stack((torch.full((4, 2, 2), 1.001), torch.full((4, 2, 2), 2.0)))
    losses = denoising_loss(prediction, target, torch.tensor([1.0, 0.25]))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, torch.tensor([1.001**2, 1.0]))


def test_loss_by_timestep():
    losses_by_timestep = LossByTimestep(1000, num_bins=10)
    losses_by_timestep.update(torch.tensor([0, 99, 100, 999]), torch.tensor([1.0, 3.0, 5.0, 7.0], requires_grad=True))
    losses_by_timestep.update(torch.tensor([950]), torch.tensor([8.0]))
    bins = losses_by_timestep.read_and_reset()
    assert [mean for _, _, mean in bins] == [2.0, 5.0, *[None] * 7, 7.5]
    assert bins[0][:2] == (0, 99) and bins[-1][:2] == (900, 999)
    assert all(mean is None for _, _, mean in losses_by_timestep.read_and_reset())


def test_loss_by_timestep_of_several_processes():
    """Sums and counts are each reduced, so that a process with more samples in a bin has more weight there."""
    mine, other = LossByTimestep(10, num_bins=2), LossByTimestep(10, num_bins=2)
    mine.update(torch.tensor([0, 1, 2]), torch.tensor([1.0, 1.0, 1.0]))
    other.update(torch.tensor([3, 9]), torch.tensor([5.0, 3.0]))
    others = iter([other.sums, other.counts])
    assert mine.read_and_reset(lambda tensor: tensor + next(others)) == [(0, 4, 2.0), (5, 9, 3.0)]
    assert [timestep_bin.mean for timestep_bin in mine.read_and_reset()] == [None, None]


def test_bins_that_do_not_divide_the_timesteps_evenly():
    losses_by_timestep = LossByTimestep(10, num_bins=4)
    losses_by_timestep.update(torch.arange(10), torch.arange(10.0))
    bins = losses_by_timestep.read_and_reset()
    assert [timestep for low, high, _ in bins for timestep in range(low, high + 1)] == list(range(10))
    for low, high, mean in bins:
        assert mean == (low + high) / 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_never_makes_the_host_wait():
    scheduler = make_noise_scheduler("v_prediction", "linear", zero_terminal_snr=True)
    losses_by_timestep = LossByTimestep(1000, device="cuda")
    latents, noise = torch.randn(2, 8, 4, 2, 2, device="cuda")
    uniforms, class_labels = torch.rand(2, 8, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")

    def step():
        timesteps = sample_timesteps(uniforms[0], 1000)
        drop_labels(class_labels, uniforms[1], 0.1, null_label=5)
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        target = diffusion_target(scheduler, latents, noise, timesteps)
        losses = denoising_loss(noisy_latents, target, min_snr_weights(scheduler, timesteps, 5.0))
        losses_by_timestep.update(timesteps, losses)

    step()  # the first one moves the schedule to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
