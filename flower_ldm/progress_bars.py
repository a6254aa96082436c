"""Progress bars: redrawn in place on a terminal, a line every few seconds in a log file."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

LOG_INTERVAL = 10.0  # seconds between two lines of a bar in a log file


class LogLines:
    """Standard error, on which every state of a bar becomes a line of its own.

    tqdm moves the cursor back by a carriage return and pads with blanks, which makes a log file hard to read.
    """

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return False


def progress_bar(iterable: Iterable | None = None, **options: object) -> tqdm:
    """tqdm's bar, with its options, on standard error."""
    return tqdm(iterable, **bar_options(**options))


def bar_options(**options: object) -> dict[str, object]:
    """Options for tqdm that suit standard error; `pipe.set_progress_bar_config` of diffusers takes them too.

    On a terminal they stay as they are. Elsewhere a bar writes its first line, its last, and one every `LOG_INTERVAL`
    seconds between them. A bar with `leave=False` is only a part of something longer: it writes nothing in its first
    `LOG_INTERVAL` seconds, and no last line.
    """
    if is_terminal():
        return options
    delay = options.get("delay", 0.0) if options.get("leave", True) else LOG_INTERVAL
    # At a fixed position tqdm never moves the cursor, even for a bar within another one.
    lines = {"file": LogLines(), "mininterval": LOG_INTERVAL, "miniters": 1, "delay": delay, "position": 0}
    return options | lines


def is_terminal() -> bool:
    """Whether a person watches standard error."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, OSError, ValueError):  # there is none, or it is closed
        return False


def write_line(text: str) -> None:
    """Write one line on standard error. A bar that is on the terminal moves down."""
    tqdm.write(text, file=sys.stderr)
