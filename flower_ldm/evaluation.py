"""Measures how good a pipeline is: `python -m flower_ldm.evaluation --pipeline DIR`.

Samples, the autoencoder's reconstructions and real training images are each compared with held-out images, by the same
features and in the same number. Real images give the floor of every distance. Reconstructions give the ceiling of what
the denoiser can reach. The samples are then searched for copies of training images, and so are held-out images, as the
chance level. The results are the entry "evaluation" of `metrics.json`, with pictures beside it.

Shapes: N samples, M reference images; D features; K classes; (H, W) pixels.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import sklearn
import torch
import torchmetrics
from sklearn.pipeline import Pipeline
from torch import nn

from . import FlowerLDMPipeline, runs
from .autoencoder_losses import VGG16_TAPS, PerceptualLoss
from .data import DataOptions, ImageDataset, to_uint8
from .errors import InputError, exit_on_input_error
from .features import (
    DEFAULT_FEATURES,
    NETWORKS,
    FeatureNetwork,
    extract_features,
    load_feature_network,
    load_or_extract_features,
)
from .files import (
    file_path,
    path_text,
    refusals_of_disk,
)
from .flags import FlagParser
from .lettering import save_figure
from .memorization import TrainingNeighbors
from .metrics import (
    COMPARED_SETS,
    HELD_OUT,
    MEMORIZATION_METRICS,
    METRICS,
    MIN_IMAGES,
    REAL,
    RECONSTRUCTION_METRICS,
    RECONSTRUCTIONS,
    SAMPLES,
    SEARCHED_SETS,
    Comparison,
    Metric,
    ReconstructedBatch,
    Row,
    cautions,
    class_accuracy,
    measure_reconstructed,
    measure_set,
    memorization_rates,
    protocol_remarks,
    smallest_n,
    train_classifier,
)
from .model_card import write_model_card
from .pipelines.pipeline_flower_ldm import NUM_INFERENCE_STEPS, SCHEDULERS
from .progress_bars import progress_bar
from .report import write_report
from .sampling import SCHEDULER_HELP, Sampler, check_sampling, load_pipeline, sample_labels
from .visualization import save_nearest_neighbors

TERMINAL_DECIMALS = 4  # at most
TERMINAL_DISTANCE = 10  # characters for a distance, which may have five digits before its point


# --- flags -----------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = FlagParser(prog="python -m flower_ldm.evaluation", description="Measure a pipeline.")
    flag = parser.add_argument
    flag("--pipeline", type=path_text, required=True, help="folder of a pipeline, or a Hub id")
    flag("--output", type=file_path,
         help=f"JSON file that gets the key evaluation; unset: {runs.METRICS_FILE.name} in --pipeline")  # fmt: skip
    flag("--cache_dir", type=file_path,
         help=f"folder that keeps features and samples; unset: {runs.EVALUATION_CACHE} beside --output")  # fmt: skip
    DataOptions.add_flags_of_run(parser)
    # what is measured
    flag("--features", type=path_text, default=DEFAULT_FEATURES,
         help=f"feature network: {', '.join(NETWORKS)}, or the path of a TorchScript file")  # fmt: skip
    flag("--vgg_weights", type=path_text,
         help="local file with torchvision's VGG16, to measure the perceptual distance")  # fmt: skip
    # how samples are drawn
    flag("--num_samples", type=int, default=1020, help="number of samples, spread evenly over the classes")
    flag("--seed", type=int, default=0, help="sample i is drawn with the seed SEED + i")
    flag("--num_inference_steps", "--steps", type=int, default=NUM_INFERENCE_STEPS)
    flag("--guidance_scale", type=float, help="1 means off; unset: the pipeline's default")
    flag("--guidance_interval", type=float, nargs=2, metavar=("BEGIN", "END"),
         help="fractions of the trajectory; 0 is pure noise; unset: the pipeline's default")  # fmt: skip
    flag("--scheduler", choices=SCHEDULERS, help=SCHEDULER_HELP)
    flag("--sweep_guidance", type=float, nargs="+", help="guidance scales to compare")
    flag("--sweep_steps", type=int, nargs="+", help="numbers of steps to compare, each at every guidance scale")
    flag("--sweep_samples", type=int, help="samples at each point of the sweep; unset: --num_samples")
    # where it is computed
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="number type of the pipeline")
    flag("--batch_size", type=int, default=64, help="images that a network processes together")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, got {args.batch_size}")
    if args.seed < 0:
        raise InputError(f"--seed must not be negative, got {args.seed}")
    for name in ("num_samples", "sweep_samples"):
        value = getattr(args, name)
        if value is not None and value < MIN_IMAGES:
            raise InputError(f"--{name} must be at least {MIN_IMAGES}, to count neighbors, got {value}")
    args.data = DataOptions.from_run(runs.read_flags(Path(args.pipeline)), args)
    if args.output is None:
        args.output = runs.METRICS_FILE.path(args.pipeline if os.path.isdir(args.pipeline) else ".")
    if args.cache_dir is None:
        args.cache_dir = args.output.parent / runs.EVALUATION_CACHE
    return args


# --- reconstruction --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def reconstruct(
    vae: nn.Module,
    images: ImageDataset,
    keys: Sequence[int],
    *,
    batch_size: int = 64,
    perceptual: PerceptualLoss | None = None,
) -> tuple[np.ndarray, dict[str, float]]:
    """Encode and decode images, using the posterior's mean.

    Returns:
        The reconstructions, `(n, H, W, 3)` uint8, and for each of `RECONSTRUCTION_METRICS` its mean over the images. A
        metric of the head needs a head with the data set's number of classes; a perceptual one needs `perceptual`.
    """
    parameter = next(vae.parameters())
    pictures, rows = [], []
    with progress_bar(total=len(keys), desc="reconstructing", unit=" images") as progress:
        for batch_keys in torch.as_tensor(keys).split(batch_size):
            batch = images.__getitems__(batch_keys.tolist())
            originals = batch["images"].to(parameter.device)
            raw_latents = vae.encode(originals.to(parameter.dtype)).latent_dist.mode()
            reconstruction = vae.decode(raw_latents).sample.float().clamp(-1, 1)
            pictures.append(to_uint8(reconstruction))
            has_head = getattr(vae, "head", None) is not None and vae.config.num_classes == images.num_classes
            class_logits = vae.head(raw_latents)[1] if has_head else None
            rows.append(measure_reconstructed(
                ReconstructedBatch(originals, reconstruction, batch["class_labels"], class_logits, perceptual)
            ))  # fmt: skip
            progress.update(len(batch_keys))
    return np.concatenate(pictures), {name: torch.cat([row[name] for row in rows]).mean().item() for name in rows[0]}


# --- the images ------------------------------------------------------------------------------------------------------


def load_images(args: argparse.Namespace, pipe: FlowerLDMPipeline) -> tuple[ImageDataset, ImageDataset]:
    """Load training and held-out images at the pipeline's size.

    Raises:
        InputError: the size or the classes differ from the pipeline's, a class has no held-out image, or there are too
            few held-out images.
    """
    train, held_out = args.data.load_for(pipe, args.pipeline)
    counts = torch.bincount(held_out.labels, minlength=train.num_classes)
    if (counts == 0).any():
        name = train.class_names[int(counts.argmin())]
        raise InputError(
            f"class {name!r} has no held-out image in {'+'.join(held_out.splits)}, so its samples can't be measured: "
            "choose other --val_splits, or evaluate a pipeline without this class, with --classes"
        )
    if len(held_out) < MIN_IMAGES:
        raise InputError(
            f"there are {len(held_out)} held-out images, but must be at least {MIN_IMAGES}: choose other --val_splits"
        )
    return train, held_out


def hold_back(class_labels: torch.Tensor, wanted: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Hold back training images for the comparison, so that the classifier is trained on the others only.

    At most half of each class is held back.

    Args:
        class_labels: `(N,)`, of the training images.
        wanted: `(K,)`, the number of images to hold back from each class.

    Returns:
        The indices of the images that are held back, and those of the others.
    """
    rng = np.random.default_rng(seed)
    held_back = []
    for label, count in enumerate(wanted.tolist()):
        keys = rng.permutation(np.flatnonzero(class_labels.numpy() == label))
        held_back.append(keys[: min(count, len(keys) // 2)])
    chosen = np.sort(np.concatenate(held_back))
    rest = np.setdiff1d(np.arange(len(class_labels)), chosen)
    return torch.from_numpy(chosen), torch.from_numpy(rest)


# --- pictures --------------------------------------------------------------------------------------------------------


COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # color-blind readers can tell them apart


def save_sweep(sweep: list[dict], against_held_out: dict[str, dict], path: Path) -> None:
    """Plot the metrics of a sweep over the guidance scales, with a line for each number of steps.

    With only one guidance scale, plot them over the steps. The floor and the ceiling are drawn if they were measured
    with the same number of images.
    """
    over, lines = "guidance_scale", "num_inference_steps"
    if len({point[over] for point in sweep}) == 1:
        over, lines = lines, over
    option_names = {"guidance_scale": "guidance scale", "num_inference_steps": "steps"}
    metrics = [metric for metric in METRICS if metric.is_swept]
    figure, axes = plt.subplots(1, len(metrics), figsize=(4 * len(metrics), 3.8), layout="constrained")
    for axis, metric in zip(axes, metrics, strict=True):
        for number, value in enumerate(sorted({point[lines] for point in sweep})):
            points = sorted((p for p in sweep if p[lines] == value), key=lambda point: point[over])
            drawn = [point for point in points if point[metric.key] is not None]
            spread = [point[metric.spread_key] for point in drawn] if metric.has_spread else None
            axis.errorbar(
                [point[over] for point in drawn], [point[metric.key] for point in drawn], spread, fmt="o-",
                markersize=4, linewidth=1.4, capsize=3, color=COLORS[number % len(COLORS)],
                label=f"{option_names[lines]} {value:g}",
            )  # fmt: skip
        for image_set, style in ((REAL, ":"), (RECONSTRUCTIONS, "--")):
            entry = against_held_out[image_set.key]
            if entry["n"] == sweep[0]["n"] and entry[metric.key] is not None:
                axis.axhline(entry[metric.key], linestyle=style, color="0.4", linewidth=1.2, label=image_set.name)
        low, high = axis.get_ylim()
        axis.set_ylim(min(0, low), 1.05 * high)  # from 0, else a tiny difference would look like a slope
        axis.set_title(metric.title, fontsize=10)
        axis.set_xlabel(option_names[over], fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"{sweep[0]['n']:,} samples a point", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    save_figure(figure, path)


# --- the whole evaluation --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Real:
    """The real images, their features and the classifier, all prepared before any sample is drawn."""

    train: ImageDataset
    held_out: ImageDataset
    train_features: torch.Tensor
    held_out_features: torch.Tensor
    held_back: torch.Tensor  # indices of the training images that are compared with held-out ones
    others: torch.Tensor  # indices of all other training images
    classifier: Pipeline | None  # trained on the others

    def compare(self, features: torch.Tensor, class_labels: torch.Tensor, drawn: bool = True) -> Comparison:
        """A set of images beside the held-out ones.

        Args:
            features: `(N, D)`, of the set.
            class_labels: `(N,)`, the classes that the images should belong to.
            drawn: the images are samples, so each may be a copy of any training image. Off for the images held back
                and their reconstructions: those are nearest to themselves, so they are compared with the others only.
        """
        training = self.train_features if drawn else self.train_features[self.others]
        return Comparison(features, class_labels, self.held_out_features, training, self.classifier)


def prepare(args: argparse.Namespace, pipe: FlowerLDMPipeline, network: FeatureNetwork) -> Real:
    """Load the images, and prepare all that samples are compared with."""
    return prepare_real(network, *load_images(args, pipe), args.num_samples, args.cache_dir, args.batch_size)


def prepare_real(
    network: FeatureNetwork, train: ImageDataset, held_out: ImageDataset, num_samples: int, cache_dir: Path,
    batch_size: int = 64,
) -> Real:  # fmt: skip
    """The features of real images, extracted or read from the cache, and a classifier trained on those not compared.

    Raises:
        InputError: too few training images can be held back.
    """
    held_out_features, train_features = (
        load_or_extract_features(network, images, cache_dir, batch_size=batch_size) for images in (held_out, train)
    )
    wanted = torch.bincount(sample_labels(num_samples, train.num_classes), minlength=train.num_classes)
    held_back, others = hold_back(train.labels, wanted)
    if len(held_back) < MIN_IMAGES:
        raise InputError(
            f"{len(held_back)} of {len(train):,} training images can be held back to compare with, at most half of "
            f"each class: there must be {MIN_IMAGES}; choose larger --train_splits"
        )
    print("training the classifier", flush=True)
    classifier = train_classifier(train_features[others], train.labels[others])
    return Real(train, held_out, train_features, held_out_features, held_back, others, classifier)


def measure_reconstruction(
    args: argparse.Namespace,
    pipe: FlowerLDMPipeline,
    network: FeatureNetwork,
    perceptual: PerceptualLoss | None,
    real: Real,
) -> dict:
    """The entry "reconstruction": how well the autoencoder reconstructs held-out images."""
    pictures, means = reconstruct(
        pipe.vae, real.held_out, range(len(real.held_out)), batch_size=args.batch_size, perceptual=perceptual
    )
    features = extract_features(network, pictures, batch_size=args.batch_size, title="features of reconstructions")
    entry = {"n": len(real.held_out), "split": "+".join(real.held_out.splits)}
    for metric in RECONSTRUCTION_METRICS:
        if metric.of_features:
            entry[metric.key] = metric.of_features(features, real.held_out_features)
        elif metric.of_images:
            value = means.get(metric.key)
            if metric.names_network and value is not None:
                value = {
                    "name": f"VGG16 {', '.join(VGG16_TAPS.values())} ({Path(args.vgg_weights).name})",
                    "value": value,
                }
            entry[metric.key] = value
    return entry


def measure_sweep(args: argparse.Namespace, sampler: Sampler, network: FeatureNetwork, real: Real) -> list[dict]:
    """The entry "sweep": samples at each guidance scale and number of steps. Empty without a sweep."""
    num_samples = args.sweep_samples or args.num_samples
    labels = sample_labels(num_samples, real.train.num_classes)
    sweep = []
    for options in sweep_options(args, sampler.pipe):
        images, seconds = sampler.draw(num_samples, **options)
        features = extract_features(network, images, batch_size=args.batch_size, title="features of samples")
        measured = measure_set(real.compare(features, labels), swept_only=True)
        del measured["n_reference"]
        point = {name: options[name] for name in ("guidance_scale", "num_inference_steps")}
        sweep.append(point | measured | {"seconds": seconds})
    return sweep


def evaluate(
    args: argparse.Namespace, pipe: FlowerLDMPipeline, network: FeatureNetwork, perceptual: PerceptualLoss | None
) -> dict:
    """Compute the entry "evaluation" of `metrics.json`, and save the pictures beside that file."""
    real = prepare(args, pipe, network)
    reconstruction = measure_reconstruction(args, pipe, network, perceptual, real)
    reconstructions, _ = reconstruct(pipe.vae, real.train, real.held_back, batch_size=args.batch_size)
    sampler = Sampler(pipe, args.cache_dir, seed=args.seed, batch_size=args.batch_size)
    samples, seconds = sampler.draw(args.num_samples, **sampling_options(args, pipe))
    labels, real_labels = sample_labels(args.num_samples, pipe.num_classes), real.train.labels[real.held_back]
    features_of = partial(extract_features, network, batch_size=args.batch_size)
    compared = {
        REAL: real.compare(real.train_features[real.held_back], real_labels, drawn=False),
        RECONSTRUCTIONS: real.compare(
            features_of(reconstructions, title="features of reconstructions"), real_labels, drawn=False
        ),
        SAMPLES: real.compare(features_of(samples, title="features of samples"), labels),
    }
    print("comparing with held-out images", flush=True)
    against_held_out = {image_set.key: measure_set(comparison) for image_set, comparison in compared.items()}
    neighbors = TrainingNeighbors(real.train, real.train_features)
    mirrored = features_of(samples, title="features of samples in a mirror", mirrored=True)
    found = {SAMPLES: neighbors.search(samples, compared[SAMPLES].features, mirrored)}
    mirrored = load_or_extract_features(
        network, real.held_out, args.cache_dir, batch_size=args.batch_size, mirrored=True
    )
    found[HELD_OUT] = neighbors.search(real.held_out, real.held_out_features, mirrored)
    names = [pipe.class_names[label] for label in labels.tolist()]
    save_nearest_neighbors(samples, names, real.train, found[SAMPLES], runs.NEAREST_NEIGHBORS.path(args.output.parent))
    sweep = measure_sweep(args, sampler, network, real)
    if sweep:
        save_sweep(sweep, against_held_out, runs.EVALUATION_SWEEP.path(args.output.parent))
    return {
        **describe(args, pipe, network, real),
        "sampling": {
            "num_samples": args.num_samples, "seed": args.seed, "scheduler": type(pipe.scheduler).__name__,
            **sampling_options(args, pipe), "seconds": seconds, "images_per_second": args.num_samples / seconds,
            "device": str(pipe.device), "dtype": args.dtype,
        },
        "reconstruction": reconstruction,
        runs.AGAINST_HELD_OUT: against_held_out,
        runs.MEMORIZATION: {image_set.key: memorization_rates(found[image_set]) for image_set in SEARCHED_SETS},
        **({"sweep": sweep} if sweep else {}),
        "remarks": remarks_on(args, against_held_out, real),
    }  # fmt: skip


def describe(args: argparse.Namespace, pipe: FlowerLDMPipeline, network: FeatureNetwork, real: Real) -> dict:
    """The first entries of the evaluation: the pipeline, the data, the features and the classifier."""
    return {
        "pipeline": Path(args.pipeline).resolve().name if os.path.isdir(args.pipeline) else args.pipeline,
        "dataset": real.train.name,
        "splits": {"train": list(real.train.splits), "held_out": list(real.held_out.splits)},
        "resolution": real.train.resolution,
        "num_classes": pipe.num_classes,
        "features": {
            "name": network.name, "num_features": real.train_features.shape[1], "input_size": network.input_size,
            "digest": network.digest,
        },
        "classifier": {
            "kind": "logistic regression on the features of real training images",
            "n": len(real.train) - len(real.held_back),
            "held_out_accuracy": class_accuracy(real.classifier, real.held_out_features, real.held_out.labels),
        },
    }  # fmt: skip


def sampling_options(args: argparse.Namespace, pipe: FlowerLDMPipeline) -> dict:
    """The arguments of the pipeline's call for the main set of samples. Unset guidance is the pipeline's default."""
    scale, interval = pipe.resolve_guidance(args.guidance_scale, args.guidance_interval)
    return {
        "guidance_scale": scale,
        "guidance_interval": list(interval),
        "num_inference_steps": args.num_inference_steps,
    }


def sweep_options(args: argparse.Namespace, pipe: FlowerLDMPipeline) -> list[dict]:
    """The arguments of the pipeline's call at each point of the sweep. Empty without a sweep."""
    if not args.sweep_guidance and not args.sweep_steps:
        return []
    options = sampling_options(args, pipe)
    return [
        options | {"guidance_scale": scale, "num_inference_steps": steps}
        for steps in sorted(set(args.sweep_steps or [args.num_inference_steps]))
        for scale in sorted(set(args.sweep_guidance or [options["guidance_scale"]]))
    ]


def remarks_on(args: argparse.Namespace, against_held_out: dict[str, dict], real: Real) -> list[str]:
    """What a reader of the numbers must know."""
    n_real, num_classes = against_held_out[REAL.key]["n"], real.train.num_classes
    n = smallest_n(against_held_out.values())
    remarks = cautions(n, real.train_features.shape[1])
    if n_real != args.num_samples:
        remarks.append(
            f"there are {n_real:,} real images and reconstructions, but {args.num_samples:,} samples, because at most "
            "half of each class is kept from the classifier; Frechet distances depend on n"
        )
    if args.num_samples < num_classes:
        remarks.append(f"{args.num_samples:,} samples cover only the first of the {num_classes:,} classes")
    return remarks + protocol_remarks(n)


# --- the table in the terminal ---------------------------------------------------------------------------------------


def table(evaluation: dict) -> str:
    """The evaluation as text for a terminal."""
    n = smallest_n(evaluation[runs.AGAINST_HELD_OUT].values())
    biased = cautions(n, evaluation["features"]["num_features"])
    lines = [*comparison_lines(evaluation, mark="*" if biased else " "), "", reconstruction_line(evaluation)]
    for image_set in SEARCHED_SETS:
        entry = evaluation[runs.MEMORIZATION][image_set.key]
        rates = [
            f"{entry[metric.key]:{'.2%' if metric.is_share else ','}} {metric.short}"
            for metric in MEMORIZATION_METRICS
        ]
        lines.append(f"memorized {image_set.name}: {', '.join(rates)} (of {entry['n']:,})")
    for point in evaluation.get("sweep", []):
        values = [f"{metric.short} {_cell(metric, point)}" for metric in METRICS if metric.is_swept]
        lines.append(
            f"guidance {point['guidance_scale']:<5g} steps {point['num_inference_steps']:<4d} n {point['n']:,}: "
            f"{', '.join(values)}, {point['seconds']:.0f} s"
        )
    lines += [f"{'* ' if remark in biased else ''}{remark}" for remark in evaluation["remarks"]]
    return "\n".join(lines)


def comparison_lines(evaluation: dict, mark: str) -> list[str]:
    """A table with a line for each set of images. `mark` follows each number that few images bias."""
    features, sets = evaluation["features"], evaluation[runs.AGAINST_HELD_OUT]
    head = [f"{metric.short:>{_width(metric)}}{' ' if metric.caution else ''}" for metric in METRICS]
    lines = [
        "",
        f"{evaluation['dataset']}, against {sets[SAMPLES.key]['n_reference']:,} held-out images "
        f"({'+'.join(evaluation['splits']['held_out'])}), {features['num_features']:,} features of {features['name']}",
        f"{'':22}{'n':>7}{''.join(head)}".rstrip(),
    ]
    for image_set in COMPARED_SETS:
        entry = sets[image_set.key]
        cells = [f"{_cell(metric, entry):>{_width(metric)}}{mark if metric.caution else ''}" for metric in METRICS]
        lines.append(f"{image_set.name:22}{entry['n']:>7,}{''.join(cells)}".rstrip())
    return lines


def reconstruction_line(evaluation: dict) -> str:
    """One line about the reconstructions. Accuracies come last, beside the classifier's on the originals."""
    entry, on_originals = evaluation["reconstruction"], evaluation["classifier"]["held_out_accuracy"]
    values, shares = [], []
    for metric in RECONSTRUCTION_METRICS:
        name, value = metric.short, entry.get(metric.key)
        if metric.names_network and value is not None:
            name, value = value["name"], value["value"]
        if metric.is_share:
            shares.append(f"{name} {_percent(value)}")
        elif value is not None:
            values.append(" ".join(filter(None, [name, _terminal_number(metric, value), metric.unit])))
    return (
        f"reconstruction of {entry['n']:,} held-out images: {', '.join(values)}; {', '.join(shares)}, "
        f"the classifier's on the originals {_percent(on_originals)}"
    )


def _width(metric: Metric) -> int:
    """The width of the metric's column in the terminal."""
    width = max(len(metric.short) + 2, TERMINAL_DISTANCE if metric.better == "lower" else 0)
    return width + (len(" ± 0.") + _terminal_decimals(metric) if metric.has_spread else 0)


def _cell(metric: Metric, entry: dict) -> str:
    """The metric's value, with its spread if it has one."""
    spread = f" ± {entry[metric.spread_key]:.{_terminal_decimals(metric)}f}" if metric.has_spread else ""
    return _terminal_number(metric, entry[metric.key]) + spread


def _terminal_number(row: Row, value: float | None) -> str:
    if row.is_share or value is None:
        return _percent(value)
    return f"{value:.{_terminal_decimals(row)}f}"


def _terminal_decimals(row: Row) -> int:
    return TERMINAL_DECIMALS if row.decimals is None else min(row.decimals, TERMINAL_DECIMALS)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def read_metrics(path: Path) -> dict:
    """Read what `--output` holds already. Empty if there is no such file.

    Raises:
        InputError: `--output` can't be read, or is something else than a JSON object.
    """
    if path.is_dir():
        raise InputError(f"--output {path} is a folder: name a file, such as {runs.METRICS_FILE.path(path)}")
    try:
        metrics = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--output {path} can't be used ({error}): name another file") from error
    if not isinstance(metrics, dict):
        raise InputError(f"--output {path} holds something else than a run's metrics: name another file")
    return metrics


def write_metrics(path: Path, evaluation: dict) -> None:
    """Write the evaluation to a file, and keep the file's other metrics."""
    with refusals_of_disk(path, "run the command again, or name another --output; samples are reused"):
        runs.write_metrics(path, {"evaluation": evaluation}, others=read_metrics(path))


def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    read_metrics(args.output)
    pipe = load_pipeline(args.pipeline, args.scheduler, args.device, args.dtype)
    for options in [sampling_options(args, pipe), *sweep_options(args, pipe)]:
        check_sampling(pipe, args.batch_size, options)
    network = load_feature_network(args.features, args.device)
    perceptual = PerceptualLoss(args.vgg_weights).to(args.device) if args.vgg_weights else None
    evaluation = evaluate(args, pipe, network, perceptual)
    evaluation["versions"] = runs.versions() | {
        "torchmetrics": torchmetrics.__version__, "scikit-learn": sklearn.__version__
    }  # fmt: skip
    evaluation["seconds"] = time.perf_counter() - started
    evaluation["command"] = shlex.join(["python", "-m", "flower_ldm.evaluation", *argv])
    write_metrics(args.output, evaluation)
    print(table(evaluation))
    print(f"wrote the metrics to {args.output}, and pictures to the same folder")
    if args.output.name == runs.METRICS_FILE.name and runs.ARGS_FILE.path(args.output.parent).is_file():
        write_model_card(args.output.parent)
        print(f"updated the report: {write_report(args.output.parent)}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
