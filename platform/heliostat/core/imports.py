"""References to the user's code: `module:attribute` strings, where they are looked up, and whose source they are.

A module is looked up in the folder of the pipeline file first, then among the installed packages. Modules found in
that folder (or installed in editable mode) are the user's own: their source is part of a node's identity and travels
with its artifacts.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import site
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from heliostat.errors import SpecError, nearest

REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
SHOW_AT_MOST = 20
"""So many known names are listed when none is near."""


def reference_to(target: Callable[..., Any]) -> str:
    """The `module:attribute` of a function or class. Raises SpecError for what cannot be found again by name."""
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if module is None or name is None or "<" in name:
        raise SpecError(f"{target!r} has no importable name; define it at the top level of a module")
    if module == "__main__":
        file = getattr(sys.modules["__main__"], "__file__", None)
        if file is None:
            raise SpecError(f"{name} is defined in an interactive session; move it into a module")
        module = Path(file).stem
    return f"{module}:{name}"


def use_root(root: Path) -> None:
    """Make the modules of the pipeline's folder importable in this process, before any installed ones."""
    folder = str(root)
    if sys.path[:1] != [folder]:
        sys.path[:] = [folder, *(p for p in sys.path if p != folder)]
        importlib.invalidate_caches()


def resolve(reference: str) -> Any:
    """The object that `module:attribute` names. Raises SpecError with the real reason when there is none."""
    if not REFERENCE.fullmatch(reference):
        raise SpecError(f"{reference!r} is not a reference; write it as 'module:attribute'")
    module_name, _, attribute = reference.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise SpecError(f"no module named {error.name!r}{_hint(error.name, _modules_beside(error.name))}") from None
        raise SpecError(f"module {module_name!r} does not import: {type(error).__name__}: {error}") from error
    except (Exception, SystemExit) as error:  # a script without a main guard exits when it is imported
        raise SpecError(f"module {module_name!r} does not import: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [n for n in dir(found) if not n.startswith("_")]
            raise SpecError(f"{module_name!r} has no {part!r}{_hint(part, names)}")
        found = getattr(found, part)
    return found


def _hint(word: str, names: list[str]) -> str:
    """The nearest name, or all of them when they are few."""
    text = nearest(word, names)
    return text if text.startswith("; did") or len(names) <= SHOW_AT_MOST else ""


def _modules_beside(name: str) -> list[str]:
    """The modules of the same package, or those that the pipeline's folder offers, for a did-you-mean."""
    package = name.rpartition(".")[0]
    places = getattr(sys.modules.get(package), "__path__", []) if package else sys.path[:1]
    return [f"{package}.{found.name}" if package else found.name for found in pkgutil.iter_modules(places)]


def why_not_callable(
    function: Any, arguments: Iterable[str], *, positional: int = 0, partial: bool = False
) -> str | None:
    """Why `function` cannot be called with these keyword arguments, or None when it can.

    With `partial`, more keyword arguments will come later, so that a missing one is not a fault.
    """
    if not callable(function):
        return f"is of type {type(function).__name__}, not a function"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins written in C have no signature to check
        return None
    accepted = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for name in arguments:
        if name not in accepted and not takes_any:
            return f"takes no argument {name!r}{nearest(name, accepted[positional:]) or '; it takes none'}"
    try:
        bind = signature.bind_partial if partial else signature.bind
        bind(*[None] * positional, **dict.fromkeys(arguments))
    except TypeError as error:
        return f"cannot be called so: {error}"
    return None


# --- whose source it is ----------------------------------------------------------------------------


PACKAGES = ("site-packages", "dist-packages")
"""How folders of installed packages are called, also those of a user (`pip install --user`) or that a `.pth` adds."""


def _installed_folders() -> tuple[Path, ...]:
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders.update(site.getsitepackages())
    folders.update(path for path in sys.path if Path(path).name in PACKAGES)
    folders.add(str(Path(__file__).resolve().parents[1]))  # heliostat itself: its stages carry a version instead
    return tuple(Path(f).resolve() for f in folders if f)


def _is_own(file: Path, root: Path, installed: Sequence[Path]) -> bool:
    """Whether a source file is the user's: in the pipeline's folder, or in no place where packages are installed."""
    around = [folder for folder in installed if folder in file.parents]
    return all(root in file.parents and folder in root.parents for folder in around)


def _module_file(name: str, root: Path) -> Path | None:
    """The source file of a module in the folder, or of one that is imported already. Imports nothing."""
    base = root.joinpath(*name.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate.resolve()
    loaded = getattr(sys.modules.get(name), "__file__", None)
    return Path(loaded).resolve() if loaded and loaded.endswith(".py") else None


def _imported_names(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Every module that the source may import, at any depth of it; `from a import b` may mean the module a.b."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def own_sources(references: Iterable[str], root: Path) -> dict[str, bytes]:
    """The user's own source files that the references need, imports of imports included.

    Returns `{path relative to the import root, such as "mnist.py" or "package/model.py": content}`, sorted by path.
    """
    root, installed = root.resolve(), _installed_folders()
    todo = [reference.partition(":")[0] for reference in references]
    seen: set[str] = set()
    sources: dict[str, bytes] = {}
    while todo:
        name = todo.pop()
        if name in seen or not name:
            continue
        seen.add(name)
        file = _module_file(name, root)
        if file is None or not _is_own(file, root, installed):
            continue
        is_package = file.name == "__init__.py"
        path = name.replace(".", "/") + ("/__init__.py" if is_package else ".py")
        sources[path] = file.read_bytes().replace(b"\r\n", b"\n")
        try:
            todo.extend(_imported_names(sources[path].decode("utf-8"), name, is_package=is_package))
        except (SyntaxError, UnicodeDecodeError) as error:
            raise SpecError(f"{path} does not parse: {error}") from error
        todo.append(name.rpartition(".")[0])
    return dict(sorted(sources.items()))


def own_modules(root: Path) -> list[ModuleType]:
    """The modules of the pipeline's folder that this process has imported."""
    root, installed = root.resolve(), _installed_folders()
    files = [(module, Path(getattr(module, "__file__", None) or "/")) for module in sys.modules.values()]
    return [module for module, file in files if root in file.parents and _is_own(file, root, installed)]


def digest_sources(sources: Mapping[str, bytes]) -> dict[str, str]:
    """A short sha256 of each file, so that a change can be told by the file's name."""
    return {path: hashlib.sha256(content).hexdigest()[:16] for path, content in sources.items()}


# --- code that travels with an artifact ------------------------------------------------------------


def call_isolated(reference: str, folder: Path, arguments: Mapping[str, Any]) -> Any:
    """Call the function that `reference` names, its own modules taken from `folder` (an artifact's `code/`).

    The modules found there are imported afresh and leave no trace in `sys.modules`, so that artifacts with different
    versions of one module live in one process. Other modules resolve as usual.
    """
    folder = folder.resolve()
    names = {_dotted(path.relative_to(folder)) for path in folder.rglob("*.py")} if folder.is_dir() else set()
    if reference.partition(":")[0] not in names:
        return resolve(reference)(**arguments)
    with _modules_set_aside(names):
        use_root(folder)
        return resolve(reference)(**arguments)


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@contextmanager
def _modules_set_aside(names: set[str]) -> Iterator[None]:
    """Import as if no module of these names were loaded, then put everything back; write no bytecode beside them."""
    aside: dict[str, ModuleType] = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    path, no_bytecode = list(sys.path), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(aside)
        sys.path[:], sys.dont_write_bytecode = path, no_bytecode
        importlib.invalidate_caches()
