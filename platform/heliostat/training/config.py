"""What a training run is told: the one config that `tune`, `train`, fine-tuning and `distill` share.

No torch here: `plan` reads this module.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from heliostat.core.imports import REFERENCE
from heliostat.core.model import (
    ADDED,
    NOT_IDENTITY,
    Count,
    Flag,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Number,
    Positive,
    Spec,
)
from heliostat.core.spec import Task
from heliostat.errors import nearest
from heliostat.training.schedule_config import SchedulerConfig as SchedulerConfig

OPTIMIZERS: dict[str, frozenset[str]] = {
    "sgd": frozenset({"lr", "weight_decay", "momentum", "nesterov"}),
    "adam": frozenset({"lr", "weight_decay", "betas", "eps"}),
    "adamw": frozenset({"lr", "weight_decay", "betas", "eps"}),
    "nadam": frozenset({"lr", "weight_decay", "betas", "eps"}),
    "radam": frozenset({"lr", "weight_decay", "betas", "eps"}),
    "rmsprop": frozenset({"lr", "weight_decay", "momentum", "eps"}),
    "adagrad": frozenset({"lr", "weight_decay", "eps"}),
}
"""The optimizers of `torch.optim` known by name, and the options that each takes."""


CPU_ROWS = 128
"""Larger batches fall out of the caches: a small CNN takes 1.6 times as long with 512 (measured)."""


class OptimizerConfig(Spec):
    """An optimizer of `torch.optim` by name, or any other class as `module:Class`, to which `options` go as they are.

    An option that is left out has the optimizer's own default, `lr` apart.
    """

    name: str = "adam"
    lr: Positive = 1e-3
    weight_decay: NonNegative | None = None
    momentum: NonNegative | None = None
    nesterov: Flag | None = None
    betas: tuple[Number, Number] | None = None
    eps: Positive | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in OPTIMIZERS and not REFERENCE.fullmatch(name):
            raise ValueError(f"unknown optimizer {name!r}{nearest(name, OPTIMIZERS)}")
        return name

    @model_validator(mode="after")
    def _options_fit(self) -> "OptimizerConfig":
        if self.is_reference:
            return self
        for option in self.arguments:
            if option not in OPTIMIZERS[self.name]:
                raise ValueError(
                    f"{self.name} takes no {option!r}; it takes {', '.join(sorted(OPTIMIZERS[self.name]))}"
                )
        return self

    @property
    def is_reference(self) -> bool:
        """Whether the name is an import path."""
        return self.name not in OPTIMIZERS

    @property
    def code_references(self) -> tuple[str, ...]:
        return (self.name,) if self.is_reference else ()

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments for the optimizer's constructor."""
        named = {k: v for k, v in self.model_dump(exclude={"name", "options"}).items() if v is not None}
        return named | self.options


class AutoConfig(Spec):
    """What `plan`, which reads no data, is told of it, so that it can count the activations too."""

    sample: tuple[Count, ...] | None = None
    """The shape of one sample's inputs, such as `[3, 224, 224]`."""
    dtype: Literal["float32", "int64"] = "float32"
    """`int64` for tokens."""


class FsdpConfig(Spec):
    """What is gathered as one: each module of a class (`wrap: Block`), or the smallest with so many parameters."""

    wrap: str | Count = 1_000_000


TpStyle = Literal["colwise", "rowwise", "heads", "sequence"]


class TpConfig(Spec):
    """How layers are split, by patterns of their names; `auto` finds the blocks of plain MLPs and transformers."""

    plan: Literal["auto"] | dict[str, TpStyle] = "auto"


class PpConfig(Spec):
    """Where the model is cut, and how the parts work at the same time."""

    split: Literal["auto"] | tuple[str, ...] = "auto"
    """The modules that the second and each further stage begin with; `auto` gives each as many parameters."""
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    microbatches: Count = 4

    @property
    def stages_per_worker(self) -> int:
        return 2 if self.schedule == "interleaved" else 1


StrategyName = Literal["auto", "single", "ddp", "fsdp", "tp", "pp"]
Axis = Literal["dp", "tp", "pp"]


class StrategyConfig(Spec):
    """How a model is spread over the workers: one word, or `{tp: {plan: …}}`, or `{mesh: {dp: 2, tp: 2}, tp: {…}}`.

    Without `mesh` all workers split one model. An axis `dp` makes several such groups, which share each global batch;
    left out of a mesh, it has the size that the number of workers leaves it.
    """

    name: StrategyName = "auto"
    mesh: dict[Axis, Count] = Field(default_factory=dict)
    auto: AutoConfig = AutoConfig()
    fsdp: FsdpConfig = FsdpConfig()
    tp: TpConfig = TpConfig()
    pp: PpConfig = PpConfig()

    @model_validator(mode="before")
    @classmethod
    def _in_short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if not isinstance(value, Mapping) or not value or "name" in value:
            return value
        mesh = value.get("mesh")
        told = [
            key for key in ("auto", "fsdp", "tp", "pp") if key in value or (isinstance(mesh, Mapping) and key in mesh)
        ]
        if len(told) != 1:
            raise ValueError(f"name one of fsdp, tp and pp, not {', '.join(told) or 'none'}")
        return {"name": told[0], **value}

    @model_validator(mode="after")
    def _fits_together(self) -> "StrategyConfig":
        for section in ("auto", "fsdp", "tp", "pp"):
            if section != self.name and (options := getattr(self, section)) != type(options)():
                raise ValueError(f"{section} has options, but the strategy is {self.name}")
        if self.mesh and (self.name not in ("tp", "pp") or set(self.mesh) - {"dp", self.name}):
            raise ValueError(f"a mesh has the axes dp and tp, or dp and pp, not {' and '.join(self.mesh)}")
        return self

    @property
    def is_replicated(self) -> bool:
        """Whether every worker has the whole model, as the user made it."""
        return self.name in ("auto", "single", "ddp")

    def sizes(self, workers: int) -> dict[str, int]:
        """The workers along each axis of tp or pp. Raises ValueError when the mesh is of another number of workers."""
        told = {str(axis): size for axis, size in self.mesh.items()}
        inner = told.get(self.name, workers // told.get("dp", 1))
        sizes = {"dp": told.get("dp", workers // max(1, inner)), self.name: inner}
        if math.prod(sizes.values()) != workers:
            raise ValueError(f"a mesh of {' x '.join(f'{axis} {size}' for axis, size in self.mesh.items())}")
        return sizes


class TrainConfig(Spec):
    """One training run. `batch_size` is global: the workers share it, so their number changes nothing but speed."""

    epochs: Count = 10
    batch_size: Count = 64
    model_args: dict[str, Any] = Field(default_factory=dict)
    data_args: dict[str, Any] = Field(default_factory=dict)
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    strategy: StrategyConfig = StrategyConfig()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What a forward pass computes in; weights stay fp32. With fp16 the loss is scaled, so that gradients survive."""
    clip_grad_norm: Positive | None = None
    accumulate_steps: Count = 1
    """In how many parts each worker computes its share of a batch, to save memory; the batch stays `batch_size`."""
    split_loss: Annotated[Literal["exact", "average"], ADDED] = "exact"
    """What to do where batches are split and the loss is no mean over samples: refuse it, or average the parts' losses.

    `average` makes the curve depend on the number of workers.
    """
    sync_batch_norm: Annotated[Flag, ADDED] = True
    """Batch norm takes its statistics of the samples of all workers, so that their number changes nothing."""
    early_stop_epochs: NonNegativeInt = 0
    """Stop after this many epochs without a better `val` figure; 0 is never."""
    monitor: str | None = None
    """The figure that decides which epoch is best, such as `val_accuracy`.

    By default the first of `task.metrics` on `val`, else `val_loss`.
    """
    ema_decay: Fraction | None = None
    """Evaluate and keep an exponential moving average of the weights (Polyak and Juditsky 1992), by optimizer step."""
    eval_batch_size: Annotated[Count | None, NOT_IDENTITY] = None
    """How many samples are computed at once without gradients: in evaluation, parity checks and calibration.

    By default `batch_size`, in its parts where it has `accumulate_steps`. On CPU that is 128 at most, which is fastest.
    """
    steps_per_epoch: Count | None = None
    """An epoch ends after so many global batches; by default when the data ends."""
    validate_every_steps: Count | None = None
    """Look at `val` also after every so many optimizer steps; only reported, nothing is chosen by it."""
    deterministic: Flag = False
    """Refuse operations whose result depends on the order of threads."""
    compile: Flag = False
    """Compile the model with `torch.compile` before the first step."""

    @property
    def code_references(self) -> tuple[str, ...]:
        return self.optimizer.code_references

    @property
    def parts_per_worker(self) -> int:
        """In how many parts each worker computes its share of a batch."""
        return self.strategy.pp.microbatches if self.strategy.name == "pp" else self.accumulate_steps

    def rows_at_once(self, *, on_cpu: bool = True) -> int:
        """How many samples are computed at once without gradients."""
        if self.eval_batch_size is not None:
            return self.eval_batch_size
        rows = math.ceil(self.batch_size / self.accumulate_steps)
        return min(rows, CPU_ROWS) if on_cpu else rows

    def gives_up(self, epoch: int, *, best_epoch: int) -> bool:
        """Whether training stops early after an epoch, the best one being so long ago."""
        return 0 < self.early_stop_epochs <= epoch - best_epoch


EXACT_LOSSES = (
    "torch.nn:CrossEntropyLoss",
    "torch.nn:NLLLoss",
    "torch.nn.functional:cross_entropy",
    "torch.nn.functional:nll_loss",
)
"""Those that are exact however a batch is split; `training/torch_losses.py` finds them in other forms too."""


def explain_split(config: TrainConfig, *, workers: int, task: Task) -> dict[str, str]:
    """What becomes of the loss and of batch norm where batches are split into parts, by place in the config."""
    found = {}
    if task.train_fn is not None:
        if workers > 1:
            found["batch norm"] = "if any, by each worker's own samples: task.train_fn computes as it likes"
        return found
    loss = task.train_step or task.loss
    if workers * config.parts_per_worker > 1 and loss not in EXACT_LOSSES:
        if config.split_loss == "average":
            found["split_loss"] = "the parts' losses are averaged, so the curve may depend on the number of workers"
        else:
            found["split_loss"] = f"{loss} must be a mean over samples or (sum, weight), as is checked before training"
    if config.accumulate_steps > 1:
        found["batch norm"] = f"if any, by each of the {config.accumulate_steps} parts of a batch, not by all of it"
    if workers > 1 and not config.sync_batch_norm:
        found["batch norm"] = "if any, by each worker's own samples, so the curve depends on the number of workers"
    return found


def why_not_trained(config: TrainConfig, *, workers: int, task: Task) -> Iterator[str]:
    """What of the config so many workers cannot do, each as `place in the config: why`."""
    strategy = config.strategy
    name = strategy.name
    if name == "single" and workers > 1:
        yield f"strategy: 'single' trains with one worker, not {workers}; take 'ddp' or 'auto'"
    if strategy.is_replicated:
        return
    if workers == 1:
        yield f"strategy: {name!r} spreads a model over workers, and there is one; take 'auto'"
        return
    try:
        strategy.sizes(workers)
    except ValueError as error:
        yield f"strategy.mesh: {error}, but there are {workers} workers"
        return
    yield from why_not_spread(
        config, workers=workers, own_loop=task.train_fn is not None, own_step=task.train_step is not None
    )


def why_not_spread(config: TrainConfig, *, workers: int, own_loop: bool, own_step: bool) -> Iterator[str]:
    """What of the config fsdp, tp or pp cannot do, with the user's own loop or step of it."""
    strategy, name = config.strategy, config.strategy.name
    if name == "pp" and (own_loop or own_step):
        own = "task.train_fn" if own_loop else "task.train_step"
        yield f"strategy: 'pp' runs the model in parts, which {own} cannot call; take 'fsdp' or 'tp'"
    if own_loop:  # how it computes is its own
        return
    if config.precision == "fp16":
        yield f"precision: with {name!r} a worker sees the overflow of its own part only; take bf16"
    if config.compile and name != "fsdp":
        yield f"compile: {name!r} changes the layers that would be compiled; take 'ddp' or 'fsdp'"
    if config.optimizer.is_reference:
        yield f"optimizer.name: an optimizer by import path may look at whole tensors, and {name!r} gives it parts"
    if name == "pp":
        sizes = strategy.sizes(workers)
        if config.accumulate_steps > 1:
            yield "accumulate_steps: 'pp' computes a batch in microbatches already; set strategy.pp.microbatches"
        microbatches, interleaved = strategy.pp.microbatches, strategy.pp.schedule == "interleaved"
        if microbatches < sizes["pp"] or (interleaved and microbatches % sizes["pp"]):
            yield f"strategy.pp.microbatches: {microbatches} do not keep {sizes['pp']} workers busy"
        if microbatches * sizes["dp"] > config.batch_size:
            yield f"strategy.pp.microbatches: more than the {config.batch_size // sizes['dp']} samples of a batch"
