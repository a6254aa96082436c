"""The losses of stage 1, each a pure function or a small module, and the fidelity of reconstructions.

The losses are unweighted. Each is a mean over pixels, latent elements, patches or images, so that its weight means the
same at every image size.

Shapes: B images, (H, W) pixels, (h, w) latent positions, Z latent channels, F class features, K classes.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchvision.models import VGG16_Weights
from torchvision.models.vgg import cfgs, make_layers

from .errors import InputError, one_line

HIGHEST_PSNR = 100.0  # in dB
VGG16_CONV_LAYERS = (0, 2, 5, 7, 10, 12, 14)  # torchvision's indices up to relu3_3
VGG16_TAPS = {3: "relu1_2", 8: "relu2_2", 15: "relu3_3"}  # Johnson et al. 2016


def pixel_loss(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of `(B, 3, H, W)` images in [-1, 1].

    At the same PSNR it gives sharper images than the squared error.
    """
    return F.l1_loss(reconstruction.float(), images.float())


def fidelity(reconstruction: torch.Tensor, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """PSNR in dB and SSIM of each image, `(B,)` each, from two batches `(B, 3, H, W)` in [-1, 1].

    The PSNR is at most 100 dB. That of equal images would be infinite, and so would every mean over one.
    """
    unit_range = (reconstruction + 1) / 2, (images + 1) / 2
    psnr = peak_signal_noise_ratio(*unit_range, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(*unit_range, data_range=1.0, reduction="none")
    return {"psnr": psnr.clamp(max=HIGHEST_PSNR).reshape(-1), "ssim": ssim.reshape(-1)}


def kl_loss(posterior: DiagonalGaussianDistribution) -> torch.Tensor:
    """KL divergence from the posterior to the standard normal, in nats per latent element.

    Kingma & Welling 2014, appendix B. It is never clamped, since a clamp would cut its gradient.
    """
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def adversarial_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """What the autoencoder minimizes against the discriminator: the generator's hinge loss (Lim & Ye 2017)."""
    return -fake_logits.float().mean()


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """The discriminator's hinge loss (Lim & Ye 2017): real patches above 1, reconstructed ones below -1."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def classification_loss(class_logits: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the head's logits `(B, K)`, in nats."""
    return F.cross_entropy(class_logits.float(), class_labels)


def loss_ramp(global_step: int, start: int, ramp_steps: int) -> float:
    """The factor of a weight at an optimizer update: 0 before `start`, then a linear rise to 1 over `ramp_steps`."""
    if global_step < start:
        return 0.0
    return min(1.0, (global_step - start + 1) / max(1, ramp_steps))


class CenterLoss(nn.Module):
    """Center loss with repulsion between class centers (after Wen et al. 2016, eq. 2).

    The center of a class is a point on the unit sphere of class features. It is learned with the autoencoder. The
    center loss pulls each feature to the center of its class. The repulsion keeps classes apart. It is a hinge on the
    squared distance between every two centers, and between every feature and every *other* center. The latter moves
    the encoder too.

    Args:
        num_classes: K.
        num_features: F.
        margin: squared distance beyond which nothing is repelled. On the unit sphere 2 is a right angle, 4 the most.
    """

    def __init__(self, num_classes: int, num_features: int, margin: float = 2.0):
        super().__init__()
        self.margin = margin
        self.centers = nn.Parameter(torch.randn(num_classes, num_features) / math.sqrt(num_features))

    def forward(self, class_features: torch.Tensor, class_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class features `(B, F)`, labels `(B,)` -> center loss and repulsion loss, both scalars."""
        with torch.autocast(class_features.device.type, enabled=False):  # small distances need float32
            features = F.normalize(class_features.float(), dim=1)  # (B, F)
            centers = F.normalize(self.centers.float(), dim=1)  # (K, F)
            distances = 2 - 2 * features @ centers.T  # (B, K), squared
            between_centers = 2 - 2 * centers @ centers.T  # (K, K), squared
        center_loss = distances.gather(1, class_labels[:, None]).mean()
        classes = torch.arange(len(centers), device=centers.device)
        repulsion_loss = self._hinge(distances, classes != class_labels[:, None])
        repulsion_loss = repulsion_loss + self._hinge(between_centers, classes != classes[:, None])
        return center_loss, repulsion_loss

    def _hinge(self, distances: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean over the masked pairs of how far each squared distance falls short of the margin."""
        return (F.relu(self.margin - distances) * mask).sum() / mask.sum().clamp(min=1)


class PerceptualLoss(nn.Module):
    """Distance of VGG16 features at relu1_2, relu2_2 and relu3_3 (Johnson et al. 2016; Zhang et al. 2018, eq. 1).

    Features are normalized to unit length at each position, so that the scale of a layer doesn't matter. The network
    is frozen. Gradients pass through it to the reconstruction.

    Args:
        vgg_weights: a safetensors or torch file with torchvision's names (`features.0.weight`, ...), at least up to
            relu3_3. `None` downloads torchvision's ImageNet weights, once.

    Raises:
        InputError: the weights can't be read or downloaded.
    """

    def __init__(self, vgg_weights: str | Path | None = None):
        super().__init__()
        self.features = load_vgg16_features(vgg_weights).eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Two batches `(B, 3, H, W)` in [-1, 1] -> scalar."""
        return self.per_image(reconstruction, images).mean()

    def per_image(self, reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Two batches `(B, 3, H, W)` in [-1, 1] -> `(B,)`, the mean over layers and positions."""
        with torch.no_grad():
            targets = self._unit_features(images)
        predictions = self._unit_features(reconstruction)
        squares = [(p.float() - t.float()).square().sum(dim=1) for p, t in zip(predictions, targets, strict=True)]
        return torch.stack([square.mean(dim=(1, 2)) for square in squares]).mean(dim=0)

    def _unit_features(self, images: torch.Tensor) -> list[torch.Tensor]:
        hidden_states = ((images + 1) / 2 - self.mean) / self.std
        taps = []
        for index, layer in enumerate(self.features):
            hidden_states = layer(hidden_states)
            if index in VGG16_TAPS:
                taps.append(F.normalize(hidden_states, dim=1))
        return taps


def load_vgg16_features(vgg_weights: str | Path | None) -> nn.Sequential:
    """The layers of VGG16 (Simonyan & Zisserman 2015) up to relu3_3, with weights from a file or torchvision."""
    if vgg_weights is None:
        try:
            state_dict = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:  # no connection, or a damaged file
            raise InputError(
                f"VGG16's weights can't be downloaded ({one_line(error)}): give a local file by --vgg_weights PATH, "
                "or train without the perceptual loss by --perceptual_weight 0"
            ) from error
    else:
        state_dict = _read_state_dict(Path(vgg_weights))
    if not isinstance(state_dict, dict):
        raise InputError(f"--vgg_weights {vgg_weights} holds no weights by name: it must be torchvision's VGG16")
    wanted = [f"features.{layer}.{name}" for layer in VGG16_CONV_LAYERS for name in ("weight", "bias")]
    missing = [name for name in wanted if name not in state_dict]
    if missing:
        raise InputError(
            f"--vgg_weights {vgg_weights} lacks {missing[0]}: it must hold torchvision's VGG16, at least features.0 "
            "to features.14 (or train without the perceptual loss by --perceptual_weight 0)"
        )
    for name in wanted:
        weight = state_dict[name]
        is_plain = isinstance(weight, torch.Tensor) and weight.layout is torch.strided and not weight.is_meta
        if not (is_plain and weight.is_floating_point() and weight.isfinite().all()):
            raise InputError(f"--vgg_weights {vgg_weights} is damaged: {name} must hold finite numbers")
    features = make_layers(cfgs["D"][:9])
    try:
        features.load_state_dict({name.removeprefix("features."): state_dict[name].float() for name in wanted})
    except RuntimeError as error:
        raise InputError(f"--vgg_weights {vgg_weights} has other shapes than torchvision's VGG16") from error
    # In-place ReLUs would overwrite what the gradient of the reconstruction needs.
    return nn.Sequential(*(nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in features))


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise InputError(
            f"--vgg_weights {path} is no file: give torchvision's VGG16 as .safetensors or .pth, or train without the "
            "perceptual loss by --perceptual_weight 0"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"--vgg_weights {path} can't be read ({one_line(error, 200)}): give torchvision's VGG16 as .safetensors "
            "or .pth, or train without the perceptual loss by --perceptual_weight 0"
        ) from error


class AdaptiveAdversarialWeight(nn.Module):
    """The weight that balances the adversarial loss and the reconstruction losses (VQGAN, Esser et al. 2021, eq. 7).

    It is the ratio of their gradient norms. They are measured at the reconstruction, not at the decoder's last layer:
    the balance is the same, without a second backward pass through the decoder. The ratio of one batch is noisy, so it
    is averaged. The average is over few measurements: a discriminator that learns to tell reconstructions from images
    has ten times larger gradients within a hundred updates. An older weight would let it drown the other losses.
    """

    def __init__(self, decay: float = 0.5, maximum: float = 1e4):
        super().__init__()
        self.decay = decay
        self.maximum = maximum
        self.register_buffer("value", torch.tensor(0.0))
        self.register_buffer("num_measurements", torch.tensor(0.0))

    def forward(self) -> torch.Tensor:
        """The averaged ratio, a scalar. The bias of its start at 0 is removed, as in Adam."""
        return self.value / (1 - self.decay**self.num_measurements).clamp(min=1 - self.decay)

    def squared_gradient_norms(
        self, reconstruction_loss: torch.Tensor, adversarial: torch.Tensor, reconstruction: torch.Tensor
    ) -> torch.Tensor:
        """Of both losses at the reconstruction, `(2,)`. Several processes add theirs up before `update`."""
        # The same factor for both: else fp16 gradients of a mean over many pixels vanish. The ratio doesn't change.
        losses = (reconstruction_loss * 2.0**14, adversarial * 2.0**14)
        gradients = [torch.autograd.grad(loss, reconstruction, retain_graph=True)[0] for loss in losses]
        return torch.stack([gradient.float().square().sum() for gradient in gradients])

    def update(self, squared_gradient_norms: torch.Tensor) -> None:
        """Add one measurement to the average. Gradients that overflow in fp16 are no measurement."""
        reconstruction_norm, adversarial_norm = squared_gradient_norms.sqrt()
        ratio = (reconstruction_norm / (adversarial_norm + 1e-8)).clamp(max=self.maximum)
        usable = squared_gradient_norms.isfinite().all()
        self.value.copy_(torch.where(usable, self.value.lerp(ratio, 1 - self.decay), self.value))
        self.num_measurements += usable
