"""What a run does around its stages: it starts processes that take long to start, and clears shelves."""

import pytest

from heliostat.core.outcome import Unwatched
from heliostat.execution import Execution, call_up_first
from heliostat.history import History
from heliostat.mirror import NoMirror
from heliostat.runner import load_pipeline, plan
from heliostat.runtime import standby
from heliostat.tracking import quiet

quiet.silence()

STAGES = """

from heliostat.core.model import Spec
from heliostat.core.stage import StageResult, stage


class Numbered(Spec):
    number: int = 0


@stage("source", output="table", place="driver")
def source(context, config: Numbered):
    return StageResult(files=[])


@stage("keeper", inputs={"table": "table"}, output="table", place="driver")
def keeper(context, config: Numbered):
    context.shelf.mkdir(parents=True, exist_ok=True)
    (context.shelf / str(config.number)).touch()
    return StageResult(files=[])
"""


@pytest.fixture
def called_up(monkeypatch):
    """The folders of the trainings whose workers were called up."""
    folders = []
    monkeypatch.setattr(standby, "call_up", lambda folder, resources: folders.append((folder, resources.workers)))
    return folders


def planned(toy, *stages):
    document = toy.document
    document["stages"] = [stage for stage in document["stages"] if stage["name"] in stages]
    document["stages"][-1]["resources"] = {"workers": 2}
    if len(stages) == 1:
        del document["stages"][0]["inputs"]
    return plan(load_pipeline(toy.write(document)))


def test_a_training_that_needs_nothing_is_called_up_at_once(toy, called_up):
    pipeline = planned(toy, "train")
    call_up_first(pipeline)
    assert called_up == [(pipeline.node("train").folder, 2)]


def test_a_training_is_called_up_when_the_last_trial_of_the_search_before_it_is_left(toy, called_up):
    pipeline = planned(toy, "search", "train")
    call_up_first(pipeline)
    with History.open(pipeline, "key", note=print) as history:
        execution = Execution(pipeline, history, NoMirror(), Unwatched())
        reporter = execution._reporter(pipeline.node("search"))
        for done in range(3):
            reporter.progress(done=done, total=4, running=2)
        assert called_up == []
        reporter.progress(done=3, total=4, running=1)
    assert called_up == [(pipeline.node("train").folder, 2)]


def test_a_shelf_is_kept_for_what_still_goes_into_the_stage_and_no_longer(toy):
    toy.module.write_text(toy.module.read_text() + STAGES)

    def kept_after(*sources, number):
        """Run with these sources, and a stage that keeps a file of this number for each; how many files it has."""
        stages = [
            {"name": "from", "uses": "toy:source", "matrix": {"number": list(sources)}},
            {"name": "keep", "uses": "toy:keeper", "inputs": {"table": "from"}, "config": {"number": number}},
        ]
        pipeline = plan(load_pipeline(toy.write({**toy.document, "stages": stages})))
        with History.open(pipeline, "key", note=print) as history:
            outcomes, _ = Execution(pipeline, history, NoMirror(), Unwatched()).run()
        assert {outcome.status for outcome in outcomes} <= {"ran", "reused"}
        return sorted(int(path.name) for path in toy.folder.glob(".heliostat/toy/keep/shelf/*/*"))

    assert kept_after(1, 2, number=10) == [10, 10]
    assert kept_after(1, 2, number=20) == [10, 10, 20, 20]
    assert kept_after(2, 3, number=30) == [10, 20, 30, 30]
    assert kept_after(1, 2, number=10) == [10, 20, 30, 30]  # the stage did not run
