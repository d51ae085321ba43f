"""`evaluate_after` of a search: the passes that each trial's model goes through before trials are compared."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from heliostat.core.model import Spec
from heliostat.core.stage import ConfigView, StageContext, find_kind
from heliostat.stages.checks import UNTRAINABLE
from heliostat.stages.prune import PruneConfig
from heliostat.stages.quantize import QuantizeConfig
from heliostat.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from heliostat.runtime.appraisal import Appraisal


class PassConfig(Spec):
    """One pass, `{quantize: {method: static}}`, with what the stage of that name takes as its config."""

    prune: PruneConfig | None = None
    quantize: QuantizeConfig | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "PassConfig":
        if (self.prune is None) == (self.quantize is None):
            raise ValueError("name one pass, prune or quantize; the next one is the next of the list")
        return self

    @property
    def chosen(self) -> tuple[str, PruneConfig | QuantizeConfig]:
        """The stage that does the same, and its config."""
        ((name, config),) = ((name, config) for name, config in self if config is not None)
        return name, config


def check_passes(passes: Sequence[PassConfig], view: ConfigView) -> Iterator[str]:
    """What the stages would say of the configs, and whether the passes can follow one another."""
    before = "train"
    for index, (uses, config) in enumerate(step.chosen for step in passes):
        place = f"config.evaluate_after[{index}].{uses}"
        if before in UNTRAINABLE:
            yield f"{place}: what {before!r} makes cannot be compressed further; put it last"
        kind, train = find_kind(uses), find_kind("train")
        for problem in kind.check(config, replace(view, inputs={"model": [(train, train.config())]})):
            yield problem.replace("config", place, 1)
        before = uses


def check_appraised(place: str, view: ConfigView, *, folds: int | None) -> Iterator[str]:
    """Whether there is one model of a trial that can be measured as `place` asks."""
    if view.task.train_fn is not None:
        yield f"{place}: task.train_fn keeps its model to itself until it ends, so a trial has none to be measured"
    if view.resources.workers_per_trial > 1:
        yield f"{place}: one worker trains and measures a trial's model; set resources.workers_per_trial to 1"
    if folds is not None:
        yield f"{place}: a trial with folds trains as many models as those; leave config.folds out"


def references_of(passes: Sequence[PassConfig]) -> tuple[str, ...]:
    """The user's code that the passes name."""
    return tuple(reference for step in passes for reference in step.chosen[1].code_references)


def epochs_of(passes: Sequence[PassConfig]) -> int:
    """How many epochs the passes train for, each time."""
    steps = [step.chosen for step in passes]
    return sum(find_kind(uses).workload(config).get("epochs", 0) for uses, config in steps)


def appraisal_of(
    context: StageContext, train: TrainConfig, *, passes: Sequence[PassConfig], costs: Sequence[str]
) -> "Appraisal":
    """What the trials of a search do that are measured for more than the figures of their epochs."""
    from heliostat.runtime.appraisal import Appraisal

    measure = partial(
        _measure,
        task=context.task,
        root=context.root,
        seed=context.seed,
        passes=tuple(passes),
        timed="latency_ms" in costs,
    )
    return Appraisal(train, measure, compresses=bool(passes), code_references=references_of(passes))


def _measure(weights: "dict[str, Tensor]", **settings: Any) -> dict[str, float]:
    """In the process of a trial: the driver of a search imports no torch."""
    from heliostat.stages.passes.appraise import appraise

    return appraise(weights, **settings)
