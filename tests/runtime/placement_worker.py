"""A process with a Ray of three nodes of two CPUs (all on this machine), which tells as JSON where workers ran on it.

The second node has two of `licence`, the third an accelerator of the kind T4.
"""

import json
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from heliostat.core.objective import Objectives
from heliostat.core.space import Space
from heliostat.core.spec import Resources, Task
from heliostat.core.stage import StageContext, Unheard
from heliostat.runtime import session
from heliostat.runtime.ledger import Budget
from heliostat.runtime.search import Search, run_search
from heliostat.runtime.tasks import run_task
from heliostat.runtime.trainer import train_workers
from heliostat.runtime.training import Training
from heliostat.training.config import TrainConfig

TOY = """
import os
import ray
import torch
from torch.utils.data import TensorDataset

def build_model():
    with open(os.environ["NODES"], "a") as file:
        file.write(ray.get_runtime_context().get_node_id() + "\\n")
    return torch.nn.Linear(4, 2)

def build_data():
    points = TensorDataset(torch.randn(32, 4), torch.zeros(32, dtype=torch.long))
    return {"train": points, "val": points, "test": points}
"""
LICENCED = Resources(custom_resources={"licence": 1})
ON_T4 = Resources(accelerator_type="T4")


def main(folder: Path) -> None:
    (folder / "toy.py").write_text(TOY)
    wrote = folder / "nodes.txt"
    task, root = Task(model="toy:build_model", data="toy:build_data"), folder

    def nodes_of(work) -> list[str]:
        """The names of the nodes where models were built meanwhile."""
        wrote.write_text("")
        work()
        names = {node["NodeID"]: name_of(node["Resources"]) for node in ray.nodes()}
        return sorted(names[line] for line in wrote.read_text().split())

    def train(resources: Resources, name: str) -> None:
        train_workers(
            task,
            TrainConfig(epochs=1),
            resources=resources,
            seed=0,
            root=root,
            folder=folder / name,
            reporter=Unheard(),
            cancel=threading.Event(),
        )

    def tune(resources: Resources) -> None:
        (folder / "search").mkdir()
        context = StageContext(
            node="search",
            folder=folder / "search",
            root=root,
            task=task,
            seed=0,
            resources=resources,
            inputs={},
            reporter=Unheard(),
            cancel=threading.Event(),
        )
        space = Space.parse({"optimizer.lr": {"uniform": [0.1, 0.2]}})
        search = Search(space, "random", Budget(3), Objectives.of({"val_loss": "min"}))
        run_search(context, search, Training(TrainConfig(epochs=1)))

    with ExitStack() as stack:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "env_vars": {"NODES": str(wrote)}})
        stack.callback(cluster.shutdown)
        cluster.add_node(num_cpus=2, resources={"licence": 2}, env_vars={"NODES": str(wrote)})
        cluster.add_node(num_cpus=2, resources={"accelerator_type:T4": 1}, env_vars={"NODES": str(wrote)})
        stack.enter_context(session.start(cluster.address, log=folder / "ray.log", root=root))
        pair = Resources(workers=2, cpus_per_worker=0.5)
        found = {
            "capacity": str(session.cluster_capacity()),
            "task": run_task(here, root=root, held=ON_T4.per_worker),
            "alone": nodes_of(lambda: train(LICENCED, "alone")),
            "together": nodes_of(lambda: train(LICENCED.model_copy(update={"workers": 2}), "together")),
            "packed": nodes_of(lambda: train(pair, "packed")),
            "spread": nodes_of(lambda: train(pair.model_copy(update={"placement": "spread"}), "spread")),
            "trials": nodes_of(lambda: tune(ON_T4)),
        }
        print(json.dumps(found), flush=True)


def here() -> str:
    (own,) = [n for n in ray.nodes() if n["NodeID"] == ray.get_runtime_context().get_node_id()]
    return name_of(own["Resources"])


def name_of(resources: dict[str, float]) -> str:
    return next((name for name in ("licence", "accelerator_type:T4") if name in resources), "head")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
