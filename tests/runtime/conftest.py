"""One embedded Ray for all tests here, and the reporter and the toy task that they share."""

import textwrap
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from heliostat.core.objective import Objectives
from heliostat.core.space import Space
from heliostat.core.spec import Resources, Task
from heliostat.core.stage import StageContext
from heliostat.runtime import session
from heliostat.training.config import TrainConfig

ONE_AT_A_TIME = Resources(max_concurrent_trials=1)
"""Each process of a search takes seconds to start."""
SPACE = {"optimizer.lr": {"loguniform": [1e-3, 1e-1]}, "model_args.width": {"choice": [2, 4, 8]}}

TOY = """
    import os, signal, time
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    def spin(seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass

    def build_model(
        width=4, fail=None, once=None, hang=None, builds=None, sleep_s=0.0, step_s=0.0, same=False, busy_s=0.0,
        endless=False,
    ):
        spin(busy_s)
        if builds:
            with open(builds, "a") as file:
                file.write("built\\n")
        if (once or hang) and int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            try:
                open(once or hang, "x").close()  # the last worker, the first time
                os.kill(os.getpid(), signal.SIGKILL) if once else time.sleep(600)
            except FileExistsError:
                pass
        if fail == "raise":
            raise ValueError(f"no net is {width} wide")
        if fail == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(sleep_s)
        if same:
            torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
        if step_s:
            net.register_forward_pre_hook(lambda *_: time.sleep(step_s))
        if endless:
            net.register_forward_pre_hook(lambda *_: spin(600))
        return net

    def build_data():
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(96, 4, generator=generator)
        targets = (inputs.sum(1) > 0).long()
        splits = zip(("train", "val", "test"), inputs.split(32), targets.split(32))
        return {name: TensorDataset(x, y) for name, x, y in splits}

    def accuracy(outputs, targets):
        return (outputs.argmax(1) == targets).float().mean().item()

    def pid(outputs, targets):
        return float(os.getpid())

    def threads(outputs, targets):
        return float(torch.get_num_threads())

    def not_a_number(outputs, targets):
        return float("nan")
"""


class RecordingReporter:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.rows: dict[str | None, list[tuple[int, dict[str, float]]]] = defaultdict(list)
        self.started: list[str] = []
        self.ended: dict[str, tuple[str, str | None]] = {}
        self.warnings: list[str] = []
        self.on_row = threading.Event()

    def began(self, at: float | None = None) -> None:
        pass

    def metrics(self, values: Mapping[str, float], *, step: int, trial: str | None = None) -> None:
        self.rows[trial].append((step, dict(values)))
        self.on_row.set()

    def trial_started(self, trial: str, params: Mapping[str, Any]) -> None:
        self.started.append(trial)

    def trial_ended(self, trial: str, status: str, *, reason: str | None = None, **more: Any) -> None:
        self.ended[trial] = (status, reason)

    def progress(self, **fields: Any) -> None:
        pass

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "toy.py").write_text(textwrap.dedent(TOY))
    return folder


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[session.Session]:
    with session.start(log=tmp_path_factory.mktemp("log") / "ray.log", root=root, num_cpus=2) as live:
        yield live


@pytest.fixture
def task() -> Task:
    return Task(model="toy:build_model", data="toy:build_data", metrics=["toy:accuracy"])


@pytest.fixture
def reporter() -> RecordingReporter:
    return RecordingReporter()


@pytest.fixture
def run(task, root, tmp_path, reporter):
    """A search over the toy's space, one trial at a time, with the changes that a test names."""
    from heliostat.runtime.ledger import Budget
    from heliostat.runtime.search import Search, run_search
    from heliostat.runtime.training import Training

    def run(
        *,
        task=task,
        space=SPACE,
        algorithm="random",
        trials=4,
        wall_time_s=None,
        target=(),
        objectives=None,
        train=None,
        folds=None,
        folder=tmp_path,
        resources=ONE_AT_A_TIME,
        reporter=reporter,
        cancel=None,
        retries=0,
        **more,
    ):
        context = StageContext(
            node="search",
            folder=folder,
            root=root,
            task=task,
            seed=0,
            resources=resources,
            inputs={},
            reporter=reporter,
            retries=retries,
            cancel=cancel or threading.Event(),
        )
        budget, objectives = Budget(trials, wall_time_s, target), objectives or Objectives.of({"val_loss": "min"})
        search = Search(Space.parse(space), algorithm, budget, objectives, **more)
        return run_search(context, search, Training(train or TrainConfig(epochs=2, batch_size=16), folds))

    return run
