"""A run's checkpoints: save them, find them, resume from them. And which folder a run may write to."""

import argparse
import itertools
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, get_int_from_env
from torch import nn

from . import runs
from .checkpoint_files import checked, checked_state, load_state, save_state, why_invalid, write_manifest
from .data import VAL_SPLIT_NAMES, DataOptions
from .errors import InputError, one_line
from .files import DiskError, check_writable, refusals_of_disk, sync, write_whole
from .recipes import flag_of
from .run_lock import LOCK, lock_folder

CHECKPOINT_NAME = re.compile(f"{runs.CHECKPOINT}(0|[1-9][0-9]*)")
UNFINISHED_NAME = re.compile(f"{runs.UNFINISHED}(0|[1-9][0-9]*)")  # one being written, or one being removed


# --- the output folder -----------------------------------------------------------------------------------------------


def check_output_dir(args: argparse.Namespace) -> None:
    """Refuse an output folder that holds another run, or something else. Change nothing.

    Raises:
        InputError: the folder is in use, and this run neither resumes there nor may overwrite it. Or nothing can be
            written there.
    """
    output_dir = Path(args.output_dir)
    check_writable(output_dir, "--output_dir")
    if resumes_in_place(args):
        return
    for flag, path in paths_read(args).items():
        if Path(path).resolve().is_relative_to(output_dir.resolve()):
            raise InputError(f"--output_dir {output_dir} holds {flag} {path}: name another folder")
    if lies_among_classes(args):
        raise InputError(
            f"--output_dir {output_dir} lies among the class folders of --data_dir {args.data_dir}, and would become "
            "a class itself: name a folder elsewhere"
        )
    if not output_dir.is_dir() or all(path.name == LOCK for path in output_dir.iterdir()):
        return
    if not args.overwrite_output_dir:
        raise InputError(
            f"--output_dir {output_dir} is not empty: name another folder, go on with the run there with "
            "--resume_from_checkpoint latest, or replace it with --overwrite_output_dir"
        )
    if reason := runs.whose_else(output_dir):
        raise InputError(f"--overwrite_output_dir: {output_dir} {reason}; name another --output_dir")
    if not runs.is_run(output_dir):
        raise InputError(
            f"--overwrite_output_dir: {output_dir} is not the folder of a training run, since it has no "
            f"{runs.ARGS_FILE.name} with the flags of one; name another --output_dir"
        )
    if foreign := runs.contents(output_dir)[1]:
        names = ", ".join(map(repr, foreign[:3])) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise InputError(
            f"--overwrite_output_dir: {output_dir} holds what no training run has written: {names}; move that "
            "elsewhere, or name another --output_dir"
        )


def lies_among_classes(args: argparse.Namespace) -> bool:
    """Whether a later run on the same data, such as stage 2, would take the output folder for a class."""
    if args.dataset != "imagefolder" or args.data_dir is None or args.classes is not None:
        return False
    data_dir, output_dir = Path(args.data_dir).resolve(), Path(args.output_dir).resolve()
    if not output_dir.is_relative_to(data_dir):
        return False
    top, splits = output_dir.relative_to(data_dir).parts[0], args.train_splits or ["train"]
    beside_splits = any((data_dir / split).is_dir() for split in splits)
    return not top.startswith(".") and (not beside_splits or top in {*splits, *(args.val_splits or VAL_SPLIT_NAMES)})


def paths_read(args: argparse.Namespace) -> dict[str, str]:
    """The flags that name something on this disk that the run reads, and what they name."""
    folder = DataOptions.from_args(args).folder  # of the images, which may still have to be downloaded
    paths = {"--data_dir": str(folder)} if folder else {}
    for name, path in vars(args).items():
        if flag_of(name).is_read and path and os.path.exists(path):  # else an id on the Hub, or made by this run
            paths[f"--{name}"] = path
    return paths


def resumes_in_place(args: argparse.Namespace) -> bool:
    """Whether the run goes on in the folder of the checkpoint that it starts from."""
    checkpoint, output_dir = args.resume_from_checkpoint, Path(args.output_dir)
    return checkpoint is not None and (
        checkpoint == "latest" or output_dir.resolve() == Path(checkpoint).resolve().parent
    )


def claim_output_dir(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Make the output folder this run's, write `args.yaml` there, and start the trackers.

    Call it when nothing else can be wrong any more. Then a mistake neither removes the run that is to be replaced, nor
    leaves a folder that stops the next attempt. Another run may have started there meanwhile, so the folder is checked
    again. The old `args.yaml` is replaced last, so that a half-emptied folder is still known as a run.
    """
    output_dir = Path(args.output_dir)
    with refusals_of_disk(output_dir, "run the command again"):
        if accelerator.is_main_process:
            check_output_dir(args)
            output_dir.mkdir(parents=True, exist_ok=True)
            lock_folder(output_dir)
            check_output_dir(args)  # once more: a run that has just ended there held the lock until now
            runs.remove(output_dir, unfinished_only=resumes_in_place(args))
            text = yaml.safe_dump(vars(args), sort_keys=True)
            write_whole(runs.ARGS_FILE.path(output_dir), lambda unfinished: unfinished.write_text(text))
        accelerator.wait_for_everyone()
    if args.report_to != "none":
        start_trackers(accelerator, args.report_to)


def start_trackers(accelerator: Accelerator, report_to: str) -> None:
    """Start what `--report_to` names.

    Raises:
        InputError: where it can't be started, such as for want of its network.
    """
    try:
        accelerator.init_trackers("flower_ldm")
    except Exception as error:  # of a tracker's network, of its account: they have no common base
        raise InputError(
            f"--report_to {report_to} can't be started: {one_line(error, 300)}; see to that, or take --report_to none"
        ) from error


@contextmanager
def refusals_say_how_to_go_on(args: argparse.Namespace) -> Iterator[None]:
    """Around a whole run: an error of the disk also says which checkpoint to go on from."""
    try:
        yield
    except DiskError as error:
        safe = [path for path in list_checkpoints(Path(args.output_dir)) if not why_invalid(path, hashes=False)]
        advice = (
            f"go on with --resume_from_checkpoint latest: {safe[-1].name} is safe"
            if safe
            else "begin again with --overwrite_output_dir: there is no checkpoint yet"
        )
        raise DiskError(error.what, error.why, advice) from error


# --- progress --------------------------------------------------------------------------------------------------------


class Progress:
    """How far a run has come: its optimizer updates, its seconds, and its best held-out score.

    Args:
        identity: what tells this run from others, by name. A checkpoint with another identity is refused.
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
        vars(self).update(checked(state_dict, vars(self), "progress"))
        if self.global_step < 0:
            raise ValueError(f"its update is {self.global_step}")


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(
    accelerator: Accelerator, args: argparse.Namespace, stateful: dict[str, object], global_step: int
) -> Path:
    """Write `checkpoint-<step>/`, complete or not at all. Then remove the oldest checkpoints beyond the limit.

    Args:
        stateful: what a resumed run needs, by name: objects with `state_dict` and `load_state_dict`, or `None`.

    Raises:
        InputError: the disk refuses. What was there stays.
    """
    output_dir = Path(args.output_dir)
    target = output_dir / f"{runs.CHECKPOINT}{global_step}"
    unfinished = output_dir / f"{runs.UNFINISHED}{global_step}"
    random_states = gather_object([random_state(accelerator.device)])
    if accelerator.is_main_process:
        with refusals_of_disk(target):
            make_room(unfinished)
            try:
                unfinished.mkdir()
                for name, owner in unwrapped(accelerator, stateful).items():
                    save_state(owner.state_dict(), unfinished / f"{name}.safetensors")
                save_state(random_states, unfinished / "random_states.safetensors")
                runs.ARGS_FILE.path(unfinished).write_text(yaml.safe_dump(vars(args), sort_keys=True))
                write_manifest(unfinished, global_step)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            make_room(target)
            unfinished.rename(target)
            sync(output_dir)
        if args.checkpoints_total_limit is not None:
            drop_checkpoints(output_dir, global_step, args.checkpoints_total_limit)
    accelerator.wait_for_everyone()  # if another process ended now, the main one would not finish
    return target


def unwrapped(accelerator: Accelerator, stateful: dict[str, object]) -> dict[str, object]:
    """The owners of a checkpoint's states, without accelerate's wrappers. With fp16 its gradient scaler is one."""
    owners = {name: owner for name, owner in {**stateful, "scaler": accelerator.scaler}.items() if owner is not None}
    return {
        name: accelerator.unwrap_model(owner) if isinstance(owner, nn.Module) else owner
        for name, owner in owners.items()
    }


def make_room(path: Path) -> None:
    """Free a path: remove the unfinished checkpoint of a killed run, or rename whatever else is there."""
    if UNFINISHED_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        names = (path.with_name(f"{path.name}{runs.ASIDE}{number}") for number in itertools.count(1))
        aside = path.rename(next(name for name in names if not os.path.lexists(name)))
        print(f"{path} existed already: it is now called {aside.name}")


def drop_checkpoints(output_dir: Path, newest: int, limit: int) -> None:
    """Remove the oldest valid checkpoints, so that `limit` are left, with the newest.

    Each is renamed first, so that half of one is never taken for a checkpoint. What can't be removed stays.
    """
    older = [path for path in list_checkpoints(output_dir) if step_of(path) < newest]
    older = [path for path in older if not why_invalid(path, step_of(path), hashes=False)]
    for path in older[: max(0, len(older) + 1 - limit)]:
        try:
            doomed = path.with_name(f"{runs.UNFINISHED}{step_of(path)}")
            make_room(doomed)
            shutil.rmtree(path.rename(doomed))
        except OSError as error:
            print(f"{path} is beyond --checkpoints_total_limit but can't be removed: {one_line(error)}")


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix(runs.CHECKPOINT))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The folders that are named like checkpoints, valid or not, oldest first. Links belong to the user."""
    return [path for path in all_named(output_dir) if path.is_dir() and not path.is_symlink()]


def all_named(output_dir: Path) -> list[Path]:
    """Everything that is named like a checkpoint, in the order of steps."""
    found = output_dir.iterdir() if output_dir.is_dir() else []
    return sorted((path for path in found if CHECKPOINT_NAME.fullmatch(path.name)), key=step_of)


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The valid checkpoint that `--resume_from_checkpoint` names, checked against this run's flags; `None` without it.

    Raises:
        InputError: there is none, a flag differs, or another run is at work in its folder.
    """
    if args.resume_from_checkpoint is None:
        return None
    # Without a checkpoint there the folder stays untouched: no lock is left in it.
    if resumes_in_place(args) and is_first_process() and all_named(Path(args.output_dir)):
        lock_folder(Path(args.output_dir))  # before the search: another run might remove what is found
    if args.resume_from_checkpoint == "latest":
        checkpoint = newest_valid(Path(args.output_dir))
    else:
        checkpoint = named_checkpoint(args)
    saved = runs.read_args(checkpoint)
    if saved is None:
        raise InputError(f"--resume_from_checkpoint {checkpoint}: its {runs.ARGS_FILE.name} can't be read")
    for name in sorted(name for name in vars(args) if not flag_of(name).may_change):
        if saved.get(name) != getattr(args, name):
            if name not in saved:
                raise InputError(
                    f"--resume_from_checkpoint {checkpoint} was made without --{name}: by the other script, or by "
                    "another version of it"
                )
            raise InputError(
                f"--{name} is {getattr(args, name)}, but {checkpoint} was made with {saved.get(name)}: "
                "a resumed run must have the same value"
            )
    return checkpoint


def is_first_process() -> bool:
    """Whether this is the main process. The launcher's variables say so, since accelerate is not set up yet."""
    return get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"], 0) == 0


def newest_valid(output_dir: Path) -> Path:
    """A run's newest valid checkpoint. Newer ones that are not valid are named.

    Raises:
        InputError: there is none.
    """
    skipped, folders = [], list_checkpoints(output_dir)
    for path in reversed(all_named(output_dir)):
        reason = why_invalid(path, step_of(path)) if path in folders else "it is a link or a file"
        if reason is None:
            if skipped and is_first_process():
                print(f"going on from {path}; skipped: {'; '.join(skipped)}")
            return path
        skipped.append(f"{path.name}, {reason}")
    if skipped:
        reasons = "; ".join(skipped[:3])
        raise InputError(f"--resume_from_checkpoint latest: {output_dir} holds no valid checkpoint ({reasons})")
    raise InputError(f"--resume_from_checkpoint latest: {output_dir} holds no checkpoint; leave the flag out")


def named_checkpoint(args: argparse.Namespace) -> Path:
    """The checkpoint that the flag names by its path. To resume in the same folder, it must be the newest.

    Raises:
        InputError: it isn't valid, or not the newest.
    """
    checkpoint, step = Path(args.resume_from_checkpoint), None
    if not checkpoint.is_dir():
        raise InputError(f"--resume_from_checkpoint {checkpoint} is no checkpoint folder")
    if resumes_in_place(args):
        if not CHECKPOINT_NAME.fullmatch(checkpoint.resolve().name):
            raise InputError(
                f"--resume_from_checkpoint {checkpoint} must be called {runs.CHECKPOINT}<step>, "
                "or --output_dir must be another folder"
            )
        step = step_of(checkpoint.resolve())
    if reason := why_invalid(checkpoint, step):
        raise InputError(f"--resume_from_checkpoint {checkpoint} is no valid checkpoint: {reason}")
    for path in list_checkpoints(Path(args.output_dir)) if resumes_in_place(args) else []:
        if step_of(path) > step and not why_invalid(path, step_of(path)):
            raise InputError(
                f"--resume_from_checkpoint {checkpoint}: {args.output_dir} holds {path.name}, which is newer; "
                "go on from that one, or name another --output_dir"
            )
    return checkpoint


def resume(
    accelerator: Accelerator, args: argparse.Namespace, checkpoint: Path | None, stateful: dict[str, object]
) -> None:
    """Load a checkpoint, if there is one, into the objects that were saved (`save_checkpoint`).

    The schedule goes on from the checkpoint's update, with this run's `--learning_rate`.

    Raises:
        InputError: it belongs to another run, or is beyond this run's end.
    """
    if checkpoint is not None:
        if accelerator.scaler is not None and not (checkpoint / "scaler.safetensors").is_file():
            raise InputError(
                f"--mixed_precision fp16: {checkpoint} was made without it, and has no gradient scale to go on with; "
                "use bf16 or no"
            )
        try:
            owners = unwrapped(accelerator, stateful)
            # The progress first, since it says best what differs: the data, the model.
            progress = owners.pop("progress")
            progress.load_state_dict(load_state(checkpoint / "progress.safetensors"))
            if reason := why_invalid(checkpoint, progress.global_step, hashes=False):
                raise ValueError(reason)
            for name, owner in owners.items():
                owner.load_state_dict(checked_state(load_state(checkpoint / f"{name}.safetensors"), owner, name))
            random_states = load_state(checkpoint / "random_states.safetensors")
            if accelerator.process_index < len(random_states):  # fewer processes may have made it
                set_random_state(random_states[accelerator.process_index], accelerator.device)
        except Exception as error:  # torch, JSON and safetensors each raise errors of their own
            # A library's message may be too long. Ours is kept whole.
            reason = one_line(error, None if isinstance(error, InputError) else 300)
            raise InputError(
                f"--resume_from_checkpoint {checkpoint} doesn't fit this run, or is damaged: {reason}"
            ) from error
        ema, lr_scheduler = stateful["ema"], stateful["lr_scheduler"]
        ema.to(accelerator.device)
        lr_scheduler.base_lrs = [args.learning_rate] * len(lr_scheduler.base_lrs)
        for group, lr_lambda in zip(lr_scheduler.optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
            group["lr"] = args.learning_rate * lr_lambda(lr_scheduler.last_epoch)
    global_step = stateful["progress"].global_step
    if global_step > args.max_train_steps:
        raise InputError(
            f"{checkpoint} is at step {global_step}, beyond the {args.max_train_steps} of this run: "
            "raise --max_train_steps"
        )


def random_state(device: torch.device) -> dict:
    """The states of this process's generators: Python's, NumPy's, torch's on the CPU and on the device."""
    kind, key, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (kind, key.tolist(), *rest), "cpu": torch.get_rng_state()}
    return state if device.type == "cpu" else state | {device.type: torch.get_device_module(device).get_rng_state()}


def set_random_state(state: dict, device: torch.device) -> None:
    """Restore the states of this process's generators. A device that the checkpoint doesn't know keeps its own."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])
