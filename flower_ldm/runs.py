"""A run's folder: what our scripts write into it, and whether a folder is a run of ours and holds nothing else."""

import json
import math
import os
import re
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml
from safetensors import SafetensorError, safe_open

from .errors import InputError, one_line
from .files import is_regular, parse_yaml
from .formatting import is_finite, number
from .recipes import flag_of, marks_of_a_run
from .run_lock import LOCK

# A card with this line was written by a run; one without is somebody's own.
CARD_MARK = "<!-- Written by flower_ldm. Take this line out, and your changes will not be overwritten. -->"

# By diffusers' name: a latent cache may lie in the same folder, and holds the photographs.
WEIGHTS = ("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model.safetensors.index*.json")
MODEL = ("config.json", *WEIGHTS, "autoencoder_flower.py", "unet_flower.py")
CHECKPOINT = ("*.safetensors", "*.bin", "*.pkl", "*.pt", "*.json", "*.yaml")
# Whatever a run and its evaluation may leave, finished or killed. Stars stand for part of one name, <step> for digits.
RUN_FILES = (
    "args.yaml", "log.jsonl", "metrics.json", "README.md", "report.html", LOCK, *MODEL,
    *(f"{part}/{name}" for part in ("best", "vae", "unet", "guide") for name in MODEL),
    "model_index.json", "pipeline_flower_ldm.py", "scheduler/scheduler_config.json",
    "autoencoder_losses.png", "diffusion_loss.png", "vae_samples_grid_subset.png", "latent_space_*.png",
    "denoising_path_*.png", "diffusion_animation_*.gif", "diffusion_animation_*.mp4", "guidance_sweep.png",
    "interpolation_*.png", "original_reconstructed_generated.png", "nearest_neighbours.png", "evaluation_sweep.png",
    "samples/step-*.png", "reconstructions/step-*.png", "latent_cache/*.safetensors",
    "evaluation_cache/*.safetensors", "evaluation_cache/samples-*/*.safetensors",
    *(f"logs/{folder}{name}" for folder in ("", "*/", "*/*/") for name in ("events.out.tfevents.*", "hparams.yml")),
    *(f"{folder}-<step>/{name}" for folder in ("checkpoint", "unfinished") for name in CHECKPOINT),
    *(f"unfinished-{kept}/{folder}{name}" for kept in ("best", "export") for folder in ("", "*/")
      for name in ("*.json", "*.safetensors", "*.py")),
)  # fmt: skip
RUN_FOLDERS = {pattern.rsplit("/", depth)[0] for pattern in RUN_FILES for depth in range(1, pattern.count("/") + 1)}
# A killed process leaves what it hadn't moved to its place: `files.write_whole`'s, and safetensors' own.
TORN = re.compile(r"(.*\.\d+\.tmp|.+/\.tmp[A-Za-z0-9]{6})")
LEFT_BY_DESKTOPS = (".DS_Store", "Thumbs.db", "desktop.ini")


def is_run(folder: Path) -> bool:
    """Whether one of our scripts has begun a run in this folder."""
    return (read_args(folder) or {}).keys() >= marks_of_a_run()


def read_args(folder: Path) -> dict[str, object] | None:
    """The flags in the `args.yaml` of a run or a checkpoint; `None` where there is none, or something else.

    Flags are plain values and lists of them. What nests deeper, such as lists of lists that fill the memory when they
    are printed, nobody's run has written.
    """
    if not is_regular(folder / "args.yaml"):
        return None
    try:
        flags = parse_yaml((folder / "args.yaml").read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(flags, dict):
        return None
    parts = [part for value in flags.values() for part in (value if isinstance(value, list) else [value])]
    return None if any(isinstance(part, (list, dict, set)) for part in parts) else flags


def contents(folder: Path) -> tuple[list[Path], list[str]]:
    """What of a run's folder our scripts have written, what lies in a folder before it; and the names of all else.

    Symbolic links are not followed.
    """
    ours, foreign = [], []

    def look(inside: Path) -> None:
        for path in sorted(inside.iterdir()):
            name = path.relative_to(folder).as_posix()
            is_folder = path.is_dir() and not path.is_symlink()
            if is_folder and fits(name, RUN_FOLDERS):
                look(path)
            elif is_folder or not (is_of_run(path, name) or (path.is_symlink() and fits(name, RUN_FOLDERS))):
                foreign.append(name)
                continue
            ours.append(path)

    look(folder)
    return ours, foreign


def is_of_run(path: Path, name: str) -> bool:
    """Whether a file, by its name within a run's folder, is one that our scripts write."""
    if name == "README.md":
        try:
            return is_regular(path) and CARD_MARK in path.read_text("utf-8")
        except (OSError, ValueError):
            return False
    if TORN.fullmatch(name):
        return path.name.startswith(".tmp") or fits(name.rsplit(".", 2)[0], RUN_FILES)
    return path.name in LEFT_BY_DESKTOPS or fits(name, RUN_FILES)


def fits(name: str, patterns: tuple[str, ...] | set[str]) -> bool:
    """Whether a name fits one of the patterns; a star stands for part of one name, never for a folder."""
    name = re.sub(r"^(checkpoint|unfinished)-[0-9]+(?=/|$)", r"\1-<step>", name)
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


def remove(folder: Path, unfinished_only: bool) -> None:
    """Take out of a run's folder what our scripts have written, or of that what a killed run had not finished.

    What says whose the folder is stays: `args.yaml`, and the lock.
    """
    for path in contents(folder)[0]:
        name = path.relative_to(folder).as_posix()
        if name in ("args.yaml", LOCK) or (unfinished_only and not is_unfinished(name)):
            continue
        if unfinished_only and path.is_symlink():  # somebody's
            continue
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError) if unfinished_only else nullcontext():  # where something of somebody else is in it
                path.rmdir()
        else:
            path.unlink()


def is_unfinished(name: str) -> bool:
    """Whether what is called so within a run's folder is what a killed run was writing."""
    return name.startswith("unfinished-") or TORN.fullmatch(name) is not None


def whose_else(folder: Path) -> str | None:
    """Why a folder must never be emptied, whatever it holds; `None` where nothing speaks against it."""
    folder = folder.resolve()
    for what, path in {"the current folder": Path.cwd(), "your home folder": Path(os.path.expanduser("~"))}.items():
        if path.resolve() == folder:
            return f"is {what}"
        if path.resolve().is_relative_to(folder):
            return f"holds {what}"
    return "is where a disk is mounted" if os.path.ismount(folder) else None


def read_log(path: Path) -> list[dict]:
    """The lines of a `log.jsonl`, in order of steps; of a step logged twice, the later line.

    Where a resumed run goes back to a step, what stood there and beyond is no longer part of the run: it may have had
    another learning rate. What is no object with a step, such as a killed run's last words, is passed over.
    """
    lines = {}
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < 2**63:
            if lines and line["step"] < next(reversed(lines))[0]:
                while lines and next(reversed(lines))[0] >= line["step"]:
                    lines.popitem()
            lines[line["step"], "steps_per_second" not in line] = line  # held-out values stand behind training losses
    return [lines[key] for key in sorted(lines)]


# What must be what, by the file that says it; `None` stands for what isn't known. What else is there, and not as
# the page wants it, is left out.
CHECKED = {
    "metrics": {
        "a number": "step training_seconds num_images",
        "a text": "dataset device vgg_weights",
        "a list of names": "splits",
        "a mapping": "evaluation versions",
    },
    "evaluation": {
        "a list of names": "remarks",
        "a text or a list of names": "command",
        "a list of mappings of numbers": "sweep",
        "a mapping": "sampling features splits reconstruction against_held_out memorization versions",
    },
    "index": {"a mapping of labels to names": "id2label"},
    "config": {
        "a number": "in_channels latent_channels num_classes",
        "a text": "_class_name _diffusers_version prediction_type beta_schedule",
        "a number or a list of them": "sample_size",
    },
}


@dataclass
class Run:
    """What a run's folder says: which stage, its flags, log, metrics and models, each empty where the file is missing.

    `configs` and `num_parameters` are by component: "autoencoder" and, of stage 2, "denoiser".
    """

    folder: Path
    stage: str  # "autoencoder" or "latent_diffusion"
    args: dict
    log: list[dict]
    metrics: dict
    configs: dict[str, dict]
    num_parameters: dict[str, int]
    class_names: list[str]

    @property
    def finished(self) -> bool:
        return bool(self.metrics)

    @property
    def last_step(self) -> int | None:
        return self.metrics.get("step") or (self.log[-1]["step"] if self.log else None)

    @property
    def evaluation(self) -> dict:
        return nested(self.metrics, "evaluation")


def read_run(folder: Path) -> Run:
    """Read all that a page shows, except for the pictures. What it gives has the types that `CHECKED` says.

    Raises:
        InputError: where `folder` is no run of either stage, or one of its files can't be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name the --output_dir of a training run")
    args, metrics, log = read_flags(folder), read_mapping(folder / "metrics.json", "metrics"), _read_log(folder)
    _check(folder / "metrics.json", nested(metrics, "evaluation"), "evaluation")
    index = read_mapping(folder / "model_index.json", "index")
    names = set().union(args, metrics, *log)
    if not names:
        raise InputError(f"{folder} is no training run: it has no args.yaml, log.jsonl or metrics.json")
    if index or names & {"autoencoder", "unweighted_loss", "val_unweighted_loss"}:
        stage, parts = "latent_diffusion", {"denoiser": folder / "unet", "autoencoder": folder / "vae"}
    elif names & {"pixel_weight", "pixel_loss", "val_pixel_loss"}:
        stage, parts = "autoencoder", {"autoencoder": folder}
    else:
        raise InputError(f"{folder} is a run of neither train_autoencoder.py nor train_latent_diffusion.py")
    class_names = [str(name) for _, name in sorted(nested(index, "id2label").items(), key=lambda item: int(item[0]))]
    configs = {name: read_mapping(path / "config.json", "config") for name, path in parts.items()}
    if stage == "latent_diffusion":
        configs["scheduler"] = read_mapping(folder / "scheduler" / "scheduler_config.json", "config")
    num_parameters = {name: _count_parameters(path) for name, path in parts.items()}
    return Run(folder, stage, args, log, metrics, configs, num_parameters, class_names)


def read_flags(folder: Path) -> dict:
    """The flags of a run, each a number, a text, or a list of such; empty where there is no `args.yaml`.

    Raises:
        InputError: where the file can't be read, or holds something else.
    """
    path = folder / "args.yaml"
    args = read_mapping(path)
    for name, value in args.items():
        if not (isinstance(name, str) and re.fullmatch(r"\w+", name, re.ASCII)):
            raise InputError(f"{path}: {name!s:.40} is no flag")
        kind = flag_of(name).kind
        if kind is not None and value is not None and not TYPES[kind](value):
            raise InputError(f"{path}: {name} must be {kind}, not {_kind(value)}")
        if not (value is None or _is_scalar(value) or _is_words(value)):
            raise InputError(f"{path}: {name} must be a number, a text, or a list of such, not {_kind(value)}")
    return args


def read_mapping(path: Path, kind: str | None = None) -> dict:
    """A JSON or YAML file that holds one mapping; empty where there is no such file.

    Raises:
        InputError: where it can't be read, or something in it is not what `CHECKED` says of this kind of file.
    """
    if not os.path.isfile(path):  # of a name too long for a file neither
        return {}
    try:
        text = path.read_text("utf-8")
        content = parse_yaml(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} can't be read: {one_line(error)}") from error
    except RecursionError:
        raise InputError(f"{path} can't be read: it is nested too deeply") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold names and values")
    if kind is not None:
        _check(path, content, kind)
    return content


def _check(path: Path, content: dict, kind: str) -> None:
    for what, names in CHECKED[kind].items():
        for name in names.split():
            if content.get(name) is not None and not TYPES[what](content[name]):
                raise InputError(f"{path}: {name} must be {what}, not {_kind(content[name])}")


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "a text", bool: "yes or no", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_scalar(value: object) -> bool:
    return isinstance(value, (int, float, str))


def _is_words(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_scalar, value))


def _is_point(value: object) -> bool:
    """Of a sweep: what was measured at one guidance scale and number of steps."""
    return isinstance(value, dict) and all(one is None or _is_number(one) for one in value.values())


LABEL = re.compile("[0-9]{1,9}")


TYPES = {
    "a number": _is_number,
    "yes or no": lambda value: isinstance(value, bool),
    "a text": lambda value: isinstance(value, str),
    "a mapping": lambda value: isinstance(value, dict),
    "a list of names": _is_words,
    "a text or a list of names": lambda value: isinstance(value, str) or _is_words(value),
    "a number or a list of them": lambda value: all(map(_is_number, value if isinstance(value, list) else [value])),
    "a list of mappings of numbers": lambda value: isinstance(value, list) and all(map(_is_point, value)),
    "a mapping of labels to names": lambda value: isinstance(value, dict) and all(map(LABEL.fullmatch, value)),
}


def _read_log(folder: Path) -> list[dict]:
    path = folder / "log.jsonl"
    try:
        log = read_log(path) if path.is_file() else []
    except OSError as error:
        raise InputError(f"{path} can't be read: {one_line(error)}") from error
    for line in log:
        bins = line.get("loss_by_timestep")
        if bins is not None and not (isinstance(bins, list) and all(map(is_bin, bins))):
            raise InputError(f"{path}: loss_by_timestep of step {number(line['step'])} must be a list of "
                             "[first timestep, last timestep, loss]")  # fmt: skip
    return log


def is_bin(value: object) -> bool:
    """A range of timesteps and the mean loss there, `None` where there was none."""
    return isinstance(value, list) and len(value) == 3 and is_finite(value[0]) and is_finite(value[1])


def nested(mapping: dict, *names: str) -> dict:
    """A mapping within mappings; empty where there is none."""
    for name in names:
        mapping = mapping.get(name) if isinstance(mapping, dict) else None
    return mapping if isinstance(mapping, dict) else {}


def _count_parameters(folder: Path) -> int:
    """Numbers in a model's safetensors files, from their headers alone; 0 where there are none."""
    count = 0
    for path in filter(Path.is_file, folder.glob("diffusion_pytorch_model*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            return 0
    return count
