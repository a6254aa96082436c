"""The flags of both training scripts with their traits, YAML recipes, and the command that repeats a training."""

import argparse
import difflib
import functools
import itertools
import os
import shlex
import sys
from collections.abc import Container
from pathlib import Path

import yaml
from accelerate.tracking import get_available_trackers

from .data import DataOptions
from .diffusion import BETA_SCHEDULES, PREDICTION_TYPES, TIMESTEP_DENSITIES
from .errors import InputError, one_line
from .files import SpellingLoader, parse_yaml, path_or_hub_id, path_text, without_paths
from .flags import NOT_NEGATIVE, POSITIVE, SEED, SHARE, Flag, FlagParser, as_it_is
from .pipelines.pipeline_flower_ldm import GUIDANCE_SCALE

# The schedules of diffusers that need no more than these flags.
LR_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
STAGES = ("autoencoder", "latent_diffusion")
OPTIMIZERS = ("adamw", "muon")
SWITCH = argparse.BooleanOptionalAction


# --- flags -----------------------------------------------------------------------------------------------------------


def training_parser(stage: str, description: str = "") -> FlagParser:
    """The parser of the script that trains this stage, one of `STAGES`."""
    parser = FlagParser(description=description)
    parser.flag(
        "--config", type=path_text, may_change=True, is_read=True, in_command=False,
        help="YAML recipe with sections common, autoencoder, latent_diffusion; flags on the command line win",
    )  # fmt: skip
    DataOptions.add_flags(parser, resolution=64)
    add_run_flags(parser)
    add_optimization_flags(parser)
    add_checkpoint_flags(parser)
    add_hub_flags(parser)
    if stage == "autoencoder":
        add_autoencoder_flags(parser)
    else:
        add_latent_diffusion_flags(parser)
    return parser


def add_run_flags(parser: FlagParser) -> None:
    """The output folder, and how the run computes."""
    flag = parser.flag
    flag("--dataloader_num_workers", type=int, default=2, bounds=NOT_NEGATIVE, may_change=True, public=as_it_is)
    flag("--output_dir", type=path_text, may_change=True, help="results/autoencoder or results/flower-ldm unless set")
    flag("--overwrite_output_dir", action=SWITCH, default=False, may_change=True, in_command=False, marks_run=True,
         help="delete the run in --output_dir and start a new one")  # fmt: skip
    flag("--seed", type=int, default=0, bounds=SEED, public=as_it_is)
    flag("--mixed_precision", choices=["no", "fp16", "bf16", "auto"], may_change=True, public=as_it_is,
         help="auto: bf16 where the device has instructions for it, else no; unset: accelerate's")  # fmt: skip
    flag("--torch_compile", action=SWITCH, default=False, may_change=True, public=as_it_is)
    flag("--gradient_checkpointing", action=SWITCH, default=False, may_change=True, public=as_it_is,
         help="less memory, slower")  # fmt: skip


def add_optimization_flags(parser: FlagParser) -> None:
    """Batches, updates, learning rate, and the config of the model."""
    flag = parser.flag
    flag("--train_batch_size", type=int, default=64, bounds=POSITIVE, may_change=True, public=as_it_is,
         help="per process and micro-batch")  # fmt: skip
    flag("--gradient_accumulation_steps", type=int, default=1, bounds=POSITIVE, may_change=True, public=as_it_is)
    flag("--max_train_steps", type=int, bounds=NOT_NEGATIVE, may_change=True, public=as_it_is,
         help="optimizer updates; wins over --num_train_epochs")  # fmt: skip
    flag("--num_train_epochs", "--total_epochs", type=int, default=100, bounds=POSITIVE, may_change=True,
         public=as_it_is)  # fmt: skip
    flag("--learning_rate", type=float, default=3e-4, bounds=POSITIVE, may_change=True, public=as_it_is)
    flag("--lr_scheduler", choices=LR_SCHEDULES, default="cosine", public=as_it_is)
    flag("--lr_warmup_steps", type=int, default=100, bounds=NOT_NEGATIVE, public=as_it_is, help="optimizer updates")
    flag("--optimizer", choices=OPTIMIZERS, default="adamw", public=as_it_is,
         help="muon: Muon for the matrices of the hidden layers, AdamW for all other parameters")  # fmt: skip
    flag("--max_grad_norm", type=float, default=1.0, bounds=POSITIVE, public=as_it_is)
    flag("--ema_decay", type=float, default=0.999, bounds=SHARE, public=as_it_is, marks_run=True)
    flag("--model_config", type=path_text, may_change=True, is_read=True,
         help="JSON file with arguments for the class of the model")  # fmt: skip


def add_checkpoint_flags(parser: FlagParser) -> None:
    """Checkpoints, validation and logs."""
    flag = parser.flag
    flag("--checkpointing_steps", type=int, default=1000, bounds=POSITIVE, may_change=True, public=as_it_is)
    flag("--checkpoints_total_limit", type=int, bounds=POSITIVE, may_change=True, public=as_it_is, marks_run=True,
         help="keep only this many of the newest; unset: keep all")  # fmt: skip
    flag("--resume_from_checkpoint", "--checkpoint_path", type=path_text, may_change=True, is_read=True,
         in_command=False, help="latest, or the folder of a checkpoint")  # fmt: skip
    flag("--validation_steps", "--visualize_every", type=int, default=1000, bounds=POSITIVE, may_change=True,
         public=as_it_is)  # fmt: skip
    flag("--logging_steps", type=int, default=50, bounds=POSITIVE, may_change=True, public=as_it_is)
    flag("--final_pictures", action=SWITCH, default=True, may_change=True, public=as_it_is, marks_run=True,
         help="at the end, save maps of the latents, denoising paths and animations")  # fmt: skip
    flag("--report_to", default="tensorboard", may_change=True, help="tensorboard, wandb, trackio, all or none")


def add_hub_flags(parser: FlagParser) -> None:
    """The upload at the end of a run."""
    flag = parser.flag
    flag("--push_to_hub", action=SWITCH, default=False, may_change=True,
         help="at the end, upload the model, its code and its pictures")  # fmt: skip
    flag("--hub_model_id", may_change=True,
         help="user/name, or a name in your own namespace; unset: the name of --output_dir")  # fmt: skip
    flag("--hub_private_repo", action=SWITCH, default=False, may_change=True,
         help="create the Hub repository as a private one")  # fmt: skip


def add_autoencoder_flags(parser: FlagParser) -> None:
    """The flags of stage 1 alone. VGG16, the discriminator or the head isn't built if its losses have weight 0."""
    parser.set_defaults(output_dir="results/autoencoder")
    flag = parser.flag
    flag("--pixel_weight", type=float, default=1.0, bounds=NOT_NEGATIVE, public=as_it_is)
    flag("--perceptual_weight", type=float, default=0.5, bounds=NOT_NEGATIVE, public=as_it_is)
    flag("--kl_weight", type=float, default=1e-4, bounds=NOT_NEGATIVE, public=as_it_is,
         help="weight of the KL loss, in nats per latent element")  # fmt: skip
    flag("--adversarial_weight", type=float, default=0.1, bounds=NOT_NEGATIVE, public=as_it_is)
    flag("--classification_weight", type=float, default=0.01, bounds=NOT_NEGATIVE, public=as_it_is)
    flag("--center_weight", type=float, default=0.01, bounds=NOT_NEGATIVE, public=as_it_is)
    flag("--repulsion_weight", type=float, default=0.01, bounds=NOT_NEGATIVE, public=as_it_is)
    flag("--latent_noise", type=float, default=0.0, bounds=NOT_NEGATIVE, public=as_it_is,
         help="noise on the latents that the decoder sees; an image's level is half-normal with this scale, relative "
         "to the latents")  # fmt: skip
    # the course of the losses
    flag("--adaptive_weight", action=SWITCH, default=True, public=as_it_is,
         help="balance the adversarial loss by gradient norms before its weight applies")  # fmt: skip
    flag("--adaptive_weight_steps", type=int, default=16, bounds=POSITIVE, public=as_it_is,
         help="updates between two measurements of this balance")  # fmt: skip
    flag("--disc_start", type=int, default=1000, bounds=NOT_NEGATIVE, public=as_it_is,
         help="update at which the discriminator starts")  # fmt: skip
    flag("--loss_ramp_steps", type=int, default=500, bounds=NOT_NEGATIVE, public=as_it_is,
         help="updates over which each loss other than pixel and KL rises to its weight")  # fmt: skip
    flag("--disc_learning_rate", type=float, default=3e-4, bounds=POSITIVE, public=as_it_is)
    flag("--perceptual_every", type=int, default=1, bounds=POSITIVE, public=as_it_is,
         help="show VGG16 only every N-th image of a batch")  # fmt: skip
    flag("--vgg_weights", type=path_text, may_change=True, is_read=True,
         help="local file with torchvision's weights of VGG16")  # fmt: skip


def add_latent_diffusion_flags(parser: FlagParser) -> None:
    """The flags of stage 2 alone."""
    parser.set_defaults(output_dir="results/flower-ldm", train_batch_size=128)
    flag = parser.flag
    flag("--autoencoder", type=path_or_hub_id, default="results/autoencoder", may_change=True, is_read=True,
         help="output folder of stage 1, or a Hub id")  # fmt: skip
    flag("--latent_cache_dir", type=path_text, may_change=True, is_read=True,
         help="folder of cached latents, to share them between runs; unset: in --output_dir")  # fmt: skip
    # the diffusion
    flag("--prediction_type", choices=PREDICTION_TYPES, default="v_prediction", public=as_it_is)
    flag("--beta_schedule", choices=BETA_SCHEDULES, default="squaredcos_cap_v2", public=as_it_is)
    flag("--zero_terminal_snr", action=SWITCH, default=False, public=as_it_is,
         help="the last timestep is pure noise")  # fmt: skip
    flag("--snr_gamma", type=float, default=5.0, bounds=NOT_NEGATIVE, public=as_it_is,
         help="gamma of the min-SNR loss weights; 0: all timesteps weigh the same")  # fmt: skip
    flag("--timestep_density", choices=TIMESTEP_DENSITIES, default="uniform", public=as_it_is,
         help="lognormal: the noise-to-signal ratio of training's timesteps is log-normal, as in EDM2")  # fmt: skip
    flag("--density_mean", type=float, default=-0.4, public=as_it_is,
         help="mean of the ratio's natural logarithm, for --timestep_density lognormal")  # fmt: skip
    flag("--density_std", type=float, default=1.0, bounds=POSITIVE, public=as_it_is,
         help="standard deviation of the ratio's natural logarithm")  # fmt: skip
    flag("--label_dropout", type=float, default=0.1, bounds=SHARE, public=as_it_is,
         help="share of labels dropped, for classifier-free guidance")  # fmt: skip
    # previews
    flag("--guidance_scale", type=float, default=GUIDANCE_SCALE, may_change=True, public=as_it_is,
         help="guidance of the previews, and the default of the saved pipeline; 1 means off")  # fmt: skip


# --- the flags of a run ----------------------------------------------------------------------------------------------


@functools.cache
def training_flags() -> dict[str, Flag]:
    """All flags of both scripts, by their names in `args.yaml`."""
    return {name: flag for stage in STAGES for name, flag in training_parser(stage).flags.items()}


def flag_of(name: str) -> Flag:
    """The traits of a flag in an `args.yaml`. A flag that neither script has gets the default traits."""
    return training_flags().get(name, Flag())


def marks_of_a_run() -> frozenset[str]:
    """The flags that every run has in its `args.yaml`, and that no other program has together."""
    return frozenset(name for name, flag in training_flags().items() if flag.marks_run)


def public_flags(args: dict) -> dict:
    """The flags of a run that everybody may see, with their public values."""
    shown = {}
    for name, value in args.items():
        if public := flag_of(name).public:
            shown[name] = value if value is None else public(value)
    return without_paths(shown)


def shared_defaults() -> dict[str, object]:
    """The flags that have the same default in both scripts, and these defaults."""
    first, second = map(training_parser, STAGES)
    shared = first.flags.keys() & second.flags.keys()
    return {name: first.get_default(name) for name in shared if first.get_default(name) == second.get_default(name)}


def training_command(args: dict, script: str) -> str:
    """The command line that sets these flags, quoted for a shell.

    Three kinds of flags are left out: those whose value is the default of both scripts, those that concern one
    folder's history, and `--config`, because the recipe's values are among the flags.
    """
    defaults = shared_defaults()
    arguments = [f"python {script}"]
    for name, value in args.items():
        unset = value is None or value == []
        if unset or not flag_of(name).in_command or (name in defaults and value == defaults[name]):
            continue
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            arguments.append(" ".join([f"--{name}", *(shlex.quote(str(item)) for item in value)]))
        elif str(value).startswith("-"):
            arguments.append(shlex.quote(f"--{name}={value}"))
        else:
            arguments.append(f"--{name} {shlex.quote(str(value))}")
    return join_on_lines(arguments)


def fold_command(command: str | list) -> str:
    """Break a command line, or its list of words, into lines of the page's width. A flag keeps its values."""
    try:
        words = shlex.split(command) if isinstance(command, str) else list(map(str, command))
    except ValueError:  # not a valid shell command
        return str(command)
    flags = [index for index, word in enumerate(words) if word.startswith("--")]
    bounds = [0, *flags, len(words)]
    return join_on_lines([shlex.join(words[start:end]) for start, end in itertools.pairwise(bounds)])


def join_on_lines(arguments: list[str], width: int = 80) -> str:
    """Join arguments to lines of about `width` characters, with backslashes between the lines."""
    lines = [arguments[0]]
    for argument in arguments[1:]:
        if len(lines) == 1 or len(lines[-1]) + len(argument) > width:
            lines.append(f"    {argument}")
        else:
            lines[-1] += f" {argument}"
    return " \\\n".join(lines)


# --- the command line, the recipe and the defaults -------------------------------------------------------------------


def parse_arguments(stage: str, argv: list[str] | None = None, description: str = "") -> argparse.Namespace:
    """Parse the flags of a stage's script. The command line wins over the recipe, the recipe over the defaults.

    Raises:
        InputError: a flag or a key of the recipe is unknown, or a value is not allowed.
    """
    parser = training_parser(stage, description)
    argv = sys.argv[1:] if argv is None else argv
    recipe = parser.parse_known_args(argv)[0].config
    args = parser.parse_args((read_recipe(parser, Path(recipe), stage) if recipe else []) + argv)
    if is_given(argv, parser, "num_train_epochs") and not is_given(argv, parser, "max_train_steps"):
        args.max_train_steps = None  # else the recipe's would win over the flag
    check_trackers(args.report_to)
    return args


def is_given(argv: list[str], parser: FlagParser, name: str) -> bool:
    """Whether the command line has a flag, in any of its spellings."""
    actions = parser._option_string_actions
    return any(word in actions and actions[word].dest == name for word in (word.partition("=")[0] for word in argv))


def check_trackers(report_to: str) -> None:
    """Raise `InputError` for a tracker that accelerate doesn't know, or that isn't installed.

    accelerate itself would silently leave it out.
    """
    installed = [str(tracker) for tracker in get_available_trackers()]
    if report_to not in ("all", "none", *installed):
        raise InputError(
            f"--report_to {report_to} is unknown or not installed; there are {', '.join(installed)}, all and none"
        )


# --- recipes ---------------------------------------------------------------------------------------------------------

SECTIONS = ("common", *STAGES)


def read_recipe(parser: FlagParser, path: Path, section: str) -> list[str]:
    """Read the sections `common` and `section` of a recipe as command-line arguments.

    Values keep their spelling, because YAML would read 010 as 8, 1.10 as 1.1 and yes as true. The flags convert them
    to their own types. A `model_config` is a path relative to the recipe.

    Raises:
        InputError: the file is not a recipe, a key is unknown or occurs twice, or no flag accepts a value.
    """
    if not os.path.isfile(path):
        raise InputError(f"--config {path} is not a file")
    try:
        recipe = parse_yaml(path.read_bytes(), yaml.compose, SpellingLoader)
    except OSError as error:
        raise InputError(f"--config {path} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--config {path} is not YAML: {one_line(error, 300)}") from error
    flags = {
        option.removeprefix("--"): action
        for option, action in parser._option_string_actions.items()
        if action.dest not in ("config", "help") and not option.startswith("--no-")
    }
    sections = entries(path, recipe, "the recipe", SECTIONS)
    for name, node in sections.items():  # the keys of the other script's section are checked by that script
        entries(path, node, f"section '{name}'", None)
    found: dict[str, tuple[str, yaml.Node]] = {}  # (key, value) by flag; a flag may have two spellings
    for name in ("common", section):  # the second section wins
        own = entries(path, sections.get(name), f"section '{name}'", flags)
        by_flag = {flags[key].dest: (key, value) for key, value in own.items()}
        if len(by_flag) < len(own):
            twice = [key for key in own if (key, own[key]) not in by_flag.values()]
            raise InputError(f"{path}: '{twice[0]}' and '{by_flag[flags[twice[0]].dest][0]}' are one flag: keep one")
        found |= by_flag
    return [item for key, value in found.values() for item in entry_arguments(path, flags[key], key, value)]


def entries(path: Path, node: yaml.Node | None, name: str, known: Container[str] | None) -> dict[str, yaml.Node]:
    """The keys and values of one level of a recipe. An empty level has none."""
    if node is None or is_unset(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise InputError(
            f"{path}: {name} must hold keys and values; a recipe must hold sections {', '.join(SECTIONS)}"
        )
    found = {}
    for key_node, value in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "..."
        if known is not None and key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
            if known is SECTIONS:
                hint = f"; a recipe must hold sections {', '.join(SECTIONS)}, each with flags and values"
            raise InputError(f"{path}: unknown {'section' if known is SECTIONS else 'key'} '{key}'{hint}")
        if key in found:
            raise InputError(f"{path}: '{key}' is written twice, also in line {key_node.start_mark.line + 1}")
        found[key] = value
    return found


def is_unset(node: yaml.Node) -> bool:
    """Whether a value is empty or `null`, and not in quotes."""
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value.lower() in ("", "~", "null")


def entry_arguments(path: Path, flag: argparse.Action, key: str, node: yaml.Node) -> list[str]:
    """One entry of a recipe as command-line arguments. An unset entry gives none."""
    where = f"{path}, line {node.start_mark.line + 1}: '{key}'"
    is_list = isinstance(node, yaml.SequenceNode)
    for item in node.value if is_list else [node]:
        if not isinstance(item, yaml.ScalarNode):
            raise InputError(f"{where} must be {'one value' if flag.nargs is None else 'values'}, none of them nested")
        if item.tag != yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG:
            raise InputError(f"{where} has the tag {item.tag}: leave it out")
    if is_unset(node):
        return []
    if isinstance(flag, argparse.BooleanOptionalAction):
        switch = "" if is_list else node.value.lower()
        if switch not in ("true", "yes", "on", "false", "no", "off"):
            raise InputError(f"{where} must be true or false")
        return [f"--{key}" if switch in ("true", "yes", "on") else f"--no-{key}"]
    if is_list:
        items = [item.value for item in node.value]
        if flag.nargs is None:
            raise InputError(f"{where} takes one value, not a list")
        if wrong := [item for item in items if not item or item.startswith("-")]:  # argparse would take it for a flag
            raise InputError(f"{where} can't hold {wrong[0]!r}; a class can be named by its index")
        return [f"--{key}", *items]
    # The path is relative to the recipe, not to the working directory, so that the two files can be moved together.
    value = str(path.parent / os.path.expanduser(node.value)) if key == "model_config" else node.value
    return [f"--{key}={value}"]
