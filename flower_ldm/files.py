"""Files that are whole or not there: `write_whole`, for caches, metrics, pages and cards; and `whole_path`.

Its neighbours: `latent_cache`, `features`, `evaluation`, `report` and `model_card` write through it.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


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


def whole_path(name: str | None) -> str | None:
    """What names a folder or else an id on the Hub, unmistakable from elsewhere too: a folder by its whole path."""
    return os.path.abspath(name) if name and "/" in name and os.path.isdir(name) else name
