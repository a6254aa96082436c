"""Each metric once, as a row of a table: its function, its key in `metrics.json`, and all that is said of it.

The tables stand at the end of the file: `METRICS` compare a set of images with held-out ones, by their features;
`RECONSTRUCTION_METRICS` say what the autoencoder keeps of an image; `MEMORIZATION_METRICS` how many images are copies.
The evaluation computes the rows; its table in the terminal, its sweep, the page and the card show them. All of these
loop over the tables, so a new row appears everywhere.

Shapes: N images of a set, M held-out images, T training images, D features; B images of a batch, K classes.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from .autoencoder_losses import PerceptualLoss, fidelity
from .memorization import memorized

PRECISION_NEIGHBORS, DENSITY_NEIGHBORS = 3, 5  # as in the papers
MIN_IMAGES = DENSITY_NEIGHBORS + 1  # an image is no neighbor of its own
KID_SUBSETS, KID_MAX_SUBSET = 100, 500
COPIED_DISTANCE = 0.1  # torchmetrics' cosine_distance_eps: from here on, nothing counts as memorized
ROWS_AT_A_TIME = 1024  # of a distance matrix


# --- functions -------------------------------------------------------------------------------------------------------


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Frechet distance of two Gaussians fitted to features `(N, D)` and `(M, D)` (Heusel et al. 2017, eq. 6).

    Biased: the same distribution against itself gives more than 0, the more the fewer the images.
    """
    identity = nn.Identity()
    identity.num_features = features.shape[1]
    metric = FrechetInceptionDistance(feature=identity)
    metric.update(reference.double(), real=True)  # in single precision the root of the product loses digits
    metric.update(features.double(), real=False)
    return max(0.0, metric.compute().item())


def kid_subset_size(n: int) -> int:
    """Half of n, at most 500: subsets of nearly all images would share most of them and hide the spread."""
    return min(KID_MAX_SUBSET, n // 2)


def kernel_distance(features: torch.Tensor, reference: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """KID, the unbiased squared MMD with the kernel (x.y / D + 1)^3, and its spread (Binkowski et al. 2018, sec. 4).

    Mean and standard deviation over 100 random subsets of `kid_subset_size` images.
    """
    subset_size = kid_subset_size(min(len(features), len(reference)))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the features: we do, too
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(feature=nn.Identity(), subsets=KID_SUBSETS, subset_size=subset_size)
        metric.update(reference.double(), real=True)
        metric.update(features.double(), real=False)
        mean, std = metric.compute()
    return mean.item(), std.item()


def neighbor_radii(features: torch.Tensor, neighbors: Sequence[int]) -> list[torch.Tensor]:
    """Distance `(N,)` of each feature vector to its k-th nearest other one, for each k."""
    nearest = [
        torch.cdist(rows, features).topk(max(neighbors) + 1, largest=False).values  # the first is itself
        for rows in features.split(ROWS_AT_A_TIME)
    ]
    return list(torch.cat(nearest)[:, list(neighbors)].T)


def neighborhood_metrics(features: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019, eq. 1, 2), density and coverage (Naeem et al. 2020, eq. 4, 5).

    Of samples `(N, D)` against a reference `(M, D)`, with k = 3 for the first two and k = 5 for the others. Every
    feature is first brought to the reference's mean 0 and deviation 1. Without that, noise lay as near to photographs
    as they to each other (precision 0.96, all by two photographs that are far from the rest), since it hardly excites
    the network at all: a point in the middle of a sphere is nearer to its surface than the points there to each other.
    """
    scaler = StandardScaler().fit(reference.double().numpy())
    features, reference = (torch.from_numpy(scaler.transform(rows.double().numpy())) for rows in (features, reference))
    wide, wider = neighbor_radii(reference, (PRECISION_NEIGHBORS, DENSITY_NEIGHBORS))  # (M,) each
    [own] = neighbor_radii(features, (PRECISION_NEIGHBORS,))  # (N,)
    precise = inside = 0.0
    recalled, covered = torch.zeros(2, len(reference), dtype=torch.bool)
    for rows, radii in zip(features.split(ROWS_AT_A_TIME), own.split(ROWS_AT_A_TIME), strict=True):
        distances = torch.cdist(rows, reference)  # (B, M)
        precise += (distances <= wide).any(dim=1).sum().item()
        recalled |= (distances <= radii[:, None]).any(dim=0)
        inside += (distances <= wider).sum().item()
        covered |= (distances <= wider).any(dim=0)
    return {
        "precision": precise / len(features),
        "recall": recalled.double().mean().item(),
        "density": inside / (DENSITY_NEIGHBORS * len(features)),
        "coverage": covered.double().mean().item(),
    }


def memorization_distance(features: torch.Tensor, training: torch.Tensor) -> float:
    """Mean over N images of 1 - |cos| to the nearest of T training images, by features `(N, D)`, `(T, D)`: MiFID's.

    torchmetrics 1.9 has the sets the other way round: its mean is over training images, so that 1,020 exact copies of
    7,169 photographs cost nothing. Here it is over the generated ones, as in the paper (Bai et al. 2021).
    """
    features = F.normalize(features.double())
    nearest = torch.zeros(len(features), dtype=torch.float64)
    for rows in training.split(ROWS_AT_A_TIME):
        nearest = torch.maximum(nearest, (features @ F.normalize(rows.double()).T).abs().amax(dim=1))
    return (1 - nearest).mean().clamp(min=0).item()


def informed_distance(frechet: float, features: torch.Tensor, training: torch.Tensor) -> float:
    """MiFID (Bai et al. 2021): a Frechet distance, divided by the `memorization_distance` where that is below 0.1.

    torchmetrics takes both to the same images. Here the Frechet distance is that to held-out images, as everywhere in
    this protocol, since copies would lower one to training images; the penalty is for being near to training images,
    since no others can have been memorized. By efficientnet-lite0, 1,020 training photographs of Oxford 102 Flowers
    at 128 px are 0.20 from the other 6,149, clear of the threshold. Synthetic flowers at 32 px are not (0.09).
    """
    distance = memorization_distance(features, training)
    return frechet / (distance + 1e-14) if distance < COPIED_DISTANCE else frechet  # torchmetrics' 1e-14


def train_classifier(features: torch.Tensor, class_labels: torch.Tensor) -> Pipeline | None:
    """A linear probe: multinomial logistic regression on standardized features of real images; None for one class."""
    if len(class_labels.unique()) < 2:
        return None
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    return probe.fit(features.numpy(), class_labels.numpy())


def class_accuracy(classifier: Pipeline | None, features: torch.Tensor, class_labels: torch.Tensor) -> float | None:
    """Share of images that the classifier takes for the class that they should be of."""
    if classifier is None:
        return None
    return float((classifier.predict(features.numpy()) == class_labels.numpy()).mean())


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Comparison:
    """A set of images beside those that it is compared with. What several metrics share is computed once."""

    features: torch.Tensor  # (N, D)
    class_labels: torch.Tensor  # (N,), of the classes that the images should be of
    reference: torch.Tensor  # (M, D), of held-out images
    training: torch.Tensor  # (T, D), of the training images that these may be copies of; they are none of them
    classifier: Pipeline | None  # has seen none of these images

    @cached_property
    def frechet_distance(self) -> float:
        return frechet_distance(self.features, self.reference)

    @cached_property
    def neighborhoods(self) -> dict[str, float]:
        return neighborhood_metrics(self.features, self.reference)


@dataclass(frozen=True, eq=False)
class ReconstructedBatch:
    """Images beside what the autoencoder makes of them. What several metrics share is computed once."""

    originals: torch.Tensor  # (B, 3, H, W) in [-1, 1]
    reconstruction: torch.Tensor  # (B, 3, H, W) in [-1, 1]
    class_labels: torch.Tensor  # (B,)
    class_logits: torch.Tensor | None  # (B, K), by the autoencoder's head; `None` without one for these classes
    perceptual: PerceptualLoss | None

    @cached_property
    def fidelity(self) -> dict[str, torch.Tensor]:
        return fidelity(self.reconstruction, self.originals)


@dataclass(frozen=True)
class ImageSet:
    """A set of images that is measured."""

    key: str  # in metrics.json
    name: str  # in a terminal and in legends
    title: str  # in the page and the card
    role: str = ""  # beside the others: what its numbers are for


REAL = ImageSet("real", "real training images", "Real images", "the floor")
RECONSTRUCTIONS = ImageSet("reconstructions", "reconstructions", "Reconstructions", "the ceiling")
SAMPLES = ImageSet("samples", "samples", "Samples", "the model")
HELD_OUT = ImageSet("held_out", "held-out", "Held-out images")
COMPARED_SETS = (REAL, RECONSTRUCTIONS, SAMPLES)  # with held-out images
SEARCHED_SETS = (SAMPLES, HELD_OUT)  # for copies of training images; in held-out ones, the rate is chance


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is said of a number wherever it is shown."""

    key: str  # in metrics.json
    title: str  # in the page, the card and pictures
    short: str = ""  # in a terminal
    decimals: int | None = None  # unset: four digits that count
    unit: str = ""
    is_share: bool = False  # between 0 and 1: in percent, except in the page's and the card's table of metrics
    headline: str = ""  # its name on the page's first screen, "{n}" in it for how many samples; unset: it isn't there
    headline_decimals: int = 1
    hub_type: str = ""  # the Hub's type of metric, for the card's metadata; unset: it isn't there
    hub_title: str = ""  # its name there; unset: the title

    @property
    def title_with_unit(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def name_on_hub(self) -> str:
        return self.hub_title or self.title


@dataclass(frozen=True, kw_only=True)
class Metric(Row):
    """A comparison of a set of images with held-out ones."""

    better: Literal["lower", "higher"]
    note: str  # how to read it
    measure: Callable[[Comparison], float | tuple[float, float] | None]  # where it has a spread, with that
    has_spread: bool = False
    is_swept: bool = False  # over guidance and steps, too
    caution: str = ""  # to be said where the images are not more than the features; unset: few images do no harm

    @property
    def spread_key(self) -> str:
        return f"{self.key}_std"


@dataclass(frozen=True, kw_only=True)
class ReconstructionMetric(Row):
    """A number of what the autoencoder keeps, from the evaluation, from stage 1's own validation, or from both.

    The evaluation takes it from images, as a mean over all, or from the features of all reconstructions and originals.
    """

    key: str = ""  # in the evaluation's entry; unset: not measured there
    stage1_key: str = ""  # in the metrics.json of stage 1; unset: not measured there
    stage1_title: str = ""  # of what is measured there; unset: the title
    of_images: Callable[[ReconstructedBatch], torch.Tensor | None] | None = None  # (B,)
    of_features: Callable[[torch.Tensor, torch.Tensor], float] | None = None
    names_network: bool = False  # in metrics.json it stands beside the name of the network that it depends on


@dataclass(frozen=True, kw_only=True)
class MemorizationMetric(Row):
    """A number of images that are copies of training images."""

    measure: Callable[[dict[str, torch.Tensor]], float | int]  # of what `TrainingNeighbors.search` has found
    by_features: bool = False  # so it depends on the feature network


SINGULAR = (
    "covariances are singular and Frechet distances biased upwards; compare them at this n and these features only"
)
METRICS = (
    Metric(
        key="frechet_distance", title="Fréchet distance", short="Frechet", better="lower", decimals=2,
        note="How far the features of two sets lie apart, each set taken as a Gaussian cloud. It shrinks as n grows: "
        "compare it only at the same n and with the same feature network.",
        measure=lambda compared: compared.frechet_distance,
        is_swept=True, caution=SINGULAR, headline="Fréchet distance, n = {n}", hub_type="frechet_distance",
    ),
    Metric(
        key="kid", title="KID", short="KID", better="lower", decimals=5,
        note="The same question asked with a kernel, without that bias: about 0 where two sets can't be told apart. "
        "What stands after ± is its spread over random subsets.",
        measure=lambda compared: kernel_distance(compared.features, compared.reference),
        has_spread=True, is_swept=True, hub_type="kid",
    ),
    Metric(
        key="precision", title="Precision", short="precision", better="higher", decimals=3,
        note="The share of a set's images that fall among the held-out ones; low where many look like no photograph.",
        measure=lambda compared: compared.neighborhoods["precision"], hub_type="precision",
    ),
    Metric(
        key="recall", title="Recall", short="recall", better="higher", decimals=3,
        note="The share of held-out images that fall among the set's; low where part of the variety is missing.",
        measure=lambda compared: compared.neighborhoods["recall"], hub_type="recall",
    ),
    Metric(
        key="density", title="Density", short="density", better="higher", decimals=3,
        note="Precision that counts how many held-out images each image is a neighbor of, so that outliers matter "
        "less. It can exceed 1.",
        measure=lambda compared: compared.neighborhoods["density"], hub_type="density",
    ),
    Metric(
        key="coverage", title="Coverage", short="coverage", better="higher", decimals=3,
        note="The share of held-out images that have an image of the set in their neighborhood.",
        measure=lambda compared: compared.neighborhoods["coverage"], hub_type="coverage",
    ),
    Metric(
        key="class_accuracy", title="Class accuracy", short="class acc.", better="higher", decimals=3, is_share=True,
        note="How often a classifier trained on real images alone names the class that was asked for.",
        measure=lambda compared: class_accuracy(compared.classifier, compared.features, compared.class_labels),
        is_swept=True, headline="Class accuracy", hub_type="accuracy",
    ),
    Metric(
        key="mifid", title="MiFID", short="MiFID", better="lower", decimals=2,
        note="The Fréchet distance with a penalty for copies: it is divided by the mean cosine distance to the "
        "nearest training image where that is below 0.1. Real images and reconstructions are held against training "
        "images other than their own. Where even real images are penalized, the data are too alike for it to show "
        "copies.",
        measure=lambda compared: informed_distance(compared.frechet_distance, compared.features, compared.training),
        caution=SINGULAR, hub_type="mifid",
    ),
)  # fmt: skip
RECONSTRUCTION_METRICS = (
    ReconstructionMetric(
        key="psnr", stage1_key="psnr", title="PSNR", stage1_title="PSNR, mean over images", short="PSNR", decimals=2,
        unit="dB", of_images=lambda batch: batch.fidelity["psnr"], headline="PSNR, held out",
        hub_type="psnr", hub_title="PSNR of reconstructions (dB)",
    ),
    ReconstructionMetric(
        stage1_key="psnr_of_mean_squared_error", title="PSNR of the mean squared error", decimals=2, unit="dB",
    ),
    ReconstructionMetric(
        key="ssim", stage1_key="ssim", title="SSIM", short="SSIM", decimals=3,
        of_images=lambda batch: batch.fidelity["ssim"], headline="SSIM, held out", headline_decimals=3,
        hub_type="ssim", hub_title="SSIM of reconstructions",
    ),
    ReconstructionMetric(stage1_key="val_pixel_loss", title="Mean absolute error, images in [−1, 1]"),
    ReconstructionMetric(
        key="perceptual_distance", stage1_key="val_perceptual_loss", title="Perceptual distance",
        stage1_title="Perceptual loss", names_network=True,
        of_images=lambda batch: None if batch.perceptual is None else
        batch.perceptual.per_image(batch.reconstruction, batch.originals),
    ),
    ReconstructionMetric(
        key="head_accuracy", stage1_key="val_accuracy", title="Accuracy of the head", short="head's accuracy",
        is_share=True, headline="Accuracy of the head",
        of_images=lambda batch: None if batch.class_logits is None else
        (batch.class_logits.argmax(dim=1).cpu() == batch.class_labels).float(),
        hub_type="accuracy", hub_title="Accuracy of the classifier head",
    ),
    ReconstructionMetric(  # in the terminal alone
        key="frechet_distance", title="", short="Frechet distance to themselves", decimals=2,
        of_features=frechet_distance,
    ),
)  # fmt: skip
FEATURE_RATE = MemorizationMetric(
    key="feature_rate", title="By features", short="by features", is_share=True, headline="Memorized samples",
    measure=lambda found: memorized(found["feature_distances"]).double().mean().item(), by_features=True,
    hub_type="memorisation_rate", hub_title="Memorization rate in feature space",
)  # fmt: skip
MEMORIZATION_METRICS = (
    FEATURE_RATE,
    MemorizationMetric(
        key="pixel_rate", title="By pixels", short="by pixels", is_share=True,
        measure=lambda found: memorized(found["pixel_distances"]).double().mean().item(),
        hub_type="memorisation_rate", hub_title="Memorization rate in pixel space",
    ),
    MemorizationMetric(
        key="exact_duplicates", title="Byte-identical", short="exact copies",
        measure=lambda found: int(found["is_copy"].sum()),
    ),
)  # fmt: skip


# --- entries of metrics.json -----------------------------------------------------------------------------------------


def measure_set(compared: Comparison, swept_only: bool = False) -> dict[str, float | int | None]:
    """The entry of one set of images: how many they are, and each metric, or those alone that a sweep measures."""
    entry = {"n": len(compared.features), "n_reference": len(compared.reference)}
    for metric in METRICS:
        if metric.is_swept or not swept_only:
            value = metric.measure(compared)
            if metric.has_spread:
                entry[metric.key], entry[metric.spread_key] = value
            else:
                entry[metric.key] = value
    return entry


def measure_reconstructed(batch: ReconstructedBatch) -> dict[str, torch.Tensor]:
    """Each metric that takes images, `(B,)`, but for those that these images or this autoencoder don't have."""
    values = {metric.key: metric.of_images(batch) for metric in RECONSTRUCTION_METRICS if metric.of_images}
    return {key: value.cpu() for key, value in values.items() if value is not None}


def memorization_rates(found: dict[str, torch.Tensor]) -> dict[str, float | int]:
    """The entry of those images for which `TrainingNeighbors.search` has found this."""
    return {"n": len(found["is_copy"])} | {metric.key: metric.measure(found) for metric in MEMORIZATION_METRICS}


def smallest_n(entries: Iterable[dict]) -> int:
    """Of the sets in these entries and of what they are compared with."""
    return min(entry[size] for entry in entries for size in ("n", "n_reference"))


def cautions(n: int, num_features: int) -> list[str]:
    """What the metrics that few images bias say of this smallest set; nothing where it is large enough."""
    if n > num_features:
        return []
    reasons = dict.fromkeys(metric.caution for metric in METRICS if metric.caution)
    return [f"n = {n:,} is not above the {num_features:,} features: {reason}" for reason in reasons]


def protocol_remarks(n: int) -> list[str]:
    """How the metrics are computed that others compute otherwise, with a smallest set of this size."""
    return [
        f"KID is the mean over {KID_SUBSETS} random subsets of at most {kid_subset_size(n)} images, its spread their "
        "deviation; the classifier has seen none of the images in this table",
        "precision, recall, density and coverage: every feature is first brought to the held-out images' mean 0 and "
        "deviation 1, so they don't compare with figures elsewhere; memorization: each image as it is and mirrored",
    ]
