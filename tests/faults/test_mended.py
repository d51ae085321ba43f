"""What a run did not bring to its end, and what MLflow says of it after the next one."""

import os
import signal
import subprocess
from contextlib import suppress

import pytest

MOODY = """

import os
import sys
import time

quick_accuracy = accuracy


class Moody(nn.Sequential):
    def forward(self, inputs):
        frame = sys._getframe()
        while os.environ.get("TOY_MOOD") == "bad" and frame is not None:
            if frame.f_code.co_name == "measure_speeds":
                raise RuntimeError("not now")
            frame = frame.f_back
        return super().forward(inputs)


def build_model(width=16):
    return Moody(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))


def accuracy(outputs, targets):
    time.sleep(float(os.environ.get("TOY_SLEEP_S", 0)))
    return quick_accuracy(outputs, targets)
"""


@pytest.fixture
def project(toy, heliostat, eventually, processes_with):
    """A toy of one training, and how to run it, kill it and look at its runs in MLflow."""
    from heliostat.tracking import quiet

    quiet.silence()
    import mlflow

    toy.module.write_text(toy.module.read_text() + MOODY)
    document = toy.document
    document["stages"] = [{"name": "train", "uses": "train", "config": {"epochs": 4}}]
    toy.write(document)

    class Project:
        def run(self, *arguments, **environment):
            with pytest.MonkeyPatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                return heliostat("run", toy.file, *arguments)

        def kill_in_training(self, *arguments):
            mark = f"TOY_FOLDER={toy.folder}"
            process = subprocess.Popen(
                [*heliostat.command, "run", str(toy.file), *arguments],
                env={**heliostat.environment, "TOY_FOLDER": str(toy.folder), "TOY_SLEEP_S": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            checkpoints = lambda: list(toy.folder.glob(".heliostat/toy/train/*/checkpoints/epoch-*.pt"))  # noqa: E731
            eventually(checkpoints, "an epoch is trained", unless=lambda: process.poll() is not None)
            for pid in processes_with(mark):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            eventually(lambda: not processes_with(mark), "processes outlive the kill")

        def tracked(self):
            client = mlflow.MlflowClient(f"sqlite:///{toy.folder}/.heliostat/mlflow.db")
            experiment = client.get_experiment_by_name("toy")
            found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
            return [(run.info.run_name, run.info.status) for run in found]

    return Project()


@pytest.mark.slow
def test_a_model_whose_speed_could_not_be_measured_has_finished_once_it_was(project):
    failed = project.run(TOY_MOOD="bad")
    assert failed.returncode == 1, failed.stderr
    assert "train: failed: its speed cannot be measured: RuntimeError: not now" in failed.stderr
    assert sorted(project.tracked()) == [("toy", "FAILED"), ("train", "FAILED")]
    done = project.run()
    assert done.returncode == 0, done.stderr
    assert sorted(project.tracked()) == [("toy", "FINISHED"), ("train", "FINISHED")]


@pytest.mark.slow
def test_a_forced_run_that_was_killed_goes_on_as_itself_or_is_ended_by_another(project):
    assert project.run().returncode == 0
    project.kill_in_training("--force", "train")
    finished = [("toy", "FINISHED"), ("train", "FINISHED")]
    assert project.run().returncode == 0
    assert sorted(project.tracked()) == sorted(finished * 2)

    project.kill_in_training("--force", "train")
    other = project.run("--set", "stages.train.config.epochs=2")
    assert other.returncode == 0, other.stderr
    assert sorted(project.tracked()) == sorted([*finished * 3, ("toy", "KILLED"), ("train", "KILLED")])
