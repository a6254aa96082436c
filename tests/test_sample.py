"""flower_ldm/sample.py: what it writes, that it writes over nothing, and what it says about bad input."""

import itertools
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from flower_ldm import FlowerAutoencoderKL, FlowerLDMPipeline, FlowerUNet2DModel
from flower_ldm.errors import InputError
from flower_ldm.files import fresh_folder
from flower_ldm.pipelines.pipeline_flower_ldm import SCHEDULERS
from flower_ldm.sample import file_names, label_grid, main

NAMES = ["rose", "bird of paradise", "7"]


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    torch.manual_seed(0)
    vae = FlowerAutoencoderKL(latent_channels=4, block_out_channels=(8, 16), layers_per_block=1)
    unet = FlowerUNet2DModel(
        sample_size=4, in_channels=4, hidden_size=32, num_layers=3, num_attention_heads=2, num_classes=len(NAMES)
    )
    for parameter in [*unet.parameters(), *vae.decoder.parameters()]:  # untrained it predicts zero
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("pipeline")
    FlowerLDMPipeline(vae, unet, DDIMScheduler(clip_sample=False), dict(enumerate(NAMES))).save_pretrained(folder)
    return folder


def run(pipeline_folder, output, *flags):
    main(["--pipeline", str(pipeline_folder), "--output", str(output), "--device", "cpu", "--steps", "2", *flags])


def pixels(folder):
    return {file.name: np.asarray(Image.open(file)).astype(int) for file in folder.glob("*.png")}


def test_writes_one_file_an_image_and_a_grid(pipeline_folder, tmp_path, capsys):
    run(pipeline_folder, tmp_path / "out", "--labels", "bird of paradise", "0", "--num_images", "2")
    images = pixels(tmp_path / "out")
    assert sorted(images) == [
        "bird_of_paradise_0.png",
        "bird_of_paradise_1.png",
        "grid.png",
        "rose_0.png",
        "rose_1.png",
    ]
    grid = images.pop("grid.png")
    assert {image.shape for image in images.values()} == {(16, 16, 3)}
    assert grid.shape[0] > 2 * 96 and grid.shape[1] > 2 * 96
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].endswith(str(tmp_path / "out"))
    assert "sampling: 100%" in captured.err and "image/s" in captured.err


def test_every_class_by_default(pipeline_folder, tmp_path):
    run(pipeline_folder, tmp_path / "out", "--num_images", "1")
    assert sorted(pixels(tmp_path / "out")) == ["7_0.png", "bird_of_paradise_0.png", "grid.png", "rose_0.png"]


def test_what_is_on_disk_stays_as_it_was(pipeline_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "rose_0.png").write_bytes(b"precious")
    for _ in range(2):
        run(pipeline_folder, out, "--labels", "rose", "--num_images", "1")
    assert [file.name for file in out.iterdir()] == ["rose_0.png"]
    assert (out / "rose_0.png").read_bytes() == b"precious"
    first, second = pixels(tmp_path / "out-2"), pixels(tmp_path / "out-3")
    np.testing.assert_array_equal(first["rose_0.png"], second["rose_0.png"])


def test_pictures_depend_on_the_seed_and_not_on_the_batch_size(pipeline_folder, tmp_path):
    for name, flags in {"one": ("--batch_size", "1"), "all": (), "other": ("--seed", "1")}.items():
        run(pipeline_folder, tmp_path / name, "--labels", "rose", "7", "--num_images", "2", *flags)
    one, together, other = (pixels(tmp_path / name) for name in ("one", "all", "other"))
    for file in ("rose_0.png", "rose_1.png", "7_0.png", "7_1.png"):
        assert abs(one[file] - together[file]).max() <= 1  # rounding
    assert abs(one["rose_0.png"] - other["rose_0.png"]).max() > 1
    np.testing.assert_allclose(one["rose_1.png"], other["rose_0.png"], atol=1)  # seed 0 + image 1 = seed 1 + image 0


def test_without_flags_guidance_is_the_pipelines_own(pipeline_folder, tmp_path):
    pipe = FlowerLDMPipeline.from_pretrained(pipeline_folder, guidance_scale=30.0, guidance_interval=[0.0, 0.5])
    pipe.save_pretrained(tmp_path / "pipeline")
    labels = ("--labels", "rose", "--num_images", "1")
    run(tmp_path / "pipeline", tmp_path / "own", *labels)
    run(pipeline_folder, tmp_path / "by flags", *labels, "--guidance_scale", "30", "--guidance_interval", "0", "0.5")
    run(pipeline_folder, tmp_path / "default", *labels)
    own, by_flags, default = (pixels(tmp_path / name)["rose_0.png"] for name in ("own", "by flags", "default"))
    np.testing.assert_array_equal(own, by_flags)
    assert abs(own - default).max() > 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws(pipeline_folder, tmp_path, scheduler):
    flags = ("--labels", "rose", "--num_images", "1", "--scheduler", scheduler, "--steps", "4")
    run(pipeline_folder, tmp_path / "out", *flags)
    assert pixels(tmp_path / "out")["rose_0.png"].std() > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--labels", "rse"), "unknown label 'rse': the nearest names are 'rose'"),
        (("--labels", "3"), "label '3' is out of range"),
        (("--num_images", "0"), "--num_images must be from 1 to 100,000, got 0"),
        (("--num_images", str(10**12)), "--num_images must be from 1 to 100,000"),
        (("--batch_size", "0"), "--batch_size must be from 1 to 100,000, got 0"),
        (("--num_inference_steps", "0"), "num_inference_steps must be"),
        (("--num_inference_steps", "1001"), "num_inference_steps must be at most 1000"),
        (("--seed", str(2**64)), "--seed must be at least 0 and below 2"),
        (("--guidance_scale", "nan"), "guidance_scale must be a finite number"),
        (("--guidance_interval", "0.8", "0.1"), "guidance_interval must be two fractions"),
        (("--device", "toaster"), "--device toaster can't be used"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_line_and_writes_nothing(pipeline_folder, tmp_path, flags, message):
    with pytest.raises(InputError, match=message) as error:
        run(pipeline_folder, tmp_path / "out", *flags)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_pictures_that_are_no_numbers_are_one_line(pipeline_folder, tmp_path):
    pipe = FlowerLDMPipeline.from_pretrained(pipeline_folder)
    next(pipe.unet.parameters()).data.fill_(torch.nan)
    pipe.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(
        InputError, match="^the weights of unet are damaged: patch_embed.weight holds numbers"
    ) as error:
        run(tmp_path / "pipeline", tmp_path / "out")
    assert str(error.value).endswith(f"not finite: --pipeline {tmp_path / 'pipeline'}")


def test_folder_without_a_pipeline(tmp_path):
    with pytest.raises(InputError, match="is not the folder of a pipeline: it has no model_index.json"):
        run(tmp_path, tmp_path / "out")


def test_folder_without_a_file_of_its_weights(pipeline_folder, tmp_path):
    for part, file in itertools.product(("vae", "unet"), ("config.json", "diffusion_pytorch_model.safetensors")):
        folder = shutil.copytree(pipeline_folder, tmp_path / f"{part}-{file}")
        (folder / part / file).unlink()
        with pytest.raises(InputError, match=f"^--pipeline {folder} can't be loaded: {part}/{file} is missing$"):
            run(folder, tmp_path / "out")
        with pytest.raises(InputError, match=f"^--guide {folder} can't be loaded: {part}/{file} is missing$"):
            run(pipeline_folder, tmp_path / "out", "--guide", str(folder))


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_folder_whose_weights_lack_one_is_not_blamed_on_the_device(pipeline_folder, tmp_path, part):
    folder = shutil.copytree(pipeline_folder, tmp_path / "pipeline")
    file = folder / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights[min(weights)]
    save_file(weights, file)
    with pytest.raises(InputError, match=f"^--pipeline {folder} can't be loaded: the weights .*1 are missing"):
        run(folder, tmp_path / "out")


def test_unknown_hub_id(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("nobody/no-such-flowers", "a/path/that/is/not"):
        with pytest.raises(InputError, match=f"--pipeline {name} is neither a folder nor a Hub id"):
            run(name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_repository_that_is_no_pipeline(pipeline_folder, hub_server, tmp_path):
    FlowerAutoencoderKL.from_pretrained(pipeline_folder / "vae").push_to_hub("autoencoder")
    with pytest.raises(InputError, match="autoencoder is no pipeline: there is no model_index.json on the Hub"):
        run("gardener/autoencoder", tmp_path / "out")
    with pytest.raises(InputError, match="--pipeline gardener/none is neither a folder nor a Hub id") as error:
        run("gardener/none", tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", "unet/diffusion_pytorch_model.safetensors"])
def test_truncated_file(pipeline_folder, tmp_path, file):
    shutil.copytree(pipeline_folder, tmp_path / "copy")
    content = (tmp_path / "copy" / file).read_bytes()
    (tmp_path / "copy" / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"--pipeline .* can.t be loaded: .*{file}") as error:
        run(tmp_path / "copy", tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_truncated_download_is_one_line_and_leaves_nothing_half(pipeline_folder, hub_server, tmp_path, monkeypatch):
    """Answers that end too early: the client gives up where nothing comes of it, and else goes on where it was."""
    FlowerLDMPipeline.from_pretrained(pipeline_folder).push_to_hub("flowers")
    hub_server.interrupt = lambda request: 1000 if request.method == "GET" and "/storage/" in request.path else None
    with pytest.raises(InputError, match="flowers is neither .* that can be loaded: peer closed connection") as error:
        run("gardener/flowers", tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # what is lost of a broken answer
    hub_server.interrupt = lambda request: 100_000 if request.method == "GET" and "/storage/" in request.path else None
    run("gardener/flowers", tmp_path / "out", "--labels", "rose")
    assert any(request.headers.get("range") == "bytes=100000-" for request in hub_server.requests)
    run(pipeline_folder, tmp_path / "local", "--labels", "rose")
    drawn, expected = pixels(tmp_path / "out"), pixels(tmp_path / "local")
    assert drawn.keys() == expected.keys() and all((drawn[name] == expected[name]).all() for name in drawn)


def test_output_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="--output .*file/out: .*file is a file; name a folder"):
        fresh_folder(tmp_path / "file" / "out")


def test_file_names_are_safe_and_never_the_same():
    names = ["rose", "Rose", "rose", "a/b", "a b", "../up", "???", "edelweiß", "x" * 300]
    files = file_names(names)
    assert files == [
        "rose_0.png", "Rose_1.png", "rose_2.png", "a_b_0.png", "a_b_1.png", "up_0.png", "class_0.png",
        "edelweiß_0.png", f"{'x' * 80}_0.png",
    ]  # fmt: skip


def test_grid_has_a_column_a_label_with_its_name_below():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    grid = np.asarray(
        label_grid([[red, red], [blue, blue]], ["rose", "a name so long that it takes two lines"], gap=4)
    )
    assert grid.shape[1] == 4 + 2 * (128 + 4)
    for row in (4, 4 + 128 + 4):
        assert (grid[row : row + 128, 4 : 4 + 128] == (255, 0, 0)).all()
        assert (grid[row : row + 128, 136 : 136 + 128] == (0, 0, 255)).all()
    below = grid[4 + 2 * (128 + 4) :]
    first, second = below[:, :134], below[:, 134:]
    assert (first < 128).any() and (second < 128).any()
    assert (second[16:] < 128).any() and not (first[18:] < 128).any()  # one line here, two lines there


def test_half_precision_draws_nearly_the_same(pipeline_folder, tmp_path):
    for dtype in ("float32", "bfloat16"):
        run(pipeline_folder, tmp_path / dtype, "--labels", "rose", "--dtype", dtype)
    single, half = (pixels(tmp_path / dtype)["rose_0.png"] for dtype in ("float32", "bfloat16"))
    assert 0 < abs(single - half).max() < 32


def test_as_a_command_bad_input_is_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample", "--pipeline", str(tmp_path)])
    monkeypatch.delitem(sys.modules, "flower_ldm.sample")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("flower_ldm.sample", run_name="__main__")
    assert end.value.code == 2
    reason = "is not the folder of a pipeline: it has no model_index.json"
    assert capsys.readouterr().err == f"error: --pipeline {tmp_path} {reason}\n"


# Pictures drawn over, and guides


@pytest.fixture
def pictures(tmp_path):
    """A picture, and a mask that keeps its left half."""
    Image.effect_noise((16, 16), 80).convert("RGB").save(tmp_path / "image.png")
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (8, 0, 16, 16))
    mask.save(tmp_path / "mask.png")
    return "--image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png")


def test_draws_over_a_picture_and_keeps_what_the_mask_keeps(pipeline_folder, tmp_path, pictures):
    flags = ("--labels", "rose", "--num_images", "1", "--strength", "0.5", "--guidance_rescale", "0.7")
    run(pipeline_folder, tmp_path / "out", *flags, *pictures)
    drawn, image = pixels(tmp_path / "out")["rose_0.png"], pixels(tmp_path)["image.png"]
    np.testing.assert_array_equal(drawn[:, :8], image[:, :8])
    assert (drawn[:, 8:] != image[:, 8:]).any()


def test_pictures_are_upright_and_what_is_transparent_in_a_mask_stays(pipeline_folder, tmp_path, pictures):
    flags = ("--labels", "rose", "--num_images", "1", "--strength", "0.5")
    run(pipeline_folder, tmp_path / "plain", *flags, *pictures)
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(pictures[1]) as image, Image.open(pictures[3]) as mask:
        image.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "turned.png", exif=exif)
        Image.merge("LA", (Image.new("L", mask.size, 255), mask)).save(tmp_path / "clear.png")
    others = ("--image", str(tmp_path / "turned.png"), "--mask", str(tmp_path / "clear.png"))
    run(pipeline_folder, tmp_path / "files", *flags, *others)
    plain, files = (pixels(tmp_path / name)["rose_0.png"] for name in ("plain", "files"))
    np.testing.assert_array_equal(files, plain)


def test_a_guide_changes_what_is_drawn(pipeline_folder, tmp_path):
    weak = FlowerLDMPipeline.from_pretrained(pipeline_folder)
    for parameter in weak.unet.parameters():
        parameter.data *= 0.9
    weak.save_pretrained(tmp_path / "weak")
    flags = ("--labels", "rose", "--num_images", "1")
    run(pipeline_folder, tmp_path / "plain", *flags)
    run(pipeline_folder, tmp_path / "guided", *flags, "--guide", str(tmp_path / "weak"))
    plain, guided = (pixels(tmp_path / name)["rose_0.png"] for name in ("plain", "guided"))
    assert (plain != guided).any()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "none.png"], r"--image none\.png can't be read as a picture"),
        (["--image", "POSTSCRIPT"], r"--image .*\.png can't be read as a picture: it is no image of the formats JPEG"),
        (
            ["--image", "IMAGE", "--max_image_pixels", "255"],
            r"can't be read as a picture: it has more than 255 pixels",
        ),
        (["--image", "FLOATS"], "can't be read as a picture: pixels of mode F are floats, whose value for white"),
        (["--mask", "IMAGE"], "mask_image needs an image: give the image that it masks"),
        (["--image", "IMAGE", "--mask", "none.png"], r"--mask none\.png can't be read as a picture"),
        (["--image", "IMAGE", "--mask", "SMALL"], r"must have the image's size, \(16, 16\) .* got \(8, 8\)"),
        (["--image", "IMAGE", "--strength", "0"], r"strength must be above 0 and at most 1, got 0\.0"),
        (["--guidance_rescale", "2"], "guidance_rescale must be from 0"),
        (["--guide", "nowhere/at/all"], "--guide nowhere/at/all is neither a folder nor a Hub id"),
    ],
)
def test_bad_pictures_and_guides_are_one_clear_line(pipeline_folder, tmp_path, pictures, flags, message):
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "postscript.png", "EPS")
    Image.new("F", (8, 8)).save(tmp_path / "floats.tif")
    places = {"IMAGE": pictures[1], "SMALL": str(tmp_path / "small.png")}
    places |= {"POSTSCRIPT": str(tmp_path / "postscript.png"), "FLOATS": str(tmp_path / "floats.tif")}
    with pytest.raises(InputError, match=message) as error:
        run(pipeline_folder, tmp_path / "out", *(places.get(flag, flag) for flag in flags))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
