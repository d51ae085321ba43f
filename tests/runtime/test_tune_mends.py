"""What of Ray Tune is put right; the rest of it is in `faults/test_memory.py`."""

import subprocess
import sys

import pytest
import ray
from ray import tune

from heliostat.runtime.tune_mends import mend_tune

TUNE = """
import sys
from ray import tune
from ray.air._internal import usage
from heliostat.runtime.tune_mends import mend_tune

mend_tune()
usage.tag_callbacks([tune.Callback()])  # as tune.run does
print("mlflow" in sys.modules)
"""


def test_a_search_imports_no_mlflow_to_count_callbacks_with():
    done = subprocess.run([sys.executable, "-c", TUNE], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def environment():
    return dict(ray.get_runtime_context().runtime_env)


class Asked(tune.Trainable):
    def step(self):
        return {"environment": environment(), "done": True}


@pytest.mark.usefixtures("ray_session")
def test_a_trial_is_in_the_environment_of_the_session(tmp_path):
    mend_tune()
    trials = tune.run(Asked, num_samples=1, storage_path=str(tmp_path), resources_per_trial={"cpu": 0.1}, verbose=0)
    assert trials.trials[0].last_result["environment"] == ray.get(ray.remote(environment).options(num_cpus=0).remote())
