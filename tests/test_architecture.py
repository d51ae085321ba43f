"""The house: the tree, the import rule, the sizes of files, and what may be imported by whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "heliostat"
LEVELS = [
    {"errors"},
    {"core", "templates"},
    {"tracking", "training", "compression", "mirror"},
    {"runtime"},
    {"stages", "report"},
    {"history"},
    {"execution", "rerun"},
    {"runner"},
    {"cli"},
]
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}
ONLY_HOME = {"ray": "runtime", "mlflow": "tracking", "pyarrow": "mirror"}
HEAVY = ("torch", "ray", "mlflow")
ENGINES = ("hyperopt", "optuna")
MAX_LINES = 400
MODEL_SCRIPT = PACKAGE / "tracking" / "pyfunc_model.py"
"""Stored with a model in MLflow and run there: the only file below that uses the public names from outside."""

modules = sorted(p for p in PACKAGE.rglob("*.py") if "project" not in p.parts and p != PACKAGE / "__init__.py")
python_files = sorted(p for folder in ("platform", "pipelines", "tests") for p in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", modules, ids=relative)
def test_imports_go_one_way(module: Path) -> None:
    own = part_of(module)
    for name in imported(module):
        parts = name.split(".")
        assert not name.startswith("."), f"{name}: say heliostat.…, so that a reader and this test see where it leads"
        if parts[0] != "heliostat":
            continue
        if len(parts) == 1 or parts[1] not in LEVEL_OF:  # a public name of the package, such as `heliostat.run`
            assert module == MODEL_SCRIPT or own in {"cli"}, f"{name}: import it from the module where it lives"
            continue
        other = parts[1]
        assert other == own or LEVEL_OF[other] < LEVEL_OF[own], f"{own} may not import {name}"


@pytest.mark.parametrize("module", modules, ids=relative)
def test_heavy_libraries_stay_in_their_home(module: Path) -> None:
    roots = {name.partition(".")[0] for name in imported(module)}
    for library, home in ONLY_HOME.items():
        assert library not in roots or part_of(module) == home, f"only {home}/ imports {library}"
    if part_of(module) == "core":
        assert not roots & set(HEAVY)


@pytest.mark.parametrize(
    "names",
    [
        "heliostat",
        "heliostat.stages",
        "heliostat.core.plan",
        "heliostat.training.config",
        "heliostat.runner",
        "heliostat.runtime.engines; heliostat.runtime.engines.engines()",
    ],
)
def test_what_plan_needs_imports_nothing_heavy(names: str) -> None:
    script = f"import sys, {names}; print(*({set(HEAVY + ENGINES)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_files_have_one_job() -> None:
    sizes = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files}
    assert {name: lines for name, lines in sizes.items() if lines > MAX_LINES} == {}


def test_platform_and_tests_are_not_packages() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_import_platform_from_the_root_gives_the_standard_library() -> None:
    script = "import platform; print(platform.python_version())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("3.")


@pytest.mark.parametrize("path", python_files, ids=relative)
def test_nothing_imports_heliostat_through_platform(path: Path) -> None:
    assert not any(name.startswith("platform.heliostat") for name in imported(path))


@pytest.mark.parametrize("module", modules, ids=relative)
def test_modules_and_public_names_say_what_they_are(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    if tree.body:
        assert ast.get_docstring(tree), "a module says what it is"
    for node in tree.body:
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if public and not _is_small(node):
            assert ast.get_docstring(node), f"{node.name} says what it does"


def _is_small(node: ast.stmt) -> bool:
    """A name says enough of what takes a few lines."""
    return (node.end_lineno or 0) - node.lineno < 8


def test_the_top_level_is_what_was_agreed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.partition("/")[0] for name in listed if not name.startswith(".")}
    assert top == {
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "SECURITY.md",
        "cluster",
        "constraints.txt",
        "pipelines",
        "platform",
        "pyproject.toml",
        "tests",
    }
