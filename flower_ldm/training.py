"""What both training scripts share: set-up, loaders, the moving average, time, the log, signals."""

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
import sysconfig
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
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
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .checkpoints import Progress
from .data import DataOptions, ImageDataset, TrainingSampler, keep_batch
from .errors import InputError, one_line
from .files import refusals_of_disk
from .images import open_image
from .memory import keep_freed_memory
from .optimizers import Muon, hidden_matrices
from .progress_bars import progress_bar
from .run_lock import locks_released
from .runs import LOGS, versions

SHARED_MEMORY = "/dev/shm"

# --- set-up ----------------------------------------------------------------------------------------------------------


def read_model_config(path: str | None) -> dict:
    """The JSON object of `--model_config`; empty without the flag.

    Raises:
        InputError: the file can't be read, or holds something else.
    """
    if path is None:
        return {}
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--model_config {path} can't be read: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"--model_config {path} must be one JSON object with arguments of the model's class")
    return config


def build_model(model_class: type[nn.Module], path: str | None, **set_by_run: object) -> nn.Module:
    """A model from `--model_config`, and from the arguments that the run itself sets.

    Raises:
        InputError: the model has no such argument, the run sets another value, or the model can't be built.
    """
    # A saved config also has entries of diffusers, and what was measured at the end of the run that saved it.
    not_arguments = ("auto_map", "latents_mean", "latents_std")
    config = {k: v for k, v in read_model_config(path).items() if not k.startswith("_") and k not in not_arguments}
    known = inspect.signature(model_class.__init__).parameters
    for key, value in config.items():
        if key not in known:
            raise InputError(f"--model_config {path}: {model_class.__name__} has no '{key}'")
        if value is not None and key in set_by_run and value != set_by_run[key]:
            raise InputError(f"--model_config {path}: '{key}' must be {set_by_run[key]} in this run, or be left out")
    try:
        return model_class(**(config | set_by_run))
    except (TypeError, ValueError, RuntimeError) as error:
        source = f"--model_config {path}: " if path else ""
        raise InputError(f"{source}{model_class.__name__} can't be built: {one_line(error)}") from error


def compile_model(args: argparse.Namespace, model: nn.Module) -> None:
    """Compile a model with `--torch_compile`, for batches of one size."""
    if args.torch_compile:
        model.compile(dynamic=False)


def check_compilation(args: argparse.Namespace, device: torch.device) -> None:
    """Check that `--torch_compile` can work here.

    Raises:
        InputError: this machine lacks what the compilation of a CPU's code needs.
    """
    if args.torch_compile and device.type == "cpu" and (missing := missing_for_compilation()):
        raise InputError(f"--torch_compile needs {missing}: install it, or add --no-torch_compile")


def missing_for_compilation() -> str | None:
    """What this machine lacks to compile a model for its CPU; `None` where it has all."""
    if not any(map(shutil.which, filter(None, [os.environ.get("CXX"), "g++", "clang++", "cl"]))):
        return "a C++ compiler, such as g++"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's header files, such as Debian's python3-dev"
    return None


def choose_precision(mixed_precision: str | None) -> str | None:
    """What `--mixed_precision` means on this machine; `None` leaves the choice to accelerate.

    Raises:
        InputError: the device can't compute in this precision, or only by emulation. A CPU without AVX-512 takes 400
            times as long for matrix products in bfloat16 as in float32.
    """
    chosen = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if mixed_precision == "auto":
        return "bf16" if has_bfloat16("cuda" if on_gpu else "cpu") else "no"
    if on_gpu:
        return mixed_precision
    if chosen == "fp16":
        raise InputError("--mixed_precision fp16 needs a GPU; on a CPU use auto or no")
    if chosen == "bf16" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        raise InputError(
            "--mixed_precision bf16: this CPU has no instructions for it and would take hundreds of times as long as "
            "without; use auto or no"
        )
    return mixed_precision


def has_bfloat16(device_type: str) -> bool:
    """Whether devices of this type compute bfloat16 by instructions of their own, and don't emulate it."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def set_up(args: argparse.Namespace, find_unused_parameters: bool = False) -> Accelerator:
    """Make the accelerator, and seed all generators.

    Raises:
        InputError: the machine can't do what `--mixed_precision` or `--torch_compile` asks for.
    """
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=choose_precision(args.mixed_precision),
        # Accumulation doesn't stop at the end of an epoch: every update sees the same number of images.
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
            # The other processes wait while one decodes or encodes a large data set.
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),
        ],
    )
    check_compilation(args, accelerator.device)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    set_seed(args.seed)
    return accelerator


def autocast_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """The data type of `accelerator.autocast()`; `None` where it changes nothing."""
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
    """The number of optimizer updates of the whole run."""
    if args.max_train_steps is not None:
        return args.max_train_steps
    return max(1, args.num_train_epochs * num_images // images_per_step(accelerator, args))


def images_per_step(accelerator: Accelerator, args: argparse.Namespace) -> int:
    """The number of images of one optimizer update, over all processes and micro-batches."""
    return args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps


def training_batches(
    accelerator: Accelerator, args: argparse.Namespace, dataset: Dataset, first_step: int, last_step: int
) -> DataLoader:
    """The micro-batches of the updates from `first_step` to `last_step`, shared out over the processes."""
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
    """`--dataloader_num_workers`, or 0 where shared memory is too small, as in many containers.

    Workers send their batches through shared memory. Where workers are not forked but started anew (macOS, Windows,
    Python 3.14), the data set goes that way too.
    """
    num_workers = args.dataloader_num_workers
    if num_workers == 0 or not os.path.isdir(SHARED_MEMORY):  # without this folder there is no such limit
        return num_workers
    in_flight = 2 * num_workers + 2  # batches: torch's two for each worker, the one in use and the next
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
    """Bytes of the tensors that an object is or has as attributes."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    return sum(map(tensor_bytes, getattr(value, "__dict__", {}).values()))


def leave_signals_to_parent(worker_id: int) -> None:
    """Let a data loader's worker ignore signals that reach all processes, such as Ctrl-C.

    The run needs its workers to finish its update and save a checkpoint. SIGTERM from the parent still ends them.
    """
    for number in set(stop_signals()) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """End this process when its parent sends SIGTERM. A signal handler would not know who sent it."""
    parent = multiprocessing.parent_process().pid  # os.getppid() may be a server that forks the workers
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def validation_batches(accelerator: Accelerator, args: argparse.Namespace, dataset: Dataset) -> DataLoader:
    """The held-out split in order, shared out over the processes."""
    return accelerator.prepare_data_loader(DataLoader(dataset, args.train_batch_size, collate_fn=keep_batch))


def build_optimizer(
    args: argparse.Namespace, model: nn.Module, more: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimizer that `--optimizer` names, of a model and `more` parameters.

    Muon takes the matrices of the model's `hidden_layers`, AdamW all other parameters. A stock model has no such
    attribute, and AdamW takes all of it.
    """
    options = {"lr": args.learning_rate, "betas": (0.9, 0.99), "weight_decay": 0.01}
    parameters = [*model.parameters(), *more]
    hidden_layers = getattr(model, "hidden_layers", ())
    if args.optimizer == "adamw" or not hidden_layers:
        return torch.optim.AdamW(parameters, fused=True, **options)
    matrices = [weight for layers in hidden_layers for weight in hidden_matrices(layers)]
    known = set(matrices)
    others = [parameter for parameter in parameters if parameter not in known]
    dtype = torch.bfloat16 if has_bfloat16(matrices[0].device.type) else torch.float32
    return Muon(matrices, others, dtype=dtype, **options)


def build_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """One of diffusers' schedules. Don't prepare it: accelerate would step it once for each process."""
    return get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )


# --- moving average --------------------------------------------------------------------------------------------------


def build_ema(model: nn.Module, decay: float) -> EMAModel:
    """diffusers' moving average of a model's parameters. Its decay is at most (1 + step) / (10 + step), a warm-up."""
    return EMAModel(model.parameters(), decay=decay, foreach=True)


@contextmanager
def ema_weights(ema: EMAModel, model: nn.Module) -> Iterator[nn.Module]:
    """The model with its averaged weights and in evaluation mode, as long as the context lasts.

    A compiled model runs uncompiled here. Validation and previews have batches of many sizes, and each size would be
    compiled anew.
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
    """What tells a run from others, and its flags don't say, or only by a path: images per update, data, model."""
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return {
        "images per update (processes x --train_batch_size x --gradient_accumulation_steps)": images_per_step(
            accelerator, args
        ),
        "training data": images.fingerprint,
        "model": json.dumps(config, sort_keys=True),
    }


class Clock:
    """Adds the seconds of training to a run's progress, without those of validation and saving."""

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
        """The time within this context doesn't count."""
        self.read()
        yield
        self.started = time.perf_counter()


def step_bar(accelerator: Accelerator, first_step: int, last_step: int, name: str) -> tqdm:
    """A bar of optimizer updates, with their rate and the time left. Only the main process shows it."""
    return progress_bar(
        initial=first_step, total=last_step, desc=name, unit="step", disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )  # fmt: skip


# --- the log ---------------------------------------------------------------------------------------------------------


@dataclass
class LossSums:
    """Losses that are measured together, since the last line of the log. L is their number."""

    sums: torch.Tensor  # (L,)
    first_bad_steps: torch.Tensor  # (L,), the first step at which each was not finite; infinite where there was none
    count: int = 0


class LossLog:
    """Writes the means of the losses since the last line. They stay on the device, so that no step waits for them.

    The first step at which a loss is not finite stays there too. It is read at every log line and before every
    checkpoint, so that bad weights are never saved.
    """

    def __init__(self, accelerator: Accelerator, path: Path, first_step: int):
        self.accelerator = accelerator
        self.path = path
        self.groups: dict[tuple[str, ...], LossSums] = {}  # by the names of losses that are measured together
        self.unwritten: list[str] = []
        self.last_step, self.last_time = first_step, time.perf_counter()

    def update(self, global_step: int, losses: dict[str, torch.Tensor]) -> None:
        """Add the scalars of one micro-batch. Other losses may be measured at other steps."""
        values = torch.stack([value.detach().float().reshape(()) for value in losses.values()])
        if tuple(losses) not in self.groups:
            self.groups[tuple(losses)] = LossSums(torch.zeros_like(values), torch.full_like(values, torch.inf))
        group = self.groups[tuple(losses)]
        group.sums += values
        bad_steps = group.first_bad_steps
        bad_steps.copy_(torch.where(values.isfinite(), bad_steps, bad_steps.clamp(max=global_step)))
        group.count += 1

    def check(self) -> None:
        """Check that every loss was finite in every process.

        Raises:
            InputError: one was not; the message names it and the step.
        """
        for names, group in self.groups.items():
            steps = self.accelerator.gather(group.first_bad_steps).view(-1, len(names)).amin(dim=0).tolist()
            step, name = min(zip(steps, names, strict=True), key=lambda pair: pair[0])
            if step != float("inf"):
                raise not_finite(name, step)

    def write(self, global_step: int, **values: object) -> dict[str, object]:
        """Check the losses, average them over processes, and append a line, with these values besides. Returns it."""
        self.check()
        line = {}
        for names, group in self.groups.items():
            means = self.accelerator.reduce(group.sums / group.count, reduction="mean").tolist()
            line |= dict(zip(names, means, strict=True))
        now = time.perf_counter()
        line |= values | {"steps_per_second": (global_step - self.last_step) / (now - self.last_time)}
        self.append(global_step, line)
        self.groups.clear()
        self.last_step, self.last_time = global_step, now
        return line

    def append(self, global_step: int, line: dict) -> None:
        """Append one line to `log.jsonl` and to the trackers.

        An error of the disk or of a tracker doesn't end the run: lines that can't be written wait for the next one.

        Raises:
            InputError: a value is not finite.
        """
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise not_finite(name, global_step)
        if self.accelerator.is_main_process:
            self.unwritten.append(json.dumps({"step": global_step, **line}))
            with optional(f"lines of {self.path}, they follow when it can be written"):
                append_lines(self.path, self.unwritten)
                self.unwritten.clear()
        with optional("the trackers' values"):
            scalars = {key: value for key, value in line.items() if isinstance(value, float)}
            self.accelerator.log(scalars, step=global_step)

    def close(self) -> None:
        """Write the lines that still wait, at the end of a run.

        Raises:
            DiskError: they can't be written.
        """
        if self.unwritten:
            with refusals_of_disk(self.path):
                append_lines(self.path, self.unwritten)
            self.unwritten.clear()

    def show(self, global_step: int, pictures: dict[str, Path]) -> None:
        """Send pictures on the disk, by name, to every tracker that takes images. For the main process."""
        for tracker in self.accelerator.trackers:
            images = {name: np.asarray(open_image(path).convert("RGB"))[None] for name, path in pictures.items()}
            with optional(f"the pictures in {tracker.name}"):
                if tracker.name == "trackio":  # accelerate has no log_images for it
                    import trackio

                    tracker.log({name: trackio.Image(image[0]) for name, image in images.items()}, step=global_step)
                elif hasattr(tracker, "log_images"):
                    options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images(images, step=global_step, **options)


def not_finite(name: str, global_step: float) -> InputError:
    """The error for a value that is not finite."""
    return InputError(
        f"{name} is not finite at step {global_step:.0f}: the run stops here, earlier checkpoints are kept; "
        "go on from one with a lower --learning_rate, or --mixed_precision bf16 in place of fp16"
    )


def end_trackers(accelerator: Accelerator) -> None:
    """Let the trackers finish. A failure doesn't end the run, since `log.jsonl` holds everything."""
    with optional("the end of the trackers"):
        accelerator.end_training()


@contextmanager
def optional(what: str, reraise: type[Exception] | tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Around something that a run can do without, such as a preview. A failure prints a line, and the run goes on.

    Args:
        reraise: errors that end the run all the same.
    """
    try:
        yield
    except reraise:
        raise
    except Exception as error:  # of matplotlib, of a tracker's network: no such error is worth the run
        print(f"left out {what}: {one_line(error, 300)}", file=sys.stderr, flush=True)


def append_lines(path: Path, lines: list[str]) -> None:
    """Append lines to a file, all of them or none. A torn line of a killed process gets a line break first.

    Raises:
        OSError: the lines can't be written.
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


# --- signals and the process -----------------------------------------------------------------------------------------


def stop_signals() -> tuple[int, ...]:
    """The signals that ask a process to stop: of Ctrl-C, of a scheduler, of a terminal that is closed.

    `nohup` lets a process ignore the last one. Outside of the main thread there are none, since Python lets no other
    thread handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return ()
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    heeded = hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *([hangup] if heeded else []))


@contextmanager
def process_as_found() -> Iterator[None]:
    """Around a whole run: restore signal handlers, accelerate's settings and the locks on folders, however it ends.

    So a notebook can go on, or start another run.
    """
    # accelerate keeps its settings here for the life of a process, and refuses to change them.
    shared = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    found = [dict(values) for values in shared]
    handlers = {number: signal.getsignal(number) for number in stop_signals()}
    for values in shared:
        values.clear()
    try:
        with locks_released():
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for values, before in zip(shared, found, strict=True):
            values.clear()
            values.update(before)


class StopSignal:
    """Remembers a signal to stop, so that the run saves a checkpoint before it ends. A second one ends it at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.number = 0
        self.numbers = stop_signals()
        for number in self.numbers:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for restored in self.numbers:
            # A terminal that is closed sends its signal twice: one from the shell, one from the system.
            is_hangup = restored not in (signal.SIGINT, signal.SIGTERM)
            signal.signal(restored, signal.SIG_IGN if is_hangup else signal.SIG_DFL)

    def agreed(self, global_step: int, every: int) -> bool:
        """Whether any process has had a signal. Several processes agree on that only `every` so many steps."""
        if self.accelerator.num_processes == 1:
            return self.number > 0
        if global_step % every:
            return False
        number = torch.tensor(self.number, device=self.accelerator.device)
        self.number = int(self.accelerator.gather(number).max())
        return self.number > 0

    def exit(self, checkpoint: Path) -> None:
        """End the run with a signal's exit code, and say how to go on."""
        self.accelerator.print(f"stopped: go on with --resume_from_checkpoint {checkpoint}")
        end_trackers(self.accelerator)
        sys.exit(128 + self.number)

    def exit_when_told(self, checkpoint: Path) -> None:
        """After the last update: from here on a signal ends the run at once, and the last checkpoint stays."""

        def exit(number: int, frame: FrameType | None) -> None:
            self._remember(number, frame)
            self.exit(checkpoint)

        for number in self.numbers:
            if not self.number:
                signal.signal(number, exit)
        if self.number:  # it came after the last update
            self.exit(checkpoint)
