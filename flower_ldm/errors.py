"""Errors of the user: `InputError`, one clear line that is raised everywhere, and the exit code it becomes."""

import argparse
import errno
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

# Characters that control a terminal, break a line or change the direction of reading, and halves of characters.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What torch, numpy, diffusers and datasets write where they advise to run the code in a file. We never advise that.
UNSAFE_ADVICE = re.compile(
    r"weights_only|safe_globals|allow_pickle|trust_remote_code|arbitrary code|\btrust(ed)? (the|this|it\b|source)",
    re.IGNORECASE,
)
PATH = re.compile(r"""(['"])[^'"]*/[^'"]*\1|\S*/\S*""")  # in a sentence; words in a path are no advice
LONGEST_LINE = 1000  # characters; of a longer message the middle is left out


class InputError(ValueError):
    """Bad input. The message is one line that names the flag, file or label, and says what would be right."""

    def __init__(self, message: str):
        line = printable(message)
        if len(line) > LONGEST_LINE:
            line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 3 :]}"
        super().__init__(line)


def printable(text: object) -> str:
    """Text from outside, such as a name, made safe for a terminal. Control characters become visible escapes.

    An escape code becomes `\\x1b`, a new line `\\n`.
    """
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], str(text))


def one_line(error: BaseException, width: int | None = None) -> str:
    """An error's message, on one line of at most `width` characters; the name of its class where there is no message.

    Sentences of libraries that advise to run the code in a file are left out.
    """
    sentences = re.split(r"(?<=[.!?])\s+|\n+", str(error))
    safe = [sentence for sentence in sentences if not UNSAFE_ADVICE.search(PATH.sub("", sentence))]
    line = " ".join(" ".join(safe).split())
    line = printable(line or type(error).__name__)
    return textwrap.shorten(line, width, placeholder=" ...") if width else line


@contextmanager
def refusals_of_input() -> Iterator[None]:
    """Around the call of a pipeline: its `ValueError`s name a wrong argument, and become `InputError`s."""
    try:
        yield
    except ValueError as error:
        raise InputError(one_line(error)) from error


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises `InputError`. Flags can't be abbreviated."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str) -> None:
        raise InputError(message)


class BestEffortStream:
    """Standard output or error that never fails, so that printing can't end a long run.

    Where the terminal is gone, a pipe has no reader or the disk of a log file is full, the text is lost.
    """

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115  (`None`: it was closed before the start)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, call: Callable[..., object], *arguments: str) -> None:
        try:
            call(*arguments)
        except (OSError, ValueError) as error:  # a closed file raises ValueError
            if getattr(error, "errno", None) in (errno.EPIPE, errno.EIO):  # nobody will ever read it
                with suppress(OSError), open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), self.stream.fileno())


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Around a command's `main`: print an `InputError` as one line on standard error, and exit with code 2.

    Any other exception keeps its traceback, since it is a defect of ours. The command goes on to its end where its
    terminal or pipe is gone.
    """
    sys.stdout, sys.stderr = BestEffortStream(sys.stdout), BestEffortStream(sys.stderr)
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        sys.stdout.flush()
