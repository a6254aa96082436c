"""flower_ldm/model_card.py: what a card says, that the Hub's client reads it, and that it gives nothing away."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

import train_autoencoder
import train_latent_diffusion
from flower_ldm import FlowerAutoencoderKL, FlowerLDMPipeline
from flower_ldm.errors import InputError
from flower_ldm.formatting import number
from flower_ldm.model_card import write_model_card
from flower_ldm.report import write_report
from flower_ldm.runs import ARTIFACTS, CARD_MARK

# Every key that the documentation of the metadata knows, and what each may hold
# (https://github.com/huggingface/hub-docs/blob/main/modelcard.md); the Hub's own validator, which
# `ModelCard.validate` asks over the network, can't be reached from the tests.
DOCUMENTED = {
    "language", "license", "license_name", "license_link", "library_name", "tags", "datasets", "metrics", "base_model",
    "pipeline_tag", "thumbnail", "model-index",
}  # fmt: skip
LICENSES = {"apache-2.0", "unknown", "other"}
RESULT = {
    "task": {"type", "name"},
    "dataset": {"type", "name", "config", "split", "revision", "args"},
    "metrics": {"type", "value", "name", "config", "args"},
    "source": {"name", "url"},
}


@pytest.fixture
def runs(finished_runs, evaluated_run, tmp_path) -> dict[str, Path]:
    """A copy of each stage's finished run, the second with its evaluation."""
    leave = shutil.ignore_patterns("checkpoint-*", "logs", "*_cache")
    finished = {"autoencoder": finished_runs.autoencoder, "flower_ldm": evaluated_run}
    return {name: shutil.copytree(folder, tmp_path / name, ignore=leave) for name, folder in finished.items()}


def evaluation_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())["evaluation"]


def change(folder: Path, name: str, **values) -> None:
    """Set values in a run's `metrics.json` or `args.yaml`."""
    path = folder / name
    path.write_text(json.dumps(yaml.safe_load(path.read_text()) | values))


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)


def test_both_scripts_leave_a_card(finished_runs):
    for folder in (finished_runs.autoencoder, finished_runs.flower_ldm):
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: diffusers\n") and CARD_MARK in card
        assert "trained for 6 updates" in card


def test_card_of_a_pipeline_says_what_was_measured_and_how(runs):
    folder = runs["flower_ldm"]
    evaluation = evaluation_of(folder)
    samples = evaluation["against_held_out"]["samples"]
    samples |= {"recall": None, "density": None, "class_accuracy": float("nan")}
    for name in ("real", "reconstructions"):
        evaluation["against_held_out"][name] |= {"recall": None, "density": None, "class_accuracy": None}
    evaluation["reconstruction"]["head_accuracy"] = None
    evaluation["memorisation"]["samples"] |= {"feature_rate": 0.0625, "exact_duplicates": 1}
    change(folder, "metrics.json", evaluation=evaluation)
    card = write_model_card(folder, "me/flowers").read_text()
    assert "# flowers\n" in card and "![Images that this model drew" in card
    for said in ("split val", "1,280 features of efficientnet-lite0", f"{samples['frechet_distance']:,.2f}",
                 f"{number(samples['kid'], 5)} ± {samples['kid_std']:.5f}", f"{samples['precision']:.3f}",
                 "| Images (n) | 8 | 8 | 8 |", "| Samples | 8 | 6.2 % | 0.0 % | 1 |", "guidance 2.5",
                 f"{evaluation['reconstruction']['psnr']:.2f}", "n = 8 is not above",
                 "Of 8 samples, 6.2 % were memorized"):  # fmt: skip
        assert said in card, said
    assert "| Learning rate | 0.0003, " in card  # no list begins there
    for unmeasured in ("Recall", "Class accuracy", "Density", "head", "nan"):
        assert unmeasured not in card


def test_card_and_page_say_the_same_of_an_autoencoder(runs):
    change(runs["autoencoder"], "metrics.json", psnr_of_mean_squared_error=21.5)
    card = write_model_card(runs["autoencoder"]).read_text()
    page = write_report(runs["autoencoder"]).read_text()
    assert "| PSNR of the mean squared error (dB) | 21.50 |" in card
    assert "<dt>PSNR of the mean squared error</dt><dd>21.50 dB</dd>" in page


@pytest.mark.parametrize("stage", ["autoencoder", "flower_ldm"])
def test_card_says_what_computed_the_run_and_not_where(runs, stage):
    metrics = json.loads((runs[stage] / "metrics.json").read_text())
    card = write_model_card(runs[stage]).read_text()
    assert f"| Device | {metrics['device']} |" in card and "| Precision | float32 |" in card
    assert f" on {metrics['device']}, on " in card
    assert all(path not in card for path in (str(Path.home()), str(runs[stage].parent)))


def test_card_without_an_evaluation_invents_nothing(finished_runs, tmp_path):
    shutil.copytree(finished_runs.flower_ldm, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    card = write_model_card(tmp_path / "run").read_text()
    loaded = ModelCard(card)
    assert "model-index" not in loaded.data.to_dict() and "metrics" not in loaded.data.to_dict()
    assert "has not been measured" in card and "Fréchet" not in card
    assert f"| Loss | {json.loads((tmp_path / 'run' / 'metrics.json').read_text())['val_loss']:.4g} |" in card


@pytest.mark.parametrize("stage", ["autoencoder", "flower_ldm"])
def test_card_survives_the_hubs_client(runs, stage, tmp_path):
    path = write_model_card(runs[stage], "me/flowers")
    loaded = ModelCard.load(path)
    loaded.save(tmp_path / "again.md")
    assert (tmp_path / "again.md").read_text() == path.read_text()
    again = ModelCard.load(tmp_path / "again.md")
    assert again.data.to_dict() == loaded.data.to_dict() and again.text == loaded.text
    metrics = json.loads((runs[stage] / "metrics.json").read_text())
    values = {result.metric_type: result.metric_value for result in again.data.eval_results}
    if stage == "autoencoder":
        assert values == {"psnr": metrics["psnr"], "ssim": metrics["ssim"], "accuracy": metrics["val_accuracy"]}
    else:
        samples = evaluation_of(runs[stage])["against_held_out"]["samples"]
        assert values.items() >= {name: samples[name] for name in ("frechet_distance", "kid", "precision")}.items()
        assert values.keys() - samples.keys() == {"accuracy", "memorisation_rate", "psnr", "ssim"}
        [kid] = [result for result in again.data.eval_results if result.metric_type == "kid"]
        assert kid.metric_args.items() >= {"n": 8, "features": "efficientnet-lite0", "guidance_scale": 2.5}.items()
        assert (kid.dataset_type, kid.dataset_split, kid.dataset_args) == ("synthetic", "val", {"resolution": 32})


@pytest.mark.parametrize("stage", ["autoencoder", "flower_ldm"])
@pytest.mark.parametrize("dataset", ["synthetic", "flowers102", "imagefolder", "someone/flowers"])
def test_metadata_is_what_is_documented(runs, stage, dataset):
    change(runs[stage], "args.yaml", dataset=dataset)
    path = write_model_card(runs[stage], "me/flowers")
    metadata = yaml.safe_load(path.read_text().split("---")[1])
    assert metadata.keys() <= DOCUMENTED
    assert metadata["license"] in LICENSES and (metadata["license"] == "apache-2.0") == (dataset == "synthetic")
    assert metadata.get("datasets") == (["someone/flowers"] if dataset == "someone/flowers" else None)
    assert all(isinstance(tag, str) for tag in metadata["tags"] + metadata["metrics"])
    [model] = metadata["model-index"]
    assert model.keys() == {"name", "results"} and model["name"] == "flowers"
    for result in model["results"]:
        assert {"task", "dataset", "metrics"} <= result.keys() <= RESULT.keys()
        assert {"type"} <= result["task"].keys() <= RESULT["task"]
        assert {"type", "name"} <= result["dataset"].keys() <= RESULT["dataset"]
        for metric in result["metrics"]:
            assert {"type", "value"} <= metric.keys() <= RESULT["metrics"]
            assert isinstance(metric["value"], float) and metric["value"] == metric["value"]
    assert {metric["type"] for result in model["results"] for metric in result["metrics"]} == set(metadata["metrics"])


@pytest.mark.parametrize("stage", ["autoencoder", "flower_ldm"])
def test_card_names_no_path_and_shows_no_photograph(runs, stage):
    planted = "/srv/planted-folder/flowers"
    flags = ("data_dir", "output_dir", "vgg_weights", "config", "model_config", "latent_cache_dir", "autoencoder",
             "resume_from_checkpoint", "dataset")  # fmt: skip
    args = yaml.safe_load((runs[stage] / "args.yaml").read_text())
    change(runs[stage], "args.yaml", **{flag: planted for flag in flags if flag in args})
    change(runs[stage], "metrics.json", vgg_weights=planted, dataset=planted)
    for name in ("nearest_neighbours", "original_reconstructed_generated", "latent_space_tsne"):
        (runs[stage] / f"{name}.png").write_bytes(b"")
    card = write_model_card(runs[stage]).read_text()
    assert "planted" not in card and str(runs[stage].parent) not in card and "reconstructions/" not in card
    linked = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", card)
    assert linked and set(linked) <= {one.name for one in ARTIFACTS if one.on_hub and not one.shows_photographs}
    assert all((runs[stage] / name).is_file() for name in linked)


def test_relative_folder_is_no_repository_from_elsewhere_either(tmp_path, monkeypatch):
    """`results/stage-1` looks like an id on the Hub once the working folder is another."""
    (tmp_path / "results" / "stage-1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    flags = ["--autoencoder", "results/stage-1", "--dataset", "results/stage-1"]
    args = train_latent_diffusion.parse_args(flags)
    assert args.autoencoder == args.dataset == str(tmp_path / "results" / "stage-1")
    args = train_latent_diffusion.parse_args(["--autoencoder", "user/stage-1", "--dataset", "user/flowers"])
    assert (args.autoencoder, args.dataset) == ("user/stage-1", "user/flowers")


def test_examples_of_a_pipeline_run_and_agree(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = {}
    for code in blocks(write_model_card(runs["flower_ldm"], "me/flowers").read_text(), "python"):
        assert len(code.splitlines()) <= 5
        names = {}
        torch.manual_seed(0)
        exec(code.replace("me/flowers", str(runs["flower_ldm"])), names)
        assert (tmp_path / "image.png").stat().st_size > 0
        drawn[type(names["pipe"])] = [image.tobytes() for image in names["images"]]
    assert FlowerLDMPipeline in drawn and len(drawn) == 2
    assert all(issubclass(kind, DiffusionPipeline) for kind in drawn)
    one, other = drawn.values()
    assert one == other and len(one) == 8


def test_examples_of_an_autoencoder_run(runs):
    found = blocks(write_model_card(runs["autoencoder"], "me/flowers").read_text(), "python")
    assert found
    for code in found:
        names = {"images": torch.zeros(2, 3, 32, 32)}
        exec(code.replace("me/flowers", str(runs["autoencoder"])), names)
        assert type(names["vae"]).__name__ == FlowerAutoencoderKL.__name__
        assert names["reconstruction"].shape == (2, 3, 32, 32)


def test_remote_code_is_pinned_wherever_it_is_shown(runs):
    readme = Path(__file__).parent.parent / "README.md"
    cards = [write_model_card(folder, "me/flowers") for folder in runs.values()]
    for path, count in zip((readme, *cards), (2, 1, 1), strict=True):
        code = "\n".join(blocks(path.read_text("utf-8"), "python"))
        lines = [line for line in code.splitlines() if "trust_remote_code" in line]
        assert len(lines) == count and all('revision="' in line for line in lines), path


def test_commands_train_the_same_again(runs, tmp_path, monkeypatch):
    """Each flag as it was, except for paths; the models' configs come from the repository itself."""
    [code] = blocks(write_model_card(runs["flower_ldm"], "me/flowers").read_text(), "sh")
    lines = [shlex.split(line) for line in code.replace("\\\n", " ").splitlines()]
    assert [line[:2] for line in lines] == [
        ["hf", "download"], ["python", "train_autoencoder.py"], ["python", "train_latent_diffusion.py"],
        ["python", "-m"],
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs["flower_ldm"], tmp_path / "model")  # what the first line would download
    for script, line, run in ((train_autoencoder, lines[1], "autoencoder"),
                              (train_latent_diffusion, lines[2], "flower_ldm")):  # fmt: skip
        args = yaml.safe_load((runs[run] / "args.yaml").read_text())
        again = vars(script.parse_args(line[2:]))
        paths = {"output_dir", "model_config", "autoencoder", "vgg_weights", "report_to"}
        for name in args.keys() - paths:
            assert again[name] == args[name], name
        wanted, found = (json.loads(Path(each["model_config"]).read_text()) for each in (args, again))
        assert found.items() >= wanted.items()


def test_autoencoder_that_was_trained_anew_is_not_taken_for_this_ones(runs):
    args = yaml.safe_load((runs["flower_ldm"] / "args.yaml").read_text())
    other = runs["autoencoder"]
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"latents_mean": [9.0] * 4}))
    change(runs["flower_ldm"], "args.yaml", **args | {"autoencoder": str(other)})
    card = write_model_card(runs["flower_ldm"]).read_text()
    assert "train_autoencoder.py" not in card and "which is in `vae/` here" in card


def test_hostile_names_stay_text(runs):
    hostile = "<img src=x onerror=alert(1)> | [a](javascript:b) ``` *rose*"
    index = json.loads((runs["flower_ldm"] / "model_index.json").read_text())
    index["id2label"]["0"] = hostile
    (runs["flower_ldm"] / "model_index.json").write_text(json.dumps(index))
    card = write_model_card(runs["flower_ldm"]).read_text()
    assert "<img" not in card and r"\[a\](javascript:b) \`\`\` \*rose\*" in card
    assert card.count("```") == 6 and "pipe([0, 3]" in card


def test_names_get_out_of_no_code_block_and_no_metadata(runs):
    """Fences are longer than any within; addresses and lists stay text; YAML keeps what it is given."""
    name = "rose\n```\n````\n# Free [prize](javascript:x) <img src=x>\n---\n"
    index = json.loads((runs["flower_ldm"] / "model_index.json").read_text())
    index["id2label"] = {"0": "- 1", "1": name, "2": "http://elsewhere", "3": "$x$ ~~y~~ \ud800"}
    (runs["flower_ldm"] / "model_index.json").write_text(json.dumps(index))
    change(runs["flower_ldm"], "args.yaml", classes=["0", name], hub_model_id='me/x"); evil(); ("')
    evaluation = evaluation_of(runs["flower_ldm"])
    hostile = {"scheduler": "x\n---\ny: [", "seed": "0; rm -rf .", "guidance_scale": "1); evil("}
    evaluation["sampling"] |= hostile
    change(runs["flower_ldm"], "metrics.json", evaluation=evaluation)
    card = write_model_card(runs["flower_ldm"]).read_text("utf-8")
    outside, fence = [], None
    for line in card.splitlines():  # as CommonMark reads fences: closed by one that is as long
        marks = re.match("`*", line)[0]
        if fence is None and len(marks) >= 3:
            fence = marks
        elif fence and line == marks and len(marks) >= len(fence):
            fence = None
        elif fence is None:
            outside.append(line)
    text = "\n".join(outside)
    assert fence is None and "# Free" not in outside and "<img" not in text
    assert r"\[prize\](javascript:x)" in text
    assert "http://elsewhere" not in text and r"\$x\$ \~\~y\~\~" in text and "evil()" not in card
    assert "&#45; 1, rose" in text and "--seed '0; rm -rf .'" in card
    loaded = ModelCard.load(runs["flower_ldm"] / "README.md")
    assert {result.metric_args.get("scheduler") for result in loaded.data.eval_results} >= {"x\n---\ny: ["}


def test_somebodys_own_card_is_left_alone(runs):
    path = runs["autoencoder"] / "README.md"
    own = path.read_text().replace(CARD_MARK, "Drawn in spring.")
    path.write_text(own)
    assert write_model_card(runs["autoencoder"]) == path and path.read_text() == own


def test_repository_is_that_of_the_run(runs):
    change(runs["flower_ldm"], "args.yaml", hub_model_id="me/from-the-flag")
    assert 'from_pretrained("me/from-the-flag"' in write_model_card(runs["flower_ldm"]).read_text()


def test_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match="is no training run"):
        write_model_card(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_card_of_an_earlier_pipeline_says_the_guidance_that_its_config_lacks(runs):
    """Else a stranger would draw with the default of a later version."""
    folder = runs["flower_ldm"]
    assert "guidance_scale" not in blocks(write_model_card(folder).read_text(), "python")[0]
    index = json.loads((folder / "model_index.json").read_text())
    del index["guidance_scale"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "guidance_scale=2.5" in blocks(write_model_card(folder).read_text(), "python")[0]


def test_the_evaluations_command_draws_the_same_samples(runs):
    folder = runs["flower_ldm"]
    evaluation = evaluation_of(folder)
    evaluation["sampling"] |= {"guidance_interval": [0.1, 0.8], "scheduler": "DDIMScheduler"}
    change(folder, "metrics.json", evaluation=evaluation)
    command = blocks(write_model_card(folder).read_text(), "sh")[-1]
    assert "--scheduler ddim" in command and "--guidance_interval 0.1 0.8" in command
