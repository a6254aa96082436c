"""The house rules that a reader of one file can't see: which way imports point, what may travel to the Hub, that the
package's lists match its files, and that no file knows the machine it was written on.
"""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import flower_ldm

ROOT = Path(__file__).parent.parent
PACKAGES = ("flower_ldm", "pipelines")


def project_files() -> list[Path]:
    """Every file of the repository, committed or about to be."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


FILES = project_files()
SOURCES = {path.relative_to(ROOT): ast.parse(path.read_text("utf-8")) for path in FILES if path.suffix == ".py"}
TRAVELLING = [
    path
    for path in SOURCES
    if path.name != "__init__.py" and path.parent in (Path("flower_ldm/models"), Path("pipelines"))
]


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; `from a import b` is a.b where that is a module of ours."""
    found = set()
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts[: len(path.parent.parts) + 1 - node.level] if node.level else ()
            base = ".".join([*package, node.module] if node.module else package)
            names = {f"{base}.{alias.name}" for alias in node.names}
            found.update(name if name in MODULES else base for name in names)
    return found


def top(module: str) -> str:
    return module.partition(".")[0]


# Imports


def test_the_walk_sees_the_project():
    assert {"flower_ldm", "flower_ldm.errors", "flower_ldm.models", "pipelines"} <= MODULES.keys()
    assert "flower_ldm.errors" in imports_of(Path("flower_ldm/latent_cache.py"))
    assert Path("flower_ldm/models/autoencoder_flower.py") in TRAVELLING


@pytest.mark.parametrize("path", TRAVELLING, ids=str)
def test_travelling_file_imports_what_a_stranger_has(path):
    """From the Hub each is fetched alone: the standard library, torch, diffusers, and Pillow, which comes with it."""
    allowed = {"torch", "diffusers", "PIL"} | sys.stdlib_module_names
    assert {module for module in imports_of(path) if top(module) not in allowed} == set()


def test_packages_import_no_scripts_and_pipelines_nothing_of_ours():
    """Scripts and benchmarks -> flower_ldm.* -> pipelines, flower_ldm.models, which stand on their own."""
    for path in SOURCES:
        if path.parts[0] in PACKAGES:
            allowed = set() if path in TRAVELLING else {"flower_ldm", "pipelines"}
            assert {top(module) for module in imports_of(path) if module in MODULES} <= allowed, path


def test_only_tests_import_tests():
    for path in SOURCES:
        if path.parts[0] != "tests":
            assert "tests" not in {top(module) for module in imports_of(path)}, path


def test_no_import_cycle():
    graph = {name: imports_of(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    while graph:
        leaves = {name for name, imported in graph.items() if not imported}
        assert leaves, f"these import each other in a circle, or one that does: {sorted(graph)}"
        graph = {name: imported - leaves for name, imported in graph.items() if name not in leaves}


def test_every_import_is_in_the_requirements(pyproject):
    """Or, of a script at the root, among the extras."""
    required = {canonicalize_name(requirement.name) for requirement in requirements()}
    extras = {
        canonicalize_name(Requirement(line).name) for line in pyproject["project"]["optional-dependencies"]["app"]
    }
    distributions = importlib.metadata.packages_distributions()
    for path in SOURCES:
        if path.parts[0] == "tests":
            continue
        foreign = {top(module) for module in imports_of(path)} - sys.stdlib_module_names - set(PACKAGES)
        for module in foreign - {"trackio"}:  # whoever chooses it by --report_to has it
            if module not in {top(name) for name in MODULES}:
                offered_by = {canonicalize_name(name) for name in distributions.get(module, [module])}
                allowed = required | extras if len(path.parts) == 1 else required
                assert offered_by & allowed, f"{path} imports {module}"


def test_every_image_is_opened_in_one_place():
    """Which names the formats, of which Pillow has too many, and minds the size."""
    readers = {"imread", "load_image", "read_image", "decode_image"}
    for path, tree in SOURCES.items():
        if path.parts[0] == "tests" or path == Path("flower_ldm/images.py"):
            continue
        for node in ast.walk(tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert not (called.endswith("Image.open") or called.rpartition(".")[2] in readers), (path, node.lineno)
            if isinstance(node, ast.Attribute) and node.attr == "open":  # given to `partial`, say
                assert ast.unparse(node.value).rpartition(".")[2] != "Image", (path, node.lineno)


# Files


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "misc"])
def test_no_file_is_called_after_nothing(name):
    assert [path for path in SOURCES if path.stem == name or name in path.parts] == []


def test_every_file_says_what_it_is():
    unsaid = [path for path, tree in SOURCES.items() if tree.body and not ast.get_docstring(tree)]
    assert unsaid == []


def test_data_flow_is_told_in_the_same_words_everywhere():
    line = (
        "data -> autoencoder_losses -> FlowerAutoencoderKL -> latent_cache -> diffusion -> FlowerUNet2DModel -> EMA "
        "-> FlowerLDMPipeline -> evaluation + visualization -> report + model_card"
    )
    for path in (ROOT / "flower_ldm/__init__.py", ROOT / "README.md", *ROOT.glob("train_*.py")):
        assert line in " ".join(path.read_text("utf-8").split()), path.name


def test_no_file_knows_the_machine_it_was_written_on():
    folders = "|".join(["home", "root", "Users", "work", "workspace", "mnt", "scratch", "tmp", "content"])
    machine_path = re.compile(rf"(?<![\w.~-])/(?:{folders})/[\w.]|\b[A-Z]:\\+Users")
    for path in FILES:
        content = path.read_bytes()
        if b"\0" not in content:
            hits = [line for line in content.decode("utf-8").splitlines() if machine_path.search(line)]
            assert hits == [], path


def test_the_tests_that_the_readme_names_are_there():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "README.md").read_text("utf-8"))
    assert named
    for file, test in named:
        assert test in {node.name for node in SOURCES[Path("tests") / file].body if isinstance(node, ast.FunctionDef)}


# Packaging


def requirement_lines() -> list[str]:
    return (ROOT / "requirements.txt").read_text("utf-8").splitlines()


def requirements() -> list[Requirement]:
    return [Requirement(line.partition("#")[0].strip()) for line in requirement_lines()]


def test_every_requirement_says_who_needs_it():
    for line in requirement_lines():
        assert re.fullmatch(r"[\w-]+>=[\d.]+ +# \S.+", line), line


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_requirement_is_installed(requirement):
    assert requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)


@pytest.fixture
def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_version_has_one_source_that_needs_no_import(pyproject):
    assert "version" in pyproject["project"]["dynamic"]
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "flower_ldm.__version__"}
    [literal] = [
        node.value.value  # what setuptools reads without running the file
        for node in SOURCES[Path("flower_ldm/__init__.py")].body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    ]
    assert literal == flower_ldm.__version__ == str(Version(literal))


def test_every_package_is_installed(pyproject):
    packages = {module_name(path) for path in SOURCES if path.name == "__init__.py" and path.parts[0] in PACKAGES}
    assert set(pyproject["tool"]["setuptools"]["packages"]) == packages
