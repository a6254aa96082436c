"""flower_ldm/hub.py and `--push_to_hub`: what goes to the Hub, what never does, and how it comes back.

The Hub is `loopback_hub`; the client is the real one, and its requests cross a socket.
"""

import hashlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import tiny_stages
from diffusers import AutoModel, DiffusionPipeline
from huggingface_hub import HfApi
from loopback_hub import TOKEN, Blob, LoopbackHub, Repository, Request

import train_autoencoder
import train_latent_diffusion
from flower_ldm import FlowerAutoencoderKL, FlowerLDMPipeline, hub
from flower_ldm.errors import InputError
from flower_ldm.model_card import write_model_card
from flower_ldm.recipes import flag_of
from flower_ldm.runs import WEIGHTS, fits

ROOT = Path(__file__).parent.parent
AUTOENCODER_FILES = {
    ".gitattributes", "README.md", "args.yaml", "autoencoder_flower.py", "autoencoder_losses.png", "config.json",
    "diffusion_pytorch_model.safetensors", "latent_space_pca.png", "latent_space_tsne.png", "metrics.json",
}  # fmt: skip
PIPELINE_FILES = {
    ".gitattributes", "README.md", "args.yaml", "diffusion_loss.png", "latent_space_pca.png", "latent_space_tsne.png",
    "metrics.json", "model_index.json", "pipeline_flower_ldm.py", "scheduler/scheduler_config.json",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/unet_flower.py",
    "vae/autoencoder_flower.py", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    "vae_samples_grid_subset.png",
}  # fmt: skip


def draw(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe([0, 1], num_inference_steps=3, generator=generator, output_type="pt").images


def same_weights(state_dict: dict, model: torch.nn.Module) -> bool:
    expected = model.state_dict()
    return state_dict.keys() == expected.keys() and all(
        torch.equal(state_dict[key], expected[key]) for key in expected
    )


def snapshot(folder: Path) -> dict[str, str]:
    """A digest of each file in a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# What goes


def test_a_run_of_each_stage_goes_and_comes_back(finished_runs, hub_server, tmp_path):
    before = snapshot(finished_runs.flower_ldm)
    hub.push_run(finished_runs.autoencoder, "gardener/autoencoder", private=True)
    hub.push_run(finished_runs.flower_ldm, "gardener/flower-ldm")
    repositories = hub_server.repositories
    assert repositories["gardener/autoencoder"].private and not repositories["gardener/flower-ldm"].private
    assert set(repositories["gardener/autoencoder"].files) == AUTOENCODER_FILES
    pictures = {f"samples/{path.name}" for path in finished_runs.flower_ldm.glob("samples/*.png")}
    generated = ("denoising_path_*.png", "diffusion_animation_*.*", "interpolation_*.png", "guidance_sweep.png")
    for pattern in generated:
        pictures |= {path.name for path in finished_runs.flower_ldm.glob(pattern)}
    assert len(pictures) > 4
    assert set(repositories["gardener/flower-ldm"].files) == PIPELINE_FILES | pictures
    after = snapshot(finished_runs.flower_ldm)
    changed = {Path(name).name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"README.md"}  # names the repository now
    card = repositories["gardener/flower-ldm"].files["README.md"].decode()
    assert 'from_pretrained("gardener/flower-ldm"' in card and "user/flower-ldm" not in card

    loaded = FlowerLDMPipeline.from_pretrained("gardener/flower-ldm")
    assert torch.equal(draw(loaded), draw(FlowerLDMPipeline.from_pretrained(finished_runs.flower_ldm)))
    vae = FlowerAutoencoderKL.from_pretrained("gardener/autoencoder")
    assert vae.config.latents_mean is not None
    assert (
        train_latent_diffusion.load_autoencoder("gardener/autoencoder").config.latents_mean == vae.config.latents_mean
    )


def test_flags_go_without_paths_and_without_what_the_run_did_with_its_folder(finished_runs):
    flags = yaml.safe_load(hub.run_files(finished_runs.flower_ldm)[1]["args.yaml"])
    assert flags["dataset"] == "synthetic" and flags["learning_rate"] == 3e-4 and flags["classes"] == list("0123")
    assert not {"output_dir", "autoencoder", "model_config", "data_dir", "config"} & flags.keys()
    assert not {"report_to", "overwrite_output_dir", "push_to_hub", "hub_model_id", "hub_private_repo"} & flags.keys()


@pytest.mark.parametrize("stage", ["autoencoder", "flower_ldm"])
def test_no_path_goes_in_whatever_flag_it_stands(finished_runs, tmp_path, stage):
    shutil.copytree(getattr(finished_runs, stage), tmp_path / "run")
    path = tmp_path / "run" / "args.yaml"
    args = yaml.safe_load(path.read_text())
    planted = {name: "/srv/planted-folder/photographs" for name, value in args.items() if isinstance(value, str)}
    planted |= {name: "/srv/planted-folder/photographs" for name, value in args.items() if flag_of(name).is_read}
    planted |= {"classes": ["/srv/planted-folder/rose"], "made_up": "planted-folder", "made_up_too": 1}
    assert planted.keys() > {"dataset", "data_dir", "output_dir", "model_config", "image_column", "config"}
    path.write_text(yaml.safe_dump(args | planted))
    sent = hub.run_files(tmp_path / "run")[1]["args.yaml"].decode()
    assert "planted" not in sent and "made_up" not in sent
    assert yaml.safe_load(sent)["dataset"] == "imagefolder"


def test_metrics_go_without_the_command_that_measured_them(finished_runs, tmp_path):
    shutil.copytree(finished_runs.flower_ldm, tmp_path / "run")
    command = "python -m flower_ldm.evaluation --pipeline secret/run --data_dir=secret/photographs"
    metrics = {"psnr": 20.0, "evaluation": {"command": command, "dataset": "synthetic"}}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    sent = json.loads(hub.run_files(tmp_path / "run")[1]["metrics.json"])
    assert sent == {"psnr": 20.0, "evaluation": {"dataset": "synthetic"}}


def test_latents_of_the_data_stay_where_they_lie_beside_the_weights(finished_runs, tmp_path):
    shutil.copytree(finished_runs.autoencoder, tmp_path / "run")
    before = hub.run_files(tmp_path / "run")[1].keys()
    assert "diffusion_pytorch_model.safetensors" in before
    shutil.copy(
        tmp_path / "run" / "diffusion_pytorch_model.safetensors", tmp_path / "run" / "synthetic-train.safetensors"
    )
    assert hub.run_files(tmp_path / "run")[1].keys() == before
    for name in ("00001-of-00002.safetensors", "fp16.safetensors", "fp16-00001-of-00002.safetensors"):
        assert fits(f"diffusion_pytorch_model{'-' if name[0] == '0' else '.'}{name}", WEIGHTS)
    for name in ("index.json", "index.fp16.json"):
        assert fits(f"diffusion_pytorch_model.safetensors.{name}", WEIGHTS)


def test_a_guide_goes_with_its_pipeline(finished_runs, tmp_path):
    shutil.copytree(finished_runs.flower_ldm, tmp_path / "run")
    guide = FlowerLDMPipeline.from_pretrained(tmp_path / "run").unet
    FlowerLDMPipeline.from_pretrained(tmp_path / "run", guide=guide).save_pretrained(tmp_path / "run")
    files = hub.run_files(tmp_path / "run")[1]
    assert {name for name in files if name.startswith("guide/")} == {
        "guide/config.json", "guide/diffusion_pytorch_model.safetensors", "guide/unet_flower.py"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("/data/vgg16.pth", "vgg16.pth"),
        ("~/models/net.pt", "net.pt"),
        ("user/dataset", "user/dataset"),
        ("--pipeline=/data/mine/run", "run"),
        ({"a": ["/b/c", 1.5, None]}, {"a": ["c", 1.5, None]}),
        ("~nobody-of-this-name/net.pt", "net.pt"),
        ("petals/" + "x" * 300, "petals/" + "x" * 300),
    ],
)
def test_paths_are_cut_down_to_names(value, public):
    assert hub.without_paths(value) == public


def test_what_an_earlier_push_left_goes_and_other_files_stay(finished_runs, hub_server):
    hub.push_run(finished_runs.autoencoder, "flowers")
    repository = hub_server.repositories["gardener/flowers"]
    stale = {"diffusion_pytorch_model.fp16.safetensors", "latent_space_old.png"}
    others = {"README.md", "notes.txt", "best/config.json"}
    files = repository.find("main")[1] | {name: Blob(b"old", False) for name in stale | others}
    repository.commit("main", files, "by hand")
    hub.push_run(finished_runs.autoencoder, "flowers")
    assert set(repository.files) == AUTOENCODER_FILES | others


def test_the_command_pushes_too(finished_runs, hub_server, capsys):
    hub.main([str(finished_runs.autoencoder), "--hub_model_id", "flowers", "--hub_private_repo"])
    repository = hub_server.repositories["gardener/flowers"]
    assert repository.private and set(repository.files) == AUTOENCODER_FILES
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{hub_server.url}/gardener/flowers/commit/")


def test_a_commit_that_is_pinned_keeps_its_code(finished_runs, hub_server):
    """As the card and README show it: what somebody pushes later doesn't run."""
    for folder, name, code, kind in (
        (finished_runs.flower_ldm, "flower-ldm", "pipeline_flower_ldm.py", DiffusionPipeline),
        (finished_runs.autoencoder, "autoencoder", "autoencoder_flower.py", AutoModel),
    ):
        commit = hub.push_run(folder, f"gardener/{name}").split("/")[-1]
        repository = hub_server.repositories[f"gardener/{name}"]
        later = repository.find("main")[1] | {code: Blob(b"raise SystemExit('later code')", False)}
        repository.commit("main", later, "later")
        loaded = kind.from_pretrained(f"gardener/{name}", revision=commit, trust_remote_code=True)
        assert type(loaded).__name__ in ("FlowerLDMPipeline", "FlowerAutoencoderKL")
        with pytest.raises(SystemExit, match="later code"):
            kind.from_pretrained(f"gardener/{name}", trust_remote_code=True)


# What ends in one line


def test_without_a_token_no_training_starts(hub_server, monkeypatch, stage_flags, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    for script, flags in zip((train_autoencoder, train_latent_diffusion), stage_flags, strict=True):
        with pytest.raises(InputError, match=r"--push_to_hub needs a Hub token: run `hf auth login`"):
            script.main([*flags, "--push_to_hub"])
    assert not (tmp_path / "autoencoder").exists() and not hub_server.requests


def test_a_token_that_may_not_write_there_starts_no_training(hub_server, stage_flags, tmp_path):
    with pytest.raises(InputError, match="--push_to_hub can't write to somebody/flowers: .*rights") as caught:
        train_autoencoder.main([*stage_flags[0], "--push_to_hub", "--hub_model_id", "somebody/flowers"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "autoencoder").exists() and not hub_server.repositories


def test_a_repository_of_somebody_else_starts_no_training(hub_server, stage_flags, tmp_path):
    """It is there already, so the client's `create_repo` has nothing against it."""
    hub_server.repositories["somebody/flowers"] = Repository()
    hub_server.repositories["somebody/flowers"].commit("main", {}, "theirs")
    with pytest.raises(InputError, match="--push_to_hub can't write to somebody/flowers: .*rights") as caught:
        train_autoencoder.main([*stage_flags[0], "--push_to_hub", "--hub_model_id", "somebody/flowers"])
    assert "\n" not in str(caught.value) and not (tmp_path / "autoencoder").exists()


def test_a_public_repository_is_not_taken_for_a_private_one(finished_runs, hub_server, stage_flags, tmp_path):
    hub.push_run(finished_runs.autoencoder, "flowers")
    words = [*stage_flags[0], "--push_to_hub", "--hub_model_id", "flowers", "--hub_private_repo"]
    with pytest.raises(InputError, match="^--hub_private_repo: gardener/flowers exists already and is public"):
        train_autoencoder.main(words)
    assert not (tmp_path / "autoencoder").exists()
    before = dict(hub_server.repositories["gardener/flowers"].files)
    with pytest.raises(InputError, match="gardener/flowers exists already and is public"):
        hub.push_run(finished_runs.autoencoder, "flowers", private=True)
    assert hub_server.repositories["gardener/flowers"].files == before


def test_name_of_a_folder_with_the_data_stays_here(finished_runs, tmp_path):
    shutil.copytree(finished_runs.flower_ldm, tmp_path / "run")
    folder = str(tmp_path / "planted-data-folder")
    flags = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text()) | {"dataset": folder}
    (tmp_path / "run" / "args.yaml").write_text(yaml.safe_dump(flags))
    metrics = {"psnr": 20.0, "dataset": folder, "evaluation": {"dataset": folder}}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    sent = hub.run_files(tmp_path / "run")[1]
    assert json.loads(sent["metrics.json"])["evaluation"]["dataset"] == "imagefolder"
    assert b"planted" not in sent["metrics.json"] + sent["args.yaml"]


def link(path: Path, target: Path) -> None:
    """A symbolic link in place of whatever is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.fixture
def secrets(tmp_path) -> Path:
    """A folder beside the run, with files that nobody is to see."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    for name in ("config.json", "step-00000004.png", "diffusion_pytorch_model.safetensors"):
        (folder / name).write_text("secret")
    return folder


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("diffusion_loss.png", "secrets/config.json"),
        ("args.yaml", "secrets/config.json"),
        ("metrics.json", "secrets/config.json"),
        ("README.md", "secrets/config.json"),
        ("unet/config.json", "secrets/config.json"),
        ("samples/new.png", "secrets/step-00000004.png"),
        ("samples", "secrets"),
        ("vae", "secrets"),
        ("guide", "secrets"),
        ("latent_space_tsne.png", "run/original_reconstructed_generated.png"),
        ("diffusion_loss.png", "secrets/nowhere"),
        ("diffusion_loss.png", "run/diffusion_loss.png"),
    ],
)
def test_a_push_follows_no_link_out_of_the_run(finished_runs, hub_server, tmp_path, secrets, name, target):
    run = tmp_path / "run"
    shutil.copytree(finished_runs.flower_ldm, run, ignore=shutil.ignore_patterns("checkpoint-*", "logs"))
    link(run / name, tmp_path / target)
    with pytest.raises(InputError, match=f"/{name} is a symbolic link") as caught:
        hub.main([str(run), "--hub_model_id", "flowers"])
    assert "\n" not in str(caught.value)
    assert not hub_server.requests and not hub_server.repositories


@pytest.mark.parametrize("name", ["diffusion_loss.png", "samples/step-00000008.png"])
def test_a_pipe_is_no_picture(finished_runs, hub_server, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(finished_runs.flower_ldm, run, ignore=shutil.ignore_patterns("checkpoint-*", "logs"))
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(InputError, match=f"/{name} is not a regular file"):
        hub.main([str(run), "--hub_model_id", "flowers"])
    assert not hub_server.requests


def test_links_within_a_run_and_to_a_run_are_followed(finished_runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_runs.flower_ldm, run, ignore=shutil.ignore_patterns("checkpoint-*", "logs"))
    newest = max((run / "samples").glob("*.png"))
    (run / "samples" / "newest.png").symlink_to(newest.name)
    (run / "checkpoint-latest").symlink_to(tmp_path)  # not among what goes
    link(tmp_path / "link", run)
    files = hub.run_files(tmp_path / "link")[1]
    assert files["samples/newest.png"].read_bytes() == newest.read_bytes()
    assert files.keys() == hub.run_files(run)[1].keys()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_upload_ends_it_with_the_line_that_says_how_to_go_on(finished_runs, hub_server, number):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever these tests were started by

    def end(request) -> int | None:
        if "/commit/" not in request.path:
            return None
        os.kill(os.getpid(), number)
        threading.Event().wait(2)
        return -1

    hub_server.interrupt = end
    args = train_autoencoder.parse_args([*finished_runs.stage1, "--push_to_hub", "--hub_model_id", "flowers"])
    with pytest.raises(InputError, match="failed: KeyboardInterrupt; .*to upload it, run: python -m flower_ldm.hub"):
        hub.push_results(Accelerator(), args)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hub_model_id", "a/b/c"], "--hub_model_id a/b/c is not a valid repository name"),
        (["--output_dir", "results/what is this"], "--hub_model_id what is this is not a valid repository name"),
    ],
)
def test_a_name_that_cannot_be_is_refused_at_once(flags, message, hub_server):
    with pytest.raises(InputError, match=message) as caught:
        train_autoencoder.parse_args(["--push_to_hub", *flags])
    assert "\n" not in str(caught.value)


def test_offline_is_refused_at_once(hub_server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="--push_to_hub can't work with HF_HUB_OFFLINE set"):
        train_autoencoder.parse_args(["--push_to_hub"])


def test_only_a_finished_run_can_be_pushed(tmp_path, hub_server):
    with pytest.raises(InputError, match="is not a finished run of flower_ldm: it has no metrics.json"):
        hub.main([str(tmp_path)])
    (tmp_path / "args.yaml").write_text("- not a mapping")
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(InputError, match="is not a finished run of flower_ldm"):
        hub.main([str(tmp_path)])
    assert not hub_server.requests


def test_a_card_that_the_hub_refuses_is_one_line_with_the_command(finished_runs, hub_server, tmp_path):
    run = tmp_path / "my run"
    shutil.copytree(finished_runs.autoencoder, run)
    (run / "README.md").write_text("---\n- no mapping\n---\nA card.\n")
    with pytest.raises(InputError, match="Invalid metadata in README.md") as caught:
        hub.push_run(run, "flowers", private=True)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(f"python -m flower_ldm.hub '{run}' --hub_model_id flowers --hub_private_repo")


# Where the package isn't installed

ELSEWHERE = """
import sys
from pathlib import Path


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "flower_ldm":
            raise ModuleNotFoundError(f"no module named {name!r}", name=name)


sys.meta_path.insert(0, NotInstalled())
import torch
from diffusers import AutoModel, DiffusionPipeline

for loader, repository in ((DiffusionPipeline, "gardener/marked"), (AutoModel, "gardener/marked-autoencoder")):
    try:
        loader.from_pretrained(repository)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("loaded without trust")
    assert not Path("executed").exists()
    loader.from_pretrained(repository, trust_remote_code=True)
    Path("executed").unlink()

for name, again in (("gardener/flower-ldm", "again"), ("gardener/again", "and-again"), ("saved", "saved-again")):
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe([0, 1], num_inference_steps=3, generator=generator, output_type="pt").images
    torch.save(images, name.removeprefix("gardener/") + ".pt")
    pipe.push_to_hub(f"gardener/{again}")
    pipe.save_pretrained("saved")
pipe.save_pretrained("parts", variant="fp16", max_shard_size="20KB")
elsewhere = {
    "variant-and-shards": ("parts", {"variant": "fp16"}),
    "revision-and-cache": ("gardener/flower-ldm", {"revision": "main", "cache_dir": "cache"}),
    "offline": ("gardener/flower-ldm", {"local_files_only": True}),
}
for name, (repository, options) in elsewhere.items():
    pipe = DiffusionPipeline.from_pretrained(repository, trust_remote_code=True, **options)
    generator = torch.Generator().manual_seed(0)
    images = pipe([0, 1], num_inference_steps=3, generator=generator, output_type="pt").images
    torch.save(images, name + ".pt")
assert len(list(Path("parts", "unet").glob("*.fp16-*.safetensors"))) > 1 and any(Path("cache").iterdir())
for part in ("vae", "unet"):
    found = AutoModel.from_pretrained(f"parts/{part}", variant="fp16", trust_remote_code=True)
    assert type(found).__name__ == type(getattr(pipe, part)).__name__
for name, again in (("autoencoder", "autoencoder-again"), ("autoencoder-again", "autoencoder-and-again")):
    vae = AutoModel.from_pretrained(f"gardener/{name}", trust_remote_code=True)
    torch.save(vae.state_dict(), f"{name}.pt")
    vae.push_to_hub(f"gardener/{again}")
assert "flower_ldm" not in sys.modules
"""


def check_elsewhere(hub_server: LoopbackHub, finished, folder: Path) -> None:
    """Both repositories, `autoencoder` and `flower-ldm`, in an empty folder without the package: same bits as here."""
    for name, marked in (("flower-ldm", "marked"), ("autoencoder", "marked-autoencoder")):
        files = hub_server.repositories[f"gardener/{name}"].find("main")[1]
        repository = hub_server.repositories[f"gardener/{marked}"] = Repository()
        mark = b"\nopen('executed', 'w').close()\n"
        repository.commit("main", {path: Blob(blob.content + mark if path.endswith(".py") else blob.content, blob.lfs)
                                   for path, blob in files.items()}, "marked")  # fmt: skip
    environment = hub_server.environment(folder / "hf")
    (folder / "empty").mkdir(parents=True)
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=folder / "empty", env=environment, check=True, timeout=300)
    expected = draw(FlowerLDMPipeline.from_pretrained(finished.flower_ldm))
    vae = FlowerAutoencoderKL.from_pretrained(finished.autoencoder)
    for name in ("flower-ldm", "again", "saved", "variant-and-shards", "revision-and-cache", "offline"):
        assert torch.equal(torch.load(folder / "empty" / f"{name}.pt"), expected), name
    for name in ("autoencoder", "autoencoder-again"):
        assert same_weights(torch.load(folder / "empty" / f"{name}.pt"), vae), name
    files = hub_server.repositories["gardener/flower-ldm"].files
    code = {path: content for path, content in files.items() if path.endswith((".py", ".json", ".safetensors"))}
    code.pop("metrics.json")
    for name in ("again", "and-again", "saved-again"):
        files = hub_server.repositories[f"gardener/{name}"].files
        assert {path: files[path] for path in files if path in code} == code


def test_both_load_and_travel_on_where_the_package_is_not_installed(finished_runs, hub_server, tmp_path):
    hub.push_run(finished_runs.autoencoder, "gardener/autoencoder")
    hub.push_run(finished_runs.flower_ldm, "gardener/flower-ldm")
    check_elsewhere(hub_server, finished_runs, tmp_path / "elsewhere")
    again = FlowerLDMPipeline.from_pretrained("gardener/and-again")
    assert type(again) is FlowerLDMPipeline
    assert torch.equal(draw(again), draw(FlowerLDMPipeline.from_pretrained(finished_runs.flower_ldm)))
    vae = FlowerAutoencoderKL.from_pretrained("gardener/autoencoder-and-again")
    assert (
        vae.config.latents_mean == FlowerAutoencoderKL.from_pretrained(finished_runs.autoencoder).config.latents_mean
    )


# From training to elsewhere, and what it tells on the way


class FinishedFolders(NamedTuple):
    autoencoder: Path
    flower_ldm: Path


@pytest.mark.slow
def test_training_pushes_a_model_that_loads_anywhere_and_nothing_leaks(image_folder, random_vgg, tmp_path):
    """Both stages as a user runs them; home, user, host, folder and data have names that nothing else has."""
    planted = tmp_path / "planted-output-folder"
    planted.mkdir()
    image_folder.rename(planted / "planted-data-folder")
    host = "import platform, socket; platform.node = socket.gethostname = lambda: 'planted-host'"
    (planted / "sitecustomize.py").write_text(host)  # which every process of the run imports
    secrets = [b"planted-", TOKEN.encode(), str(tmp_path).encode(), str(ROOT).encode()]
    with LoopbackHub() as hub_server:
        environment = hub_server.environment(tmp_path / "hf") | {
            "HOME": str(tmp_path / "planted-home"), "USER": "planted-user", "LOGNAME": "planted-user",
            "USERNAME": "planted-user", "HOSTNAME": "planted-host", "PYTHONPATH": str(planted),
        }  # fmt: skip
        (tmp_path / "planted-home").mkdir()
        data = ["--dataset", "imagefolder", "--data_dir", str(planted / "planted-data-folder")]
        data += ["--classes", "daisy", "rose", "tulip", "--final_pictures", "--push_to_hub"]
        data += ["--report_to", "tensorboard"]  # whose files are named after the host
        stages = tiny_stages(planted, shutil.copy(random_vgg, planted / "vgg16.safetensors"))
        stages[1].extend(["--autoencoder", "gardener/autoencoder"])  # which the first has pushed
        for script, flags in zip(("train_autoencoder", "train_latent_diffusion"), stages, strict=True):
            command = [sys.executable, str(ROOT / f"{script}.py"), *flags, *data]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            assert f"pushed: {hub_server.url}/gardener/" in done.stdout
        assert list(planted.glob("autoencoder/logs/**/*planted-host*"))
        uploaded = hub_server.sent()
        assert len(uploaded) > 30
        for secret in secrets:
            assert [content[:200] for content in uploaded if secret in content] == [], secret
        finished = FinishedFolders(planted / "autoencoder", planted / "flower-ldm")
        check_elsewhere(hub_server, finished, tmp_path / "elsewhere")


@pytest.mark.slow
def test_training_whose_upload_breaks_off_is_complete_on_disk(hub_server, run_script, stage_flags, tmp_path):
    hub_server.interrupt = lambda request: -1 if "/commit/" in request.path else None
    with pytest.raises(InputError, match="the upload to gardener/flowers failed: .*to upload it, run: ") as error:
        run_script(train_autoencoder.main, [*stage_flags[0], "--push_to_hub", "--hub_model_id", "flowers"])
    folder, repository = tmp_path / "autoencoder", hub_server.repositories["gardener/flowers"]
    assert (folder / "report.html").is_file() and (folder / "checkpoint-6").is_dir()
    assert set(repository.files) == {".gitattributes"}
    hub_server.interrupt = lambda request: None
    hub.main(shlex.split(str(error.value).partition("python -m flower_ldm.hub ")[2]))
    assert same_weights(FlowerAutoencoderKL.from_pretrained("gardener/flowers").state_dict(),
                        FlowerAutoencoderKL.from_pretrained(folder))  # fmt: skip


def belongs_to_an_upload(request: Request) -> bool:
    """Not so the question, asked once a day by any use of the client, which agents there are that may run it."""
    return request.path != "/api/agent-harnesses"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "flower_ldm"])
@pytest.mark.parametrize("sent", [-1, 0], ids=["before the answer", "within the answer"])
def test_upload_broken_off_at_each_request_can_be_finished(finished_runs, hub_server, tmp_path, sent, stage):
    """The connection is cut at one request and stays so; when it is back the same command finishes the upload."""
    run = tmp_path / "run"
    shutil.copytree(getattr(finished_runs, stage), run)
    (run / "README.md").write_text("---\nlicense: apache-2.0\n---\nA card.\n")
    before = snapshot(run)
    hub.push_run(run, "gardener/whole", api=HfApi(hub_server.url, TOKEN))
    whole = hub_server.repositories["gardener/whole"].files
    num_requests = sum(map(belongs_to_an_upload, hub_server.requests))

    def break_at(number: int) -> str:
        with LoopbackHub() as broken:
            count = itertools.count()
            broken.interrupt = lambda request: (
                sent if belongs_to_an_upload(request) and next(count) >= number else None
            )
            api = HfApi(broken.url, TOKEN)
            with pytest.raises(InputError, match="failed: .*to upload it, run: python -m flower_ldm.hub") as caught:
                hub.push_run(run, "flowers", api=api)
            broken.interrupt = lambda request: None
            repository = broken.repositories.get("gardener/flowers")
            halfway = set(repository.files) if repository else set()
            assert halfway in (set(), {".gitattributes"}, set(whole))
            hub.push_run(run, "flowers", api=api)
            assert broken.repositories["gardener/flowers"].files == whole
            return str(caught.value)

    with ThreadPoolExecutor(num_requests) as threads:  # which mostly sleep, as the client does between its tries
        lines = list(threads.map(break_at, range(num_requests)))
    assert len(lines) >= 10 and all("\n" not in line for line in lines)
    assert snapshot(run) == before


@pytest.mark.slow
def test_upload_interrupted_by_the_user_or_killed_can_be_finished(finished_runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_runs.autoencoder, run)
    write_model_card(run, "gardener/flowers")  # as the push writes it, with the repository's name
    before = snapshot(run)
    command = [sys.executable, "-m", "flower_ldm.hub", str(run), "--hub_model_id", "flowers"]
    with LoopbackHub() as hub_server:
        environment = hub_server.environment(tmp_path / "hf")
        for number in (signal.SIGINT, signal.SIGKILL):
            reached, go_on = threading.Event(), threading.Event()

            def hold(request, reached=reached, go_on=go_on):
                if "/commit/" in request.path:
                    reached.set()
                    go_on.wait(60)
                    return -1

            hub_server.interrupt = hold
            process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=PIPE, stderr=PIPE)
            assert reached.wait(120)
            process.send_signal(number)
            go_on.set()
            out, err = process.communicate(timeout=60)
            assert process.returncode != 0
            assert "python -m flower_ldm.hub" in out
            if number == signal.SIGINT:
                assert process.returncode == 2 and err.splitlines()[-1].startswith("error: the upload to")
            assert set(hub_server.repositories["gardener/flowers"].files) == {".gitattributes"}
        hub_server.interrupt = lambda request: None
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120)
        assert set(hub_server.repositories["gardener/flowers"].files) == AUTOENCODER_FILES
    assert snapshot(run) == before
