"""Stage 1: train FlowerAutoencoderKL, the autoencoder of the latent diffusion model, as a VAE-GAN.

    data -> autoencoder_losses -> FlowerAutoencoderKL -> latent_cache -> diffusion -> FlowerUNet2DModel -> EMA
         -> FlowerLDMPipeline -> evaluation + visualization -> report + model_card

    accelerate launch --config_file accelerate_config.yaml train_autoencoder.py --config configs/flowers102_64_gpu.yaml

Read it from top to bottom: flags, one training step, validation, the end of a run, set-up, the loop. `recipes.py`,
`checkpoints.py` and `training.py` of `flower_ldm/` hold what both training scripts share. The losses are in
`flower_ldm/autoencoder_losses.py`.
"""

import math
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from torch import nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from flower_ldm import checkpoints, hub, recipes, runs, training
from flower_ldm.autoencoder_losses import (
    HIGHEST_PSNR,
    AdaptiveAdversarialWeight,
    CenterLoss,
    PerceptualLoss,
    adversarial_loss,
    classification_loss,
    discriminator_loss,
    fidelity,
    kl_loss,
    loss_ramp,
    pixel_loss,
)
from flower_ldm.data import ImageDataset
from flower_ldm.discriminator import SMALLEST_IMAGE, PatchDiscriminator
from flower_ldm.errors import InputError, exit_on_input_error, one_line
from flower_ldm.files import replace_files, tensors_digest
from flower_ldm.latent_maps import encode_for_map, save_latent_maps
from flower_ldm.model_card import write_model_card
from flower_ldm.models.autoencoder_flower import FlowerAutoencoderKL
from flower_ldm.optimizers import parameters_of
from flower_ldm.progress_bars import progress_bar
from flower_ldm.report import write_report
from flower_ldm.visualization import AUTOENCODER_CURVES, save_loss_curves, save_reconstructions, vae_encoder


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parse the flags, which `flower_ldm/recipes.py` declares, and check combinations of them."""
    args = recipes.parse_arguments("autoencoder", argv, __doc__.splitlines()[0])
    hub.check_flags(args)
    if args.pixel_weight == args.perceptual_weight == 0:
        raise InputError(
            "--pixel_weight and --perceptual_weight are both 0: nothing would tell the decoder what to draw"
        )
    if args.train_batch_size % args.perceptual_every:
        raise InputError(f"--perceptual_every {args.perceptual_every} must divide --train_batch_size")
    return args


# --- one training step -----------------------------------------------------------------------------------------------


@dataclass
class Networks:
    """The autoencoder and the networks of its losses. Those that no loss with a weight needs are `None`."""

    vae: nn.Module
    perceptual: PerceptualLoss | None
    discriminator: nn.Module | None
    adaptive_weight: AdaptiveAdversarialWeight | None
    centers: nn.Module | None

    @property
    def trained(self) -> list[nn.Module]:
        """The networks whose gradients accelerate accumulates."""
        return [network for network in (self.vae, self.centers, self.discriminator) if network is not None]


class AutoencoderStep(NamedTuple):
    """The results of one micro-batch."""

    loss: torch.Tensor  # the weighted sum, for the backward pass
    losses: dict[str, torch.Tensor]  # each unweighted, for the log
    reconstruction: torch.Tensor  # (B, 3, H, W), detached, for the discriminator


def autoencoder_step(
    accelerator: Accelerator, args: Namespace, networks: Networks, batch: dict[str, torch.Tensor], global_step: int
) -> AutoencoderStep:
    """One micro-batch through the autoencoder and its losses."""
    images, class_labels = batch["images"], batch["class_labels"]
    ramp = loss_ramp(global_step, 0, args.loss_ramp_steps)
    noise, noise_levels = batch["noise"], None
    if args.latent_noise > 0:  # its level comes from the last channel
        noise, noise_levels = noise[:, :-1], args.latent_noise * noise[:, -1, 0, 0].abs()
    with accelerator.autocast():
        output = networks.vae(images, noise=noise, noise_levels=noise_levels)
        losses = {"pixel_loss": pixel_loss(output.sample, images), "kl_loss": kl_loss(output.posterior)}
        loss = args.pixel_weight * losses["pixel_loss"]
        if networks.perceptual is not None:
            seen = slice(None, None, args.perceptual_every)
            losses["perceptual_loss"] = networks.perceptual(output.sample[seen], images[seen])
            loss = loss + args.perceptual_weight * ramp * losses["perceptual_loss"]
        if networks.discriminator is not None and global_step >= args.disc_start:
            loss = loss + weighted_adversarial_loss(
                accelerator, args, networks, output.sample, loss, losses, global_step
            )
        loss = loss + args.kl_weight * losses["kl_loss"]
        if args.classification_weight > 0:
            losses["classification_loss"] = classification_loss(output.class_logits, class_labels)
            loss = loss + args.classification_weight * ramp * losses["classification_loss"]
        if networks.centers is not None:
            losses["center_loss"], losses["repulsion_loss"] = networks.centers(output.class_features, class_labels)
            loss = loss + args.center_weight * ramp * losses["center_loss"]
            loss = loss + args.repulsion_weight * ramp * losses["repulsion_loss"]
    return AutoencoderStep(loss, losses, output.sample.detach())


def weighted_adversarial_loss(
    accelerator: Accelerator, args: Namespace, networks: Networks, reconstruction: torch.Tensor,
    reconstruction_loss: torch.Tensor, losses: dict[str, torch.Tensor], global_step: int,
) -> torch.Tensor:  # fmt: skip
    """The weighted adversarial loss. The unweighted loss and the adaptive weight are added to `losses`."""
    discriminator = accelerator.unwrap_model(networks.discriminator)
    # The discriminator is a fixed function here: this pass must leave no gradients in it.
    fixed = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    losses["adversarial_loss"] = adversarial_loss(functional_call(discriminator, fixed, (reconstruction,)))
    weight = args.adversarial_weight * loss_ramp(global_step, args.disc_start, args.loss_ramp_steps)
    adaptive_weight = networks.adaptive_weight
    if adaptive_weight is None:
        return weight * losses["adversarial_loss"]
    # Only the last micro-batch of an update measures: `sync_gradients` marks it.
    if (global_step - args.disc_start) % args.adaptive_weight_steps == 0 and accelerator.sync_gradients:
        norms = adaptive_weight.squared_gradient_norms(reconstruction_loss, losses["adversarial_loss"], reconstruction)
        adaptive_weight.update(accelerator.reduce(norms, reduction="sum"))
    losses["adaptive_weight"] = adaptive_weight()
    return weight * losses["adaptive_weight"] * losses["adversarial_loss"]


def discriminator_step(
    accelerator: Accelerator, discriminator: nn.Module, images: torch.Tensor, reconstruction: torch.Tensor
) -> torch.Tensor:
    """The discriminator's loss on one micro-batch of images and their reconstructions, each `(B, 3, H, W)`."""
    with accelerator.autocast():
        real_logits, fake_logits = discriminator(torch.cat([images, reconstruction])).chunk(2)
        return discriminator_loss(real_logits, fake_logits)


# --- validation ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def validate(
    accelerator: Accelerator, args: Namespace, vae: FlowerAutoencoderKL, perceptual: PerceptualLoss | None,
    batches: DataLoader,
) -> dict[str, float]:  # fmt: skip
    """Means over the held-out images: PSNR (dB), SSIM and losses of reconstructions from the posterior's mean."""
    measured = []
    for batch in batches:
        images, class_labels = batch["images"], batch["class_labels"]
        with accelerator.autocast():
            output = vae(images)
        reconstruction = output.sample.float().clamp(-1, 1)
        rows = fidelity(reconstruction, images) | {
            "val_pixel_loss": (reconstruction - images).abs().mean(dim=(1, 2, 3)),
            "mean_squared_error": ((reconstruction - images) / 2).square().mean(dim=(1, 2, 3)),
        }
        if args.classification_weight > 0:
            rows["val_accuracy"] = (output.class_logits.argmax(dim=1) == class_labels).float()
        if perceptual is not None:
            with accelerator.autocast():
                rows["val_perceptual_loss"] = perceptual.per_image(reconstruction, images)
        measured.append(accelerator.gather_for_metrics(rows))
    means = {name: torch.cat([rows[name] for rows in measured]).mean().item() for name in measured[0]}
    # Papers also report the PSNR of the mean error. It is never higher than the mean of the images' PSNRs.
    error = max(means["mean_squared_error"], 10 ** (-HIGHEST_PSNR / 10))
    return means | {"psnr_of_mean_squared_error": -10 * math.log10(error)}


@torch.inference_mode()
def draw_reconstructions(
    accelerator: Accelerator, args: Namespace, vae: FlowerAutoencoderKL, images: ImageDataset, step: int
) -> Path:
    """Draw 16 held-out images, spread over all classes, above their reconstructions. Returns the file."""
    keys = np.linspace(0, len(images) - 1, min(16, len(images))).astype(int).tolist()
    originals = images.__getitems__(keys)["images"].to(accelerator.device)
    with accelerator.autocast():
        reconstructions = vae(originals).sample
    path = runs.RECONSTRUCTION_GRIDS.path(args.output_dir, step)
    save_reconstructions(originals, reconstructions, path)
    return path


def validate_and_keep_best(
    accelerator: Accelerator, args: Namespace, vae: FlowerAutoencoderKL, perceptual: PerceptualLoss | None,
    batches: DataLoader, log: training.LossLog, progress: checkpoints.Progress,
) -> dict[str, float]:  # fmt: skip
    """`validate`, logged and drawn. Weights with the lowest pixel + perceptual loss so far go to `best/`."""
    step = progress.global_step
    metrics = validate(accelerator, args, vae, perceptual, batches)
    log.append(step, metrics)
    if accelerator.is_main_process:
        # The last pictures are promised. An error of the disk then ends the run.
        reraise = InputError if step == args.max_train_steps else ()
        with training.optional("pictures of this validation", reraise=reraise):
            curves = runs.AUTOENCODER_LOSSES.path(args.output_dir)
            save_loss_curves(runs.read_log(log.path), AUTOENCODER_CURVES, curves)
            rows = draw_reconstructions(accelerator, args, vae, batches.dataset, step)
            log.show(step, {"reconstructions": rows, "autoencoder_losses": curves})
    score = metrics["val_pixel_loss"] + metrics.get("val_perceptual_loss", 0.0)
    best_dir = Path(args.output_dir) / runs.BEST
    if score < progress.best_score or not (best_dir / runs.MODEL_CONFIG).is_file():
        progress.best_score = score
        if accelerator.is_main_process:
            replace_files(best_dir, best_dir.with_name(runs.UNFINISHED_BEST), vae.save_pretrained)
    accelerator.wait_for_everyone()
    return metrics


def drop_torn_best(best_dir: Path) -> None:
    """Remove the config of a `best/` that can't be loaded, so that the next validation writes `best/` anew."""
    if not best_dir.is_dir():
        return
    try:
        FlowerAutoencoderKL.from_pretrained(best_dir)
    except Exception as error:  # diffusers checks little, so a damaged file can raise anything
        print(f"{best_dir} can't be loaded ({one_line(error, 200)}): the next validation writes it anew", flush=True)
        with suppress(OSError):  # if it can't be removed, replacing it gives a clear error
            (best_dir / runs.MODEL_CONFIG).unlink()


@torch.inference_mode()
def measure_latents(
    accelerator: Accelerator, vae: nn.Module, dataset: ImageDataset, batch_size: int
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the training split's raw latents, per channel, for the model's config.

    The variance is that of the posterior means plus the mean posterior variance.
    """
    sums = torch.zeros(3, vae.config.latent_channels, dtype=torch.float64)
    for keys in progress_bar(torch.arange(len(dataset)).split(batch_size), desc="latent statistics"):
        with accelerator.autocast():
            images = dataset.__getitems__(keys.tolist())["images"].to(accelerator.device)
            posterior = vae.encode(images).latent_dist
        # On the CPU, since Apple's GPUs have no float64.
        mean, variance = posterior.mean.cpu().double(), posterior.var.cpu().double()
        moments = torch.stack([values.mean(dim=(0, 2, 3)) for values in (mean, mean.square(), variance)])
        sums += len(keys) / len(dataset) * moments
    variance = sums[1] - sums[0].square() + sums[2]
    return sums[0].tolist(), variance.sqrt().tolist()


# --- the end of a run ------------------------------------------------------------------------------------------------


def save_results(
    accelerator: Accelerator, args: Namespace, vae: FlowerAutoencoderKL, train_images: ImageDataset,
    results: dict[str, object],
) -> None:  # fmt: skip
    """Measure the latents, then write the autoencoder with its present weights, `best/` and the metrics."""
    output_dir = Path(args.output_dir)
    vae.set_latents_statistics(*measure_latents(accelerator, vae, train_images, args.train_batch_size))
    best = FlowerAutoencoderKL.from_pretrained(output_dir / runs.BEST).to(accelerator.device).eval()
    best.set_latents_statistics(*measure_latents(accelerator, best, train_images, args.train_batch_size))
    replace_files(output_dir, output_dir / runs.UNFINISHED_EXPORT, vae.save_pretrained, index=runs.MODEL_CONFIG)
    replace_files(output_dir / runs.BEST, output_dir / runs.UNFINISHED_BEST, best.save_pretrained)
    runs.write_metrics(runs.METRICS_FILE.path(output_dir), results)
    pictures = runs.RECONSTRUCTION_GRIDS.path(output_dir).parent
    print(f"autoencoder in {output_dir}, its reconstructions of held-out images in {pictures}")


def draw_latent_maps(
    accelerator: Accelerator, args: Namespace, vae: FlowerAutoencoderKL, train_images: ImageDataset,
    val_images: ImageDataset, log: training.LossLog,
) -> None:  # fmt: skip
    """Save the latent maps of training and held-out images by t-SNE and PCA, and send them to the trackers."""
    with accelerator.autocast():
        images = {"training": train_images, "held out": val_images}
        sets = encode_for_map(vae_encoder(vae), images, accelerator.device)
    save_latent_maps(sets, train_images.class_names, Path(args.output_dir))
    maps = [runs.LATENT_MAP.path(args.output_dir, method) for method in runs.LATENT_MAPS]
    log.show(args.max_train_steps, {path.stem: path for path in maps})


# --- set-up ----------------------------------------------------------------------------------------------------------


def needs_head(args: Namespace) -> bool:
    """Whether a loss needs the classifier head."""
    return args.classification_weight > 0 or args.center_weight > 0 or args.repulsion_weight > 0


def check_resolution(args: Namespace) -> None:
    """Refuse images that are too small for the discriminator.

    Raises:
        InputError: they are, and the adversarial loss is in use.
    """
    if args.adversarial_weight > 0 and args.resolution < SMALLEST_IMAGE:
        raise InputError(
            f"--resolution must be at least {SMALLEST_IMAGE} for the discriminator, got {args.resolution}: raise it, "
            "or train without the discriminator by --adversarial_weight 0"
        )


def load_perceptual_loss(accelerator: Accelerator, args: Namespace) -> PerceptualLoss | None:
    """The perceptual loss, where it has a weight. One process downloads VGG16, the others wait for it."""
    if args.perceptual_weight == 0:
        return None
    with accelerator.main_process_first():
        return PerceptualLoss(args.vgg_weights)


def build_autoencoder(accelerator: Accelerator, args: Namespace, num_classes: int) -> FlowerAutoencoderKL:
    """The autoencoder on its device.

    Raises:
        InputError: `--model_config` is wrong, or doesn't suit `--resolution`.
    """
    vae = training.build_model(
        FlowerAutoencoderKL,
        args.model_config,
        in_channels=3,
        num_classes=num_classes if needs_head(args) else 0,
        sample_size=args.resolution,
    )
    if args.resolution % vae.downsample_factor:
        raise InputError(
            f"--resolution {args.resolution} must be a multiple of {vae.downsample_factor} for this model"
        )
    vae = vae.to(accelerator.device, memory_format=torch.channels_last)
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    training.compile_model(args, vae)
    return vae


def noise_shape(args: Namespace, vae: FlowerAutoencoderKL) -> tuple[int, int, int]:
    """The shape of the noise that goes with an image: that of its latents, with `--latent_noise` one channel more."""
    size = args.resolution // vae.downsample_factor
    return vae.config.latent_channels + (args.latent_noise > 0), size, size


class Optimizers(NamedTuple):
    """The optimizers, prepared, and the schedule of the autoencoder's learning rate."""

    autoencoder: AcceleratedOptimizer
    discriminator: AcceleratedOptimizer | None
    lr_scheduler: LRScheduler


def build_networks(
    accelerator: Accelerator, args: Namespace, vae: FlowerAutoencoderKL, perceptual: PerceptualLoss | None
) -> tuple[Networks, Optimizers]:
    """All trained networks and loss networks, on their device and prepared, with the optimizers."""
    centers = discriminator = adaptive_weight = disc_optimizer = None
    if args.center_weight > 0 or args.repulsion_weight > 0:
        centers = CenterLoss(vae.config.num_classes, vae.config.head_channels)
    optimizer = training.build_optimizer(args, vae, [] if centers is None else centers.parameters())
    lr_scheduler = training.build_lr_scheduler(args, optimizer)
    vae, optimizer = accelerator.prepare(vae, optimizer)
    if centers is not None:
        centers = accelerator.prepare(centers)
    if perceptual is not None:
        perceptual = perceptual.to(accelerator.device, memory_format=torch.channels_last)
    if args.adversarial_weight > 0:
        discriminator = PatchDiscriminator().to(memory_format=torch.channels_last)
        disc_optimizer = torch.optim.AdamW(
            discriminator.parameters(), lr=args.disc_learning_rate, betas=(0.5, 0.9), weight_decay=0.0, fused=True
        )
        discriminator, disc_optimizer = accelerator.prepare(discriminator, disc_optimizer)
        if args.adaptive_weight:
            adaptive_weight = AdaptiveAdversarialWeight().to(accelerator.device)
    networks = Networks(vae, perceptual, discriminator, adaptive_weight, centers)
    return networks, Optimizers(optimizer, disc_optimizer, lr_scheduler)


def checkpoint_states(
    networks: Networks, optimizers: Optimizers, ema: EMAModel, progress: checkpoints.Progress
) -> dict[str, object]:
    """The contents of a checkpoint, by name."""
    return {
        "model": networks.vae,
        "centers": networks.centers,
        "discriminator": networks.discriminator,
        "optimizer": optimizers.autoencoder,
        "disc_optimizer": optimizers.discriminator,
        "adaptive_weight": networks.adaptive_weight,
        "ema": ema,
        "lr_scheduler": optimizers.lr_scheduler,
        "progress": progress,
    }


# --- the loop --------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Train with the flags of the command line or of `argv`."""
    args = parse_args(argv)
    with training.process_as_found(), checkpoints.refusals_say_how_to_go_on(args):
        train(args)


def train(args: Namespace) -> None:
    """The whole run: set-up, the loop, the results. A signal ends it with `SystemExit`, after a checkpoint."""
    output_dir = Path(args.output_dir)
    check_resolution(args)
    checkpoints.check_output_dir(args)
    checkpoint = checkpoints.find_checkpoint(args)
    accelerator = training.set_up(args, find_unused_parameters=needs_head(args) and args.classification_weight == 0)
    perceptual = load_perceptual_loss(accelerator, args)
    train_images, val_images = training.load_images(accelerator, args)
    args.max_train_steps = last_step = training.total_steps(accelerator, args, len(train_images))

    vae = build_autoencoder(accelerator, args, train_images.num_classes)
    train_images.carry_noise(noise_shape(args, vae))
    ema = training.build_ema(vae, args.ema_decay)
    networks, optimizers = build_networks(accelerator, args, vae, perceptual)
    optimizer, disc_optimizer, lr_scheduler = optimizers
    identity = training.run_identity(accelerator, args, train_images, vae)
    if perceptual is not None:
        identity["VGG16 (--vgg_weights)"] = tensors_digest(perceptual.features.state_dict())
    progress = checkpoints.Progress(identity)
    stateful = checkpoint_states(networks, optimizers, ema, progress)
    checkpoints.resume(accelerator, args, checkpoint, stateful)
    hub.claim_repository(accelerator, args)
    checkpoints.claim_output_dir(accelerator, args)
    if accelerator.is_main_process:
        drop_torn_best(output_dir / runs.BEST)

    train_batches = training.training_batches(accelerator, args, train_images, progress.global_step, last_step)
    val_batches = training.validation_batches(accelerator, args, val_images)
    log = training.LossLog(accelerator, runs.LOG_FILE.path(output_dir), progress.global_step)
    stop = training.StopSignal(accelerator)
    bar = training.step_bar(accelerator, progress.global_step, last_step, "autoencoder")
    clock = training.Clock(progress)
    networks.vae.train()

    for batch in train_batches:
        with accelerator.accumulate(*networks.trained):
            loss, losses, reconstruction = autoencoder_step(accelerator, args, networks, batch, progress.global_step)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                # Only this optimizer's: the discriminator's fp16 gradients of earlier micro-batches would be lost.
                accelerator.unscale_gradients(optimizer)
                grad_norm = nn.utils.clip_grad_norm_(parameters_of(optimizer), args.max_grad_norm)
                if accelerator.scaler is None:  # fp16's scaler meets infinite gradients by itself
                    log.update(progress.global_step + 1, {"grad_norm": grad_norm})
            optimizer.step()
            optimizer.zero_grad()
            if networks.discriminator is not None and progress.global_step >= args.disc_start:
                disc_loss = discriminator_step(accelerator, networks.discriminator, batch["images"], reconstruction)
                accelerator.backward(disc_loss)
                disc_optimizer.step()
                disc_optimizer.zero_grad()
                losses["discriminator_loss"] = disc_loss
        log.update(progress.global_step + 1, losses)
        if not accelerator.sync_gradients:
            continue

        lr_scheduler.step()
        ema.step(vae.parameters())
        progress.global_step += 1
        bar.update()
        step, at_end = progress.global_step, progress.global_step == last_step
        if step % args.logging_steps == 0 or at_end:
            line = log.write(step, learning_rate=lr_scheduler.get_last_lr()[0])
            bar.set_postfix(pixel_loss=f"{line['pixel_loss']:.4f}", refresh=False)
        if step % args.validation_steps == 0 and not at_end:
            log.check()
            with training.ema_weights(ema, vae), clock.paused():
                validate_and_keep_best(accelerator, args, vae, networks.perceptual, val_batches, log, progress)
        stopping = stop.agreed(step, 1 if at_end else args.logging_steps)
        if step % args.checkpointing_steps == 0 or at_end or stopping:
            log.check()
            with clock.paused():
                checkpoint = checkpoints.save_checkpoint(accelerator, args, stateful, step)
            if stopping:
                stop.exit(checkpoint)
    bar.close()
    stop.exit_when_told(checkpoint)

    with training.ema_weights(ema, vae):
        results = validate_and_keep_best(accelerator, args, vae, networks.perceptual, val_batches, log, progress)
        results |= {"step": last_step, "training_seconds": progress.seconds, "num_images": len(val_images)}
        results |= {"dataset": train_images.name, "splits": val_images.splits}
        results |= {"vgg_weights": args.vgg_weights and Path(args.vgg_weights).name}
        results |= training.about_machine(accelerator)
        log.close()
        if accelerator.is_main_process:
            save_results(accelerator, args, vae, train_images, results)
            if args.final_pictures:
                with training.optional("the maps of the latents", reraise=InputError):
                    draw_latent_maps(accelerator, args, vae, train_images, val_images, log)
            write_model_card(output_dir)
            print(f"the run on one page: {write_report(output_dir)}")
    training.end_trackers(accelerator)
    hub.push_results(accelerator, args)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
