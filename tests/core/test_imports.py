"""References to the user's code: where they are looked up, whose source they are, and code that travels."""

import importlib
import sys
from pathlib import Path

import pytest

from heliostat.core.imports import (
    call_isolated,
    digest_sources,
    own_sources,
    reference_to,
    resolve,
    use_root,
    why_not_callable,
)
from heliostat.errors import SpecError


@pytest.fixture
def folder(tmp_path):
    """A function that writes modules into a folder, which is then the first place where modules are looked up."""
    root = tmp_path / "project"
    root.mkdir()

    def write(**sources: str) -> Path:
        for name, source in sources.items():
            path = root / f"{name.replace('__', '/')}.py".replace("init.py", "__init__.py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        importlib.invalidate_caches()
        use_root(root)
        return root

    return write


# --- references ------------------------------------------------------------------------------------


def test_a_reference_names_functions_classes_methods_and_packages(folder):
    folder(
        mine="class Net:\n    @staticmethod\n    def small(): return 'small'\n", package__init="", package__net="x = 3"
    )
    assert resolve("mine:Net").__name__ == "Net"
    assert resolve("mine:Net.small")() == "small"
    assert resolve("package.net:x") == 3
    assert resolve("math:sqrt")(4) == 2


def test_the_folder_comes_before_what_is_installed(folder):
    folder(colorsys="x = 'mine'")
    sys.modules.pop("colorsys", None)
    assert resolve("colorsys:x") == "mine"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("mine", "'mine' is not a reference; write it as 'module:attribute'"),
        ("mine:", "is not a reference"),
        ("mine:a b", "is not a reference"),
        ("../mine:x", "is not a reference"),
        ("mien:x", "no module named 'mien'; did you mean 'mine'?"),
        ("package.nett:x", "no module named 'package.nett'; did you mean 'package.net'?"),
        ("mine:bulid", "'mine' has no 'bulid'; did you mean 'build'?"),
        ("mine:zzz", "'mine' has no 'zzz'; known: Net, build"),
        ("mine:Net.larg", "'mine' has no 'larg'; did you mean 'large'?"),
        ("os:zzzzzz", "'os' has no 'zzzzzz'"),
    ],
)
def test_a_reference_to_nothing_is_refused_with_the_nearest_name(folder, reference, message):
    folder(mine="def build(): ...\nclass Net:\n    large = 1\n", package__init="", package__net="x = 3")
    with pytest.raises(SpecError) as caught:
        resolve(reference)
    assert message in str(caught.value)


def test_many_names_are_not_listed(folder):
    with pytest.raises(SpecError, match=r"'os' has no 'zzzzzz'$"):
        resolve("os:zzzzzz")


def test_what_went_wrong_inside_a_module_is_kept_as_the_cause(folder):
    folder(mine="import numpyy\n")
    with pytest.raises(SpecError, match="module 'mine' does not import: ModuleNotFoundError: No module named 'numpyy'"):
        resolve("mine:x")
    with pytest.raises(SpecError) as caught:
        resolve("mine:x")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_function_gives_the_reference_that_finds_it_again(folder):
    folder(mine="class Net:\n    def small(self): ...\n")
    assert reference_to(resolve("mine:Net.small")) == "mine:Net.small"
    assert reference_to(Path) == "pathlib:Path"
    for nameless in (lambda: None, 3):
        with pytest.raises(SpecError, match="no importable name"):
            reference_to(nameless)


def test_a_function_of_the_script_itself_goes_by_the_name_of_its_file(monkeypatch, tmp_path):
    def build(): ...

    build.__module__, build.__qualname__ = "__main__", "build"
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "script.py"), raising=False)
    assert reference_to(build) == "script:build"
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    with pytest.raises(SpecError, match="interactive session; move it into a module"):
        reference_to(build)


def _optional(width, *, bias=True): ...
def _anything(**kwargs): ...
def _nothing(): ...


@pytest.mark.parametrize(
    ("function", "arguments", "how", "why"),
    [
        (_optional, ["width"], {}, None),
        (_optional, ["width", "bias"], {}, None),
        (_optional, ["bias"], {}, "cannot be called so: missing a required argument: 'width'"),
        (_optional, ["bias"], {"partial": True}, None),
        (_optional, ["widht"], {}, "takes no argument 'widht'; did you mean 'width'?"),
        (_optional, ["bias"], {"positional": 1}, None),
        (_optional, [], {"positional": 2}, "cannot be called so: too many positional arguments"),
        (_anything, ["whatever"], {}, None),
        (_nothing, ["width"], {}, "takes no argument 'width'; it takes none"),
        (3, [], {}, "is of type int, not a function"),
        (dict, ["whatever"], {}, None),
    ],
)
def test_whether_a_function_takes_arguments_is_known_without_calling_it(function, arguments, how, why):
    assert why_not_callable(function, arguments, **how) == why


# --- whose source it is ----------------------------------------------------------------------------


def test_own_sources_follow_imports_through_packages_and_relative_ones(folder):
    root = folder(
        mine="import helper\nimport numpy\nfrom package.sub import net\n",
        helper="def late():\n    import lazy\n",
        lazy="",
        unrelated="",
        package__init="from . import other\n",
        package__other="",
        package__unused="",
        package__sub__init="",
        package__sub__net="from ..common import x\nfrom .block import Block\n",
        package__sub__block="class Block: ...\n",
        package__common="x = 1\n",
    )
    assert list(own_sources(["mine:build", "torch.nn:Linear"], root)) == [
        "helper.py",
        "lazy.py",
        "mine.py",
        "package/__init__.py",
        "package/common.py",
        "package/other.py",
        "package/sub/__init__.py",
        "package/sub/block.py",
        "package/sub/net.py",
    ]


def test_modules_that_import_each_other_are_each_taken_once(folder):
    root = folder(a="import b\n", b="import a\n")
    assert list(own_sources(["a:x", "b:y", "a:z"], root)) == ["a.py", "b.py"]


def test_installed_packages_and_heliostat_itself_are_not_the_users_source(folder):
    root = folder(mine="import json, yaml, torch, heliostat\nfrom heliostat.core import spec\n")
    assert list(own_sources(["mine:x", "yaml:load", "heliostat.stages.train:train"], root)) == ["mine.py"]


def test_packages_that_are_installed_for_one_user_alone_are_not_the_users_source(folder, tmp_path, monkeypatch):
    theirs = tmp_path / "local" / "site-packages"
    theirs.mkdir(parents=True)
    (theirs / "theirs.py").write_text("x = 1")
    root = folder(mine="import theirs\nx = theirs.x")
    monkeypatch.syspath_prepend(theirs)
    resolve("mine:x")
    assert list(own_sources(["mine:x"], root)) == ["mine.py"]


def test_a_project_inside_the_folder_of_installed_packages_is_still_the_users(tmp_path, monkeypatch):
    """Such as one in a Ray job's working directory, which lies where packages are looked up."""
    site = tmp_path / "site-packages"
    project = site / "project"
    project.mkdir(parents=True)
    (project / "mine.py").write_text("import library\n")
    (site / "library.py").write_text("")
    monkeypatch.setattr("site.getsitepackages", lambda: [str(site)])
    monkeypatch.syspath_prepend(site)
    importlib.import_module("library")
    assert list(own_sources(["mine:x"], project)) == ["mine.py"]


def test_line_endings_do_not_change_the_digest(folder):
    root = folder(mine="x = 1\ny = 2\n")
    before = digest_sources(own_sources(["mine:x"], root))
    (root / "mine.py").write_bytes(b"x = 1\r\ny = 2\r\n")
    assert digest_sources(own_sources(["mine:x"], root)) == before


def test_source_that_does_not_parse_is_refused_by_its_file(folder):
    root = folder(mine="import broken\n", broken="def f(:\n")
    with pytest.raises(SpecError, match=r"broken\.py does not parse: invalid syntax"):
        own_sources(["mine:x"], root)


# --- code that travels with an artifact ------------------------------------------------------------


def write_version(folder: Path, version: int) -> Path:
    (folder / "package").mkdir(parents=True)
    (folder / "net.py").write_text(
        "from package.part import VERSION\n\ndef build(extra=0):\n    return VERSION + extra\n"
    )
    (folder / "package/__init__.py").write_text("")
    (folder / "package/part.py").write_text(f"VERSION = {version}\n")
    return folder


def test_two_versions_of_one_module_live_in_one_process(tmp_path):
    old, new = write_version(tmp_path / "old", 1), write_version(tmp_path / "new", 2)
    assert [call_isolated("net:build", folder, {}) for folder in (old, new, old)] == [1, 2, 1]
    assert call_isolated("net:build", new, {"extra": 10}) == 12


def test_isolated_code_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    working, travelled = write_version(tmp_path / "working", 1), write_version(tmp_path / "travelled", 2)
    use_root(working)
    mine = importlib.import_module("net")
    path = list(sys.path)
    assert call_isolated("net:build", travelled, {}) == 2
    assert sys.modules["net"] is mine
    assert sys.modules["package.part"].VERSION == 1
    assert sys.path == path
    assert sys.dont_write_bytecode is False
    assert not list(travelled.rglob("__pycache__"))


def test_isolated_code_that_fails_leaves_no_trace_either(tmp_path):
    travelled = write_version(tmp_path / "travelled", 2)
    (travelled / "net.py").write_text("raise RuntimeError('no')\n")
    path = list(sys.path)
    with pytest.raises(SpecError, match="RuntimeError: no"):
        call_isolated("net:build", travelled, {})
    assert sys.path == path
    assert "net" not in sys.modules


def test_what_did_not_travel_resolves_as_usual(tmp_path):
    assert call_isolated("math:hypot", tmp_path, {}) == 0
    assert call_isolated("builtins:dict", tmp_path / "nowhere", {"a": 1}) == {"a": 1}
