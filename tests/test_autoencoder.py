"""`FlowerAutoencoderKL`: its parts do what their names say, and it holds the contracts of diffusers' models.

Real tiny models of a few thousand weights.
"""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.nn import functional as F

from flower_ldm.models.autoencoder_flower import (
    ChannelAttention,
    FlowerAutoencoderKL,
    LayerNorm2d,
    ResidualBlock,
    SpatialAttention,
)

CLOSED, OPEN = -100.0, 100.0  # what a sigmoid gate is shut or opened by
LATENTS_MEAN, LATENTS_STD = [0.5, -1.0, 2.0, 0.0], [2.0, 0.5, 1.0, 4.0]


def make_vae(**config) -> FlowerAutoencoderKL:
    """4 x 4 pixels a latent position, 4 latent channels, 3 classes."""
    torch.manual_seed(0)
    tiny = {"block_out_channels": (8, 16), "decoder_layers_per_block": 1, "head_channels": 8, "sample_size": 16}
    return FlowerAutoencoderKL(**{"latent_channels": 4, "num_classes": 3, **tiny, **config}).eval()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def vae() -> FlowerAutoencoderKL:
    return make_vae()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))


def loss_of(output) -> torch.Tensor:
    """Something that every weight of the model has a part in."""
    return output.sample.square().mean() + output.class_logits.square().mean() + output.posterior.kl().mean()


# Parts


def test_layer_norm_is_over_channels_at_each_position():
    hidden_states = torch.randn(2, 8, 3, 5) * (0.5 + torch.rand(2, 1, 3, 5)) + torch.randn(2, 1, 3, 5)
    normed = LayerNorm2d(8, eps=0.0)(hidden_states)
    torch.testing.assert_close(normed.mean(dim=1), torch.zeros(2, 3, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.var(dim=1, correction=0), torch.ones(2, 3, 5))


def test_layer_norm_does_not_mix_positions():
    norm, hidden_states = LayerNorm2d(8), torch.randn(2, 8, 3, 5)
    changed = hidden_states.clone()
    changed[0, :, 1, 2] = torch.randn(8)
    differs = (norm(hidden_states) != norm(changed)).any(dim=1)
    assert differs.nonzero().tolist() == [[0, 1, 2]]


def test_layer_norm_scales_and_shifts_each_channel():
    norm, hidden_states = LayerNorm2d(8), torch.randn(2, 8, 3, 5)
    plain = norm(hidden_states)
    scale, shift = torch.randn(8), torch.randn(8)
    norm.load_state_dict({"weight": scale, "bias": shift})
    torch.testing.assert_close(norm(hidden_states), plain * scale.view(8, 1, 1) + shift.view(8, 1, 1))


def test_channel_attention_is_one_gate_a_channel_from_the_image_itself():
    attention, hidden_states = ChannelAttention(16), torch.randn(3, 16, 4, 6)
    gate = attention(hidden_states)
    assert gate.shape == (3, 16, 1, 1)
    assert gate.min() > 0 and gate.max() < 1
    torch.testing.assert_close(attention(hidden_states[:1]), gate[:1])
    torch.testing.assert_close(attention(hidden_states.flip(2, 3)), gate)  # it doesn't know where
    assert not torch.allclose(attention(hidden_states + 1), gate)


def test_spatial_attention_is_one_gate_a_position():
    attention, hidden_states = SpatialAttention(16), torch.randn(3, 16, 4, 6)
    gate = attention(hidden_states)
    assert gate.shape == (3, 1, 4, 6)
    assert gate.min() > 0 and gate.max() < 1
    changed = hidden_states.clone()
    changed[1, :, 2, 3] += 1
    assert (attention(changed) != gate).nonzero().tolist() == [[1, 0, 2, 3]]


@pytest.fixture
def shut_block() -> ResidualBlock:
    """A residual block with both of its gates shut, whatever the image."""
    block = ResidualBlock(8).requires_grad_(False)
    for layer in (block.channel_attention.excite, block.spatial_attention.mix):
        layer.weight.zero_()
        layer.bias.fill_(CLOSED)
    return block


def test_block_with_both_gates_shut_is_the_identity(shut_block):
    hidden_states = torch.randn(2, 8, 4, 4)
    assert torch.equal(shut_block(hidden_states), hidden_states)


def test_channel_attention_gates_the_block(shut_block):
    hidden_states = torch.randn(2, 8, 4, 4)
    shut_block.channel_attention.excite.bias[2] = OPEN
    changed = (shut_block(hidden_states) != hidden_states).all(dim=3).all(dim=2)
    assert changed.nonzero().tolist() == [[0, 2], [1, 2]]


def test_spatial_attention_gates_the_block(shut_block):
    hidden_states = torch.randn(2, 8, 4, 4)
    mix = shut_block.spatial_attention.mix
    mix.bias.zero_()
    mix.weight[0, 3] = 1e6  # open where channel 3 of the branch is above zero
    branch = shut_block.conv_out(F.silu(shut_block.conv_in(shut_block.norm(hidden_states))))
    is_open = (branch[:, 3:4] > 0).expand_as(branch)
    update = shut_block(hidden_states) - hidden_states
    assert 0 < is_open.float().mean() < 1
    torch.testing.assert_close(update[is_open], branch[is_open], atol=1e-5, rtol=1e-5)
    assert not update[~is_open].any()


# The model


@pytest.mark.parametrize(
    ("patch_size", "block_out_channels", "factor"), [(1, (8,), 1), (2, (8, 16), 4), (4, (8, 8, 8), 16)]
)
def test_one_latent_position_stands_for_downsample_factor_pixels(patch_size, block_out_channels, factor):
    vae = make_vae(patch_size=patch_size, block_out_channels=block_out_channels)
    images = torch.rand(2, 3, 32, 48)
    output = vae(images)
    assert vae.downsample_factor == factor
    assert output.posterior.mean.shape == (2, 4, 32 // factor, 48 // factor)
    assert output.sample.shape == images.shape
    assert output.class_logits.shape == (2, 3)
    assert output.class_features.shape == (2, 8)


@pytest.mark.parametrize("size", [(18, 16), (16, 18)])
def test_size_that_cannot_be_halved_is_refused(vae, size):
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} can't be encoded.*multiples of 4"):
        vae.encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"block_out_channels": []}, "block_out_channels"),
        ({"block_out_channels": [8, 4]}, "block_out_channels"),
        ({"patch_size": 0}, "patch_size"),
        ({"latents_mean": [0.0], "latents_std": [1.0]}, "must have 4 values"),
        ({"latents_mean": [0.0] * 4}, "must have 4 values"),
        ({"latents_mean": [0.0] * 4, "latents_std": "1111"}, "must have 4 values"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 0.0, 1.0, 1.0]}, "must hold numbers above 0, got 0"),
        ({"latents_mean": [0.0] * 4, "latents_std": [float("nan")] * 4}, "must hold finite numbers"),
        ({"latents_mean": [10**400] * 4, "latents_std": [1.0] * 4}, "must hold finite numbers"),
        ({"latents_mean": [0.0] * 4, "latents_std": [None] * 4}, "must hold finite numbers"),
        ({"layers_per_block": 10**9}, "layers_per_block must be a whole number from 0 to 100, got 1000000000"),
        ({"num_classes": 10**12}, "num_classes must be a whole number from 0 to 1,000,000"),
        ({"sample_size": None}, "sample_size must be a whole number"),
        ({"latent_channels": True}, "latent_channels must be a whole number"),
        ({"block_out_channels": [8] * 10**5}, "block_out_channels must be 1 to 12 whole numbers"),
        ({"block_out_channels": [2**14] * 12, "layers_per_block": 100}, "asks for 6e[+]12 weights, more than 1e[+]11"),
    ],
)
def test_numbers_that_cannot_be_built_are_refused(config, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_vae(**config)


def test_forward_decodes_a_sample_of_the_posterior(vae, images, noise):
    output = vae(images, noise=noise)
    posterior = vae.encode(images).latent_dist
    assert isinstance(output.posterior, DiagonalGaussianDistribution)
    expected = vae.decode(posterior.mean + posterior.std * noise).sample
    torch.testing.assert_close(output.sample, expected)
    assert not torch.allclose(output.sample, vae(images).sample)


def test_noise_levels_are_relative_to_the_latents(vae, images, noise):
    """The sum of the posterior's noise and of the further noise has the sum of their variances."""
    posterior = vae.encode(images).latent_dist
    levels = torch.arange(len(images)) / 2
    variance = posterior.var + (levels * posterior.mean.std()).square().view(-1, 1, 1, 1)
    expected = vae.decode(posterior.mean + variance.sqrt() * noise).sample
    output = vae(images, noise=noise, noise_levels=levels)
    torch.testing.assert_close(output.sample, expected)
    torch.testing.assert_close(output.sample[0], vae(images, noise=noise).sample[0])
    output.sample.square().mean().backward()  # the encoder can't avoid it by larger latents
    assert vae.encoder.conv_in.weight.grad.isfinite().all()


def test_forward_without_noise_decodes_the_mean(vae, images):
    expected = vae.decode(vae.encode(images).latent_dist.mean).sample
    assert torch.equal(vae(images).sample, expected)


def test_classes_are_read_from_the_mean_of_the_posterior(vae, images, noise):
    output, noisy = vae(images), vae(images, noise=noise)
    assert torch.equal(output.class_logits, noisy.class_logits)
    assert torch.equal(output.class_logits, vae.head.classifier(output.class_features))
    assert torch.equal(output.class_logits, vae.head(output.posterior.mean)[1])


def test_without_classes_there_is_no_head(images):
    vae = make_vae(num_classes=0)
    output = vae(images)
    assert vae.head is None
    assert not [name for name in vae.state_dict() if name.startswith("head")]
    assert output.class_logits is None and output.class_features is None
    assert vae(images, return_dict=False)[2:] == (None, None)


def test_channels_last_gives_the_same_and_keeps_the_layout(vae, images, noise):
    expected = vae(images, noise=noise)
    vae = vae.to(memory_format=torch.channels_last)
    output = vae(images.to(memory_format=torch.channels_last), noise=noise)
    torch.testing.assert_close(output.sample, expected.sample, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.posterior.mean, expected.posterior.mean, atol=1e-5, rtol=1e-4)
    assert output.sample.is_contiguous(memory_format=torch.channels_last)
    assert output.posterior.parameters.is_contiguous(memory_format=torch.channels_last)


# Normalized latents


def test_latents_are_as_they_are_before_the_statistics_are_known(vae, noise):
    assert torch.equal(vae.normalize(noise), noise)


def test_normalized_latents_have_unit_variance_in_each_channel(vae):
    vae.set_latents_statistics(LATENTS_MEAN, LATENTS_STD)
    mean, std = torch.tensor(LATENTS_MEAN).view(4, 1, 1), torch.tensor(LATENTS_STD).view(4, 1, 1)
    one_std_away = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).expand(1, 4, 2, 2)
    assert torch.equal(vae.normalize(mean + std * one_std_away), one_std_away)


def test_denormalize_is_the_inverse_of_normalize(vae, noise):
    vae.set_latents_statistics(LATENTS_MEAN, LATENTS_STD)
    torch.testing.assert_close(vae.denormalize(vae.normalize(noise)), noise)
    torch.testing.assert_close(vae.normalize(vae.denormalize(noise)), noise)


@pytest.mark.parametrize("statistics", [([0.0] * 3, [1.0] * 4), ([0.0] * 4, [1.0] * 5)])
def test_statistics_are_one_value_a_channel(vae, statistics):
    with pytest.raises(ValueError, match="must have 4 values each"):
        vae.set_latents_statistics(*statistics)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_statistics_are_saved_in_the_config(vae, noise, tmp_path, low_cpu_mem_usage):
    vae.set_latents_statistics(LATENTS_MEAN, LATENTS_STD)
    assert (vae.config.latents_mean, vae.config.latents_std) == (LATENTS_MEAN, LATENTS_STD)
    vae.save_pretrained(tmp_path)
    loaded = FlowerAutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert (loaded.config.latents_mean, loaded.config.latents_std) == (LATENTS_MEAN, LATENTS_STD)
    assert torch.equal(loaded.normalize(noise), vae.normalize(noise))
    assert loaded.state_dict().keys() == dict(loaded.named_parameters()).keys()  # and nowhere else


# diffusers' contracts


def test_saved_and_loaded_it_is_the_same(vae, images, noise, tmp_path):
    vae.save_pretrained(tmp_path)
    files = {"config.json", "diffusion_pytorch_model.safetensors", "autoencoder_flower.py"}
    assert {path.name for path in tmp_path.iterdir()} == files
    loaded = FlowerAutoencoderKL.from_pretrained(tmp_path)
    assert not loaded.training
    assert json.loads(loaded.to_json_string()) == {**json.loads(vae.to_json_string()), "_name_or_path": str(tmp_path)}
    assert torch.equal(loaded(images, noise=noise).sample, vae(images, noise=noise).sample)


def test_variant_in_half_precision(vae, images, tmp_path):
    expected = vae(images).sample
    vae.set_latents_statistics(LATENTS_MEAN, LATENTS_STD)
    vae.half().save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = FlowerAutoencoderKL.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    posterior = loaded.encode(images.half()).latent_dist
    assert loaded.normalize(posterior.mean).dtype == torch.float16
    torch.testing.assert_close(loaded(images.half()).sample.float(), expected, atol=5e-3, rtol=1e-2)


def test_shards(vae, images, tmp_path):
    vae.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    loaded = FlowerAutoencoderKL.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).sample, vae(images).sample)


def kept_for_backward(vae: FlowerAutoencoderKL, images: torch.Tensor, noise: torch.Tensor) -> tuple[int, list]:
    """How many values the forward pass keeps, and the gradients of all weights."""
    kept = Counter()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept["values"] += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(vae(images, noise=noise))
    return kept["values"], list(torch.autograd.grad(loss, list(vae.parameters())))


def test_gradient_checkpointing_keeps_less_and_gives_identical_gradients(images, noise):
    vae = make_vae(layers_per_block=2, decoder_layers_per_block=2).train()
    kept, gradients = kept_for_backward(vae, images, noise)
    vae.enable_gradient_checkpointing()
    kept_with_checkpointing, gradients_with_checkpointing = kept_for_backward(vae, images, noise)
    assert kept_with_checkpointing < 0.6 * kept
    for gradient, (name, parameter), again in zip(
        gradients, vae.named_parameters(), gradients_with_checkpointing, strict=True
    ):
        assert gradient.shape == parameter.shape and gradient.any(), name
        assert torch.equal(gradient, again), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_runs_in_low_precision(vae, images, noise, dtype):
    expected = vae(images, noise=noise)
    output = vae.to(dtype)(images.to(dtype), noise=noise.to(dtype))
    assert {output.sample.dtype, output.posterior.mean.dtype, output.class_logits.dtype} == {dtype}
    tolerance = {"atol": 30 * torch.finfo(dtype).eps, "rtol": 0.0}
    torch.testing.assert_close(output.sample.float(), expected.sample, **tolerance)
    torch.testing.assert_close(output.class_logits.float(), expected.class_logits, **tolerance)


def test_trains_under_bf16_autocast_with_fp32_weights(vae, images, noise):
    exact = torch.autograd.grad(loss_of(vae(images, noise=noise)), vae.encoder.conv_in.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = vae(images, noise=noise)
    assert output.sample.dtype == torch.bfloat16
    gradient = torch.autograd.grad(loss_of(output), vae.encoder.conv_in.weight)[0]
    assert gradient.dtype == torch.float32
    assert F.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > 0.99


def test_return_dict_false_gives_tuples(vae, images, noise):
    (posterior,) = vae.encode(images, return_dict=False)
    assert torch.equal(posterior.mean, vae.encode(images).latent_dist.mean)
    (sample,) = vae.decode(noise, return_dict=False)
    assert torch.equal(sample, vae.decode(noise).sample)
    output, plain = vae(images, noise=noise), vae(images, noise=noise, return_dict=False)
    assert type(plain) is tuple
    assert torch.equal(plain[0], output.sample)
    assert torch.equal(plain[1].parameters, output.posterior.parameters)
    assert torch.equal(plain[2], output.class_logits)
    assert torch.equal(plain[3], output.class_features)


def test_traces_as_one_graph(vae, images, noise):
    expected = vae(images, noise=noise).sample
    torch._dynamo.reset()
    compiled = torch.compile(vae, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, noise=noise).sample, expected)


@pytest.mark.slow  # a minute: the C++ compiler takes its time
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_compiles_forward_and_backward(vae, images, noise, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    vae.train()
    expected = loss_of(vae(images, noise=noise))
    expected_gradient = torch.autograd.grad(expected, vae.encoder.conv_in.weight)[0]
    torch._dynamo.reset()
    loss = loss_of(torch.compile(vae, fullgraph=True)(images, noise=noise))
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    gradient = torch.autograd.grad(loss, vae.encoder.conv_in.weight)[0]
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-3)
