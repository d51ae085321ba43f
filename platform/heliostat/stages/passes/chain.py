"""Chains of passes, of which those that begin alike share what they begin with.

What a pass makes of a model lies in a folder of the shelf that is named by what it is: the model, the pass, its config.
`made.json` in it is written last. Whoever needs a model that another process is making waits for it, and a process that
died leaves its lock, and the checkpoints of its training, to the next.
"""

import fcntl
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heliostat.compression.formats import load_model
from heliostat.core.artifact import Artifact, digest_files, keep_only, write_json
from heliostat.core.integrity import changed, check_names, lacking
from heliostat.core.spec import Task
from heliostat.errors import HeliostatError, StageError
from heliostat.runtime.gate import Gate
from heliostat.stages.compress_config import MADE, CompressConfig, Link, links_of
from heliostat.stages.measure import evaluate_with_intervals, recipe_of
from heliostat.stages.passes.appraise import costs_of, latency_of
from heliostat.stages.passes.registry import PASSES
from heliostat.stages.passes.workshop import Workshop
from heliostat.stages.saved import check_made
from heliostat.training.task import Data, build_objective
from heliostat.training.trained_loss import load_loss


@dataclass(frozen=True)
class Made:
    """A model on its way through a chain."""

    node: str
    folder: Path
    params: Mapping[str, Any]
    """As in a record: how it was trained."""


def explore(
    params: Mapping[str, Any],
    *,
    config: CompressConfig,
    source: Artifact,
    shelf: Path,
    task: Task,
    root: Path,
    seed: int,
    data: Data,
    gate: Gate,
    warn: Callable[[str], None],
) -> dict[str, float]:
    """Make of `source` the model that `params` describe, and measure its quality on `val`, its size and its latency.

    Raises StageError, which names the step, where a pass fails, and when the outcome is not finite.
    """
    start = Made(source.node, source.folder, source.record.params)
    shop = Workshop(
        task=task,
        recipe=recipe_of(start.params),
        data=data,
        seed=seed,
        root=root,
        folder=shelf,
        shelf=shelf,
        on_epoch=lambda epoch, row: gate.give_way(),
        warn=warn,
        teacher=start,
    )
    links = links_of(config.steps(params), start=source.record.fingerprint, seed=seed, root=root)
    made = make_chain(links, start, shop=shop, gate=gate)
    gate.give_way()
    finished = load_model(made.folder)
    objective = build_objective(task, load_loss(made.folder))
    quality = evaluate_with_intervals(finished, data["val"], objective, split="val", batch_size=shop.batch_size)
    figures = costs_of(made.folder) | dict(quality.figures)
    for name, value in figures.items():
        if not math.isfinite(value):
            raise StageError(f"it diverged: {name} is {value}")
    return figures | latency_of(finished, shop, alone=gate.alone)


def make_chain(links: Sequence[Link], start: Made, *, shop: Workshop, gate: Gate) -> Made:
    """What comes of `start` after all links, each made once, in its folder of the shelf `shop.folder`."""
    made = start
    for link in links:
        folder = shop.folder / link.digest
        with _held(shop.folder / f"{link.digest}.lock", gate):
            if not _is_made(folder):
                recipe, loss_state = recipe_of(made.params), load_loss(made.folder)
                _make(link, made, replace(shop, folder=folder, recipe=recipe, loss_state=loss_state))
        outcome = json.loads((folder / MADE).read_text(encoding="utf-8"))
        if "failed" in outcome:
            raise StageError(f"{link.uses}: {outcome['failed']}")
        made = Made(link.uses, folder, outcome["params"])
        gate.give_way()
    return made


def _is_made(folder: Path) -> bool:
    """Whether the model is there as it was made. One that was damaged since is made again."""
    if not (folder / MADE).exists():
        return False
    files = json.loads((folder / MADE).read_text(encoding="utf-8")).get("files", {})
    check_names(files, place=str(folder / MADE))
    return isinstance(files, list) or not (lacking(folder, files) or changed(folder, files))  # old ones have no digests


@contextmanager
def _held(path: Path, gate: Gate) -> Iterator[None]:
    """The lock of a folder. Whoever waits for it is at rest: the one who has it may be held up by a measurement."""
    with path.open("w") as lock:
        with gate.at_rest():
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(link: Link, source: Made, shop: Workshop) -> None:
    """Fill the workshop's folder. That a pass cannot be done is an outcome too: it would fail for all that share it."""
    shop.folder.mkdir(exist_ok=True)
    try:
        result = PASSES[link.uses](shop, source, link.config)
        check_made(shop, result)
    except HeliostatError as error:
        outcome: dict[str, Any] = {"failed": str(error)}
    else:
        keep_only(shop.folder, result.files)
        outcome = {
            "files": digest_files(shop.folder, result.files),
            "params": dict(result.params or source.params),
            "details": dict(result.details),
        }
    write_json(shop.folder / MADE, outcome)
