"""Compare our recipe with models put together from stock parts: the same minutes, data, machine and evaluation.

    python benchmarks/time_to_quality.py --data_dir data --vgg_weights PATH --minutes 20
    python benchmarks/time_to_quality.py --data_dir data --vgg_weights PATH --contenders ours dit --seeds 0 1

A contender with an autoencoder spends half of its minutes on it. Learning rates are tried in shorter trainings first:
the published one and two others. Then each contender trains at its published rate and at the best one. The number of
updates follows from a rate that is measured alone. The trainings themselves take turns: each runs for some seconds and
stands still while the others run, so that a slow moment of the machine affects all. Samples of all are judged by the
same code at the best guidance scale. A finished training is kept in `--output_dir`: the same command goes on there.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch

# Python adds this file's folder to the path. The package and the other benchmarks are in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import ablate
from benchmarks.stock_contenders import AUTOENCODER, AUTOENCODER_LEARNING_RATES, CONTENDERS, load_stock_pipeline
from benchmarks.train_throughput import DEFAULT_RECIPE
from flower_ldm import FlowerLDMPipeline, recipes, runs
from flower_ldm.data import DataOptions
from flower_ldm.errors import InputError, OneLineParser, exit_on_input_error
from flower_ldm.evaluation import prepare_real
from flower_ldm.features import DEFAULT_FEATURES, extract_features, load_feature_network
from flower_ldm.files import file_path, path_text
from flower_ldm.lettering import save_figure
from flower_ldm.metrics import METRICS, measure_set
from flower_ldm.sampling import Sampler, load_pipeline, sample_labels

OURS = "ours"
CALIBRATION_STEPS, FEWEST_STEPS = 8, 4
STAGE_1_SHARE = 0.5  # of the minutes of a contender with an autoencoder
GUIDANCE_SCALES = (1.0, 2.0, 3.0, 4.0)
SHOWN = ("kid", "frechet_distance", "class_accuracy", "recall")  # of the metrics
METRIC_TITLES = {metric.key: metric.title for metric in METRICS}
COSTS = "costs.json"


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--contenders", nargs="+", choices=[OURS, *CONTENDERS], default=[OURS, *CONTENDERS])
    flag("--minutes", type=float, nargs="+", default=[20.0], help="of training; several draw quality over time")
    flag("--tuning_minutes", type=float, default=5.0, help="of each training that tries a learning rate")
    flag("--seeds", type=int, nargs="+", default=[0], help="of our recipe; the others have the first")
    flag("--num_samples", type=int, default=510, help="at each guidance scale")
    flag("--slice", type=float, default=20.0, help="seconds of each turn")
    flag("--config", type=file_path, default=DEFAULT_RECIPE, help="our recipe")
    flag("--data_dir", type=path_text, help="the folder that holds the data set")
    flag("--vgg_weights", type=path_text, help="local file with torchvision's weights of VGG16")
    flag("--output_dir", type=file_path, default=Path("results/time_to_quality"))
    return parser.parse_args(argv)


# --- trainings -------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """One training of one stage.

    Attributes:
        needs: the training of its autoencoder.
        command: its words, once it is planned.
        items_per_second: images or latents, measured alone.
        peak_kib: the highest memory of its main process so far.
    """

    name: str
    folder: Path
    needs: "Training | None" = None
    command: list = field(default_factory=list)
    items_per_second: float = 0.0
    peak_kib: int = 0
    process: subprocess.Popen | None = field(default=None, repr=False)

    def plan(self, seconds: float, seconds_per_update: float, items_per_second: float) -> int:
        """The number of updates in so many seconds, at least a few."""
        self.items_per_second = items_per_second
        return max(FEWEST_STEPS, round(seconds / seconds_per_update))

    @property
    def is_done(self) -> bool:
        """Whether its process has ended. A process that has written its metrics may still draw."""
        return (self.folder / COSTS).is_file()

    @property
    def can_run(self) -> bool:
        return not self.is_done and (self.needs is None or self.needs.is_done)

    @property
    def metrics(self) -> dict:
        return json.loads(runs.METRICS_FILE.path(self.folder).read_text())

    def turn(self, seconds: float) -> None:
        """Run for some seconds, or to the end, then stand still.

        Raises:
            InputError: the training has failed.
        """
        if self.process is None:
            log = self.folder.with_name(f"{self.folder.name}.log").open("wb")
            self.process = subprocess.Popen(  # in a group of its own, with the data loader's workers
                [sys.executable, *map(str, self.command)], cwd=ablate.ROOT, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        os.killpg(self.process.pid, signal.SIGCONT)
        ends = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < ends:
            self.peak_kib = max(self.peak_kib, peak_memory(self.process.pid))
            time.sleep(0.5)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGSTOP)
        elif self.process.returncode:
            raise InputError(f"{self.name} has ended with exit code {self.process.returncode}: see {self.folder}.log")
        else:
            costs = {"peak_gib": self.peak_kib / 2**20, "items_per_second": self.items_per_second}
            (self.folder / COSTS).write_text(json.dumps(costs))

    def end(self) -> None:
        """End the process where it still runs."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def peak_memory(pid: int) -> int:
    """The highest memory of a process so far in KiB; 0 where the system doesn't say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def take_turns(trainings: list[Training], seconds: float) -> None:
    """Run all trainings in slices of so many seconds. A denoiser waits for its autoencoder."""
    try:
        while waiting := [training for training in trainings if not training.is_done]:
            for training in waiting:
                if training.can_run:
                    training.turn(seconds)
            left = ", ".join(training.name for training in waiting if not training.is_done)
            print(f"{time.strftime('%H:%M:%S')} in training: {left}", flush=True)
    finally:
        for training in trainings:
            training.end()


def stock_training(
    options: argparse.Namespace, name: str, rate: float, minutes: float, autoencoder: Training | None = None
) -> Training:
    """A training of `stock_contenders.py`, whose number of updates is measured now."""
    whole = name in CONTENDERS and CONTENDERS[name].in_pixels
    seconds = 60 * minutes * (1 if whole else STAGE_1_SHARE if name == AUTOENCODER else 1 - STAGE_1_SHARE)
    suffix = "" if autoencoder is None else f"-on-{autoencoder.metrics['learning_rate']:g}"
    folder = options.output_dir / f"{name}-{rate:g}-{minutes:g}min{suffix}"
    command = ["benchmarks/stock_contenders.py", name, f"--learning_rate={rate}", f"--output_dir={folder.resolve()}"]
    command += [f"--config={options.config.resolve()}", f"--seed={options.seeds[0]}"]
    command += [f"--{flag}={Path(value).resolve()}" for flag in ("data_dir", "vgg_weights")
                if (value := getattr(options, flag))]  # fmt: skip
    if name != AUTOENCODER:
        command.append(f"--latent_cache_dir={(options.output_dir / 'latents').resolve()}")
    if autoencoder is not None:
        command.append(f"--autoencoder={autoencoder.folder.resolve()}")
    training = Training(f"{name} at {rate:g}", folder, autoencoder)
    if not training.is_done:
        measured = measured_rate(options, name, command)
        steps = training.plan(seconds, measured["seconds_per_update"], measured["items_per_second"])
        training.command = [*command, f"--steps={steps}"]
    return training


def measured_rate(options: argparse.Namespace, name: str, command: list) -> dict[str, float]:
    """The rate of a stock contender, measured alone; the same for all learning rates."""
    path = runs.METRICS_FILE.path(options.output_dir / f"calibration-{name}")
    if not path.is_file():
        words = [word for word in command if not word.startswith("--output_dir=")]
        ablate.run_program(*words, f"--output_dir={path.parent.resolve()}", f"--steps={CALIBRATION_STEPS}")
    return json.loads(path.read_text())


def our_training(
    options: argparse.Namespace, minutes: float, seed: int, autoencoder: Training | None = None
) -> Training:
    """A stage of the recipe, the second where there is an autoencoder, with as many updates as the minutes allow."""
    stage = recipes.STAGES[0 if autoencoder is None else 1]
    flags, model = ablate.recipe_settings(options.config, stage)
    folder = options.output_dir / f"{OURS}-{stage}-{seed}-{minutes:g}min"
    training = Training(f"{OURS}, {stage}, seed {seed}", folder, autoencoder)
    if training.is_done:
        return training
    flags |= {"seed": seed}
    if autoencoder is not None:
        flags["autoencoder"] = autoencoder.folder.resolve()
    flags = ablate.run_flags(stage, flags, model, folder, options)
    rate_file = options.output_dir / f"calibration-{OURS}-{stage}.json"
    if not rate_file.is_file():
        measured = ablate.seconds_per_update(stage, flags, options.output_dir / "calibration")
        rate_file.write_text(json.dumps(measured))
    seconds = 60 * minutes * (STAGE_1_SHARE if autoencoder is None else 1 - STAGE_1_SHARE)
    seconds_per_update = json.loads(rate_file.read_text())
    steps = training.plan(seconds, seconds_per_update, flags["train_batch_size"] / seconds_per_update)
    training.command = ablate.stage_command(stage, ablate.scaled(flags, steps), folder)
    return training


# --- quality ---------------------------------------------------------------------------------------------------------


class Judge:
    """Measures pipelines against held-out images, all by the same features and classifier."""

    def __init__(self, options: argparse.Namespace):
        flags = [f"--config={options.config}", *([f"--data_dir={options.data_dir}"] if options.data_dir else [])]
        data = DataOptions.from_args(recipes.parse_arguments(recipes.STAGES[0], flags))
        self.cache_dir = options.output_dir / "evaluation"
        self.num_samples = options.num_samples
        self.network = load_feature_network(DEFAULT_FEATURES, "cpu")
        self.real = prepare_real(self.network, *data.load(), self.num_samples, self.cache_dir)

    def measure(self, pipe: FlowerLDMPipeline) -> dict:
        """The metrics at the guidance scale of the lowest KID, and the images drawn in a second there."""
        sampler = Sampler(pipe, self.cache_dir)
        labels = sample_labels(self.num_samples, pipe.num_classes)
        points = []
        for scale in GUIDANCE_SCALES:
            images, seconds = sampler.draw(
                self.num_samples, guidance_scale=scale, guidance_interval=[0.0, 1.0], num_inference_steps=25
            )
            features = extract_features(self.network, images, title="features of samples")
            measured = measure_set(self.real.compare(features, labels), swept_only=True)
            point = {name: measured[name] for name in SHOWN}
            points.append(point | {"guidance_scale": scale, "images_per_second": self.num_samples / seconds})
        parameters = sum(weight.numel() for model in (pipe.vae, pipe.unet) for weight in model.parameters())
        return min(points, key=lambda point: point["kid"]) | {"parameters": parameters}

    def quality(self, training: Training, name: str) -> dict:
        """The metrics of a finished training, which are kept in its folder."""
        path = training.folder / "quality.json"
        if not path.is_file():
            autoencoder = training.needs and str(training.needs.folder)
            if name == OURS:
                pipe = load_pipeline(str(training.folder), None, "cpu", "bfloat16")
            else:
                sizes = self.real.train.resolution, self.real.train.num_classes
                pipe = load_stock_pipeline(name, training.folder, autoencoder, *sizes)
                pipe = pipe.to(torch.bfloat16)
            path.write_text(json.dumps(self.measure(pipe)))
        return json.loads(path.read_text())


# --- the contest -----------------------------------------------------------------------------------------------------


def best_rates(options: argparse.Namespace, judge: Judge) -> dict[str, float]:
    """The learning rate of each stock contender, and of their autoencoder, that is best in the short trainings."""
    names = [name for name in options.contenders if name != OURS]
    best: dict[str, float] = {}
    autoencoder = None
    if any(not CONTENDERS[name].in_pixels for name in names):
        tried = [
            stock_training(options, AUTOENCODER, rate, options.tuning_minutes) for rate in AUTOENCODER_LEARNING_RATES
        ]
        take_turns(tried, options.slice)
        autoencoder = min(tried, key=held_out_loss)
        best[AUTOENCODER] = autoencoder.metrics["learning_rate"]
    for name in names:
        needs = None if CONTENDERS[name].in_pixels else autoencoder
        tried = [
            stock_training(options, name, rate, options.tuning_minutes, needs)
            for rate in CONTENDERS[name].learning_rates
        ]
        take_turns(tried, options.slice)
        best[name] = min(tried, key=lambda one: judge.quality(one, name)["kid"]).metrics["learning_rate"]
    return best


def held_out_loss(training: Training) -> float:
    """The pixel and perceptual loss of an autoencoder."""
    return training.metrics["val_pixel_loss"] + training.metrics.get("val_perceptual_loss", 0.0)


def run_contest(options: argparse.Namespace, judge: Judge, best: dict[str, float], minutes: float) -> list[dict]:
    """All trainings of so many minutes, in turns, then their quality."""
    seeds = options.seeds if OURS in options.contenders else []
    ours = {seed: our_training(options, minutes, seed) for seed in seeds}
    settings = {"published": {name: one.learning_rates[0] for name, one in CONTENDERS.items()}, "tuned": best}
    settings["published"][AUTOENCODER] = AUTOENCODER_LEARNING_RATES[0]
    stock: dict[str, Training] = {}  # the autoencoders, by their settings
    if AUTOENCODER in best:
        stock = {
            which: stock_training(options, AUTOENCODER, rates[AUTOENCODER], minutes)
            for which, rates in settings.items()
        }
    take_turns([*ours.values(), *stock.values()], options.slice)
    pairs = [(OURS, f"seed {seed}", our_training(options, minutes, seed, vae)) for seed, vae in ours.items()]
    for which, rates in settings.items():
        for name in (name for name in options.contenders if name != OURS):
            needs = None if CONTENDERS[name].in_pixels else stock[which]
            training = stock_training(options, name, rates[name], minutes, needs)
            pairs.append((name, f"{which}, {rates[name]:g}", training))
    take_turns(list({training.folder: training for _, _, training in pairs}.values()), options.slice)
    return [
        {
            "contender": name, "settings": which, "minutes": minutes, **costs_of(training),
            **judge.quality(training, name),
        }
        for name, which, training in pairs
    ]  # fmt: skip


def costs_of(training: Training) -> dict:
    """Updates, rates and memory of the trainings of both stages, or of the only one."""
    both = [one for one in (training.needs, training) if one is not None]
    costs = [json.loads((one.folder / COSTS).read_text()) for one in both]
    return {
        "updates": " + ".join(str(one.metrics["step"]) for one in both),
        "trained_per_second": " / ".join(f"{cost['items_per_second']:.0f}" for cost in costs),
        "peak_gib": max(cost["peak_gib"] for cost in costs),
    }


# --- the results -----------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table, best first."""
    titles = ["contender", "settings", "minutes", "updates", "trained a second", "drawn a second", "parameters",
              "memory", "guidance", *(METRIC_TITLES[name] for name in SHOWN)]  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in sorted(rows, key=lambda row: (row["minutes"], row["kid"])):
        cells = [
            title_of(row["contender"]), row["settings"], f"{row['minutes']:g}", row["updates"],
            row["trained_per_second"], f"{row['images_per_second']:.1f}", f"{row['parameters'] / 1e6:.1f} M",
            f"{row['peak_gib']:.1f} GiB", f"{row['guidance_scale']:g}",
            *("-" if row[name] is None else f"{row[name]:.3g}" for name in SHOWN),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def title_of(name: str) -> str:
    return "flower_ldm" if name == OURS else CONTENDERS[name].title


def save_plot(rows: list[dict], path: Path) -> None:
    """Draw KID and class accuracy over the minutes of training, a line for each contender at its best settings."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, name, best in zip(axes, ("kid", "class_accuracy"), (min, max), strict=True):
        for contender in dict.fromkeys(row["contender"] for row in rows):
            own = [row for row in rows if row["contender"] == contender]
            minutes = sorted({row["minutes"] for row in own})
            values = [best(row[name] for row in own if row["minutes"] == one) for one in minutes]
            axis.plot(minutes, values, "o-", label=title_of(contender), linewidth=2.5 if contender == OURS else 1.2)
        axis.set_ylim(bottom=0)
        axis.set_title(METRIC_TITLES[name], fontsize=10)
        axis.set_xlabel("minutes of training", fontsize=9)
        axis.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    judge = Judge(options)
    best = best_rates(options, judge)
    rows = []
    for minutes in options.minutes:
        rows += run_contest(options, judge, best, minutes)
        print(table(rows), flush=True)
    path = options.output_dir / "time_to_quality.png"
    save_plot(rows, path)
    print(f"quality over time: {path}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
