"""What a user can get wrong: `InputError`, raised everywhere with one clear line, and the exit code it becomes."""

import argparse
import errno
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

# What steers a terminal, breaks a line, turns the direction of reading, or is half a character.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# In sentences of torch, numpy, diffusers and datasets that say how to run the code in a file: never our advice.
UNSAFE_ADVICE = re.compile(
    r"weights_only|safe_globals|allow_pickle|trust_remote_code|arbitrary code|\btrust(ed)? (the|this|it\b|source)",
    re.IGNORECASE,
)
PATH = re.compile(r"""(['"])[^'"]*/[^'"]*\1|\S*/\S*""")  # in a sentence; its words advise nothing
LONGEST_LINE = 1000  # of a name that fills screens, beginning and end say enough


class InputError(ValueError):
    """Bad input from outside. Its message is one line: the flag, file or label, and what would be right."""

    def __init__(self, message: str):
        line = printable(message)
        if len(line) > LONGEST_LINE:
            line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 3 :]}"
        super().__init__(line)


def printable(text: object) -> str:
    """Text of others, such as a name or a message, as a terminal may show it: what it mustn't is written as an escape.

    An escape code comes out as `\\x1b`, a new line as `\\n`.
    """
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], str(text))


def one_line(error: BaseException, width: int | None = None) -> str:
    """What an error says, on one line of at most `width` characters; its kind where it says nothing.

    Advice of libraries to run the code in a file is left out.
    """
    sentences = re.split(r"(?<=[.!?])\s+|\n+", str(error))
    line = " ".join(" ".join(one for one in sentences if not UNSAFE_ADVICE.search(PATH.sub("", one))).split())
    line = printable(line or type(error).__name__)
    return textwrap.shorten(line, width, placeholder=" ...") if width else line


@contextmanager
def refusals_of_input() -> Iterator[None]:
    """Around a pipeline at work: its `ValueError`s, which name a wrong argument, become `InputError`s."""
    try:
        yield
    except ValueError as error:
        raise InputError(one_line(error)) from error


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, and whose flags can't be abbreviated."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str) -> None:
        raise InputError(message)


class Mouthpiece:
    """Standard output or error for a process that has more to do than to print: nobody need be there to read it.

    Where a terminal is gone, a pipe has no reader or the disk that a log goes to is full, what is said gets lost.
    """

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115  (none where it was closed before the start)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, call: Callable, *words: str) -> None:
        try:
            call(*words)
        except (OSError, ValueError) as error:  # as of a closed file
            if getattr(error, "errno", None) in (errno.EPIPE, errno.EIO):  # nobody will ever read on
                with suppress(OSError), open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), self.stream.fileno())


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Around a command's `main`: print an `InputError` as one line on standard error and exit with code 2.

    Any other exception keeps its traceback: it is a defect of ours, not of the input. A command whose terminal or
    pipe is gone does its work to the end.
    """
    sys.stdout, sys.stderr = Mouthpiece(sys.stdout), Mouthpiece(sys.stderr)
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        sys.stdout.flush()
