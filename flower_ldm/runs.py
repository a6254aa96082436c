"""The folder of a run: the files that our scripts write there, and tests whether a folder holds a run and no more."""

import json
import math
import os
import platform
import re
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import accelerate
import diffusers
import torch
import yaml
from safetensors import SafetensorError, safe_open

from . import __version__
from .errors import InputError, one_line
from .files import is_regular, parse_yaml, write_whole
from .formatting import is_finite, number
from .recipes import marks_of_a_run, training_flags
from .run_lock import LOCK

# A run wrote the card if it has this line; otherwise it belongs to the user, and is never overwritten.
CARD_MARK = "<!-- Written by flower_ldm. Take this line out, and your changes will not be overwritten. -->"


# --- the files of a run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """A kind of file that a run or its evaluation writes into the run's folder.

    Attributes:
        name: path in the folder. A star stands for the part that differs between files of this kind, such as the class
            or the update, but never for a folder. <step> stands for the digits of an update.
        alt: alternative text of a picture, for readers who can't see it; with the star of the name.
        caption: text below a picture; with the star of the name.
        stage: the stage that writes it, as in `Run.stage`; `None` for both.
        shows_photographs: the picture shows photographs of the data set, or their reconstructions. Then it appears
            neither in the card nor on the Hub.
        on_hub: a push uploads it.
    """

    name: str
    alt: str = ""
    caption: str = ""
    stage: str | None = None
    shows_photographs: bool = False
    on_hub: bool = False

    def path(self, folder: str | Path, which: str | int = "") -> Path:
        """The file's path in a folder. `which` replaces the star; the number of an update gets eight digits."""
        return Path(folder) / self.name.replace("*", f"{which:08d}" if isinstance(which, int) else which)

    def found(self, folder: Path) -> list[tuple[str, Path]]:
        """The files of this kind in a folder, sorted: the part that the star stands for, and the path."""
        before, _, after = self.name.partition("*")
        names = [(path.relative_to(folder).as_posix(), path) for path in sorted(folder.glob(self.name))]
        return [(name.removeprefix(before).removesuffix(after), path) for name, path in names]

    def texts(self, which: str = "") -> tuple[str, str]:
        """Alternative text and caption. `which` replaces the star, worded for people."""
        return self.alt.replace("*", which), self.caption.replace("*", which)


ARGS_FILE = Artifact("args.yaml", on_hub=True)
LOG_FILE = Artifact("log.jsonl")
METRICS_FILE = Artifact("metrics.json", on_hub=True)
CARD_FILE = Artifact("README.md", on_hub=True)
PAGE_FILE = Artifact("report.html", shows_photographs=True)

# Models, with diffusers' names. The patterns of the weights must not match a latent cache: it may lie in the same
# folder, and photographs can be decoded from it.
MODEL_CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model.safetensors.index*.json")
AUTOENCODER_FILES = (MODEL_CONFIG, *WEIGHTS, "autoencoder_flower.py")
UNET_FILES = (MODEL_CONFIG, *WEIGHTS, "unet_flower.py")
BEST = "best"  # folder of stage 1's best weights
PIPELINE_INDEX = Artifact("model_index.json", stage="latent_diffusion", on_hub=True)
SCHEDULER_CONFIG = Artifact("scheduler/scheduler_config.json", stage="latent_diffusion", on_hub=True)
MODELS = (
    *(Artifact(name, stage="autoencoder", on_hub=True) for name in AUTOENCODER_FILES),
    *(Artifact(f"{BEST}/{name}", stage="autoencoder") for name in AUTOENCODER_FILES),
    PIPELINE_INDEX, SCHEDULER_CONFIG, Artifact("pipeline_flower_ldm.py", stage="latent_diffusion", on_hub=True),
    *(Artifact(f"{component}/{name}", stage="latent_diffusion", on_hub=True)
      for component, names in {"vae": AUTOENCODER_FILES, "unet": UNET_FILES, "guide": UNET_FILES}.items()
      for name in names),
)  # fmt: skip

AUTOENCODER_LOSSES = Artifact(
    "autoencoder_losses.png", "The losses over the updates", stage="autoencoder", on_hub=True
)
RECONSTRUCTION_GRIDS = Artifact(
    "reconstructions/step-*.png", "Reconstructions at update *", "Update *",
    stage="autoencoder", shows_photographs=True,
)  # fmt: skip
LATENT_MAP = Artifact("latent_space_*.png", "Latents by *, colored by class", on_hub=True)
LATENT_MAPS = {  # the star of LATENT_MAP: (name of the method, caption)
    "tsne": ("t-SNE", "t-SNE: neighbors stay neighbors; distances between clouds mean little."),
    "pca": ("PCA", "PCA: the two directions along which the latents vary most; distances are true to scale."),
}
DIFFUSION_LOSS = Artifact("diffusion_loss.png", "The loss over the updates", stage="latent_diffusion", on_hub=True)
SAMPLE_GRIDS = Artifact("samples/step-*.png", "Samples at update *", "Update *", stage="latent_diffusion", on_hub=True)
CLASS_GRID = Artifact(
    "vae_samples_grid_subset.png", "Images that this model drew, one class a column",
    "Every image is drawn by the model; none is a photograph.", stage="latent_diffusion", on_hub=True,
)  # fmt: skip
SIDE_BY_SIDE = Artifact(
    "original_reconstructed_generated.png", "Originals, their reconstructions and generated images",
    "Originals, what the autoencoder makes of them, and generated images of the same classes.",
    stage="latent_diffusion", shows_photographs=True,
)  # fmt: skip
DENOISING_PATH = Artifact(
    "denoising_path_*.png", "The denoising path of one sample of class *", "*: the path of one sample",
    stage="latent_diffusion", on_hub=True,
)  # fmt: skip
ANIMATION = Artifact(
    "diffusion_animation_*.gif", "Animation: a sample of class * emerges", "*", stage="latent_diffusion", on_hub=True
)
FILM = Artifact("diffusion_animation_*.mp4", stage="latent_diffusion", on_hub=True)
INTERPOLATION = Artifact(
    "interpolation_*.png", "Images between two *", "Between two *.", stage="latent_diffusion", on_hub=True
)
GUIDANCE_SWEEP = Artifact(
    "guidance_sweep.png", "The same seeds at several guidance scales", "The same seeds at several guidance scales.",
    stage="latent_diffusion", on_hub=True,
)  # fmt: skip
EVALUATION_SWEEP = Artifact(
    "evaluation_sweep.png", "Metrics over guidance and steps", stage="latent_diffusion", on_hub=True
)
NEAREST_NEIGHBORS = Artifact(
    "nearest_neighbours.png",  # British spelling, because users know the file by this name
    "Samples beside the training images nearest to them",
    "The most suspicious samples, each beside the training images nearest to it.",
    stage="latent_diffusion", shows_photographs=True,
)  # fmt: skip
PICTURES = (
    AUTOENCODER_LOSSES, RECONSTRUCTION_GRIDS, LATENT_MAP, DIFFUSION_LOSS, SAMPLE_GRIDS, CLASS_GRID, SIDE_BY_SIDE,
    DENOISING_PATH, ANIMATION, FILM, INTERPOLATION, GUIDANCE_SWEEP, EVALUATION_SWEEP, NEAREST_NEIGHBORS,
)  # fmt: skip

# Folders. After a hyphen follows an update or, for the samples of an evaluation, a digest.
LATENT_CACHE, EVALUATION_CACHE, DRAWN_SAMPLES, LOGS = "latent_cache", "evaluation_cache", "samples-", "logs"
CHECKPOINT, ASIDE = "checkpoint-", "-aside-"  # checkpoint-<step>-aside-<number> is an old one of the same step
UNFINISHED = "unfinished-"  # a checkpoint that is being written or removed; and, for the export of a model:
UNFINISHED_BEST, UNFINISHED_EXPORT = "unfinished-best", "unfinished-export"
WORKING_FILES = (
    LOCK, f"{LATENT_CACHE}/*.safetensors", f"{EVALUATION_CACHE}/*.safetensors",
    f"{EVALUATION_CACHE}/{DRAWN_SAMPLES}*/*.safetensors",
    *(f"{LOGS}/{folder}{name}" for folder in ("", "*/", "*/*/") for name in ("events.out.tfevents.*", "hparams.yml")),
    *(f"{folder}<step>/{name}" for folder in (CHECKPOINT, UNFINISHED)
      for name in ("*.safetensors", "*.bin", "*.pkl", "*.pt", "*.json", "*.yaml")),
    *(f"{unfinished}/{folder}{name}" for unfinished in (UNFINISHED_BEST, UNFINISHED_EXPORT) for folder in ("", "*/")
      for name in ("*.json", "*.safetensors", "*.py")),
)  # fmt: skip

# All files that a run and its evaluation may leave, finished or killed.
ARTIFACTS = (ARGS_FILE, LOG_FILE, METRICS_FILE, CARD_FILE, PAGE_FILE, *MODELS, *PICTURES,
             *map(Artifact, WORKING_FILES))  # fmt: skip
RUN_FILES = tuple(artifact.name for artifact in ARTIFACTS)
RUN_FOLDERS = {name.rsplit("/", depth)[0] for name in RUN_FILES for depth in range(1, name.count("/") + 1)}
OF_A_STEP = re.compile(f"^(?:({CHECKPOINT})[0-9]+(?:{ASIDE}[0-9]+)?|({UNFINISHED})[0-9]+)(?=/|$)")
# Temporary files that a killed process may leave, of `files.write_whole` and of safetensors.
TORN = re.compile(r"(.*\.\d+\.tmp|.+/\.tmp[A-Za-z0-9]{6})")
LEFT_BY_DESKTOPS = (".DS_Store", "Thumbs.db", "desktop.ini")


def public_files(stage: str) -> tuple[str, ...]:
    """The names of the files that a push of this stage uploads, with their stars."""
    return tuple(artifact.name for artifact in ARTIFACTS if artifact.on_hub and artifact.stage in (None, stage))


# --- what belongs to a run -------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether one of our scripts has started a run in this folder."""
    return (read_args(folder) or {}).keys() >= marks_of_a_run()


def contents(folder: Path) -> tuple[list[Path], list[str]]:
    """The paths in a run's folder that our scripts have written, and the names of everything else.

    Files come before the folder that they lie in. Symbolic links are not followed.
    """
    ours, foreign = [], []

    def visit(inside: Path) -> None:
        for path in sorted(inside.iterdir()):
            name = path.relative_to(folder).as_posix()
            is_folder = path.is_dir() and not path.is_symlink()
            if is_folder and fits(name, RUN_FOLDERS):
                visit(path)
            elif is_folder or not (is_of_run(path, name) or (path.is_symlink() and fits(name, RUN_FOLDERS))):
                foreign.append(name)
                continue
            ours.append(path)

    visit(folder)
    return ours, foreign


def is_of_run(path: Path, name: str) -> bool:
    """Whether our scripts write a file of this name, which is relative to the run's folder."""
    if name == CARD_FILE.name:
        try:
            return is_regular(path) and CARD_MARK in path.read_text("utf-8")
        except (OSError, ValueError):
            return False
    if TORN.fullmatch(name):
        return path.name.startswith(".tmp") or fits(name.rsplit(".", 2)[0], RUN_FILES)
    return path.name in LEFT_BY_DESKTOPS or fits(name, RUN_FILES)


def fits(name: str, patterns: tuple[str, ...] | set[str]) -> bool:
    """Whether a name matches one of the patterns. A star never matches a slash."""
    name = OF_A_STEP.sub(lambda found: f"{found[1] or found[2]}<step>", name)
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


def remove(folder: Path, unfinished_only: bool) -> None:
    """Remove the files of our scripts from a run's folder, or only those that a killed run had not finished.

    `args.yaml`, which marks the folder as a run's, and the lock file stay.
    """
    for path in contents(folder)[0]:
        name = path.relative_to(folder).as_posix()
        if name in (ARGS_FILE.name, LOCK) or (unfinished_only and not is_unfinished(name)):
            continue
        if unfinished_only and path.is_symlink():  # the user's
            continue
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError) if unfinished_only else nullcontext():  # a file of the user is in it
                path.rmdir()
        else:
            path.unlink()


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is one that a killed run was still writing."""
    return name.startswith(UNFINISHED) or TORN.fullmatch(name) is not None


def whose_else(folder: Path) -> str | None:
    """The reason why a folder must never be emptied, or `None`. The reason completes the sentence "<folder> ..."."""
    folder = folder.resolve()
    for title, path in {"the current folder": Path.cwd(), "your home folder": Path(os.path.expanduser("~"))}.items():
        if path.resolve() == folder:
            return f"is {title}"
        if path.resolve().is_relative_to(folder):
            return f"holds {title}"
    return "is where a disk is mounted" if os.path.ismount(folder) else None


# --- reading a run ---------------------------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict]:
    """The lines of a `log.jsonl`, in order of steps. If a step was logged twice, the later line counts.

    When a resumed run goes back to a step, the old lines of that step and all later ones are dropped: they may belong
    to another learning rate. Lines that are not objects with a step are skipped, such as the torn last one of a killed
    run.
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
            lines[line["step"], "steps_per_second" not in line] = line  # held-out values come after training losses
    return [lines[key] for key in sorted(lines)]


# For each file, the keys that are read and the kinds of their values. A value of another kind is an error; for
# "anything", readers leave out values that they can't show. Additional keys are allowed. The keys of args.yaml are the
# flags.
METRICS_KEYS = {  # `write_metrics` writes no others
    # the run
    "step": "a number", "training_seconds": "a number", "num_images": "a number",
    "dataset": "a text", "splits": "a list of names", "vgg_weights": "a text",
    "device": "a text", "versions": "a mapping", "mixed_precision": "a text", "num_processes": "a number",
    # stage 1, on held-out images
    "psnr": "anything", "ssim": "anything", "psnr_of_mean_squared_error": "anything", "mean_squared_error": "anything",
    "val_pixel_loss": "anything", "val_perceptual_loss": "anything", "val_accuracy": "anything",
    # stage 2, on held-out images
    "val_loss": "anything", "val_unweighted_loss": "anything",
    "evaluation": "a mapping",
}  # fmt: skip
AGAINST_HELD_OUT = "against_held_out"
MEMORIZATION = "memorisation"  # British spelling, because users' programs read this key
EVALUATION_KEYS = {  # the same for the entry "evaluation"
    "pipeline": "anything", "dataset": "anything", "resolution": "anything", "num_classes": "anything",
    "splits": "a mapping", "features": "a mapping", "classifier": "anything", "sampling": "a mapping",
    "reconstruction": "a mapping", AGAINST_HELD_OUT: "a mapping",
    MEMORIZATION: "a mapping",
    "sweep": "a list of mappings of numbers", "remarks": "a list of names", "versions": "a mapping",
    "seconds": "anything", "command": "a text or a list of names",
}  # fmt: skip
INDEX_KEYS = {"id2label": "a mapping of labels to names", "_diffusers_version": "a text"}
CONFIG_KEYS = {
    "in_channels": "a number", "latent_channels": "a number", "num_classes": "a number",
    "_class_name": "a text", "_diffusers_version": "a text", "prediction_type": "a text", "beta_schedule": "a text",
    "sample_size": "a number or a list of them",
}  # fmt: skip


@dataclass
class Run:
    """The contents of a run's folder: stage, flags, log, metrics and models. If a file is missing, its field is empty.

    The keys of `configs` and `num_parameters` are components: "autoencoder" and, for stage 2, "denoiser". `configs`
    of stage 2 also has "scheduler" and "pipeline".
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
    """Read everything that the report shows, except for the pictures. All values have the kinds of the tables above.

    Raises:
        InputError: `folder` is not a run of either stage, or one of its files can't be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name the --output_dir of a training run")
    args, log = read_flags(folder), _read_log(folder)
    metrics = read_mapping(METRICS_FILE.path(folder), METRICS_KEYS)
    _check(METRICS_FILE.path(folder), nested(metrics, "evaluation"), EVALUATION_KEYS)
    index = read_mapping(PIPELINE_INDEX.path(folder), INDEX_KEYS)
    names = set().union(args, metrics, *log)
    if not names:
        files = f"{ARGS_FILE.name}, {LOG_FILE.name} or {METRICS_FILE.name}"
        raise InputError(f"{folder} is no training run: it has no {files}")
    if index or names & {"autoencoder", "unweighted_loss", "val_unweighted_loss"}:
        stage, models = "latent_diffusion", {"denoiser": folder / "unet", "autoencoder": folder / "vae"}
    elif names & {"pixel_weight", "pixel_loss", "val_pixel_loss"}:
        stage, models = "autoencoder", {"autoencoder": folder}
    else:
        raise InputError(f"{folder} is a run of neither train_autoencoder.py nor train_latent_diffusion.py")
    class_names = [str(name) for _, name in sorted(nested(index, "id2label").items(), key=lambda item: int(item[0]))]
    configs = {name: read_mapping(path / MODEL_CONFIG, CONFIG_KEYS) for name, path in models.items()}
    if stage == "latent_diffusion":
        configs["scheduler"] = read_mapping(SCHEDULER_CONFIG.path(folder), CONFIG_KEYS)
        configs["pipeline"] = index
    num_parameters = {name: _count_parameters(path) for name, path in models.items()}
    return Run(folder, stage, args, log, metrics, configs, num_parameters, class_names)


def read_flags(folder: Path) -> dict:
    """The flags of a run: numbers, texts, or lists of them. Empty if there is no `args.yaml`.

    Raises:
        InputError: the file can't be read, or holds something else.
    """
    path = ARGS_FILE.path(folder)
    args = read_mapping(path, {name: flag.kind for name, flag in training_flags().items()})
    for name, value in args.items():
        if not (isinstance(name, str) and re.fullmatch(r"\w+", name, re.ASCII)):
            raise InputError(f"{path}: {name!s:.40} is no flag")
        if not (value is None or _is_scalar(value) or _is_list_of_names(value)):
            raise InputError(f"{path}: {name} must be a number, a text, or a list of such, not {_kind(value)}")
    return args


def read_args(folder: Path) -> dict[str, object] | None:
    """As `read_flags`, for a folder that may not be a run: `None` if `args.yaml` is missing, invalid or a link."""
    try:
        return read_flags(folder) if is_regular(ARGS_FILE.path(folder)) else None
    except InputError:
        return None


def read_mapping(path: Path, keys: dict[str, str]) -> dict:
    """Read a JSON or YAML file that holds one mapping. Empty if there is no such file.

    Args:
        keys: the kind that the value of each key must have, one of `TYPES`.

    Raises:
        InputError: the file can't be read, or a value has another kind.
    """
    if not os.path.isfile(path):  # unlike `Path.is_file`, False for a name that is too long
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
    _check(path, content, keys)
    return content


def _check(path: Path, content: dict, keys: dict[str, str]) -> None:
    for name, kind in keys.items():
        if content.get(name) is not None and not TYPES[kind](content[name]):
            raise InputError(f"{path}: {name} must be {kind}, not {_kind(content[name])}")


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "a text", bool: "yes or no", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_scalar(value: object) -> bool:
    return isinstance(value, (int, float, str))


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_scalar, value))


def _is_point(value: object) -> bool:
    """Whether the value is one point of a sweep: the numbers at one guidance scale and number of steps."""
    return isinstance(value, dict) and all(one is None or _is_number(one) for one in value.values())


LABEL = re.compile("[0-9]{1,9}")


TYPES = {
    "anything": lambda value: True,
    "a number": _is_number,
    "yes or no": lambda value: isinstance(value, bool),
    "a text": lambda value: isinstance(value, str),
    "a mapping": lambda value: isinstance(value, dict),
    "a list of names": _is_list_of_names,
    "a text or a list of names": lambda value: isinstance(value, str) or _is_list_of_names(value),
    "a number or a list of them": lambda value: all(map(_is_number, value if isinstance(value, list) else [value])),
    "a list of mappings of numbers": lambda value: isinstance(value, list) and all(map(_is_point, value)),
    "a mapping of labels to names": lambda value: isinstance(value, dict) and all(map(LABEL.fullmatch, value)),
}


def _read_log(folder: Path) -> list[dict]:
    path = LOG_FILE.path(folder)
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
    """Whether the value is [first timestep, last timestep, mean loss]. The loss may be `None`."""
    return isinstance(value, list) and len(value) == 3 and is_finite(value[0]) and is_finite(value[1])


def nested(mapping: dict, *names: str) -> dict:
    """The mapping at `names` within nested mappings. Empty if there is none."""
    for name in names:
        mapping = mapping.get(name) if isinstance(mapping, dict) else None
    return mapping if isinstance(mapping, dict) else {}


def _count_parameters(folder: Path) -> int:
    """The number of parameters in a model's safetensors files, read from their headers. 0 without such files."""
    count = 0
    for path in filter(Path.is_file, folder.glob(WEIGHTS[0])):
        try:
            with safe_open(path, framework="numpy") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            return 0
    return count


# --- metrics.json ----------------------------------------------------------------------------------------------------


def write_metrics(path: Path, metrics: dict, others: dict | None = None) -> None:
    """Write a `metrics.json`. A reader sees the old file or the new one, whole.

    Args:
        others: other entries to keep in the file, unchecked. `metrics` wins over them.

    Raises:
        KeyError: a key is not declared in `METRICS_KEYS` or, under "evaluation", in `EVALUATION_KEYS`.
        DiskError: the file can't be written.
    """
    unknown = metrics.keys() - METRICS_KEYS.keys() | nested(metrics, "evaluation").keys() - EVALUATION_KEYS.keys()
    if unknown:
        raise KeyError(f"declare these keys of {METRICS_FILE.name} in runs.py: {', '.join(sorted(unknown))}")
    text = json.dumps((others or {}) | metrics, indent=2) + "\n"
    write_whole(path, lambda unfinished: unfinished.write_text(text))


def versions() -> dict[str, str]:
    """The versions of this package, of Python and of the libraries that affect a run's results most."""
    packages = {package.__name__: package.__version__ for package in (torch, diffusers, accelerate)}
    return {"flower_ldm": __version__, "python": platform.python_version(), **packages}
