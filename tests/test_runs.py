"""What a run's folder holds, by the one table of it: against what the scripts and the evaluation really write."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import train_autoencoder
import train_latent_diffusion
from flower_ldm import __version__, recipes, runs
from flower_ldm.errors import InputError


@pytest.mark.parametrize("stage", ["autoencoder", "flower_ldm", "evaluated"])
def test_a_finished_run_is_one_and_holds_nothing_else(request, finished_runs, stage):
    """Each file is in the table, and each row of the table that this stage writes is a file."""
    evaluated = stage == "evaluated"
    folder: Path = request.getfixturevalue("evaluated_run") if evaluated else getattr(finished_runs, stage)
    for artifact in runs.PICTURES:
        is_written = artifact.stage in (None, "autoencoder" if stage == "autoencoder" else "latent_diffusion")
        is_written &= evaluated or artifact not in (runs.NEAREST_NEIGHBORS, runs.EVALUATION_SWEEP)
        if artifact is not runs.FILM:  # where ffmpeg is installed
            assert bool(artifact.found(folder)) == is_written, artifact
    ours, foreign = runs.contents(folder)
    assert runs.is_run(folder) and foreign == []
    assert set(ours) == set(folder.rglob("*"))
    assert all(ours.index(path) < ours.index(path.parent) for path in ours if path.parent != folder)


def test_every_run_is_known_by_its_flags():
    for script in (train_autoencoder, train_latent_diffusion):
        assert vars(script.parse_args([])).keys() >= recipes.marks_of_a_run()


def test_what_a_killed_run_leaves_is_known_and_removed(finished_runs, tmp_path):
    folder = shutil.copytree(finished_runs.autoencoder, tmp_path / "run")
    kept = set(folder.rglob("*"))
    left = ["metrics.json.123.tmp", "samples/step-00000004.png.9.tmp", "unfinished-8/model.safetensors",
            "unfinished-8/.tmpk5lnhD", "best/.tmpA0z9bC",
            "unfinished-best/config.json", "unfinished-export/vae/diffusion_pytorch_model.safetensors"]  # fmt: skip
    for name in left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("half")
    somebodys = folder / "unfinished-9" / "symphony.txt"
    somebodys.parent.mkdir()
    somebodys.write_text("b minor")
    assert runs.contents(folder)[1] == ["unfinished-9/symphony.txt"]
    runs.remove(folder, unfinished_only=True)
    assert set(folder.rglob("*")) == kept | {somebodys, somebodys.parent, folder / "samples"}


def test_an_artifact_knows_its_path_and_what_is_found_there(tmp_path):
    written = [runs.SAMPLE_GRIDS.path(tmp_path, which) for which in (20, "x")]
    written.append(runs.DENOISING_PATH.path(tmp_path, "a_b"))
    names = [path.relative_to(tmp_path).as_posix() for path in written]
    assert names == ["samples/step-00000020.png", "samples/step-x.png", "denoising_path_a_b.png"]
    (tmp_path / "samples").mkdir()
    for path in written:
        path.touch()
    assert runs.SAMPLE_GRIDS.found(tmp_path) == [("00000020", written[0]), ("x", written[1])]
    assert runs.DENOISING_PATH.found(tmp_path) == [("a_b", written[2])]
    assert runs.DENOISING_PATH.texts("a*b")[1] == "a*b: the path of one sample"


# metrics.json


@pytest.mark.parametrize("stage", ["autoencoder", "flower_ldm"])
def test_both_stages_say_what_computed_them(finished_runs, stage):
    metrics = json.loads((getattr(finished_runs, stage) / "metrics.json").read_text())
    gpu = re.escape(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    assert re.fullmatch(gpu or r"\S.* \((1 thread|\d+ threads)\)", metrics["device"])
    assert metrics["versions"] == runs.versions()
    assert {"flower_ldm": __version__, "torch": torch.__version__}.items() <= metrics["versions"].items()
    assert metrics["versions"].keys() == {"flower_ldm", "python", "torch", "diffusers", "accelerate"}
    assert (metrics["mixed_precision"], metrics["num_processes"]) == ("no", 1)


def test_what_is_written_is_declared_and_what_is_declared_is_written(finished_runs, evaluated_run):
    first = json.loads((finished_runs.autoencoder / "metrics.json").read_text())
    second = json.loads((evaluated_run / "metrics.json").read_text())
    assert first.keys() | second.keys() == runs.METRICS_KEYS.keys()
    assert second["evaluation"].keys() == runs.EVALUATION_KEYS.keys()
    assert second["evaluation"]["versions"].items() > second["versions"].items()


@pytest.mark.parametrize("metrics", [{"step": 1, "sharpness": 2.0}, {"step": 1, "evaluation": {"sharpness": 2.0}}])
def test_a_key_that_nobody_declared_is_not_written(tmp_path, metrics):
    with pytest.raises(KeyError, match="declare these keys of metrics.json in runs.py: sharpness"):
        runs.write_metrics(tmp_path / "metrics.json", metrics)
    assert list(tmp_path.iterdir()) == []
    runs.write_metrics(tmp_path / "metrics.json", {"step": 1}, others={"step": 0, "sharpness": 2.0})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"step": 1, "sharpness": 2.0}


# args.yaml


def test_flags_are_read_in_one_way_and_refused_in_two(finished_runs, tmp_path):
    flags = yaml.safe_load((finished_runs.autoencoder / "args.yaml").read_text())
    assert runs.read_flags(finished_runs.autoencoder) == runs.read_args(finished_runs.autoencoder) == flags
    assert runs.read_flags(tmp_path) == {} and runs.read_args(tmp_path) is None
    for wrong in ({"resolution": "64 pixels"}, {"classes": [["rose"]]}, {"a flag": 1}):
        (tmp_path / "args.yaml").write_text(yaml.safe_dump(flags | wrong))
        with pytest.raises(InputError, match=next(iter(wrong))):
            runs.read_flags(tmp_path)
        assert runs.read_args(tmp_path) is None and not runs.is_run(tmp_path)
    (tmp_path / "args.yaml").unlink()
    (tmp_path / "args.yaml").symlink_to(finished_runs.autoencoder / "args.yaml")
    assert runs.read_flags(tmp_path) == flags and runs.read_args(tmp_path) is None
