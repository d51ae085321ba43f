"""The user's task made concrete: a model, the data, and the objective, from `module:attribute` references.

Data is read once per process, or for a whole search (`runtime/shared_data.py`): the next trial with the same arguments
has the same memory, so datasets must not be changed in place.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from heliostat.core.credentials import revealed
from heliostat.core.imports import resolve
from heliostat.core.spec import Task
from heliostat.errors import HeliostatError, SpecError, StageError, nearest
from heliostat.training.config import TrainConfig
from heliostat.training.losses import Loss, TrainStep, mean_of
from heliostat.training.torch_losses import as_sum, is_of_torch

Mode = Literal["max", "min"]
Data = Mapping[str, Dataset[Any]]


@dataclass(frozen=True)
class Metric:
    """`function(outputs, targets) -> float` over a whole split, on CPU; reported as `{split}_{name}`."""

    name: str
    function: Callable[[Tensor, Tensor], float]
    mode: Mode

    def value(self, outputs: Tensor, targets: Tensor, *, split: str) -> float:
        """The metric of a whole split. Raises StageError that names the metric when it fails or gives no number."""
        try:
            found: Any = self.function(outputs, targets)
            return float(found)
        except HeliostatError:
            raise
        except Exception as error:  # a user's metric may raise anything
            shapes = f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}"
            reason = f"{type(error).__name__}: {error}"
            raise StageError(f"task.metrics: {self.name} fails on `{split}`, for {shapes}: {reason}") from error


@dataclass(frozen=True)
class Objective:
    """What training minimises and what it reports beside it."""

    loss: Callable[..., Loss]
    """`loss(outputs, targets)`: the mean over the samples of a batch, or `(sum, weight)`."""
    metrics: tuple[Metric, ...] = ()
    train_step: TrainStep | None = None
    """The user's own loss of a training batch, `train_step(model, batch)`, of the same two kinds."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_as_sum", as_sum(self.loss))

    @property
    def is_exact(self) -> bool:
        """Whether the loss is known to be that of the global batch, however this is split."""
        return self._as_sum is not None  # type: ignore[attr-defined]

    def part_of_loss(self, outputs: Any, targets: Any) -> Loss:
        """The loss of a batch that may be a part of a larger one: as `(sum, weight)` where it is known to be that."""
        found: Loss = (self._as_sum or self.loss)(outputs, targets)  # type: ignore[attr-defined]
        return found

    def mean_loss(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of a batch as one number."""
        return mean_of(self.loss(outputs, targets))

    @property
    def named_loss(self) -> Callable[..., Tensor]:
        """`mean_loss`, or the loss itself where that is one of torch's, which says by its name what it compares."""
        return self.loss if is_of_torch(self.loss) else self.mean_loss  # type: ignore[return-value]

    @property
    def default_monitor(self) -> str:
        return f"val_{self.metrics[0].name}" if self.metrics else "val_loss"

    def mode(self, reported: str) -> Mode:
        """Whether a reported figure such as `val_accuracy` is better high or low; a loss is better low."""
        name = reported.partition("_")[2]
        return next((m.mode for m in self.metrics if m.name == name), "min" if reported.endswith("loss") else "max")

    def monitor(self, config: TrainConfig) -> tuple[str, Mode]:
        """The figure that says which epoch is best, and its mode. Raises SpecError when nothing reports it."""
        reported = ["train_loss", "val_loss", *(f"val_{metric.name}" for metric in self.metrics)]
        name = config.monitor or self.default_monitor
        if name not in reported:
            raise SpecError(f"monitor: nothing reports {name!r}{nearest(name, reported)}")
        return name, self.mode(name)


def build_model(task: Task, model_args: Mapping[str, Any]) -> nn.Module:
    """Call the user's model function. Weights come from the global generators: seed them before."""
    model = resolve(task.model)(**revealed(model_args, place="model_args"))
    if not isinstance(model, nn.Module):
        raise SpecError(f"task.model: {task.model} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def build_data(task: Task, data_args: Mapping[str, Any]) -> Data:
    """The user's datasets by split: `train`, `val` and, where there is one, `test`.

    A stream (an `IterableDataset`, or a Ray Data dataset) stays one for training; what is evaluated is read into memory
    once. It must start anew, and give the same samples on every worker, each time it is iterated over.
    """
    return _read_data(resolve(task.data), task.data, json.dumps(dict(data_args), sort_keys=True))


# Keyed by the function itself as well: two pipelines' modules may have one name.
@lru_cache(maxsize=4)
def _read_data(function: Callable[..., Any], reference: str, data_args: str) -> Data:
    data = function(**revealed(json.loads(data_args), place="data_args"))
    if not isinstance(data, Mapping):
        raise SpecError(f"task.data: {reference} returned {type(data).__name__}, not a mapping of split to Dataset")
    for split in ("train", "val"):
        if split not in data:
            raise SpecError(f"task.data: {reference} returned no {split!r} split{nearest(split, map(str, data))}")
    datasets = {split: _readable(dataset, split, reference) for split, dataset in data.items()}
    for split, dataset in datasets.items():
        if not isinstance(dataset, IterableDataset) and len(dataset) == 0:  # type: ignore[arg-type]
            raise SpecError(f"task.data: {reference} returned no samples for {split!r}")
    return datasets


def _readable(dataset: Any, split: str, reference: str) -> Dataset[Any]:
    if hasattr(dataset, "iter_rows"):  # a Ray Data dataset, which only runtime/ could name
        dataset = _Rows(dataset)
    if isinstance(dataset, IterableDataset):
        return dataset if split == "train" else list(dataset)  # type: ignore[return-value]
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return dataset  # type: ignore[no-any-return]
    raise SpecError(
        f"task.data: {reference} returned {type(dataset).__name__} for {split!r}; "
        "it must be a Dataset with __len__ and __getitem__, or an IterableDataset"
    )


class _Rows(IterableDataset[tuple[Any, ...]]):
    """The rows of a Ray Data dataset, in their order, as tuples in the order of its columns."""

    def __init__(self, rows: Any) -> None:
        rows.context.execution_options.preserve_order = True
        self._rows = rows

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return (tuple(row.values()) for row in self._rows.iter_rows())

    def __reduce__(self) -> Any:
        raise TypeError("the blocks of a Ray Data dataset end with the process that read them")


def build_objective(task: Task, loss_state: Mapping[str, Tensor] | None = None) -> Objective:
    """The loss and the metrics. A loss class such as `torch.nn:CrossEntropyLoss` is instantiated with its defaults.

    A module is the caller's own, and has the state, if any, that it was trained to.
    """
    loss = resolve(task.loss)
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        loss = loss()
    elif isinstance(loss, nn.Module):
        loss = copy.deepcopy(loss)
    if isinstance(loss, nn.Module) and loss_state:
        loss.load_state_dict(loss_state)
    metrics = tuple(Metric(name=m.name, function=resolve(m.reference), mode=m.mode) for m in task.metrics)
    train_step = resolve(task.train_step) if task.train_step else None
    return Objective(loss=loss, metrics=metrics, train_step=train_step)
