"""Finds the training images nearest to other images, by features and by pixels, and tells which were memorized.

Shapes: Q queries, R references; D features or pixels; (H, W) pixels.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from .data import ImageDataset, uint8_images
from .errors import InputError
from .progress_bars import progress_bar

MEMORIZED_RATIO = 1 / 3
RULE = (
    "An image counts as memorized if its nearest training image is at most a third as far away as the second nearest."
)
PIXEL_SPACE = 64  # side in pixels of the images that are compared
ROWS_AT_A_TIME = 1024  # rows of a distance matrix in memory
IMAGES_AT_A_TIME = 64  # full-size float32 images in memory; 1,000 of 128 x 128 pixels take 200 MB a copy
Rows = Callable[[torch.Tensor], torch.Tensor]  # keys (B,) -> vectors (B, D)


def nearest_two(
    query_rows: Rows,
    queries: torch.Tensor,
    reference_rows: Rows,
    references: torch.Tensor,
    title: str = "nearest neighbors",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the two nearest references of each query: distances `(Q, 2)` and their keys `(Q, 2)`, nearest first.

    Args:
        query_rows, reference_rows: return the vectors `(B, D)` of up to a thousand keys.
        queries, references: keys `(Q,)` and `(R,)`.
    """
    distances = torch.full((len(queries), 2), torch.inf)
    keys = torch.zeros(len(queries), 2, dtype=torch.int64)
    with progress_bar(total=len(queries) * len(references), desc=title, unit=" pairs", unit_scale=True) as progress:
        for positions in torch.arange(len(queries)).split(ROWS_AT_A_TIME):
            rows = query_rows(queries[positions])
            for block in references.split(ROWS_AT_A_TIME):
                found = torch.cdist(rows, reference_rows(block))  # (B, R'), good enough to find the nearest
                candidates = torch.cat([distances[positions], found], dim=1)
                candidate_keys = torch.cat([keys[positions], block.expand(len(found), -1)], dim=1)
                distances[positions], chosen = candidates.topk(2, largest=False)
                keys[positions] = candidate_keys.gather(1, chosen)
                progress.update(found.numel())
    for positions in torch.arange(len(queries)).split(ROWS_AT_A_TIME // 4):
        # `cdist` uses matrix products, by which equal vectors are not quite at distance 0: compute them exactly
        rows = query_rows(queries[positions])
        exact = [(rows - reference_rows(keys[positions, column])).norm(dim=1) for column in range(2)]
        distances[positions], order = torch.stack(exact, dim=1).sort(dim=1)
        keys[positions] = keys[positions].gather(1, order)
    return distances, keys


class TrainingNeighbors:
    """The distinct training images, in which `search` finds the two nearest to any other image.

    Identical training images count as one. Otherwise the nearest and the second nearest could be the same picture, and
    `memorized` would give the wrong answer.

    Args:
        images: the training split, or `(N, H, W, 3)` uint8.
        features: `(N, D)`, of the same images. Without them, images are compared by pixels alone.
    """

    def __init__(self, images: ImageDataset | np.ndarray, features: torch.Tensor | None = None) -> None:
        self.images = images
        self.features = features
        self.first_of: dict[bytes, int] = {}
        for key, digest in enumerate(image_digests(images)):
            self.first_of.setdefault(digest, key)
        self.distinct = torch.tensor(list(self.first_of.values()))
        if len(self.distinct) < 2:
            raise InputError("memorization needs at least 2 different training images: choose other --train_splits")

    def search(
        self,
        images: ImageDataset | np.ndarray,
        features: torch.Tensor | None = None,
        mirrored_features: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Find the two training images nearest to each of Q images.

        Each image is searched for as it is and mirrored, because models are trained on mirrored images too.

        Args:
            features, mirrored_features: `(Q, D)`, of the images and of their mirror images; both or neither.

        Returns:
            "pixel_distances" and, with features, "feature_distances" `(Q, 2)`, nearest first. "pixel_keys" and
            "feature_keys" `(Q, 2)`, the indices of these training images. "is_copy" `(Q,)`, whether the pixels are
            exactly those of a training image.
        """
        sides = [partial(pixel_rows, images, mirrored=mirrored) for mirrored in (False, True)]
        rows_in = {"pixel": (sides, partial(pixel_rows, self.images))}
        if features is not None:
            sides = [features.__getitem__, mirrored_features.__getitem__]
            rows_in["feature"] = (sides, self.features.__getitem__)
        queries = torch.arange(len(images))
        found = {}
        for space, (sides, training_rows) in rows_in.items():
            upright, mirrored = (
                nearest_two(rows, queries, training_rows, self.distinct, title=f"neighbors by {space}s{side}")
                for rows, side in zip(sides, ("", ", mirrored"), strict=True)
            )
            found[f"{space}_distances"], found[f"{space}_keys"] = nearest_of_either(upright, mirrored)
        copies = [[digest in self.first_of for digest in image_digests(images, side)] for side in (False, True)]
        found["is_copy"] = torch.tensor(copies).any(dim=0)
        return found


def nearest_of_either(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two results of `nearest_two` for the same queries into the two nearest different references."""
    distances, order = torch.cat([one[0], other[0]], dim=1).sort(dim=1, stable=True)  # (Q, 4)
    keys = torch.cat([one[1], other[1]], dim=1).gather(1, order)
    second = 1 + (keys[:, 1:] != keys[:, :1]).int().argmax(dim=1)
    both = torch.stack([torch.zeros_like(second), second], dim=1)  # (Q, 2)
    return distances.gather(1, both), keys.gather(1, both)


def image_digests(images: ImageDataset | np.ndarray, mirrored: bool = False) -> Iterator[bytes]:
    """The SHA-256 of each image's pixels, in order."""
    for keys in torch.arange(len(images)).split(IMAGES_AT_A_TIME):
        for image in uint8_images(images, keys.tolist(), mirrored):
            yield hashlib.sha256(image.tobytes()).digest()


def pixel_rows(images: ImageDataset | np.ndarray, keys: torch.Tensor, mirrored: bool = False) -> torch.Tensor:
    """Pixels `(B, 3 H W)` in [-1, 1], averaged down to at most 64 x 64. Copies are as near there as at full size."""
    rows = []
    for chunk in keys.split(IMAGES_AT_A_TIME):
        pixels = torch.from_numpy(uint8_images(images, chunk.tolist(), mirrored)).permute(0, 3, 1, 2)
        pixels = pixels.float().div_(127.5).sub_(1)
        if pixels.shape[-1] > PIXEL_SPACE:
            pixels = F.interpolate(pixels, size=(PIXEL_SPACE, PIXEL_SPACE), mode="area")
        rows.append(pixels.flatten(1))
    return torch.cat(rows)


def memorized(distances: torch.Tensor) -> torch.Tensor:
    """Whether the nearest training image is nearer than a third of the second nearest, `(Q, 2)` -> `(Q,)`.

    This is the rule of Yoon et al. 2023. If both are at distance 0, the features can't tell training images apart, and
    the image doesn't count as memorized.
    """
    return (distances[:, 0] <= MEMORIZED_RATIO * distances[:, 1]) & (distances[:, 1] > 0)
