"""`flower_ldm.autoencoder_losses`: each loss is what it says, by a calculation of its own, and the gradient of each
alone reaches the layer that it must train.

Real tiny autoencoders, and a VGG16 with random weights in a file.
"""

import math
import urllib.request
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from flower_ldm.autoencoder_losses import (
    AdaptiveAdversarialWeight,
    CenterLoss,
    PerceptualLoss,
    adversarial_loss,
    classification_loss,
    discriminator_loss,
    fidelity,
    kl_loss,
    loss_ramp,
    pixel_loss,
)
from flower_ldm.discriminator import PatchDiscriminator
from flower_ldm.errors import InputError
from flower_ldm.models.autoencoder_flower import FlowerAutoencoderKL, FlowerAutoencoderOutput
from train_autoencoder import Networks, autoencoder_step, discriminator_step, parse_args

CLASS_LABELS = torch.tensor([0, 2])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def perceptual(random_vgg) -> PerceptualLoss:
    return PerceptualLoss(random_vgg)


@pytest.fixture
def vae() -> FlowerAutoencoderKL:
    return FlowerAutoencoderKL(latent_channels=4, block_out_channels=(8, 16), num_classes=3, head_channels=8)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))


# What each loss is


def test_pixel_loss_is_the_mean_absolute_error():
    reconstruction = torch.full((2, 3, 4, 4), 0.5)
    images = torch.cat([torch.full((1, 3, 4, 4), -0.25), torch.full((1, 3, 4, 4), 0.5)])
    assert pixel_loss(reconstruction, images) == 0.375
    assert pixel_loss(reconstruction.bfloat16(), images).dtype == torch.float32


def make_posterior() -> tuple[DiagonalGaussianDistribution, torch.Tensor, torch.Tensor]:
    mean, logvar = torch.randn(2, 2, 4, 3, 3)
    return DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1)), mean, logvar


def test_kl_loss_is_the_divergence_from_the_standard_normal_an_element():
    posterior, mean, logvar = make_posterior()
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_loss(posterior), expected)
    assert kl_loss(DiagonalGaussianDistribution(torch.zeros(1, 8, 3, 3))) == 0


def test_kl_loss_weighs_the_same_at_any_size():
    moments = torch.randn(1, 8, 3, 3)
    twice = DiagonalGaussianDistribution(moments.repeat(2, 1, 2, 2))
    torch.testing.assert_close(kl_loss(twice), kl_loss(DiagonalGaussianDistribution(moments)))


def test_kl_loss_is_never_cut_off_from_its_gradient():
    values = torch.tensor([-20.0, -5.0, 0.5, 15.0])
    moments = values.repeat(2).view(1, 8, 1, 1).requires_grad_()
    gradient = torch.autograd.grad(kl_loss(DiagonalGaussianDistribution(moments)), moments)[0].flatten()
    torch.testing.assert_close(gradient[:4], values / 4)  # of the mean
    torch.testing.assert_close(gradient[4:], 0.5 * (values.exp() - 1) / 4)  # of the log variance


def test_adversarial_loss_is_minus_the_mean_logit():
    assert adversarial_loss(torch.tensor([1.0, -3.0])) == 1.0


def test_discriminator_loss_is_a_hinge_on_both_sides():
    real_logits, fake_logits = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert discriminator_loss(real_logits, fake_logits) == 0.5 * ((0 + 0.5) / 2 + (0 + 1) / 2)
    assert discriminator_loss(torch.zeros(4), torch.zeros(4)) == 1.0


def test_classification_loss_is_the_cross_entropy():
    assert classification_loss(torch.zeros(2, 5), torch.tensor([1, 4])).item() == pytest.approx(math.log(5))
    logits = torch.tensor([[math.log(3), 0.0]])  # probabilities 3/4 and 1/4
    assert classification_loss(logits, torch.tensor([0])).item() == pytest.approx(-math.log(0.75))


@pytest.mark.parametrize(
    ("global_step", "start", "ramp_steps", "factor"),
    [(0, 0, 4, 0.25), (1, 0, 4, 0.5), (3, 0, 4, 1.0), (99, 0, 4, 1.0)]
    + [(4, 5, 2, 0.0), (5, 5, 2, 0.5), (6, 5, 2, 1.0), (4, 5, 0, 0.0), (5, 5, 0, 1.0)],
)
def test_loss_ramp(global_step, start, ramp_steps, factor):
    assert loss_ramp(global_step, start, ramp_steps) == factor


# Which layer each reaches


def only(name: str, output: FlowerAutoencoderOutput, images, perceptual) -> torch.Tensor:
    """One of stage 1's losses, nothing else."""
    if name in ("center", "repulsion"):
        losses = CenterLoss(num_classes=3, num_features=8)(output.class_features, CLASS_LABELS)
        return losses[("center", "repulsion").index(name)]
    return {
        "pixel": lambda: pixel_loss(output.sample, images),
        "perceptual": lambda: perceptual(output.sample, images),
        "kl": lambda: kl_loss(output.posterior),
        "adversarial": lambda: adversarial_loss(PatchDiscriminator(base_channels=8)(output.sample)),
        "classification": lambda: classification_loss(output.class_logits, CLASS_LABELS),
    }[name]()


@pytest.mark.parametrize("name", ["pixel", "perceptual", "kl", "adversarial", "classification", "center", "repulsion"])
def test_gradient_alone_reaches_the_encoders_first_layer(name, vae, images, noise, perceptual):
    loss = only(name, vae(images, noise=noise), images, perceptual)
    assert loss.shape == () and loss.isfinite()
    loss.backward()
    gradient = vae.encoder.conv_in.weight.grad
    assert gradient is not None
    assert gradient.flatten(1).any(dim=1).all()  # every filter of it
    decodes = name in ("pixel", "perceptual", "adversarial")
    assert (vae.decoder.conv_in.weight.grad is not None) == decodes
    classifies = name in ("classification", "center", "repulsion")
    assert (vae.head.conv.weight.grad is not None) == classifies


def test_the_two_players_train_only_themselves(vae, images, noise):
    """The discriminator's loss reaches its first layer and not the autoencoder; the adversarial loss the reverse."""
    accelerator, discriminator = Accelerator(cpu=True), PatchDiscriminator(base_channels=8)
    networks = Networks(vae, perceptual=None, discriminator=discriminator, adaptive_weight=None, centers=None)
    args = parse_args(["--disc_start=0", "--perceptual_weight=0", "--train_batch_size=2"])
    batch = {"images": images, "class_labels": CLASS_LABELS, "noise": noise}

    loss, losses, reconstruction = autoencoder_step(accelerator, args, networks, batch, global_step=0)
    loss.backward()
    assert "adversarial_loss" in losses
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert vae.encoder.conv_in.weight.grad.any()

    vae.zero_grad()
    discriminator_step(accelerator, discriminator, images, reconstruction).backward()
    assert discriminator.layers[0].weight.grad.flatten(1).any(dim=1).all()
    assert all(parameter.grad is None for parameter in vae.parameters())


# Center loss


def axes_as_centers(*axes: int, margin: float = 2.0) -> CenterLoss:
    """Centers along the given axes of four features, of lengths that must not matter."""
    loss = CenterLoss(num_classes=len(axes), num_features=4, margin=margin)
    loss.centers.data = torch.eye(4)[list(axes)] * torch.arange(1, len(axes) + 1)[:, None]
    return loss


def test_center_loss_is_the_squared_distance_on_the_unit_sphere():
    features = torch.tensor([[5.0, 0.0, 0.0, 0.0], [-0.1, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]])
    center_loss, _ = axes_as_centers(0, 1)(features, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(center_loss, torch.tensor((0.0 + 4.0 + 2.0) / 3))


@pytest.mark.parametrize(("margin", "expected"), [(1.5, 0.0), (2.0, 0.0), (3.0, 1.0 + 1.0), (4.0, 2.0 + 2.0)])
def test_repulsion_falls_to_zero_beyond_the_margin(margin, expected):
    """Of centers at a right angle, a squared distance of 2, and of features at their own centers."""
    features = torch.eye(4)[:3]
    center_loss, repulsion_loss = axes_as_centers(0, 1, 2, margin=margin)(features, torch.arange(3))
    assert center_loss == 0
    assert repulsion_loss == expected


def test_repulsion_counts_only_other_classes():
    features = torch.eye(4)[[0, 0]]
    _, repulsion_loss = axes_as_centers(0, 0)(features, torch.tensor([0, 1]))
    assert repulsion_loss == 2.0 + 2.0  # each center at the other, each feature at the other class's center
    _, repulsion_loss = axes_as_centers(0)(features, torch.tensor([0, 0]))
    assert repulsion_loss == 0.0  # a single class has no other


def test_repulsion_moves_centers_apart_and_then_lets_them_be():
    loss = CenterLoss(num_classes=3, num_features=4)
    loss.centers.data = torch.tensor([1.0, 0.0, 0.0, 0.0]) + 0.1 * torch.randn(3, 4)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    elsewhere = -torch.eye(4)[:1]  # opposite all of them: nothing but the centers repel each other
    for _ in range(300):
        optimizer.zero_grad()
        loss(elsewhere, torch.tensor([0]))[1].backward()
        optimizer.step()
    directions = F.normalize(loss.centers, dim=1)
    assert torch.pdist(directions).square().min() > 1.9
    assert loss(elsewhere, torch.tensor([0]))[1] < 0.1


def test_center_loss_draws_features_and_centers_together():
    loss, features = CenterLoss(num_classes=2, num_features=4), torch.randn(6, 4, requires_grad=True)
    class_labels = torch.tensor([0, 0, 0, 1, 1, 1])
    start, centers = loss(features, class_labels)[0].item(), loss.centers.detach().clone()
    optimizer = torch.optim.SGD([features, *loss.parameters()], lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        loss(features, class_labels)[0].backward()
        optimizer.step()
    assert loss(features, class_labels)[0] < 0.05 * start
    assert not torch.allclose(loss.centers, centers, atol=0.01)


# Perceptual loss


def perceptual_by_hand(random_vgg: Path, reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    weights = load_file(random_vgg)
    distances = []
    pair = (torch.cat([reconstruction, images]) + 1) / 2
    pair = (pair - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    for block in ((0, 2), (5, 7), (10, 12, 14)):
        for layer in block:
            pair = F.conv2d(pair, weights[f"features.{layer}.weight"], weights[f"features.{layer}.bias"], padding=1)
            pair = pair.clamp(min=0)
        unit = pair / pair.norm(dim=1, keepdim=True)
        first, second = unit.chunk(2)
        distances.append((first - second).square().sum(dim=1).mean())
        pair = F.max_pool2d(pair, 2)
    return sum(distances) / 3


def test_perceptual_loss_and_its_gradient_are_those_by_hand(random_vgg, perceptual, images):
    reconstruction = (images + 0.3 * torch.randn_like(images)).requires_grad_()
    loss, expected = perceptual(reconstruction, images), perceptual_by_hand(random_vgg, reconstruction, images)
    torch.testing.assert_close(loss, expected)
    gradient, expected_gradient = (torch.autograd.grad(value, reconstruction)[0] for value in (loss, expected))
    assert gradient.any()
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-3)


def test_perceptual_loss_of_an_image_with_itself_is_zero(perceptual, images):
    assert perceptual(images, images) == 0
    assert perceptual(images.flip(3), images) > 0.01


def test_perceptual_loss_per_image(perceptual, images):
    reconstruction = images.flip(3)
    both = perceptual.per_image(reconstruction, images)
    torch.testing.assert_close(both.mean(), perceptual(reconstruction, images))
    torch.testing.assert_close(both[1:], perceptual.per_image(reconstruction[1:], images[1:]), atol=1e-5, rtol=1e-4)


def test_perceptual_network_is_frozen_and_the_target_is_fixed(perceptual, images):
    images.requires_grad_()
    perceptual(images.detach().flip(3).requires_grad_(), images).backward()
    assert images.grad is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in perceptual.parameters())


def test_weights_may_be_a_torch_file_of_the_whole_network(random_vgg, perceptual, images, tmp_path):
    whole = {**load_file(random_vgg), "classifier.6.bias": torch.zeros(1000)}
    torch.save(whole, tmp_path / "vgg16.pth")
    loss = PerceptualLoss(tmp_path / "vgg16.pth")
    assert torch.equal(loss(images.flip(3), images), perceptual(images.flip(3), images))


def assert_says(error: InputError, *parts: str) -> None:
    """One line, with all of these in it."""
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)


def test_missing_vgg_file(tmp_path):
    with pytest.raises(InputError) as caught:
        PerceptualLoss(tmp_path / "nowhere.pth")
    assert_says(caught.value, "--vgg_weights", "nowhere.pth", "--perceptual_weight 0")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda weights: dict.fromkeys(weights, "flower"), "features.0.weight must hold finite numbers"),
        (lambda weights: dict.fromkeys(weights, torch.ones(2).to_sparse()), "features.0.weight must hold finite"),
        (lambda weights: dict.fromkeys(weights, torch.ones(2, device="meta")), "features.0.weight must hold finite"),
        (
            lambda weights: {name: value * torch.nan for name, value in weights.items()},
            "is damaged: features.0.weight",
        ),
        (lambda weights: {name: value.long() for name, value in weights.items()}, "is damaged: features.0.weight"),
        (lambda weights: {name: value[:1] for name, value in weights.items()}, "has other shapes"),
        (lambda weights: list(weights.values()), "holds no weights by name"),
        (lambda weights: torch.zeros(3), "holds no weights by name"),
        (lambda weights: "flower", "holds no weights by name"),
    ],
)
def test_vgg_file_of_something_else(random_vgg, tmp_path, change, complaint):
    torch.save(change(load_file(random_vgg)), tmp_path / "vgg16.pth")
    with pytest.raises(InputError) as caught:
        PerceptualLoss(tmp_path / "vgg16.pth")
    assert_says(caught.value, "--vgg_weights", complaint)


def test_vgg_file_that_lacks_a_layer(random_vgg, tmp_path):
    weights = load_file(random_vgg)
    del weights["features.12.weight"]
    save_file(weights, tmp_path / "vgg16.safetensors")
    with pytest.raises(InputError) as caught:
        PerceptualLoss(tmp_path / "vgg16.safetensors")
    assert_says(caught.value, "--vgg_weights", "lacks features.12.weight", "--perceptual_weight 0")


@pytest.mark.parametrize("name", ["vgg16.safetensors", "vgg16.pth"])
def test_vgg_file_that_cannot_be_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(InputError) as caught:
        PerceptualLoss(tmp_path / name)
    assert_says(caught.value, "--vgg_weights", name, "can't be read", "--perceptual_weight 0")


def test_vgg_that_cannot_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers an earlier proxy
    with pytest.raises(InputError) as caught:
        PerceptualLoss()
    assert_says(caught.value, "can't be downloaded", "--vgg_weights PATH", "--perceptual_weight 0")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# Fidelity


def test_fidelity_of_each_image():
    images = torch.zeros(3, 3, 16, 16)
    reconstruction = images + torch.tensor([0.2, 0.02, 0.0]).view(3, 1, 1, 1)  # in [0, 1], errors of 0.1 and 0.01
    found = fidelity(reconstruction, images)
    # Equal images would make the mean infinite.
    torch.testing.assert_close(found["psnr"], torch.tensor([20.0, 40.0, 100.0]), rtol=1e-4, atol=0)
    assert found["ssim"][2] == pytest.approx(1, abs=1e-3) and found["ssim"][0] < found["ssim"][1]
    assert fidelity(reconstruction[:1], images[:1])["ssim"].shape == (1,)


# Adaptive weight


def measured(wanted: float, adverse: float, weight: AdaptiveAdversarialWeight | None = None) -> float:
    """The averaged ratio after one more measurement, of two losses whose gradients have these norms."""
    weight = AdaptiveAdversarialWeight() if weight is None else weight
    reconstruction = torch.zeros(1, 1, 2, 2, requires_grad=True)
    direction = torch.full((1, 1, 2, 2), 0.5)  # a unit vector
    losses = [norm * (reconstruction * direction).sum() for norm in (wanted, adverse)]
    weight.update(weight.squared_gradient_norms(*losses, reconstruction))
    return weight().item()


def test_adaptive_weight_is_the_ratio_of_the_gradient_norms():
    reconstruction = torch.randn(2, 3, 4, 4, requires_grad=True)
    weight = AdaptiveAdversarialWeight()
    # |3| in each of 96 places, against the values themselves.
    losses = 3 * reconstruction.sum(), 0.5 * reconstruction.square().sum()
    weight.update(weight.squared_gradient_norms(*losses, reconstruction))
    torch.testing.assert_close(weight(), (3 * math.sqrt(96) / reconstruction.norm()).detach())
    assert not weight().requires_grad


@pytest.mark.parametrize(("wanted", "adverse", "ratio"), [(2.0, 4.0, 0.5), (6.0, 4.0, 1.5), (2.0, 0.5, 4.0)])
def test_adaptive_weight_scales_with_the_losses(wanted, adverse, ratio):
    assert measured(wanted, adverse) == pytest.approx(ratio, rel=1e-5)


def test_adaptive_weight_is_an_average_without_the_bias_of_its_start():
    weight = AdaptiveAdversarialWeight(decay=0.9)
    assert weight() == 0  # nothing is measured
    assert measured(3.0, 1.0, weight) == pytest.approx(3.0, rel=1e-5)
    assert measured(1.0, 1.0, weight) == pytest.approx((0.9 * 3 + 1) / 1.9, rel=1e-5)
    assert measured(2.0, 1.0, weight) == pytest.approx((0.81 * 3 + 0.9 * 1 + 2) / (0.81 + 0.9 + 1), rel=1e-5)


def test_adaptive_weight_follows_a_discriminator_that_finds_its_feet():
    weight = AdaptiveAdversarialWeight()
    for _ in range(8):
        measured(1.0, 1.0, weight)
    for _ in range(4):  # 64 updates by the default
        ratio = measured(1.0, 10.0, weight)
    assert 0.1 < ratio < 0.2


def test_adaptive_weight_goes_on_from_a_checkpoint():
    weight, resumed = AdaptiveAdversarialWeight(), AdaptiveAdversarialWeight()
    measured(3.0, 1.0, weight)
    resumed.load_state_dict(weight.state_dict())
    assert measured(1.0, 1.0, resumed) == measured(1.0, 1.0, weight)


def test_adaptive_weight_is_bounded_where_the_discriminator_says_nothing():
    assert measured(1.0, 0.0) == pytest.approx(1e4)


@pytest.mark.parametrize("norms", [(math.inf, 1.0), (1.0, math.inf), (math.inf, math.inf), (math.nan, 1.0)])
def test_adaptive_weight_forgets_what_overflowed(norms):
    weight, undisturbed = AdaptiveAdversarialWeight(), AdaptiveAdversarialWeight()
    for other in (weight, undisturbed):
        measured(3.0, 1.0, other)
    weight.update(torch.tensor(norms))
    assert torch.equal(weight(), undisturbed())
    assert measured(1.0, 1.0, weight) == measured(1.0, 1.0, undisturbed)


def test_adaptive_weight_survives_fp16():
    """Gradients of means over many pixels are below what fp16 can hold, but for the scaling."""
    reconstruction = torch.zeros(16, 3, 64, 64, dtype=torch.float16, requires_grad=True)
    losses = pixel_loss(reconstruction, torch.ones(16, 3, 64, 64)), 0.01 * reconstruction.float().mean()
    weight = AdaptiveAdversarialWeight()
    weight.update(weight.squared_gradient_norms(*losses, reconstruction))
    assert weight().item() == pytest.approx(100, rel=2e-3)
