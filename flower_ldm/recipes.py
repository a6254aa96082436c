"""Flags and recipes of both training scripts: flags over recipe over defaults, and what numbers can't be right."""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Container
from pathlib import Path

import yaml
from accelerate.tracking import get_available_trackers

from .errors import InputError, OneLineParser, one_line
from .files import SpellingLoader, parse_yaml, path_text, whole_path
from .images import MAX_IMAGE_PIXELS

# diffusers' schedules that these flags can describe.
LR_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


# --- flags -----------------------------------------------------------------------------------------------------------


def common_parser(description: str) -> OneLineParser:
    """The flags that both scripts have; each script adds its own."""
    parser = OneLineParser(description=description)
    flag = parser.add_argument
    switch = argparse.BooleanOptionalAction
    parser.add_argument_group("recipe")
    flag(
        "--config",
        type=path_text,
        help="YAML recipe with sections common, autoencoder, latent_diffusion; flags given here win",
    )
    # data
    flag(
        "--dataset",
        type=path_text,
        default="flowers102",
        help="flowers102, synthetic, imagefolder, or a Hub data set id",
    )
    flag("--data_dir", type=path_text, help="the folder that holds flowers-102/, or the class folders")
    flag("--image_column", default="image", help="of a Hub data set")
    flag("--label_column", default="label", help="of a Hub data set")
    flag("--skip_bad_images", action=switch, default=False, help="count unreadable images and go on without them")
    flag("--max_image_pixels", type=int, default=MAX_IMAGE_PIXELS, help="larger images count as unreadable")
    flag("--train_splits", nargs="+", help="splits to train on")
    flag("--val_splits", nargs="+", help="splits held out")
    flag("--classes", nargs="+", help="names, else 0-based indices; relabeled 0..k-1 in this order")
    flag("--images_per_class", type=int, default=100, help="training images of each synthetic class")
    flag("--resolution", type=int, default=64, help="pixels a side")
    flag("--dataloader_num_workers", type=int, default=2)
    # run
    flag("--output_dir", type=path_text, help="results/autoencoder or results/flower-ldm unless set")
    flag("--overwrite_output_dir", action=switch, default=False, help="replace the run that is there")
    flag("--seed", type=int, default=0)
    flag("--mixed_precision", choices=["no", "fp16", "bf16", "auto"],
         help="auto: bf16 where the device has instructions for it, else no; unset: accelerate's")  # fmt: skip
    flag("--torch_compile", action=switch, default=False)
    flag("--gradient_checkpointing", action=switch, default=False, help="less memory, slower")
    # optimization
    flag("--train_batch_size", type=int, default=64, help="per process and micro-batch")
    flag("--gradient_accumulation_steps", type=int, default=1)
    flag("--max_train_steps", type=int, help="optimizer updates; wins over --num_train_epochs")
    flag("--num_train_epochs", "--total_epochs", type=int, default=100)
    flag("--learning_rate", type=float, default=3e-4)
    flag("--lr_scheduler", choices=LR_SCHEDULES, default="cosine")
    flag("--lr_warmup_steps", type=int, default=100, help="optimizer updates")
    flag("--max_grad_norm", type=float, default=1.0)
    flag("--ema_decay", type=float, default=0.999)
    flag("--model_config", type=path_text, help="JSON file with arguments of the model's class")
    # checkpoints, validation, logs
    flag("--checkpointing_steps", type=int, default=1000)
    flag("--checkpoints_total_limit", type=int, help="keep only the newest; unset: all")
    flag("--resume_from_checkpoint", "--checkpoint_path", type=path_text, help="latest, or a checkpoint folder")
    flag("--validation_steps", "--visualize_every", type=int, default=1000)
    flag("--logging_steps", type=int, default=50)
    flag("--final_pictures", action=switch, default=True,
         help="at the end: maps of the latents, denoising paths, animations")  # fmt: skip
    flag("--report_to", default="tensorboard", help="tensorboard, wandb, trackio, all or none")
    # the Hub
    flag("--push_to_hub", action=switch, default=False, help="upload the model, its code and pictures at the end")
    flag("--hub_model_id", help="user/name, or a name in your own namespace; unset: the name of --output_dir")
    flag("--hub_private_repo", action=switch, default=False, help="make the repository private, where it is new")
    return parser


def parse_arguments(parser: OneLineParser, section: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Flags over recipe over defaults.

    Raises:
        InputError: for an unknown flag or recipe key, or a value that can't be right.
    """
    argv = sys.argv[1:] if argv is None else argv
    recipe_parser = OneLineParser(add_help=False)
    recipe_parser.add_argument("--config", type=path_text)
    recipe = recipe_parser.parse_known_args(argv)[0].config
    args = parser.parse_args((read_recipe(parser, Path(recipe), section) if recipe else []) + argv)
    if given(argv, parser, "num_train_epochs") and not given(argv, parser, "max_train_steps"):
        args.max_train_steps = None  # the recipe's, which would win over the flag
    check_numbers(args)
    check_trackers(args.report_to)
    for name in {"dataset", "autoencoder"} & vars(args).keys():
        setattr(args, name, whole_path(getattr(args, name)))
    return args


def given(argv: list[str], parser: OneLineParser, name: str) -> bool:
    """Whether a flag is among the words of the command line, by any of its spellings."""
    actions = parser._option_string_actions
    return any(word in actions and actions[word].dest == name for word in (word.partition("=")[0] for word in argv))


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that can't be right, of the flags that the script at hand has."""
    positive = ("resolution", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "logging_steps",
                "validation_steps", "checkpointing_steps", "checkpoints_total_limit", "images_per_class",
                "max_image_pixels", "learning_rate", "max_grad_norm", "disc_learning_rate",
                "adaptive_weight_steps")  # fmt: skip
    not_negative = ("max_train_steps", "lr_warmup_steps", "dataloader_num_workers", "disc_start", "loss_ramp_steps")
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name} must be a finite number, got {value}")
        if name in positive and value is not None and value <= 0:
            raise InputError(f"--{name} must be positive, got {value}")
        if name in not_negative and value is not None and value < 0:
            raise InputError(f"--{name} must not be negative, got {value}")
        if name in (*positive, *not_negative) and isinstance(value, int) and value >= 2**31:
            raise InputError(f"--{name} must be below 2**31, got {value}")
    if not 0 <= args.seed < 2**32:  # numpy's bounds
        raise InputError(f"--seed must be at least 0 and below 2**32, got {args.seed}")
    if not 0 <= args.ema_decay < 1:
        raise InputError(f"--ema_decay must be at least 0 and below 1, got {args.ema_decay}")


def check_trackers(report_to: str) -> None:
    """Refuse a tracker that accelerate doesn't know, or would leave out in silence because it isn't installed."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    if report_to not in ("all", "none", *installed):
        raise InputError(
            f"--report_to {report_to} is unknown or not installed; there are {', '.join(installed)}, all and none"
        )


# --- recipes ---------------------------------------------------------------------------------------------------------

SECTIONS = ("common", "autoencoder", "latent_diffusion")


def read_recipe(parser: OneLineParser, path: Path, section: str) -> list[str]:
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
    given: dict[str, tuple[str, yaml.Node]] = {}  # key and value by the flag, which may have two spellings
    for name in ("common", section):  # the second one wins
        own = entries(path, sections.get(name), f"section '{name}'", flags)
        by_flag = {flags[key].dest: (key, value) for key, value in own.items()}
        if len(by_flag) < len(own):
            twice = [key for key in own if (key, own[key]) not in by_flag.values()]
            raise InputError(f"{path}: '{twice[0]}' and '{by_flag[flags[twice[0]].dest][0]}' are one flag: keep one")
        given |= by_flag
    return [word for key, value in given.values() for word in words_of(path, flags[key], key, value)]


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


def words_of(path: Path, flag: argparse.Action, key: str, node: yaml.Node) -> list[str]:
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
