"""Feature networks by name, and features in a cache."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Payload
from torch import nn

from flower_ldm import features as features_module
from flower_ldm.data import DataOptions
from flower_ldm.errors import InputError
from flower_ldm.features import (
    FeatureNetwork,
    clip,
    dinov2,
    extract_features,
    inception,
    load_feature_network,
    load_or_extract_features,
    torchscript,
)
from flower_ldm.files import UnusableCacheError, read_tensors


class ChannelMeans(nn.Module):
    """Mean and deviation of each channel: 6 features that can be worked out by hand."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = images.float().flatten(2)
        return torch.cat([values.mean(dim=2), values.std(dim=2)], dim=1)


class Sized(ChannelMeans):
    def __init__(self, input_size: int):
        super().__init__()
        self.input_size = input_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        return images.float().mean(dim=1).flatten(1)


class LikeNvidias(nn.Module):
    """The shape of the forward that inception-2015-12-05.pt has."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        means = img.float().mean(dim=(2, 3))
        return means if return_features else means.softmax(dim=1)


def save_script(module: nn.Module, path: Path) -> str:
    torch.jit.script(module).save(str(path))
    return str(path)


def random_images(n: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


# Networks


def test_default_network_is_the_imagenet_one_and_needs_no_connection():
    """Its features lead to the right classes by its own last layer: weights, normalization and pooling are right."""
    network = load_feature_network("efficientnet-lite0")
    assert (network.name, network.input_size) == ("efficientnet-lite0", 128)
    images = random_images(3, 64)
    features = extract_features(network, images)
    assert features.shape == (3, 1280) and features.dtype == torch.float32
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    pixels = nn.functional.interpolate(pixels, size=128, mode="bicubic", antialias=True).clamp(0, 255)
    with torch.no_grad():
        whole = network.module.network((pixels - 127) / 128)
        logits = network.module.network._fc(features)
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    flat = extract_features(network, np.full((1, 64, 64, 3), 127, dtype=np.uint8))
    assert (features - flat).norm(dim=1).min() > 1


def test_torchscript_file_gets_uint8_at_the_size_that_it_asks_for(tmp_path):
    images = random_images(5, 16)
    as_they_are = load_feature_network(save_script(ChannelMeans(), tmp_path / "means.pt"))
    assert (as_they_are.name, as_they_are.input_size) == ("means.pt", None)
    means = extract_features(as_they_are, images, batch_size=2)
    np.testing.assert_allclose(means[:, :3], images.mean(axis=(1, 2)), rtol=1e-5)
    scaled = load_feature_network(save_script(Sized(8), tmp_path / "sized.pt"))
    assert scaled.input_size == 8
    assert extract_features(scaled, images).shape == (5, 64)
    assert as_they_are.digest != scaled.digest


def test_file_in_nvidias_form_gives_features_and_not_classes(tmp_path):
    network = load_feature_network(save_script(LikeNvidias(), tmp_path / "nvidia.pt"))
    images = random_images(2, 8)
    np.testing.assert_allclose(extract_features(network, images), images.mean(axis=(1, 2)), rtol=1e-5)


def test_scaling_is_antialiased():
    """A checkerboard of single pixels shrinks to gray; without antialiasing it would stay black or white."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    images = np.broadcast_to(board[None, :, :, None], (1, 64, 64, 3)).copy()
    network = FeatureNetwork("small", nn.Flatten(), 16, mean=[0.0] * 3, std=[1.0] * 3)
    small = extract_features(network, images).view(3, 16, 16)[:, 2:-2, 2:-2]
    assert (small - 127.5).abs().max() < 3


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_transformer_networks_load_from_a_repository(name, tmp_path):
    import transformers

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if name == "dinov2":
        config = transformers.Dinov2Config(**small, image_size=224, patch_size=56)
        model, loader, size = transformers.Dinov2Model(config), dinov2, 32
    else:
        config = transformers.CLIPVisionConfig(**small, image_size=224, patch_size=56, projection_dim=8)
        model, loader, size = transformers.CLIPVisionModelWithProjection(config), clip, 8
    model.save_pretrained(tmp_path / name)
    network = loader(str(tmp_path / name))
    assert (network.name, network.input_size) == (name, 224)
    images = random_images(2, 32)
    features = extract_features(network, images)
    assert features.shape == (2, size)
    mean, std = [torch.tensor(values).view(1, 3, 1, 1) for values in (
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if name == "dinov2" else
        ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )]  # fmt: skip
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    pixels = nn.functional.interpolate(pixels, size=224, mode="bicubic", antialias=True).clamp(0, 255) / 255
    with torch.no_grad():
        output = model.eval()(pixel_values=(pixels - mean) / std)
    expected = output.last_hidden_state[:, 0] if name == "dinov2" else output.image_embeds
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


def test_inception_is_torch_fidelitys(tmp_path, monkeypatch):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    state = {}
    monkeypatch.setattr(  # the real network with the weights that it is built with
        fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, _: state.update(self.state_dict())
    )
    torch.save({}, tmp_path / "weights.pth")
    network = inception(str(tmp_path / "weights.pth"))
    assert (network.name, network.input_size, len(state) > 100) == ("inception", 299, True)
    assert extract_features(network, random_images(2, 32)).shape == (2, 2048)


def test_inceptions_weights_run_nothing(tmp_path):
    """torch-fidelity unpickles whatever it is given."""
    pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.save({"a": Payload(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights"):
        inception(str(tmp_path / "weights.pth"))
    assert not (tmp_path / "ran").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("name", ["inception", "dinov2", "clip"])
def test_network_that_cannot_be_had_is_an_error_that_names_others(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    if name != "inception":
        repository = f"nobody/no-such-{name}"
        loader = {"dinov2": dinov2, "clip": clip}[name]
        monkeypatch.setitem(features_module.NETWORKS, name, lambda: loader(repository))
    with pytest.raises(InputError, match=f"--features {name}.*efficientnet-lite0.*TorchScript") as error:
        load_feature_network(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_bad_networks_are_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("no network")
    with pytest.raises(InputError, match="notes.txt is not a TorchScript file") as error:
        load_feature_network(str(tmp_path / "notes.txt"))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="--features resnet: choose efficientnet-lite0, inception, dinov2, clip, or"):
        load_feature_network("resnet")
    network = torchscript(Path(save_script(nn.Linear(7, 2), tmp_path / "linear.pt")))
    with pytest.raises(InputError, match="linear.pt doesn't take uint8 images") as error:
        extract_features(network, random_images(2, 8))
    assert "\n" not in str(error.value)
    for module, gives in ((nn.Identity(), r"\(2, 3, 8, 8\)"), (NotANumber(), r"\(2, 3\)")):
        network = torchscript(Path(save_script(module, tmp_path / "wrong.pt")))
        with pytest.raises(InputError, match=f"wrong.pt must give finite features .* but gives {gives}"):
            extract_features(network, random_images(2, 8))


class NotANumber(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3)) / 0 - images.float().mean(dim=(2, 3)) / 0


# The cache


def test_features_are_cached_and_a_stale_or_torn_file_is_made_anew(tmp_path, capsys):
    small, _ = DataOptions("synthetic", resolution=16, images_per_class=3, classes=[0, 1]).load(show_progress=False)
    other, _ = DataOptions("synthetic", resolution=16, images_per_class=4, classes=[0, 1]).load(show_progress=False)
    network = load_feature_network(save_script(ChannelMeans(), tmp_path / "net.pt"))
    features = load_or_extract_features(network, small, tmp_path / "cache")
    originals = np.rint((small.__getitems__(range(6))["images"].numpy() + 1) * 127.5)
    np.testing.assert_allclose(features[:, :3], originals.mean(axis=(2, 3)), rtol=1e-5)
    [path] = (tmp_path / "cache").iterdir()
    written = path.stat().st_mtime_ns
    assert torch.equal(load_or_extract_features(network, small, tmp_path / "cache"), features)
    assert path.stat().st_mtime_ns == written and "again" not in capsys.readouterr().out

    whole = path.read_bytes()
    for content, reason in (
        (whole[:-7], "can't be read"),
        (b"", "can't be read"),
        (whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:], "is damaged"),
    ):
        path.write_bytes(content)
        assert torch.equal(load_or_extract_features(network, small, tmp_path / "cache"), features)
        assert reason in capsys.readouterr().out
        assert torch.equal(load_or_extract_features(network, small, tmp_path / "cache"), features)
        assert capsys.readouterr().out == ""
    assert len(load_or_extract_features(network, other, tmp_path / "cache")) == 8
    assert "belongs to another model, other images or another size" in capsys.readouterr().out
    network.digest = "other weights"
    load_or_extract_features(network, other, tmp_path / "cache")
    assert "belongs to another model" in capsys.readouterr().out


def test_cache_that_cannot_be_written_is_one_line(tmp_path):
    images, _ = DataOptions("synthetic", resolution=16, images_per_class=2, classes=[0]).load(show_progress=False)
    network = load_feature_network(save_script(ChannelMeans(), tmp_path / "net.pt"))
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(InputError, match="features-synthetic.*can't be written: .*name another --cache_dir"):
        load_or_extract_features(network, images, tmp_path / "cache")


def test_a_torn_header_steers_no_terminal(tmp_path):
    """safetensors says the type that it doesn't know as it is written there."""
    header = b'{"features": {"dtype": "\\u001b[31m", "shape": [1], "data_offsets": [0, 4]}}'
    (tmp_path / "torn.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UnusableCacheError, match=r"unknown variant `\\x1b\[31m`"):
        read_tensors(tmp_path / "torn.safetensors", "key")
