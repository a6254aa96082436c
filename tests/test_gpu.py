"""Both stages and the pipeline on a CUDA device: half precision, compilation, resuming, offloading."""

from pathlib import Path

import pytest
import torch

import train_autoencoder
import train_latent_diffusion
from flower_ldm import FlowerLDMPipeline
from flower_ldm.runs import read_log

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
    train_autoencoder.main([*stage1, "--mixed_precision", "fp16", "--output_dir", str(tmp_path / "rest"),
                            "--resume_from_checkpoint", str(tmp_path / "autoencoder" / "checkpoint-4")])  # fmt: skip
    assert read_log(tmp_path / "rest" / "log.jsonl")[-1]["step"] == 6


@pytest.fixture
def trained(stage_flags, tmp_path: Path) -> Path:
    """The folder of a pipeline."""
    train_autoencoder.main(stage_flags[0])
    train_latent_diffusion.main(stage_flags[1])
    return tmp_path / "flower-ldm"


def draw(pipeline: FlowerLDMPipeline, **options) -> torch.Tensor:
    options = {"num_inference_steps": 3, "output_type": "pt", **options}
    return pipeline([1], generator=torch.Generator("cpu").manual_seed(0), **options).images.cpu()


def test_offloading_to_the_cpu_draws_the_same_images(trained: Path):
    image, mask = torch.rand(3, 32, 32), (torch.rand(1, 32, 32) > 0.5).float()
    for options in ({}, {"image": image, "mask_image": mask}):
        for guided in (False, True):  # the guide takes turns with the unet
            guide = FlowerLDMPipeline.from_pretrained(trained).unet if guided else None
            if guided:
                torch.nn.init.normal_(guide.proj_out.weight, std=0.1)  # a guide that is the unet would change nothing
            whole = draw(FlowerLDMPipeline.from_pretrained(trained, guide=guide).to("cuda"), **options)
            pipeline = FlowerLDMPipeline.from_pretrained(trained, guide=guide)
            pipeline.enable_model_cpu_offload()
            torch.testing.assert_close(draw(pipeline, **options), whole, atol=1e-3, rtol=1e-3)
            assert {part.device.type for part in (pipeline.unet, pipeline.vae)} == {"cpu"}


def test_compiled_parts_draw_the_same_images(trained: Path):
    pipeline = FlowerLDMPipeline.from_pretrained(trained).to("cuda")
    plain = draw(pipeline)
    pipeline.unet = torch.compile(pipeline.unet)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode)
    torch.testing.assert_close(draw(pipeline), plain, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_draws_over_an_image(trained: Path, dtype: torch.dtype):
    pipeline = FlowerLDMPipeline.from_pretrained(trained, torch_dtype=dtype).to("cuda")
    image, mask = torch.rand(3, 32, 32), torch.zeros(1, 32, 32)
    mask[:, :, 16:] = 1
    images = draw(pipeline, image=image, mask_image=mask)
    assert images.isfinite().all() and torch.equal(images[0, :, :, :16], image[:, :, :16])
