"""Training from Python: `main` leaves the process as it found it, so that a notebook can go on, or train again."""

import os
import signal
import threading

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_checkpoints import held_by_another_process
from test_resume import signal_when_there_is

import train_autoencoder
import train_latent_diffusion
from flower_ldm.errors import InputError
from flower_ldm.training import stop_signals

MAINS = [train_autoencoder.main, train_latent_diffusion.main]


def my_handler(number: int, frame: object) -> None:
    pass


@pytest.fixture
def my_handlers():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, my_handler)


def handlers() -> set:
    assert len(stop_signals()) == 3
    return {signal.getsignal(number) for number in stop_signals()}


def test_both_stages_in_one_process_then_again_in_the_same_folders(stage_flags, tmp_path, my_handlers):
    """The notebook has an accelerator of its own, of another precision, which goes on afterwards."""
    mine = Accelerator(cpu=True, mixed_precision="bf16")
    for main, flags in zip(MAINS, stage_flags, strict=True):
        main([*flags, "--max_train_steps", "2", "--checkpointing_steps", "2", "--mixed_precision", "no"])
        assert handlers() == {my_handler}
    for folder in (tmp_path / "autoencoder", tmp_path / "flower-ldm"):
        with held_by_another_process(folder):
            pass
    assert AcceleratorState().mixed_precision == mine.mixed_precision == "bf16"
    more = ["--max_train_steps", "3", "--mixed_precision", "no", "--resume_from_checkpoint", "latest"]
    train_latent_diffusion.main([*stage_flags[1], *more])
    assert (tmp_path / "flower-ldm" / "checkpoint-3").is_dir()
    train_latent_diffusion.main([*stage_flags[1], "--max_train_steps", "1", "--overwrite_output_dir"])
    assert not (tmp_path / "flower-ldm" / "checkpoint-3").exists()


@pytest.mark.parametrize("words", [["--nonsense"], ["--seed", "-1"], ["--model_config", "nowhere.json"]])
@pytest.mark.parametrize("stage", [0, 1])
def test_bad_input_is_an_error_to_catch(finished_runs, stage_flags, my_handlers, stage, words):
    flags = [*stage_flags[stage], *(["--autoencoder", str(finished_runs.autoencoder)] if stage else [])]
    for _ in range(2):
        with pytest.raises(InputError):
            MAINS[stage]([*flags, *words])
    assert handlers() == {my_handler} and not AcceleratorState._shared_state


def test_an_interrupted_training_gives_the_process_back(stage_flags, tmp_path, my_handlers):
    folder = tmp_path / "autoencoder"
    flags = [*stage_flags[0], "--max_train_steps", "200", "--logging_steps", "1"]
    with signal_when_there_is(folder / "log.jsonl", signal.SIGINT), pytest.raises(SystemExit):
        train_autoencoder.main(flags)
    assert handlers() == {my_handler} and not AcceleratorState._shared_state
    os.kill(os.getpid(), signal.SIGINT)  # raised SystemExit again, long after the run
    with held_by_another_process(folder):
        pass


def test_another_thread_will_do(stage_flags, tmp_path, hub_server):
    """Python lets only the main thread handle signals. Neither training nor upload asks another one for them."""
    errors = []
    push = ["--push_to_hub", "--hub_model_id", "gardener/flowers"]

    def train() -> None:
        try:
            train_autoencoder.main([*stage_flags[0], "--max_train_steps", "2", "--dataloader_num_workers", "1", *push])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert errors == [] and (tmp_path / "autoencoder" / "metrics.json").is_file()
    assert "config.json" in hub_server.repositories["gardener/flowers"].files
