"""Every metric, as one row of a table: its function, its key in `metrics.json`, its title and how to read it.

There are three tables, near the end of the file. `METRICS` compare a set of images with held-out images, by features.
`RECONSTRUCTION_METRICS` measure how well the autoencoder reconstructs an image. `MEMORIZATION_METRICS` count copies of
training images. Evaluation, terminal table, sweep, page and card loop over these tables, so a new row appears in each.

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
MIN_IMAGES = DENSITY_NEIGHBORS + 1  # an image is not its own neighbor
KID_SUBSETS, KID_MAX_SUBSET = 100, 500
COPIED_DISTANCE = 0.1  # torchmetrics' cosine_distance_eps: from this distance on, MiFID has no penalty
ROWS_AT_A_TIME = 1024  # rows of a distance matrix in memory


# --- functions -------------------------------------------------------------------------------------------------------


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Frechet distance of two Gaussians fitted to features `(N, D)` and `(M, D)` (Heusel et al. 2017, eq. 6).

    It is biased: two samples of the same distribution have a distance above 0, which grows as the samples shrink.
    """
    identity = nn.Identity()
    identity.num_features = features.shape[1]
    metric = FrechetInceptionDistance(feature=identity)
    metric.update(reference.double(), real=True)  # in float32 the matrix square root loses digits
    metric.update(features.double(), real=False)
    return max(0.0, metric.compute().item())


def kid_subset_size(n: int) -> int:
    """Half of n, at most 500. Larger subsets would share most of their images, and hide the spread."""
    return min(KID_MAX_SUBSET, n // 2)


def kernel_distance(features: torch.Tensor, reference: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """KID, the unbiased squared MMD with the kernel (x.y / D + 1)^3, and its spread (Binkowski et al. 2018, sec. 4).

    They are the mean and the standard deviation over 100 random subsets of `kid_subset_size` images.
    """
    subset_size = kid_subset_size(min(len(features), len(reference)))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # about the memory for all features, which we hold anyway
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

    Samples `(N, D)` are compared with a reference `(M, D)`, with k = 3 neighbors for precision and recall, and k = 5
    for density and coverage. All features are first standardized, to the reference's mean 0 and deviation 1. Without
    that, pure noise had a precision of 0.96: it hardly excites the network, so its features lie in the middle of all
    others, within the neighborhoods of two outlying photographs.
    """
    scaler = StandardScaler().fit(reference.double().numpy())
    features, reference = (torch.from_numpy(scaler.transform(rows.double().numpy())) for rows in (features, reference))
    radii, density_radii = neighbor_radii(reference, (PRECISION_NEIGHBORS, DENSITY_NEIGHBORS))  # (M,) each
    [sample_radii] = neighbor_radii(features, (PRECISION_NEIGHBORS,))  # (N,)
    precise = inside = 0.0
    recalled, covered = torch.zeros(2, len(reference), dtype=torch.bool)
    batches = zip(features.split(ROWS_AT_A_TIME), sample_radii.split(ROWS_AT_A_TIME), strict=True)
    for rows, rows_radii in batches:
        distances = torch.cdist(rows, reference)  # (B, M)
        precise += (distances <= radii).any(dim=1).sum().item()
        recalled |= (distances <= rows_radii[:, None]).any(dim=0)
        inside += (distances <= density_radii).sum().item()
        covered |= (distances <= density_radii).any(dim=0)
    return {
        "precision": precise / len(features),
        "recall": recalled.double().mean().item(),
        "density": inside / (DENSITY_NEIGHBORS * len(features)),
        "coverage": covered.double().mean().item(),
    }


def memorization_distance(features: torch.Tensor, training: torch.Tensor) -> float:
    """The memorization distance of MiFID: the mean of 1 - |cos| to the nearest training image (Bai et al. 2021).

    The mean is over the N generated images `(N, D)`, as in the paper; T training images `(T, D)` are searched.
    torchmetrics 1.9 takes the mean over the training images instead. Then 1,020 exact copies of 7,169 photographs get
    no penalty.
    """
    features = F.normalize(features.double())
    nearest = torch.zeros(len(features), dtype=torch.float64)
    for rows in training.split(ROWS_AT_A_TIME):
        nearest = torch.maximum(nearest, (features @ F.normalize(rows.double()).T).abs().amax(dim=1))
    return (1 - nearest).mean().clamp(min=0).item()


def informed_distance(frechet: float, features: torch.Tensor, training: torch.Tensor) -> float:
    """MiFID (Bai et al. 2021): the Frechet distance, divided by the `memorization_distance` if that is below 0.1.

    torchmetrics computes both against the same images. Here the Frechet distance is to held-out images, because copies
    would lower a distance to training images. The penalty is for nearness to training images, because no others can
    have been memorized. With efficientnet-lite0, 1,020 training photographs of Oxford 102 Flowers at 128 px have a
    distance of 0.20 to the other 6,149, well above the threshold. Synthetic flowers at 32 px are below it (0.09).
    """
    distance = memorization_distance(features, training)
    return frechet / (distance + 1e-14) if distance < COPIED_DISTANCE else frechet  # torchmetrics' 1e-14


def train_classifier(features: torch.Tensor, class_labels: torch.Tensor) -> Pipeline | None:
    """A linear probe: logistic regression on standardized features of real images. None if there is only one class."""
    if len(class_labels.unique()) < 2:
        return None
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    return probe.fit(features.numpy(), class_labels.numpy())


def class_accuracy(classifier: Pipeline | None, features: torch.Tensor, class_labels: torch.Tensor) -> float | None:
    """The share of images for which the classifier predicts the intended class."""
    if classifier is None:
        return None
    return float((classifier.predict(features.numpy()) == class_labels.numpy()).mean())


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Comparison:
    """The features of a set of images, and those it is compared with. Values that metrics share are cached."""

    features: torch.Tensor  # (N, D)
    class_labels: torch.Tensor  # (N,), the intended class of each image
    reference: torch.Tensor  # (M, D), of held-out images
    training: torch.Tensor  # (T, D), of the training images to search for copies; without the images themselves
    classifier: Pipeline | None  # trained without these images

    @cached_property
    def frechet_distance(self) -> float:
        return frechet_distance(self.features, self.reference)

    @cached_property
    def neighborhoods(self) -> dict[str, float]:
        return neighborhood_metrics(self.features, self.reference)


@dataclass(frozen=True, eq=False)
class ReconstructedBatch:
    """Images and their reconstructions. Values that several metrics share are cached."""

    originals: torch.Tensor  # (B, 3, H, W) in [-1, 1]
    reconstruction: torch.Tensor  # (B, 3, H, W) in [-1, 1]
    class_labels: torch.Tensor  # (B,)
    class_logits: torch.Tensor | None  # (B, K), by the autoencoder's head; `None` if it has none for these classes
    perceptual: PerceptualLoss | None

    @cached_property
    def fidelity(self) -> dict[str, torch.Tensor]:
        return fidelity(self.reconstruction, self.originals)


@dataclass(frozen=True)
class ImageSet:
    """A set of images to measure."""

    key: str  # in metrics.json
    name: str  # in the terminal and in legends
    title: str  # in the page and the card
    role: str = ""  # what its numbers tell, beside those of the other sets


REAL = ImageSet("real", "real training images", "Real images", "the floor")
RECONSTRUCTIONS = ImageSet("reconstructions", "reconstructions", "Reconstructions", "the ceiling")
SAMPLES = ImageSet("samples", "samples", "Samples", "the model")
HELD_OUT = ImageSet("held_out", "held-out", "Held-out images")
COMPARED_SETS = (REAL, RECONSTRUCTIONS, SAMPLES)  # compared with held-out images
SEARCHED_SETS = (SAMPLES, HELD_OUT)  # searched for copies of training images; the held-out rate is the chance level


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """The key, the names and the format of a number, for every place that shows it."""

    key: str  # in metrics.json
    title: str  # in the page, the card and pictures
    short: str = ""  # its name in the terminal
    decimals: int | None = None  # unset: four significant digits
    unit: str = ""
    is_share: bool = False  # a share from 0 to 1, shown in percent except in the metric tables of page and card
    headline: str = ""  # its name on the page's first screen, with "{n}" for the number of samples; unset: not there
    headline_decimals: int = 1
    hub_type: str = ""  # the Hub's metric type, for the card's metadata; unset: not there
    hub_title: str = ""  # its name in that metadata; unset: the title

    @property
    def title_with_unit(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def name_on_hub(self) -> str:
        return self.hub_title or self.title


@dataclass(frozen=True, kw_only=True)
class Metric(Row):
    """A metric that compares a set of images with held-out images."""

    better: Literal["lower", "higher"]
    note: str  # how to read it
    measure: Callable[[Comparison], float | tuple[float, float] | None]  # (value, spread) with has_spread
    has_spread: bool = False
    is_swept: bool = False  # the sweep over guidance and steps measures it too
    caution: str = ""  # a warning for when there are no more images than features; unset: no warning is needed

    @property
    def spread_key(self) -> str:
        return f"{self.key}_std"


@dataclass(frozen=True, kw_only=True)
class ReconstructionMetric(Row):
    """A metric of the reconstructions, measured by the evaluation, by the validation of stage 1, or by both.

    The evaluation computes it from images, as the mean over all, or from features of reconstructions and originals.
    """

    key: str = ""  # in the evaluation's entry; unset: the evaluation doesn't measure it
    stage1_key: str = ""  # in the metrics.json of stage 1; unset: stage 1 doesn't measure it
    stage1_title: str = ""  # title of stage 1's value; unset: the same title
    of_images: Callable[[ReconstructedBatch], torch.Tensor | None] | None = None  # (B,)
    of_features: Callable[[torch.Tensor, torch.Tensor], float] | None = None
    names_network: bool = False  # its entry in metrics.json also names the network that it depends on


@dataclass(frozen=True, kw_only=True)
class MemorizationMetric(Row):
    """A metric that counts copies of training images."""

    measure: Callable[[dict[str, torch.Tensor]], float | int]  # takes the result of `TrainingNeighbors.search`
    by_features: bool = False  # it depends on the feature network


SINGULAR = (
    "covariances are singular and Frechet distances too high; compare them only at this n and with these features"
)
METRICS = (
    Metric(
        key="frechet_distance", title="Fréchet distance", short="Frechet", better="lower", decimals=2,
        note="The distance between the features of two sets, each described as a Gaussian. It shrinks as n grows, so "
        "compare it only at the same n and with the same feature network.",
        measure=lambda compared: compared.frechet_distance,
        is_swept=True, caution=SINGULAR, headline="Fréchet distance, n = {n}", hub_type="frechet_distance",
    ),
    Metric(
        key="kid", title="KID", short="KID", better="lower", decimals=5,
        note="Another distance between the features, without that bias: it is about 0 for two sets that can't be told "
        "apart. The number after ± is its spread over random subsets.",
        measure=lambda compared: kernel_distance(compared.features, compared.reference),
        has_spread=True, is_swept=True, hub_type="kid",
    ),
    Metric(
        key="precision", title="Precision", short="precision", better="higher", decimals=3,
        note="The share of the set's images that lie among the held-out images. It is low if many look unlike "
        "photographs.",
        measure=lambda compared: compared.neighborhoods["precision"], hub_type="precision",
    ),
    Metric(
        key="recall", title="Recall", short="recall", better="higher", decimals=3,
        note="The share of held-out images that lie among the set's images. It is low if part of the variety is "
        "missing.",
        measure=lambda compared: compared.neighborhoods["recall"], is_swept=True, hub_type="recall",
    ),
    Metric(
        key="density", title="Density", short="density", better="higher", decimals=3,
        note="Like precision, but it counts the held-out images that each image is a neighbor of, so outliers matter "
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
        note="How often a classifier, trained on real images alone, predicts the requested class.",
        measure=lambda compared: class_accuracy(compared.classifier, compared.features, compared.class_labels),
        is_swept=True, headline="Class accuracy", hub_type="accuracy",
    ),
    Metric(
        key="mifid", title="MiFID", short="MiFID", better="lower", decimals=2,
        note="The Fréchet distance with a penalty for copies: it is divided by the mean cosine distance to the "
        f"nearest training image if that is below {COPIED_DISTANCE}. Real images and reconstructions are compared "
        "with training images other than their own. If even real images get a penalty, the data are too similar for "
        "it to show copies.",
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
    ReconstructionMetric(  # without a title: shown only in the terminal
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
    """The entry of one set of images: its size, and every metric, or only those of a sweep."""
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
    """Every metric that is computed from images, `(B,)`, except those that this autoencoder doesn't have."""
    values = {metric.key: metric.of_images(batch) for metric in RECONSTRUCTION_METRICS if metric.of_images}
    return {key: value.cpu() for key, value in values.items() if value is not None}


def memorization_rates(found: dict[str, torch.Tensor]) -> dict[str, float | int]:
    """The memorization entry of a set of images, from the result of `TrainingNeighbors.search`."""
    return {"n": len(found["is_copy"])} | {metric.key: metric.measure(found) for metric in MEMORIZATION_METRICS}


def smallest_n(entries: Iterable[dict]) -> int:
    """The size of the smallest set of images in these entries, reference sets included."""
    return min(entry[size] for entry in entries for size in ("n", "n_reference"))


def cautions(n: int, num_features: int) -> list[str]:
    """Warnings about metrics that are biased because the smallest set has only n images. Empty if n is enough."""
    if n > num_features:
        return []
    reasons = dict.fromkeys(metric.caution for metric in METRICS if metric.caution)
    return [f"n = {n:,} is not above the {num_features:,} features: {reason}" for reason in reasons]


def protocol_remarks(n: int) -> list[str]:
    """Explanations of the metrics that others compute differently; n is the size of the smallest set."""
    return [
        f"KID is the mean over {KID_SUBSETS} random subsets of at most {kid_subset_size(n)} images, and its spread is "
        "their standard deviation; the classifier has seen none of the images in this table",
        "precision, recall, density and coverage use features standardized by the held-out images, so they can't be "
        "compared with figures elsewhere; memorization is searched for in each image and in its mirror image",
    ]
