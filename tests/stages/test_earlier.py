"""A search that learns from the trials of an earlier one: what it takes of them, and what a plan says of that."""

import json

import pytest

from heliostat.core.load import load_pipeline
from heliostat.core.objective import Bound, Objectives
from heliostat.core.space import Space
from heliostat.errors import SpecError
from heliostat.runner import plan
from heliostat.runtime.journal import Ended, Journal, Reported, Suggested
from heliostat.stages.earlier import lessons_of

SPACE = {"optimizer.lr": {"loguniform": [1e-3, 1e-1]}, "model_args.width": {"choice": [8, 16]}}
LOSS = Objectives.of({"val_loss": "min"})


@pytest.fixture
def earlier(toy):
    """Writes the folder of a search with one trial for each learning rate; it ended as stated, after these rows."""

    def write(*rates, width=8, status="done", rows=({"val_loss": 2.0}, {"val_loss": 1.0}), name="before"):
        folder = toy.folder / name
        folder.mkdir(exist_ok=True)
        journal = Journal(folder / "journal.jsonl")
        for number, rate in enumerate(rates, len(journal.past) // 3 + 1):
            trial = f"{number:04d}"
            journal.append(Suggested(trial, {"optimizer.lr": rate, "model_args.width": width}))
            journal.append(Reported(trial, list(enumerate(rows, 1))))
            journal.append(Ended(trial, status, "its reason" if status == "failed" else None, 1.0))
        journal.close()
        return folder

    return write


@pytest.fixture
def lessons(toy):
    def read(stated="before", *, space=SPACE, objectives=LOSS):
        return lessons_of(stated, root=toy.folder, space=Space.parse(space), objectives=objectives)

    return read


@pytest.fixture
def planned(toy):
    """The plan's node of a search that starts so."""

    def make(start_from, **config):
        document = toy.document
        config = {"space": SPACE, "objective": {"metric": "val_loss"}, "start_from": start_from, **config}
        search = document["stages"][0] | {"config": config}
        document["stages"] = [search]
        return plan(load_pipeline(toy.write(document))).node("search")

    return make


def test_trials_are_read_from_the_folder_of_a_search_its_journal_or_its_table(earlier, lessons):
    folder = earlier(0.01, 0.02)
    from_folder = lessons().trials
    assert [trial.params["optimizer.lr"] for trial in from_folder] == [0.01, 0.02]
    assert [trial.metrics for trial in from_folder] == [{"val_loss": 1.0}] * 2
    assert lessons("before/journal.jsonl").trials == lessons(str(folder)).trials == from_folder
    table = [
        {"id": t.id, "params": t.params, "status": t.status, "metrics": t.metrics, "epochs": 2, "reason": None}
        for t in from_folder
    ]
    (folder / "trials.json").write_text(json.dumps([{**row, "seconds": 1.0} for row in table]))
    (folder / "journal.jsonl").unlink()
    assert [(t.params, t.metrics) for t in lessons().trials] == [(t.params, t.metrics) for t in from_folder]


def test_figures_are_those_of_the_new_objectives(earlier, lessons):
    earlier(0.01, rows=[{"val_loss": 1.0, "acc": 0.5, "size_mb": 3.0}, {"val_loss": 2.0, "acc": 0.7, "size_mb": 3.0}])
    limited = Objectives.of({"acc": "max"}, Bound("size_mb", 2.0, "min"))
    (trial,) = lessons(objectives=limited).trials
    assert trial.metrics == {"val_loss": 2.0, "acc": 0.7, "size_mb": 3.0}


def test_trials_that_failed_or_lie_outside_a_narrower_space_or_miss_a_figure_are_left_out(earlier, lessons):
    earlier(0.01, 0.02)
    earlier(0.5)
    earlier(0.03, status="failed")
    earlier(0.04, rows=[{"train_loss": 1.0}])
    earlier(0.05, status="stopped")
    found = lessons()
    assert [trial.params["optimizer.lr"] for trial in found.trials] == [0.01, 0.02, 0.05]
    assert str(found) == "3 of 6, 1 outside the space, 1 failed, 1 without val_loss"


@pytest.mark.parametrize(
    ("space", "objectives", "expected"),
    [
        (
            {"optimizer.lrr": 1, "model_args.width": 8},
            LOSS,
            "'before': nothing to learn from it: 2 outside the space; trial 0001: optimizer.lr: not in the "
            "space; did you mean 'optimizer.lrr'?",
        ),
        ({**SPACE, "batch_size": 8}, LOSS, "2 outside the space; trial 0001: batch_size: missing"),
        ({**SPACE, "model_args.width": {"choice": [4]}}, LOSS, "trial 0001: model_args.width: 8 is not in the space"),
        (
            SPACE,
            Objectives.of({"val_los": "min"}),
            "2 without val_los; trial 0001: no epoch has 'val_los'; did you mean 'val_loss'?",
        ),
    ],
)
def test_an_earlier_search_of_which_nothing_fits_is_refused_by_its_first_difference(
    earlier, lessons, space, objectives, expected
):
    earlier(0.01, 0.02)
    with pytest.raises(SpecError) as refused:
        lessons(space=space, objectives=objectives)
    assert expected in str(refused.value)


def test_a_path_that_leads_to_no_search_is_refused(earlier, lessons, toy):
    folder = earlier(0.01)
    for stated, expected in {
        "befor": "'befor': no such file or folder; did you mean 'before'?",
        ".": "'.': no folder of a search: no journal.jsonl is in it; known: before",
        "toy.py": "'toy.py': toy.py is not what a search writes",
    }.items():
        with pytest.raises(SpecError) as refused:
            lessons(stated)
        assert expected in str(refused.value)
    (folder / "journal.jsonl").write_bytes(b"")
    with pytest.raises(SpecError, match="nothing to learn from it: no trial of it has ended"):
        lessons()


def test_what_the_earlier_trials_are_is_identity_and_where_they_lie_is_not(earlier, planned):
    earlier(0.01)
    folder = earlier(0.01, name="elsewhere")
    (folder / "journal.jsonl").write_bytes((folder.parent / "before" / "journal.jsonl").read_bytes())
    before = planned([{"trials": "before"}])
    assert planned([{"trials": "elsewhere/journal.jsonl"}]).fingerprint == before.fingerprint
    assert planned({"trials": "before"}).fingerprint == before.fingerprint
    assert planned([]).fingerprint != before.fingerprint
    earlier(0.02)
    assert planned([{"trials": "before"}]).fingerprint != before.fingerprint


def test_the_plan_says_what_is_learned_and_auto_takes_an_engine_that_does(earlier, planned):
    earlier(0.01)
    earlier(0.02, width=4)
    small = {"optimizer.lr": {"choice": [0.01]}, "model_args.width": {"choice": [8]}}
    for node in planned([{"trials": "before"}]), planned([{"trials": "before"}], space=small):
        assert node.explained["start_from[0].trials"] == (
            "learns from trials of an earlier search: 1 of 2, 1 outside the space"
        )
        assert node.explained["algorithm"] == "bayesian, there are earlier trials to learn from"


@pytest.mark.parametrize("algorithm", ["random", "grid"])
def test_an_engine_that_does_not_learn_is_refused_earlier_trials(earlier, planned, algorithm):
    earlier(0.01)
    with pytest.raises(SpecError, match=f"trials: {algorithm} learns from no trials; what does: bayesian, optuna_tpe"):
        planned([{"trials": "before"}], algorithm=algorithm, space={**SPACE, "optimizer.lr": {"choice": [0.01]}})


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"trial": "before"}, "config.start_from[0].trial: not in the space; did you mean 'trials'?"),
        ({"trials": "before", "optimizer.lr": 0.1}, "config.start_from[0]: beside 'trials' stands nothing"),
        ({"trials": "after"}, "stages[0] (search).config.start_from[0].trials: 'after': no such file or folder"),
    ],
)
def test_a_faulty_entry_is_refused(earlier, planned, entry, expected):
    earlier(0.01)
    with pytest.raises(SpecError) as refused:
        planned([entry])
    assert expected in str(refused.value)


# --- a search of the same file ---------------------------------------------------------------------------------------


@pytest.fixture
def taught(toy):
    """The plan of a narrow search that learns from a wide one, and from whatever else is named."""

    def make(*names, wide=SPACE, **config):
        document = toy.document
        narrow = {"space": {**SPACE, "optimizer.lr": {"loguniform": [1e-2, 2e-2]}}, **config}
        document["stages"] = [
            {"name": "wide", "uses": "tune", "config": {"space": wide, "algorithm": "random"}},
            {"name": "train", "uses": "train", "config": {"epochs": 1}},
            {"name": "narrow", "uses": "tune", "inputs": {"start_from": list(names)}, "config": narrow},
        ]
        return plan(load_pipeline(toy.write(document)))

    return make


def test_a_search_of_the_same_file_teaches_the_next_one_and_is_part_of_what_that_is(taught):
    planned = taught("wide")
    narrow = planned.node("narrow")
    assert [node.name for node in narrow.inputs["start_from"]] == ["wide"]
    assert narrow.explained["start_from"].startswith("learns from the trials of the search before it")
    assert narrow.explained["algorithm"] == "bayesian, there are earlier trials to learn from"
    assert "first trial" not in narrow.explained
    wider = taught("wide", wide={**SPACE, "optimizer.lr": {"loguniform": [1e-4, 1e-1]}})
    assert wider.node("narrow").fingerprint != narrow.fingerprint
    assert wider.node("train").fingerprint == planned.node("train").fingerprint


@pytest.mark.parametrize(
    ("names", "config", "expected"),
    [
        (["wid"], {}, "stages[2] (narrow).inputs.start_from: the stage 'wid' does not exist; did you mean 'wide'?"),
        (["train"], {}, "inputs.start_from: 'train' makes 'model', but the input takes 'params'"),
        (["wide"], {"algorithm": "random"}, "inputs.start_from: random (as asked) learns from no trials; what does: "),
        (
            ["wide"],
            {"space": {"optimizer.lr": {"choice": [0.01]}, "model_args.width": {"choice": [8]}}},
            "inputs.start_from: grid (the space has only 1 points) learns from no trials",
        ),
        (
            ["wide"],
            {"wide": {**SPACE, "optimizer.lr": {"loguniform": [1e-4, 1e-3]}}},
            "inputs.start_from: no trial of that search can lie in the space of this one: "
            "optimizer.lr: no value is in both spaces",
        ),
        (
            ["wide"],
            {"wide": {**SPACE, "batch_size": {"choice": [4, 8]}}},
            "space of this one: batch_size: not in both spaces",
        ),
    ],
)
def test_what_can_teach_nothing_is_refused(taught, names, config, expected):
    with pytest.raises(SpecError) as refused:
        taught(*names, **config)
    assert expected in str(refused.value)
