"""Knowledge distillation: a student learns from the outputs of a teacher as well as from the labels.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531. The
teacher's outputs over the training set are computed once, before training, and are then just another target.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from heliostat.compression.soft_loss import SoftLoss
from heliostat.errors import SpecError, StageError, nearest


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    soft_loss: SoftLoss,
    temperature: float,
    alpha: float,
) -> Tensor:
    """`alpha * soft_loss(student, teacher) + (1 - alpha) * loss(student, targets)`, both terms means over the batch.

    A divergence in `soft_loss` is multiplied with the squared temperature: its gradients shrink with that, and so
    `alpha` means the same at every temperature.

    Args:
        student: outputs of any shape that the two losses take.
        teacher: outputs of the same shape, already computed; no gradient flows into them.
        targets: whatever `loss` takes as its second argument.
        alpha: the weight of the teacher, in [0, 1].

    Raises:
        SpecError: temperature <= 0, or alpha outside [0, 1].
        StageError: student and teacher do not have the same shape of outputs.
    """
    if temperature <= 0:
        raise SpecError(f"temperature {temperature} is not above 0")
    if not 0 <= alpha <= 1:
        raise SpecError(f"alpha {alpha} is not in [0, 1]")
    if student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)}, the teacher's {tuple(teacher.shape)}"
        raise StageError(f"the student's outputs have the shape {shapes}")
    soft = soft_loss(student, teacher, targets, temperature=temperature)
    return alpha * soft if alpha == 1 else alpha * soft + (1 - alpha) * loss(student, targets)


def teacher_outputs(model: Callable[[Tensor], Tensor], inputs: Tensor, batch_size: int) -> Tensor:
    """The teacher's outputs for every row of `inputs`, in order, on the CPU. `model` must be in eval mode."""
    with torch.no_grad():
        return torch.cat([model(batch).cpu() for batch in torch.split(inputs, batch_size)])


def mean_outputs(models: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """The model that gives the mean of the models' outputs: of logits, the geometric mean of what they believe.

    It raises StageError when they do not have the same shape.
    """

    def mean(inputs: Tensor) -> Tensor:
        outputs = [model(inputs) for model in models]
        if len({output.shape for output in outputs}) > 1:
            shapes = ", ".join(str(tuple(output.shape)) for output in outputs)
            raise StageError(f"the outputs of several teachers have the shapes {shapes}: they have no mean")
        return torch.stack(outputs).mean(0)

    return mean


@contextmanager
def matched_features(
    student: nn.Module, teacher: nn.Module, pairs: Mapping[str, str]
) -> Iterator[Callable[[int], Tensor]]:
    """Yield the feature loss: given the number of rows of the batch that both models have just seen, how differently
    their layers tell samples apart.

    For each pair of layers, the mean squared difference of the (batch, batch) matrices of inner products of the
    features of samples, rows scaled to length 1 (similarity-preserving distillation, Tung and Mori 2019,
    https://arxiv.org/abs/1907.09682). The two layers may differ in width and in everything else.

    Raises SpecError for a layer that is not there; the loss raises StageError for one whose output is no tensor with a
    row for each sample.
    """
    seen: dict[tuple[str, str], Any] = {}
    handles = [
        _layer_of(model, name, whose).register_forward_hook(
            lambda layer, inputs, outputs, key=(whose, name): seen.update({key: outputs})
        )
        for one, other in pairs.items()
        for whose, model, name in (("student", student, one), ("teacher", teacher, other))
    ]

    def similarities(whose: str, name: str, num_rows: int) -> Tensor:
        features = seen[whose, name]
        if not isinstance(features, Tensor) or features.ndim == 0 or len(features) != num_rows:
            what = f"a tensor {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            raise StageError(
                f"features: the {whose}'s layer {name!r} gives {what} for {num_rows} samples, not a tensor with a row "
                "for each; name another layer"
            )
        return _similarities(features)

    def loss(num_rows: int) -> Tensor:
        differences = [
            (similarities("student", one, num_rows) - similarities("teacher", other, num_rows).detach()).square().mean()
            for one, other in pairs.items()
        ]
        return torch.stack(differences).sum()

    try:
        yield loss
    finally:
        for handle in handles:
            handle.remove()


def _layer_of(model: nn.Module, name: str, whose: str) -> nn.Module:
    layers: dict[str, nn.Module] = dict(model.named_modules())
    if name not in layers:
        raise SpecError(f"features: the {whose} has no layer {name!r}{nearest(name, layers)}")
    return layers[name]


def _similarities(features: Tensor) -> Tensor:
    rows = features.flatten(1)
    return functional.normalize(rows @ rows.T, dim=1)
