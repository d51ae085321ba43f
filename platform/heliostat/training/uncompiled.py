"""Training does not load the compiler that it does not use.

The first optimizer of a process, its first step and its first `DistributedDataParallel` import `torch._dynamo`, for as
long as torch itself takes, to tell the compiler which functions to leave alone, or to ask what it is set to. Nothing
can be compiled before it is loaded, so until then nobody has to be told: once something else has loaded it, all is as
torch has it. What is changed is torch's (2.13), in this process.
"""

import inspect
import sys
from collections.abc import Callable
from functools import update_wrapper
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

COMPILER = "torch._dynamo"
DEFAULT_DDP_MODE = "ddp_optimizer"
"""`torch._dynamo.config.optimize_ddp` of a process in which nobody can have set it."""

_init_ddp = DistributedDataParallel.__init__


def leave_compiler_unloaded() -> None:
    """From now on torch's optimizers and DDP work without the compiler, until something else loads it."""
    if COMPILER in sys.modules or DistributedDataParallel.__init__ is not _init_ddp:
        return
    for method in (Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict):
        _disable_once_loaded(inspect.unwrap(method), recursive=True)
    _disable_once_loaded(inspect.unwrap(DistributedDataParallel._inside_ddp_forward), recursive=False)
    for optimizer in vars(torch.optim).values():
        if isinstance(optimizer, type) and _breaks_graph(optimizer.__dict__.get("step")):
            optimizer.step = _without_graph_breaks(optimizer.step)  # type: ignore[attr-defined]
    DistributedDataParallel.__init__ = _init_uncompiled  # type: ignore[method-assign]


def _disable_once_loaded(function: Callable[..., Any], *, recursive: bool) -> None:
    """Fill the place where `torch._compile._disable_dynamo` keeps what it calls instead of `function`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if COMPILER not in sys.modules:
            return function(*args, **kwargs)
        import torch._dynamo

        disabled = torch._dynamo.disable(function, recursive, wrapping=False)  # type: ignore[no-untyped-call]
        setattr(function, "__dynamo_disable", disabled)
        return disabled(*args, **kwargs)

    setattr(function, "__dynamo_disable", call)


def _breaks_graph(step: Any) -> bool:
    """Whether it is a step under `torch.optim.optimizer._use_grad_for_differentiable`."""
    return getattr(getattr(step, "__code__", None), "co_name", None) == "_use_grad"


def _without_graph_breaks(breaking: Callable[..., Any]) -> Callable[..., Any]:
    step = inspect.unwrap(breaking)

    def call(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if COMPILER in sys.modules:
            return breaking(optimizer, *args, **kwargs)
        with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
            return step(optimizer, *args, **kwargs)

    return update_wrapper(call, breaking)


def _init_uncompiled(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
    if COMPILER in sys.modules:
        _init_ddp(self, *args, **kwargs)
        return
    compiler = SimpleNamespace(utils=SimpleNamespace(get_optimize_ddp_mode=lambda: DEFAULT_DDP_MODE))
    vars(torch)["_dynamo"] = compiler
    try:
        _init_ddp(self, *args, **kwargs)
    finally:
        del vars(torch)["_dynamo"]
