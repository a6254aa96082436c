"""Files that are whole or not there; paths as flags give them, and what they are good for."""

import argparse
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .errors import InputError


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

    Args:
        write: writes the file at the path that it is given.

    Raises:
        OSError, and whatever `write` raises: where that can't be done; nothing unfinished is left.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        with suppress(OSError):
            unfinished.unlink()


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
    return path


def file_path(text: str) -> Path:
    """The same as a `Path`."""
    return Path(path_text(text))


def whole_path(name: str | None) -> str | None:
    """What names a folder or else an id on the Hub, unmistakable from elsewhere too: a folder by its whole path."""
    return os.path.abspath(name) if name and "/" in name and os.path.isdir(name) else name
