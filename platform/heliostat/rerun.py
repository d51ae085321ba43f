"""One trial of a search run again, to see whether its figures come again. Nothing of it is recorded."""

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import heliostat.stages  # noqa: F401 - registers the built-in stages
from heliostat.core.artifact import read_record
from heliostat.core.identity import explain_change
from heliostat.core.plan import Node, Plan, artifact_of, plan_pipeline
from heliostat.core.spec import Pipeline
from heliostat.core.stage import Unheard
from heliostat.errors import SpecError, nearest
from heliostat.mirror import mirror_of
from heliostat.report import runs
from heliostat.stages.rerun import SearchConfig, ended_trial, rerun
from heliostat.tracking.context import library_versions

if TYPE_CHECKING:
    from heliostat.runtime.one_trial import Rerun


def run_trial(pipeline: Pipeline, name: str, *, address: str | None = None) -> "Rerun":
    """Run one trial of a finished or half-done search again, be it of `tune` or `compress`, beside what it was.

    `name` is the trial's id, or `NODE/ID` where there are several searches. Raises SpecError when there is no such
    trial, or none that this code and config have run; ResourceError when it can never fit.
    """
    from heliostat.runtime import session

    mirror = mirror_of(pipeline)
    planned = plan_pipeline(pipeline, elsewhere=mirror.look(pipeline.name))
    for search in _searches(planned).values():
        for needed in (search, *search.upstream):
            mirror.fetch(needed.folder)
    node, trial = _find(planned, name)
    assert isinstance(node.config, SearchConfig)
    inputs = {slot: tuple(map(artifact_of, nodes)) for slot, nodes in node.inputs.items()}
    context = planned.context(node, inputs=inputs, reporter=Unheard(), cancel=threading.Event())
    then = ended_trial(context, node.config, trial)
    log = pipeline.storage_folder / "logs" / f"{runs.new_run_id(pipeline.name)}.log"
    with session.start(address, log=log, root=pipeline.root):
        result = rerun(context, node.config, then)
    record = read_record(node.folder)
    versions = record.versions if record else library_versions()
    return replace(result, changed=tuple(explain_change(versions, library_versions())))


def _searches(planned: Plan) -> dict[str, Node]:
    """The nodes that have trials, by name."""
    return {node.name: node for node in planned.nodes if isinstance(node.config, SearchConfig)}


def _find(planned: Plan, name: str) -> tuple[Node, str]:
    """The search that `name` means, which has run, and the id."""
    searches = _searches(planned)
    if not searches:
        raise SpecError(f"--trial {name}: no stage of this file has trials; those that use 'tune' or 'compress' have")
    stated, _, trial = name.rpartition("/")
    if not stated and len(searches) > 1:
        choices = " or ".join(f"{search}/{trial}" for search in searches)
        raise SpecError(f"--trial {name}: there are several searches; say which: {choices}")
    node = searches.get(stated) if stated else next(iter(searches.values()), None)
    if node is None:
        exists = any(other.name == stated for other in planned.nodes)
        what = f"the stage {stated!r} has no trials" if exists else f"no search {stated!r}"
        raise SpecError(f"--trial {name}: {what}{nearest(stated, searches)}")
    if not (node.folder / "journal.jsonl").is_file():
        raise SpecError(f"--trial {name}: {node.name} has not run with this code and config: {node.reason}")
    return node, trial
