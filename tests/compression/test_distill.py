import pytest
import torch
from torch.nn import functional

from heliostat.compression.distill import distillation_loss, matched_features, mean_outputs, teacher_outputs
from heliostat.compression.soft_loss import SoftLoss
from heliostat.errors import SpecError, StageError

SETTINGS = {
    "loss": functional.cross_entropy,
    "soft_loss": SoftLoss("classes", why="a test"),
    "temperature": 4.0,
    "alpha": 0.5,
}


def _loss(student, teacher, targets, **overrides):
    return distillation_loss(student, teacher, targets, **(SETTINGS | overrides))


@pytest.fixture
def logits():
    return torch.randn(6, 5, requires_grad=True), torch.randn(6, 5), torch.randint(5, (6,))


def test_alpha_0_is_the_plain_loss_and_alpha_1_ignores_the_labels(logits):
    student, teacher, targets = logits
    assert torch.equal(_loss(student, teacher, targets, alpha=0.0), functional.cross_entropy(student, targets))
    assert torch.equal(
        _loss(student, teacher, targets, alpha=1.0), _loss(student, teacher, (targets + 1) % 5, alpha=1.0)
    )


def test_the_soft_term_is_the_cross_entropy_of_hinton_up_to_the_teachers_entropy(logits):
    student, teacher, targets = logits
    soft = functional.softmax(teacher / 3, dim=1)
    cross = -(soft * functional.log_softmax(student / 3, dim=1)).sum(1).mean()
    entropy = -(soft * soft.log()).sum(1).mean()
    assert torch.isclose(_loss(student, teacher, targets, temperature=3.0, alpha=1.0), 9 * (cross - entropy))


def test_a_student_equal_to_its_teacher_has_no_soft_loss(logits):
    student, _, targets = logits
    assert _loss(student, student.detach(), targets, alpha=1.0).abs() < 1e-6


def test_the_gradient_keeps_its_size_as_the_temperature_grows(logits):
    student, teacher, targets = logits

    def gradient(temperature):
        loss = _loss(student, teacher, targets, temperature=temperature, alpha=1.0)
        return torch.autograd.grad(loss, student)[0].norm()

    assert 0.8 < gradient(50.0) / gradient(100.0) < 1.25


def test_no_gradient_flows_into_the_teacher(logits):
    student, teacher, targets = logits
    teacher.requires_grad_(True)
    _loss(student, teacher, targets).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(("overrides", "text"), [({"temperature": 0.0}, "temperature"), ({"alpha": 1.5}, "alpha")])
def test_impossible_settings_are_refused(logits, overrides, text):
    with pytest.raises(SpecError, match=text):
        _loss(*logits, **overrides)


def test_a_teacher_of_another_task_is_refused(logits):
    with pytest.raises(StageError, match=r"\(6, 5\).*\(6, 7\)"):
        _loss(logits[0], torch.randn(6, 7), logits[2])


def test_teacher_outputs_are_in_order_and_without_gradients():
    model = torch.nn.Linear(3, 2)
    inputs = torch.randn(10, 3)
    outputs = teacher_outputs(model, inputs, 4)
    assert torch.allclose(outputs, model(inputs))
    assert not outputs.requires_grad


def test_a_task_without_labels_learns_from_the_teacher_alone(logits):
    student, teacher, _ = logits
    unlabelled = torch.full((6,), -100)
    assert functional.cross_entropy(student, unlabelled).isnan()
    assert _loss(student, teacher, unlabelled, alpha=1.0).isfinite()


def test_teachers_whose_outputs_differ_have_no_mean():
    models = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 4)]
    with pytest.raises(StageError, match=r"\(5, 2\), \(5, 4\)"):
        mean_outputs(models)(torch.randn(5, 3))


@pytest.mark.parametrize(
    ("layer", "text"), [(torch.nn.GRU(4, 4), "gives tuple"), (torch.nn.Linear(4, 4), r"gives a tensor \(7, 5, 4\)")]
)
def test_layers_without_a_row_for_each_sample_are_not_matched(layer, text):
    """A GRU gives a tuple, and of one whose first dim is time the steps would be compared, not the samples."""
    student, teacher = (torch.nn.Sequential(layer) for _ in range(2))
    with matched_features(student, teacher, {"0": "0"}) as feature_loss:
        for model in (student, teacher):
            model(torch.randn(7, 5, 4))
        with pytest.raises(StageError, match=f"layer '0' {text} for 5 samples"):
            feature_loss(5)
