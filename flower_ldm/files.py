"""Files that are written whole or not at all, disk errors in one line, paths from flags, YAML, and tensor files."""

import argparse
import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import InputError, one_line

# Error numbers of the system, grouped by what the user can do about them.
FULL = {errno.ENOSPC: "no space is left on the device", errno.EDQUOT: "the quota of this user is used up"}
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
CANT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF, errno.EISDIR, errno.ENOSYS, errno.EPERM)


class DiskError(InputError):
    """A file couldn't be written. The message names the file, the reason, and the next step."""

    def __init__(self, what: str | Path, why: str, next_step: str) -> None:
        super().__init__(f"{what} can't be written: {why}, then {next_step}")
        self.what, self.why = what, why


@contextmanager
def refusals_of_disk(target: str | Path, next_step: str = "run the command again") -> Iterator[None]:
    """Turn errors of writing inside this context into one line: what couldn't be written, why, and what to do.

    When two are nested, the inner one names the file, and the outer one the next step.

    Args:
        next_step: what to do once the disk accepts files again, and what is safe. It completes the sentence
            "..., then".

    Raises:
        DiskError: the system, safetensors or `torch.save` couldn't write a file.
    """
    try:
        yield
    except DiskError as error:
        raise DiskError(error.what, error.why, next_step) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_torn_archive(error):
            raise
        raise DiskError(target, why_refused(error), next_step) from error


def is_torn_archive(error: RuntimeError) -> bool:
    """Whether `torch.save` couldn't write. Its message names its own source code and not the system's error."""
    return any(text in str(error) for text in ("inline_container.cc", "PytorchStreamWriter", "Parent directory"))


def why_refused(error: BaseException) -> str:
    """The reason why a file couldn't be written, and what would help."""
    number = system_error(error)
    if number in FULL or (number is None and is_torn_archive(error)):
        return f"{FULL.get(number, 'torch stopped early: no space is left, or the folder is gone')}; make room"
    if number in FORBIDDEN:
        return f"{os.strerror(number)}; allow writing there"
    if number in IN_THE_WAY:
        return f"{os.strerror(number)}; take away what is in its place"
    return f"{os.strerror(number) if number else one_line(error, 200)}; check the disk"


def system_error(error: BaseException | None) -> int | None:
    """The system's error number behind an error. safetensors has it in its text, torch in the error before it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None


# --- whole files -----------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, from memory to the disk.

    Raises:
        OSError: the disk can't store it. A full disk may accept the write first and fail only here.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:  # some systems can't flush folders, or files that are open for reading
        if error.errno not in CANT_SYNC:
            raise


def is_regular(path: Path) -> bool:
    """Whether the path is a regular file. Reading a pipe or a device might never end; links don't count either."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def check_writable(folder: Path, flag: str) -> None:
    """Check that a folder can be created, or can be written to if it exists. Nothing is changed.

    Raises:
        InputError: it can't.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not nearest.is_dir():
        raise InputError(f"{flag} {folder}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {folder}: {nearest} is not writable; name another folder")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, then rename it. A reader sees the old file or the new one, whole.

    This holds after a power failure too: the file is flushed to the disk before it gets its name.

    Args:
        write: writes the file at the path that it gets. That path has another suffix than `path`.

    Raises:
        DiskError: the file can't be written; no temporary file is left.
        Exception: anything else that `write` raises.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with refusals_of_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(unfinished)
            sync(unfinished)
            os.replace(unfinished, path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            unfinished.unlink()


def replace_files(folder: Path, unfinished: Path, write: Callable[[Path], object], index: str | None = None) -> None:
    """Write several files into a temporary folder, then move them into their own. Until then, old files stay.

    Args:
        unfinished: the temporary folder, on the same disk. If a killed process left one, it is removed first.
        write: writes files, and folders of files, into the folder that it gets.
        index: the file without which the others can't be loaded. It is removed before the move and comes last, so
            a process that is killed in between never leaves a loadable mixture of old and new files.

    Raises:
        DiskError: the files can't be written; no temporary file is left.
        Exception: anything else that `write` raises.
    """
    with refusals_of_disk(folder):
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            write(unfinished)
            for path in unfinished.rglob("*"):
                sync(path)
            folder.mkdir(parents=True, exist_ok=True)
            if index is not None:
                (folder / index).unlink(missing_ok=True)
            for path in sorted(unfinished.iterdir(), key=lambda path: path.name == index):
                target = folder / path.name
                if path.is_dir() and target.is_dir() and not target.is_symlink():
                    shutil.rmtree(target)
                os.replace(path, target)
            sync(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


# --- paths -----------------------------------------------------------------------------------------------------------


def path_text(text: str) -> str:
    """Read a path, or a Hub id, from a flag or a recipe, and replace `~` by the home folder.

    It is the argparse type of every flag that is a path, because a shell doesn't expand the `~` of `--flag=~/x`.

    Raises:
        argparse.ArgumentTypeError: the text can't be a path.
    """
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path: name one, or leave the flag out")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text}: there is no such home folder; a file of this name is ./{text}")
    try:
        os.stat(path)
    except (OSError, ValueError) as error:  # a ValueError: for a character that no file name can have
        if system_error(error) not in NOT_THERE:
            reason = error.strerror if isinstance(error, OSError) else "no file can have such a name"
            raise argparse.ArgumentTypeError(f"{text:.100} can't be accessed: {reason}") from None
    return path


def file_path(text: str) -> Path:
    """As `path_text`, but a `Path`."""
    return Path(path_text(text))


def path_or_hub_id(text: str) -> str:
    """As `path_text`, for a flag that takes a folder or a Hub id.

    A folder becomes an absolute path: from another working directory, a relative one would look like a Hub id.
    """
    path = path_text(text)
    return os.path.abspath(path) if "/" in path and os.path.isdir(path) else path


def hub_id(name: object) -> str | None:
    """The name, if it is a Hub id; `None` for anything else, such as a folder on this machine."""
    is_id = isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
    return name if is_id and not os.path.exists(name) else None


def without_paths(value: Any) -> Any:
    """Copy nested lists and dicts, and shorten every text that is a path on this machine to its last part."""
    if isinstance(value, dict):
        return {name: without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    if isinstance(value, str) and "/" in value and (re.match(r"(--\w+=)?[/~]", value) or os.path.exists(value)):
        return Path(value).name
    return value


def file_safe_name(name: str) -> str:
    """A class name made fit for a file name, at most 80 bytes long, since file systems limit bytes.

    Examples: "bishop of llandaff" -> "bishop_of_llandaff", "hippeastrum " -> "hippeastrum"; "globe-flower" stays.
    """
    stem = re.sub(r"[^\w-]+", "_", name).encode()[:80].decode(errors="ignore")
    return stem.strip("_") or "class"


def fresh_folder(folder: Path) -> Path:
    """Create `folder`. If it holds something already, create `folder-2`, `folder-3` ... instead."""
    folder = folder.resolve()  # so that "." has a name that a number can follow
    candidate, number = folder, 1
    while candidate.exists() and not (candidate.is_dir() and not any(candidate.iterdir())):
        number += 1
        candidate = folder.parent / f"{folder.name}-{number}"
    check_writable(candidate, "--output")
    try:
        candidate.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder} can't be created: {error.strerror}") from error
    return candidate


# --- YAML ------------------------------------------------------------------------------------------------------------


class _Shallow:
    """Refuses more than 100 nested brackets. PyYAML needs quadratic time for them: minutes for 100 kB."""

    def fetch_flow_collection_start(self, token: type) -> None:
        if self.flow_level >= 100:
            raise yaml.YAMLError("it is nested too deeply")
        super().fetch_flow_collection_start(token)


class ValueLoader(_Shallow, yaml.SafeLoader):
    """Gives every value the type that YAML gives it."""


class SpellingLoader(_Shallow, yaml.BaseLoader):
    """Gives every value as text, exactly as it is written."""


def parse_yaml(text: str | bytes, parse: Callable = yaml.load, loader: type = ValueLoader) -> Any:
    """Parse YAML.

    Raises:
        yaml.YAMLError, ValueError: the text isn't YAML, is nested too deeply, or has an impossible date or number.
    """
    try:
        return parse(text, loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except TypeError as error:  # a key that is a list
        raise yaml.YAMLError(one_line(error)) from None


# --- tensors ---------------------------------------------------------------------------------------------------------


# The `next_step` for features and generated images, which the evaluation caches.
CACHE_REFUSED = "run the command again, or name another --cache_dir; files in it are reused"


class UnusableCacheError(Exception):
    """A cache file must not be used. The message completes the sentence "<file> ..."."""


def read_tensors(path: Path, key: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors and the metadata that `write_tensors` wrote with this key.

    Raises:
        UnusableCacheError: the file has another key, is incomplete or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                raise UnusableCacheError("belongs to another model, other images or another size")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise UnusableCacheError(f"can't be read ({one_line(error)})") from error
    if metadata.get("digest") != tensors_digest(tensors):
        raise UnusableCacheError("is damaged")
    return tensors, metadata


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    key: str,
    next_step: str = "run the command again",
    **metadata: str,
) -> None:
    """Write a safetensors file with its key and digest, whole or not at all.

    Args:
        key: identifies what the tensors were computed from. `read_tensors` refuses the file for any other key.
        next_step: see `refusals_of_disk`.
        metadata: anything else that a reader needs to know.

    Raises:
        DiskError: the file can't be written.
    """
    header = {"key": key, "digest": tensors_digest(tensors), **metadata}
    with refusals_of_disk(path, next_step):
        write_whole(path, lambda unfinished: save_file(dict(tensors), unfinished, metadata=header))


def tensors_digest(tensors: Mapping[str, torch.Tensor], text: str = "") -> str:
    """SHA-256 (hex) of a text and of tensors, with their names, types and shapes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
