"""A process that starts each trial as if it were its first.

What is restored: torch's global switches and its compiler's caches, the global generators (seeded apart), the number of
threads, environment variables, the working directory, the import path, warning filters, and the names in the user's own
modules with what the lists, dicts and sets behind them held. What a thread has of its own (grad mode, autocast, NumPy's
error handling) begins anew since each trial has a thread of its own. What nobody can see from outside remains: threads
that a trial left running, caches of `functools`, what it changed inside classes and other objects.
"""

import gc
import itertools
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from heliostat.core.imports import own_modules, resolve

HOOKS_ON_ALL_MODULES = [
    hooks for name, hooks in vars(torch_module).items() if name.startswith("_global_") and name.endswith("_hooks")
]


@dataclass(frozen=True)
class ModuleState:
    """The names of a module and what its containers hold."""

    module: ModuleType
    names: dict[str, Any]
    contents: list[tuple[Any, Any]]

    @classmethod
    def of(cls, module: ModuleType) -> "ModuleState":
        names = dict(vars(module))
        held = [(value, value.copy()) for name, value in names.items() if _is_container(name, value)]
        return cls(module, names, held)

    def restore(self) -> None:
        current = vars(self.module)
        for name in [name for name, value in current.items() if not isinstance(value, ModuleType)]:
            if name not in self.names:
                del current[name]
        current.update(self.names)
        for container, content in self.contents:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)


def _is_container(name: str, value: Any) -> bool:
    return isinstance(value, (list, dict, set)) and not name.startswith("__")


@dataclass(frozen=True)
class ProcessState:
    """A process before its first trial."""

    environ: dict[str, str]
    folder: str
    path: list[str]
    filters: list[Any]
    modules: list[ModuleState]

    @classmethod
    def now(cls, root: Path) -> "ProcessState":
        modules = [ModuleState.of(module) for module in own_modules(root)]
        return cls(dict(os.environ), os.getcwd(), list(sys.path), list(warnings.filters), modules)

    def restore(self) -> None:
        os.environ.clear()
        os.environ.update(self.environ)
        os.chdir(self.folder)
        sys.path[:] = self.path
        warnings.filters[:] = self.filters  # type: ignore[index]
        for module in self.modules:
            module.restore()


_trials = itertools.count(1)


@lru_cache(maxsize=1)
def _before_first_trial(root: Path, references: tuple[str, ...]) -> ProcessState:
    for reference in references:
        resolve(reference)
    return ProcessState.now(root)


def as_if_first(root: Path, references: Iterable[str], *, num_threads: int) -> None:
    """Undo what earlier trials did to this process, whose trials all use the same references. Seeds are separate."""
    _before_first_trial(root, tuple(references)).restore()
    fresh_process_state(num_threads=num_threads)
    gc.enable()
    gc.collect()
    if next(_trials) <= 2:  # the first one has imported much: no later collection need look at that either
        gc.freeze()


def fresh_process_state(*, num_threads: int) -> None:
    """Torch's global switches and caches as in a new process."""
    torch.set_num_threads(num_threads)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(False)
    torch.set_warn_always(False)
    if torch.are_deterministic_algorithms_enabled():  # the call itself imports the compiler
        torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)
    for device_type in ("cpu", "cuda"):
        torch.set_autocast_enabled(device_type, False)
    torch.set_autocast_dtype("cpu", torch.bfloat16)
    torch.set_autocast_dtype("cuda", torch.float16)
    torch.set_autocast_cache_enabled(True)
    torch.clear_autocast_cache()
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = True
    for hooks in HOOKS_ON_ALL_MODULES:
        hooks.clear()
    if "torch._dynamo" in sys.modules:  # a trial compiled: at torch's limit of graphs the next would run eagerly
        torch.compiler.reset()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
