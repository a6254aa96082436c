"""Both stages in two real processes (gloo, on the CPU): they see different images, keep the same weights, and end
where one process with the same global batch ends. One pair of processes runs both stages, for all the tests.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_stages
from test_resume import MAINS, STAGES, apart, contents, tensors

from flower_ldm.errors import InputError
from flower_ldm.runs import read_log

REPOSITORY = Path(__file__).resolve().parents[1]

# Runs the stages of a JSON file one after the other. At each checkpoint every rank leaves what it has seen and knows.
DRIVER = """
import json, sys

import torch
from accelerate.state import PartialState

import train_autoencoder, train_latent_diffusion
from flower_ldm import checkpoints, training

PartialState.destroy_process_group = lambda *args: None  # the stages share it
batches_of, save_checkpoint = training.training_batches, checkpoints.save_checkpoint


def recorded_batches(*args):
    for batch in batches_of(*args):
        seen.append(batch["index"].tolist())
        yield batch


def recorded_checkpoint(accelerator, args, stateful, global_step):
    parts = {name: owner.state_dict() for name, owner in checkpoints.unwrapped(accelerator, stateful).items()}
    about = {"world_size": torch.distributed.get_world_size(), "backend": torch.distributed.get_backend()}
    state = {"parts": parts, "seen": seen, **about}
    torch.save(state, f"{args.output_dir}-step-{global_step}-rank-{accelerator.process_index}.pt")
    return save_checkpoint(accelerator, args, stateful, global_step)


training.training_batches, checkpoints.save_checkpoint = recorded_batches, recorded_checkpoint
for stage, flags in json.load(open(sys.argv[1])):
    seen = []
    {"autoencoder": train_autoencoder, "latent_diffusion": train_latent_diffusion}[stage].main(flags)
    torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def run_in_two_processes(folder: Path, runs: list[tuple[str, list[str]]]) -> None:
    """Run stages with their flags, one after the other, in one pair of processes."""
    (folder / "driver.py").write_text(DRIVER)
    (folder / "runs.json").write_text(json.dumps(runs))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*words, str(folder / "driver.py"), str(folder / "runs.json")],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed = process.communicate(timeout=500)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, printed[-5000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def flags(folder: Path, random_vgg: Path) -> dict[str, list[str]]:
    """Of each stage, for 3 updates of 16 images, of which there are 36, with 24 held out; to be ended by a batch size.

    The discriminator starts with the second update, and the adaptive weight is measured at every one from there.
    """
    stage1, stage2 = tiny_stages(folder, random_vgg)
    common = "--classes 0 1 2 --max_train_steps 3 --lr_warmup_steps 0 --mixed_precision no --logging_steps 1"
    common += " --validation_steps 2 --checkpointing_steps 2"
    stage1 += f"{common} --disc_start 1 --adaptive_weight_steps 1 --perceptual_every 2".split()
    stage2 += f"{common} --latent_cache_dir {folder}/latent_cache".split()
    return {"autoencoder": stage1, "latent_diffusion": stage2}


@pytest.fixture(scope="module")
def two_processes(folder: Path, flags: dict) -> Path:
    """The folder with `<stage>/` of a run with 8 images a process, and what each rank left of it."""
    words = {stage: ["--train_batch_size", "8", "--output_dir", f"{folder}/{stage}"] for stage in STAGES}
    run_in_two_processes(folder, [(stage, flags[stage] + words[stage]) for stage in STAGES])
    return folder


def ranks(folder: Path, stage: str, step: int = 3) -> list[dict]:
    return [torch.load(folder / f"{stage}-step-{step}-rank-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("stage", STAGES)
def test_there_are_two_and_they_see_different_images(two_processes, stage):
    first, second = ranks(two_processes, stage)
    assert (first["world_size"], first["backend"]) == (2, "gloo")
    assert [len(indices) for indices in first["seen"] + second["seen"]] == [8] * 6
    together = [index for pair in zip(first["seen"], second["seen"], strict=True) for part in pair for index in part]
    assert sorted(together[:36]) == list(range(36))  # an epoch, each image once
    assert len(set(together[36:])) == 12


@pytest.mark.parametrize("stage", STAGES)
def test_both_have_the_same_weights(two_processes, stage):
    """Models, optimizers, moving average; in stage 1 the discriminator, the centers and the adaptive weight too."""
    first, second = (tensors(rank) for rank in ranks(two_processes, stage))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    before = tensors(ranks(two_processes, stage, step=2)[0])
    moved = {name for name in first if not torch.equal(first[name], before[name])}
    expected = ["/parts/model/", "/parts/ema/shadow_params/"]
    if stage == "autoencoder":
        expected += ["/parts/centers/centers", "/parts/discriminator/", "/parts/adaptive_weight/value"]
        assert first["/parts/adaptive_weight/num_measurements"] == 2
    assert [start for start in expected if not any(name.startswith(start) for name in moved)] == []


@pytest.fixture(scope="module")
def one_process(two_processes: Path, flags: dict, run_script) -> Path:
    """The folder with `one-<stage>/` of a run with 16 images in this process."""
    for stage in STAGES:
        words = ["--train_batch_size", "16", "--output_dir", f"{two_processes}/one-{stage}"]
        run_script(MAINS[stage], [*flags[stage], *words])
    return two_processes


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_with_the_same_batch_ends_there_too(one_process, stage):
    """Up to rounding, which Adam makes larger where a gradient is almost 0: its averages agree better than weights."""
    names = (f"one-{stage}/checkpoint-3", f"{stage}/checkpoint-3", f"{stage}/checkpoint-2")
    one, two, before = (contents(one_process / name) for name in names)
    assert one.keys() == two.keys()
    compared = []
    for name in one:
        states = [tensors(checkpoint[name]) for checkpoint in (one, two, before)]
        assert states[0].keys() == states[1].keys()
        if states[0]:
            assert apart(*states) < (5e-3 if "optimizer" in name else 1e-2), name
            compared.append(name)
    assert len(compared) == (7 if stage == "autoencoder" else 3)


@pytest.mark.parametrize("stage", STAGES)
def test_the_logs_agree(one_process, stage):
    """Every loss of every update, gradient norms, the adaptive weight, the held-out figures (over uneven batches)."""
    one, two = (read_log(one_process / name / "log.jsonl") for name in (f"one-{stage}", stage))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 2, 3, 3]
    for line, other in zip(one, two, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"steps_per_second", "loss_by_timestep"}:
            assert other[name] == pytest.approx(line[name], rel=1e-3, abs=1e-6), name
        bins = [
            [value or 0.0 for part in logged.get("loss_by_timestep", []) for value in part] for logged in (line, other)
        ]
        assert bins[1] == pytest.approx(bins[0], rel=1e-3)
    if stage == "autoencoder":
        assert {"adversarial_loss", "discriminator_loss", "adaptive_weight", "perceptual_loss"} < one[1].keys()


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_goes_on_with_as_many_images_only(one_process, flags, run_script, tmp_path, stage):
    """From a checkpoint of two: to the same end up to rounding, or not at all."""
    words = ["--resume_from_checkpoint", one_process / stage / "checkpoint-2", "--output_dir", tmp_path / "resumed"]
    line = "its images per update .* was 16, this run's is 8: they must be the same"
    with pytest.raises(InputError, match=line) as refusal:
        run_script(MAINS[stage], [*flags[stage], *words, "--train_batch_size", "8"])
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "resumed").exists()

    run_script(MAINS[stage], [*flags[stage], *words, "--train_batch_size", "16"])
    folders = (tmp_path / "resumed" / "checkpoint-3", one_process / stage / "checkpoint-3")
    ours, theirs, before = (contents(folder)["model"] for folder in (*folders, words[1]))
    assert apart(ours, theirs, before) < 1e-2


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(two_processes, flags):
    """Both stages from update 2 to 3, in a pair of processes of its own."""
    runs = []
    for stage in STAGES:
        words = ["--train_batch_size", "8", "--output_dir", f"{two_processes}/resumed-{stage}"]
        runs.append(
            (stage, [*flags[stage], *words, "--resume_from_checkpoint", f"{two_processes}/{stage}/checkpoint-2"])
        )
    run_in_two_processes(two_processes, runs)
    for stage in STAGES:
        for whole, resumed in zip(ranks(two_processes, stage), ranks(two_processes, f"resumed-{stage}"), strict=True):
            assert resumed["seen"] == whole["seen"][2:]
            whole, resumed = tensors(whole), tensors(resumed)
            assert whole.keys() == resumed.keys()
            assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
