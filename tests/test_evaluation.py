"""The evaluation command: what is measured and where it is shown, sampling that goes on, memorization, bad input."""

import json
import os
import re
import runpy
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from flower_ldm import FlowerLDMPipeline, evaluation, metrics, model_card, report, report_curves
from flower_ldm.data import DataOptions, uint8_images
from flower_ldm.errors import InputError
from flower_ldm.evaluation import (
    hold_back,
    main,
    parse_args,
    reconstruct,
    sampling_options,
    save_sweep,
    sweep_options,
    write_metrics,
)
from flower_ldm.features import extract_features, load_feature_network, load_or_extract_features
from flower_ldm.memorization import TrainingNeighbors
from flower_ldm.metrics import Comparison, Metric, class_accuracy, measure_set, memorization_rates, train_classifier
from flower_ldm.sampling import Sampler, pipeline_digest, sample_labels

OPTIONS = {"guidance_scale": 2.0, "guidance_interval": [0.0, 1.0], "num_inference_steps": 2}
ENTRIES = ["n", "n_reference", "frechet_distance", "kid", "kid_std", "precision", "recall", "density", "coverage",
           "class_accuracy", "mifid"]  # fmt: skip


class Pooled(torch.nn.Module):
    """A feature network of 12 numbers: the mean color of each quarter of the image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks as tiny as these wait for each other's threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("network") / "pooled.pt"
    torch.jit.script(Pooled()).save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def stock() -> FlowerLDMPipeline:
    """A pipeline of diffusers' own parts: 3 classes, 16 px."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    unet = UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
        num_class_embeds=4,
    )  # fmt: skip
    return FlowerLDMPipeline(vae.eval(), unet.eval(), DDIMScheduler(clip_sample=False))


def random_images(n: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def test_images_held_back_are_as_many_as_samples_but_never_more_than_half_a_class():
    labels = torch.tensor([0] * 10 + [1] * 3 + [2] * 1 + [3] * 8)
    held_back, rest = hold_back(labels, torch.tensor([2, 2, 2, 100]))
    assert torch.bincount(labels[held_back], minlength=4).tolist() == [2, 1, 0, 4]
    assert torch.bincount(labels[rest]).tolist() == [8, 2, 1, 4]
    assert sorted(torch.cat([held_back, rest]).tolist()) == list(range(22))
    assert torch.equal(hold_back(labels, torch.tensor([2, 2, 2, 100]))[0], held_back)


# Samples


def test_labels_take_turns():
    assert sample_labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.bincount(sample_labels(1020, 102)).tolist() == [10] * 102


def test_an_image_depends_neither_on_the_batch_size_nor_on_how_many_are_drawn(stock, tmp_path):
    one, _ = Sampler(stock, tmp_path / "a", seed=3, batch_size=1).draw(5, **OPTIONS)
    together, _ = Sampler(stock, tmp_path / "b", seed=3, batch_size=64).draw(9, **OPTIONS)
    assert one.shape == (5, 16, 16, 3) and one.dtype == np.uint8
    assert abs(one.astype(int) - together[:5]).max() <= 1  # rounding
    for number in (0, 4):
        generator = torch.Generator("cpu").manual_seed(3 + number)
        alone = stock([number % 3], generator=[generator], output_type="np", **OPTIONS).images[0]
        assert abs((alone * 255).round() - one[number]).max() <= 1
    other, _ = Sampler(stock, tmp_path / "a", seed=4).draw(5, **OPTIONS)
    assert abs(other.astype(int) - one).max() > 1


def test_kept_images_are_used_and_only_the_missing_are_drawn(stock, tmp_path, capsys):
    first, seconds = Sampler(stock, tmp_path, batch_size=4).draw(8, **OPTIONS)
    [folder] = tmp_path.iterdir()
    files = sorted(folder.iterdir())
    assert len(files) == 2 and seconds > 0
    times = [file.stat().st_mtime_ns for file in files]
    again, same_seconds = Sampler(stock, tmp_path, batch_size=3).draw(8, **OPTIONS)
    assert np.array_equal(again, first) and same_seconds == pytest.approx(seconds)
    fewer, less = Sampler(stock, tmp_path).draw(4, **OPTIONS)
    assert np.array_equal(fewer, first[:4]) and 0 < less < seconds
    more, _ = Sampler(stock, tmp_path).draw(10, **OPTIONS)
    assert np.array_equal(more[:8], first)
    assert [file.stat().st_mtime_ns for file in files] == times and len(list(folder.iterdir())) == 3
    Sampler(stock, tmp_path).draw(4, **OPTIONS | {"guidance_scale": 1.0})
    assert len(list(tmp_path.iterdir())) == 2

    files[0].write_bytes(files[0].read_bytes()[:-50])
    capsys.readouterr()
    repaired, _ = Sampler(stock, tmp_path).draw(8, **OPTIONS)
    assert "drawing them again" in capsys.readouterr().out
    assert abs(repaired.astype(int) - first).max() <= 1


def test_other_weights_are_another_folder(stock, tmp_path):
    Sampler(stock, tmp_path).draw(2, **OPTIONS)
    parameter = next(stock.unet.parameters())
    with torch.no_grad():
        parameter += 1
        Sampler(stock, tmp_path).draw(2, **OPTIONS)
        parameter -= 1
    assert len(list(tmp_path.iterdir())) == 2


def test_interrupted_sampling_goes_on(stock, tmp_path, capsys):
    whole, _ = Sampler(stock, tmp_path / "whole", batch_size=1).draw(12, **OPTIONS)

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("parts/*/*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    with pytest.raises(SystemExit) as end:
        Sampler(stock, tmp_path / "parts", batch_size=1).draw(12, **OPTIONS)
    assert end.value.code == 130
    files = list(tmp_path.glob("parts/*/*"))
    kept = sum(len(load_file(file)["numbers"]) for file in files)
    assert 0 < kept < 12 and {file.suffix for file in files} == {".safetensors"}
    assert f"stopped: {kept} of 12 images are kept in" in capsys.readouterr().err
    resumed, _ = Sampler(stock, tmp_path / "parts", batch_size=1).draw(12, **OPTIONS)
    assert f"{kept}/12" in capsys.readouterr().err  # the bar starts where it was stopped
    assert np.array_equal(resumed, whole)


def test_samples_of_another_guide_are_drawn_anew(stock):
    plain = pipeline_digest(stock)
    parts = {name: part for name, part in stock.components.items() if name != "guide"}
    guided = FlowerLDMPipeline(**parts, guide=stock.unet)
    assert pipeline_digest(guided) != plain == pipeline_digest(stock)


def test_reconstructions_of_stock_parts(stock):
    images, _ = DataOptions("synthetic", resolution=16, images_per_class=4, classes=[0, 1, 2]).load(
        show_progress=False
    )
    pictures, means = reconstruct(stock.vae, images, [3, 0, 7, 5, 11], batch_size=2)
    assert pictures.shape == (5, 16, 16, 3) and set(means) == {"psnr", "ssim"}
    originals = uint8_images(images, [3, 0, 7, 5, 11]).astype(float)
    errors = ((originals - pictures) ** 2).mean(axis=(1, 2, 3))
    assert means["psnr"] == pytest.approx((10 * np.log10(255**2 / errors)).mean(), abs=0.05)


# The command


def run(finished_runs, pooled: str, output: Path, *flags: str) -> None:
    main([
        "--pipeline", str(finished_runs.flower_ldm), "--features", pooled, "--output", str(output), "--num_samples",
        "24", "--steps", "2", "--device", "cpu", *flags,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(finished_runs, pooled, random_vgg, tmp_path_factory) -> tuple[Path, dict]:
    """One evaluation with all that it can do, of the tiny run, beside the metrics that the run wrote."""
    folder = tmp_path_factory.mktemp("evaluated")
    for name in ("metrics.json", "args.yaml"):
        shutil.copy(finished_runs.flower_ldm / name, folder)
    sweep = ["--sweep_guidance", "1", "3", "--sweep_steps", "1", "2", "--sweep_samples", "12"]
    run(finished_runs, pooled, folder / "metrics.json", "--vgg_weights", str(random_vgg), *sweep)
    return folder, json.loads((folder / "metrics.json").read_text())["evaluation"]


def test_the_evaluation_stands_beside_the_runs_other_metrics(evaluated, finished_runs):
    folder, evaluation = evaluated
    before = json.loads((finished_runs.flower_ldm / "metrics.json").read_text())
    after = json.loads((folder / "metrics.json").read_text())
    assert after == before | {"evaluation": evaluation} and "evaluation" not in before
    assert {path.name for path in folder.iterdir()} == {
        "metrics.json", "args.yaml", "nearest_neighbours.png", "evaluation_sweep.png", "evaluation_cache",
        "report.html", "README.md",
    }  # fmt: skip
    page = (folder / "report.html").read_text()
    assert f"{evaluation['against_held_out']['samples']['class_accuracy']:.1%}" in page


def test_what_was_measured_is_written_down(evaluated, finished_runs):
    _, evaluation = evaluated
    assert list(evaluation) == [
        "pipeline", "dataset", "splits", "resolution", "num_classes", "features", "classifier", "sampling",
        "reconstruction", "against_held_out", "memorisation", "sweep", "remarks", "versions", "seconds", "command",
    ]  # fmt: skip
    assert evaluation["dataset"] == "synthetic"  # which, with which classes, its args.yaml says
    assert evaluation["splits"] == {"train": ["train"], "held_out": ["val"]}
    assert (evaluation["resolution"], evaluation["num_classes"]) == (32, 4)
    features = evaluation["features"]
    assert (features["name"], features["num_features"], features["input_size"]) == ("pooled.pt", 12, None)
    sampling = evaluation["sampling"]
    assert sampling["scheduler"] == "DPMSolverMultistepScheduler" and sampling["num_samples"] == 24
    assert sampling["images_per_second"] == pytest.approx(24 / sampling["seconds"])
    assert (sampling["device"], sampling["dtype"]) == ("cpu", "float32")
    assert evaluation["command"].startswith("python -m flower_ldm.evaluation --pipeline")
    assert {"torch", "diffusers", "flower_ldm"} <= evaluation["versions"].keys()


def test_every_set_is_measured_against_the_same_images(evaluated):
    _, evaluation = evaluated
    sets = evaluation["against_held_out"]
    assert list(sets) == ["real", "reconstructions", "samples"]
    for entry in sets.values():
        assert list(entry) == ENTRIES
        assert (entry["n"], entry["n_reference"]) == (24, 32)  # half of 48 training images, 8 held out of 4 classes
        assert entry["frechet_distance"] <= entry["mifid"]
    assert sets["real"]["mifid"] < 1e6 * sets["real"]["frechet_distance"]  # they are no copies of themselves
    assert sets["real"]["frechet_distance"] < sets["reconstructions"]["frechet_distance"]
    assert sets["real"]["frechet_distance"] < sets["samples"]["frechet_distance"]
    assert not any("not above" in remark for remark in evaluation["remarks"])  # 24 images, 12 features
    held_out = evaluation["reconstruction"]
    assert (held_out["n"], held_out["split"]) == (32, "val")
    assert held_out["perceptual_distance"]["name"].startswith("VGG16") and held_out["perceptual_distance"]["value"] > 0
    assert 0 <= held_out["head_accuracy"] <= 1
    for entry, n in (("samples", 24), ("held_out", 32)):
        assert list(evaluation["memorisation"][entry]) == ["n", "feature_rate", "pixel_rate", "exact_duplicates"]
        assert evaluation["memorisation"][entry]["n"] == n


def test_reconstruction_agrees_with_stage_ones_own_validation(evaluated, finished_runs):
    """The same weights on the same held-out images: two programs, one number."""
    ours = evaluated[1]["reconstruction"]
    theirs = json.loads((finished_runs.autoencoder / "metrics.json").read_text())
    assert ours["psnr"] == pytest.approx(theirs["psnr"], rel=1e-3)
    assert ours["ssim"] == pytest.approx(theirs["ssim"], rel=1e-3, abs=1e-4)
    assert ours["head_accuracy"] == pytest.approx(theirs["val_accuracy"])
    assert ours["perceptual_distance"]["value"] == pytest.approx(theirs["val_perceptual_loss"], rel=1e-3)


def test_sweep_has_every_point(evaluated):
    folder, evaluation = evaluated
    points = [(point["guidance_scale"], point["num_inference_steps"]) for point in evaluation["sweep"]]
    assert points == [(1, 1), (3, 1), (1, 2), (3, 2)]
    for point in evaluation["sweep"]:
        assert list(point) == ["guidance_scale", "num_inference_steps", "n", "frechet_distance", "kid", "kid_std",
                               "recall", "class_accuracy", "seconds"]  # fmt: skip
        assert point["n"] == 12
    folders = list((folder / "evaluation_cache").glob("samples-*"))
    assert len(folders) == 4  # the point with the settings of the main samples took those


def test_a_new_row_appears_everywhere(evaluated, finished_runs, pooled, tmp_path, monkeypatch, capsys, figures):
    """A metric is one row: nothing else has to be told of it."""
    row = Metric(
        key="petals", title="Petals per image", short="petals", better="higher", decimals=3, note="More is prettier.",
        measure=lambda compared: (len(compared.features) + 0.125, 0.5), has_spread=True, is_swept=True,
        caution="petals are hard to count", headline="Petals at {n}", hub_type="petal_count",
    )  # fmt: skip
    rows = (row, *metrics.METRICS)
    for module in (metrics, evaluation, report, report_curves, model_card):
        monkeypatch.setattr(module, "METRICS", rows)
    for name in ("metrics.json", "args.yaml"):
        shutil.copy(evaluated[0] / name, tmp_path)
    cache = (
        "--cache_dir",
        str(evaluated[0] / "evaluation_cache"),
        "--num_samples",
        "12",
        "--sweep_guidance",
        "1",
        "3",
    )
    run(finished_runs, pooled, tmp_path / "metrics.json", *cache)

    entry = json.loads((tmp_path / "metrics.json").read_text())["evaluation"]
    for one in (*entry["against_held_out"].values(), *entry["sweep"]):
        assert (one["petals"], one["petals_std"]) == (12.125, 0.5)
    assert entry["remarks"][0] == "n = 12 is not above the 12 features: petals are hard to count"
    out = capsys.readouterr().out
    assert re.search(r"^ +n +petals +Frechet", out, re.MULTILINE)
    assert re.search(r"^samples +12 +12.125 ± 0.500\*", out, re.MULTILINE)
    assert re.search(r"^guidance 3 .*: petals 12.125 ± 0.500, Frechet", out, re.MULTILINE)
    assert "Petals per image" in [axis.get_title() for figure in figures for axis in figure.axes]

    page = (tmp_path / "report.html").read_text()
    assert (
        "<dt>Petals at 12</dt><dd>12.1</dd>" in page and "<dt>Petals per image</dt><dd>More is prettier.</dd>" in page
    )
    assert '<td class="own">12.125<small> ± 0.500</small>' in page and "<b>Petals per image</b>" in page
    assert '<th scope="col">n</th><th scope="col">Petals per image</th>' in page
    card = ModelCard.load(tmp_path / "README.md")
    assert "| Petals per image (higher is better) | 12.125 ± 0.500 | 12.125 ± 0.500 | 12.125 ± 0.500 |" in card.text
    [petals] = [result for result in card.data.eval_results if result.metric_type == "petal_count"]
    assert (petals.metric_name, petals.metric_value, petals.metric_args["std"]) == ("Petals per image", 12.125, 0.5)


def test_second_run_takes_what_is_there(evaluated, finished_runs, pooled, tmp_path, capsys):
    folder, evaluation = evaluated
    cache = ("--cache_dir", str(folder / "evaluation_cache"))
    run(finished_runs, pooled, tmp_path / "new" / "metrics.json", *cache, "--batch_size", "7")
    again = json.loads((tmp_path / "new" / "metrics.json").read_text())["evaluation"]
    captured = capsys.readouterr()
    assert "features of train" not in captured.err and "features of val" not in captured.err
    assert "sampling: 100%" in captured.err
    assert again["sampling"]["seconds"] == pytest.approx(evaluation["sampling"]["seconds"])
    for name, entry in evaluation["against_held_out"].items():
        assert again["against_held_out"][name] == pytest.approx(entry, rel=1e-3, abs=1e-3)
    assert "sweep" not in again and again["reconstruction"]["perceptual_distance"] is None
    for words in ("real training images", "reconstructions", "samples", "Frechet", "KID", "memorized held-out"):
        assert words in captured.out


def test_too_few_images_for_the_features_are_remarked_beside_the_number(finished_runs, pooled, tmp_path, capsys):
    run(finished_runs, pooled, tmp_path / "metrics.json", "--num_samples", "8")
    evaluation = json.loads((tmp_path / "metrics.json").read_text())["evaluation"]
    assert evaluation["remarks"][0].startswith("n = 8 is not above the 12 features")
    table = capsys.readouterr().out.splitlines()
    [samples] = [line for line in table if line.startswith("samples  ")]
    assert f"{evaluation['against_held_out']['samples']['frechet_distance']:.2f}*" in samples
    assert any(line.startswith("* n = 8 is not above") for line in table)


def test_too_few_training_images_to_hold_some_back(finished_runs, pooled, tmp_path):
    with pytest.raises(InputError, match="4 of 8 training images can be held back to compare with.*there must be 6"):
        run(finished_runs, pooled, tmp_path / "metrics.json", "--images_per_class", "2", "--dataset", "synthetic",
            "--classes", "0", "1", "2", "3", "--train_splits", "train", "--val_splits", "val")  # fmt: skip


def test_without_flags_guidance_is_the_pipelines_own(stock, tmp_path):
    """And what was drawn by is noted as numbers."""
    pipe = FlowerLDMPipeline.from_pipe(stock, guidance_scale=4, guidance_interval=(0.1, 0.9))
    flags = ["--pipeline", str(tmp_path), "--dataset", "synthetic", "--steps", "5", "--sweep_steps", "2"]
    args = parse_args(flags)
    own = {"guidance_scale": 4.0, "guidance_interval": [0.1, 0.9], "num_inference_steps": 5}
    assert sampling_options(args, pipe) == own and sweep_options(args, pipe) == [own | {"num_inference_steps": 2}]
    args = parse_args([*flags, "--guidance_scale", "1.5", "--guidance_interval", "0", "1"])
    assert sampling_options(args, pipe) == own | {"guidance_scale": 1.5, "guidance_interval": [0.0, 1.0]}
    unguided = FlowerLDMPipeline.from_pipe(stock, takes_guidance=False)
    assert sampling_options(parse_args(flags), unguided)["guidance_scale"] == 1


def test_the_data_are_those_of_the_run_unless_flags_say_otherwise(tmp_path):
    saved = {"dataset": "imagefolder", "data_dir": "here", "classes": ["a", "b"], "resolution": 32, "seed": 7}
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(saved))
    args = parse_args(["--pipeline", str(tmp_path), "--data_dir", "there"])
    assert args.data == DataOptions("imagefolder", "there", classes=["a", "b"], resolution=32)
    assert (args.seed, args.output) == (0, tmp_path / "metrics.json")
    assert parse_args(["--pipeline", str(tmp_path / "none")]).data == DataOptions("flowers102")


@pytest.mark.parametrize(
    ("text", "message"),
    [("- no\n- mapping", "must hold names and values"), ("a: [", "can't be read"),
     ("resolution: x", "resolution must be a number"), ("classes: rose", "classes must be a list of names"),
     ("skip_bad_images: perhaps", "skip_bad_images must be yes or no")],
)  # fmt: skip
def test_damaged_args_yaml_is_one_line(tmp_path, text, message):
    (tmp_path / "args.yaml").write_text(text)
    with pytest.raises(InputError, match=f"args.yaml:? {message}"):
        parse_args(["--pipeline", str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--features", "resnet"), "--features resnet: choose efficientnet-lite0"),
        (("--num_samples", "5"), "--num_samples must be at least 6"),
        (("--sweep_samples", "5"), "--sweep_samples must be at least 6"),
        (("--batch_size", "0"), "--batch_size must be at least 1"),
        (("--seed", "-1"), "--seed must not be negative"),
        (("--max_image_pixels", "0"), "--max_image_pixels must be positive, got 0"),
        (("--resolution", "64"), "--resolution 64: --pipeline .* draws 32 pixels"),
        (("--classes", "0", "1"), "has 4 classes, synthetic has 2: give the --dataset and --classes"),
        (("--classes", "0", "1", "3", "2"), "class 2 is '.*' in --pipeline .*, but '.*' in synthetic"),
        (("--val_splits", "test"), "--val_splits: there is no split 'test'"),
        (("--guidance_scale", "nan"), "guidance_scale must be a finite number"),
        (("--scheduler", "ddim", "--sweep_steps", "2", "1001"), "num_inference_steps must be at most 1000"),
        (("--guidance_interval", "0.8", "0.1"), "guidance_interval must be two fractions"),
        (("--device", "toaster"), "--device toaster can't be used"),
        (("--vgg_weights", "nowhere.pth"), "--vgg_weights nowhere.pth is no file"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_line_and_writes_nothing(finished_runs, pooled, tmp_path, flags, message):
    with pytest.raises(InputError, match=message) as error:
        run(finished_runs, pooled, tmp_path / "metrics.json", *flags)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("samples-*"))


def test_class_without_a_held_out_image_is_one_line(finished_runs, pooled, tmp_path):
    names = FlowerLDMPipeline.from_pretrained(finished_runs.flower_ldm).class_names
    for name in names:
        for split in ("train", "val"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            if split == "train" or name != sorted(names)[1]:
                for i in range(4):
                    Image.fromarray(random_images(1, 40, seed=i)[0]).save(folder / f"{i}.png")
    flags = ("--dataset", "imagefolder", "--data_dir", str(tmp_path / "data"), "--classes", *names)
    with pytest.raises(InputError, match=f"class '{sorted(names)[1]}' has no held-out image in val"):
        run(finished_runs, pooled, tmp_path / "metrics.json", *flags)


def test_output_that_is_no_place_for_metrics(tmp_path):
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "torn.json").write_text('{"step": 1')
    for path, message in (
        (tmp_path, "is a folder: name a file"),
        (tmp_path / "list.json", "holds something else than a run's metrics"),
        (tmp_path / "torn.json", "can't be used"),
        (tmp_path / "list.json" / "metrics.json", "can't be used"),
    ):
        with pytest.raises(InputError, match=message):
            main(["--pipeline", "nowhere", "--output", str(path)])
    assert (tmp_path / "torn.json").read_text() == '{"step": 1'
    write_metrics(tmp_path / "new.json", {"seconds": 1})
    assert json.loads((tmp_path / "new.json").read_text()) == {"evaluation": {"seconds": 1}}


def test_as_a_command_bad_input_is_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluation", "--pipeline", str(tmp_path)])
    monkeypatch.delitem(sys.modules, "flower_ldm.evaluation")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("flower_ldm.evaluation", run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: --pipeline {tmp_path} is not the folder of a pipeline")


def test_sweep_over_steps_alone_and_with_one_class(tmp_path):
    sweep = [
        {"guidance_scale": 2.0, "num_inference_steps": steps, "n": 10, "frechet_distance": 5.0 / steps, "kid": 0.1,
         "kid_std": 0.01, "recall": 0.5, "class_accuracy": None, "seconds": 1.0}
        for steps in (5, 10, 25)
    ]  # fmt: skip
    known = {name: {"n": 10, "frechet_distance": 0.1, "kid": 0.0, "recall": 0.6, "class_accuracy": None}
             for name in ("real", "reconstructions")}  # fmt: skip
    save_sweep(sweep, known, tmp_path / "sweep.png")
    assert np.asarray(Image.open(tmp_path / "sweep.png")).std() > 10


# On the real photographs: the floor is a floor


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """All of Oxford 102 Flowers at 64 px with the features of the default network: 1 to 3 minutes on two cores."""
    if "FLOWERS102_ROOT" not in os.environ:
        pytest.skip("FLOWERS102_ROOT names no folder with flowers-102/")
    torch.set_num_threads(os.cpu_count())
    train, held_out = DataOptions("flowers102", os.environ["FLOWERS102_ROOT"], resolution=64).load(show_progress=False)
    network = load_feature_network("efficientnet-lite0")
    cache = tmp_path_factory.mktemp("features")
    features = [load_or_extract_features(network, images, cache) for images in (train, held_out)]
    return network, train, held_out, *features


@pytest.mark.slow
def test_real_images_beat_noise_by_far_and_know_their_classes(photographs):
    network, train, held_out, train_features, held_out_features = photographs
    held_back, rest = hold_back(train.labels, torch.full((102,), 10))
    classifier = train_classifier(train_features[rest], train.labels[rest])
    noise = extract_features(network, random_images(1020, 64))
    reference = held_out_features, train_features[rest], classifier
    real = measure_set(Comparison(train_features[held_back], train.labels[held_back], *reference))
    bad = measure_set(Comparison(noise, held_out.labels, *reference))
    assert real["n"] == bad["n"] == real["n_reference"] == 1020
    assert bad["frechet_distance"] > 5 * real["frechet_distance"]
    assert abs(real["kid"]) < 2 * real["kid_std"] and bad["kid"] > 50 * real["kid_std"]
    assert real["precision"] > 0.6 and real["recall"] > 0.6 and real["density"] > 0.9 and real["coverage"] > 0.9
    assert bad["precision"] == bad["recall"] == bad["density"] == bad["coverage"] == 0
    assert real["mifid"] == real["frechet_distance"]  # photographs that no training has seen are no copies
    copies = measure_set(Comparison(train_features[rest], train.labels[rest], *reference))
    assert copies["mifid"] > 1000 * copies["frechet_distance"]
    assert real["class_accuracy"] > 0.7 > 0.05 > bad["class_accuracy"]
    held_out_accuracy = class_accuracy(classifier, held_out_features, held_out.labels)
    assert held_out_accuracy == pytest.approx(real["class_accuracy"], abs=0.06)
    shuffled = torch.randperm(1020, generator=torch.Generator().manual_seed(0))
    chance = 1 / 102
    assert class_accuracy(classifier, held_out_features, held_out.labels[shuffled]) < chance + 0.01  # 3 deviations


@pytest.mark.slow
def test_training_photographs_are_memorized_and_held_out_ones_are_not(photographs):
    network, train, held_out, train_features, held_out_features = photographs
    in_a_mirror = [extract_features(network, images, mirrored=True) for images in (train, held_out)]
    neighbors = TrainingNeighbors(train, train_features)
    assert len(neighbors.distinct) < len(train)  # byte-identical pairs
    rates = memorization_rates(neighbors.search(train, train_features, in_a_mirror[0]))
    assert rates["n"] == rates["exact_duplicates"] == 7169
    assert rates["feature_rate"] >= 0.999 and rates["pixel_rate"] >= 0.999
    null = memorization_rates(neighbors.search(held_out, held_out_features, in_a_mirror[1]))
    assert null["n"] == 1020
    assert null["feature_rate"] <= 0.005 and null["pixel_rate"] <= 0.005
