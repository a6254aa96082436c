"""A run that was killed, stopped or split in two ends as if nothing had happened, bit for bit, in both stages.

With random crops and flips, two micro-batches an update, and all the losses; subprocesses only where a signal must
really end one.
"""

import fcntl
import json
import os
import pickle
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import Payload
from PIL import Image
from safetensors.torch import load_file, save_file

import train_autoencoder
import train_latent_diffusion
from flower_ldm import FlowerAutoencoderKL, FlowerLDMPipeline, checkpoints
from flower_ldm.checkpoint_files import load_state, save_state, write_manifest
from flower_ldm.errors import InputError
from flower_ldm.runs import read_log
from flower_ldm.synthetic import synthetic_flower

REPOSITORY = Path(__file__).resolve().parents[1]
MAINS = {"autoencoder": train_autoencoder.main, "latent_diffusion": train_latent_diffusion.main}
STAGES = list(MAINS)
SIGNALS = [("autoencoder", signal.SIGTERM), ("latent_diffusion", signal.SIGINT)]


@pytest.fixture(scope="module")
def flowers(tmp_path_factory) -> Path:
    """4 classes of 10 images, 40 x 30 pixels or 30 x 40, so that there is something to crop."""
    folder = tmp_path_factory.mktemp("data") / "flowers"
    for label in range(4):
        (folder / f"class {label}").mkdir(parents=True)
        for i in range(10):
            pixels = synthetic_flower(label, i, resolution=40)
            image = Image.fromarray(pixels[:30] if i % 2 else pixels[:, :30])
            image.save(folder / f"class {label}" / f"{i}.png")
    return folder


@pytest.fixture
def flags(stage_flags, flowers: Path, tmp_path: Path) -> dict[str, list[str]]:
    """Flags of each stage; 36 training images, 8 an update: the 5th crosses to a new epoch."""
    torch.manual_seed(0)
    config = json.loads((tmp_path / "vae.json").read_text())
    vae = FlowerAutoencoderKL(**config, sample_size=24)
    vae.set_latents_statistics([0.0] * 4, [1.0] * 4)
    vae.save_pretrained(tmp_path / "untrained")
    common = f"--dataset imagefolder --data_dir {flowers} --resolution 24 --train_batch_size 4"
    common += " --gradient_accumulation_steps 2 --mixed_precision no --logging_steps 1 --checkpointing_steps 2"
    stage1, stage2 = stage_flags
    stage1 += f"{common} --disc_start 1 --perceptual_every 2".split()
    stage2 += f"{common} --autoencoder {tmp_path}/untrained".split()
    return {"autoencoder": stage1, "latent_diffusion": stage2}


@pytest.fixture
def run(flags: dict, run_script) -> Callable[..., Path]:
    """Trains a stage in this process and returns its output folder."""

    def run(stage: str, output_dir: Path, *more: str) -> Path:
        run_script(MAINS[stage], [*flags[stage], "--output_dir", output_dir, *more])
        return output_dir

    return run


def contents(checkpoint: Path) -> dict:
    """All that a checkpoint holds by part and name, but the time spent and generators that nothing draws from."""
    found = {path.stem: load_state(path) for path in sorted(checkpoint.glob("*.safetensors"))}
    del found["random_states"], found["progress"]["seconds"]
    return found


def tensors(part, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors in a nest of dictionaries and lists, by their path."""
    if isinstance(part, torch.Tensor):
        return {name: part}
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    return {path: value for key, inner in items for path, value in tensors(inner, f"{name}/{key}").items()}


def differences(one, other, name: str = "") -> list[str]:
    """Where two nests of dictionaries, lists and tensors are not equal in every bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [line for key in one for line in differences(one[key], other[key], f"{name}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [line for i in range(len(one)) for line in differences(one[i], other[i], f"{name}/{i}")]
    equal = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if equal else [name]


def apart(one: dict, other: dict, before: dict) -> float:
    """Norm of the difference of all tensors, relative to how far they have come since `before`; counters apart."""
    names = [name for name in one if one[name].is_floating_point() and not name.endswith("/step")]
    difference = torch.cat([(one[name] - other[name]).flatten() for name in names]).norm()
    way = torch.cat([(other[name] - before[name]).flatten() for name in names]).norm()
    return (difference / way).item()


def averaged_weights(checkpoint: Path) -> list[torch.Tensor]:
    """The moving average in a checkpoint, in the order of the model's parameters."""
    return contents(checkpoint)["ema"]["shadow_params"]


def assert_same_end(one: Path, other: Path, stage: str, step: int) -> None:
    """Checkpoint, exported weights and logged losses of two runs are the same, and everything is in them."""
    ends = [contents(run_dir / f"checkpoint-{step}") for run_dir in (one, other)]
    assert differences(*ends) == []
    if stage == "autoencoder":
        expected = ["adaptive_weight", "centers", "disc_optimizer", "discriminator", "ema", "lr_scheduler", "model",
                    "optimizer", "progress"]  # fmt: skip
        assert list(ends[0]) == expected
        assert ends[0]["adaptive_weight"]["num_measurements"] > 2
        assert ends[0]["centers"].keys() == {"centers"}
        assert ends[0]["disc_optimizer"]["state"], "the discriminator has never been trained"
    else:
        assert list(ends[0]) == ["ema", "lr_scheduler", "model", "optimizer", "progress"]
    weights = {"autoencoder": "diffusion_pytorch_model.safetensors",
               "latent_diffusion": "unet/diffusion_pytorch_model.safetensors"}[stage]  # fmt: skip
    assert differences(load_file(one / weights), load_file(other / weights)) == []
    assert differences(*[losses_after(run_dir, step - 2) for run_dir in (one, other)]) == []


def losses_after(run_dir: Path, step: int) -> list[dict]:
    """The log's lines beyond a step, without the time that they took."""
    lines = [line for line in read_log(run_dir / "log.jsonl") if line["step"] > step]
    assert lines
    return [{name: value for name, value in line.items() if name != "steps_per_second"} for line in lines]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_in_two_parts_is_the_same_bit_for_bit(run, tmp_path, stage):
    whole = run(stage, tmp_path / "whole")
    rest = run(stage, tmp_path / "rest", "--resume_from_checkpoint", str(whole / "checkpoint-4"))
    assert_same_end(whole, rest, stage, step=6)
    assert differences(contents(whole / "checkpoint-4"), contents(whole / "checkpoint-6"))  # it could have failed
    assert [path.name for path in rest.glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_with_muon_in_two_parts_is_the_same_bit_for_bit(flags, run, tmp_path, stage):
    flags[stage] += ["--optimizer", "muon", *(["--latent_noise", "0.5"] if stage == "autoencoder" else [])]
    whole = run(stage, tmp_path / "whole")
    rest = run(stage, tmp_path / "rest", "--resume_from_checkpoint", str(whole / "checkpoint-4"))
    assert_same_end(whole, rest, stage, step=6)
    kept = [set(state) for state in contents(whole / "checkpoint-4")["optimizer"]["state"].values()]
    assert {"momentum"} in kept and {"step", "exp_avg", "exp_avg_sq"} in kept
    with pytest.raises(InputError, match="--optimizer is adamw, but .* was made with muon"):
        run(stage, tmp_path / "other", "--resume_from_checkpoint", str(whole / "checkpoint-4"), "--optimizer", "adamw")


# Signals


@contextmanager
def signal_when_there_is(path: Path, number: int) -> Iterator[None]:
    """Sends this process a signal as soon as the path exists, if that is within the context."""
    ended = threading.Event()

    def send() -> None:
        while not path.exists() and not ended.wait(0.001):
            pass
        if not ended.is_set():
            os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        ended.set()
        sender.join()


@pytest.mark.parametrize(("stage", "number"), SIGNALS)
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(flags, run, tmp_path, capsys, stage, number):
    stopped = tmp_path / "stopped"
    flags[stage] += ["--checkpointing_steps", "1000", "--max_train_steps", "200"]
    with signal_when_there_is(stopped / "log.jsonl", number), pytest.raises(SystemExit) as ending:
        run(stage, stopped)
    assert ending.value.code == 128 + number
    (checkpoint,) = stopped.glob("checkpoint-*")
    assert f"go on with --resume_from_checkpoint {checkpoint}" in capsys.readouterr().out
    step = int(checkpoint.name.split("-")[1])
    assert 1 <= step < 200
    run(stage, stopped, "--resume_from_checkpoint", "latest", "--max_train_steps", str(step + 2))
    assert (stopped / f"checkpoint-{step + 2}").is_dir() and (stopped / "metrics.json").is_file()


@pytest.mark.parametrize(("stage", "number"), SIGNALS)
def test_a_signal_after_the_last_update_ends_the_run_too(run, tmp_path, capsys, stage, number, hub_server):
    """While results are measured and drawn: nothing is pushed, and the last checkpoint gives the rest."""
    stopped = tmp_path / "stopped"
    with signal_when_there_is(stopped / "checkpoint-6", number), pytest.raises(SystemExit) as ending:
        run(stage, stopped, "--push_to_hub", "--hub_model_id", "flowers")
    assert ending.value.code == 128 + number and not (stopped / "report.html").exists()
    assert f"go on with --resume_from_checkpoint {stopped / 'checkpoint-6'}" in capsys.readouterr().out
    repository = hub_server.repositories["gardener/flowers"]
    assert set(repository.files) == {".gitattributes"}
    run(stage, stopped, "--resume_from_checkpoint", "latest", "--push_to_hub", "--hub_model_id", "flowers")
    assert (stopped / "report.html").exists() and "metrics.json" in repository.files


def start(stage: str, flags: dict, output_dir: Path) -> subprocess.Popen:
    """The script in a process of its own, the first of a group, with this process's arithmetic."""
    words = [sys.executable, f"train_{stage}.py", *flags[stage], "--output_dir", str(output_dir)]
    return subprocess.Popen(
        words,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end_beyond(process: subprocess.Popen, output_dir: Path, step: int, send: Callable[[int], None]) -> str:
    """Send a signal as soon as an update beyond `step` is in the log; return what the process printed."""
    log = output_dir / "log.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and any(line["step"] > step for line in read_log(log))):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no update beyond {step}: {process.communicate()[0]}")
        time.sleep(0.002)
    send(process.pid)
    try:
        return process.communicate(timeout=120)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"the run goes on in spite of its signal: {process.communicate()[0]}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_bit_for_bit(flags, run, tmp_path, stage):
    flags[stage] += ["--dataloader_num_workers", "2", "--max_train_steps", "14", "--checkpointing_steps", "4"]
    whole, killed = run(stage, tmp_path / "whole"), tmp_path / "killed"
    process = start(stage, flags, killed)
    end_beyond(process, killed, 5, lambda pid: os.kill(pid, signal.SIGKILL))
    assert process.returncode == -signal.SIGKILL
    assert (killed / "checkpoint-4").is_dir() and not (killed / "checkpoint-14").exists()
    run(stage, killed, "--resume_from_checkpoint", "latest")
    assert_same_end(whole, killed, stage, step=14)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "number"), SIGNALS)
def test_a_signal_to_the_whole_group_stops_in_order(flags, run, tmp_path, stage, number):
    """As from Ctrl-C or `timeout`, which reach the data loader's workers too."""
    flags[stage] += ["--dataloader_num_workers", "2", "--max_train_steps", "14", "--checkpointing_steps", "1000"]
    whole, stopped = run(stage, tmp_path / "whole"), tmp_path / "stopped"
    process = start(stage, flags, stopped)
    printed = end_beyond(process, stopped, 2, lambda pid: os.killpg(pid, number))
    assert process.returncode == 128 + number, printed
    (checkpoint,) = stopped.glob("checkpoint-*")
    assert f"go on with --resume_from_checkpoint {checkpoint}" in printed and "Traceback" not in printed
    run(stage, stopped, "--resume_from_checkpoint", str(checkpoint))
    assert_same_end(whole, stopped, stage, step=14)


@pytest.mark.slow
def test_a_terminal_that_is_gone_stops_in_order(flags, run, tmp_path):
    """The system sends SIGHUP to the whole group, and nothing can be printed any more."""
    stage, stopped = "latent_diffusion", tmp_path / "stopped"
    flags[stage] += ["--dataloader_num_workers", "2", "--max_train_steps", "14", "--checkpointing_steps", "1000"]
    whole = run(stage, tmp_path / "whole")
    master, slave = pty.openpty()

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    words = [sys.executable, f"train_{stage}.py", *flags[stage], "--output_dir", str(stopped)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        words, cwd=REPOSITORY, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(slave)
    gone = threading.Event()

    def read() -> None:  # so that printing never waits for room
        while not gone.is_set():
            if select.select([master], [], [], 0.02)[0]:
                os.read(master, 65536)
        os.close(master)

    threading.Thread(target=read).start()
    try:
        end_beyond(process, stopped, 2, lambda pid: gone.set())
    finally:
        gone.set()
    assert process.returncode == 128 + signal.SIGHUP
    (checkpoint,) = stopped.glob("checkpoint-*")
    run(stage, stopped, "--resume_from_checkpoint", "latest")
    assert_same_end(whole, stopped, stage, step=14)


# Checkpoints as results


def test_any_checkpoint_is_exported_as_a_pipeline(run, tmp_path):
    whole, exported = run("latent_diffusion", tmp_path / "whole"), tmp_path / "exported"
    checkpoint = whole / "checkpoint-4"
    words = ["--resume_from_checkpoint", str(checkpoint), "--max_train_steps", "4"]
    run("latent_diffusion", exported, *words)
    pipeline = FlowerLDMPipeline.from_pretrained(exported)
    weights = list(pipeline.unet.parameters())
    assert all(map(torch.equal, weights, averaged_weights(checkpoint)))
    assert not all(map(torch.equal, weights, averaged_weights(whole / "checkpoint-6")))
    assert not all(map(torch.equal, weights, load_file(checkpoint / "model.safetensors").values()))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(["class 1"], num_inference_steps=2, output_type="np").images.shape == (1, 24, 24, 3)
    assert [line["step"] for line in read_log(exported / "log.jsonl")] == [4]  # held-out loss; nothing was trained
    assert not list(exported.glob("checkpoint-*"))


def test_any_checkpoint_is_exported_as_an_autoencoder(run, tmp_path):
    whole, exported = run("autoencoder", tmp_path / "whole"), tmp_path / "exported"
    checkpoint = whole / "checkpoint-4"
    run("autoencoder", exported, "--resume_from_checkpoint", str(checkpoint), "--max_train_steps", "4")
    vae = FlowerAutoencoderKL.from_pretrained(exported)
    assert all(map(torch.equal, vae.parameters(), averaged_weights(checkpoint)))
    assert vae.config.latents_std is not None
    assert json.loads((exported / "metrics.json").read_text())["step"] == 4


# Gradient accumulation


@pytest.mark.parametrize("stage", STAGES)
def test_one_batch_or_two_halves_are_one_update(flags, run, tmp_path, stage):
    """Up to rounding: every loss, Adam's averages of the gradients, and the weights."""
    if stage == "autoencoder":  # the adaptive weight is measured on one micro-batch
        flags[stage] += ["--no-adaptive_weight"]
    ways = {"whole": ("16", "1"), "halves": ("8", "2")}
    for name, (batch_size, micro_batches) in ways.items():
        words = ["--train_batch_size", batch_size, "--gradient_accumulation_steps", micro_batches]
        run(stage, tmp_path / name, *words, "--max_train_steps", "3")
    for one, other in zip(*(losses_after(tmp_path / name, 0) for name in ways), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"loss_by_timestep"}:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name
    names = ("whole/checkpoint-3", "halves/checkpoint-3", "halves/checkpoint-2")
    one, other, before = (contents(tmp_path / name) for name in names)
    for name in one:
        states = [tensors(checkpoint[name]) for checkpoint in (one, other, before)]
        if states[0]:
            assert apart(*states) < (1e-3 if "optimizer" in name else 1e-2), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_may_split_its_batches_otherwise(flags, run, tmp_path, stage):
    """From an odd number of micro-batches, too: the halves of an update stay together."""
    if stage == "autoencoder":
        flags[stage] += ["--no-adaptive_weight"]
    whole = ["--train_batch_size", "8", "--gradient_accumulation_steps", "1", "--checkpointing_steps", "1"]
    run(stage, tmp_path / "whole", *whole, "--max_train_steps", "4", "--checkpoints_total_limit", "4")
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    run(stage, tmp_path / "halves", "--max_train_steps", "4", "--resume_from_checkpoint", str(checkpoint))
    ends = [contents(tmp_path / name) for name in ("whole/checkpoint-4", "halves/checkpoint-4")]
    before = contents(checkpoint)
    for name in before:
        states = [tensors(part[name]) for part in (*ends, before)]
        if states[0]:
            assert apart(*states) < 1e-2, name


def test_a_resumed_run_finds_its_data_in_another_place(run, flags, flowers, tmp_path, monkeypatch):
    """A folder of data is kept by its whole path, but may be moved: the images say whether they are the same."""
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "other"):
        shutil.copytree(flowers, tmp_path / folder / "data" / "flowers" / "train")
    words = ["--train_splits", "train", "--label_column", "label", "--max_train_steps", "2"]
    run("latent_diffusion", tmp_path / "run", "--dataset", "one/data/flowers", *words)
    words[-1] = "4"
    run("latent_diffusion", tmp_path / "run", "--dataset", "other/data/flowers", *words, "--resume_from_checkpoint",
        "latest")  # fmt: skip
    assert (tmp_path / "run" / "checkpoint-4").is_dir()


def test_a_renamed_checkpoint_is_refused_in_its_own_folder(run, tmp_path):
    folder = run("latent_diffusion", tmp_path / "run", "--max_train_steps", "2")
    (folder / "checkpoint-2").rename(folder / "kept")
    words = ["--resume_from_checkpoint", str(folder / "kept"), "--max_train_steps", "2"]
    with pytest.raises(InputError, match="kept must be called checkpoint-<step>, or --output_dir must be another"):
        run("latent_diffusion", folder, *words)
    run("latent_diffusion", tmp_path / "exported", *words)


def test_a_resumed_run_takes_another_learning_rate(run, tmp_path):
    """What the line that ends a run with a NaN advises; both stages resume by the same function."""
    stage = "latent_diffusion"
    schedule = ["--lr_scheduler", "linear", "--lr_warmup_steps", "0"]
    run(stage, tmp_path / "run", "--max_train_steps", "4", "--learning_rate", "1e-3", *schedule)
    same, lower = tmp_path / "same", tmp_path / "lower"
    for folder, rate in ((same, "1e-3"), (lower, "1e-4")):
        checkpoint = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")]
        run(stage, folder, "--max_train_steps", "4", "--learning_rate", rate, *schedule, *checkpoint)
    rates = {}
    for folder in (same, lower):
        rates[folder] = [line["learning_rate"] for line in losses_after(folder, 2) if "learning_rate" in line]
    assert rates[lower] == pytest.approx([rate / 10 for rate in rates[same]])
    before = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    moved = {}
    for folder in (same, lower):
        after = load_file(folder / "checkpoint-4" / "model.safetensors")
        moved[folder] = max((after[name] - before[name]).abs().max().item() for name in before)
    assert moved[lower] < 0.3 * moved[same]


# What can't be resumed


@pytest.mark.parametrize("stage", STAGES)
def test_what_would_not_be_the_same_run_is_refused(run, tmp_path, stage):
    run(stage, tmp_path / "run", "--max_train_steps", "2")
    wrong = {
        "--seed": ("1", "--seed is 1, .* made with 0: a resumed run must have the same value"),
        "--resolution": ("32", "--resolution is 32, .* made with 24"),
        "--train_batch_size": ("8", "its images per update .* was 8, this run's is 16: they must be the same"),
        "--gradient_accumulation_steps": ("4", "its images per update .* was 8, this run's is 16"),
        "--max_train_steps": ("1", "is at step 2, beyond the 1 of this run: raise --max_train_steps"),
    }
    for flag, (value, line) in wrong.items():
        words = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2"), flag, value]
        with pytest.raises(InputError, match=line) as refusal:
            run(stage, tmp_path / "refused", *words)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "refused").exists()


def test_other_vgg_weights_are_refused(run, random_vgg, tmp_path):
    run("autoencoder", tmp_path / "run", "--max_train_steps", "2")
    save_file({name: 2 * value for name, value in load_file(random_vgg).items()}, tmp_path / "other.safetensors")
    resumed = ["--resume_from_checkpoint", "latest", "--vgg_weights"]
    with pytest.raises(InputError, match=r"its VGG16 \(--vgg_weights\) was .* they must be the same"):
        run("autoencoder", tmp_path / "run", *resumed, str(tmp_path / "other.safetensors"))
    shutil.copy(random_vgg, tmp_path / "moved.safetensors")
    run("autoencoder", tmp_path / "run", *resumed, str(tmp_path / "moved.safetensors"))


def test_another_model_is_refused_and_named(run, flags, tmp_path):
    run("latent_diffusion", tmp_path / "run", "--max_train_steps", "2")
    words = flags["latent_diffusion"]
    path = Path(words[words.index("--model_config") + 1])
    config = json.loads(path.read_text())
    (tmp_path / "wider.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    resumed = ["--resume_from_checkpoint", "latest", "--model_config"]
    with pytest.raises(InputError, match='its model was .*"hidden_size": 64, .*: they must be the same') as refusal:
        run("latent_diffusion", tmp_path / "run", *resumed, str(tmp_path / "wider.json"))
    assert "\n" not in str(refusal.value)
    (tmp_path / "dropping.json").write_text(json.dumps(config | {"dropout": 0.1}))
    with pytest.raises(InputError, match='its model was .*"dropout": 0.1, .*: they must be the same'):
        run("latent_diffusion", tmp_path / "run", *resumed, str(tmp_path / "dropping.json"))


# What may not run


@pytest.fixture
def resumable(flags, run, tmp_path, monkeypatch) -> tuple[Path, Callable[[Path], None]]:
    """A checkpoint of stage 1, which has all kinds of parts, and what loads one into a run as the script does."""
    words = ["--max_train_steps", "2"]
    checkpoint = run("autoencoder", tmp_path / "run", *words) / "checkpoint-2"
    reached, resume = [], checkpoints.resume

    def stop_there(*parts) -> None:
        reached.extend(parts)
        raise InterruptedError

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(checkpoints, "resume", stop_there)
        run("autoencoder", tmp_path / "other", *words, "--resume_from_checkpoint", str(checkpoint))
    _, args, _, kept = reached
    accelerator = Accelerator(cpu=True)

    def load(folder: Path) -> None:
        args.resume_from_checkpoint = str(folder)
        resume(accelerator, args, checkpoints.find_checkpoint(args), kept)

    load.kept = kept
    load(checkpoint)
    return checkpoint, load


def run_on_loading(path: Path, ran: Path, how: str = "torch") -> None:
    """Write what makes the file `ran` where it is unpickled, as torch writes it or as a bare pickle."""
    if how == "pickle":
        path.write_bytes(pickle.dumps(Payload(ran)))
    else:
        torch.save({"state": Payload(ran)}, path, _use_new_zipfile_serialization=how == "torch")


def test_nothing_in_a_checkpoint_runs(resumable, tmp_path):
    """Whichever file it is, by whatever name, with a manifest that says that all is well."""
    checkpoint, load = resumable
    ran, forged = tmp_path / "ran", tmp_path / "forged"
    states = [path.name for path in checkpoint.glob("*.safetensors")]
    assert len(states) == 10
    # In place of a state, and by the names that accelerate, torch and diffusers would read in place of it.
    names = [(state, state) for state in states] * 3
    names += [(state, state.replace(".safetensors", end)) for state in states for end in (".bin", ".pkl")]
    names += [("model.safetensors", "pytorch_model.bin"), ("random_states.safetensors", "random_states_0.pkl")]
    hows = ["torch", "legacy", "pickle"]
    for i, (removed, name) in enumerate(names):
        shutil.copytree(checkpoint, forged, copy_function=os.link)
        (forged / removed).unlink()
        run_on_loading(forged / name, ran, hows[(i + i // len(states)) % 3])
        (forged / "manifest.json").unlink()
        write_manifest(forged, 2)
        with pytest.raises(InputError, match="forged doesn't fit this run, or is damaged: ") as refusal:
            load(forged)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500
        assert not ran.exists(), (removed, name)
        shutil.rmtree(forged)


def test_beside_the_states_nothing_is_read(resumable, tmp_path):
    checkpoint, load = resumable
    ran, args = tmp_path / "ran", (checkpoint / "args.yaml").read_text()
    for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin", "sampler.bin"):
        run_on_loading(checkpoint / name, ran)
    for text, fits in ((f"!!python/object/apply:os.mkdir [{ran}]", False), (args, True)):
        (checkpoint / "args.yaml").write_text(text)
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint, 2)
        with nullcontext() if fits else pytest.raises(InputError, match="its args.yaml can't be read"):
            load(checkpoint)
        assert not ran.exists()
    torch.load(checkpoint / "optimizer.bin", weights_only=False)
    assert ran.exists()  # it could have failed


def put(value: object, *keys) -> Callable[[dict], None]:
    """Puts a value into a state, by the keys that lead there; a function makes it of what was there."""

    def edit(state: dict) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value(state[keys[-1]]) if callable(value) else value

    return edit


FORGED = {
    "optimizer/1/exp_avg": ("optimizer", put(torch.zeros(7), "state", 1, "exp_avg")),  # was written beyond its end
    "optimizer/1/exp_avg_sq": ("optimizer", put(torch.tensor(1.0), "state", 1, "exp_avg_sq")),
    "disc_optimizer/0/exp_avg": ("disc_optimizer", put("x", "state", 0, "exp_avg")),
    "optimizer/1": ("optimizer", lambda state: state["state"][1].pop("exp_avg")),
    "ema/shadow_params/0": ("ema", put(torch.zeros(1), "shadow_params", 0)),
    "ema/shadow_params": ("ema", put(lambda averages: averages[:-1], "shadow_params")),
    "ema/decay": ("ema", put(float("nan"), "decay")),
    "model/[^ ]*": ("model", lambda state: put(lambda weight: weight / 0, next(iter(state)))(state)),
    "lr_scheduler/last_epoch": ("lr_scheduler", put("2", "last_epoch")),
    "progress/global_step": ("progress", put(10**400, "global_step")),
    "update is -2": ("progress", put(-2, "global_step")),
    "holds step 2": ("progress", put(1, "global_step")),
}


@pytest.fixture
def forge(resumable, tmp_path) -> Callable[[str, Callable[[dict], None]], Path]:
    """Copies the checkpoint with one of its states edited, by a manifest that says that all is well."""

    def forge(name: str, edit: Callable[[dict], None]) -> Path:
        forged = shutil.copytree(resumable[0], tmp_path / f"forged-{name}", dirs_exist_ok=True)
        state = load_state(forged / f"{name}.safetensors")
        edit(state)
        save_state(state, forged / f"{name}.safetensors")
        (forged / "manifest.json").unlink()
        write_manifest(forged, 2)
        return forged

    return forge


def test_a_state_that_no_run_has_written_is_refused_before_an_update(resumable, forge):
    """torch's fused AdamW took moments of any length, and wrote into memory that isn't theirs."""
    for where, (name, edit) in FORGED.items():
        with pytest.raises(InputError, match=f"doesn't fit this run, or is damaged: it(s)? {where}") as refusal:
            resumable[1](forge(name, edit))
        assert "\n" not in str(refusal.value)


def test_a_state_sets_nothing_but_what_the_part_keeps(resumable, forge):
    """Options and methods of optimizers and schedules are this run's, whatever a checkpoint says."""
    _, load = resumable
    load(forge("optimizer", put((2.0, "x"), "param_groups", 0, "betas")))
    load(forge("lr_scheduler", put("not a method", "step")))
    optimizer, lr_scheduler = load.kept["optimizer"], load.kept["lr_scheduler"]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99) and callable(lr_scheduler.step)


def test_a_checkpoint_of_an_earlier_version_is_refused_unread(run, tmp_path):
    """What accelerate's `save_state` writes."""
    checkpoint = run("latent_diffusion", tmp_path / "run", "--max_train_steps", "2") / "checkpoint-2"
    (checkpoint / "manifest.json").unlink()
    for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl"):
        run_on_loading(checkpoint / name, tmp_path / "ran")
    for words in (checkpoint, "latest"):
        with pytest.raises(InputError, match="an earlier version made it, with files that can run code") as refusal:
            run("latent_diffusion", tmp_path / "run", "--resume_from_checkpoint", str(words))
        assert "\n" not in str(refusal.value) and not (tmp_path / "ran").exists()
