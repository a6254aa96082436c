"""What several test files need: a tiny folder of labelled images, a tiny training run, a VGG16 with random weights."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """`DIR/<class>/*.jpg`: daisy, rose and tulip with 10 images each, 40 x 30 pixels or 30 x 40, of one colour."""
    rng = np.random.default_rng(0)
    for class_name in ("tulip", "daisy", "rose"):  # not in order: the loader sorts
        folder = tmp_path / "flowers" / class_name
        folder.mkdir(parents=True)
        for i in range(10):
            colour = tuple(rng.integers(0, 256, size=3).tolist())
            Image.new("RGB", (40, 30) if i % 2 else (30, 40), colour).save(folder / f"{i}.jpg", quality=95)
    return tmp_path / "flowers"


@pytest.fixture(autouse=True)
def fresh_process_state():
    """Each test finds accelerate and the signal handlers as a new process would."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


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


@pytest.fixture
def stage_flags(tmp_path: Path, random_vgg: Path) -> tuple[list[str], list[str]]:
    """Flags of both scripts for a run of seconds: 4 synthetic classes at 32 px, tiny models, every loss in use."""
    vae = {
        "block_out_channels": [16, 16, 16],
        "decoder_layers_per_block": 1,
        "latent_channels": 4,
        "head_channels": 16,
    }
    (tmp_path / "vae.json").write_text(json.dumps(vae))
    unet = {"hidden_size": 32, "num_layers": 3, "num_attention_heads": 2}
    (tmp_path / "unet.json").write_text(json.dumps(unet))
    common = "--dataset synthetic --classes 0 1 2 3 --images_per_class 12 --resolution 32 --train_batch_size 8"
    common += " --max_train_steps 6 --lr_warmup_steps 2 --logging_steps 2 --validation_steps 4 --checkpointing_steps 4"
    common += " --dataloader_num_workers 0 --report_to none"
    stage1 = f"{common} --model_config {tmp_path}/vae.json --vgg_weights {random_vgg} --disc_start 2"
    stage1 += f" --loss_ramp_steps 2 --adaptive_weight_steps 2 --output_dir {tmp_path}/autoencoder"
    stage2 = f"{common} --model_config {tmp_path}/unet.json --autoencoder {tmp_path}/autoencoder"
    stage2 += f" --output_dir {tmp_path}/flower-ldm"
    return stage1.split(), stage2.split()
