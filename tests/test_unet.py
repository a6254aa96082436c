"""FlowerUNet2DModel: what diffusers asks of a model, and that attention, skips and conditioning do what they say.

A new model predicts zero whatever it sees, so most tests perturb all its weights first.
"""

import inspect
import shutil

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from flower_ldm.models.unet_flower import FlowerUNet2DModel, attend, rotary_embedding, rotate

CONFIG = {
    "sample_size": 4,
    "in_channels": 3,
    "hidden_size": 32,
    "num_layers": 5,
    "num_attention_heads": 2,
    "num_classes": 5,
}


def make_unet(**config) -> FlowerUNet2DModel:
    """A tiny model whose every weight is off its initial value."""
    torch.manual_seed(0)
    unet = FlowerUNet2DModel(**{**CONFIG, **config}).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def make_inputs(batch_size: int = 3, size: tuple[int, int] = (4, 4)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch_size, 3, *size, generator=generator)
    return sample, torch.tensor([10, 400, 900])[:batch_size], torch.tensor([0, 2, 4])[:batch_size]


@pytest.fixture(scope="module")
def unet() -> FlowerUNet2DModel:
    return make_unet()


# The contract of diffusers


def test_signature_is_that_of_the_stock_model():
    ours, stock = (inspect.signature(model.forward).parameters for model in (FlowerUNet2DModel, UNet2DModel))
    assert list(ours) == list(stock)
    assert [p.default for p in ours.values()] == [p.default for p in stock.values()]


def test_new_model_predicts_zero_and_its_blocks_are_the_identity():
    unet = FlowerUNet2DModel(**CONFIG)
    seen = []
    for block in unet.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    assert unet(*make_inputs()).sample.abs().max() == 0
    assert len(seen) == CONFIG["num_layers"]
    assert all(torch.allclose(before, after, atol=1e-6) for before, after in seen)


@pytest.mark.parametrize("save_options", [{}, {"max_shard_size": "40KB"}, {"variant": "fp16"}])
def test_save_and_load(tmp_path, unet, save_options):
    unet.save_pretrained(tmp_path, **save_options)
    weights = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(weights) > 1 if "max_shard_size" in save_options else len(weights) == 1
    assert not list(tmp_path.glob("*.bin"))
    loaded = FlowerUNet2DModel.from_pretrained(tmp_path, variant=save_options.get("variant"))
    assert not loaded.training
    assert {name: loaded.config[name] for name in CONFIG} == CONFIG
    assert torch.equal(loaded(*make_inputs()).sample, unet(*make_inputs()).sample)


def test_half_precision_variant(tmp_path):
    make_unet().half().save_pretrained(tmp_path, variant="fp16")
    loaded = FlowerUNet2DModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert loaded.dtype == torch.float16
    assert list(tmp_path.glob("*.fp16.safetensors"))


def test_pair_as_sample_size_survives_json(tmp_path):
    make_unet(sample_size=(4, 6)).save_pretrained(tmp_path)
    assert tuple(FlowerUNet2DModel.from_pretrained(tmp_path).config.sample_size) == (4, 6)


def test_return_dict(unet):
    output = unet(*make_inputs(), return_dict=False)
    assert isinstance(output, tuple) and len(output) == 1
    assert torch.equal(output[0], unet(*make_inputs()).sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_in_half_precision(unet, dtype):
    sample, timesteps, class_labels = make_inputs()
    prediction = make_unet().to(dtype)(sample.to(dtype), timesteps, class_labels).sample
    assert prediction.dtype == dtype
    expected = unet(sample, timesteps, class_labels).sample
    assert (prediction.float() - expected).norm() < 0.03 * expected.norm()


def test_autocast_keeps_the_stream_in_bfloat16_and_gradients_in_float32():
    unet = make_unet()
    dtypes = []
    unet.blocks[-1].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        prediction = unet(*make_inputs()).sample
    prediction.float().square().mean().backward()
    assert dtypes == [torch.bfloat16]
    assert all(parameter.grad.dtype == torch.float32 for parameter in unet.parameters())
    expected = make_unet()(*make_inputs()).sample
    assert (prediction - expected).norm() < 0.03 * expected.norm()


def test_gradient_checkpointing_gives_identical_gradients():
    gradients = []
    for checkpointing in (False, True):
        unet = make_unet(dropout=0.1).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        calls = []
        unet.blocks[0].register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        torch.manual_seed(2)
        unet(*make_inputs()).sample.square().mean().backward()
        assert len(calls) == 1 + checkpointing  # the second time in the backward pass
        gradients.append([parameter.grad for parameter in unet.parameters()])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*gradients, strict=True))


def test_traces_as_one_graph(unet):
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(*make_inputs()).sample, unet(*make_inputs()).sample, atol=1e-5)
    sample, timesteps, _ = make_inputs()
    weights = torch.full((3, CONFIG["num_classes"] + 1), 1 / 6)
    expected = unet(sample, timesteps, weights).sample
    assert torch.allclose(compiled(sample, timesteps, weights).sample, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiles_as_one_graph_with_its_gradients():
    unet, compiled_unet = make_unet(num_layers=3), make_unet(num_layers=3)
    compiled = torch.compile(compiled_unet, fullgraph=True)
    for model in (unet, compiled):
        model(*make_inputs()).sample.square().mean().backward()
    for expected, actual in zip(unet.parameters(), compiled_unet.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=1e-5)


# Conditioning


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.full((3,), 7)])
def test_any_form_of_timestep(unet, timestep):
    sample, _, class_labels = make_inputs()
    expected = unet(sample, torch.full((3,), 7, dtype=torch.int32), class_labels).sample
    assert torch.equal(unet(sample, timestep, class_labels).sample, expected)


def test_every_sample_has_its_own_timestep_and_label(unet):
    sample, timesteps, class_labels = make_inputs()
    together = unet(sample, timesteps, class_labels).sample
    alone = [unet(sample[i : i + 1], timesteps[i], class_labels[i : i + 1]).sample for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_timestep_and_label_reach_every_block():
    unet = make_unet()
    sample, timesteps, class_labels = make_inputs()
    expected = unet(sample, timesteps, class_labels).sample
    assert not torch.allclose(unet(sample, timesteps + 1, class_labels).sample, expected, atol=1e-3)
    assert not torch.allclose(unet(sample, timesteps, class_labels + 1).sample, expected, atol=1e-3)
    modulations = []
    for block in unet.blocks:
        block.register_forward_hook(lambda module, args, output: modulations.append(args[1]))
    unet(sample, timesteps, class_labels)
    for modulation in modulations:
        (gradient,) = torch.autograd.grad(modulation.sum(), unet.class_embedding.weight, retain_graph=True)
        assert gradient[class_labels].abs().sum(dim=1).min() > 0


def test_null_label_is_the_default(unet):
    sample, timesteps, _ = make_inputs()
    assert unet.null_label == 5
    expected = unet(sample, timesteps, torch.full((3,), 5)).sample
    assert torch.equal(unet(sample, timesteps).sample, expected)


def test_floats_as_labels_weigh_the_rows_of_the_embedding(unet):
    sample, timesteps, class_labels = make_inputs()
    one_hot = F.one_hot(class_labels, CONFIG["num_classes"] + 1).float()
    expected = unet(sample, timesteps, class_labels).sample
    torch.testing.assert_close(unet(sample, timesteps, one_hot).sample, expected, rtol=1e-5, atol=1e-6)
    seen = []
    unet_of_one_class = make_unet()
    unet_of_one_class.modulation.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    unet_of_one_class(sample[:1], 7, torch.tensor([[0.25, 0, 0.75, 0, 0, 0]]))
    table = unet_of_one_class.class_embedding.weight
    with torch.no_grad():
        table[4] = 0.25 * table[0] + 0.75 * table[2]
    unet_of_one_class(sample[:1], 7, torch.tensor([4]))
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats_as_labels_in_half_precision(unet, dtype):
    sample, timesteps, class_labels = make_inputs()
    weights = F.one_hot(class_labels, CONFIG["num_classes"] + 1).float()
    prediction = make_unet().to(dtype)(sample.to(dtype), timesteps, weights).sample
    assert prediction.dtype == dtype
    expected = unet(sample, timesteps, class_labels).sample
    assert (prediction.float() - expected).norm() < 0.03 * expected.norm()


# Attention and skips


def test_attention_mixes_positions_and_never_the_batch(unet):
    sample, timesteps, class_labels = make_inputs()
    sample.requires_grad_()
    unet(sample, timesteps, class_labels).sample[1, :, 0, 0].sum().backward()
    reach = sample.grad.abs().sum(dim=1)  # (B, H, W)
    assert reach[1].min() > 0
    assert reach[[0, 2]].max() == 0


def test_attend_is_scaled_dot_product_attention():
    query, key, value = torch.randn(3, 2, 2, 9, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    torch.testing.assert_close(attend(query, key, value).float(), expected, rtol=0.02, atol=0.02)


def test_rotation_keeps_length_and_depends_on_the_offset_alone():
    cosine, sine = rotary_embedding(5, 6, 16, torch.device("cpu"), torch.float32)
    query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    queries, keys = (rotate(vector.expand(30, 16), cosine, sine) for vector in (query, key))
    torch.testing.assert_close(queries.norm(dim=-1), query.norm().expand(30))
    scores = (queries @ keys.T).unflatten(0, (5, 6)).unflatten(2, (5, 6))  # row, column of the query, then of the key
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[3, 2, 4, 4], rtol=1e-4, atol=1e-5)
    assert (scores[0, 0, 1, 2] - scores[0, 0, 2, 1]).abs() > 1e-3  # rows are not columns
    assert (scores[0, 0, 1, 2] - scores[1, 2, 0, 0]).abs() > 1e-3  # nor is there as good as back


def test_positions_matter(unet):
    sample, timesteps, class_labels = make_inputs()
    moved = unet(sample.roll(1, dims=-1), timesteps, class_labels).sample.roll(-1, dims=-1)
    assert not torch.allclose(moved, unet(sample, timesteps, class_labels).sample, atol=1e-3)


@pytest.mark.parametrize("size", [(6, 2), (1, 1), (8, 8)])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_other_sample_sizes(size, patch_size):
    size = tuple(side * patch_size for side in size)
    unet = make_unet(patch_size=patch_size, out_channels=4)
    sample, timesteps, class_labels = make_inputs(size=size)
    assert unet(sample, timesteps, class_labels).sample.shape == (3, 4, *size)


def test_every_block_of_the_second_half_gets_the_output_of_its_mirror(unet):
    outputs, skips = [], []

    def record(module, args, output):
        outputs.append(output)
        skips.append(args[-1])

    handles = [block.register_forward_hook(record) for block in unet.blocks]
    unet(*make_inputs())
    for handle in handles:
        handle.remove()
    assert skips[:3] == [None, None, None]
    assert skips[3] is outputs[1] and skips[4] is outputs[0]


def test_skips_are_used():
    unet = make_unet()
    expected = unet(*make_inputs()).sample
    for layer in (3, 4):
        weight = unet.blocks[layer].skip.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[:, CONFIG["hidden_size"] :] = 0
            assert not torch.allclose(unet(*make_inputs()).sample, expected, atol=1e-3)
            weight.copy_(kept)


# Bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_layers": 4}, "num_layers must be odd"),
        ({"num_layers": -1}, "num_layers must be a whole number from 1 to "),
        ({"hidden_size": 36}, "hidden_size must be a multiple of 4"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number from 1 to "),
        ({"num_classes": 0}, "num_classes must be a whole number from 1 to "),
        ({"patch_size": 3}, "sample_size must be one or two multiples of patch_size=3"),
        ({"sample_size": (4, 4, 4)}, "sample_size must be one or two"),
        ({"sample_size": 10**6}, "sample_size must be one or two multiples of patch_size=1 up to 8,192, not 1000000"),
        ({"sample_size": None}, "sample_size must be one or two"),
        ({"sample_size": "4"}, "sample_size must be one or two"),
        ({"num_layers": 10**9 + 1}, "num_layers must be a whole number from 1 to 1,001, not 1000000001"),
        ({"num_layers": 3.0}, "num_layers must be a whole number"),
        ({"num_layers": True}, "num_layers must be a whole number"),
        ({"num_classes": 10**12}, "num_classes must be a whole number from 1 to 1,000,000"),
        ({"in_channels": "3"}, "in_channels must be a whole number"),
        ({"out_channels": -1}, "out_channels must be a whole number"),
        ({"hidden_size": 2**16, "num_layers": 1001}, "ask for 6e[+]13 weights, more than 1e[+]11"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be a number from 0 to 64, not nan"),
        ({"dropout": 1.5}, "dropout must be a number from 0 to 1"),
    ],
)
def test_impossible_config(config, message):
    with pytest.raises(ValueError, match=message):
        FlowerUNet2DModel(**{**CONFIG, **config})


def test_inputs_that_do_not_fit():
    unet = make_unet(patch_size=2)
    sample, timesteps, class_labels = make_inputs()
    with pytest.raises(ValueError, match="in_channels=3 channels, not 2"):
        unet(sample[:, :2], timesteps, class_labels)
    with pytest.raises(ValueError, match="multiples of patch_size=2, not 4x3"):
        unet(sample[..., :3], timesteps, class_labels)
    with pytest.raises(ValueError, match="timestep must hold 1 or 3"):
        unet(sample, timesteps[:2], class_labels)
    with pytest.raises(ValueError, match=r"class_labels must have shape \(3,\)"):
        unet(sample, timesteps, class_labels[:2])
    with pytest.raises(ValueError, match=r"float class_labels must have shape \(3, 6\), not \(3,\)"):
        unet(sample, timesteps, class_labels.float())
    with pytest.raises(ValueError, match=r"class_labels must have shape \(3,\), not \(3, 6\)"):
        unet(sample, timesteps, torch.zeros(3, 6, dtype=torch.int64))
