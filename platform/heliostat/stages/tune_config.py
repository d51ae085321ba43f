"""What a pipeline file may say of a search, and what its defaults and `auto` come down to."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from heliostat.core.model import Count, Integer, Number, Positive, Spec
from heliostat.core.space import Space
from heliostat.errors import nearest
from heliostat.stages.evaluate_after import PassConfig, epochs_of, references_of
from heliostat.training.config import TrainConfig

if TYPE_CHECKING:
    from heliostat.runtime.engines import EngineKind

SMALL_SPACE = 64
"""`auto` tries every point of a discrete space up to this size, if the trials suffice."""
BAYESIAN_FROM = 20
"""`auto` models the objective from this many trials on: TPE draws its first ones at random anyway."""
TRIALS = "trials"
"""What an entry of `start_from` that is no point says instead of parameters."""
COSTS = ("latency_ms", "size_mb", "num_params")
"""What a trial's model may be measured for, besides the task's own metrics; less is better."""


class ObjectiveConfig(Spec):
    """The metric that trials are compared by. `mode` is the metric's own by default: a loss is better low."""

    metric: str
    mode: Literal["max", "min"] | None = None


def _to_objective(value: Any) -> Any:
    """`val_accuracy` or `{val_accuracy: max}` as the fields of an objective."""
    if isinstance(value, str):
        return {"metric": value}
    if isinstance(value, Mapping) and len(value) == 1 and "metric" not in value:
        ((metric, mode),) = value.items()
        return {"metric": metric, "mode": mode}
    return value


def _to_list(value: Any) -> Any:
    return [value] if isinstance(value, Mapping) else value


class AshaConfig(Spec):
    """Asynchronous successive halving (Li et al. 2018, https://arxiv.org/abs/1810.05934), in its stopping form.

    Trials are compared after `grace_epochs` epochs and then each time `reduction_factor` times as many; one in
    `reduction_factor` goes on.
    """

    grace_epochs: Count = 1
    reduction_factor: Annotated[Integer, Field(ge=2)] = 3

    def compared_at(self, epochs: int) -> Sequence[int]:
        """The epochs after which trials of so many are compared; the last one is none of them."""
        rungs = [self.grace_epochs]
        while rungs[-1] < epochs:
            rungs.append(rungs[-1] * self.reduction_factor)
        return rungs[:-1]


class MedianConfig(Spec):
    """The median stopping rule (Golovin et al. 2017, https://research.google/pubs/pub46180/).

    After any epoch from `grace_epochs` on, a trial ends whose best value so far is worse than the median of what the
    others that came so far, `min_trials` or more, had on average.
    """

    grace_epochs: Count = 1
    min_trials: Count = 3

    def compared_at(self, epochs: int) -> Sequence[int]:
        """The epochs after which trials of so many are compared; the last one is none of them."""
        return range(1, epochs)


class SchedulerConfig(Spec):
    """What stops trials before their last epoch: one of them."""

    asha: AshaConfig | None = None
    median: MedianConfig | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "SchedulerConfig":
        if (self.asha is None) == (self.median is None):
            raise ValueError(f"name one of {' and '.join(type(self).model_fields)}, or `none`")
        return self

    @property
    def chosen(self) -> tuple[str, AshaConfig | MedianConfig]:
        """Its name and its options."""
        ((name, options),) = ((name, options) for name, options in self if options is not None)
        return name, options


def _known_algorithm(name: str) -> str:
    from heliostat.runtime.engines import engines

    known = [*engines(), "auto"]
    if name not in known:
        raise ValueError(f"unknown algorithm {name!r}{nearest(name, known)}")
    return name


def _to_scheduler(value: Any) -> Any:
    known = [*SchedulerConfig.model_fields, "none"]
    if isinstance(value, str) and value not in known:
        raise ValueError(f"unknown scheduler {value!r}{nearest(value, known)}")
    return None if value == "none" else {value: {}} if isinstance(value, str) else value


class TuneConfig(Spec):
    """A search. `grid` needs no `trials`; the other methods run 16 unless told.

    It ends before its last trial after `wall_time_s` seconds, interruptions left out, or with the first epoch of a
    trial in which each metric of `stop_when` is as good as stated. The best so far is its result.
    """

    algorithm: Annotated[str, AfterValidator(_known_algorithm)] = "auto"
    trials: Count | None = None
    space: dict[str, Any]
    max_grid: Count = 500
    """A `grid` of more points than these is taken for an accident, and refused."""
    objective: ObjectiveConfig | None = None
    objectives: (
        Annotated[tuple[Annotated[ObjectiveConfig, BeforeValidator(_to_objective)], ...], Field(min_length=1)] | None
    ) = None
    """Several, as `[{val_accuracy: max}, {latency_ms: min}]`: the record has the Pareto set. The best of it, which goes
    on to training, is the best in the first; equals in that are told apart by the next. A scheduler sees the first."""
    start_from: Annotated[tuple[dict[str, Any], ...], BeforeValidator(_to_list)] = ()
    """Parameters to try first, each a whole point of the space; the engine learns from them as from its own.

    `{trials: PATH}` is an earlier search, by its folder: the engine learns from its trials, which are not run again.
    One of the same file stands in the slot `start_from`.
    """
    limits: dict[str, Number] = Field(default_factory=dict)
    """What a metric may be at most, or at least if more of it is better. No trial beyond one is the best, or on the
    front; a search in which none is within fails, and names the closest."""
    scheduler: Annotated[SchedulerConfig | None, BeforeValidator(_to_scheduler)] = None
    folds: Annotated[Integer, Field(ge=2)] | None = None
    """Cross-validate: `train` is cut into so many parts, each held out by one of as many trainings of a trial."""
    train: TrainConfig = TrainConfig()
    wall_time_s: Positive | None = None
    stop_when: dict[str, Number] = Field(default_factory=dict)
    evaluate_after: tuple[PassConfig, ...] = ()
    """What each trial's model goes through before it is judged, `[{prune: {…}}, {quantize: {…}}]`: the metrics of `val`
    are then those of the outcome. The trained model's stand beside them, as `val_accuracy_plain`."""

    @property
    def searched(self) -> list[str]:
        """The dotted paths that the search sets."""
        return Space.parse(self.space).paths()

    @property
    def points(self) -> dict[str, dict[str, Any]]:
        """The parameters to try first, by their places."""
        return {place: entry for place, entry in self._starts if TRIALS not in entry}

    @property
    def earlier(self) -> dict[str, str]:
        """The paths of the searches to learn from, by their places."""
        return {f"{place}.{TRIALS}": str(entry[TRIALS]) for place, entry in self._starts if TRIALS in entry}

    @property
    def _starts(self) -> list[tuple[str, dict[str, Any]]]:
        return [(f"config.start_from[{index}]", entry) for index, entry in enumerate(self.start_from)]

    @property
    def code_references(self) -> tuple[str, ...]:
        return (*self.train.code_references, *references_of(self.evaluate_after))

    @property
    def costs(self) -> dict[str, str]:
        """What a trial's model has to be measured for besides its metrics, each with a place that asks for it."""
        places = {aim.metric: "config.objectives" if self.objectives else "config.objective" for aim in self.aims}
        for field in ("limits", "stop_when"):
            places |= {metric: f"config.{field}.{metric}" for metric in getattr(self, field)}
        return {metric: place for metric, place in places.items() if metric in COSTS}

    @property
    def epochs_per_trial(self) -> int:
        """How many a trial trains for at most, those included that its passes take each time that it is judged."""
        compared_at = self.scheduler.chosen[1].compared_at(self.train.epochs) if self.scheduler else ()
        return self.train.epochs * (self.folds or 1) + epochs_of(self.evaluate_after) * (len(compared_at) + 1)

    @property
    def aims(self) -> tuple[ObjectiveConfig, ...]:
        """The objectives that are stated, be it one or several."""
        return self.objectives or ((self.objective,) if self.objective else ())

    @property
    def engine(self) -> "EngineKind | None":
        """The engine that is asked for; None for `auto`."""
        from heliostat.runtime.engines import engines

        return engines().get(self.algorithm)

    @property
    def exhaustive(self) -> bool:
        """Whether the method that is asked for tries each point of the space."""
        return self.engine is not None and self.engine.exhaustive

    @property
    def method(self) -> tuple[str, int, str]:
        """The method, the number of trials, and why: what `auto` and the defaults come down to."""
        return self.method_when(taught=False)

    def method_when(self, *, taught: bool) -> tuple[str, int, str]:
        """The same; `taught` if there is an earlier search to learn from that the config does not name."""
        size = Space.parse(self.space).size()
        if self.exhaustive:
            return self.algorithm, size or 0, f"every one of {size} points"
        trials = self.trials or 16
        if self.algorithm != "auto":
            return self.algorithm, trials, "as asked"
        if not self.earlier and size is not None and size <= min(SMALL_SPACE, trials):
            return "grid", size, f"the space has only {size} points"
        taught = taught or bool(self.earlier)
        if not taught and trials < BAYESIAN_FROM:
            return "random", trials, f"{trials} trials are too few to learn a model of the space from"
        enough = f"{trials} trials suffice to learn where the space is good"
        if taught:
            enough = "there are earlier trials to learn from"
        if len(self.aims) > 1:
            return "optuna_tpe", trials, f"{enough}, and unlike bayesian it takes several objectives"
        if self.limits:
            return "optuna_tpe", trials, f"{enough}, and unlike bayesian it models how far beyond the limits a trial is"
        return "bayesian", trials, enough
