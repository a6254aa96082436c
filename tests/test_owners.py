"""Each file of a run is named in one place, `flower_ldm/runs.py`: a second literal would drift from the first."""

import ast
import re
from pathlib import Path

import pytest
from test_structure import SOURCES, TRAVELING

from flower_ldm import runs

OWNER = Path("flower_ldm/runs.py")
ALONE = {*TRAVELING, Path("app.py")}  # travel to the Hub, where there is no package to ask for a name


def literals(tree: ast.Module) -> list[tuple[int, str]]:
    """Every text in the code with its line, within f-strings too; no docstring, no comment."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    blocks = [node.body for node in ast.walk(tree) if isinstance(node, documented)]
    docstrings = {id(block[0].value) for block in blocks if block and isinstance(block[0], ast.Expr)}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [(node.lineno, node.value) for node in texts if id(node) not in docstrings]


LITERALS = {
    path: literals(tree)
    for path, tree in SOURCES.items()
    if path.parts[0] not in ("tests", "docs") and path not in ALONE
}


def telling_part(name: str) -> str:
    """The longest part of an artifact's name without a star; of its folder's, where others name the files in it."""
    folder, _, file = name.rpartition("/")
    return max(re.split(r"[*/]|<step>", folder if file.startswith("*") else file), key=len)


NAMES = sorted({telling_part(artifact.name) for artifact in runs.ARTIFACTS})


def places(name: str) -> set[str]:
    """Where a name stands, or what begins with it where it is a part: "file, line"."""
    spelled = re.compile(rf"(?<![\w.-]){re.escape(name)}" + (r"(?![\w-])" if name[-1].isalnum() else ""))
    return {f"{path}, line {line}" for path, texts in LITERALS.items() for line, text in texts if spelled.search(text)}


def test_literals_are_found_wherever_code_can_hold_them():
    function = 'def f(x):\n    """To b.png."""\n    # and c.png\n    return f"{x}/d.png", {"e.png": [x]}\n'
    code = f'"""Writes a.png."""\n{function}'
    assert {text for _, text in literals(ast.parse(code))} == {"/d.png", "e.png"}
    assert {"metrics.json", "denoising_path_", "step-", "latent_cache", "checkpoint-", "config.json"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_artifact_is_named_in_one_place(name):
    owner = Path("flower_ldm/run_lock.py") if name == runs.LOCK else OWNER
    named = places(name)
    assert any(place.startswith(f"{owner}, ") for place in named)
    second = sorted(place for place in named if not place.startswith(f"{owner}, "))
    assert second == [], f"{name} is named in {owner} and, a second time, in {'; '.join(second)}"


def test_every_artifact_is_in_the_table():
    declared = {value for value in vars(runs).values() if isinstance(value, runs.Artifact)}
    assert runs.METRICS_FILE in declared and declared <= set(runs.ARTIFACTS)
    assert len(set(runs.RUN_FILES)) == len(runs.RUN_FILES)


def test_no_photograph_goes_to_the_hub():
    assert [artifact.name for artifact in runs.ARTIFACTS if artifact.shows_photographs and artifact.on_hub] == []
    assert {"reconstructions/step-*.png", "original_reconstructed_generated.png", "nearest_neighbours.png"} <= {
        artifact.name for artifact in runs.ARTIFACTS if artifact.shows_photographs
    }
