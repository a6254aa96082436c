"""The quickstart's promise: flowers whose petals and colours follow their class, judged by a classifier of its own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flower_ldm import FlowerLDMPipeline
from flower_ldm.synthetic import synthetic_flower
from flower_ldm.training import read_log

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


@pytest.mark.slow
def test_quickstart_draws_the_class_that_it_is_asked_for(tmp_path: Path) -> None:
    recipe = str(ROOT / "configs" / "quickstart.yaml")
    folders = ["--output_dir", str(tmp_path / "autoencoder")]
    subprocess.run([sys.executable, str(ROOT / "train_autoencoder.py"), "--config", recipe, *folders], check=True)
    folders = ["--autoencoder", str(tmp_path / "autoencoder"), "--output_dir", str(tmp_path / "flower-ldm")]
    subprocess.run([sys.executable, str(ROOT / "train_latent_diffusion.py"), "--config", recipe, *folders], check=True)
    assert read_log(tmp_path / "autoencoder" / "log.jsonl")[-1]["psnr"] > 20

    classifier = train_classifier()
    assert accuracy(classifier, *fresh_flowers(20, 2 * FRESH)) > 0.95, "the judge itself must know its flowers"

    pipeline = FlowerLDMPipeline.from_pretrained(tmp_path / "flower-ldm")
    labels = torch.arange(NUM_CLASSES).repeat_interleave(12)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    drawn = pipeline(labels.tolist(), generator=generators, output_type="pt").images
    drawn = F.interpolate(drawn * 2 - 1, size=32, mode="area")
    assert accuracy(classifier, drawn, labels) >= 0.8
