"""What a user can get wrong: `InputError`, raised by every module with one clear line, and the exit code it becomes.

Its neighbours: raised by `data`, `latent_cache` and `training`; turned into exit code 2 by the scripts and the
`python -m flower_ldm.*` commands.
"""

import argparse
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input from outside. Its message is one line: the flag, file or label, and what would be right."""


def one_line(error: BaseException, width: int | None = None) -> str:
    """What an error says, on one line of at most `width` characters; its kind where it says nothing."""
    line = " ".join(str(error).split()) or type(error).__name__
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


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Around a command's `main`: print an `InputError` as one line on standard error and exit with code 2.

    Any other exception keeps its traceback: it is a defect of ours, not of the input.
    """
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
