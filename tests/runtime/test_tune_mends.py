"""What of Ray Tune is put right; the rest of it is in `faults/test_memory.py`."""

import subprocess
import sys

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
