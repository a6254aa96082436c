"""Every write fails once: no space, an input/output error, no permission. No valid checkpoint is lost, one clear line
says what to do, and doing it ends in the same weights.

The writes are counted in an undisturbed run: opening a file, the first writing to it, safetensors, making a folder,
renaming, `fsync`. Then the k-th fails. The short form takes a few of them; the long one, `slow`, all.
"""

import builtins
import errno
import io
import os
import random
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import tiny_stages
from matplotlib.figure import Figure
from safetensors.torch import load_file

import train_autoencoder
import train_latent_diffusion
from flower_ldm import FlowerAutoencoderKL, FlowerLDMPipeline, checkpoints, evaluation, report, sample
from flower_ldm.checkpoint_files import why_invalid
from flower_ldm.errors import InputError
from flower_ldm.model_card import write_model_card

ROOT = Path(__file__).parent.parent
MAINS = {"autoencoder": train_autoencoder.main, "latent_diffusion": train_latent_diffusion.main}
KINDS = {"no space": errno.ENOSPC, "I/O error": errno.EIO, "no permission": errno.EACCES}
SEED = 0


# A disk that refuses


class RefusingFile:
    """A file whose first writing is counted, and may break off in its middle."""

    def __init__(self, file: io.IOBase, disk: "Disk", path: str):
        self._file, self._disk, self._path, self._counted = file, disk, path, False

    def __getattr__(self, name: str) -> object:
        if name == "fileno":  # Pillow writes past `write` where there is one
            raise AttributeError(name)
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __iter__(self):
        return iter(self._file)

    def write(self, content) -> int:
        if not self._counted:
            self._counted = True
            try:
                self._disk.attempt("write", self._path)
            except OSError:
                self._file.write(content[: len(content) // 2])
                self._file.flush()
                raise
        return self._file.write(content)


class Disk:
    """Counts the writes of this thread below a folder, and refuses the `fails`-th.

    Attributes:
        calls: what was asked for, in order.
        refused: what was refused; `None` until then.
        before: what the folder's runs held then that must not get lost, by `valuables`.
    """

    def __init__(self, folder: Path, fails: int | None = None, number: int = errno.ENOSPC):
        self.folder, self.fails, self.number = str(folder), fails, number
        self.thread = threading.get_ident()
        self.calls: list[str] = []
        self.refused: str | None = None
        self.before: dict[str, dict[str, bytes]] = {}

    def attempt(self, call: str, path: object) -> None:
        where = os.fspath(path) if not isinstance(path, int) else os.readlink(f"/proc/self/fd/{path}")
        if threading.get_ident() != self.thread or not str(where).startswith(self.folder):
            return
        self.calls.append(f"{call} {Path(where).relative_to(self.folder)}")
        if len(self.calls) - 1 == self.fails:
            self.refused = self.calls[-1]
            self.before = valuables(Path(self.folder))
            raise OSError(self.number, os.strerror(self.number), str(where))

    @contextmanager
    def watched(self) -> Iterator["Disk"]:
        """Within this context the calls go through this disk."""
        with pytest.MonkeyPatch.context() as patch:
            for name, position in {"mkdir": 0, "rename": 1, "replace": 1, "fsync": 0}.items():
                patch.setattr(os, name, self._counted(name, getattr(os, name), position))
            patch.setattr(builtins, "open", self._open(open))
            patch.setattr(io, "open", self._open(io.open))  # pathlib's
            serialize = "safetensors.torch.serialize_file"
            patch.setattr(serialize, self._counted("safetensors", sys.modules["safetensors.torch"].serialize_file, 1))
            patch.setattr(torch, "save", self._counted("torch", torch.save, 1))
            yield self

    def _counted(self, name: str, call: Callable, position: int) -> Callable:
        def counted(*args, **kwargs):
            if name == "mkdir" and os.path.isdir(args[0]):  # nothing to be made
                return call(*args, **kwargs)
            self.attempt(name, args[position])
            return call(*args, **kwargs)

        return counted

    def _open(self, call: Callable) -> Callable:
        def opened(file, mode="r", *args, **kwargs):
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return call(file, mode, *args, **kwargs)
            self.attempt("open", file)
            return RefusingFile(call(file, mode, *args, **kwargs), self, os.fspath(file))

        return opened


def valuables(folder: Path) -> dict[str, dict[str, bytes]]:
    """The files of each complete checkpoint, and of each `best/` and export that is whole, by their names."""
    found = {}
    for run in (folder / "autoencoder", folder / "flower-ldm"):
        parts = [run / "best"] if (run / "best").is_dir() else []
        for part in [*checkpoints.list_checkpoints(run), *parts]:
            found[f"{part.relative_to(folder)}"] = contents(part)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What is tried


class Trial(NamedTuple):
    """Something that writes below a folder, and what must do after it was refused."""

    act: Callable[[Path], None]
    go_on: Callable[[Path], None]
    check: Callable[[Path], None]
    start: Path | None  # a folder that it begins with
    whole: Path | None = None  # what it makes undisturbed


@pytest.fixture(scope="module")
def quick_figures() -> Iterator[None]:
    """Two thirds of a tiny run are spent on drawing curves; here it matters that they are written, not how."""
    drawn = io.BytesIO()
    Figure(figsize=(1, 1)).savefig(drawn, format="png")

    def savefig(figure, path, **_) -> None:
        with open(path, "wb") as file:
            file.write(drawn.getvalue())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield


@pytest.fixture(scope="module")
def trial(tmp_path_factory, finished_runs, random_vgg, quick_figures, run_script) -> Callable[[str], Trial]:
    """Either stage from its beginning, or on to a later end; or one of the commands on what they have made."""
    words = tiny_stages(tmp_path_factory.mktemp("flags"), random_vgg)
    flags = {stage: [*given, *TINIER.split()] for stage, given in zip(MAINS, words, strict=True)}
    flags["autoencoder"] += ["--perceptual_weight", "0", "--adversarial_weight", "0"]
    flags["latent_diffusion"] += ["--autoencoder", str(finished_runs.autoencoder)]

    def train(stage: str, folder: Path, *more: str) -> None:
        run_script(MAINS[stage], [*flags[stage], "--output_dir", folder / FOLDERS[stage], *more])

    @cache
    def make(name: str) -> Trial:
        if name in COMMANDS:
            return Trial(COMMANDS[name], COMMANDS[name], loads, finished_runs.flower_ldm.parent)
        stage, longer = name.removesuffix(", longer"), name.endswith(", longer")
        start = make(stage).whole if longer else None
        more = ["--max_train_steps", "3", "--checkpoints_total_limit", "1"] if longer else []
        whole = tmp_path_factory.mktemp("whole")

        def act(folder: Path) -> None:
            train(stage, folder, *more, *(["--resume_from_checkpoint", "latest"] if longer else []))

        def go_on(folder: Path) -> None:
            safe = checkpoints.list_checkpoints(folder / FOLDERS[stage])
            how = ["--resume_from_checkpoint", "latest"] if safe else ["--overwrite_output_dir"]
            train(stage, folder, *more, *how)

        if start is not None:
            shutil.copytree(start, whole, dirs_exist_ok=True)
        act(whole)
        return Trial(
            act, go_on, lambda folder: same_end(whole / FOLDERS[stage], folder / FOLDERS[stage]), start, whole
        )

    return make


FOLDERS = {"autoencoder": "autoencoder", "latent_diffusion": "flower-ldm"}
# 2 updates, each with validation and checkpoint.
TINIER = "--classes 0 1 --images_per_class 8 --resolution 16 --train_batch_size 4 --max_train_steps 2"
TINIER += " --lr_warmup_steps 1 --logging_steps 1 --validation_steps 1 --checkpointing_steps 1 --mixed_precision no"
COMMANDS = {
    "evaluation": lambda folder: evaluation.main([
        "--pipeline", str(folder / "flower-ldm"), "--num_samples", "8", "--steps", "1", "--device", "cpu",
        "--sweep_guidance", "1", "--sweep_steps", "1",
    ]),
    "sample": lambda folder: sample.main([
        "--pipeline", str(folder / "flower-ldm"), "--labels", "0", "--num_images", "1", "--num_inference_steps", "1",
        "--output", str(folder / "out"),
    ]),
    "report": lambda folder: report.main([str(folder / "flower-ldm")]),
    "card": lambda folder: write_model_card(folder / "flower-ldm", "gardener/flowers"),
}  # fmt: skip


def loads(folder: Path) -> None:
    """Whatever says that it is whole must be."""
    for run in (folder / "autoencoder", folder / "autoencoder" / "best"):
        if (run / "config.json").exists():
            FlowerAutoencoderKL.from_pretrained(run)
    if (folder / "flower-ldm" / "model_index.json").exists():
        FlowerLDMPipeline.from_pretrained(folder / "flower-ldm")
    for page in folder.glob("*/report.html"):
        assert page.read_text().rstrip().endswith("</html>")
    assert not list(folder.rglob("*.tmp"))


def same_end(one: Path, other: Path) -> None:
    """Two runs have made the same weights, bit for bit, and the same files."""
    for path in one.rglob("diffusion_pytorch_model.safetensors"):
        mine, yours = load_file(path), load_file(other / path.relative_to(one))
        assert mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine), path
    made = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (one, other)]
    assert {name for name in made[0] ^ made[1] if "step-0" not in name} == set()  # a preview may be left out
    loads(other.parent)


# The trials


def refuse(trial: Trial, folder: Path, fails: int, kind: str, going_on: bool, capsys) -> str:
    """Let the `fails`-th write fail, then go on as the line says, where that is wanted. Returns how it ended."""
    if trial.start is not None:
        shutil.copytree(trial.start, folder, dirs_exist_ok=True)
    disk = Disk(folder, fails, KINDS[kind])
    capsys.readouterr()
    line = None
    with disk.watched():
        try:
            trial.act(folder)
        except InputError as error:
            line = str(error)
    said = capsys.readouterr()
    assert disk.refused is not None, f"write {fails} of {len(disk.calls)} was never asked for"
    loads(folder)
    if line is None:  # what a run can do without, or what the system may not be able to do at all
        optional = ("log.jsonl", "_loss.png", "_losses.png", "/samples", "/reconstructions")
        if disk.refused.startswith("rename") and "/unfinished-" in disk.refused:  # an old checkpoint on its way out
            assert "can't be removed" in said.out
            shutil.rmtree(folder / disk.refused.split()[1].replace("unfinished-", "checkpoint-"))  # as nobody did
        elif any(name in disk.refused for name in optional):
            assert "left out" in said.err or "fsync" in disk.refused
        else:
            assert disk.refused.split()[0] in ("fsync", "unlink"), disk.refused
        trial.check(folder)
        return "went on without"
    assert "\n" not in line and "Traceback" not in said.err
    assert ("o space " if kind == "no space" else os.strerror(KINDS[kind])) in line, line
    unhurt(disk.before, folder)
    if going_on:
        trial.go_on(folder)
        trial.check(folder)
    return "ended in one line"


def unhurt(before: dict[str, dict[str, bytes]], folder: Path) -> None:
    """What was valid when the disk refused still is, or has a successor."""
    for name, files in before.items():
        if name.endswith("/best"):
            continue  # `loads` has loaded it
        step = checkpoints.step_of(Path(name))
        found = checkpoints.list_checkpoints((folder / name).parent)
        newer = [path for path in found if checkpoints.step_of(path) > step and not why_invalid(path)]
        assert newer or contents(folder / name) == files, f"{name} was lost"


def count(trial: Trial, folder: Path) -> list[str]:
    """The writes of an undisturbed trial."""
    if trial.start is not None:
        shutil.copytree(trial.start, folder, dirs_exist_ok=True)
    disk = Disk(folder)
    with disk.watched():
        trial.act(folder)
    return disk.calls


def refuse_some(trial: Trial, name: str, tmp_path: Path, capsys, most: int | None = None, go_on_every: int = 1) -> str:
    """Count the writes of an undisturbed trial, and refuse so many of them, each in a trial of its own."""
    calls = count(trial, tmp_path / "counted")
    assert calls
    draw = random.Random(SEED)
    chosen = sorted(draw.sample(range(len(calls)), min(most or len(calls), len(calls))))
    shift = draw.randrange(len(KINDS))
    ends, failures = Counter(), []
    for number, fails in enumerate(chosen):
        kind = list(KINDS)[(number + shift) % len(KINDS)]
        try:
            ends[f"{kind}: {refuse(trial, tmp_path / 'trial', fails, kind, number % go_on_every == 0, capsys)}"] += 1
        except Exception as error:
            failures.append(
                f"{kind} at write {fails} of {len(calls)}, {calls[fails]}: {type(error).__name__}: {error}"
            )
        shutil.rmtree(tmp_path / "trial", ignore_errors=True)
    assert not failures, "\n".join(failures)
    counted = ", ".join(f"{end} {number}" for end, number in sorted(ends.items()))
    return f"{name}: {len(calls)} writes, {len(chosen)} of them refused (seed {SEED}): {counted}"


@pytest.mark.parametrize("name", ["autoencoder", "latent_diffusion", "sample"])
def test_a_write_that_fails_costs_nothing(trial, name, tmp_path, capsys, record_property):
    record_property("counts", refuse_some(trial(name), name, tmp_path, capsys, most=2))


TRIALS = ("autoencoder", "latent_diffusion", "autoencoder, longer", "latent_diffusion, longer", *COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIALS)
def test_every_write_fails_once(trial, name, tmp_path, capsys, record_property):
    record_property("counts", refuse_some(trial(name), name, tmp_path, capsys, go_on_every=3))
