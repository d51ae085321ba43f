"""When the processes of a stage are started that take long to start."""

import pytest

from heliostat.core.outcome import Unwatched
from heliostat.execution import Execution, call_up_first
from heliostat.history import History
from heliostat.mirror import NoMirror
from heliostat.runner import load_pipeline, plan
from heliostat.runtime import standby
from heliostat.tracking import quiet

quiet.silence()


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
