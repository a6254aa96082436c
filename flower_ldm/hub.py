"""Uploads a finished run to the Hub: `python -m flower_ldm.hub results/flower-ldm --hub_model_id user/name`.

Both training scripts do the same with `--push_to_hub`. `runs.ARTIFACTS` says of each file whether it is uploaded. The
model with its code, the card, generated pictures, curves, metrics and public flags are. Everything else stays on this
machine, such as checkpoints, logs, and pictures that show photographs of the data set.
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
    """With `--push_to_hub`, refuse an upload that can't succeed (`check_upload`)."""
    if args.push_to_hub:
        check_upload(repository_of(args))


def repository_of(args: argparse.Namespace) -> str:
    """The repository that `--push_to_hub` uploads to."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def claim_repository(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """With `--push_to_hub`, create the repository before the training begins, and keep its full name in the flags.

    Raises:
        InputError: this token has no write access, or the Hub can't be reached.
    """
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = create_repository(repository_of(args), args.hub_private_repo)


def push_results(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """With `--push_to_hub`, upload the public files of the finished run, from the main process.

    Raises:
        InputError: the upload failed or was interrupted. The run is complete on disk, and the message says how to
            finish the upload.
    """
    if args.push_to_hub and accelerator.is_main_process:
        for stop_signal in stop_signals():  # each interrupts the upload, so that the message above is printed
            signal.signal(stop_signal, signal.default_int_handler)
        print(f"pushed: {push_run(Path(args.output_dir), repository_of(args), args.hub_private_repo)}")


def check_upload(repo_id: str) -> None:
    """Refuse, before anything is computed, an upload that can't succeed.

    Raises:
        InputError: the name is not valid for a repository, there is no token, or HF_HUB_OFFLINE is set.
    """
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise InputError(f"--hub_model_id {repo_id} is not a valid repository name: {one_line(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise InputError("--push_to_hub can't work with HF_HUB_OFFLINE set: unset it, or leave the flag out")
    if get_token() is None:
        raise InputError("--push_to_hub needs a Hub token: run `hf auth login`, or set HF_TOKEN")


def create_repository(repo_id: str, private: bool = False, api: HfApi | None = None) -> str:
    """Create the repository unless it exists, and return its full name, `user/name`.

    Also check for write access, because `create_repo` doesn't complain where the repository exists already.

    Raises:
        InputError: this token has no write access, the repository is public though `private` is set, or the Hub can't
            be reached.
    """
    api = api or HfApi()
    try:
        full_name = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        api.auth_check(full_name, write=True)
        is_public = private and not api.model_info(full_name).private
    except Exception as error:  # HTTP, network, invalid token: the client's errors have no common base class
        raise InputError(f"--push_to_hub can't write to {repo_id}: {one_line(error)}") from error
    if is_public:
        raise InputError(
            f"--hub_private_repo: {full_name} exists already and is public; make it private on the Hub, or "
            "name another --hub_model_id"
        )
    return full_name


def push_run(run_dir: Path, repo_id: str, private: bool = False, api: HfApi | None = None) -> str:
    """Upload the public files of a finished run.

    There is one commit, so a failed upload leaves the repository as it was. The card is written again with the
    repository's name, unless a person has edited it (`write_model_card`). Files of an earlier push that this run no
    longer has are deleted. All other files in the repository stay.

    Returns:
        The address of the commit.

    Raises:
        InputError: the folder is not a finished run, or the upload failed. The message then has the command that
            finishes it.
    """
    allowed, additions = run_files(run_dir)
    command = f"python -m flower_ldm.hub {shlex.quote(str(run_dir))} --hub_model_id {repo_id}"
    command += " --hub_private_repo" if private else ""
    print(f"uploading {run_dir} to {repo_id}; if the upload fails, run: {command}", flush=True)
    api = api or HfApi()
    try:
        repo_id = create_repository(repo_id, private, api)
        additions[CARD_FILE.name] = write_model_card(run_dir, repo_id)
        operations = [CommitOperationAdd(path, content) for path, content in additions.items()]
        for path in api.list_repo_files(repo_id):
            if path not in additions and path != CARD_FILE.name and fits(path, allowed):
                operations.append(CommitOperationDelete(path))
        return api.create_commit(repo_id, operations, commit_message="Upload a run of flower_ldm").commit_url
    except (Exception, KeyboardInterrupt) as error:  # the run is on disk and can be pushed again
        raise InputError(
            f"the upload to {repo_id} failed: {one_line(error)}; {run_dir} is complete; to upload it, run: {command}"
        ) from error


def run_files(run_dir: Path) -> tuple[tuple[str, ...], dict[str, Path | bytes]]:
    """Patterns of the public files, and those files that the run has, by their path in the repository.

    Raises:
        InputError: the folder is not a finished run, or one of the files is a link or no regular file.
    """
    for needed in (METRICS_FILE, ARGS_FILE):
        if not needed.path(run_dir).is_file():
            raise InputError(f"{run_dir} is not a finished run of flower_ldm: it has no {needed.name}")
    if PIPELINE_INDEX.path(run_dir).is_file():
        # Images that the user has put beside our samples are uploaded too.
        allowed = (*public_files("latent_diffusion"), f"{os.path.dirname(SAMPLE_GRIDS.name)}/*.png")
    else:
        allowed = public_files("autoencoder")
    files: dict[str, Path | bytes] = dict(own_files(run_dir, allowed))
    try:
        metrics = without_paths(json.loads(METRICS_FILE.path(run_dir).read_text()))
        metrics.get("evaluation", {}).pop("command", None)  # it contains paths
        flags = public_flags(read_flags(run_dir))
        for entries in (metrics, metrics.get("evaluation", {})):
            if "dataset" in entries:
                entries["dataset"] = public_dataset(entries["dataset"])
    except (OSError, ValueError, AttributeError, TypeError, RecursionError, yaml.YAMLError) as error:  # damaged
        raise InputError(f"{run_dir} is not a finished run of flower_ldm: {one_line(error)}") from error
    files[METRICS_FILE.name] = (json.dumps(metrics, indent=2) + "\n").encode()
    files[ARGS_FILE.name] = yaml.safe_dump(flags, sort_keys=True).encode()
    return allowed, files


def own_files(run_dir: Path, allowed: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """The run's files that match the patterns, as (name, path). Each is a regular file inside the run's folder.

    Raises:
        InputError: a symbolic link leads to a file that isn't public, or a name belongs to a pipe, a device or the
            like. Skipping it silently would delete from the Hub what an earlier push uploaded.
    """
    root = Path(os.path.realpath(run_dir))
    folders = {os.path.dirname(pattern) for pattern in allowed} - {""}
    for path in sorted(run_dir.rglob("*")):
        name = path.relative_to(run_dir).as_posix()
        target = Path(os.path.realpath(path))
        if name in folders and target != root / name:
            raise InputError(
                f"{path} is a symbolic link, and a push doesn't follow links: put the folder itself there"
            )
        if not fits(name, allowed):
            continue
        inside = target.is_relative_to(root) and fits(target.relative_to(root).as_posix(), allowed)
        if not (inside and target.is_file()):
            problem = "a symbolic link to a file that isn't public" if path.is_symlink() else "not a regular file"
            raise InputError(f"{path} is {problem}, so it can't be uploaded: replace it by a copy, or remove it")
        yield name, target


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m flower_ldm.hub", description="Push a finished run to the Hugging Face Hub.")
    parser.add_argument("run_dir", type=file_path, help="folder that a training script wrote")
    parser.add_argument("--hub_model_id", help="user/name, or a name in your own namespace; unset: the folder's name")
    parser.add_argument(
        "--hub_private_repo",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="create it as a private repository",
    )
    args = parser.parse_args(argv)
    repo_id = args.hub_model_id or args.run_dir.resolve().name
    check_upload(repo_id)
    print(push_run(args.run_dir, repo_id, args.hub_private_repo))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
