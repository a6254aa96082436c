"""Runs that are killed at random instants, and again while they resume: what is on disk is always a run to go on from.

After each kill: every folder called a checkpoint is valid, the newest is none older than before, nothing but the
updates since then is done again. In the end the weights are those of the run that nobody killed, bit for bit.
"""

import json
import os
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fault_runs import RunServer, run_server
from safetensors.torch import load_file
from test_resume import contents, differences, losses_after

from flower_ldm.checkpoint_files import why_invalid
from flower_ldm.checkpoints import list_checkpoints, step_of

WEIGHTS = {
    "autoencoder": ["diffusion_pytorch_model.safetensors", "best/diffusion_pytorch_model.safetensors"],
    "latent_diffusion": ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"],
}
SEED = 0


@dataclass
class Faults:
    """Kills one stage's run again and again. Counts what it did."""

    server: RunServer
    stage: str
    flags: list[str]
    every: int  # updates between two checkpoints
    rng: random.Random
    kills: int = 0
    in_saves: int = 0
    resumes: int = 0
    redone: int = 0
    ends: int = 0
    seconds: float = 3.0  # that a whole run takes, as far as is known

    def kill_and_resume(self, folder: Path, kills: int) -> None:
        """One run, killed so many times, or as often as it takes to its end; then left to finish."""
        before = 0
        for _ in range(kills):
            in_save = self.in_saves < (self.kills + 1) / 2.5  # some miss: the run may have ended before
            finished = self.attempt(folder, before, in_save)
            before = self.check(folder, before)
            if finished:
                return
        assert self.attempt(folder, before, None)
        self.check(folder, before)

    def attempt(self, folder: Path, before: int, in_save: bool | None) -> bool:
        """Start the run or go on with it, and kill it, in a save or at any time; `None` lets it be. Has it ended?"""
        words = ["--output_dir", str(folder)]
        if before:
            words += ["--resume_from_checkpoint", "latest"]
            self.resumes += 1
        elif folder.exists():
            words += ["--overwrite_output_dir"]
        printed = folder.with_suffix(".out")
        printed.unlink(missing_ok=True)
        logged = num_lines(folder)
        pid, started = self.server.start(self.stage, self.flags + words, printed), time.monotonic()
        ended = threading.Event()
        killer = threading.Thread(target=self.kill, args=(pid, folder, in_save, ended))
        if in_save is not None:
            killer.start()
        code = self.server.wait()
        ended.set()
        if in_save is not None:
            killer.join()
        if code == 0:
            self.ends += 1
            self.seconds = 0.5 * self.seconds + 0.5 * (time.monotonic() - started)
        elif code == -signal.SIGKILL:
            self.kills += 1
            self.in_saves += bool(list(folder.glob("unfinished-[0-9]*")))
        else:
            pytest.fail(f"{self.stage}: exit code {code} of {words}: {printed.read_text()[-2000:]}")
        if before:
            new = [line["step"] for line in lines(folder)[logged:] if "steps_per_second" in line]
            assert min(new, default=before + 1) > before, f"{self.stage} did update {min(new)} again, after {before}"
        return code == 0

    def kill(self, pid: int, folder: Path, in_save: bool, ended: threading.Event) -> None:
        """End the process at a random time of its life; in a save, as soon as one has begun and a little later."""
        if in_save:
            saves = self.rng.randint(1, 2)
            seen, until = set(), time.monotonic() + 60
            while len(seen) < saves and not ended.is_set() and time.monotonic() < until:
                seen |= {path.name for path in folder.glob("unfinished-[0-9]*")}
                time.sleep(0.0005)
            delay = self.rng.expovariate(1 / 0.03)
        else:
            delay = self.rng.uniform(0, 1.1 * self.seconds)
        if not ended.wait(delay):
            with suppress(ProcessLookupError):  # it has ended this very moment
                os.kill(pid, signal.SIGKILL)

    def check(self, folder: Path, before: int) -> int:
        """The step of the newest checkpoint, once all are found valid and none older than the one before."""
        found = list_checkpoints(folder)
        assert [(path.name, why_invalid(path, step_of(path))) for path in found] == [(p.name, None) for p in found]
        newest = max(map(step_of, found), default=0)
        assert newest >= before, f"checkpoint-{before} is lost"
        done = max((line["step"] for line in lines(folder)), default=0)
        self.redone = max(self.redone, done - newest)
        assert done - newest <= self.every
        return newest


def lines(folder: Path) -> list[dict]:
    """The lines of a run's log as they were written, without what was torn."""
    found = []
    for text in (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def num_lines(folder: Path) -> int:
    return len(lines(folder))


def assert_same_end(whole: Path, killed: Path, stage: str, last_step: int) -> None:
    for name in WEIGHTS[stage]:
        assert differences(load_file(whole / name), load_file(killed / name)) == [], name
    ends = [contents(folder / f"checkpoint-{last_step}") for folder in (whole, killed)]
    assert differences(*ends) == []
    assert differences(*[losses_after(folder, 0) for folder in (whole, killed)]) == []
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, killed))
    assert one | {"training_seconds": 0} == other | {"training_seconds": 0}
    assert (killed / "README.md").is_file() and (killed / "report.html").is_file()
    assert not list(killed.glob("unfinished-*")) and not list(killed.glob("*.tmp"))


def report(all_faults: list[Faults]) -> str:
    total = {name: sum(getattr(faults, name) for faults in all_faults) for name in ("kills", "in_saves", "resumes")}
    redone = max(faults.redone for faults in all_faults)
    return (
        f"faults: {total['kills']} kills ({total['in_saves']} in saves), seed {SEED}, resumes {total['resumes']}, "
        f"redone at most {redone} updates of {all_faults[0].every} between two checkpoints; "
        f"{sum(faults.ends for faults in all_faults)} runs to the end, all the same; 0 valid checkpoints lost, 0 torn "
        "ones accepted"
    )


def test_a_few_kills_cost_nothing(finished_runs, tmp_path, record_property):
    """Both stages, against the runs that nobody killed; `make test`'s part of the test below."""
    all_faults = []
    with run_server(torch.get_num_threads()) as server:
        for stage, flags, whole in (
            ("autoencoder", finished_runs.stage1, finished_runs.autoencoder),
            ("latent_diffusion", finished_runs.stage2, finished_runs.flower_ldm),
        ):
            words = [*flags, "--no-final_pictures", "--report_to", "none", "--checkpoints_total_limit", "2"]
            faults = Faults(server, stage, words, 4, random.Random(SEED))
            faults.kill_and_resume(tmp_path / stage, 2)
            assert faults.kills
            assert_same_end(whole, tmp_path / stage, stage, 6)
            all_faults.append(faults)
    record_property("counts", report(all_faults))


@pytest.mark.slow
def test_two_hundred_kills_cost_nothing(finished_runs, tmp_path, record_property):
    """A third of them and more in the time of a save. Two servers at a time, each with a core."""
    flags = {"autoencoder": finished_runs.stage1, "latent_diffusion": finished_runs.stage2}

    def kill_stage(stage: str, part: int) -> Faults:
        more = "--no-final_pictures --report_to none --max_train_steps 9 --checkpointing_steps 3 --logging_steps 1"
        more += " --validation_steps 5 --checkpoints_total_limit 1"
        rng = random.Random(f"{SEED} {stage} {part}")
        folder = tmp_path / f"{stage}-{part}"
        folder.mkdir()
        with run_server() as server:
            faults = Faults(server, stage, [*flags[stage], *more.split()], 3, rng)
            assert faults.attempt(folder / "whole", 0, None)
            while faults.kills < 50:
                killed = folder / f"killed-{faults.ends}"
                faults.kill_and_resume(killed, min(rng.randint(3, 12), 50 - faults.kills))
                assert_same_end(folder / "whole", killed, stage, 9)
                shutil.rmtree(killed)
        return faults

    parts = [(stage, part) for stage in flags for part in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        all_faults = list(pool.map(kill_stage, *zip(*parts, strict=True)))
    record_property("counts", report(all_faults))
    assert sum(faults.kills for faults in all_faults) == 200
    assert sum(faults.in_saves for faults in all_faults) >= 67
