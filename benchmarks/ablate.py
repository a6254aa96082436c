"""Compare variants of a recipe at equal seconds of training. Each arm changes one thing of another arm.

    python benchmarks/ablate.py --data_dir data --vgg_weights PATH
    python benchmarks/ablate.py --arms baseline "no min-SNR weights" --seeds 0 1

The arms are in `benchmarks/ablations.yaml`. Each trains both stages, in as many updates as the given seconds allow at
a rate that is measured first. Arms with the same stage 1 share it. Schedules keep their share of the updates. Every
pipeline is judged by its samples at several guidance scales, and by the held-out loss at unit weight and uniform
timesteps. A result is kept in `--output_dir`, so the same command goes on after an interruption.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

import yaml

# Python adds this file's folder to the path. The package is in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flower_ldm import runs
from flower_ldm.errors import InputError, OneLineParser, exit_on_input_error
from flower_ldm.files import file_path, parse_yaml, path_text
from flower_ldm.metrics import RECONSTRUCTIONS
from flower_ldm.recipes import STAGES

ROOT = Path(__file__).resolve().parent.parent
# The flags of a recipe that count updates, and must stay the same share of a shorter training.
SCHEDULES = ("lr_warmup_steps", "disc_start", "loss_ramp_steps")
CALIBRATION_STEPS, LOGGED_STEPS = 24, 4
COLUMNS = {
    "arm": "arm", "seed": "seed", "steps": "updates", "seconds": "seconds", "psnr": "PSNR",
    "reconstructions": "named (rec.)", "val_loss": "held-out loss", "guidance_scale": "guidance", "kid": "KID",
    "frechet_distance": "FD", "class_accuracy": "named", "recall": "recall",
}  # fmt: skip
DECIMALS = {"psnr": 2, "reconstructions": 3, "val_loss": 4, "kid": 3, "frechet_distance": 0, "class_accuracy": 3,
            "recall": 2, "seconds": 0, "guidance_scale": 1}  # fmt: skip


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--ablations", type=file_path, default=ROOT / "benchmarks" / "ablations.yaml", help="YAML file of the arms")
    flag("--arms", nargs="+", help="names of the arms to run; unset: all")
    flag("--seeds", type=int, nargs="+", default=[0])
    flag("--data_dir", type=path_text, help="the folder that holds the data set")
    flag("--vgg_weights", type=path_text, help="local file with torchvision's weights of VGG16")
    flag("--output_dir", type=file_path, default=Path("results/ablations"), help="folder of all runs and results")
    return parser.parse_args(argv)


# --- the arms --------------------------------------------------------------------------------------------------------


def read_ablations(path: Path) -> dict:
    """The file of the arms, each arm with the changes of the arm that it is based on.

    Raises:
        InputError: the file is not YAML, or an arm is based on none that stands before it.
    """
    try:
        ablations = parse_yaml(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"--ablations {path} can't be read: {error}") from error
    arms = {}
    for arm in ablations["arms"]:
        if unknown := arm.keys() - {"name", "base", *STAGES, *(f"{stage}_model" for stage in STAGES)}:
            raise InputError(f"--ablations {path}: arm {arm.get('name')!r} has the unknown key {unknown.pop()!r}")
        base = arm.get("base")
        if base is not None and base not in arms:
            raise InputError(
                f"--ablations {path}: {arm['name']!r} is based on {base!r}, which doesn't stand before it"
            )
        inherited = arms.get(base, {})
        arms[arm["name"]] = {
            stage: {
                "flags": inherited.get(stage, {}).get("flags", {}) | arm.get(stage, {}),
                "model": inherited.get(stage, {}).get("model", {}) | arm.get(f"{stage}_model", {}),
            }
            for stage in STAGES
        }
    return ablations | {"arms": arms}


def recipe_settings(path: Path, stage: str) -> tuple[dict, dict]:
    """The flags of a recipe for a stage, and the arguments of its model."""
    recipe = parse_yaml(path.read_bytes())
    flags = recipe.get("common", {}) | recipe[stage]
    config = flags.pop("model_config", None)
    return flags, json.loads((path.parent / config).read_text()) if config else {}


def stage_settings(ablations: dict, arm: str, stage: str, options: argparse.Namespace) -> tuple[dict, dict]:
    """The flags of an arm's stage, and the arguments of its model: the recipe's, then the arm's."""
    flags, model = recipe_settings(options.ablations.parent / ablations["recipe"], stage)
    changes = ablations["arms"][arm][stage]
    return flags | changes["flags"], model | changes["model"]


# --- one arm ---------------------------------------------------------------------------------------------------------


def run_program(*words: object) -> None:
    """Run a command of this project. Its output goes to the terminal.

    Raises:
        InputError: it fails.
    """
    command = [sys.executable, *map(str, words)]
    if code := subprocess.run(command, cwd=ROOT).returncode:
        raise InputError(f"{' '.join(command[1:3])} has ended with exit code {code}")


def train_stage(
    stage: str, flags: dict, model: dict, seconds: float, folder: Path, options: argparse.Namespace
) -> dict:
    """Train a stage for about `seconds`, and return its metrics. A finished run is only read.

    The number of updates follows from a rate that is measured first.
    """
    metrics = runs.METRICS_FILE.path(folder)
    if metrics.is_file():
        return json.loads(metrics.read_text())
    flags = run_flags(stage, flags, model, folder, options)
    steps = round(seconds / seconds_per_update(stage, flags, folder.with_name("calibration")))
    run_program(*stage_command(stage, scaled(flags, steps), folder))
    return json.loads(metrics.read_text())


def run_flags(stage: str, flags: dict, model: dict, folder: Path, options: argparse.Namespace) -> dict:
    """The flags of a run in this folder, beside which its `--model_config` is written."""
    model_config = folder.with_name(f"{folder.name}.json")
    model_config.write_text(json.dumps(model))
    paths = {"data_dir": options.data_dir} | ({"vgg_weights": options.vgg_weights} if stage == "autoencoder" else {})
    paths = {name: Path(path).resolve() for name, path in paths.items() if path}
    quiet = {"report_to": "none", "logging_steps": LOGGED_STEPS, "validation_steps": 10**6}
    return flags | quiet | paths | {"model_config": model_config.resolve()}


def seconds_per_update(stage: str, flags: dict, folder: Path) -> float:
    """Measure the time of an update in a short training, which leaves nothing behind. The first ones don't count."""
    run_program(*stage_command(stage, scaled(flags, CALIBRATION_STEPS), folder))
    lines = [line for line in runs.read_log(runs.LOG_FILE.path(folder)) if "steps_per_second" in line]
    shutil.rmtree(folder)
    return mean(1 / line["steps_per_second"] for line in lines[1:])


def scaled(flags: dict, steps: int) -> dict:
    """The flags for a training of so many updates. Schedules keep their share."""
    share = steps / flags["max_train_steps"]
    shorter = {name: round(flags[name] * share) for name in SCHEDULES if name in flags}
    return flags | shorter | {"max_train_steps": steps, "checkpointing_steps": steps}


def stage_command(stage: str, flags: dict, folder: Path) -> list:
    """The words of a training with these flags, without the last pictures."""
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *value]
        elif value is not None:
            words.append(f"--{name}={value}")
    history = [f"--output_dir={folder.resolve()}", "--overwrite_output_dir", "--no-final_pictures"]
    return [f"train_{stage}.py", *words, *history]


def run_arm(ablations: dict, arm: str, seed: int, options: argparse.Namespace) -> dict:
    """Train both stages of an arm and measure its pipeline. Returns a row of the table."""
    output_dir, seconds = options.output_dir, ablations["seconds"]
    flags, model = stage_settings(ablations, arm, "autoencoder", options)
    flags["seed"] = seed
    settings = json.dumps([flags, model, seconds["autoencoder"]], sort_keys=True)
    autoencoder = output_dir / f"autoencoder-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    stage1 = train_stage("autoencoder", flags, model, seconds["autoencoder"], autoencoder, options)

    folder = output_dir / f"{re.sub('[^a-z0-9.]+', '-', arm.lower())}-{seed}"
    flags, model = stage_settings(ablations, arm, "latent_diffusion", options)
    flags |= {"seed": seed, "autoencoder": autoencoder.resolve()}
    flags["latent_cache_dir"] = (output_dir / "latents").resolve()
    stage2 = train_stage("latent_diffusion", flags, model, seconds["latent_diffusion"], folder, options)
    if "evaluation" not in stage2:
        scales = ablations["guidance_scales"]
        run_program(
            "-m", "flower_ldm.evaluation", "--pipeline", folder.resolve(), "--num_samples", ablations["num_samples"],
            "--cache_dir", (output_dir / "evaluation").resolve(), "--dtype", ablations["dtype"],
            "--guidance_scale", scales[0], "--sweep_guidance", *scales,
        )  # fmt: skip
        stage2 = json.loads(runs.METRICS_FILE.path(folder).read_text())
    return row_of(arm, seed, stage1, stage2)


def row_of(arm: str, seed: int, stage1: dict, stage2: dict) -> dict:
    """A row of the table, at the guidance scale of the lowest KID."""
    evaluation = stage2["evaluation"]
    best = min(evaluation["sweep"], key=lambda point: point["kid"])
    return {
        "arm": arm, "seed": seed, "steps": f"{stage1['step']} + {stage2['step']}",
        "seconds": stage1["training_seconds"] + stage2["training_seconds"], "psnr": stage1["psnr"],
        "reconstructions": evaluation[runs.AGAINST_HELD_OUT][RECONSTRUCTIONS.key]["class_accuracy"],
        "val_loss": stage2["val_unweighted_loss"],
        **{name: best[name] for name in ("guidance_scale", "kid", "frechet_distance", "class_accuracy", "recall")},
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = [f"{row[name]:.{DECIMALS[name]}f}" if name in DECIMALS else str(row[name]) for name in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    ablations = read_ablations(options.ablations)
    names = options.arms or list(ablations["arms"])
    if unknown := [name for name in names if name not in ablations["arms"]]:
        raise InputError(f"--arms {unknown[0]!r} is none of {options.ablations}: {', '.join(ablations['arms'])}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in options.seeds:
        for name in names:
            rows.append(run_arm(ablations, name, seed, options))
            print(table(rows), flush=True)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
