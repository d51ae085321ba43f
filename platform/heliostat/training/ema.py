"""An exponential moving average of the weights (Polyak and Juditsky 1992), often better than the last of them.

It forgets faster in the beginning, as in TensorFlow: after n updates the decay is at most (1 + n) / (10 + n). Buffers,
such as BatchNorm's statistics, are averages already and stay the model's own.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.training.strategies.gradients import local


class Ema:
    """The average of a module's trainable parameters, by their names. `average` is changed in place."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        name_of = {id(p): name for name, p in self._parameters.items()}
        every_name = module.named_parameters(remove_duplicate=False)
        self._names = {name: name_of[id(p)] for name, p in every_name if id(p) in name_of}
        self._decay = decay
        self.average = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Called after every optimizer step."""
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for average, parameter in self._pairs():
            average.lerp_(parameter, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the module has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def under_every_name(self, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return averages with tied parameters under each of their names, as a module's state has them."""
        return {name: average[first] for name, first in self._names.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, average in self.average.items():
            average.copy_(state["average"][name])

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in self._pairs():
            kept = average.clone()
            average.copy_(parameter)
            parameter.copy_(kept)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((local(average), local(self._parameters[name])) for name, average in self.average.items())
