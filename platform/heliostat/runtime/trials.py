"""Trials through Ray Tune, in processes of the cluster: as many at once as fit, and as many as the ledger has."""

import json
import tempfile
import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.tune.experiment import Trial
from ray.tune.search import ConcurrencyLimiter, Searcher

from heliostat.core.capacity import amount
from heliostat.core.spec import Resources
from heliostat.errors import ResourceError
from heliostat.runtime.hang import why_it_hung
from heliostat.runtime.ledger import Ledger
from heliostat.runtime.placement import free
from heliostat.runtime.scheduling import Scheduler
from heliostat.runtime.session import cluster_capacity
from heliostat.runtime.shared_data import DataProvider
from heliostat.runtime.task_failure import why_it_failed_before
from heliostat.runtime.tasks import why_it_died
from heliostat.runtime.trial_actor import TrialActor
from heliostat.runtime.tune_mends import mend_tune
from heliostat.runtime.work import Conditions, Work

POLL_S = 0.1
_registering = threading.Lock()
"""Tune's registry is one dictionary of the process, and searches may run side by side."""


def run_trials(
    work: Work,
    conditions: Conditions,
    ledger: Ledger,
    *,
    judge: Scheduler | None,
    provider: DataProvider | None,
    concurrent: int,
    cancel: threading.Event,
) -> None:
    """Run what the ledger has next, until it is over or has no more. Raises KeyboardInterrupt when `cancel` is set.

    Tune is in a thread of its own: there it leaves signals alone, and this thread can be interrupted at once.
    """

    def run() -> None:
        mend_tune()
        trainable = f"trials-{uuid.uuid4().hex}"
        with _registering:
            tune.register_trainable(trainable, type("Trials", (TrialActor,), {"work": work, "conditions": conditions}))
        only_waits = {"memory": 1}  # for its workers, but Tune cannot ask Ray for nothing
        resources = conditions.resources
        held = resources.per_worker if resources.workers_per_trial == 1 else only_waits
        with tempfile.TemporaryDirectory(prefix="tune-", ignore_cleanup_errors=True) as scratch:
            tune.run(
                trainable,
                name="search",
                search_alg=ConcurrencyLimiter(_TuneSearcher(ledger, work, provider), max_concurrent=concurrent),
                scheduler=judge,
                num_samples=ledger.left,
                max_failures=conditions.retries,  # of the trial's process: what the user's code raises is a result
                resources_per_trial=tune.PlacementGroupFactory([held]),
                reuse_actors=True,
                stop=_Over(ledger, cancel),
                callbacks=[_TuneCallback(ledger, judge, conditions)],
                storage_path=scratch,
                raise_on_failed_trial=False,
                verbose=0,
            )
        free(conditions.folder_of("*"))  # nobody waits for the workers of trials that were stopped

    with ThreadPoolExecutor(1, thread_name_prefix="tune") as pool:
        running = pool.submit(run)
        try:
            while not running.done():
                cancel.wait(POLL_S)
                if cancel.is_set():
                    break
        except KeyboardInterrupt:
            cancel.set()
        running.result()
    if cancel.is_set() and not ledger.over:
        raise KeyboardInterrupt


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


class _TuneSearcher(Searcher):  # type: ignore[misc]
    """Tune asks here for parameters. Outcomes reach the ledger through the callback, which sees how a trial ended."""

    def __init__(self, ledger: Ledger, work: Work, provider: DataProvider | None) -> None:
        super().__init__()
        self._ledger, self._work, self._provider = ledger, work, provider

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if (trial := self._ledger.next()) and self._provider:
            self._provider.provide(self._work.data_args(json.loads(trial["params"])))
        return trial or Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass


class _TuneCallback(tune.Callback):  # type: ignore[misc]
    """Tells the ledger, and leaves little of a trial behind: Tune holds every trial until the search ends."""

    def __init__(self, ledger: Ledger, judge: Scheduler | None, conditions: Conditions) -> None:
        self._ledger, self._judge, self._conditions = ledger, judge, conditions

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ledger.began(trial.config["trial"])

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
        if trial.last_result.get("of_task"):
            self._ledger.task_failed(trial.config["trial"], trial.last_result["reason"])
        self._ledger.ended(trial.config["trial"], outcome, trial.last_result.get("reason"))
        for statistics in (trial.last_result, trial.metric_analysis, trial.metric_n_steps):
            statistics.clear()

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ledger.restarted(trial.config["trial"], why=self._why_lost(trial))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        free(self._conditions.folder_of(trial.config["trial"]))
        self._ledger.ended(trial.config["trial"], "failed", self._why_lost(trial))

    def _why_lost(self, trial: Trial) -> str:
        if reason := why_it_failed_before(self._conditions.failure_note(trial.config["trial"])):
            return reason
        note = self._conditions.hang_note(trial.config["trial"])
        return why_it_hung(self._conditions.resources.hang_timeout_s, note=note) or _why_lost(trial)


def _why_lost(trial: Trial) -> str:
    """By the files that Tune has just written on this machine: `trial.get_error` looks where they come to lie later."""
    if trial.pickled_error_file:
        return why_it_died(cloudpickle.loads(Path(trial.pickled_error_file).read_bytes()))
    return Path(trial.error_file).read_text()  # it could not even be started


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
