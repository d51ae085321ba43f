"""What a trial's model is worth after the passes, against what the stages themselves make and measure."""

from contextlib import nullcontext

import pytest
import torch

from heliostat.errors import StageError
from heliostat.stages.evaluate_after import PassConfig
from heliostat.stages.measure import measure_quality
from heliostat.stages.models import train_config_of
from heliostat.stages.passes.appraise import appraise
from heliostat.training.task import build_data


@pytest.fixture
def appraised(bench, trained):
    """The figures of the trained toy model after these passes."""

    def run(*passes, timed=False, alone=nullcontext):
        recipe = train_config_of(trained)
        return appraise(
            torch.load(trained.folder / "weights.pt", weights_only=True),
            task=bench.task,
            root=bench.root,
            seed=0,
            passes=[PassConfig.model_validate(step) for step in passes],
            timed=timed,
            config=recipe,
            data=build_data(bench.task, recipe.data_args),
            give_way=lambda: None,
            alone=alone,
        )

    return run


@pytest.mark.parametrize(
    "passes",
    [
        [{"quantize": {"method": "static"}}],
        [{"quantize": {"method": "dynamic"}}],
        [{"quantize": {"method": "weight_only", "bits": 4, "group_size": 16}}],
        [{"quantize": {"method": "qat", "finetune_epochs": 1}}],
        [{"prune": {"sparsity": 0.5, "finetune_epochs": 2}}],
        [{"prune": {"method": "magnitude", "sparsity": 0.7, "gradual_epochs": 1}}],
        [{"prune": {"method": "semi_structured"}}],
        [{"prune": {"sparsity": 0.3, "finetune_epochs": 1}}, {"quantize": {"calibration_samples": 64}}],
    ],
    ids=lambda passes: ", ".join(
        str(settings.get("method", uses)) for step in passes for uses, settings in step.items()
    ),
)
def test_the_figures_are_those_of_what_the_stages_make(bench, trained, appraised, passes):
    made = trained
    for step in passes:
        ((uses, settings),) = step.items()
        made = bench.run(uses, settings, model=made)
    measured = measure_quality(made.folder, bench.task, made.record.params)
    assert appraised(*passes) == {
        name: measured[name] for name in ("val_loss", "val_accuracy", "size_mb", "num_params")
    }


def test_without_passes_only_the_costs_of_the_model_as_train_saves_it_are_measured(bench, trained, appraised):
    measured = measure_quality(trained.folder, bench.task, trained.record.params)
    assert appraised() == {name: measured[name] for name in ("size_mb", "num_params")}


def test_the_latency_is_measured_alone(appraised):
    class Alone:
        entered = 0

        def __enter__(self):
            type(self).entered += 1

        def __exit__(self, *error):
            pass

    assert appraised({"quantize": {}}, timed=True, alone=Alone)["latency_ms"] > 0
    assert Alone.entered == 1


def test_a_pass_that_fails_is_named(appraised):
    with pytest.raises(StageError, match=r"evaluate_after\[1\] \(quantize\): skip: 'conv' matches no layer"):
        appraised({"prune": {"sparsity": 0.25}}, {"quantize": {"method": "weight_only", "skip": ["conv"]}})
