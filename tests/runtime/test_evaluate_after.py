"""Searches whose trials are judged by their compressed models, and by what these cost, through real Ray."""

import json
import textwrap
import threading
from collections import defaultdict
from dataclasses import replace

import pytest

from heliostat.core.artifact import Artifact, Record
from heliostat.core.imports import use_root
from heliostat.core.paths import overlay
from heliostat.core.spec import Resources, Task
from heliostat.core.stage import StageContext
from heliostat.errors import StageError
from heliostat.runtime.appraisal import Appraisal, Appraiser
from heliostat.runtime.gate import Gate
from heliostat.runtime.journal import Journal
from heliostat.runtime.ledger import trial_seed
from heliostat.stages.measure import measure_quality
from heliostat.stages.models import fine_tune, save_trained
from heliostat.stages.quantize import QuantizeConfig, quantize
from heliostat.stages.rerun import ended_trial, rerun
from heliostat.stages.tune import TuneConfig, tune
from heliostat.training.config import TrainConfig
from heliostat.training.seeding import seed_everything
from heliostat.training.task import build_model

ONE_AT_A_TIME = Resources(max_concurrent_trials=1)

OUTLIERS = """
    import os, time
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    class Spread(nn.Module):
        # Channels of very different ranges, which the next layer undoes: in float they change nothing.
        def __init__(self, width, ratio):
            super().__init__()
            self.register_buffer("ranges", torch.logspace(0, 1, width, base=ratio))
            self.last = nn.Linear(width, 3)

        def forward(self, hidden):
            return nn.functional.linear(hidden * self.ranges, self.last.weight / self.ranges, self.last.bias)

    class Watched(nn.Module):
        # Notes when this process trains on a row or computes one, the latter not before another process trains.
        def __init__(self, log):
            super().__init__()
            self.log, self.met = log, False

        def forward(self, rows):
            if self.log and len(rows) == 1:
                while not (self.training or self.met):
                    trained = {line.split()[1] for line in open(self.log) if line.startswith("train")}
                    self.met = bool(trained - {str(os.getpid())})
                    time.sleep(0.001)
                with open(self.log, "a") as file:
                    file.write(f"{'train' if self.training else 'compute'} {os.getpid()} {time.monotonic_ns()}\\n")
            return rows

    def build_model(width=16, ratio=1.0, bare=False, log=None):
        if bare:
            return nn.Sequential(nn.LayerNorm(8), nn.AvgPool1d(2, 3))
        return nn.Sequential(Watched(log), nn.Linear(8, width), nn.ReLU(), Spread(width, ratio))

    def build_data():
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(800, 8, generator=generator)
        targets = (inputs @ torch.randn(8, 3, generator=generator)).argmax(1)
        parts = {"train": slice(0, 500), "val": slice(500, 800)}
        return {split: TensorDataset(inputs[rows], targets[rows]) for split, rows in parts.items()}

    def accuracy(outputs, targets):
        return (outputs.argmax(1) == targets).float().mean().item()
"""

WIDE = {"value": 1e5, "space": {"model_args.width": 16}}
"""Better in float; its outliers leave int8 no steps for the other channels."""
NARROW = {"value": 1.0, "space": {"model_args.width": 3}}
TRAIN = {"epochs": 4, "batch_size": 32, "optimizer": {"lr": 0.03}}
INT8 = {"quantize": {"method": "static"}}


@pytest.fixture
def task(root) -> Task:
    (root / "outliers.py").write_text(textwrap.dedent(OUTLIERS))
    return Task(model="outliers:build_model", data="outliers:build_data", metrics=["outliers:accuracy"])


@pytest.fixture
def context(task, root, tmp_path, reporter):
    """What a stage function is given, with a new folder of that name."""

    def make(name, *, seed=0, resources=ONE_AT_A_TIME, **inputs):
        (tmp_path / name).mkdir()
        return StageContext(
            node=name,
            folder=tmp_path / name,
            root=root,
            task=task,
            seed=seed,
            resources=resources,
            inputs=inputs,
            reporter=reporter,
            cancel=threading.Event(),
        )

    return make


def search(*points, **more):
    config = {"algorithm": "grid", "space": {"model_args.ratio": {"grid": list(points)}}, "train": TRAIN, **more}
    return TuneConfig.model_validate(config)


def int8_accuracy(context, root, *, trial, params):
    """What the stages make of a trial's parameters: trained as it was, then quantized."""
    config = overlay(TrainConfig.model_validate(TRAIN), params)
    use_root(root)
    trained = context(f"{trial}-train", seed=trial_seed(0, trial))
    seed_everything(trained.seed)
    model = build_model(trained.task, config.model_args)
    fine_tune(trained, model, config)
    save_trained(trained, model.eval(), config=config)
    fields = dict.fromkeys(["pipeline", "node", "stage", "uses", "fingerprint"], "train")
    recipe = {"train": config.model_dump(mode="json", exclude_unset=True)}
    record = Record(kind="model", identity={}, files={}, params=recipe, **fields)
    quantized = context(f"{trial}-int8", model=(Artifact(trained.folder, record),))
    quantize(quantized, QuantizeConfig(method="static"))
    return measure_quality(quantized.folder, quantized.task, recipe)["val_accuracy"]


@pytest.mark.usefixtures("ray_session")
def test_the_winner_by_compressed_models_is_another_one_than_the_plain_one_and_better_when_compressed(context, root):
    plain = tune(context("plain"), search(WIDE, NARROW))
    aware = tune(context("aware"), search(WIDE, NARROW, evaluate_after=[INT8]))
    assert (plain.details["best_trial"], aware.details["best_trial"]) == ("0001", "0002")
    assert plain.metrics["val_accuracy"] > aware.metrics["val_accuracy_plain"]
    wide = int8_accuracy(context, root, trial="0001", params=plain.params)
    narrow = int8_accuracy(context, root, trial="0002", params=aware.params)
    assert narrow > wide + 0.1
    assert narrow == pytest.approx(aware.metrics["val_accuracy"], abs=0.005)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_rungs_compare_compressed_models_and_the_plain_figures_stay_visible(context, reporter):
    asha = {"asha": {"reduction_factor": 2}}
    given, config = context("search"), search(NARROW, WIDE, evaluate_after=[INT8], scheduler=asha)
    found = tune(given, config)
    assert found.details["trials"] == {"done": 1, "stopped": 1, "failed": 0}
    assert [epoch for epoch, _ in reporter.rows["0002"]] == [1]  # in float it leads already
    assert reporter.rows["0002"][0][1]["val_accuracy_plain"] > reporter.rows["0001"][0][1]["val_accuracy_plain"]
    rows = dict(reporter.rows["0001"])
    assert [epoch for epoch in rows if "val_accuracy" in rows[epoch]] == [1, 2, 4]
    assert [epoch for epoch in rows if "val_accuracy_plain" in rows[epoch]] == [1, 2, 3, 4]
    assert rows[4].keys() >= {"val_loss", "val_loss_plain", "size_mb", "num_params", "train_loss"}
    for trial in ("0001", "0002"):
        again = rerun(given, config, ended_trial(given, config, trial))
        assert again.identical, again.differences
    then = ended_trial(given, config, "0001")
    cut_short = replace(then, status="stopped", epochs=3, history=then.history[:3])  # by the end of its search
    again = rerun(given, config, cut_short)
    assert (again.now.status, again.now.epochs, again.identical) == ("stopped", 3, True)


@pytest.mark.usefixtures("ray_session")
def test_a_model_that_cannot_be_compressed_fails_its_trial_alone(context, tmp_path):
    space = {"model_args.bare": {"grid": [True, False]}}
    tune(context("search"), search(evaluate_after=[INT8], space=space))
    bare, other = json.loads((tmp_path / "search" / "trials.json").read_text())
    assert (bare["status"], other["status"]) == ("failed", "done")
    assert bare["reason"].startswith("evaluate_after[0] (quantize): static quantisation finds nothing to quantise")


@pytest.mark.usefixtures("ray_session")
def test_a_trial_that_the_end_of_the_search_stops_before_its_first_judged_epoch_has_not_failed(context, reporter):
    early = {"stop_when": {"train_loss": 100.0}, "train": TRAIN | {"epochs": 500}}
    with pytest.raises(StageError, match="all 1 trials failed or were stopped unjudged"):
        tune(context("search"), search(NARROW, evaluate_after=[INT8], **early))
    assert reporter.ended == {"0001": ("stopped", "the search ended before an epoch of it reported val_accuracy")}


@pytest.mark.usefixtures("ray_session")
def test_when_its_time_is_over_the_best_judged_trial_goes_on_and_one_under_way_is_stopped_unjudged(
    context, reporter, monkeypatch
):
    monkeypatch.setattr(Journal, "spent_s", property(lambda journal: 1e9 if "0002" in reporter.rows else 0.0))
    space = {"epochs": {"grid": [1, 100_000]}}
    found = tune(context("search"), search(evaluate_after=[INT8], space=space, wall_time_s=60))
    assert (found.details["ended_by"], found.details["best_trial"]) == ("wall time", "0001")
    unjudged = ("stopped", "the search ended before an epoch of it reported val_accuracy")
    assert reporter.ended == {"0001": ("done", None), "0002": unjudged}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_model_that_costs_too_much_is_not_chosen(context):
    space = {"model_args.width": {"grid": [3, 4000]}}
    given = context("search")
    found = tune(given, search(space=space, limits={"size_mb": 0.1}, train=TRAIN | {"epochs": 1}))
    assert found.details["best_trial"] == "0001"
    assert [trial["trial"] for trial in found.details["front"]] == ["0001"]
    small, large = json.loads((given.folder / "trials.json").read_text())
    assert small["metrics"]["size_mb"] < 0.1 < large["metrics"]["size_mb"]
    assert (small["status"], large["status"]) == ("done", "done")


@pytest.mark.usefixtures("ray_session")
def test_what_a_model_costs_is_an_objective_measured_while_other_trials_pause(context, tmp_path, reporter):
    log = tmp_path / "calls"
    log.touch()
    objectives = ["val_accuracy", {"num_params": "min"}, {"latency_ms": "min"}]
    space = {"model_args.width": {"grid": [3, 16]}, "model_args.log": str(log)}
    config = search(space=space, objectives=objectives, train=TRAIN | {"batch_size": 1, "eval_batch_size": 128})
    found = tune(context("search", resources=Resources()), config)

    front = {trial["trial"]: trial for trial in found.details["front"]}
    assert front["0001"]["num_params"] == (8 + 1) * 3 + (3 + 1) * 3
    assert all(row["latency_ms"] > 0 for rows in reporter.rows.values() for _, row in rows)
    times = {"train": defaultdict(list), "compute": defaultdict(list)}
    for what, pid, at in map(str.split, log.read_text().splitlines()):
        times[what][pid].append(int(at))
    assert times["train"].keys() == times["compute"].keys()
    for pid, computed in times["compute"].items():
        timed = computed[len(computed) // 2 :]  # the first ones were to count operations, and to warm up
        ((other, steps),) = [(other, steps) for other, steps in times["train"].items() if other != pid]
        assert [at for at in steps if timed[0] < at < timed[-1]] == [], f"{other} trained while {pid} measured"


# --- the rows of one trial ------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path):
    """The rows that come of a training with these plain accuracies; what is measured is the epoch of the weights."""

    def run(accuracies, *, compresses=True, compared_at=(), **config):
        measured, reported = [], []

        def measure(weights, **more):
            measured.append(weights["epoch"])
            return {"val_accuracy": weights["epoch"]} if compresses else {"size_mb": 7.0}

        def report(epoch, row):
            reported.append(dict(row))
            return False

        gate, train = Gate(tmp_path), TrainConfig(epochs=len(accuracies), **config)
        appraiser = Appraiser(
            Appraisal(train, measure, compresses),
            report,
            config=train,
            data={},
            compared_at=compared_at,
            gate=gate,
        )
        with gate.at_work():
            for epoch, accuracy in enumerate(accuracies, 1):
                if accuracy > max(accuracies[: epoch - 1], default=-1.0):
                    appraiser.best(epoch, {"epoch": epoch}, {})
                appraiser.epoch(epoch, {"train_loss": 1.0, "val_accuracy": accuracy, "val_s": 2.0})
        return reported, measured

    return run


def test_a_row_has_the_figures_of_the_best_weights_so_far_which_are_measured_once(rows):
    reported, measured = rows([0.5, 0.9, 0.7, 0.8], compared_at=(1, 3))
    assert [row.get("val_accuracy") for row in reported] == [1, None, 2, 2]
    assert [row["val_accuracy_plain"] for row in reported] == [0.5, 0.9, 0.7, 0.8]
    assert all(row.keys() >= {"train_loss", "val_s"} for row in reported)
    assert measured == [1, 2]


def test_a_trial_that_stops_early_is_judged_at_its_last_epoch(rows):
    reported, _ = rows([0.9, 0.5, 0.4, 0.3], early_stop_epochs=2)
    assert [row.get("val_accuracy") for row in reported][:3] == [None, None, 1]


def test_what_a_model_costs_without_passes_is_measured_once_and_stands_in_every_row(rows):
    reported, measured = rows([0.5, 0.9, 0.7], compresses=False)
    assert [(row["val_accuracy"], row["size_mb"]) for row in reported] == [(0.5, 7.0), (0.9, 7.0), (0.7, 7.0)]
    assert measured == [1]
