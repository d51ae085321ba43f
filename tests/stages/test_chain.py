"""Chains of passes: what they begin alike is made once, whoever needs it, and what is made is what the stages make."""

import json
import threading

import pytest

from heliostat.errors import StageError
from heliostat.runtime.gate import Gate
from heliostat.stages.compress_config import CompressConfig, links_of
from heliostat.stages.measure import measure_quality
from heliostat.stages.models import train_config_of
from heliostat.stages.passes import chain
from heliostat.training.task import build_data

PRUNE = {"prune": {"sparsity": 0.5, "finetune_epochs": 2}}
INT8 = {"quantize": {"method": {"choice": ["static", "dynamic"]}}}


@pytest.fixture
def made(monkeypatch):
    """The names of the passes in the order in which they were begun."""
    begun = []
    for uses, run in list(chain.PASSES.items()):

        def noting(shop, source, config, *, uses=uses, run=run):
            begun.append(uses)
            return run(shop, source, config)

        monkeypatch.setitem(chain.PASSES, uses, noting)
    return begun


@pytest.fixture
def explore(bench, trained, tmp_path):
    """The figures of the toy model after a chain; the shelf is the same every time."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()

    def run(params, *passes):
        recipe = train_config_of(trained)
        gate = Gate(tmp_path / "gate")
        with gate.at_work():
            return chain.explore(
                params,
                config=CompressConfig(passes=passes),
                source=trained,
                shelf=shelf,
                task=bench.task,
                root=bench.root,
                seed=0,
                data=build_data(bench.task, recipe.data_args),
                gate=gate,
                warn=pytest.fail,
            )

    run.shelf = shelf
    return run


def pruned_then(method):
    return {
        "step_1": "prune",
        "step_1.sparsity": 0.5,
        "step_1.finetune_epochs": 2,
        "step_2": "quantize",
        "step_2.method": method,
    }


def test_the_figures_are_those_of_what_the_stages_make(bench, trained, explore):
    pruned = bench.run("prune", PRUNE["prune"], model=trained)
    quantized = bench.run("quantize", {"method": "static"}, model=pruned)
    measured = measure_quality(quantized.folder, bench.task, quantized.record.params)
    figures = explore(pruned_then("static"), PRUNE, INT8)
    assert figures.pop("latency_ms") > 0
    assert figures == {name: measured[name] for name in figures}
    ends = ["val_accuracy_low", "val_accuracy_high"]
    assert list(figures) == ["size_mb", "num_params", "val_loss", "val_accuracy", *ends]


def test_what_chains_begin_alike_is_made_once(explore, made):
    for method in ("static", "dynamic", "static"):
        explore(pruned_then(method), PRUNE, INT8)
    assert made == ["prune", "quantize", "quantize"]


def test_of_two_that_need_the_same_at_once_the_second_waits_for_it(explore, made):
    others = [threading.Thread(target=explore, args=(pruned_then("static"), PRUNE, INT8)) for _ in range(3)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert sorted(made) == ["prune", "quantize"]


def test_a_pass_that_cannot_be_done_fails_once_for_every_chain_that_has_it(explore, made):
    broken = {"prune": {**PRUNE["prune"], "skip": {"choice": [["conv*"]]}}}
    for method in ("static", "dynamic"):
        params = {**pruned_then(method), "step_1.skip": ["conv*"]}
        with pytest.raises(StageError, match=r"prune: .*'conv\*' matches no layer"):
            explore(params, broken, INT8)
    assert made == ["prune"]


def test_what_was_cut_off_goes_on_from_its_checkpoints(bench, trained, explore, made, monkeypatch):
    links = links_of(
        CompressConfig(passes=(PRUNE,)).steps(pruned_then("static")), start="train", seed=0, root=bench.root
    )
    folder = explore.shelf / links[0].digest

    def killed(path, document):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(chain, "keep_only", lambda folder, files: None)
        patched.setattr(chain, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            explore({**pruned_then("static"), "step_2": "nothing"}, PRUNE, INT8)
    before = {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").rglob("*.pt")}
    assert before
    with monkeypatch.context() as patched:
        patched.setattr(chain, "keep_only", lambda folder, files: None)
        explore({**pruned_then("static"), "step_2": "nothing"}, PRUNE, INT8)
    assert {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").rglob("*.pt")} == before
    assert made == ["prune", "prune"]


def test_a_student_takes_its_recipe_to_what_follows(explore):
    student = {"distill": {"model_args.width": 4, "epochs": 1}}
    params = {
        "step_1": "distill",
        "step_1.model_args.width": 4,
        "step_1.epochs": 1,
        "step_2": "quantize",
        "step_2.method": "static",
    }
    figures = explore(params, student, INT8)
    assert figures["num_params"] < 200
    recipes = [json.loads(path.read_text())["params"]["train"] for path in explore.shelf.glob("*/made.json")]
    assert [recipe["model_args"] for recipe in recipes] == [{"width": 4}, {"width": 4}]


def test_a_model_that_diverged_is_no_candidate(explore):
    wild = {"prune": {"finetune_epochs": 1, "optimizer.name": "sgd", "optimizer.lr": 1e30}}
    params = {"step_1": "prune"} | {f"step_1.{path}": value for path, value in wild["prune"].items()}
    with pytest.raises(StageError, match="prune: the training loss became nan"):
        explore(params, wild)


def test_fine_tuning_learns_from_the_uncompressed_model(bench, trained, explore, monkeypatch):
    taught = []
    monkeypatch.setitem(
        chain.PASSES, "quantize", lambda shop, source, config: taught.append((shop.teacher.node, source.node)) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        explore(pruned_then("static"), PRUNE, INT8)
    assert taught == [("train", "prune")]


def test_a_shared_model_that_was_damaged_on_the_shelf_is_made_again(explore, made):
    explore(pruned_then("static"), PRUNE, INT8)
    explore(pruned_then("dynamic"), PRUNE, INT8)
    assert made == ["prune", "quantize", "quantize"]
    (weights,) = explore.shelf.glob("*/weights.pt")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    explore(pruned_then("static"), PRUNE, INT8)
    assert made[3:] == ["prune"]
