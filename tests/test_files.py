"""What a disk refuses is one line, and a file is whole or not there."""

import argparse
import errno
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import flower_ldm
from flower_ldm.errors import InputError
from flower_ldm.files import DiskError, parse_yaml, path_text, refusals_of_disk, sync, write_whole


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "no space is left on the device; make room"),
        (errno.EDQUOT, "the quota of this user is used up; make room"),
        (errno.EACCES, "Permission denied; allow writing there"),
        (errno.EROFS, "Read-only file system; allow writing there"),
        (errno.EEXIST, "File exists; take away what is in its place"),
        (errno.EIO, "Input/output error; check the disk"),
    ],
)
def test_a_refusal_says_what_why_and_how_to_go_on(number, said):
    with pytest.raises(InputError) as caught, refusals_of_disk("checkpoint-4", "go on"):
        raise OSError(number, os.strerror(number), "file")
    assert str(caught.value) == f"checkpoint-4 can't be written: {said}, then go on"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
@pytest.mark.parametrize("open_first", [True, False])
def test_torch_on_a_full_device(open_first):
    """It raises a `RuntimeError` about its own source code."""
    with pytest.raises(InputError, match="^weights can't be written: .*space.*; make room, then go on$"):  # noqa: SIM117
        with refusals_of_disk("weights", "go on"):
            if open_first:
                with open("/dev/full", "wb") as file:
                    torch.save(torch.zeros(100_000), file)
            torch.save(torch.zeros(100_000), "/dev/full")


def test_safetensors_where_there_is_no_folder(tmp_path):
    with pytest.raises(InputError, match="^weights can't be written: No such file or directory; "):  # noqa: SIM117
        with refusals_of_disk("weights", "go on"):
            save_file({"a": torch.zeros(2)}, tmp_path / "nowhere" / "weights.safetensors")


def test_a_mistake_of_ours_is_no_refusal_of_the_disk():
    with pytest.raises(RuntimeError, match="size"), refusals_of_disk("weights", "go on"):
        torch.zeros(2) @ torch.zeros(3)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch, call):
    path = tmp_path / "metrics.json"
    write_whole(path, lambda unfinished: unfinished.write_text("old"))

    def refuse(*_):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(
            DiskError, match="^.*metrics.json can't be written: no space is left on the device; make room"
        ):
            write_whole(path, lambda unfinished: unfinished.write_text("new"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "nothing unfinished is left"


def test_what_a_disk_owes_shows_when_it_is_asked_for(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(error, "fsync")

    sync(tmp_path)
    monkeypatch.setattr(os, "fsync", fsync)
    error = errno.EINVAL  # as of folders that can't be asked
    sync(tmp_path)
    error = errno.EIO
    with pytest.raises(OSError, match="fsync"):
        sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync(Path("nowhere"))


@pytest.mark.parametrize(
    "text", ["[" * 500_000, "- " * 100_000, "{a: " * 5000, "? [a]\n: 1", "? {a: 1}\n: 1", "&a [*a", "@"]
)
def test_yaml_that_is_none_is_one_error(text):
    """Over the first PyYAML itself takes hours; the next ones end in a `RecursionError`."""
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


def test_yaml_is_read_in_one_place_only():
    package = Path(flower_ldm.__file__).parent
    assert [path.name for path in package.rglob("*.py") if "yaml.safe_load" in path.read_text("utf-8")] == []


@pytest.mark.parametrize(("path", "why"), [("x" * 5000, "too long"), ("\ud800", "no file can have such a name")])
def test_a_path_that_cannot_be_looked_at_is_one_line(path, why):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^.{{1,100}} can't be accessed: .*{why}"):
        path_text(path)


def test_a_path_may_lead_nowhere_yet_but_not_where_one_may_not_look(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "new" / "run", tmp_path / "file" / "run", tmp_path / "loop"):
        assert path_text(str(path)) == str(path)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", refuse)  # root may look anywhere
        with pytest.raises(argparse.ArgumentTypeError, match="/closed/x can't be accessed: Permission denied"):
            path_text("/closed/x")
