"""One self-contained HTML page that shows a run: `python -m flower_ldm.report results/flower-ldm`.

It reads the folder that either training script writes and the evaluation adds to. The run may be unfinished. It writes
`report.html` into that folder and leaves out what isn't there. The page loads no script, font or picture from the
network.

This file turns a run's files into numbers, curves and data URIs. `report_page/` holds the page: a Jinja template that
escapes every text, a style sheet and a script.
"""

import argparse
import base64
import hashlib
import io
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from PIL import Image, ImageSequence

from .data import DATASET_TITLES
from .errors import OneLineParser, exit_on_input_error
from .files import file_path, file_safe_name, write_whole
from .formatting import count_of_parameters, duration, is_finite, joined, number, percent
from .images import open_image
from .memorization import RULE
from .metrics import (
    COMPARED_SETS,
    MEMORIZATION_METRICS,
    METRICS,
    RECONSTRUCTION_METRICS,
    SAMPLES,
    SEARCHED_SETS,
    Metric,
    Row,
)
from .recipes import fold_command, training_command
from .report_curves import sweep_charts, timestep_chart, training_curves
from .runs import (
    AGAINST_HELD_OUT,
    ANIMATION,
    CLASS_GRID,
    DENOISING_PATH,
    EVALUATION_SWEEP,
    GUIDANCE_SWEEP,
    INTERPOLATION,
    LATENT_MAP,
    LATENT_MAPS,
    MEMORIZATION,
    NEAREST_NEIGHBORS,
    PAGE_FILE,
    RECONSTRUCTION_GRIDS,
    SAMPLE_GRIDS,
    SIDE_BY_SIDE,
    Artifact,
    Run,
    nested,
    read_run,
)

PICTURES_BYTES = 9_000_000  # all data URIs together; with its text the page stays below 10 MB
PICTURE_BYTES = 500_000  # a larger picture is compressed further
MOST_PIXELS = 50_000_000  # a larger picture isn't opened
PICTURE_PIXELS = 2400  # the longest side of a picture on the page
TEMPLATES = Path(__file__).parent / "report_page"

PRECISIONS = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}


# --- what was trained ------------------------------------------------------------------------------------------------


def training_seconds(run: Run) -> float | None:
    """Seconds of training: from the metrics, or the sum over the log lines of an unfinished run."""
    if number(run.metrics.get("training_seconds")) != "–":
        return run.metrics["training_seconds"]
    seconds, last = 0.0, 0
    for line in run.log:
        if is_finite(line.get("steps_per_second")) and line["steps_per_second"] > 0:
            seconds += (line["step"] - last) / line["steps_per_second"]
            last = line["step"]
    return seconds or None


def data_name(run: Run) -> str:
    """The data set's usual name."""
    name = run.args.get("dataset") or run.metrics.get("dataset") or "images"
    return DATASET_TITLES.get(name, str(name))


def title(run: Run) -> str:
    """The page's title: which model, for which data."""
    if run.stage == "autoencoder":
        return f"An autoencoder for {data_name(run)}"
    return f"Latent diffusion on {data_name(run)}"


def summary(run: Run) -> str:
    """One sentence: which model was trained, on which data, for how long."""
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
    preposition = "on" if run.stage == "autoencoder" else "on the latents of"
    sentence += f" {preposition} {data_name(run)}"
    if num_classes := class_count(run):
        sentence += f", {num_classes} classes"
    if resolution := run.args.get("resolution"):
        sentence += f", at {resolution}\u00a0×\u00a0{resolution} pixels"
    return sentence + "."


def class_count(run: Run) -> int | None:
    """The number of classes, from the pipeline, a model's config, or the flags."""
    configs = [config.get("num_classes") for config in run.configs.values()]
    return len(run.class_names) or next(filter(None, configs), None) or len(run.args.get("classes") or []) or None


def headline(run: Run) -> list[tuple[str, str]]:
    """Up to four figures for the first screen, each with its name."""
    samples = nested(run.evaluation, AGAINST_HELD_OUT, SAMPLES.key)
    copied = nested(run.evaluation, MEMORIZATION, SAMPLES.key)
    values = [(metric, samples.get(metric.key)) for metric in METRICS]
    values += [(metric, copied.get(metric.key)) for metric in MEMORIZATION_METRICS]
    values += [(metric, run.metrics.get(metric.stage1_key)) for metric in RECONSTRUCTION_METRICS]
    candidates = [
        (metric.headline.format(n=number(samples.get("n"))), shown(metric, value, metric.headline_decimals))
        for metric, value in values
        if metric.headline
    ]
    candidates += [
        ("Loss, held out", number(run.metrics.get("val_loss"))),
        ("Training", duration(seconds) if (seconds := training_seconds(run)) else "–"),
        ("Updates", number(run.last_step)),
    ]
    return [(name, value) for name, value in candidates if value != "–"][:4]


def shown(row: Row, value: object, decimals: int | None) -> str:
    """A number with its unit, or a share in percent; a dash if the value is unknown."""
    text = percent(value) if row.is_share else number(value, decimals)
    return f"{text} {row.unit}" if row.unit and text != "–" else text


def facts(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Model, data and training in groups of (name, value). Unknown values are left out."""
    args, metrics = run.args, run.metrics
    size = args.get("resolution")
    splits = nested(run.evaluation, "splits")
    held_out = splits.get("held_out") or metrics.get("splits") or args.get("val_splits")
    images = metrics.get("num_images")
    trained_on = splits.get("train") or args.get("train_splits")
    unet = run.configs.get("denoiser", {})
    side = unet.get("sample_size")
    latents = [unet.get("in_channels"), *(side if isinstance(side, list) else [side, side])]
    scheduler = run.configs.get("scheduler", {})
    sampler = scheduler.get("_class_name")
    models = [
        (name.capitalize(), _model_description(run.configs.get(name, {}), run.num_parameters.get(name, 0)))
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
            ("Trained on", joined(trained_on) if trained_on else None),
            ("Held out", (joined(held_out) if held_out else "") + (f", {number(images)} images" if images else "")),
            ("Size", f"{size} × {size} pixels" if size else None),
        ],
        "Training": [
            ("Updates", number(run.last_step)),
            ("Batch", _batch_description(args)),
            ("Learning rate", _learning_rate_description(args)),
            ("Precision", PRECISIONS.get(metrics.get("mixed_precision") or args.get("mixed_precision"))),
            ("Moving average", f"decay {args['ema_decay']}" if "ema_decay" in args else None),
            ("Time", duration(seconds) if (seconds := training_seconds(run)) else None),
            ("Device", metrics.get("device")),
            ("Processes", number(processes) if (processes := metrics.get("num_processes")) != 1 else None),
            ("Recipe", args.get("config")),
            ("Perceptual network", metrics.get("vgg_weights") and Path(str(metrics["vgg_weights"])).name),
        ],
    }  # fmt: skip
    known = {name: [(key, str(value)) for key, value in rows if value not in (None, "", "–")]
             for name, rows in groups.items()}  # fmt: skip
    return [(name, rows) for name, rows in known.items() if rows]


def _model_description(config: dict, num_parameters: int) -> str:
    name = config.get("_class_name", "")
    return name + (f", {count_of_parameters(num_parameters)} parameters" if name and num_parameters else "")


def _batch_description(args: dict) -> str | None:
    if "train_batch_size" not in args:
        return None
    accumulated = args.get("gradient_accumulation_steps") or 1
    return f"{args['train_batch_size']} images" + (f" × {accumulated} micro-batches" if accumulated > 1 else "")


def _learning_rate_description(args: dict) -> str | None:
    if "learning_rate" not in args:
        return None
    schedule = str(args.get("lr_scheduler") or "").replace("_", " ")
    return ", ".join(filter(None, [
        number(args["learning_rate"]), schedule,
        f"{number(args['lr_warmup_steps'])} updates of warm-up" if args.get("lr_warmup_steps") else "",
    ]))  # fmt: skip


# --- pictures --------------------------------------------------------------------------------------------------------


@dataclass
class Album:
    """A run's pictures as data URIs, up to the page's maximum size. The first pictures requested get the space."""

    folder: Path
    bytes_left: int = PICTURES_BYTES
    left_out: list[str] = field(default_factory=list)

    def picture(self, path: Path, alt: str, caption: str = "") -> dict | None:
        """A still picture, compressed. `None` if the file is missing, damaged, or too large for the space left."""

        def read(image: Image.Image) -> tuple[str, str]:
            image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS), Image.Resampling.LANCZOS)
            return _data_uri(_webp(image, path.stat().st_size < 2 * PICTURE_BYTES), "webp"), ""

        return self._embed(path, alt, caption, read)

    def animation(self, path: Path, alt: str, caption: str = "") -> dict | None:
        """A GIF, unchanged. Its last frame is shown to readers who prefer reduced motion."""

        def read(image: Image.Image) -> tuple[str, str]:
            for frame in ImageSequence.Iterator(image):
                still = frame.convert("RGB")
            return _data_uri(path.read_bytes(), "gif"), _data_uri(_webp(still, try_lossless=False), "webp")

        return self._embed(path, alt, caption, read)

    def _embed(
        self, path: Path, alt: str, caption: str, read: Callable[[Image.Image], tuple[str, str]]
    ) -> dict | None:
        """A file as the template's `picture` takes it. `read` returns its data URI and that of a still, or ""."""
        if not path.is_file():
            return None
        if reason := self._not_shown(path):
            return self._leave_out(path, reason)
        try:
            with open_image(path) as image:
                uri, still = read(image)
                size = image.size
        except Exception:  # Pillow's errors for damaged files have no common base class
            return self._leave_out(path, "damaged")
        return self._add(path, uri, size, alt, caption, still)

    def _add(
        self, path: Path, uri: str, size: tuple[int, int], alt: str, caption: str, still: str = ""
    ) -> dict | None:
        if len(uri) + len(still) > self.bytes_left:
            return self._leave_out(path, "the page would be larger than 10 MB")
        self.bytes_left -= len(uri) + len(still)
        return {"src": uri, "width": size[0], "height": size[1], "alt": alt, "caption": caption, "still": still}

    def _not_shown(self, path: Path) -> str | None:
        """Why a file isn't opened, or `None` if it may be.

        People pass pages on, so a page shows only files of the run itself. Decompression bombs stay closed.
        """
        if not os.path.realpath(path).startswith(os.path.join(os.path.realpath(self.folder), "")):
            return "a link to a file outside the run"
        try:
            with open_image(path) as image:
                too_large = image.width * image.height > MOST_PIXELS
        except Exception:
            return "damaged"
        return f"more than {number(MOST_PIXELS)} pixels" if too_large else None

    def _leave_out(self, path: Path, reason: str) -> None:
        self.left_out.append(f"{path.relative_to(self.folder)} ({reason})")


def _webp(image: Image.Image, try_lossless: bool = True) -> bytes:
    """WebP bytes: lossless if that is small enough, as for plots, or else at the best quality that is."""
    image = (
        image if image.mode in ("RGB", "RGBA") else image.convert("RGBA" if "transparency" in image.info else "RGB")
    )
    for options in ({"lossless": True},) * try_lossless + ({"quality": 90}, {"quality": 75}):
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", method=4, **options)
        if buffer.tell() <= PICTURE_BYTES:
            break
    return buffer.getvalue()


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _by_update(pictures: Artifact, folder: Path) -> list[tuple[int, Path]]:
    """The pictures that a run drew during training, each with its update, in order."""
    found = pictures.found(folder)
    return sorted((int(digits), path) for digits, path in found if re.fullmatch("[0-9]+", digits) and path.is_file())


def _without_underscores(stem: str) -> str:
    return stem.replace("_", " ").strip()


def _class_of(run: Run, stem: str) -> str:
    """The class that a picture shows, in its own spelling unless two classes share this file name."""
    stems = [(name, file_safe_name(name)) for name in run.class_names]
    names = [name for label, (name, safe) in enumerate(stems) if stem in (safe, f"{safe}_{label}")]
    return names[0] if len(names) == 1 else _without_underscores(stem)


def hero_picture(run: Run, album: Album) -> dict | None:
    """The picture at the top: the last reconstructions (stage 1), or the class grid or else the last samples."""
    if run.stage == "autoencoder":
        steps, content = _by_update(RECONSTRUCTION_GRIDS, run.folder), "held-out images, each above its reconstruction"
    else:
        steps, content = _by_update(SAMPLE_GRIDS, run.folder), "generated images, one class a column"
        grid = CLASS_GRID.path(run.folder)
        if grid.is_file():
            caption = f"{content.capitalize()}; nothing here is a photograph."
            return album.picture(grid, f"A grid of {content}", caption)
    if not steps:
        return None
    step, path = steps[-1]
    return album.picture(path, f"A grid of {content}", f"{content.capitalize()}, at update {number(step)}.")


def pictures_over_time(run: Run, album: Album) -> list[dict]:
    """The first, a middle and the last picture drawn during training. Empty if there is only one."""
    drawn = RECONSTRUCTION_GRIDS if run.stage == "autoencoder" else SAMPLE_GRIDS
    steps = _by_update(drawn, run.folder)
    shown = sorted({0, len(steps) // 2, len(steps) - 1}) if len(steps) > 1 else []
    pictures = [album.picture(path, *drawn.texts(number(step))) for step, path in map(steps.__getitem__, shown)]
    return [picture for picture in pictures if picture]


def latent_maps(run: Run, album: Album) -> list[dict]:
    """The maps of the latents, one for each method."""
    pictures = [album.picture(LATENT_MAP.path(run.folder, method), LATENT_MAP.texts(name)[0], caption)
                for method, (name, caption) in LATENT_MAPS.items()]  # fmt: skip
    return [picture for picture in pictures if picture]


def interpolations(run: Run, album: Album) -> list[dict]:
    """The pictures between two seeds or two classes."""
    pictures = [album.picture(path, *INTERPOLATION.texts(_without_underscores(ends)))
                for ends, path in INTERPOLATION.found(run.folder)]  # fmt: skip
    return [picture for picture in pictures if picture]


def denoising_paths(run: Run, album: Album) -> list[dict]:
    """The pictures of the way from noise to image, one for each class drawn."""
    pictures = [album.picture(path, *DENOISING_PATH.texts(_class_of(run, stem)))
                for stem, path in DENOISING_PATH.found(run.folder)]  # fmt: skip
    return [picture for picture in pictures if picture]


def animations(run: Run, album: Album) -> list[dict]:
    """The animations of denoising, one for each class drawn."""
    pictures = [album.animation(path, *ANIMATION.texts(_class_of(run, stem)))
                for stem, path in ANIMATION.found(run.folder)]  # fmt: skip
    return [picture for picture in pictures if picture]


# --- measured --------------------------------------------------------------------------------------------------------


def metrics_table(evaluation: dict) -> dict | None:
    """Metrics in rows, sets of images in columns. `None` if nothing was compared."""
    entries = {one: entry for one in COMPARED_SETS if (entry := nested(evaluation, AGAINST_HELD_OUT, one.key))}
    if not entries:
        return None
    known = [metric for metric in METRICS if any(is_finite(entry.get(metric.key)) for entry in entries.values())]
    rows = [
        {"name": metric.title, "better": metric.better, "cells": _metric_cells(metric, list(entries.values()))}
        for metric in known
    ]
    counts = [("Images (n)", [number(entry.get("n")) for entry in entries.values()]),
              ("Held-out images", [number(entry.get("n_reference")) for entry in entries.values()])]  # fmt: skip
    notes = [(metric.title, metric.note) for metric in known]
    return {"columns": list(entries), "own": SAMPLES, "rows": rows, "counts": counts, "notes": notes}


def _metric_cells(metric: Metric, entries: list[dict]) -> list[tuple[str, str, str]]:
    """For each set of images: the value, its spread, and the length of its bar in percent."""
    sizes = [abs(entry[metric.key]) for entry in entries if is_finite(entry.get(metric.key))]
    longest = max(sizes + ([1.0] if metric.better == "higher" else [])) or 1.0
    cells = []
    for entry in entries:
        value, spread = entry.get(metric.key), entry.get(metric.spread_key)
        has_spread = metric.has_spread and is_finite(spread)
        cells.append((
            number(float(value), metric.decimals) if is_finite(value) else "–",
            f" ± {number(spread, metric.decimals)}" if has_spread else "",
            f"{100 * max(0.0, value) / longest:.1f}" if is_finite(value) else "0",
        ))  # fmt: skip
    return cells


def sampling_description(evaluation: dict) -> str:
    """One line: how the evaluated samples were drawn, and by which features they were compared."""
    sampling, features = nested(evaluation, "sampling"), nested(evaluation, "features")
    interval = sampling.get("guidance_interval")
    scale = sampling.get("guidance_scale")
    rate = sampling.get("images_per_second")
    details = [
        f"{number(sampling.get('num_samples'))} samples" if sampling.get("num_samples") else "",
        f"seed {sampling['seed']}" if "seed" in sampling else "",
        str(sampling.get("scheduler") or ""),
        f"{sampling['num_inference_steps']} steps" if sampling.get("num_inference_steps") else "",
        f"guidance {scale}" + (f", {joined(interval)} of the way" if interval and interval != [0, 1] else "")
        if scale is not None else "",
        f"{number(rate, 1)} images a second" if is_finite(rate) else "",
        " ".join(str(sampling[key]) for key in ("device", "dtype") if sampling.get(key)),
        f"{number(features.get('num_features'))} features an image by {features['name']}"
        if features.get("name") else "",
    ]  # fmt: skip
    return ", ".join(filter(None, details))


def reconstruction_figures(run: Run) -> list[tuple[str, str]]:
    """How well the autoencoder reconstructs held-out images, by the evaluation or else by stage 1's validation."""
    entry, rows = nested(run.evaluation, "reconstruction"), []
    if entry:
        rows.append(("Images", f"{number(entry.get('n'))} of {joined(entry.get('split'))}"))
        for metric in RECONSTRUCTION_METRICS:
            title, value = metric.title, entry.get(metric.key)
            if metric.names_network and isinstance(value, dict):
                title, value = f"{title} ({value.get('name')})", value.get("value")
            if title:
                rows.append((title, shown(metric, value, metric.decimals)))
    elif run.stage == "autoencoder":
        rows.append(("Images", f"{number(run.metrics.get('num_images'))} of {joined(run.metrics.get('splits'))}"))
        rows += [
            (metric.stage1_title or metric.title, shown(metric, run.metrics.get(metric.stage1_key), metric.decimals))
            for metric in RECONSTRUCTION_METRICS
        ]
    rows = [(name, value) for name, value in rows if not value.startswith("–")]
    return rows if len(rows) > 1 else []


def memorization_table(evaluation: dict) -> dict | None:
    """How many samples there are, and the share of copies by each measure.

    Held-out images can't be copies: their row shows which share is chance.
    """
    rows = []
    for image_set in SEARCHED_SETS:
        if entry := nested(evaluation, MEMORIZATION, image_set.key):
            rates = [shown(metric, entry.get(metric.key), metric.decimals) for metric in MEMORIZATION_METRICS]
            rows.append((image_set.title, [number(entry.get("n")), *rates]))
    return {"head": ["", "n", *(metric.title for metric in MEMORIZATION_METRICS)], "rows": rows} if rows else None


def sweep_table(sweep: list[dict]) -> dict | None:
    """The sweep's points as rows, which have no names."""
    columns = [("Guidance", "guidance_scale", None), ("Steps", "num_inference_steps", None), ("n", "n", None)]
    columns += [(metric.title, metric.key, metric.decimals) for metric in METRICS if metric.is_swept]
    columns += [("Seconds", "seconds", 0)]
    rows = [("", [number(point.get(key), decimals) for _, key, decimals in columns]) for point in sweep]
    return {"head": [name for name, _, _ in columns], "rows": rows} if rows else None


# --- commands and versions -------------------------------------------------------------------------------------------


def commands(run: Run) -> list[tuple[str, str]]:
    """Commands that repeat the run, each under a title."""
    script = "train_autoencoder.py" if run.stage == "autoencoder" else "train_latent_diffusion.py"
    titled = []
    if run.args:
        titled.append(("Train", training_command(run.args, script)))
        output_dir = shlex.quote(str(run.args.get("output_dir") or run.folder.name))
        if run.stage == "latent_diffusion" and run.finished:
            titled.append(("Draw samples", f"python -m flower_ldm.sample --pipeline {output_dir}"))
        if evaluation := run.evaluation.get("command"):
            titled.append(("Evaluate", fold_command(evaluation)))
        titled.append(("Write this page", f"python -m flower_ldm.report {output_dir}"))
    return titled


def versions(run: Run) -> list[tuple[str, str]]:
    """Package versions: those that the run and its evaluation recorded, and the diffusers that saved the models."""
    saved = {config.get("_diffusers_version") for config in run.configs.values()} - {None}
    noted = {"diffusers": joined(sorted(saved))} if saved else {}
    noted |= nested(run.metrics, "versions") | nested(run.evaluation, "versions")
    return [(str(name), str(version)) for name, version in noted.items()]


# --- the page --------------------------------------------------------------------------------------------------------


def page_sections(run: Run, album: Album) -> dict[str, object]:
    """The page's sections by id, in reading order. Empty sections are left out."""
    losses, optimizer = training_curves(run.log)
    evaluation = run.evaluation
    table = metrics_table(evaluation)
    sweep = evaluation["sweep"] if isinstance(evaluation.get("sweep"), list) else []
    # If there are numbers, the page draws the sweep itself, so that readers can hover over it.
    pictures = (SIDE_BY_SIDE, NEAREST_NEIGHBORS, GUIDANCE_SWEEP, *(() if sweep else (EVALUATION_SWEEP,)))
    single = {picture: album.picture(picture.path(run.folder), *picture.texts()) for picture in pictures}
    sections = {
        "facts": facts(run),
        "curves": {"losses": losses, "optimizer": optimizer},
        "timesteps": timestep_chart(run.log),
        "progress": pictures_over_time(run, album),
        "reconstruction": {
            "rows": reconstruction_figures(run),
            "picture": single[SIDE_BY_SIDE],
        },
        "latents": latent_maps(run, album),
        "path": {"paths": denoising_paths(run, album), "animations": []},
        "interpolations": interpolations(run, album),
        "metrics": table
        and table | {"sampling": sampling_description(evaluation), "remarks": evaluation.get("remarks") or []},
        "sweep": {
            "charts": sweep_charts(sweep),
            "table": sweep_table(sweep),
            "plot": single.get(EVALUATION_SWEEP),
            "grid": single[GUIDANCE_SWEEP],
        },
        MEMORIZATION: {"table": memorization_table(evaluation), "picture": single[NEAREST_NEIGHBORS]},
        "commands": commands(run),
        "versions": versions(run),
    }
    # Animations are the largest files, so they come after all other pictures and take the space that is left.
    sections["path"]["animations"] = animations(run, album)
    return {
        name: content
        for name, content in sections.items()
        if (any(content.values()) if isinstance(content, dict) else content)
    }


def render(run: Run) -> str:
    """The page as HTML.

    The template escapes every text. The page's Content-Security-Policy blocks all other scripts and all requests.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    script = (TEMPLATES / "page.js").read_text()
    album = Album(run.folder)
    hero = hero_picture(run, album)  # before all others, so that it surely fits
    planned = run.args.get("max_train_steps")
    page = environment.get_template("page.html").render(
        run=run,
        title=title(run),
        summary=summary(run),
        hero=hero,
        headline=headline(run),
        memorization_rule=RULE,
        planned=number(planned) if planned else "",
        last_step=number(run.last_step or 0),
        sections=page_sections(run, album),
        class_names=run.class_names,
        left_out=album.left_out,
        style=(TEMPLATES / "page.css").read_text(),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return page.encode("utf-8", "backslashreplace").decode("utf-8")  # a file name may be no valid UTF-8


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the folder of a run of either stage, finished or not.

    Returns:
        the page's path. An old page is replaced once the new one is complete.

    Raises:
        InputError: `run_dir` is no run, one of its files can't be read, or the page can't be written.
    """
    run_dir = Path(run_dir)
    page = render(read_run(run_dir))
    path = PAGE_FILE.path(run_dir)
    write_whole(path, lambda unfinished: unfinished.write_text(page, encoding="utf-8"))
    return path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m flower_ldm.report", description="Write one HTML page that shows a run.")
    parser.add_argument(
        "run_dir", type=file_path, metavar="DIR", help="folder of a run of either stage, finished or not"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    path = write_report(parse_args(argv).run_dir)
    print(f"{path}, {path.stat().st_size / 1e6:.1f} MB: open it in any browser")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
