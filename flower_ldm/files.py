"""Whole files, what a disk refuses said in one line, paths as flags give them, YAML, and tensors in files."""

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

# What a disk may refuse, and what helps.
FULL = {errno.ENOSPC: "no space is left on the device", errno.EDQUOT: "the quota of this user is used up"}
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
CANT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF, errno.EISDIR, errno.ENOSYS, errno.EPERM)


class DiskError(InputError):
    """What couldn't be written and why, and as the end of the line, how to go on."""

    def __init__(self, what: str | Path, why: str, way_out: str):
        super().__init__(f"{what} can't be written: {why}, then {way_out}")
        self.what, self.why = what, why


@contextmanager
def refusals_of_disk(what: str | Path, way_out: str = "run the command again") -> Iterator[None]:
    """Around writing: what the disk refuses becomes one line that says what couldn't be written, why, what to do.

    Where one is within another, the inner one says what, and the outer one how to go on.

    Args:
        way_out: how to go on once the disk takes files again, and what is safe; ends the sentence "..., then".

    Raises:
        DiskError: for what the system, safetensors and `torch.save` raise where a file can't be written.
    """
    try:
        yield
    except DiskError as error:
        raise DiskError(error.what, error.why, way_out) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_torn_archive(error):
            raise
        raise DiskError(what, why_refused(error), way_out) from error


def is_torn_archive(error: RuntimeError) -> bool:
    """Whether `torch.save` couldn't write: it names the place in its own source code, not what the system said."""
    return any(words in str(error) for words in ("inline_container.cc", "PytorchStreamWriter", "Parent directory"))


def why_refused(error: BaseException) -> str:
    """Why something couldn't be written, and what would help."""
    number = system_error(error)
    if number in FULL or (number is None and is_torn_archive(error)):
        return f"{FULL.get(number, 'torch ended early, for want of space or of the folder')}; make room"
    if number in FORBIDDEN:
        return f"{os.strerror(number)}; allow writing there"
    if number in IN_THE_WAY:
        return f"{os.strerror(number)}; take away what is in its place"
    return f"{os.strerror(number) if number else one_line(error, 200)}; see that the disk is well"


def system_error(error: BaseException | None) -> int | None:
    """The system's number behind an error; safetensors gives it in words, torch has it as the error before."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None


# --- whole files -----------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Have what a file holds, or which names a folder holds, on the disk and not only in memory.

    Raises:
        OSError: where the disk can't take it, such as a full one that accepted the writing first.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:  # some systems can't do that with folders, or with files that are open for reading
        if error.errno not in CANT_SYNC:
            raise


def is_regular(path: Path) -> bool:
    """Whether there is a file: no folder, link, pipe or device, whose reading may never end."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def check_writable(folder: Path, flag: str) -> None:
    """Look whether a folder can be made, or written to where it is there, and change nothing.

    Raises:
        InputError: where it can't.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not nearest.is_dir():
        raise InputError(f"{flag} {folder}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {folder}: nothing may be written to {nearest}; name another folder")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside its place, then move it there: a reader sees the old one or the new one.

    So does who looks after a power failure: the file is on the disk before it gets its name.

    Args:
        write: writes the file at the path that it is given, whose name doesn't end as that of `path` does.

    Raises:
        DiskError: where that can't be done; nothing unfinished is left.
        Exception: whatever else `write` raises.
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
    """Have several files written elsewhere, then move them into a folder; until then all that is there stays.

    Args:
        unfinished: a folder on the same disk, made for this; what a killed process left there is removed.
        write: writes files, and folders of files, into the folder that it is given.
        index: the file that says that the others belong together; gone while they are moved, so that a process that
            is killed just then leaves nothing that can be loaded, rather than files of two kinds.

    Raises:
        DiskError: where that can't be done; nothing unfinished is left.
        Exception: whatever else `write` raises.
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
    """A path, or an id on the Hub, as a flag or a recipe gives it: with the home folder in place of `~`.

    The type of every flag that is a path, since a shell leaves the `~` of `--flag=~/x` as it is.

    Raises:
        argparse.ArgumentTypeError: where no path can be meant.
    """
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path: name one, or leave the flag out")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text}: there is no such home folder; a file of this name is ./{text}")
    try:
        os.stat(path)
    except (OSError, ValueError) as error:  # a ValueError: of a letter that no file's name can have
        if system_error(error) not in NOT_THERE:
            why = error.strerror if isinstance(error, OSError) else "no file can have such a name"
            raise argparse.ArgumentTypeError(f"{text:.100} can't be looked at: {why}") from None
    return path


def file_path(text: str) -> Path:
    """The same as a `Path`."""
    return Path(path_text(text))


def path_or_hub_id(text: str) -> str:
    """The same for a flag that takes a folder or an id on the Hub.

    A folder comes out as its whole path: seen from elsewhere, a relative one would look like an id.
    """
    path = path_text(text)
    return os.path.abspath(path) if "/" in path and os.path.isdir(path) else path


def hub_id(name: object) -> str | None:
    """The name where it is an id on the Hub; `None` where it is anything else, a folder on this machine among it."""
    is_id = isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
    return name if is_id and not os.path.exists(name) else None


def without_paths(value: Any) -> Any:
    """Nested lists and dicts with each text that is a path on this machine cut down to its last part."""
    if isinstance(value, dict):
        return {name: without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    if isinstance(value, str) and "/" in value and (re.match(r"(--\w+=)?[/~]", value) or os.path.exists(value)):
        return Path(value).name
    return value


def file_safe_name(name: str) -> str:
    """A class name as part of a file's name: "bishop of llandaff" -> "bishop_of_llandaff", "hippeastrum " without its
    blank, "globe-flower" as it is. At most 80 bytes, for file systems count those.
    """
    stem = re.sub(r"[^\w-]+", "_", name).encode()[:80].decode(errors="ignore")
    return stem.strip("_") or "class"


def fresh_folder(folder: Path) -> Path:
    """Make `folder`, or `folder-2`, `folder-3` ... where there is something already: what is there stays as it was."""
    folder = folder.resolve()  # "." gets a name to number
    candidate, number = folder, 1
    while candidate.exists() and not (candidate.is_dir() and not any(candidate.iterdir())):
        number += 1
        candidate = folder.parent / f"{folder.name}-{number}"
    check_writable(candidate, "--output")
    try:
        candidate.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder} can't be made: {error.strerror}") from error
    return candidate


# --- YAML ------------------------------------------------------------------------------------------------------------


class _Shallow:
    """Ends at a hundred brackets in brackets: PyYAML's time grows with their square, 100 kB of them take minutes."""

    def fetch_flow_collection_start(self, token: type) -> None:
        if self.flow_level >= 100:
            raise yaml.YAMLError("it is nested too deep")
        super().fetch_flow_collection_start(token)


class ValueLoader(_Shallow, yaml.SafeLoader):
    """Values by YAML's types."""


class SpellingLoader(_Shallow, yaml.BaseLoader):
    """Every value as the text that is written there."""


def parse_yaml(text: str | bytes, parse: Callable = yaml.load, loader: type = ValueLoader) -> Any:
    """What YAML says.

    Raises:
        yaml.YAMLError, ValueError: where it is none, is nested too deep, or holds a date or number that can't be.
    """
    try:
        return parse(text, loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None
    except TypeError as error:  # a key that is a list
        raise yaml.YAMLError(one_line(error)) from None


# --- tensors ---------------------------------------------------------------------------------------------------------


# Said of features and drawn images, which evaluation keeps.
CACHE_REFUSED = "run the command again, or name another --cache_dir; what is kept there is used"


class UnusableCacheError(Exception):
    """Why a cache file must not be used; its message continues the sentence "<file> ..."."""


def read_tensors(path: Path, key: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What `write_tensors` wrote under this key: the tensors, and what else was said about them.

    Raises:
        UnusableCacheError: another key, a torn or damaged file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                raise UnusableCacheError("belongs to another model, other images or another size")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dictionary)
    except (SafetensorError, OSError) as error:
        raise UnusableCacheError(f"can't be read ({one_line(error)})") from error
    if metadata.get("digest") != tensors_digest(tensors):
        raise UnusableCacheError("is damaged")
    return tensors, metadata


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], key: str, way_out: str = "run the command again", **metadata: str
) -> None:
    """Write a safetensors file with its key and digest, whole or not at all.

    Args:
        key: what the tensors were made from; `read_tensors` refuses the file under any other key.
        way_out: see `refusals_of_disk`.
        metadata: what else a reader needs to know.

    Raises:
        DiskError: where that can't be done.
    """
    about = {"key": key, "digest": tensors_digest(tensors), **metadata}
    with refusals_of_disk(path, way_out):
        write_whole(path, lambda unfinished: save_file(dict(tensors), unfinished, metadata=about))


def tensors_digest(tensors: Mapping[str, torch.Tensor], text: str = "") -> str:
    """SHA-256 of a text and of tensors with their names, types and shapes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
