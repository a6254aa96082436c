"""pipelines/pipeline_flower_ldm.py: labels, guidance, noise, schedulers, outputs, saving so that it loads anywhere."""

import inspect
import json
import logging
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from huggingface_hub import constants, create_branch, create_repo, upload_folder
from safetensors.torch import load_file, save_file

from flower_ldm import FlowerAutoencoderKL, FlowerUNet2DModel
from flower_ldm.pipelines.pipeline_flower_ldm import (
    GUIDANCE_SCALE,
    SCHEDULERS,
    FlowerLDMPipeline,
    find_classes,
    latents_statistics,
    plain_name,
)

NAMES = {0: "rose", 1: "sunflower", 2: "7", 3: "Tulip"}
STEPS = 4


def stock_parts() -> tuple[AutoencoderKL, UNet2DModel]:
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    unet = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=len(NAMES) + 1,
    )
    return vae, unet


def flower_parts() -> tuple[FlowerAutoencoderKL, FlowerUNet2DModel]:
    vae = FlowerAutoencoderKL(
        latent_channels=4,
        patch_size=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        decoder_layers_per_block=1,
        num_classes=len(NAMES),
        latents_mean=[0.1, 0.2, -0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 3.0],
    )
    unet = FlowerUNet2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=3, num_attention_heads=2, num_classes=len(NAMES)
    )
    for parameter in unet.parameters():  # untrained it predicts zero
        torch.nn.init.normal_(parameter, std=0.1)
    return vae, unet


def make_pipeline(parts=stock_parts, id2label=NAMES) -> FlowerLDMPipeline:
    torch.manual_seed(0)
    vae, unet = parts()
    pipe = FlowerLDMPipeline(vae.eval(), unet.eval(), DDIMScheduler(clip_sample=False), id2label=id2label)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=[stock_parts, flower_parts], ids=["stock", "flower"])
def pipe(request) -> FlowerLDMPipeline:
    return make_pipeline(request.param)


@pytest.fixture
def stock_pipe() -> FlowerLDMPipeline:
    return make_pipeline()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(pipe: FlowerLDMPipeline, labels=("rose",), output_type="latent", **options) -> torch.Tensor:
    options = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0), **options}
    return pipe(labels, output_type=output_type, **options).images


def record_forwards(pipe: FlowerLDMPipeline) -> list[list[int]]:
    """The class labels of every forward of the unet from here on."""
    calls: list[list[int]] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: calls.append(args[2].tolist()))
    return calls


# Labels


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        ("sunflower", [1]),
        (1, [1]),
        (["sunflower", 0], [1, 0]),
        (("Tulip", "rose"), [3, 0]),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor(2), [2]),
        (np.array([0, 2]), [0, 2]),
        ([np.int64(3), torch.tensor(1)], [3, 1]),
        (range(2), [0, 1]),
        ("3", [3]),
        ("7", [2]),  # a name that looks like an index is a name
        (" 7 ", [2]),
        ("TULIP", [3]),
        ("\u00a0 sunflower\n", [1]),
    ],
)
def test_labels_are_names_or_indices_one_or_many(stock_pipe, labels, ids):
    assert stock_pipe.get_label_ids(labels) == ids


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("sunflwer", "nearest names are 'sunflower'"),
        (["rose", "zzz"], "unknown label 'zzz': names are such as 'rose'"),
        ("٣", "unknown label '٣': names are such as"),  # a digit to int() and to isdecimal()
        ("²", "unknown label '²'"),  # a digit to isdigit()
        ("1_0", "unknown label '1_0'"),  # 10 to int()
        ("1" * 5000, "unknown label '1111"),
        ("rose\n" * 5000, r"unknown label 'rose\\nrose\\n"),
        (4, "label 4 is out of range: the labels are 0 to 3"),
        (-1, "label -1 is out of range"),
        ("-1", "label '-1' is out of range"),
        (torch.tensor([0, 9]), "label 9 is out of range"),
        (1.0, "label 1.0 is neither a class name nor an index"),
        ([True], "label True is neither"),
        ([torch.tensor(True)], r"label tensor\(True\) is neither"),  # an index to operator.index
        ([torch.zeros(9, 9)], "label tensor.* is neither a class name nor an index"),  # lines to repr
        (None, "label None is neither"),
        ([["rose"]], "neither a class name nor an index"),
        ([], "labels is empty"),
    ],
)
def test_bad_label_is_one_clear_line(stock_pipe, labels, message):
    calls = record_forwards(stock_pipe)
    with pytest.raises(ValueError, match=message) as error:
        sample(stock_pipe, labels)
    assert "\n" not in str(error.value)
    assert not calls


def test_a_mixture_of_one_class_is_that_class():
    pipe = make_pipeline(flower_parts)
    calls = record_forwards(pipe)
    mixed = sample(pipe, torch.eye(4)[[1, 3]], guidance_scale=2.0)
    torch.testing.assert_close(mixed, sample(pipe, [1, 3], guidance_scale=2.0), rtol=1e-4, atol=1e-5)
    assert calls[0] == torch.eye(5)[[1, 3, 4, 4]].tolist()  # guided by the null label


def test_mixtures_lie_between_their_classes():
    pipe = make_pipeline(flower_parts)
    noise = torch.randn(1, *pipe.latents_shape, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([[1.0, 0, 0, 0], [0.9, 0, 0.1, 0], [0.5, 0, 0.5, 0], [0, 0, 1, 0]])
    images = sample(pipe, weights, latents=noise.expand(4, -1, -1, -1), guidance_scale=1)
    distances = (images - images[0]).flatten(1).norm(dim=1)
    assert 0 == distances[0] < distances[1] < distances[2] < distances[3]
    twice = sample(pipe, weights[:2], num_images_per_label=2, latents=noise.expand(4, -1, -1, -1), guidance_scale=1)
    torch.testing.assert_close(twice, images[[0, 0, 1, 1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((2, 5), 0.2), r"must have the shape \(L, 4\), a weight for each class, got \(2, 5\)"),
        (torch.zeros(0, 4), r"must have the shape \(L, 4\), a weight for each class, got \(0, 4\)"),
        (torch.eye(4) * 2, "finite weights that sum to 1"),
        (torch.tensor([[float("nan"), 1, 0, 0]]), "finite weights that sum to 1"),
        (torch.tensor([[float("inf"), 1, 0, 0]]), "finite weights that sum to 1"),
        ({"rose": 0.5, "Tulip": 0.4}, "finite weights that sum to 1"),
        ({}, "finite weights that sum to 1"),
        ({"rose": 0.5, "tulipp": 0.5}, "unknown label 'tulipp': the nearest names are 'Tulip'"),
        ({"rose": float("nan"), 1: 1}, "the weight of 'rose' must be a finite number, got nan"),
        (["rose", {"rose": "1"}], "the weight of 'rose' must be a finite number, got '1'"),
    ],
)
def test_bad_mixture_is_one_clear_line(labels, message):
    pipe = make_pipeline(flower_parts)
    calls = record_forwards(pipe)
    with pytest.raises(ValueError, match=message) as error:
        sample(pipe, labels)
    assert "\n" not in str(error.value)
    assert not calls


def test_sums_of_classes_by_name_and_weight():
    pipe = make_pipeline(flower_parts)
    calls = record_forwards(pipe)
    by_name = sample(pipe, ["sunflower", {"rose": 1, "Tulip": 0.5, 1: -0.5}], guidance_scale=2.0)
    assert calls[0][:2] == [[0, 1, 0, 0, 0], [1, -0.5, 0, 0.5, 0]]
    weights = torch.tensor([[0, 1, 0, 0], [1, -0.5, 0, 0.5]])
    assert torch.equal(sample(pipe, weights, guidance_scale=2.0), by_name)
    assert torch.equal(sample(pipe, {"rose": 1}), sample(pipe, torch.eye(4)[:1]))


def test_a_stock_unet_takes_no_mixtures(stock_pipe):
    with pytest.raises(ValueError, match="^labels are mixtures of classes, but UNet2DModel takes single ones: give"):
        sample(stock_pipe, torch.eye(4))


def test_without_names_indices_still_work():
    pipe = make_pipeline(id2label=None)
    assert pipe.class_names == ["0", "1", "2", "3"]
    assert pipe.get_label_ids(["3", 1]) == [3, 1]
    with pytest.raises(ValueError, match="unknown label 'rose'"):
        pipe.get_label_ids("rose")


LOOKALIKES = ["rose", "rose ", "Rose", "caf\u00e9", "cafe\u0301", "sword  lily", "1"]


@pytest.mark.parametrize(
    ("label", "index"),
    [(name, index) for index, name in enumerate(LOOKALIKES)]  # the exact spelling first
    + [
        ("Rose ", 2),  # then the one that differs in blanks or Unicode's form
        ("Cafe\u0301", None),
        ("ROSE", None),  # in case only: three are alike
        (" sword lily", 5),
        ("SWORD LILY", 5),
        ("1 ", 6),
        ("0", 0),
        (6, 6),
    ],
)
def test_classes_are_found_by_one_rule(label, index):
    if index is None:
        with pytest.raises(ValueError, match=f"label '{label}' may be any of '(rose|caf)"):
            find_classes([label], LOOKALIKES)
    else:
        assert find_classes([label], LOOKALIKES) == [index]


def test_plain_names():
    assert plain_name(" sword \t\u00a0lily\n") == "sword lily"
    assert plain_name("cafe\u0301") == "caf\u00e9"
    assert plain_name(os.fsdecode(b"ros\xe9")) == "ros\\udce9"
    assert plain_name(" \u2003 ") == ""


def test_many_labels_among_many_names_are_looked_up_not_searched(counted):
    names = [counted(f"class {index}") for index in range(2000)]
    assert find_classes([f"class {index}" for index in range(2000)], names) == list(range(2000))
    assert find_classes([f"CLASS {index}" for index in range(2000)], names) == list(range(2000))
    assert counted.compared < 20 * 2000


@pytest.mark.parametrize("id2label", [{0: "rose"}, {0: "a", 1: "b", 2: "c", 4: "d"}, {0: "a", 1: "a", 2: "b", 3: "c"},
                                      {"0": "a", "00": "b", 1: "c", 2: "d", 3: "e"}])  # fmt: skip
def test_id2label_names_each_class_once(id2label):
    with pytest.raises(ValueError, match="id2label must name each of the labels 0 to 3 once"):
        make_pipeline(id2label=id2label)


@pytest.mark.parametrize("id2label", [["a", "b", "c", "d"], {"²": "a", 1: "b", 2: "c", 3: "d"},
                                      {0.5: "a", 1: "b", 2: "c", 3: "d"}, "abcd"])  # fmt: skip
def test_id2label_is_a_dict_of_labels(id2label):
    with pytest.raises(ValueError, match="id2label must be a dict of labels and their names, got"):
        make_pipeline(id2label=id2label)


def test_unconditional_unet_is_refused():
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="takes no class labels"):
        FlowerLDMPipeline(stock_parts()[0], unet, DDIMScheduler(), id2label=NAMES)


def test_images_come_label_by_label(pipe):
    calls = record_forwards(pipe)
    images = sample(pipe, ["sunflower", 0], "pt", num_images_per_label=2, guidance_scale=1)
    assert images.shape[0] == 4
    assert calls == [[1, 1, 0, 0]] * STEPS


# Bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
        ({"guidance_scale": "2"}, "guidance_scale must be a finite number"),
        ({"num_images_per_label": 0}, "num_images_per_label must be a whole number of at least 1"),
        ({"num_images_per_label": 1.5}, "num_images_per_label must be a whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1"),
        ({"output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents must have the shape \(2, 4, 8, 8\), got \(1, 4, 8, 8\)"),
        ({"latents": torch.zeros(2, 4, 8, 8).long()}, "latents must be a tensor of floats"),
        ({"generator": generators(0)}, "must have one for each of 2 images, got 1"),
        ({"generator": [0, 1]}, "generator must be a torch.Generator"),
        ({"generator": 0}, "generator must be a torch.Generator"),
        ({"guidance_interval": (0.5, 0.5)}, "0 <= begin < end <= 1"),
        ({"guidance_interval": (0.8, 0.1)}, "0 <= begin < end <= 1"),
        ({"guidance_interval": (-0.1, 1.0)}, "0 <= begin < end <= 1"),
        ({"guidance_interval": (0.0, 1.1)}, "0 <= begin < end <= 1"),
        ({"guidance_interval": (float("nan"), 1.0)}, "0 <= begin < end <= 1"),
        ({"guidance_interval": (0.5,)}, "0 <= begin < end <= 1"),
        ({"guidance_interval": 0.5}, "0 <= begin < end <= 1"),
        ({"eta": -1.0}, "eta must be a finite number of at least 0"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "must be among"),
        ({"callback_on_step_end_tensor_inputs": 1}, "must be among"),
        ({"strength": torch.zeros(9, 9)}, "strength must be above 0 and at most 1, got tensor"),
        ({"eta": [0] * 2000}, r"eta must be a finite number of at least 0, got \[0, 0, .* \.\.\.$"),
        ({"guidance_scale": 10**5000}, "guidance_scale must be a finite number .*, got a int$"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_argument_is_one_clear_line_before_any_computation(stock_pipe, options, message):
    calls = record_forwards(stock_pipe)
    with pytest.raises(ValueError, match=message) as error:
        sample(stock_pipe, ["rose", 1], **{"output_type": "pt", **options})
    assert "\n" not in str(error.value)
    assert not calls


def state_of(scheduler) -> dict:
    """All that a scheduler remembers, each tensor with the numbers in it."""
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else list(value) if isinstance(value, list) else value
        for name, value in vars(scheduler).items()
    }


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_checking_inputs_changes_nothing(stock_pipe, scheduler):
    stock_pipe.scheduler = stock_pipe.make_scheduler(SCHEDULERS[scheduler].scheduler_class)
    sample(stock_pipe, num_inference_steps=25)
    state, chance = state_of(stock_pipe.scheduler), torch.get_rng_state()
    stock_pipe.check_inputs(num_labels=2, num_inference_steps=20, guidance_scale=1.5)
    stock_pipe.check_inputs(num_labels=1)
    assert state_of(stock_pipe.scheduler) == state
    assert torch.equal(torch.get_rng_state(), chance)


def test_inputs_can_be_checked_in_the_middle_of_a_call(pipe):
    expected = sample(pipe)

    def check(pipe, *_):
        pipe.check_inputs(num_labels=3, num_inference_steps=50)
        return {}

    assert torch.equal(sample(pipe, callback_on_step_end=check), expected)


def test_arguments_that_are_not_checked_count_as_the_calls_defaults(stock_pipe):
    """25 steps, for one."""
    stock_pipe.scheduler = DDIMScheduler(20, beta_schedule="squaredcos_cap_v2", clip_sample=False)
    with pytest.raises(ValueError, match="^num_inference_steps must be at most 20, as many as training has, got 25$"):
        stock_pipe.check_inputs(num_labels=1)
    stock_pipe.check_inputs(num_labels=1, num_inference_steps=20)
    with pytest.raises(ValueError, match="must have one for each of 2 images, got 3"):
        stock_pipe.check_inputs(num_labels=2, num_inference_steps=20, generator=generators(0, 1, 2))
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        stock_pipe.check_inputs(num_labels=1, steps=20)


def test_a_scheduler_whose_config_leaves_no_timestep_is_one_clear_line(stock_pipe):
    options = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "lambda_min_clipped": 9.0}
    stock_pipe.scheduler = diffusers.DPMSolverMultistepScheduler(**options)
    with pytest.raises(ValueError, match="^DPMSolverMultistepScheduler can't take 4 steps: "):
        sample(stock_pipe)


# Guidance


def test_guidance_scale_one_is_one_forward_a_step_without_the_null_label(pipe):
    calls = record_forwards(pipe)
    sample(pipe, ["rose", 1], guidance_scale=1)
    assert calls == [[0, 1]] * STEPS


def test_guidance_is_one_batched_forward_with_the_null_label(pipe):
    calls = record_forwards(pipe)
    sample(pipe, ["rose", 1], guidance_scale=2.0)
    assert calls == [[0, 1, 4, 4]] * STEPS


def test_guidance_interval_counts_from_pure_noise(pipe):
    calls = record_forwards(pipe)
    sample(pipe, "rose", guidance_scale=2.0, guidance_interval=(0.1, 0.8), num_inference_steps=10)
    assert [len(labels) for labels in calls] == [1] + [2] * 7 + [1] * 2


def test_guided_prediction_extrapolates_from_null_to_label(pipe):
    latents = torch.randn(2, *pipe.latents_shape)
    timestep, labels = torch.tensor(500), torch.tensor([0, 3])
    with torch.no_grad():
        conditional = pipe.unet(latents, timestep, labels).sample
        unconditional = pipe.unet(latents, timestep, torch.full_like(labels, pipe.null_label)).sample
        guided = pipe.predict(latents, timestep, labels, guidance_scale=3.0)
    assert (conditional - unconditional).abs().max() > 1e-4
    torch.testing.assert_close(guided, 3 * conditional - 2 * unconditional, rtol=1e-4, atol=1e-5)


def test_guidance_rescale_brings_the_spread_back(pipe):
    latents, timestep, labels = torch.randn(2, *pipe.latents_shape), torch.tensor(500), torch.tensor([0, 3])
    with torch.no_grad():
        conditional, guided, rescaled, half = (
            pipe.predict(latents, timestep, labels, scale, rescale)
            for scale, rescale in ((1, 0), (8, 0), (8, 1), (8, 0.5))
        )
    spread, target = guided.flatten(1).std(dim=1), conditional.flatten(1).std(dim=1)
    assert (spread > 1.05 * target).all()
    torch.testing.assert_close(rescaled.flatten(1).std(dim=1), target)  # Lin et al. 2023, eq. 15
    torch.testing.assert_close(rescaled, guided * (target / spread).view(-1, 1, 1, 1))
    torch.testing.assert_close(half, (rescaled + guided) / 2)  # eq. 16


# The guidance that suits a model


def with_guidance(pipe: FlowerLDMPipeline, **guidance) -> FlowerLDMPipeline:
    pipe = FlowerLDMPipeline.from_pipe(pipe, **guidance)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_call_takes_the_guidance_that_the_pipeline_keeps(pipe, tmp_path):
    assert pipe.default_guidance_scale == pipe.guidance_scale == GUIDANCE_SCALE
    assert torch.equal(sample(pipe), sample(pipe, guidance_scale=GUIDANCE_SCALE, guidance_interval=(0.0, 1.0)))
    expected = sample(pipe, guidance_scale=5, guidance_interval=(0.25, 0.75))
    kept = with_guidance(pipe, guidance_scale=5, guidance_interval=(0.25, 0.75))
    kept.save_pretrained(tmp_path)
    for one in (kept, FlowerLDMPipeline.from_pretrained(tmp_path), with_guidance(kept)):
        assert one.resolve_guidance() == (5.0, [0.25, 0.75])
        calls = record_forwards(one)
        assert torch.equal(sample(one), expected)
        assert [len(labels) for labels in calls] == [1, 2, 2, 1]
    assert torch.equal(sample(kept, guidance_scale=1), sample(pipe, guidance_scale=1))
    index = read_index(tmp_path)
    assert (index["guidance_scale"], index["guidance_interval"], index["takes_guidance"]) == (5.0, [0.25, 0.75], True)


def test_a_pipeline_that_was_saved_before_it_kept_guidance_takes_the_default(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = read_index(tmp_path)
    for name in ("guidance_scale", "guidance_interval", "takes_guidance"):
        del index[name]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = FlowerLDMPipeline.from_pretrained(tmp_path)
    assert loaded.resolve_guidance() == (GUIDANCE_SCALE, [0.0, 1.0]) and loaded.can_guide
    assert torch.equal(sample(loaded), sample(pipe))


def test_a_model_without_a_null_label_is_guided_by_a_guide_only(tmp_path):
    unguided = with_guidance(make_pipeline(flower_parts), takes_guidance=False)
    unguided.save_pretrained(tmp_path)
    pipe = FlowerLDMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    calls = record_forwards(pipe)
    assert pipe.default_guidance_scale == 1 and not pipe.can_guide
    assert torch.equal(sample(pipe), sample(pipe, guidance_scale=1))
    assert calls == [[0]] * 2 * STEPS
    with pytest.raises(ValueError, match="^guidance_scale must be 1, got 2: this model takes no guidance, since its"):
        sample(pipe, guidance_scale=2.0)
    assert len(calls) == 2 * STEPS
    pipe.guide = flower_guide()
    assert pipe.default_guidance_scale == GUIDANCE_SCALE
    assert not torch.equal(sample(pipe, guidance_scale=2.0), sample(pipe, guidance_scale=1))


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number (1 means off), got nan"),
        ({"guidance_scale": "3"}, "guidance_scale must be a finite number (1 means off), got '3'"),
        ({"guidance_interval": [0.5]}, "guidance_interval must be two fractions of the trajectory"),
        ({"guidance_interval": ["flower_ldm", "FlowerUNet2DModel"]}, "guidance_interval must be two fractions"),
        ({"takes_guidance": "no"}, "takes_guidance must be true or false, got 'no'"),
    ],
)
def test_guidance_in_a_config_that_cannot_be_right_is_one_clear_line(stock_pipe, tmp_path, guidance, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FlowerLDMPipeline(**stock_pipe.components, **guidance)
    stock_pipe.save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(read_index(tmp_path) | guidance))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        FlowerLDMPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


# Autoguidance


def flower_guide(**options) -> FlowerUNet2DModel:
    """Half as wide as the unet of `flower_parts`."""
    torch.manual_seed(1)
    options = {"sample_size": 8, "in_channels": 4, "num_classes": len(NAMES), **options}
    unet = FlowerUNet2DModel(hidden_size=16, num_layers=1, num_attention_heads=2, **options).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


def test_a_guide_takes_the_place_of_the_null_label():
    pipe = make_pipeline(flower_parts)
    plain = sample(pipe, guidance_scale=2.0)
    pipe.guide = flower_guide()
    latents, timestep, labels = torch.randn(2, *pipe.latents_shape), torch.tensor(500), torch.tensor([0, 3])
    calls = record_forwards(pipe)
    with torch.no_grad():
        own, worse = (unet(latents, timestep, labels).sample for unet in (pipe.unet, pipe.guide))
        torch.testing.assert_close(pipe.predict(latents, timestep, labels, 3.0), worse + 3 * (own - worse))
    assert calls[1:] == [[0, 3]]
    assert not torch.equal(sample(pipe, guidance_scale=2.0), plain)
    mixed = torch.eye(4)[:1]
    torch.testing.assert_close(sample(pipe, mixed), sample(pipe, "rose"), rtol=1e-4, atol=1e-5)
    unguided = sample(pipe, guidance_scale=1)
    pipe.guide = None
    assert torch.equal(sample(pipe, guidance_scale=1), unguided)


def test_a_guide_that_is_the_unet_changes_nothing():
    pipe = make_pipeline(flower_parts)
    pipe.guide = pipe.unet
    torch.testing.assert_close(sample(pipe, guidance_scale=5), sample(pipe, guidance_scale=1), rtol=1e-4, atol=1e-4)


def test_a_guide_is_given_to_from_pretrained_and_saved_along(tmp_path):
    pipe = make_pipeline(flower_parts)
    pipe.save_pretrained(tmp_path / "plain")
    assert read_index(tmp_path / "plain")["guide"] == [None, None] and not (tmp_path / "plain" / "guide").exists()
    guided = FlowerLDMPipeline.from_pretrained(tmp_path / "plain", guide=flower_guide())
    guided.save_pretrained(tmp_path / "given")
    plain = sample(pipe)
    pipe.guide = flower_guide()
    pipe.save_pretrained(tmp_path / "set")
    expected = sample(pipe)
    assert not torch.allclose(expected, plain, rtol=0.1)
    for folder in ("given", "set"):
        assert read_index(tmp_path / folder)["guide"] == ["unet_flower", "FlowerUNet2DModel"]
        loaded = FlowerLDMPipeline.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(sample(loaded), expected, rtol=1e-4, atol=1e-4)
        without = FlowerLDMPipeline.from_pretrained(tmp_path / folder, guide=None)
        torch.testing.assert_close(sample(without), plain, rtol=1e-4, atol=1e-4)


def test_a_pipeline_that_was_saved_before_there_were_guides_loads(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = read_index(tmp_path)
    del index["guide"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    torch.testing.assert_close(sample(FlowerLDMPipeline.from_pretrained(tmp_path)), sample(pipe))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (flower_guide(num_classes=3), "guide must be for 4 classes as the unet is, but is for 3 classes"),
        (flower_guide(sample_size=4), r"for latents of \(4, 8, 8\) as the unet is, but is for latents of \(4, 4, 4\)"),
        (flower_guide(in_channels=3), r"but is for latents of \(3, 8, 8\)"),
        (torch.nn.Identity(), "guide must be a denoiser, such as another pipeline's unet, got Identity"),
        ("results/weak", "guide must be a denoiser, such as another pipeline's unet, got str"),
    ],
)
def test_a_guide_that_does_not_fit_is_one_clear_line(tmp_path, guide, message):
    pipe = make_pipeline(flower_parts)
    with pytest.raises(ValueError, match=message) as error:
        FlowerLDMPipeline(**{**pipe.components, "guide": guide})
    assert "\n" not in str(error.value)
    if isinstance(guide, torch.nn.Module):
        pipe.guide = guide
        with pytest.raises(ValueError, match=message):
            sample(pipe)


# Noise, batches, outputs


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_batch_equals_single_images_with_a_list_of_generators(pipe, scheduler):
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    together = sample(pipe, ["rose", 3], generator=generators(5, 6))
    alone = torch.cat([sample(pipe, "rose", generator=generators(5)), sample(pipe, 3, generator=generators(6)[0])])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_given_latents_replace_the_noise(pipe):
    noise = torch.randn(1, *pipe.latents_shape, generator=torch.Generator().manual_seed(7))
    drawn = sample(pipe, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(sample(pipe, latents=noise), drawn, rtol=0, atol=0)
    assert not torch.equal(sample(pipe, latents=noise + 1), drawn)


def test_eta_reaches_the_scheduler(stock_pipe):
    assert not torch.equal(sample(stock_pipe, eta=1.0), sample(stock_pipe, eta=0.0))


def test_output_types_agree(pipe):
    latents = sample(pipe, output_type="latent")
    tensor, array, pictures = (sample(pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    assert latents.shape == (1, *pipe.latents_shape)
    assert tensor.dtype == torch.float32 and tensor.shape[:2] == (1, 3)
    assert 0 <= tensor.min() < tensor.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert isinstance(pictures, list) and isinstance(pictures[0], PIL.Image.Image)
    np.testing.assert_array_equal(np.asarray(pictures[0]), (array[0] * 255).round().astype(np.uint8))


def test_default_output_is_pil_and_tuple_on_request(pipe):
    images = pipe("rose", num_inference_steps=2, return_dict=False)
    assert isinstance(images, tuple) and isinstance(images[0][0], PIL.Image.Image)


def test_stock_vae_is_decoded_through_its_factors(stock_pipe):
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = stock_pipe.vae.decode(latents / 0.5 + 0.25).sample
        torch.testing.assert_close(stock_pipe.decode_latents(latents, "pt"), (expected / 2 + 0.5).clamp(0, 1))
        stock_pipe.vae.register_to_config(latents_mean=[1.0] * 4, latents_std=[3.0] * 4)
        expected = stock_pipe.vae.decode(latents / 0.5 * 3 + 1).sample
        torch.testing.assert_close(stock_pipe.decode_latents(latents, "pt"), (expected / 2 + 0.5).clamp(0, 1))


def test_latents_statistics_of_every_kind_of_autoencoder():
    vae, _ = stock_parts()
    assert latents_statistics(vae) == ([0.25] * 4, [2.0] * 4)  # 1 / 0.5
    vae.register_to_config(shift_factor=None)
    assert latents_statistics(vae) == ([0.0] * 4, [2.0] * 4)
    vae.register_to_config(latents_mean=[1, 2, 3, 4], latents_std=[1.0, 2.0, 3.0, 4.0])
    assert latents_statistics(vae) == ([1, 2, 3, 4], [2.0, 4.0, 6.0, 8.0])
    vae, _ = flower_parts()
    assert latents_statistics(vae) == ([0.1, 0.2, -0.3, 0.0], [1.0, 2.0, 0.5, 3.0])


def test_flower_vae_is_decoded_through_its_statistics():
    pipe = make_pipeline(flower_parts)
    latents = torch.randn(1, 4, 8, 8)
    mean, std = (torch.tensor(pipe.vae.config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    raw_latents = latents * std + mean
    with torch.no_grad():
        expected = pipe.vae.decode(raw_latents).sample
        torch.testing.assert_close(pipe.decode_latents(latents, "pt"), (expected / 2 + 0.5).clamp(0, 1))


def test_encoded_images_are_the_latents_that_are_decoded(pipe):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = pipe.encode_images(images)
    raw_latents = pipe.vae.encode(images).latent_dist.mean
    assert not torch.allclose(latents, raw_latents, atol=0.01)
    torch.testing.assert_close(pipe._denormalize(latents), raw_latents)
    pipe.vae.register_to_config(latents_mean=[1.0] * 4, latents_std=[3.0] * 4)
    torch.testing.assert_close(pipe._denormalize(pipe.encode_images(images)), raw_latents)


def test_bfloat16_draws_the_same_noise_and_stays_near(pipe):
    reference = sample(pipe, output_type="latent")
    pipe.to(torch.bfloat16)
    latents = sample(pipe, output_type="latent")
    assert latents.dtype == torch.float32
    assert (latents - reference).abs().max() < 0.1 * reference.abs().max()
    assert sample(pipe, output_type="pt").dtype == torch.float32
    drawn_over = sample(pipe, image=picture(), mask_image=half_mask(), output_type="latent")
    assert drawn_over.dtype == torch.float32 and drawn_over.isfinite().all()


# Images drawn over


def picture(seed: int = 0, size: tuple[int, int] = (16, 16)) -> PIL.Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values).resize(size, PIL.Image.Resampling.BICUBIC)


def half_mask(size: tuple[int, int] = (16, 16)) -> PIL.Image.Image:
    """White, to be drawn anew, in the right half and a bit."""
    row = np.where(np.arange(size[0]) < size[0] * 3 // 8, 0, 255).astype(np.uint8)
    return PIL.Image.fromarray(np.tile(row, (size[1], 1)))


def to_images(image: PIL.Image.Image) -> torch.Tensor:
    """`(1, 3, H, W)` in [-1, 1]."""
    return 2 * torch.as_tensor(np.asarray(image, dtype=np.float32) / 255).movedim(-1, 0)[None] - 1


def test_strength_one_keeps_nothing_and_a_small_one_nearly_all(pipe):
    image = picture()
    reconstruction = pipe.encode_images(to_images(image))
    noise = torch.randn(1, *pipe.latents_shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(sample(pipe, image=image, strength=1.0, latents=noise), sample(pipe, latents=noise))
    distances = [
        (sample(pipe, image=image, strength=strength, latents=noise, num_inference_steps=100, guidance_scale=1)
         - reconstruction).norm() / reconstruction.norm()
        for strength in (0.01, 0.3, 0.7)
    ]  # fmt: skip
    assert distances[0] < 0.2 < distances[1] < distances[2]


def test_strength_is_the_share_of_the_steps(pipe):
    calls = record_forwards(pipe)
    seen = []
    options = {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.8), "num_inference_steps": 10}
    sample(pipe, image=picture(), strength=0.4, callback_on_step_end=lambda *args: seen.append(args[1]), **options)
    assert seen == [0, 1, 2, 3] and pipe.num_timesteps == 4
    assert [len(labels) for labels in calls] == [2, 2, 1, 1]  # 0.8 of the whole trajectory
    sample(pipe, image=picture(), strength=0.001)
    assert pipe.num_timesteps == 1


def test_diffusers_image_to_image_starts_from_the_same_latents(stock_pipe):
    """The noisy image at the first timestep of the rest, as in StableDiffusionImg2ImgPipeline.get_timesteps."""
    noise, seen = torch.randn(1, 4, 8, 8), []
    stock_pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    sample(stock_pipe, image=picture(), strength=0.5, latents=noise, guidance_scale=1, num_inference_steps=10)
    timestep = stock_pipe.scheduler.timesteps[10 - int(10 * 0.5)]
    original = stock_pipe.encode_images(to_images(picture()))
    expected = stock_pipe.scheduler.add_noise(original, noise, timestep[None])
    assert seen[0][1] == timestep and len(seen) == 5
    torch.testing.assert_close(seen[0][0], expected)


def test_an_image_may_be_what_the_pipeline_returns(pipe):
    (drawn,) = sample(pipe, output_type="pil")
    options = {"strength": 0.5, "mask_image": half_mask()}
    expected = sample(pipe, image=drawn, **options)
    array = np.asarray(drawn, dtype=np.float32) / 255
    tensor = torch.as_tensor(array).movedim(-1, 0)
    for image in ([drawn], array, array[None], tensor, tensor[None], [tensor], [tensor[None]], [array[None]]):
        assert torch.equal(sample(pipe, image=image, **options), expected)
    labels, options = ["rose", 3], {"strength": 0.5, "latents": torch.randn(2, *pipe.latents_shape)}
    several = sample(pipe, labels, image=tensor.expand(2, -1, -1, -1), mask_image=half_mask(), **options)
    mask = torch.as_tensor(np.asarray(half_mask(), dtype=np.float32) / 255)[None, None]
    assert torch.equal(sample(pipe, labels, image=[tensor[None]] * 2, mask_image=[mask] * 2, **options), several)
    mask = np.asarray(half_mask(), dtype=np.float32) / 255
    for given in (mask, mask[..., None], torch.as_tensor(mask), torch.as_tensor(mask)[None, None]):
        assert torch.equal(sample(pipe, image=drawn, strength=0.5, mask_image=given), expected)


def test_a_mask_of_floats_is_for_the_pixels_that_are_drawn(pipe):
    photograph = PIL.Image.new("RGB", (48, 20), "red")
    mask = torch.zeros(1, 16, 16)
    mask[..., 8:] = 1
    drawn = sample(pipe, image=photograph, mask_image=mask, output_type="pt")
    assert (drawn[..., :8] == torch.tensor([1.0, 0, 0]).view(3, 1, 1)).all() and (drawn[..., 8:] < 1).any()


def test_from_pipe_shares_the_parts(pipe):
    other = FlowerLDMPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet and other.vae is pipe.vae and other.class_names == pipe.class_names


def test_latents_that_are_no_numbers_are_refused(pipe):
    with pytest.raises(ValueError, match="^latents must hold finite numbers$"):
        sample(pipe, latents=torch.full((1, *pipe.latents_shape), torch.nan))


def test_images_in_a_batch_equal_single_ones(pipe):
    images = [picture(1), picture(2)]
    options = {"strength": 0.6, "mask_image": half_mask(), "output_type": "pt"}
    together = sample(
        pipe, ["rose", 3], image=images, num_images_per_label=2, generator=generators(5, 6, 7, 8), **options
    )
    alone = [
        sample(pipe, label, image=images[index], generator=generators(seed), **options)
        for label, index, seed in (("rose", 0, 5), ("rose", 0, 6), (3, 1, 7), (3, 1, 8))
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-3)
    one, twice = (sample(pipe, ["rose", 3], image=image, **options) for image in (images[0], images[:1] * 2))
    torch.testing.assert_close(one, twice, rtol=1e-3, atol=1e-3)


def test_a_mask_keeps_every_pixel_to_the_bit(pipe):
    image, mask = picture(), half_mask()
    for strength in (0.5, 1.0):
        options = {"image": image, "mask_image": mask, "strength": strength}
        (drawn,) = sample(pipe, output_type="pil", **options)
        black = np.asarray(mask) == 0
        changed = (np.asarray(drawn) != np.asarray(image)).any(axis=-1)
        assert not changed[black].any() and changed[~black].mean() > 0.9
        np.testing.assert_array_equal(
            sample(pipe, output_type="np", **options)[0][black], np.asarray(image)[black] / np.float32(255)
        )
    latents = sample(pipe, **options)
    original = pipe.encode_images(to_images(image))
    assert torch.equal(latents[..., :3], original[..., :3])  # of 8 columns
    assert not (latents[..., 3:] == original[..., 3:]).any()


def test_masks_of_one_color(pipe):
    white, black = (PIL.Image.new("L", (16, 16), value) for value in (255, 0))
    noise = torch.randn(1, *pipe.latents_shape)
    options = {"image": picture(), "strength": 1.0, "latents": noise, "output_type": "pt"}
    assert torch.equal(sample(pipe, mask_image=white, **options), sample(pipe, latents=noise, output_type="pt"))
    kept = sample(pipe, mask_image=black, **options)
    np.testing.assert_array_equal(kept[0].permute(1, 2, 0).numpy(), np.asarray(picture()) / np.float32(255))


def test_photographs_of_any_shape_and_mode_are_cropped_from_the_middle(stock_pipe):
    wide = PIL.Image.new("RGB", (48, 20), "red")
    wide.paste("blue", (9, 0, 39, 20))
    kept = PIL.Image.new("L", (48, 20), 0)
    (drawn,) = sample(stock_pipe, image=wide, mask_image=kept, output_type="pil")
    assert drawn.size == (16, 16)
    assert np.asarray(drawn).reshape(-1, 3).max(axis=0).tolist() == [0, 0, 255]
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert sample(stock_pipe, image=wide.convert(mode), output_type="pt").shape == (1, 3, 16, 16)


def opened(image: PIL.Image.Image, file: os.PathLike, **options) -> PIL.Image.Image:
    image.save(file, **options)
    return PIL.Image.open(file)


def test_pictures_as_they_come_from_files_are_seen_as_viewers_show_them(pipe, tmp_path):
    """Turned by EXIF, and by Pillow's TIFF reader, 16 bits, transparent over hidden colors."""
    upright = PIL.Image.new("L", (16, 16), 200)
    upright.paste(90, (0, 0, 16, 5))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    stored = upright.transpose(PIL.Image.Transpose.ROTATE_90)
    sixteen = PIL.Image.fromarray(np.asarray(upright).astype("<u2") * 257)
    hidden = PIL.Image.merge(
        "LA", (PIL.Image.new("L", (16, 16), 90), upright.point(lambda value: 255 * (value < 200)))
    )
    pictures = {
        "upright": opened(upright, tmp_path / "upright.png"),
        "exif": opened(stored, tmp_path / "exif.png", exif=exif),
        "tiff": opened(stored, tmp_path / "exif.tif", tiffinfo={0x0112: 6}),
        "sixteen": opened(sixteen, tmp_path / "sixteen.png"),
    }
    black = PIL.Image.new("L", (16, 16), 0)
    for name, image in pictures.items():
        kept = sample(pipe, image=image, mask_image=black, output_type="np")[0]
        np.testing.assert_array_equal(kept[..., 0], np.asarray(upright) / np.float32(255), name)
    kept = sample(pipe, image=opened(hidden, tmp_path / "hidden.png"), mask_image=black, output_type="np")[0]
    np.testing.assert_array_equal(kept[5:], np.ones((11, 16, 3), np.float32))


def test_what_is_transparent_in_a_mask_stays(pipe):
    mask = PIL.Image.merge("LA", (PIL.Image.new("L", (16, 16), 255), half_mask()))
    options = {"image": picture(), "strength": 0.5, "output_type": "pt"}
    assert torch.equal(sample(pipe, mask_image=mask, **options), sample(pipe, mask_image=half_mask(), **options))


def test_the_sizes_of_image_and_mask_are_those_of_the_upright_ones(pipe, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 8
    photograph = opened(picture(size=(20, 16)), tmp_path / "photograph.png", exif=exif)
    assert sample(pipe, image=photograph, mask_image=half_mask((16, 20)), output_type="pt").shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"the image's size, \(16, 20\) in width and height, got \(20, 16\)"):
        sample(pipe, image=photograph, mask_image=half_mask((20, 16)))


def test_pictures_whose_range_is_unknown_are_refused(pipe):
    with pytest.raises(ValueError, match="pixels of mode F are floats, whose value for white is unknown"):
        sample(pipe, image=PIL.Image.new("F", (16, 16)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, r"strength must be above 0 and at most 1, got 0\.0"),
        ({"strength": 1.1}, "strength must be above 0 and at most 1"),
        ({"strength": float("nan")}, "strength must be above 0 and at most 1"),
        ({"strength": "1"}, "strength must be above 0 and at most 1"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale must be from 0 \(off\) to 1, got 1.5"),
        ({"guidance_rescale": float("nan")}, "guidance_rescale must be from 0"),
        (
            {"image": None, "mask_image": half_mask()},
            "mask_image needs an image: give the image that it masks",
        ),
        (
            {"mask_image": half_mask((8, 16))},
            r"the image's size, \(16, 16\) in width and height, got \(8, 16\)",
        ),
        ({"image": torch.zeros(3, 16, 16), "mask_image": half_mask((8, 16))}, "must have the image's size"),
        ({"image": [torch.zeros(2, 3, 16, 16)] * 2}, "image must be one or one for each of 2 labels, got 4"),
        ({"image": [picture()] * 3}, "image must be one or one for each of 2 labels, got 3"),
        ({"image": []}, "image must be one or one for each of 2 labels, got 0"),
        ({"mask_image": [half_mask()] * 3}, "mask_image must be one or one for each of 2 labels, got 3"),
        ({"image": "flower.png"}, "image must be a PIL image or an array or tensor of floats, got str"),
        ({"image": np.zeros((16, 16, 3), np.uint8)}, "image must be a PIL image or an array or tensor of floats"),
        ({"image": torch.zeros(3, 8, 8)}, r"\(3, 16, 16\), as an array \(16, 16, 3\), got a tensor of \(3, 8, 8\)"),
        ({"image": torch.zeros(16)}, "image as a tensor must have the shape"),
        ({"image": torch.full((3, 16, 16), -1.0)}, r"image must hold floats in \[0, 1\]"),
        ({"image": torch.full((3, 16, 16), float("nan"))}, r"image must hold floats in \[0, 1\]"),
        ({"mask_image": torch.zeros(3, 16, 16)}, "mask_image as a tensor must have the shape"),
    ],
)
def test_bad_image_is_one_clear_line_before_any_computation(stock_pipe, options, message):
    calls = record_forwards(stock_pipe)
    with pytest.raises(ValueError, match=message) as error:
        sample(stock_pipe, ["rose", 1], **{"image": picture(), **options})
    assert "\n" not in str(error.value)
    assert not calls


# What diffusers' parts can do


def test_a_sliced_autoencoder_draws_the_same(pipe):
    options = {"image": picture(), "strength": 0.5, "output_type": "pt"}
    whole = sample(pipe, ["rose", 1, 2], **options)
    pipe.vae.enable_slicing()
    calls = []
    pipe.vae.decoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    torch.testing.assert_close(sample(pipe, ["rose", 1, 2], **options), whole, rtol=1e-4, atol=1e-5)
    assert calls == [1, 1, 1]
    pipe.vae.disable_slicing()
    sample(pipe, ["rose", 1, 2], **options)
    assert calls == [1, 1, 1, 3]


def test_compiled_parts_draw_the_same_and_are_saved_as_they_were(pipe, tmp_path):
    """By the backend that compiles nothing; tests/test_gpu.py has the real one."""
    options = {"image": picture(), "mask_image": half_mask(), "output_type": "pt"}
    plain = sample(pipe, **options)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    torch.testing.assert_close(sample(pipe, **options), plain)
    pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(sample(FlowerLDMPipeline.from_pretrained(tmp_path), **options), plain)


# What is loaded


def damage_config(part: str, **entries):
    def damage(folder):
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return damage


def damage_weights(part: str, change):
    def damage(folder):
        file = folder / part / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        change(weights, sorted(weights)[0])
        save_file(weights, file)

    return damage


@pytest.mark.parametrize(
    ("parts", "damage", "message"),
    [
        (stock_parts, damage_config("unet", sample_size=10**6), "unet/config.json is damaged: sample_size must hold"),
        (stock_parts, damage_config("unet", other=json.loads("[" * 400 + "]" * 400)), "damaged: other must hold numb"),
        (stock_parts, damage_config("unet", layers_per_block=10**9), "damaged: layers_per_block must hold numbers,"),
        (stock_parts, damage_config("unet", num_class_embeds=10**12), "damaged: num_class_embeds must hold numbers,"),
        (stock_parts, damage_config("unet", sample_size=None), "the unet's in_channels and sample_size must be from"),
        (stock_parts, damage_config("unet", sample_size=[8, "8"]), "the unet's in_channels and sample_size must be"),
        (stock_parts, damage_config("vae", block_out_channels=[8] * 10**7), "damaged: block_out_channels must hold"),
        (stock_parts, damage_config("vae", scaling_factor=0), "the vae's scaling_factor must be a number other than"),
        (stock_parts, damage_config("vae", shift_factor="0"), "the vae's shift_factor must be a finite number, got"),
        (stock_parts, damage_config("vae", latents_std=[1.0] * 4), "the vae's latents_mean must be finite numbers"),
        (
            stock_parts,
            damage_config("vae", latents_mean=[0] * 4, latents_std=[0] * 4),
            "the vae's latents_std must be finite numbers above 0, one a channel",
        ),
        (flower_parts, damage_config("vae", latents_std=None), "latents_mean and latents_std must have 4 values each"),
        (flower_parts, damage_config("vae", latents_std=[float("nan")] * 4), "vae/config.json is damaged: latents_s"),
        (flower_parts, damage_config("unet", num_layers=10**9 + 1), "damaged: num_layers must hold numbers, none ab"),
        (flower_parts, damage_config("scheduler", num_train_timesteps=10**10), "damaged: num_train_timesteps must h"),
        (flower_parts, damage_config("scheduler", num_train_timesteps="9"), "num_train_timesteps must be a whole nu"),
        (flower_parts, damage_config("scheduler", trained_betas=[float("nan")]), "damaged: trained_betas must hold"),
        (flower_parts, lambda folder: (folder / "vae" / "config.json").write_text("[]"), "must hold one JSON object"),
        (stock_parts, damage_weights("unet", lambda weights, name: weights.pop(name)), "the weights of unet lack cl"),
        (stock_parts, damage_weights("vae", lambda weights, name: weights.pop(name)), "the weights of vae lack deco"),
        (flower_parts, damage_weights("unet", lambda weights, name: weights.pop(name)), "FlowerUNet2DModel: 1 are m"),
        (flower_parts, damage_weights("vae", lambda weights, name: weights.pop(name)), "FlowerAutoencoderKL: 1 are"),
        (
            flower_parts,
            damage_weights("unet", lambda weights, name: weights.update(more=torch.ones(1))),
            "the weights don't fit the config of FlowerUNet2DModel: 1 are unexpected, such as more",
        ),
    ],
)
def test_a_damaged_part_is_one_clear_line_when_it_is_loaded(tmp_path, parts, damage, message):
    make_pipeline(parts).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        FlowerLDMPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_a_guidance_scale_beyond_64_bits_is_a_number_as_any_other(pipe):
    """torch can't multiply by such a whole number, but it is finite."""
    with pytest.raises(ValueError, match="gave numbers that are not finite"):
        sample(pipe, guidance_scale=10**300)


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_weights_that_are_no_numbers_are_blamed_when_images_are_not_finite(pipe, tmp_path, part):
    pipe.save_pretrained(tmp_path)
    damage_weights(part, lambda weights, name: weights[name].fill_(torch.nan))(tmp_path)
    with pytest.raises(ValueError, match=f"^the weights of {part} are damaged: .* holds numbers that are not finite$"):
        sample(FlowerLDMPipeline.from_pretrained(tmp_path), output_type="pt")


# Wrappers and threads


@pytest.mark.parametrize("name", ["vae", "unet", "guide"])
def test_a_wrapped_model_is_one_clear_line(pipe, name):
    parts = {"guide": pipe.unet, **pipe.components}
    parts[name] = torch.nn.DataParallel(parts[name] or pipe.unet)
    line = f"^{name} is wrapped in DataParallel: give {name}.module, the model itself$"
    for id2label in (None, NAMES):
        with pytest.raises(ValueError, match=line):
            FlowerLDMPipeline(**parts, id2label=id2label)
    setattr(pipe, name, parts[name])
    with pytest.raises(ValueError, match=line):
        sample(pipe)


def test_a_pipeline_at_work_refuses_another_thread_and_a_call_from_its_callback(pipe):
    expected = sample(pipe)
    shares_the_scheduler = FlowerLDMPipeline.from_pipe(pipe)
    refused = []

    def call_again(*_):
        for other in (pipe, shares_the_scheduler):
            with pytest.raises(ValueError, match="^this pipeline, or another with its scheduler, is drawing already"):
                sample(other)
        with ThreadPoolExecutor() as executor:
            refused.append(executor.submit(sample, pipe).exception())
        return {}

    assert torch.equal(sample(pipe, callback_on_step_end=call_again), expected)
    assert [type(error) for error in refused] == [ValueError] * STEPS
    with pytest.raises(ZeroDivisionError):
        sample(pipe, callback_on_step_end=lambda *_: 1 / 0)
    assert torch.equal(sample(pipe), expected)  # an error leaves it free


def test_threads_with_a_pipeline_and_scheduler_of_their_own_draw_what_each_draws_alone(pipe):
    pipes = [pipe, FlowerLDMPipeline.from_pipe(pipe, scheduler=pipe.make_scheduler(type(pipe.scheduler)))]
    pipes[1].set_progress_bar_config(disable=True)
    expected = sample(pipe, num_inference_steps=20), sample(pipe, num_inference_steps=30)
    in_step = threading.Barrier(2, timeout=30)  # both are in the middle of a call at once

    def wait_for_both(given_pipe, step_index, *_):
        if step_index == 10:
            in_step.wait()
        return {}

    with ThreadPoolExecutor(2) as executor:
        drawn = [
            executor.submit(sample, one, num_inference_steps=steps, callback_on_step_end=wait_for_both)
            for one, steps in zip(pipes, (20, 30), strict=True)
        ]
    for latents, alone in zip(drawn, expected, strict=True):
        torch.testing.assert_close(latents.result(), alone)


# Callback, interrupt, progress bar


def test_a_callback_changes_the_guidance_of_the_steps_to_come(pipe):
    calls, scales = record_forwards(pipe), []

    def turn_off(pipe, step_index, timestep, given):
        scales.append(pipe.guidance_scale)
        if step_index == 1:
            pipe._guidance_scale = 1
        return {}

    changed = sample(pipe, guidance_scale=5.0, callback_on_step_end=turn_off)
    assert scales == [5.0, 5.0, 1, 1] and [len(labels) for labels in calls] == [2, 2, 1, 1]
    assert torch.equal(changed, sample(pipe, guidance_scale=5.0, guidance_interval=(0.0, 0.5)))
    assert pipe.guidance_scale == 5.0  # the latest call's
    with pytest.raises(AttributeError):  # a value that the next call replaces would do nothing, in silence
        pipe.guidance_scale = 2.0


def test_callback_sees_each_step_and_may_replace_the_latents(pipe):
    seen = []

    def callback(given_pipe, step_index, timestep, inputs):
        seen.append((step_index, int(timestep), list(inputs)))
        assert given_pipe is pipe
        return {"latents": torch.zeros_like(inputs["latents"])} if step_index == STEPS - 1 else {}

    latents = sample(pipe, callback_on_step_end=callback)
    assert [step for step, *_ in seen] == list(range(STEPS))
    assert [timestep for _, timestep, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert seen[0][2] == ["latents"]
    assert not latents.any()


def recorded(pipe: FlowerLDMPipeline, monkeypatch, **options) -> tuple[list, list]:
    """Of each step what the callback got as denoised latents, and what the scheduler itself returned."""
    given, own = [], []
    step = pipe.scheduler.step

    def stepped(*args, **kwargs):
        own.append(step(*args, **kwargs))
        return own[-1]

    monkeypatch.setattr(pipe.scheduler, "step", stepped)
    sample(
        pipe,
        callback_on_step_end=lambda *args: given.append(args[3]),
        callback_on_step_end_tensor_inputs=["latents", "denoised_latents"],
        **options,
    )
    return given, own


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "scheduler", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
                  "HeunDiscreteScheduler"],
)  # fmt: skip
def test_denoised_latents_are_the_schedulers_own(stock_pipe, monkeypatch, scheduler, prediction_type):
    if scheduler == "EulerAncestralDiscreteScheduler" and prediction_type == "sample":
        pytest.skip("diffusers has not implemented it")
    config = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False, "prediction_type": prediction_type}
    stock_pipe.scheduler = getattr(diffusers, scheduler)(
        **{name: value for name, value in config.items()
           if name in inspect.signature(getattr(diffusers, scheduler)).parameters}
    )  # fmt: skip
    given, own = recorded(stock_pipe, monkeypatch, num_inference_steps=7)  # Euler's timesteps are fractions
    assert len(given) == len(own) == len(stock_pipe.scheduler.timesteps)
    for one, output in zip(given, own, strict=True):
        scale = output.pred_original_sample.abs().max().item()
        torch.testing.assert_close(one["denoised_latents"], output.pred_original_sample, rtol=1e-3, atol=1e-4 * scale)
        assert torch.equal(one["latents"], output.prev_sample)


def test_denoised_latents_where_the_last_step_is_pure_noise(stock_pipe, monkeypatch):
    stock_pipe.scheduler = DDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction", clip_sample=False
    )
    given, own = recorded(stock_pipe, monkeypatch)
    assert stock_pipe.signal_and_noise(999) == (0.0, 1.0)
    for one, output in zip(given, own, strict=True):
        torch.testing.assert_close(one["denoised_latents"], output.pred_original_sample, rtol=1e-4, atol=1e-5)


def test_denoised_latents_are_computed_only_when_asked_for(stock_pipe, monkeypatch):
    asked = []
    predict = stock_pipe.predict_denoised_latents
    monkeypatch.setattr(stock_pipe, "predict_denoised_latents", lambda *args: asked.append(1) or predict(*args))
    expected = sample(stock_pipe)
    sample(stock_pipe, callback_on_step_end=lambda *_: {})
    sample(stock_pipe, callback_on_step_end_tensor_inputs=["denoised_latents"])
    assert not asked
    inputs = ("denoised_latents", "latents")
    watched = sample(stock_pipe, callback_on_step_end=lambda *_: {}, callback_on_step_end_tensor_inputs=inputs)
    assert len(asked) == STEPS and torch.equal(watched, expected)


def test_signal_and_noise_between_timesteps(stock_pipe):
    alphas_cumprod = stock_pipe.scheduler.alphas_cumprod.double()
    ratios = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    for timestep, ratio in ((0, ratios[0]), (500, ratios[500]), (500.25, torch.lerp(*ratios[500:502], 0.25))):
        alpha, sigma = stock_pipe.signal_and_noise(torch.tensor(timestep))
        assert sigma / alpha == pytest.approx(ratio.item(), rel=1e-4)
        assert alpha**2 + sigma**2 == pytest.approx(1)


def test_interrupt_ends_the_denoising(pipe):
    calls = record_forwards(pipe)

    def stop(given_pipe, step_index, timestep, inputs):
        given_pipe._interrupt = step_index == 1

    assert len(sample(pipe, output_type="pil", callback_on_step_end=stop)) == 1
    assert len(calls) == 2
    sample(pipe)
    assert len(calls) == 2 + STEPS  # the next call starts afresh


def test_progress_bar_counts_forwards_and_can_be_configured(stock_pipe, capsys):
    stock_pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(stock_pipe.scheduler.config)
    stock_pipe.set_progress_bar_config(desc="drawing")
    sample(stock_pipe)
    assert "drawing: 100%" in (shown := capsys.readouterr().err) and f"{2 * STEPS - 1}/{2 * STEPS - 1}" in shown
    stock_pipe.set_progress_bar_config(disable=True)
    sample(stock_pipe)
    assert capsys.readouterr().err == ""


# Saving and loading


def read_index(folder):
    return json.loads((folder / "model_index.json").read_text())


def test_saved_pipeline_loads_as_the_installed_class(pipe, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pipe.save_pretrained(tmp_path)
    loaded = FlowerLDMPipeline.from_pretrained(tmp_path)
    assert type(loaded) is FlowerLDMPipeline
    assert type(loaded.vae) is type(pipe.vae) and type(loaded.unet) is type(pipe.unet)
    assert loaded.config.id2label == pipe.config.id2label == {str(label): name for label, name in NAMES.items()}
    torch.testing.assert_close(sample(loaded, "Tulip", "pt"), sample(pipe, "Tulip", "pt"), rtol=0, atol=0)
    assert not caplog.records  # such as "Expected types for vae" or "config attributes are not expected"


def test_saved_index_names_files_beside_it(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = read_index(tmp_path)
    assert index["_class_name"] == ["pipeline_flower_ldm", "FlowerLDMPipeline"]
    assert (tmp_path / "pipeline_flower_ldm.py").is_file()
    for name in ("vae", "unet", "scheduler"):
        module, class_name = index[name]
        assert class_name == type(getattr(pipe, name)).__name__
        assert module == "diffusers" or (tmp_path / name / f"{module}.py").is_file()


def test_saving_again_tells_no_local_path(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "first")
    loaded = FlowerLDMPipeline.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    first, second = ({file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*")
                      if file.is_file()} for name in ("first", "second"))  # fmt: skip
    assert first == second
    assert not any(str(tmp_path).encode() in content for content in second.values())


def test_variant_and_shards_load_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert list(tmp_path.glob("unet/*fp16-00001-of-*.safetensors"))
    loaded = FlowerLDMPipeline.from_pretrained(tmp_path, variant="fp16")
    torch.testing.assert_close(sample(loaded), sample(pipe), rtol=0, atol=0)


def test_components_can_be_passed_to_from_pretrained(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = FlowerLDMPipeline.from_pretrained(tmp_path, vae=pipe.vae, id2label=None)
    assert loaded.vae is pipe.vae
    assert loaded.config.id2label is None


def same_images(loaded: FlowerLDMPipeline, pipe: FlowerLDMPipeline) -> bool:
    loaded.set_progress_bar_config(disable=True)
    return torch.equal(sample(loaded, "Tulip", "pt"), sample(pipe, "Tulip", "pt"))


def test_from_the_hub_the_installed_class_needs_no_trust(hub_server):
    pipe = make_pipeline(flower_parts)
    pipe.push_to_hub("gardener/flowers")
    loaded = FlowerLDMPipeline.from_pretrained("gardener/flowers")
    assert type(loaded) is FlowerLDMPipeline and type(loaded.vae) is FlowerAutoencoderKL
    assert same_images(loaded, pipe)


def test_saving_with_push_to_hub_uploads_a_loadable_folder_and_nothing_else(stock_pipe, tmp_path, hub_server):
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-1" / "state.bin").write_bytes(b"not for the Hub")
    stock_pipe.save_pretrained(tmp_path / "run", push_to_hub=True, repo_id="gardener/flowers", private=True)
    repository = hub_server.repositories["gardener/flowers"]
    assert repository.private and len(repository.commits) == 2  # the Hub's own first one, and all of this
    assert json.loads(repository.files["model_index.json"]) == read_index(tmp_path / "run")
    assert not [path for path in repository.files if path.startswith("checkpoint-")]
    assert same_images(FlowerLDMPipeline.from_pretrained("gardener/flowers"), stock_pipe)


def test_shards_over_the_hub(tmp_path, hub_server):
    pipe = make_pipeline(flower_parts)
    pipe.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    create_repo("gardener/flowers")
    upload_folder(folder_path=tmp_path / "sharded", repo_id="gardener/flowers")
    assert sum(file.endswith(".safetensors") for file in hub_server.repositories["gardener/flowers"].files) > 4
    assert same_images(FlowerLDMPipeline.from_pretrained("gardener/flowers"), pipe)


def test_from_the_hub_by_revision_variant_and_from_a_cache_without_network(tmp_path, hub_server, monkeypatch):
    before, after = make_pipeline(flower_parts), make_pipeline(flower_parts)
    with torch.no_grad():
        for parameter in after.unet.parameters():
            parameter.mul_(1.1)
    before.push_to_hub("gardener/flowers")
    create_branch("gardener/flowers", branch="before")
    after.push_to_hub("gardener/flowers")
    after.push_to_hub("gardener/flowers", variant="fp16")
    options = {"pretrained_model_name_or_path": "gardener/flowers", "cache_dir": tmp_path / "cache"}
    assert same_images(FlowerLDMPipeline.from_pretrained(**options), after)
    assert same_images(FlowerLDMPipeline.from_pretrained(**options, revision="before"), before)
    assert same_images(FlowerLDMPipeline.from_pretrained(**options, variant="fp16"), after)
    assert (tmp_path / "cache" / "models--gardener--flowers").is_dir()
    assert not list((tmp_path / "hf").glob("hub/*/snapshots/*/*/*.safetensors"))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    num_requests = len(hub_server.requests)
    assert same_images(FlowerLDMPipeline.from_pretrained(**options), after)
    assert same_images(FlowerLDMPipeline.from_pretrained(**options, revision="before"), before)
    assert len(hub_server.requests) == num_requests


ELSEWHERE = """
import sys, torch
from diffusers import DiffusionPipeline

try:
    DiffusionPipeline.from_pretrained("saved")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("remote code ran without trust")
for folder, folder_again in (("saved", "saved-again"), ("saved-again", "and-again")):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe("Tulip", num_inference_steps=4, generator=generator, output_type="pt").images
    torch.save(images, f"{folder}.pt")
    pipe.save_pretrained(folder_again)
assert "flower_ldm" not in sys.modules
"""


@pytest.mark.slow
def test_with_a_guide_loads_and_saves_again_where_the_package_is_not_installed(tmp_path):
    pipe = with_guidance(make_pipeline(flower_parts), guidance_scale=2.0, guidance_interval=(0.0, 0.8))
    pipe.guide = flower_guide()
    tolerance = {"rtol": 1e-4, "atol": 1e-5}  # so narrow a guide's products depend on where its weights lie
    expected = sample(pipe, "Tulip", "pt")
    pipe.save_pretrained(tmp_path / "saved")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, env=environment, check=True, timeout=300)
    for folder in ("saved", "saved-again"):
        torch.testing.assert_close(torch.load(tmp_path / f"{folder}.pt"), expected, **tolerance)
    assert read_index(tmp_path / "saved") == read_index(tmp_path / "saved-again") == read_index(tmp_path / "and-again")
    loaded = FlowerLDMPipeline.from_pretrained(tmp_path / "and-again")
    assert loaded.resolve_guidance() == (2.0, [0.0, 0.8])
    torch.testing.assert_close(sample(loaded, "Tulip", "pt"), expected, **tolerance)
