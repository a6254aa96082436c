"""`PatchDiscriminator`: one logit a patch, of the size it says, and every image judged by itself."""

import pytest
import torch

from flower_ldm.discriminator import PatchDiscriminator


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("num_downsamples", "size"), [(1, 30), (2, 14), (3, 6)])
def test_one_logit_a_patch(num_downsamples, size):
    discriminator = PatchDiscriminator(base_channels=8, num_downsamples=num_downsamples)
    assert discriminator(torch.randn(2, 3, 64, 64)).shape == (2, 1, size, size)


@pytest.mark.parametrize(("num_downsamples", "receptive_field"), [(2, 34), (3, 70)])
def test_receptive_field(num_downsamples, receptive_field):
    discriminator = PatchDiscriminator(base_channels=8, num_downsamples=num_downsamples)
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = discriminator(images)
    middle = logits.shape[-1] // 2
    gradient = torch.autograd.grad(logits[0, 0, middle, middle], images)[0]
    rows, columns = gradient[0].any(dim=0).nonzero().unbind(dim=1)
    assert rows.max() - rows.min() + 1 == receptive_field
    assert columns.max() - columns.min() + 1 == receptive_field


def test_an_image_is_judged_without_the_rest_of_its_batch():
    discriminator, images = PatchDiscriminator(base_channels=8).train(), torch.randn(3, 3, 32, 32)
    together = discriminator(images)
    for index in range(3):
        alone = discriminator(images[index : index + 1])
        torch.testing.assert_close(alone, together[index : index + 1], atol=1e-5, rtol=1e-5)
    assert not list(discriminator.buffers())  # no running statistics either


def test_channels_are_in_channels():
    assert PatchDiscriminator(in_channels=1, base_channels=8)(torch.randn(1, 1, 32, 32)).shape == (1, 1, 6, 6)
