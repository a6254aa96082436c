"""app.py: the real page on a tiny pipeline, through its endpoints over a socket, by hand, and in a browser."""

import base64
import errno
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
import yaml
from loopback_hub import Blob
from PIL import Image

pytest.importorskip("gradio", reason="pip install -e '.[app]'")
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

import app
from flower_ldm import FlowerLDMPipeline, hub
from flower_ldm.pipelines import pipeline_flower_ldm
from flower_ldm.pipelines.pipeline_flower_ldm import SCHEDULERS

ROOT = Path(__file__).parent.parent
SAMPLERS = [facts.title for facts in SCHEDULERS.values()]
COMMIT = "0123456789abcdef" * 2 + "01234567"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def served(finished_runs, tmp_path_factory):
    """The page of a tiny pipeline, a client of it, and the pipeline itself."""
    pipe = app.load_pipeline(str(finished_runs.flower_ldm), "cpu", trust_remote_code=False)
    page = app.build_page(app.Studio(pipe), "tiny flowers")
    address = app.launch(page, "127.0.0.1", free_port(), block=False)
    client = Client(address, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))
    yield SimpleNamespace(address=address, client=client, pipe=pipe, names=pipe.class_names)
    client.close()
    page.close(verbose=False)


def draw(served, flowers=None, images_each=1, seed=0, steps=3, guidance=2.0, sampler="DPM-Solver++"):
    flowers = served.names[:1] if flowers is None else flowers
    return served.client.predict(flowers, images_each, seed, steps, guidance, sampler, api_name="/draw")


def opened(gallery: list[dict]) -> list[np.ndarray]:
    return [np.asarray(Image.open(entry["image"]).convert("RGB")) for entry in gallery]


def alone(pipe, labels, seed: int, steps: int, guidance: float) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed)]
    [image] = pipe(labels, num_inference_steps=steps, guidance_scale=guidance, generator=generator).images
    return np.asarray(image)


# --- what it draws ---------------------------------------------------------------------------------------------------


def test_drawn_images_are_those_of_the_pipeline(served):
    note, gallery = draw(served, [served.names[2], served.names[0]], 2, seed=7, steps=4)
    assert "4 images, seed 7" in note
    assert [entry["caption"] for entry in gallery] == [served.names[2]] * 2 + [served.names[0]] * 2
    for number, (image, label) in enumerate(zip(opened(gallery), (2, 2, 0, 0), strict=True)):
        expected = alone(served.pipe, label, 7 + number, 4, 2.0)
        assert image.shape == (32, 32, 3)
        assert np.abs(image.astype(int) - expected).max() <= 1  # a batch's rounding


def test_previews_come_one_by_one_and_change(served):
    job = served.client.submit(served.names[:2], 1, 0, 30, 2.0, "DPM-Solver++", api_name="/draw")
    job.result()
    pages = [page for page, _ in job.outputs()]
    steps = [int(found[1]) for page in pages if (found := re.search(r"step (\d+) of 30", page))]
    assert steps == sorted(steps) and steps[-1] == 30 and 8 <= len(steps) <= app.PREVIEWS + 1
    shown = [re.findall(r"data:image/jpeg;base64,([^\"]+)", page) for page in pages[:-1]]
    assert all(len(images) == 2 for images in shown)
    first, last = (np.asarray(Image.open(io.BytesIO(base64.b64decode(images[0]))), int) for images in
                   (shown[0], shown[-1]))  # fmt: skip
    assert np.abs(first - last).mean() > 1


def test_blend_goes_from_one_class_to_the_other(served):
    page, gallery = served.client.predict(served.names[:2], 3, 3, 2.0, "DPM-Solver++", api_name="/blend")
    frames = opened(gallery)
    assert len(frames) == app.BLEND_FRAMES and gallery[-1]["caption"] == f"100 % {served.names[1]}"
    for frame, label in ((frames[0], 0), (frames[-1], 1)):
        assert np.abs(frame.astype(int) - alone(served.pipe, label, 3, 3, 2.0)).max() <= 1
    assert page.startswith('<img class="loop" src="data:image/webp;base64,') and 'download="blend.webp"' in page


def test_animation_goes_there_and_back():
    page = app.loop([Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 90, 180, 250)], "from black to <red>")
    [animation] = set(re.findall(r"data:image/webp;base64,([^\"]+)", page))
    with Image.open(io.BytesIO(base64.b64decode(animation))) as image:
        assert image.n_frames == 6 and image.size == (256, 256)
    assert "&lt;red&gt;" in page


@pytest.mark.parametrize("sampler", [app.OWN_SAMPLER, *SAMPLERS])
def test_every_sampler_draws(served, sampler):
    _, gallery = draw(served, sampler=sampler, steps=20)
    assert opened(gallery)[0].shape == (32, 32, 3)


def test_a_drawing_that_is_left_makes_room_for_the_next(served):
    job = served.client.submit(served.names[:4], 6, 0, 100, 2.0, "DDPM", api_name="/draw")
    end = time.monotonic() + 60
    while not job.outputs():
        assert time.monotonic() < end
        time.sleep(0.01)
    job.cancel()
    _, gallery = draw(served)
    assert len(gallery) == 1 and len(job.outputs()) < app.PREVIEWS


def test_stock_parts_draw_but_do_not_blend(served):
    """The page asks what the parts can do, never what they are."""
    from diffusers import AutoencoderKL, UNet2DModel

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8,), norm_num_groups=4,
                       down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=4,
                       layers_per_block=1)  # fmt: skip
    studio = app.Studio(FlowerLDMPipeline(vae, unet, served.pipe.scheduler))
    assert not studio.can_blend and [name for _, name in studio.thumbnails()] == ["0", "1", "2"]


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_a_long_name_is_found_whole(served):
    """Cut to a hundred letters two of them would be one, and neither would be found."""
    names = ["a" * 150 + "1", "a" * 150 + "2", "b", "c"]
    pipe = FlowerLDMPipeline(served.pipe.vae, served.pipe.unet, served.pipe.scheduler, dict(enumerate(names)))
    assert app.check_request(pipe, [names[1]], 1, 0, 4, 2.0, app.OWN_SAMPLER).labels == [1]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"flowers": []}, "Choose at least one flower"),
        ({"flowers": None, "images_each": 0}, "Images of each flower must be a whole number from 1 to 12"),
        ({"flowers": ["amber dasy"]}, "Unknown label 'amber dasy': the nearest names are 'amber daisy'"),
        ({"flowers": ["4"]}, "out of range: the labels are 0 to 3"),
        ({"flowers": ["0"] * 9}, "Choose at most 8 flowers, not 9"),
        ({"flowers": ["0"] * 8, "images_each": 4}, "8 flowers with 4 images each are 32 images: at most 24"),
        ({"images_each": 1.5}, "Images of each flower must be a whole number"),
        ({"steps": 101}, "Steps must be a whole number from 1 to 100"),
        ({"steps": "all"}, "Steps must be a whole number"),
        ({"seed": -1}, "The seed must be a whole number from 0 to 2,147,483,647"),
        ({"guidance": 11}, "Guidance must be a number from 1 to 10"),
        ({"guidance": True}, "Guidance must be a number"),
        ({"images_each": 10**400}, "Images of each flower must be a whole number"),
        ({"sampler": "os.system"}, "The sampler must be one of"),
        ({"flowers": {"path": "/etc/passwd"}}, "Choose at least one flower"),
        ({"flowers": [["0"]]}, "Choose at least one flower"),
    ],
    ids=str,
)
def test_bad_request_is_one_line(served, choices, message):
    with pytest.raises(AppError, match=re.escape(message)) as error:
        draw(served, **{"flowers": served.names[:1]} | {k: v for k, v in choices.items() if v is not None})
    assert "\n" not in str(error.value)


def test_guidance_that_is_no_number(served):
    for value in (float("nan"), float("inf")):  # its client can't send them; others can
        with pytest.raises(app.gr.Error, match="Guidance must be a number from 1 to 10"):
            app.check_request(served.pipe, ["0"], 1, 0, 3, value, "DDIM")


@pytest.mark.parametrize("flowers", [["0"], ["0", "1", "2"], "01", None])
def test_blend_takes_two(served, flowers):
    with pytest.raises(AppError, match="Choose exactly two flowers"):
        served.client.predict(flowers, 0, 3, 2.0, "DDIM", api_name="/blend")


def test_sampler_that_cannot_says_so(served):
    with pytest.raises(AppError, match="PNDM draws nothing in 2 steps: PNDMScheduler can't take 2 steps: "):
        draw(served, sampler="PNDM", steps=2)


def test_pictures_that_are_no_numbers_are_not_shown(served):
    """Some samplers give such with very few steps; here the unet does."""

    def spoil(module, given, output):
        output.sample.fill_(torch.inf)

    studio = app.Studio(served.pipe)
    request = app.check_request(served.pipe, served.names[:1], 1, 0, 3, 2.0, "DDIM")
    hook = served.pipe.unet.register_forward_hook(spoil)
    try:
        with pytest.raises(app.gr.Error, match="DDIM draws nothing in 3 steps"):
            list(studio.draw(request))
    finally:
        hook.remove()


def test_samplers_are_those_that_follow_the_model(served):
    studio = app.Studio(served.pipe)
    assert sorted(studio.samplers) == sorted(SAMPLERS)
    zero_snr = served.pipe.scheduler.from_config(served.pipe.scheduler.config, rescale_betas_zero_snr=True)
    parts = served.pipe.components | {"scheduler": zero_snr}
    studio = app.Studio(FlowerLDMPipeline(**parts, id2label=served.pipe.config.id2label))
    assert studio.samplers[0] == "DPM-Solver++" and not {"Heun", "PNDM"} & set(studio.samplers)
    request = app.check_request(studio.pipe, served.names[:1], 1, 0, 3, 2.0, "Heun")  # by hand
    with pytest.raises(app.gr.Error, match="Heun draws nothing in 3 steps: .* knows no zero terminal SNR"):
        list(studio.draw(request))


def test_guide_of_the_pipeline_guides_here_too(served):
    guide = type(served.pipe.unet).from_config(served.pipe.unet.config)
    pipe = FlowerLDMPipeline(**served.pipe.components | {"guide": guide}, id2label=served.pipe.config.id2label)
    *_, drawn = app.Studio(pipe).draw(app.DrawingRequest([1], 1, 5, 4, 3.0, app.OWN_SAMPLER))
    expected = alone(pipe, 1, 5, 4, 3.0)
    assert np.abs(np.asarray(drawn.images[0], int) - expected).max() <= 1
    assert np.abs(alone(served.pipe, 1, 5, 4, 3.0).astype(int) - expected).max() > 1


def slider(page, label: str):
    [found] = [block for block in page.blocks.values() if getattr(block, "label", None) == label]
    return found


def test_guidance_is_at_first_what_suits_the_model(served):
    for guidance, shown, visible in (
        ({"guidance_scale": 4.5}, 4.5, True),
        ({"guidance_scale": 30}, app.MAX_GUIDANCE, True),
        ({"takes_guidance": False}, 1, False),
    ):
        studio = app.Studio(FlowerLDMPipeline.from_pipe(served.pipe, **guidance))
        control = slider(app.build_page(studio, "tiny flowers"), "Guidance")
        assert (control.value, control.visible) == (shown, visible)
        *_, drawn = studio.draw(app.check_request(studio.pipe, served.names[:1], 1, 0, 3, shown, "DDIM"))
        assert len(drawn.images) == 1


def test_a_pipeline_of_an_earlier_version_draws_by_its_own_scheduler(served, tmp_path):
    """Before there was a table, and before it kept the guidance that suits it."""
    code = Path(pipeline_flower_ldm.__file__).read_text("utf-8")
    code = re.sub(r"\bSCHEDULERS\b", "TABLE", code).replace("default_guidance_scale", "scale_by_default")
    code = code.replace("guidance_scale: float | None = None", "guidance_scale: float = 2.25").replace(
        "can_guide", "x"
    )
    (tmp_path / "pipeline_of_before.py").write_text(code, "utf-8")
    spec = importlib.util.spec_from_file_location("pipeline_of_before", tmp_path / "pipeline_of_before.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        pipe = module.FlowerLDMPipeline(**served.pipe.components, id2label=served.pipe.config.id2label)
        studio = app.Studio(pipe)
        assert studio.samplers == [app.OWN_SAMPLER] and studio.can_guide
        assert slider(app.build_page(studio, "old flowers"), "Guidance").value == 2.25
        *_, drawn = studio.draw(app.check_request(pipe, served.names[:1], 1, 0, 3, 2.0, app.OWN_SAMPLER))
        assert np.abs(np.asarray(drawn.images[0], int) - alone(served.pipe, 0, 0, 3, 2.0)).max() <= 1
        with pytest.raises(app.gr.Error, match="The sampler must be one of The pipeline's own"):
            app.check_request(pipe, served.names[:1], 1, 0, 3, 2.0, "DDIM")
    finally:
        del sys.modules[spec.name]


def test_visitors_file_is_not_taken_and_none_is_given(served, tmp_path):
    path = tmp_path / "visitor.txt"
    path.write_text("x" * 100)
    with pytest.raises(Exception, match="413|exceed|size"):
        served.client.predict([handle_file(path)], 1, 0, 3, 2.0, "DDIM", api_name="/draw")
    for wanted in (f"gradio_api/file={path}", f"gradio_api/file={ROOT / 'app.py'}", "gradio_api/file=/etc/passwd"):
        with pytest.raises(HTTPError) as refused:
            urlopen(served.address + wanted)
        assert refused.value.code in (403, 404)


def test_endpoints_are_these_two(served):
    assert set(served.client.view_api(return_format="dict")["named_endpoints"]) == {"/draw", "/blend"}


def test_nonsense_by_hand_draws_nothing(served):
    """Not even the client's own checks: JSON straight to the queue, for each function of the page."""
    with urlopen(f"{served.address}config") as answer:
        functions = json.load(answer)["dependencies"]
    for function in functions:
        for data in ([], [None] * 6, [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}] * 6):
            body = {"data": data, "fn_index": function["id"], "session_hash": f"by-hand-{function['id']}",
                    "event_data": {"index": "../..", "value": None}}  # fmt: skip
            request = Request(f"{served.address}gradio_api/queue/join", json.dumps(body).encode(),
                              {"Content-Type": "application/json"})  # fmt: skip
            try:
                urlopen(request).read()
            except HTTPError as refused:
                assert refused.code in (400, 403, 404, 413, 422, 500)
    assert len(draw(served)[1]) == 1


def test_page_keeps_to_this_machine(served):
    assert app.parse_args([]).host == "127.0.0.1" and served.address.startswith("http://127.0.0.1:")
    with urlopen(served.address) as page:
        config = json.loads(re.search(r"window\.gradio_config = (\{.*?\});</script>", page.read().decode())[1])
    assert config["analytics_enabled"] is False


# --- the command, and the Space --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pipeline", "nowhere"], "--pipeline nowhere is not a folder or Hub id"),
        (["--pipeline", str(ROOT / "docs")], "is not the folder of a pipeline: it has no model_index.json"),
        (["--port", "seven"], "argument --port: invalid int value"),
        (["--port", "70000"], "--port must be from 1 to 65535, got 70000"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--space", "space"], "--space needs --pipeline by its id on the Hub"),
    ],
)
def test_bad_command_is_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as end:
        app.main(words)
    assert end.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "model_index.json").write_text("{}"),
        lambda folder: (folder / "unet" / "config.json").write_text("null"),
        lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 20),
        lambda folder: (change(folder / "model_index.json", scheduler=["diffusers", "PNDMScheduler"]),
                        change(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")),
    ],
    ids=["an empty index", "no config", "torn weights", "a sampler that can't"],
)  # fmt: skip
def test_damaged_pipeline_is_one_line(finished_runs, tmp_path, capsys, spoil):
    shutil.copytree(finished_runs.flower_ldm, tmp_path / "pipeline")
    spoil(tmp_path / "pipeline")
    with pytest.raises(SystemExit) as end:
        app.main(["--pipeline", str(tmp_path / "pipeline")])
    assert end.value.code == 2
    assert "is not a folder or Hub id of a pipeline that draws classes: " in capsys.readouterr().err.splitlines()[-1]


def change(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_advice_to_trust_a_file_is_left_out():
    file = io.BytesIO()
    torch.save(SimpleNamespace(a=1), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(file, weights_only=True)
    line = app.one_line(caught.value)
    assert line.startswith("Weights only load failed. ") and "SimpleNamespace" in line
    assert not any(word in line for word in ("trust", "weights_only", "False", "\n"))


def test_without_gradio_it_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setattr(app, "gr", None)
    with pytest.raises(SystemExit) as end:
        app.main([])
    assert end.value.code == 2 and "pip install 'gradio" in capsys.readouterr().err


def test_port_that_is_taken(served, finished_runs, capsys):
    with pytest.raises(SystemExit):
        app.main(["--pipeline", str(finished_runs.flower_ldm), "--port", served.address.rstrip("/").split(":")[-1]])
    assert "is taken or can't be opened: name another" in capsys.readouterr().err


def test_space_is_whole(tmp_path, capsys):
    space = tmp_path / "space"
    app.main(["--pipeline", "someone/flowers", "--space", str(space), "--revision", COMMIT])
    assert sorted(path.name for path in space.iterdir()) == ["README.md", "app.py", "demo.py", "requirements.txt"]
    assert "hf upload USER/NAME" in capsys.readouterr().out
    card = yaml.safe_load((space / "README.md").read_text("utf-8").split("---")[1])
    # https://huggingface.co/docs/hub/spaces-config-reference
    assert card.keys() <= {"title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version",
                           "app_file", "license", "models", "pinned", "short_description"}  # fmt: skip
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and card["models"] == ["someone/flowers"]
    assert len(card["short_description"]) <= 60
    ours = {line.split()[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert set((space / "requirements.txt").read_text().split()) <= ours
    assert f'revision = "{COMMIT}"' in (space / "app.py").read_text()
    with pytest.raises(SystemExit):
        app.main(["--pipeline", "someone/flowers", "--space", str(space), "--revision", COMMIT])
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("revision", [[], ["--revision", "main"], ["--revision", COMMIT[:7]]])
def test_a_space_trusts_one_commit(tmp_path, capsys, revision):
    with pytest.raises(SystemExit):
        app.main(["--pipeline", "someone/flowers", "--space", str(tmp_path / "space"), *revision])
    assert "--space needs --revision, the commit whose code" in capsys.readouterr().err
    assert not (tmp_path / "space").exists()


def test_names_cannot_write_code_into_a_space(tmp_path, capsys):
    for name in ('a/b"); import os; ("', "a/b\nmodels: []", "a/b: c", "a/\x1b[31m"):
        with pytest.raises(SystemExit):
            app.main(["--pipeline", name, "--space", str(tmp_path / "space"), "--revision", COMMIT])
        said = capsys.readouterr().err
        assert "--space needs --pipeline by its id on the Hub" in said and said.count("\n") == 1 and "\x1b" not in said


def test_a_space_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        app.main(["--pipeline", "someone/flowers", "--revision", COMMIT, "--space", "x" * 300])
    assert "can't be written: File name too long" in capsys.readouterr().err

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(app.shutil, "copyfile", refuse)
    with pytest.raises(SystemExit) as end:
        app.main(["--pipeline", "someone/flowers", "--revision", COMMIT, "--space", str(tmp_path / "space")])
    assert end.value.code == 2
    assert "space can't be written: No space left on device; remove that folder" in capsys.readouterr().err


@pytest.mark.slow
def test_space_needs_no_package(tmp_path):
    """Where neither the package nor the network is, its entry gets as far as the download."""
    app.write_space(tmp_path / "space", "someone/flowers", COMMIT)
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PYTHONNOUSERSITE": "1"}
    code = "import sys; sys.modules['flower_ldm'] = None; sys.path.insert(0, '.'); import app"
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "space", env=environment, capture_output=True,
                           text=True)  # fmt: skip
    assert ended.returncode == 2 and f"--pipeline someone/flowers --revision {COMMIT} is not a folder" in ended.stderr


@pytest.mark.slow
def test_space_draws_what_the_hub_holds(finished_runs, hub_server, tmp_path):
    """Its entry as a Space starts it, without the package: by the code of the model's repository, to the bit."""
    commit = hub.push_run(finished_runs.flower_ldm, "gardener/flower-ldm").split("/")[-1]
    repository = hub_server.repositories["gardener/flower-ldm"]
    code = Blob(b"raise SystemExit('not what was read')", False)
    repository.commit("main", repository.find("main")[1] | {"pipeline_flower_ldm.py": code}, "by somebody else")
    app.write_space(tmp_path / "space", "gardener/flower-ldm", commit)
    code = "import sys; sys.modules['flower_ldm'] = None; sys.path.insert(0, '.'); import demo; "
    port = free_port()  # a Space has the default one for itself
    code += f"launch = demo.launch; demo.launch = lambda page, host, _, **more: launch(page, host, {port}, **more); "
    environment = os.environ | hub_server.environment(tmp_path / "hf") | {"PYTHONPATH": ""}
    space = subprocess.Popen([sys.executable, "-c", code + "import app"], cwd=tmp_path / "space", env=environment,
                             stdout=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert "gardener/flower-ldm is at http://" in space.stdout.readline()
        pipe = FlowerLDMPipeline.from_pretrained(finished_runs.flower_ldm)
        client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=str(tmp_path / "downloads"))
        _, gallery = client.predict(pipe.class_names[:1], 1, 0, 3, 2.0, "DPM-Solver++", api_name="/draw")
        assert np.array_equal(*opened(gallery), alone(pipe, 0, 0, 3, 2.0))
    finally:
        space.kill()
        space.wait()


# --- in a browser ----------------------------------------------------------------------------------------------------


def until(browser, expression: str, seconds: float = 30):
    """Wait for an expression in the page to be true."""
    end = time.monotonic() + seconds
    while not (value := browser.evaluate(expression)):
        assert time.monotonic() < end, expression
        time.sleep(0.05)
    return value


def press(browser, name: str) -> None:
    browser.evaluate(f"[...document.querySelectorAll('button')].find(b => b.textContent.trim() === {name!r}).click()")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (375, True)])
def test_page_in_a_browser(browser, served, width, dark, request):
    """Pick a flower, draw, watch it come, see it, blend: all without a complaint or a request to elsewhere."""
    slow = served.pipe.unet.register_forward_hook(lambda *_: time.sleep(0.03))  # too quick for an eye otherwise
    request.addfinalizer(slow.remove)
    browser.open(served.address, width=width, dark=dark)
    until(browser, "document.querySelectorAll('#flowers img').length === 4")
    browser.evaluate("document.querySelectorAll('#flowers button:has(img)')[2].click()")
    until(browser, "document.querySelectorAll('.token').length === 2")
    browser.evaluate("""
        window.seen = new Set();
        new MutationObserver(() => seen.add(document.querySelector("#easel .sheet img")?.src))
            .observe(document.querySelector("#easel"), {childList: true, subtree: true, attributes: true});""")
    press(browser, "Draw")
    pictures = "[...document.querySelectorAll('#pictures button img')]"
    until(browser, "document.querySelectorAll('#pictures button img').length === 8")
    browser.evaluate("document.querySelector('#pictures').scrollIntoView()")  # they load when they are looked at
    until(browser, f"{pictures}.length === 8 && {pictures}.every(i => i.complete && i.naturalWidth === 32)")
    note = "document.querySelector('#easel').innerText"
    assert "8 images, seed 0" in browser.evaluate(note)
    assert browser.evaluate("[...seen].filter(src => src?.startsWith('data:image/jpeg')).length") >= 3  # previews
    captions = browser.evaluate(
        "[...document.querySelectorAll('#pictures .caption-label')].map(c => c.innerText.trim())"
    )
    assert captions == [name for name in (served.names[0], served.names[2]) for _ in range(4)]
    first = browser.evaluate(f"{pictures}.map(i => i.src)")
    press(browser, "Another seed")
    until(browser, "[...document.querySelectorAll('input[type=number]')].some(i => Number(i.value) > 1000)")
    press(browser, "Draw")
    until(browser, f"{note}.includes('8 images, seed ') && !{note}.includes('seed 0.')")
    until(browser, f"{pictures}.length === 8 && {pictures}.every(i => i.complete && i.naturalWidth === 32)")
    assert set(browser.evaluate(f"{pictures}.map(i => i.src)")).isdisjoint(first)
    press(browser, "Blend two flowers")
    until(browser, "document.querySelector('#easel .loop')?.naturalWidth === 256")
    assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert browser.complaints() == []
    here = (served.address, "data:", "blob:")
    assert [address for address in browser.requests() if not address.startswith(here)] == []


ELSEWHERE = "http://127.0.0.1:9/elsewhere"
HOSTILE = [f'<img src={ELSEWHERE}> "\'', f"![x]({ELSEWHERE}) **rose** ${{fetch('{ELSEWHERE}')}} {{{{x}}}}",
           f"</script><script>fetch('{ELSEWHERE}')</script>", "[a](javascript:fetch('x')) `b` $c$"]  # fmt: skip


def test_text_of_data_flags_and_visitors_stays_text(browser, served):
    """Names of classes, of the pipeline's folder and of a flower that isn't there ask for nothing elsewhere."""
    parts = served.pipe.components
    pipe = FlowerLDMPipeline(**parts, id2label=dict(enumerate(HOSTILE)))
    name = " ".join(HOSTILE)
    page = app.build_page(app.Studio(pipe), name)
    address = app.launch(page, "127.0.0.1", free_port(), block=False)
    words = "document.body.innerText"
    try:
        browser.open(address)
        until(browser, "document.querySelectorAll('#flowers img').length === 4")
        assert browser.evaluate("document.querySelector('#title h1').innerText") == " ".join(name.split())
        assert browser.evaluate("document.title").startswith(" ".join(name.split())[:40])
        captions = "[...document.querySelectorAll('{} .caption-label')].map(c => c.innerText.trim())"
        assert browser.evaluate(captions.format("#flowers")) == HOSTILE
        browser.evaluate("document.querySelectorAll('#flowers button:has(img)')[1].click()")
        until(browser, "document.querySelectorAll('.token').length === 2")
        press(browser, "Blend two flowers")
        until(browser, "document.querySelector('#easel .loop')?.naturalWidth === 256")
        alternative = browser.evaluate("document.querySelector('#easel .loop').alt")
        assert alternative == f"from {HOSTILE[0]} to {HOSTILE[1]} and back"
        press(browser, "Draw")
        until(browser, "document.querySelectorAll('#pictures button img').length === 8")
        assert set(browser.evaluate(captions.format("#pictures"))) == set(HOSTILE[:2])
        browser.evaluate("document.querySelector('#pictures button:has(img)').click()")  # one of them, enlarged
        browser.evaluate("document.querySelector('[aria-label^=Flowers]').focus()")
        browser.call("Input.insertText", text=HOSTILE[0] + "?")
        browser.press("Enter")
        until(browser, "document.querySelectorAll('.token').length === 3")
        press(browser, "Draw")
        until(browser, f"{words}.includes('Unknown label')")
        toast = browser.evaluate("document.querySelector('.toast-body').innerText")
        assert "Unknown label" in toast and "<img src=" in toast
        assert browser.evaluate("document.querySelectorAll('.toast-body img, #title img, #title strong').length") == 0
        assert [at for at in browser.requests() if not at.startswith((address, "data:", "blob:"))] == []
        assert browser.complaints() == []
    finally:
        page.close(verbose=False)


# --- many visitors ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_visitors_are_all_served(finished_runs, tmp_path):
    """Each is answered in turn, and the server's memory stays within 10 % of what it was after a first round."""
    port = free_port()
    command = [sys.executable, str(ROOT / "app.py"), "--pipeline", str(finished_runs.flower_ldm), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=tmp_path)
    try:
        assert f"http://127.0.0.1:{port}" in server.stdout.readline()
        clients = [Client(f"http://127.0.0.1:{port}", verbose=False, download_files=str(tmp_path)) for _ in range(20)]

        def visit(number: int) -> list:
            return clients[number].predict(["0", "1"], 4, number, 25, 2.0, "DDIM", api_name="/draw")[1]

        memory = []
        for _ in range(3):
            with ThreadPoolExecutor(20) as visitors:
                galleries = list(visitors.map(visit, range(20)))
            assert [len(gallery) for gallery in galleries] == [8] * 20
            status = Path(f"/proc/{server.pid}/status").read_text()
            memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]))
        assert max(memory[1:]) <= 1.1 * memory[0], memory
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        server.terminate()
        server.wait(timeout=20)
