"""What both training scripts share: set-up, loaders, the moving average, the loss log, signals."""

import argparse
import errno
import inspect
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
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
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .checkpoints import Progress
from .data import DataOptions, ImageDataset, TrainingSampler, keep_batch
from .errors import InputError, one_line
from .files import refusals_of_disk
from .images import open_image
from .runs import LOGS, versions

SHARED_MEMORY = "/dev/shm"

# --- set-up ----------------------------------------------------------------------------------------------------------


def read_model_config(path: str | None) -> dict:
    """The JSON object of `--model_config`; empty without one."""
    if path is None:
        return {}
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--model_config {path} can't be read: {one_line(error)}") from error
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
        if value is not None and key in of_this_run and value != of_this_run[key]:
            raise InputError(f"--model_config {path}: '{key}' must be {of_this_run[key]} in this run, or be left out")
    try:
        return model_class(**(config | of_this_run))
    except (TypeError, ValueError, RuntimeError) as error:
        which = f"--model_config {path}: " if path else ""
        raise InputError(f"{which}{model_class.__name__} can't be built: {one_line(error)}") from error


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
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / LOGS)),
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


def about_machine(accelerator: Accelerator) -> dict[str, object]:
    """What computes the run, for its metrics: device, versions, precision in force, processes."""
    return {
        "device": device_name(accelerator.device),
        "versions": versions(),
        "mixed_precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
    }


def device_name(device: torch.device) -> str:
    """A GPU as its maker calls it; a CPU likewise, with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{cpu_name()} ({device.type})"
    threads = torch.get_num_threads()
    return f"{cpu_name()} ({threads} thread{'s' if threads > 1 else ''})"


def cpu_name() -> str:
    """The CPU's model; its architecture where the system doesn't say more."""
    with suppress(OSError):  # Linux, where `platform` doesn't know it
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def load_images(accelerator: Accelerator, args: argparse.Namespace) -> tuple[ImageDataset, ImageDataset]:
    """Training and held-out images. One process downloads, the others wait for it."""
    with accelerator.main_process_first():
        return DataOptions.from_args(args).load(seed=args.seed)


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
        num_workers=workers_that_fit(accelerator, args, dataset),
        worker_init_fn=leave_signals_to_parent,
        pin_memory=accelerator.device.type == "cuda",
        drop_last=True,
    )
    return accelerator.prepare_data_loader(dataloader)


def workers_that_fit(accelerator: Accelerator, args: argparse.Namespace, dataset: Dataset) -> int:
    """`--dataloader_num_workers`, or 0 where shared memory can't hold what passes through it, as in many containers.

    Workers send their batches through it. The data set goes the same way to workers that are not forked, but started
    anew (macOS, Windows, Python 3.14).
    """
    num_workers = args.dataloader_num_workers
    if num_workers == 0 or not os.path.isdir(SHARED_MEMORY):  # without that folder it has no limit of its own
        return num_workers
    in_flight = 2 * num_workers + 2  # batches: two for each worker, as torch has it, the one in use and the next
    image_bytes = sum(value.nbytes for value in dataset.__getitems__([(0, 0)]).values())
    needed = image_bytes * args.train_batch_size * in_flight
    if multiprocessing.get_start_method() != "fork":
        needed += sum(map(tensor_bytes, dataset.__reduce_ex__(2)[2].values()))
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed <= free:
        return num_workers
    accelerator.print(
        f"--dataloader_num_workers {num_workers} needs {needed / 2**20:,.0f} MiB of shared memory, {SHARED_MEMORY} "
        f"has {free / 2**20:,.0f} free: going on without workers (docker run --shm-size raises it)"
    )
    return 0


def tensor_bytes(value: object) -> int:
    """Memory of the tensors that an object has or is."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    return sum(map(tensor_bytes, getattr(value, "__dict__", {}).values()))


def leave_signals_to_parent(worker_id: int) -> None:
    """Keep a data loader's worker at work when a signal to stop reaches all processes, as from Ctrl-C or a terminal.

    The run goes on to the end of its update and to a checkpoint. SIGTERM from the parent still ends the worker.
    """
    for number in set(stop_signals()) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """End this process when its parent sends SIGTERM; a handler wouldn't know who sent it."""
    parent = multiprocessing.parent_process().pid  # not os.getppid(), which may be a server that forks the workers
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
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


# --- progress --------------------------------------------------------------------------------------------------------


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
        self.unwritten: list[str] = []
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

        A disk or a tracker that refuses costs the run nothing: lines that can't be written wait for the next one.

        Raises:
            InputError: where one of them is not finite.
        """
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise not_finite(name, global_step)
        if self.accelerator.is_main_process:
            self.unwritten.append(json.dumps({"step": global_step, **line}))
            with optional(f"{self.path}, its lines follow when it can be written"):
                append_lines(self.path, self.unwritten)
                self.unwritten.clear()
        with optional("what the trackers keep of it"):
            scalars = {key: value for key, value in line.items() if isinstance(value, float)}
            self.accelerator.log(scalars, step=global_step)

    def close(self) -> None:
        """Write what is still waiting, at the end of a run.

        Raises:
            DiskError: where that can't be done.
        """
        if self.unwritten:
            with refusals_of_disk(self.path):
                append_lines(self.path, self.unwritten)
            self.unwritten.clear()

    def show(self, global_step: int, pictures: dict[str, Path]) -> None:
        """Pictures that lie on disk, by name, to each tracker that takes images. For the main process."""
        for tracker in self.accelerator.trackers:
            images = {name: np.asarray(open_image(path).convert("RGB"))[None] for name, path in pictures.items()}
            with optional(f"pictures for {tracker.name}"):
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


def end_trackers(accelerator: Accelerator) -> None:
    """Have the trackers write what they still hold; `log.jsonl` has it all, so that a run doesn't fail for them."""
    with optional("what the trackers still hold"):
        accelerator.end_training()


@contextmanager
def optional(what: str, but: type[Exception] | tuple = ()) -> Iterator[None]:
    """Around what a run can do without, such as a preview: where it fails, a line says so and the run goes on.

    Args:
        but: errors that are raised all the same.
    """
    try:
        yield
    except but:
        raise
    except Exception as error:  # of matplotlib, of a tracker's network: whatever it is, the weights are worth more
        print(f"left out {what}: {one_line(error, 300)}", file=sys.stderr, flush=True)


def append_lines(path: Path, lines: list[str]) -> None:
    """Add lines to a file, all of them or none; what a killed process left of a line is no part of the first.

    Raises:
        OSError: where that can't be done.
    """
    with path.open("ab+", buffering=0) as file:
        length = file.seek(0, os.SEEK_END)
        torn = length > 0 and (file.seek(length - 1), file.read(1))[1] != b"\n"
        text = "\n" * torn + "".join(f"{line}\n" for line in lines)
        try:
            if file.write(text.encode()) < len(text.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                file.truncate(length)
            raise


def stop_signals() -> tuple[int, ...]:
    """What asks a process to stop: Ctrl-C, a scheduler, a terminal that is gone unless `nohup` has that ignored."""
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    heard = hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *([hangup] if heard else []))


class StopSignal:
    """Remembers a signal to stop, so that a run saves a checkpoint before it ends. A second one ends it at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.number = 0
        self.numbers = stop_signals()
        for number in self.numbers:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame) -> None:
        self.number = number
        for restored in self.numbers:
            # A terminal that goes away says so twice, once by the shell and once by the system.
            is_hangup = restored not in (signal.SIGINT, signal.SIGTERM)
            signal.signal(restored, signal.SIG_IGN if is_hangup else signal.SIG_DFL)

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
        end_trackers(self.accelerator)
        sys.exit(128 + self.number)

    def exit_when_told(self, checkpoint: Path) -> None:
        """After the last update: from here on a signal ends the run as it comes, and the last checkpoint stays."""

        def exit(number: int, frame) -> None:
            self._remember(number, frame)
            self.exit(checkpoint)

        for number in self.numbers:
            if not self.number:
                signal.signal(number, exit)
        if self.number:  # it came when the last update was done
            self.exit(checkpoint)
