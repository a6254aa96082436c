"""Stage 2: train FlowerUNet2DModel, the denoiser, on the cached latents of stage 1; the result is a FlowerLDMPipeline.

    data -> autoencoder_losses -> FlowerAutoencoderKL -> latent_cache -> diffusion -> FlowerUNet2DModel -> EMA
         -> FlowerLDMPipeline -> evaluation + visualization -> report + model_card

    accelerate launch --config_file accelerate_config.yaml train_latent_diffusion.py \\
        --config configs/flowers102_64_gpu.yaml

Read it from top to bottom: flags, one training step, validation and previews, set-up, the end of a run, the loop.
`recipes.py`, `checkpoints.py` and `training.py` of `flower_ldm/` hold what both training scripts share. The formulas
are in `flower_ldm/diffusion.py`.
"""

import shutil
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler
from torch import nn
from torch.utils.data import DataLoader

from flower_ldm import (
    FlowerAutoencoderKL,
    FlowerLDMPipeline,
    FlowerUNet2DModel,
    checkpoints,
    hub,
    recipes,
    runs,
    training,
)
from flower_ldm.data import ImageDataset, keep_batch
from flower_ldm.diffusion import (
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
from flower_ldm.errors import InputError, exit_on_input_error, one_line
from flower_ldm.files import replace_files, write_whole
from flower_ldm.latent_cache import LatentDataset, cache_key, load_or_build_latent_cache
from flower_ldm.latent_maps import MAP_SETS, LatentSet, named_classes, spread_over_classes
from flower_ldm.model_card import write_model_card
from flower_ldm.pipelines.pipeline_flower_ldm import latents_statistics
from flower_ldm.progress_bars import bar_options
from flower_ldm.report import write_report
from flower_ldm.visualization import draw_samples, save_diffusion_loss, save_pipeline_pictures, save_samples_grid


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parse the flags, which `flower_ldm/recipes.py` declares, and check combinations of them."""
    args = recipes.parse_arguments("latent_diffusion", argv, __doc__.splitlines()[0])
    hub.check_flags(args)
    if args.label_dropout == 0 and args.guidance_scale != 1:
        raise InputError("--label_dropout 0 never trains the null label that guidance needs: add --guidance_scale 1")
    check_schedule(args.prediction_type, args.beta_schedule, args.zero_terminal_snr)
    return args


# --- one training step -----------------------------------------------------------------------------------------------


class DenoisingStep(NamedTuple):
    """The results of one micro-batch, each `(B,)`."""

    losses: torch.Tensor  # weighted
    unweighted_losses: torch.Tensor
    timesteps: torch.Tensor


def denoising_step(
    args: Namespace, unet: nn.Module, noise_scheduler: DDPMScheduler, batch: dict[str, torch.Tensor], null_label: int,
    timestep_density: str,
) -> DenoisingStep:  # fmt: skip
    """One micro-batch through the denoiser: noise the latents, predict, compare."""
    latents, noise, uniforms = batch["latents"], batch["noise"], batch["uniforms"]  # (B, C, h, w) twice, (B, 2)
    if timestep_density == "lognormal":
        timesteps = sample_lognormal_timesteps(noise_scheduler, uniforms[:, 0], args.density_mean, args.density_std)
    else:
        timesteps = sample_timesteps(uniforms[:, 0], noise_scheduler.config.num_train_timesteps)
    class_labels = drop_labels(batch["class_labels"], uniforms[:, 1], args.label_dropout, null_label)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    prediction = unet(noisy_latents, timesteps, class_labels).sample
    target = diffusion_target(noise_scheduler, latents, noise, timesteps)
    weights = min_snr_weights(noise_scheduler, timesteps, args.snr_gamma or None)
    losses = denoising_loss(prediction, target, weights)
    return DenoisingStep(losses, losses / weights, timesteps)


# --- validation and previews -----------------------------------------------------------------------------------------


@torch.inference_mode()
def validate(
    accelerator: Accelerator, args: Namespace, unet: nn.Module, noise_scheduler: DDPMScheduler, batches: DataLoader
) -> dict[str, float]:
    """The held-out loss, weighted and unweighted. Every validation has the same noise and timesteps.

    The timesteps are uniform, whatever the training's density, so that runs can be compared.
    """
    rows = []
    for batch in batches:
        with accelerator.autocast():
            step = denoising_step(args, unet, noise_scheduler, batch, unet.null_label, "uniform")
        rows.append(accelerator.gather_for_metrics(torch.stack([step.losses, step.unweighted_losses], dim=1)))
    loss, unweighted_loss = torch.cat(rows).mean(dim=0).tolist()
    return {"val_loss": loss, "val_unweighted_loss": unweighted_loss}


def draw_preview(
    accelerator: Accelerator, args: Namespace, pipeline: FlowerLDMPipeline, step: int, log: training.LossLog
) -> LatentSet:
    """Save this step's class grid and loss curves, and send them to the trackers. Returns the grid's latents."""
    grid, curves = samples_path(args, step), runs.DIFFUSION_LOSS.path(args.output_dir)
    with accelerator.autocast():
        generated = draw_samples(pipeline, args.seed)
        save_samples_grid(pipeline, generated, grid)
    save_diffusion_loss(runs.read_log(log.path), curves)
    log.show(step, {"samples": grid, "diffusion_loss": curves})
    return generated


def samples_path(args: Namespace, step: int) -> Path:
    """The path of a step's class grid."""
    return runs.SAMPLE_GRIDS.path(args.output_dir, step)


# --- set-up ----------------------------------------------------------------------------------------------------------


def load_autoencoder(name: str) -> nn.Module:
    """Stage 1's autoencoder, or a stock `AutoencoderKL`, frozen.

    Raises:
        InputError: it can't be loaded, or its latents have not been measured.
    """
    try:
        config = FlowerAutoencoderKL.load_config(name)
        model_class = AutoencoderKL if config.get("_class_name") == "AutoencoderKL" else FlowerAutoencoderKL
        if config.get("_class_name") != model_class.__name__:
            raise InputError(f"--autoencoder {name} is a {config.get('_class_name')}, not a FlowerAutoencoderKL")
        vae, info = model_class.from_pretrained(name, output_loading_info=True)
        if info["missing_keys"]:  # diffusers would initialize them at random
            raise ValueError(f"its weights lack {sorted(info['missing_keys'])[0]}")
        latents_statistics(vae)  # raises if an entry is invalid
    except InputError:
        raise
    except Exception as error:  # diffusers checks little, so a damaged file can raise anything
        reason = one_line(error)
        raise InputError(
            f"--autoencoder {name} can't be loaded: give train_autoencoder.py's output folder or a Hub id ({reason})"
        ) from error
    if model_class is FlowerAutoencoderKL and vae.config.latents_mean is None:
        raise InputError(f"--autoencoder {name} has no latents_mean and latents_std: its training has not ended")
    return vae.eval().requires_grad_(False)


def latent_shape(vae: nn.Module, images: ImageDataset) -> tuple[int, int, int]:
    """The shape `(C, h, w)` of this data's latents, from the first image.

    Raises:
        InputError: the autoencoder can't encode images of this size.
    """
    try:
        with torch.no_grad():
            raw_latents = vae.encode(images[0]["images"][None].to(vae.device)).latent_dist.mean
            size = vae.decode(raw_latents).sample.shape[-1]
    except (ValueError, RuntimeError) as error:
        reason = one_line(error)
        raise InputError(f"--resolution {images.resolution} doesn't suit --autoencoder: {reason}") from error
    if size != images.resolution:  # a stock autoencoder rounds without an error
        raise InputError(
            f"--resolution {images.resolution} doesn't suit --autoencoder, which would draw images of {size} pixels"
        )
    return tuple(raw_latents.shape[1:])


def load_latents(accelerator: Accelerator, args: Namespace, vae: nn.Module, images: ImageDataset) -> LatentDataset:
    """The normalized latents of a split, from the cache. One process encodes, the others wait for it."""
    cache_dir = args.latent_cache_dir or Path(args.output_dir) / runs.LATENT_CACHE
    with accelerator.main_process_first():
        cache = load_or_build_latent_cache(
            vae,
            images,
            cache_dir,
            device=accelerator.device,
            autocast_dtype=training.autocast_dtype(accelerator),
            num_workers=training.workers_that_fit(accelerator, args, images),
        )
    return LatentDataset(cache, *latents_statistics(vae), args.seed)


def held_out_batches(accelerator: Accelerator, args: Namespace, latents: LatentDataset) -> DataLoader:
    """The held-out latents in order, each with the draws of epoch 0, shared among the processes."""
    keys = [(0, index) for index in range(len(latents))]
    return accelerator.prepare_data_loader(
        DataLoader(latents, args.train_batch_size, sampler=keys, collate_fn=keep_batch)
    )


def build_denoiser(
    accelerator: Accelerator, args: Namespace, latent_shape: tuple[int, int, int], num_classes: int
) -> FlowerUNet2DModel:
    """The denoiser on its device, for latents of this shape `(C, h, w)`.

    Raises:
        InputError: `--model_config` is wrong, or doesn't suit the latents.
    """
    channels, height, width = latent_shape
    unet = training.build_model(
        FlowerUNet2DModel,
        args.model_config,
        sample_size=height if height == width else [height, width],
        in_channels=channels,
        out_channels=channels,
        num_classes=num_classes,
    ).to(accelerator.device)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    training.compile_model(args, unet)
    return unet


def build_pipeline(
    vae: nn.Module, unet: nn.Module, noise_scheduler: DDPMScheduler, class_names: list[str], **guidance
) -> FlowerLDMPipeline:
    """The pipeline, with a fast sampler of the same noise schedule (DPM-Solver++, Lu et al. 2022).

    Args:
        guidance: the pipeline's arguments for guidance, such as `guidance_scale`.
    """
    scheduler = DPMSolverMultistepScheduler.from_config(noise_scheduler.config, timestep_spacing="trailing")
    id2label = dict(enumerate(class_names))
    pipeline = FlowerLDMPipeline(vae=vae, unet=unet, scheduler=scheduler, id2label=id2label, **guidance)
    pipeline.set_progress_bar_config(**bar_options(leave=False, desc="preview"))
    return pipeline


# --- the end of a run ------------------------------------------------------------------------------------------------


def save_results(args: Namespace, pipeline: FlowerLDMPipeline, results: dict) -> None:
    """Save the pipeline with the present weights of its unet, and the metrics."""
    output_dir = Path(args.output_dir)
    unfinished = output_dir / runs.UNFINISHED_EXPORT
    replace_files(output_dir, unfinished, pipeline.save_pretrained, index=runs.PIPELINE_INDEX.name)
    runs.write_metrics(runs.METRICS_FILE.path(output_dir), results)
    print(f"pipeline in {output_dir}")


def draw_last_pictures(
    accelerator: Accelerator, args: Namespace, pipeline: FlowerLDMPipeline, train_latents: LatentDataset,
    val_latents: LatentDataset, val_images: ImageDataset, log: training.LossLog,
) -> None:  # fmt: skip
    """Save the class grid and the curves, and with `--final_pictures` every picture of a pipeline.

    A picture that fails is left out. The run and the other pictures go on.
    """
    output_dir, step, generated = Path(args.output_dir), args.max_train_steps, None
    optional = partial(training.optional, reraise=InputError)
    with optional("the last class grid"):
        generated = draw_preview(accelerator, args, pipeline, step, log)
        grid = runs.CLASS_GRID.path(output_dir)
        write_whole(grid, lambda unfinished: shutil.copy(samples_path(args, step), unfinished))
        print(f"samples in {grid}")
    if generated is None or not args.final_pictures:
        return
    with optional("the last pictures"), accelerator.autocast():
        encoded = {"training": map_set(train_latents, "training"), "held out": map_set(val_latents, "held out")}
        written = save_pipeline_pictures(
            pipeline, output_dir, generated, encoded, val_images, seed=args.seed, guard=optional
        )
        log.show(step, {path.stem: path for path in written if path.suffix == ".png"})


def map_set(latents: LatentDataset, name: str) -> LatentSet:
    """The latents of a split that a latent map shows, spread over the classes."""
    labels = latents.cache.labels.numpy()
    kept = spread_over_classes(labels, MAP_SETS[name][0], named_classes(len(latents.cache.class_names)))
    return LatentSet(latents.posterior_means(kept).numpy(), labels[kept])


# --- the loop --------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Train with the flags of the command line or of `argv`."""
    args = parse_args(argv)
    with training.process_as_found(), checkpoints.refusals_say_how_to_go_on(args):
        train(args)


def train(args: Namespace) -> None:
    """The whole run: set-up, the loop, the results. A signal ends it with `SystemExit`, after a checkpoint."""
    output_dir = Path(args.output_dir)
    vae = load_autoencoder(args.autoencoder)
    checkpoints.check_output_dir(args)
    checkpoint = checkpoints.find_checkpoint(args)
    accelerator = training.set_up(args)
    train_images, val_images = training.load_images(accelerator, args)
    class_names = train_images.class_names
    args.max_train_steps = last_step = training.total_steps(accelerator, args, len(train_images))

    vae = vae.to(accelerator.device, memory_format=torch.channels_last)
    unet = build_denoiser(accelerator, args, latent_shape(vae, train_images), len(class_names))
    ema = training.build_ema(unet, args.ema_decay)
    noise_scheduler = make_noise_scheduler(args.prediction_type, args.beta_schedule, args.zero_terminal_snr)
    pipeline = build_pipeline(
        vae, unet, noise_scheduler, class_names,
        guidance_scale=args.guidance_scale, takes_guidance=args.label_dropout > 0,
    )  # fmt: skip
    optimizer = training.build_optimizer(args, unet)
    lr_scheduler = training.build_lr_scheduler(args, optimizer)
    model, optimizer = accelerator.prepare(unet, optimizer)
    identity = training.run_identity(accelerator, args, train_images, unet)
    progress = checkpoints.Progress(identity | {"autoencoder": cache_key(vae, train_images)})
    stateful = {"model": model, "optimizer": optimizer, "ema": ema, "lr_scheduler": lr_scheduler, "progress": progress}
    checkpoints.resume(accelerator, args, checkpoint, stateful)
    hub.claim_repository(accelerator, args)
    checkpoints.claim_output_dir(accelerator, args)
    train_latents = load_latents(accelerator, args, vae, train_images)
    val_latents = load_latents(accelerator, args, vae, val_images)

    train_batches = training.training_batches(accelerator, args, train_latents, progress.global_step, last_step)
    val_batches = held_out_batches(accelerator, args, val_latents)
    log = training.LossLog(accelerator, runs.LOG_FILE.path(output_dir), progress.global_step)
    loss_by_timestep = LossByTimestep(noise_scheduler.config.num_train_timesteps, device=accelerator.device)
    stop = training.StopSignal(accelerator)
    bar = training.step_bar(accelerator, progress.global_step, last_step, "denoiser")
    clock = training.Clock(progress)

    for batch in train_batches:
        with accelerator.accumulate(model):
            losses, unweighted_losses, timesteps = denoising_step(
                args, model, noise_scheduler, batch, unet.null_label, args.timestep_density
            )
            loss = losses.mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
                if accelerator.scaler is None:  # fp16's scaler meets infinite gradients by itself
                    log.update(progress.global_step + 1, {"grad_norm": grad_norm})
            optimizer.step()
            optimizer.zero_grad()
        log.update(progress.global_step + 1, {"loss": loss, "unweighted_loss": unweighted_losses.mean()})
        loss_by_timestep.update(timesteps, unweighted_losses)
        if not accelerator.sync_gradients:
            continue

        lr_scheduler.step()
        ema.step(unet.parameters())
        progress.global_step += 1
        bar.update()
        step, at_end = progress.global_step, progress.global_step == last_step
        if step % args.logging_steps == 0 or at_end:
            bins = loss_by_timestep.read_and_reset(accelerator.reduce)
            line = log.write(step, learning_rate=lr_scheduler.get_last_lr()[0], loss_by_timestep=bins)
            bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
        if step % args.validation_steps == 0 and not at_end:
            log.check()
            with training.ema_weights(ema, unet), clock.paused():
                log.append(step, validate(accelerator, args, unet, noise_scheduler, val_batches))
                if accelerator.is_main_process:
                    with training.optional("pictures of this validation"):
                        draw_preview(accelerator, args, pipeline, step, log)
                accelerator.wait_for_everyone()
        stopping = stop.agreed(step, 1 if at_end else args.logging_steps)
        if step % args.checkpointing_steps == 0 or at_end or stopping:
            log.check()
            with clock.paused():
                checkpoint = checkpoints.save_checkpoint(accelerator, args, stateful, step)
            if stopping:
                stop.exit(checkpoint)
    bar.close()
    stop.exit_when_told(checkpoint)

    with training.ema_weights(ema, unet):
        results = validate(accelerator, args, unet, noise_scheduler, val_batches)
        log.append(last_step, results)
        results |= {"step": last_step, "training_seconds": progress.seconds, "num_images": len(val_images)}
        results |= {"dataset": train_images.name, "splits": val_images.splits}
        results |= training.about_machine(accelerator)
        log.close()
        if accelerator.is_main_process:
            save_results(args, pipeline, results)
            draw_last_pictures(accelerator, args, pipeline, train_latents, val_latents, val_images, log)
            write_model_card(output_dir)
            print(f"the run on one page: {write_report(output_dir)}")
    training.end_trackers(accelerator)
    hub.push_results(accelerator, args)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
