"""A student learns from its teacher whatever the task is, or is refused before anything is trained."""

import json

import pytest
import yaml

import heliostat
from heliostat.core.load import load_pipeline
from heliostat.errors import SpecError
from heliostat.runner import plan

WRONG = "stages.s_ten.config.model_args.out=5"


def test_a_student_with_other_outputs_than_its_teacher_is_refused_by_the_plan(case_file):
    file = case_file("distill/pipeline.yaml")
    plan(load_pipeline(file))
    with pytest.raises(SpecError, match=r"\(s_ten\).*the student ends in 5 outputs, its teacher in 10"):
        plan(load_pipeline(file, settings=[WRONG]))


@pytest.mark.parametrize(("out", "problem"), [(10, None), (5, "the student ends in 5 outputs, its teacher in 10")])
def test_a_student_in_a_chain_is_compared_with_the_model_that_goes_in(case_file, out, problem):
    file = case_file("distill/pipeline.yaml")
    document = yaml.safe_load(file.read_text())
    step = {"distill": {"model_args.out": out, "epochs": 1}}
    document["stages"].append({"name": "chain", "uses": "compress", "inputs": {"model": "t_ten"}})
    document["stages"][-1]["config"] = {"passes": [step], "max_drop": {"val_loss": 0.1}}
    file.write_text(yaml.safe_dump(document))
    if problem is None:
        plan(load_pipeline(file))
        return
    with pytest.raises(SpecError, match=problem):
        plan(load_pipeline(file))


@pytest.mark.slow
def test_every_student_of_every_kind_of_task_learns_from_its_teacher(case_file):
    result = heliostat.run(load_pipeline(case_file("distill/pipeline.yaml")))
    losses = {node.name: node.metrics["val_loss"] for node in result.nodes}
    for student in ("s_reg[alpha=0.0]", "s_reg[alpha=0.9]", "s_reg[alpha=1.0]", "s_1d", "s_64", "p_reg"):
        assert losses[student] < 2.5, student  # the variance is 5
    for student in ("s_bin[alpha=0.0]", "s_bin[alpha=1.0]"):
        assert losses[student] < 0.4, student
    told = {}
    for node in result.nodes:
        details = json.loads((node.path / "record.json").read_text())["details"]
        if "distillation" in details:
            told[node.stage] = details["distillation"]["loss"]
    assert told == {
        "s_reg": "regression",
        "s_1d": "regression",
        "s_64": "regression",
        "s_bin": "binary",
        "s_ten": "classes",
        "p_reg": "regression",
    }


@pytest.mark.slow
def test_what_a_sample_has_beside_inputs_and_targets_changes_no_student(case_file):
    result = heliostat.run(load_pipeline(case_file("distill_meta/pipeline.yaml")))
    accuracy = {node.name: node.metrics["val_accuracy"] for node in result.nodes}
    assert accuracy["s_extra"] == accuracy["s_plain"]
    assert min(accuracy.values()) > 0.9
