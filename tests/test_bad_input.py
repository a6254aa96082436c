"""What a user can get wrong, through both scripts: one clear line, and what is on disk stays as it was.

The parts that raise these lines are tested one by one in `test_data.py`, `test_training.py`, `test_latent_cache.py`
and `test_resume.py`; here is what a user sees of them.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_autoencoder
import train_latent_diffusion
from flower_ldm import FlowerAutoencoderKL, FlowerLDMPipeline
from flower_ldm.errors import InputError
from flower_ldm.runs import read_log

ROOT = Path(__file__).parent.parent
MAINS = {"autoencoder": train_autoencoder.main, "latent_diffusion": train_latent_diffusion.main}
STAGES = tuple(MAINS)
NO_PERCEPTUAL = ["--perceptual_weight", "0"]


@pytest.fixture
def flags(stage_flags, finished_runs) -> dict[str, list[str]]:
    """Of a run of each stage that would succeed."""
    stage1, stage2 = stage_flags
    return {
        "autoencoder": [*stage1, *NO_PERCEPTUAL],
        "latent_diffusion": [*stage2, "--autoencoder", str(finished_runs.autoencoder)],
    }


def on_disk(folder: Path) -> dict[str, bytes | None]:
    """Every folder, and every file with what is in it."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def refusal(flags, run_script, tmp_path):
    """The one line with which a stage refuses these flags, after a look at the disk."""

    def refusal(stage: str, *words: object) -> str:
        before = on_disk(tmp_path)
        with pytest.raises(InputError) as caught:
            run_script(MAINS[stage], [*flags[stage], *words])
        assert on_disk(tmp_path) == before
        line = str(caught.value)
        assert "\n" not in line
        return line

    return refusal


@pytest.fixture
def offline(monkeypatch, tmp_path_factory):
    """Downloads fail at once, and none has been made before."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))


# Data


@pytest.mark.parametrize("stage", STAGES)
def test_missing_data_folder(refusal, tmp_path, stage):
    line = refusal(stage, "--dataset", "imagefolder", "--data_dir", tmp_path / "nowhere")
    assert line == f"--data_dir {tmp_path / 'nowhere'}: there is no such folder"


def test_missing_flowers102_that_cannot_be_downloaded(refusal, tmp_path, offline):
    flags = ["--dataset", "flowers102", "--data_dir", tmp_path / "data", "--classes", "0", "1"]
    line = refusal("autoencoder", *flags)
    assert f"cannot be downloaded to --data_dir {tmp_path / 'data'}" in line
    assert "pass a --data_dir that holds flowers-102/, or --dataset synthetic" in line


def test_empty_data_folder(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    line = refusal("autoencoder", "--dataset", "imagefolder", "--data_dir", tmp_path / "empty")
    assert line == f"--data_dir {tmp_path}/empty: no class folder in it; expected {tmp_path}/empty/<class>/*.jpg"


@pytest.fixture
def folder_flags(image_folder) -> list:
    """A folder with the classes daisy, rose and tulip."""
    return ["--dataset", "imagefolder", "--data_dir", image_folder, "--classes", "daisy", "rose", "tulip"]


def test_class_folder_without_an_image(refusal, image_folder, folder_flags):
    (image_folder / "violet").mkdir()
    (image_folder / "violet" / "notes.txt").write_text("to be photographed")
    line = refusal("autoencoder", *folder_flags, "violet")
    assert line == (
        f"class 'violet' has no training image in {image_folder}: add some, or leave it out with --classes"
    )


def test_truncated_jpeg_is_named_or_skipped(refusal, flags, run_script, image_folder, folder_flags, tmp_path, capsys):
    torn = image_folder / "rose" / "3.jpg"
    Image.effect_noise((64, 64), 50).save(torn)
    torn.write_bytes(torn.read_bytes()[:1000])
    line = refusal("autoencoder", *folder_flags)
    assert str(torn) in line and "cannot be read" in line and "--skip_bad_images" in line

    steps = ["--max_train_steps", "1", "--adversarial_weight", "0"]
    run_script(train_autoencoder.main, [*flags["autoencoder"], *folder_flags, "--skip_bad_images", *steps])
    assert FlowerAutoencoderKL.load_config(tmp_path / "autoencoder")["num_classes"] == 3
    printed = capsys.readouterr().err
    assert "left out 1 of" in printed and str(torn) in printed


@pytest.mark.parametrize("stage", STAGES)
def test_unknown_class_name_with_the_nearest(refusal, folder_flags, stage):
    line = refusal(stage, *folder_flags[:-3], "tulp", "rose")
    assert line == "--classes: unknown label 'tulp': the nearest names are 'tulip'"


def test_resolution_that_cannot_be_halved_often_enough(refusal):
    assert refusal("autoencoder", "--resolution", "36") == "--resolution 36 must be a multiple of 8 for this model"
    line = refusal("latent_diffusion", "--resolution", "36")
    assert line.startswith("--resolution 36 doesn't suit --autoencoder: images of 36 x 36 can't be encoded")
    assert "multiples of 8" in line
    line = refusal("autoencoder", "--resolution", "4", "--adversarial_weight", "0")
    assert line == "--resolution must be at least 8, not 4"


def test_resolution_that_a_stock_autoencoder_would_round(refusal, tmp_path):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **blocks).save_pretrained(tmp_path / "stock")
    line = refusal("latent_diffusion", "--autoencoder", tmp_path / "stock", "--resolution", "33")
    assert line.startswith("--resolution 33 doesn't suit --autoencoder")


# Flags and recipes


@pytest.mark.parametrize("stage", STAGES)
def test_unknown_recipe_key_with_the_nearest(refusal, tmp_path, stage):
    (tmp_path / "recipe.yaml").write_text("common: {train_bach_size: 8}")
    line = refusal(stage, "--config", tmp_path / "recipe.yaml")
    assert line == f"{tmp_path}/recipe.yaml: unknown key 'train_bach_size'; did you mean 'train_batch_size'?"


@pytest.mark.parametrize(
    ("stage", "words", "said"),
    [
        ("autoencoder", "--kl_weight -1", "--kl_weight must not be negative, got -1.0"),
        ("autoencoder", "--center_weight nan", "--center_weight must be a finite number, got nan"),
        ("autoencoder", "--adversarial_weight inf", "--adversarial_weight must be a finite number, got inf"),
        ("autoencoder", "--pixel_weight 0", "--pixel_weight and --perceptual_weight are both 0"),
        ("autoencoder", "--perceptual_every 3", "--perceptual_every 3 must divide --train_batch_size"),
        ("autoencoder", "--perceptual_every 0", "--perceptual_every must be positive, got 0"),
        ("autoencoder", "--adaptive_weight_steps 0", "--adaptive_weight_steps must be positive, got 0"),
        ("autoencoder", "--disc_learning_rate -1", "--disc_learning_rate must be positive, got -1.0"),
        ("autoencoder", "--disc_start -1", "--disc_start must not be negative, got -1"),
        ("autoencoder", "--learning_rate nan", "--learning_rate must be a finite number, got nan"),
        ("autoencoder", "--dataloader_num_workers -1", "--dataloader_num_workers must not be negative, got -1"),
        ("autoencoder", "--max_grad_norm 0", "--max_grad_norm must be positive, got 0"),
        ("autoencoder", "--ema_decay 1", "--ema_decay must be at least 0 and below 1, got 1.0"),
        ("autoencoder", "--checkpoints_total_limit 0", "--checkpoints_total_limit must be positive, got 0"),
        ("autoencoder", "--lr_scheduler sinus", "--lr_scheduler: invalid choice: 'sinus' (choose from"),
        ("autoencoder", "--report_to tensorbord", "--report_to tensorbord is unknown or not installed; there are"),
        ("autoencoder", "--resume_from_checkpoint latest", "holds no checkpoint; leave the flag out"),
        ("autoencoder", "--train_splits train train", "--train_splits: 'train' is given twice"),
        ("autoencoder", "--seed -1", "--seed must be at least 0 and below 2**32, got -1"),
        ("latent_diffusion", "--zero_terminal_snr --prediction_type epsilon", "--prediction_type v_prediction"),
        ("latent_diffusion", "--prediction_type noise", "--prediction_type: invalid choice: 'noise'"),
        ("latent_diffusion", "--beta_schedule cosine", "--beta_schedule: invalid choice: 'cosine'"),
        ("latent_diffusion", "--label_dropout 1", "--label_dropout must be at least 0 and below 1, got 1.0"),
        ("latent_diffusion", "--prediction_type epsilon", "cannot be used with --beta_schedule squaredcos_cap_v2"),
        ("latent_diffusion", "--label_dropout 0", "never trains the null label that guidance needs"),
        ("autoencoder", "--resolution 8", "--resolution must be at least 12 for the discriminator, got 8"),
        ("latent_diffusion", "--snr_gamma -1", "--snr_gamma must not be negative, got -1.0"),
        ("latent_diffusion", "--guidance_scale nan", "--guidance_scale must be a finite number, got nan"),
        ("latent_diffusion", "--lr_scheduler sinus", "--lr_scheduler: invalid choice: 'sinus' (choose from"),
        ("latent_diffusion", "--report_to tensorbord", "--report_to tensorbord is unknown or not installed"),
        ("latent_diffusion", "--resume_from_checkpoint latest", "holds no checkpoint; leave the flag out"),
        ("latent_diffusion", "--pixel_weight 1", "unrecognized arguments: --pixel_weight 1"),
    ],
)
def test_value_that_cannot_be_right(refusal, stage, words, said):
    assert said in refusal(stage, *words.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can")
@pytest.mark.parametrize("stage", STAGES)
def test_fp16_without_a_gpu(refusal, monkeypatch, stage):
    line = "--mixed_precision fp16 needs a GPU; on a CPU use auto or no"
    assert refusal(stage, "--mixed_precision", "fp16") == line
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # as `accelerate launch` sets it
    assert refusal(stage) == line


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX2", reason="only on a CPU without AVX-512")
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_where_the_cpu_would_emulate_it(refusal, monkeypatch, stage):
    assert refusal(stage, "--mixed_precision", "bf16").startswith("--mixed_precision bf16: this CPU has no")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as accelerate_config.yaml sets it
    assert refusal(stage).endswith("use auto or no")


@pytest.mark.parametrize("stage", STAGES)
def test_model_config_of_another_model(refusal, tmp_path, stage):
    (tmp_path / "model.json").write_text(json.dumps({"depth": 12}))
    line = refusal(stage, "--model_config", tmp_path / "model.json")
    assert line.startswith(f"--model_config {tmp_path}/model.json: Flower") and line.endswith("has no 'depth'")


@pytest.mark.parametrize(("stage", "name"), [("autoencoder", "in_channels"), ("latent_diffusion", "out_channels")])
def test_model_config_with_channels_that_images_or_latents_have_not(refusal, earlier_runs, tmp_path, stage, name):
    (tmp_path / "model.json").write_text(json.dumps({name: 1}))
    line = refusal(stage, "--model_config", tmp_path / "model.json", "--overwrite_output_dir")
    assert f"model.json: '{name}' must be" in line and line.endswith("in this run, or be left out")


def test_vgg_that_cannot_be_had(refusal, flags, offline, tmp_path):
    position = flags["autoencoder"].index("--vgg_weights")
    del flags["autoencoder"][position : position + 2]
    line = refusal("autoencoder", "--perceptual_weight", "0.5")
    assert "can't be downloaded" in line and "--vgg_weights PATH" in line and "--perceptual_weight 0" in line
    line = refusal("autoencoder", "--perceptual_weight", "0.5", "--vgg_weights", tmp_path / "vgg.pth")
    assert line.startswith(f"--vgg_weights {tmp_path / 'vgg.pth'} is no file") and "--perceptual_weight 0" in line


# Folders


@pytest.fixture
def earlier_runs(finished_runs, tmp_path) -> Path:
    """Copies of both finished runs where this test's runs would go."""
    shutil.copytree(finished_runs.autoencoder, tmp_path / "autoencoder")
    shutil.copytree(finished_runs.flower_ldm, tmp_path / "flower-ldm")
    return tmp_path


@pytest.mark.parametrize("stage", STAGES)
def test_another_run_is_in_the_output_folder(refusal, earlier_runs, stage):
    line = refusal(stage)
    assert "is not empty" in line
    assert "--resume_from_checkpoint latest" in line and "--overwrite_output_dir" in line


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--dataset imagefolder --data_dir nowhere", "--data_dir nowhere: there is no such folder"),
        ("--resolution 36", "--resolution 36"),
        ("--lr_warmup_steps -1", "--lr_warmup_steps must not be negative"),
    ],
)
def test_a_mistake_costs_no_earlier_run(refusal, earlier_runs, stage, words, said):
    assert said in refusal(stage, "--overwrite_output_dir", *words.split())


def test_the_autoencoder_is_not_replaced_by_what_is_trained_on_it(refusal, earlier_runs):
    words = ["--autoencoder", earlier_runs / "autoencoder", "--output_dir", earlier_runs / "autoencoder"]
    line = refusal("latent_diffusion", *words, "--overwrite_output_dir")
    assert line.startswith(f"--output_dir {earlier_runs / 'autoencoder'} holds --autoencoder")


def test_what_is_no_run_is_not_replaced(refusal, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("flower")
    line = refusal("autoencoder", "--output_dir", tmp_path / "letters", "--overwrite_output_dir")
    assert "is not the folder of a training run" in line


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_folder_that_is_none(refusal, tmp_path, stage):
    (tmp_path / "checkpoint-5").mkdir()
    line = refusal(stage, "--resume_from_checkpoint", tmp_path / "checkpoint-6")
    assert line == f"--resume_from_checkpoint {tmp_path}/checkpoint-6 is no checkpoint folder"
    line = refusal(stage, "--resume_from_checkpoint", tmp_path / "checkpoint-5")
    assert line.endswith("checkpoint-5 is no valid checkpoint: it has no manifest.json, which is written last")


@pytest.mark.parametrize("stage", STAGES)
def test_a_torn_checkpoint(refusal, flags, finished_runs, earlier_runs, stage):
    flags["autoencoder"], flags["latent_diffusion"] = finished_runs.stage1, finished_runs.stage2
    output_dir = earlier_runs / {"autoencoder": "autoencoder", "latent_diffusion": "flower-ldm"}[stage]
    weights = output_dir / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.rmtree(output_dir / "checkpoint-4")
    line = refusal(stage, "--output_dir", output_dir, "--resume_from_checkpoint", "latest")
    reason = "its 'model.safetensors' has changed since it was written"
    assert line == (
        f"--resume_from_checkpoint latest: {output_dir} holds no valid checkpoint (checkpoint-6, {reason})"
    )
    line = refusal(stage, "--output_dir", output_dir, "--resume_from_checkpoint", weights.parent)
    assert line == f"--resume_from_checkpoint {weights.parent} is no valid checkpoint: {reason}"


# The autoencoder of stage 2


def unfinished(folder: Path) -> Path:
    """A run of stage 1 that was stopped before its end."""
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (folder / "autoencoder" / name).unlink()
    return folder / "autoencoder"


def not_measured(folder: Path) -> Path:
    vae = FlowerAutoencoderKL.from_pretrained(folder / "autoencoder")
    vae.register_to_config(latents_mean=None, latents_std=None)
    vae.save_pretrained(folder / "autoencoder" / "best")
    return folder / "autoencoder" / "best"


def torn(folder: Path) -> Path:
    weights = folder / "autoencoder" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder / "autoencoder"


def lacks_a_weight(folder: Path) -> Path:
    file = folder / "autoencoder" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights[min(weights)]
    save_file(weights, file)
    return folder / "autoencoder"


def with_statistics(**statistics):
    def make(folder: Path) -> Path:
        file = folder / "autoencoder" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | statistics))
        return folder / "autoencoder"

    return make


def text_file(folder: Path) -> Path:
    (folder / "autoencoder.txt").write_text("dear flower")
    return folder / "autoencoder.txt"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder / "nowhere", "can't be loaded: give train_autoencoder.py's output folder or a Hub id"),
        (text_file, "can't be loaded: give train_autoencoder.py's output folder or a Hub id"),
        (lambda folder: folder / "autoencoder" / "config.json", "can't be loaded: give train_autoencoder.py's"),
        (lambda folder: folder / "flower-ldm", "can't be loaded: give train_autoencoder.py's output folder"),
        (lambda folder: folder / "flower-ldm" / "unet", "is a FlowerUNet2DModel, not a FlowerAutoencoderKL"),
        (unfinished, "can't be loaded: give train_autoencoder.py's output folder"),
        (not_measured, "has no latents_mean and latents_std: its training has not ended"),
        (torn, "can't be loaded: give train_autoencoder.py's output folder"),
        (lacks_a_weight, "the weights don't fit the config of FlowerAutoencoderKL: 1 are missing"),
        (with_statistics(latents_std=None), "latents_mean and latents_std must have 4 values each"),
        (with_statistics(latents_std=[0, 1, 1, 1]), "latents_std must hold numbers above 0, got 0"),
        (with_statistics(latents_std=[float("nan")] * 4), "latents_mean and latents_std must hold finite numbers"),
        (with_statistics(layers_per_block=10**9), "layers_per_block must be a whole number from 0 to 100"),
    ],
)
def test_autoencoder_path_that_is_none(refusal, earlier_runs, make, said):
    path = make(earlier_runs)
    line = refusal("latent_diffusion", "--autoencoder", path, "--output_dir", earlier_runs / "new")
    assert line.startswith(f"--autoencoder {path} ") and said in line


def test_latents_of_another_autoencoder_are_encoded_again(flags, run_script, finished_runs, tmp_path, capsys):
    """A message, and not a refusal: the cache is ours to rebuild."""
    cache_dir, other = tmp_path / "cache", tmp_path / "other"
    words = [*flags["latent_diffusion"], "--latent_cache_dir", cache_dir, "--max_train_steps", "1"]
    run_script(train_latent_diffusion.main, words)
    keys = {path: key_of(path) for path in cache_dir.iterdir()}
    capsys.readouterr()

    vae = FlowerAutoencoderKL.from_pretrained(finished_runs.autoencoder)
    with torch.no_grad():
        vae.encoder.conv_in.weight *= 1.1
    vae.save_pretrained(other)
    run_script(train_latent_diffusion.main, [*words, "--autoencoder", other, "--output_dir", tmp_path / "second"])
    printed = capsys.readouterr().out
    for path, key in keys.items():
        reason = "belongs to another model, other images or another size: encoding the images again"
        assert f"latent cache {path} {reason}" in printed
        assert key_of(path) != key
    assert len(keys) == 2


def key_of(path: Path) -> str:
    with safe_open(path, "pt") as file:
        return file.metadata()["key"]


# Losses that are not finite


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_ends_the_run(flags, run_script, tmp_path, stage):
    """The first update has a rate of 0, the second one of 1e30; then there is nothing left to save."""
    steps = "--max_train_steps 20 --checkpointing_steps 1 --logging_steps 20 --validation_steps 20"
    words = [*flags[stage], *steps.split(), "--learning_rate", "1e30", "--lr_warmup_steps", "1"]
    with pytest.raises(InputError, match="is not finite at step [2-9]: .*--learning_rate") as caught:
        run_script(MAINS[stage], words)
    term = str(caught.value).split()[0]
    assert term.endswith("loss") or term == "grad_norm"

    output_dir = tmp_path / {"autoencoder": "autoencoder", "latent_diffusion": "flower-ldm"}[stage]
    assert not (output_dir / "best").exists() and not (output_dir / "model_index.json").exists()
    for path in output_dir.glob("checkpoint-*/model*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()), path
    good = ["--resume_from_checkpoint", output_dir / "checkpoint-1", "--max_train_steps", "1"]
    run_script(MAINS[stage], [*words, *good, "--output_dir", tmp_path / "good"])
    for line in read_log(tmp_path / "good" / "log.jsonl"):
        assert all(torch.tensor(value).isfinite() for value in line.values())
    if stage == "latent_diffusion":
        FlowerLDMPipeline.from_pretrained(tmp_path / "good")


def test_weights_that_are_not_finite_are_never_the_best(flags, run_script, tmp_path):
    """Validation between two log lines looks at the losses first."""
    words = "--learning_rate 1e30 --lr_warmup_steps 0 --max_train_steps 9 --logging_steps 9 --validation_steps 8"
    with pytest.raises(InputError, match="^(grad_norm|(?!val_).*_loss) is not finite at step"):
        run_script(train_autoencoder.main, [*flags["autoencoder"], *words.split(), "--checkpointing_steps", "9"])
    assert not (tmp_path / "autoencoder" / "best").exists()


# As a process of its own


def printed_by(command: list[str], folder: Path) -> tuple[int, list[str]]:
    """Exit code and standard error's lines of a run that must fail; it writes nothing."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["--dataset", "imagefolder", "--data_dir", "nowhere", "--report_to", "none", *NO_PERCEPTUAL]
    process = subprocess.run(
        [*command, str(ROOT / "train_autoencoder.py"), *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert list(folder.iterdir()) == []
    return process.returncode, process.stderr.splitlines()


def test_python_prints_one_line_and_exits_with_2(tmp_path):
    code, lines = printed_by([sys.executable], tmp_path)
    assert code == 2
    assert [line for line in lines if line.startswith("error:")] == [
        "error: --data_dir nowhere: there is no such folder"
    ]
    assert not any("Traceback" in line for line in lines)


@pytest.mark.slow
def test_accelerate_launch_trains_with_the_file_that_is_here(stage_flags, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_config.yaml"]
    subprocess.run([*launch, "--mixed_precision", "no", ROOT / "train_autoencoder.py", *stage_flags[0]], check=True)
    assert (tmp_path / "autoencoder" / "report.html").is_file()


@pytest.mark.slow
def test_accelerate_launch_prints_the_line_too(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    code, lines = printed_by(launch, tmp_path)
    assert code != 0
    assert "error: --data_dir nowhere: there is no such folder" in lines
