"""Stage 1 end to end, through `train_autoencoder.main`: what a run leaves on disk, and what its flags change.

One tiny run with every loss in use (`finished_runs` of conftest) serves most tests; the others train for two steps.
Bad input is in `test_bad_input.py`.
"""

import io
import itertools
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torchmetrics.functional.image import structural_similarity_index_measure

import train_autoencoder
from flower_ldm import FlowerAutoencoderKL
from flower_ldm.autoencoder_losses import PerceptualLoss
from flower_ldm.checkpoint_files import load_state
from flower_ldm.data import DataOptions
from flower_ldm.discriminator import PatchDiscriminator
from flower_ldm.files import replace_files
from flower_ldm.runs import read_log
from flower_ldm.training import choose_precision
from train_autoencoder import parse_args

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
FROM_THE_START = {"pixel_loss", "perceptual_loss", "kl_loss", "classification_loss", "center_loss", "repulsion_loss"}
FROM_DISC_START = {"adversarial_loss", "discriminator_loss", "adaptive_weight"}
QUICK = "--images_per_class 4 --classes 0 1 --train_batch_size 4 --max_train_steps 2 --logging_steps 1 --disc_start 0"
QUICK += " --validation_steps 2 --checkpointing_steps 2 --adaptive_weight_steps 1 --perceptual_weight 0"


@pytest.fixture(scope="module")
def run_dir(finished_runs) -> Path:
    """The output folder of the finished run."""
    return finished_runs.autoencoder


@pytest.fixture(scope="module")
def datasets():
    """The images that it was trained on, and those held out."""
    return DataOptions("synthetic", resolution=32, classes=[0, 1, 2, 3], images_per_class=12).load()


@pytest.fixture
def train(stage_flags, run_script, tmp_path):
    """Trains for two steps with these flags besides; gives the output folder."""
    numbers = itertools.count()

    def train(flags: str = "") -> Path:
        output_dir = tmp_path / f"run-{next(numbers)}"
        words = f"{QUICK} --output_dir {output_dir} {flags}"
        run_script(train_autoencoder.main, [*stage_flags[0], *words.split()])
        return output_dir

    return train


def training_lines(run_dir: Path) -> list[dict]:
    """What was logged of the losses, without the speed."""
    lines = [line for line in read_log(run_dir / "log.jsonl") if line.pop("steps_per_second", None)]
    assert lines
    return lines


def held_out_lines(run_dir: Path) -> list[dict]:
    return [line for line in read_log(run_dir / "log.jsonl") if "psnr" in line]


def all_images(dataset) -> torch.Tensor:
    return dataset.__getitems__(list(range(len(dataset))))["images"]


def weights_in(checkpoint: Path) -> dict[str, set[str]]:
    """The parameters of each model in a checkpoint."""
    found = {name: checkpoint / f"{name}.safetensors" for name in ("model", "centers", "discriminator")}
    return {name: set(load_file(path)) for name, path in found.items() if path.exists()}


# What a run leaves on disk


def test_every_promised_file_is_there(run_dir):
    promised = "config.json diffusion_pytorch_model.safetensors args.yaml log.jsonl metrics.json reconstructions"
    promised += " best/config.json best/diffusion_pytorch_model.safetensors autoencoder_losses.png"
    promised += " latent_space_tsne.png latent_space_pca.png"
    promised += " checkpoint-4 checkpoint-6"
    assert [name for name in promised.split() if not (run_dir / name).exists()] == []
    assert list(run_dir.glob("unfinished-*")) == []


@pytest.mark.parametrize("folder", ["", "best"])
def test_latents_statistics_are_those_of_the_training_split(run_dir, datasets, folder):
    vae = FlowerAutoencoderKL.from_pretrained(run_dir / folder).eval()
    with torch.inference_mode():
        posterior = vae.encode(all_images(datasets[0])).latent_dist
        drawn = torch.cat([posterior.sample(torch.Generator().manual_seed(i)) for i in range(50)])
    assert len(vae.config.latents_mean) == len(vae.config.latents_std) == vae.config.latent_channels
    torch.testing.assert_close(torch.tensor(vae.config.latents_mean), drawn.mean(dim=(0, 2, 3)), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.tensor(vae.config.latents_std), drawn.std(dim=(0, 2, 3)), atol=0, rtol=0.02)
    normalized = vae.normalize(drawn)
    assert normalized.mean(dim=(0, 2, 3)).abs().max() < 0.02
    torch.testing.assert_close(normalized.std(dim=(0, 2, 3)), torch.ones(4), atol=0.02, rtol=0)


def test_saved_weights_are_the_moving_average(run_dir):
    saved = load_file(run_dir / "diffusion_pytorch_model.safetensors")
    last = load_file(run_dir / "checkpoint-6" / "model.safetensors")
    vae = FlowerAutoencoderKL.from_pretrained(run_dir)
    averaged = load_state(run_dir / "checkpoint-6" / "ema.safetensors")["shadow_params"]
    names = [name for name, _ in vae.named_parameters()]
    assert all(torch.equal(saved[name], mean) for name, mean in zip(names, averaged, strict=True))
    assert not any(torch.equal(saved[name], last[name]) for name in names if name.endswith("weight"))


def test_best_has_the_lowest_held_out_pixel_and_perceptual_loss(train, random_vgg):
    # At this rate, and with the last step's weights for an average, some later step is worse than an earlier one.
    flags = f"--perceptual_weight 0.5 --vgg_weights {random_vgg} --max_train_steps 5 --validation_steps 1"
    run_dir = train(f"{flags} --ema_decay 0 --learning_rate 0.03 --lr_scheduler constant --lr_warmup_steps 0")
    scores = [line["val_pixel_loss"] + line["val_perceptual_loss"] for line in held_out_lines(run_dir)]
    assert len(scores) == 5 and min(scores) < scores[-1]
    images = all_images(DataOptions("synthetic", resolution=32, classes=[0, 1], images_per_class=4).load()[1])
    perceptual = PerceptualLoss(random_vgg)
    for folder, score in (("best", min(scores)), ("", scores[-1])):
        with torch.inference_mode():
            reconstruction = FlowerAutoencoderKL.from_pretrained(run_dir / folder).eval()(images).sample.clamp(-1, 1)
            measured = (reconstruction - images).abs().mean() + perceptual(reconstruction, images)
        assert measured.item() == pytest.approx(score, rel=1e-3)


def test_args_yaml_says_what_was_run(run_dir):
    args = yaml.safe_load((run_dir / "args.yaml").read_text())
    assert args["classes"] == ["0", "1", "2", "3"] and args["dataset"] == "synthetic" and args["disc_start"] == 2
    assert args["kl_weight"] == 1e-4 and args["max_train_steps"] == 6 and args["output_dir"] == str(run_dir)


def test_every_loss_is_logged_unweighted(run_dir):
    first, *later = training_lines(run_dir)
    assert [line["step"] for line in (first, *later)] == [2, 4, 6]
    common = FROM_THE_START | {"step", "grad_norm", "learning_rate"}
    assert first.keys() == common
    for line in later:
        assert line.keys() == common | FROM_DISC_START
    assert all(math.isfinite(value) for line in (first, *later) for value in line.values())
    assert abs(first["classification_loss"] - math.log(4)) < 0.5  # the head knows nothing yet
    held_out = {"psnr", "ssim", "val_pixel_loss", "val_perceptual_loss", "val_accuracy", "mean_squared_error"}
    assert [line["step"] for line in held_out_lines(run_dir)] == [4, 6]
    assert all(held_out <= line.keys() for line in held_out_lines(run_dir))


def test_tensorboard_has_the_same_figures(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = run_dir.rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events.parent)).Reload()
    logged = read_log(run_dir / "log.jsonl")
    for name in FROM_THE_START | FROM_DISC_START | {"psnr", "ssim", "learning_rate"}:
        seen = [(event.step, pytest.approx(event.value, rel=1e-5)) for event in board.Scalars(name)]
        assert [(line["step"], line[name]) for line in logged if name in line] == seen


def test_tensorboard_has_the_same_pictures(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = run_dir.rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events.parent), size_guidance={"images": 0}).Reload()
    files = {("reconstructions", step): f"reconstructions/step-{step:08d}.png" for step in (4, 6)}
    files |= {(name, 6): f"{name}.png" for name in ("autoencoder_losses", "latent_space_tsne", "latent_space_pca")}
    for (name, step), file in files.items():
        (encoded,) = [event.encoded_image_string for event in board.Images(name) if event.step == step]
        seen, drawn = Image.open(io.BytesIO(encoded)), Image.open(run_dir / file).convert("RGB")
        assert np.array_equal(np.asarray(seen), np.asarray(drawn)), file
    assert [event.step for event in board.Images("autoencoder_losses")] == [4, 6]


def test_without_final_pictures_there_are_the_cheap_ones(train):
    run_dir = train("--validation_steps 1")
    pictures = sorted(path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*.png"))
    assert pictures == [
        "autoencoder_losses.png", "reconstructions/step-00000001.png", "reconstructions/step-00000002.png"
    ]  # fmt: skip


def test_metrics_are_of_the_saved_weights_on_the_held_out_images(run_dir, datasets):
    metrics = yaml.safe_load((run_dir / "metrics.json").read_text())
    images = all_images(datasets[1])
    with torch.inference_mode():
        reconstruction = FlowerAutoencoderKL.from_pretrained(run_dir).eval()(images).sample.clamp(-1, 1)
    errors = ((reconstruction - images) / 2).square().mean(dim=(1, 2, 3))
    assert metrics["psnr"] == pytest.approx((-10 * errors.log10()).mean().item(), abs=1e-3)
    assert metrics["psnr_of_mean_squared_error"] == pytest.approx(-10 * math.log10(errors.mean()), abs=1e-3)
    ssim = structural_similarity_index_measure((reconstruction + 1) / 2, (images + 1) / 2, data_range=1.0)
    assert metrics["ssim"] == pytest.approx(ssim.item(), abs=1e-4)
    assert (metrics["dataset"], metrics["splits"], metrics["num_images"]) == ("synthetic", ["val"], 32)
    assert metrics["step"] == 6 and metrics["training_seconds"] > 0


def test_pictures(run_dir, datasets):
    for name in ("autoencoder_losses", "latent_space_tsne", "latent_space_pca"):
        with Image.open(run_dir / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5  # not blank
    names = [f"step-{step:08d}.png" for step in (4, 6)]
    assert sorted(path.name for path in (run_dir / "reconstructions").iterdir()) == names
    before, after = (np.asarray(Image.open(run_dir / "reconstructions" / name).convert("RGB")) for name in names)
    assert before.shape == after.shape and not np.array_equal(before, after)
    first = ((datasets[1][0]["images"].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
    assert np.array_equal(after[2:66:2, 2:66:2], first)  # 32 pixels, enlarged to 64, behind a gap of 2


def test_model_config_is_the_models(run_dir):
    config = FlowerAutoencoderKL.load_config(run_dir)
    assert (config["block_out_channels"], config["latent_channels"], config["head_channels"]) == ([16, 16, 16], 4, 16)
    assert (config["num_classes"], config["sample_size"]) == (4, 32)  # from the data and --resolution


# A weight of 0 means that the part is never built or run


def test_without_perceptual_loss_no_vgg_is_read(train):
    run_dir = train("--vgg_weights nowhere.pth")
    assert training_lines(run_dir)[-1].keys() >= (FROM_THE_START | FROM_DISC_START) - {"perceptual_loss"}
    assert not any("perceptual" in name for line in read_log(run_dir / "log.jsonl") for name in line)
    assert (run_dir / "best" / "config.json").is_file()  # by the pixel loss alone


def test_without_adversarial_loss_there_is_no_discriminator(train):
    assert weights_in(train() / "checkpoint-2")["discriminator"] == set(PatchDiscriminator().state_dict())
    run_dir = train("--adversarial_weight 0")
    assert weights_in(run_dir / "checkpoint-2").keys() == {"model", "centers"}
    assert [path.stem for path in (run_dir / "checkpoint-2").glob("*optimizer*")] == ["optimizer"]
    assert not training_lines(run_dir)[-1].keys() & FROM_DISC_START


def test_without_any_loss_on_classes_there_is_no_head(train):
    run_dir = train("--classification_weight 0 --center_weight 0 --repulsion_weight 0")
    assert FlowerAutoencoderKL.load_config(run_dir)["num_classes"] == 0
    weights = weights_in(run_dir / "checkpoint-2")
    assert not any(name.startswith("head") for name in weights["model"]) and "centers" not in weights
    assert not training_lines(run_dir)[-1].keys() & {"classification_loss", "center_loss", "repulsion_loss"}
    assert "val_accuracy" not in held_out_lines(run_dir)[-1]


@pytest.mark.parametrize(
    ("words", "absent", "present"),
    [
        ("--classification_weight 0", {"classification_loss"}, {"center_loss", "repulsion_loss"}),
        ("--center_weight 0 --repulsion_weight 0", {"center_loss", "repulsion_loss"}, {"classification_loss"}),
        ("--no-adaptive_weight", {"adaptive_weight"}, {"adversarial_loss", "discriminator_loss"}),
    ],
)
def test_one_part_without_another(train, words, absent, present):
    line = training_lines(train(words))[-1]
    assert not line.keys() & absent
    assert line.keys() >= present


# What flags change, and what they don't


def test_gradient_checkpointing_changes_no_loss(train):
    assert training_lines(train("--gradient_checkpointing")) == training_lines(train())


@pytest.mark.skipif(choose_precision("auto") != "bf16", reason="no instructions for bfloat16 here")
def test_bf16_keeps_master_weights_in_float32(train):
    run_dir = train("--mixed_precision bf16")
    assert {value.dtype for value in load_file(run_dir / "checkpoint-2" / "model.safetensors").values()} == {
        torch.float32
    }
    plain, half = training_lines(train())[-1], training_lines(run_dir)[-1]
    assert half["pixel_loss"] != plain["pixel_loss"]
    assert half["pixel_loss"] == pytest.approx(plain["pixel_loss"], rel=0.02)


def test_only_the_newest_checkpoints_are_kept(train):
    run_dir = train("--max_train_steps 3 --checkpointing_steps 1 --checkpoints_total_limit 2")
    assert sorted(path.name for path in run_dir.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.slow
def test_compiled_training_has_the_same_losses(train):
    plain, compiled = training_lines(train()), training_lines(train("--torch_compile"))
    for line, other in zip(plain, compiled, strict=True):
        assert other == pytest.approx(line, rel=2e-3)


# Flags and recipes


@pytest.mark.parametrize("left", ["half its weights", "no config", "a link to half its weights"])
def test_a_torn_best_is_written_anew(finished_runs, run_script, tmp_path, capsys, left):
    """Also where no better score is to come; it failed at every retry."""
    run = shutil.copytree(finished_runs.autoencoder, tmp_path / "run")
    weights = run / "best" / "diffusion_pytorch_model.safetensors"
    (run / "best" / "notes.txt").write_text("mine")
    if left == "no config":
        (run / "best" / "config.json").unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1000])
    if left.startswith("a link"):
        (run / "best").rename(tmp_path / "best")
        (run / "best").symlink_to(tmp_path / "best")
    words = ["--output_dir", run, "--resume_from_checkpoint", "latest", "--no-final_pictures", "--report_to", "none"]
    run_script(train_autoencoder.main, [*finished_runs.stage1, *words])
    assert "best can't be loaded" in capsys.readouterr().out
    best, last = (FlowerAutoencoderKL.from_pretrained(folder) for folder in (run / "best", run))
    assert all(map(torch.equal, best.parameters(), last.parameters())) and best.config.latents_std is not None
    assert (run / "best" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("killed_at", ["rename", "safetensors"])
def test_an_export_that_breaks_off_leaves_the_one_before_or_none(tmp_path, monkeypatch, killed_at):
    """Never weights of one run with the statistics of another."""
    models = [FlowerAutoencoderKL(block_out_channels=(8, 8), latent_channels=2) for _ in range(2)]
    for number, model in enumerate(models):
        model.set_latents_statistics([float(number)] * 2, [1.0] * 2)
    run, unfinished = tmp_path / "run", tmp_path / "run" / "unfinished-export"
    replace_files(run, unfinished, models[0].save_pretrained, index="config.json")
    calls = []

    def killed(*args, **_):
        calls.append(args)
        if killed_at == "safetensors" or len(calls) == 2:
            raise KeyboardInterrupt
        os.rename(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*(("os.replace",) if killed_at == "rename" else ("safetensors.torch.serialize_file",)), killed)
        replace_files(run, unfinished, models[1].save_pretrained, index="config.json")
    if killed_at == "rename":
        assert not (run / "config.json").exists()
    else:
        found = FlowerAutoencoderKL.from_pretrained(run)
        assert all(map(torch.equal, found.parameters(), models[0].parameters()))
    replace_files(run, unfinished, models[1].save_pretrained, index="config.json")
    found = FlowerAutoencoderKL.from_pretrained(run)
    assert found.config.latents_mean == [1.0, 1.0] and not unfinished.exists()
    assert all(map(torch.equal, found.parameters(), models[1].parameters()))


OWN_FLAGS = """
    --pixel_weight 1; --perceptual_weight 1; --kl_weight 1; --adversarial_weight 1; --classification_weight 1
    --center_weight 1; --repulsion_weight 1; --disc_start 5; --loss_ramp_steps 5; --disc_learning_rate 1e-4
    --vgg_weights vgg16.pth
"""


def test_promised_flags_are_understood(misread_flags):
    assert misread_flags(parse_args, OWN_FLAGS) == []


def test_a_flag_wins_over_the_recipe_and_the_recipe_over_the_default(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "common: {seed: 5, resolution: 32}\nautoencoder: {resolution: 48, kl_weight: 1e-3, adaptive_weight: false}\n"
        "latent_diffusion: {resolution: 96, snr_gamma: 3}"
    )
    args = parse_args(["--config", str(recipe), "--seed", "7"])
    assert (args.seed, args.resolution, args.kl_weight, args.adaptive_weight) == (7, 48, 1e-3, False)
    assert (args.output_dir, args.perceptual_weight) == ("results/autoencoder", 0.5)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_of_the_repository_is_understood(path):
    args = parse_args(["--config", str(path)])
    assert args.model_config is None or (path.parent.parent / args.model_config).is_file()


def test_there_are_recipes():
    assert RECIPES
