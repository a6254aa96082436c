"""Measure how fast both stages train, relative to the machine's peak and to stock diffusers models in the same run.

    python benchmarks/train_throughput.py            # everything, about 3 minutes on 2 cores
    python benchmarks/train_throughput.py --stage 2 --steps 20 --json throughput.json

The steps are those of `train_autoencoder.py` and `train_latent_diffusion.py`: bfloat16 autocast if the machine has
instructions for it, float32 weights, channels-last convolutions and fused AdamW. torch counts the operations. All
variants take turns, round after round, so that a slow moment of the machine affects all of them.
"""

import argparse
import dataclasses
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.vgg import cfgs, make_layers

# Python adds this file's folder to the path. The training scripts are in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_autoencoder
import train_latent_diffusion
from flower_ldm import FlowerAutoencoderKL, FlowerUNet2DModel, training
from flower_ldm.autoencoder_losses import PerceptualLoss
from flower_ldm.data import DataOptions
from flower_ldm.diffusion import make_noise_scheduler
from flower_ldm.errors import OneLineParser, exit_on_input_error
from flower_ldm.files import file_path, path_text
from flower_ldm.latent_cache import LatentDataset, load_or_build_latent_cache
from flower_ldm.models.autoencoder_flower import FlowerAutoencoderOutput
from flower_ldm.optimizers import parameters_of

DEFAULT_RECIPE = Path(__file__).resolve().parent.parent / "configs" / "flowers102_64_cpu.yaml"
NUM_CLASSES = 102
MANY_STEPS = 10**6  # more than any benchmark runs
# A GPU runs asynchronously. Several steps share one synchronization, so that its cost hardly counts.
STEPS_AT_A_TIME = {"cpu": 1, "cuda": 20}
# Stage 1's losses beyond pixel and KL loss, in the order in which they are added, with the flags of their weights.
ADDED_LOSSES = {
    "+ perceptual loss": ("perceptual_weight",),
    "+ adversarial loss, discriminator": ("adversarial_weight",),
    "+ classification loss": ("classification_weight",),
    "+ center loss, repulsion": ("center_weight", "repulsion_weight"),
}
# Names of variants in the tables and in the JSON file.
ADVERSARIAL, ADAPTIVE_WEIGHT = "+ adversarial loss, discriminator", "  with its adaptive weight measured"
FLOWER_VAE, FLOWER_UNET, STOCK_UNET = "FlowerAutoencoderKL", "FlowerUNet2DModel", "stock UNet2DModel"
IN_MEMORY = "full step, latents in memory"
FROM_CACHE = "full step, latents from the cache"
ON_THE_FLY = "full step, latents encoded on the fly"


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--stage", choices=["1", "2", "memory", "all"], default="all")
    flag("--config", type=path_text, default=str(DEFAULT_RECIPE), help="recipe of models and losses")
    flag("--resolution", type=int, help="image size in pixels; unset: the recipe's")
    flag("--steps", type=int, default=6, help="rounds; each measures every variant once (20 steps of it on a GPU)")
    flag("--autoencoder_batch_size", type=int, default=64)
    flag("--denoiser_batch_size", type=int, default=128)
    flag("--autoencoder_config", type=path_text,
         help="JSON file with arguments of FlowerAutoencoderKL; unset: the recipe's")  # fmt: skip
    flag("--unet_config", type=path_text,
         help="JSON file with arguments of FlowerUNet2DModel; unset: the recipe's")  # fmt: skip
    flag("--mixed_precision", choices=["no", "fp16", "bf16", "auto"], default="auto")
    flag("--vgg_weights", type=path_text,
         help="local file with torchvision's VGG16; unset: random weights, which take the same time")  # fmt: skip
    flag("--compile", action="store_true", help="torch.compile every model, except in the memory measurement")
    flag("--json", type=file_path, help="also write all results to this file")
    return parser.parse_args(argv)


# --- measuring -------------------------------------------------------------------------------------------------------


class Workload:
    """A function to repeat, with its operation count and its measured times.

    Args:
        run: one repetition. It is called once here to count its operations.
        items: the number of images or latents in a repetition.
        model: the model that it trains, if any.
    """

    def __init__(self, run: Callable[[], None], items: int = 0, model: nn.Module | None = None):
        self.run = run
        self.items = items
        self.parameters = sum(parameter.numel() for parameter in model.parameters()) if model is not None else 0
        self.flops = count_flops(run)
        self.seconds: list[float] = []  # of one repetition, measured once a round

    @property
    def gflops(self) -> float:
        """GFLOP/s at the median time."""
        return self.flops / median(self.seconds) / 1e9

    def rates(self, reference_gflops: float) -> dict[str, float]:
        """A row of the table."""
        return {
            "parameters": self.parameters,
            "items_per_second": self.items / median(self.seconds),
            "ms_per_step": median(self.seconds) * 1e3,
            "gflop_per_step": self.flops / 1e9,
            "gflops": self.gflops,
            "share_of_reference": self.gflops / reference_gflops,
        }

    def ms_more_than(self, other: "Workload") -> float:
        """Median in milliseconds of the differences within rounds, which slow moments of the machine don't shift."""
        return 1e3 * median(mine - theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))


def count_flops(run: Callable[[], None]) -> int:
    """Operations of all matrix products and convolutions in one repetition, backward passes included.

    A multiplication and an addition count as two. Meanwhile attention runs as matrix products, since torch can't count
    the operations of its fused CPU kernel.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def reference_workloads(accelerator: Accelerator) -> dict[str, Workload]:
    """Workloads for the machine's peak in this precision: a large matrix product, and a convolution as in stage 1."""
    options = {"device": accelerator.device, "dtype": training.autocast_dtype(accelerator) or torch.float32}
    matrix = torch.randn(2048, 2048, **options)
    images = torch.randn(16, 128, 64, 64, **options).to(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3, **options).to(memory_format=torch.channels_last)
    return {
        "2048^3 matrix product": Workload(lambda: torch.mm(matrix, matrix)),
        "3x3 convolution 128 to 128 at 64x64": Workload(lambda: F.conv2d(images, weight, padding=1)),
    }


def measure(workloads: dict[str, Workload], rounds: int, accelerator: Accelerator) -> dict:
    """Rates of all workloads and of the references, which take turns. The first round is a warm-up."""
    references = reference_workloads(accelerator)
    synchronize = torch.cuda.synchronize if accelerator.device.type == "cuda" else lambda: None
    repetitions = STEPS_AT_A_TIME[accelerator.device.type]
    for round_number in range(rounds + 1):
        for workload in (*references.values(), *workloads.values()):
            synchronize()
            start = time.perf_counter()
            for _ in range(repetitions):
                workload.run()
            synchronize()
            if round_number > 0:
                workload.seconds.append((time.perf_counter() - start) / repetitions)
    reference = {name: workload.gflops for name, workload in references.items()}
    best = max(reference.values())
    rates = {name: workload.rates(best) for name, workload in workloads.items()}
    return {"reference": reference, "reference_gflops": best, "rates": rates}


# --- set-up ----------------------------------------------------------------------------------------------------------


def script_arguments(
    script: ModuleType, options: argparse.Namespace, batch_size: int, model_config: str | None, folder: Path
) -> argparse.Namespace:
    """The arguments of a training script, from the recipe and our options."""
    flags = ["--config", options.config, f"--train_batch_size={batch_size}", "--gradient_accumulation_steps=1"]
    flags += [f"--mixed_precision={options.mixed_precision}", "--report_to=none"]
    flags.append("--torch_compile" if options.compile else "--no-torch_compile")  # whatever the recipe says
    flags.append(f"--output_dir={folder / script.__name__}")
    if model_config is not None:
        flags.append(f"--model_config={model_config}")
    if options.resolution is not None:
        flags.append(f"--resolution={options.resolution}")
    args = script.parse_args(flags)
    args.max_train_steps = MANY_STEPS
    return args


def autoencoder_arguments(options: argparse.Namespace, folder: Path) -> argparse.Namespace:
    """The arguments of `train_autoencoder.py`."""
    batch_size = options.autoencoder_batch_size
    return script_arguments(train_autoencoder, options, batch_size, options.autoencoder_config, folder)


def build_autoencoder(args: argparse.Namespace, device: torch.device) -> FlowerAutoencoderKL:
    """The recipe's model, with the classifier head that some losses need."""
    vae = training.build_model(
        FlowerAutoencoderKL, args.model_config, num_classes=NUM_CLASSES, sample_size=args.resolution
    )
    return vae.to(device, memory_format=torch.channels_last)


def write_random_vgg16(path: Path) -> str:
    """Write random weights of VGG16, up to the last layer that the perceptual loss uses. Returns the path."""
    layers = make_layers(cfgs["D"][:9]).state_dict()
    torch.save({f"features.{name}": weight for name, weight in layers.items()}, path)
    return str(path)


# --- stage 1 ---------------------------------------------------------------------------------------------------------


class StockAutoencoder(nn.Module):
    """A stock AutoencoderKL of 3.5 M parameters, with the interface that the training step calls."""

    def __init__(self, latent_channels: int, sample_size: int):
        super().__init__()
        self.vae = AutoencoderKL(
            block_out_channels=(32, 64, 96, 128),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=latent_channels,
            sample_size=sample_size,
        )

    def forward(self, images: torch.Tensor, noise: torch.Tensor, noise_levels: None = None) -> FlowerAutoencoderOutput:
        """Reconstruct, with noise of its own: its latents may have another size than ours."""
        posterior = self.vae.encode(images).latent_dist
        return FlowerAutoencoderOutput(sample=self.vae.decode(posterior.sample()).sample, posterior=posterior)


def update_autoencoder(
    accelerator: Accelerator, args: argparse.Namespace, networks: train_autoencoder.Networks, optimizer: Optimizer,
    disc_optimizer: Optimizer | None, batch: dict[str, torch.Tensor], global_step: int,
) -> None:  # fmt: skip
    """One update of an autoencoder and of its discriminator, as in the script's loop."""
    loss, _, reconstruction = train_autoencoder.autoencoder_step(accelerator, args, networks, batch, global_step)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(parameters_of(optimizer), args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    if networks.discriminator is not None and global_step >= args.disc_start:
        loss = train_autoencoder.discriminator_step(
            accelerator, networks.discriminator, batch["images"], reconstruction
        )
        accelerator.backward(loss)
        disc_optimizer.step()
        disc_optimizer.zero_grad()


class AutoencoderTraining:
    """The training of `train_autoencoder.py`, with every loss, on one batch of random images in memory."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.args = args = autoencoder_arguments(options, folder)
        args.vgg_weights = options.vgg_weights or write_random_vgg16(folder / "vgg16.pt")
        perceptual = PerceptualLoss(args.vgg_weights) if args.perceptual_weight > 0 else None
        self.accelerator = training.set_up(args)
        self.device = self.accelerator.device
        self.vae = build_autoencoder(args, self.device)
        self.ema = training.build_ema(self.vae, args.ema_decay)
        self.networks, (self.optimizer, self.disc_optimizer, _) = train_autoencoder.build_networks(
            self.accelerator, args, self.vae, perceptual
        )
        batch_size = args.train_batch_size
        self.batch = {
            "images": 2 * torch.rand(batch_size, 3, args.resolution, args.resolution, device=self.device) - 1,
            "class_labels": torch.randint(NUM_CLASSES, (batch_size,), device=self.device),
            "noise": torch.randn(batch_size, *train_autoencoder.noise_shape(args, self.vae), device=self.device),
        }

    def update(
        self, args: argparse.Namespace, networks: train_autoencoder.Networks, optimizer: Optimizer, global_step: int
    ) -> None:
        """One update, as in the script's loop."""
        update_autoencoder(self.accelerator, args, networks, optimizer, self.disc_optimizer, self.batch, global_step)

    def full_update(self, global_step: int) -> None:
        """One update with every loss and the moving average."""
        self.update(self.args, self.networks, self.optimizer, global_step)
        self.ema.step(self.vae.parameters())

    def with_losses(self, names: list[str]) -> tuple[argparse.Namespace, train_autoencoder.Networks]:
        """Flags and networks for pixel loss, KL loss and only these of the added losses."""
        left_out = [flag for name, flags in ADDED_LOSSES.items() if name not in names for flag in flags]
        args = argparse.Namespace(**{**vars(self.args), **dict.fromkeys(left_out, 0.0)})
        networks = dataclasses.replace(
            self.networks,
            perceptual=self.networks.perceptual if args.perceptual_weight > 0 else None,
            discriminator=self.networks.discriminator if args.adversarial_weight > 0 else None,
            centers=self.networks.centers if args.center_weight > 0 or args.repulsion_weight > 0 else None,
        )
        return args, networks

    def workload(
        self, args: argparse.Namespace, networks: train_autoencoder.Networks, optimizer: Optimizer, global_step: int
    ) -> Workload:
        """An update as a workload."""
        return Workload(
            lambda: self.update(args, networks, optimizer, global_step), args.train_batch_size, networks.vae
        )


def autoencoder_workloads(stage: AutoencoderTraining, compiled: bool) -> dict[str, Workload]:
    """Our model alone, then with the recipe's losses added one by one, and the stock model."""
    args = stage.args
    # The adaptive weight is measured at `disc_start` and at intervals from there, so not at the step after it.
    measuring_step, usual_step = args.disc_start, args.disc_start + 1
    alone_args, alone = stage.with_losses([])
    workloads = {FLOWER_VAE: stage.workload(alone_args, alone, stage.optimizer, usual_step)}
    in_use = [name for name, flags in ADDED_LOSSES.items() if any(getattr(args, flag) > 0 for flag in flags)]
    for count, name in enumerate(in_use, start=1):
        variant = stage.with_losses(in_use[:count])
        workloads[name] = stage.workload(*variant, stage.optimizer, usual_step)
        if name == ADVERSARIAL and stage.networks.adaptive_weight is not None:
            workloads[ADAPTIVE_WEIGHT] = stage.workload(*variant, stage.optimizer, measuring_step)

    stock = StockAutoencoder(stage.vae.config.latent_channels, args.resolution)
    stock = stock.to(stage.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(stock.parameters(), lr=args.learning_rate, fused=True)
    stock, optimizer = stage.accelerator.prepare(stock, optimizer)
    stock_networks = dataclasses.replace(alone, vae=stock)
    workloads["stock AutoencoderKL"] = stage.workload(alone_args, stock_networks, optimizer, usual_step)
    if compiled:  # after the operations were counted, which a compiled model doesn't allow
        stage.vae.compile()
        stock.compile()
    return workloads


def added_by_losses(workloads: dict[str, Workload], adaptive_weight_steps: int) -> dict[str, float]:
    """The milliseconds a step that each loss adds to those before it."""
    in_turn = [FLOWER_VAE, *(name for name in ADDED_LOSSES if name in workloads)]
    added = {name: workloads[name].ms_more_than(workloads[before]) for before, name in pairwise(in_turn)}
    if ADAPTIVE_WEIGHT in workloads:
        one_measurement = workloads[ADAPTIVE_WEIGHT].ms_more_than(workloads[ADVERSARIAL])
        added[f"+ adaptive weight, every {adaptive_weight_steps} steps"] = one_measurement / adaptive_weight_steps
    return added | {"all losses": sum(added.values())}


def measure_autoencoder(options: argparse.Namespace, folder: Path) -> dict:
    """Rates of the autoencoders, and the time that each loss adds to ours."""
    stage = AutoencoderTraining(options, folder)
    args = stage.args
    workloads = autoencoder_workloads(stage, options.compile)
    weights = "random" if options.vgg_weights is None else "given"
    return {
        "title": f"Stage 1, {args.resolution} x {args.resolution} pixels, batch {args.train_batch_size}; the "
        f"perceptual loss sees one image in {args.perceptual_every}, {weights} VGG16 weights",
        **measure(workloads, options.steps, stage.accelerator),
        "added_to": FLOWER_VAE,
        "added_ms": added_by_losses(workloads, args.adaptive_weight_steps),
    }


# --- stage 2 ---------------------------------------------------------------------------------------------------------


class DenoiserTraining:
    """The training of `train_latent_diffusion.py`, on latents of the recipe's autoencoder."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.args = args = script_arguments(
            train_latent_diffusion, options, options.denoiser_batch_size, options.unet_config, folder
        )
        self.accelerator = training.set_up(args)
        self.device = self.accelerator.device
        self.vae = build_autoencoder(autoencoder_arguments(options, folder), self.device).eval().requires_grad_(False)
        channels, size = self.vae.config.latent_channels, args.resolution // self.vae.downsample_factor
        unet = training.build_model(
            FlowerUNet2DModel, args.model_config, sample_size=size, in_channels=channels, num_classes=NUM_CLASSES
        )
        self.unet, self.optimizer = self.prepare(unet)
        self.ema = training.build_ema(self.unet, args.ema_decay)
        self.noise_scheduler = make_noise_scheduler(args.prediction_type, args.beta_schedule, args.zero_terminal_snr)
        batch_size = args.train_batch_size
        self.images = 2 * torch.rand(batch_size, 3, args.resolution, args.resolution, device=self.device) - 1
        self.batch = {
            "latents": torch.randn(batch_size, channels, size, size, device=self.device),
            "noise": torch.randn(batch_size, channels, size, size, device=self.device),
            "uniforms": torch.rand(batch_size, 2, device=self.device),
            "class_labels": torch.randint(NUM_CLASSES, (batch_size,), device=self.device),
        }

    def prepare(self, model: nn.Module) -> tuple[nn.Module, Optimizer]:
        """The model on its device and its optimizer, both prepared."""
        model = model.to(self.device, memory_format=torch.channels_last)
        return self.accelerator.prepare(model, training.build_optimizer(self.args, model))

    def cached_batches(self, folder: Path) -> Iterator[dict]:
        """The script's own data path: a cache file with latents of synthetic flowers, its workers and its order."""
        args = self.args
        images, _ = DataOptions("synthetic", resolution=args.resolution, classes=range(5), images_per_class=50).load(
            seed=args.seed
        )
        options = {"device": self.device, "autocast_dtype": training.autocast_dtype(self.accelerator)}
        load_or_build_latent_cache(self.vae, images, folder, **options)
        cache = load_or_build_latent_cache(self.vae, images, folder, **options)  # now it is read from the file
        channels = self.vae.config.latent_channels
        dataset = LatentDataset(cache, [0.0] * channels, [1.0] * channels, args.seed)
        return iter(training.training_batches(self.accelerator, args, dataset, 0, MANY_STEPS))

    def update(self, model: nn.Module, optimizer: Optimizer, batch: dict[str, torch.Tensor]) -> None:
        """One update of any denoiser, as in the script's loop, without the moving average."""
        losses, _, _ = train_latent_diffusion.denoising_step(
            self.args, model, self.noise_scheduler, batch, NUM_CLASSES, self.args.timestep_density
        )
        self.accelerator.backward(losses.mean())
        self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def full_update(self, batch: dict[str, torch.Tensor]) -> None:
        """One update of our denoiser and its moving average."""
        self.update(self.unet, self.optimizer, batch)
        self.ema.step(self.unet.parameters())

    @torch.no_grad()
    def encoded_batch(self) -> dict[str, torch.Tensor]:
        """The batch, with latents encoded from images in memory. Reading the images would take extra time."""
        with self.accelerator.autocast():
            posterior = self.vae.encode(self.images).latent_dist
            return self.batch | {"latents": self.vae.normalize(posterior.sample().float())}


def stock_denoisers(unet: FlowerUNet2DModel) -> dict[str, nn.Module]:
    """A stock UNet2DModel of 3.9 M parameters, and a stock transformer as wide and as deep as ours."""
    config = unet.config
    sizes = {"sample_size": config.sample_size, "in_channels": config.in_channels, "out_channels": config.in_channels}
    return {
        STOCK_UNET: UNet2DModel(
            **sizes,
            block_out_channels=(64, 96, 128),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=NUM_CLASSES + 1,
        ),
        "stock DiTTransformer2DModel": DiTTransformer2DModel(
            **sizes,
            patch_size=config.patch_size,
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.hidden_size // config.num_attention_heads,
            num_embeds_ada_norm=NUM_CLASSES,
        ),
    }


def measure_denoiser(options: argparse.Namespace, folder: Path) -> dict:
    """Rates of the denoisers, and the time that the cache, or encoding on the fly, adds to a full step of ours.

    A worker loads its next batch during the step that consumes the last one. So its work counts in the right step,
    although the variants take turns.
    """
    stage = DenoiserTraining(options, folder)
    batch_size, batch = options.denoiser_batch_size, stage.batch
    models = {FLOWER_UNET: (stage.unet, stage.optimizer)}
    models |= {name: stage.prepare(model) for name, model in stock_denoisers(stage.unet).items()}
    workloads = {
        name: Workload(partial(stage.update, model, optimizer, batch), batch_size, model)
        for name, (model, optimizer) in models.items()
    }
    batches = stage.cached_batches(folder)
    data_paths = {
        IN_MEMORY: lambda: stage.full_update(batch),
        FROM_CACHE: lambda: stage.full_update(next(batches)),
        ON_THE_FLY: lambda: stage.full_update(stage.encoded_batch()),
    }
    workloads |= {name: Workload(run, batch_size, stage.unet) for name, run in data_paths.items()}
    if options.compile:  # after the operations were counted, which a compiled model doesn't allow
        for model, _ in models.values():
            model.compile()
    rates = measure(workloads, options.steps, stage.accelerator)
    in_memory = workloads[IN_MEMORY]
    return {
        "title": f"Stage 2, latents of {' x '.join(map(str, batch['latents'].shape[1:]))}, batch {batch_size}",
        **rates,
        "gflops_over_stock_unet": workloads[FLOWER_UNET].gflops / workloads[STOCK_UNET].gflops,
        "added_to": IN_MEMORY,
        "added_ms": {name: workloads[name].ms_more_than(in_memory) for name in (FROM_CACHE, ON_THE_FLY)},
    }


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_memory(stage: str, options: argparse.Namespace) -> float:
    """Peak memory of a few full training steps in GiB: the GPU's, or else that of this process since its start."""
    with tempfile.TemporaryDirectory() as folder:
        if stage == "1":
            autoencoder = AutoencoderTraining(options, Path(folder))
            for step in range(3):
                autoencoder.full_update(autoencoder.args.disc_start + step)
            device = autoencoder.device
        else:
            denoiser = DenoiserTraining(options, Path(folder))
            batches = denoiser.cached_batches(Path(folder))
            for _ in range(3):
                denoiser.full_update(next(batches))
            device = denoiser.device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def measure_memory(options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of each stage in GiB, each in its own process."""
    peaks = {}
    for stage in ("1", "2"):
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
            peaks[f"stage {stage}"] = fresh_process.submit(peak_memory, stage, options).result()
    return peaks


# --- the program -----------------------------------------------------------------------------------------------------


def print_rates(results: dict) -> None:
    """Print a stage's two tables: the rate of each variant, and the time added to the first."""
    measured = ", ".join(f"{name} {gflops:.0f}" for name, gflops in results["reference"].items())
    print(f"\n{results['title']}")
    print(f"reference rate {results['reference_gflops']:.0f} GFLOP/s, the best of: {measured}")
    print(f"{'':40}{'params':>9}{'per second':>11}{'ms/step':>10}{'GFLOP/s':>10}{'of reference':>14}")
    for name, row in results["rates"].items():
        print(
            f"{name:40}{row['parameters'] / 1e6:7.2f} M{row['items_per_second']:11.1f}{row['ms_per_step']:10.1f}"
            f"{row['gflops']:10.1f}{row['share_of_reference']:14.2f}"
        )
    if "gflops_over_stock_unet" in results:
        print(f"GFLOP/s of {FLOWER_UNET} over {STOCK_UNET}: {results['gflops_over_stock_unet']:.2f}")
    print(f'time added to "{results["added_to"]}":')
    for name, ms in results["added_ms"].items():
        share = ms / results["rates"][results["added_to"]]["ms_per_step"]
        print(f"{name:40}{ms:+27.1f} ms{100 * share:+9.1f} %")


def main(argv: list[str] | None = None) -> dict:
    """Measure, print the tables, and return all results."""
    options = parse_options(argv)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    precision = training.choose_precision(options.mixed_precision)
    autocast = f"{precision} autocast over float32 weights" if precision != "no" else "float32"
    print(f"{device}, torch {torch.__version__}; {autocast}, medians of {options.steps}")
    results = {"device": device, "torch": torch.__version__, "precision": precision}
    results["options"] = {k: str(v) for k, v in vars(options).items()}
    # Memory comes first: on Linux a new process inherits the peak memory of its parent.
    if options.stage in ("memory", "all"):
        results["memory_gib"] = measure_memory(options)
        print("\npeak memory of full training steps, each stage in its own process")
        for name, gib in results["memory_gib"].items():
            print(f"{name:40}{gib:9.2f} GiB")
    with tempfile.TemporaryDirectory() as folder:
        if options.stage in ("1", "all"):
            results["stage1"] = measure_autoencoder(options, Path(folder))
            print_rates(results["stage1"])
        if options.stage in ("2", "all"):
            results["stage2"] = measure_denoiser(options, Path(folder))
            print_rates(results["stage2"])
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    with exit_on_input_error():
        main()
