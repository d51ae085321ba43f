"""Knowledge distillation: a student learns from the outputs of a teacher as well as from the labels.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531. The
teacher's outputs over the training set are computed once, before training, and are then just another target.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from heliostat.errors import SpecError, StageError, nearest


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    temperature: float,
    alpha: float,
) -> Tensor:
    """`alpha * T^2 * KL(teacher || student) + (1 - alpha) * loss(student, targets)`, both terms means over the batch.

    The KL divergence compares the softmax over dim 1 of the logits divided by the temperature T; T^2 keeps the size
    of its gradients, which shrink with 1 / T^2, so that `alpha` means the same at every temperature.

    Args:
        student_logits: (batch, classes) or (batch, classes, ...), as `cross_entropy` takes them.
        teacher_logits: the same shape, already computed; no gradient flows into them.
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
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)}, the teacher's {tuple(teacher_logits.shape)}"
        raise StageError(f"the student's outputs have the shape {shapes}")
    student_log_probs = functional.log_softmax(student_logits / temperature, dim=1)
    teacher_log_probs = functional.log_softmax(teacher_logits.detach() / temperature, dim=1)
    divergence = functional.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True)
    soft = divergence.sum(dim=1).mean()
    return alpha * temperature**2 * soft + (1 - alpha) * loss(student_logits, targets)


def teacher_outputs(model: Callable[[Tensor], Tensor], inputs: Tensor, batch_size: int) -> Tensor:
    """The teacher's outputs for every row of `inputs`, in order, on the CPU. `model` must be in eval mode."""
    with torch.no_grad():
        return torch.cat([model(batch).cpu() for batch in torch.split(inputs, batch_size)])


def mean_outputs(models: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """The model that gives the mean of the models' outputs: of logits, the geometric mean of what they believe."""
    return lambda inputs: torch.stack([model(inputs) for model in models]).mean(0)


@contextmanager
def matched_features(
    student: nn.Module, teacher: nn.Module, pairs: Mapping[str, str]
) -> Iterator[Callable[[], Tensor]]:
    """Yields the loss of the batch that both models have just seen: how differently their layers tell samples apart.

    For each pair of layers, the mean squared difference of the (batch, batch) matrices of inner products of the
    features of samples, rows scaled to length 1 (similarity-preserving distillation, Tung and Mori 2019,
    https://arxiv.org/abs/1907.09682). The two layers may differ in width and in everything else.

    Raises SpecError for a layer that is not there.
    """
    seen: dict[tuple[str, str], Tensor] = {}
    handles = [
        _layer_of(model, name, whose).register_forward_hook(
            lambda layer, inputs, outputs, key=(whose, name): seen.update({key: outputs})
        )
        for one, other in pairs.items()
        for whose, model, name in (("student", student, one), ("teacher", teacher, other))
    ]

    def loss() -> Tensor:
        differences = [
            (_similarities(seen["student", one]) - _similarities(seen["teacher", other]).detach()).square().mean()
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
