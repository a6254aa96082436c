"""The procedural flowers of `flower_ldm.synthetic`: reproducible, no class like another, the same at every size."""

from dataclasses import astuple

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from flower_ldm.errors import InputError
from flower_ldm.synthetic import CLASS_NAMES, FORMS, PALETTES, flower_design, synthetic_flower


def mean_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference of two uint8 images, in levels."""
    return float(np.abs(first.astype(np.float32) - second.astype(np.float32)).mean())


@pytest.mark.parametrize("resolution", [16, 32, 50, 64, 96])
def test_is_square_rgb_uint8_at_every_resolution(resolution):
    flower = synthetic_flower(3, 0, resolution=resolution)
    assert flower.shape == (resolution, resolution, 3)
    assert flower.dtype == np.uint8


def test_same_arguments_give_the_same_flower_in_any_order():
    keys = [(class_index, index) for class_index in (0, 8, 101) for index in (0, 5)]
    forwards = {key: synthetic_flower(*key, seed=7) for key in keys}
    np.random.seed(123)  # the global generator must have no say
    backwards = {key: synthetic_flower(*key, seed=7) for key in reversed(keys)}
    for key in keys:
        np.testing.assert_array_equal(forwards[key], backwards[key])


def test_numpy_integers_are_the_same_as_python_ones():
    expected = synthetic_flower(4, 2, seed=1, resolution=32)
    np.testing.assert_array_equal(synthetic_flower(np.int64(4), np.int64(2), seed=1, resolution=32), expected)


def test_seed_index_and_class_each_change_the_flower():
    reference = synthetic_flower(2, 1, seed=0)
    for other in (synthetic_flower(2, 1, seed=1), synthetic_flower(2, 2, seed=0), synthetic_flower(3, 1, seed=0)):
        assert mean_difference(reference, other) > 5


def test_swapping_class_and_index_is_another_draw():
    # the background is drawn before anything that depends on the class, so equal streams would give equal corners
    assert mean_difference(synthetic_flower(1, 2)[:6, :6], synthetic_flower(2, 1)[:6, :6]) > 2


def test_every_class_has_its_own_name_form_and_palette():
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 102
    assert all(name == name.lower() and name.replace(" ", "").isalpha() for name in CLASS_NAMES)
    designs = [flower_design(class_index) for class_index in range(102)]
    assert len(set(designs)) == 102
    for name, (form, palette) in zip(CLASS_NAMES, designs, strict=True):
        assert name == f"{palette.adjective} {form.noun}"


def test_any_thirteen_classes_in_a_row_share_neither_form_nor_palette():
    for start in range(102 - 13 + 1):
        forms, palettes = zip(*(flower_design(start + step) for step in range(13)), strict=True)
        assert len(set(forms)) == len(set(palettes)) == 13


def test_forms_and_palettes_differ_in_more_than_their_names():
    assert len({astuple(form)[1:] for form in FORMS}) == len(FORMS)
    assert len({(form.petals, form.whorls, form.disc) for form in FORMS}) >= 12
    assert len({palette.body for palette in PALETTES}) == len(PALETTES)


def test_the_flower_is_the_same_at_every_resolution():
    for class_index in range(13):
        flower = synthetic_flower(class_index, 4, resolution=64)
        halved = np.asarray(Image.fromarray(synthetic_flower(class_index, 4, resolution=128)).reduce(2))
        assert mean_difference(flower, halved) < 2
        quartered = np.asarray(Image.fromarray(flower).reduce(2))
        assert mean_difference(synthetic_flower(class_index, 4, resolution=32), quartered) < 2


def test_images_are_neither_dark_nor_burnt_out():
    flowers = np.stack([synthetic_flower(class_index, 0) for class_index in range(102)])
    brightness = flowers.mean(axis=(1, 2, 3))
    assert brightness.min() > 25
    assert brightness.max() < 220
    assert ((flowers == 255).all(axis=-1)).mean() < 0.02


def labeled_flowers(num_classes: int, indices: range, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of fresh flowers, (N, D), and their classes, (N,).

    Features: color by distance from the middle, which no rotation changes, and contrast on the same rings.
    """
    line = np.linspace(-1, 1, 32)
    ring = np.minimum(np.hypot(*np.meshgrid(line, line)) * 6, 6).astype(int).ravel()
    members = np.stack([ring == number for number in range(6)]).astype(np.float64)
    members /= members.sum(axis=1, keepdims=True)
    features, labels = [], []
    for class_index in range(num_classes):
        for index in indices:
            pixels = synthetic_flower(class_index, index, seed=seed, resolution=32).reshape(-1, 3) / 255.0
            mean = members @ pixels
            deviation = np.sqrt(np.maximum(members @ pixels**2 - mean**2, 0))
            features.append(np.concatenate([mean, deviation]).ravel())
            labels.append(class_index)
    return np.array(features), np.array(labels)


def test_classes_can_be_told_apart_on_fresh_flowers():
    train_features, train_labels = labeled_flowers(10, range(40))
    fresh_features, fresh_labels = labeled_flowers(10, range(1000, 1020), seed=1)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    classifier.fit(train_features, train_labels)
    accuracy = classifier.score(fresh_features, fresh_labels)
    assert accuracy > 0.95


@pytest.mark.parametrize("class_index", [-1, 102])
def test_unknown_class_is_named(class_index):
    with pytest.raises(InputError, match=f"class {class_index}: .* 0 to 101"):
        synthetic_flower(class_index, 0)


@pytest.mark.parametrize("resolution", [0, 15, 513])
def test_bad_resolution_is_named(resolution):
    with pytest.raises(InputError, match=f"resolution {resolution}: .* 16 to 512"):
        synthetic_flower(0, 0, resolution=resolution)


@pytest.mark.parametrize(("index", "seed"), [(-1, 0), (0, -1)])
def test_negative_index_or_seed_is_named(index, seed):
    with pytest.raises(InputError, match=f"index {index}, seed {seed}"):
        synthetic_flower(0, index, seed=seed)
