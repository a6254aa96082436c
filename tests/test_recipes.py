"""Flags and recipes: which wins, what is read from YAML, and what is refused in one line."""

import ast
import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import parse

import app
import train_autoencoder
import train_latent_diffusion
from flower_ldm import evaluation, hub, recipes, report, sample, visualization
from flower_ldm.data import DataOptions
from flower_ldm.errors import InputError
from flower_ldm.files import path_or_hub_id, path_text
from flower_ldm.flags import Flag, FlagParser
from flower_ldm.recipes import fold_command, training_command


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
    assert complaint("--config", "nowhere.yaml") == "--config nowhere.yaml is not a file"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resolutoin", "64"], "--resolutoin"),
        (["--resol", "64"], "--resol"),  # no abbreviations: they would change meaning when a flag is added
        (["--learning_rate=-1"], "--learning_rate must be positive, got -1.0"),
        (["--max_train_steps=-1"], "--max_train_steps must not be negative"),
        (["--max_train_steps=2147483648"], "--max_train_steps must be below 2**31, got 2147483648"),
        ([f"--train_batch_size={10**30}"], "--train_batch_size must be below 2**31"),
        (["--train_splits"], "--train_splits"),
    ],
)
def test_what_flags_cannot_be(words, said):
    assert said in complaint(*words)


# Traits


def test_a_flag_without_traits_is_private_and_may_not_change():
    parser = FlagParser()
    parser.flag("--made_up", type=int)
    assert parser.flags == {"made_up": Flag(kind="a number")}
    for flag in (parser.flags["made_up"], recipes.flag_of("made_up")):
        assert flag.public is None and not flag.may_change
    assert recipes.public_flags({"made_up": 1, "seed": 2, "val_splits": None}) == {"seed": 2, "val_splits": None}


@pytest.mark.parametrize("stage", recipes.STAGES)
def test_every_flag_is_declared_with_traits(stage):
    parser = recipes.training_parser(stage)
    assert vars(parser.parse_args([])).keys() == parser.flags.keys()


@pytest.mark.parametrize("stage", recipes.STAGES)
def test_every_flag_that_takes_a_path_stays_private(stage):
    parser = recipes.training_parser(stage)
    paths = {action.dest for action in parser._actions if action.type in (path_text, path_or_hub_id)}
    assert paths > {"output_dir", "config", "data_dir"}
    assert {name for name in paths if parser.flags[name].public is not None} == {"dataset"}
    assert parser.flags["dataset"].public("/srv/photos") == "imagefolder"


@pytest.mark.parametrize("stage", recipes.STAGES)
def test_every_number_must_be_finite_and_within_its_bounds(stage):
    parser = recipes.training_parser(stage)
    numbers = {action.dest: action.type for action in parser._actions if action.type in (int, float)}
    assert len(numbers) >= 20
    for name, kind in numbers.items():
        words = ["nan", "inf", "-inf"] if kind is float else []
        words += ["-1"] if parser.flags[name].bounds else []
        assert words, name
        for word in words:
            with pytest.raises(InputError, match=f"^--{name} must .*, got {float(word) if kind is float else word}$"):
                parser.parse_args([f"--{name}={word}"])


def test_what_is_not_repeated_in_the_command_that_trains_again():
    history = {name for name, flag in recipes.training_flags().items() if not flag.in_command}
    assert history == {"config", "resume_from_checkpoint", "overwrite_output_dir"}


# One owner

ROOT = Path(__file__).parent.parent
PRODUCT = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8"))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("flower_ldm/**/*.py"), *ROOT.glob("pipelines/*.py")]
}


def declarations(file: str) -> list[str]:
    """The spellings of all flags that a file declares, in order."""
    calls = [node for node in ast.walk(PRODUCT[file]) if isinstance(node, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func).rpartition(".")[2] in ("flag", "add_argument")]
    words = [argument.value for call in calls for argument in call.args if isinstance(argument, ast.Constant)]
    return [word.removeprefix("--") for word in words if str(word).startswith("--")]


def test_each_training_flag_is_declared_in_one_place():
    """Other commands have flags of the same name, such as `--seed`, but those of the data."""
    commands = {"evaluation", "visualization", "sample", "hub", "report"}
    own = [word for file in PRODUCT if Path(file).stem not in {*commands, "app"} for word in declarations(file)]
    spellings = [option.removeprefix("--") for stage in recipes.STAGES
                 for option in recipes.training_parser(stage)._option_string_actions]  # fmt: skip
    assert sorted(own) == sorted({word for word in spellings if word not in ("help", "-h") and word[:3] != "no-"})
    of_data = {field.name for field in dataclasses.fields(DataOptions)}
    for command in ("evaluation", "visualization"):
        assert not of_data & set(declarations(f"flower_ldm/{command}.py"))


def collections_of_words(tree: ast.AST) -> Iterator[list[str]]:
    """Sets, lists, tuples, keys of dicts, and texts of several words."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Set, ast.List, ast.Tuple)):
            yield [getattr(item, "value", None) for item in node.elts]
        elif isinstance(node, ast.Dict):
            yield [getattr(item, "value", None) for item in node.keys]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.split()


def test_no_other_list_knows_training_flags_by_name():
    """Their traits are asked for. What lists keys of `metrics.json` or of losses has other words too."""
    flags = recipes.training_flags().keys()
    assert list(collections_of_words(ast.parse("{'seed', 'classes'}"))) == [["seed", "classes"], ["seed"], ["classes"]]
    found = [
        (file, words)
        for file, tree in PRODUCT.items()
        for words in collections_of_words(tree)
        if len(words) > 1 and flags >= set(words)
    ]
    assert found == []


# What a recipe spells


@pytest.mark.parametrize("name", ["001", "010", "1.10", "1_0", "0x1F", "yes", "No", "null", "1:30", "2024-06-01"])
def test_text_keeps_its_spelling_without_quotes(recipe, name):
    """YAML 1.1 makes 8 of 010, 1.1 of 1.10, True of yes and 90 of 1:30."""
    assert parse(*recipe(f"common: {{classes: [{name}, '{name}', rose]}}")).classes == [name, name, "rose"]


@pytest.mark.parametrize("word", ["true", "True", "yes", "ON", "'yes'"])
def test_a_switch_takes_all_words_for_true(recipe, word):
    assert parse(*recipe(f"common: {{skip_bad_images: {word}}}")).skip_bad_images is True
    assert complaint(*recipe("common: {skip_bad_images: 1}")).endswith(
        "line 1: 'skip_bad_images' must be true or false"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("common: {seed: 1, resolution: 8, seed: 2}", "'seed' is written twice, also in line 1"),
        ("common: {seed: 1}\nautoencoder: {}\ncommon: {seed: 2}", "'common' is written twice, also in line 3"),
        ("common: {num_train_epochs: 1, total_epochs: 2}", "'num_train_epochs' and 'total_epochs' are one flag"),
        ("latent_diffusion: {snr_gamma: 1, snr_gamma: 2}", "'snr_gamma' is written twice"),
        ("latent_diffusion: [snr_gamma]", "section 'latent_diffusion' must hold keys and values"),
        ("common: {5: 1}", "unknown key '5'"),
        ("5: {seed: 1}", "unknown section '5'"),
        ("common: {[seed]: 1}", "unknown key '...'"),
        ("common: {seed: {value: 1}}", "line 1: 'seed' must be one value, none of them nested"),
        ("common:\n  classes: [[rose]]", "line 2: 'classes' must be values, none of them nested"),
        ("common: {seed: [1, 2]}", "'seed' takes one value, not a list"),
        ("common: {classes: [rose, --overwrite_output_dir]}", "'classes' can't hold '--overwrite_output_dir'"),
        ("common: {classes: []}", "--classes: expected at least one argument"),
        ("common: {seed: !!int 5}", "'seed' has the tag tag:yaml.org,2002:int"),
        ("common: {no-skip_bad_images: true}", "unknown key 'no-skip_bad_images'"),
        ("common: {seed: 0o17}", "--seed: invalid int value: '0o17'"),
        ("common: {seed: 2024-99-99}", "--seed: invalid int value: '2024-99-99'"),
        ("a: " + "[" * 5000, "is not YAML"),
    ],
)
def test_what_a_recipe_cannot_mean(recipe, text, said):
    assert said in complaint(*recipe(text))


def test_a_section_may_unset_what_is_common_by_either_spelling(recipe):
    config = recipe(
        "common: {max_train_steps: 5, num_train_epochs: 7}\nautoencoder: {max_train_steps: , total_epochs: 3}"
    )
    args = parse(*config)
    assert (args.max_train_steps, args.num_train_epochs) == (None, 3)


def test_an_alias_is_read_and_a_mark_of_the_encoding_too(recipe):
    config = recipe("common: &both {seed: &five 5, resolution: *five}\nlatent_diffusion: *both\n".encode("utf-16"))
    args = parse(*config)
    assert (args.seed, args.resolution) == (5, 5)


def test_args_yaml_gives_back_the_names_it_was_given():
    names = ["001", "1.10", "yes", "No", "null", "~", "1:30", "=", "a: b", "rose "]
    assert yaml.safe_load(yaml.safe_dump({"classes": names}))["classes"] == names


# The command that trains a run again


SCRIPTS = {"train_autoencoder.py": train_autoencoder, "train_latent_diffusion.py": train_latent_diffusion}


def typed_again(args: dict, script: str) -> dict:
    """The flags that a script reads from the command that a page shows for these."""
    words = shlex.split(training_command(args, script).replace("\\\n", " "))
    assert words[:2] == ["python", script]
    return vars(SCRIPTS[script].parse_args(words[2:]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_command_gives_the_same_flags(script, finished_runs):
    defaults = vars(SCRIPTS[script].parse_args([]))
    assert typed_again(defaults, script) == defaults
    for other in SCRIPTS.values():  # what one leaves out by default, the other may not
        given = {name: value for name, value in vars(other.parse_args([])).items() if name in defaults}
        assert typed_again(defaults | given, script) == defaults | given
    changed = {"data_dir": "my flowers; $HOME", "classes": ["3", "bird's nest"], "max_grad_norm": 0.25,
               "dataset": "-x", "skip_bad_images": True, "train_splits": ["train", "test"],
               "mixed_precision": "no"}  # fmt: skip
    assert typed_again(defaults | changed, script) == defaults | changed
    run = finished_runs.autoencoder if script == "train_autoencoder.py" else finished_runs.flower_ldm
    args = yaml.safe_load((run / "args.yaml").read_text())
    assert typed_again(args, script) == args


def test_command_of_a_recipe_needs_no_recipe_and_resumes_nothing():
    args = vars(
        train_autoencoder.parse_args(["--config", "configs/quickstart.yaml", "--resume_from_checkpoint", "latest"])
    )
    again = typed_again(args, "train_autoencoder.py")
    assert again == args | {"config": None, "resume_from_checkpoint": None}
    assert again["model_config"] == "configs/quickstart_autoencoder.json"


def test_folded_command_is_the_same_command():
    words = ["python", "-m", "flower_ldm.evaluation", "--data_dir", "it's here", *["--labels", "a", "b c"] * 9]
    for folded in (fold_command(words), fold_command(shlex.join(words))):
        assert shlex.split(folded.replace("\\\n", " ")) == words
        assert max(map(len, folded.splitlines())) < 100
    assert fold_command("python 'torn") == "python 'torn"


# Paths


def test_a_recipes_paths_know_the_home_folder(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = recipe("common: {data_dir: ~/photos, model_config: ~/model.json, output_dir: '~/out'}")
    args = parse(*config)
    home = f"{tmp_path}/home"
    assert (args.data_dir, args.model_config, args.output_dir) == (
        f"{home}/photos",
        f"{home}/model.json",
        f"{home}/out",
    )
    assert parse(*recipe("common: {model_config: model.json}")).model_config == f"{tmp_path}/model.json"
    assert parse(*recipe("common: {data_dir: ~}")).data_dir is None  # YAML's word for nothing


PATH_FLAGS = {
    train_autoencoder.parse_args: "config data_dir dataset output_dir model_config resume_from_checkpoint vgg_weights",
    train_latent_diffusion.parse_args: "autoencoder latent_cache_dir checkpoint_path",
    evaluation.parse_args: "pipeline output cache_dir dataset data_dir features vgg_weights",
    sample.parse_args: "pipeline guide image mask output",
    visualization.parse_args: "pipeline autoencoder dataset data_dir output",
    app.parse_args: "pipeline space",
}


@pytest.mark.parametrize(
    ("parse_args", "flag"),
    [(parse_args, flag) for parse_args, flags in PATH_FLAGS.items() for flag in flags.split()],
)
def test_every_path_flag_knows_the_home_folder(monkeypatch, tmp_path, parse_args, flag):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").write_text("")  # of --config
    words = [f"--{flag}=~/x"]
    if flag not in ("pipeline", "autoencoder") and "pipeline" in PATH_FLAGS[parse_args].split():
        words += ["--pipeline", "run"]
    args = parse_args(words)
    assert str(getattr(args, {"checkpoint_path": "resume_from_checkpoint"}.get(flag, flag))) == f"{tmp_path}/x"


@pytest.mark.parametrize("command", [hub.main, report.main])
def test_the_folder_of_a_run_may_be_at_home(monkeypatch, tmp_path, command):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "a token")
    with pytest.raises(InputError, match=f"{tmp_path}/run"):
        command(["~/run"])


def test_paths_that_cannot_be_meant():
    assert complaint("--output_dir=").endswith("'' is not a path: name one, or leave the flag out")
    line = complaint("--data_dir", "~nobody-of-this-name/x")
    assert line.endswith("there is no such home folder; a file of this name is ./~nobody-of-this-name/x")
    assert "can't be accessed: File name too long" in complaint("--resume_from_checkpoint", "x" * 300)


def test_a_path_of_half_a_character_cannot_be_meant(recipe):
    assert "can't be accessed: no file can have such a name" in complaint(*recipe(r'common: {output_dir: "\ud800"}'))


@pytest.mark.parametrize("text", ["[" * 500_000, "common: {classes: " + "[" * 500_000, "- " * 100_000, "{a: " * 5000])
def test_what_is_nested_without_end_is_refused_at_once(recipe, text):
    """PyYAML would take hours over the first two; a test that waits for it is killed."""
    assert "nested too deep" in complaint(*recipe(text))
