"""The output folder, checkpoints by name, and the progress that they keep; nothing is trained."""

import errno
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from conftest import parse
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file

from flower_ldm import checkpoints, recipes, run_lock, runs
from flower_ldm.checkpoint_files import load_state, save_state, why_invalid, write_manifest
from flower_ldm.checkpoints import Progress
from flower_ldm.errors import InputError
from flower_ldm.run_lock import lock_folder

# The output folder


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    return tmp_path / "results" / "autoencoder"


def claim(output_dir: Path, *words: str) -> None:
    args = parse(f"--output_dir={output_dir}", "--report_to=none", *words)
    checkpoints.check_output_dir(args)
    checkpoints.claim_output_dir(Accelerator(cpu=True), args)


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_another_run_has_filled_meanwhile_is_left_alone(output_dir):
    args = parse(f"--output_dir={output_dir}", "--report_to=none")
    checkpoints.check_output_dir(args)
    (output_dir / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(InputError, match="is not empty"):
        checkpoints.claim_output_dir(Accelerator(cpu=True), args)
    assert [path.name for path in output_dir.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize(
    "name", ["data_dir", "vgg_weights", "config", "model_config", "latent_cache_dir", "resume_from_checkpoint"]
)
def test_what_a_run_reads_may_not_lie_where_it_writes(output_dir, name):
    output_dir.mkdir(parents=True)
    (output_dir / "args.yaml").write_text("{}")
    needed = output_dir / "some" / "needed"
    needed.parent.mkdir()
    needed.write_text("{}")
    args = parse(f"--output_dir={output_dir}", "--overwrite_output_dir")
    setattr(args, name, str(needed))
    with pytest.raises(InputError, match=f"holds --{name} {needed}: name another folder"):
        checkpoints.check_output_dir(args)


def test_the_default_folder_of_the_flowers_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--output_dir data holds --data_dir data: name another folder"):
        checkpoints.check_output_dir(parse("--output_dir=data", "--dataset=flowers102"))
    checkpoints.check_output_dir(parse("--output_dir=data", "--dataset=synthetic"))


@pytest.mark.parametrize("where", ["run", "results/autoencoder", "rose/run"])
def test_a_run_does_not_become_a_class_of_its_data(image_folder, where):
    """It couldn't be resumed, for other data than before; stage 2 learned to draw its pictures."""
    words = ["--dataset=imagefolder", f"--output_dir={image_folder / where}"]
    with pytest.raises(InputError, match=f"{where} lies among the class folders of --data_dir {image_folder}, and"):
        checkpoints.check_output_dir(parse(*words, f"--data_dir={image_folder}"))
    checkpoints.check_output_dir(parse(*words, f"--data_dir={image_folder}", "--classes", "rose"))
    (image_folder.parent / "all").mkdir()
    image_folder.rename(image_folder.parent / "all" / "train")  # DIR/<split>/<class>: beside the splits is room
    folder = image_folder.parent / "all"
    checkpoints.check_output_dir(parse("--dataset=imagefolder", f"--data_dir={folder}", f"--output_dir={folder}/run"))
    with pytest.raises(InputError, match="lies among the class folders"):
        checkpoints.check_output_dir(
            parse("--dataset=imagefolder", f"--data_dir={folder}", f"--output_dir={folder}/train/run")
        )


@pytest.fixture
def earlier_run(output_dir) -> dict[str, bytes]:
    """A run that has ended, with a checkpoint, and what it has on disk."""
    with run_lock.locks_released():
        claim(output_dir, "--seed=1")
    make_checkpoint(output_dir, 5)
    return on_disk(output_dir)


def make_checkpoint(output_dir: Path, step: int) -> Path:
    """A valid one of the run in this folder, with next to nothing in it."""
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir()
    save_state({"weights": torch.ones(100)}, folder / "model.safetensors")
    shutil.copy(output_dir / "args.yaml", folder)
    write_manifest(folder, step)
    return folder


def test_a_new_folder_is_made_and_holds_the_arguments(output_dir):
    claim(output_dir, "--seed=3", "--classes", "1", "rose")
    args = yaml.safe_load((output_dir / "args.yaml").read_text())
    words = ["--report_to=none", "--seed=3", "--classes", "1", "rose"]
    assert args == vars(parse(f"--output_dir={output_dir}", *words))


def test_an_empty_folder_will_do(output_dir):
    output_dir.mkdir(parents=True)
    claim(output_dir)
    assert (output_dir / "args.yaml").is_file()


def test_another_run_is_not_overwritten(output_dir, earlier_run):
    with pytest.raises(InputError, match="is not empty.*--resume_from_checkpoint latest.*--overwrite_output_dir"):
        claim(output_dir, "--seed=2")
    assert on_disk(output_dir) == earlier_run


def test_another_run_is_replaced_when_asked_to(output_dir, earlier_run):
    claim(output_dir, "--seed=2", "--overwrite_output_dir")
    assert on_disk(output_dir).keys() == {"args.yaml", ".lock"}
    assert yaml.safe_load((output_dir / "args.yaml").read_text())["seed"] == 2


# Each list holds the one before ten times: printed, it would fill the memory.
LAUGHS = "\n".join(["l0: &l0 [ha]", *(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 10))])
FOREIGN_ARGS = {
    "empty": "",
    "Ultralytics": "task: detect\nmode: train\nepochs: 100\nbatch: 16\nimgsz: 640\nsave_dir: runs/detect/train\n",
    "no mapping": "- 1\n",
    "no YAML": "a: [",
    "no text": "\x00\x01",
    "deep": "a: " + "[" * 5000,
    "laughing": LAUGHS + "".join(f"\n{flag}: *l9" for flag in recipes.marks_of_a_run()),
}


@pytest.mark.parametrize("args", [None, *FOREIGN_ARGS])
@pytest.mark.parametrize("name", ["letters.txt", "weights/best.pt"])
def test_what_is_no_run_is_never_replaced(output_dir, name, args):
    """Such as a home folder, another program's run, or a folder that holds several runs."""
    (output_dir / name).parent.mkdir(parents=True)
    (output_dir / name).write_text("dear flower")
    if args is not None:
        (output_dir / "args.yaml").write_text(FOREIGN_ARGS[args])
    before = on_disk(output_dir)
    with pytest.raises(InputError, match="is not the folder of a training run"):
        claim(output_dir, "--overwrite_output_dir")
    assert on_disk(output_dir) == before


@pytest.mark.parametrize("name", ["args.yaml", "README.md"])
def test_a_pipe_in_a_run_is_not_waited_for(output_dir, earlier_run, name):
    (output_dir / name).unlink(missing_ok=True)
    os.mkfifo(output_dir / name)
    with pytest.raises(InputError, match="is not the folder of a training run|no training run has written"):
        claim(output_dir, "--overwrite_output_dir")


@pytest.mark.parametrize(
    "name",
    [
        "my_flower.py", "letters.txt", "flower-ldm/args.yaml", "flowers-102/jpg/image_00001.jpg", ".git/config",
        "train.log", "checkpoint-5/notes.txt", "checkpoint-5-before-lr-change/model.safetensors", "samples/mine.png",
        "logs/slurm.out", "checkpoint-²/model.safetensors", "diffusion_loss.png/notes.png",
    ],
)  # fmt: skip
def test_what_somebody_else_put_into_a_run_stops_its_replacement(output_dir, earlier_run, name):
    (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
    (output_dir / name).write_text("dear flower")
    with pytest.raises(InputError, match="holds what no training run has written: '.*; move that") as caught:
        claim(output_dir, "--overwrite_output_dir")
    assert re.search("written: '([^']*)'", str(caught.value))[1] in (name, str(Path(name).parent), name.split("/")[0])
    assert on_disk(output_dir) == earlier_run | {name: b"dear flower"}


def test_a_checkpoint_that_was_set_aside_is_the_runs_own(output_dir, earlier_run):
    """`make_room` renames what is in a new checkpoint's place, such as a damaged one of the same update."""
    checkpoints.make_room(output_dir / "checkpoint-5")
    assert (output_dir / "checkpoint-5-aside-1" / "model.safetensors").is_file()
    (output_dir / "checkpoint-5-aside-1" / "notes.txt").write_text("dear flower")
    with pytest.raises(InputError, match="no training run has written: 'checkpoint-5-aside-1/notes.txt'"):
        claim(output_dir, "--overwrite_output_dir")
    (output_dir / "checkpoint-5-aside-1" / "notes.txt").unlink()
    claim(output_dir, "--resume_from_checkpoint=latest")
    assert (output_dir / "checkpoint-5-aside-1" / "model.safetensors").is_file()
    claim(output_dir, "--overwrite_output_dir")
    assert on_disk(output_dir).keys() == {"args.yaml", ".lock"}


class Unreachable(GeneralTracker):
    """A tracker whose service can't be reached."""

    name, requires_logging_directory, tracker = "unreachable", False, None

    def __init__(self):
        super().__init__(_blank=True)

    def store_init_configuration(self, values):
        pass

    def start(self):
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def test_a_tracker_that_cannot_start_is_not_taken_for_the_disk(output_dir):
    args = parse(f"--output_dir={output_dir}", "--report_to=tensorboard")
    accelerator = Accelerator(cpu=True, log_with=Unreachable())
    with pytest.raises(InputError) as caught, checkpoints.refusals_say_how_to_go_on(args):
        checkpoints.claim_output_dir(accelerator, args)
    assert re.fullmatch("--report_to tensorboard can't be started: .*Connection refused; see .*", str(caught.value))
    assert "can't be written" not in str(caught.value)


def test_what_is_not_ours_is_named_in_one_line(output_dir, earlier_run):
    for number in range(5):
        (output_dir / f"note\n{number}").touch()
    with pytest.raises(InputError, match="'note\\\\n0', 'note\\\\n1', 'note\\\\n2' and 2 more; move") as caught:
        claim(output_dir, "--overwrite_output_dir")
    assert "\n" not in str(caught.value)


def test_a_card_of_somebodys_own_is_not_ours(output_dir, earlier_run):
    (output_dir / "README.md").write_text("My flowers")
    with pytest.raises(InputError, match="no training run has written: 'README.md'"):
        claim(output_dir, "--overwrite_output_dir")
    (output_dir / "README.md").write_text(f"---\n{runs.CARD_MARK}\n")
    claim(output_dir, "--overwrite_output_dir")


@pytest.mark.parametrize("where", ["here", "above", "home", "above home", "mounted"])
def test_some_folders_are_never_emptied(output_dir, earlier_run, monkeypatch, where):
    inside = output_dir / "checkpoint-5"
    monkeypatch.chdir({"here": output_dir, "above": inside}.get(where, output_dir.parent))
    monkeypatch.setenv("HOME", str({"home": output_dir, "above home": inside}.get(where, "/")))
    monkeypatch.setattr(os.path, "ismount", lambda path: where == "mounted" and path == output_dir)
    said = "(is|holds) (the current folder|your home folder)|is where a disk is mounted"
    for path in (Path("."), output_dir) if where == "here" else (output_dir,):
        with pytest.raises(
            InputError, match=f"^--overwrite_output_dir: {re.escape(str(path))} ({said}); name another"
        ):
            claim(path, "--overwrite_output_dir", "--dataset=synthetic")
    assert on_disk(output_dir) == earlier_run


def test_links_are_removed_and_never_followed(output_dir, earlier_run, tmp_path):
    kept = tmp_path / "kept" / "step-1.png"
    kept.parent.mkdir()
    kept.write_bytes(b"picture")
    (output_dir / "latent_cache").symlink_to(kept.parent)
    (output_dir / "samples").mkdir()
    (output_dir / "samples" / "step-1.png").symlink_to(kept)
    link = tmp_path / "link"
    link.symlink_to(output_dir)
    claim(link, "--seed=2", "--overwrite_output_dir")
    assert on_disk(output_dir).keys() == {"args.yaml", ".lock"} and not (output_dir / "latent_cache").exists()
    assert kept.read_bytes() == b"picture" and link.is_symlink()


def test_a_replacement_that_was_killed_can_be_begun_again(output_dir, earlier_run, monkeypatch):
    """What says that it is a run goes last."""
    gone = []
    unlink = Path.unlink

    def killed(path, *args, **kwargs):
        if len(gone) == 1:
            raise KeyboardInterrupt
        unlink(path, *args, **kwargs)
        gone.append(path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", killed)
        claim(output_dir, "--overwrite_output_dir")
    assert gone and (output_dir / "args.yaml").is_file()
    claim(output_dir, "--seed=2", "--overwrite_output_dir")
    assert on_disk(output_dir).keys() == {"args.yaml", ".lock"}


@pytest.mark.parametrize("words", [[], ["--overwrite_output_dir"]])
def test_a_file_is_no_folder(output_dir, words):
    output_dir.parent.mkdir()
    output_dir.write_text("dear flower")
    with pytest.raises(InputError, match="is a file"):
        claim(output_dir, *words)
    with pytest.raises(InputError, match=f"{output_dir}/run: {output_dir} is a file"):
        claim(output_dir / "run", *words)
    assert output_dir.read_text() == "dear flower"


def test_a_folder_in_which_nothing_may_be_written(output_dir, monkeypatch):
    output_dir.parent.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != output_dir.parent)  # nothing is forbidden to root
    with pytest.raises(InputError, match=f"{output_dir.parent} is not writable; name another"):
        checkpoints.check_output_dir(parse(f"--output_dir={output_dir}"))


@pytest.mark.parametrize("words", [[], ["--overwrite_output_dir"]])
@pytest.mark.parametrize("checkpoint", ["latest", "by path"])
def test_a_resumed_run_keeps_what_is_there(output_dir, earlier_run, checkpoint, words):
    checkpoint = checkpoint if checkpoint == "latest" else output_dir / "checkpoint-5"
    (output_dir / "unfinished-7").mkdir()
    (output_dir / "unfinished-7" / "model.safetensors").write_bytes(b"half")
    (output_dir / "unfinished-novel").mkdir()
    (output_dir / "unfinished-novel" / "chapter-1").write_bytes(b"once")
    (output_dir / "unfinished-8").symlink_to(output_dir / "unfinished-novel")
    claim(output_dir, f"--resume_from_checkpoint={checkpoint}", "--seed=1", *words)
    kept = on_disk(output_dir)
    assert kept.pop("unfinished-novel/chapter-1") == b"once" and (output_dir / "unfinished-8").is_symlink()
    assert kept.keys() == earlier_run.keys(), "a killed run's unfinished checkpoint goes, all else stays"
    assert kept["checkpoint-5/model.safetensors"] == earlier_run["checkpoint-5/model.safetensors"]


def test_resuming_elsewhere_does_not_open_a_folder_with_a_run(output_dir, earlier_run, tmp_path):
    with pytest.raises(InputError, match="is not empty"):
        claim(output_dir, f"--resume_from_checkpoint={tmp_path / 'other' / 'checkpoint-5'}")
    assert on_disk(output_dir) == earlier_run


# The lock


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[int]:
    """The other's number. It is killed, if it hasn't been, and leaves nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run_lock.HELD.clear()  # what this process has locked, its child has not
            lock_folder(folder)
            os.write(writer, b"held")
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(reader, 4) == b"held"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_without_checkpoints_stays_as_it_is(tmp_path):
    """Somebody's photos, by a slip: not even a lock is left there."""
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="photos holds no checkpoint; leave the flag out"):
        find(tmp_path / "photos", "latest")
    assert list((tmp_path / "photos").iterdir()) == []


def test_a_second_run_is_refused_until_the_first_is_killed(output_dir, earlier_run):
    """It is resumed while it is still at work, or replaced; a lock that outlived its process would be no use."""
    line = f"--output_dir {output_dir}: another run is at work there"
    with held_by_another_process(output_dir):
        with pytest.raises(InputError, match=line):
            find(output_dir, "latest", "--seed=1")
        with pytest.raises(InputError, match=line):
            find(output_dir, output_dir / "checkpoint-5", "--seed=1")
        with pytest.raises(InputError, match=line):
            claim(output_dir, "--overwrite_output_dir")
        assert on_disk(output_dir) == earlier_run
        assert find(output_dir.parent / "other", output_dir / "checkpoint-5", "--seed=1")
    assert find(output_dir, "latest", "--seed=1")


def test_two_new_runs_at_once_in_one_folder(output_dir):
    """The other has the lock and nothing else there yet."""
    output_dir.mkdir(parents=True)
    with (
        held_by_another_process(output_dir),
        pytest.raises(InputError, match="another run is at work there; wait for its end, or name another folder"),
    ):
        claim(output_dir)
    assert on_disk(output_dir) == {".lock": b""}
    claim(output_dir)


def test_the_lock_follows_no_link(output_dir, tmp_path):
    output_dir.mkdir(parents=True)
    (output_dir / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"its \.lock can't be opened"):
        lock_folder(output_dir)
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_system_without_locks_is_said(output_dir, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", lockf)
    claim(output_dir)
    claim(output_dir, "--overwrite_output_dir")
    printed = capsys.readouterr().out
    assert printed.count("can't be locked (") == 1 and "start no second run there" in printed


# Checkpoints


def test_checkpoints_are_in_the_order_of_their_steps(output_dir):
    names = "checkpoint-10 checkpoint-9 checkpoint-100 checkpoint-best unfinished-200 best checkpoint-keep-1"
    names += " checkpoint-before-lr-change-2024 checkpoint-² checkpoint-٣ checkpoint-007 checkpoint-5.bak checkpoint-"
    for name in names.split():
        (output_dir / name).mkdir(parents=True)
    (output_dir / "checkpoint-3").symlink_to(output_dir / "checkpoint-9")
    (output_dir / "checkpoint-4").write_text("a file")
    assert [path.name for path in checkpoints.list_checkpoints(output_dir)] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
    ]


def find(output_dir: Path, checkpoint: str | Path, *words: str) -> Path | None:
    return checkpoints.find_checkpoint(
        parse(f"--output_dir={output_dir}", f"--resume_from_checkpoint={checkpoint}", *words)
    )


def test_find_checkpoint(output_dir, earlier_run, tmp_path):
    assert checkpoints.find_checkpoint(parse(f"--output_dir={output_dir}")) is None
    assert find(output_dir, "latest", "--seed=1") == output_dir / "checkpoint-5"
    assert find(tmp_path / "new", output_dir / "checkpoint-5", "--seed=1") == output_dir / "checkpoint-5"
    longer = ["--seed=1", "--logging_steps=1", "--max_train_steps=99", "--learning_rate=1"]
    assert find(output_dir, "latest", *longer) == output_dir / "checkpoint-5"


def test_no_checkpoint_to_find(output_dir, earlier_run, tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint; leave the flag out"):
        find(tmp_path / "new", "latest")
    with pytest.raises(InputError, match="is no checkpoint folder"):
        find(output_dir, output_dir / "checkpoint-6")


@pytest.mark.parametrize(
    "text, line",
    [
        ("a: " + "[" * 5000, "checkpoint-5: its args.yaml can't be read"),
        (f"{LAUGHS}\nseed: *l9", "checkpoint-5: its args.yaml can't be read"),
        ("seed: 1", "checkpoint-5 was made without --[a-z_]+: by the other script, or by another version"),
    ],
)
def test_flags_that_this_script_has_not_written_are_refused(output_dir, earlier_run, text, line):
    checkpoint = output_dir / "checkpoint-5"
    (checkpoint / "args.yaml").write_text(text)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, 5)
    with pytest.raises(InputError, match=line):
        find(output_dir, "latest", "--seed=1")


@pytest.mark.parametrize(
    "flag",
    ["seed=2", "resolution=32", "lr_warmup_steps=1", "classes=1", "images_per_class=7"],
)
def test_a_checkpoint_of_another_trajectory_is_refused(output_dir, earlier_run, flag):
    with pytest.raises(InputError, match=f"--{flag.partition('=')[0]} is .* made with") as caught:
        find(output_dir, "latest", "--seed=1", f"--{flag}")
    assert "checkpoint-5" in str(caught.value)


def test_a_flag_without_traits_may_not_change(output_dir, earlier_run):
    """Such as one that was added in haste: nobody has said that a resumed run may have another value."""
    checkpoint = output_dir / "checkpoint-5"
    saved = yaml.safe_load((checkpoint / "args.yaml").read_text())
    (checkpoint / "args.yaml").write_text(yaml.safe_dump(saved | {"made_up": 1}))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, 5)
    args = parse(f"--output_dir={output_dir}", "--resume_from_checkpoint=latest", "--seed=1")
    args.made_up = 1
    assert checkpoints.find_checkpoint(args) == checkpoint
    args.made_up = 2
    with pytest.raises(InputError, match="--made_up is 2, but .*checkpoint-5 was made with 1: .* must have the same"):
        checkpoints.find_checkpoint(args)


def test_an_older_checkpoint_is_no_place_to_go_on_in_the_same_folder(output_dir, earlier_run, tmp_path):
    make_checkpoint(output_dir, 7)
    with pytest.raises(InputError, match="holds checkpoint-7, which is newer.*--output_dir"):
        find(output_dir, output_dir / "checkpoint-5", "--seed=1")
    assert find(tmp_path / "branch", output_dir / "checkpoint-5", "--seed=1") == output_dir / "checkpoint-5"
    (output_dir / "checkpoint-7" / "args.yaml").write_text("torn")
    assert find(output_dir, output_dir / "checkpoint-5", "--seed=1") == output_dir / "checkpoint-5"


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def as_an_earlier_version_wrote(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "random_states_0.pkl").write_bytes(b"pickled")


def edit_manifest(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


# What happens to a checkpoint's folder, by what is said of it.
DAMAGE = {
    "it has no manifest.json, which is written last": lambda folder: (folder / "manifest.json").unlink(),
    "an earlier version made it, with files that can run code": as_an_earlier_version_wrote,
    "its manifest.json can't be read": lambda folder: os.truncate(folder / "manifest.json", 50),
    "its 'model.safetensors' is missing": lambda folder: (folder / "model.safetensors").unlink(),
    "its 'model.safetensors' has changed": lambda folder: flip_a_bit(folder / "model.safetensors"),
    "its 'args.yaml' has changed": lambda folder: os.truncate(folder / "args.yaml", 9),
    "it holds step 5": lambda folder: [shutil.rmtree(folder), shutil.copytree(folder.parent / "checkpoint-5", folder)],
    "its manifest.json has version 2": lambda folder: edit_manifest(folder / "manifest.json", version=2),
    "its 'model.safetensors' is missing ": lambda folder: (  # a pipe, which would be waited for
        [(folder / "model.safetensors").unlink(), os.mkfifo(folder / "model.safetensors")]
    ),
    "its '../args.yaml' is missing": lambda folder: edit_manifest(
        folder / "manifest.json", files={"../args.yaml": {"size": 0, "sha256": ""}}
    ),
    "its manifest.json can't be read ": lambda folder: edit_manifest(folder / "manifest.json", files=["args.yaml"]),
    "its manifest.json can't be read  ": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_checkpoint_that_is_not_whole_is_named_and_passed_over(output_dir, earlier_run, capsys, reason):
    newer = make_checkpoint(output_dir, 7)
    DAMAGE[reason](newer)
    assert find(output_dir, "latest", "--seed=1") == output_dir / "checkpoint-5"
    said = f"going on from {output_dir / 'checkpoint-5'}; skipped: checkpoint-7, {reason.strip()}"
    assert capsys.readouterr().out.startswith(said)
    with pytest.raises(InputError, match=re.escape(f"{newer} is no valid checkpoint: {reason.strip()}")):
        find(output_dir, newer, "--seed=1")
    shutil.rmtree(output_dir / "checkpoint-5")
    with pytest.raises(InputError, match="holds no valid checkpoint ") as caught:
        find(output_dir, "latest", "--seed=1")
    assert f"(checkpoint-7, {reason.strip()}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_link_or_a_file_called_like_a_checkpoint_is_named_and_passed_over(output_dir, earlier_run, capsys, kind):
    shutil.copytree(output_dir / "checkpoint-5", output_dir / "kept")
    if kind == "link":
        (output_dir / "checkpoint-7").symlink_to(output_dir / "kept")
    else:
        (output_dir / "checkpoint-7").write_text("dear flower")
    assert find(output_dir, "latest", "--seed=1") == output_dir / "checkpoint-5"
    assert "skipped: checkpoint-7, it is a link or a file\n" in capsys.readouterr().out


def test_a_checkpoint_without_fp16s_scale_is_not_resumed_in_fp16(output_dir, earlier_run):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    checkpoint = output_dir / "checkpoint-5"
    with pytest.raises(InputError, match="--mixed_precision fp16: .*checkpoint-5 was made without"):
        checkpoints.resume(accelerator, parse(), checkpoint, {"progress": Progress({})})


# Saving


@pytest.fixture
def save(output_dir):
    """Saves a checkpoint of a run with as good as nothing to keep."""
    args = parse(f"--output_dir={output_dir}", "--report_to=none", "--max_train_steps=100")
    accelerator = Accelerator(cpu=True)
    checkpoints.claim_output_dir(accelerator, args)
    progress = Progress({})

    def save(step: int, limit: int | None = None) -> Path:
        args.checkpoints_total_limit, progress.global_step = limit, step
        return checkpoints.save_checkpoint(accelerator, args, {"progress": progress, "ema": None}, step)

    return save


def entries(output_dir: Path) -> set[str]:
    return {path.name for path in output_dir.iterdir()} - {"args.yaml", ".lock"}


def test_the_limit_never_takes_what_is_not_a_checkpoint_of_ours(save, output_dir):
    """Somebody's own copies, links and files stay, and end no run; what is torn counts for nothing."""
    save(1)
    theirs = [
        "checkpoint-keep-1",
        "checkpoint-before-lr-change-2024",
        "checkpoint-²",
        "checkpoint-001",
        "checkpoint-1.bak",
    ]
    for name in theirs:
        shutil.copytree(output_dir / "checkpoint-1", output_dir / name)
    (output_dir / "checkpoint-0").symlink_to(output_dir / "checkpoint-keep-1")
    (output_dir / "checkpoint-90").write_text("a file")
    shutil.copytree(output_dir / "checkpoint-1", output_dir / "checkpoint-2")  # by its manifest of step 1
    save(3)
    (output_dir / "checkpoint-3" / "args.yaml").unlink()
    theirs += ["checkpoint-0", "checkpoint-90", "checkpoint-2", "checkpoint-3"]
    for step in range(4, 8):
        save(step, limit=2)
    assert entries(output_dir) == {*theirs, "checkpoint-6", "checkpoint-7"}
    assert (output_dir / "checkpoint-keep-1" / "manifest.json").is_file()
    save(8, limit=1)
    assert entries(output_dir) == {*theirs, "checkpoint-8"}


def test_a_damaged_newer_one_is_not_what_remains(save, output_dir):
    """The run went on from an older one, since the newest isn't whole, though all its sizes are right."""
    for step in (2, 9):
        save(step)
    flip_a_bit(output_dir / "checkpoint-9" / "progress.safetensors")
    save(4, limit=1)
    assert entries(output_dir) == {"checkpoint-4", "checkpoint-9"}
    save(9, limit=1)
    assert entries(output_dir) == {"checkpoint-9", "checkpoint-9-aside-1"}
    assert why_invalid(output_dir / "checkpoint-9", 9) is None


@pytest.mark.parametrize("kind", ["file", "link", "folder", "broken link"])
@pytest.mark.parametrize("name", ["checkpoint-6", "unfinished-6"])
def test_what_is_called_like_the_checkpoint_to_come_is_set_aside(save, output_dir, capsys, kind, name):
    there = output_dir / name
    (output_dir / "mine").mkdir()
    (output_dir / "mine" / "letters.txt").write_text("dear flower")
    if kind == "file":
        there.write_text("dear flower")
    elif kind == "folder":
        (output_dir / "mine").rename(there)
    else:
        there.symlink_to(output_dir / ("mine" if kind == "link" else "nowhere"))
    save(6)
    assert why_invalid(output_dir / "checkpoint-6", 6) is None and not (output_dir / "checkpoint-6").is_symlink()
    if (kind, name) == ("folder", "unfinished-6"):  # a killed run's own
        return
    assert os.path.lexists(output_dir / f"{name}-aside-1")
    assert f"{there} existed already: it is now called {name}-aside-1" in capsys.readouterr().out
    if kind != "broken link":
        assert any(path.is_file() and path.read_bytes() == b"dear flower" for path in output_dir.rglob("*"))


def test_a_checkpoint_that_cannot_be_removed_ends_no_run(save, output_dir, monkeypatch, capsys):
    save(1)
    monkeypatch.setattr(shutil, "rmtree", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    save(2, limit=1)
    assert "checkpoint-1 is beyond --checkpoints_total_limit but can't be removed: " in capsys.readouterr().out
    assert why_invalid(output_dir / "checkpoint-2", 2) is None


def test_nothing_old_goes_before_the_new_one_is_on_the_disk(save, output_dir, monkeypatch):
    """Each file, the list of them, their folder, its name: all asked of the disk, then the oldest is renamed."""
    save(1)
    calls = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree
    where = lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: [calls.append(where(handle)), fsync(handle)])
    monkeypatch.setattr(
        Path, "rename", lambda one, other: [calls.append(f"{one.name} -> {other.name}"), rename(one, other)][1]
    )
    monkeypatch.setattr(shutil, "rmtree", lambda path, **more: [calls.append(f"rm {path.name}"), rmtree(path, **more)])
    save(2, limit=1)
    *files, manifest, folder, new, parent, old, removed = calls
    assert set(files) == {"args.yaml", "progress.safetensors", "random_states.safetensors"}
    assert [manifest, folder, new] == ["manifest.json", "unfinished-2", "unfinished-2 -> checkpoint-2"]
    assert [parent, old, removed] == [output_dir.name, "checkpoint-1 -> unfinished-1", "rm unfinished-1"]


@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_keeps_what_is_there_and_says_how_to_go_on(save, output_dir, monkeypatch, earlier):
    if earlier:
        save(1)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, name in ((checkpoints, "save_state"), (checkpoints, "write_manifest"), (os, "fsync")):
        with (
            monkeypatch.context() as patched,
            pytest.raises(InputError) as caught,
            checkpoints.refusals_say_how_to_go_on(parse(f"--output_dir={output_dir}")),
        ):
            patched.setattr(module, name, full)
            save(2, limit=1)
        then = "begin again with --overwrite_output_dir: there is no checkpoint yet"
        if earlier:
            then = "go on with --resume_from_checkpoint latest: checkpoint-1 is safe"
        assert str(caught.value) == (
            f"{output_dir / 'checkpoint-2'} can't be written: no space is left on the device; make room, then {then}"
        )
        assert entries(output_dir) == ({"checkpoint-1"} if earlier else set())


def test_fp16s_scale_and_the_generators_go_on(output_dir):
    """Python's, NumPy's and torch's: as they stood at the save."""
    args = parse(f"--output_dir={output_dir}", "--report_to=none", "--max_train_steps=9")
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    checkpoints.claim_output_dir(accelerator, args)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    kept = {"ema": EMAModel([parameter]), "lr_scheduler": lr_scheduler, "progress": Progress({})}
    kept["progress"].global_step = 1
    checkpoint = checkpoints.save_checkpoint(accelerator, args, kept, 1)

    def draw() -> list[float]:
        return [random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn(), torch.rand(1).item()]

    drawn = draw()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    checkpoints.resume(accelerator, args, checkpoint, kept)
    assert draw() == drawn != draw()
    assert accelerator.scaler.get_scale() == 512.0


# States


def test_a_state_comes_back_as_it_was(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors = [images, torch.rand(3, 4).T, torch.tensor(2.5), torch.rand(0, 3), torch.arange(3, dtype=torch.uint8),
               torch.rand(4).bfloat16(), torch.rand(5, 1, 1, 1).to(memory_format=torch.channels_last)]  # fmt: skip
    state = {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "rates": (0.9, [1e-30, float("inf")], None), "on": True,
             "text": "ß\n\x00", "tensors": tensors}  # fmt: skip
    save_state(state, tmp_path / "state.safetensors")
    loaded = load_state(tmp_path / "state.safetensors")
    again = loaded.pop("tensors")
    assert loaded == {key: value for key, value in state.items() if key != "tensors"}
    assert type(loaded["on"]) is bool and loaded["state"].keys() == {0, 1}
    for tensor, other in zip(tensors, again, strict=True):
        assert torch.equal(tensor, other) and tensor.dtype == other.dtype and tensor.stride() == other.stride()


def test_a_state_keeps_only_what_cannot_run(tmp_path):
    with pytest.raises(TypeError, match="a checkpoint can't keep a/0, a PosixPath"):
        save_state({"a": [tmp_path]}, tmp_path / "state.safetensors")


def test_a_forged_state_takes_no_memory_by_naming_a_tensor_again(tmp_path):
    plain = json.dumps([{"tensor": "a", "stride": [1]}] * 2)
    save_file({"a": torch.rand(2)}, tmp_path / "state.safetensors", metadata={"state": plain})
    with pytest.raises(KeyError):
        load_state(tmp_path / "state.safetensors")


@pytest.mark.parametrize("stride", [[10**12, 1], [0, 1], [-1, 1], [1]])
def test_a_forged_state_takes_no_memory(tmp_path, stride):
    plain = json.dumps({"tensor": "a", "stride": stride})
    save_file({"a": torch.rand(2, 3)}, tmp_path / "state.safetensors", metadata={"state": plain})
    with pytest.raises((ValueError, RuntimeError)):
        load_state(tmp_path / "state.safetensors")


# Progress


def test_progress_is_what_a_checkpoint_keeps():
    progress, resumed = Progress({"data": "abc"}), Progress({"data": "abc"})
    progress.global_step, progress.seconds, progress.best_score = 7, 1.5, 0.25
    resumed.load_state_dict(progress.state_dict())
    assert vars(resumed) == {"identity": {"data": "abc"}, "global_step": 7, "seconds": 1.5, "best_score": 0.25}


def test_progress_of_another_run_is_refused():
    with pytest.raises(InputError, match="its data was abc, this run's is xyz"):
        Progress({"data": "xyz"}).load_state_dict(Progress({"data": "abc"}).state_dict())
