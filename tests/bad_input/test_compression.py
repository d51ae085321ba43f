"""Compression that cannot be done as it is written."""

from importlib.util import find_spec

import pytest

from heliostat.core import extras


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"method": "magnitud"},
            "method: 'magnitud' is not one of structured, magnitude, semi_structured; did you mean",
        ),
        ({"sparsity": 1.0}, "config.sparsity: input should be less than 1, not 1.0"),
        ({"sparsity": -0.1}, "config.sparsity: input should be greater than or equal to 0, not -0.1"),
        ({"head_sparsity": 1}, "config.head_sparsity: input should be less than 1, not 1"),
        (
            {"method": "semi_structured", "gradual_epochs": 2},
            "config: semi_structured takes no 'gradual_epochs'; it takes skip",
        ),
        ({"sensitivity": {"levels": [0.5, 0.25]}}, "config.sensitivity.levels: [0.5, 0.25] do not rise; write"),
        ({"sensitivity": {"levels": [0.5, 1.0]}}, "config.sensitivity.levels[1]: input should be less than 1, not 1"),
        ({"sensitivity": {"levels": []}}, "config.sensitivity.levels: empty; name at least one"),
        ({"sensitivity": {"max_drop": {"val_acc": 0.1}}}, "sensitivity.max_drop.val_acc: nobody reports 'val_acc'"),
        ({"sensitivity": {"max_drop": {"val_accuracy": 0.1}}, "sparsity": 0.4}, "leave 'sparsity' out"),
        ({"sensitivity": {}, "scope": "layer"}, "sensitivity says how far each layer goes; leave 'scope' out"),
        ({"sensitivity": {}, "head_sparsity": 0.5}, "how many heads of each attention go; leave 'head_sparsity' out"),
        ({"sensitivity": {}, "sparsity": 0.95}, "sparsity 0.95 is beyond the last of sensitivity.levels, 0.9"),
        ({"method": "magnitude", "importance": "taylor"}, "magnitude takes no 'importance'; it takes gradual_epochs,"),
        ({"method": "semi_structured", "sparsity": 0.4}, "semi_structured takes no 'sparsity'; it takes skip"),
        ({"importance": "tailor"}, "'tailor' is not one of magnitude, taylor, bn_scale; did you mean 'taylor'?"),
        ({"penalty": {"name": "l2"}}, "config.penalty.name: 'l2' is not one of l1, group_lasso"),
        ({"penalty": {"name": "l1"}}, "config: structured goes with the penalty 'group_lasso', not 'l1'"),
        (
            {"scheduler": {"name": "StepLR"}},
            "config.scheduler.options: 'torch.optim.lr_scheduler:StepLR' cannot be called",
        ),
        ({"penalty": {"name": "group_lasso", "strength": 0.0}}, "penalty.strength: input should be greater than 0"),
        (
            {"method": "magnitude", "penalty": {"name": "l1"}, "sparsity": 0.4},
            "config: the penalty's threshold decides what goes; leave 'sparsity' out",
        ),
    ],
)
def test_a_way_to_prune_that_makes_no_sense_is_refused(refusal, config, expected):
    text = str(refusal({"stages/prune/config": config, "stages/prune/matrix": {}}))
    assert text.startswith("stages[2] (prune).config")
    assert expected in text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"method": "statik"}, "config.method: 'statik' is not one of static, dynamic, qat, weight_only; did you mean"),
        ({"calibration": "min_max"}, "'min_max' is not one of minmax, entropy, percentile; did you mean 'minmax'?"),
        ({"calibration_split": "test"}, "config.calibration_split: 'test' is not one of train, val"),
        ({"calibration_samples": 0}, "config.calibration_samples: input should be greater than or equal to 1, not 0"),
        ({"method": "dynamic", "max_drop": {"val_accuracy": 0.1}}, "config: dynamic takes no 'max_drop'; it takes"),
        ({"bits": 4}, "config: static takes no 'bits'; it takes calibration,"),
        (
            {"method": "weight_only", "bits": 4, "backend": "torchao"},
            "torchao stores 4 bits in 8 on a CPU; take the backend onnxruntime or litert",
        ),
        ({"backend": "torcho"}, "config.backend: 'torcho' is not one of onnxruntime, torchao, executorch, litert; did"),
        ({"backend": "torchao", "calibration": "entropy"}, "config: torchao calibrates by minmax alone; entropy is of"),
        ({"backend": "litert", "reduce_range": False}, "config: static by litert takes no 'reduce_range'; it takes"),
        (
            {"backend": "executorch", "method": "weight_only"},
            "config: executorch has no 'weight_only', only static, dynamic, qat; for it take the backend",
        ),
        pytest.param(
            {"backend": "executorch"},
            "config.backend: 'executorch': executorch is not installed; type: pip install 'heliostat[executorch]'",
            marks=pytest.mark.skipif(find_spec("executorch") is not None, reason="it is installed"),
        ),
        ({"method": "weight_only", "bits": 3}, "config.bits: 3 is not one of 4, 8"),
        ({"finetune_epochs": 2}, "config: static takes no 'finetune_epochs'; it takes calibration,"),
        ({"method": "qat", "finetune_epochs": 0}, "config: qat learns in training; give it finetune_epochs"),
        ({"max_drop": {"val_acc": 0.1}}, "config.max_drop.val_acc: nobody reports 'val_acc'; did you mean"),
        ({"max_drop": {"test_accuracy": 0.1}}, "'test_accuracy' is of the test split, which nothing may choose by"),
        ({"max_drop": {"val_accuracy": -0.1}}, "max_drop.val_accuracy: input should be greater than or equal to 0"),
    ],
)
def test_a_way_to_quantize_that_makes_no_sense_is_refused(refusal, config, expected):
    text = str(refusal({"stages/int8/config": config}))
    assert text.startswith("stages[4] (int8).config")
    assert expected in text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"temperature": 0.0}, "config.temperature: input should be greater than 0, not 0.0"),
        ({"alpha": 1.5}, "config.alpha: input should be less than or equal to 1, not 1.5"),
        ({"model": "toy:bild_model"}, "'toy' has no 'bild_model'; did you mean 'build_model'?"),
        ({"model": "toy:build_model", "model_args": {"widht": 3}}, "takes no argument 'widht'; did you mean 'width'?"),
        ({"features": ["0"]}, "config.features: input should be a mapping"),
    ],
)
def test_a_student_that_cannot_learn_is_refused(refusal, config, expected):
    text = str(refusal({"stages/student/config": config}))
    assert text.startswith("stages[3] (student).")
    assert expected in text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"energy": 1.5}, "config.energy: input should be less than or equal to 1, not 1.5"),
        ({"energy": 0.0}, "config.energy: input should be greater than 0, not 0.0"),
        ({"rank": 0}, "config.rank: input should be greater than or equal to 1, not 0"),
        ({"rank": 4, "energy": 0.9}, "config: rank and energy: give one of them"),
        ({"distillation": {"temprature": 2.0}}, "distillation.temprature: unknown field; did you mean 'temperature'?"),
    ],
)
def test_a_rank_that_makes_no_sense_is_refused(toy, refusal, config, expected):
    thin = {"name": "thin", "uses": "factorize", "inputs": {"model": "train"}, "config": config}
    text = str(refusal({"stages": [*toy.document["stages"], thin]}))
    assert text.startswith("stages[6] (thin).config")
    assert expected in text


@pytest.mark.parametrize(
    ("uses", "config"),
    [("prune", {}), ("factorize", {}), ("quantize", {"method": "qat"})],
    ids=lambda value: str(value),
)
def test_an_exported_model_goes_into_nothing_that_trains(toy, refusal, uses, config):
    more = [
        {"name": "onnx", "uses": "export", "inputs": {"model": "train"}},
        {"name": "more", "uses": uses, "inputs": {"model": "onnx"}, "config": config},
    ]
    text = str(refusal({"stages": [*toy.document["stages"], *more]}))
    assert "stages[7] (more).inputs.model: what 'export' makes cannot be trained further" in text


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ("onnx", "config.features: what 'export' makes has no layers to match; name the stage before it"),
        (["train", "prune"], "config.features: layers are matched with those of one teacher, not of 3"),
    ],
    ids=["exported", "several"],
)
def test_layers_are_matched_with_those_of_one_torch_model(toy, refusal, teacher, expected):
    more = [
        {"name": "onnx", "uses": "export", "inputs": {"model": "train"}},
        {"name": "more", "uses": "distill", "inputs": {"teacher": teacher}, "config": {"features": {"1": "1"}}},
    ]
    assert f"stages[7] (more).{expected}" in str(refusal({"stages": [*toy.document["stages"], *more]}))


def test_only_an_onnx_export_can_be_quantized_on(toy, refusal):
    more = [
        {"name": "graph", "uses": "export", "inputs": {"model": "train"}, "config": {"format": "pt2"}},
        {"name": "more", "uses": "quantize", "inputs": {"model": "graph"}},
    ]
    text = str(refusal({"stages": [*toy.document["stages"], *more]}))
    assert "stages[7] (more).inputs.model: a model in the format 'pt2' cannot be quantized" in text


@pytest.mark.parametrize(
    ("format", "package", "extra"), [("tflite", "litert_torch", "litert"), ("pte", "executorch", "executorch")]
)
def test_a_format_whose_package_is_not_installed_names_the_extra_before_anything_starts(
    toy, refusal, monkeypatch, format, package, extra
):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == package else find_spec(name))
    export = {"name": "device", "uses": "export", "inputs": {"model": "train"}, "config": {"format": format}}
    text = str(refusal({"stages": [*toy.document["stages"], export]}))
    expected = f"config.format: '{format}': {package} is not installed; type: pip install 'heliostat[{extra}]'"
    assert text.startswith(f"stages[6] (device).{expected}")


def test_an_unknown_format_is_refused_with_the_nearest(toy, refusal):
    export = {"name": "device", "uses": "export", "inputs": {"model": "train"}, "config": {"format": "pt"}}
    assert "config.format" in str(refusal({"stages": [*toy.document["stages"], export]}))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_drop": {"val_acc": 0.1}}, "config.max_drop.val_acc: nobody reports 'val_acc'; did you mean"),
        ({"max_drop": {"test_accuracy": 0.1}}, "'test_accuracy' is of the test split, which nothing may choose by"),
        (
            {},
            "config.max_drop: empty; say how much worse than the uncompressed model a model may be, as {val_",
        ),
        ({"max_size_mb": 0.0}, "config.max_size_mb: input should be greater than 0, not 0.0"),
        ({"max_sizemb": 1.0}, "config.max_sizemb: unknown field; did you mean 'max_size_mb'?"),
        (
            {"minimize": ["latency"]},
            "no model is measured for 'latency'; did you mean 'latency_ms'?",
        ),
        ({"trials": 0}, "config.trials: input should be greater than or equal to 1, not 0"),
        ({"wall_time_s": -1.0}, "config.wall_time_s: input should be greater than 0, not -1.0"),
        ({"passes": []}, "config.passes: empty; name at least one"),
        ({"passes": [{}]}, "config.passes[0]: empty; name at least one of prune, factorize, distill, quantize"),
        ({"passes": [{"prun": {}}]}, "config.passes[0].prun: unknown pass; did you mean 'prune'?"),
        (
            {"passes": [{"prune": {"sparsty": 0.5}}]},
            "config.passes[0].prune.sparsty: unknown field 'sparsty'; did you mean 'sparsity'?",
        ),
        (
            {"passes": [{"prune": {"sparsity": {"choise": [0.5]}}}]},
            "config.passes[0].prune.sparsity: unknown dimension 'choise'; did you mean 'choice'?",
        ),
        (
            {"passes": [{"prune": {"sparsity": {"uniform": [0.5, 1.5]}}}]},
            "config.passes[0].prune.sparsity: input should be less than 1, not 1.5",
        ),
        (
            {"passes": [{"quantize": {"method": {"choice": ["static", "dynamc"]}}}]},
            "config.passes[0].quantize.method: 'dynamc' is not one of static, dynamic, qat, weight_only; did you mean",
        ),
        (
            {"passes": [{"quantize": {"method": {"choice": ["dynamic", "weight_only"]}, "calibration_samples": 64}}]},
            "config.passes[0].quantize: weight_only takes no 'calibration_samples'",
        ),
        (
            {"passes": [{"prune": {}}, {"quantize": {}}, {"factorize": {}}]},
            "config.passes[2]: what 'quantize' makes cannot be compressed further; make it the last step",
        ),
        (
            {"passes": [{"distill": {"model_args.widht": 4}}]},
            "takes no argument 'widht'; did you mean 'width'?",
        ),
    ],
)
def test_a_search_for_a_chain_that_makes_no_sense_is_refused(refusal, config, expected):
    stage = {"uses": "compress", "inputs": {"model": "train"}, "config": config}
    text = str(refusal({f"stages/int8/{field}": value for field, value in stage.items()}))
    assert text.startswith("stages[4] (int8).config")
    assert expected in text


def test_a_chain_begins_with_a_model_that_can_be_trained(refusal):
    stage = {"uses": "compress", "inputs": {"model": "int8"}, "config": {}}
    text = str(refusal({f"stages/best/{field}": value for field, value in stage.items()}))
    assert "inputs.model: what 'quantize' makes cannot be trained further; name the stage before it" in text


def test_a_chain_is_made_by_one_worker(refusal):
    stage = {"uses": "compress", "inputs": {"model": "train"}, "config": {}, "resources": {"workers_per_trial": 2}}
    text = str(refusal({f"stages/int8/{field}": value for field, value in stage.items()}))
    assert "one worker makes and measures a chain; set resources.workers_per_trial to 1" in text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "config.elastic: missing; it is required"),
        ({"elastic": {}}, "config.elastic: empty; name at least one"),
        ({"elastic": {"width": [8, 16]}}, "'width' is no argument of the model; write it as 'model_args.width'"),
        ({"elastic": {"model_args.width": [8]}}, "model_args.width: [8] leaves no choice; name two values or more"),
        (
            {"elastic": {"model_args.widht": [8, 16]}},
            "config.elastic.model_args.widht: 'toy:build_model' takes no argument 'widht'; did you mean 'width'?",
        ),
        ({"subnets_per_batch": 1}, "config.subnets_per_batch: input should be greater than or equal to 2, not 1"),
        ({"max_drop": {"val_acc": 0.1}}, "config.max_drop.val_acc: nobody reports 'val_acc'; did you mean"),
    ],
)
def test_an_architecture_search_without_a_choice_is_refused(refusal, config, expected):
    elastic = {"elastic": {"model_args.width": [8, 16]}} if config and "elastic" not in config else {}
    stage = {"name": "best", "uses": "nas", "config": {**elastic, **config}}
    text = str(refusal({"stages": [stage]}))
    assert text.startswith("stages[0] (best).config")
    assert expected in text


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (
            {"uses": "distill", "inputs": {"teacher": "train"}},
            "config: a student learns by a loss of its own, for which",
        ),
        ({"uses": "nas", "inputs": {}, "config": {"elastic": {"model_args.width": [8, 16]}}}, "config: sub-networks"),
        (
            {"uses": "prune", "config": {"distillation": {}}},
            "config.distillation: a teacher's outputs are learned by a",
        ),
        ({"uses": "prune", "config": {"penalty": {"name": "group_lasso"}}}, "config.penalty: sparsity is learned by a"),
        ({"uses": "quantize", "config": {"method": "qat", "distillation": {}}}, "config.distillation: a teacher's"),
    ],
    ids=lambda value: value["uses"] if isinstance(value, dict) else "",
)
def test_a_loss_of_a_stages_own_is_refused_beside_the_users_step(refusal, stage, expected):
    last = {"name": "last", "inputs": {"model": "train"}, "config": {}, **stage}
    train = {"name": "train", "uses": "train", "config": {}}
    text = str(refusal({"task/train_step": "toy:step", "stages": [train, last]}))
    assert text.startswith(f"stages[1] (last).{expected}")
    assert "task.train_step" in text
