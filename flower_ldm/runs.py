"""A run's folder: what our scripts write into it, and whether a folder is a run of ours and holds nothing else."""

import os
import re
from contextlib import nullcontext, suppress
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from .files import is_regular, parse_yaml
from .run_lock import LOCK

# Flags that both scripts keep in args.yaml; no other program has all of them.
RUN_FLAGS = frozenset({
    "checkpoints_total_limit", "ema_decay", "final_pictures", "images_per_class", "label_column",
    "overwrite_output_dir", "skip_bad_images",
})  # fmt: skip
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
    return (read_args(folder) or {}).keys() >= RUN_FLAGS


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
