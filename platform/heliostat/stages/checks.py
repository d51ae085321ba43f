"""What several stages check of their config before anything starts: arguments, metrics, and what goes in."""

from collections.abc import Iterable, Iterator, Sequence

from heliostat.core.imports import resolve, why_not_callable
from heliostat.core.stage import ConfigView
from heliostat.errors import nearest
from heliostat.training.config import TrainConfig, why_not_trained
from heliostat.training.schedule_config import SCHEDULERS

UNTRAINABLE = {"quantize", "export"}
"""Kinds whose models have no torch parameters that could be trained."""


def check_arguments(
    config: TrainConfig, view: ConfigView, *, place: str, more: Iterable[str] = (), partial: bool = False
) -> Iterator[str]:
    """Whether the user's model and data functions take the arguments: those of the config and those of `more` paths."""
    for name in ("model", "data"):
        field = f"{name}_args"
        searched = [path.removeprefix(f"{field}.") for path in more if path.startswith(f"{field}.")]
        arguments = list(dict.fromkeys([*getattr(config, field), *(path.partition(".")[0] for path in searched)]))
        problem = why_not_callable(view.functions[name], arguments, partial=partial)
        if problem:
            yield f"{place}.{field}: {getattr(view.task, name)!r} {problem}"


def check_searched(paths: Iterable[str], view: ConfigView, *, place: str) -> Iterator[str]:
    """Whether the user's model and data functions take the arguments that a search sets."""
    for path in paths:
        field, _, argument = path.partition(".")
        name = field.removesuffix("_args")
        if field in {"model_args", "data_args"}:
            problem = why_not_callable(view.functions[name], [argument.partition(".")[0]], partial=True)
            if problem:
                yield f"{place}.{path}: {getattr(view.task, name)!r} {problem}"


def check_loop(config: TrainConfig, view: ConfigView, *, place: str, workers: int) -> Iterator[str]:
    """Whether the optimizer and the scheduler take their options, and the workers can train as the config says."""
    if config.optimizer.is_reference:
        yield from _check_made(config.optimizer.name, config.optimizer.arguments, place=f"{place}.optimizer")
    if config.scheduler.name in SCHEDULERS:
        reference = f"torch.optim.lr_scheduler:{config.scheduler.name}"
        yield from _check_made(reference, config.scheduler.arguments, place=f"{place}.scheduler.options")
    for problem in why_not_trained(config, workers=workers, task=view.task):
        yield f"{place}.{problem}"


def _check_made(reference: str, arguments: Iterable[str], *, place: str) -> Iterator[str]:
    """Whether a class can be made from its one positional argument and these options."""
    problem = why_not_callable(resolve(reference), arguments, positional=1)
    if problem:
        yield f"{place}: {reference!r} {problem}"


def check_own_loss(view: ConfigView, *, place: str, learns: str) -> Iterator[str]:
    """Whether a training by a loss of its own, as `learns` says, leaves anything to the user's."""
    if view.task.train_step is not None:
        yield f"{place}: {learns} by a loss of its own, for which task.train_step is not called; leave one of them out"


def check_monitor(config: TrainConfig, view: ConfigView, *, place: str) -> Iterator[str]:
    if config.monitor is not None:
        yield from check_metric(config.monitor, view, place=f"{place}.monitor")


def check_metric(
    metric: str, view: ConfigView, *, place: str, splits: Sequence[str] = ("train", "val"), more: Sequence[str] = ()
) -> Iterator[str]:
    """Whether anybody reports the metric, which may be one of `more`, and whether a choice may look at it."""
    known = [*(name for name in view.task.metric_modes if name.partition("_")[0] in splits), *more]
    if metric.startswith("test_"):
        yield f"{place}: {metric!r} is of the test split, which nothing may choose by; use val_{metric[5:]!s}"
    elif metric not in known and view.task.train_fn is None:
        yield f"{place}: nobody reports {metric!r}{nearest(metric, known)}"


def check_trainable(view: ConfigView, *, slot: str) -> Iterator[str]:
    for kind, _ in view.inputs[slot]:
        if kind.name in UNTRAINABLE:
            yield f"inputs.{slot}: what {kind.name!r} makes cannot be trained further; name the stage before it"
