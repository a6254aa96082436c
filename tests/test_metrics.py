"""flower_ldm/metrics.py: numbers on sets whose answer is known, and that each fact of a metric stands in its row."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

from flower_ldm import metrics
from flower_ldm.metrics import (
    MEMORIZATION_METRICS,
    METRICS,
    RECONSTRUCTION_METRICS,
    Comparison,
    cautions,
    class_accuracy,
    frechet_distance,
    informed_distance,
    kernel_distance,
    measure_set,
    memorization_distance,
    neighborhood_metrics,
    train_classifier,
)

ROOT = Path(__file__).parent.parent
KEYS = [
    "frechet_distance", "kid", "kid_std", "precision", "recall", "density", "coverage", "class_accuracy",
    "mifid",
]  # fmt: skip


def exact_gaussian(n: int, mean: torch.Tensor, covariance: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """`n` vectors whose sample mean and covariance are these, not merely expected to be."""
    noise = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise -= noise.mean(dim=0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(noise.T @ noise / (n - 1)))
    return noise @ whitening.T @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_two_gaussians():
    rng = torch.Generator().manual_seed(1)
    one, other = torch.randn(2, 5, 5, generator=rng, dtype=torch.float64)
    one, other = one @ one.T + torch.eye(5), other @ other.T + torch.eye(5)  # they don't commute
    mean = torch.arange(5, dtype=torch.float64)
    root = scipy.linalg.sqrtm((one @ other).numpy()).real
    expected = mean.square().sum() + one.trace() + other.trace() - 2 * np.trace(root)
    features = exact_gaussian(300, mean, one)
    reference = exact_gaussian(400, torch.zeros(5, dtype=torch.float64), other, seed=2)
    assert frechet_distance(features, reference) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(reference, features) == pytest.approx(float(expected), rel=1e-6)
    widths = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    wide = exact_gaussian(50, torch.zeros(3, dtype=torch.float64), torch.diag(widths**2))
    narrow = exact_gaussian(50, torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64), seed=3)
    assert frechet_distance(wide, narrow) == pytest.approx(0 + 1 + 4, rel=1e-6)  # sum of (sigma - 1)^2


def test_frechet_distance_of_a_set_to_itself_and_to_itself_moved():
    features = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))  # fewer than features: singular
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(features + 2, features) == pytest.approx(60 * 4, rel=1e-4)


def test_frechet_distance_is_biased_in_n():
    rng = torch.Generator().manual_seed(0)
    few, many, reference = (torch.randn(n, 32, generator=rng) for n in (100, 2000, 2000))
    assert frechet_distance(few, reference) > 5 * frechet_distance(many, reference) > 0


def test_kernel_distance_of_two_points():
    """All features at a, all references at b: k(a, a) + k(b, b) - 2 k(a, b) with k = (x.y / 2 + 1)^3, no spread."""
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    mean, std = kernel_distance(a.expand(20, 2), b.expand(30, 2))
    assert mean == pytest.approx((4 / 2 + 1) ** 3 + (16 / 2 + 1) ** 3 - 2 * 1)
    assert std == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_unbiased_and_keeps_the_random_state():
    rng = torch.Generator().manual_seed(0)
    few, many, moved = torch.randn(100, 16, generator=rng), torch.randn(2000, 16, generator=rng), 0.5
    state = torch.get_rng_state()
    mean, std = kernel_distance(few, many)
    assert torch.equal(torch.get_rng_state(), state)
    assert (mean, std) == kernel_distance(few, many)
    assert abs(mean) < std
    far, spread = kernel_distance(few + moved, many)
    assert far > 5 * spread > 0


def brute_force(features: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The definitions, one pair at a time."""

    def radius(points, index, k):
        return sorted(np.linalg.norm(points - points[index], axis=1))[k]

    def near(x, points, k):
        return [np.linalg.norm(x - point) <= radius(points, index, k) for index, point in enumerate(points)]

    inside = np.array([near(x, reference, 5) for x in features])
    return {
        "precision": np.mean([any(near(x, reference, 3)) for x in features]),
        "recall": np.mean([any(near(x, features, 3)) for x in reference]),
        "density": inside.sum() / (5 * len(features)),
        "coverage": inside.any(axis=0).mean(),
    }


def test_neighborhood_metrics_are_their_definitions(monkeypatch):
    monkeypatch.setattr(metrics, "ROWS_AT_A_TIME", 7)  # several blocks, the last one shorter
    rng = np.random.default_rng(0)
    features, reference = rng.normal(0.7, 1.3, size=(30, 4)), rng.normal(size=(40, 4))
    stretch = np.array([1.0, 100.0, 0.01, 3.0])  # says nothing about neighbors: deviations are evened out
    measured = neighborhood_metrics(torch.from_numpy(features * stretch), torch.from_numpy(reference * stretch))
    mean, deviation = reference.mean(axis=0), reference.std(axis=0)
    assert measured == pytest.approx(brute_force((features - mean) / deviation, (reference - mean) / deviation))
    assert all(0 < value < 1 for value in measured.values())


def test_neighborhood_metrics_of_identical_disjoint_and_one_sided_sets():
    rng = torch.Generator().manual_seed(0)
    left, right = torch.randn(60, 3, generator=rng), torch.randn(60, 3, generator=rng) + 100
    same = neighborhood_metrics(left, left)
    in_six = pytest.approx(6 / 5, abs=0.02)  # itself and five; the fifth is as far as the radius, up to rounding
    assert same == {"precision": 1, "recall": 1, "density": in_six, "coverage": 1}
    assert neighborhood_metrics(right, left) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    half = neighborhood_metrics(left, torch.cat([left, right]))  # one of two modes is missing
    assert half == {"precision": 1, "recall": 0.5, "density": in_six, "coverage": 0.5}


# Memorization-informed distance


def test_memorization_distance_by_hand(monkeypatch):
    """The first lies in the direction of a training image, the second at 45 degrees to one, the third against one."""
    features, training = torch.tensor([[1.0, 0], [0, 3], [-2, -2]]), torch.tensor([[2.0, 0], [5, 5], [9, 0], [7, 0]])
    by_hand = (0 + (1 - 0.5**0.5) + 0) / 3  # of |cos|: what points the other way counts as near
    assert memorization_distance(features, training) == pytest.approx(by_hand)
    monkeypatch.setattr(metrics, "ROWS_AT_A_TIME", 3)  # several blocks, the last one shorter
    assert memorization_distance(features, training) == pytest.approx(by_hand)


@pytest.mark.parametrize(("spread", "penalized"), [(0.1, True), (5.0, False)])
def test_informed_distance_is_torchmetrics_where_held_out_images_are_the_training_images(spread, penalized):
    rng = torch.Generator().manual_seed(0)
    training = torch.randn(40, 16, generator=rng)
    features = training[:25] + spread * torch.randn(25, 16, generator=rng)
    theirs = MemorizationInformedFrechetInceptionDistance(feature=nn.Identity())
    theirs.update(features.double(), real=True)  # its mean is over what it takes for real
    theirs.update(training.double(), real=False)
    frechet = frechet_distance(features, training)
    ours = informed_distance(frechet, features, training)
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-6)
    assert (ours > 10 * frechet) if penalized else (ours == frechet)


def test_a_few_of_many_training_images_are_copies_too():
    """They are what torchmetrics passes over: seen from the other training images, no copy is near."""
    training = torch.randn(700, 16, generator=torch.Generator().manual_seed(0))
    copies = training[:100]
    theirs = MemorizationInformedFrechetInceptionDistance(feature=nn.Identity())
    theirs.update(training.double(), real=True)
    theirs.update(copies.double(), real=False)
    frechet = frechet_distance(copies, training)
    assert theirs.compute().item() == pytest.approx(frechet)
    assert informed_distance(frechet, copies, training) > 1000 * frechet


def test_mifid_penalizes_the_training_images_and_no_others():
    rng = torch.Generator().manual_seed(0)
    features, training, reference = (torch.randn(50, 16, generator=rng) for _ in range(3))
    labels = torch.zeros(50)
    far = measure_set(Comparison(features, labels, reference, training, classifier=None))
    same = measure_set(Comparison(training, labels, reference, training, classifier=None))
    assert far["mifid"] == far["frechet_distance"] > 0
    assert same["mifid"] > 1000 * same["frechet_distance"] > 0


# Classes


def clusters(n: int, seed: int, num_classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % num_classes
    return 10 * torch.eye(num_classes)[labels] + torch.randn(n, num_classes, generator=rng), labels


def test_class_accuracy_knows_classes_and_is_chance_where_there_are_none():
    features, labels = clusters(500, seed=0, num_classes=20)
    others, other_labels = clusters(500, seed=1, num_classes=20)
    classifier = train_classifier(features, labels)
    assert class_accuracy(classifier, others, other_labels) > 0.99
    shuffled = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert class_accuracy(classifier, others, other_labels[shuffled]) < 0.08  # 1 in 20, and 3 deviations
    fooled = train_classifier(features, labels[shuffled])
    assert class_accuracy(fooled, others, other_labels) < 0.25  # chance is 1 in 20, of 20 clusters
    assert train_classifier(features, torch.zeros(500)) is None
    assert class_accuracy(None, others, other_labels) is None


def test_the_same_distribution_beats_noise():
    features, labels = clusters(200, seed=0)
    reference, _ = clusters(200, seed=1)
    classifier = train_classifier(*clusters(400, seed=2))
    noise = 20 * torch.randn(200, 5, generator=torch.Generator().manual_seed(3))
    real, bad = (
        measure_set(Comparison(rows, labels, reference, training=clusters(400, seed=2)[0], classifier=classifier))
        for rows in (features, noise)
    )
    assert list(real) == ["n", "n_reference", *KEYS]
    assert (real["n"], real["n_reference"]) == (200, 200)
    assert bad["frechet_distance"] > 100 * real["frechet_distance"]
    assert bad["kid"] > 100 * abs(real["kid"]) and abs(real["kid"]) < 3 * real["kid_std"]
    for name in ("precision", "density", "class_accuracy"):
        assert real[name] > 0.8 > 0.5 > bad[name]


# Rows


def test_neighborhoods_are_computed_once(monkeypatch):
    calls = []
    compute = metrics.neighborhood_metrics
    monkeypatch.setattr(metrics, "neighborhood_metrics", lambda *sets: calls.append(1) or compute(*sets))
    (features, labels), (reference, _) = clusters(60, seed=0), clusters(60, seed=1)
    measure_set(Comparison(features, labels, reference, training=reference, classifier=None))
    assert calls == [1]
    measure_set(Comparison(features, labels, reference, training=reference, classifier=None), swept_only=True)
    assert calls == [1, 1]


def test_few_images_are_a_reason_for_caution():
    [sentence] = cautions(1280, 1280)
    assert sentence.startswith("n = 1,280 is not above the 1,280 features: covariances are singular")
    assert cautions(1281, 1280) == []


def literals(tree: ast.Module) -> list[str]:
    """The texts of a file, but for docstrings."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


def test_a_key_stands_in_its_row_alone():
    """Whoever adds a metric, or renames one, has one file to know."""
    shown = {f"flower_ldm/{name}.py" for name in ("evaluation", "report", "report_curves", "model_card")}
    product = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.py"), *ROOT.glob("flower_ldm/**/*.py"))]
    assert shown < set(product) and "flower_ldm/metrics.py" in product
    keys = {metric.key for metric in METRICS} | {metric.spread_key for metric in METRICS if metric.has_spread}
    others = {row.key for row in (*RECONSTRUCTION_METRICS, *MEMORIZATION_METRICS)} - {""}
    assert keys == set(KEYS) and {"psnr", "head_accuracy", "pixel_rate"} < others
    for name in product:
        own = keys | others if name in shown else keys
        texts = literals(ast.parse((ROOT / name).read_text("utf-8")))
        found = {
            key for key in own for text in texts if key == text or ("_" in key and re.search(rf"\b{key}\b", text))
        }
        assert found == ({metric.key for metric in METRICS} if name == "flower_ldm/metrics.py" else set()), name
    page = (ROOT / "flower_ldm/report_page/page.html").read_text("utf-8")
    assert not [key for key in keys | others if re.search(rf"\b{key}\b", page)]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
def test_a_row_says_all_that_is_shown(metric):
    assert metric.title and metric.short and metric.hub_type and metric.decimals is not None
    assert re.fullmatch(r"[A-Z].*[^.]\.", metric.note) and metric.better in ("lower", "higher")
