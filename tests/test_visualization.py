"""`flower_ldm.visualization`: every picture shows what it was given, where it should."""

import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from matplotlib import pyplot as plt
from PIL import Image

import train_autoencoder
import train_latent_diffusion
from flower_ldm import FlowerLDMPipeline
from flower_ldm.data import DataOptions, to_uint8
from flower_ldm.errors import InputError
from flower_ldm.files import file_safe_name
from flower_ldm.latent_maps import (
    COLORS,
    OTHERS,
    LatentSet,
    latent_map,
    named_classes,
    save_latent_maps,
    spread_over_classes,
    tsne,
)
from flower_ldm.synthetic import CLASS_NAMES
from flower_ldm.training import optional
from flower_ldm.visualization import (
    class_grid,
    data_options,
    draw_samples,
    image_grid,
    main,
    parse_args,
    picture_table,
    save_class_grid,
    save_denoising,
    save_diffusion_loss,
    save_loss_curves,
    save_pipeline_pictures,
    save_reconstructions,
    save_side_by_side,
)

SIZE, GAP = 64, 2  # of images that need no enlarging


def plain_images(values: list[float]) -> torch.Tensor:
    """One image of a single gray for each value in [-1, 1]."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE)


def cells(grid: Image.Image) -> list[list[int]]:
    """The gray in the middle of each cell of a grid, row by row."""
    middles = np.asarray(grid)[GAP + SIZE // 2 :: SIZE + GAP, GAP + SIZE // 2 :: SIZE + GAP]
    return middles[..., 0].tolist()


# Images


def test_to_uint8_maps_rounds_and_clips():
    values = torch.tensor([-1.0, 0.0, 1.0, -1.5, 1.5, 0.5])
    pixels = to_uint8(values.view(-1, 1, 1, 1).expand(-1, 3, 2, 2).requires_grad_())
    assert pixels.shape == (6, 2, 2, 3) and pixels.dtype == np.uint8
    assert pixels[:, 0, 0, 0].tolist() == [0, 128, 255, 0, 255, 191]


def test_to_uint8_gives_every_level_back():
    levels = torch.arange(256)
    images = (levels / 127.5 - 1).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert to_uint8(images)[0, :, :, 2].flatten().tolist() == levels.tolist()


def test_to_uint8_takes_bf16_and_keeps_the_channels_order():
    images = torch.tensor([1.0, -1.0, 0.0], dtype=torch.bfloat16).view(1, 3, 1, 1)
    assert to_uint8(images).tolist() == [[[[255, 0, 128]]]]


def test_grid_goes_row_by_row_on_white():
    grid = image_grid(to_uint8(plain_images([-1.0, -0.5, 0.0, 0.5, -1.0])), num_columns=3)
    assert grid.size == (3 * (SIZE + GAP) + GAP, 2 * (SIZE + GAP) + GAP)
    assert cells(grid) == [[0, 64, 128], [191, 0, 255]]
    assert (np.asarray(grid)[:GAP] == 255).all() and (np.asarray(grid)[:, SIZE + GAP : SIZE + 2 * GAP] == 255).all()


def test_small_images_are_enlarged_by_a_whole_factor():
    image = np.random.default_rng(0).integers(0, 256, size=(1, 24, 24, 3), dtype=np.uint8)
    enlarged = np.asarray(image_grid(image, num_columns=1))[GAP:-GAP, GAP:-GAP]
    assert enlarged.shape == (72, 72, 3)
    for row in range(3):
        assert (enlarged[row::3, row::3] == image[0]).all()


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [
        (2, [[0, 64], [128, 191]]),
        (4, [[0, 64, 0], [128, 191, 128], [64, 255, 255], [191, 255, 255]]),
        (6, [[0, 64, 0], [128, 191, 128], [64, 0, 64], [191, 128, 191]]),
    ],
)
def test_reconstructions_stand_under_their_originals(tmp_path, num_images, expected):
    images = plain_images([-1.0, -0.5] * (num_images // 2))
    reconstructions = plain_images([0.0, 0.5] * (num_images // 2))
    save_reconstructions(images, reconstructions, tmp_path / "new" / "grid.png", num_columns=3)
    assert cells(Image.open(tmp_path / "new" / "grid.png")) == expected


def test_class_grid_has_a_named_column_a_class():
    images = np.arange(6, dtype=np.uint8).reshape(3, 2, 1, 1, 1).repeat(8, 2).repeat(8, 3).repeat(3, 4)
    names = ["rose", "bird of paradise", "love-in-the-mist"]
    figure = class_grid(images, names, title="step 3")
    axes = np.array(figure.axes).reshape(2, 3)
    for row, column in np.ndindex(2, 3):
        assert axes[row, column].images[0].get_array()[0, 0, 0] == images[column, row, 0, 0, 0]
    assert [axis.get_xlabel() for axis in axes[1]] == ["rose", "bird of\nparadise", "love-in-\nthe-mist"]
    assert figure.get_suptitle() == "step 3"
    plt.close(figure)


def test_save_class_grid_writes_a_picture_and_leaves_no_figure_open(tmp_path):
    path = tmp_path / "samples" / "grid.png"
    save_class_grid(np.zeros((2, 1, 8, 8, 3), dtype=np.uint8), ["rose", "daisy"], path)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > picture.height
    assert not plt.get_fignums()


def test_picture_table_names_rows_columns_and_pictures():
    images = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1).repeat(8, 2).repeat(8, 3).repeat(3, 4)
    figure = picture_table(images, ["1", "2", "4"], ["rose", "love-in-the-mist"], title="scales")
    axes = np.array(figure.axes).reshape(2, 3)
    for row, column in np.ndindex(2, 3):
        assert axes[row, column].images[0].get_array()[0, 0, 0] == images[row, column, 0, 0, 0]
    assert [axis.get_xlabel() for axis in axes[1]] == ["1", "2", "4"]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["rose", "love-in-\nthe-mist"]
    plt.close(figure)


def test_named_classes_are_spread_over_all():
    assert named_classes(4) == [0, 1, 2, 3]
    assert named_classes(102) == [0, 11, 22, 34, 45, 56, 67, 79, 90, 101]
    assert named_classes(102, 3) == [0, 50, 101] and named_classes(2, 3) == [0, 1]


def test_points_are_spread_over_the_classes():
    labels = np.repeat([0, 1, 2], [100, 20, 5])
    kept = spread_over_classes(labels, 30)
    assert np.bincount(labels[kept]).tolist() in ([13, 12, 5], [12, 13, 5])
    assert (np.diff(kept) > 0).all()
    assert np.array_equal(kept, spread_over_classes(labels, 30))
    assert not np.array_equal(kept, spread_over_classes(labels, 30, seed=1))
    assert kept[labels[kept] == 0].max() > 50  # not the first ones, which are alike in many a data set
    assert np.array_equal(spread_over_classes(labels, 1000), np.arange(125))
    few = np.bincount(labels[spread_over_classes(np.repeat(np.arange(3), 100), 100, favored=[1])[:0]], minlength=3)
    assert few.sum() == 0
    counts = np.bincount(np.repeat(np.arange(3), 100)[spread_over_classes(np.repeat(np.arange(3), 100), 100, [1])])
    assert counts[1] == 80 and counts.sum() == 100


def clouds(num_classes: int, of_each: int, spread: float = 0.1, seed: int = 0) -> LatentSet:
    """Latents around a center for each class; the centers are the same for every seed."""
    centers = np.random.default_rng(99).standard_normal((num_classes, 4, 2, 2))
    labels = np.repeat(np.arange(num_classes), of_each)
    noise = spread * np.random.default_rng(seed).standard_normal((len(labels), 4, 2, 2))
    return LatentSet((centers[labels] + noise).astype(np.float32), labels)


def test_tsne_keeps_classes_together():
    latents = clouds(4, 20)
    points = tsne(latents.latents)
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (latents.labels[distances.argmin(axis=1)] == latents.labels).all()
    assert np.array_equal(points, tsne(latents.latents))


def test_tsne_of_few_images():
    assert np.isfinite(tsne(clouds(2, 1).latents)).all()


@pytest.mark.parametrize("num_classes", [3, 102])
def test_latent_map_shows_classes_by_color_and_sets_by_marker(num_classes):
    figure, axis = plt.subplots()
    names = [f"class {label} " for label in range(num_classes)]
    labels = {"training": np.arange(num_classes), "generated": np.array([0, num_classes - 1])}
    points = {name: np.column_stack([of_set, of_set]) for name, of_set in labels.items()}
    latent_map(axis, points, labels, names)
    shown = named_classes(num_classes)
    drawn = {}
    for collection in axis.collections:
        for (x, _), color in zip(collection.get_offsets(), collection.get_facecolors(), strict=False):
            drawn.setdefault(int(x), set()).add("#{:02X}{:02X}{:02X}".format(*(int(255 * c + 0.5) for c in color[:3])))
    expected = {label: {COLORS[shown.index(label)]} if label in shown else {OTHERS.upper()} for label in drawn}
    assert drawn.keys() >= set(shown) and all(drawn[label] == expected[label] for label in shown)
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    others = [f"{num_classes - 10} other classes"] if num_classes > 10 else []
    sets = [f"training ({num_classes})", "generated (2)"]
    assert legend == [*(f"class {label}" for label in shown), *others, *sets]
    plt.close(figure)


def test_latent_maps_put_every_set_into_one_picture(tmp_path, figures):
    sets = {"training": clouds(3, 30), "held out": clouds(3, 4, seed=1), "generated": clouds(3, 2, spread=9, seed=2)}
    plane = save_latent_maps(sets, ["a", "b", "c"], tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"latent_space_pca.png", "latent_space_tsne.png"}
    for figure in figures:
        named = [len(collection.get_offsets()) for collection in figure.axes[0].collections]
        assert named == [0, 90, 0, 12, 0, 6]
    assert len(plane.points) == 90 and np.array_equal(plane.labels, sets["training"].labels)
    alone = save_latent_maps({"training": sets["training"]}, ["a", "b", "c"], tmp_path / "alone")
    np.testing.assert_allclose(alone.points, plane.points)  # what is generated doesn't turn the plane


# Curves


def points(axis: plt.Axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axis.lines}


def test_loss_curves_have_a_panel_a_loss_with_its_held_out_values(tmp_path, figures):
    lines = [
        {"step": 1, "pixel_loss": 0.5},
        {"step": 2, "pixel_loss": 0.25, "center_loss": 1.0},
        {"step": 2, "val_pixel_loss": 0.3, "psnr": 20.0},
    ]
    path = tmp_path / "losses.png"
    save_loss_curves(lines, ["pixel_loss", "perceptual_loss", "center_loss", "psnr"], path)
    panels = {axis.get_title(): points(axis) for axis in figures[0].axes if axis.axison}
    assert panels == {
        "pixel loss": {"training": [(1, 0.5), (2, 0.25)], "held out": [(2, 0.3)]},
        "center loss": {"training": [(2, 1.0)]},
        "psnr": {"training": [(2, 20.0)]},
    }
    assert Image.open(path).format == "PNG"


def test_loss_curves_of_an_empty_log(tmp_path):
    save_loss_curves([], ["pixel_loss"], tmp_path / "losses.png")
    assert (tmp_path / "losses.png").is_file()
    assert not plt.get_fignums()


def test_diffusion_loss_over_steps_and_by_timestep(tmp_path, figures):
    lines = [
        {"step": step, "loss": 1 / step, "loss_by_timestep": [[0, 500, 2 / step], [500, 1000, None]]}
        for step in range(1, 6)
    ]
    save_diffusion_loss([*lines, {"step": 5, "val_loss": 0.25}], tmp_path / "loss.png")
    over_steps, by_timestep = map(points, figures[0].axes)
    assert list(over_steps.values()) == [[(step, 1 / step) for step in range(1, 6)], [(5, 0.25)]]
    assert by_timestep == {"update 1": [(250, 2)], "update 3": [(250, 2 / 3)], "update 5": [(250, 2 / 5)]}
    assert Image.open(tmp_path / "loss.png").format == "PNG"


@pytest.mark.parametrize("damage", [None, "x", {}, [[1]], ["x"], 10**400, True, [[0, 500, {}], [500, 1000, 7.0]]])
def test_what_is_no_number_in_a_log_is_not_drawn(damage, tmp_path, figures):
    lines = [{"step": 1, "loss": 0.5, "loss_by_timestep": [[0, 1000, 0.5]]},
             {"step": 2, "loss": damage, "loss_by_timestep": damage, "val_loss": damage}]  # fmt: skip
    save_loss_curves(lines, ["loss"], tmp_path / "losses.png")
    assert points(figures[0].axes[0]) == {"training": [(1, 0.5)]}
    save_diffusion_loss(lines, tmp_path / "loss.png")
    over_steps, by_timestep = map(points, figures[1].axes)
    assert over_steps == {"training": [(1, 0.5)]} and by_timestep.pop("update 1") == [(500, 0.5)]
    assert by_timestep == ({"update 2": [(750, 7.0)]} if damage and damage == [[0, 500, {}], [500, 1000, 7.0]] else {})


def test_diffusion_loss_of_a_run_without_a_log_line(tmp_path: Path):
    save_diffusion_loss([{"step": 0, "val_loss": 1.0}], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").is_file()


# The command


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".mp4")


def of_paths(*names: str) -> list[str]:
    return [file for name in names for file in (f"denoising_path_{name}.png", f"diffusion_animation_{name}.gif")]


def test_every_picture_of_a_pipeline(finished_runs, tmp_path, capsys):
    flags = ["--labels", "0", CLASS_NAMES[2], "--output", str(tmp_path / "out"), "--steps", "3", "--device", "cpu"]
    main(["--pipeline", str(finished_runs.flower_ldm), *flags])
    first, second = (CLASS_NAMES[label].replace(" ", "_") for label in (0, 2))
    expected = "vae_samples_grid_subset latent_space_tsne latent_space_pca original_reconstructed_generated"
    expected += " diffusion_loss nearest_neighbours guidance_sweep interpolation_classes interpolation_seeds"
    expected = [f"{name}.png" for name in expected.split()] + of_paths(first, second)
    assert pictures(tmp_path / "out") == sorted(expected)
    for path in (tmp_path / "out").iterdir():
        if path.suffix != ".mp4":
            with Image.open(path) as picture:
                assert np.asarray(picture.convert("L")).std() > 5, path.name
    assert f"pictures are in {tmp_path / 'out'}" in capsys.readouterr().out


def test_the_images_are_those_of_the_run_unless_flags_say_otherwise(finished_runs, tmp_path):
    def options(*words: str, folder: Path = finished_runs.flower_ldm) -> DataOptions | None:
        return data_options(parse_args(["--pipeline", str(folder), *words]), str(folder))

    of_run = DataOptions("synthetic", classes=list("0123"), images_per_class=12, resolution=32)
    assert options() == options("--dataset", "synthetic") == of_run
    assert options("--dataset", "flowers102") == DataOptions("flowers102")
    assert options("--dataset", "none") is None
    assert options(folder=tmp_path) is None  # there is no run, and no flag names a data set


def test_a_pipeline_with_a_stock_unet_and_without_images(finished_runs, tmp_path, capsys):
    pipe = FlowerLDMPipeline.from_pretrained(finished_runs.flower_ldm)
    channels, size, _ = pipe.latents_shape
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "norm_num_groups": 4}
    unet = UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=(8, 16), layers_per_block=1,
        num_class_embeds=5, **blocks,
    )  # fmt: skip
    FlowerLDMPipeline(pipe.vae, unet.eval(), pipe.scheduler, pipe.config.id2label).save_pretrained(tmp_path / "stock")
    main(["--pipeline", str(tmp_path / "stock"), "--output", str(tmp_path / "out"), "--steps", "2", "--device", "cpu"])
    names = [CLASS_NAMES[label].replace(" ", "_") for label in (0, 2, 3)]
    rest = ["guidance_sweep.png", "interpolation_seeds.png", "vae_samples_grid_subset.png"]
    assert pictures(tmp_path / "out") == sorted([*rest, *of_paths(*names)])
    assert "left out interpolation_classes.png: labels are mixtures of classes" in capsys.readouterr().out


def test_pictures_of_an_autoencoder(finished_runs, tmp_path):
    main(["--autoencoder", str(finished_runs.autoencoder), "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert pictures(tmp_path / "out") == [
        "autoencoder_losses.png", "latent_space_pca.png", "latent_space_tsne.png", "reconstructions.png"
    ]  # fmt: skip
    last = finished_runs.autoencoder / "reconstructions" / "step-00000006.png"
    drawn, expected = (
        np.asarray(Image.open(path)).astype(int) for path in (tmp_path / "out" / "reconstructions.png", last)
    )
    assert abs(drawn - expected).max() <= 1


def test_a_picture_that_cannot_be_drawn_costs_no_other(finished_runs, tmp_path, capsys):
    """Folders lie where two of them should go."""
    pipe = FlowerLDMPipeline.from_pretrained(finished_runs.flower_ldm)
    pipe.set_progress_bar_config(disable=True)
    _, held_out = DataOptions("synthetic", resolution=32, classes=[0, 1, 2, 3], images_per_class=12).load()
    for name in ("original_reconstructed_generated", "guidance_sweep"):
        (tmp_path / f"{name}.png").mkdir()
    options = {"labels": [0, 1], "num_inference_steps": 2}
    generated = draw_samples(pipe, 0, num_inference_steps=2)
    written = save_pipeline_pictures(pipe, tmp_path, generated, {}, held_out, guard=optional, **options)
    names = [file_safe_name(CLASS_NAMES[label]) for label in (0, 1)]
    drawn = ["interpolation_classes.png", "interpolation_seeds.png", *of_paths(*names)]
    assert sorted(path.name for path in written if path.suffix != ".mp4") == sorted(drawn)
    assert all(path.is_file() for path in written)
    said = capsys.readouterr().err
    assert said.count("left out original_reconstructed_generated.png: ") == 1
    assert said.count("left out guidance_sweep.png: ") == 1 and said.count("left out") == 2
    with pytest.raises(InputError, match="original_reconstructed_generated.png can.t be written"):
        save_pipeline_pictures(pipe, tmp_path, generated, {}, held_out, **options)


def test_classes_whose_file_safe_names_are_the_same_have_files_of_their_own(finished_runs, tmp_path):
    pipe = FlowerLDMPipeline.from_pretrained(finished_runs.flower_ldm)
    pipe.set_progress_bar_config(disable=True)
    pipe.register_to_config(id2label={"0": "a b", "1": "A?b", "2": "c", "3": "d"})
    plane = save_latent_maps({"training": clouds(4, 3)}, pipe.class_names, tmp_path)
    plane.pca.n_features_in_ = int(np.prod(pipe.latents_shape))
    plane.pca.mean_ = np.zeros(plane.pca.n_features_in_)
    plane.pca.components_ = np.eye(2, plane.pca.n_features_in_)
    written = save_denoising(pipe, [0, 1], plane, tmp_path, num_inference_steps=2)
    assert pictures(tmp_path) == sorted(["latent_space_pca.png", "latent_space_tsne.png", *of_paths("a_b", "A_b_1")])
    assert written[:2] == [tmp_path / "denoising_path_a_b.png", tmp_path / "denoising_path_A_b_1.png"]


def test_classes_without_a_held_out_image_are_not_compared(finished_runs, tmp_path, capsys):
    pipe = FlowerLDMPipeline.from_pretrained(finished_runs.flower_ldm)
    _, held_out = DataOptions("synthetic", resolution=32, classes=[0, 1, 2, 3], images_per_class=12).load()
    drawn = np.zeros((2, 32, 32, 3), np.uint8)
    held_out.labels[held_out.labels == 1] = 0
    (written,) = save_side_by_side(pipe, held_out, [0, 1], drawn, tmp_path)
    assert written == tmp_path / "original_reconstructed_generated.png" and written.is_file()
    assert save_side_by_side(pipe, held_out, [1], drawn[:1], tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
    assert "none of these classes has a held-out image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give either --pipeline (a folder or Hub id) or --autoencoder"),
        ("--pipeline {run} --autoencoder {run}", "give either --pipeline"),
        ("--pipeline {run} --labels rse", "unknown label 'rse'"),
        ("--pipeline {run} --guidance_scale nan", "guidance_scale must be a finite number"),
        ("--pipeline {run} --steps 0", "num_inference_steps must be a whole number of at least 1"),
        ("--pipeline {run} --classes 0 1 2", "--pipeline {run} has 4 classes, synthetic has 3: give the --dataset"),
        ("--pipeline {run} --classes 0 1 3 2", "in --pipeline {run}, but"),
        ("--pipeline {run} --resolution 64", "--resolution 64: --pipeline {run} draws 32 pixels"),
        ("--autoencoder {ae} --resolution 64", "--resolution 64: --autoencoder {ae} draws 32 pixels"),
        ("--pipeline {run} --max_image_pixels 0", "--max_image_pixels must be positive, got 0"),
        ("--pipeline {run} --dataset imagefolder --data_dir {tmp}/nowhere", "there is no such folder"),
        ("--pipeline {tmp}", "is not the folder of a pipeline"),
        ("--autoencoder {tmp}", "--autoencoder {tmp} can't be loaded"),
        ("--autoencoder {ae} --dataset none", "name the images to encode by --dataset"),
        ("--autoencoder {ae} --device toaster", "--device toaster can't be used"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(finished_runs, tmp_path, flags, message):
    places = {"run": finished_runs.flower_ldm, "ae": finished_runs.autoencoder, "tmp": tmp_path}
    with pytest.raises(InputError) as error:
        main([*flags.format(**places).split(), "--output", str(tmp_path / "out")])
    assert message.format(**places) in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_damaged_flags_of_the_run_are_one_line(finished_runs, tmp_path):
    (tmp_path / "args.yaml").write_text("dataset: [synthetic]")
    shutil.copy(finished_runs.autoencoder / "config.json", tmp_path)
    shutil.copy(finished_runs.autoencoder / "diffusion_pytorch_model.safetensors", tmp_path)
    with pytest.raises(InputError, match="args.yaml: dataset must be a text, not a list"):
        main(["--autoencoder", str(tmp_path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_as_a_command_bad_input_is_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["visualization"])
    monkeypatch.delitem(sys.modules, "flower_ldm.visualization")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("flower_ldm.visualization", run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: give either --pipeline")


# Pictures that can't be drawn


@pytest.mark.parametrize("stage", ["autoencoder", "flower_ldm"])
def test_a_picture_that_cannot_be_drawn_costs_no_checkpoint(finished_runs, run_script, tmp_path, capsys, stage):
    """Folders lie where pictures of validation and of the end should go; the weights are those of a run without."""
    script, flags, pictures, kept = {
        "autoencoder": (train_autoencoder, finished_runs.stage1, "reconstructions", "."),
        "flower_ldm": (train_latent_diffusion, finished_runs.stage2, "samples", "unet"),
    }[stage]
    finished, run = getattr(finished_runs, stage), tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoint-6")
    (run / pictures / "step-00000005.png").mkdir()  # a picture can't take its place
    more = ["--validation_steps", "1", "--resume_from_checkpoint", "latest", "--no-final_pictures"]
    run_script(script.main, [*flags, "--output_dir", run, *more])
    said = capsys.readouterr().err
    assert said.count("left out pictures of this validation: ") == 1
    assert (run / "checkpoint-6").is_dir() and (run / "report.html").is_file()
    name = f"{kept}/diffusion_pytorch_model.safetensors"
    assert (run / name).read_bytes() == (finished / name).read_bytes()
