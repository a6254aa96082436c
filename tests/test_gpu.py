"""Both stages and the pipeline on a CUDA device: half precision, compilation, resuming, offloading."""

from pathlib import Path

import pytest
import torch

import train_autoencoder
import train_latent_diffusion
from flower_ldm import FlowerLDMPipeline
from flower_ldm.training import read_log

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_both_stages_train_in_half_precision(stage_flags, tmp_path: Path, mixed_precision: str):
    stage1, stage2 = stage_flags
    train_autoencoder.main([*stage1, "--mixed_precision", mixed_precision, "--gradient_accumulation_steps", "2"])
    train_latent_diffusion.main([*stage2, "--mixed_precision", mixed_precision])
    for run in ("autoencoder", "flower-ldm"):
        losses = [value for line in read_log(tmp_path / run / "log.jsonl") for value in line.values()]
        assert all(abs(value) < float("inf") for value in losses if isinstance(value, float))
    pipeline = FlowerLDMPipeline.from_pretrained(tmp_path / "flower-ldm", torch_dtype=torch.float16).to("cuda")
    images = pipeline([0, 3], num_inference_steps=3, output_type="pt").images
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()


def test_master_weights_stay_in_float32(stage_flags, tmp_path: Path):
    from safetensors.torch import load_file

    train_autoencoder.main([*stage_flags[0], "--mixed_precision", "bf16"])
    weights = load_file(tmp_path / "autoencoder" / "checkpoint-4" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.parametrize("stage", [0, 1])
def test_compiled_training_and_gradient_checkpointing(stage_flags, stage: int):
    train_autoencoder.main([*stage_flags[0], *(["--torch_compile"] if stage == 0 else [])])
    if stage == 1:
        train_latent_diffusion.main([*stage_flags[1], "--torch_compile"])


def test_resuming_goes_on_where_the_run_stopped(stage_flags, tmp_path: Path):
    stage1, _ = stage_flags
    train_autoencoder.main([*stage1, "--mixed_precision", "fp16"])
    train_autoencoder.main([*stage1, "--mixed_precision", "fp16", "--resume_from_checkpoint",
                            str(tmp_path / "autoencoder" / "checkpoint-4")])  # fmt: skip
    assert read_log(tmp_path / "autoencoder" / "log.jsonl")[-1]["step"] == 6


def test_offloading_to_the_cpu_draws_the_same_images(stage_flags, tmp_path: Path):
    stage1, stage2 = stage_flags
    train_autoencoder.main(stage1)
    train_latent_diffusion.main(stage2)
    pipeline = FlowerLDMPipeline.from_pretrained(tmp_path / "flower-ldm").to("cuda")
    options = {"num_inference_steps": 3, "output_type": "pt"}
    whole = pipeline([1], generator=torch.Generator("cpu").manual_seed(0), **options).images
    pipeline = FlowerLDMPipeline.from_pretrained(tmp_path / "flower-ldm")
    pipeline.enable_model_cpu_offload()
    offloaded = pipeline([1], generator=torch.Generator("cpu").manual_seed(0), **options).images
    torch.testing.assert_close(offloaded.cpu(), whole.cpu(), atol=1e-3, rtol=1e-3)
