"""A strategy that cannot be, or that the workers, the task or the rest of the config do not allow."""

import pytest

PLACE = "stages[1] (train).config."


@pytest.mark.parametrize(
    ("strategy", "workers", "expected"),
    [
        ("fsdp", 1, "strategy: 'fsdp' spreads a model over workers, and there is one; take 'auto'"),
        ({"mesh": {"dp": 2, "tp": 2}}, 2, "strategy.mesh: a mesh of dp 2 x tp 2, but there are 2 workers"),
        ({"mesh": {"dp": 2, "tp": 2, "pp": 2}}, 8, "strategy: name one of fsdp, tp and pp, not tp, pp"),
        ({"name": "fsdp", "mesh": {"dp": 2}}, 2, "strategy: a mesh has the axes dp and tp, or dp and pp, not dp"),
        ({"name": "ddp", "fsdp": {"wrap": "Block"}}, 2, "strategy: fsdp has options, but the strategy is ddp"),
        ({"tp": {"plan": {"*": "columnwise"}}}, 2, "'columnwise' is not one of colwise, rowwise, heads, sequence"),
        ({"tp": {"plans": "auto"}}, 2, "strategy.tp.plans: unknown field; did you mean 'plan'?"),
        ({"pp": {"schedule": "1b1f"}}, 2, "'1b1f' is not one of gpipe, 1f1b, interleaved"),
        ({"pp": {"microbatches": 3}}, 4, "strategy.pp.microbatches: 3 do not keep 4 workers busy"),
        (
            {"pp": {"schedule": "interleaved", "microbatches": 3}},
            2,
            "strategy.pp.microbatches: 3 do not keep 2 workers",
        ),
        ({"pp": {"microbatches": 100}}, 2, "strategy.pp.microbatches: more than the 64 samples of a batch"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused(refusal, strategy, workers, expected):
    changes = {"stages/train/config/strategy": strategy, "stages/train/resources": {"workers": workers}}
    assert expected in str(refusal(changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"task/train_fn": "toy:accuracy"},
            "strategy: 'pp' runs the model in parts, which task.train_fn cannot call; take 'fsdp' or 'tp'",
        ),
        (
            {"task/train_step": "toy:accuracy"},
            "strategy: 'pp' runs the model in parts, which task.train_step cannot",
        ),
        ({"precision": "fp16"}, "precision: with 'pp' a worker sees the overflow of its own part only; take bf16"),
        ({"compile": True}, "compile: 'pp' changes the layers that would be compiled; take 'ddp' or 'fsdp'"),
        ({"accumulate_steps": 2}, "accumulate_steps: 'pp' computes a batch in microbatches already"),
        ({"optimizer": {"name": "torch.optim:SGD"}}, "optimizer.name: an optimizer by import path may look at whole"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_strategy_cannot_support_is_refused_with_the_reason(refusal, changes, expected):
    placed = {key if "/" in key else f"stages/train/config/{key}": value for key, value in changes.items()}
    strategy = {"stages/train/config/strategy": "pp", "stages/train/resources": {"workers": 2}}
    assert PLACE + expected in str(refusal({**strategy, **placed}))


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ({"tp": {"plan": {"5": "colwise"}}}, "strategy.tp.plan: the model has no module '5'; known: 0, 1, 2, 3, 4"),
        ({"pp": {"split": ["9"]}}, "strategy.pp.split: no stage can begin with '9'; known: 1, 2, 3, 4"),
        ({"pp": {"split": ["1", "2"]}}, "strategy.pp.split: 3 stages, but the workers need 2"),
        ({"fsdp": {"wrap": "Linea"}}, "strategy.fsdp.wrap: the model has no 'Linea'; did you mean 'Linear'?"),
    ],
    ids=str,
)
def test_layers_that_the_model_does_not_have_are_refused_before_anything_starts(refusal, strategy, expected):
    changes = {"stages/train/config/strategy": strategy, "stages/train/resources": {"workers": 2}}
    assert PLACE + expected in str(refusal({**changes, "stages/train/inputs": {}}))


def test_one_worker_stages_take_no_strategy_of_several(refusal):
    assert "stages[3] (student).config.strategy: 'tp' spreads a model over workers" in str(
        refusal({"stages/student/config/strategy": "tp"})
    )
