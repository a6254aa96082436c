"""The house rules that a reader of one file can't see: which way imports point, what may travel to the Hub, that the
package's lists match its files, and that no file knows the machine it was written on.
"""

import ast
import importlib.metadata
import re
import shutil
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
TRAVELING = [
    path
    for path in SOURCES
    if path.name != "__init__.py" and path.parent in (Path("flower_ldm/models"), Path("pipelines"))
]


def module_name(path: Path) -> str:
    """As it is imported: the folder pipelines/ is a part of the package."""
    packaged = Path("flower_ldm", path) if path.parts[0] == "pipelines" else path
    return ".".join(packaged.with_suffix("").parts).removesuffix(".__init__")


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
    assert {"flower_ldm", "flower_ldm.errors", "flower_ldm.models", "flower_ldm.pipelines"} <= MODULES.keys()
    assert "flower_ldm.errors" in imports_of(Path("flower_ldm/latent_cache.py"))
    assert Path("flower_ldm/models/autoencoder_flower.py") in TRAVELING


@pytest.mark.parametrize("path", TRAVELING, ids=str)
def test_traveling_file_imports_what_a_stranger_has(path):
    """From the Hub each is fetched alone: the standard library, torch, diffusers, and Pillow, which comes with it."""
    allowed = {"torch", "diffusers", "PIL"} | sys.stdlib_module_names
    assert {module for module in imports_of(path) if top(module) not in allowed} == set()


def test_packages_import_no_scripts_and_pipelines_nothing_of_ours():
    """Scripts and benchmarks -> flower_ldm.* -> flower_ldm.pipelines, flower_ldm.models, which stand on their own."""
    for path in SOURCES:
        if path.parts[0] in PACKAGES:
            allowed = set() if path in TRAVELING else {"flower_ldm"}
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
        foreign = {top(module) for module in imports_of(path)} - sys.stdlib_module_names - {"flower_ldm"}
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


def test_the_tests_that_the_promises_name_are_there():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/promises.md").read_text("utf-8"))
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


def test_the_package_is_imported_beside_a_strangers_folders(tmp_path):
    """Whoever works with Hugging Face has folders of these names. No installed top-level package may need them."""
    for name in ("pipelines", "models", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("mine = True\n")
    (tmp_path / "training.py").write_text("mine = True\n")
    program = (
        "import flower_ldm, flower_ldm.data, flower_ldm.training, pipelines, models, data, training\n"
        "assert pipelines.mine and models.mine and data.mine and training.mine\n"
        "assert flower_ldm.FlowerLDMPipeline.__module__ == 'flower_ldm.pipelines.pipeline_flower_ldm'\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


def test_what_is_installed_is_one_package_with_the_pipeline_inside(tmp_path):
    """As `pip install` makes it: nothing at the top level but `flower_ldm`, and it works far from the clone."""
    pytest.importorskip("setuptools")
    for name in ("flower_ldm", "pipelines", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    command = "import setuptools; setuptools.setup()"
    built = tmp_path / "built"
    subprocess.run([sys.executable, "-c", command, "-q", "build_py", "--build-lib", built], cwd=tmp_path, check=True)
    assert [path.name for path in built.iterdir()] == ["flower_ldm"]
    program = (
        f"import sys; sys.path.insert(0, {str(built)!r}); import flower_ldm\n"
        f"assert flower_ldm.__path__ == [{str(built / 'flower_ldm')!r}], flower_ldm.__path__\n"
        "import flower_ldm.pipelines, flower_ldm.report\n"
        "assert flower_ldm.report.TEMPLATES.is_dir()\n"
    )
    (tmp_path / "elsewhere").mkdir()
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "elsewhere", check=True)


def test_every_package_is_installed(pyproject):
    packages = {module_name(path) for path in SOURCES if path.name == "__init__.py" and path.parts[0] in PACKAGES}
    assert set(pyproject["tool"]["setuptools"]["packages"]) == packages


# Size

LONGEST_FUNCTION = 60  # lines, its docstring apart


def test_every_function_fits_a_screen():
    """Except the two training loops, which are read from top to bottom."""
    too_long = []
    for path, tree in SOURCES.items():
        for node in ast.walk(tree) if path.parts[0] != "tests" else ():
            if isinstance(node, ast.FunctionDef) and not (path.name.startswith("train_") and node.name == "train"):
                docstring = node.body[0] if ast.get_docstring(node) else None
                told = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
                if node.end_lineno - node.lineno + 1 - told > LONGEST_FUNCTION:
                    too_long.append(f"{path}:{node.lineno} {node.name}")
    assert too_long == []
