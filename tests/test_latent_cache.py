"""`flower_ldm.latent_cache`: a cache is what the autoencoder gives, is reused, is never used when stale or torn, and
`LatentDataset` draws from it by (seed, epoch, image index) alone.

Real tiny autoencoders, ours and diffusers' own, and real synthetic flowers.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from flower_ldm import latent_cache
from flower_ldm.data import DataOptions, ImageDataset, TrainingSampler, keep_batch
from flower_ldm.errors import InputError
from flower_ldm.latent_cache import LatentCache, LatentDataset, cache_key, cache_path, load_or_build_latent_cache
from flower_ldm.models.autoencoder_flower import FlowerAutoencoderKL


def make_dataset(resolution: int = 16, classes: Sequence[int] = (0, 1, 2)) -> ImageDataset:
    """Nine flowers of three classes."""
    return DataOptions("synthetic", resolution=resolution, classes=classes, images_per_class=3).load()[0]


def make_vae(kind: str = "flower") -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "flower":
        vae = FlowerAutoencoderKL(latent_channels=4, block_out_channels=(8, 8), patch_size=2, sample_size=16)
    else:
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16, **blocks)
    return vae.eval()


@pytest.fixture(scope="module")
def dataset() -> ImageDataset:
    return make_dataset()


@pytest.fixture
def vae() -> torch.nn.Module:
    return make_vae()


def build(vae: torch.nn.Module, dataset: ImageDataset, cache_dir: Path, **options) -> LatentCache:
    return load_or_build_latent_cache(vae, dataset, cache_dir, device="cpu", batch_size=4, **options)


def assert_same(first: LatentCache, second: LatentCache) -> None:
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    assert first.class_names == second.class_names


# Building and reading


@pytest.mark.parametrize("kind", ["flower", "stock"])
def test_holds_the_posteriors_of_each_image_and_its_flip(kind, dataset, tmp_path):
    vae = make_vae(kind)
    cache = build(vae, dataset, tmp_path)
    images = dataset.__getitems__(list(range(len(dataset))))["images"]
    for side, pixels in enumerate([images, images.flip(-1)]):
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        torch.testing.assert_close(cache.mean[:, side].float(), posterior.mean, rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(cache.std[:, side].float(), posterior.std, rtol=2e-3, atol=2e-4)
    assert (cache.mean[:, 0] - cache.mean[:, 1]).abs().max() > 0.01  # a flip that matters
    assert cache.mean.dtype == cache.std.dtype == torch.float16
    assert torch.equal(cache.labels, dataset.labels) and cache.class_names == dataset.class_names


def test_autocast_gives_nearly_the_same(vae, dataset, tmp_path):
    plain = build(vae, dataset, tmp_path / "plain")
    cast = build(vae, dataset, tmp_path / "cast", autocast_dtype=torch.bfloat16)
    torch.testing.assert_close(cast.mean, plain.mean, rtol=0.05, atol=0.05)
    assert not torch.equal(cast.mean, plain.mean)


def test_second_time_is_read_and_not_encoded(vae, dataset, tmp_path, capsys):
    built = build(vae, dataset, tmp_path)
    [path] = tmp_path.iterdir()  # one file, nothing unfinished beside it
    before = path.stat()
    same_images = make_dataset()
    capsys.readouterr()
    read = build(make_vae(), same_images, tmp_path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert_same(built, read)
    assert capsys.readouterr() == ("", "")  # no message, no progress bar


def test_header_tells_what_the_file_is(vae, dataset, tmp_path):
    build(vae, dataset, tmp_path)
    with safe_open(cache_path(tmp_path, dataset), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["key"] == cache_key(vae, dataset)
    assert json.loads(metadata["class_names"]) == dataset.class_names


def test_training_and_validation_images_have_their_own_files(tmp_path):
    train, val = DataOptions("synthetic", resolution=16, classes=[0], images_per_class=2).load()
    assert cache_path(tmp_path, train) != cache_path(tmp_path, val)


def test_any_data_set_name_is_a_file_name(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "name", "../some one/flowers: a set")
    path = cache_path(tmp_path, dataset)
    assert path.parent == tmp_path and "some-one-flowers-a-set" in path.name


# Stale


@pytest.mark.parametrize("changed", ["weights", "images", "labels", "size"])
def test_stale_cache_is_rebuilt_with_a_message(changed, vae, dataset, tmp_path, capsys):
    stale = build(vae, dataset, tmp_path)
    if changed == "weights":
        with torch.no_grad():
            vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    else:
        other = {"images": {"classes": (3, 4, 5)}, "labels": {"classes": (2, 0, 1)}, "size": {"resolution": 24}}
        dataset = make_dataset(**other[changed])
    capsys.readouterr()
    rebuilt = build(vae, dataset, tmp_path)
    message = capsys.readouterr().out
    assert str(cache_path(tmp_path, dataset)) in message and "another model" in message
    assert not all(torch.equal(tensor, stale.tensors()[name]) for name, tensor in rebuilt.tensors().items())
    assert_same(rebuilt, build(vae, dataset, tmp_path / "fresh"))
    assert_same(rebuilt, build(vae, dataset, tmp_path))


def test_key_depends_on_all_weights_and_the_config_but_not_on_measured_statistics(vae, dataset):
    key = cache_key(vae, dataset)
    assert cache_key(make_vae(), dataset) == key
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[2.0] * 4)
    assert cache_key(vae, dataset) == key
    vae.register_to_config(sample_size=32)
    assert cache_key(vae, dataset) != key
    assert cache_key(make_vae("stock"), dataset) != key
    assert cache_key(make_vae().half(), dataset) != key
    for name, parameter in vae.named_parameters():
        before = cache_key(vae, dataset)
        with torch.no_grad():
            parameter.view(-1)[-1] += 0.1
        assert cache_key(vae, dataset) != before, name


def test_key_survives_saving_and_loading(vae, dataset, tmp_path):
    vae.save_pretrained(tmp_path)
    assert cache_key(FlowerAutoencoderKL.from_pretrained(tmp_path), dataset) == cache_key(vae, dataset)


# Torn or damaged


def truncate(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def rewrite(path: Path, **tensors: torch.Tensor | None) -> None:
    """Other tensors (`None`: none) under the same key, with a digest that agrees."""
    with safe_open(path, framework="pt") as file:
        metadata, old = file.metadata(), {name: file.get_tensor(name).clone() for name in ("mean", "std", "labels")}
    new = {name: tensor for name, tensor in {**old, **tensors}.items() if tensor is not None}
    save_file(new, path, metadata={**metadata, "digest": latent_cache.tensors_digest(new)})


DAMAGES = {
    "empty": lambda path: truncate(path, 0),
    "cut in the header": lambda path: truncate(path, 0.02),
    "cut in the tensors": lambda path: truncate(path, 0.7),
    "last bytes missing": lambda path: truncate(path, 0.9999),
    "header length": lambda path: flip_byte(path, 0),
    "header text": lambda path: flip_byte(path, 9),
    "one byte of a tensor": lambda path: flip_byte(path, -100),
    "zeros where the disk lost a page": lambda path: path.write_bytes(path.read_bytes()[:-4000] + bytes(4000)),
    "something else": lambda path: path.write_text("<html>not found</html>"),
    "missing tensor": lambda path: rewrite(path, std=None),
    "not finite": lambda path: rewrite(path, mean=torch.full((9, 2, 4, 4, 4), float("nan"), dtype=torch.float16)),
    "labels beyond the classes": lambda path: rewrite(path, labels=torch.full((9,), 10**6)),
    "fewer images than labels": lambda path: rewrite(path, mean=torch.zeros(8, 2, 4, 4, 4, dtype=torch.float16)),
    "pixels": lambda path: rewrite(path, mean=torch.zeros(9, 2, 4, 4), std=torch.zeros(9, 2, 4, 4)),
    "a pipe": lambda path: [path.unlink(), os.mkfifo(path)],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_cache_is_rebuilt_with_a_message(damage, vae, dataset, tmp_path, capsys):
    whole = build(vae, dataset, tmp_path)
    path = cache_path(tmp_path, dataset)
    damage(path)
    capsys.readouterr()
    is_file = path.is_file()
    assert_same(build(vae, dataset, tmp_path), whole)
    assert ("encoding the images again" in capsys.readouterr().out) == is_file
    assert_same(build(vae, dataset, tmp_path), whole)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("bad", [float("nan"), 1e6])
def test_latents_that_cannot_be_stored_are_refused_and_the_old_file_stays(bad, vae, dataset, tmp_path):
    build(vae, dataset, tmp_path)
    content = cache_path(tmp_path, dataset).read_bytes()
    with torch.no_grad():
        vae.encoder.conv_out.bias[0] = bad
    with pytest.raises(InputError, match=r"--autoencoder: its latents of images 0 to 3 .* not finite or too large"):
        build(vae, dataset, tmp_path)
    assert cache_path(tmp_path, dataset).read_bytes() == content
    assert list(tmp_path.iterdir()) == [cache_path(tmp_path, dataset)]


def test_folder_that_cannot_be_written_is_named(vae, dataset, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="/file/.*can't be written: .*; take away what is in its place"):
        build(vae, dataset, tmp_path / "file")


def test_nothing_unfinished_is_left_behind(vae, dataset, tmp_path):
    path = cache_path(tmp_path, dataset)
    (path / "in the way").mkdir(parents=True)
    with pytest.raises(InputError, match="safetensors can't be written: "):
        build(vae, dataset, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_rebuilding_leaves_whoever_reads_the_old_file_in_peace(vae, dataset, tmp_path):
    before = build(vae, dataset, tmp_path)
    in_use = build(vae, dataset, tmp_path)  # mapped from the file
    with torch.no_grad():
        vae.encoder.conv_out.bias += 1
    assert not torch.equal(build(vae, dataset, tmp_path).mean, before.mean)
    assert_same(in_use, before)


# Drawing from it

LATENTS_MEAN, LATENTS_STD = [1.0, -1.0], [2.0, 4.0]


@pytest.fixture
def latents() -> LatentDataset:
    """Six images with raw latents of mean 10 i, flipped -10 i, and std 1 + i / 4."""
    level = torch.arange(6.0).view(6, 1, 1, 1, 1).expand(6, 2, 2, 8, 8)
    mean = 10 * level * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1, 1)
    cache = LatentCache(mean.half(), (1 + level / 4).half(), torch.arange(6) % 3, ["a", "b", "c"])
    return LatentDataset(cache, LATENTS_MEAN, LATENTS_STD, seed=5)


def test_item_is_complete(latents):
    batch = latents.__getitems__([(0, 4), (0, 0), (3, 5)])
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "latents": ((3, 2, 8, 8), torch.float32),
        "noise": ((3, 2, 8, 8), torch.float32),
        "uniforms": ((3, 2), torch.float32),
        "class_labels": ((3,), torch.int64),
        "index": ((3,), torch.int64),
    }
    assert batch["index"].tolist() == [4, 0, 5] and batch["class_labels"].tolist() == [1, 0, 2]
    assert len(latents) == 6


def test_sample_follows_the_posterior_of_image_or_flip(latents):
    batch = latents.__getitems__([(epoch, 4) for epoch in range(400)])
    shift, scale = (torch.tensor(values).view(2, 1, 1) for values in (LATENTS_MEAN, LATENTS_STD))
    raw_latents = batch["latents"] * scale + shift
    flipped = raw_latents.mean(dim=(1, 2, 3)) < 0
    assert 160 < flipped.sum() < 240
    for side, mean in ((~flipped, 40.0), (flipped, -40.0)):
        for channel in range(2):
            assert raw_latents[side, channel].mean().item() == pytest.approx(mean, abs=0.1)
            assert raw_latents[side, channel].std().item() == pytest.approx(2.0, rel=0.03)
        assert batch["uniforms"][side].mean(dim=0).tolist() == pytest.approx(
            [0.5, 0.5], abs=0.06
        )  # flip tells nothing


def test_posterior_means_are_normalized_and_not_flipped(latents):
    means = latents.posterior_means([2, 0])
    expected = latents.cache.mean[[2, 0], 0].float()
    expected = (expected - latents.latents_mean) / latents.latents_std
    assert means.dtype == torch.float32 and torch.equal(means, expected)
    assert torch.equal(latents.posterior_means(np.array([2, 0])), means)


def test_noise_and_uniforms_are_what_they_are_called(latents):
    batch = latents.__getitems__([(epoch, index) for epoch in range(200) for index in range(6)])
    noise, uniforms = batch["noise"], batch["uniforms"]
    assert abs(noise.mean()) < 0.02 and noise.std().item() == pytest.approx(1, rel=0.02)
    assert uniforms.min() >= 0 and uniforms.max() < 1
    for quantile in (0.1, 0.5, 0.9):
        assert (uniforms < quantile).float().mean(dim=0).tolist() == pytest.approx([quantile] * 2, abs=0.04)
    residual = (batch["latents"] - batch["latents"].mean(dim=(1, 2, 3), keepdim=True)).flatten()
    drawn = torch.stack([residual, noise.flatten()])
    assert abs(torch.corrcoef(drawn)[0, 1]) < 0.02  # the diffusion's noise is not the posterior's
    assert abs(torch.corrcoef(uniforms.T)[0, 1]) < 0.1


def test_item_depends_on_seed_epoch_and_index_alone(latents):
    alone = latents[(2, 3)]
    amid = latents.__getitems__([(2, 5), (1, 3), (2, 3), (2, 0)])
    again = LatentDataset(latents.cache, LATENTS_MEAN, LATENTS_STD, seed=5)[(2, 3)]
    for name, value in alone.items():
        assert torch.equal(value, amid[name][2]) and torch.equal(value, again[name]), name
    other_seed = LatentDataset(latents.cache, LATENTS_MEAN, LATENTS_STD, seed=6)[(2, 3)]
    for other in (other_seed, latents[(1, 3)], latents[(2, 2)]):
        for name in ("latents", "noise", "uniforms"):
            assert not torch.equal(alone[name], other[name]), name


def test_workers_give_what_the_main_process_gives(latents):
    def epoch(num_workers: int) -> list[dict[str, torch.Tensor]]:
        sampler = TrainingSampler(len(latents), seed=1, start=3 * len(latents), stop=4 * len(latents))
        options = {"batch_size": 2, "sampler": sampler, "collate_fn": keep_batch, "num_workers": num_workers}
        return list(DataLoader(latents, **options))

    for one, other in zip(epoch(0), epoch(2), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_statistics_of_another_number_of_channels_are_refused(latents):
    with pytest.raises(RuntimeError, match="shape"):
        LatentDataset(latents.cache, [0.0] * 3, [1.0] * 3, seed=0)
