import json
import subprocess
import sys
import textwrap

SCRIPT = """
    import json, os, sys
    import torch
    from torch import distributed, nn
    from torch.nn.parallel import DistributedDataParallel
    from heliostat.training.isolation import fresh_process_state
    from heliostat.training.uncompiled import leave_compiler_unloaded

    leave_compiler_unloaded()
    fresh_process_state(num_threads=1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    distributed.init_process_group("gloo")

    def train(model, optimizer, wrap):
        torch.manual_seed(0)
        nn.init.ones_(model.weight)
        called, optimizer = wrap(model), optimizer(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            called(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        return model.weight.tolist()

    def both(wrap):
        return [train(nn.Linear(3, 1, bias=False), name, wrap) for name in (torch.optim.SGD, torch.optim.AdamW)]

    plain = both(DistributedDataParallel)
    loaded = "torch._dynamo" in sys.modules
    compiled = both(lambda model: torch.compile(model, backend="eager"))
    after = both(DistributedDataParallel)
    print(json.dumps([plain, loaded, compiled, after, torch._dynamo.utils.get_optimize_ddp_mode()]))
"""


def test_a_training_loads_no_compiler_and_one_that_compiles_is_the_same():
    """In a process of its own, since another test may have compiled."""
    run = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    printed = subprocess.run(run, check=True, capture_output=True, text=True, timeout=200).stdout
    plain, loaded, compiled, after, mode = json.loads(printed.splitlines()[-1])
    assert not loaded
    assert plain == compiled == after
    assert mode == "ddp_optimizer"  # what is taken for the setting of a compiler that is not loaded
