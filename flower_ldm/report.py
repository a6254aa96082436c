"""One self-contained HTML page that shows a run: `python -m flower_ldm.report results/flower-ldm`.

Reads the folder that either training script writes (and that the evaluation adds to), finished or not, and writes
`report.html` into it: no network, no script, font or picture from elsewhere. What isn't there is left out. This file
turns files into numbers, curves and data URIs; `report_page/` holds the page itself, a Jinja template that escapes
every text, with its style sheet and its script.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jinja2
import yaml
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageSequence
from safetensors import SafetensorError, safe_open

from .errors import InputError, OneLineParser, exit_on_input_error
from .training import common_parser, read_log

FILE_NAME = "report.html"
PICTURES_BYTES = 9_000_000  # all data URIs together; with the page's text it stays below 10 MB
PICTURE_BYTES = 500_000  # above it a picture is compressed further
PICTURE_PIXELS = 2400  # the longest side that is kept
MAX_POINTS = 600  # of a curve; of a longer log, the lowest and the highest of each stretch are drawn
LOG_SCALE_RATIO = 8  # of the highest to the lowest value, above which a loss is drawn on a log scale
TEMPLATES = Path(__file__).parent / "report_page"

DATASETS = {"flowers102": "Oxford 102 Flowers", "synthetic": "synthetic flowers", "imagefolder": "an image folder"}
PRECISIONS = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}
# What else a log line holds beside losses: how the optimizer fared.
OPTIMIZER_NAMES = ("learning_rate", "grad_norm", "adaptive_weight", "steps_per_second")
CURVES_FIRST = ("loss", "unweighted_loss", "pixel_loss", "perceptual_loss", "psnr", "ssim", "accuracy")
NOT_DRAWN = ("step", "mean_squared_error", "psnr_of_mean_squared_error")  # the last two say what PSNR says
CURVE_TITLES = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "accuracy": "Accuracy of the head",
    "kl_loss": "KL loss",
    "loss": "Loss, weighted",
    "grad_norm": "Gradient norm",
    "steps_per_second": "Updates per second",
}
SETS = {"real": "Real images", "reconstructions": "Reconstructions", "samples": "Samples"}
ROLES = {"real": "the floor", "reconstructions": "the ceiling", "samples": "the model"}
METRICS = {  # name: (title, which way is better, decimals, how to read it)
    "frechet_distance": (
        "Fréchet distance", "lower", 2,
        "How far the features of two sets lie apart, each set taken as a Gaussian cloud. It shrinks as n grows: compare "
        "it only at the same n and with the same feature network.",
    ),
    "kid": (
        "KID", "lower", 5,
        "The same question asked with a kernel, without that bias: about 0 where two sets can't be told apart. What "
        "stands after ± is its spread over random subsets.",
    ),
    "precision": (
        "Precision", "higher", 3,
        "The share of a set's images that fall among the held-out ones; low where many look like no photograph.",
    ),
    "recall": (
        "Recall", "higher", 3,
        "The share of held-out images that fall among the set's; low where part of the variety is missing.",
    ),
    "density": (
        "Density", "higher", 3,
        "Precision that counts how many held-out images each image is a neighbour of, so that outliers matter less. It "
        "can exceed 1.",
    ),
    "coverage": (
        "Coverage", "higher", 3,
        "The share of held-out images that have an image of the set in their neighbourhood.",
    ),
    "class_accuracy": (
        "Class accuracy", "higher", 3,
        "How often a classifier trained on real images alone names the class that was asked for.",
    ),
}  # fmt: skip


# --- reading a run ---------------------------------------------------------------------------------------------------


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
        return _part(self.metrics, "evaluation")


def read_run(folder: Path) -> Run:
    """Read all that a page shows, except for the pictures.

    Raises:
        InputError: where `folder` is no run of either stage, or one of its files can't be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name the --output_dir of a training run")
    args, metrics = _read_mapping(folder / "args.yaml"), _read_mapping(folder / "metrics.json")
    try:
        log = read_log(folder / "log.jsonl") if (folder / "log.jsonl").is_file() else []
    except (KeyError, TypeError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / 'log.jsonl'} is not the log of a training run") from error
    index = _read_mapping(folder / "model_index.json")
    names = set().union(args, metrics, *log)
    if not names:
        raise InputError(f"{folder} is no training run: it has no args.yaml, log.jsonl or metrics.json")
    if index or names & {"autoencoder", "unweighted_loss", "val_unweighted_loss"}:
        stage, parts = "latent_diffusion", {"denoiser": folder / "unet", "autoencoder": folder / "vae"}
    elif names & {"pixel_weight", "pixel_loss", "val_pixel_loss"}:
        stage, parts = "autoencoder", {"autoencoder": folder}
    else:
        raise InputError(f"{folder} is a run of neither train_autoencoder.py nor train_latent_diffusion.py")
    class_names = [str(name) for _, name in sorted(_part(index, "id2label").items(), key=lambda item: int(item[0]))]
    configs = {name: _read_mapping(path / "config.json") for name, path in parts.items()}
    if stage == "latent_diffusion":
        configs["scheduler"] = _read_mapping(folder / "scheduler" / "scheduler_config.json")
    num_parameters = {name: _count_parameters(path) for name, path in parts.items()}
    return Run(folder, stage, args, log, metrics, configs, num_parameters, class_names)


def _read_mapping(path: Path) -> dict:
    """A JSON or YAML file that holds one mapping; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold names and values")
    return content


def _part(mapping: dict, *names: str) -> dict:
    """A mapping within mappings; empty where there is none."""
    for name in names:
        mapping = mapping.get(name) if isinstance(mapping, dict) else None
    return mapping if isinstance(mapping, dict) else {}


def _count_parameters(folder: Path) -> int:
    """Numbers in a model's safetensors files, from their headers alone; 0 where there are none."""
    count = 0
    for path in folder.glob("diffusion_pytorch_model*.safetensors"):
        try:
            with safe_open(path, framework="numpy") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            return 0
    return count


# --- numbers and words -----------------------------------------------------------------------------------------------


def number(value: object, decimals: int | None = None) -> str:
    """A number for people: thousands apart, four digits that count unless `decimals` are asked for; else a dash."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if decimals is not None:
        return f"{value:,.{decimals}f}".replace("-", "−")
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return re.sub(r"e([+-])0*(\d)", lambda match: "e" + match[1].strip("+") + match[2], text).replace("-", "−")


def percent(value: object) -> str:
    """A share between 0 and 1 as a percentage."""
    return "–" if number(value) == "–" else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """Seconds as people say them, such as "1 h 32 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600, 1)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours / 24:.1f} days"


def count_of_parameters(value: int) -> str:
    """Such as "12.3 million"."""
    if value >= 1_000_000:
        return f"{value / 1e6:.3g} million"
    return number(value)


def words(values: object) -> str:
    """A list as text; anything else as it is."""
    return ", ".join(map(str, values)) if isinstance(values, (list, tuple)) else str(values)


def training_seconds(run: Run) -> float | None:
    """What the metrics say; of a run that hasn't finished, the sum over its log lines."""
    if number(run.metrics.get("training_seconds")) != "–":
        return run.metrics["training_seconds"]
    seconds, last = 0.0, 0
    for line in run.log:
        if _finite(line.get("steps_per_second")) and line["steps_per_second"] > 0:
            seconds += (line["step"] - last) / line["steps_per_second"]
            last = line["step"]
    return seconds or None


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def data_name(run: Run) -> str:
    """What people call the data set."""
    name = run.args.get("dataset") or run.metrics.get("dataset") or "images"
    return DATASETS.get(name, str(name))


def title(run: Run) -> str:
    if run.stage == "autoencoder":
        return f"An autoencoder for {data_name(run)}"
    return f"Latent diffusion on {data_name(run)}"


def lede(run: Run) -> str:
    """One sentence: what was trained, on what, how long."""
    name = "autoencoder" if run.stage == "autoencoder" else "denoiser"
    sentence = f"{'An' if name == 'autoencoder' else 'A'} {name}"
    if run.num_parameters[name]:
        sentence += f" of {count_of_parameters(run.num_parameters[name])} parameters"
    sentence += ", trained"
    if run.last_step:
        sentence += f" for {number(run.last_step)} updates"
    if seconds := training_seconds(run):
        sentence += f" in {duration(seconds)}"
    device = run.metrics.get("device")
    sentence += f" on {device}," if device else ""
    what = "on" if run.stage == "autoencoder" else "on the latents of"
    sentence += f" {what} {data_name(run)}"
    if num_classes := class_count(run):
        sentence += f", {num_classes} classes"
    if resolution := run.args.get("resolution"):
        sentence += f", at {resolution}\u00a0×\u00a0{resolution} pixels"
    return sentence + "."


def class_count(run: Run) -> int | None:
    """From the pipeline, a model's config, or the flags."""
    configs = [config.get("num_classes") for config in run.configs.values()]
    return len(run.class_names) or next(filter(None, configs), None) or len(run.args.get("classes") or []) or None


def headline(run: Run) -> list[tuple[str, str]]:
    """Up to four figures for the first screen, each with its name."""
    samples = _part(run.evaluation, "against_held_out", "samples")
    memorised = _part(run.evaluation, "memorisation", "samples").get("feature_rate")
    metrics = run.metrics
    candidates = [
        (f"Fréchet distance, n = {number(samples.get('n'))}", number(samples.get("frechet_distance"), 1)),
        ("Class accuracy", percent(samples.get("class_accuracy"))),
        ("Memorised samples", percent(memorised)),
        ("PSNR, held out", f"{number(metrics.get('psnr'), 1)} dB".replace("– dB", "–")),
        ("SSIM, held out", number(metrics.get("ssim"), 3)),
        ("Accuracy of the head", percent(metrics.get("val_accuracy"))),
        ("Loss, held out", number(metrics.get("val_loss"))),
        ("Training", duration(seconds) if (seconds := training_seconds(run)) else "–"),
        ("Updates", number(run.last_step)),
    ]
    return [(name, value) for name, value in candidates if value != "–"][:4]


def facts(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """What was trained, in groups of (name, value); what isn't known is left out."""
    args, metrics = run.args, run.metrics
    size = args.get("resolution")
    splits = _part(run.evaluation, "splits")
    held_out = splits.get("held_out") or metrics.get("splits") or args.get("val_splits")
    images = metrics.get("num_images")
    trained_on = splits.get("train") or args.get("train_splits")
    unet = run.configs.get("denoiser", {})
    latents = [unet.get("in_channels"), *([side] * 2 if isinstance(side := unet.get("sample_size"), int) else side or [])]
    scheduler = run.configs.get("scheduler", {})
    sampler = scheduler.get("_class_name")
    models = [
        (name.capitalize(), _model_words(run.configs.get(name, {}), run.num_parameters.get(name, 0)))
        for name in ("denoiser", "autoencoder")
    ]
    groups = {
        "Model": [
            *models,
            ("Latents", " × ".join(map(str, latents)) if all(latents) else
             f"{channels} channels" if (channels := run.configs["autoencoder"].get("latent_channels")) else None),
            ("Prediction", args.get("prediction_type") or scheduler.get("prediction_type")),
            ("Noise schedule", args.get("beta_schedule") or scheduler.get("beta_schedule")),
            ("Sampler", sampler),
        ],
        "Data": [
            ("Data set", data_name(run)),
            ("Classes", number(class_count(run))),
            ("Trained on", words(trained_on) if trained_on else None),
            ("Held out", (words(held_out) if held_out else "") + (f", {number(images)} images" if images else "")),
            ("Size", f"{size} × {size} pixels" if size else None),
        ],
        "Training": [
            ("Updates", number(run.last_step)),
            ("Batch", _batch_words(args)),
            ("Learning rate", _rate_words(args)),
            ("Precision", PRECISIONS.get(args.get("mixed_precision"))),
            ("Moving average", f"decay {args['ema_decay']}" if "ema_decay" in args else None),
            ("Time", duration(seconds) if (seconds := training_seconds(run)) else None),
            ("Device", metrics.get("device")),
            ("Recipe", args.get("config")),
            ("Perceptual network", metrics.get("vgg_weights") and Path(str(metrics["vgg_weights"])).name),
        ],
    }  # fmt: skip
    known = {name: [(key, str(value)) for key, value in rows if value not in (None, "", "–")]
             for name, rows in groups.items()}  # fmt: skip
    return [(name, rows) for name, rows in known.items() if rows]


def _model_words(config: dict, num_parameters: int) -> str:
    name = config.get("_class_name", "")
    return name + (f", {count_of_parameters(num_parameters)} parameters" if name and num_parameters else "")


def _batch_words(args: dict) -> str | None:
    if "train_batch_size" not in args:
        return None
    accumulated = args.get("gradient_accumulation_steps") or 1
    return f"{args['train_batch_size']} images" + (f" × {accumulated} micro-batches" if accumulated > 1 else "")


def _rate_words(args: dict) -> str | None:
    if "learning_rate" not in args:
        return None
    schedule = str(args.get("lr_scheduler") or "").replace("_", " ")
    return ", ".join(filter(None, [
        number(args["learning_rate"]), schedule,
        f"{number(args['lr_warmup_steps'])} updates of warm-up" if args.get("lr_warmup_steps") else "",
    ]))  # fmt: skip


# --- curves ----------------------------------------------------------------------------------------------------------


class Series(NamedTuple):
    """One curve: its name, its points, and whether each is marked, as held-out values are."""

    name: str
    points: list[tuple[float, float]]
    marked: bool = False
    style: str = "s1"  # a class of the style sheet: colour and dashes


def thin(points: list[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most about `limit` of the points, in order: the lowest and the highest of each stretch, first and last too."""
    if len(points) <= limit:
        return points
    stretch = math.ceil(2 * len(points) / limit)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        indices = range(start, min(start + stretch, len(points)))
        kept |= {min(indices, key=lambda i: points[i][1]), max(indices, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def chart(
    heading: str, series: list[Series], x_name: str, x_range: tuple[float, float] | None = None, *,
    may_be_log: bool = False, group: str | None = None, note: str = "",
) -> dict | None:  # fmt: skip
    """What the template draws: paths in a square of 1000 x 1000 that the page stretches, ticks in per cent, and data.

    Args:
        series: those without points are left out.
        x_range: of the axis; that of the points unless given.
        may_be_log: draw the values on a log scale where they span more than `LOG_SCALE_RATIO`.
        group: charts of one group follow each other's cross-hair.

    Returns:
        `None` where there is nothing to draw.
    """
    series = [one._replace(points=thin(one.points)) for one in series if one.points]
    if not series:
        return None
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    left, right = x_range or (min(xs), max(xs))
    if left == right:
        left, right = left - 1, right + 1
    log_scale = may_be_log and min(ys) > 0 and max(ys) / min(ys) > LOG_SCALE_RATIO
    bottom, top, ticks = _y_axis(min(ys), max(ys), log_scale)
    scale = math.log if log_scale else float

    def across(x: float) -> float:
        return (x - left) / (right - left)

    def up(y: float) -> float:
        return (scale(y) - scale(bottom)) / (scale(top) - scale(bottom))

    def path(one: Series) -> str:
        places = [f"{1000 * across(x):.1f} {1000 - 1000 * up(y):.1f}" for x, y in one.points]
        return "M" + "L".join(places)

    x_ticks = [x for x in MaxNLocator(4).tick_values(left, right) if left <= x <= right]
    return {
        "heading": heading, "note": note, "log_scale": log_scale, "x_name": x_name, "group": group or "",
        "paths": [{"d": path(one), "dots": "".join(f"M{p}h0" for p in path(one)[1:].split("L"))} for one in series],
        "series": series,
        "last": [number(float(one.points[-1][1])) for one in series],
        "x_ticks": [(f"{100 * across(x):.2f}", number(_whole(x))) for x in x_ticks],
        "y_ticks": [(f"{100 * up(y):.2f}", number(_whole(y))) for y in ticks],
        "summary": "; ".join(f"{one.name} from {number(one.points[0][1])} to {number(one.points[-1][1])}"
                             for one in series),
        "data": {
            "x": [left, right], "y": [bottom, top], "log": log_scale, "xName": x_name,
            "series": [{"name": one.name, "points": [[x, float(f"{y:.5g}")] for x, y in one.points]}
                       for one in series],
        },
    }  # fmt: skip


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


def _y_axis(low: float, high: float, log_scale: bool) -> tuple[float, float, list[float]]:
    """Lowest and highest value of an axis with some air, and where its ticks are."""
    if log_scale:
        low, high = low / 1.15, high * 1.15
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
            if len(ticks) >= 3:
                break
        return low, high, ticks
    if low >= 0 and low < high / 2:
        low = 0.0  # an axis that starts at zero where that costs no more than half of the height
    air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = (0.0 if low == 0 else low - air), high + air
    return low, high, [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]


def _curve(log: list[dict], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in log if _finite(line.get(name)) and _finite(line["step"])]


def training_curves(run: Run) -> tuple[list[dict], list[dict]]:
    """A chart for every scalar of the log, held-out values as points: the losses and scores, and the optimizer's."""
    names = dict.fromkeys(name.removeprefix("val_") for line in run.log for name in line)
    names = [*(name for name in CURVES_FIRST if name in names), *(name for name in names if name not in CURVES_FIRST)]
    x_range = (0, run.log[-1]["step"]) if run.log else None
    measured_only = ("psnr", "ssim")  # in validation alone, without a prefix
    charts: dict[str, dict | None] = {}
    for name in names:
        if name in NOT_DRAWN:
            continue
        held_out = _curve(run.log, name if name in measured_only else f"val_{name}")
        trained = [] if name in measured_only else _curve(run.log, name)
        if name in OPTIMIZER_NAMES:
            series = [Series("each update" if name == "learning_rate" else "mean since the last line", trained)]
        else:
            series = [Series("training", trained), Series("held out", held_out, marked=True, style="s2")]
        heading = CURVE_TITLES.get(name, name.replace("_", " ").capitalize())
        charts[name] = chart(heading, series, "update", x_range, may_be_log=name.endswith(("loss", "grad_norm")),
                             group="updates")  # fmt: skip
    losses = [one for name, one in charts.items() if one and name not in OPTIMIZER_NAMES]
    return losses, [charts[name] for name in OPTIMIZER_NAMES if charts.get(name)]


def timestep_chart(run: Run) -> dict | None:
    """The unweighted loss by timestep, as the first, a middle and the last log line had it."""
    lines = [line for line in run.log if isinstance(line.get("loss_by_timestep"), list)]
    series = []
    shown = sorted({0, len(lines) // 2, len(lines) - 1}) if lines else []
    for index, style in zip(shown, ("early", "middle", "s1")[3 - len(shown) :], strict=True):
        bins = [(low, high, mean) for low, high, mean in lines[index]["loss_by_timestep"] if _finite(mean)]
        points = [((low + high) / 2, mean) for low, high, mean in bins]
        series.append(Series(f"update {number(lines[index]['step'])}", points, marked=True, style=style))
    ends = [end for line in lines for low, high, _ in line["loss_by_timestep"] for end in (low, high)]
    return chart("Loss by timestep, unweighted", series, "timestep", (min(ends), max(ends)) if ends else None,
                 may_be_log=True)  # fmt: skip


def sweep_charts(sweep: list[dict]) -> list[dict]:
    """Frechet distance, KID and class accuracy over guidance, one curve for each number of steps; or over steps."""
    by_guidance = len({row.get("guidance_scale") for row in sweep}) > 1
    x_key, other = ("guidance_scale", "num_inference_steps") if by_guidance else ("num_inference_steps", None)
    values = sorted({row.get(other) for row in sweep}) if other else [None]
    charts = []
    for name in ("frechet_distance", "kid", "class_accuracy"):
        series = []
        for index, value in enumerate(values):
            points = [(row.get(x_key), row.get(name)) for row in sweep if other is None or row.get(other) == value]
            points = sorted((x, y) for x, y in points if _finite(x) and _finite(y))
            label = f"{value} steps" if other else "samples"
            series.append(Series(label, points, marked=True, style=f"s{index % 4 + 1}"))
        heading, better = METRICS[name][:2]
        x_name = "guidance scale" if by_guidance else "steps"
        charts.append(chart(heading, series, x_name, group="sweep", note=f"{better} is better"))
    return [one for one in charts if one]


# --- pictures --------------------------------------------------------------------------------------------------------


@dataclass
class Album:
    """A run's pictures as data URIs, the most wanted asked for first, within what a page may weigh."""

    folder: Path
    room: int = PICTURES_BYTES
    left_out: list[str] = field(default_factory=list)

    def picture(self, path: Path, alt: str, caption: str = "") -> dict | None:
        """A still picture, compressed; `None` where there is none, where it is damaged, or there is no room left."""
        if not path.is_file():
            return None
        try:
            with Image.open(path) as image:
                image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS), Image.Resampling.LANCZOS)
                size, content = image.size, _webp(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow has for damaged files
            return self._leave_out(path, "damaged")
        return self._add(path, content, "webp", size, alt, caption)

    def animation(self, path: Path, alt: str, caption: str = "") -> dict | None:
        """A GIF as it is, with its last frame for those who want no motion."""
        try:
            with Image.open(path) as image:
                size = image.size
                for frame in ImageSequence.Iterator(image):
                    still = frame.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return self._leave_out(path, "damaged")
        picture = self._add(path, path.read_bytes(), "gif", size, alt, caption)
        return picture and picture | {"still": _data_uri(_webp(still), "webp")}

    def _add(self, path: Path, content: bytes, kind: str, size: tuple[int, int], alt: str, caption: str) -> dict | None:
        uri = _data_uri(content, kind)
        if len(uri) > self.room:
            return self._leave_out(path, "the page would weigh more than 10 MB")
        self.room -= len(uri)
        return {"src": uri, "width": size[0], "height": size[1], "alt": alt, "caption": caption, "still": ""}

    def _leave_out(self, path: Path, reason: str) -> None:
        self.left_out.append(f"{path.relative_to(self.folder)} ({reason})")


def _webp(image: Image.Image) -> bytes:
    """Without loss where that is small enough, as it is for plots; else as good as fits."""
    image = image if image.mode in ("RGB", "RGBA") else image.convert("RGBA" if "transparency" in image.info else "RGB")
    for options in ({"lossless": True}, {"quality": 90}, {"quality": 75}):
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", method=4, **options)
        if buffer.tell() <= PICTURE_BYTES:
            break
    return buffer.getvalue()


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """The pictures `step-<update>.png` of a folder, by update."""
    found = [(int(path.stem.removeprefix("step-")), path) for path in folder.glob("step-*.png")
             if path.stem.removeprefix("step-").isdigit()]  # fmt: skip
    return sorted(found)


def _spoken(path: Path, prefix: str) -> str:
    """The class that a picture's name ends in."""
    return path.stem.removeprefix(prefix).replace("_", " ").strip()


def hero_picture(run: Run, album: Album) -> dict | None:
    """The picture of the first screen: the last reconstructions, or the class grid, or else the last samples."""
    if run.stage == "autoencoder":
        steps, what = _steps(run.folder / "reconstructions"), "held-out images, each above its reconstruction"
    else:
        steps, what = _steps(run.folder / "samples"), "generated images, one class a column"
        grid = run.folder / "vae_samples_grid_subset.png"
        if grid.is_file():
            return album.picture(grid, f"A grid of {what}", f"{what.capitalize()}; nothing here is a photograph.")
    if not steps:
        return None
    step, path = steps[-1]
    return album.picture(path, f"A grid of {what}", f"{what.capitalize()}, at update {number(step)}.")


def pictures_over_time(run: Run, album: Album) -> list[dict]:
    """The first, a middle and the last picture drawn in training; nothing where there is one only."""
    name, what = ("reconstructions", "Reconstructions") if run.stage == "autoencoder" else ("samples", "Samples")
    steps = _steps(run.folder / name)
    shown = sorted({0, len(steps) // 2, len(steps) - 1}) if len(steps) > 1 else []
    pictures = [album.picture(steps[i][1], f"{what} at update {number(steps[i][0])}", f"Update {number(steps[i][0])}")
                for i in shown]  # fmt: skip
    return [picture for picture in pictures if picture]


def latent_maps(run: Run, album: Album) -> list[dict]:
    kinds = {
        "tsne": ("t-SNE", "t-SNE: neighbours stay neighbours; distances between clouds mean little."),
        "pca": ("PCA", "PCA: the two directions along which the latents vary most; distances are true to scale."),
    }
    pictures = [album.picture(run.folder / f"latent_space_{kind}.png", f"The latents by {name}, coloured by class", note)
                for kind, (name, note) in kinds.items()]  # fmt: skip
    return [picture for picture in pictures if picture]


def interpolations(run: Run, album: Album) -> list[dict]:
    pictures = [album.picture(path, f"Images between two {_spoken(path, 'interpolation_')}",
                              f"Between two {_spoken(path, 'interpolation_')}.")
                for path in sorted(run.folder.glob("interpolation_*.png"))]  # fmt: skip
    return [picture for picture in pictures if picture]


def denoising_paths(run: Run, album: Album) -> list[dict]:
    pictures = [album.picture(path, f"The denoising path of one sample of class {_spoken(path, 'denoising_path_')}",
                              f"{_spoken(path, 'denoising_path_')}: the path of one sample")
                for path in sorted(run.folder.glob("denoising_path_*.png"))]  # fmt: skip
    return [picture for picture in pictures if picture]


def animations(run: Run, album: Album) -> list[dict]:
    pictures = [album.animation(path, f"Animation: a sample of class {_spoken(path, 'diffusion_animation_')} emerges",
                                _spoken(path, "diffusion_animation_"))
                for path in sorted(run.folder.glob("diffusion_animation_*.gif"))]  # fmt: skip
    return [picture for picture in pictures if picture]


# --- measured --------------------------------------------------------------------------------------------------------


def metrics_table(evaluation: dict) -> dict | None:
    """Metrics in rows, sets of images in columns: the floor, the ceiling, the samples."""
    sets = {name: values for name in SETS if (values := _part(evaluation, "against_held_out", name))}
    if not sets:
        return None
    rows = []
    for name, (heading, better, decimals, _) in METRICS.items():
        values = [one.get(name) for one in sets.values()]
        if not any(map(_finite, values)):
            continue
        most = max([abs(value) for value in values if _finite(value)] + ([1.0] if better == "higher" else [])) or 1.0
        cells = []
        for one, value in zip(sets.values(), values, strict=True):
            spread = f" ± {number(one['kid_std'], decimals)}" if name == "kid" and _finite(one.get("kid_std")) else ""
            share = f"{100 * max(0.0, value) / most:.1f}" if _finite(value) else "0"
            cells.append((number(float(value), decimals) if _finite(value) else "–", spread, share))
        rows.append({"name": heading, "better": better, "cells": cells})
    counts = [("Images (n)", [number(one.get("n")) for one in sets.values()]),
              ("Held-out images", [number(one.get("n_reference")) for one in sets.values()])]  # fmt: skip
    notes = [(heading, note) for name, (heading, _, _, note) in METRICS.items()
             if any(_finite(one.get(name)) for one in sets.values())]  # fmt: skip
    return {"columns": [(name, SETS[name], ROLES[name]) for name in sets], "rows": rows, "counts": counts,
            "notes": notes}  # fmt: skip


def sampling_words(evaluation: dict) -> str:
    """How the evaluated samples were drawn and looked at, in one sentence."""
    sampling, features = _part(evaluation, "sampling"), _part(evaluation, "features")
    interval = sampling.get("guidance_interval")
    scale = sampling.get("guidance_scale")
    rate = sampling.get("images_per_second")
    parts = [
        f"{number(sampling.get('num_samples'))} samples" if sampling.get("num_samples") else "",
        f"seed {sampling['seed']}" if "seed" in sampling else "",
        str(sampling.get("scheduler") or ""),
        f"{sampling['num_inference_steps']} steps" if sampling.get("num_inference_steps") else "",
        f"guidance {scale}" + (f" from {interval[0]} to {interval[1]} of the way" if interval and interval != [0, 1] else "")
        if scale is not None else "",
        f"{number(rate, 1)} images a second" if _finite(rate) else "",
        " ".join(str(sampling[key]) for key in ("device", "dtype") if sampling.get(key)),
        f"{number(features.get('num_features'))} features an image by {features['name']}"
        if features.get("name") else "",
    ]  # fmt: skip
    return ", ".join(filter(None, parts))


def reconstruction_figures(run: Run) -> list[tuple[str, str]]:
    """What the autoencoder keeps of held-out images: from the evaluation, or else from stage 1's own validation."""
    metrics, measured = run.metrics, _part(run.evaluation, "reconstruction")
    distance = _part(measured, "perceptual_distance")
    if measured:
        rows = [
            ("Images", f"{number(measured.get('n'))} of {words(measured.get('split'))}"),
            ("PSNR", number(measured.get("psnr"), 2)), ("SSIM", number(measured.get("ssim"), 3)),
            (f"Perceptual distance ({distance.get('name')})", number(distance.get("value"))),
            ("Accuracy of the head", percent(measured.get("head_accuracy"))),
        ]  # fmt: skip
    elif run.stage == "autoencoder":
        rows = [
            ("Images", f"{number(metrics.get('num_images'))} of {words(metrics.get('splits'))}"),
            ("PSNR, mean over images", number(metrics.get("psnr"), 2)),
            ("PSNR of the mean squared error", number(metrics.get("psnr_of_mean_squared_error"), 2)),
            ("SSIM", number(metrics.get("ssim"), 3)),
            ("Mean absolute error, images in [−1, 1]", number(metrics.get("val_pixel_loss"))),
            ("Perceptual loss", number(metrics.get("val_perceptual_loss"))),
            ("Accuracy of the head", percent(metrics.get("val_accuracy"))),
        ]
    else:
        return []
    rows = [(name, f"{value} dB" if name.startswith("PSNR") else value)
            for name, value in rows if not value.startswith("–")]  # fmt: skip
    return rows if len(rows) > 1 else []


def memorisation_table(evaluation: dict) -> list[tuple[str, list[str]]]:
    """Samples and, as the null, held-out images: how many, memorised by features, by pixels, byte-identical."""
    rows = []
    for name, heading in (("samples", "Samples"), ("held_out", "Held-out images")):
        if values := _part(evaluation, "memorisation", name):
            rates = [percent(values.get(key)) for key in ("feature_rate", "pixel_rate")]
            rows.append((heading, [number(values.get("n")), *rates, number(values.get("exact_duplicates"))]))
    return rows


def sweep_table(sweep: list[dict]) -> list[list[str]]:
    keys = {"guidance_scale": None, "num_inference_steps": None, "n": None, "frechet_distance": 2, "kid": 5,
            "class_accuracy": 3, "seconds": 0}  # fmt: skip
    return [[number(row.get(key), decimals) for key, decimals in keys.items()] for row in sweep]


# --- doing it again --------------------------------------------------------------------------------------------------


def training_command(args: dict, script: str) -> str:
    """The command line that gives these flags, each quoted for a shell.

    A flag that both scripts share is left out at its default, except for those whose default a script sets itself.
    The recipe is left out: all that it said is among the flags. So is what belongs to one folder's history.
    """
    defaults = vars(common_parser("").parse_args([]))
    history = {"config", "resume_from_checkpoint", "overwrite_output_dir"}
    parts = [f"python {script}"]
    for name, value in args.items():
        unset = value is None or value == []
        default = name in defaults and value == defaults[name] and name not in ("output_dir", "train_batch_size")
        if name in history or unset or default:
            continue
        if isinstance(value, bool):
            parts.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            parts.append(" ".join([f"--{name}", *(shlex.quote(str(one)) for one in value)]))
        elif str(value).startswith("-"):
            parts.append(shlex.quote(f"--{name}={value}"))
        else:
            parts.append(f"--{name} {shlex.quote(str(value))}")
    return _fold(parts)


def _fold(parts: list[str], width: int = 80) -> str:
    """Words on lines of about `width`, joined by backslashes."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines) == 1 or len(lines[-1]) + len(part) > width:
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}"
    return " \\\n".join(lines)


def commands(run: Run) -> list[tuple[str, str]]:
    """What to type to do it again, each with what it does."""
    script = "train_autoencoder.py" if run.stage == "autoencoder" else "train_latent_diffusion.py"
    found = []
    if run.args:
        found.append(("Train", training_command(run.args, script)))
        output_dir = shlex.quote(str(run.args.get("output_dir") or run.folder.name))
        if run.stage == "latent_diffusion" and run.finished:
            found.append(("Draw samples", f"python -m flower_ldm.sample --pipeline {output_dir}"))
        again = run.evaluation.get("command")
        if again:
            found.append(("Evaluate", shlex.join(map(str, again)) if isinstance(again, list) else str(again)))
        found.append(("Write this page", f"python -m flower_ldm.report {output_dir}"))
    return found


def versions(run: Run) -> list[tuple[str, str]]:
    """Of the packages: what the run and its evaluation noted, and what the models were saved with."""
    saved = {config.get("_diffusers_version") for config in run.configs.values()} - {None}
    noted = {"diffusers": words(sorted(saved))} if saved else {}
    noted |= _part(run.metrics, "versions") | _part(run.evaluation, "versions")
    return [(str(name), str(version)) for name, version in noted.items()]


# --- the page --------------------------------------------------------------------------------------------------------


def page_sections(run: Run, album: Album) -> dict[str, object]:
    """What the page shows, by section, in the order in which a reader meets it; an empty section is left out."""
    losses, optimizer = training_curves(run)
    evaluation = run.evaluation
    sweep = evaluation.get("sweep") if isinstance(evaluation.get("sweep"), list) else []
    sweep_plot = None if sweep else album.picture(run.folder / "evaluation_sweep.png", "Metrics over guidance and steps")
    sweep_grid = album.picture(
        run.folder / "guidance_sweep.png", "The same seeds at several guidance scales",
        "The same seeds at several guidance scales.",
    )  # fmt: skip
    neighbours = album.picture(
        run.folder / "nearest_neighbours.png", "Samples beside the training images nearest to them",
        "The most suspicious samples, each beside the training images nearest to it.",
    )  # fmt: skip
    generated = album.picture(
        run.folder / "original_reconstructed_generated.png", "Originals, their reconstructions and generated images",
        "Originals, what the autoencoder makes of them, and generated images of the same classes.",
    )  # fmt: skip
    memorised = memorisation_table(evaluation)
    table = metrics_table(evaluation)
    paths = denoising_paths(run, album)
    sections = {
        "facts": facts(run),
        "curves": {"losses": losses, "optimizer": optimizer} if losses or optimizer else None,
        "timesteps": timestep_chart(run),
        "progress": pictures_over_time(run, album),
        "reconstruction": {"rows": rows, "picture": generated} if (rows := reconstruction_figures(run)) or generated
        else None,
        "latents": latent_maps(run, album),
        "path": {"paths": paths, "animations": moving} if (moving := animations(run, album)) or paths else None,
        "between": interpolations(run, album),
        "metrics": table and table | {"sampling": sampling_words(evaluation), "remarks": evaluation.get("remarks") or []},
        "sweep": {"charts": sweep_charts(sweep), "rows": sweep_table(sweep), "plot": sweep_plot, "grid": sweep_grid}
        if sweep or sweep_plot or sweep_grid else None,
        "memorisation": {"rows": memorised, "picture": neighbours} if memorised or neighbours else None,
        "again": commands(run),
        "versions": versions(run),
    }  # fmt: skip
    return {name: content for name, content in sections.items() if content}


def render(run: Run) -> str:
    """The page as HTML. Texts are escaped by the template; a policy in its head lets no other script run, and no
    request leave it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    script = (TEMPLATES / "page.js").read_text()
    album = Album(run.folder)
    hero = hero_picture(run, album)  # before all others: it is sure to have room
    planned = run.args.get("max_train_steps")
    return environment.get_template("page.html").render(
        run=run,
        title=title(run),
        lede=lede(run),
        hero=hero,
        headline=headline(run),
        planned=number(planned) if planned else "",
        last_step=number(run.last_step or 0),
        sections=page_sections(run, album),
        class_names=run.class_names,
        left_out=album.left_out,
        style=(TEMPLATES / "page.css").read_text(),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the folder of a run of either stage, finished or not.

    Returns:
        the page's path; a page that was there is replaced, and not before the new one is complete.

    Raises:
        InputError: where `run_dir` is no run, one of its files can't be read, or the page can't be written.
    """
    run_dir = Path(run_dir)
    page = render(read_run(run_dir))
    path = run_dir / FILE_NAME
    unfinished = path.with_name(f"{FILE_NAME}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror}") from error
    return path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m flower_ldm.report", description="Write one HTML page that shows a run.")
    parser.add_argument("run_dir", type=Path, metavar="DIR", help="folder of a run of either stage, finished or not")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    path = write_report(parse_args(argv).run_dir)
    print(f"{path}, {path.stat().st_size / 1e6:.1f} MB: open it in any browser")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
