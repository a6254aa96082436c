"""Maps of the latents, by class and origin: the plane in which they vary most (PCA), and neighborhoods (t-SNE)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from .data import ImageDataset
from .lettering import drawable, save_figure
from .progress_bars import progress_bar
from .runs import LATENT_MAP

NAMED_CLASSES = 10  # classes that a map shows by name, each in its own color
# CARTO's "Safe" palette, after Paul Tol's: color-blind readers can distinguish these colors.
COLORS = (
    "#88CCEE",
    "#CC6677",
    "#DDCC77",
    "#117733",
    "#332288",
    "#AA4499",
    "#44AA99",
    "#999933",
    "#882255",
    "#6699CC",
)
OTHERS = "#c9c9c9"
# The sets of a map in drawing order, each with its maximum number of points, its marker and the marker's area.
MAP_SETS = {"training": (1200, "o", 12), "held out": (500, "^", 26), "generated": (300, "*", 90)}


@dataclass(frozen=True)
class LatentSet:
    """Latents of one origin: normalized `latents` `(N, Z, h, w)` float32, and their `labels` `(N,)` int64."""

    latents: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class LatentPlane:
    """The plane in which latents vary most (PCA), with the points that it was fitted to.

    Attributes:
        pca: maps flattened latents to two coordinates.
        points: `(N, 2)`, the coordinates of the latents that the PCA was fitted to.
        labels: `(N,)`, their classes.
    """

    pca: PCA
    points: np.ndarray
    labels: np.ndarray

    @classmethod
    def fit(cls, latents: np.ndarray, labels: np.ndarray) -> "LatentPlane":
        """Fit the plane to latents `(N, Z, h, w)` of classes `labels` `(N,)`, with N at least 2."""
        pca = PCA(n_components=2, random_state=0).fit(latents.reshape(len(latents), -1))
        return cls(pca, pca.transform(latents.reshape(len(latents), -1)), labels)

    def project(self, latents: np.ndarray) -> np.ndarray:
        """Latents `(N, Z, h, w)` -> coordinates `(N, 2)`."""
        return self.pca.transform(latents.reshape(len(latents), -1))


def named_classes(num_classes: int, count: int = NAMED_CLASSES) -> list[int]:
    """The labels that a picture shows by name: all of them, or `count` spread over all."""
    return np.linspace(0, num_classes - 1, min(num_classes, count)).round().astype(int).tolist()


def spread_over_classes(labels: np.ndarray, limit: int, favored: Sequence[int] = (), seed: int = 0) -> np.ndarray:
    """At most `limit` indices into `labels` `(N,)`, in order, with about the same number for each class.

    The `favored` classes get up to eight times as many, so that their points form visible clouds. The same seed gives
    the same indices.
    """
    rank = np.empty(len(labels))
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        rank[members] = np.arange(len(members)) / (8 if label in favored else 1)
    return np.sort(shuffled[np.argsort(rank[shuffled], kind="stable")[:limit]])


def tsne(latents: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE (van der Maaten & Hinton 2008) of latents `(N, Z, h, w)` by their 50 principal components: `(N, 2)`."""
    flat = latents.reshape(len(latents), -1)
    flat = PCA(min(50, *flat.shape), random_state=seed).fit_transform(flat)
    perplexity = min(30.0, max(1.0, (len(flat) - 1) / 3))
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(flat)


def save_latent_maps(sets: dict[str, LatentSet], class_names: list[str], folder: Path, seed: int = 0) -> LatentPlane:
    """Write `latent_space_tsne.png` and `latent_space_pca.png`: the sets in one picture, colored by class.

    Args:
        sets: latents by name: "training", and optionally "held out" and "generated". `MAP_SETS` limits the points of
            each, 2,000 in all, spread over the classes: t-SNE of 9,209 points took 100 s.

    Returns:
        the plane of the PCA, which is fitted to the training latents only.
    """
    favored = named_classes(len(class_names))
    shown = {}
    for name in [name for name in MAP_SETS if name in sets]:
        kept = spread_over_classes(sets[name].labels, MAP_SETS[name][0], favored, seed)
        shown[name] = LatentSet(sets[name].latents[kept], sets[name].labels[kept])
    plane = LatentPlane.fit(shown["training"].latents, shown["training"].labels)
    by_pca = {name: plane.project(latents.latents) for name, latents in shown.items()}
    embedded = tsne(np.concatenate([latents.latents for latents in shown.values()]), seed)
    starts = np.cumsum([len(latents) for latents in shown.values()])[:-1]
    by_tsne = dict(zip(shown, np.split(embedded, starts), strict=True))
    labels = {name: latents.labels for name, latents in shown.items()}

    figure, axis = plt.subplots(figsize=(8.2, 6.2), layout="constrained")
    latent_map(axis, by_pca, labels, class_names)
    shares = plane.pca.explained_variance_ratio_
    axis.set_xlabel(f"1st principal component, {shares[0]:.1%} of the variance")
    axis.set_ylabel(f"2nd principal component, {shares[1]:.1%}")
    axis.set_title("Latents in the plane in which the training images vary most (PCA)", fontsize=10)
    save_figure(figure, LATENT_MAP.path(folder, "pca"))
    figure, axis = plt.subplots(figsize=(8.2, 6.2), layout="constrained")
    latent_map(axis, by_tsne, labels, class_names)
    axis.set(xticks=[], yticks=[])
    axis.set_title("Latents, neighbors beside each other (t-SNE)", fontsize=10)
    save_figure(figure, LATENT_MAP.path(folder, "tsne"))
    return plane


def latent_map(
    axis: plt.Axes, points: dict[str, np.ndarray], labels: dict[str, np.ndarray], class_names: list[str]
) -> None:
    """Draw the points `(N, 2)` of each set with its marker: up to 10 classes in their own colors, the others gray."""
    color_of = dict(zip(named_classes(len(class_names)), COLORS, strict=False))
    for name, coordinates in points.items():
        _, marker, area = MAP_SETS[name]
        style = {"marker": marker, "s": area, "linewidths": 0, "alpha": 0.75 if name == "training" else 0.9}
        if name != "training":
            style |= {"edgecolors": "black", "linewidths": 0.5}
        named = np.isin(labels[name], list(color_of))
        axis.scatter(*coordinates[~named].T, color=OTHERS, **(style | {"s": area / 2, "linewidths": 0}))
        axis.scatter(*coordinates[named].T, c=[color_of[label] for label in labels[name][named].tolist()], **style)
    handles = [plt.Line2D([], [], marker="s", linestyle="", color=c, label=drawable(class_names[k]))
               for k, c in color_of.items()]  # fmt: skip
    if len(class_names) > len(color_of):
        rest = len(class_names) - len(color_of)
        handles.append(plt.Line2D([], [], marker="s", linestyle="", color=OTHERS, label=f"{rest} other classes"))
    for name, coordinates in points.items():
        marker, size = MAP_SETS[name][1], 11 if name == "generated" else 6
        handles.append(plt.Line2D([], [], marker=marker, linestyle="", color="#555555", markersize=size,
                                  label=f"{name} ({len(coordinates):,})"))  # fmt: skip
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.2)


def encode_some(
    encode: Callable[[torch.Tensor], torch.Tensor], dataset: ImageDataset, indices: np.ndarray, device: torch.device
) -> LatentSet:
    """The latents of the dataset's images at `indices`; `encode` maps images `(B, 3, H, W)` to `(B, Z, h, w)`."""
    latents = []
    with progress_bar(total=len(indices), desc="encoding", unit=" images", leave=False) as progress:
        for start in range(0, len(indices), 64):
            batch = dataset.__getitems__(indices[start : start + 64].tolist())
            with torch.inference_mode():
                latents.append(encode(batch["images"].to(device)).float().cpu().numpy())
            progress.update(len(latents[-1]))
    return LatentSet(np.concatenate(latents), dataset.labels[torch.from_numpy(indices)].numpy())


def encode_for_map(
    encode: Callable[[torch.Tensor], torch.Tensor], datasets: dict[str, ImageDataset], device: torch.device
) -> dict[str, LatentSet]:
    """The latents of only those images that `save_latent_maps` shows of each data set."""
    sets = {}
    for name, dataset in datasets.items():
        favored = named_classes(dataset.num_classes)
        kept = spread_over_classes(dataset.labels.numpy(), MAP_SETS[name][0], favored)
        sets[name] = encode_some(encode, dataset, kept, device)
    return sets
