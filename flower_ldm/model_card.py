"""The model card of a run: `README.md` with the metadata that the Hugging Face Hub reads.

Both training scripts write it at their end. The evaluation writes it again with more results. The card shows only
what was measured. It is safe to publish: it names no path, and shows no photograph of the data set or a reconstruction
of one.
"""

import html
import json
import os
import re
import shlex
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .data import DATASET_TITLES, public_dataset
from .errors import InputError, one_line
from .files import hub_id, write_whole
from .formatting import duration, is_finite, joined, number, percent
from .memorization import RULE
from .metrics import (
    FEATURE_RATE,
    HELD_OUT,
    MEMORIZATION_METRICS,
    METRICS,
    RECONSTRUCTION_METRICS,
    SAMPLES,
    ReconstructionMetric,
)
from .pipelines.pipeline_flower_ldm import SCHEDULERS
from .recipes import public_flags, training_command
from .report import (
    facts,
    memorization_table,
    metrics_table,
    sampling_description,
    summary,
    training_seconds,
)
from .runs import (
    AGAINST_HELD_OUT,
    ARGS_FILE,
    AUTOENCODER_LOSSES,
    CARD_FILE,
    CARD_MARK,
    CLASS_GRID,
    DIFFUSION_LOSS,
    MEMORIZATION,
    MODEL_CONFIG,
    Artifact,
    Run,
    nested,
    read_run,
)

EXAMPLE_IDS = {"autoencoder": "user/flower-autoencoder", "latent_diffusion": "user/flower-ldm"}  # of an unpushed run
DOWNLOADED = "model"  # the folder in which the card's commands expect this repository

TASKS = {
    # The Hub has no task for class-conditional images. People look for such models under this one.
    "latent_diffusion": ("unconditional-image-generation", "Class-conditional image generation"),
    "autoencoder": ("image-to-image", "Image reconstruction"),
}


def write_model_card(run_dir: Path, repo_id: str | None = None) -> Path:
    """Write `README.md` into the folder of a finished run of either stage.

    Args:
        repo_id: the repository on the Hub, "user/name". Unset: the run's `--hub_model_id`, or else an example.

    Returns:
        the card's path. An old card is replaced once the new one is complete. A card without the line `CARD_MARK` was
        edited by hand and stays unchanged.

    Raises:
        InputError: `run_dir` is no run, one of its files can't be read, or the card can't be written.
    """
    run = read_run(Path(run_dir))
    path = CARD_FILE.path(run.folder)
    try:
        if path.is_file() and CARD_MARK not in path.read_text("utf-8"):
            return path
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read: {one_line(error)}") from error
    write_whole(path, ModelCard(render(run, repo_id or repository(run.args.get("hub_model_id")))).save)
    return path


def render(run: Run, repo_id: str | None = None) -> str:
    """The card as text: the metadata as YAML between two lines of dashes, then Markdown."""
    example_id = EXAMPLE_IDS[run.stage]
    name = (repo_id or example_id).split("/")[-1]
    sections = [
        f"# {plain(name)}",
        plain(summary(public_run(run))),
        picture(run, CLASS_GRID),
        usage(run, repo_id or example_id),
        training(run),
        measured(run),
        limitations(run),
        license(run),
        reproduction(run, repo_id or example_id),
        CARD_MARK,
    ]
    body = "\n\n".join(filter(None, sections))
    card = f"---\n{metadata(run, name).to_yaml()}\n---\n\n{body}\n"
    return card.encode("utf-8", "backslashreplace").decode("utf-8")  # a class name may be no valid UTF-8


# --- safe to publish -------------------------------------------------------------------------------------------------


def plain(text: object) -> str:
    """Text on one line, escaped so that neither Markdown nor HTML interprets any of it, such as a class name."""
    line = re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))
    list_start = re.compile(r"^([-+=]|[0-9]+(?=[.)](\s|$)))")
    line = list_start.sub(lambda start: f"{start[0][:-1]}&#{ord(start[0][-1])};", line)
    return line.replace("://", "&#58;//").replace("www.", "www&#46;")  # no address becomes a link


def repository(name: object) -> str | None:
    """The name if it is a valid repository name, which is safe within code, or else `None`."""
    is_valid = isinstance(name, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII)
    return name if is_valid else None


def public_run(run: Run) -> Run:
    """The same run with public flags only, and the public name of its data set."""
    name = public_dataset(run.args.get("dataset") or run.metrics.get("dataset"))
    return Run(run.folder, run.stage, public_flags(run.args) | {"dataset": name}, run.log,
               {key: value for key, value in run.metrics.items() if key != "vgg_weights"}, run.configs,
               run.num_parameters, run.class_names)  # fmt: skip


# --- sections --------------------------------------------------------------------------------------------------------


def picture(run: Run, artifact: Artifact) -> str:
    """A relative link to one of the run's pictures, with its caption below.

    Empty if there is no such picture, if it shows photographs, or if it isn't pushed to the Hub.
    """
    if artifact.shows_photographs or not artifact.on_hub or artifact.stage not in (None, run.stage):
        return ""
    if not artifact.path(run.folder).is_file():
        return ""
    alt, caption = artifact.texts()
    return f"![{alt}]({artifact.name})" + (f"\n\n*{caption}*" if caption else "")


def usage(run: Run, repo_id: str) -> str:
    """Examples in Python: with diffusers alone, and with the package."""
    if run.stage == "autoencoder":
        variable, kind, library = "vae", "FlowerAutoencoderKL", "AutoModel"
        lines = [
            "posterior = vae.encode(images).latent_dist  # images: (B, 3, H, W) in [-1, 1]",
            "latents = vae.normalize(posterior.mean)  # zero mean and unit variance, as a denoiser expects",
            "reconstruction = vae.decode(vae.denormalize(latents)).sample",
        ]
        has_code = "auto_map" in run.configs["autoencoder"]
    else:
        variable, kind, library = "pipe", "FlowerLDMPipeline", "DiffusionPipeline"
        lines = [f"images = pipe({_labels(run)}, num_images_per_label=4{_guidance(run)}).images",
                 'images[0].save("image.png")']  # fmt: skip
        has_code = True
    blocks = [
        "## Use it",
        "With [diffusers](https://github.com/huggingface/diffusers) alone. `trust_remote_code` runs the code in this "
        "repository, which is short: read it first. Then replace `COMMIT` by the commit that you have read "
        f"([list](https://huggingface.co/{repo_id}/commits/main)), so that no later code runs:"
        if has_code else "",
        _code(f"from diffusers import {library}", "", f'{variable} = {library}.from_pretrained('
              f'"{repo_id}", revision="COMMIT", trust_remote_code=True)', *lines)
        if has_code else "",
        "With the package `flower_ldm` installed" + (", which needs no `trust_remote_code`:" if has_code else ":"),
        _code(f"from flower_ldm import {kind}", "", f'{variable} = {kind}.from_pretrained("{repo_id}")', *lines),
    ]  # fmt: skip
    if run.stage == "latent_diffusion" and (names := run.class_names):
        title = f"The {number(len(names))} classes, by name or by index from 0" if len(names) > 1 else "The class"
        blocks.append(f"<details><summary>{title}</summary>\n\n{plain(', '.join(names))}\n\n</details>")
    return "\n\n".join(filter(None, blocks))


def _guidance(run: Run) -> str:
    """The guidance scale as an argument, for a pipeline of an earlier version, whose config has none."""
    scales = nested(run.evaluation, "sampling").get("guidance_scale"), run.args.get("guidance_scale")
    scale = next(filter(is_finite, scales), None)
    return "" if scale is None or "guidance_scale" in run.configs["pipeline"] else f", guidance_scale={scale}"


def _labels(run: Run) -> str:
    """The labels of the example: one by name, if a name needs no escaping, and one by index."""
    names = run.class_names
    preferred = "sunflower" if "sunflower" in names else names[0] if names else ""
    first = json.dumps(preferred) if re.fullmatch(r"[A-Za-z0-9 '-]+", preferred) else "0"
    return f"[{first}, {len(names) - 1}]" if len(names) > 1 else f"[{first}]"


def _code(*lines: str, language: str = "python") -> str:
    """A code block. Its fences are longer than any run of backticks inside, so that no class name can end it."""
    longest = max((len(run) for run in re.findall("`+", "\n".join(lines))), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def training(run: Run) -> str:
    """Model, data and training as a table, with the loss curves."""
    rows = [[plain(name), plain(value)] for _, group in facts(public_run(run)) for name, value in group]
    curves = AUTOENCODER_LOSSES if run.stage == "autoencoder" else DIFFUSION_LOSS
    blocks = ["## Training", f"| | |\n|---|---|\n{_rows(rows)}", picture(run, curves), _perceptual_network(run)]
    if (stage1 := autoencoder_run(run)) and (seconds := training_seconds(stage1)):
        blocks.append(f"Its autoencoder was trained first, for {number(stage1.last_step)} updates in "
                      f"{duration(seconds)}.")  # fmt: skip
    return "\n\n".join(filter(None, blocks))


def _rows(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _perceptual_network(run: Run) -> str:
    """The perceptual loss's network, on which the measured values depend."""
    if run.stage != "autoencoder" or not run.args.get("perceptual_weight"):
        return ""
    weights = "weights of a local file" if run.args.get("vgg_weights") else "torchvision's ImageNet weights"
    return f"Perceptual loss: VGG16 with {weights}."


def measured(run: Run) -> str:
    """The metrics with their protocol, or only the held-out loss if nothing else was measured."""
    if run.stage == "autoencoder":
        rows = [[name, value] for name, value in _reconstruction(run)]
        note = "Values are means over images. Images are reconstructed from the posterior's mean."
        return f"## Measured\n\n{_table([_held_out(run), ''], rows)}\n\n{note}" if rows else ""
    evaluation = run.evaluation
    blocks = []
    if table := metrics_table(evaluation):
        columns = [f"{one.title}, {one.role}" for one in table["columns"]]
        rows = [[f"{row['name']} ({row['better']} is better)", *(value + spread for value, spread, _ in row["cells"])]
                for row in table["rows"]]  # fmt: skip
        rows += [[name, *values] for name, values in table["counts"]]
        blocks += [protocol(run), _table(["", *columns], rows)]
        blocks.append("\n".join(f"- {plain(remark)}" for remark in evaluation.get("remarks") or []))
    if table := memorization_table(evaluation):
        blocks.append(
            f"**Memorization.** {RULE} Distances are measured in feature and in pixel space. Held-out images can't "
            "be memorized, so their share is due to chance."
        )
        head = [name.lower() for name in table["head"]]
        blocks.append(_table(head, [[name, *values] for name, values in table["rows"]]))
    if rows := _reconstruction(run):
        blocks.append(f"**The autoencoder**, {_held_out(run)}:\n\n{_table(['', ''], [list(row) for row in rows])}")
    if not blocks and is_finite(run.metrics.get("val_loss")):
        blocks.append(_table([_held_out(run), ""], [["Loss", number(run.metrics["val_loss"])]]))
        blocks.append("The quality of its images has not been measured.")
    return "\n\n".join(["## Measured", *filter(None, blocks)]) if blocks else ""


def protocol(run: Run) -> str:
    """One paragraph: which images were compared, by which features, and how the samples were drawn."""
    evaluation = run.evaluation
    features, splits = nested(evaluation, "features"), nested(evaluation, "splits")
    sentence = "Samples, reconstructions and real training images were each compared with held-out images"
    sentence += f" (split {plain(joined(splits['held_out']))})" if splits.get("held_out") else ""
    if features.get("name"):
        sentence += f", by {number(features.get('num_features'))} features of {plain(features['name'])}"
        sentence += f" on images of {number(features['input_size'])} pixels" if features.get("input_size") else ""
    drawn = sampling_description({"sampling": nested(evaluation, "sampling")})
    return f"{sentence}. Sampling: {plain(drawn)}." if drawn else f"{sentence}."


def _held_out(run: Run) -> str:
    """Which images were held out, and how many."""
    entry = nested(run.evaluation, "reconstruction")
    count, splits = entry.get("n") or run.metrics.get("num_images"), entry.get("split") or run.metrics.get("splits")
    return f"{number(count)} held-out images" + (f" ({plain(joined(splits))})" if splits else "")


def _reconstruction(run: Run) -> list[tuple[str, str]]:
    """How well the autoencoder reconstructs held-out images: the values that were measured, each with its name."""
    figures = [(metric.name_on_hub, metric, value) for metric, value in reconstruction_values(run)]
    if run.stage == "autoencoder":
        figures += [
            (metric.stage1_title or metric.title_with_unit, metric, run.metrics[metric.stage1_key])
            for metric in RECONSTRUCTION_METRICS
            if not metric.hub_type and is_finite(run.metrics.get(metric.stage1_key))
        ]
    return [
        (name, percent(value) if metric.is_share else number(value, metric.decimals))
        for name, metric, value in figures
    ]


def reconstruction_values(run: Run) -> list[tuple[ReconstructionMetric, float]]:
    """The metrics that the Hub has names for, from the evaluation or from stage 1's own validation."""
    entry, rows = nested(run.evaluation, "reconstruction"), [one for one in RECONSTRUCTION_METRICS if one.hub_type]
    if run.stage == "autoencoder" and not entry:
        values = [(metric, run.metrics.get(metric.stage1_key)) for metric in rows]
    else:
        values = [(metric, entry.get(metric.key)) for metric in rows]
    return [(metric, value) for metric, value in values if is_finite(value)]


def limitations(run: Run) -> str:
    """What the model can't do, and whether it repeats training images."""
    size = run.args.get("resolution")
    text = f"The model knows images of {size} × {size} pixels" if size else "The model knows images of one size"
    if run.stage == "autoencoder":
        text += " and of the kind that it was trained on. Others, above all faces and text, come out blurred or wrong."
    else:
        text += " and the classes that it was trained on. It can draw no text and no other subject."
        copied = nested(run.evaluation, MEMORIZATION, SAMPLES.key)
        rate = copied.get(FEATURE_RATE.key)
        text += (
            f" Of {number(copied.get('n'))} samples, {percent(rate)} were memorized training images "
            "by the measure above." if is_finite(rate)
            else " Whether it repeats training images has not been measured."
        )  # fmt: skip
        text += " Its pictures are no evidence of what a plant looks like." if _of_flowers(run) else ""
    return f"## Limits\n\n{text}"


def _of_flowers(run: Run) -> bool:
    return public_run(run).args["dataset"] == "flowers102"


def license(run: Run) -> str:
    """The licenses of code and weights, and where the images are from."""
    dataset = public_run(run).args["dataset"]
    if dataset == "flowers102":
        data = (
            "The photographs of [Oxford 102 Flowers](https://www.robots.ox.ac.uk/~vgg/data/flowers/102/) (Nilsback & "
            "Zisserman 2008) were collected from the web by the data set's authors. The rights in them are unclear, "
            "so it is unclear how weights trained on them may be used. This repository contains no photographs."
        )
    elif dataset == "synthetic":
        data = "The model was trained on flowers that the package draws itself, so the weights are Apache-2.0 too."
    else:
        images = f"[{dataset}](https://huggingface.co/datasets/{dataset})" if hub_id(dataset) else "a folder of images"
        data = (
            f"The weights were trained on {images}. How they may be used depends on the rights in those images, which "
            "this card doesn't know. If you publish the weights, please state the rights here."
        )
    return f"## License and data\n\nThe code is Apache-2.0. {data}"


# --- training it again -----------------------------------------------------------------------------------------------


def autoencoder_run(run: Run) -> Run | None:
    """The stage 1 run that trained this pipeline's autoencoder, or `None` if it is gone or has changed."""
    folder = run.args.get("autoencoder")
    if run.stage != "latent_diffusion" or not folder or not os.path.isfile(ARGS_FILE.path(folder)):
        return None
    try:
        stage1 = read_run(Path(folder))
    except InputError:
        return None
    mean = run.configs["autoencoder"].get("latents_mean")
    return stage1 if mean and stage1.configs.get("autoencoder", {}).get("latents_mean") == mean else None


def reproduction(run: Run, repo_id: str) -> str:
    """The exact commands of this run, with the reader's own paths."""
    if not run.args:
        return ""
    commands, notes = [], []
    stages = [(run, "train_autoencoder.py", MODEL_CONFIG)]
    if run.stage == "latent_diffusion":
        stages = [(run, "train_latent_diffusion.py", f"unet/{MODEL_CONFIG}")]
        if stage1 := autoencoder_run(run):
            stages.insert(0, (stage1, "train_autoencoder.py", f"vae/{MODEL_CONFIG}"))
        elif hub_id(run.args.get("autoencoder")):
            notes.append("The autoencoder is downloaded from the Hub.")
        else:
            notes.append("`results/autoencoder` stands for the folder of its autoencoder, which is in `vae/` here.")
    for stage_run, script, config in stages:
        commands.append(public_command(stage_run, script, config))
    if any(DOWNLOADED in command for command in commands):
        commands.insert(0, f"hf download {repo_id} --local-dir {DOWNLOADED}")
    stage_args = [stage_run.args for stage_run, _, _ in stages]
    if any(args.get("data_dir") for args in stage_args):
        notes.append("`data` is the folder with the images.")
    if any(args.get("vgg_weights") and args.get("perceptual_weight") for args in stage_args):
        notes.append(
            "VGG16 came from a local file. Add `--vgg_weights PATH`, or torchvision's weights are downloaded."
        )
    if run.stage == "latent_diffusion" and (sampling := nested(run.evaluation, "sampling")):
        commands.append(_evaluation_command(run, sampling))
    return "\n\n".join(["## Train it again", "In a clone of flower_ldm:",
                        _code(*commands, language="sh"), " ".join(notes)]).strip()  # fmt: skip


def public_command(run: Run, script: str, config: str) -> str:
    """The command line that repeats this training. Each path in it is replaced by the reader's own."""
    public = public_run(run).args
    flags = {"dataset": public["dataset"]} | public
    if run.args.get("data_dir"):
        flags["data_dir"] = "data"
    if run.args.get("model_config"):
        flags["model_config"] = f"{DOWNLOADED}/{config}"
    if autoencoder := hub_id(run.args.get("autoencoder")):
        flags["autoencoder"] = autoencoder
    return training_command(flags, script)


def _evaluation_command(run: Run, sampling: dict) -> str:
    """The evaluation's command, from the settings that it recorded: its own command line contains paths."""
    flags = {name: sampling.get(name) for name in ("num_samples", "seed", "num_inference_steps", "guidance_scale")}
    flags["features"] = nested(run.evaluation, "features").get("name")
    used = {facts.scheduler_class.__name__: name for name, facts in SCHEDULERS.items()}.get(sampling.get("scheduler"))
    if sampling.get("scheduler") != run.configs["scheduler"].get("_class_name"):
        flags["scheduler"] = used
    settings = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value is not None)
    interval = sampling.get("guidance_interval")
    if isinstance(interval, list) and all(map(is_finite, interval)) and interval != [0, 1]:
        settings += f" --guidance_interval {' '.join(map(str, interval))}"
    return f"python -m flower_ldm.evaluation --pipeline results/flower-ldm \\\n    {settings}"


# --- metadata --------------------------------------------------------------------------------------------------------


def metadata(run: Run, name: str) -> ModelCardData:
    """The metadata that the Hub indexes, with metrics as model-index.

    Source: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    """
    results, dataset = eval_results(run), public_run(run).args["dataset"]
    kind = ["autoencoder", "vae"] if run.stage == "autoencoder" else ["latent-diffusion", "class-conditional"]
    return ModelCardData(
        library_name="diffusers",
        # Weights can have the code's license only if the training images are synthetic.
        license="apache-2.0" if dataset == "synthetic" else "unknown",
        pipeline_tag=TASKS[run.stage][0] if run.stage == "latent_diffusion" else None,
        tags=["diffusers", "flower_ldm", *kind, "image-generation"],
        datasets=[dataset] if hub_id(dataset) else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def eval_results(run: Run) -> list[EvalResult]:
    """Each measured value, with the settings that others need for a comparison."""
    dataset, evaluation = public_run(run).args["dataset"], run.evaluation
    splits = nested(evaluation, "splits").get("held_out") or run.metrics.get("splits")
    splits = list(map(str, splits)) if isinstance(splits, list) else None
    task_type, task_name = TASKS[run.stage]
    size = run.args.get("resolution")
    shared = {
        "task_type": task_type, "task_name": task_name, "dataset_type": dataset,
        "dataset_name": DATASET_TITLES.get(dataset, dataset), "dataset_split": "+".join(splits) if splits else None,
        "dataset_args": {"resolution": size} if size else None,
    }  # fmt: skip
    network = nested(evaluation, "features")
    features = {"features": network.get("name"), "num_features": network.get("num_features")}
    drawn = ("scheduler", "num_inference_steps", "guidance_scale", "guidance_interval", "seed")
    sampling = {name: nested(evaluation, "sampling").get(name) for name in drawn}
    samples = nested(evaluation, AGAINST_HELD_OUT, SAMPLES.key)
    args = {"n": samples.get("n"), "n_reference": samples.get("n_reference")} | features | sampling
    rows = [
        (metric, samples[metric.key], args | ({"std": samples.get(metric.spread_key)} if metric.has_spread else {}))
        for metric in METRICS
        if metric.hub_type and is_finite(samples.get(metric.key))
    ]
    copied, chance = (nested(evaluation, MEMORIZATION, one.key) for one in (SAMPLES, HELD_OUT))
    for metric in MEMORIZATION_METRICS:
        if metric.hub_type and is_finite(copied.get(metric.key)):
            args = {"n": copied.get("n"), "held_out": chance.get(metric.key)}
            rows.append((metric, copied[metric.key], args | (features if metric.by_features else {})))
    n = nested(evaluation, "reconstruction").get("n") or run.metrics.get("num_images")
    rows += [(metric, value, {"n": n}) for metric, value in reconstruction_values(run)]
    return [
        EvalResult(metric_type=metric.hub_type, metric_name=metric.name_on_hub, metric_value=value,
                   metric_args={key: one for key, one in args.items() if one is not None}, **shared)
        for metric, value, args in rows
    ]  # fmt: skip
