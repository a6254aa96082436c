"""pipelines/pipeline_flower_ldm.py with diffusers' schedulers and their options, prediction types, zero terminal SNR:
what they draw through an exact denoiser has the distribution that it was made for, or one line says why not.
"""

import inspect
import itertools
import re

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from flower_ldm.diffusion import PREDICTION_TYPES, make_noise_scheduler
from flower_ldm.pipelines.pipeline_flower_ldm import SCHEDULERS, FlowerLDMPipeline

MEANS = (-1.0, 2.0)  # of the two classes
STD = 0.5
# Steps in which each comes near: those of first order need many; so does PNDM with v_prediction, which averages
# velocities that belong to different latents; and Heun's method starts a step below pure noise, so a small one.
# LCM and TCD take 50 at most.
FEW_STEPS = {"dpm++": 25, "unipc": 25, "heun": 100, "lcm": 50, "tcd": 50}
STEPS = {name: FEW_STEPS.get(name, 200) for name in SCHEDULERS}
FOR_ANY_MODEL = [name for name in SCHEDULERS if name != "lcm"]
# The second is the harder one: at its end there is no signal.
BETA_SCHEDULES = [pytest.param("linear", marks=pytest.mark.slow), "squaredcos_cap_v2"]
COMBINATIONS = list(itertools.product(SCHEDULERS, PREDICTION_TYPES, (False, True)))


def refusal(scheduler: str, prediction_type: str, zero_snr: bool) -> str | None:
    """What the line says about a combination that diffusers doesn't support."""
    if prediction_type == "sample" and scheduler in ("pndm", "euler_ancestral"):
        return "can't follow a unet that predicts the sample"
    if zero_snr and scheduler in ("pndm", "heun"):
        return "knows no zero terminal SNR"
    if zero_snr and prediction_type == "epsilon":
        return "undefined at pure noise"
    return None


class DenoiserOutput(BaseOutput):
    sample: torch.Tensor


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """What a perfect unet would predict where latents of class k are drawn from N(means[k], std^2)."""

    @register_to_config
    def __init__(
        self,
        alphas_cumprod: list,
        prediction_type: str,
        means: tuple = MEANS,
        std: float = STD,
        num_classes: int = 2,
        sample_size: int = 4,
        in_channels: int = 3,
    ):
        super().__init__()
        self.class_means = torch.nn.Parameter(torch.tensor(means))
        self.register_buffer("signal_variances", torch.tensor(alphas_cumprod))

    def forward(self, sample, timestep, class_labels):
        # Between two timesteps the logarithm of noise over signal is interpolated, as the schedulers themselves do.
        levels = torch.logit(self.signal_variances.double(), eps=1e-12)
        lower = timestep.floor().long()
        level = torch.lerp(levels[lower], levels[(lower + 1).clamp(max=len(levels) - 1)], (timestep - lower).double())
        variance = level.sigmoid().float().view(-1, 1, 1, 1)
        alpha, sigma = variance.sqrt(), (1 - variance).sqrt()
        mean = self.class_means[class_labels].view(-1, 1, 1, 1)
        noisy_variance = alpha**2 * self.config.std**2 + sigma**2
        surprise = (sample - alpha * mean) / noisy_variance
        clean = mean + alpha * self.config.std**2 * surprise  # the posterior's mean
        noise = sigma * surprise
        predictions = {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean}
        return DenoiserOutput(sample=predictions[self.config.prediction_type])


class PixelAutoencoder(ModelMixin, ConfigMixin):
    """Latents are ten times the pixels: what is encoded has the distribution that the test gave it."""

    downsample_factor = 1

    @register_to_config
    def __init__(self, scaling_factor: float = 10.0):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def encode(self, images):
        moments = torch.cat([self.factor * images, torch.full_like(images, -30.0)], dim=1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def decode(self, raw_latents):
        return DecoderOutput(sample=self.factor * raw_latents)


def make_pipeline(
    scheduler: str,
    prediction_type: str = "v_prediction",
    zero_snr: bool = False,
    beta_schedule: str = "squaredcos_cap_v2",
    std: float = STD,
) -> FlowerLDMPipeline:
    """A pipeline as training saves it, then with the scheduler that `--scheduler` makes."""
    # what `make_noise_scheduler` refuses of epsilon can still come from elsewhere
    training = make_noise_scheduler("sample", beta_schedule, zero_snr)
    training = DDPMScheduler.from_config(training.config, prediction_type=prediction_type)
    denoiser = GaussianDenoiser(training.alphas_cumprod.tolist(), prediction_type, std=std)
    saved = DPMSolverMultistepScheduler.from_config(training.config, timestep_spacing="trailing")
    pipe = FlowerLDMPipeline(PixelAutoencoder(), denoiser, saved)
    pipe.scheduler = pipe.make_scheduler(SCHEDULERS[scheduler].scheduler_class)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: FlowerLDMPipeline, scheduler: str, num_images_per_label: int = 200, **options) -> torch.Tensor:
    options = {"num_inference_steps": STEPS[scheduler], "guidance_scale": 1, "output_type": "latent", **options}
    generator = torch.Generator().manual_seed(0)
    return pipe([0, 1], num_images_per_label=num_images_per_label, generator=generator, **options).images


def assert_gaussian(latents: torch.Tensor) -> None:
    """Half of them of each class; the standard error of both figures is about 0.005, the rest is for the steps."""
    for of_class, mean in zip(latents.chunk(2), MEANS, strict=True):
        assert of_class.mean().item() == pytest.approx(mean, abs=0.03)
        assert of_class.std().item() == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize(
    ("scheduler", "prediction_type", "zero_snr"),
    [c for c in COMBINATIONS if c[0] in FOR_ANY_MODEL and not refusal(*c)],
)
def test_reproduces_a_gaussian_through_its_exact_denoiser(scheduler, prediction_type, zero_snr, beta_schedule):
    assert_gaussian(draw(make_pipeline(scheduler, prediction_type, zero_snr, beta_schedule), scheduler))


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_lcm_keeps_the_classes_of_a_model_that_is_not_distilled_but_not_their_variance(steps):
    """It makes each noisy latent's mean clean latent noisy again: of a distilled model that is a clean latent."""
    assert [name for name, facts in SCHEDULERS.items() if facts.only_distilled] == ["lcm"]
    drawn = draw(make_pipeline("lcm"), "lcm", num_inference_steps=steps)
    for of_class, mean in zip(drawn.chunk(2), MEANS, strict=True):
        assert of_class.mean().item() == pytest.approx(mean, abs=0.03)
        assert of_class.std().item() < 0.75 * STD
    exact = draw(make_pipeline("lcm", std=0.0), "lcm", 1, num_inference_steps=steps)
    torch.testing.assert_close(exact, torch.tensor(MEANS).view(2, 1, 1, 1).expand(2, 3, 4, 4), rtol=0, atol=1e-3)


def test_tcd_is_ddim_where_it_adds_no_noise():
    tcd, ddim = (draw(make_pipeline(name), name, 4, num_inference_steps=10) for name in ("tcd", "ddim"))
    torch.testing.assert_close(tcd, ddim, rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="^eta must be a finite number of at least 0 and at most 1 with TCDScheduler"):
        draw(make_pipeline("tcd"), "tcd", eta=1.5)


@pytest.mark.parametrize(("scheduler", "prediction_type"), [("heun", "v_prediction"), ("pndm", "epsilon")])
def test_start_from_pure_noise_is_refused_where_it_has_no_bound(scheduler, prediction_type):
    pipe = make_pipeline(scheduler, prediction_type)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with pytest.raises(ValueError, match=r"can't start from pure noise: take pipe.make_scheduler\(\w+Scheduler\)$"):
        draw(pipe, scheduler)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, pytest.param(1000, marks=pytest.mark.slow)])
def test_few_steps_and_many_give_images_or_one_line(scheduler, steps):
    pipe = make_pipeline(scheduler)
    try:
        drawn = draw(pipe, scheduler, 1, num_inference_steps=steps)
    except ValueError as error:
        line = r"\w+ (can't take (\d+) steps: .*|gave numbers that are not finite in (\d+) steps: take .*)"
        assert re.fullmatch(line, str(error))
        assert (steps < 4 and scheduler in ("heun", "pndm", "euler_ancestral")) or (
            steps > 50 and scheduler in ("lcm", "tcd")
        )
    else:
        assert drawn[1].mean() > drawn[0].mean() + 1  # of the two classes


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_more_steps_than_in_training_are_refused(scheduler):
    with pytest.raises(
        ValueError, match="^num_inference_steps must be at most 1000, as many as training has, got 1001$"
    ):
        draw(make_pipeline(scheduler), scheduler, 1, num_inference_steps=1001)


def test_the_way_back_from_heun_starts_from_pure_noise_again():
    pipe = make_pipeline("dpm++")
    pipe.scheduler = pipe.make_scheduler(SCHEDULERS["heun"].scheduler_class)
    pipe.scheduler = pipe.make_scheduler(SCHEDULERS["dpm++"].scheduler_class)
    assert pipe.scheduler.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("name", ["IPNDMScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_schedulers_with_noise_levels_of_their_own_are_refused(name):
    pipe = make_pipeline("dpm++")
    pipe.scheduler = getattr(diffusers, name)()
    with pytest.raises(
        ValueError, match=f"^{name} can't follow the noise schedule of training: take another scheduler"
    ):
        draw(pipe, "dpm++")


@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if refusal(*c)])
def test_what_diffusers_does_not_support_is_one_clear_line(combination):
    pipe = make_pipeline(*combination)
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("it was computed first"))
    with pytest.raises(ValueError, match=refusal(*combination)) as error:
        draw(pipe, combination[0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_denoised_latents_of_known_data(scheduler):
    """Where all latents of a class are the same, the exact denoiser predicts them from whatever noise."""
    pipe = make_pipeline(scheduler, "epsilon", std=0.0)
    denoised = []
    draw(
        pipe, scheduler, 1, num_inference_steps=8, callback_on_step_end_tensor_inputs=["denoised_latents"],
        callback_on_step_end=lambda *args: denoised.append(args[3]["denoised_latents"]),
    )  # fmt: skip
    assert len(denoised) == len(pipe.scheduler.timesteps)
    expected = torch.tensor(MEANS).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    for latents in denoised:
        torch.testing.assert_close(latents, expected, rtol=0, atol=0.05)


# All of diffusers' schedulers, and their options

# Each option's values, the default left out, that could change what is drawn.
OPTIONS = {
    "use_karras_sigmas": [True], "use_exponential_sigmas": [True], "use_beta_sigmas": [True],
    "use_flow_sigmas": [True], "use_lu_lambdas": [True], "use_dynamic_shifting": [True], "flow_shift": [3.0],
    "thresholding": [True], "clip_sample": [True], "sigma_min": [0.5], "sigma_max": [1.0], "shift_terminal": [0.1],
    "lambda_min_clipped": [-5.1, -1.0], "snr_shift_scale": [3.0], "final_sigmas_type": ["sigma_min"],
    "solver_order": [1, 3], "predictor_order": [1, 3], "corrector_order": [1], "solver_type": ["heun", "bh1"],
    "algorithm_type": ["dpmsolver", "sde-dpmsolver", "sde-dpmsolver++", "noise_prediction"], "predict_x0": [False],
    "disable_corrector": [[0, 1]], "lower_order_final": [False, True], "euler_at_final": [True],
    "skip_prk_steps": [True], "interpolation_type": ["log_linear"], "timestep_type": ["continuous"],
    "variance_type": ["fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"],
    "timestep_spacing": ["linspace", "leading", "trailing"], "set_alpha_to_one": [True, False], "steps_offset": [1],
}  # fmt: skip
FINAL = {"final_sigmas_type": "sigma_min"}
MORE_OPTIONS = [
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", **FINAL}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver", **FINAL}),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver", **FINAL}),
    ("UniPCMultistepScheduler", {"predict_x0": False, **FINAL}),
    ("UniPCMultistepScheduler", {"solver_type": "bh1", **FINAL}),
]
DISTILLED = ("LCMScheduler", "TCDScheduler")  # made for unets that predict clean latents in few steps


def schedulers_of_diffusers() -> list[str]:
    """Those that can be made by their defaults; the others want what isn't installed, or aren't of diffusion."""
    names = []
    for name, kind in inspect.getmembers(diffusers.schedulers, inspect.isclass):
        if issubclass(kind, diffusers.SchedulerMixin) and kind is not diffusers.SchedulerMixin:
            parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
            if all(one.default is not one.empty or one.kind is one.VAR_KEYWORD for one in parameters):
                names.append(name)
    return names


def with_options(name: str, beta_schedule: str = "squaredcos_cap_v2", **options) -> FlowerLDMPipeline:
    pipe = make_pipeline("dpm++", beta_schedule=beta_schedule)
    kind = getattr(diffusers.schedulers, name)
    if name in ("HeunDiscreteScheduler", "PNDMScheduler"):
        options = {"timestep_spacing": "leading", **options}
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    return pipe


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("sigmas", ["karras", "exponential"])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
                                  "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler"])  # fmt: skip
def test_sigmas_of_another_spacing_draw_the_distribution(name, sigmas, beta_schedule):
    """Some fall on the same timestep, by which the scheduler couldn't tell where it is."""
    pipe = with_options(name, beta_schedule, **{f"use_{sigmas}_sigmas": True})
    assert_gaussian(draw(pipe, "dpm++", num_inference_steps=200 if name.startswith("Euler") else 60))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
        ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned"}),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -1.0}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}),
        ("DDIMScheduler", {"thresholding": True}),
        ("DDIMScheduler", {"clip_sample": True}),
        ("DDPMScheduler", {"clip_sample": True}),
        ("DDPMScheduler", {"variance_type": "learned_range"}),
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_max": 1.0}),
        ("DDIMInverseScheduler", {}),
        ("DPMSolverMultistepInverseScheduler", {}),
        ("RePaintScheduler", {}),
        ("UnCLIPScheduler", {}),
        ("CogVideoXDDIMScheduler", {}),
        ("CogVideoXDPMScheduler", {}),
    ],
)
def test_what_changes_the_process_is_refused_before_anything_is_computed(name, options):
    pipe = with_options(name, **options)
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("it was computed first"))
    with pytest.raises(ValueError, match=f"^{name} ") as error:
        draw(pipe, "dpm++")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_what_a_refused_option_s_line_says_helps(name):
    """By their defaults they clip latents, as images are clipped."""
    pipe = make_pipeline("dpm++")
    pipe.scheduler = getattr(diffusers, name)(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    with pytest.raises(
        ValueError, match="clip_sample=True doesn't follow .*or set clip_sample so in scheduler/"
    ) as error:
        draw(pipe, "ddim")
    advice = re.search(r"take (.*), or set", str(error.value))[1]
    pipe.scheduler = eval(advice, {"pipe": pipe}, vars(diffusers))
    assert_gaussian(draw(pipe, "ddim"))


def test_steps_that_leave_out_the_noisiest_timesteps_are_refused():
    """1000 // 400 = 2, and 400 times 2 is 800."""
    pipe = with_options("DDIMScheduler", timestep_spacing="leading")
    with pytest.raises(
        ValueError, match="^DDIMScheduler can't take 400 steps: .* timestep 798, far below pure noise: take ano"
    ):
        draw(pipe, "ddim", num_inference_steps=400)
    assert_gaussian(draw(pipe, "ddim", num_inference_steps=500))


@pytest.mark.parametrize(
    "betas",
    [[float("nan")] * 1000, [0.01] * 999 + [float("inf")], [-0.01] * 1000, [2.0] * 1000, [0.01] * 10],
    ids=["nan", "inf", "negative", "above 1", "too few"],
)
def test_betas_that_are_no_noise_schedule_are_refused(betas):
    pipe = make_pipeline("dpm++")
    pipe.scheduler = DDPMScheduler(trained_betas=betas, clip_sample=False)
    with pytest.raises(ValueError, match="^DDPMScheduler has no noise schedule of 1000 betas from 0 to 1: check .*$"):
        draw(pipe, "ddpm")


def test_timesteps_beyond_training_and_foreign_predictions_are_refused():
    for name in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
        with pytest.raises(ValueError, match=f"^{name} can't follow a unet that predicts the sample: take another"):
            draw(with_options(name, prediction_type="sample"), "ddim")
    pipe = with_options("DDIMScheduler", timestep_spacing="leading", steps_offset=500)
    with pytest.raises(ValueError, match="^DDIMScheduler goes to timestep 1495, beyond training's 999"):
        draw(pipe, "ddim")
    pipe.scheduler = DDPMScheduler(clip_sample=False, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="^prediction_type must be one of epsilon, sample, v_prediction, got 'flow_"):
        draw(pipe, "ddpm")


@pytest.mark.slow  # a minute and a half: some 500 combinations
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_every_scheduler_with_every_option_draws_the_distribution_or_is_refused(beta_schedule, record_property):
    combinations = list(MORE_OPTIONS)
    for name in schedulers_of_diffusers():
        known = inspect.signature(getattr(diffusers.schedulers, name).__init__).parameters
        combinations += [(name, {})]
        combinations += [(name, {key: value}) for key, values in OPTIONS.items() if key in known for value in values]
    drawn, refused, wrong = 0, 0, []
    for name, options in combinations:
        try:
            pipe = with_options(name, beta_schedule, **options)
        except (ValueError, NotImplementedError):  # by diffusers
            continue
        try:
            latents = draw(pipe, "ddim", 60, num_inference_steps=25 if name in DISTILLED else 200)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        drawn += 1
        errors = [abs(part.mean() - mean) for part, mean in zip(latents.chunk(2), MEANS, strict=True)]
        errors += [abs(part.std() - STD) for part in latents.chunk(2)]
        if max(errors) > (0.25 if name in DISTILLED else 0.06):
            wrong.append((name, options, max(errors).item()))
    counts = f"{beta_schedule}: {drawn} schedulers and options draw the distribution, {refused} are refused"
    record_property("counts", counts)
    assert not wrong
    assert drawn > 150 and refused > 80


# Images drawn over

STARTS_MIDWAY = [name for name in FOR_ANY_MODEL if name != "pndm"]


def gaussian_image(count: int) -> torch.Tensor:
    """Images `(2 count, 3, 4, 4)` in [0, 1] whose latents have the distribution of the two classes."""
    noise = torch.randn(2 * count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    latents = torch.tensor(MEANS).repeat_interleave(count).view(-1, 1, 1, 1) + STD * noise
    return latents / 10 / 2 + 0.5


def draw_over(pipe: FlowerLDMPipeline, scheduler: str, image: torch.Tensor, **options) -> torch.Tensor:
    labels = [0] * (len(image) // 2) + [1] * (len(image) // 2)
    options = {"num_inference_steps": STEPS[scheduler], "guidance_scale": 1, "output_type": "latent", **options}
    return pipe(labels, image=image, generator=torch.Generator().manual_seed(0), **options).images


@pytest.mark.parametrize("strength", [0.3, pytest.param(0.7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheduler", STARTS_MIDWAY)
def test_an_image_drawn_over_has_the_distribution_again(scheduler, strength):
    """Also where a scheduler that remembers earlier steps starts in the middle."""
    pipe, image = make_pipeline(scheduler), gaussian_image(200)
    latents = draw_over(pipe, scheduler, image, strength=strength)
    assert_gaussian(latents)
    moved = (latents - pipe.encode_images(2 * image - 1)).std()
    assert 0.3 * STD < moved < 1.6 * STD  # sqrt(2) of it where nothing were left of the image


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_a_mask_keeps_is_as_noisy_as_the_rest_after_each_step(scheduler):
    strength = 1 if scheduler == "pndm" else 0.7
    pipe, image = make_pipeline(scheduler), gaussian_image(1)
    mask = torch.zeros(1, 4, 4)
    mask[:, :, 2:] = 1
    original = pipe.encode_images(2 * image - 1)[..., :2]
    noise = torch.randn(2, 3, 4, 4)
    seen = []

    def compare(pipe, step_index, timestep, given):
        timesteps = pipe.scheduler.timesteps
        following = len(timesteps) - pipe.num_timesteps + step_index + 1
        if following == len(timesteps):
            expected, latents = original, given["latents"]
        else:
            alpha, sigma = pipe.signal_and_noise(timesteps[following])
            expected = alpha * original + sigma * noise[..., :2]
            latents = pipe.scheduler.scale_model_input(given["latents"], timesteps[following])
        torch.testing.assert_close(latents[..., :2], expected, rtol=0, atol=1e-3)
        seen.append(step_index)
        return {}

    latents = draw_over(
        pipe, scheduler, image, strength=strength, mask_image=mask, latents=noise, num_inference_steps=10,
        callback_on_step_end=compare,
    )  # fmt: skip
    assert len(seen) >= 7
    assert torch.equal(latents[..., :2], original)


@pytest.mark.parametrize("scheduler", FOR_ANY_MODEL)
def test_what_a_mask_does_not_keep_has_the_distribution(scheduler):
    pipe, image = make_pipeline(scheduler), gaussian_image(200)
    mask = torch.zeros(1, 4, 4)
    mask[:, :, 2:] = 1
    latents = draw_over(pipe, scheduler, image, strength=1, mask_image=mask)
    assert_gaussian(latents[..., 2:])
    assert torch.equal(latents[..., :2], pipe.encode_images(2 * image - 1)[..., :2])


def test_pndm_does_not_start_midway():
    with pytest.raises(ValueError, match="^PNDMScheduler can't start from an image: take another scheduler"):
        draw_over(make_pipeline("pndm"), "pndm", gaussian_image(1), strength=0.5)
