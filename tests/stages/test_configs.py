"""What the stages' configs come down to: defaults, and what `auto` decides."""

import pytest

import heliostat
from heliostat import TuneConfig
from heliostat.core.spec import Resources
from heliostat.core.stage import find_kind
from heliostat.stages.compress_config import CompressConfig
from heliostat.stages.tune_config import AshaConfig, MedianConfig, SchedulerConfig

CONTINUOUS = {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}}
SMALL = {"batch_size": {"choice": [16, 32]}, "model_args.width": {"choice": [4, 8]}}


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"space": CONTINUOUS}, ("random", 16)),
        ({"space": CONTINUOUS, "trials": 19}, ("random", 19)),
        ({"space": CONTINUOUS, "trials": 20}, ("bayesian", 20)),
        ({"space": SMALL}, ("grid", 4)),
        ({"space": SMALL, "trials": 3}, ("random", 3)),
        ({"space": SMALL, "algorithm": "grid"}, ("grid", 4)),
        ({"space": SMALL, "algorithm": "random", "trials": 2}, ("random", 2)),
        ({"space": CONTINUOUS, "algorithm": "bayesian"}, ("bayesian", 16)),
    ],
)
def test_auto_tries_all_of_a_small_space_and_models_the_objective_only_with_trials_enough(config, method):
    algorithm, trials, why = TuneConfig(**config).method
    assert (algorithm, trials) == method
    assert why


def test_the_work_ahead_is_told_from_the_config_alone():
    def workload(uses, **config):
        kind = find_kind(uses)
        return kind.workload(kind.config(**config))

    assert workload("tune", space=SMALL, train={"epochs": 3}) == {"trials": 4, "epochs": 12}
    twice = {"evaluate_after": [{"prune": {"finetune_epochs": 2}}, {"quantize": {"method": "qat"}}]}
    qat = workload("quantize", method="qat")["epochs"]
    alone = {"space": SMALL, "train": {"epochs": 4}, **twice}
    assert workload("tune", **alone) == {"trials": 4, "epochs": 4 * (4 + 2 + qat)}
    assert workload("tune", **alone, scheduler="asha") == {"trials": 4, "epochs": 4 * (4 + 3 * (2 + qat))}
    assert workload("train", epochs=7) == {"epochs": 7}
    assert workload("prune", finetune_epochs=2) == {"epochs": 2}
    assert workload("distill", epochs=5) == {"epochs": 5}
    assert workload("prune", method="magnitude", gradual_epochs=3, finetune_epochs=2) == {"epochs": 5}
    assert workload("factorize", finetune_epochs=2) == {"epochs": 2}
    assert workload("compress") == {"trials": 24}
    assert workload("compress", passes=({"quantize": {}},)) == {"trials": 2}
    assert workload("quantize") == {}
    assert workload("quantize", method="qat", finetune_epochs=4) == {"epochs": 4}


@pytest.mark.parametrize(
    ("uses", "needs"),
    [("tune", (6, 3)), ("train", (8, 4)), ("prune", (2, 1)), ("quantize", (2, 1)), ("select", (0, 0))],
)
def test_what_a_stage_needs_at_once(uses, needs):
    resources = Resources(workers=4, workers_per_trial=3, cpus_per_worker=2, gpus_per_worker=1)
    need = find_kind(uses).needs(resources)
    assert (need.of("CPU"), need.of("GPU")) == needs


def test_a_scheduler_may_be_named_by_one_word():
    assert TuneConfig(space=SMALL, scheduler="asha").scheduler == SchedulerConfig(asha=AshaConfig())
    assert TuneConfig(space=SMALL, scheduler="median").scheduler.chosen == ("median", MedianConfig())
    assert TuneConfig(space=SMALL, scheduler="none").scheduler is None


def test_every_config_of_a_built_in_is_a_public_name():
    for uses in ("tune", "train", "prune", "factorize", "quantize", "distill", "compress", "export", "nas", "select"):
        config = find_kind(uses).config
        assert getattr(heliostat, config.__name__) is config


def test_a_chain_is_told_by_what_varies():
    prune = {"sparsity": {"choice": [0.3, 0.5]}, "finetune_epochs": 2}
    ways = {"choice": ["static", {"value": "qat", "space": {"finetune_epochs": 3}}]}
    config = CompressConfig(passes=({"prune": prune, "factorize": {}}, {"quantize": {"method": ways}}))
    labels = [config.label(point) for point in config.space.grid()]
    assert labels[0] == "uncompressed"
    assert labels[1:6] == [
        "quantize(method=static)",
        "quantize(method=qat)",
        "prune(sparsity=0.3)",
        "prune(sparsity=0.3) -> quantize(method=static)",
        "prune(sparsity=0.3) -> quantize(method=qat)",
    ]
    assert labels[-1] == "factorize -> quantize(method=qat)"
    (_, aware) = config.steps(config.space.grid()[-1])
    assert (aware.uses, aware.config.method, aware.config.finetune_epochs) == ("quantize", "qat", 3)
