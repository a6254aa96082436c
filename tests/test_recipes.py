"""Flags and recipes: which wins, what is read from YAML, and what is refused in one line."""

import argparse
from pathlib import Path

import pytest

from flower_ldm import recipes
from flower_ldm.errors import InputError


def parse(*words: str) -> argparse.Namespace:
    """As a script does that has one flag of its own."""
    parser = recipes.common_parser("a script")
    parser.set_defaults(output_dir="results/autoencoder")
    parser.add_argument("--pixel_weight", type=float, default=1.0)
    return recipes.parse_arguments(parser, "autoencoder", list(words))


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
