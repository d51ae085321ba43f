"""The structure of a RayCluster manifest for KubeRay, as far as it can be checked without Kubernetes.

Checked: `apiVersion` and `kind`, unknown and missing fields of the RayCluster itself (not of the pods in it), numbers
of replicas, that every pod has a named container with an image and requests for CPU and memory, and that the Ray in the
image is the one in `rayVersion`. Not checked: pod templates in depth, images, volumes, quotas; `kubectl apply
--dry-run=server` does that on the real cluster. Field names: KubeRay's `raycluster_types.go` (API `ray.io/v1`).
"""

import re
from collections.abc import Mapping
from typing import Any

from heliostat.errors import SpecError, nearest

# fmt: off
_SPEC = frozenset({
    "upgradeStrategy", "authOptions", "suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations",
    "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "historyServerOptions", "networkPolicy",
    "tlsOptions", "headGroupSpec", "rayVersion", "workerGroupSpecs",
})
_HEAD = frozenset({
    "template", "headService", "enableIngress", "resources", "labels", "rayStartParams", "serviceType",
})
_WORKER = frozenset({
    "suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "resources",
    "labels", "rayStartParams", "template", "scaleStrategy", "numOfHosts",
})
# fmt: on
_AUTH = frozenset({"mode", "secretName", "enableK8sTokenAuth"})


def check_manifest(manifest: Mapping[str, Any], *, place: str) -> dict[str, Any]:
    """Check a RayCluster and describe it: name, workers, groups. Raises SpecError with place, value and words."""
    for key, wanted in (("apiVersion", "ray.io/v1"), ("kind", "RayCluster")):
        if manifest.get(key) != wanted:
            raise SpecError(f"{place}: {key}: {manifest.get(key)!r} is not {wanted!r}")
    _fields(manifest, {"apiVersion", "kind", "metadata", "spec", "status"}, place, "", required=("metadata", "spec"))
    about, spec = _mapping(manifest, "metadata", place, ""), _mapping(manifest, "spec", place, "")
    if not isinstance(about.get("name"), str):
        raise SpecError(f"{place}: metadata.name: missing; it is required")
    _fields(spec, _SPEC, place, "spec", required=("rayVersion", "headGroupSpec", "workerGroupSpecs"))
    _check_head(_mapping(spec, "headGroupSpec", place, "spec"), spec["rayVersion"], place)
    groups = spec["workerGroupSpecs"]
    if not isinstance(groups, list):
        raise SpecError(f"{place}: spec.workerGroupSpecs: {groups!r} is not a list of groups")
    for index, group in enumerate(groups):
        _check_group(group, spec["rayVersion"], place, f"spec.workerGroupSpecs[{index}]")
    auth = spec.get("authOptions") or {}
    _fields(auth, _AUTH, place, "spec.authOptions")
    if auth.get("mode", "token") not in {"token", "disabled"}:
        raise SpecError(f"{place}: spec.authOptions.mode: {auth['mode']!r} is not one of token, disabled")
    notes = about.get("annotations") or {}
    return {
        "name": about["name"],
        "provider": "kuberay",
        "min_workers": sum(group.get("minReplicas", 0) for group in groups),
        "max_workers": sum(group["maxReplicas"] for group in groups),
        "node_types": ("head", *(group["groupName"] for group in groups)),
        "versions": {
            key.removeprefix("heliostat/"): value for key, value in notes.items() if key.startswith("heliostat/")
        },
        "token_auth": bool(auth) and auth.get("mode", "token") == "token",
        "warnings": [],
    }


def _check_head(head: Mapping[str, Any], ray_version: Any, place: str) -> None:
    _fields(head, _HEAD, place, "spec.headGroupSpec", required=("template",))
    _check_pod(head, ray_version, place, "spec.headGroupSpec")


def _check_group(group: Any, ray_version: Any, place: str, where: str) -> None:
    _fields(group, _WORKER, place, where, required=("groupName", "maxReplicas", "template"))
    for key in ("replicas", "minReplicas", "maxReplicas"):
        value = group.get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise SpecError(f"{place}: {where}.{key}: {value!r} is not a number of pods")
    low, now, high = (
        group.get("minReplicas", 0),
        group.get("replicas", group.get("minReplicas", 0)),
        group["maxReplicas"],
    )
    if not low <= now <= high:
        raise SpecError(f"{place}: {where}: minReplicas {low} <= replicas {now} <= maxReplicas {high} does not hold")
    _check_pod(group, ray_version, place, where)


def _check_pod(group: Mapping[str, Any], ray_version: Any, place: str, where: str) -> None:
    template = _mapping(group, "template", place, where)
    containers = _mapping(template, "spec", place, f"{where}.template").get("containers")
    where = f"{where}.template.spec.containers"
    if not isinstance(containers, list) or not containers:
        raise SpecError(f"{place}: {where}: missing; a pod has at least one container")
    container, where = containers[0], f"{where}[0]"  # KubeRay runs Ray in the first one
    for key in ("name", "image"):
        if not isinstance(container, Mapping) or not isinstance(container.get(key), str):
            raise SpecError(f"{place}: {where}.{key}: missing; it is required")
    requests = (container.get("resources") or {}).get("requests") or {}
    for key in ("cpu", "memory"):
        if key not in requests:
            raise SpecError(f"{place}: {where}.resources.requests.{key}: missing; Ray counts what it may use by it")
    image = re.search(r"ray[:-](\d+\.\d+\.\d+)", container["image"])
    if image and image[1] != str(ray_version):
        raise SpecError(f"{place}: {where}.image: {container['image']!r} is not of spec.rayVersion {ray_version}")


def _fields(
    found: Any, known: set[str] | frozenset[str], place: str, where: str, *, required: tuple[str, ...] = ()
) -> None:
    prefix = f"{where}." if where else ""
    if not isinstance(found, Mapping):
        raise SpecError(f"{place}: {where}: {found!r} is not a mapping")
    for key in found:
        if key not in known:
            raise SpecError(f"{place}: {prefix}{key}: unknown field{nearest(str(key), known)}")
    for key in required:
        if key not in found:
            raise SpecError(f"{place}: {prefix}{key}: missing; it is required")


def _mapping(parent: Mapping[str, Any], key: str, place: str, where: str) -> Mapping[str, Any]:
    value = parent.get(key)
    if not isinstance(value, Mapping):
        prefix = f"{where}." if where else ""
        raise SpecError(
            f"{place}: {prefix}{key}: {value!r} is not a mapping"
            if key in parent
            else f"{place}: {prefix}{key}: missing; it is required"
        )
    return value
