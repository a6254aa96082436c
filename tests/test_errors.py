"""One clear line, and a command that goes on where nobody is there to read."""

import os
import pty
import sys
from collections.abc import Callable

import pytest
from tqdm import tqdm

from flower_ldm.errors import InputError, Mouthpiece, exit_on_input_error


def pipe_without_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def terminal_that_is_gone():
    master, slave = pty.openpty()
    stream = open(slave, "w")  # noqa: SIM115
    os.close(master)
    return stream


def closed_file():
    stream = open(os.devnull, "w")  # noqa: SIM115
    stream.close()
    return stream


DEAF = {
    "pipe": pipe_without_reader,
    "terminal": terminal_that_is_gone,
    "full disk": lambda: open("/dev/full", "w"),  # noqa: SIM115
    "closed": closed_file,
    "none": lambda: None,
}
TEXT = "words " * 10_000  # more than a buffer takes


@pytest.mark.parametrize("make", DEAF.values(), ids=DEAF)
def test_what_is_said_to_nobody_ends_nothing(make: Callable, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, make())
    with exit_on_input_error():
        for _ in range(2):
            print(TEXT)
            print(TEXT, file=sys.stderr, flush=True)
        for _ in tqdm(range(3), miniters=1, mininterval=0):
            sys.stdout.flush()
    with pytest.raises(SystemExit) as end, exit_on_input_error():
        raise InputError("--seed must be at least 0")
    assert end.value.code == 2


@pytest.mark.parametrize("make", [pipe_without_reader, terminal_that_is_gone])
def test_without_it_the_same_would_end_the_command(make):
    stream = make()
    with pytest.raises(OSError, match="Broken pipe|Input/output error"):
        print(TEXT, file=stream, flush=True)
    Mouthpiece(stream).flush()  # what is left in its buffer


def test_what_is_said_to_somebody_arrives(monkeypatch):
    reader, writer = os.pipe()
    with open(writer, "w") as stream, open(reader) as heard:
        monkeypatch.setattr(sys, "stdout", stream)
        with exit_on_input_error():
            print("one", flush=True)
            assert heard.readline() == "one\n"
            print("two")
        assert heard.readline() == "two\n"
        assert sys.stdout.fileno() == stream.fileno()
