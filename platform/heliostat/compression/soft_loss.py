"""How a student's outputs are compared with its teacher's: by what the outputs mean, which shapes and the loss tell.

    regression  squared error of the outputs (Ba and Caruana 2014, https://arxiv.org/abs/1312.6184)
    binary      each output a logit of its own, of a task with one logit or many labels: Hinton's divergence between the
                two classes whose logits are 0 and the output
    classes     (batch, classes): the divergence of the softmax (Hinton et al. 2015, https://arxiv.org/abs/1503.02531)
    dense       (batch, classes, ...), as `cross_entropy` takes it: the same in each position, over dim 1
    tokens      (batch, ..., classes): the same in each position, over the last dim

A softmax over one logit is always 1, so with `classes` a student with one output would learn nothing from its teacher.
`auto` therefore chooses by the loss of the task: a loss of torch by its name, a function of the user by trying it on
the first batch. It refuses an ambiguous loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from heliostat.errors import StageError

SoftLossName = Literal["regression", "binary", "classes", "tokens", "dense"]
NAMES: tuple[SoftLossName, ...] = get_args(SoftLossName)
IGNORED = -100
"""The target that torch's losses leave out unless told otherwise."""
TINY = 1e-6

KNOWN: dict[str, SoftLossName | Literal["dim 1"]] = {
    "mse_loss": "regression",
    "MSELoss": "regression",
    "l1_loss": "regression",
    "L1Loss": "regression",
    "smooth_l1_loss": "regression",
    "SmoothL1Loss": "regression",
    "huber_loss": "regression",
    "HuberLoss": "regression",
    "poisson_nll_loss": "regression",
    "PoissonNLLLoss": "regression",
    "binary_cross_entropy_with_logits": "binary",
    "BCEWithLogitsLoss": "binary",
    "binary_cross_entropy": "binary",
    "BCELoss": "binary",
    "multilabel_soft_margin_loss": "binary",
    "MultiLabelSoftMarginLoss": "binary",
    "soft_margin_loss": "binary",
    "SoftMarginLoss": "binary",
    "cross_entropy": "dim 1",
    "CrossEntropyLoss": "dim 1",
    "nll_loss": "dim 1",
    "NLLLoss": "dim 1",
    "multi_margin_loss": "dim 1",
    "MultiMarginLoss": "dim 1",
}
"""What the outputs mean to the losses of torch, by the name of the function or the class."""
OF_PROBABILITIES = {"binary_cross_entropy", "BCELoss"}

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SoftLoss:
    """One way to compare outputs: `soft_loss(student, teacher, targets, temperature=…)`, a mean over the batch."""

    name: SoftLossName
    why: str
    """What told."""
    ignore_index: int = IGNORED
    """Positions whose whole-number target is this one do not count."""
    of_probabilities: bool = False
    """The outputs are no logits but probabilities."""

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
        """Each divergence times the squared temperature, which keeps the size of its gradients at any temperature."""
        teacher = teacher.detach().to(student)
        if self.name == "regression":
            return functional.mse_loss(student, teacher)
        if self.name == "binary":
            return temperature**2 * self._binary(student, teacher, temperature)
        dim = self.class_dim(student.ndim)
        if self.of_probabilities:
            student, teacher = student.clamp(min=TINY).log(), teacher.clamp(min=TINY).log()
        student_log_probs = functional.log_softmax(student / temperature, dim=dim)
        teacher_log_probs = functional.log_softmax(teacher / temperature, dim=dim)
        divergence = functional.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True)
        return temperature**2 * self._mean(divergence.sum(dim=dim), targets)

    def class_dim(self, ndim: int) -> int:
        """The dimension of the classes."""
        return ndim - 1 if self.name == "tokens" else 1

    def _binary(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        if self.of_probabilities:
            student, teacher = torch.logit(student, eps=TINY), torch.logit(teacher, eps=TINY)
        belief = torch.sigmoid(teacher / temperature)
        entropy = functional.binary_cross_entropy(belief, belief)
        return functional.binary_cross_entropy_with_logits(student / temperature, belief) - entropy

    def _mean(self, divergence: Tensor, targets: Tensor) -> Tensor:
        """Over the positions that the targets do not leave out."""
        if not _is_whole(targets) or targets.numel() != divergence.numel():
            return divergence.mean()
        counts = (targets.reshape(divergence.shape) != self.ignore_index).to(divergence)
        return (divergence * counts).sum() / counts.sum().clamp(min=1)


def choose_soft_loss(
    name: SoftLossName | Literal["auto"], outputs: Tensor, targets: Tensor, *, loss: Loss, option: str = "loss"
) -> SoftLoss:
    """What suits a task with these outputs and targets of a batch, and this loss, unless it has a name already.

    `option` is what the choice is called in the file. Raises StageError for what does not fit the outputs, and where
    nothing tells what they mean.
    """
    known = _name_in_torch(loss)
    settled = partial(
        SoftLoss,
        ignore_index=_ignored_by(loss),
        of_probabilities=known in OF_PROBABILITIES or (known is None and _takes_probabilities(loss, outputs, targets)),
    )
    if name != "auto":
        found = settled(name, why=f"{option}: {name}")
    elif known in KNOWN:
        means = KNOWN[known]
        by_ndim: SoftLossName = "classes" if outputs.ndim == 2 else "dense"
        found = settled(by_ndim if means == "dim 1" else means, why=f"the loss of the task is {known}")
    elif (told := _tell(outputs, targets, loss)) is not None:
        found = settled(*told)
    else:
        raise StageError(
            f"{option}: outputs {_shape(outputs)}, targets {_shape(targets)} and the loss of the task do not tell how "
            f"a teacher's outputs are to be compared; name one of {', '.join(NAMES)}"
        )
    _require_fit(found, outputs, option=option)
    return found


def _require_fit(found: SoftLoss, outputs: Tensor, *, option: str) -> None:
    """Raise StageError where the softmax has no classes to tell apart: nothing would be learned."""
    if found.name in ("regression", "binary"):
        return
    least = 2 if found.name == "classes" else 3
    dim = found.class_dim(outputs.ndim)
    if outputs.ndim < least or (found.name == "classes" and outputs.ndim != 2):
        raise StageError(f"{option}: {found.name} ({found.why}) is not for outputs {_shape(outputs)}")
    if outputs.shape[dim] < 2:
        raise StageError(
            f"{option}: outputs {_shape(outputs)} have one class in dim {dim} ({found.why}), whose softmax is always "
            "1, so nothing is learned; name 'binary' for logits of yes or no, or 'regression'"
        )


# --- what tells ---------------------------------------------------------------------------------------


def _name_in_torch(loss: Any) -> str | None:
    """The name of one of torch's losses, or of a module's class that is derived from one."""
    while isinstance(loss, partial):
        loss = loss.func
    if isinstance(loss, nn.Module):
        ours = (kind.__name__ for kind in type(loss).__mro__ if kind.__module__ == "torch.nn.modules.loss")
        return next((name for name in ours if name in KNOWN), None)
    name = getattr(loss, "__name__", None)
    return name if name in KNOWN and str(getattr(loss, "__module__", "")).startswith("torch") else None


def _ignored_by(loss: Any) -> int:
    stated = loss.keywords.get("ignore_index") if isinstance(loss, partial) else getattr(loss, "ignore_index", None)
    return stated if isinstance(stated, int) else IGNORED


def _tell(outputs: Tensor, targets: Tensor, loss: Loss) -> tuple[SoftLossName, str] | None:
    """By the shapes, and where those are not enough by how the user's loss behaves; None where that is not either."""
    if outputs.numel() == targets.numel():
        return _tell_alike(outputs, targets, loss)
    if not _is_whole(targets):
        return None
    dims = [dim for dim in dict.fromkeys((1, outputs.ndim - 1)) if _is_class_dim(dim, outputs, targets)]
    dims = [dim for dim in dims if _is_softmax(dim, outputs, targets, loss)]
    return _by_dim(dims[0], outputs) if len(dims) == 1 else None


def _tell_alike(outputs: Tensor, targets: Tensor, loss: Loss) -> tuple[SoftLossName, str] | None:
    """Where there is a target for each output."""
    if targets.dtype == torch.bool:
        return "binary", "the targets are yes or no, one for each output"
    values = targets.reshape(outputs.shape).to(outputs)
    from_0_to_1 = bool(values.min() >= 0 and values.max() <= 1)
    if _is_whole(targets) or from_0_to_1:
        for dim in dict.fromkeys((1, outputs.ndim - 1)):
            if 0 < dim < outputs.ndim and outputs.shape[dim] > 1 and _is_softmax(dim, outputs, targets, loss):
                return _by_dim(dim, outputs)
        if from_0_to_1 and _takes_probabilities(loss, outputs, targets):
            return "binary", "targets from 0 to 1, and the loss of the task takes probabilities"
        at = _loss_at(values, targets, loss)
        beyond = _loss_at(torch.logit(values.clamp(0, 1), eps=3e-4), targets, loss)
        if from_0_to_1 and beyond < at:
            return "binary", "targets from 0 to 1, and the loss of the task takes logits"
        if not at <= beyond:
            return None
    return "regression", "a target for each output, which the loss of the task wants to be met"


def _by_dim(dim: int, outputs: Tensor) -> tuple[SoftLossName, str]:
    name: SoftLossName = "classes" if outputs.ndim == 2 else "dense" if dim == 1 else "tokens"
    return name, f"outputs {_shape(outputs)} with the classes in dim {dim}"


def _is_class_dim(dim: int, outputs: Tensor, targets: Tensor) -> bool:
    """Whether the targets are the numbers of classes in that dim."""
    if not 0 < dim < outputs.ndim or outputs.shape[dim] < 2:
        return False
    counted = targets[targets != IGNORED]
    shape = (*outputs.shape[:dim], *outputs.shape[dim + 1 :])
    return tuple(targets.shape) == shape and bool(((counted >= 0) & (counted < outputs.shape[dim])).all())


def _is_softmax(dim: int, outputs: Tensor, targets: Tensor, loss: Loss) -> bool:
    """Whether the loss sees only the softmax over that dim: a constant on top of all classes changes nothing.

    Outputs that are normalised already, as those of a `log_softmax` or a `softmax` are, tell by themselves.
    """
    if _is_log_softmax(dim, outputs) or _is_distribution(dim, outputs):
        return True
    shape = [1 if place == dim else size for place, size in enumerate(outputs.shape)]
    constants = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(outputs)
    before, after = (_loss_at(values, targets, loss) for values in (outputs, outputs + constants))
    return math.isclose(before, after, rel_tol=1e-3, abs_tol=1e-5)


def _is_log_softmax(dim: int, outputs: Tensor) -> bool:
    return bool(outputs.logsumexp(dim).abs().max() < 1e-3)


def _is_distribution(dim: int, outputs: Tensor) -> bool:
    return bool(outputs.min() >= 0 and (outputs.sum(dim) - 1).abs().max() < 1e-3)


def _takes_probabilities(loss: Loss, outputs: Tensor, targets: Tensor) -> bool:
    """Whether the outputs lie between 0 and 1, and the loss of the task refuses others or makes no number of them."""
    if outputs.min() < 0 or outputs.max() > 1:
        return False
    return not math.isfinite(_loss_at(outputs - 2, targets, loss)) and math.isfinite(_loss_at(outputs, targets, loss))


def _loss_at(outputs: Tensor, targets: Tensor, loss: Loss) -> float:
    """Not a number where the loss refuses these outputs."""
    try:
        with torch.no_grad():
            return float(loss(outputs, targets))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return math.nan


def _is_whole(targets: Tensor) -> bool:
    return not (targets.is_floating_point() or targets.is_complex())


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
