"""The flags of both training scripts with their traits, recipes in YAML, and the command that trains a run again."""

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
from .diffusion import BETA_SCHEDULES, PREDICTION_TYPES
from .errors import InputError, one_line
from .files import SpellingLoader, parse_yaml, path_or_hub_id, path_text, without_paths
from .flags import NOT_NEGATIVE, POSITIVE, SEED, SHARE, Flag, FlagParser, as_it_is
from .pipelines.pipeline_flower_ldm import GUIDANCE_SCALE

# diffusers' schedules that these flags can describe.
LR_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
STAGES = ("autoencoder", "latent_diffusion")
SWITCH = argparse.BooleanOptionalAction


# --- flags -----------------------------------------------------------------------------------------------------------


def training_parser(stage: str, description: str = "") -> FlagParser:
    """The flags of the script that trains this stage, one of `STAGES`."""
    parser = FlagParser(description=description)
    parser.flag(
        "--config", type=path_text, may_change=True, is_read=True, in_command=False,
        help="YAML recipe with sections common, autoencoder, latent_diffusion; flags given here win",
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
    """Where a run goes and how it computes."""
    flag = parser.flag
    flag("--dataloader_num_workers", type=int, default=2, bounds=NOT_NEGATIVE, may_change=True, public=as_it_is)
    flag("--output_dir", type=path_text, may_change=True, help="results/autoencoder or results/flower-ldm unless set")
    flag("--overwrite_output_dir", action=SWITCH, default=False, may_change=True, in_command=False, marks_run=True,
         help="replace the run that is there")  # fmt: skip
    flag("--seed", type=int, default=0, bounds=SEED, public=as_it_is)
    flag("--mixed_precision", choices=["no", "fp16", "bf16", "auto"], may_change=True, public=as_it_is,
         help="auto: bf16 where the device has instructions for it, else no; unset: accelerate's")  # fmt: skip
    flag("--torch_compile", action=SWITCH, default=False, may_change=True, public=as_it_is)
    flag("--gradient_checkpointing", action=SWITCH, default=False, may_change=True, public=as_it_is,
         help="less memory, slower")  # fmt: skip


def add_optimization_flags(parser: FlagParser) -> None:
    """Batches, updates, learning rate, and the model's own config."""
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
    flag("--max_grad_norm", type=float, default=1.0, bounds=POSITIVE, public=as_it_is)
    flag("--ema_decay", type=float, default=0.999, bounds=SHARE, public=as_it_is, marks_run=True)
    flag("--model_config", type=path_text, may_change=True, is_read=True,
         help="JSON file with arguments of the model's class")  # fmt: skip


def add_checkpoint_flags(parser: FlagParser) -> None:
    """Checkpoints, validation and logs."""
    flag = parser.flag
    flag("--checkpointing_steps", type=int, default=1000, bounds=POSITIVE, may_change=True, public=as_it_is)
    flag("--checkpoints_total_limit", type=int, bounds=POSITIVE, may_change=True, public=as_it_is, marks_run=True,
         help="keep only the newest; unset: all")  # fmt: skip
    flag("--resume_from_checkpoint", "--checkpoint_path", type=path_text, may_change=True, is_read=True,
         in_command=False, help="latest, or a checkpoint folder")  # fmt: skip
    flag("--validation_steps", "--visualize_every", type=int, default=1000, bounds=POSITIVE, may_change=True,
         public=as_it_is)  # fmt: skip
    flag("--logging_steps", type=int, default=50, bounds=POSITIVE, may_change=True, public=as_it_is)
    flag("--final_pictures", action=SWITCH, default=True, may_change=True, public=as_it_is, marks_run=True,
         help="at the end: maps of the latents, denoising paths, animations")  # fmt: skip
    flag("--report_to", default="tensorboard", may_change=True, help="tensorboard, wandb, trackio, all or none")


def add_hub_flags(parser: FlagParser) -> None:
    """The upload at the end of a run."""
    flag = parser.flag
    flag("--push_to_hub", action=SWITCH, default=False, may_change=True,
         help="upload the model, its code and pictures at the end")  # fmt: skip
    flag("--hub_model_id", may_change=True,
         help="user/name, or a name in your own namespace; unset: the name of --output_dir")  # fmt: skip
    flag("--hub_private_repo", action=SWITCH, default=False, may_change=True,
         help="make the repository private, where it is new")  # fmt: skip


def add_autoencoder_flags(parser: FlagParser) -> None:
    """Stage 1's own. At weight 0 of what needs them, VGG16, the discriminator and the head are never built."""
    parser.set_defaults(output_dir="results/autoencoder")
    flag = parser.flag
    flag("--pixel_weight", type=float, default=1.0, bounds=NOT_NEGATIVE, public=as_it_is)
    flag("--perceptual_weight", type=float, default=0.5, bounds=NOT_NEGATIVE, public=as_it_is)
    flag("--kl_weight", type=float, default=1e-4, bounds=NOT_NEGATIVE, public=as_it_is,
         help="of nats per latent element")  # fmt: skip
    flag("--adversarial_weight", type=float, default=0.1, bounds=NOT_NEGATIVE, public=as_it_is)
    flag("--classification_weight", type=float, default=0.01, bounds=NOT_NEGATIVE, public=as_it_is)
    flag("--center_weight", type=float, default=0.01, bounds=NOT_NEGATIVE, public=as_it_is)
    flag("--repulsion_weight", type=float, default=0.01, bounds=NOT_NEGATIVE, public=as_it_is)
    # how the losses are used
    flag("--adaptive_weight", action=SWITCH, default=True, public=as_it_is,
         help="balance the adversarial loss by gradient norms before its weight")  # fmt: skip
    flag("--adaptive_weight_steps", type=int, default=16, bounds=POSITIVE, public=as_it_is,
         help="updates between two measurements of that balance")  # fmt: skip
    flag("--disc_start", type=int, default=1000, bounds=NOT_NEGATIVE, public=as_it_is,
         help="update at which the discriminator starts")  # fmt: skip
    flag("--loss_ramp_steps", type=int, default=500, bounds=NOT_NEGATIVE, public=as_it_is,
         help="updates over which a loss other than pixel and KL rises")  # fmt: skip
    flag("--disc_learning_rate", type=float, default=3e-4, bounds=POSITIVE, public=as_it_is)
    flag("--perceptual_every", type=int, default=1, bounds=POSITIVE, public=as_it_is,
         help="every how many-th image of a batch VGG16 sees")  # fmt: skip
    flag("--vgg_weights", type=path_text, may_change=True, is_read=True,
         help="a local file with torchvision's VGG16")  # fmt: skip


def add_latent_diffusion_flags(parser: FlagParser) -> None:
    """Stage 2's own."""
    parser.set_defaults(output_dir="results/flower-ldm", train_batch_size=128)
    flag = parser.flag
    flag("--autoencoder", type=path_or_hub_id, default="results/autoencoder", may_change=True, is_read=True,
         help="stage 1's output folder, or a Hub id")  # fmt: skip
    flag("--latent_cache_dir", type=path_text, may_change=True, is_read=True,
         help="in --output_dir unless set; share it between runs on the same latents")  # fmt: skip
    # the diffusion
    flag("--prediction_type", choices=PREDICTION_TYPES, default="v_prediction", public=as_it_is)
    flag("--beta_schedule", choices=BETA_SCHEDULES, default="squaredcos_cap_v2", public=as_it_is)
    flag("--zero_terminal_snr", action=SWITCH, default=False, public=as_it_is,
         help="the last timestep is pure noise")  # fmt: skip
    flag("--snr_gamma", type=float, default=5.0, bounds=NOT_NEGATIVE, public=as_it_is,
         help="min-SNR loss weights; 0: all timesteps weigh alike")  # fmt: skip
    flag("--label_dropout", type=float, default=0.1, bounds=SHARE, public=as_it_is,
         help="share of labels dropped, for classifier-free guidance")  # fmt: skip
    # previews
    flag("--guidance_scale", type=float, default=GUIDANCE_SCALE, may_change=True, public=as_it_is,
         help="of the previews, and kept in the pipeline as its default; 1 means off")  # fmt: skip


# --- what holds of a run's flags -------------------------------------------------------------------------------------


@functools.cache
def training_flags() -> dict[str, Flag]:
    """Every flag of both scripts, by its name in `args.yaml`."""
    return {name: flag for stage in STAGES for name, flag in training_parser(stage).flags.items()}


def flag_of(name: str) -> Flag:
    """The traits of a flag in some `args.yaml`; of one that neither script has, those of a flag without traits."""
    return training_flags().get(name, Flag())


def marks_of_a_run() -> frozenset[str]:
    """Flags that every run keeps in its `args.yaml`; no other program has all of them."""
    return frozenset(name for name, flag in training_flags().items() if flag.marks_run)


def public_flags(args: dict) -> dict:
    """What everybody may see of a run's flags."""
    shown = {}
    for name, value in args.items():
        if public := flag_of(name).public:
            shown[name] = value if value is None else public(value)
    return without_paths(shown)


def shared_defaults() -> dict[str, object]:
    """The defaults that both scripts have in common, by flag."""
    first, second = map(training_parser, STAGES)
    shared = first.flags.keys() & second.flags.keys()
    return {name: first.get_default(name) for name in shared if first.get_default(name) == second.get_default(name)}


def training_command(args: dict, script: str) -> str:
    """The command line that gives these flags, each quoted for a shell.

    A flag is left out where both scripts have its value by default. So is what belongs to one folder's history, and
    the recipe: all that it said is among the flags.
    """
    defaults = shared_defaults()
    words = [f"python {script}"]
    for name, value in args.items():
        unset = value is None or value == []
        if unset or not flag_of(name).in_command or (name in defaults and value == defaults[name]):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words.append(" ".join([f"--{name}", *(shlex.quote(str(item)) for item in value)]))
        elif str(value).startswith("-"):
            words.append(shlex.quote(f"--{name}={value}"))
        else:
            words.append(f"--{name} {shlex.quote(str(value))}")
    return join_on_lines(words)


def fold_command(command: str | list) -> str:
    """A command line, or its words, on lines that fit the page: a flag and its values stay together."""
    try:
        words = shlex.split(command) if isinstance(command, str) else list(map(str, command))
    except ValueError:  # no line for a shell
        return str(command)
    flags = [index for index, word in enumerate(words) if word.startswith("--")]
    bounds = [0, *flags, len(words)]
    return join_on_lines([shlex.join(words[start:end]) for start, end in itertools.pairwise(bounds)])


def join_on_lines(words: list[str], width: int = 80) -> str:
    """Words on lines of about `width`, joined by backslashes."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines) == 1 or len(lines[-1]) + len(word) > width:
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}"
    return " \\\n".join(lines)


# --- flags over recipe over defaults ---------------------------------------------------------------------------------


def parse_arguments(stage: str, argv: list[str] | None = None, description: str = "") -> argparse.Namespace:
    """The flags of the script that trains this stage: those given over those of the recipe over the defaults.

    Raises:
        InputError: for an unknown flag or recipe key, or a value that can't be right.
    """
    parser = training_parser(stage, description)
    argv = sys.argv[1:] if argv is None else argv
    recipe = parser.parse_known_args(argv)[0].config
    args = parser.parse_args((read_recipe(parser, Path(recipe), stage) if recipe else []) + argv)
    if is_given(argv, parser, "num_train_epochs") and not is_given(argv, parser, "max_train_steps"):
        args.max_train_steps = None  # the recipe's, which would win over the flag
    check_trackers(args.report_to)
    return args


def is_given(argv: list[str], parser: FlagParser, name: str) -> bool:
    """Whether a flag is among the words of the command line, by any of its spellings."""
    actions = parser._option_string_actions
    return any(word in actions and actions[word].dest == name for word in (word.partition("=")[0] for word in argv))


def check_trackers(report_to: str) -> None:
    """Refuse a tracker that accelerate doesn't know, or would leave out in silence because it isn't installed."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    if report_to not in ("all", "none", *installed):
        raise InputError(
            f"--report_to {report_to} is unknown or not installed; there are {', '.join(installed)}, all and none"
        )


# --- recipes ---------------------------------------------------------------------------------------------------------

SECTIONS = ("common", *STAGES)


def read_recipe(parser: FlagParser, path: Path, section: str) -> list[str]:
    """A recipe's sections `common` and `section` as the command-line words they stand for.

    Values keep their spelling, since YAML would read 010 as 8, 1.10 as 1.1 and yes as true: the flags know their
    types. Its `model_config` is a path relative to the recipe.

    Raises:
        InputError: for what is no recipe, an unknown key, what is written twice, and what no flag takes.
    """
    if not os.path.isfile(path):
        raise InputError(f"--config {path} is no file")
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
    for name, node in sections.items():  # the other script's flags are its own to know
        entries(path, node, f"section '{name}'", None)
    found: dict[str, tuple[str, yaml.Node]] = {}  # key and value by the flag, which may have two spellings
    for name in ("common", section):  # the second one wins
        own = entries(path, sections.get(name), f"section '{name}'", flags)
        by_flag = {flags[key].dest: (key, value) for key, value in own.items()}
        if len(by_flag) < len(own):
            twice = [key for key in own if (key, own[key]) not in by_flag.values()]
            raise InputError(f"{path}: '{twice[0]}' and '{by_flag[flags[twice[0]].dest][0]}' are one flag: keep one")
        found |= by_flag
    return [word for key, value in found.values() for word in command_words(path, flags[key], key, value)]


def entries(path: Path, node: yaml.Node | None, name: str, known: Container[str] | None) -> dict[str, yaml.Node]:
    """The keys of one level of a recipe, and their values; none where it is left empty."""
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
    """Whether a value is left empty, or `null`, without quotes."""
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value.lower() in ("", "~", "null")


def command_words(path: Path, flag: argparse.Action, key: str, node: yaml.Node) -> list[str]:
    """One entry of a recipe as the words of a command line; none where it is unset."""
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
        if wrong := [item for item in items if not item or item.startswith("-")]:  # it would end the list, as a flag
            raise InputError(f"{where} can't hold {wrong[0]!r}; a class has an index, too")
        return [f"--{key}", *items]
    # A recipe and its model travel together: the path is seen from the recipe, not from where one stands.
    value = str(path.parent / os.path.expanduser(node.value)) if key == "model_config" else node.value
    return [f"--{key}={value}"]
