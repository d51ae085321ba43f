"""Search: many short trainings, through Ray Tune.

    engine (what to try next)  ->  Tune (where and when)  ->  trial actors (the training loop)
                 ^                                                     |
                 +------------ ledger: journal + reporter <------------+

Tune keeps nothing that matters. A search resumes by leading a fresh engine and scheduler through the journal: trials
that ended are not run again, and those under way begin anew, first, under the same ids and parameters.
"""

import json
import tempfile
import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.tune.experiment import Trial
from ray.tune.search import ConcurrencyLimiter, Searcher

from heliostat.core.capacity import amount
from heliostat.core.objective import Objectives
from heliostat.core.paths import overlay
from heliostat.core.space import Space
from heliostat.core.spec import Resources, Task
from heliostat.core.stage import Reporter
from heliostat.errors import ResourceError, StageError
from heliostat.runtime.appraisal import Appraisal
from heliostat.runtime.engines import Engine, engines
from heliostat.runtime.failures import commonest
from heliostat.runtime.hang import why_it_hung
from heliostat.runtime.journal import Journal, TrialRecord
from heliostat.runtime.ledger import Budget, Cause, Ledger
from heliostat.runtime.making import Distinct, Making
from heliostat.runtime.scheduling import Rung, Scheduler, Settings, make_scheduler, rung_table
from heliostat.runtime.session import cluster_capacity
from heliostat.runtime.shared_data import DataProvider
from heliostat.runtime.tasks import why_it_died
from heliostat.runtime.trial_actor import TrialActor, TrialWork
from heliostat.runtime.tune_mends import mend_tune
from heliostat.training.config import TrainConfig

POLL_S = 0.1
_registering = threading.Lock()
"""Tune's registry is one dictionary of the process, and searches may run side by side."""


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found out."""

    trials: tuple[TrialRecord, ...]
    """Every trial, in the order in which they were suggested."""
    best: TrialRecord
    """By the first objective, of equals in that by the next; within the limits."""
    front: tuple[TrialRecord, ...]
    """Those that no other is better than in one objective and as good as in all: the Pareto set, `best` among them."""
    ended_by: Cause
    rungs: tuple[Rung, ...] = ()
    """Each epoch after which trials were compared, and the last one; empty without a scheduler."""


def search(
    task: Task,
    *,
    space: Space,
    algorithm: str,
    budget: Budget,
    train: TrainConfig,
    objectives: Objectives,
    scheduler: Settings | None,
    seed: int,
    resources: Resources,
    root: Path,
    folder: Path,
    reporter: Reporter,
    cancel: threading.Event,
    provider: DataProvider | None = None,
    retries: int = 0,
    folds: int | None = None,
    appraisal: Appraisal | None = None,
    start_from: Sequence[Mapping[str, Any]] = (),
    earlier: Sequence[TrialRecord] = (),
    making: Making | None = None,
) -> SearchOutcome:
    """The best of the trainings that the budget allows, each of `train` with parameters from `space` laid over it.

    `folder` holds `journal.jsonl`; a search that was cut off goes on from there. With one trial at a time and a seed it
    then makes the suggestions that it would have made uninterrupted. `retries` is how often a trial begins anew after
    its process died; what the user's code raises is that trial's end. `provider` has the data built once for all;
    without one each process builds its own. With `folds` a trial is cross-validated on parts of `train`, and its
    figures are means; an `appraisal` gives it further ones. With a `making`, trials do that instead of training, each
    point once. The engine learns from the trials `earlier`, of other searches, and the points of `start_from` are tried
    first. Raises StageError when no trial succeeds within the limits, ResourceError when none can ever fit,
    KeyboardInterrupt when `cancel` is set; the journal is intact then.
    """
    metric, mode = objectives.first.metric, objectives.first.mode
    concurrent = concurrent_trials(resources)
    engine: Engine = engines()[algorithm].make(
        space, num_objectives=len(objectives.ordered), seed=seed, trials=budget.trials
    )
    if making is not None:
        engine = Distinct(engine, space, seed=seed)
    judge = make_scheduler(scheduler, epochs=train.epochs, mode=mode) if scheduler else None
    compared_at = judge.compared_at if judge else ()
    journal = Journal(folder / "journal.jsonl")
    try:
        ledger = Ledger(
            engine,
            journal,
            reporter,
            budget=budget,
            seed=seed,
            objectives=objectives,
            start_from=start_from,
            earlier=earlier,
        )
        if not ledger.over:
            if judge:
                judge.remember(ledger.standing.ended.values(), metric=metric)
            shared = provider.shared if provider else None
            work = TrialWork(
                task,
                train,
                folds,
                seed,
                metric,
                compared_at,
                root,
                folder,
                resources,
                shared,
                retries,
                appraisal,
                making,
            )
            searcher = _TuneSearcher(ledger, provider, train)
            _run_interruptibly(searcher, work, judge, concurrent=min(concurrent, ledger.left), cancel=cancel)
        ended_by = ledger.over or "trials"  # a grid may have fewer points than there were trials to spend
        ledger.end_open()
    finally:
        journal.close()
    trials = sorted(ledger.standing.ended.values(), key=lambda trial: trial.id)
    best, front = _choose(trials, objectives)
    table = rung_table(trials, epochs=(*compared_at, train.epochs)) if judge else ()
    return SearchOutcome(tuple(trials), best, front, ended_by, tuple(table))


def concurrent_trials(resources: Resources) -> int:
    """How many trials the cluster holds at once, workers counted node by node; at most `max_concurrent_trials`.

    The driver of a trial with several workers only waits and holds no CPU. Raises ResourceError when none ever fits.
    """
    capacity = cluster_capacity()
    fit = int(capacity.workers(resources.per_worker)) // resources.workers_per_trial
    if fit == 0:
        raise ResourceError(
            f"a trial needs {resources.workers_per_trial} worker(s) of {amount(resources.per_worker)} each; "
            f"the cluster has {capacity}"
        )
    return min(fit, resources.max_concurrent_trials or fit)


def _choose(trials: Sequence[TrialRecord], objectives: Objectives) -> tuple[TrialRecord, tuple[TrialRecord, ...]]:
    """The best of the trials, and the front. Raises StageError when none was judged, or is within the limits."""
    by_id = {trial.id: trial for trial in trials}
    good = {trial.id: trial.metrics for trial in trials if trial.was_judged}
    if not good:
        how = "failed" if all(trial.status == "failed" for trial in trials) else "failed or were stopped unjudged"
        raise StageError(f"all {len(trials)} trials {how}\n{commonest(trial.reason or '' for trial in trials)}")
    best = objectives.best(good)
    if best is None:
        closest = by_id[objectives.closest(good)]
        figures = ", ".join(f"{limit.metric} {closest.metrics[limit.metric]:.4g}" for limit in objectives.limits)
        raise StageError(
            f"none of {len(good)} trials is within the limits: {', '.join(map(str, objectives.limits))}; "
            f"the closest is {closest.id}, with {figures}: {json.dumps(closest.params)}"
        )
    return by_id[best], tuple(by_id[trial] for trial in objectives.front(good))


def data_args_of(train: TrainConfig, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the data function will be given, whatever else of the parameters makes a train config or does not."""
    mine = {path: value for path, value in params.items() if path.startswith("data_args.")}
    return overlay(TrainConfig(data_args=train.data_args), mine).data_args


class _TuneSearcher(Searcher):  # type: ignore[misc]
    """Tune asks here for parameters. Outcomes reach the ledger through the callback, which sees how a trial ended."""

    def __init__(self, ledger: Ledger, provider: DataProvider | None, train: TrainConfig) -> None:
        super().__init__()
        self.ledger = ledger
        self._provider, self._train = provider, train

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if (trial := self.ledger.next()) and self._provider:
            self._provider.provide(data_args_of(self._train, json.loads(trial["params"])))
        return trial or Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass


class _TuneCallback(tune.Callback):  # type: ignore[misc]
    """Tells the ledger, and leaves little of a trial behind: Tune holds every trial until the search ends."""

    def __init__(self, ledger: Ledger, judge: Scheduler | None, work: TrialWork) -> None:
        self._ledger, self._judge, self._work = ledger, judge, work

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        name = trial.config["trial"]
        self._ledger.rows(name, result.pop("rows"))
        for text in result.pop("warnings"):
            self._ledger.warned(name, text)
        if self._judge and (verdict := self._judge.take_verdict()):
            self._ledger.judged(verdict)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        outcome = trial.last_result.get("outcome", "stopped")
        self._ledger.ended(trial.config["trial"], outcome, trial.last_result.get("reason"))
        for statistics in (trial.last_result, trial.metric_analysis, trial.metric_n_steps):
            statistics.clear()

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ledger.restarted(trial.config["trial"], why=self._why_lost(trial))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ledger.ended(trial.config["trial"], "failed", self._why_lost(trial))

    def _why_lost(self, trial: Trial) -> str:
        note = self._work.hang_note(trial.config["trial"])
        return why_it_hung(self._work.resources.hang_timeout_s, note=note) or _why_lost(trial)


def _why_lost(trial: Trial) -> str:
    """By the files that Tune has just written on this machine: `trial.get_error` looks where they come to lie later."""
    if trial.pickled_error_file:
        return why_it_died(cloudpickle.loads(Path(trial.pickled_error_file).read_bytes()))
    return Path(trial.error_file).read_text()  # it could not even be started


def _run_interruptibly(
    searcher: _TuneSearcher, work: TrialWork, judge: Scheduler | None, *, concurrent: int, cancel: threading.Event
) -> None:
    """Tune in a thread of its own: there it leaves signals alone, and this thread can be interrupted at once."""
    with ThreadPoolExecutor(1, thread_name_prefix="tune") as pool:
        running = pool.submit(_run_tune, searcher, work, judge, concurrent=concurrent, cancel=cancel)
        try:
            while not running.done():
                cancel.wait(POLL_S)
                if cancel.is_set():
                    break
        except KeyboardInterrupt:
            cancel.set()
        running.result()
    if cancel.is_set() and not searcher.ledger.over:
        raise KeyboardInterrupt


class _Over(tune.Stopper):  # type: ignore[misc]
    """Stops all trials when the search is cancelled, or over before its last trial has ended."""

    def __init__(self, ledger: Ledger, cancel: threading.Event) -> None:
        self._ledger, self._cancel = ledger, cancel

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it into a snapshot that nobody reads

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._cancel.is_set() or self._ledger.over is not None


def _run_tune(
    searcher: _TuneSearcher, work: TrialWork, judge: Scheduler | None, *, concurrent: int, cancel: threading.Event
) -> None:
    mend_tune()
    ledger = searcher.ledger
    trainable = f"trials-{uuid.uuid4().hex}"
    with _registering:
        tune.register_trainable(trainable, type("Trials", (TrialActor,), {"work": work}))
    only_waits = {"memory": 1}  # for its workers, but Tune cannot ask Ray for nothing
    held = work.resources.per_worker if work.resources.workers_per_trial == 1 else only_waits
    with tempfile.TemporaryDirectory(prefix="tune-", ignore_cleanup_errors=True) as scratch:
        tune.run(
            trainable,
            name="search",
            search_alg=ConcurrencyLimiter(searcher, max_concurrent=concurrent),
            scheduler=judge,
            num_samples=ledger.left,
            max_failures=work.retries,  # of the trial's process: what the user's code raises is a result
            resources_per_trial=tune.PlacementGroupFactory([held]),
            reuse_actors=True,
            stop=_Over(ledger, cancel),
            callbacks=[_TuneCallback(ledger, judge, work)],
            storage_path=scratch,
            raise_on_failed_trial=False,
            verbose=0,
        )
