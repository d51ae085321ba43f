"""How outputs are compared with a teacher's: what each comparison is, and what tells which one suits a task."""

from functools import partial
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional

from heliostat.compression.soft_loss import NAMES, SoftLoss, choose_soft_loss
from heliostat.errors import StageError
from heliostat.stages.finetuning import SoftLoss as Option


def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def _classes(num, *shape):
    return torch.randint(num, shape, generator=torch.Generator().manual_seed(0))


def _squared(outputs, targets):
    return ((outputs - targets) ** 2).mean()


def _own_bce(outputs, targets):
    return functional.binary_cross_entropy_with_logits(outputs.float(), targets.reshape(outputs.shape).float())


def _own_cross_entropy(outputs, targets):
    return functional.cross_entropy(outputs, targets, label_smoothing=0.1)


def _flattened(outputs, targets):
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _of_probabilities(outputs, targets):
    return functional.binary_cross_entropy(outputs, targets)


def _log_likelihood(outputs, targets):
    return functional.nll_loss(outputs, targets)


def _focal(outputs, targets):
    likelihood = outputs.log_softmax(1).gather(1, targets[:, None])
    return -((1 - likelihood.exp()) ** 2 * likelihood).mean()


def _quantile(outputs, targets):
    error = targets - outputs
    return torch.maximum(0.9 * error, -0.1 * error).mean()


KNOWN_TO_TORCH = [
    (functional.mse_loss, _random(8, 1), _random(8, 1), "regression"),
    (nn.HuberLoss(), _random(8), _random(8).double(), "regression"),
    (functional.l1_loss, _random(8, 1), torch.ones(8, 1), "regression"),
    (functional.mse_loss, _random(8, 3, 4, 4), _random(8, 3, 4, 4), "regression"),
    (functional.binary_cross_entropy_with_logits, _random(8, 1), torch.ones(8, 1), "binary"),
    (nn.BCEWithLogitsLoss(), _random(8, 20), torch.ones(8, 20), "binary"),
    (functional.cross_entropy, _random(8, 5), _classes(5, 8), "classes"),
    (partial(functional.cross_entropy, label_smoothing=0.1), _random(8, 5), _classes(5, 8), "classes"),
    (functional.cross_entropy, _random(8, 5), _random(8, 5).softmax(1), "classes"),
    (nn.CrossEntropyLoss(), _random(8, 2, 6, 6), _classes(2, 8, 6, 6), "dense"),
    (nn.NLLLoss(), _random(8, 5, 7).log_softmax(1), _classes(5, 8, 7), "dense"),
]
OF_THE_USER = [
    (_squared, _random(8, 1), _random(8, 1) * 3, "regression"),
    (_squared, _random(8, 1), torch.rand(8, 1), "regression"),
    (_squared, _random(8, 1), (_random(8, 1) > 0).float(), "regression"),
    (lambda o, t: _squared(o.squeeze(-1), t), _random(8, 1), torch.rand(8), "regression"),
    (lambda o, t: _squared(o, t.float()), _random(8), _classes(9, 8), "regression"),
    (_quantile, _random(8, 1), torch.rand(8, 1), "regression"),
    (_own_bce, _random(8, 1), (_random(8, 1) > 0).float(), "binary"),
    (_own_bce, _random(8), (_random(8) > 0).float(), "binary"),
    (_own_bce, _random(8, 1), (_random(8) > 0).long(), "binary"),
    (_own_bce, _random(8, 20), (_random(8, 20) > 0).float(), "binary"),
    (_own_bce, _random(8, 20), _random(8, 20) > 0, "binary"),
    (_own_bce, _random(8, 1, 6, 6), torch.rand(8, 1, 6, 6), "binary"),
    (_of_probabilities, _random(8, 1).sigmoid(), (_random(8, 1) > 0).float(), "binary"),
    (_own_cross_entropy, _random(8, 5), _classes(5, 8), "classes"),
    (_own_cross_entropy, _random(8, 5), _random(8, 5).softmax(1), "classes"),
    (_focal, _random(8, 5), _classes(5, 8), "classes"),
    (_log_likelihood, _random(8, 5).log_softmax(1), _classes(5, 8), "classes"),
    (_own_cross_entropy, _random(8, 2, 6, 6), _classes(2, 8, 6, 6), "dense"),
    (_own_cross_entropy, _random(8, 7, 7), _classes(7, 8, 7), "dense"),
    (_flattened, _random(8, 7, 5), _classes(5, 8, 7), "tokens"),
    (_flattened, _random(8, 7, 7), _classes(7, 8, 7), "tokens"),
    (_flattened, _random(8, 7, 5), _classes(5, 8, 7).masked_fill(_random(8, 7) > 0, -100), "tokens"),
]


@pytest.mark.parametrize(("loss", "outputs", "targets", "expected"), KNOWN_TO_TORCH + OF_THE_USER)
def test_the_loss_of_the_task_and_the_shapes_tell_how_outputs_are_compared(loss, outputs, targets, expected):
    chosen = choose_soft_loss("auto", outputs, targets, loss=loss)
    assert chosen.name == expected
    assert chosen.why
    student = outputs.clone().requires_grad_()
    soft = chosen(student * 0.9, outputs, targets, temperature=2.0)
    soft.backward()
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        (lambda o, t: (o[:, 0] - t).square().mean(), _random(8, 2), _random(8)),  # a mean and a spread
        (lambda o, t: _own_bce(o, functional.one_hot(t, 5)), _random(8, 5), _classes(5, 8)),  # classes, but no softmax
        (lambda o, t: (o - t).clamp(-5, 5).acos().mean(), _random(8), torch.rand(8)),  # takes no other outputs
    ],
)
def test_what_nothing_tells_is_refused_and_the_option_is_named(loss, outputs, targets):
    with pytest.raises(StageError, match=r"distillation\.loss: outputs float32 \(8.*name one of regression, binary"):
        choose_soft_loss("auto", outputs, targets, loss=loss, option="distillation.loss")
    assert choose_soft_loss("regression", outputs, targets, loss=loss).name == "regression"


@pytest.mark.parametrize(
    ("name", "outputs"), [("classes", (8, 1)), ("classes", (8,)), ("dense", (8, 1, 4, 4)), ("tokens", (8, 5))]
)
def test_a_softmax_that_would_teach_nothing_is_refused(name, outputs):
    with pytest.raises(StageError, match="loss: "):
        choose_soft_loss(name, torch.randn(outputs), torch.rand(outputs), loss=_squared)


def test_cross_entropy_over_one_class_is_refused():
    with pytest.raises(StageError, match="nothing is learned; name 'binary'"):
        choose_soft_loss("auto", _random(8, 1), torch.zeros(8, dtype=torch.long), loss=functional.cross_entropy)


def test_every_name_is_an_option_of_the_file():
    assert ("auto", *NAMES) == get_args(Option)


def test_one_logit_is_compared_as_the_two_classes_that_it_stands_for():
    student, teacher = _random(8, 1), _random(8, 1) * 2 + 1
    binary = SoftLoss("binary", why="")(student, teacher, student, temperature=3.0)
    pair = [functional.pad(logit, (1, 0)) for logit in (student, teacher)]
    assert torch.isclose(binary, SoftLoss("classes", why="")(*pair, student, temperature=3.0))


def test_probabilities_are_compared_by_their_logits():
    student, teacher, targets = _random(8, 4), _random(8, 4) + 1, torch.ones(8, 4)
    expected = SoftLoss("binary", why="")(student, teacher, targets, temperature=2.0)
    for loss in (_of_probabilities, nn.BCELoss()):
        chosen = choose_soft_loss("auto", teacher.sigmoid(), targets, loss=loss)
        assert torch.isclose(chosen(student.sigmoid(), teacher.sigmoid(), targets, temperature=2.0), expected)


@pytest.mark.parametrize("name", ["tokens", "dense"])
def test_positions_that_the_targets_leave_out_teach_nothing(name):
    student, teacher, targets = _random(4, 6, 6), _random(4, 6, 6) + _classes(3, 4, 6, 6), _classes(6, 4, 6)
    targets[:, 3:] = -100
    kept = [part[:, :3] if name == "tokens" else part[:, :, :3] for part in (student, teacher)]
    soft = SoftLoss(name, why="")
    assert torch.isclose(
        soft(student, teacher, targets, temperature=1.0), soft(*kept, targets[:, :3].contiguous(), temperature=1.0)
    )
    assert soft(student, teacher, targets.fill_(-100), temperature=1.0) == 0


def test_the_index_to_ignore_is_that_of_the_loss():
    outputs, targets = _random(8, 2, 6), _classes(2, 8, 6)
    for loss in (nn.CrossEntropyLoss(ignore_index=1), partial(functional.cross_entropy, ignore_index=1)):
        assert choose_soft_loss("auto", outputs, targets, loss=loss).ignore_index == 1
    assert choose_soft_loss("auto", outputs, targets, loss=functional.cross_entropy).ignore_index == -100


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_keeps_its_size_at_any_temperature(name):
    shape = (6, 5) if name == "classes" else (6, 5, 5)
    student, teacher, targets = _random(*shape).requires_grad_(), _random(*shape) + _classes(3, *shape), torch.rand(6)

    def gradient(temperature):
        loss = SoftLoss(name, why="")(student, teacher, targets, temperature=temperature)
        return torch.autograd.grad(loss, student)[0].norm()

    assert 0.8 < gradient(50.0) / gradient(100.0) < 1.25
