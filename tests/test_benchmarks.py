"""`benchmarks/train_throughput.py`: it runs, counts what it should, and prints what it measured.

Tiny models, two rounds. No time is compared with another: this machine may be busy.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState, GradientState

from benchmarks import train_throughput

SCRIPT = Path(train_throughput.__file__)
ROUNDS = 2


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its precision for as long as the process lives; the benchmark's is bf16."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState):
        state._reset_state()


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Flags for models of a few thousand parameters on images of 16 pixels."""
    model_configs = {
        "autoencoder": {"block_out_channels": [8, 8], "latent_channels": 4, "head_channels": 8},
        "latent_diffusion": {"hidden_size": 16, "num_layers": 3, "num_attention_heads": 2},
    }
    recipe = {"common": {"resolution": 16, "dataloader_num_workers": 1}, "autoencoder": {"perceptual_every": 2}}
    for section, config in model_configs.items():
        path = tmp_path / f"{section}.json"
        path.write_text(json.dumps(config))
        recipe.setdefault(section, {})["model_config"] = str(path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    flags = {
        "config": tmp_path / "recipe.yaml",
        "json": tmp_path / "throughput.json",
        "steps": ROUNDS,
        "autoencoder_batch_size": 2,
        "denoiser_batch_size": 4,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def check_rates(stage: dict, items: int, printed: str) -> None:
    """All figures are there, agree with each other, and are printed."""
    assert stage["reference_gflops"] == max(stage["reference"].values()) > 0
    for name, row in stage["rates"].items():
        assert all(math.isfinite(value) and value > 0 for value in row.values()), name
        assert row["items_per_second"] * row["ms_per_step"] == pytest.approx(1e3 * items)
        assert row["gflops"] * row["ms_per_step"] == pytest.approx(1e3 * row["gflop_per_step"])
        assert row["share_of_reference"] == pytest.approx(row["gflops"] / stage["reference_gflops"])
        [line] = [line for line in printed.splitlines() if line.startswith(name) and line.count(" ms ") == 0]
        assert f"{row['items_per_second']:.1f}" in line and f"{row['ms_per_step']:.1f}" in line
    assert stage["added_to"] in stage["rates"]
    for name, milliseconds in stage["added_ms"].items():
        assert any(line.startswith(name) and f"{milliseconds:+.1f} ms" in line for line in printed.splitlines()), name


def test_stage_1(tiny, tmp_path, capsys):
    results = train_throughput.main([*tiny, "--stage=1"])
    assert json.loads((tmp_path / "throughput.json").read_text()) == results
    assert "memory_gib" not in results and "stage2" not in results
    stage = results["stage1"]
    check_rates(stage, 2, capsys.readouterr().out)

    losses = list(train_throughput.ADDED_LOSSES)
    assert stage["rates"].keys() == {
        "FlowerAutoencoderKL", *losses, train_throughput.ADAPTIVE_WEIGHT, "stock AutoencoderKL"
    }  # fmt: skip
    # Each loss really comes on top of those before it: none of them is free of arithmetic.
    operations = [stage["rates"][name]["gflop_per_step"] for name in ("FlowerAutoencoderKL", *losses)]
    assert operations == sorted(operations) and len(set(operations)) == len(operations)
    adversarial, adaptive = train_throughput.ADVERSARIAL, train_throughput.ADAPTIVE_WEIGHT
    assert stage["rates"][adaptive]["gflop_per_step"] > stage["rates"][adversarial]["gflop_per_step"]

    added = stage["added_ms"]
    assert list(added) == [*losses, "+ adaptive weight, every 16 steps", "all losses"]
    assert added["all losses"] == pytest.approx(sum(added[name] for name in list(added)[:-1]))
    assert 3e6 < stage["rates"]["stock AutoencoderKL"]["parameters"] < 4e6


def test_stage_1_without_the_losses_that_the_recipe_leaves_out(tiny, tmp_path):
    path = tmp_path / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["autoencoder"] |= {"perceptual_weight": 0, "adversarial_weight": 0, "classification_weight": 0}
    path.write_text(yaml.safe_dump(recipe))
    stage = train_throughput.main([*tiny, "--stage=1"])["stage1"]
    assert list(stage["rates"]) == ["FlowerAutoencoderKL", "+ center loss, repulsion", "stock AutoencoderKL"]
    assert list(stage["added_ms"]) == ["+ center loss, repulsion", "all losses"]


def test_stage_2(tiny, capsys):
    stage = train_throughput.main([*tiny, "--stage=2"])["stage2"]
    printed = capsys.readouterr().out
    check_rates(stage, 4, printed)

    rates = stage["rates"]
    in_memory, from_cache, on_the_fly = (
        rates[name]["gflop_per_step"]
        for name in (train_throughput.IN_MEMORY, train_throughput.FROM_CACHE, train_throughput.ON_THE_FLY)
    )
    assert rates["FlowerUNet2DModel"]["gflop_per_step"] == in_memory == from_cache < on_the_fly
    ratio = rates["FlowerUNet2DModel"]["gflops"] / rates["stock UNet2DModel"]["gflops"]
    assert stage["gflops_over_stock_unet"] == pytest.approx(ratio)
    assert f"over stock UNet2DModel: {ratio:.2f}" in printed
    assert "stock DiTTransformer2DModel" in rates
    assert 3.5e6 < rates["stock UNet2DModel"]["parameters"] < 4e6


def test_latents_come_from_the_cache_file(tiny, tmp_path):
    stage = train_throughput.DenoiserTraining(train_throughput.parse_options(tiny), tmp_path)
    batches = stage.cached_batches(tmp_path)
    first, second = next(batches), next(batches)
    assert first.keys() - {"index"} == stage.batch.keys()
    for name, value in stage.batch.items():
        assert (first[name].shape, first[name].dtype) == (value.shape, value.dtype), name
    assert not torch.equal(first["latents"], second["latents"])
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_operations_of_attention_and_of_backward_passes_are_counted():
    query = torch.randn(2, 3, 8, 16, requires_grad=True)

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, query, query)

    products = 2 * 2 * 3 * 2 * 8 * 8 * 16  # two for each of 2 x 3 heads, of 8 x 8 x 16, each operation counting twice
    assert train_throughput.count_flops(attend) == products
    assert train_throughput.count_flops(lambda: attend().sum().backward()) == 3 * products


@pytest.mark.parametrize("stage", ["1", "2"])
def test_peak_memory(stage, tiny):
    peak = train_throughput.peak_memory(stage, train_throughput.parse_options(tiny))
    assert math.isfinite(peak) and peak > 0


@pytest.mark.slow
def test_everything_from_the_command_line_in_another_folder(tiny, tmp_path):
    command = [sys.executable, str(SCRIPT), *tiny]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    results = json.loads((tmp_path / "throughput.json").read_text())
    assert results.keys() == {"device", "torch", "precision", "options", "memory_gib", "stage1", "stage2"}
    for name, gib in results["memory_gib"].items():
        assert 0.1 < gib < 4  # a process of its own, with little more than its imports
        assert any(line.startswith(name) and f"{gib:.2f} GiB" in line for line in output.splitlines())
    for name in ("stage1", "stage2"):
        assert results[name]["title"] in output


# Ablations and the contest with stock parts


@pytest.fixture
def tiny_recipe(tiny, tmp_path: Path) -> Path:
    """The tiny models' recipe, with synthetic images and all that a whole training needs."""
    path = tmp_path / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["common"] |= {"dataset": "synthetic", "classes": [0, 1, 2, 3], "images_per_class": 12, "seed": 0}
    recipe["common"] |= {"resolution": 32, "mixed_precision": "no", "dataloader_num_workers": 0}
    schedule = {"max_train_steps": 100, "lr_warmup_steps": 10, "train_batch_size": 4, "ema_decay": 0.9}
    recipe["autoencoder"] |= schedule | {"perceptual_weight": 0, "disc_start": 50, "perceptual_every": 1}
    recipe["latent_diffusion"] |= schedule
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_benchmark(script: str, *words: object) -> str:
    command = [sys.executable, SCRIPT.with_name(script), *words]
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_ablation_trains_arms_that_differ_in_one_thing_and_goes_on_where_it_was(tiny_recipe, tmp_path):
    ablations = {
        "recipe": "recipe.yaml", "seconds": {"autoencoder": 3, "latent_diffusion": 3}, "num_samples": 8,
        "guidance_scales": [1.0, 2.0], "dtype": "float32",
        "arms": [
            {"name": "baseline", "latent_diffusion": {"snr_gamma": 5.0}},
            {"name": "wide", "base": "baseline", "latent_diffusion_model": {"hidden_size": 24}},
        ],
    }  # fmt: skip
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump(ablations))
    words = ["--ablations", tmp_path / "arms.yaml", "--output_dir", tmp_path / "out"]
    first = run_benchmark("ablate.py", *words)
    runs = {name: tmp_path / "out" / f"{name}-0" for name in ("baseline", "wide")}
    args = {name: yaml.safe_load((run / "args.yaml").read_text()) for name, run in runs.items()}
    different = {key for key in args["wide"] if args["wide"][key] != args["baseline"][key]}
    assert different <= {"model_config", "output_dir", "max_train_steps", "lr_warmup_steps", "checkpointing_steps"}
    widths = [json.loads((run / "unet/config.json").read_text())["hidden_size"] for run in runs.values()]
    assert widths == [16, 24] and args["wide"]["snr_gamma"] == 5.0
    assert len(list((tmp_path / "out").glob("autoencoder-*/"))) == 1  # both share it
    for run in runs.values():
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["step"] > 1 and len(metrics["evaluation"]["sweep"]) == 2
    before = {run: (run / "args.yaml").stat().st_mtime_ns for run in runs.values()}
    again = run_benchmark("ablate.py", *words)
    assert before == {run: (run / "args.yaml").stat().st_mtime_ns for run in runs.values()}
    rows = [line for line in first.splitlines() if line.startswith("| wide")]
    assert rows and rows[-1] in again


@pytest.mark.slow
def test_contest_gives_each_contender_its_rates_and_judges_all_alike(tiny_recipe, tmp_path):
    words = ["--config", tiny_recipe, "--contenders", "ours", "dit", "jit", "--minutes", 0.05]
    words += ["--tuning_minutes", 0.02, "--num_samples", 8, "--slice", 1, "--output_dir", tmp_path / "out"]
    printed = run_benchmark("time_to_quality.py", *words)
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ") and "---" not in line]
    found = {(row[0].removeprefix("| "), row[1].partition(",")[0]) for row in rows[1:]}
    dit, jit = "stock AutoencoderKL + DiTTransformer2DModel", "pixel transformer, predicts the image"
    assert found == {("flower_ldm", "seed 0")} | {(name, how) for name in (dit, jit) for how in ("published", "tuned")}
    assert (tmp_path / "out" / "time_to_quality.png").stat().st_size > 10_000
