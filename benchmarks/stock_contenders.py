"""Train one of the models that `time_to_quality.py` compares with ours: an autoencoder or a denoiser of stock parts.

    python benchmarks/stock_contenders.py autoencoder --steps 600 --learning_rate 3e-4 --output_dir DIR
    python benchmarks/stock_contenders.py dit --autoencoder DIR --steps 2000 --learning_rate 1e-4 --output_dir DIR2

Data, augmentation, latent cache, precision, compilation and label dropout are those of our scripts, so that only the
model, its loss, its noise and its optimizer differ. The results are `ema.safetensors` and `metrics.json`.

Shapes: B batch, C channels, H W height and width of latents or pixels.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.optimization import get_cosine_schedule_with_warmup
from safetensors.torch import load_file, save_file
from torch import nn

# Python adds this file's folder to the path. The package and the scripts are in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_autoencoder
import train_latent_diffusion
from benchmarks.train_throughput import DEFAULT_RECIPE, StockAutoencoder, update_autoencoder
from flower_ldm import FlowerLDMPipeline, FlowerUNet2DModel, runs, training
from flower_ldm.autoencoder_losses import PerceptualLoss
from flower_ldm.data import ImageDataset
from flower_ldm.diffusion import (
    diffusion_target,
    drop_labels,
    make_noise_scheduler,
    sample_lognormal_timesteps,
    sample_timesteps,
)
from flower_ldm.errors import OneLineParser, exit_on_input_error
from flower_ldm.files import file_path, path_text
from flower_ldm.models.autoencoder_flower import FlowerAutoencoderOutput

LABEL_DROPOUT = 0.1  # for guidance; none of the published settings has any
LATENT_CHANNELS = 16  # as many as ours
AUTOENCODER = "autoencoder"
WEIGHTS = "ema.safetensors"
LARGEST_VELOCITY_WEIGHT = 400.0  # JiT divides by 1 - t of at least 0.05


@dataclass(frozen=True)
class Contender:
    """A denoiser and how it is trained.

    Attributes:
        source: where its settings are published.
        learning_rates: the published one, then two others to try.
        build: makes the model for (channels, size, classes).
        in_pixels: it has no autoencoder.
        loss: "squared", "absolute", or "velocity", the squared error of the velocity of a predicted clean sample.
        lognormal: mean and deviation of the logarithm of sigma/alpha; `None` for uniform timesteps.
        drops_labels: the model drops labels by itself in training.
    """

    title: str
    source: str
    learning_rates: tuple[float, float, float]
    batch_size: int
    build: Callable[[int, int, int], nn.Module]
    in_pixels: bool = False
    prediction_type: str = "epsilon"
    beta_schedule: str = "linear"
    loss: str = "squared"
    lognormal: tuple[float, float] | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    ema_decay: float = 0.9999
    drops_labels: bool = False


def build_unet(
    channels: int, size: int, num_classes: int, *, widths: tuple[int, ...], layers: int, attention: int
) -> UNet2DModel:
    """A stock U-Net with attention in its `attention` lowest resolutions."""
    plain = len(widths) - attention
    return UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=widths,
        layers_per_block=layers, num_class_embeds=num_classes + 1,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",) * attention,
        up_block_types=("AttnUpBlock2D",) * attention + ("UpBlock2D",) * plain,
    )  # fmt: skip


def build_dit(channels: int, size: int, num_classes: int) -> DiTTransformer2DModel:
    """A stock transformer as wide and as deep as the recipe's denoiser."""
    return DiTTransformer2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, patch_size=1, num_layers=9,
        num_attention_heads=4, attention_head_dim=64, num_embeds_ada_norm=num_classes,
    )  # fmt: skip


def build_pixel_transformer(channels: int, size: int, num_classes: int) -> FlowerUNet2DModel:
    """Our blocks on patches of 8 pixels."""
    return FlowerUNet2DModel(
        sample_size=size, in_channels=channels, patch_size=8, hidden_size=256, num_layers=9, num_attention_heads=4,
        num_classes=num_classes,
    )  # fmt: skip


TRAIN_UNCONDITIONAL = "diffusers, examples/unconditional_image_generation/train_unconditional.py"
# Of the autoencoder: diffusers, examples/research_projects/autoencoderkl/train_autoencoderkl.py.
AUTOENCODER_LEARNING_RATES = (4.5e-6, 3e-4, 1e-3)
CONTENDERS = {
    "unet": Contender(
        "stock AutoencoderKL + UNet2DModel", TRAIN_UNCONDITIONAL, (1e-4, 3e-4, 1e-3), 64,
        partial(build_unet, widths=(128, 192, 256), layers=1, attention=2), betas=(0.95, 0.999), weight_decay=1e-6,
    ),
    "dit": Contender(
        "stock AutoencoderKL + DiTTransformer2DModel", "Peebles & Xie 2023, section 4", (1e-4, 3e-4, 1e-3), 128,
        build_dit, weight_decay=0.0, drops_labels=True,
    ),
    "pixel_unet": Contender(
        "UNet2DModel in pixels", TRAIN_UNCONDITIONAL, (1e-4, 3e-4, 1e-3), 16,
        partial(build_unet, widths=(128, 128, 256, 256, 512, 512), layers=2, attention=2), in_pixels=True,
        betas=(0.95, 0.999), weight_decay=1e-6,
    ),
    "keras": Contender(
        "Keras's DDIM of flowers", "keras.io/examples/generative/ddim", (1e-3, 3e-4, 2e-3), 64,
        partial(build_unet, widths=(64, 128, 256, 512), layers=2, attention=0), in_pixels=True,
        prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2", loss="absolute", weight_decay=1e-4,
        ema_decay=0.999,
    ),
    "jit": Contender(
        "pixel transformer, predicts the image", "Li & He 2025, JiT", (2e-4, 6e-4, 2e-3), 128,
        build_pixel_transformer, in_pixels=True, prediction_type="sample", beta_schedule="squaredcos_cap_v2",
        loss="velocity", lognormal=(0.8, 0.8), betas=(0.9, 0.95), weight_decay=0.0,
    ),
}  # fmt: skip


class PixelAutoencoder(ModelMixin, ConfigMixin):
    """No autoencoder: its latents are the pixels, so models in pixels train and draw by the code of the others."""

    downsample_factor = 1

    @register_to_config
    def __init__(self, latents_mean: tuple = (0.0, 0.0, 0.0), latents_std: tuple = (1.0, 1.0, 1.0)):
        super().__init__()
        self.register_buffer("one", torch.ones(1))

    def encode(self, images: torch.Tensor) -> AutoencoderKLOutput:
        """A distribution without variance at the images `(B, 3, H, W)`."""
        moments = torch.cat([images, torch.full_like(images, -30.0)], dim=1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def decode(self, latents: torch.Tensor) -> DecoderOutput:
        """The latents as they are."""
        return DecoderOutput(sample=latents)


# --- training --------------------------------------------------------------------------------------------------------


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("name", choices=[AUTOENCODER, *CONTENDERS])
    flag("--learning_rate", type=float, required=True)
    flag("--steps", type=int, required=True, help="optimizer updates")
    flag("--output_dir", type=file_path, required=True)
    flag("--autoencoder", type=path_text, help="folder of the trained autoencoder, for a denoiser on latents")
    flag("--latent_cache_dir", type=path_text)
    flag("--config", type=path_text, default=str(DEFAULT_RECIPE), help="recipe of the data and of stage 1's losses")
    flag("--data_dir", type=path_text)
    flag("--vgg_weights", type=path_text)
    flag("--seed", type=int, default=0)
    return parser.parse_args(argv)


def script_flags(options: argparse.Namespace) -> list[str]:
    """The flags that a stock model shares with ours."""
    flags = ["--config", options.config, f"--max_train_steps={options.steps}", f"--seed={options.seed}"]
    flags += [f"--learning_rate={options.learning_rate}", "--report_to=none", f"--output_dir={options.output_dir}"]
    flags += ["--optimizer=adamw", f"--lr_warmup_steps={options.steps // 10}"]
    return flags + ([f"--data_dir={options.data_dir}"] if options.data_dir else [])


def train_stock_autoencoder(options: argparse.Namespace) -> dict:
    """Stage 1 with a stock `AutoencoderKL` and our losses but those of the head, which it lacks."""
    flags = [*script_flags(options), "--classification_weight=0", "--center_weight=0", "--repulsion_weight=0"]
    flags.append("--latent_noise=0")
    flags += [f"--disc_start={options.steps // 2}", f"--loss_ramp_steps={max(1, options.steps // 8)}"]
    flags += [f"--vgg_weights={options.vgg_weights}"] if options.vgg_weights else []
    args = train_autoencoder.parse_args(flags)
    accelerator = training.set_up(args)
    train_images, val_images = training.load_images(accelerator, args)
    model = StockAutoencoder(LATENT_CHANNELS, args.resolution).to(memory_format=torch.channels_last)
    size = args.resolution // 8
    train_images.carry_noise((LATENT_CHANNELS, size, size))
    perceptual = train_autoencoder.load_perceptual_loss(accelerator, args)
    networks, optimizers = train_autoencoder.build_networks(accelerator, args, model, perceptual)
    ema = training.build_ema(model, args.ema_decay)
    clock = Clock()
    for step, batch in enumerate(training.training_batches(accelerator, args, train_images, 0, options.steps)):
        update_autoencoder(accelerator, args, networks, optimizers.autoencoder, optimizers.discriminator, batch, step)
        optimizers.lr_scheduler.step()
        ema.step(model.parameters())
        clock.tick()
    with training.ema_weights(ema, model):
        metrics = held_out_fidelity(accelerator, args, model, perceptual, val_images)
        mean, std = train_autoencoder.measure_latents(accelerator, model.vae, train_images, args.train_batch_size)
        model.vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0)
        model.vae.save_pretrained(options.output_dir)
    return clock.metrics(args.train_batch_size) | metrics


@torch.inference_mode()
def held_out_fidelity(
    accelerator: Accelerator, args: argparse.Namespace, model: StockAutoencoder, perceptual: PerceptualLoss | None,
    images: ImageDataset,
) -> dict[str, float]:  # fmt: skip
    """Our validation, of a model that has another interface."""

    def reconstruct(batch: torch.Tensor) -> FlowerAutoencoderOutput:
        posterior = model.vae.encode(batch).latent_dist
        return FlowerAutoencoderOutput(model.vae.decode(posterior.mean).sample, posterior)

    batches = training.validation_batches(accelerator, args, images)
    return train_autoencoder.validate(accelerator, args, reconstruct, perceptual, batches)


def build_denoiser(contender: Contender, channels: int, size: int, num_classes: int) -> nn.Module:
    """The contender's model, whose config says how many classes there are."""
    model = contender.build(channels, size, num_classes)
    if "num_class_embeds" not in model.config:
        model.register_to_config(num_classes=num_classes)
    return model.to(memory_format=torch.channels_last)


def load_stock_autoencoder(contender: Contender, folder: str | None) -> nn.Module:
    """The frozen autoencoder of a contender."""
    vae = PixelAutoencoder() if contender.in_pixels else AutoencoderKL.from_pretrained(folder)
    return vae.eval().requires_grad_(False)


def train_stock_denoiser(options: argparse.Namespace) -> dict:
    """Stage 2 with a stock model, or a model in pixels."""
    contender = CONTENDERS[options.name]
    flags = [*script_flags(options), f"--train_batch_size={contender.batch_size}"]
    if options.latent_cache_dir:
        flags.append(f"--latent_cache_dir={Path(options.latent_cache_dir) / options.name}")
    args = train_latent_diffusion.parse_args(flags)
    accelerator = training.set_up(args)
    train_images, _ = training.load_images(accelerator, args)
    vae = load_stock_autoencoder(contender, options.autoencoder)
    latents = train_latent_diffusion.load_latents(accelerator, args, vae, train_images)
    channels, size = latents.cache.mean.shape[2], latents.cache.mean.shape[3]
    model = build_denoiser(contender, channels, size, train_images.num_classes)
    training.compile_model(args, model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=contender.betas, weight_decay=contender.weight_decay,
        fused=True,
    )  # fmt: skip
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, args.lr_warmup_steps, options.steps)
    ema = training.build_ema(model, contender.ema_decay)
    noise_scheduler = make_noise_scheduler(contender.prediction_type, contender.beta_schedule, False)
    clock = Clock()
    for batch in training.training_batches(accelerator, args, latents, 0, options.steps):
        with accelerator.autocast():
            loss = denoising_loss(contender, model, noise_scheduler, batch, train_images.num_classes)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        ema.step(model.parameters())
        clock.tick()
    ema.copy_to(model.parameters())
    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, options.output_dir / WEIGHTS)
    return clock.metrics(contender.batch_size)


def denoising_loss(
    contender: Contender,
    model: nn.Module,
    noise_scheduler: DDPMScheduler,
    batch: dict[str, torch.Tensor],
    null_label: int,
) -> torch.Tensor:
    """One batch through a denoiser by its own rules: noise density, target and error."""
    samples, noise, uniforms = batch["latents"], batch["noise"], batch["uniforms"]  # (B, C, H, W) twice, (B, 2)
    if contender.lognormal is None:
        timesteps = sample_timesteps(uniforms[:, 0], noise_scheduler.config.num_train_timesteps)
    else:
        timesteps = sample_lognormal_timesteps(noise_scheduler, uniforms[:, 0], *contender.lognormal)
    class_labels = batch["class_labels"]
    if not contender.drops_labels:
        class_labels = drop_labels(class_labels, uniforms[:, 1], LABEL_DROPOUT, null_label)
    prediction = model(noise_scheduler.add_noise(samples, noise, timesteps), timesteps, class_labels).sample
    error = prediction.float() - diffusion_target(noise_scheduler, samples, noise, timesteps)
    if contender.loss == "absolute":
        return error.abs().mean()
    errors = error.square().mean(dim=(1, 2, 3))
    if contender.loss == "velocity":
        signal = noise_scheduler.alphas_cumprod[timesteps]
        errors = errors * (1 / (1 - signal)).clamp(max=LARGEST_VELOCITY_WEIGHT)
    return errors.mean()


class Clock:
    """Times updates. The median leaves out those during which the process was stopped, and the first ones."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def tick(self) -> None:
        """An update has ended."""
        self.times.append(time.perf_counter())

    def metrics(self, batch_size: int) -> dict[str, float]:
        """The number of updates and their rate."""
        seconds = [after - before for before, after in zip(self.times[2:], self.times[3:], strict=False)]
        return {
            "step": len(self.times) - 1,
            "seconds_per_update": median(seconds),
            "items_per_second": batch_size / median(seconds),
        }


# --- drawing ---------------------------------------------------------------------------------------------------------


def load_stock_pipeline(
    name: str, folder: Path, autoencoder: str | None, image_size: int, num_classes: int
) -> FlowerLDMPipeline:
    """A trained contender as a pipeline with the sampler of ours."""
    contender = CONTENDERS[name]
    vae = load_stock_autoencoder(contender, autoencoder)
    channels, size = (3, image_size) if contender.in_pixels else (LATENT_CHANNELS, image_size // 8)
    model = build_denoiser(contender, channels, size, num_classes)
    model.load_state_dict(load_file(folder / WEIGHTS))
    noise_scheduler = make_noise_scheduler(contender.prediction_type, contender.beta_schedule, False)
    scheduler = DPMSolverMultistepScheduler.from_config(noise_scheduler.config, timestep_spacing="trailing")
    return FlowerLDMPipeline(vae=vae, unet=model.eval(), scheduler=scheduler)


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    train = train_stock_autoencoder if options.name == AUTOENCODER else train_stock_denoiser
    metrics = train(options) | {"learning_rate": options.learning_rate}
    runs.METRICS_FILE.path(options.output_dir).write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
