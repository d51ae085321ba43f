"""Ray cluster files: check them without a cloud account, and hand them to the tool that acts on them.

There are two kinds. A *launcher file* is what `ray up` reads; it is completed with Ray's defaults for its provider and
checked against Ray's own schema. A *KubeRay manifest* is what `kubectl apply` reads; its structure is checked here (the
module `kuberay_manifest`). What only a cloud or a Kubernetes cluster knows, such as instance types, images, quotas and
permissions, is checked by neither.
"""

import contextlib
import io
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from heliostat.core.load import parse_yaml
from heliostat.errors import HeliostatError, SpecError, nearest
from heliostat.runtime.auth import use_token_if_present
from heliostat.runtime.kuberay_manifest import check_manifest

THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1"})
_PLACEHOLDER = re.compile(r"<[^<>\s]+>")
_VERSIONED = ("ray", "torch", "mlflow")


@dataclass(frozen=True)
class ClusterSummary:
    """What a valid cluster file describes, and what about it deserves a second look."""

    path: Path
    kind: Literal["launcher", "kuberay"]
    name: str
    provider: str
    min_workers: int
    max_workers: int
    node_types: tuple[str, ...]
    versions: Mapping[str, str]
    """What the file says that the nodes run: `python`, `ray`, `torch`, `mlflow`."""
    token_auth: bool
    placeholders: tuple[str, ...]
    """`place: value` of every `<...>` that is still to be filled in."""
    warnings: tuple[str, ...]


def validate(path: Path) -> ClusterSummary:
    """Check a cluster file as far as that is possible without its cloud.

    Raises SpecError that names the place, the value and the nearest right word. What is unfinished or unwise but not
    wrong (placeholders, other versions than those installed here, no token) is a warning in the summary.
    """
    documents = _read(path)
    manifest = _ray_cluster(documents)
    if manifest is not None:
        described = check_manifest(manifest, place=str(path))
        return _summary(path, "kuberay", documents, described)
    if len(documents) != 1:
        raise SpecError(
            f"{path}: {len(documents)} documents and none of `kind: RayCluster`; a launcher file is one document"
        )
    return _summary(path, "launcher", documents, _check_launcher_file(documents[0], place=str(path)))


def up(path: Path) -> int:
    """Start or update the cluster with Ray's launcher, or kubectl, whose exit code is returned.

    Their output goes to the terminal. Where the head node of a launcher file is this machine, the file's commands run
    here: Ray's launcher would need an SSH server for it. Raises SpecError for a wrong or unfinished file, and
    HeliostatError when the tool is missing.
    """
    summary = validate(path)
    if summary.placeholders:
        raise SpecError("\n".join(f"{path}: {p}: fill it in first" for p in summary.placeholders))
    if summary.kind == "kuberay":
        return _run("kubectl", "apply", "-f", str(path))
    if (config := _head_is_here(path)) is not None:
        keys = ("initialization_commands", "setup_commands", "head_setup_commands", "head_start_ray_commands")
        return _run_here([command for key in keys for command in config.get(key) or []])
    return _run("ray", "up", "-y", str(path))


def down(path: Path) -> int:
    """Stop the cluster; returns the tool's exit code. Raises like `up`."""
    summary = validate(path)
    if summary.kind == "kuberay":
        return _run("kubectl", "delete", "-f", str(path))
    if _head_is_here(path) is not None:
        return _run_here(["ray stop"])
    return _run("ray", "down", "-y", str(path))


def status(path: Path) -> int:
    """Print nodes and resources of the running cluster; returns the tool's exit code. Raises like `up`."""
    summary = validate(path)
    if summary.kind == "kuberay":
        return _run("kubectl", "get", "raycluster,pods", "-l", f"ray.io/cluster={summary.name}", "-o", "wide")
    if _head_is_here(path) is not None:
        use_token_if_present()
        return _run_here(["ray status"])
    return _run("ray", "exec", str(path), "RAY_AUTH_MODE=token ray status")


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        others = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise SpecError(f"{path}: no such file{nearest(path.name, others)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not YAML: {error}") from None
    documents = [parse_yaml(part, name=str(path)) for part in _parts(text)]
    for document in documents:
        if not isinstance(document, dict):
            raise SpecError(f"{path}: holds {type(document).__name__}, not a mapping")
    if not documents:
        raise SpecError(f"{path}: is empty")
    return documents


def _parts(text: str) -> Iterator[str]:
    """The documents of a YAML stream, each behind as many empty lines as keep its line numbers right."""
    line = 0
    for part in re.split(r"(?m)^---[ \t]*$", text):
        if any(row.strip() and not row.lstrip().startswith("#") for row in part.splitlines()):
            yield "\n" * line + part
        line += part.count("\n")


def _ray_cluster(documents: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The RayCluster among Kubernetes objects; None when these are none. Raises SpecError when it is missing."""
    if not any("kind" in document or "apiVersion" in document for document in documents):
        return None
    clusters = [d for d in documents if str(d.get("apiVersion", "")).startswith("ray.io/")] or [
        d for d in documents if d.get("kind") == "RayCluster"
    ]
    if len(clusters) != 1:
        kinds = [str(d.get("kind")) for d in documents]
        raise SpecError(
            f"kind: {', '.join(kinds)}: exactly one of them has to be a RayCluster{nearest('RayCluster', kinds)}"
        )
    return clusters[0]


def _check_launcher_file(config: dict[str, Any], *, place: str) -> dict[str, Any]:
    """Check one launcher file and describe it: name, provider, workers, node types."""
    import jsonschema
    from click import ClickException
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = _schema()
    local = _check_provider(config, place)
    for key in config:
        if key == "min_workers" and not local:
            raise SpecError(
                f"{place}: min_workers: Ray ignores it here; give min_workers to a type under available_node_types"
            )
        if key not in schema["properties"] and key != "min_workers":
            raise SpecError(f"{place}: {key}: unknown field{nearest(str(key), {*schema['properties'], 'min_workers'})}")
    for key in ("min_workers", "max_workers"):
        if not isinstance(config.get(key, 0), int):
            raise SpecError(f"{place}: {key}: {config[key]!r} is not a whole number")
    if "cluster_name" not in config:
        raise SpecError(f"{place}: cluster_name: missing; it is required")
    said = io.StringIO()
    try:
        jsonschema.validate({k: v for k, v in config.items() if k != "min_workers"}, schema)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), _quiet("ray.autoscaler"):
            prepared = prepare_config(config)
            validate_config(prepared)
    except jsonschema.ValidationError as error:
        raise SpecError(f"{place}: {_describe(error)}") from None
    except (ValueError, ClickException) as error:
        raise SpecError(f"{place}: {error}") from None
    types = prepared["available_node_types"]
    return {
        "name": prepared["cluster_name"],
        "provider": prepared["provider"]["type"],
        "min_workers": sum(t.get("min_workers", 0) for t in types.values()),
        "max_workers": prepared["max_workers"],
        "node_types": tuple(types),
        "versions": prepared.get("metadata") or {},
        "token_auth": _has_token(prepared),
        "warnings": _warnings_of_ray(said.getvalue()) + _missing_mounts(config),
    }


def _check_provider(config: Mapping[str, Any], place: str) -> bool:
    """Check the part of the file that decides how the rest is read; returns whether the machines are the user's own."""
    from ray.autoscaler._private.providers import _DEFAULT_CONFIGS

    provider = config.get("provider")
    if not isinstance(provider, dict) or "type" not in provider:
        raise SpecError(f"{place}: provider.type: missing; it is required{nearest('', _DEFAULT_CONFIGS)}")
    if provider["type"] not in _DEFAULT_CONFIGS:
        raise SpecError(
            f"{place}: provider.type: unknown {provider['type']!r}{nearest(str(provider['type']), _DEFAULT_CONFIGS)}"
        )
    if provider["type"] != "local" or "coordinator_address" in provider:
        return bool(provider["type"] == "local")
    for key, kind, shape in (("head_ip", str, "a host"), ("worker_ips", list, "a list of hosts")):
        if key not in provider:
            raise SpecError(f"{place}: provider.{key}: missing; it is required{_instead(provider, key)}")
        if not isinstance(provider[key], kind):
            raise SpecError(f"{place}: provider.{key}: {provider[key]!r} is not {shape}")
    if "available_node_types" in config:
        raise SpecError(
            f"{place}: available_node_types: machines of your own have one type; use min_workers and max_workers"
        )
    return True


def _instead(found: Iterable[str], key: str) -> str:
    hint = nearest(key, found)
    return f" (there is {hint.split()[-1].rstrip('?')})" if hint.startswith("; did") else ""


def _schema() -> dict[str, Any]:
    import ray.autoscaler

    schema: dict[str, Any] = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    return schema


def _describe(error: Any) -> str:
    """A jsonschema error as place, value and nearest right word."""
    where = ".".join(str(step) for step in error.absolute_path)
    prefix = f"{where}." if where else ""
    if error.validator == "additionalProperties":
        known = set(error.schema.get("properties", {}))
        unknown = next(key for key in error.instance if key not in known)
        return f"{prefix}{unknown}: unknown field{nearest(str(unknown), known)}"
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        return f"{prefix}{missing}: missing; it is required{_instead(error.instance, missing)}"
    if error.validator == "type":
        return f"{where}: {error.instance!r} is not of type {error.validator_value}"
    return f"{where}: {error.message}"


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _warnings_of_ray(said: str) -> list[str]:
    """What Ray printed while it completed the file: one line each, without colours and time stamps."""
    records = re.split(r"(?m)^\d{4}-\d\d-\d\d .* -- ", re.sub(r"\x1b\[[0-9;]*m", "", said))
    return [" ".join(record.split()) for record in records if record.strip()]


def _has_token(config: Mapping[str, Any]) -> bool:
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    return all("RAY_AUTH_MODE=token" in command for command in starts)


def _missing_mounts(config: Mapping[str, Any]) -> list[str]:
    mounts = (config.get("file_mounts") or {}).items()
    return [
        f"file_mounts.{there}: {here} is not here; run this in the folder that it is relative to, or make it"
        for there, here in mounts
        if not Path(str(here)).expanduser().exists()
    ]


def _summary(
    path: Path, kind: Literal["launcher", "kuberay"], documents: Sequence[Any], described: dict[str, Any]
) -> ClusterSummary:
    placeholders = tuple(f"{where}: {value}" for document in documents for where, value in _placeholders(document, ""))
    warnings = [f"{placeholder}: still to be filled in" for placeholder in placeholders]
    warnings += described["warnings"]
    versions = {str(k): str(v) for k, v in described["versions"].items()}
    warnings += _other_versions(versions, str(documents))
    if not described["token_auth"]:
        warnings.append("no token authentication: whoever reaches the cluster can run anything on it")
    known = {**described, "versions": versions, "warnings": tuple(warnings)}
    return ClusterSummary(path=path, kind=kind, placeholders=placeholders, **known)


def _placeholders(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _placeholders(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _placeholders(inner, f"{where}[{index}]")
    elif isinstance(value, str) and _PLACEHOLDER.search(value):
        yield where, value


def _other_versions(versions: Mapping[str, str], text: str) -> list[str]:
    """Where the versions that the file declares, or has in its images, differ from those installed here."""
    here = {name: metadata.version(name).partition("+")[0] for name in _VERSIONED}
    here["python"] = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = [
        f"{name} {version} on the nodes, {here[name]} here"
        for name, version in versions.items()
        if here.get(name, version) != version
    ]
    images = set(re.findall(r"ray[:-](\d+\.\d+\.\d+)-py", text)) - {here["ray"]}
    return found + [f"an image with ray {version}, {here['ray']} here" for version in sorted(images)]


def _head_is_here(path: Path) -> dict[str, Any] | None:
    (config,) = _read(path)
    provider = config["provider"]
    return (
        config
        if provider["type"] == "local" and provider.get("head_ip") in THIS_MACHINE and not provider["worker_ips"]
        else None
    )


def _environment() -> dict[str, str]:
    """This process's own environment, with the programs of its Python environment first on the PATH."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def _run(tool: str, *arguments: str) -> int:
    environment = _environment()
    if shutil.which(tool, path=environment["PATH"]) is None:
        advice = {
            "kubectl": "install kubectl and point it at your Kubernetes cluster",
            "ray": "pip install 'ray[default]'",
        }[tool]
        raise HeliostatError(
            f"{tool} is not on the PATH: {advice}. The command would be: {shlex.join([tool, *arguments])}"
        )
    return subprocess.run([tool, *arguments], env=environment).returncode


def _run_here(commands: Sequence[str]) -> int:
    for command in commands:
        code = subprocess.run(["bash", "-c", command], env=_environment()).returncode
        if code != 0:
            return code
    return 0
