"""flower_ldm/errors.py: what others say and how they call things, on one line that a terminal only shows."""

import io
import pickle

import numpy as np
import pytest
import torch

from flower_ldm.errors import InputError, exit_on_input_error, one_line, printable


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


def test_a_path_that_speaks_of_trust_stays():
    assert "/data/trust/roses.png" in one_line(FileNotFoundError(2, "No such file", "/data/trust/roses.png"))


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
