"""What a run's folder holds, by the one table of it: against what the scripts and the evaluation really write."""

import shutil
from pathlib import Path

import pytest

import train_autoencoder
import train_latent_diffusion
from flower_ldm import hub, recipes, runs


@pytest.mark.parametrize("stage", ["autoencoder", "flower_ldm"])
def test_a_finished_run_is_one_and_holds_nothing_else(finished_runs, stage):
    folder: Path = getattr(finished_runs, stage)
    ours, foreign = runs.contents(folder)
    assert runs.is_run(folder) and foreign == []
    assert set(ours) == set(folder.rglob("*"))
    assert all(ours.index(path) < ours.index(path.parent) for path in ours if path.parent != folder)


def test_every_run_is_known_by_its_flags():
    for script in (train_autoencoder, train_latent_diffusion):
        assert vars(script.parse_args([])).keys() >= recipes.marks_of_a_run()


def test_what_goes_to_the_hub_is_part_of_a_run():
    for pattern in (*hub.AUTOENCODER_FILES, *hub.PIPELINE_FILES):
        name = pattern.replace("step-*", "*").replace("*.png", "step-1.png") if "samples" in pattern else pattern
        assert runs.fits(name.replace("*", "x"), runs.RUN_FILES), pattern


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


def test_the_evaluation_is_part_of_a_run(finished_runs, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("evaluation_cache/synthetic-val.safetensors", "evaluation_cache/samples-0a/000-007.safetensors",
                 "nearest_neighbours.png", "evaluation_sweep.png"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert runs.contents(folder)[1] == []
