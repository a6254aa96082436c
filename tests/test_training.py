"""The parts of `flower_ldm.training` that need no training: models from a file, the clock, the loss log."""

import argparse
import errno
import io
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from flower_ldm import runs, training
from flower_ldm.checkpoints import Progress
from flower_ldm.data import DataOptions
from flower_ldm.errors import InputError
from flower_ldm.models.autoencoder_flower import FlowerAutoencoderKL
from flower_ldm.training import Clock, LossLog

ROOT = Path(__file__).resolve().parents[1]

# Models from a file

TINY = {"latent_channels": 4, "block_out_channels": [8, 8]}


@pytest.fixture
def build(tmp_path: Path):
    def build(config, **of_this_run):
        path = tmp_path / "model.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return training.build_model(FlowerAutoencoderKL, str(path), **of_this_run)

    return build


def test_model_from_a_file_and_the_run(build):
    model = build({**TINY, "sample_size": 16}, sample_size=16, num_classes=3)
    assert (model.config.latent_channels, model.config.sample_size, model.config.num_classes) == (4, 16, 3)


def test_a_saved_models_own_config_will_do(build, tmp_path):
    saved = build(TINY, num_classes=3)
    saved.set_latents_statistics([0.5] * 4, [2.0] * 4)
    saved.save_pretrained(tmp_path / "saved")
    model = build((tmp_path / "saved" / "config.json").read_text(), num_classes=3)
    assert model.config.latent_channels == 4
    assert model.config.latents_mean is None  # of other latents


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"latent_chanels": 4}, "FlowerAutoencoderKL has no 'latent_chanels'"),
        ({"num_classes": 5}, "'num_classes' must be 3 in this run"),
        ({"block_out_channels": [4]}, "can't be built: block_out_channels"),
        ({"block_out_channels": "wide"}, "can't be built"),
        ({"block_out_channels": []}, "can't be built"),
        ("{", "can't be read"),
        ("[1]", "must be one JSON object"),
    ],
)
def test_what_a_model_cannot_be(build, config, said):
    with pytest.raises(InputError) as caught:
        build(config, num_classes=3)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_model_config_that_is_not_there():
    with pytest.raises(InputError, match="--model_config nowhere.json can't be read"):
        training.build_model(FlowerAutoencoderKL, "nowhere.json")


# Time


def test_clock_adds_up_and_can_pause():
    progress = Progress({})
    progress.seconds = 100.0  # from before a resume
    clock = Clock(progress)
    time.sleep(0.02)
    before = clock.read()
    assert 100.02 <= before < 100.5
    with clock.paused():
        paused_at = progress.seconds
        time.sleep(0.3)
    assert clock.read() - paused_at < 0.2
    assert progress.seconds == clock.progress.seconds >= before


# The moving average


def test_ema_weights_are_lent_and_given_back():
    model = torch.nn.Linear(2, 2).train()
    ema = training.build_ema(model, decay=0.9)
    averaged = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    trained = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(KeyboardInterrupt), training.ema_weights(ema, model):
        assert not model.training
        assert all(map(torch.equal, model.parameters(), averaged))
        raise KeyboardInterrupt
    assert model.training
    assert all(map(torch.equal, model.parameters(), trained))


# The log


@pytest.fixture
def log(tmp_path: Path) -> LossLog:
    return LossLog(Accelerator(cpu=True), tmp_path / "log.jsonl", first_step=0)


def test_log_line_is_the_means_since_the_last(log):
    for step, value in ((1, 1.0), (2, 3.0)):
        log.update(step, {"pixel_loss": torch.tensor(value), "kl_loss": torch.tensor(2 * value)})
    log.update(2, {"grad_norm": torch.tensor([5.0], requires_grad=True)})  # measured half as often
    line = log.write(2, learning_rate=0.5)
    assert line["steps_per_second"] > 0
    assert {**line, "steps_per_second": 0} == {
        "pixel_loss": 2.0,
        "kl_loss": 4.0,
        "grad_norm": 5.0,
        "learning_rate": 0.5,
        "steps_per_second": 0,
    }
    log.update(3, {"pixel_loss": torch.tensor(7.0)})
    next_line = log.write(3)
    assert next_line["pixel_loss"] == 7.0
    assert runs.read_log(log.path) == [{"step": 2, **line}, {"step": 3, **next_line}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_named_with_its_step(log, value):
    fine, bad = torch.tensor(1.0), torch.tensor(value)
    log.update(5, {"pixel_loss": fine, "center_loss": fine})
    log.check()
    log.update(6, {"pixel_loss": fine, "center_loss": fine})
    log.update(7, {"pixel_loss": fine, "center_loss": bad})
    log.update(8, {"pixel_loss": bad, "center_loss": bad})  # what follows from it is not to blame
    log.update(8, {"discriminator_loss": bad})
    for check in (log.check, lambda: log.write(8)):
        with pytest.raises(InputError, match="^center_loss is not finite at step 7: .*--learning_rate"):
            check()
    assert not log.path.exists()


def test_held_out_values_stand_behind_the_training_losses_of_their_step(log):
    for step in (1, 2):
        log.update(step, {"loss": torch.tensor(float(step))})
        log.write(step)
        log.append(step, {"val_loss": 10.0 * step})
    lines = runs.read_log(log.path)
    assert [line["step"] for line in lines] == [1, 1, 2, 2]
    assert [line.get("loss") for line in lines] == [1.0, None, 2.0, None]
    assert [line.get("val_loss") for line in lines] == [None, 10.0, None, 20.0]


def test_of_a_step_logged_twice_the_later_line_counts(tmp_path):
    path = tmp_path / "log.jsonl"
    written = [(1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25), (3, 0.35)]  # resumed at step 1
    path.write_text("".join(json.dumps({"step": s, "loss": v, "steps_per_second": 1.0}) + "\n" for s, v in written))
    assert [(line["step"], line["loss"]) for line in runs.read_log(path)] == [(1, 0.1), (2, 0.25), (3, 0.35)]


def test_what_a_resumed_run_has_gone_back_from_is_not_shown_beside_it(tmp_path):
    """It goes on with a lower rate, and logs at other steps; of the first run's end nothing is left in the curve."""
    path = tmp_path / "log.jsonl"
    written = [*((step, 9.0) for step in range(10, 100, 10)), (45, 0.5), (60, 0.4)]
    text = "".join(json.dumps({"step": s, "loss": v, "steps_per_second": 1.0}) + "\n" for s, v in written)
    path.write_text(text + '{"step": 60, "val_loss": 0.3}\n')
    steps = [line["step"] for line in runs.read_log(path)]
    assert steps == [10, 20, 30, 40, 45, 60, 60]


WHOLE = '{"step": 1, "loss": 0.5, "steps_per_second": 1.0}\n'


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', "{", '{"step": 2, "loss": 0.25}', "\x00\x00\x00"])
def test_a_torn_last_line_swallows_nothing(log, torn):
    """As a killed process leaves it, or a power failure."""
    log.path.write_text(WHOLE + torn)
    log.append(3, {"loss": 0.125})
    log.append(4, {"loss": 0.0625})
    losses = {line["step"]: line["loss"] for line in runs.read_log(log.path)}
    assert losses.pop(2, 0.25) == 0.25
    assert losses == {1: 0.5, 3: 0.125, 4: 0.0625}


@pytest.mark.parametrize(
    "line", ["null", "[]", "3", '"step"', "{}", '{"step": null}', '{"step": "2"}', '{"step": true}', "[" * 10**5, "é"]
)
def test_what_is_no_line_of_a_log_is_passed_over(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes((WHOLE + line + "\n" + WHOLE.replace("1", "2", 1)).encode("latin-1"))
    assert [read["step"] for read in runs.read_log(path)] == [1, 2]


@pytest.mark.parametrize("written", [0, 7])
def test_lines_that_cannot_be_written_wait_for_the_next(log, monkeypatch, capsys, written):
    """A disk that is full for a while costs the log nothing, not even where it took half a line."""
    log.append(1, {"loss": 0.5})
    before = log.path.read_bytes()

    class FullDisk(io.FileIO):
        def write(self, text):
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(text[:written])

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda path, mode, buffering: FullDisk(path, mode.replace("b", "")))
        log.append(2, {"loss": 0.25})
        with pytest.raises(InputError, match="log.jsonl can't be written: no space is left on the device"):
            log.close()
    assert log.path.read_bytes() == before
    assert "log.jsonl, they follow when it can be written: [Errno 28] No space left" in capsys.readouterr().err
    log.append(3, {"loss": 0.125})
    assert [(line["step"], line["loss"]) for line in runs.read_log(log.path)] == [(1, 0.5), (2, 0.25), (3, 0.125)]
    log.close()


def test_a_tracker_that_fails_costs_nothing(log, monkeypatch, capsys):
    def fail(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(log.accelerator, "log", fail)
    monkeypatch.setattr(log.accelerator, "end_training", fail)
    log.append(1, {"loss": 0.5})
    training.end_trackers(log.accelerator)
    assert runs.read_log(log.path) == [{"step": 1, "loss": 0.5}]
    assert capsys.readouterr().err.count("no route to host") == 2


def test_what_may_be_left_out_and_what_not(capsys):
    with training.optional("a picture"):
        raise RuntimeError("no such font")
    assert capsys.readouterr().err == "left out a picture: no such font\n"
    for error in (InputError("--flag is wrong"), KeyboardInterrupt()):
        with pytest.raises(type(error)), training.optional("a picture", reraise=InputError):
            raise error


# Signals


def test_a_terminal_that_is_gone_says_so_twice(log):
    """The shell and the system each send SIGHUP; the second must not end the run before its checkpoint."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever these tests were started by
    stop = training.StopSignal(log.accelerator)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGHUP)
    assert stop.agreed(1, 1) and stop.number == signal.SIGHUP
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "any other second signal ends it at once"
    with pytest.raises(SystemExit) as end:
        stop.exit(Path("checkpoint-1"))
    assert end.value.code == 128 + signal.SIGHUP


def test_nohup_is_respected(log):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = training.StopSignal(log.accelerator)
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.agreed(1, 1) and signal.SIGHUP not in training.stop_signals()
    stop.exit_when_told(Path("checkpoint-1"))
    os.kill(os.getpid(), signal.SIGHUP)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_after_the_last_update_a_signal_ends_the_run(log, number):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = training.StopSignal(log.accelerator)
    stop.exit_when_told(Path("checkpoint-1"))
    with pytest.raises(SystemExit) as end:
        signal.raise_signal(number)
    assert end.value.code == 128 + number


# Workers


@pytest.fixture
def flowers():
    train, _ = DataOptions("synthetic", resolution=16, classes=[0, 1], images_per_class=20).load(show_progress=False)
    train.carry_noise((2, 4, 4))
    return train


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_are_left_out_where_shared_memory_is_too_small(flowers, monkeypatch, tmp_path, capsys, method):
    """Else they end in "unable to allocate shared memory" or a bus error, as in a container with 64 MB of it."""
    args = argparse.Namespace(train_batch_size=4, dataloader_num_workers=2)
    sample = flowers[0, 0]
    batches = 6 * 4 * sum(value.nbytes for value in sample.values())
    data_set = flowers.labels.nbytes + sum(3 * height * width for height, width, _ in flowers._layout.tolist())
    needed = batches + (0 if method == "fork" else data_set)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: method)
    monkeypatch.setattr(training, "SHARED_MEMORY", str(tmp_path))
    workers = []
    for free in (needed, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
        workers.append(training.workers_that_fit(Accelerator(cpu=True), args, flowers))
    assert workers == [2, 0]
    assert capsys.readouterr().out.startswith("--dataloader_num_workers 2 needs 0 MiB of shared memory")
    monkeypatch.setattr(training, "SHARED_MEMORY", str(tmp_path / "nowhere"))  # not on macOS and Windows
    assert training.workers_that_fit(Accelerator(cpu=True), args, flowers) == 2


def test_a_worker_of_another_parent_ends_when_it_is_told_to():
    """As that of a forkserver, whose parent is a server and not the process that ends it."""
    ready = multiprocessing.get_context("fork").Event()

    def work():
        os.getppid = lambda: 1
        training.leave_signals_to_parent(0)
        ready.set()
        time.sleep(20)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    assert ready.wait(10)
    process.terminate()
    process.join(10)
    exit_code = process.exitcode
    process.kill()
    assert exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_started_anew_deliver_the_same_batches(flowers, monkeypatch, method):
    options = {"train_batch_size": 4, "gradient_accumulation_steps": 1, "seed": 0}
    batches = []
    for num_workers in (0, 1):
        args = argparse.Namespace(dataloader_num_workers=num_workers, **options)
        loader = training.training_batches(Accelerator(cpu=True), args, flowers, 0, 3)
        if num_workers:
            loader.multiprocessing_context = method
        batches.append(list(loader))
    for one, two in zip(*batches, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


# Compilation and memory


@pytest.mark.parametrize(
    ("tools", "headers", "said"),
    [((), True, "needs a C\\+\\+ compiler"), (("g++",), False, "needs Python's header files"), (("g++",), True, None)],
)
def test_a_cpu_without_what_compilation_needs_is_one_line(monkeypatch, tmp_path, tools, headers, said):
    for tool in tools:
        (tmp_path / tool).touch(mode=0o755)
    if headers:
        (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    model, args = torch.nn.Linear(2, 2), argparse.Namespace(torch_compile=True)
    if said is None:
        training.check_compilation(args, torch.device("cpu"))
        training.compile_model(args, model)
        assert model._compiled_call_impl is not None
        return
    with pytest.raises(InputError, match=f"--torch_compile {said}.*: install it, or add --no-torch_compile"):
        training.check_compilation(args, torch.device("cpu"))
    training.check_compilation(argparse.Namespace(torch_compile=False), torch.device("cpu"))
    training.compile_model(argparse.Namespace(torch_compile=False), model)
    assert model._compiled_call_impl is None


MEMORY_PROGRAM = """
    import resource, torch
    from flower_ldm.memory import keep_freed_memory

    def new_pages():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.ones(2**23)  # 32 MiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    new_pages()
    default = new_pages()
    keep_freed_memory()
    new_pages()
    print(default, new_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_used_again():
    """Large tensors get the pages of earlier ones. By default the system makes new ones each time."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    command = [sys.executable, "-c", textwrap.dedent(MEMORY_PROGRAM)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment).stdout
    default, kept = map(int, output.split())
    assert kept < default / 10
