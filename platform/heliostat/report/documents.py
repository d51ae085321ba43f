"""The JSON documents that `--json` prints: what other people's scripts rely on."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heliostat.core.artifact import Record
    from heliostat.core.outcome import RunResult
    from heliostat.core.plan import Node, Plan
    from heliostat.runtime.journal import TrialRecord
    from heliostat.runtime.one_trial import Rerun


def run_document(result: "RunResult") -> dict[str, Any]:
    """What `heliostat run --json` prints."""
    return {
        "pipeline": result.pipeline,
        "status": result.status,
        "nodes": [
            {
                "name": node.name,
                "stage": node.stage,
                "uses": node.uses,
                "status": node.status,
                "fingerprint": node.fingerprint,
                "path": str(node.path),
                "seconds": round(node.seconds, 3),
                "metrics": dict(node.metrics),
                **({"error": node.error} if node.error is not None else {}),
            }
            for node in result.nodes
        ],
        "tracking": dict(result.tracking),
        "selected": dict(result.selected) if result.selected else None,
        "log": str(result.log) if result.log else None,
    }


def plan_document(planned: "Plan", *, why_not: str | None) -> dict[str, Any]:
    """What `heliostat plan --json` prints. `why_not` is why the plan can never fit this machine."""
    return {
        "pipeline": planned.pipeline.name,
        "status": "planned",
        "nodes": [
            {
                "name": node.name,
                "stage": node.stage,
                "uses": node.uses,
                "status": node.status,
                "reason": node.reason,
                "fingerprint": node.fingerprint,
                "path": str(node.folder),
                "config": node.config.model_dump(mode="json"),
                "needs": _needs(node),
                **(workload(node) if node.status == "run" else {}),
                **({"explained": dict(node.explained)} if node.explained else {}),
                "estimate_s": node.estimate_s,
            }
            for node in planned.nodes
        ],
        "estimate": estimate(planned),
        "fits": {"ok": why_not is None, "reason": why_not},
    }


def _needs(node: "Node") -> dict[str, float]:
    """What the node holds at once, by Ray's names but for CPUs and GPUs."""
    need = node.kind.needs(node.resources)
    others = {name: need.of(name) for name in need.each if name not in ("CPU", "GPU")}
    return {"cpus": need.of("CPU"), "gpus": need.of("GPU"), **others}


def workload(node: "Node") -> Mapping[str, int]:
    """The trials and epochs that the node has ahead of it, at most."""
    return node.kind.workload(node.config)


def estimate(planned: "Plan") -> dict[str, Any]:
    """Time and cost of what would run, from how long the same stages took before; None where nothing is known."""
    todo = [node for node in planned.nodes if node.status == "run"]
    known = [(node, node.estimate_s) for node in todo if node.estimate_s is not None]
    cpu_s = sum(seconds * max(1.0, node.kind.needs(node.resources).of("CPU")) for node, seconds in known)
    complete = len(known) == len(todo)
    return {
        "nodes_to_run": len(todo),
        "trials": sum(workload(node).get("trials", 0) for node in todo),
        "epochs": sum(workload(node).get("epochs", 0) for node in todo),
        "seconds": round(sum(s for _, s in known), 1) if complete else None,
        "cpu_hours": round(cpu_s / 3600, 4) if complete else None,
    }


def record_document(record: "Record", path: str) -> dict[str, Any]:
    """What `heliostat show --json` prints of a node."""
    return {"path": path, **asdict(record)}


def rerun_document(rerun: "Rerun") -> dict[str, Any]:
    """What `heliostat run --trial --json` prints."""

    def ended(trial: "TrialRecord") -> dict[str, Any]:
        return {"status": trial.status, "epochs": trial.epochs, "reason": trial.reason, "metrics": dict(trial.metrics)}

    return {
        "node": rerun.node,
        "trial": rerun.then.id,
        "params": dict(rerun.then.params),
        "then": ended(rerun.then),
        "now": ended(rerun.now),
        "metrics": [dict(zip(("metric", "then", "now", "difference"), row)) for row in rerun.differences],
        "identical": rerun.identical,
        "changed": list(rerun.changed),
    }
