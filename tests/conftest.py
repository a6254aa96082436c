"""What several test files need: a tiny folder of labeled images, a tiny training run, a VGG16 with random weights."""

import argparse
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from chromium import CHROMIUM, Browser
from loopback_hub import TOKEN, LoopbackHub
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, each with a core of its own; torch reads it later
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_terminal_summary(terminalreporter):
    """What the harnesses counted, by `record_property("counts", ...)`, from whichever process ran them."""
    reports = [report for name in ("passed", "failed") for report in terminalreporter.getreports(name)]
    for report in reports:
        for name, counts in report.user_properties if report.when == "call" else ():
            if name == "counts":
                terminalreporter.write_line(counts)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """`DIR/<class>/*.jpg`: daisy, rose and tulip with 10 images each, 40 x 30 pixels or 30 x 40, of one color."""
    rng = np.random.default_rng(0)
    for class_name in ("tulip", "daisy", "rose"):  # not in order: the loader sorts
        folder = tmp_path / "flowers" / class_name
        folder.mkdir(parents=True)
        for i in range(10):
            color = tuple(rng.integers(0, 256, size=3).tolist())
            Image.new("RGB", (40, 30) if i % 2 else (30, 40), color).save(folder / f"{i}.jpg", quality=95)
    return tmp_path / "flowers"


class Payload:
    """What runs something where it is unpickled: it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(autouse=True)
def fresh_process_state() -> Iterator[None]:
    """Each test finds accelerate and the signal handlers as a new process would."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def run_script():
    """Calls a script's `main` with words of any type, such as paths."""

    def run(main, argv: list) -> None:
        main([str(word) for word in argv])

    return run


@pytest.fixture(scope="session")
def random_vgg(tmp_path_factory) -> Path:
    """VGG16 up to relu3_3 with random weights: the real network where the real weights can't be downloaded."""
    import torch
    from safetensors.torch import save_file
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    layers = make_layers(cfgs["D"][:9])
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file({f"features.{name}": value for name, value in layers.state_dict().items()}, path)
    return path


def parse(*words: str) -> argparse.Namespace:
    """As stage 1's script does, but for what concerns several flags."""
    from flower_ldm import recipes

    return recipes.parse_arguments("autoencoder", list(words))


@pytest.fixture
def counted() -> type[str]:
    """Texts that count how often they are compared, whatever they are compared with, in `compared` of their class."""

    class Counted(str):
        compared = 0

        def __eq__(self, other):
            Counted.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    return Counted


def tiny_stages(folder: Path, vgg_weights: Path) -> tuple[list[str], list[str]]:
    """Flags of both scripts for a run of seconds in `folder`: 4 synthetic classes, tiny models, every loss in use."""
    vae = {
        "block_out_channels": [16, 16, 16],
        "decoder_layers_per_block": 1,
        "latent_channels": 4,
        "head_channels": 16,
    }
    (folder / "vae.json").write_text(json.dumps(vae))
    unet = {"hidden_size": 32, "num_layers": 3, "num_attention_heads": 2}
    (folder / "unet.json").write_text(json.dumps(unet))
    common = "--dataset synthetic --classes 0 1 2 3 --images_per_class 12 --resolution 32 --train_batch_size 8"
    common += " --max_train_steps 6 --lr_warmup_steps 2 --logging_steps 2 --validation_steps 4 --checkpointing_steps 4"
    common += " --dataloader_num_workers 0 --report_to none --no-final_pictures"
    stage1 = f"{common} --model_config {folder}/vae.json --vgg_weights {vgg_weights} --disc_start 2"
    stage1 += f" --loss_ramp_steps 2 --adaptive_weight_steps 2 --output_dir {folder}/autoencoder"
    stage2 = f"{common} --model_config {folder}/unet.json --autoencoder {folder}/autoencoder"
    stage2 += f" --output_dir {folder}/flower-ldm"
    return stage1.split(), stage2.split()


@pytest.fixture
def stage_flags(tmp_path: Path, random_vgg: Path) -> tuple[list[str], list[str]]:
    """Flags of both scripts for a run of seconds in this test's own folder."""
    return tiny_stages(tmp_path, random_vgg)


class FinishedRuns(NamedTuple):
    """Both stages, run once. Tests read their folders and change nothing there."""

    autoencoder: Path
    flower_ldm: Path
    stage1: list[str]
    stage2: list[str]


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory, random_vgg: Path, run_script) -> FinishedRuns:
    """A tiny run of both stages, every loss in use, with TensorBoard's files and all pictures; the flags of each."""
    import train_autoencoder
    import train_latent_diffusion

    folder = tmp_path_factory.mktemp("finished")
    more = ["--report_to", "tensorboard", "--final_pictures"]
    stage1, stage2 = ([*flags, *more] for flags in tiny_stages(folder, random_vgg))
    stage1 += ["--perceptual_every", "2"]
    run_script(train_autoencoder.main, stage1)
    run_script(train_latent_diffusion.main, stage2)
    return FinishedRuns(folder / "autoencoder", folder / "flower-ldm", stage1, stage2)


@pytest.fixture(scope="session")
def evaluated_run(finished_runs: FinishedRuns, random_vgg: Path, tmp_path_factory) -> Path:
    """A copy of the tiny pipeline on which the whole evaluation has run. Tests change copies of it, or nothing."""
    from flower_ldm import evaluation

    folder = shutil.copytree(finished_runs.flower_ldm, tmp_path_factory.mktemp("evaluated") / "flower-ldm")
    flags = f"--pipeline {folder} --vgg_weights {random_vgg} --device cpu --num_samples 8 --steps 2"
    flags += " --guidance_scale 2.5 --guidance_interval 0.1 0.8"
    flags += " --sweep_guidance 1 3 --sweep_steps 1 2 --sweep_samples 6"
    evaluation.main(flags.split())
    return folder


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures of matplotlib that were saved and closed, still to be looked at."""
    from matplotlib import pyplot as plt

    closed = []
    close = plt.close
    monkeypatch.setattr(plt, "close", closed.append)
    yield closed
    for figure in closed:
        close(figure)


@pytest.fixture
def hub_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """An empty Hub of this test's own; this process's `huggingface_hub` is logged in to it, caches in `tmp_path`."""
    from diffusers.utils import dynamic_modules_utils
    from huggingface_hub import constants, hf_api

    with LoopbackHub() as hub:
        # What the client reads from its environment when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "hf" / "modules"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Browser]:
    """One for all tests of pages."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


# The flags that both scripts promise, each with a value that isn't its default.
COMMON_FLAGS = """
    --dataset imagefolder; --data_dir flowers; --image_column picture; --label_column class; --skip_bad_images
    --train_splits train test; --val_splits val; --classes 3 17 sunflower; --resolution 128; --output_dir out
    --overwrite_output_dir; --train_batch_size 8; --gradient_accumulation_steps 2; --max_train_steps 10
    --num_train_epochs 3; --total_epochs 3; --learning_rate 1e-5; --lr_scheduler constant; --lr_warmup_steps 5
    --mixed_precision bf16; --seed 1; --dataloader_num_workers 0; --checkpointing_steps 5
    --checkpoints_total_limit 2; --resume_from_checkpoint latest; --checkpoint_path latest; --validation_steps 5
    --visualize_every 5; --logging_steps 5; --report_to none; --model_config model.json; --ema_decay 0.5
    --torch_compile; --gradient_checkpointing; --push_to_hub; --hub_model_id me/flowers; --hub_private_repo
"""
OTHER_SPELLINGS = {
    "total_epochs": "num_train_epochs",
    "visualize_every": "validation_steps",
    "checkpoint_path": "resume_from_checkpoint",
}


@pytest.fixture(scope="session")
def misread_flags():
    """Which of the common flags, and of a script's own, its `parse_args` doesn't read as they are meant."""

    def misread(parse_args, own_flags: str) -> list[str]:
        wrong = []
        for words in filter(None, map(str.strip, f"{COMMON_FLAGS};{own_flags}".replace("\n", ";").split(";"))):
            flag, *values = words.split()
            name = flag.removeprefix("--")
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("HF_TOKEN", TOKEN)  # without one --push_to_hub is refused
                read = getattr(parse_args([flag, *values]), OTHER_SPELLINGS.get(name, name))
            meant = True if not values else values if isinstance(read, list) else type(read)(values[0])
            if read != meant:
                wrong.append(words)
        return wrong

    return misread
