"""A run's checkpoints: progress, save, find, resume; and which folder is a run's own."""

import argparse
import os
import shutil
from pathlib import Path

import yaml
from accelerate import Accelerator
from accelerate.utils import SCALER_NAME
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LambdaLR

from .errors import InputError, one_line
from .files import check_writable

CHECKPOINT_PREFIX = "checkpoint-"

# What a resumed run may have otherwise. The paths among these are compared by what they lead to (`Progress.identity`),
# the batch by the images of one update.
MAY_CHANGE = {
    "config", "data_dir", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "max_train_steps",
    "num_train_epochs", "val_splits", "checkpointing_steps", "checkpoints_total_limit", "validation_steps",
    "logging_steps", "report_to", "dataloader_num_workers", "torch_compile", "gradient_checkpointing",
    "mixed_precision", "skip_bad_images", "train_batch_size", "gradient_accumulation_steps", "model_config",
    "vgg_weights", "autoencoder", "latent_cache_dir", "guidance_scale", "final_pictures", "learning_rate",
    "push_to_hub", "hub_model_id", "hub_private_repo", "dataset", "max_image_pixels",
}  # fmt: skip


# --- the output folder -----------------------------------------------------------------------------------------------


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


# --- progress --------------------------------------------------------------------------------------------------------


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


# --- checkpoints -----------------------------------------------------------------------------------------------------


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
