"""flower_ldm/report.py: what a page holds, that it needs nothing from outside, and that it works in a browser."""

import base64
import io
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from flower_ldm.errors import InputError
from flower_ldm.formatting import number
from flower_ldm.model_card import write_model_card
from flower_ldm.report import Album, write_report
from flower_ldm.report_curves import thin
from flower_ldm.runs import read_run

HOSTILE = "<script>alert('x')</script> & \"rose\" '>"


# --- runs to show ----------------------------------------------------------------------------------------------------


def picture(path: Path, color: str = "seagreen", size: tuple[int, int] = (60, 30)) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture(scope="module")
def stage1(finished_runs, tmp_path_factory) -> Path:
    """A finished run of stage 1, with the pictures that other parts may add."""
    folder = tmp_path_factory.mktemp("report") / "autoencoder"
    shutil.copytree(finished_runs.autoencoder, folder, ignore=shutil.ignore_patterns("checkpoint-*", "logs"))
    picture(folder / "latent_space_pca.png")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def stage2(evaluated_run, tmp_path_factory) -> Path:
    """An evaluated run of stage 2 with everything that a page can show; a class and a remark mean to break it."""
    folder = tmp_path_factory.mktemp("report") / "flower-ldm"
    shutil.copytree(evaluated_run, folder, ignore=shutil.ignore_patterns("checkpoint-*", "logs", "*_cache"))
    picture(folder / "denoising_path_red_rose.png")
    frames = [Image.new("RGB", (32, 32), color) for color in ("gray", "olive", "red")]
    frames[0].save(folder / "diffusion_animation_red_rose.gif", save_all=True, append_images=frames[1:])
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"]["0"] = HOSTILE
    (folder / "model_index.json").write_text(json.dumps(index))
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["evaluation"]["remarks"].append("few images <i>")
    metrics["evaluation"]["memorisation"]["samples"]["feature_rate"] = 0.0625  # nothing so tiny repeats anything
    (folder / "metrics.json").write_text(json.dumps(metrics))
    write_report(folder)
    return folder


def test_pictures_are_of_classes_as_they_are_spelled(small_run):
    index = json.loads((small_run / "model_index.json").read_text())
    index["id2label"] = {"0": "a$b$", "1": "a b", "2": "<img src=x>", "3": "向日葵"}
    (small_run / "model_index.json").write_text(json.dumps(index))
    for stem in ("a_b", "a_b_1", "img_src_x", "向日葵", "gone_since"):
        picture(small_run / f"denoising_path_{stem}.png")
    Image.new("RGB", (8, 8)).save(small_run / "diffusion_animation_img_src_x.gif")
    page = Page(write_report(small_run))
    shown = [tag[1]["alt"] for tag in page.tags if tag[0] == "img"]
    for name in ("a b", "<img src=x>", "向日葵", "gone since"):  # the first may be of two classes
        assert f"The denoising path of one sample of class {name}" in shown
        assert f"{name}: the path of one sample" in page.text
    assert "Animation: a sample of class <img src=x> emerges" in shown


class Page(HTMLParser):
    """A page taken apart: every tag with its attributes, the text outside of scripts and styles, open tags."""

    VOID = {"meta", "link", "img", "source", "br", "path"}

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] for attributes in self.all("section")]


# --- what a page holds -----------------------------------------------------------------------------------------------


def test_stage1_page_has_a_section_for_all_that_is_there(stage1):
    page = Page(stage1 / "report.html")
    assert page.sections == ["facts", "curves", "progress", "reconstruction", "latents", "commands", "versions"]
    assert [link["href"] for link in page.all("a")][1:] == [f"#{name}" for name in page.sections]
    assert "trained for 6 updates" in page.text and "synthetic flowers, 4 classes" in page.text
    metrics = json.loads((stage1 / "metrics.json").read_text())
    for said in (f"{metrics['psnr']:.2f} dB", f"Device {metrics['device']}", f"on {metrics['device']}, on synthetic",
                 "Precision float32", f"torch {metrics['versions']['torch']}"):  # fmt: skip
        assert said in page.text, said
    assert "Processes" not in page.text
    headings = {json.loads(figure["data-chart"])["series"][0]["name"] for figure in page.all("figure")
                if "data-chart" in figure}  # fmt: skip
    assert {"training", "held out"} <= headings


def test_precision_is_what_was_in_force_and_several_processes_are_said(small_run):
    metrics = json.loads((small_run / "metrics.json").read_text()) | {"mixed_precision": "bf16", "num_processes": 8}
    (small_run / "metrics.json").write_text(json.dumps(metrics))
    assert yaml.safe_load((small_run / "args.yaml").read_text())["mixed_precision"] is None
    text = Page(write_report(small_run)).text
    assert "Precision bfloat16 autocast" in text and "Processes 8" in text


def test_stage2_page_has_a_section_for_all_that_is_there(stage2):
    page = Page(stage2 / "report.html")
    assert page.sections == [
        "facts", "curves", "timesteps", "progress", "reconstruction", "latents", "path", "interpolations", "metrics",
        "sweep", "memorisation", "commands", "versions",
    ]  # fmt: skip
    metrics = json.loads((stage2 / "metrics.json").read_text())
    evaluation = metrics["evaluation"]
    figures = [f"{entry['frechet_distance']:,.2f}" for entry in evaluation["against_held_out"].values()]
    figures += [number(entry["kid_std"], 5) for entry in evaluation["against_held_out"].values()]
    figures += [f"{evaluation['against_held_out']['real']['recall']:.3f}", "6.2 %", "1,280 features an image"]
    figures += [f"{evaluation['reconstruction']['psnr']:.2f} dB", "(vgg16.safetensors)", "guidance 2.5, 0.1, 0.8 of"]
    figures += [f"scikit-learn {evaluation['versions']['scikit-learn']}", f"Device {metrics['device']}"]
    for figure in figures:
        assert figure in page.text, figure
    assert page.text.index("the floor") < page.text.index("the ceiling") < page.text.index("the model")
    assert all(remark in page.text for remark in evaluation["remarks"]) and len(evaluation["remarks"]) == 4
    assert evaluation["command"] in page.text.replace("\\ ", "")
    charts = [json.loads(figure["data-chart"]) for figure in page.all("figure") if figure.get("data-group") == "sweep"]
    drawn = {value for chart in charts for series in chart["series"] for _, value in series["points"]}
    assert {float(f"{point['kid']:.5g}") for point in evaluation["sweep"]} <= drawn


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_page_is_whole_and_needs_nothing_from_outside(stage, request):
    path = request.getfixturevalue(stage) / "report.html"
    page = Page(path)
    assert page.open == [] and path.stat().st_size < 10_000_000
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "poster", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, name)
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon", page.source)
    [policy] = [tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src 'sha256-" in policy
    assert all(image["alt"] for image in page.all("img") if "src" in image)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_every_picture_can_be_decoded(stage, request):
    page = Page(request.getfixturevalue(stage) / "report.html")
    uris = [image["src"] for image in page.all("img") if "src" in image]
    uris += [source["srcset"] for source in page.all("source")]
    assert len(uris) >= (4 if stage == "stage1" else 12)
    for uri in uris:
        kind, content = re.fullmatch(r"data:image/(webp|gif);base64,(.+)", uri).groups()
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
            image.load()
            assert image.format == kind.upper()


def test_pictures_keep_their_pixels_where_that_is_small(tmp_path):
    noise = Image.effect_noise((64, 48), 80).convert("RGB")
    noise.save(tmp_path / "noise.png")
    shown = Album(tmp_path).picture(tmp_path / "noise.png", "noise")
    with Image.open(io.BytesIO(base64.b64decode(shown["src"].partition(",")[2]))) as image:
        assert image.convert("RGB").tobytes() == noise.tobytes()
    assert (shown["width"], shown["height"]) == (64, 48)


def test_what_finds_no_room_or_is_damaged_is_named_and_not_shown(stage1, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stage1, folder)
    (folder / "latent_space_tsne.png").write_bytes(b"\x89PNG torn")
    frames = [Image.effect_noise((400, 400), 200) for _ in range(8)]
    for stem in range(10):
        frames[0].save(folder / f"diffusion_animation_{stem}.gif", save_all=True, append_images=frames[1:])
    page = Page(write_report(folder))
    assert 5_000_000 < (folder / "report.html").stat().st_size < 10_000_000
    assert "latent_space_tsne.png (damaged)" in page.text
    assert "diffusion_animation_9.gif (the page would be larger than 10 MB)" in page.text
    assert "diffusion_animation_0.gif (" not in page.text


def test_large_picture_is_compressed(tmp_path):
    Image.effect_noise((3000, 500), 60).convert("RGB").save(tmp_path / "large.png")
    shown = Album(tmp_path).picture(tmp_path / "large.png", "noise")
    assert (shown["width"], shown["height"]) == (2400, 400)
    assert len(shown["src"]) < (tmp_path / "large.png").stat().st_size / 2


def test_hostile_names_stay_text(stage2):
    page = Page(stage2 / "report.html")
    assert [text for text in page.words if "alert" in text] == [HOSTILE]
    assert len(page.all("script")) == 1
    assert "<script>alert" not in page.source


def test_hostile_flags_stay_text_and_data(stage1, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stage1, folder)
    args = yaml.safe_load((folder / "args.yaml").read_text())
    (folder / "args.yaml").write_text(yaml.safe_dump(args | {"dataset": HOSTILE, "data_dir": "a b; '$HOME'"}))
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 7, HOSTILE: 1.0, "pixel_loss": 0.5, "steps_per_second": 1.0}) + "\n")
    page = Page(write_report(folder))
    assert len(page.all("script")) == 1 and "<script>alert" not in page.source
    assert page.all("h1") and HOSTILE in page.text
    assert shlex.quote("a b; '$HOME'") in page.text


# --- runs that are not whole -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "planned"), [("autoencoder", True), ("flower_ldm", True), ("flower_ldm", False)])
def test_unfinished_run_says_so(finished_runs, tmp_path, stage, planned):
    names = ["log.jsonl", *(["args.yaml"] if planned else [])]
    for name in names:
        shutil.copy(getattr(finished_runs, stage) / name, tmp_path)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 99, "lo')  # torn off
    page = Page(write_report(tmp_path))
    assert "Unfinished. The log ends at update 6" + (" of 6;" if planned else ";") in page.text
    expected = ["curves"] if stage == "autoencoder" else ["curves", "timesteps"]
    assert page.sections == (["facts", *expected, "commands"] if planned else ["facts", *expected])
    assert not page.all("img")[:-1]  # but for the empty one that enlarges others
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "report.html"])


def test_run_that_has_only_started(finished_runs, tmp_path):
    shutil.copy(finished_runs.flower_ldm / "args.yaml", tmp_path)
    (tmp_path / "log.jsonl").touch()
    page = Page(write_report(tmp_path))
    assert "The log ends at update 0 of 6" in page.text and page.sections == ["facts", "commands"]


def test_gaps_in_the_metrics_are_left_out(stage2, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stage2, folder)
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text())
    evaluation = {
        "sampling": None, "reconstruction": {"psnr": float("nan")}, "memorisation": {"samples": {}},
        "against_held_out": {"samples": {"n": 4, "frechet_distance": 1.5, "kid": None}}, "sweep": None,
    }  # fmt: skip
    path.write_text(json.dumps(metrics | {"evaluation": evaluation}))
    page = Page(write_report(folder))
    assert "metrics" in page.sections and "1.50" in page.text and "KID" not in page.text
    path.write_text(json.dumps(metrics | {"evaluation": {}}))
    assert {"metrics"}.isdisjoint(Page(write_report(folder)).sections)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is no training run: it has no args.yaml, log.jsonl or metrics.json"),
        ({"args.yaml": "resolution: 64"}, "is a run of neither train_autoencoder.py nor train_latent_diffusion.py"),
        ({"metrics.json": '{"psnr": 2'}, r"metrics\.json can't be read: "),
        ({"metrics.json": "[1, 2]"}, r"metrics\.json must hold names and values"),
        ({"args.yaml": "a: [b"}, r"args\.yaml can't be read: "),
        ({"log.jsonl": "[1]"}, "is no training run: it has no args.yaml"),
        ({"log.jsonl": '{"loss": 1}'}, "is no training run: it has no args.yaml"),
    ],
)
def test_folder_that_is_no_run_is_one_line_and_stays_as_it_was(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


DAMAGED = [  # a file of the run, where in it, and what stands there; then what the line says, or nothing: left out
    ("model_index.json", "id2label", {"²²²": "rose"}, "id2label must be a mapping of labels to names"),
    ("model_index.json", "id2label", {"x": "rose"}, "id2label must be a mapping of labels to names"),
    ("model_index.json", "id2label", ["rose"], "id2label must be a mapping of labels to names, not a list"),
    ("args.yaml", "resolution", [[64]], "resolution must be a number, not a list"),
    ("args.yaml", "classes", 5, "classes must be a list of names, not a number"),
    ("args.yaml", "dataset", {"a": 1}, "dataset must be a text, not a mapping"),
    ("args.yaml", "petals", {"a": 1}, "petals must be a number, a text, or a list of such, not a mapping"),
    ("args.yaml", "skip_bad_images", "no", "skip_bad_images must be yes or no, not a text"),
    ("args.yaml", "seed; rm -rf .", 1, "seed; rm -rf . is no flag"),
    ("args.yaml", "gradient_accumulation_steps", "two", "gradient_accumulation_steps must be a number, not a text"),
    ("args.yaml", "autoencoder", "x" * 5000, None),
    ("args.yaml", "hub_model_id", 'x"); import os; ("', None),
    ("metrics.json", "step", 10**400, None),
    ("metrics.json", "training_seconds", float("inf"), None),
    ("metrics.json", "splits", 3, "splits must be a list of names, not a number"),
    ("metrics.json", "dataset", ["a"], "dataset must be a text, not a list"),
    ("metrics.json", "evaluation", [1], "evaluation must be a mapping, not a list"),
    ("metrics.json", "evaluation", {"sweep": [3]}, "sweep must be a list of mappings of numbers"),
    ("metrics.json", "evaluation", {"sweep": [{"kid": "a"}]}, "sweep must be a list of mappings of numbers"),
    ("metrics.json", "evaluation", {"remarks": 7}, "remarks must be a list of names, not a number"),
    ("metrics.json", "evaluation", {"command": {"a": 1}}, "command must be a text or a list of names"),
    ("metrics.json", "evaluation", {"sampling": "x"}, "sampling must be a mapping, not a text"),
    ("metrics.json", "evaluation", {"memorisation": 3}, "memorisation must be a mapping, not a number"),
    ("metrics.json", "psnr", "high", None),
    ("metrics.json", "device", ["cpu"], "device must be a text, not a list"),
    ("metrics.json", "versions", "2", "versions must be a mapping, not a text"),
    ("metrics.json", "mixed_precision", "bf8", None),
    ("metrics.json", "num_processes", "two", "num_processes must be a number, not a text"),
    ("metrics.json", "evaluation", {"against_held_out": {"samples": {"kid": 10**400, "n": [1]}}}, None),
    ("metrics.json", "evaluation", {"splits": {"held_out": 5}, "memorisation": {"samples": 3}}, None),
    ("unet/config.json", "sample_size", "8", "sample_size must be a number or a list of them, not a text"),
    ("unet/config.json", "_class_name", ["a"], "_class_name must be a text, not a list"),
    ("vae/config.json", "num_classes", "four", "num_classes must be a number, not a text"),
    ("scheduler/scheduler_config.json", "_diffusers_version", [1], "_diffusers_version must be a text, not a list"),
    ("model_index.json", "_diffusers_version", 0.0, "_diffusers_version must be a text, not a number"),
]  # fmt: skip


@pytest.fixture
def small_run(finished_runs, tmp_path) -> Path:
    """A finished run of stage 2 without its pictures, with a page of before."""
    leave = shutil.ignore_patterns("checkpoint-*", "logs", "*.png", "*.gif", "*.mp4", "latent_cache", "*.safetensors")
    shutil.copytree(finished_runs.flower_ldm, tmp_path / "run", ignore=leave)
    (tmp_path / "run" / "report.html").write_text("the old page")
    return tmp_path / "run"


def page_and_card(folder: Path, message: str | None) -> None:
    """Both are whole, or say in one line what is wrong and leave the old ones."""
    card = (folder / "README.md").read_text()
    for write, old, name in ((write_report, "the old page", "report.html"), (write_model_card, card, "README.md")):
        if message is None:
            assert write(folder).read_text("utf-8")
            continue
        with pytest.raises(InputError) as error:
            write(folder)
        assert message in str(error.value) and "\n" not in str(error.value)
        assert (folder / name).read_text() == old


@pytest.mark.parametrize(("name", "key", "value", "message"), DAMAGED, ids=str)
def test_damaged_entry_is_one_line_or_left_out(small_run, name, key, value, message):
    path = small_run / name
    content = yaml.safe_load(path.read_text()) | {key: value}
    path.write_text(yaml.safe_dump(content) if path.suffix == ".yaml" else json.dumps(content))
    page_and_card(small_run, message and f"{path}: {message}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.jsonl", b'{"step": "six", "loss": 1}', None),
        ("log.jsonl", b'{"step": 1e999, "loss": 1}', None),
        ("log.jsonl", b'{"step": ' + b"9" * 5000 + b"}", None),
        ("log.jsonl", b"[" * 100_000, None),
        ("log.jsonl", b'{"step": 1, "loss": 1e308}\n{"step": 2, "loss": 1e-320}', None),
        ("log.jsonl", b'{"step": 1, "loss_by_timestep": [3]}', "loss_by_timestep of step 1 must be a list of"),
        ("log.jsonl", b'{"step": 1, "loss_by_timestep": [[0, 100, "x"], [100, 200, null]]}', None),
        ("metrics.json", b"\xff\xfe", "metrics.json can't be read"),
        ("metrics.json", b'{"a":' * 100_000, "metrics.json can't be read"),
        ("metrics.json", b'{"step": ' + b"9" * 5000 + b"}", "metrics.json can't be read"),
        ("args.yaml", b"? [a, b]\n: c", "args.yaml can't be read"),
        ("args.yaml", b"!!python/object/apply:os.system [id]", "args.yaml can't be read"),
        ("args.yaml", b"a: &a [*a]", "a must be a number, a text, or a list of such, not a list"),
        ("vae/config.json", b"null", "config.json must hold names and values"),
        ("unet/config.json", b'{"in_channels": 4, "sample_size": 4.5}', None),
    ],
    ids=str,
)  # fmt: skip
def test_damaged_file_is_one_line_or_left_out(small_run, name, content, message):
    (small_run / name).write_bytes(content)
    page_and_card(small_run, message)


@pytest.mark.parametrize("name", ["log.jsonl", "model_index.json", "unet/config.json", "metrics.json"])
def test_a_folder_or_a_pipe_in_a_files_place_is_left_out(small_run, name):
    (small_run / name).unlink()
    (small_run / name).mkdir()
    assert write_report(small_run).read_text("utf-8")
    (small_run / name).rmdir()
    os.mkfifo(small_run / name)
    os.mkfifo(small_run / "unet" / "diffusion_pytorch_model.safetensors")
    assert write_report(small_run).read_text("utf-8")


def test_pictures_are_those_of_the_run(small_run, tmp_path):
    """Names that are no numbers or not in UTF-8, links out of the run, pipes, other formats, far too many pixels."""
    samples = small_run / "samples"
    for name in ("step-²²².png", "step-x.png", "step-00000002.png", "step-00000004.png"):
        picture(samples / name)
    picture(tmp_path / "secret.png")
    (samples / "step-00000006.png").symlink_to(tmp_path / "secret.png")
    (small_run / "guidance_sweep.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    Image.new("1", (9000, 9000)).save(small_run / "latent_space_pca.png")
    os.mkfifo(small_run / "latent_space_tsne.png")
    picture(small_run / "interpolation_\udce9.png")
    (small_run / "diffusion_animation_x.gif").symlink_to(tmp_path / "secret.png")
    page = Page(write_report(small_run))
    for said in ("samples/step-00000006.png (a link to a file outside the run)", "guidance_sweep.png (damaged)",
                 "latent_space_pca.png (more than 50,000,000 pixels)",
                 "diffusion_animation_x.gif (a link to a file outside the run)"):  # fmt: skip
        assert said in page.text, said
    assert "Update 2" in page.text and "²" not in page.text and r"\udce9" in page.text


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="nowhere is no folder"):
        write_report(tmp_path / "nowhere")


def test_as_a_command(stage1, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "flower_ldm.report")
    monkeypatch.setattr(sys, "argv", ["report", str(stage1)])
    runpy.run_module("flower_ldm.report", run_name="__main__")
    assert capsys.readouterr().out.startswith(f"{stage1 / 'report.html'}, ")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("flower_ldm.report", run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is no training run")


# --- what it says is so ----------------------------------------------------------------------------------------------


def test_charts_carry_the_numbers_of_the_log(stage1):
    lines = read_run(stage1).log
    charts = [json.loads(figure["data-chart"]) for figure in Page(stage1 / "report.html").all("figure")
              if "data-chart" in figure]  # fmt: skip
    drawn = {tuple(map(tuple, series["points"])) for chart in charts for series in chart["series"]}
    for name in ("pixel_loss", "val_pixel_loss", "psnr", "kl_loss", "learning_rate", "grad_norm"):
        assert tuple((line["step"], float(f"{line[name]:.5g}")) for line in lines if name in line) in drawn, name


def test_thinned_curve_keeps_its_ends_and_its_extremes():
    points = [(step, float(step % 7)) for step in range(10_000)]
    points[1234], points[7777] = (1234, 50.0), (7777, -50.0)
    kept = thin(points, limit=600)
    assert len(kept) <= 602 and kept == sorted(kept) and set(kept) <= set(points)
    assert {points[0], points[-1], points[1234], points[7777]} <= set(kept)
    assert thin(points[:600], limit=600) == points[:600]


def test_every_file_of_the_page_is_packaged():
    root = Path(__file__).parent.parent
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["flower_ldm"]
    packaged = {path for pattern in patterns for path in (root / "flower_ldm").glob(pattern)}
    assert packaged == set((root / "flower_ldm" / "report_page").iterdir())


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_browser_loads_the_page_without_a_complaint(browser, stage, request):
    path = request.getfixturevalue(stage) / "report.html"
    browser.open(path)
    assert browser.complaints() == []
    assert browser.requests() == [path.resolve().as_uri()]
    widths = browser.evaluate(
        "Promise.all([...document.querySelectorAll('figure img')].map(i => i.decode().then(() => i.naturalWidth)))"
    )
    assert len(widths) >= 4 and min(widths) > 0
    assert browser.evaluate("document.querySelectorAll('script').length") == 1


def test_hovering_over_a_chart_shows_its_values_in_all_of_its_group(browser, stage1):
    browser.open(stage1 / "report.html")
    at_rest = browser.evaluate("document.querySelector('.chart .axis').textContent")
    browser.point_at(".chart .area", 0.01)
    first = read_run(stage1).log[0]
    readout = browser.evaluate("[...document.querySelectorAll('.chart output')].map(o => o.textContent)")
    assert float(readout[0]) == pytest.approx(first["pixel_loss"], rel=1e-3)
    assert readout[1].endswith("at 4")  # held-out values are rarer: the nearest one, and where it is
    axes = browser.evaluate("[...document.querySelectorAll('#curves .axis')].map(a => a.textContent)")
    assert axes[0] == "update 2" and len(axes) > 8
    assert browser.evaluate("document.querySelector('.chart .cursor').getBoundingClientRect().height") > 100
    browser.point_at("h1", 0.5)
    assert browser.evaluate("document.querySelectorAll('.cursor').length") == 0
    assert browser.evaluate("document.querySelector('.chart .axis').textContent") == at_rest
    assert browser.complaints() == []


def test_keyboard_reaches_charts_and_pictures(browser, stage2):
    browser.open(stage2 / "report.html")
    reached = []
    for _ in range(120):
        browser.press("Tab")
        reached.append(browser.evaluate("document.activeElement.className"))
        if reached[-1] == "plot":
            break
    assert reached[0] == "skip" and "zoom" in reached and reached[-1] == "plot"
    browser.press("Home")
    focused = "document.activeElement.getAttribute('aria-valuetext')"
    first = browser.evaluate(focused)
    browser.press("End")
    browser.press("ArrowLeft")
    assert first.startswith("update 2: training ") and browser.evaluate(focused).startswith("update 4: training ")
    browser.press("Escape")
    assert browser.evaluate("document.querySelectorAll('.cursor').length") == 0


def test_picture_opens_large_and_closes(browser, stage2):
    browser.open(stage2 / "report.html")
    browser.evaluate("document.querySelector('.zoom').focus()")
    browser.press("Enter")
    is_open = "document.querySelector('dialog').open"
    assert browser.evaluate(is_open)
    assert browser.evaluate("document.querySelector('dialog img').decode().then(() => true)")
    browser.press("Escape")
    assert not browser.evaluate(is_open)


def test_touch_shows_values(browser, stage2):
    browser.open(stage2 / "report.html", width=390)
    browser.evaluate("document.querySelector('.area').scrollIntoView({block: 'center', behavior: 'instant'})")
    x, y = browser.evaluate(
        "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        "(document.querySelector('.area').getBoundingClientRect())"
    )
    browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert browser.evaluate("document.querySelector('.axis').textContent").startswith("update ")
    assert browser.evaluate("document.querySelectorAll('.cursor').length") >= 1


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_nothing_is_wider_than_the_screen(browser, stage, width, request):
    browser.open(request.getfixturevalue(stage) / "report.html", width=width)
    browser.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_either_scheme(browser, stage2, dark):
    """Contrast of at least 4.5 to 1 (WCAG 2.2, success criterion 1.4.3) against what a text stands on."""
    browser.open(stage2 / "report.html", dark=dark)
    rows = browser.evaluate("""[...document.querySelectorAll("h1, p, dt, dd, a, td, th, small, output, .tick, pre")]
        .filter(one => one.textContent.trim())
        .map(one => {
            let behind = one;
            while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            return [getComputedStyle(one).color, getComputedStyle(behind).backgroundColor];
        })""")
    pairs = {tuple(luminance(color) for color in row) for row in rows}
    assert len(pairs) >= 4
    for text, paper in pairs:
        assert (text > paper) == dark
        assert (max(text, paper) + 0.05) / (min(text, paper) + 0.05) >= 4.5


def luminance(color: str) -> float:
    """Relative luminance of "rgb(r, g, b)" (WCAG 2.2)."""
    channels = [int(channel) / 255 for channel in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_page_prints(browser, stage2):
    browser.open(stage2 / "report.html")
    pdf = base64.b64decode(browser.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])
    assert pdf.startswith(b"%PDF-") and len(pdf) > 20_000
    assert browser.complaints() == []
