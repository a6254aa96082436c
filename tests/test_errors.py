"""What others say, on one line that a terminal only shows; and a command that goes on where nobody reads."""

import io
import os
import pickle
import pty
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tqdm import tqdm

from flower_ldm.errors import BestEffortStream, InputError, exit_on_input_error, one_line, printable


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
    BestEffortStream(stream).flush()  # what is left in its buffer


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


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return print, ("I am code",)


def refused_by_torch() -> BaseException:
    file = io.BytesIO()
    torch.save(Code(), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(file, weights_only=True)
    return caught.value


def refused_by_numpy() -> BaseException:
    file = io.BytesIO()
    np.save(file, np.array([Code()], dtype=object), allow_pickle=True)
    file.seek(0)
    with pytest.raises(ValueError, match="allow_pickle") as caught:
        np.load(file)
    return caught.value


@pytest.mark.parametrize("refused", [refused_by_torch, refused_by_numpy])
def test_advice_to_run_a_files_code_is_left_out(refused):
    line = one_line(refused())
    assert line and not any(word in line for word in ("trust", "weights_only", "allow_pickle", "arbitrary", "\x1b"))
    if refused is refused_by_torch:
        assert "Unsupported global: GLOBAL print" in line


def test_of_diffusers_advice_what_is_wrong_stays():
    """As `diffusers.utils.dynamic_modules_utils` words it."""
    said = ValueError(
        "The repository for user/x contains custom code in pipe.py which must be executed to correctly load the model."
        " You can inspect the repository content at https://hf.co/user/x/blob/main/pipe.py.\nPlease pass the argument"
        " `trust_remote_code=True` to allow custom code to be run."
    )
    line = one_line(said)
    assert "contains custom code in pipe.py" in line and "trust_remote_code" not in line


@pytest.mark.parametrize("path", ["/data/trust/roses.png", "/data/weights_only/roses.png", "we trust this/roses.png"])
def test_a_path_that_speaks_of_trust_stays(path):
    assert path in one_line(FileNotFoundError(2, "No such file", path))


def test_of_a_line_that_fills_screens_both_ends_are_said():
    line = str(InputError(f"--classes {'x' * 5000} is no class"))
    assert (
        len(line) < 1000 and line.startswith("--classes xxx") and line.endswith("xxx is no class") and " ... " in line
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("a\rb\nc\td", r"a\rb\nc\td"),
        ("photo\u202egnp.exe", r"photo\u202egnp.exe"),
        ("foto-\udce9.png", r"foto-\udce9.png"),
        ("\x9b2J\u2028\u2066", r"\x9b2J\u2028\u2066"),
        ("牡丹 Rose 🌹 \\x1b", "牡丹 Rose 🌹 \\x1b"),
    ],
)
def test_what_steers_a_terminal_is_escaped(text, shown, capsys):
    assert printable(text) == printable(shown) == shown
    with pytest.raises(SystemExit) as end, exit_on_input_error():
        raise InputError(f"--classes {text}")
    assert end.value.code == 2 and capsys.readouterr().err == f"error: --classes {shown}\n"
    assert pickle.loads(pickle.dumps(InputError(text))).args == (shown,)
    assert printable(one_line(RuntimeError(text))) == one_line(RuntimeError(text))
