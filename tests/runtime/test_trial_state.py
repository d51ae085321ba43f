"""What trials leave behind in the process that they share."""

import random
import textwrap

import pytest
import torch

from heliostat.core.spec import Task
from heliostat.runtime.ledger import trial_seed
from heliostat.training.config import TrainConfig
from heliostat.training.seeding import seed_everything

pytestmark = pytest.mark.usefixtures("ray_session")


MESSY = """
    import os, random, sys, warnings
    import numpy as np
    import torch
    from torch import nn
    from toy import build_data, build_model

    COUNT = 0
    SEEN = []
    CACHE = {"kept": 1.0}

    def state():
        return {
            "pid": float(os.getpid()),
            "threads": float(torch.get_num_threads()),
            "grad": float(torch.is_grad_enabled()),
            "dtype_bytes": float(torch.ones(()).element_size()),
            "deterministic": float(torch.are_deterministic_algorithms_enabled()),
            "python_random": random.random(),
            "numpy_random": float(np.random.rand()),
            "torch_random": float(torch.rand((), dtype=torch.float32)),
            "environ": float("MESSY" in os.environ),
            "folder_is_root": float(os.getcwd() == "/"),
            "path": float("/messy" in sys.path),
            "warnings": float(any(f[0] == "error" and f[2] is ResourceWarning for f in warnings.filters)),
            "hooked": float(nn.Identity()(torch.ones(()))),
            "count": float(COUNT),
            "seen": float(len(SEEN)),
            "cache": float(sum(CACHE.values())),
            "new_global": float("NEW" in globals()),
        }

    def make_a_mess():
        global COUNT, NEW
        torch.set_num_threads(2)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        nn.modules.module.register_module_forward_hook(lambda module, inputs, outputs: outputs * 3)
        os.environ["MESSY"] = "1"
        os.chdir("/")
        sys.path.append("/messy")
        warnings.simplefilter("error", ResourceWarning)
        for module in (random, np.random, torch):
            getattr(module, "manual_seed", getattr(module, "seed", None))(99)
        COUNT, NEW = COUNT + 1, 1
        SEEN.append(COUNT)
        CACHE.update(kept=2.0, more=1.0)

    def train(context, config):
        if config.model_args["mess"]:
            make_a_mess()
        context.report({"val_loss": 0.0, **state()})

    def rss_mb(outputs, targets):
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
"""


@pytest.fixture(scope="module", autouse=True)
def _messy(root):
    (root / "messy.py").write_text(textwrap.dedent(MESSY))


def test_a_trial_sees_nothing_of_what_the_ones_before_did_to_their_process(run):
    outcome = run(
        task=Task(model="messy:build_model", data="messy:build_data", train_fn="messy:train"),
        algorithm="grid",
        space={"model_args.mess": {"grid": [False, True, False]}},
    )
    before, mess, after = (dict(trial.history[-1][1]) for trial in outcome.trials)
    assert {name for name in before if mess[name] == before[name]} <= {"pid", "val_loss", "seconds"}
    seeded = {"python_random", "numpy_random", "torch_random"}
    assert {name for name in before if after[name] != before[name]} <= seeded | {"seconds"}
    seed_everything(trial_seed(0, "0003"))
    assert (after["python_random"], after["torch_random"]) == (random.random(), float(torch.rand(())))


@pytest.mark.slow
def test_two_hundred_trials_leave_no_memory_behind(run, task):
    """A model and its optimizer are 1 MB here: keeping one of them per trial would be seen."""
    outcome = run(
        task=Task(**task.model_dump() | {"metrics": ["messy:rss_mb"]}),
        algorithm="random",
        trials=200,
        space={"optimizer.lr": {"loguniform": [1e-4, 1e-2]}, "model_args.width": 8192},
        train=TrainConfig(epochs=1, batch_size=32),
    )
    assert [trial.status for trial in outcome.trials] == ["done"] * 200
    used = [trial.metrics["val_rss_mb"] for trial in outcome.trials]
    assert used[-1] - used[0] < 50
