"""Each metric once: how samples compare with held-out images by their features."""

import warnings
from collections.abc import Sequence

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

PRECISION_NEIGHBORS, DENSITY_NEIGHBORS = 3, 5  # as in the papers
MIN_IMAGES = DENSITY_NEIGHBORS + 1  # an image is no neighbor of its own
KID_SUBSETS, KID_MAX_SUBSET = 100, 500
ROWS_AT_A_TIME = 1024  # of a distance matrix


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


def kernel_distance(features: torch.Tensor, reference: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """KID, the unbiased squared MMD with the kernel (x.y / D + 1)^3, and its spread (Binkowski et al. 2018, sec. 4).

    Mean and standard deviation over 100 subsets of half the smaller set, at most 500 images: subsets of nearly all
    images would share most of them and hide the spread.
    """
    subset_size = min(KID_MAX_SUBSET, min(len(features), len(reference)) // 2)
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


def measure_set(
    features: torch.Tensor,
    class_labels: torch.Tensor,
    reference: torch.Tensor,
    classifier: Pipeline | None,
    neighborhoods: bool = True,
) -> dict[str, float | int | None]:
    """All that `metrics.json` says of one set of images, by its features `(N, D)`, against a reference `(M, D)`."""
    kid, kid_std = kernel_distance(features, reference)
    return {
        "n": len(features),
        "n_reference": len(reference),
        "frechet_distance": frechet_distance(features, reference),
        "kid": kid,
        "kid_std": kid_std,
        **(neighborhood_metrics(features, reference) if neighborhoods else {}),
        "class_accuracy": class_accuracy(classifier, features, class_labels),
    }
