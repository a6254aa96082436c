"""Stage 2 end to end, through `train_latent_diffusion.main`: the pipeline that a run leaves, what its flags change.

One tiny run (`finished_runs` of conftest) serves most tests; the others train for two steps on its autoencoder. Bad
input is in `test_bad_input.py`.
"""

import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

import train_latent_diffusion
from flower_ldm import FlowerAutoencoderKL, FlowerLDMPipeline
from flower_ldm.checkpoint_files import load_state
from flower_ldm.data import DataOptions
from flower_ldm.files import file_safe_name
from flower_ldm.latent_cache import LatentDataset, cache_key, cache_path, read_latent_cache
from flower_ldm.pipelines.pipeline_flower_ldm import GUIDANCE_SCALE
from flower_ldm.runs import read_log
from flower_ldm.synthetic import CLASS_NAMES
from flower_ldm.trajectory import PANEL
from flower_ldm.visualization import draw_samples, save_samples_grid
from train_latent_diffusion import parse_args

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
QUICK = "--images_per_class 4 --classes 0 1 --train_batch_size 4 --max_train_steps 2 --logging_steps 1"
QUICK += " --validation_steps 2 --checkpointing_steps 2"


PATHS = [file_safe_name(CLASS_NAMES[label]) for label in (0, 2, 3)]  # of 4 classes, 3 spread over them


@pytest.fixture(scope="module")
def run_dir(finished_runs) -> Path:
    """The output folder of the finished run."""
    return finished_runs.flower_ldm


@pytest.fixture
def train(stage_flags, finished_runs, run_script, tmp_path):
    """Trains for two steps with these flags besides; gives the output folder."""
    numbers = itertools.count()

    def train(flags: str = "") -> Path:
        output_dir = tmp_path / f"run-{next(numbers)}"
        words = f"{QUICK} --autoencoder {finished_runs.autoencoder} --output_dir {output_dir} {flags}"
        run_script(train_latent_diffusion.main, [*stage_flags[1], *words.split()])
        return output_dir

    return train


def load(run_dir: Path) -> FlowerLDMPipeline:
    pipeline = FlowerLDMPipeline.from_pretrained(run_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: FlowerLDMPipeline, labels: list, **options) -> np.ndarray:
    options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)} | options
    return pipeline(labels, output_type="np", **options).images


def training_lines(run_dir: Path) -> list[dict]:
    """What was logged in training, without the speed."""
    lines = [line for line in read_log(run_dir / "log.jsonl") if line.pop("steps_per_second", None)]
    assert lines
    return lines


# What a run leaves on disk


def test_every_promised_file_is_there(run_dir):
    promised = "model_index.json vae/config.json unet/config.json scheduler/scheduler_config.json args.yaml log.jsonl"
    promised += " metrics.json diffusion_loss.png vae_samples_grid_subset.png checkpoint-4 checkpoint-6"
    promised += " vae/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.safetensors"
    promised += " latent_space_tsne.png latent_space_pca.png original_reconstructed_generated.png guidance_sweep.png"
    promised += " interpolation_seeds.png interpolation_classes.png"
    for name in PATHS:
        promised += f" denoising_path_{name}.png diffusion_animation_{name}.gif"
    assert [name for name in promised.split() if not (run_dir / name).exists()] == []
    assert sorted(path.name for path in (run_dir / "samples").iterdir()) == ["step-00000004.png", "step-00000006.png"]
    assert list(run_dir.glob("unfinished-*")) == []


def test_the_pipeline_draws_the_classes_it_is_asked_for(run_dir):
    pipeline = load(run_dir)
    assert pipeline.class_names == list(CLASS_NAMES[:4])
    images = pipeline([CLASS_NAMES[1], 3], num_images_per_label=2, num_inference_steps=2).images
    assert [image.size for image in images] == [(32, 32)] * 4


def test_the_pipeline_holds_the_autoencoder_it_was_trained_on(run_dir, finished_runs):
    vae, trained_on = load(run_dir).vae, FlowerAutoencoderKL.from_pretrained(finished_runs.autoencoder)
    assert all(map(torch.equal, vae.state_dict().values(), trained_on.state_dict().values()))
    assert vae.config.latents_mean == trained_on.config.latents_mean is not None


def test_saved_weights_are_the_moving_average(run_dir):
    averaged = load_state(run_dir / "checkpoint-6" / "ema.safetensors")["shadow_params"]
    unet = load(run_dir).unet
    assert all(map(torch.equal, unet.parameters(), averaged))
    last = load_file(run_dir / "checkpoint-6" / "model.safetensors")
    assert not any(torch.equal(value, last[name]) for name, value in unet.named_parameters() if "weight" in name)


def test_log(run_dir):
    lines = training_lines(run_dir)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        bins = line.pop("loss_by_timestep")
        assert [(first, last) for first, last, _ in bins] == [(low, low + 99) for low in range(0, 1000, 100)]
        means = [mean for _, _, mean in bins if mean is not None]
        assert min(means) <= line["unweighted_loss"] <= max(means)
        assert line.keys() == {"step", "loss", "unweighted_loss", "grad_norm", "learning_rate"}
        assert all(math.isfinite(value) for value in (*line.values(), *means))
    assert 0.5 < lines[0]["unweighted_loss"] < 1.5  # it starts at 0, and the target has unit variance
    held_out = [line for line in read_log(run_dir / "log.jsonl") if "val_loss" in line]
    assert [line["step"] for line in held_out] == [4, 6]


def test_tensorboard_has_the_same_figures(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = run_dir.rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events.parent)).Reload()
    logged = read_log(run_dir / "log.jsonl")
    for name in ("loss", "unweighted_loss", "val_loss", "learning_rate"):
        seen = [(event.step, pytest.approx(event.value, rel=1e-5)) for event in board.Scalars(name)]
        assert [(line["step"], line[name]) for line in logged if name in line] == seen


def test_tensorboard_has_the_same_pictures(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = run_dir.rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events.parent), size_guidance={"images": 0}).Reload()
    files = {("samples", step): f"samples/step-{step:08d}.png" for step in (4, 6)}
    stills = ["diffusion_loss", "latent_space_tsne", "latent_space_pca", "original_reconstructed_generated"]
    stills += ["guidance_sweep", "interpolation_seeds", "interpolation_classes"]
    stills += [f"denoising_path_{name}" for name in PATHS]
    files |= {(name, 6): f"{name}.png" for name in stills}
    for (name, step), file in files.items():
        (encoded,) = [event.encoded_image_string for event in board.Images(name) if event.step == step]
        seen, drawn = Image.open(io.BytesIO(encoded)), Image.open(run_dir / file).convert("RGB")
        assert np.array_equal(np.asarray(seen), np.asarray(drawn)), file
    assert [event.step for event in board.Images("diffusion_loss")] == [4, 6]


def test_animation_ends_with_what_the_pipeline_draws(run_dir):
    image = load(run_dir)(0, generator=torch.Generator().manual_seed(0)).images[0]
    with Image.open(run_dir / f"diffusion_animation_{PATHS[0]}.gif") as animation:
        assert animation.n_frames == 26 and animation.info["loop"] == 0
        animation.seek(25)
        last = np.asarray(animation.convert("RGB")).astype(int)[4 : 4 + PANEL, 4 : 4 + PANEL]
    assert abs(last - image.resize((PANEL, PANEL), Image.Resampling.BICUBIC)).mean() < 8  # 256 colors


def test_without_final_pictures_there_are_the_cheap_ones(train):
    run_dir = train("--validation_steps 1")
    pictures = sorted(path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*.[pg][ni][gf]"))
    assert pictures == [
        "diffusion_loss.png", "samples/step-00000001.png", "samples/step-00000002.png", "vae_samples_grid_subset.png"
    ]  # fmt: skip


def test_metrics_are_of_the_saved_weights_on_the_held_out_latents(run_dir):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    pipeline = load(run_dir)
    _, held_out = DataOptions("synthetic", resolution=32, classes=[0, 1, 2, 3], images_per_class=12).load()
    cache = read_latent_cache(cache_path(run_dir / "latent_cache", held_out), cache_key(pipeline.vae, held_out))
    config = pipeline.vae.config
    batch = LatentDataset(cache, config.latents_mean, config.latents_std, seed=0).__getitems__(
        [(0, index) for index in range(len(held_out))]
    )
    timesteps = (batch["uniforms"][:, 0] * 1000).long()
    labels = torch.where(batch["uniforms"][:, 1] < 0.1, pipeline.null_label, batch["class_labels"])
    alpha = pipeline.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy_latents = alpha.sqrt() * batch["latents"] + (1 - alpha).sqrt() * batch["noise"]
    velocity = alpha.sqrt() * batch["noise"] - (1 - alpha).sqrt() * batch["latents"]
    with torch.inference_mode():
        errors = (pipeline.unet(noisy_latents, timesteps, labels).sample - velocity).square().mean(dim=(1, 2, 3))
    snr = (alpha / (1 - alpha)).flatten().clamp(min=0.01)
    assert metrics["val_unweighted_loss"] == pytest.approx(errors.mean().item(), rel=1e-4)
    assert metrics["val_loss"] == pytest.approx((errors * snr.clamp(max=5) / (snr + 1)).mean().item(), rel=1e-4)
    assert (metrics["dataset"], metrics["splits"], metrics["num_images"], metrics["step"]) == (
        "synthetic",
        ["val"],
        32,
        6,
    )


def test_pictures(run_dir):
    names = ["diffusion_loss.png", "vae_samples_grid_subset.png", "samples/step-00000004.png", "latent_space_tsne.png"]
    for name in [*names, "latent_space_pca.png", f"denoising_path_{PATHS[1]}.png"]:
        with Image.open(run_dir / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5, name  # not blank
    last = (run_dir / "samples" / "step-00000006.png").read_bytes()
    assert last == (run_dir / "vae_samples_grid_subset.png").read_bytes()


# What flags change, and what they don't


@pytest.mark.parametrize(
    ("prediction_type", "beta_schedule", "zero_terminal_snr"),
    [
        ("epsilon", "scaled_linear", False),
        ("sample", "linear", True),
        ("v_prediction", "squaredcos_cap_v2", True),
    ],
)
def test_what_the_model_predicts(train, prediction_type, beta_schedule, zero_terminal_snr):
    flags = f"--prediction_type {prediction_type} --beta_schedule {beta_schedule}"
    run_dir = train(f"{flags} --zero_terminal_snr" if zero_terminal_snr else flags)
    pipeline = load(run_dir)
    config = pipeline.scheduler.config
    assert (config.prediction_type, config.beta_schedule) == (prediction_type, beta_schedule)
    assert config.rescale_betas_zero_snr is zero_terminal_snr
    assert (pipeline.scheduler.alphas_cumprod[-1] < 1e-6) == zero_terminal_snr
    assert np.isfinite(draw(pipeline, [0, 1])).all()


def test_without_min_snr_weights_all_timesteps_weigh_alike(train):
    for line in training_lines(train("--snr_gamma 0 --label_dropout 0 --guidance_scale 1")):
        assert line["loss"] == pytest.approx(line["unweighted_loss"], rel=1e-6)
    for line in training_lines(train()):
        assert line["loss"] != pytest.approx(line["unweighted_loss"], rel=0.01)


def test_without_a_null_label_no_guidance_is_drawn(train, capsys):
    run_dir = train("--label_dropout 0 --guidance_scale 1 --final_pictures")
    assert (run_dir / "interpolation_seeds.png").is_file() and not (run_dir / "guidance_sweep.png").exists()
    assert "left out guidance_sweep.png: this model takes no guidance" in capsys.readouterr().out
    pipeline = load(run_dir)
    assert pipeline.config.takes_guidance is False and pipeline.default_guidance_scale == 1
    with pytest.raises(ValueError, match="^guidance_scale must be 1, got 3: this model takes no guidance"):
        draw(pipeline, [0], guidance_scale=3.0)


def test_the_pipeline_keeps_the_guidance_of_the_previews(train, run_dir):
    assert load(run_dir).resolve_guidance() == (GUIDANCE_SCALE, [0.0, 1.0]) and load(run_dir).can_guide
    run = train("--guidance_scale 1.5 --validation_steps 1")
    pipeline = load(run)
    assert pipeline.resolve_guidance() == (1.5, [0.0, 1.0])
    save_samples_grid(pipeline, draw_samples(pipeline, seed=0), run / "again.png")
    preview, again = (
        np.asarray(Image.open(run / name)).astype(int) for name in ("samples/step-00000002.png", "again.png")
    )
    assert abs(preview - again).max() <= 1


def test_gradient_checkpointing_changes_no_loss(train):
    assert training_lines(train("--gradient_checkpointing")) == training_lines(train())


@pytest.mark.slow
def test_compiled_training_has_the_same_losses(train):
    plain, compiled = training_lines(train()), training_lines(train("--torch_compile"))
    for line, other in zip(plain, compiled, strict=True):
        line.pop("loss_by_timestep"), other.pop("loss_by_timestep")
        assert other == pytest.approx(line, rel=2e-3)


def test_classes_by_name_are_the_pipelines(stage_flags, finished_runs, run_script, tmp_path):
    names = [CLASS_NAMES[2], CLASS_NAMES[0]]  # in order neither of labels nor of letters
    assert names == sorted(names, reverse=True)
    words = [*stage_flags[1], *QUICK.split(), "--autoencoder", finished_runs.autoencoder, "--classes", *names]
    run_script(train_latent_diffusion.main, words)
    pipeline = load(tmp_path / "flower-ldm")
    assert pipeline.class_names == names
    assert pipeline.unet.config.num_classes == pipeline.null_label == 2
    assert np.array_equal(draw(pipeline, names), draw(pipeline, [0, 1]))


def test_a_stock_autoencoder_will_do(train, tmp_path):
    torch.manual_seed(0)
    stock = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        norm_num_groups=4,
        latent_channels=3,
        scaling_factor=0.5,
    )
    stock.save_pretrained(tmp_path / "stock")
    run_dir = train(f"--autoencoder {tmp_path / 'stock'}")
    pipeline = load(run_dir)
    assert type(pipeline.vae) is AutoencoderKL
    assert pipeline.latents_shape == (3, 8, 8)
    assert draw(pipeline, [CLASS_NAMES[0], 1]).shape == (2, 32, 32, 3)


def test_the_best_autoencoder_will_do(train, finished_runs):
    best = FlowerAutoencoderKL.from_pretrained(finished_runs.autoencoder / "best")
    vae = load(train(f"--autoencoder {finished_runs.autoencoder / 'best'}")).vae
    assert all(map(torch.equal, vae.state_dict().values(), best.state_dict().values()))


def test_runs_can_share_a_latent_cache(train, tmp_path, capfd):
    first = train(f"--latent_cache_dir {tmp_path / 'cache'}")
    assert "Encoding images" in capfd.readouterr().err
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(written) == 2 and not (first / "latent_cache").exists()
    second = train(f"--latent_cache_dir {tmp_path / 'cache'}")
    assert "Encoding images" not in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == written
    assert training_lines(first) == training_lines(second) == training_lines(train())


# Flags and recipes

OWN_FLAGS = """
    --autoencoder someone/autoencoder; --prediction_type sample; --beta_schedule linear; --zero_terminal_snr
    --snr_gamma 3; --label_dropout 0.2; --guidance_scale 1.5
"""


def test_promised_flags_are_understood(misread_flags):
    assert misread_flags(parse_args, OWN_FLAGS) == []


def test_a_flag_wins_over_the_recipe_and_the_recipe_over_the_default(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "common: {seed: 5, resolution: 32}\nautoencoder: {resolution: 48, kl_weight: 1e-3}\n"
        "latent_diffusion: {resolution: 96, snr_gamma: 3, zero_terminal_snr: true}"
    )
    args = parse_args(["--config", str(recipe), "--seed", "7"])
    assert (args.seed, args.resolution, args.snr_gamma, args.zero_terminal_snr) == (7, 96, 3.0, True)
    assert (args.output_dir, args.train_batch_size) == ("results/flower-ldm", 128)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_of_the_repository_is_understood(path):
    args = parse_args(["--config", str(path)])
    assert args.model_config is None or (path.parent.parent / args.model_config).is_file()
