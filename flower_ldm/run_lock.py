"""One run at a time in a folder: a lock that ends with the run, or with its process, however that ends."""

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
    """Around a run: release the locks that it takes, so that the same process can start another run there."""
    before = set(HELD)
    try:
        yield
    finally:
        for path in HELD.keys() - before:
            os.close(HELD.pop(path))


def lock_folder(folder: Path) -> None:
    """Keep other processes' runs out of a folder, until `locks_released` or this process ends. The file stays, empty.

    It is a record lock, which the data loader's workers don't inherit: they may outlive a killed run by seconds.

    Raises:
        InputError: another run is at work there, or something else has the lock file's name.
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
        raise InputError(f"--output_dir {folder}: its {LOCK} is no file; remove it")
    HELD[path] = handle
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system, or a system, without locks
            print(f"{folder} can't be locked ({one_line(error)}): start no second run there while this one is at work")
            return
        os.close(HELD.pop(path))
        raise InputError(
            f"--output_dir {folder}: another run is at work there; wait for its end, or name another folder"
        ) from None
