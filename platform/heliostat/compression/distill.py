"""Knowledge distillation: a student learns from the outputs of a teacher as well as from the labels.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531. The
teacher's outputs over the training set are computed once, before training, and are then just another target.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from heliostat.errors import SpecError, StageError


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
