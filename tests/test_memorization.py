"""`flower_ldm.memorization`: copies are found, by features and by pixels, and nothing else is."""

import numpy as np
import pytest
import torch
from PIL import Image

from flower_ldm import memorization
from flower_ldm.errors import InputError
from flower_ldm.memorization import TrainingNeighbors, memorized, nearest_two
from flower_ldm.metrics import memorization_rates
from flower_ldm.visualization import save_nearest_neighbors


def random_images(n: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def rows_of(images: np.ndarray) -> torch.Tensor:
    """Features of an image that are its pixels."""
    return torch.from_numpy(images).flatten(1).float()


def mirrored_rows_of(images: np.ndarray) -> torch.Tensor:
    return rows_of(images[:, :, ::-1].copy())


def test_nearest_two_are_the_nearest(monkeypatch):
    monkeypatch.setattr(memorization, "ROWS_AT_A_TIME", 8)
    rng = torch.Generator().manual_seed(0)
    queries, references = torch.randn(20, 6, generator=rng), torch.randn(50, 6, generator=rng)
    queries[3] = references[17]
    keys = torch.arange(10, 50)  # the first ones are left out
    distances, found = nearest_two(lambda k: queries[k], torch.arange(20), lambda k: references[k], keys)
    expected = (queries[:, None].double() - references[10:].double()).norm(dim=2).topk(2, largest=False)
    torch.testing.assert_close(distances.double(), expected.values, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, expected.indices + 10)
    assert distances[3, 0] == 0 and found[3, 0] == 17


def test_training_images_are_memorized_and_others_are_not():
    train, others = random_images(60), random_images(40, seed=1)
    neighbors = TrainingNeighbors(train, rows_of(train))
    found = neighbors.search(train, rows_of(train), mirrored_rows_of(train))
    assert memorization_rates(found) == {"n": 60, "feature_rate": 1, "pixel_rate": 1, "exact_duplicates": 60}
    assert found["pixel_keys"][:, 0].tolist() == found["feature_keys"][:, 0].tolist() == list(range(60))
    assert (found["pixel_distances"][:, 0] == 0).all()
    rates = memorization_rates(neighbors.search(others, rows_of(others), mirrored_rows_of(others)))
    assert rates == {"n": 40, "feature_rate": 0, "pixel_rate": 0, "exact_duplicates": 0}


def test_mirrored_copies_are_memorized_too():
    train = random_images(60)
    mirrored = train[:20, :, ::-1].copy()
    neighbors = TrainingNeighbors(train, rows_of(train))
    found = neighbors.search(mirrored, rows_of(mirrored), mirrored_rows_of(mirrored))
    assert memorization_rates(found) == {"n": 20, "feature_rate": 1, "pixel_rate": 1, "exact_duplicates": 20}
    assert found["pixel_keys"][:, 0].tolist() == found["feature_keys"][:, 0].tolist() == list(range(20))


def test_an_image_that_is_its_own_mirror_image_has_another_as_its_second():
    train = random_images(30)
    train[7] = train[7, :, ::-1] // 2 + train[7] // 2
    found = TrainingNeighbors(train).search(train)
    assert found["pixel_keys"][7, 0] == 7 and (found["pixel_keys"][:, 0] != found["pixel_keys"][:, 1]).all()
    assert (found["pixel_distances"][:, 1] > 1).all()


def test_near_copies_are_memorized_though_no_byte_is_the_same():
    train = random_images(60)
    copies = np.where(train[:20] > 127, train[:20] - 1, train[:20] + 1)
    neighbors = TrainingNeighbors(train, rows_of(train))
    rates = memorization_rates(neighbors.search(copies, rows_of(copies), mirrored_rows_of(copies)))
    assert rates == {"n": 20, "feature_rate": 1, "pixel_rate": 1, "exact_duplicates": 0}


def test_byte_identical_training_images_neither_hide_nor_fake_memorization():
    """With its twin as the second neighbor a near copy would have the ratio 1, and every exact one 0 / 0."""
    train = random_images(30)
    twins = np.concatenate([train, train[:10]])
    neighbors = TrainingNeighbors(twins, rows_of(twins))
    near = np.where(train[:10] > 127, train[:10] - 1, train[:10] + 1)
    found = neighbors.search(near, rows_of(near), mirrored_rows_of(near))
    assert memorization_rates(found)["feature_rate"] == memorization_rates(found)["pixel_rate"] == 1
    assert (found["pixel_keys"] < 30).all() and (found["pixel_distances"][:, 1] > 0).all()
    exact = memorization_rates(neighbors.search(train[:10], rows_of(train[:10]), mirrored_rows_of(train[:10])))
    assert exact == {"n": 10, "feature_rate": 1, "pixel_rate": 1, "exact_duplicates": 10}
    others = random_images(20, seed=1)
    assert memorization_rates(neighbors.search(others, rows_of(others), mirrored_rows_of(others)))["pixel_rate"] == 0


def test_the_one_third_rule():
    distances = torch.tensor([[1.0, 3.0], [1.0, 2.99], [0.0, 1.0], [0.0, 0.0], [2.0, 2.0]])
    assert memorized(distances).tolist() == [True, False, True, False, False]  # 0 of 0 says nothing


def test_memorization_needs_two_different_images():
    same = np.repeat(random_images(1), 5, axis=0)
    with pytest.raises(InputError, match="memorization needs at least 2 different training images"):
        TrainingNeighbors(same, rows_of(same))


def test_picture_shows_the_suspects_first(tmp_path):
    train = random_images(30, size=16) // 2 + 64  # no strong red in it
    samples = random_images(12, size=16, seed=1) // 2 + 64
    samples[7] = train[3]
    found = TrainingNeighbors(train, rows_of(train)).search(samples, rows_of(samples), mirrored_rows_of(samples))
    names = [f"a class with a long name {number}" for number in range(12)]
    save_nearest_neighbors(samples, names, train, found, tmp_path / "new" / "nearest_neighbours.png")
    picture = np.asarray(Image.open(tmp_path / "new" / "nearest_neighbours.png").convert("RGB")).astype(int)
    red = (picture[..., 0] > 170) & (picture[..., 1] < 60) & (picture[..., 2] < 70)
    columns = np.flatnonzero(red.any(axis=0))
    assert len(columns) > 5 and columns.max() < picture.shape[1] / 4  # the copy's caption, in the first column
    assert (tmp_path / "new" / "nearest_neighbours.png").stat().st_size < 2e6


def test_without_features_pixels_decide_alone(tmp_path):
    train = random_images(30)
    found = TrainingNeighbors(train).search(train[[4, 9]])
    assert found.keys() == {"pixel_distances", "pixel_keys", "is_copy"}
    assert found["pixel_keys"][:, 0].tolist() == [4, 9] and found["is_copy"].all()
    save_nearest_neighbors(train[[4, 9]], ["rose", "daisy"], train, found, tmp_path / "one.png")
    with_features = found | {f"feature_{name}": found[f"pixel_{name}"] for name in ("distances", "keys")}
    save_nearest_neighbors(train[[4, 9]], ["rose", "daisy"], train, with_features, tmp_path / "two.png")
    assert Image.open(tmp_path / "two.png").height > 1.8 * Image.open(tmp_path / "one.png").height
