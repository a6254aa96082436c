"""What both training scripts share and nobody reads twice: flags and recipes, set-up, checkpoints, EMA, the loss log.

Its neighbours: `train_autoencoder.py` and `train_latent_diffusion.py`, which hold the training steps themselves.
"""

import argparse
import difflib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    SCALER_NAME,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
    set_seed,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .data import ImageDataset, TrainingSampler, keep_batch, load_datasets
from .errors import InputError, OneLineParser, one_line
from .files import check_writable, whole_path

CHECKPOINT_PREFIX = "checkpoint-"
# What a resumed run may have otherwise. The paths among these are compared by what they lead to (`Progress.identity`),
# the batch by the images of one update.
MAY_CHANGE = {
    "config", "data_dir", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "max_train_steps",
    "num_train_epochs", "val_splits", "checkpointing_steps", "checkpoints_total_limit", "validation_steps",
    "logging_steps", "report_to", "dataloader_num_workers", "torch_compile", "gradient_checkpointing",
    "mixed_precision", "skip_bad_images", "train_batch_size", "gradient_accumulation_steps", "model_config",
    "vgg_weights", "autoencoder", "latent_cache_dir", "guidance_scale", "final_pictures", "learning_rate",
    "push_to_hub", "hub_model_id", "hub_private_repo", "dataset",
}  # fmt: skip
# diffusers' schedules that these flags can describe.
LR_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


# --- flags and recipes -----------------------------------------------------------------------------------------------


def common_parser(description: str) -> OneLineParser:
    """The flags that both scripts have; each script adds its own."""
    parser = OneLineParser(description=description)
    flag = parser.add_argument
    switch = argparse.BooleanOptionalAction
    parser.add_argument_group("recipe")
    flag("--config", help="YAML recipe with sections common, autoencoder, latent_diffusion; flags given here win")
    # data
    flag("--dataset", default="flowers102", help="flowers102, synthetic, imagefolder, or a Hub data set id")
    flag("--data_dir", help="the folder that holds flowers-102/, or the class folders")
    flag("--image_column", default="image", help="of a Hub data set")
    flag("--label_column", default="label", help="of a Hub data set")
    flag("--skip_bad_images", action=switch, default=False, help="count unreadable images and go on without them")
    flag("--train_splits", nargs="+", help="splits to train on")
    flag("--val_splits", nargs="+", help="splits held out")
    flag("--classes", nargs="+", help="names, else 0-based indices; relabelled 0..k-1 in this order")
    flag("--images_per_class", type=int, default=100, help="training images of each synthetic class")
    flag("--resolution", type=int, default=64, help="pixels a side")
    flag("--dataloader_num_workers", type=int, default=2)
    # run
    flag("--output_dir", help="results/autoencoder or results/flower-ldm unless set")
    flag("--overwrite_output_dir", action=switch, default=False, help="replace the run that is there")
    flag("--seed", type=int, default=0)
    flag("--mixed_precision", choices=["no", "fp16", "bf16", "auto"],
         help="auto: bf16 where the device has instructions for it, else no; unset: accelerate's")  # fmt: skip
    flag("--torch_compile", action=switch, default=False)
    flag("--gradient_checkpointing", action=switch, default=False, help="less memory, slower")
    # optimisation
    flag("--train_batch_size", type=int, default=64, help="per process and micro-batch")
    flag("--gradient_accumulation_steps", type=int, default=1)
    flag("--max_train_steps", type=int, help="optimizer updates; wins over --num_train_epochs")
    flag("--num_train_epochs", "--total_epochs", type=int, default=100)
    flag("--learning_rate", type=float, default=3e-4)
    flag("--lr_scheduler", choices=LR_SCHEDULES, default="cosine")
    flag("--lr_warmup_steps", type=int, default=100, help="optimizer updates")
    flag("--max_grad_norm", type=float, default=1.0)
    flag("--ema_decay", type=float, default=0.999)
    flag("--model_config", help="JSON file with arguments of the model's class")
    # checkpoints, validation, logs
    flag("--checkpointing_steps", type=int, default=1000)
    flag("--checkpoints_total_limit", type=int, help="keep only the newest; unset: all")
    flag("--resume_from_checkpoint", "--checkpoint_path", help="latest, or a checkpoint folder")
    flag("--validation_steps", "--visualize_every", type=int, default=1000)
    flag("--logging_steps", type=int, default=50)
    flag("--final_pictures", action=switch, default=True,
         help="at the end: maps of the latents, denoising paths, animations")  # fmt: skip
    flag("--report_to", default="tensorboard", help="tensorboard, wandb, trackio, all or none")
    # the Hub
    flag("--push_to_hub", action=switch, default=False, help="upload the model, its code and pictures at the end")
    flag("--hub_model_id", help="user/name, or a name in your own namespace; unset: the name of --output_dir")
    flag("--hub_private_repo", action=switch, default=False, help="make the repository private, where it is new")
    return parser


def parse_arguments(parser: OneLineParser, section: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Flags over recipe over defaults.

    Raises:
        InputError: for an unknown flag or recipe key, or a value that can't be right.
    """
    argv = sys.argv[1:] if argv is None else argv
    recipe_parser = OneLineParser(add_help=False)
    recipe_parser.add_argument("--config")
    recipe = recipe_parser.parse_known_args(argv)[0].config
    args = parser.parse_args((read_recipe(parser, Path(recipe), section) if recipe else []) + argv)
    if given(argv, parser, "num_train_epochs") and not given(argv, parser, "max_train_steps"):
        args.max_train_steps = None  # the recipe's, which would win over the flag
    check_numbers(args)
    check_trackers(args.report_to)
    for name in {"dataset", "autoencoder"} & vars(args).keys():
        setattr(args, name, whole_path(getattr(args, name)))
    return args


def given(argv: list[str], parser: OneLineParser, name: str) -> bool:
    """Whether a flag is among the words of the command line, by any of its spellings."""
    actions = parser._option_string_actions
    return any(word in actions and actions[word].dest == name for word in (word.partition("=")[0] for word in argv))


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that can't be right, of the flags that the script at hand has."""
    positive = ("resolution", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "logging_steps",
                "validation_steps", "checkpointing_steps", "checkpoints_total_limit", "images_per_class",
                "learning_rate", "max_grad_norm", "disc_learning_rate", "adaptive_weight_steps")  # fmt: skip
    not_negative = ("max_train_steps", "lr_warmup_steps", "dataloader_num_workers", "disc_start", "loss_ramp_steps")
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name} must be a finite number, got {value}")
        if name in positive and value is not None and value <= 0:
            raise InputError(f"--{name} must be positive, got {value}")
        if name in not_negative and value is not None and value < 0:
            raise InputError(f"--{name} must not be negative, got {value}")
    if not 0 <= args.seed < 2**32:  # numpy's bounds
        raise InputError(f"--seed must be at least 0 and below 2**32, got {args.seed}")
    if not 0 <= args.ema_decay < 1:
        raise InputError(f"--ema_decay must be at least 0 and below 1, got {args.ema_decay}")


def check_trackers(report_to: str) -> None:
    """Refuse a tracker that accelerate doesn't know, or would leave out in silence because it isn't installed."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    if report_to not in ("all", "none", *installed):
        raise InputError(
            f"--report_to {report_to} is unknown or not installed; there are {', '.join(installed)}, all and none"
        )


def read_recipe(parser: OneLineParser, path: Path, section: str) -> list[str]:
    """A recipe's sections `common` and `section` as the command-line words they stand for.

    Its `model_config` is a path relative to the recipe.
    """
    if not path.is_file():
        raise InputError(f"--config {path} is no file")
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is not YAML: {one_line(error)}") from error
    sections = ("common", "autoencoder", "latent_diffusion")
    if not isinstance(recipe, dict) or any(not isinstance(part or {}, dict) for part in recipe.values()):
        raise InputError(f"--config {path} must hold sections {', '.join(sections)}, each with flags and values")
    for key in recipe:
        if key not in sections:
            raise InputError(f"{path}: unknown section '{key}'; there are {', '.join(sections)}")
    flags = {option.removeprefix("--"): action for option, action in parser._option_string_actions.items()}
    words = []
    for key, value in {**(recipe.get("common") or {}), **(recipe.get(section) or {})}.items():
        if key not in flags or key in ("config", "help"):
            nearest = difflib.get_close_matches(key, flags, n=1)
            raise InputError(f"{path}: unknown key '{key}'" + (f"; did you mean '{nearest[0]}'?" if nearest else ""))
        if isinstance(flags[key], argparse.BooleanOptionalAction) and isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no-{key}")
        elif isinstance(value, bool):  # YAML's reading of a bare yes or no, as in `mixed_precision: no`
            words.append(f"--{key}={'yes' if value else 'no'}")
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif value is not None:
            # A recipe and its model travel together: the path is seen from the recipe, not from where one stands.
            words.append(f"--{key}={path.parent / value if key == 'model_config' else value}")
    return words


def read_model_config(path: str | None) -> dict:
    """The JSON object of `--model_config`; empty without one."""
    if path is None:
        return {}
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--model_config {path} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"--model_config {path} must be one JSON object with arguments of the model")
    return config


def build_model(model_class: type, path: str | None, **of_this_run) -> nn.Module:
    """A model from `--model_config`, with the arguments that follow from the run.

    Raises:
        InputError: for an argument that the model doesn't have, that the run sets otherwise, or that can't be built.
    """
    # A saved config has entries of diffusers too, and what was measured at the end of the run that saved it.
    not_arguments = ("auto_map", "latents_mean", "latents_std")
    config = {k: v for k, v in read_model_config(path).items() if not k.startswith("_") and k not in not_arguments}
    known = inspect.signature(model_class.__init__).parameters
    for key, value in config.items():
        if key not in known:
            raise InputError(f"--model_config {path}: {model_class.__name__} has no '{key}'")
        if value is not None and value != of_this_run.get(key, value):
            raise InputError(f"--model_config {path}: '{key}' must be {of_this_run[key]} in this run, or be left out")
    try:
        return model_class(**(config | of_this_run))
    except (TypeError, ValueError, RuntimeError) as error:
        which = f"--model_config {path}: " if path else ""
        raise InputError(f"{which}{model_class.__name__} can't be built: {one_line(error)}") from error


# --- set-up ----------------------------------------------------------------------------------------------------------


def choose_precision(mixed_precision: str | None) -> str | None:
    """What `--mixed_precision` stands for on this machine; `None` leaves it to accelerate.

    Raises:
        InputError: where the device can't compute in it, or only by emulating it: the matrix products of a CPU without
            AVX-512 take 400 times as long in bfloat16 as in float32.
    """
    chosen = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        bf16_is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16" if bf16_is_native else "no") if mixed_precision == "auto" else mixed_precision
    if chosen == "fp16":
        raise InputError("--mixed_precision fp16 needs a GPU; on a CPU use auto or no")
    if chosen == "bf16" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        raise InputError(
            "--mixed_precision bf16: this CPU has no instructions for it and would take hundreds of times as long as "
            "without; use auto or no"
        )
    if mixed_precision == "auto":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "no"
    return mixed_precision


def set_up(args: argparse.Namespace, find_unused_parameters: bool = False) -> Accelerator:
    """The accelerator and the seed."""
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=choose_precision(args.mixed_precision),
        # Accumulation runs across epochs, so that every update sees the same number of images.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=find_unused_parameters
            ),
            # The others wait while one process decodes or encodes a large data set.
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),
        ],
    )
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    set_seed(args.seed)
    return accelerator


def autocast_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """What `accelerator.autocast()` computes in; `None` where it changes nothing."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)


def check_output_dir(args: argparse.Namespace) -> None:
    """Refuse an output folder that holds another run, or something else, and change nothing.

    Raises:
        InputError: unless this run goes on with the one there, or `--overwrite_output_dir` allows to replace it; where
            nothing can be written.
    """
    output_dir = Path(args.output_dir)
    check_writable(output_dir, "--output_dir")
    if not resumes_in_place(args):
        for name in ("data_dir", "dataset", "autoencoder", "config", "model_config", "vgg_weights"):
            path = getattr(args, name, None)
            there = path and (name == "data_dir" or os.path.exists(path))  # else an id on the Hub
            if there and Path(path).resolve().is_relative_to(output_dir.resolve()):
                raise InputError(f"--output_dir {output_dir} holds --{name} {path}: name another folder")
    if not output_dir.is_dir() or not any(output_dir.iterdir()) or resumes_in_place(args):
        return
    if not args.overwrite_output_dir:
        raise InputError(
            f"--output_dir {output_dir} is not empty: name another, go on with the run there by "
            "--resume_from_checkpoint latest, or replace it by --overwrite_output_dir"
        )
    if not (output_dir / "args.yaml").is_file():
        raise InputError(f"--overwrite_output_dir: {output_dir} has no args.yaml, so it is no run of ours to replace")


def resumes_in_place(args: argparse.Namespace) -> bool:
    """Whether the run goes on in the folder of the checkpoint that it starts from."""
    checkpoint, output_dir = args.resume_from_checkpoint, Path(args.output_dir)
    return checkpoint is not None and (
        checkpoint == "latest" or output_dir.resolve() == Path(checkpoint).resolve().parent
    )


def claim_output_dir(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Make the output folder this run's, with its `args.yaml`, and start the trackers in it.

    Called when nothing else can be wrong any more, so that a mistake neither costs the run that is replaced nor leaves
    a folder behind that the next try would stumble over. Another run may have come there meanwhile, so it looks again.
    """
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        check_output_dir(args)
        output_dir.mkdir(parents=True, exist_ok=True)
        for path in list(output_dir.iterdir()):
            if not resumes_in_place(args) or path.name.startswith("unfinished-"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (output_dir / "args.yaml").write_text(yaml.safe_dump(vars(args), sort_keys=True))
    accelerator.wait_for_everyone()
    if args.report_to != "none":
        accelerator.init_trackers("flower_ldm")


def load_images(accelerator: Accelerator, args: argparse.Namespace) -> tuple[ImageDataset, ImageDataset]:
    """Training and held-out images. One process downloads, the others wait for it."""
    with accelerator.main_process_first():
        return load_datasets(
            args.dataset,
            args.data_dir,
            resolution=args.resolution,
            train_splits=args.train_splits,
            val_splits=args.val_splits,
            classes=args.classes,
            image_column=args.image_column,
            label_column=args.label_column,
            skip_bad_images=args.skip_bad_images,
            images_per_class=args.images_per_class,
            seed=args.seed,
        )


def total_steps(accelerator: Accelerator, args: argparse.Namespace, num_images: int) -> int:
    """Optimizer updates of the whole run."""
    if args.max_train_steps is not None:
        return args.max_train_steps
    return max(1, args.num_train_epochs * num_images // images_per_step(accelerator, args))


def images_per_step(accelerator: Accelerator, args: argparse.Namespace) -> int:
    """Images that one optimizer update sees, over all processes and micro-batches."""
    return args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps


def training_batches(
    accelerator: Accelerator, args: argparse.Namespace, dataset: Dataset, first_step: int, last_step: int
) -> DataLoader:
    """The run's remaining micro-batches, from one optimizer update to another, shared out over the processes."""
    per_step = images_per_step(accelerator, args)
    sampler = TrainingSampler(len(dataset), args.seed, first_step * per_step, last_step * per_step)
    dataloader = DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        sampler=sampler,
        collate_fn=keep_batch,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=accelerator.device.type == "cuda",
        drop_last=True,
    )
    return accelerator.prepare_data_loader(dataloader)


def leave_signals_to_parent(worker_id: int) -> None:
    """Keep a data loader's worker at work when a signal to stop reaches all processes, as from Ctrl-C or a scheduler.

    The run goes on to the end of its update and to a checkpoint. SIGTERM from the parent still ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """End this process when its parent sends SIGTERM; a handler wouldn't know who sent it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def validation_batches(accelerator: Accelerator, args: argparse.Namespace, dataset: Dataset) -> DataLoader:
    """The held-out split in order, shared out over the processes."""
    return accelerator.prepare_data_loader(DataLoader(dataset, args.train_batch_size, collate_fn=keep_batch))


def build_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer):
    """One of diffusers' schedules. Don't prepare it: accelerate would step it once a process."""
    return get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )


# --- moving average --------------------------------------------------------------------------------------------------


def build_ema(model: nn.Module, decay: float) -> EMAModel:
    """diffusers' moving average of a model's parameters, warmed up by its own (1 + step) / (10 + step)."""
    return EMAModel(model.parameters(), decay=decay, foreach=True)


@contextmanager
def ema_weights(ema: EMAModel, model: nn.Module) -> Iterator[nn.Module]:
    """The model with its averaged weights and in evaluation mode, for as long as the context lasts.

    A compiled model runs uncompiled: validation and previews have batches of many sizes, and each would cost a
    compilation of its own.
    """
    parameters = list(model.parameters())
    ema.store(parameters)
    ema.copy_to(parameters)
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield model
    finally:
        ema.restore(parameters)
        model.train()


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Progress:
    """Where a run stands: optimizer updates done, seconds spent, the best held-out score so far.

    Args:
        identity: what makes it this run, by name; a checkpoint of a run that differs in it is refused.
    """

    def __init__(self, identity: dict[str, str | int]):
        self.identity = identity
        self.global_step = 0
        self.seconds = 0.0
        self.best_score = float("inf")

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict) -> None:
        for name, value in self.identity.items():
            saved = state_dict["identity"].get(name, "not recorded")
            if saved != value:
                raise InputError(f"its {name} was {saved}, this run's is {value}: they must be the same")
        vars(self).update(state_dict)


def run_identity(accelerator: Accelerator, args: argparse.Namespace, images: ImageDataset, model: nn.Module) -> dict:
    """What a run's flags don't say, or say by a path: images per update, the data, the model."""
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return {
        "images per update (processes x --train_batch_size x --gradient_accumulation_steps)": images_per_step(
            accelerator, args
        ),
        "training data": images.fingerprint,
        "model": json.dumps(config, sort_keys=True),
    }


class Clock:
    """Adds the seconds spent on training, validation and saving apart, to a run's progress."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.started = time.perf_counter()

    def read(self) -> float:
        """Bring `progress.seconds` up to date and return it."""
        now = time.perf_counter()
        self.progress.seconds += now - self.started
        self.started = now
        return self.progress.seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in this context doesn't count."""
        self.read()
        yield
        self.started = time.perf_counter()


def progress_bar(accelerator: Accelerator, first_step: int, last_step: int, name: str) -> tqdm:
    """Optimizer updates done, their rate, and the time left; in the main process only."""
    return tqdm(
        initial=first_step, total=last_step, desc=name, unit="step", disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )  # fmt: skip


def save_checkpoint(accelerator: Accelerator, args: argparse.Namespace, global_step: int) -> Path:
    """Write `checkpoint-<step>/`, complete or not at all, then drop the oldest beyond the limit."""
    output_dir = Path(args.output_dir)
    target, unfinished = output_dir / f"{CHECKPOINT_PREFIX}{global_step}", output_dir / f"unfinished-{global_step}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / "args.yaml").write_text(yaml.safe_dump(vars(args), sort_keys=True))
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
        if args.checkpoints_total_limit is not None:
            for old in list_checkpoints(output_dir)[: -args.checkpoints_total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()  # a process that ends now must not take the main one along
    return target


def list_checkpoints(output_dir: Path) -> list[Path]:
    """A run's complete checkpoints, oldest first."""
    found = [path for path in output_dir.glob(f"{CHECKPOINT_PREFIX}*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The folder that `--resume_from_checkpoint` names, checked against this run's flags; `None` without the flag."""
    if args.resume_from_checkpoint is None:
        return None
    checkpoints = list_checkpoints(Path(args.output_dir))
    if args.resume_from_checkpoint != "latest":
        checkpoint = Path(args.resume_from_checkpoint)
        if not (checkpoint / "args.yaml").is_file():
            raise InputError(f"--resume_from_checkpoint {checkpoint} is no checkpoint folder")
    elif checkpoints:
        checkpoint = checkpoints[-1]
    else:
        raise InputError(f"--resume_from_checkpoint latest: {args.output_dir} holds no checkpoint; leave the flag out")
    try:
        saved = dict(yaml.safe_load((checkpoint / "args.yaml").read_text()))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise InputError(f"--resume_from_checkpoint {checkpoint}: its args.yaml can't be read") from error
    if resumes_in_place(args) and checkpoint.resolve() not in [path.resolve() for path in checkpoints]:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint} must be called {CHECKPOINT_PREFIX}<step>, or --output_dir another"
        )
    if resumes_in_place(args) and checkpoint.resolve() != checkpoints[-1].resolve():
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: {args.output_dir} holds {checkpoints[-1].name}, which is newer; "
            "go on from that one, or name another --output_dir"
        )
    for name in sorted(set(vars(args)) - MAY_CHANGE):
        if saved.get(name) != getattr(args, name):
            raise InputError(
                f"--{name} is {getattr(args, name)}, but {checkpoint} was made with {saved.get(name)}: "
                "a resumed run must have the same"
            )
    return checkpoint


def resume(
    accelerator: Accelerator,
    args: argparse.Namespace,
    checkpoint: Path | None,
    progress: Progress,
    ema: EMAModel,
    lr_scheduler: LambdaLR,
) -> None:
    """Load a checkpoint, if there is one, into all that has been prepared or registered.

    The schedule goes on from the checkpoint's update, with this run's `--learning_rate`.

    Raises:
        InputError: where it is damaged, belongs to another run, or is beyond this run's end.
    """
    if checkpoint is not None:
        if accelerator.scaler is not None and not (checkpoint / SCALER_NAME).is_file():
            raise InputError(
                f"--mixed_precision fp16: {checkpoint} was made without, and has no scale of the gradients to go on "
                "with; use bf16 or no"
            )
        try:
            accelerator.load_state(str(checkpoint))
        except Exception as error:  # torch, pickle and safetensors each have errors of their own for a damaged file
            # torch names every parameter that has another shape; our own line is whole.
            reason = one_line(error, None if isinstance(error, InputError) else 300)
            raise InputError(
                f"--resume_from_checkpoint {checkpoint} doesn't fit this run, or is damaged: {reason}"
            ) from error
        accelerator.step = 0  # it counts micro-batches: a checkpoint lies between two updates, however many those had
        ema.to(accelerator.device)  # accelerate loads what is registered to the CPU
        lr_scheduler.base_lrs = [args.learning_rate] * len(lr_scheduler.base_lrs)
        for group, lr_lambda in zip(lr_scheduler.optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
            group["lr"] = args.learning_rate * lr_lambda(lr_scheduler.last_epoch)
    if progress.global_step > args.max_train_steps:
        raise InputError(
            f"{checkpoint} is at step {progress.global_step}, beyond the {args.max_train_steps} of this run: "
            "raise --max_train_steps"
        )


# --- logs and ends ---------------------------------------------------------------------------------------------------


class LossLog:
    """Means of the losses since the last line, kept on the device so that no step waits for one.

    The first step and term that is not finite is kept there too, and found when the means are read: at every log line
    and before every checkpoint, so that no bad weights are ever saved.
    """

    def __init__(self, accelerator: Accelerator, path: Path, first_step: int):
        self.accelerator = accelerator
        self.path = path
        # By the names that are measured together: their sums, the first bad step of each, and how many were added.
        self.groups: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor, list[int]]] = {}
        self.last_step, self.last_time = first_step, time.perf_counter()

    def update(self, global_step: int, losses: dict[str, torch.Tensor]) -> None:
        """Add one micro-batch's scalars. Which ones are measured may change from step to step."""
        values = torch.stack([value.detach().float().reshape(()) for value in losses.values()])
        if tuple(losses) not in self.groups:
            self.groups[tuple(losses)] = torch.zeros_like(values), torch.full_like(values, torch.inf), [0]
        sums, bad_steps, count = self.groups[tuple(losses)]
        sums += values
        bad_steps.copy_(torch.where(values.isfinite(), bad_steps, bad_steps.clamp(max=global_step)))
        count[0] += 1

    def check(self) -> None:
        """Raise where any process has met a loss that is not finite.

        Raises:
            InputError: with the step and the term.
        """
        for names, (_, bad_steps, _) in self.groups.items():
            steps = self.accelerator.gather(bad_steps).view(-1, len(names)).amin(dim=0).tolist()
            step, name = min(zip(steps, names, strict=True), key=lambda pair: pair[0])
            if step != float("inf"):
                raise not_finite(name, step)

    def write(self, global_step: int, **more: float) -> dict[str, float]:
        """Check, average over processes, and append one line to `log.jsonl` and to the trackers."""
        self.check()
        line = {}
        for names, (sums, _, count) in self.groups.items():
            means = self.accelerator.reduce(sums / count[0], reduction="mean").tolist()
            line |= dict(zip(names, means, strict=True))
        now = time.perf_counter()
        line |= more | {"steps_per_second": (global_step - self.last_step) / (now - self.last_time)}
        self.append(global_step, line)
        self.groups.clear()
        self.last_step, self.last_time = global_step, now
        return line

    def append(self, global_step: int, line: dict) -> None:
        """One line of scalars: `log.jsonl` and the trackers.

        Raises:
            InputError: where one of them is not finite.
        """
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise not_finite(name, global_step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": global_step, **line}) + "\n")
        self.accelerator.log({key: value for key, value in line.items() if isinstance(value, float)}, step=global_step)

    def show(self, global_step: int, pictures: dict[str, Path]) -> None:
        """Pictures that lie on disk, by name, to each tracker that takes images. For the main process."""
        for tracker in self.accelerator.trackers:
            images = {name: np.asarray(Image.open(path).convert("RGB"))[None] for name, path in pictures.items()}
            if tracker.name == "trackio":  # accelerate has no log_images for it
                import trackio

                tracker.log({name: trackio.Image(image[0]) for name, image in images.items()}, step=global_step)
            elif hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(images, step=global_step, **options)


def not_finite(name: str, global_step: float) -> InputError:
    """What ends a run that has met a number like this."""
    return InputError(
        f"{name} is not finite at step {global_step:.0f}: the run stops here, earlier checkpoints are kept; "
        "go on from one with a lower --learning_rate, or --mixed_precision bf16 in place of fp16"
    )


def read_log(path: Path) -> list[dict]:
    """The lines of a `log.jsonl`, in order of steps; of a step logged twice, by a resumed run, the later line."""
    lines = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # a killed run's last words
            continue
        lines[line["step"], "steps_per_second" not in line] = line  # held-out values stand behind the training losses
    return [lines[key] for key in sorted(lines)]


class StopSignal:
    """Remembers SIGINT or SIGTERM, so that a run saves a checkpoint before it ends. A second one ends it at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame) -> None:
        self.number = number
        for restored in (signal.SIGINT, signal.SIGTERM):
            signal.signal(restored, signal.SIG_DFL)

    def agreed(self, global_step: int, every: int) -> bool:
        """Whether any process was told to stop. Several processes agree on it only every so many steps."""
        if self.accelerator.num_processes == 1:
            return self.number > 0
        if global_step % every:
            return False
        number = torch.tensor(self.number, device=self.accelerator.device)
        self.number = int(self.accelerator.gather(number).max())
        return self.number > 0

    def exit(self, checkpoint: Path) -> None:
        """End the run as a signal does, saying how to go on."""
        self.accelerator.print(f"stopped: go on with --resume_from_checkpoint {checkpoint}")
        self.accelerator.end_training()
        sys.exit(128 + self.number)

    def exit_when_told(self, checkpoint: Path) -> None:
        """After the last update: from here on a signal ends the run as it comes, and the last checkpoint stays."""

        def exit(number: int, frame) -> None:
            self._remember(number, frame)
            self.exit(checkpoint)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, exit)
        if self.number:  # it came when the last update was done
            self.exit(checkpoint)
