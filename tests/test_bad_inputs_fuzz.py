"""Thousands of bad inputs, made by hypothesis, at every door that files and people come through: flags, recipes, model
configs, labels, arguments, images, folders, repositories, checkpoints, caches, logs, run folders, visitors.

Each input is accepted, and then it must be right, or refused in one line that names it. Anything else is a finding: a
traceback, an input accepted that shouldn't be, one refused that is fine, seconds of silence, a gigabyte of memory. A
kind of input is a class: what it makes (`cases`), what comes of it (`run`), what has to come of it (`run` again, by
assertions, and `expects`). The seed is fixed; `FLOWER_LDM_FUZZ_SEED` sets another.
"""

import copy
import faulthandler
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import unicodedata
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torchvision.models.vgg import cfgs, make_layers

import train_autoencoder
import train_latent_diffusion
from flower_ldm import (
    FlowerAutoencoderKL,
    FlowerLDMPipeline,
    FlowerUNet2DModel,
    checkpoint_files,
    checkpoints,
    hub,
    runs,
    sample,
    training,
)
from flower_ldm.autoencoder_losses import PerceptualLoss
from flower_ldm.data import DataOptions
from flower_ldm.errors import InputError, exit_on_input_error
from flower_ldm.features import FeatureNetwork, load_or_extract_features
from flower_ldm.latent_cache import load_or_build_latent_cache
from flower_ldm.model_card import write_model_card
from flower_ldm.report import write_report

SEED = int(os.environ.get("FLOWER_LDM_FUZZ_SEED", "10"))
SECONDS = 20  # for one input; the slowest takes a tenth of one on an idle core
MEMORY = 2**30  # bytes beyond what the process has
LONGEST_LINE = 2000

# --- what comes of one input -----------------------------------------------------------------------------------------


class TooLong(BaseException):
    """No `except Exception` on the way catches it."""


@contextmanager
def bounded() -> Iterator[None]:
    """Ends what takes too long, and has allocations fail that want too much."""

    def end(number, frame):
        raise TooLong(f"more than {SECONDS} s")

    before, limits = signal.signal(signal.SIGALRM, end), resource.getrlimit(resource.RLIMIT_DATA)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True)  # where no handler can run
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + MEMORY, limits[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_DATA, limits)


class Kind(ABC):
    """A kind of input. `short` and `long` are how many of it the two tests try."""

    name = ""
    short, long = 20, 500
    raises_value_errors = False  # else it is a command, which prints its refusals

    def __init__(self, folder: Path, runs):
        self.folder = folder
        self.runs = runs

    @abstractmethod
    def cases(self) -> st.SearchStrategy:
        """The inputs to be tried."""

    @abstractmethod
    def run(self, case: Any) -> str | None:
        """Bring the case in, and assert that what was accepted is right. Returns a line where that was a refusal."""

    def expects(self, case: Any) -> bool | None:
        """Whether the case is fine; None where both can be."""
        return None

    def named(self, case: Any) -> tuple[str, ...]:
        """What a refusal must hold one of; empty: anything."""
        return ()


@dataclass
class Tally:
    """How many of a kind came to what; of each finding the shortest input."""

    kind: str
    refused: int = 0
    accepted: int = 0
    findings: dict[str, tuple[str, str]] = field(default_factory=dict)
    other: int = 0
    slowest: float = 0.0

    @property
    def inputs(self) -> int:
        return self.refused + self.accepted + self.other

    def find(self, what: str, case: Any, detail: str) -> None:
        self.other += 1
        shown = repr(case)
        if what not in self.findings or len(shown) < len(self.findings[what][0]):
            self.findings[what] = shown, detail


def line_of(kind: Kind, case: Any) -> str | None:
    """What a user reads where the case is refused; None where it is accepted."""
    printed = io.StringIO()
    with bounded(), redirect_stderr(printed), redirect_stdout(io.StringIO()):
        try:
            with exit_on_input_error():
                return kind.run(case)
        except SystemExit as error:
            assert error.code == 2, f"exit code {error.code}"
            return printed.getvalue().partition("error: ")[2].removesuffix("\n")
        except ValueError as error:
            if kind.raises_value_errors and type(error) is ValueError:
                return str(error)
            raise


def judge(kind: Kind, case: Any, tally: Tally) -> None:
    started = time.perf_counter()
    try:
        line = line_of(kind, case)
    except (Exception, TooLong) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
        ours = [f for f in frames if "/tests/" not in f.filename] or frames
        where = f"{Path(ours[-1].filename).name}:{ours[-1].name}"
        said = str(error)[:300]
        what = f"{type(error).__name__} in {where}"
        if isinstance(error, AssertionError):
            what = f"wrong: {said.splitlines()[0] if said else where}"
        return tally.find(what, case, said)
    finally:
        tally.slowest = max(tally.slowest, time.perf_counter() - started)
    expected = kind.expects(case)
    if line is None:
        if expected is False:
            return tally.find("accepted what is wrong", case, "")
        tally.accepted += 1
        return
    problem = problem_of(line, kind.named(case))
    if problem:
        return tally.find(problem, case, line)
    if expected is True:
        return tally.find("refused what is fine", case, line)
    tally.refused += 1


def problem_of(line: str, names: tuple[str, ...]) -> str | None:
    """What is wrong with a refusal."""
    if not line.strip():
        return "a refusal that says nothing"
    if len(line.splitlines()) > 1 or re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", line):
        return "a refusal that isn't one plain line"
    if len(line) > LONGEST_LINE:
        return f"a refusal of more than {LONGEST_LINE} letters"
    if re.search(r"(?i)\ballocat|MemoryError|bad_alloc|Traceback|weights_only|most recent call", line):
        return "a refusal that shows the inside"
    if names and not any(name in line for name in names):
        return "a refusal that doesn't name its input"
    return None


def fuzz(kind: Kind, number: int) -> Tally:
    tally = Tally(kind.name)

    @seed(SEED)
    @settings(
        max_examples=number, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(kind.cases())
    def look(case):
        judge(kind, case, tally)

    look()
    return tally


# --- bad values, trees and bytes -------------------------------------------------------------------------------------

BAD_TEXTS = [
    "", " ", "\n", "a\nb", "\0", "a\0b", "\x1b[31mred", "\ud800", "\udce9", "\u202egnp.exe", "\u2028", "\ufeff", "²",
    "١٢", "1_000", " 5 ", "0x10", "1e400", "nan", "-inf", "NaN", "--seed", "-1", "@file", "None", "true", "yes", "~",
    "../../etc/passwd", "$HOME", "Ca$$h", "é", "e\u0301", "😀" * 50, "<script>alert(1)</script>", "`x`", "[a](b)",
    "{{7*7}}", "%s%n", "x" * 300, "x" * 100_000, "'", '"', "\\", "|", "#", ":", "001",
]  # fmt: skip
BAD_NUMBERS = [
    0, -1, 1, 2, 2**31, 2**63, 2**64, 10**30, -(10**40), 10**400, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf,
    -math.inf, True, False,
]  # fmt: skip


def nested(depth: int, leaf: Any = None, key: str | None = None) -> Any:
    for _ in range(depth):
        leaf = [leaf] if key is None else {key: leaf}
    return leaf


BAD_TREES = [None, [], {}, [[]], [None], [{}], {"": None}, {"a": {}}, nested(50), nested(50, 1, "a"), [0] * 2000]
bad_values = st.one_of(
    st.sampled_from(BAD_TEXTS),
    st.sampled_from(BAD_NUMBERS),
    st.sampled_from(BAD_TREES),
    st.text(max_size=12),
    st.integers(),
    st.floats(),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
)


def places(tree: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """Each container within a tree with each of its keys."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    found = [(tree, key) for key, _ in items]
    for _, inner in items[:40] if depth < 10 else []:
        found += places(inner, depth + 1)
    return found


@st.composite
def changed_trees(draw, trees: list) -> Any:
    """One of the trees with one to three of its values swapped, dropped, doubled, or under another name."""
    tree = copy.deepcopy(draw(st.sampled_from(trees)))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        found = places(tree)
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        change = draw(st.sampled_from(["value"] * 5 + ["number", "drop", "key", "wrap", "whole"]))
        if change == "value":
            container[key] = copy.deepcopy(draw(bad_values))  # the next change must not reach the shared ones
        elif change == "number":
            container[key] = draw(st.sampled_from(BAD_NUMBERS))
        elif change == "drop":
            del container[key]
        elif change == "key" and isinstance(container, dict):
            container[draw(st.sampled_from(BAD_TEXTS) | st.text(max_size=8))] = container.pop(key)
        elif change == "wrap":
            container[key] = draw(st.sampled_from([[container[key]], {"0": container[key]}, str(container[key])]))
        elif change == "whole" and draw(st.integers(0, 3)) == 0:
            tree = copy.deepcopy(draw(bad_values))
    return tree


@st.composite
def json_bytes(draw, trees: list) -> bytes:
    """A changed tree as the bytes of a JSON file; some of them torn, doubled, nested deep or in another encoding."""
    tree = draw(changed_trees(trees))
    text = json.dumps(tree, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 2])))
    content = text.encode("utf-8", "surrogatepass")
    damage = draw(st.sampled_from(["no"] * 18 + ["cut", "bytes", "double", "deep", "encoding", "digits"]))
    if damage == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    elif damage == "bytes":
        content = draw(changed_bytes([content]))
    elif damage == "double" and text.startswith("{") and len(text) > 2:
        content = (
            b'{"' + draw(st.sampled_from(list(tree) or ["a"])).encode("utf-8", "ignore") + b'": 1, ' + content[1:]
        )
    elif damage == "deep":
        content = b"[" * 100_000 if draw(st.booleans()) else b'{"a":' * 100_000
    elif damage == "encoding":
        content = draw(st.sampled_from([b"\xff\xfe", b"\xef\xbb\xbf", b"\x00"])) + content
    elif damage == "digits":
        content = content.replace(b"1", b"1" * 5000, 1)
    return content


EXTREMES = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**24, 2**31 - 1, 2**31, 2**32 - 1]


@st.composite
def changed_bytes(draw, contents: list[bytes]) -> bytes:
    """One of the contents, cut, or with bytes flipped, put in, taken out, or numbers in it made extreme."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.sampled_from([1, 1, 2, 4]))):
        # Heads are where lengths and types stand.
        start = draw(st.one_of(st.integers(0, min(64, len(content))), st.integers(0, len(content))))
        change = draw(st.sampled_from(["flip", "number", "cut", "insert", "delete", "repeat", "text"]))
        if change == "flip" and start < len(content):
            content[start] ^= draw(st.integers(1, 255))
        elif change == "number":
            size, order = draw(st.sampled_from([(2, "<"), (2, ">"), (4, "<"), (4, ">"), (8, "<")]))
            number = draw(st.sampled_from(EXTREMES)) % 2 ** (8 * size)
            content[start : start + size] = struct.pack(order + {2: "H", 4: "I", 8: "Q"}[size], number)
        elif change == "cut":
            del content[start:]
        elif change == "insert":
            content[start:start] = draw(st.binary(min_size=1, max_size=20))
        elif change == "delete":
            del content[start : start + draw(st.integers(1, 40))]
        elif change == "repeat":
            content[start:start] = content[start : start + 40] * draw(st.integers(1, 3))
        elif change == "text":
            content[start:start] = draw(st.sampled_from(BAD_TEXTS[:25])).encode("utf-8", "surrogatepass")
    return bytes(content)


@st.composite
def changed_safetensors(draw, content: bytes) -> bytes:
    """A safetensors file with another header, of the length that it says or not, or with other bytes."""
    if draw(st.integers(0, 2)) == 0:
        return draw(changed_bytes([content]))
    length = struct.unpack("<Q", content[:8])[0]
    tree = json.loads(content[8 : 8 + length])
    header = draw(json_bytes([tree]))
    said = draw(st.sampled_from([len(header)] * 6 + [0, 1, len(header) + 1, 2**31, 2**63]))
    return struct.pack("<Q", said) + header + content[8 + length :]


# --- flags -----------------------------------------------------------------------------------------------------------

COUNTS = [
    "train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "logging_steps",
    "validation_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "images_per_class",
    "resolution",
    "adaptive_weight_steps",
]
COUNTS_FROM_0 = [
    "max_train_steps",
    "lr_warmup_steps",
    "dataloader_num_workers",
    "disc_start",
    "loss_ramp_steps",
    "seed",
]
RATES = ["learning_rate", "max_grad_norm", "disc_learning_rate"]
WEIGHTS = [
    "pixel_weight",
    "perceptual_weight",
    "kl_weight",
    "adversarial_weight",
    "classification_weight",
    "center_weight",
    "repulsion_weight",
    "snr_gamma",
]
SHARES = ["ema_decay", "label_dropout"]
CHOICES = {
    "mixed_precision": ("no", "fp16", "bf16", "auto"),
    "lr_scheduler": ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
}
SWITCHES = [
    "skip_bad_images",
    "overwrite_output_dir",
    "torch_compile",
    "gradient_checkpointing",
    "final_pictures",
    "zero_terminal_snr",
]
PATHS = [
    "data_dir",
    "output_dir",
    "latent_cache_dir",
    "vgg_weights",
    "model_config",
    "resume_from_checkpoint",
    "autoencoder",
]
LISTS = ["train_splits", "val_splits", "classes"]
# Of flags that have a say in each other no single value is right or wrong.
TOGETHER = {
    "pixel_weight", "perceptual_weight", "perceptual_every", "train_batch_size", "label_dropout", "guidance_scale",
    "prediction_type", "beta_schedule", "zero_terminal_snr", "output_dir", "resume_from_checkpoint",
}  # fmt: skip
OWN = {
    "autoencoder": {*WEIGHTS, "disc_start", "loss_ramp_steps", "adaptive_weight_steps", "disc_learning_rate",
                    "perceptual_every", "vgg_weights"} - {"snr_gamma"},
    "latent_diffusion": {"snr_gamma", "label_dropout", "prediction_type", "beta_schedule", "zero_terminal_snr",
                         "autoencoder", "latent_cache_dir", "guidance_scale"},
}  # fmt: skip
SCRIPTS = {"autoencoder": train_autoencoder, "latent_diffusion": train_latent_diffusion}
NOT_WHOLE = ["", "x", str(10**30), "1.5", "1e3", "nan", "inf", "²", "0x10", "1 2", "--5", "5\n6", "9" * 5000]
NOT_NUMBERS = ["", "x", "nan", "inf", "-inf", "1e400", "²", "0x10", "1 2", "1,5", "9" * 5000]


def values_of(flag: str) -> tuple[list[str], list[str]]:
    """Texts that are right for a flag, and texts that are wrong; of a path none is wrong in itself."""
    if flag in COUNTS:
        return ["1", "24", "1000"], [*NOT_WHOLE, "0", "-1"]
    if flag in COUNTS_FROM_0:
        return ["0", "1", "7"], [*NOT_WHOLE, "-1", str(-(10**30))]
    if flag in RATES:
        return ["1e-4", "0.5", "1"], [*NOT_NUMBERS, "0", "-1e-3"]
    if flag in WEIGHTS:
        return ["0", "0.1", "1"], [*NOT_NUMBERS, "-1", "-1e-9"]
    if flag in SHARES:
        return ["0", "0.1", "0.999"], [*NOT_NUMBERS, "-0.1", "1", "1.5"]
    if flag in CHOICES:
        return list(CHOICES[flag]), ["", "x", CHOICES[flag][0].upper(), CHOICES[flag][0] + " ", "0"]
    if flag == "perceptual_every":
        return ["1", "2"], [*NOT_WHOLE, "0", "-1"]
    if flag == "guidance_scale":
        return ["1", "3.5"], NOT_NUMBERS
    if flag == "report_to":
        return ["none", "tensorboard"], ["", "x", "tensorbord", "None", "tensorboard "]
    return ["flowers", "a/b"], []


def check_namespace(args) -> None:
    """That no accepted flag holds what can't be right, whatever it was given."""
    given = vars(args)
    for name, value in given.items():
        if name in COUNTS and value is not None:
            assert isinstance(value, int) and 0 < value < 2**63, name
        elif name in COUNTS_FROM_0 and value is not None:
            assert isinstance(value, int) and 0 <= value < 2**63, name
        elif name in RATES:
            assert 0 < value < math.inf, name
        elif name in WEIGHTS:
            assert 0 <= value < math.inf, name
        elif name in SHARES:
            assert 0 <= value < 1, name
        elif name in CHOICES and value is not None:
            assert value in CHOICES[name], name
        elif name in SWITCHES:
            assert value in (True, False), name
    if "pixel_weight" in given:
        assert args.pixel_weight > 0 or args.perceptual_weight > 0
        assert args.perceptual_every >= 1 and args.train_batch_size % args.perceptual_every == 0
    else:
        assert args.label_dropout > 0 or args.guidance_scale == 1
        assert math.isfinite(args.guidance_scale)
        assert args.prediction_type != "epsilon" or not args.zero_terminal_snr


class FlagCase(NamedTuple):
    stage: str
    words: list[str]
    fine: bool | None


@st.composite
def flag_cases(draw) -> FlagCase:
    stage = draw(st.sampled_from(list(SCRIPTS)))
    known = {*COUNTS, *COUNTS_FROM_0, *RATES, *WEIGHTS, *SHARES, *CHOICES, *SWITCHES, *PATHS, *LISTS, "report_to",
             "perceptual_every", "guidance_scale"}  # fmt: skip
    own = OWN[stage] | {flag for flag in known if flag not in OWN["autoencoder"] | OWN["latent_diffusion"]}
    words, fine = [], True
    for flag in draw(st.lists(st.sampled_from(sorted(own)), min_size=1, max_size=4, unique=True)):
        right, wrong = values_of(flag)
        sort = draw(st.sampled_from(["right", "right", "wrong", "wrong", "any", "odd"]))
        if sort == "odd":
            words += draw(st.sampled_from([
                [f"--{flag[:-1]}", "1"], [f"--{flag.upper()}", "1"], [f"-{flag}", "1"], [f"--{flag}x=1"], ["loose"],
                [f"--{flag}\n", "1"], ["--\ud800", "1"], ["--" + "x" * 5000], ["\x1b[31m"], [f"--no-{flag}x"],
            ]))  # fmt: skip
            fine = False
        elif flag in SWITCHES:
            words.append(draw(st.sampled_from([f"--{flag}", f"--no-{flag}"])))
        elif flag in LISTS or flag in PATHS or sort == "any" or not wrong:
            words.append(f"--{flag}={draw(st.sampled_from(BAD_TEXTS) | st.text(max_size=8))}")
            fine = None if fine else fine
        else:
            words.append(f"--{flag}={draw(st.sampled_from(right if sort == 'right' else wrong))}")
            fine = fine if sort == "right" else False
        if flag in TOGETHER or flag == "mixed_precision" or flag == "resume_from_checkpoint":
            fine = None if fine else fine
    return FlagCase(stage, words, fine)


class Flags(Kind):
    """Both training scripts' flags, and the folders that they name."""

    name = "flags of both scripts"
    short, long = 100, 2500

    def cases(self):
        return flag_cases()

    def run(self, case):
        args = SCRIPTS[case.stage].parse_args(case.words)
        check_namespace(args)
        checkpoints.check_output_dir(args)
        checkpoints.find_checkpoint(args)
        output_dir = Path(args.output_dir)
        made = next(path for path in (output_dir, *output_dir.parents) if path.exists())
        output_dir.mkdir(parents=True, exist_ok=True)
        for path in (output_dir, *output_dir.parents):
            if path in made.parents or path == made:
                break
            path.rmdir()

    def expects(self, case):
        return case.fine

    def named(self, case):
        return ("--", "unrecognized", *(word[:100] for word in case.words if len(word.strip()) > 3))


# --- recipes ---------------------------------------------------------------------------------------------------------


class RecipeCase(NamedTuple):
    stage: str
    content: bytes
    fine: bool | None
    means: list[str] | None  # the words of a command line that say the same


YAML_ODDITIES = [
    b"", b"---\n---\n", b"- a", b"common", b"common: [", b"common:\n\tseed: 1", b"common: &a [*a]", b"5: {}",
    b"common: {5: 1}", b"common: {null: 1}", b"common: {? [a] : 1}", b"common: {? {a: 1} : 1}", b"? [a]\n: 1",
    b"common: !!python/object/apply:os.getcwd []", b"common: !!binary aaa", b"common: {seed: !!float 1}",
    b"common: {seed: !!set {1}}", b"common: {seed: 2001-01-01}", b"common: {seed: 2001-13-45}",
    b"common: {seed: 12:30:45}", b"common: {<<: 5}", b"common: {<<: {seed: 1}}", b"common: {seed: {a: 1}}",
    b"common: {classes: [[1], 2]}", b"common: {classes: [null]}", b"common: {classes: {a: 1}}", b"[" * 20_000,
    b"{a: " * 5000, b"common: {classes: " + b"[" * 3000 + b"]" * 3000 + b"}", b"\xff\xfe\x00", b"\x00",
    b"%YAML 9.9\n---\n",
    b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9))
                                               for i in range(9)) + b"common: {classes: *j}",
    b"common: {classes: &a [x,x,x,x,x,x,x,x,x], train_splits: [*a,*a,*a]}", b"common: {seed: 1" + b"0" * 5000 + b"}",
    b"common: {seed: 0x" + b"f" * 5000 + b"}", b"common: {config: x}", b"common: {help: true}", b"common: {-h: 1}",
    b"common: {seed: 1, seed: 2}", b"common: {seed: 1}\ncommon: {resolution: 8}", b"common: {seed: 1}\n...\nx",
    b"common: {'--seed': 1}", b"common: {seed: [1, 2]}", b"common: {seed: []}", b"common: {classes: []}",
]  # fmt: skip


@st.composite
def recipe_cases(draw) -> RecipeCase:
    stage = draw(st.sampled_from(list(SCRIPTS)))
    sort = draw(st.sampled_from(["keys"] * 6 + ["odd", "bytes", "tree"]))
    if sort == "odd":
        return RecipeCase(stage, draw(st.sampled_from(YAML_ODDITIES)), None, None)
    if sort == "bytes":
        recipe = b"common:\n  seed: 1\n  classes: [rose, tulip]\nautoencoder:\n  kl_weight: 1.0e-4\n"
        return RecipeCase(stage, draw(st.binary(max_size=60) | changed_bytes([recipe])), None, None)
    if sort == "tree":
        tree = {"common": {"seed": 1, "classes": ["rose", 2], "mixed_precision": "no"}, stage: {"resolution": 32}}
        text = yaml.safe_dump(draw(changed_trees([tree])), allow_unicode=draw(st.booleans()))
        return RecipeCase(stage, text.encode("utf-8", "surrogatepass"), None, None)
    flags = [*COUNTS_FROM_0[:3], *COUNTS[:7], "learning_rate", "ema_decay", "lr_scheduler"]
    lines, words, fine = {"common": [], stage: []}, [], True
    for flag in draw(st.lists(st.sampled_from(flags), min_size=1, max_size=4, unique=True)):
        right, wrong = values_of(flag)
        is_right = draw(st.booleans())
        value = draw(st.sampled_from(right if is_right else wrong))
        fine = fine and (is_right if flag not in TOGETHER or not is_right else None)
        section = draw(st.sampled_from(["common", stage]))
        key = flag if draw(st.integers(0, 9)) else draw(st.sampled_from([flag + "x", flag.upper(), "", "-" + flag]))
        lines[section].append(f"  {json.dumps(key) if key != flag else key}: {spelled(draw, value)}\n")
        if key != flag or (not value and not is_right):
            fine = False
        words.append(f"--{flag}={value}")
        if draw(st.integers(0, 9)) == 0:  # said twice
            lines[section].append(f"  {flag}: {value or 1}\n")
            fine = False
    text = "".join(f"{section}:\n{''.join(these)}" for section, these in lines.items() if these)
    return RecipeCase(stage, text.encode(), fine, words if fine is not False else None)


def spelled(draw, value: str) -> str:
    plain = re.fullmatch(r"[\w.+-]+", value, re.ASCII) and value not in ("", "no")
    return value if plain and draw(st.booleans()) else json.dumps(value)


class Recipes(Kind):
    name = "recipes"
    short, long = 70, 1500

    def cases(self):
        return recipe_cases()

    def run(self, case):
        path = self.folder / "recipe.yaml"
        path.write_bytes(case.content)
        args = SCRIPTS[case.stage].parse_args(["--config", str(path)])
        check_namespace(args)
        for name in LISTS:
            assert all(isinstance(one, str) and len(one) < 10_000 for one in getattr(args, name) or []), name
        if case.means is not None:
            meant = SCRIPTS[case.stage].parse_args(["--config", str(self.empty()), *case.means])
            meant.config = args.config
            assert vars(meant) == vars(args), "a recipe means something else than its words as flags"

    def empty(self) -> Path:
        path = self.folder / "empty.yaml"
        path.write_text("common: {}\n")
        return path

    def expects(self, case):
        return case.fine

    def named(self, case):
        return ("recipe.yaml", "--")


# --- model configs ---------------------------------------------------------------------------------------------------

UNET = {"hidden_size": 32, "num_layers": 3, "num_attention_heads": 2, "num_classes": 4, "sample_size": 8,
        "in_channels": 4, "out_channels": 4, "patch_size": 1}  # fmt: skip
VAE = {"in_channels": 3, "latent_channels": 4, "patch_size": 1, "block_out_channels": [8, 16], "layers_per_block": 1,
       "decoder_layers_per_block": 1, "num_classes": 4, "head_channels": 16, "sample_size": 16}  # fmt: skip


class ModelConfigs(Kind):
    name = "model configs"
    short, long = 60, 1200

    def cases(self):
        return st.one_of(
            st.tuples(st.just("unet"), json_bytes([UNET, {"_class_name": "X", "auto_map": {}, **UNET}])),
            st.tuples(st.just("vae"), json_bytes([VAE, {"latents_mean": [0.0] * 4, **VAE}])),
        )

    def run(self, case):
        kind, content = case
        path = self.folder / "model.json"
        path.write_bytes(content)
        torch.manual_seed(0)
        if kind == "unet":
            run = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_classes": 4}
            model = training.build_model(FlowerUNet2DModel, str(path), **run).eval()
            with torch.no_grad():
                out = model(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.tensor([0])).sample
            assert out.shape == (1, 4, 8, 8) and out.isfinite().all(), "a model that gives something else"
        else:
            run = {"in_channels": 3, "num_classes": 4, "sample_size": 32}
            model = training.build_model(FlowerAutoencoderKL, str(path), **run).eval()
            assert model.downsample_factor <= 32 or model.config.block_out_channels, "a factor beyond the image"
            size = model.downsample_factor
            if size <= 256:
                with torch.no_grad():
                    out = model(torch.randn(1, 3, size, size)).sample
                assert out.shape == (1, 3, size, size) and out.isfinite().all(), "a model that gives something else"
        assert sum(parameter.numel() for parameter in model.parameters()) < 3e8, "a model beyond all memory"
        json.dumps(dict(model.config))

    def named(self, case):
        return ("model.json",)


# --- labels and arguments of the pipeline ----------------------------------------------------------------------------

NAMES = {0: "rose", 1: "sunflower", 2: "7", 3: "Tulip"}


def tiny_pipeline() -> FlowerLDMPipeline:
    torch.manual_seed(0)
    vae = FlowerAutoencoderKL(**VAE, latents_mean=[0.1, 0.2, -0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 3.0])
    unet = FlowerUNet2DModel(**UNET)
    scheduler = train_latent_diffusion.make_noise_scheduler("v_prediction", "squaredcos_cap_v2", False)
    return quiet(train_latent_diffusion.build_pipeline(vae.eval(), unet.eval(), scheduler, list(NAMES.values())))


def quiet(pipe: FlowerLDMPipeline) -> FlowerLDMPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


spelled_labels = st.sampled_from([*NAMES.values(), *NAMES, "3", "0", " rose", "ROSE", "rose ", "04"])
labels = st.one_of(
    spelled_labels,
    spelled_labels,
    bad_values,
    st.sampled_from([np.int64(1), np.float32(1), np.array([0, 1]), np.array("rose"), torch.tensor(2), b"rose", "-0"]),
    st.sampled_from([torch.tensor([0.0, 1]), torch.eye(4), torch.full((1, 4), math.nan), torch.ones(2, 4), 1j, "+1"]),
    st.sampled_from(
        [torch.zeros(0), torch.zeros(0, 4), torch.tensor([[1, 2]]), torch.tensor([True]), range(3), "1_0"]
    ),
    st.dictionaries(st.sampled_from([*NAMES.values(), *NAMES, "x"]), st.sampled_from([1, 0.5, -0.5, math.nan, "1"])),
)


class OfPipeline(Kind):
    """What a pipeline itself is given, which refuses by `ValueError`."""

    raises_value_errors = True

    def __init__(self, folder, runs):
        super().__init__(folder, runs)
        self.pipe = tiny_pipeline()


class Labels(OfPipeline):
    """What `pipe(labels)` takes: names, indices, several, sums of classes."""

    name = "labels of the pipeline"
    short, long = 150, 2500

    def cases(self):
        many = st.lists(labels, max_size=3)
        return labels | many | many.map(tuple) | st.lists(spelled_labels, max_size=4)

    def run(self, case):
        given = self.pipe.prepare_class_labels(case)
        if given.is_floating_point():
            assert given.ndim == 2 and given.shape[1] == 5, "weights of another shape"
            assert given.isfinite().all() and torch.allclose(given.sum(dim=1), torch.ones(len(given)), atol=1e-2)
        else:
            expected = label_ids(case)
            assert expected is not None, "a label that is none"
            assert given.tolist() == expected, "another label"

    def expects(self, case):
        items = case if isinstance(case, (list, tuple)) else [case]
        plain = all(type(one) in (str, int) for one in items)
        return True if plain and label_ids(case) is not None else None


def label_ids(case: Any) -> list[int] | None:
    """What each label means, by the rule said a second time; None where one means nothing."""
    items = list(case) if isinstance(case, (list, tuple, range)) else [case]
    if isinstance(case, (np.ndarray, torch.Tensor)):
        items = case.tolist() if case.ndim else [case.tolist()]
    ids = [label_id(one) for one in items]
    return None if not ids or None in ids else ids


def label_id(label: Any) -> int | None:
    if isinstance(label, str):
        alike = " ".join(unicodedata.normalize("NFC", label).split()).casefold()
        for index, name in NAMES.items():
            if name.casefold() == alike:
                return index
        label = int(alike) if re.fullmatch("-?[0-9]{1,18}", alike) else None
    elif isinstance(label, (torch.Tensor, np.ndarray)):
        label = label.item() if label.reshape(-1).shape == (1,) else None
    if not isinstance(label, (int, np.integer)) or isinstance(label, bool) or not 0 <= label < len(NAMES):
        return None
    return int(label)


pictures = st.sampled_from([
    None, Image.new("RGB", (20, 30)), Image.new("L", (1, 1)), Image.new("RGB", (5000, 1)), Image.new("I;16", (16, 16)),
    Image.new("F", (16, 16)), Image.new("P", (16, 16)), Image.new("RGBA", (16, 16)), np.zeros((16, 16, 3), np.float32),
    np.full((16, 16, 3), 2.0, np.float32), np.zeros((16, 16, 3), np.uint8), np.zeros((3, 16, 16)),
    torch.zeros(3, 16, 16),
    torch.full((3, 16, 16), math.nan), torch.zeros(2, 3, 16, 16), torch.zeros(16, 16), torch.zeros(0),
    np.zeros((16, 16)),
])  # fmt: skip
ARGUMENTS = {
    "num_images_per_label": (1, 2), "guidance_scale": (1, 3.0), "guidance_interval": ((0.0, 1.0), [0.2, 0.5]),
    "num_inference_steps": (1, 2, 25), "eta": (0.0, 1), "guidance_rescale": (0.0, 0.7), "strength": (0.8, 1.0, 0.01),
    "output_type": ("pil", "np", "pt", "latent"), "generator": (None, torch.Generator()),
    "latents": (None, torch.zeros(1, 4, 8, 8)), "callback_on_step_end_tensor_inputs": (["latents"], ()),
}  # fmt: skip
odd_tensors = st.sampled_from([
    torch.zeros(1, 4, 8, 8, dtype=torch.int64), torch.full((1, 4, 8, 8), math.inf), torch.zeros(1, 4, 8, 9),
    torch.zeros(1, 4, 8, 8).bool(), torch.tensor(1.0), np.zeros((1, 4, 8, 8)), [torch.Generator()] * 3,
])  # fmt: skip


@st.composite
def calls(draw) -> dict:
    """Arguments of `pipe(...)`, one to three of which may be anything."""
    options = {
        name: draw(st.sampled_from(ARGUMENTS[name])) for name in draw(st.sets(st.sampled_from(list(ARGUMENTS))))
    }
    for name in draw(st.lists(st.sampled_from(list(ARGUMENTS)), max_size=2)):
        options[name] = draw(bad_values | odd_tensors | st.lists(bad_values, max_size=3))
    for name in draw(st.sets(st.sampled_from(["image", "mask_image"]))):
        options[name] = draw(pictures | st.lists(pictures, max_size=2) | bad_values)
    return options


class Calls(OfPipeline):
    """What `pipe(labels, ...)` takes besides labels; a draw where nothing is wrong with it."""

    name = "arguments of the pipeline"
    short, long = 60, 1500

    def cases(self):
        return calls()

    def run(self, case):
        self.pipe.check_inputs(num_labels=1, **case)
        images, steps = case.get("num_images_per_label", 1), case.get("num_inference_steps", 25)
        if images > 4 or steps > 25:
            return
        drawn = self.pipe("rose", **case).images
        assert len(drawn) == images, "another number of images"


# --- images ----------------------------------------------------------------------------------------------------------


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture_files() -> tuple[list[bytes], list[bytes]]:
    """Small files of the formats that are read, in many variants, and of such as never are."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
    rgba, gray = rgb.convert("RGBA"), rgb.convert("L")
    deep = Image.fromarray(rng.integers(0, 65536, (20, 24), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    read = [
        saved(rgb, "PNG"), saved(rgba, "PNG"), saved(deep, "PNG"), saved(rgb.convert("P"), "PNG", transparency=3),
        saved(gray.convert("1"), "PNG"), saved(gray.convert("LA"), "PNG"), saved(rgb, "PNG", exif=exif),
        saved(rgb, "JPEG"), saved(rgb, "JPEG", progressive=True, exif=exif), saved(rgb.convert("CMYK"), "JPEG"),
        saved(gray, "JPEG"), saved(rgb, "WEBP"), saved(rgba, "WEBP", lossless=True),
        saved(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)]), saved(rgb, "BMP"),
        saved(rgb.convert("P"), "BMP"),
        saved(rgb, "GIF"), saved(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)], transparency=1),
        saved(rgb, "TIFF"), saved(rgb, "TIFF", compression="tiff_lzw"), saved(deep, "TIFF"),
        saved(rgb, "TIFF", exif=exif),
        saved(rgb, "TIFF", compression="tiff_deflate", save_all=True, append_images=[rgb]), saved(rgb, "PPM"),
        saved(deep, "PPM"), b"P3 2 2 255 " + b"1 2 3 " * 4, b"P2 2 2 9 1 2 3 4", b"P1 2 2 1 0 0 1",
    ]  # fmt: skip
    foreign = [saved(rgb, kind) for kind in ("EPS", "PDF", "ICO", "PCX", "TGA", "SGI", "IM", "JPEG2000", "DDS")]
    foreign += [saved(gray.convert("1"), "XBM"), saved(rgb, "MPO", save_all=True, append_images=[rgb])[:0]]
    foreign += [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n", b"<svg xmlns='http://x'/>",
        b"GIF89a", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"P6", b"P6 9 9",
        b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", b"\0" * 100,
    ]  # fmt: skip
    return read, foreign


BOMB = zlib.compress(bytes(64_000_000))


def png_with(content: bytes, name: bytes, data: bytes) -> bytes:
    """A PNG with one chunk swapped, or put in behind its head, its checksum right."""
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    at = content.find(name) - 4
    if at < 0:
        return content[:33] + chunk + content[33:]
    length = struct.unpack(">I", content[at : at + 4])[0]
    return content[:at] + chunk + content[at + 12 + length :]


@st.composite
def picture_cases(draw, read: list[bytes], foreign: list[bytes]) -> tuple[bytes, str, bool | None]:
    """The bytes of a file, its suffix, and whether it is fine."""
    suffix = draw(st.sampled_from([".png", ".jpg", ".tif", ".webp", ".gif", ".bmp", ".ppm"]))
    sort = draw(st.sampled_from(["fine"] + ["bytes"] * 6 + ["foreign", "png", "random"]))
    if sort == "fine":
        return draw(st.sampled_from(read)), suffix, True
    if sort == "foreign":
        return draw(st.sampled_from(foreign)), suffix, False
    if sort == "random":
        return draw(st.binary(max_size=100)), suffix, False
    if sort == "png":
        png = draw(st.sampled_from(read[:7]))
        head = png[16:29]
        sides = st.sampled_from([0, 1, 20, 24, 2**15, 40_000, 2**31 - 1, 2**31, 2**32 - 1])
        data = {
            b"IHDR": struct.pack(">II", draw(sides), draw(sides)) + head[8:],
            b"IDAT": draw(st.sampled_from([b"", b"x", zlib.compress(b""), BOMB])),
            b"iCCP": b"x\0\0" + draw(st.sampled_from([b"", b"x", BOMB])),
            b"zTXt": b"x\0\0" + draw(st.sampled_from([b"", b"x", BOMB])),
            b"eXIf": draw(st.binary(max_size=30)),
            b"PLTE": draw(st.binary(max_size=9)),
            b"tRNS": draw(st.binary(max_size=9)),
            b"acTL": struct.pack(">II", draw(sides), 0),
        }
        name = draw(st.sampled_from(list(data)))
        return png_with(png, name, data[name]), suffix, None
    return draw(changed_bytes(read)), suffix, None


class Pictures(Kind):
    """A file in an image folder, with and without `--skip_bad_images`, and the same as `sample --image`."""

    name = "image files"
    short, long = 60, 1500

    def __init__(self, folder, runs):
        super().__init__(folder, runs)
        self.read, self.foreign = picture_files()
        for name in ("rose", "tulip"):
            (folder / "images" / name).mkdir(parents=True)
            for index in range(2):
                (folder / "images" / name / f"{index}.png").write_bytes(self.read[index])

    def cases(self):
        return picture_cases(self.read, self.foreign)

    def load(self, **options):
        return DataOptions("imagefolder", self.folder / "images", resolution=8, val_splits=None, **options).load(
            show_progress=False
        )

    def run(self, case):
        content, suffix, _ = case
        path = self.folder / "images" / "rose" / f"any{suffix}"
        path.write_bytes(content)
        try:
            skipped = sum(one.num_bad_images for one in self.load(skip_bad_images=True))
            try:
                train, val = self.load()
            except InputError:
                assert skipped == 1, "refused, but not left out by --skip_bad_images"
                raise
            assert skipped == 0, "left out by --skip_bad_images, but not refused without"
            assert len(train) + len(val) == 5, "an image is missing"
            for images in (train, val):
                batch = images.__getitems__(list(range(len(images))))["images"]
                assert batch.shape[1:] == (3, 8, 8) and batch.abs().max() <= 1, "pixels out of range"
            picture = sample.open_picture("--image", path, sample.MAX_IMAGE_PIXELS)
            assert picture.mode == "RGB" and min(picture.size) > 0, "a picture that is none"
        finally:
            path.unlink()

    def expects(self, case):
        return case[2]

    def named(self, case):
        return ("rose/any", "--image")


class DrawnOver(Pictures):
    """The same files as `sample --image`."""

    name = "pictures that are drawn over"
    short, long = 30, 700

    def run(self, case):
        content, suffix, _ = case
        path = self.folder / f"any{suffix}"
        path.write_bytes(content)
        picture = sample.open_picture("--image", path, sample.MAX_IMAGE_PIXELS)
        assert picture.mode == "RGB" and min(picture.size) > 0, "a picture that is none"

    def named(self, case):
        return ("--image",)


# --- class folders ---------------------------------------------------------------------------------------------------

names = st.one_of(
    st.sampled_from([text for text in BAD_TEXTS if "\0" not in text and 0 < len(text) < 200]),
    st.sampled_from(
        ["rose", "Rose", "rose ", " rose", "1", "01", "-1", ".hidden", "__MACOSX", "train", "val", "test"]
    ),
    st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=10),
    st.binary(min_size=1, max_size=6).filter(lambda name: not {0, 47} & set(name)),
)


class Folders(Kind):
    """Class folders and images of any names, and what `--classes` asks for."""

    name = "folders and --classes"
    short, long = 40, 700

    def __init__(self, folder, runs):
        super().__init__(folder, runs)
        self.picture = saved(Image.new("RGB", (8, 8), "red"), "PNG")
        self.pipe = tiny_pipeline()

    def cases(self):
        one = st.tuples(names, st.sampled_from([0, 1, 2, 2, 2]))
        asked = st.none() | st.lists(st.sampled_from(["rose", "0", "1"]) | st.text(max_size=4) | names, max_size=3)
        return st.tuples(st.lists(one, max_size=4), st.sampled_from([b"%d.png", b"\xe9%d.png", b"%d.PNG"]), asked)

    def run(self, case):
        folders, pattern, asked = case
        root = self.folder / "classes"
        root.mkdir()
        try:
            for name, count in folders:
                path = Path(os.fsdecode(os.path.join(os.fsencode(root), raw(name))))
                with suppress(FileExistsError, OSError):
                    path.mkdir()
                for index in range(count if path.is_dir() and path != root and path.parent == root else 0):
                    with suppress(OSError):
                        (path / os.fsdecode(pattern % index)).write_bytes(self.picture)
            classes = None if asked is None else [os.fsdecode(raw(name)) for name in asked]
            train, val = DataOptions("imagefolder", root, resolution=8, classes=classes).load(show_progress=False)
            assert len(set(train.class_names)) == len(train.class_names), "two classes of one name"
            assert classes is None or len(train.class_names) == len(classes), "another number of classes"
            assert set(train.labels.tolist()) == set(range(train.num_classes)), "a class without an image"
            unet = FlowerUNet2DModel(**UNET | {"num_classes": train.num_classes})
            parts = {"vae": self.pipe.vae, "unet": unet, "scheduler": self.pipe.scheduler}
            FlowerLDMPipeline(**parts, id2label=dict(enumerate(train.class_names)))
        finally:
            shutil.rmtree(os.fsencode(root))

    def named(self, case):
        return ("--classes", "--data_dir", "classes")


def raw(name: str | bytes) -> bytes:
    return (
        name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape" if "\udce9" in name else "ignore")
    )


class DataSets(Kind):
    """Parquet files as `--dataset`: columns of any kind; a row that names a file of this machine reads none."""

    name = "Parquet data sets"
    short, long = 5, 80

    def __init__(self, folder, runs):
        super().__init__(folder, runs)
        self.secret = folder / "secret.png"
        self.secret.write_bytes(saved(Image.new("RGB", (16, 16), (255, 0, 255)), "PNG"))
        self.number = 0
        with suppress(InputError):  # what is imported and reserved once isn't an input's memory
            self.run(([{"bytes": b"x", "path": None}] * 4, [0, 0, 1, 1]))

    def cases(self):
        picture = saved(Image.new("RGB", (16, 16), (0, 128, 0)), "PNG")
        fine = st.just({"bytes": picture, "path": None})
        odd = st.sampled_from([
            None, {"bytes": None, "path": None}, {"bytes": None, "path": str(self.secret)},
            {"bytes": None, "path": "secret.png"}, {"bytes": None, "path": f"file://{self.secret}"},
            {"bytes": b"", "path": str(self.secret)}, {"bytes": b"x", "path": "a.png"},
            {"bytes": picture, "path": "\n"},
        ])  # fmt: skip
        columns = [fine] * 3 + [fine | odd] * 3 + [
            st.just(picture), st.just("text"), st.integers(0, 9), st.none(), st.just([[0, 255]] * 8), st.floats(0, 1),
            st.just([[[0, 9, 9]] * 8] * 8), st.just(str(self.secret)),
        ]  # fmt: skip
        text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
        labels = [st.integers(0, 1)] * 3 + [
            st.integers(-1, 1), st.none() | st.integers(0, 1), st.floats(), st.booleans(), text, st.none() | text,
            st.sampled_from(["rose", "rose ", "Rose", "tulip"]), st.just([1]), st.just(b"x"),
        ]  # fmt: skip

        @st.composite
        def tables(draw):
            rows = draw(st.integers(0, 8))
            image, label = draw(st.sampled_from(columns)), draw(st.sampled_from(labels))
            return [draw(image) for _ in range(rows)], [draw(label) for _ in range(rows)]

        return tables()

    def run(self, case):
        import datasets
        import pyarrow
        import pyarrow.parquet

        self.number += 1  # `datasets` keeps what it has read, by its path
        source = self.folder / f"set-{self.number}"
        source.mkdir()
        images, labels = case
        pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": labels}), source / "train.parquet")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(datasets.config, "HF_DATASETS_CACHE", self.folder / "cache")
            for skip_bad_images in (True, False):
                self.load(source, skip_bad_images)

    def load(self, source: Path, skip_bad_images: bool) -> None:
        parts = DataOptions(str(source), resolution=8, skip_bad_images=skip_bad_images).load(show_progress=False)
        names = parts[0].class_names
        assert len(set(names)) == len(names) == parts[0].num_classes, "two of one name"
        for images in parts:
            corners = images.__getitems__(list(range(len(images))))["images"][:, :, 0, 0]
            secret = torch.tensor([1.0, -1.0, 1.0])
            assert ((corners - secret).abs().sum(dim=1) > 0.1).all(), "another file is read"

    def named(self, case):
        return ("set-", "--label_column", "--image_column", "--dataset")


# --- repositories ----------------------------------------------------------------------------------------------------


class Repositories(Kind):
    """A saved pipeline with one file changed, as `sample --pipeline` loads it; drawn with where it loads."""

    name = "repositories of pipelines"
    short, long = 25, 600

    def __init__(self, folder, runs):
        super().__init__(folder, runs)
        whole, sharded = folder / "whole", folder / "sharded"
        tiny_pipeline().save_pretrained(whole)
        tiny_pipeline().save_pretrained(sharded, max_shard_size="20KB")
        self.repository = folder / "repository"
        self.files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.suffix in (".json", ".safetensors") and (path.parent.name == "unet" or path.suffix == ".json")
        }

    def cases(self):
        def changed(name: str):
            content = self.files[name]
            if name.endswith(".json"):
                return st.tuples(st.just(name), json_bytes([json.loads(content)]) | changed_bytes([content]))
            return st.tuples(st.just(name), changed_safetensors(content))

        trees = [name for name in self.files if name.endswith(".json")]
        some = st.sampled_from(trees) | st.sampled_from(list(self.files))
        return some.flatmap(lambda name: st.tuples(st.just(name), st.none()) | changed(name) | changed(name))

    def run(self, case):
        name, content = case
        source, _, file = name.partition("/")
        shutil.copytree(self.folder / source, self.repository)
        try:
            if content is None:
                (self.repository / file).unlink()
            else:
                (self.repository / file).write_bytes(content)
            pipe = quiet(sample.load_pipeline(str(self.repository), None, "cpu", "float32"))
            sample.check_sampling(pipe, 1, {"num_inference_steps": 2})
            height, width = pipe.image_size
            assert height * width <= 2**20, "images beyond all use"
            assert len(pipe.class_names) == pipe.num_classes == len(set(pipe.class_names)), (
                "names that aren't one each"
            )
            with sample.refusals_of_input():
                [image] = pipe(0, num_inference_steps=2, output_type="np").images
            assert image.shape == (height, width, 3) and np.isfinite(image).all(), "no image"
            check_weights(pipe.unet, self.repository / "unet")
            check_weights(pipe.vae, self.repository / "vae")
        finally:
            shutil.rmtree(self.repository)

    def named(self, case):
        return ("repository", "scheduler", "Scheduler", "steps")


def check_weights(model: torch.nn.Module, folder: Path) -> None:
    """That no weight is made up, as diffusers does of those that a file lacks."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with suppress(SafetensorError), safe_open(path, "pt") as file:
            found |= set(file.keys())
    assert model.state_dict().keys() <= found, "weights that are in no file"


class Autoencoders(Repositories):
    """The same of stage 2's `--autoencoder`."""

    name = "repositories of autoencoders"
    short, long = 20, 300

    def __init__(self, folder, runs):
        super().__init__(folder, runs)
        self.files = {name: content for name, content in self.files.items() if "/vae/" in name}
        weights = folder / "whole" / "vae" / "diffusion_pytorch_model.safetensors"
        self.files[weights.relative_to(folder).as_posix()] = weights.read_bytes()

    def run(self, case):
        name, content = case
        source, _, file = name.partition("/vae/")
        shutil.copytree(self.folder / source / "vae", self.repository)
        try:
            if content is None:
                (self.repository / file).unlink()
            else:
                (self.repository / file).write_bytes(content)
            vae = train_latent_diffusion.load_autoencoder(str(self.repository))
            check_weights(vae, self.repository)
            size = 2 ** (len(vae.config.block_out_channels) - 1) * getattr(vae.config, "patch_size", 1)
            if size <= 64:
                latents = vae.encode(torch.zeros(1, 3, size, size)).latent_dist.mean
                assert latents.isfinite().all(), "latents that are not finite"
                assert vae.normalize(latents).isfinite().all(), "latents that can't be normalized"
        finally:
            shutil.rmtree(self.repository)

    def named(self, case):
        return ("repository",)


# --- checkpoints and caches ------------------------------------------------------------------------------------------


class Checkpoints(Kind):
    """A run's newest checkpoint with one file changed: the one before it is taken, or the change is refused.

    A forged one has a manifest that says what was changed. It may go on from something else, and run nothing.
    """

    name = "checkpoints"
    short, long = 25, 600

    def __init__(self, folder, runs):
        super().__init__(folder, runs)
        self.accelerator = Accelerator(cpu=True)
        self.words = ["--output_dir", str(folder / "run"), "--max_train_steps", "9", "--report_to", "none"]
        args = train_autoencoder.parse_args(self.words)
        checkpoints.claim_output_dir(self.accelerator, args)
        for step in (2, 4):
            kept = self.kept(args, step)
            checkpoints.save_checkpoint(self.accelerator, args, kept, step)
        self.newest = folder / "run" / "checkpoint-4"
        self.files = {path.name: path.read_bytes() for path in self.newest.iterdir()}

    def kept(self, args, step: int) -> dict:
        """What a run keeps, all of it telling of the step."""
        model = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(model.weight, step)
        optimizer = torch.optim.AdamW(model.parameters())
        progress = checkpoints.Progress({"training data": "flowers"})
        progress.global_step = step
        return {
            "model": model, "optimizer": optimizer, "ema": training.build_ema(model, 0.9), "progress": progress,
            "lr_scheduler": training.build_lr_scheduler(args, optimizer),
        }  # fmt: skip

    def cases(self):
        def changed(name: str):
            content = self.files[name]
            if name.endswith(".json"):
                return json_bytes([json.loads(content)]) | changed_bytes([content])
            if name.endswith(".yaml"):
                return changed_trees([yaml.safe_load(content)]).map(dumped) | st.sampled_from(YAML_ODDITIES)
            return changed_safetensors(content) | changed_states(content)

        return st.sampled_from(list(self.files)).flatmap(
            lambda name: st.tuples(st.just(name), st.none() | changed(name) | changed(name), st.booleans())
        )

    def run(self, case):
        name, content, forged = case
        path = self.newest / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        if forged and name != "manifest.json":
            (self.newest / "manifest.json").unlink()
            checkpoint_files.write_manifest(self.newest, 4)
        try:
            args = train_autoencoder.parse_args([*self.words, "--resume_from_checkpoint", "latest"])
            kept = self.kept(args, 0)
            checkpoint = checkpoints.find_checkpoint(args)
            checkpoints.resume(self.accelerator, args, checkpoint, kept)
            step = kept["progress"].global_step
            assert checkpoint.name == f"checkpoint-{step}", "another step than its name says"
            assert forged or (kept["model"].weight == step).all(), "another state than was saved"
            assert forged or step == 2 or content == self.files[name] or name == "manifest.json", "a torn one"
        finally:
            for file, whole in self.files.items():
                (self.newest / file).write_bytes(whole)

    def named(self, case):
        return ("checkpoint-4", "--")


@st.composite
def changed_states(draw, content: bytes) -> bytes:
    """A state of a run whose header says something else of what isn't a tensor."""
    length = struct.unpack("<Q", content[:8])[0]
    tree = json.loads(content[8 : 8 + length])
    state = draw(json_bytes([json.loads(tree["__metadata__"]["state"])]))
    tree["__metadata__"]["state"] = state.decode("utf-8", "replace")
    header = json.dumps(tree).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


class Caches(Kind):
    """Files of latents and of features: what is not ours to the bit is told of in one line, and made anew."""

    name = "latent and feature caches"
    short, long = 20, 400

    def __init__(self, folder, runs):
        super().__init__(folder, runs)
        self.dataset = DataOptions("synthetic", resolution=16, classes=[0, 1], images_per_class=2).load(
            show_progress=False
        )[0]
        self.vae = tiny_pipeline().vae
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 5))
        self.network = FeatureNetwork("tiny", network, 16, mean=[127.0] * 3, std=[128.0] * 3)
        self.made = {"latents": self.latents().tensors(), "features": {"features": self.features()}}
        self.files = {
            name: (path, path.read_bytes())
            for name in self.made
            for path in (folder / name).iterdir()
        }  # fmt: skip

    def latents(self):
        return load_or_build_latent_cache(self.vae, self.dataset, self.folder / "latents", device="cpu")

    def features(self):
        return load_or_extract_features(self.network, self.dataset, self.folder / "features")

    def cases(self):
        return st.sampled_from(list(self.files)).flatmap(
            lambda name: st.tuples(st.just(name), changed_safetensors(self.files[name][1]))
        )

    def run(self, case):
        name, content = case
        path, whole = self.files[name]
        path.write_bytes(content)
        said = io.StringIO()
        with redirect_stdout(said):
            read = self.latents().tensors() if name == "latents" else {"features": self.features()}
        for key, tensor in self.made[name].items():
            assert torch.equal(read[key], tensor), "a cache that isn't ours"
        assert bool(said.getvalue()) == (path.read_bytes() != content) or content == whole
        path.write_bytes(whole)
        return said.getvalue().removesuffix("\n") or None

    def named(self, case):
        return (".safetensors",)


class Logs(Kind):
    """`log.jsonl` as a resumed run and the pictures read it."""

    name = "logs"
    short, long = 50, 700

    def cases(self):
        lines = [
            {"step": 2, "loss": 0.5, "learning_rate": 1e-4, "loss_by_timestep": [[0, 500, 0.1], [500, 1000, None]],
             "steps_per_second": 3.0},
            {"step": 2, "val_loss": 0.4, "val_unweighted_loss": 0.7},
        ]  # fmt: skip
        line = json_bytes(lines).map(lambda content: content.replace(b"\n", b" ")) | st.binary(max_size=30)
        fine = st.sampled_from([json.dumps(line).encode() for line in lines])
        return st.lists(line | fine, max_size=4).map(b"\n".join)

    def run(self, case):
        path = self.folder / "log.jsonl"
        path.write_bytes(case)
        steps = [line["step"] for line in runs.read_log(path)]
        assert steps == sorted(steps), "lines in another order"

    def named(self, case):
        return ("log.jsonl",)


# --- run folders -----------------------------------------------------------------------------------------------------

SECRET = "folder-of-mine"
HOSTILE = "<script>alert(1)</script>"


class Tags(HTMLParser):
    """Which tags a page has, and what they do."""

    def __init__(self, page: str):
        super().__init__()
        self.scripts, self.handlers = 0, []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.handlers += [name for name, _ in attributes if name.startswith("on")]


class RunFolders(Kind):
    """A finished run with one file changed: the page, the card, and what of it would be uploaded."""

    name = "run folders"
    short, long = 20, 700

    def __init__(self, folder, runs):
        super().__init__(folder, runs)
        self.files: dict[str, bytes] = {}
        for stage in (runs.autoencoder, runs.flower_ldm):
            for path in sorted(stage.rglob("*")):
                name = path.relative_to(stage.parent).as_posix()
                kept = path.suffix in (".json", ".jsonl", ".yaml") and "checkpoint-" not in name
                if kept and "logs/" not in name and "best/" not in name:
                    self.files[name] = path.read_bytes()
        metrics = json.loads(self.files["flower-ldm/metrics.json"])
        self.files["flower-ldm/metrics.json"] = json.dumps(metrics | {"evaluation": EVALUATION}).encode()
        self.root = folder / "runs"
        for name, content in self.files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_bytes(content)

    def cases(self):
        return st.sampled_from([*self.files, *[n for n in self.files if "metrics" in n or "log" in n] * 2]).flatmap(
            lambda name: st.tuples(st.just(name), self.changed(name))
        )

    def changed(self, name: str):
        content = self.files[name]
        if name.endswith(".json"):
            return json_bytes([json.loads(content)]) | changed_bytes([content])
        if name.endswith(".yaml"):
            tree = changed_trees([yaml.safe_load(content)])
            return tree.map(dumped) | changed_bytes([content]) | st.sampled_from(YAML_ODDITIES)
        lines = content.splitlines()
        some = json_bytes([json.loads(line) for line in lines]).map(lambda one: one.replace(b"\n", b" "))
        return some.map(lambda one: b"\n".join([*lines[:2], one, *lines[2:]])) | changed_bytes([content])

    def run(self, case):
        name, content = case
        stage = self.root / name.partition("/")[0]
        (self.root / name).write_bytes(content)
        refusals = []
        try:
            for look in (self.look_at_page, self.look_at_card, self.look_at_upload):
                try:
                    look(stage)
                except InputError as error:
                    refusals.append(error)
        finally:
            (self.root / name).write_bytes(self.files[name])
            for written in ("report.html", "README.md"):
                (stage / written).unlink(missing_ok=True)
        if refusals:
            raise refusals[0]

    def look_at_page(self, stage: Path) -> None:
        tags = Tags(write_report(stage).read_text("utf-8"))
        assert tags.scripts == 1 and not tags.handlers, "a page with a script that isn't ours"

    def look_at_card(self, stage: Path) -> None:
        _, head, body = write_model_card(stage).read_text("utf-8").split("---\n", 2)
        assert isinstance(yaml.safe_load(head), dict), "a card without a head"
        assert HOSTILE not in re.sub(r"(?ms)^```.*?^```$", "", body), "a card with markup that isn't ours"

    def look_at_upload(self, stage: Path) -> None:
        _, files = hub.run_files(stage)
        assert SECRET.encode() not in files["metrics.json"] + files["args.yaml"], "a path of this machine"
        json.loads(files["metrics.json"])

    def named(self, case):
        return (Path(case[0]).name, "runs/")


def dumped(tree: Any) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


EVALUATION = {
    "dataset": "synthetic", "splits": {"train": ["train"], "held_out": ["val"]}, "remarks": ["few images"],
    "command": ["python", "-m", "flower_ldm.evaluation", f"--pipeline=/{SECRET}/run"],
    "features": {"name": "efficientnet-lite0", "num_features": 1280, "input_size": 128},
    "sampling": {"num_samples": 8, "seed": 0, "scheduler": "DPMSolverMultistepScheduler", "num_inference_steps": 4,
                 "guidance_scale": 2.0, "guidance_interval": [0.0, 1.0], "images_per_second": 3.0, "device": "cpu",
                 "dtype": "float32"},
    "against_held_out": {name: {"n": 8, "n_reference": 8, "frechet_distance": 20.5, "kid": 0.01, "kid_std": 0.001,
                                "precision": 0.5, "recall": 0.5, "density": 1.0, "coverage": 0.5,
                                "class_accuracy": 0.5}
                         for name in ("real", "reconstructions", "samples")},
    "reconstruction": {"n": 8, "split": ["val"], "psnr": 20.0, "ssim": 0.5, "head_accuracy": 0.5,
                       "perceptual_distance": {"name": "vgg", "value": 0.5}},
    "memorisation": {"samples": {"n": 8, "feature_rate": 0.0, "pixel_rate": 0.0, "exact_duplicates": 0},
                     "held_out": {"n": 8, "feature_rate": 0.0, "pixel_rate": 0.0, "exact_duplicates": 0}},
    "sweep": [{"guidance_scale": scale, "num_inference_steps": 4, "n": 8, "frechet_distance": 20.0 + scale,
               "kid": 0.01, "class_accuracy": 0.5, "seconds": 1.0} for scale in (1.0, 2.0)],
    "versions": {"torch": "2"},
}  # fmt: skip


# --- the command that draws ------------------------------------------------------------------------------------------

SAMPLE_FLAGS = {
    "--labels": ["rose", "0", "Tulip 3"], "--num_images": ["1", "2"], "--seed": ["0", "7"], "--steps": ["1", "2"],
    "--guidance_scale": ["1", "3.5"], "--guidance_interval": ["0 1", "0.2 0.5"], "--guidance_rescale": ["0", "0.7"],
    "--scheduler": ["ddim", "dpm++", "unipc", "heun", "pndm", "euler"], "--strength": ["0.8", "1"],
    "--device": ["cpu"], "--dtype": ["float32"], "--batch_size": ["1", "32"], "--output": ["drawn"],
    "--guide": ["whole"], "--image": ["picture.png"], "--mask": ["picture.png"],
}  # fmt: skip


@st.composite
def sample_words(draw) -> list[str]:
    words = []
    for flag in draw(st.lists(st.sampled_from(list(SAMPLE_FLAGS)), min_size=1, max_size=4, unique=True)):
        values = draw(st.sampled_from(SAMPLE_FLAGS[flag])).split()
        if draw(st.integers(0, 2)) == 0:
            values = draw(st.lists(st.sampled_from([*BAD_TEXTS, *NOT_WHOLE]) | st.text(max_size=5), max_size=2))
        words += [flag, *values] if len(values) != 1 else [f"{flag}={values[0]}"]
    return words


class SampleFlags(Kind):
    """`python -m flower_ldm.sample` by its flags; what is accepted is drawn."""

    name = "flags of sample"
    short, long = 20, 300

    def __init__(self, folder, runs):
        super().__init__(folder, runs)
        tiny_pipeline().save_pretrained(Path("whole"))
        Image.new("RGB", (20, 20)).save("picture.png")

    def cases(self):
        return sample_words()

    def run(self, case):
        words = ["--pipeline", "whole", "--num_images", "1", "--steps", "2", "--output", "drawn", *case]
        printed = io.StringIO()
        with redirect_stdout(printed):
            sample.main(words)
        folder = Path(printed.getvalue().strip().rpartition(" are in ")[2])
        assert (folder / "grid.png").is_file() and len(list(folder.glob("*.png"))) > 1, "nothing drawn"
        shutil.rmtree(folder)


class VggFiles(Kind):
    """`--vgg_weights`: a file of stage 1's judge."""

    name = "files of VGG16"
    short, long = 5, 120

    def __init__(self, folder, runs):
        super().__init__(folder, runs)
        torch.manual_seed(0)
        layers = make_layers(cfgs["D"][:9])
        tensors = {f"features.{name}": value for name, value in layers.state_dict().items()}
        save_file(tensors, folder / "vgg.safetensors")
        torch.save(tensors, folder / "vgg.pth")
        torch.save(dict.fromkeys(tensors, "text"), folder / "texts.pth")
        torch.save(list(tensors), folder / "list.pth")
        self.safe = (folder / "vgg.safetensors").read_bytes()
        self.others = [(folder / name).read_bytes() for name in ("vgg.pth", "texts.pth", "list.pth")]

    def cases(self):
        safe = st.tuples(st.just("vgg.safetensors"), changed_safetensors(self.safe))
        return safe | st.tuples(st.just("vgg.pth"), changed_bytes(self.others[1:]) | changed_bytes(self.others[:1]))

    def run(self, case):
        path = self.folder / case[0]
        path.write_bytes(case[1])
        judge = PerceptualLoss(path)
        loss = judge(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16))
        assert loss.isfinite(), "a loss that is not finite"

    def named(self, case):
        return ("--vgg_weights",)


# --- visitors --------------------------------------------------------------------------------------------------------


class Visitors(Kind):
    """What a visitor of the page sends to its endpoints by hand."""

    name = "requests to the page"
    short, long = 60, 800

    def __init__(self, folder, runs):
        super().__init__(folder, runs)
        self.app = pytest.importorskip("app")
        pytest.importorskip("gradio")
        self.pipe = tiny_pipeline()

    def cases(self):
        flowers = st.lists(st.sampled_from(list(NAMES.values())), min_size=1, max_size=3)
        odd_flowers = st.lists(st.sampled_from(list(NAMES.values())) | bad_values, max_size=10)
        numbers, samplers = st.integers(1, 12), st.sampled_from(["DDIM", "Euler", "The pipeline's own"])
        fine = [flowers, st.integers(1, 4), numbers, numbers, st.floats(1, 10), samplers]
        odd = [odd_flowers, *[numbers] * 5]

        @st.composite
        def requests(draw):
            wrong = draw(st.sets(st.sampled_from(range(len(fine))), max_size=2))
            return [draw(odd[i] | bad_values if i in wrong else one) for i, one in enumerate(fine)], not wrong

        return requests()

    def run(self, case):
        import gradio

        try:
            request = self.app.check_request(self.pipe, *case[0])
        except gradio.Error as error:
            assert "<" not in error.message.replace("&lt;", ""), "live markup in an error"
            return error.message
        assert 1 <= len(request.labels) * request.images_each <= self.app.MAX_IMAGES and set(request.labels) <= set(
            range(4)
        )
        assert 0 <= request.seed <= self.app.MAX_SEED and 1 <= request.steps <= self.app.MAX_STEPS
        assert 1 <= request.guidance <= self.app.MAX_GUIDANCE

    def expects(self, case):
        return True if case[1] else None


# --- the two forms ---------------------------------------------------------------------------------------------------

KINDS = [
    Flags, Recipes, ModelConfigs, Labels, Calls, Pictures, DrawnOver, Folders, DataSets, Repositories, Autoencoders,
    Checkpoints, Caches, Logs, RunFolders, SampleFlags, VggFiles, Visitors,
]  # fmt: skip
HEAD = ("kind", "inputs", "refused in one line", "accepted (valid)", "other", "slowest")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A folder to be in, deep enough for `../..`; no token, no network."""
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


def tried(kind: type[Kind], number: int, runs) -> Tally:
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as folder:
        return fuzz(kind(Path(folder), runs if kind is RunFolders else None), number)


def complaints(tallies: list[Tally]) -> str:
    return "\n".join(
        f"{tally.kind}: {what}\n    input: {shown[:400]}\n    said: {detail[:400]}"
        for tally in tallies
        for what, (shown, detail) in tally.findings.items()
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_few_inputs_of_each_kind(kind, elsewhere, request):
    tally = tried(kind, kind.short, request.getfixturevalue("finished_runs") if kind is RunFolders else None)
    assert tally.inputs >= kind.short / 2
    if tally.findings:
        pytest.fail(complaints([tally]), pytrace=False)


@pytest.mark.slow
def test_ten_thousand_inputs(elsewhere, finished_runs, record_property):
    tallies = [tried(kind, kind.long, finished_runs) for kind in KINDS]
    rows = [(t.kind, t.inputs, t.refused, t.accepted, t.other, f"{t.slowest:.1f} s") for t in tallies]
    total = ("all", *(sum(row[column] for row in rows) for column in range(1, 5)), "")
    table = ["{:32}{:>8}{:>21}{:>18}{:>7}{:>9}".format(*row) for row in (HEAD, *rows, total)]
    record_property("counts", "\n".join([f"bad inputs, seed {SEED}", *table]))
    if total[4]:
        pytest.fail(complaints(tallies), pytrace=False)
    assert total[1] >= 10_000
