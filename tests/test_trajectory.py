"""flower_ldm/trajectory.py: paths are the pipeline's own, interpolations end where they should, animations move."""

import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from matplotlib.figure import Figure
from PIL import Image

from flower_ldm import FlowerAutoencoderKL, FlowerLDMPipeline, FlowerUNet2DModel, trajectory
from flower_ldm.latent_maps import LatentPlane
from flower_ldm.sampling import decode, draw_classes
from flower_ldm.trajectory import (
    MAX_FRAMES,
    MILLISECONDS,
    PANEL,
    animation_frames,
    draw_path,
    interpolate_classes,
    interpolate_seeds,
    record_trajectory,
    save_animation,
    save_denoising_path,
    slerp,
    sweep_guidance,
)

STEPS = 5  # a divisor of 1000: else the step that DDIM makes is not quite to its next timestep


def make_pipeline() -> FlowerLDMPipeline:
    torch.manual_seed(0)
    vae = FlowerAutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latents_mean=[0.1, 0.2, -0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 3.0],
    )
    unet = FlowerUNet2DModel(
        sample_size=4, in_channels=4, hidden_size=32, num_layers=3, num_attention_heads=2, num_classes=3
    )
    for parameter in [*unet.parameters(), *vae.decoder.parameters()]:  # untrained it predicts zero
        torch.nn.init.normal_(parameter, std=0.1)
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="trailing")
    names = dict(enumerate(["rose", "bishop of llandaff", "hippeastrum "]))
    pipe = FlowerLDMPipeline(vae.eval(), unet.eval(), scheduler, names)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> FlowerLDMPipeline:
    return make_pipeline()


@pytest.fixture(scope="module")
def recorded() -> trajectory.Trajectory:
    return record_trajectory(make_pipeline(), "bishop of llandaff", seed=3, num_inference_steps=STEPS)


def drawn(pipe: FlowerLDMPipeline, label, seed: int, **options) -> np.ndarray:
    options = {"num_inference_steps": STEPS, **options}
    (image,) = pipe(label, generator=torch.Generator().manual_seed(seed), **options).images
    return np.asarray(image)


# Recording


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler",
                  "HeunDiscreteScheduler"],
)  # fmt: skip
def test_path_begins_with_the_noise_and_ends_with_the_pipelines_sample(pipe, scheduler, guidance_scale):
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    path = record_trajectory(pipe, 1, seed=5, num_inference_steps=STEPS, guidance_scale=guidance_scale)
    noise = torch.randn(1, *pipe.latents_shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        decoded = pipe.numpy_to_pil(pipe.decode_latents(noise, "np"))[0]
    assert np.array_equal(path.noisy_images[0], decoded)
    sample = drawn(pipe, 1, seed=5, guidance_scale=guidance_scale)
    assert np.array_equal(path.noisy_images[-1], sample) and np.array_equal(path.denoised_images[-1], sample)
    assert len(path) == len(pipe.scheduler.timesteps) + 1
    assert path.noise_levels[0] == 1 and path.noise_levels[-1] == 0
    assert (np.diff(path.noise_levels) <= 0).all()
    arrays = (path.noisy_latents, path.denoised_latents, path.noisy_images, path.denoised_images)
    assert [len(array) for array in arrays] == [len(path)] * 4
    assert np.unique(path.noisy_images, axis=0).shape[0] >= STEPS + 1  # each state is another


def test_states_have_the_same_scale_whatever_the_scheduler(pipe):
    """Euler's steps are those of DDIM without noise, on latents that grow with it (Karras et al. 2022, appendix C)."""
    by_ddim = record_trajectory(pipe, 0, num_inference_steps=STEPS)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    by_euler = record_trajectory(pipe, 0, num_inference_steps=STEPS)
    np.testing.assert_allclose(by_euler.noise_levels, by_ddim.noise_levels, atol=1e-4)
    for name in ("noisy_latents", "denoised_latents"):
        expected = getattr(by_ddim, name)
        np.testing.assert_allclose(getattr(by_euler, name), expected, rtol=0.01, atol=0.01 * abs(expected).max())


def test_noisy_latents_are_clean_ones_and_noise_in_the_shares_that_are_named(recorded):
    """From DDIM's state i to i + 1 neither the predicted clean latents nor the predicted noise change."""
    for i in range(len(recorded) - 1):
        sigma, sigma_next = recorded.noise_levels[[i, i + 1]]
        alpha, alpha_next = np.sqrt(1 - sigma**2), np.sqrt(1 - sigma_next**2)
        if i == 0:  # named 1, as it is drawn, where the scheduler begins just below
            continue
        noise = (recorded.noisy_latents[i] - alpha * recorded.denoised_latents[i]) / sigma
        following = alpha_next * recorded.denoised_latents[i] + sigma_next * noise
        np.testing.assert_allclose(recorded.noisy_latents[i + 1], following, rtol=1e-3, atol=1e-3)


def test_label_may_be_a_name_and_is_kept(recorded):
    assert (recorded.label, recorded.name) == (1, "bishop of llandaff")


# Interpolation and guidance


def test_slerp_turns_at_an_even_rate():
    start, end = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    for fraction in (0, 1 / 3, 0.5, 1):
        angle = fraction * torch.pi / 2
        expected = 2 * torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32)
        torch.testing.assert_close(slerp(start, end, fraction), expected, rtol=1e-5, atol=1e-6)


def test_slerp_keeps_the_length_of_noise_where_the_straight_line_does_not():
    start, end = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert slerp(start, end, 0.5).norm() == pytest.approx(start.norm().item(), rel=0.03)
    assert torch.lerp(start, end, 0.5).norm() < 0.8 * start.norm()


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_slerp_of_vectors_on_one_line(factor):
    start = torch.tensor([1.0, 2.0, 3.0])
    assert torch.allclose(slerp(start, factor * start, 0.25), start * (0.75 + 0.25 * factor), rtol=1e-4, atol=1e-3)


def test_seeds_are_joined(pipe):
    images = interpolate_seeds(pipe, 1, (4, 9), num_images=5, num_inference_steps=STEPS)
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    for image, seed in ((images[0], 4), (images[-1], 9)):
        assert abs(image.astype(int) - drawn(pipe, 1, seed)).max() <= 1  # rounding
    assert len(np.unique(images, axis=0)) == 5


def test_classes_are_joined(pipe):
    images = interpolate_classes(pipe, "rose", 2, num_images=4, seed=6, num_inference_steps=STEPS)
    assert images.shape == (4, 16, 16, 3)
    for image, label in ((images[0], 0), (images[-1], 2)):
        assert abs(image.astype(int) - drawn(pipe, label, 6)).max() <= 1
    assert len(np.unique(images, axis=0)) == 4
    [alone] = interpolate_classes(pipe, "rose", 2, num_images=1, seed=6, num_inference_steps=STEPS)
    assert abs(alone.astype(int) - images[0]).max() <= 1


def test_guidance_is_swept_over_the_same_noise(pipe):
    images = sweep_guidance(pipe, [0, 2], [1.0, 4.0], seed=2, num_inference_steps=STEPS)
    assert images.shape == (2, 2, 16, 16, 3)
    for row, label in enumerate([0, 2]):
        for column, scale in enumerate([1.0, 4.0]):
            expected = drawn(pipe, label, 2, guidance_scale=scale)
            assert abs(images[row, column].astype(int) - expected).max() <= 1


def test_the_first_images_of_a_class_stay_the_same_when_more_are_drawn(pipe):
    few, many = (draw_classes(pipe, [2, 0], 7, count, num_inference_steps=2) for count in (2, 5))
    torch.testing.assert_close(few.view(2, 2, 4, 4, 4), many.view(2, 5, 4, 4, 4)[:, :2], rtol=1e-4, atol=1e-5)
    assert len(np.unique(decode(pipe, many), axis=0)) == 10


# Pictures


def test_plane_is_that_of_largest_variance():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((16, 2)))[0]
    coordinates = rng.standard_normal((200, 2)) * [5, 2]
    latents = (coordinates @ axes.T).reshape(200, 4, 2, 2).astype(np.float32)
    plane = LatentPlane.fit(latents, np.arange(200) % 3)
    assert plane.pca.explained_variance_ratio_.sum() == pytest.approx(1, abs=1e-5)
    centered = coordinates - coordinates.mean(axis=0)
    np.testing.assert_allclose(np.linalg.norm(plane.points, axis=1), np.linalg.norm(centered, axis=1), rtol=1e-3)
    np.testing.assert_allclose(plane.project(latents[:7]), plane.points[:7], atol=1e-4)


@pytest.fixture(scope="module")
def plane() -> LatentPlane:
    rng = np.random.default_rng(1)
    return LatentPlane.fit(rng.standard_normal((30, 4, 4, 4)).astype(np.float32), np.arange(30) % 3)


def test_way_through_the_plane(recorded, plane):
    axis = Figure().subplots()
    draw_path(axis, recorded, plane)
    others, own = (collection.get_offsets() for collection in axis.collections)
    assert len(others) == 20
    np.testing.assert_allclose(own, plane.points[plane.labels == 1], rtol=1e-4, atol=1e-3)
    lines = {line.get_label(): line.get_xydata() for line in axis.lines}
    np.testing.assert_allclose(lines["noisy latents"], plane.project(recorded.noisy_latents), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(
        lines["predicted clean latents"], plane.project(recorded.denoised_latents), rtol=1e-4, atol=1e-3
    )
    np.testing.assert_allclose(lines["noise"], plane.project(recorded.noisy_latents[:1]), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(lines["sample"], plane.project(recorded.noisy_latents[-1:]), rtol=1e-4, atol=1e-3)
    assert "bishop of llandaff" in [text.get_text() for text in axis.get_legend().get_texts()]


def test_picture_of_a_path(recorded, plane, tmp_path):
    save_denoising_path(recorded, plane, tmp_path / "new" / "path.png")
    with Image.open(tmp_path / "new" / "path.png") as picture:
        assert picture.width > 1000 and np.asarray(picture.convert("L")).std() > 5


def test_frames_show_the_states_and_end_with_the_sample(recorded):
    frames = animation_frames(recorded)
    assert len(frames) == len(recorded)
    bars = []
    for frame, noisy, denoised in zip(frames, recorded.noisy_images, recorded.denoised_images, strict=True):
        for left, image in ((4, noisy), (4 + PANEL + 8, denoised)):
            enlarged = np.asarray(Image.fromarray(image).resize((PANEL, PANEL), Image.Resampling.BICUBIC))
            assert np.array_equal(frame[4 : 4 + PANEL, left : left + PANEL], enlarged)
        bars.append((frame[4 + PANEL + 24] == (0x33, 0x22, 0x88)).all(axis=-1).sum())
    assert bars == sorted(bars, reverse=True) and bars[0] > 250 and bars[-1] == 0


def test_animation_holds_its_last_frame(recorded, tmp_path):
    written = save_animation(recorded, tmp_path / "new" / "animation.gif")
    assert written[0] == tmp_path / "new" / "animation.gif"
    assert written[0].stat().st_size < 2e6
    with Image.open(written[0]) as gif:
        assert gif.n_frames == len(recorded) and gif.info["loop"] == 0
        durations, last = [], None
        for number in range(gif.n_frames):
            gif.seek(number)
            durations.append(gif.info["duration"])
            last = np.asarray(gif.convert("RGB")).astype(int)
    assert durations == [MILLISECONDS["first"], *[MILLISECONDS["between"]] * (STEPS - 1), MILLISECONDS["last"]]
    assert abs(last - animation_frames(recorded)[-1]).mean() < 4  # 256 colors


def test_a_long_path_is_shown_in_as_many_frames_as_are_good_to_watch(pipe):
    path = record_trajectory(pipe, 0, num_inference_steps=2 * MAX_FRAMES)
    frames = animation_frames(path)
    assert len(frames) == MAX_FRAMES
    corner = np.s_[4 : 4 + PANEL, 4 : 4 + PANEL]
    for frame, image in ((frames[0], path.noisy_images[0]), (frames[-1], path.noisy_images[-1])):
        enlarged = Image.fromarray(image).resize((PANEL, PANEL), Image.Resampling.BICUBIC)
        assert np.array_equal(frame[corner], np.asarray(enlarged))


def test_no_film_where_ffmpeg_is_not_installed(recorded, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # so the import system says that there is none
    written = save_animation(recorded, tmp_path / "animation.gif")
    assert written == [tmp_path / "animation.gif"] == list(tmp_path.iterdir())


def test_film_where_ffmpeg_is_installed(recorded, tmp_path):
    pytest.importorskip("imageio_ffmpeg", reason="pip install -e '.[dev]'")
    import imageio.v3 as imageio

    written = save_animation(recorded, tmp_path / "animation.gif")
    assert written[1:] == [tmp_path / "animation.mp4"]
    film = imageio.imread(written[1], plugin="FFMPEG")
    assert film.shape == (5 + STEPS - 1 + 20, 240, 400, 3)
    assert abs(film[-1].astype(int) - animation_frames(recorded)[-1]).mean() < 6
