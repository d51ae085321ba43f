"""What a process holds with `fsdp` on 2 and 4 workers against `ddp`, for a model of 100 million parameters, on CPU.

`state_mb` is parameters, gradients and optimizer state (Adam) by their tensors, after a step and before the gradients
are cleared; `rss_mb` is how much the process grew from before the model was there to after the last step. The ideal of
N workers is 1/N of ddp's. Prints one JSON line. Target: `state_mb` within 15 % of the ideal.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WIDTH, LAYERS = 2048, 24
RUNS = (("ddp", 2), ("fsdp", 2), ("fsdp", 4))
MB = 2**20


def build_model() -> Any:
    """24 square layers: 100.7 million parameters."""
    from torch import nn

    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def rss_mb() -> float:
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MB


def work(strategy: str, folder: str) -> None:
    """One process: three steps; rank 0 writes what it holds."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.utils.data import TensorDataset

    from heliostat.training.config import TrainConfig
    from heliostat.training.loop import fit
    from heliostat.training.strategies.gradients import local
    from heliostat.training.task import Objective
    from heliostat.training.world import World

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    data = TensorDataset(torch.zeros(3 * size, WIDTH), torch.zeros(3 * size, dtype=torch.long))
    before, found = rss_mb(), {}
    clear = torch.optim.Optimizer.zero_grad

    def measure(optimizer: torch.optim.Optimizer, set_to_none: bool = True) -> None:
        """Called where the loop clears the gradients of a step."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        found["state_mb"] = sum(local(t).numel() * local(t).element_size() for t in tensors) / MB
        found["rss_mb"] = rss_mb() - before
        clear(optimizer, set_to_none=set_to_none)

    torch.optim.Optimizer.zero_grad = measure  # type: ignore[method-assign]
    fit(
        build_model(),
        {"train": data, "val": data},
        TrainConfig(epochs=1, batch_size=size, strategy=strategy),
        objective=Objective(nn.functional.cross_entropy),
        seed=0,
        world=World(rank, size),
    )
    if rank == 0:
        Path(folder, "figures.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort a process that ends in order


def held(strategy: str, workers: int) -> dict[str, float]:
    """What rank 0 holds under a strategy."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
        subprocess.run([*command, __file__, strategy, folder], check=True, stderr=subprocess.DEVNULL, env=environment)
        figures: dict[str, float] = json.loads(Path(folder, "figures.json").read_text())
        return figures


def main() -> None:
    figures: dict[str, Any] = {"benchmark": "memory", "parameters": LAYERS * (WIDTH * WIDTH + WIDTH)}
    ddp = held(*RUNS[0])
    figures["ddp_2"] = {name: round(value) for name, value in ddp.items()}
    for strategy, workers in RUNS[1:]:
        found = held(strategy, workers)
        figures[f"{strategy}_{workers}"] = {
            **{name: round(value) for name, value in found.items()},
            **{f"{name}_to_ideal": round(value / (ddp[name] / workers), 3) for name, value in found.items()},
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    work(*sys.argv[1:]) if len(sys.argv) > 1 else main()
