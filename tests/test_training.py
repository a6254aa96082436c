"""The parts of `flower_ldm.training` that need no training: flags and recipes, models from a file, the output folder,
checkpoints by name, the clock, and the loss log.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator

from flower_ldm import training
from flower_ldm.errors import InputError
from flower_ldm.models.autoencoder_flower import FlowerAutoencoderKL
from flower_ldm.training import Clock, LossLog, Progress


def parse(*words: str) -> argparse.Namespace:
    """As a script does that has one flag of its own."""
    parser = training.common_parser("a script")
    parser.set_defaults(output_dir="results/autoencoder")
    parser.add_argument("--pixel_weight", type=float, default=1.0)
    return training.parse_arguments(parser, "autoencoder", list(words))


@pytest.fixture
def recipe(tmp_path: Path):
    """Writes a recipe and gives the words that name it."""

    def write(text: str | bytes) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--config", str(path)]

    return write


def complaint(*words: str) -> str:
    """The one line with which these words are refused."""
    with pytest.raises(InputError) as caught:
        parse(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Flags and recipes


def test_a_flag_wins_over_the_recipe_and_the_recipe_over_the_default(recipe):
    config = recipe("common: {seed: 5, resolution: 32, learning_rate: 1e-4}\nautoencoder: {resolution: 48}")
    args = parse(*config, "--seed", "7")
    assert (args.seed, args.resolution, args.learning_rate) == (7, 48, 1e-4)
    assert (args.train_batch_size, args.output_dir, args.pixel_weight) == (64, "results/autoencoder", 1.0)


@pytest.mark.parametrize("flag", [["--num_train_epochs", "3"], ["--total_epochs=3"]])
def test_epochs_on_the_command_line_win_over_a_recipes_steps(recipe, flag):
    config = recipe("autoencoder: {max_train_steps: 100}")
    assert parse(*config).max_train_steps == 100
    args = parse(*config, *flag)
    assert (args.max_train_steps, args.num_train_epochs) == (None, 3)
    assert parse(*config, *flag, "--max_train_steps", "7").max_train_steps == 7


def test_a_script_reads_its_own_section(recipe):
    config = recipe("autoencoder: {pixel_weight: 2}\nlatent_diffusion: {train_batch_size: 128, snr_gamma: 5}")
    args = parse(*config)
    assert (args.pixel_weight, args.train_batch_size) == (2.0, 64)


def test_lists_and_other_spellings(recipe):
    config = recipe(
        "common:\n  classes: [3, 17, sword lily]\n  train_splits:\n  - train\n  - test\n"
        "  total_epochs: 12\n  visualize_every: 5\n  val_splits: null\n"
    )
    args = parse(*config)
    assert args.classes == ["3", "17", "sword lily"]
    assert args.train_splits == ["train", "test"]
    assert (args.num_train_epochs, args.validation_steps, args.val_splits) == (12, 5, None)
    assert parse(*config, "--classes", "1").classes == ["1"]


def test_true_and_false(recipe):
    config = recipe("common: {skip_bad_images: true, torch_compile: false, gradient_checkpointing: true}")
    args = parse(*config, "--no-gradient_checkpointing")
    assert (args.skip_bad_images, args.torch_compile, args.gradient_checkpointing) == (True, False, False)


def test_the_no_of_mixed_precision_needs_no_quotes(recipe):
    assert parse(*recipe("common: {mixed_precision: no}")).mixed_precision == "no"
    assert parse(*recipe("common: {mixed_precision: bf16}")).mixed_precision == "bf16"


def test_an_empty_recipe_changes_nothing(recipe):
    defaults = vars(parse())
    for text in ("", "common:\n", "# nothing yet\n"):
        words = recipe(text)
        assert vars(parse(*words)) == {**defaults, "config": words[1]}


def test_unknown_key_with_the_nearest(recipe):
    line = complaint(*recipe("common: {train_bach_size: 8}"))
    assert "recipe.yaml" in line and "'train_bach_size'" in line and "did you mean 'train_batch_size'?" in line
    assert "'zzz'" in complaint(*recipe("autoencoder: {zzz: 8}"))
    assert "'snr_gamma'" in complaint(*recipe("common: {snr_gamma: 5}"))  # it's the other script's


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stage1: {seed: 1}", "unknown section 'stage1'"),
        ("common: {config: other.yaml}", "unknown key 'config'"),
        ("seed: 1", "must hold sections common, autoencoder, latent_diffusion"),
        ("- common", "must hold sections"),
        ("common: {seed: [", "is not YAML"),
        (b"common: \xff\xfe", "is not YAML"),
        ("common: {seed: soon}", "--seed"),
        ("common: {seed: yes}", "--seed"),
        ("common: {mixed_precision: fp8}", "--mixed_precision"),
        ("common: {resolution: 0}", "--resolution must be positive, got 0"),
    ],
)
def test_what_a_recipe_cannot_be(recipe, text, said):
    assert said in complaint(*recipe(text))


def test_missing_recipe():
    assert complaint("--config", "nowhere.yaml") == "--config nowhere.yaml is no file"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resolutoin", "64"], "--resolutoin"),
        (["--resol", "64"], "--resol"),  # no abbreviations: they would change meaning when a flag is added
        (["--learning_rate=-1"], "--learning_rate must be positive, got -1.0"),
        (["--max_train_steps=-1"], "--max_train_steps must not be negative"),
        (["--train_splits"], "--train_splits"),
    ],
)
def test_what_flags_cannot_be(words, said):
    assert said in complaint(*words)


# Models from a file

TINY = {"latent_channels": 4, "block_out_channels": [8, 8]}


@pytest.fixture
def build(tmp_path: Path):
    def build(config, **of_this_run):
        path = tmp_path / "model.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return training.build_model(FlowerAutoencoderKL, str(path), **of_this_run)

    return build


def test_model_from_a_file_and_the_run(build):
    model = build({**TINY, "sample_size": 16}, sample_size=16, num_classes=3)
    assert (model.config.latent_channels, model.config.sample_size, model.config.num_classes) == (4, 16, 3)


def test_a_saved_models_own_config_will_do(build, tmp_path):
    saved = build(TINY, num_classes=3)
    saved.set_latents_statistics([0.5] * 4, [2.0] * 4)
    saved.save_pretrained(tmp_path / "saved")
    model = build((tmp_path / "saved" / "config.json").read_text(), num_classes=3)
    assert model.config.latent_channels == 4
    assert model.config.latents_mean is None  # of other latents


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"latent_chanels": 4}, "FlowerAutoencoderKL has no 'latent_chanels'"),
        ({"num_classes": 5}, "'num_classes' must be 3 in this run"),
        ({"block_out_channels": [4]}, "can't be built: block_out_channels"),
        ({"block_out_channels": "wide"}, "can't be built"),
        ({"block_out_channels": []}, "can't be built"),
        ("{", "can't be read"),
        ("[1]", "must be one JSON object"),
    ],
)
def test_what_a_model_cannot_be(build, config, said):
    with pytest.raises(InputError) as caught:
        build(config, num_classes=3)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_model_config_that_is_not_there():
    with pytest.raises(InputError, match="--model_config nowhere.json can't be read"):
        training.build_model(FlowerAutoencoderKL, "nowhere.json")


# The output folder


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    return tmp_path / "results" / "autoencoder"


def claim(output_dir: Path, *words: str) -> None:
    args = parse(f"--output_dir={output_dir}", "--report_to=none", *words)
    training.check_output_dir(args)
    training.claim_output_dir(Accelerator(cpu=True), args)


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_another_run_has_filled_meanwhile_is_left_alone(output_dir):
    args = parse(f"--output_dir={output_dir}", "--report_to=none")
    training.check_output_dir(args)
    (output_dir / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(InputError, match="is not empty"):
        training.claim_output_dir(Accelerator(cpu=True), args)
    assert [path.name for path in output_dir.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("name", ["data_dir", "vgg_weights", "config", "model_config"])
def test_what_a_run_reads_may_not_lie_where_it_writes(output_dir, name):
    output_dir.mkdir(parents=True)
    (output_dir / "args.yaml").write_text("{}")
    (output_dir / "needed").write_text("{}")
    args = parse(f"--output_dir={output_dir}", "--overwrite_output_dir")
    setattr(args, name, str(output_dir / "needed"))
    with pytest.raises(InputError, match=f"holds --{name} {output_dir}/needed: name another folder"):
        training.check_output_dir(args)


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


@pytest.mark.parametrize("name", ["letters.txt", "sub/letters.txt"])
def test_what_is_no_run_is_never_replaced(output_dir, name):
    (output_dir / name).parent.mkdir(parents=True)
    (output_dir / name).write_text("dear flower")
    with pytest.raises(InputError, match="no run of ours"):
        claim(output_dir, "--overwrite_output_dir")
    assert on_disk(output_dir) == {name: b"dear flower"}


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
        training.check_output_dir(parse(f"--output_dir={output_dir}"))


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
    assert [path.name for path in training.list_checkpoints(output_dir)] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
    ]


def find(output_dir: Path, checkpoint: str | Path, *words: str) -> Path | None:
    return training.find_checkpoint(
        parse(f"--output_dir={output_dir}", f"--resume_from_checkpoint={checkpoint}", *words)
    )


def test_find_checkpoint(output_dir, earlier_run, tmp_path):
    assert training.find_checkpoint(parse(f"--output_dir={output_dir}")) is None
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
        training.resume(accelerator, parse(), checkpoint, training.Progress({}), None, None)


# Time


def test_clock_adds_up_and_can_pause():
    progress = Progress({})
    progress.seconds = 100.0  # from before a resume
    clock = Clock(progress)
    time.sleep(0.02)
    before = clock.read()
    assert 100.02 <= before < 100.5
    with clock.paused():
        paused_at = progress.seconds
        time.sleep(0.3)
    assert clock.read() - paused_at < 0.2
    assert progress.seconds == clock.progress.seconds >= before


def test_progress_is_what_a_checkpoint_keeps():
    progress, resumed = Progress({"data": "abc"}), Progress({"data": "abc"})
    progress.global_step, progress.seconds, progress.best_score = 7, 1.5, 0.25
    resumed.load_state_dict(progress.state_dict())
    assert vars(resumed) == {"identity": {"data": "abc"}, "global_step": 7, "seconds": 1.5, "best_score": 0.25}


def test_progress_of_another_run_is_refused():
    with pytest.raises(InputError, match="its data was abc, this run's is xyz"):
        Progress({"data": "xyz"}).load_state_dict(Progress({"data": "abc"}).state_dict())


# The moving average


def test_ema_weights_are_lent_and_given_back():
    model = torch.nn.Linear(2, 2).train()
    ema = training.build_ema(model, decay=0.9)
    averaged = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    trained = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(KeyboardInterrupt), training.ema_weights(ema, model):
        assert not model.training
        assert all(map(torch.equal, model.parameters(), averaged))
        raise KeyboardInterrupt
    assert model.training
    assert all(map(torch.equal, model.parameters(), trained))


# The log


@pytest.fixture
def log(tmp_path: Path) -> LossLog:
    return LossLog(Accelerator(cpu=True), tmp_path / "log.jsonl", first_step=0)


def test_log_line_is_the_means_since_the_last(log):
    for step, value in ((1, 1.0), (2, 3.0)):
        log.update(step, {"pixel_loss": torch.tensor(value), "kl_loss": torch.tensor(2 * value)})
    log.update(2, {"grad_norm": torch.tensor([5.0], requires_grad=True)})  # measured half as often
    line = log.write(2, learning_rate=0.5)
    assert line["steps_per_second"] > 0
    assert {**line, "steps_per_second": 0} == {
        "pixel_loss": 2.0,
        "kl_loss": 4.0,
        "grad_norm": 5.0,
        "learning_rate": 0.5,
        "steps_per_second": 0,
    }
    log.update(3, {"pixel_loss": torch.tensor(7.0)})
    next_line = log.write(3)
    assert next_line["pixel_loss"] == 7.0
    assert training.read_log(log.path) == [{"step": 2, **line}, {"step": 3, **next_line}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_named_with_its_step(log, value):
    fine, bad = torch.tensor(1.0), torch.tensor(value)
    log.update(5, {"pixel_loss": fine, "center_loss": fine})
    log.check()
    log.update(6, {"pixel_loss": fine, "center_loss": fine})
    log.update(7, {"pixel_loss": fine, "center_loss": bad})
    log.update(8, {"pixel_loss": bad, "center_loss": bad})  # what follows from it is not to blame
    log.update(8, {"discriminator_loss": bad})
    for check in (log.check, lambda: log.write(8)):
        with pytest.raises(InputError, match="^center_loss is not finite at step 7: .*--learning_rate"):
            check()
    assert not log.path.exists()


def test_held_out_values_stand_behind_the_training_losses_of_their_step(log):
    for step in (1, 2):
        log.update(step, {"loss": torch.tensor(float(step))})
        log.write(step)
        log.append(step, {"val_loss": 10.0 * step})
    lines = training.read_log(log.path)
    assert [line["step"] for line in lines] == [1, 1, 2, 2]
    assert [line.get("loss") for line in lines] == [1.0, None, 2.0, None]
    assert [line.get("val_loss") for line in lines] == [None, 10.0, None, 20.0]


def test_of_a_step_logged_twice_the_later_line_counts(tmp_path):
    path = tmp_path / "log.jsonl"
    written = [(1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25), (3, 0.35)]  # resumed at step 1
    path.write_text("".join(json.dumps({"step": s, "loss": v, "steps_per_second": 1.0}) + "\n" for s, v in written))
    assert [(line["step"], line["loss"]) for line in training.read_log(path)] == [(1, 0.1), (2, 0.25), (3, 0.35)]
