"""Flags that are wrong, and what the command itself says and ends with."""

import pytest


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("stages.trian.config.epochs=3", "--set stages.trian: no stage 'trian'; did you mean 'train'?"),
        ("stages.9.name=x", "--set stages.9: no stage '9'; known: best, int8, prune, search, student, train"),
        ("stages.train.config.epoch=3", "stages[1] (train).config.epoch: unknown field; did you mean 'epochs'?"),
        ("stages.train.config.epochs=x", "stages[1] (train).config.epochs: input should be a valid integer, not 'x'"),
        ("stages.train.config.epochs.x=3", "--set stages.train.config.epochs.x: stages.train.config.epochs is not a"),
        ("stages.train.config.epochs=[", "--set stages.train.config.epochs: line 1, column 2: not YAML"),
        ("stages.train.config.epochs", "--set stages.train.config.epochs: write it as path=value, such as"),
        ("=3", "--set =3: write it as path=value"),
        ("stages..x=3", "--set stages..x=3: write it as path=value"),
        ("stages.train=3", "--set stages.train: stages is not a mapping"),
        ("trakcing.uri=x", "trakcing: unknown field; did you mean 'tracking'?"),
        ("stages.prune.matrix.optimizer.lrr=[0.1]", "matrix.optimizer.lrr: unknown field 'lrr'; did you mean 'lr'?"),
    ],
)
def test_a_bad_set_is_refused(refusal, setting, expected):
    assert expected in str(refusal(settings=[setting]))


def test_forcing_a_stage_that_is_not_there_is_refused(refusal):
    assert "--force trian: no stage 'trian'; did you mean 'train'?" in str(refusal(force=["trian"]))


WITHOUT_TORCH = """
def build_model(width=8): ...
def build_data(): ...
def loss(outputs, targets): ...
"""


@pytest.fixture
def light(toy):
    """A pipeline whose module imports nothing, so that a process can plan it at once."""
    (toy.folder / "light.py").write_text(WITHOUT_TORCH)
    document = toy.document
    document["task"] = {"model": "light:build_model", "data": "light:build_data", "loss": "light:loss"}
    document["stages"] = [{"name": "train", "uses": "train", "config": {"epochs": 1}}]
    return document


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("changes", "exit_code", "expected"),
    [
        ({"stages/train/config/epoch": 2}, 2, "stages[0] (train).config.epoch: unknown field; did you mean 'epochs'?"),
        ({"task/model": "light:modle"}, 2, "task.model: 'light:modle': 'light' has no 'modle'"),
        ({"stages/train/resources": {"workers": 4096}}, 3, "train: needs 4096 CPUs at once; this machine has"),
    ],
    ids=["unknown-field", "missing-function", "too-many-workers"],
)
def test_the_command_ends_with_the_exit_code_and_one_message(
    toy, light, heliostat, change, command, changes, exit_code, expected
):
    done = heliostat(command, toy.write(change(light, changes)))
    assert done.returncode == exit_code
    assert f"error: {expected}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_refused_run_prints_nothing_on_standard_output_under_json(toy, light, heliostat, change):
    done = heliostat("run", toy.write(change(light, {"task/model": "light:modle"})), "--json")
    assert (done.returncode, done.stdout) == (2, "")


def test_the_command_refuses_a_file_that_is_not_there(toy, heliostat):
    done = heliostat("run", "toi.yaml", cwd=toy.folder)
    assert (done.returncode, done.stderr) == (2, "error: toi.yaml: no such file; did you mean 'toy.yaml'?\n")


def test_the_command_refuses_a_bad_set_and_a_bad_force(toy, light, heliostat):
    path = toy.write(light)
    bad_set = heliostat("plan", path, "--set", "stages.trian.config.epochs=3")
    assert (bad_set.returncode, "--set stages.trian: no stage 'trian'" in bad_set.stderr) == (2, True)
    bad_force = heliostat("plan", path, "--force", "trian")
    assert (bad_force.returncode, "--force trian: no stage 'trian'" in bad_force.stderr) == (2, True)
