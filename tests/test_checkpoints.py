"""The output folder, checkpoints by name, and the progress that they keep; nothing is trained."""

import argparse
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator

from flower_ldm import checkpoints, recipes, runs
from flower_ldm.checkpoints import Progress
from flower_ldm.errors import InputError


def parse(*words: str) -> argparse.Namespace:
    """As a script does that has one flag of its own."""
    parser = recipes.common_parser("a script")
    parser.set_defaults(output_dir="results/autoencoder")
    parser.add_argument("--pixel_weight", type=float, default=1.0)
    return recipes.parse_arguments(parser, "autoencoder", list(words))


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


@pytest.fixture
def earlier_run(output_dir) -> dict[str, bytes]:
    """A run with a checkpoint, and what it has on disk."""
    claim(output_dir, "--seed=1")
    (output_dir / "checkpoint-5").mkdir()
    (output_dir / "checkpoint-5" / "model.safetensors").write_bytes(b"weights")
    (output_dir / "checkpoint-5" / "args.yaml").write_bytes((output_dir / "args.yaml").read_bytes())
    return on_disk(output_dir)


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
    assert on_disk(output_dir).keys() == {"args.yaml"}
    assert yaml.safe_load((output_dir / "args.yaml").read_text())["seed"] == 2


FOREIGN_ARGS = {
    "empty": "",
    "Ultralytics": "task: detect\nmode: train\nepochs: 100\nbatch: 16\nimgsz: 640\nsave_dir: runs/detect/train\n",
    "no mapping": "- 1\n",
    "no YAML": "a: [",
    "no text": "\x00\x01",
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
    with pytest.raises(InputError, match="no run of ours"):
        claim(output_dir, "--overwrite_output_dir")
    assert on_disk(output_dir) == before


@pytest.mark.parametrize(
    "name",
    [
        "letters.txt", "flower-ldm/args.yaml", "flowers-102/jpg/image_00001.jpg", ".git/config", "train.log",
        "checkpoint-5/notes.txt", "checkpoint-5-before-lr-change/model.safetensors", "samples/mine.png",
        "logs/slurm.out", "checkpoint-²/model.safetensors", "diffusion_loss.png/notes.png",
    ],
)  # fmt: skip
def test_what_somebody_else_put_into_a_run_stops_its_replacement(output_dir, earlier_run, name):
    (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
    (output_dir / name).write_text("dear flower")
    with pytest.raises(InputError, match="holds what no run of ours has written: '.*; move that") as caught:
        claim(output_dir, "--overwrite_output_dir")
    assert re.search("written: '([^']*)'", str(caught.value))[1] in (name, str(Path(name).parent), name.split("/")[0])
    assert on_disk(output_dir) == earlier_run | {name: b"dear flower"}


def test_what_is_not_ours_is_named_in_one_line(output_dir, earlier_run):
    for number in range(5):
        (output_dir / f"note\n{number}").touch()
    with pytest.raises(InputError, match="'note\\\\n0', 'note\\\\n1', 'note\\\\n2' and 2 more; move") as caught:
        claim(output_dir, "--overwrite_output_dir")
    assert "\n" not in str(caught.value)


def test_a_card_of_somebodys_own_is_not_ours(output_dir, earlier_run):
    (output_dir / "README.md").write_text("My flowers")
    with pytest.raises(InputError, match="no run of ours has written: 'README.md'"):
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
    assert on_disk(output_dir).keys() == {"args.yaml"} and not (output_dir / "latent_cache").exists()
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
    assert on_disk(output_dir).keys() == {"args.yaml"}


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
    with pytest.raises(InputError, match=f"nothing may be written to {output_dir.parent}; name another"):
        checkpoints.check_output_dir(parse(f"--output_dir={output_dir}"))


@pytest.mark.parametrize("words", [[], ["--overwrite_output_dir"]])
@pytest.mark.parametrize("checkpoint", ["latest", "by path"])
def test_a_resumed_run_keeps_what_is_there(output_dir, earlier_run, checkpoint, words):
    checkpoint = checkpoint if checkpoint == "latest" else output_dir / "checkpoint-5"
    (output_dir / "unfinished-7").mkdir()
    (output_dir / "unfinished-7" / "model.safetensors").write_bytes(b"half")
    claim(output_dir, f"--resume_from_checkpoint={checkpoint}", "--seed=1", *words)
    kept = on_disk(output_dir)
    assert kept.keys() == earlier_run.keys(), "a killed run's unfinished checkpoint goes, all else stays"
    assert kept["checkpoint-5/model.safetensors"] == b"weights"


def test_resuming_elsewhere_does_not_open_a_folder_with_a_run(output_dir, earlier_run, tmp_path):
    with pytest.raises(InputError, match="is not empty"):
        claim(output_dir, f"--resume_from_checkpoint={tmp_path / 'other' / 'checkpoint-5'}")
    assert on_disk(output_dir) == earlier_run


# Checkpoints


def test_checkpoints_are_in_the_order_of_their_steps(output_dir):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-100", "checkpoint-best", "unfinished-200", "best"):
        (output_dir / name).mkdir(parents=True)
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
    "flag",
    ["seed=2", "resolution=32", "lr_warmup_steps=1", "classes=1", "images_per_class=7"],
)
def test_a_checkpoint_of_another_trajectory_is_refused(output_dir, earlier_run, flag):
    with pytest.raises(InputError, match=f"--{flag.partition('=')[0]} is .* made with") as caught:
        find(output_dir, "latest", "--seed=1", f"--{flag}")
    assert "checkpoint-5" in str(caught.value)


def test_an_older_checkpoint_is_no_place_to_go_on_in_the_same_folder(output_dir, earlier_run, tmp_path):
    shutil.copytree(output_dir / "checkpoint-5", output_dir / "checkpoint-7")
    with pytest.raises(InputError, match="holds checkpoint-7, which is newer.*--output_dir"):
        find(output_dir, output_dir / "checkpoint-5", "--seed=1")
    assert find(tmp_path / "branch", output_dir / "checkpoint-5", "--seed=1") == output_dir / "checkpoint-5"


def test_a_checkpoint_without_fp16s_scale_is_not_resumed_in_fp16(output_dir, earlier_run):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    checkpoint = output_dir / "checkpoint-5"
    with pytest.raises(InputError, match="--mixed_precision fp16: .*checkpoint-5 was made without"):
        checkpoints.resume(accelerator, parse(), checkpoint, checkpoints.Progress({}), None, None)


# Progress


def test_progress_is_what_a_checkpoint_keeps():
    progress, resumed = Progress({"data": "abc"}), Progress({"data": "abc"})
    progress.global_step, progress.seconds, progress.best_score = 7, 1.5, 0.25
    resumed.load_state_dict(progress.state_dict())
    assert vars(resumed) == {"identity": {"data": "abc"}, "global_step": 7, "seconds": 1.5, "best_score": 0.25}


def test_progress_of_another_run_is_refused():
    with pytest.raises(InputError, match="its data was abc, this run's is xyz"):
        Progress({"data": "xyz"}).load_state_dict(Progress({"data": "abc"}).state_dict())
