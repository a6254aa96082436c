"""The quickstart's promise: flowers whose petals and colors follow their class, judged by a classifier of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flower_ldm import FlowerLDMPipeline
from flower_ldm.runs import read_log
from flower_ldm.synthetic import synthetic_flower

ROOT = Path(__file__).parent.parent
NUM_CLASSES = 10
FRESH = 2_000_000  # beyond the indices that training and validation draw


def fresh_flowers(images_per_class: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Synthetic flowers that no model has seen: images `(B, 3, 32, 32)` in [-1, 1] and labels `(B,)`."""
    labels = torch.arange(NUM_CLASSES).repeat_interleave(images_per_class)
    images = [
        synthetic_flower(label, first + i, resolution=32)
        for label in range(NUM_CLASSES)
        for i in range(images_per_class)
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1, labels


def train_classifier() -> nn.Module:
    """A small convolutional network, trained on fresh flowers alone."""
    torch.manual_seed(0)
    images, labels = fresh_flowers(100, FRESH)
    layers: list[nn.Module] = []
    for channels_in, channels in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(channels_in, channels, 3, stride=2, padding=1), nn.GroupNorm(8, channels), nn.ReLU()]
    classifier = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, NUM_CLASSES))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    for _ in range(20):
        for rows in torch.randperm(len(images)).split(50):
            loss = F.cross_entropy(classifier(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return (classifier(images).argmax(dim=1) == labels).float().mean().item()


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[Path, str]:
    """What `make quickstart` leaves in a copy of the clone, without a network, beside a first one; what it printed."""
    clone = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "requirements.txt", "pyproject.toml", "configs", "flower_ldm", "pipelines",
                 "train_autoencoder.py", "train_latent_diffusion.py"):  # fmt: skip
        (clone / name).symlink_to(ROOT / name)
    (clone / ".venv" / "bin").mkdir(parents=True)
    python = clone / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (clone / ".venv" / ".installed").touch()
    (clone / "results" / "quickstart-1").mkdir(parents=True)
    nowhere = "http://127.0.0.1:9"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "http_proxy": nowhere, "https_proxy": nowhere}
    command = ["make", "quickstart"]
    done = subprocess.run(command, cwd=clone, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert list((clone / "results" / "quickstart-1").iterdir()) == []
    return clone, done.stdout


@pytest.mark.slow
def test_quickstart_says_where_its_pictures_are(quickstart) -> None:
    clone, printed = quickstart
    places = [line.split()[-1] for line in printed.splitlines()[-4:]]
    assert places == [f"results/quickstart-2/{name}" for name in (
        "pictures/grid.png", "flower-ldm/samples", "autoencoder/reconstructions", "flower-ldm"
    )]  # fmt: skip
    assert all((clone / place).exists() for place in places)


@pytest.mark.slow
def test_quickstart_draws_the_class_that_it_is_asked_for(quickstart) -> None:
    run = quickstart[0] / "results" / "quickstart-2"
    assert read_log(run / "autoencoder" / "log.jsonl")[-1]["psnr"] > 20

    classifier = train_classifier()
    assert accuracy(classifier, *fresh_flowers(20, 2 * FRESH)) > 0.95, "the judge itself must know its flowers"

    pipeline = FlowerLDMPipeline.from_pretrained(run / "flower-ldm")
    labels = torch.arange(NUM_CLASSES).repeat_interleave(12)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    drawn = pipeline(labels.tolist(), generator=generators, output_type="pt").images
    drawn = F.interpolate(drawn * 2 - 1, size=32, mode="area")
    assert accuracy(classifier, drawn, labels) >= 0.8
