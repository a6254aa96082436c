"""A lock that allows one run at a time in a folder. It ends with the run, or with the process in any case."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError, one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
HELD: dict[Path, int] = {}  # this process's open lock files, by path; closing one releases its lock


@contextmanager
def locks_released() -> Iterator[None]:
    """At the end of this context, release the locks taken within it. The process can then start another run there."""
    before = set(HELD)
    try:
        yield
    finally:
        for path in HELD.keys() - before:
            os.close(HELD.pop(path))


def lock_folder(folder: Path) -> None:
    """Keep runs of other processes out of a folder, until `locks_released` or this process ends.

    It is a record lock, so the data loader's workers, which may outlive a killed run by seconds, don't inherit it. The
    empty lock file stays in the folder.

    Raises:
        InputError: another run uses the folder, or the lock file's name belongs to something else.
    """
    path = folder.resolve() / LOCK
    if path in HELD and path.exists() and os.path.samestat(os.fstat(HELD[path]), path.stat()):
        return
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: its {LOCK} can't be opened ({one_line(error)})") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError(f"--output_dir {folder}: its {LOCK} is not a file; remove it")
    HELD[path] = handle
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # the system or the file system has no locks
            print(f"{folder} can't be locked ({one_line(error)}): start no second run there while this one runs")
            return
        os.close(HELD.pop(path))
        raise InputError(
            f"--output_dir {folder}: another run is at work there; wait for its end, or name another folder"
        ) from None
