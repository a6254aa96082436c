"""PatchGAN: for every overlapping patch of an image, one logit that says whether it is real or reconstructed.

Only training uses it. It is saved in checkpoints, but never with the results.
"""

import torch
from torch import nn

from .models.autoencoder_flower import LayerNorm2d

SMALLEST_IMAGE = 12  # pixels a side, for one patch


class PatchDiscriminator(nn.Module):
    """The patch discriminator of pix2pix (Isola et al. 2017), with layer normalization over channels.

    No batch normalization: its statistics would differ between processes and between real and reconstructed batches.

    Args:
        in_channels: channels of the images.
        base_channels: channels after the first convolution. Each further one doubles them, up to 4 times as many.
        num_downsamples: number of strided convolutions. 2 give a receptive field of 34 pixels, 3 one of 70.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_downsamples: int = 2):
        super().__init__()
        channels = base_channels
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for stride in [2] * (num_downsamples - 1) + [1]:
            widened = min(2 * channels, 4 * base_channels)
            layers += [nn.Conv2d(channels, widened, 4, stride=stride, padding=1), LayerNorm2d(widened)]
            layers += [nn.LeakyReLU(0.2)]
            channels = widened
        layers.append(nn.Conv2d(channels, 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] -> logits `(B, 1, h', w')`, positive for real."""
        return self.layers(images)
