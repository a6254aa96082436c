"""Use a pipeline in a browser: `python app.py --pipeline results/flower-ldm`, then open the address it prints.

Choose flowers, watch them form out of noise, and blend one into another. The page works with any pipeline that draws
classes, from a folder or the Hub. It needs only torch, diffusers, gradio and their dependencies. Since it doesn't need
the package, this file is also a complete Space on the Hub: `--space DIR` writes one.

Read it from top to bottom: limits, a visitor's request, drawing, the page, the Space, the command.
"""

import argparse
import base64
import html
import inspect
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import NamedTuple

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it on import

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from tqdm import tqdm

try:
    import gradio as gr
except ImportError:
    gr = None
try:
    from flower_ldm import FlowerLDMPipeline  # with the package, pipelines load without trust_remote_code
except ImportError:
    FlowerLDMPipeline = None

# Limits of one request. Other visitors wait in the queue meanwhile.
MAX_FLOWERS = 8
MAX_IMAGES = 24  # flowers times images of each
MAX_IMAGES_EACH = 12
MAX_STEPS = 100
MAX_GUIDANCE = 10.0
MAX_SEED = 2**31 - 1
BLEND_FRAMES = 9
QUEUE = 64  # waiting visitors; others are told that the queue is full
PREVIEWS = 12  # at most, of one drawing
THUMBNAIL_STEPS = 12
MAX_THUMBNAILS = 128  # further classes can only be chosen by name
DEFAULT_PIPELINE = "results/flower-ldm"
FILES_KEPT = (600, 3600)  # seconds: how often old images are deleted, and from which age on
OWN_SAMPLER = "The pipeline's own"


# --- a visitor's request ---------------------------------------------------------------------------------------------


class DrawingRequest(NamedTuple):
    """A visitor's request, checked: labels by index, and the options of the drawing."""

    labels: list[int]
    images_each: int
    seed: int
    steps: int
    guidance: float
    sampler: str


def check_request(
    pipe: DiffusionPipeline, names: object, images_each: object, seed: object, steps: object, guidance: object,
    sampler: object,
) -> DrawingRequest:  # fmt: skip
    """Check a request. Anybody can call the page's endpoints by hand, so values may be anything.

    Raises:
        gr.Error: one line about the first invalid value.
    """
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise refusal("Choose at least one flower.")
    if len(names) > MAX_FLOWERS:
        raise refusal(f"Choose at most {MAX_FLOWERS} flowers, not {len(names)}.")
    try:
        labels = pipe.get_label_ids(names)
    except ValueError as error:  # its message offers the nearest names
        raise refusal(f"{str(error)[0].upper()}{str(error)[1:]}.") from None
    images_each = whole("Images of each flower", images_each, 1, MAX_IMAGES_EACH)
    if len(labels) * images_each > MAX_IMAGES:
        raise refusal(
            f"{len(labels)} flowers with {images_each} images each are {len(labels) * images_each} images: "
            f"at most {MAX_IMAGES} are drawn at a time."
        )
    if not is_number(guidance) or not 1 <= guidance <= MAX_GUIDANCE:
        raise refusal(f"Guidance must be a number from 1 to {MAX_GUIDANCE:g}.")
    known = [OWN_SAMPLER, *known_samplers(pipe)]
    if not isinstance(sampler, str) or sampler not in known:
        raise refusal(f"The sampler must be one of {'; '.join(known)}.")
    return DrawingRequest(
        labels, images_each, whole("The seed", seed, 0, MAX_SEED), whole("Steps", steps, 1, MAX_STEPS),
        float(guidance), sampler,
    )  # fmt: skip


def whole(name: str, value: object, lowest: int, highest: int) -> int:
    if not is_number(value) or value != int(value) or not lowest <= value <= highest:
        raise refusal(f"{name} must be a whole number from {lowest:,} to {highest:,}.")
    return int(value)


def is_number(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def refusal(message: str) -> Exception:
    """An error that the page shows as one line. It is escaped, since gradio shows HTML, and isn't logged."""
    return gr.Error(html.escape(message, quote=False), print_exception=False)


# --- drawing ---------------------------------------------------------------------------------------------------------


def known_samplers(pipe: DiffusionPipeline) -> dict[str, type[SchedulerMixin]]:
    """Schedulers by the titles that visitors see, from the table in the pipeline's file, which a Space has too.

    A pipeline saved by an earlier version has no table. It draws with its own scheduler only.
    """
    table = getattr(sys.modules.get(type(pipe).__module__), "SCHEDULERS", {})
    return {facts.title: facts.scheduler_class for facts in table.values()}


def own_guidance(pipe: DiffusionPipeline) -> float:
    """The model's own guidance scale, within the page's limits.

    A pipeline saved by an earlier version has none. Then it is the default of the pipeline's call.
    """
    scale = getattr(pipe, "default_guidance_scale", None)
    if scale is None:
        scale = inspect.signature(pipe.__call__).parameters["guidance_scale"].default
    return min(max(scale, 1.0), MAX_GUIDANCE)


class Preview(NamedTuple):
    """The progress of a drawing, and the images predicted so far. The last preview holds the finished images."""

    done: int
    steps: int
    images: list[Image.Image]


class Studio:
    """A pipeline that draws one request at a time and shows previews."""

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        self.known_samplers = known_samplers(pipe)
        # All drawings take turns in one thread, also those of visitors who have left. torch creates its workers once.
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="studio")

    @property
    def can_blend(self) -> bool:
        return self.pipe.num_classes > 1 and getattr(self.pipe.unet, "takes_class_mixtures", False)

    @property
    def can_guide(self) -> bool:
        return getattr(self.pipe, "can_guide", True)  # pipelines of earlier versions lack it

    @property
    def samplers(self) -> list[str]:
        """The titles of the samplers that work with this model. The pipeline's own comes first."""
        known, own_class = self.known_samplers, type(self.pipe.scheduler)
        own = [name for name, scheduler_class in known.items() if scheduler_class is own_class] or [OWN_SAMPLER]
        return own + [name for name in known if name not in own and self._can_follow(name)]

    def _can_follow(self, sampler: str) -> bool:
        try:
            self._pipeline(sampler).check_inputs(num_labels=1)
        except ValueError:
            return False
        return True

    def draw(self, request: DrawingRequest) -> Iterator[Preview]:
        """Draw images of each label in turn. Image i, counted over all labels, has the seed `request.seed + i`."""
        labels = [label for label in request.labels for _ in range(request.images_each)]
        return self._watch(labels, [request.seed + number for number in range(len(labels))], request)

    def blend(self, request: DrawingRequest) -> Iterator[Preview]:
        """Draw `BLEND_FRAMES` mixtures from the first label to the second, all from the same noise."""
        mixtures = torch.zeros(BLEND_FRAMES, self.pipe.num_classes)
        share = torch.linspace(0, 1, BLEND_FRAMES)
        mixtures[:, request.labels[0]] += 1 - share
        mixtures[:, request.labels[1]] += share
        return self._watch(mixtures, [request.seed] * BLEND_FRAMES, request)

    def thumbnails(self) -> list[tuple[Image.Image, str]]:
        """One image of each class, drawn now in few steps, and its name."""
        names = self.pipe.class_names[:MAX_THUMBNAILS]
        pictures = []
        for start in tqdm(range(0, len(names), MAX_IMAGES), desc="thumbnails", disable=None):
            labels = list(range(start, min(start + MAX_IMAGES, len(names))))
            request = DrawingRequest(labels, 1, 0, THUMBNAIL_STEPS, own_guidance(self.pipe), OWN_SAMPLER)
            *_, last = self.draw(request)
            pictures += last.images
        return list(zip(pictures, names, strict=True))

    def _watch(self, labels: list[int] | torch.Tensor, seeds: list[int], request: DrawingRequest) -> Iterator[Preview]:
        """Draw in the studio's thread, and yield previews from its step callback.

        Raises:
            gr.Error: the pipeline or its sampler can't draw this request.
        """
        seen: SimpleQueue[Preview | Exception] = SimpleQueue()
        left = Event()

        def on_step(pipe: DiffusionPipeline, index: int, timestep: torch.Tensor, tensors: dict) -> dict:
            total = len(pipe.scheduler.timesteps)
            pipe._interrupt = left.is_set()
            if (index + 1) % -(-total // PREVIEWS) == 0 and index + 1 < total and not left.is_set():
                seen.put(Preview(index + 1, total, pipe.decode_latents(tensors["denoised_latents"])))
            return {}

        def work() -> None:
            try:
                if not left.is_set():
                    seen.put(self._finish(labels, seeds, request, on_step))
            except Exception as error:
                seen.put(error)

        self.executor.submit(work)
        try:
            while True:
                preview = seen.get()
                if isinstance(preview, Exception):
                    raise preview
                yield preview
                if preview.done == preview.steps:
                    return
        finally:
            left.set()  # when a visitor closes the page, the drawing stops at its next step

    def _finish(self, labels: list[int] | torch.Tensor, seeds: list[int], request: DrawingRequest, on_step) -> Preview:
        """Draw, and return the last preview.

        Raises:
            gr.Error: the sampler doesn't work with this model, or not in so few steps.
        """
        try:
            pipe = self._pipeline(request.sampler)
            images = pipe(
                labels, guidance_scale=request.guidance, num_inference_steps=request.steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                callback_on_step_end=on_step, callback_on_step_end_tensor_inputs=("denoised_latents",),
            ).images  # fmt: skip
        except ValueError as error:
            raise refusal(f"{request.sampler} draws nothing in {request.steps} steps: {one_line(error)}.") from None
        steps = len(pipe.scheduler.timesteps)
        return Preview(steps, steps, images)

    def _pipeline(self, sampler: str) -> DiffusionPipeline:
        """A pipeline of the same models with its own scheduler, since a scheduler has state."""
        own = self.pipe.scheduler
        chosen = self.known_samplers.get(sampler, type(own))
        scheduler = type(own).from_config(own.config) if chosen is type(own) else self.pipe.make_scheduler(chosen)
        components = self.pipe.components | {"scheduler": scheduler}
        known = inspect.signature(type(self.pipe)).parameters
        settings = {
            name: value for name, value in self.pipe.config.items() if name in known and name not in components
        }
        pipe = type(self.pipe)(**components, **settings)
        pipe.set_progress_bar_config(disable=True)
        return pipe


# --- the page --------------------------------------------------------------------------------------------------------

CSS = """
.gradio-container { width: 100%; max-width: 1240px !important; margin: 0 auto; }
.gradio-container main { min-width: 0; max-width: 100%; }
#title h1 { margin: 0.2rem 0 0; font-size: 1.9rem; letter-spacing: -0.02em; overflow-wrap: anywhere; }
#title p { margin: 0.2rem 0 0; opacity: 0.8; }
#flowers .grid-wrap { min-height: 0; max-height: 340px; }
#flowers .grid-container { grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)) !important; gap: 6px; }
#flowers .caption-label, #pictures .caption-label { inset: auto 4px 4px; max-width: none; padding: 2px 4px;
    font-size: 0.68rem; line-height: 1.15; text-align: center; white-space: normal; overflow-wrap: anywhere; }
#pictures:has(.empty) { display: none; }
#pictures .grid-wrap { min-height: 0; max-height: none; }
#pictures .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(128px, 40%), 1fr)) !important; }
#another { align-self: end; }
#easel .sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--cell), 1fr)); gap: 8px; }
#easel figure { margin: 0; }
#easel figure img { width: 100%; border-radius: 10px; display: block; }
#easel figcaption { font-size: 0.75rem; opacity: 0.75; text-align: center; overflow-wrap: anywhere; }
#easel .way { display: flex; align-items: center; gap: 12px; margin: 0 0 10px; font-variant-numeric: tabular-nums; }
#easel .bar { flex: 1; height: 8px; border-radius: 4px; overflow: hidden; background: var(--border-color-primary); }
#easel .bar i { display: block; height: 100%; background: var(--color-accent); }
#easel .rest { padding: 64px 16px; text-align: center; opacity: 0.7; border: 1px dashed currentColor;
               border-radius: 14px; }
#easel .loop { display: block; margin: 0 auto 8px; width: min(256px, 70%); border-radius: 14px; }
#easel .note { text-align: center; margin: 0 0 8px; }
"""
AT_REST = '<p class="rest">Choose flowers, then press Draw.</p>'


def data_uri(image: Image.Image, kind: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def sheet(preview: Preview, captions: list[str]) -> str:
    """HTML of a preview: a progress bar above the images."""
    cell = 150 if len(captions) <= 12 else 100
    figures = "".join(
        f'<figure><img src="{data_uri(image, "JPEG", quality=88)}" alt="{html.escape(caption)}, not finished">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for image, caption in zip(preview.images, captions, strict=True)
    )
    bar = f'<span class="bar"><i style="width: {100 * preview.done / preview.steps:.0f}%"></i></span>'
    return (f'<p class="way">{bar}<span role="status">step {preview.done} of {preview.steps}</span></p>'
            f'<div class="sheet" style="--cell: {cell}px">{figures}</div>')  # fmt: skip


def loop(images: list[Image.Image], caption: str) -> str:
    """HTML of an animation that runs through the images and back, with a link to download it."""
    frames = [image.resize((256, 256), Image.Resampling.BICUBIC) for image in (*images, *images[-2:0:-1])]
    uri = data_uri(frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=120, loop=0, quality=85)
    return (f'<img class="loop" src="{uri}" alt="{html.escape(caption)}">'
            f'<p class="note"><a href="{uri}" download="blend.webp">Download the animation</a></p>')  # fmt: skip


class Controls(NamedTuple):
    """The inputs of the page. The values of the last four are options of a drawing."""

    flowers: "gr.Dropdown"
    thumbnails: "gr.Gallery"
    another_seed: "gr.Button"
    images_each: "gr.Slider"
    seed: "gr.Number"
    steps: "gr.Slider"
    guidance: "gr.Slider"
    sampler: "gr.Dropdown"


def build_controls(studio: Studio) -> Controls:
    """The left column of the page."""
    names = studio.pipe.class_names
    flowers = gr.Dropdown(names, value=names[:1], multiselect=True, allow_custom_value=True,
                          max_choices=MAX_FLOWERS, label=f"Flowers, up to {MAX_FLOWERS}")  # fmt: skip
    thumbnails = gr.Gallery(
        studio.thumbnails(), show_label=False, columns=5, height="auto", allow_preview=False,
        interactive=False, object_fit="cover", buttons=[], elem_id="flowers", format="webp",
    )  # fmt: skip
    images_each = gr.Slider(1, MAX_IMAGES_EACH, 4, step=1, label="Images of each flower")
    with gr.Row():
        seed = gr.Number(0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed", min_width=120)
        another_seed = gr.Button("Another seed", min_width=120, elem_id="another")
    with gr.Accordion("How it is drawn", open=False):
        steps = gr.Slider(1, MAX_STEPS, 25, step=1, label="Steps", info="more steps are finer but slower")
        guidance = gr.Slider(
            1, MAX_GUIDANCE, own_guidance(studio.pipe), step=0.1, label="Guidance", visible=studio.can_guide,
            info="1 is off and most varied; higher values are truer to the class",
        )  # fmt: skip
        sampler = gr.Dropdown(studio.samplers, label="Sampler", filterable=False)
    return Controls(flowers, thumbnails, another_seed, images_each, seed, steps, guidance, sampler)


def build_page(studio: Studio, name: str) -> "gr.Blocks":
    """The page and its two endpoints, /draw and /blend.

    Args:
        name: what the page calls the pipeline.
    """
    names = studio.pipe.class_names

    def draw(flowers, images_each, seed, steps, guidance, sampler):
        request = check_request(studio.pipe, flowers, images_each, seed, steps, guidance, sampler)
        captions = [names[label] for label in request.labels for _ in range(request.images_each)]
        for preview in studio.draw(request):
            yield sheet(preview, captions), []
        note = f'<p class="note">{len(captions)} images, seed {request.seed}. Click one to enlarge or download it.</p>'
        yield note, list(zip(preview.images, captions, strict=True))

    def blend(flowers, seed, steps, guidance, sampler):
        if not isinstance(flowers, list) or len(flowers) != 2:
            raise refusal("Choose exactly two flowers to blend.")
        request = check_request(studio.pipe, flowers, 1, seed, steps, guidance, sampler)
        first, second = (names[label] for label in request.labels)
        captions = [f"{percent:.0f} % {second}" for percent in torch.linspace(0, 100, BLEND_FRAMES).tolist()]
        for preview in studio.blend(request):
            yield sheet(preview, captions), []
        animation = loop(preview.images, f"from {first} to {second} and back")
        yield animation, list(zip(preview.images, captions, strict=True))

    def pick(flowers, event: gr.SelectData):
        """Add a thumbnail's flower to the chosen ones, or remove it."""
        chosen = [flower for flower in flowers or [] if flower in names]
        if not isinstance(event.index, int) or not 0 <= event.index < len(names):
            return chosen
        flower = names[event.index]
        return [one for one in chosen if one != flower] if flower in chosen else [*chosen, flower]

    with gr.Blocks(title=f"{name} – flower_ldm", analytics_enabled=False, delete_cache=FILES_KEPT) as page:
        gr.HTML(
            f"<h1>{html.escape(name)}</h1><p>A latent diffusion model of {len(names)} classes. It draws every picture "
            "here, thumbnails included. None is a photograph.</p>", elem_id="title", js_on_load=None,
        )  # fmt: skip
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                controls = build_controls(studio)
            with gr.Column(scale=3, min_width=300):
                with gr.Row():
                    draw_button = gr.Button("Draw", variant="primary")
                    blend_button = gr.Button("Blend two flowers", visible=studio.can_blend)
                    stop = gr.Button("Stop", min_width=80, scale=0)
                easel = gr.HTML(AT_REST, elem_id="easel", js_on_load=None, label="The drawing")
                pictures = gr.Gallery(show_label=False, interactive=False, columns=4, height="auto", format="png",
                                      object_fit="contain", buttons=["download", "download_all", "fullscreen"],
                                      elem_id="pictures")  # fmt: skip
        flowers, thumbnails, another_seed, images_each, *options = controls
        # One request is drawn at a time. gradio passes inputs on unchecked, and `check_request` checks them.
        shared = {"outputs": [easel, pictures], "preprocess": False, "concurrency_limit": 1, "concurrency_id": "model",
                  "show_progress": "minimal", "show_progress_on": easel}  # fmt: skip
        drawing = draw_button.click(draw, [flowers, images_each, *options], api_name="draw", **shared)
        blending = blend_button.click(blend, [flowers, *options], api_name="blend", **shared)
        stop.click(lambda: None, cancels=[drawing, blending], api_visibility="private")
        another_seed.click(None, None, controls.seed, js=f"() => Math.floor(Math.random() * {MAX_SEED})")
        thumbnails.select(pick, flowers, flowers, api_visibility="private", queue=False, show_progress="hidden",
                          preprocess=False)  # fmt: skip
    return page.queue(max_size=QUEUE, default_concurrency_limit=None)


def launch(page: "gr.Blocks", host: str, port: int, block: bool = True) -> str:
    """Serve the page, and return its address. With `block`, serve until interrupted.

    Raises:
        OSError: the port is taken.
    """
    theme = gr.themes.Soft(
        primary_hue="rose", secondary_hue="pink", neutral_hue="stone",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],  # no font is downloaded
    ).set(
        block_title_background_fill="none", block_title_background_fill_dark="none", block_title_padding="0",
        block_title_text_color="*neutral_600", block_title_text_color_dark="*neutral_300",
    )  # fmt: skip
    _, address, _ = page.launch(
        server_name=host, server_port=port, prevent_thread_lock=not block, share=False, quiet=True, theme=theme,
        css=CSS, footer_links=[], ssr_mode=False, mcp_server=False, run_history=False, enable_monitoring=False,
        max_file_size=1,  # the page takes no files
    )  # fmt: skip
    return address


# --- the Space -------------------------------------------------------------------------------------------------------

SPACE_CARD = """---
title: {title}
emoji: 🌸
colorFrom: pink
colorTo: green
sdk: gradio
sdk_version: {gradio}
app_file: app.py
license: apache-2.0
models:
- {pipeline}
short_description: Draw pictures by class, and watch them form
---

A demo of [{pipeline}](https://huggingface.co/{pipeline}), written by `python app.py --space`.
The model draws every picture; none is a photograph. The code is Apache-2.0. The model's card says how the weights may
be used.
"""
SPACE_APP = '''"""The Space's entry; the page itself is in demo.py.

It runs the code of one commit of the model's repository. Before you name a later commit, read its code.
"""

from demo import main

revision = "{revision}"
main(["--pipeline", "{pipeline}", "--revision", revision, "--trust_remote_code", "--host", "0.0.0.0"])
'''
SPACE_REQUIREMENTS = "torch>=2.6\ndiffusers>=0.41\naccelerate>=1.10\n"


def write_space(folder: Path, pipeline: str, revision: str) -> None:
    """Write a folder to push as a Space: this file, an entry that names the pipeline, a card and the requirements.

    Args:
        pipeline: a Hub id, since a Space can't read this machine's folders.
        revision: the commit whose code and weights the Space may run.
    """
    folder.mkdir(parents=True)
    shutil.copyfile(__file__, folder / "demo.py")
    (folder / "app.py").write_text(SPACE_APP.format(pipeline=pipeline, revision=revision))
    (folder / "requirements.txt").write_text(SPACE_REQUIREMENTS)
    card = SPACE_CARD.format(pipeline=pipeline, title=json.dumps(pipeline.split("/")[1]), gradio=gr.__version__)
    (folder / "README.md").write_text(card, encoding="utf-8")


# --- the command -----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Use a pipeline in a browser.", allow_abbrev=False)
    parser.error = fail
    flag = parser.add_argument
    flag("--pipeline", type=os.path.expanduser, default=DEFAULT_PIPELINE,
         help="folder of a pipeline, or its id on the Hub")  # fmt: skip
    flag("--revision", help="commit or branch of the repository; with --trust_remote_code, a commit you have read")
    flag("--trust_remote_code", action="store_true", help="run the code in the repository")
    flag("--host", default="127.0.0.1", help="0.0.0.0: everybody in the network can use the page")
    flag("--port", type=int, default=7860)
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--space", type=home_path, metavar="DIR",
         help="only write a Space for --pipeline at --revision into a new folder")  # fmt: skip
    return parser.parse_args(argv)


def home_path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # a shell leaves the ~ of --space=~/x as it is


def fail(message: str) -> None:
    """Print one line and exit with code 2, as for all bad input. Control characters are escaped."""
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(2)


def one_line(error: Exception) -> str:
    """An error's message on one line, without torch's advice to run the code in a file.

    It stands in for `flower_ldm.errors.one_line`, since a Space doesn't have the package.
    """
    sentences = re.split(r"(?<=[.!?])\s+|\n+", str(error))
    advice = re.compile(r"weights_only|safe_globals|arbitrary code|\btrust(ed)? (the |this )?(source|class)", re.I)
    return " ".join(" ".join(one for one in sentences if not advice.search(one)).split())


def load_pipeline(name: str, device: str, trust_remote_code: bool, revision: str | None = None) -> DiffusionPipeline:
    """Load a pipeline that draws classes from a folder or the Hub, or exit with one line."""
    if os.path.exists(name) and not (Path(name) / "model_index.json").is_file():
        fail(f"--pipeline {name} is not the folder of a pipeline: it has no model_index.json")
    loader = DiffusionPipeline if FlowerLDMPipeline is None else FlowerLDMPipeline
    options = {"trust_remote_code": True} if trust_remote_code else {}
    options |= {"revision": revision} if revision else {}
    try:
        pipe = loader.from_pretrained(name, **options)
        pipe.class_names, pipe.make_scheduler  # noqa: B018  (the page needs both)
        pipe.check_inputs(num_labels=1)
    except Exception as error:  # errors of files, network and Hub have no common base class
        name = f"{name} --revision {revision}" if revision else name
        fail(f"--pipeline {name} is not a folder or Hub id of a pipeline that draws classes: {one_line(error)}")
    try:
        return pipe.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        fail(f"--device {device} can't be used: {str(error).splitlines()[0]}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not 0 < args.port < 65536:
        fail(f"--port must be from 1 to 65535, got {args.port}")
    if gr is None:
        fail("the page needs gradio: pip install 'gradio>=6.0' (or, in a clone, pip install -e '.[app]')")
    if args.space:
        is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", args.pipeline, re.ASCII)
        if not is_id or args.pipeline == DEFAULT_PIPELINE or os.path.exists(args.pipeline):
            fail(f"--space needs --pipeline by its id on the Hub, such as user/flower-ldm, not {args.pipeline}")
        if not re.fullmatch("[0-9a-f]{40}", args.revision or ""):
            fail(
                "--space needs --revision, the commit whose code the Space may run: 40 hexadecimal digits, as "
                f"https://huggingface.co/{args.pipeline}/commits/main lists them"
            )
        if os.path.exists(args.space):
            fail(f"--space {args.space} exists already: name a new folder")
        try:
            write_space(args.space, args.pipeline, args.revision)
        except OSError as error:
            fail(f"--space {args.space} can't be written: {error.strerror}; remove that folder and try again")
        print(f"the Space is in {args.space}; to push it: hf upload USER/NAME {args.space} --repo-type space")
        return
    pipe = load_pipeline(args.pipeline, args.device, args.trust_remote_code, args.revision)
    page = build_page(Studio(pipe), Path(args.pipeline).resolve().name)
    try:
        address = launch(page, args.host, args.port, block=False)
    except OSError:
        fail(f"--port {args.port} is taken or can't be opened: name another")
    print(f"{args.pipeline} is at {address}; Ctrl-C stops it", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
