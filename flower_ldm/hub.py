"""A finished run to the Hugging Face Hub: `python -m flower_ldm.hub results/flower-ldm --hub_model_id user/name`.

Both training scripts do the same with `--push_to_hub`. What goes is listed in `runs.ARTIFACTS`, file by file: the
model with its code, the card, generated pictures and curves, the metrics, the flags that aren't paths. All else stays,
such as checkpoints, logs, and pictures that show photographs of the data set.
"""

import argparse
import json
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import yaml
from accelerate import Accelerator
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.utils import validate_repo_id

from .data import public_dataset
from .errors import InputError, OneLineParser, exit_on_input_error, one_line
from .files import file_path, without_paths
from .model_card import write_model_card
from .recipes import public_flags
from .runs import ARGS_FILE, CARD_FILE, METRICS_FILE, PIPELINE_INDEX, SAMPLE_GRIDS, fits, public_files, read_flags
from .training import stop_signals


def check_flags(args: argparse.Namespace) -> None:
    """With `--push_to_hub`, `check_upload`."""
    if args.push_to_hub:
        check_upload(repository_of(args))


def repository_of(args: argparse.Namespace) -> str:
    """The repository that `--push_to_hub` uploads to."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def claim_repository(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """With `--push_to_hub`, make the repository before the training begins, and keep its full name in the flags.

    Raises:
        InputError: where this token may not write there, or the Hub can't be reached.
    """
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = create_repository(repository_of(args), args.hub_private_repo)


def push_results(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """With `--push_to_hub`, upload what the finished run may show, from the main process.

    Raises:
        InputError: where the upload fails or is interrupted; all is on disk, and the line says how to go on.
    """
    if args.push_to_hub and accelerator.is_main_process:
        for number in stop_signals():  # each ends the upload with the line that says how to go on
            signal.signal(number, signal.default_int_handler)
        print(f"pushed: {push_run(Path(args.output_dir), repository_of(args), args.hub_private_repo)}")


def check_upload(repo_id: str) -> None:
    """Refuse, before anything is computed, an upload that can't succeed.

    Raises:
        InputError: where that can't be a repository's name, or there is no token, or no network by choice.
    """
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise InputError(f"--hub_model_id {repo_id} is no repository's name: {one_line(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise InputError("--push_to_hub can't work with HF_HUB_OFFLINE set: unset it, or leave the flag out")
    if get_token() is None:
        raise InputError("--push_to_hub needs a token of the Hub: run `hf auth login`, or set HF_TOKEN")


def create_repository(repo_id: str, private: bool = False, api: HfApi | None = None) -> str:
    """The repository of that name, made where there is none yet; its full name, `user/name`.

    Asks whether it may be written to as well: of one that is there already `create_repo` hides that it may not.

    Raises:
        InputError: where this token may not write there, it is public but shall be private, or the Hub can't be
            reached.
    """
    api = api or HfApi()
    try:
        full_name = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        api.auth_check(full_name, write=True)
        is_public = private and not api.model_info(full_name).private
    except Exception as error:  # HTTP, network, a token that is none: the client has no common base for them
        raise InputError(f"--push_to_hub can't write to {repo_id}: {one_line(error)}") from error
    if is_public:
        raise InputError(
            f"--hub_private_repo: {full_name} is there already and public; make it private on the Hub, or name "
            "another --hub_model_id"
        )
    return full_name


def push_run(run_dir: Path, repo_id: str, private: bool = False, api: HfApi | None = None) -> str:
    """Upload what a finished run may show, in one commit, so that a broken upload leaves the repository as it was.

    Its card is written anew with the repository's name, unless it is somebody's own (`write_model_card`). What an
    earlier push left there and this run no longer has goes away; other files stay.

    Returns:
        The address of the commit.

    Raises:
        InputError: where the folder is no finished run, or the upload breaks off; with the command that finishes it.
    """
    allowed, additions = run_files(run_dir)
    command = f"python -m flower_ldm.hub {shlex.quote(str(run_dir))} --hub_model_id {repo_id}"
    command += " --hub_private_repo" if private else ""
    print(f"uploading {run_dir} to {repo_id}; should that break off: {command}", flush=True)
    api = api or HfApi()
    try:
        repo_id = create_repository(repo_id, private, api)
        additions[CARD_FILE.name] = write_model_card(run_dir, repo_id)
        operations = [CommitOperationAdd(path, content) for path, content in additions.items()]
        for path in api.list_repo_files(repo_id):
            if path not in additions and path != CARD_FILE.name and fits(path, allowed):
                operations.append(CommitOperationDelete(path))
        return api.create_commit(repo_id, operations, commit_message="Upload a run of flower_ldm").commit_url
    except (Exception, KeyboardInterrupt) as error:  # whatever the reason, the run is on disk and can be pushed again
        raise InputError(
            f"the upload to {repo_id} broke off: {one_line(error)}; {run_dir} is complete, finish by: {command}"
        ) from error


def run_files(run_dir: Path) -> tuple[tuple[str, ...], dict[str, Path | bytes]]:
    """Patterns of what may go to the Hub, and what there is of it, by its path in the repository.

    Raises:
        InputError: where the folder is no finished run, or what would go isn't a file of its own.
    """
    for needed in (METRICS_FILE, ARGS_FILE):
        if not needed.path(run_dir).is_file():
            raise InputError(f"{run_dir} is no finished run of flower_ldm: it has no {needed.name}")
    if PIPELINE_INDEX.path(run_dir).is_file():
        # What somebody has put beside our samples goes too.
        allowed = (*public_files("latent_diffusion"), f"{os.path.dirname(SAMPLE_GRIDS.name)}/*.png")
    else:
        allowed = public_files("autoencoder")
    files: dict[str, Path | bytes] = dict(own_files(run_dir, allowed))
    try:
        metrics = without_paths(json.loads(METRICS_FILE.path(run_dir).read_text()))
        metrics.get("evaluation", {}).pop("command", None)  # its words are paths, among others
        flags = public_flags(read_flags(run_dir))
        for entries in (metrics, metrics.get("evaluation", {})):
            if "dataset" in entries:
                entries["dataset"] = public_dataset(entries["dataset"])
    except (OSError, ValueError, AttributeError, TypeError, RecursionError, yaml.YAMLError) as error:  # damaged
        raise InputError(f"{run_dir} is no finished run of flower_ldm: {one_line(error)}") from error
    files[METRICS_FILE.name] = (json.dumps(metrics, indent=2) + "\n").encode()
    files[ARGS_FILE.name] = yaml.safe_dump(flags, sort_keys=True).encode()
    return allowed, files


def own_files(run_dir: Path, allowed: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """What may go, by name: regular files that lie in the run's folder themselves.

    Raises:
        InputError: where a symbolic link, of a file or a folder, leads to what may not go; at a pipe, a device and the
            like. To leave one out in silence would take away what an earlier push uploaded.
    """
    root = Path(os.path.realpath(run_dir))
    folders = {os.path.dirname(pattern) for pattern in allowed} - {""}
    for path in sorted(run_dir.rglob("*")):
        name = path.relative_to(run_dir).as_posix()
        target = Path(os.path.realpath(path))
        if name in folders and target != root / name:
            raise InputError(f"{path} is a symbolic link, which no push follows: put the folder itself there")
        if not fits(name, allowed):
            continue
        inside = target.is_relative_to(root) and fits(target.relative_to(root).as_posix(), allowed)
        if not (inside and target.is_file()):
            what = "a symbolic link to what may not go" if path.is_symlink() else "no regular file"
            raise InputError(f"{path} is {what} to the Hub: put a copy in its place, or take it away")
        yield name, target


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m flower_ldm.hub", description="Push a finished run to the Hugging Face Hub.")
    parser.add_argument("run_dir", type=file_path, help="folder that a training script wrote")
    parser.add_argument("--hub_model_id", help="user/name, or a name in your own namespace; unset: the folder's name")
    parser.add_argument(
        "--hub_private_repo", action=argparse.BooleanOptionalAction, default=False, help="where it is made now"
    )
    args = parser.parse_args(argv)
    repo_id = args.hub_model_id or args.run_dir.resolve().name
    check_upload(repo_id)
    print(push_run(args.run_dir, repo_id, args.hub_private_repo))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
