"""From a YAML file (and `--set` values) to a Pipeline."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from heliostat.core.model import NonNegativeInt, Spec
from heliostat.core.spec import Pipeline, Resources
from heliostat.core.validate import validate
from heliostat.errors import SpecError, nearest

MERGE = "tag:yaml.org,2002:merge"


MAX_DEPTH = 50
"""No file nests deeper that a person wrote; Python's stack ends at some hundreds."""
MAX_VALUES = 100_000
"""Of a document, those that aliases repeat included: a few lines of them can stand for billions."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys, reads `1e-4` as a number, and leaves `yes`, `no`, `on`, `off` as words.

    It refuses what nests too deep, and what is too large once its aliases are written out, before it builds any of it.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._num_values = 0
        self._sizes: dict[yaml.Node, int] = {}
        """Of each node that is complete: how many values it stands for."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
        is_alias = self.check_event(yaml.AliasEvent)
        if self._depth >= MAX_DEPTH:
            raise SpecError(f"line {line}: nested more than {MAX_DEPTH} levels deep; write it flatter")
        before = self._num_values
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        assert node is not None
        if is_alias and node not in self._sizes:
            raise SpecError(f"line {line}: an alias stands inside what it repeats, which has no end; write it out")
        self._num_values = before + self._sizes[node] if is_alias else self._num_values + 1
        if self._num_values > MAX_VALUES:
            raise SpecError(
                f"line {line}: more than {MAX_VALUES:,} values, with those that aliases repeat; write fewer, or put "
                "them into a file that your data function reads"
            )
        if not is_alias:
            self._sizes[node] = self._num_values - before
        return node


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == MERGE:
            continue
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str | int | float | bool):
            raise SpecError(f"line {line}: {key!r} cannot be a key")
        if key in seen:
            raise SpecError(f"line {line}: duplicate key {key!r}; it is on line {seen[key]} already")
        seen[key] = line
    loader.flatten_mapping(node)  # puts what `<<` brings first, so that the mapping's own keys hold
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"}
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?:inf|Inf|nan|NaN))$"
    ),
    list("-+.0123456789"),
)


def parse_yaml(text: str, *, name: str) -> Any:
    """The document in `text`. Raises SpecError that names the file and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except SpecError as error:
        raise SpecError(f"{name}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        if error.problem and "'\\t'" in error.problem:
            raise SpecError(f"{name}: {line}a tab; YAML indents with spaces only") from None
        raise SpecError(f"{name}: {line}not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(f"{name}: not YAML: {str(error).partition(chr(10))[0]}") from None


def read_document(path: Path) -> dict[str, Any]:
    """The mapping in a pipeline file. Raises SpecError for no file, a folder, no YAML, or no mapping."""
    if not path.exists():
        others = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise SpecError(f"{path}: no such file{nearest(path.name, others)}")
    if not path.is_file():
        raise SpecError(f"{path}: is not a file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not YAML: {error}") from None
    document = parse_yaml(text, name=str(path))
    if not isinstance(document, dict):
        raise SpecError(f"{path}: holds {type(document).__name__}, not a mapping with `name`, `task` and `stages`")
    return document


def load_pipeline(path: str | Path, *, settings: Sequence[str] = ()) -> Pipeline:
    """The pipeline of a YAML file, with `--set` values such as `stages.train.config.epochs=3` applied to it.

    Raises SpecError that names the place, the value and the nearest right word.
    """
    path = Path(path)
    document = read_document(path)
    for setting in settings:
        apply_setting(document, setting)
    return pipeline_from(document, root=path.resolve().parent)


def apply_setting(document: dict[str, Any], setting: str) -> None:
    """Put one `path=value` into the document; the value is YAML. Stages go by name: `stages.train.config.epochs=3`."""
    path, equals, text = setting.partition("=")
    steps = _steps(path)
    if len(steps) > MAX_DEPTH:
        raise SpecError(f"--set {path[:60]}…: nested more than {MAX_DEPTH} levels deep; no field of a pipeline is")
    if not equals or not all(steps):
        raise SpecError(f"--set {setting}: write it as path=value, such as stages.train.config.epochs=3")
    value = parse_yaml(text, name=f"--set {path}")
    target: Any = document
    for depth, step in enumerate(steps[:-1]):
        target = _descend(target, step, f"--set {'.'.join(steps[: depth + 1])}")
    if not isinstance(target, dict):
        raise SpecError(f"--set {path}: {'.'.join(steps[:-1])} is not a mapping")
    target[steps[-1]] = value


def _steps(path: str) -> list[str]:
    """The steps of a `--set` path. The keys of a stage's `matrix` and `space` are dotted paths themselves."""
    steps = path.split(".")
    for start, word in ((3, "matrix"), (4, "space")):
        if steps[0] == "stages" and steps[start - 1 : start] == [word] and len(steps) > start:
            return [*steps[:start], ".".join(steps[start:])]
    return steps


def _descend(target: Any, step: str, place: str) -> Any:
    if isinstance(target, list):
        named = {entry.get("name"): entry for entry in target if isinstance(entry, dict)}
        if step in named:
            return named[step]
        if step.isdigit() and int(step) < len(target):
            return target[int(step)]
        raise SpecError(f"{place}: no stage {step!r}{nearest(step, [str(n) for n in named])}")
    if not isinstance(target, dict):
        raise SpecError(f"{place}: there is nothing to set inside {target!r}")
    return target.setdefault(step, {})


class _Default(Spec):
    """What `defaults.<kind>` gives to every stage of that kind that does not say otherwise."""

    config: dict[str, Any] = Field(default_factory=dict)
    resources: Resources = Resources()
    retries: NonNegativeInt = 0


def pipeline_from(document: Mapping[str, Any], *, root: Path) -> Pipeline:
    """The pipeline that a document describes; its `defaults` are merged into the stages and are gone after that."""
    document = dict(document)
    known = {"defaults", *Pipeline.model_fields} - {"root"}
    for key in document:
        if key not in known:
            raise SpecError(f"{key}: unknown field{nearest(str(key), known)}")
    defaults = document.pop("defaults", None) or {}
    stages = document.get("stages")
    if not isinstance(defaults, Mapping):
        raise SpecError(
            f"defaults: {defaults!r} is not a mapping from a stage kind to its config, resources or retries"
        )
    if isinstance(stages, list):
        used = [entry["uses"] for entry in stages if isinstance(entry, dict) and isinstance(entry.get("uses"), str)]
        for kind, default in defaults.items():
            validate(_Default, default, f"defaults.{kind}")
            if kind not in used:
                raise SpecError(f"defaults.{kind}: no stage uses {kind!r}{nearest(str(kind), used)}")
        document["stages"] = [_with_defaults(entry, defaults) for entry in stages]
    return validate(Pipeline, {**document, "root": root})


def _with_defaults(entry: Any, defaults: Mapping[str, Any]) -> Any:
    uses = entry.get("uses") if isinstance(entry, dict) else None
    return _merge(defaults[uses], entry) if isinstance(uses, str) and uses in defaults else entry


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
