"""Muon: the updates that it takes, of matrices and of convolutions, and which parameters get them."""

import copy

import pytest
import torch
from torch import nn

from flower_ldm import FlowerAutoencoderKL, FlowerUNet2DModel
from flower_ldm.optimizers import Muon, as_matrix, hidden_matrices, like_weight, orthogonalize

SHAPES = [(12, 20), (12, 20), (20, 12), (16, 16)]


def layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(columns, rows) for rows, columns in SHAPES])


def muon(model: nn.Module, lr: float = 0.02) -> Muon:
    matrices = hidden_matrices(model)
    others = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    return Muon(matrices, others, lr=lr, betas=(0.9, 0.99), weight_decay=0.1, dtype=torch.float32)


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 12, 40), (2, 40, 12)])
def test_singular_values_come_close_to_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.tensor(1e-4)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalize(matrices, torch.float32)
    values = torch.linalg.svdvals(result)
    assert result.shape == shape and values.max() < 1.25 and values.median() > 0.65
    # The singular vectors stay: what is left is diagonal in them.
    rotated = left.transpose(1, 2) @ result @ right.transpose(1, 2)
    assert (rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_updates_are_those_of_torch():
    """But for rounding: torch computes in bfloat16."""
    ours, theirs = layers(), layers()
    optimizer = muon(ours)
    reference = torch.optim.Muon(
        hidden_matrices(theirs), lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    before = [weight.clone() for weight in hidden_matrices(ours)]
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for one, other, start in zip(hidden_matrices(ours), hidden_matrices(theirs), before, strict=True):
        assert (one - other).norm() < 0.02 * (other - start).norm()


def test_other_parameters_get_the_updates_of_adamw():
    ours, theirs = layers(), layers()
    optimizer = muon(ours)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.02, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.bias, other.bias)
        assert not torch.allclose(one.weight, other.weight)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_a_matrix_with_a_row_for_each_output(memory_format):
    torch.manual_seed(0)
    convolution = nn.Conv2d(6, 8, 3, bias=False).to(memory_format=memory_format)
    weight = convolution.weight
    assert as_matrix(weight).shape == (8, 54)
    torch.testing.assert_close(like_weight(as_matrix(weight), weight), weight)
    before = weight.detach().clone()
    set_gradients(convolution, 0)
    optimizer = muon(nn.ModuleList([convolution]))
    optimizer.step()
    update = (before * (1 - 0.02 * 0.1) - weight).detach().flatten(1)
    values = torch.linalg.svdvals(update) / (0.02 * 0.2 * 54**0.5)
    assert values.max() < 1.25 and values.min() > 0.6


def test_parameters_without_a_gradient_stay():
    model = layers()
    set_gradients(model, 0)
    model[1].weight.grad = None
    before = model[1].weight.clone()
    optimizer = muon(model)
    optimizer.step()
    assert torch.equal(model[1].weight, before)


def test_a_loaded_state_goes_on_bit_for_bit():
    whole = layers()
    optimizer = muon(whole)
    for step in range(2):
        set_gradients(whole, step)
        optimizer.step()
    rest = layers(seed=1)
    rest.load_state_dict(whole.state_dict())
    resumed = muon(rest)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, its_optimizer in ((whole, optimizer), (rest, resumed)):
        set_gradients(model, 2)
        its_optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), rest.parameters(), strict=True))


def test_a_closure_is_called_once_with_gradients():
    model = layers()
    losses = []

    def closure() -> torch.Tensor:
        loss = sum(layer.weight.square().sum() for layer in model)
        loss.backward()
        losses.append(loss.item())
        return loss

    assert muon(model).step(closure).item() == losses[0] and len(losses) == 1


def test_hidden_matrices_of_both_models():
    """Embeddings, modulation, first and last layer, norms and gates of one row are not among them."""
    unet = FlowerUNet2DModel(sample_size=4, in_channels=4, hidden_size=16, num_layers=3, num_attention_heads=2)
    names = {id(parameter): name for name, parameter in unet.named_parameters()}
    found = {names[id(weight)] for weight in hidden_matrices(unet.hidden_layers[0])}
    assert found == {name for name in names.values() if name.startswith("blocks.") and name.endswith(".weight")} - {
        name for name in names.values() if ".norm_" in name
    }
    vae = FlowerAutoencoderKL(block_out_channels=(8, 16), latent_channels=4, num_classes=3, head_channels=8)
    names = {id(parameter): name for name, parameter in vae.named_parameters()}
    found = {names[id(weight)] for layers in vae.hidden_layers for weight in hidden_matrices(layers)}
    assert {"encoder.layers.0.conv_in.weight", "decoder.layers.0.channel_attention.squeeze.weight"} < found
    assert not any("conv_out.weight" in name and "layers" not in name for name in found)
    assert not any("spatial_attention" in name or "norm" in name or "head" in name for name in found)
