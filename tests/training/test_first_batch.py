"""What does not fit training, evaluation or saving is refused before the first epoch, with its structure."""

from collections import namedtuple
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from heliostat.errors import StageError
from heliostat.training.config import TrainConfig
from heliostat.training.folds import cut_folds
from heliostat.training.loop import fit
from heliostat.training.structure import describe
from heliostat.training.task import Objective

Named = namedtuple("Named", "inputs targets")
CROSS_ENTROPY = Objective(functional.cross_entropy)


@dataclass
class Record:
    image: torch.Tensor
    label: int


class Samples(Dataset):
    """What `make` gives for each number."""

    def __init__(self, make, count=12):
        self.make, self.count = make, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.make(index)


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def _rows(index):
    return torch.ones(4) * index, index % 3


def _train(train, *, val=None, model=None, objective=CROSS_ENTROPY, **config):
    epochs = []
    data = {"train": train, "val": train if val is None else val}
    settings = TrainConfig(epochs=1, batch_size=6, **config)
    try:
        fit(
            model or nn.Linear(4, 3),
            data,
            settings,
            objective=objective,
            seed=0,
            on_epoch=lambda epoch, row: epochs.append(epoch),
        )
    except StageError:
        assert not epochs
        raise
    return epochs


@pytest.mark.parametrize(
    "sample",
    [
        lambda i: (torch.ones(4), i % 3, torch.randn(2), "where", {"more": i}),
        lambda i: [np.ones(4, dtype=np.float32), np.int64(i % 3)],
        lambda i: Named(torch.ones(4), torch.tensor(i % 3)),
        lambda i: (np.ones(4, dtype=np.float32), np.array(i % 3)),
    ],
)
def test_inputs_and_targets_of_any_kind_of_number_train_and_extras_are_left_alone(sample):
    assert _train(Samples(sample)) == [1]


TOKENS = {"input_ids": torch.zeros(16, dtype=torch.long), "attention_mask": torch.ones(16, dtype=torch.long)}


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (
            lambda i: (TOKENS, i % 3),
            r"of 'train' has inputs: \{input_ids: int64 \(16,\), attention_mask: int64 \(16,\)\}; they must be",
        ),
        (lambda i: ((torch.ones(4), torch.ones(2, 4)), 1), r"inputs: \(float32 \(4,\), float32 \(2, 4\)\); they must"),
        (lambda i: ((i, i), 1), r"inputs: \(int, int\); they must be one tensor"),
        (lambda i: ([0.5] * 20, 1), r"inputs: \[float, .*, … 20 in all\]; they must be one tensor"),
        (
            lambda i: (torch.ones(4), {"mask": np.ones(3), "label": 1}),
            r"targets: \{mask: array float64 \(3,\), label: int\}",
        ),
        (lambda i: (torch.ones(4), None), "targets: None; they must be one tensor"),
        (lambda i: (torch.ones(4), "cat"), "targets: str; they must be one tensor"),
        (lambda i: (np.array(["a"]), 1), "inputs: array <U1"),
        (
            lambda i: {"image": torch.ones(4), "label": i % 3},
            r"is \{image: float32 \(4,\), label: int\}; it must",
        ),
        (lambda i: Record(torch.ones(4), 1), r"is Record \{image: float32 \(4,\), label: int\}; it must"),
        (lambda i: torch.ones(4), r"is float32 \(4,\); it must be a tuple \(inputs, targets\)"),
        (lambda i: (torch.ones(4),), r"is \(float32 \(4,\)\); it must be a tuple"),
        (
            lambda i: (torch.ones(4 + i), 1),
            r"4 samples do not make.*\(float32 \(4,\), int\) and \(float32 \(5,\), int\)",
        ),
        (lambda i: (torch.ones(4), 1, None), r"do not make a batch; among them are \(float32 \(4,\), int, None\)"),
    ],
)
@pytest.mark.parametrize("place", ["train", "val", "stream"])
def test_samples_that_are_not_one_tensor_each_are_refused_with_their_structure(sample, text, place):
    bad, good = Samples(sample), Samples(_rows)
    given = {
        "train": {"train": bad, "val": good},
        "val": {"train": good, "val": bad},
        "stream": {"train": Stream(bad), "val": good},
    }[place]
    with pytest.raises(StageError, match=text.replace("'train'", "'val'") if place == "val" else text):
        _train(**given)


def test_a_split_of_one_tensor_alone_has_no_targets():
    with pytest.raises(StageError, match="it must be a tuple"):
        _train(TensorDataset(torch.ones(12, 4)))


def test_folds_are_not_cut_from_samples_that_cannot_be_trained_on():
    with pytest.raises(StageError, match=r"inputs: \{input_ids"):
        cut_folds({"train": Samples(lambda i: (TOKENS, 1)), "val": Samples(_rows)}, folds=2, seed=0)


def test_samples_that_do_not_stack_later_are_named_too():
    uneven = Samples(lambda i: (torch.ones(4 if i < 9 else 5), i % 3))
    with pytest.raises(StageError, match=r"6 samples do not make a batch.*float32 \(5,\)"):
        _train(uneven, val=Samples(_rows))


class Wraps(nn.Module):
    """Gives what `wrap` makes of the outputs of a layer, in training alone if that is asked for."""

    def __init__(self, wrap, *, in_training_alone=False):
        super().__init__()
        self.layer, self.wrap, self.in_training_alone = nn.Linear(4, 3), wrap, in_training_alone

    def forward(self, inputs):
        outputs = self.layer(inputs)
        return outputs if self.in_training_alone and not self.training else self.wrap(outputs)


WRAPPED = [
    (
        lambda o: {"logits": o, "loss": None},
        r"gives \{logits: float32 \(\d, 3\), loss: None\}; it must give one tensor",
    ),
    (lambda o: (o, o.sum()), r"gives \(float32 \(\d, 3\), float32 \(\)\); it must"),
    (lambda o: Named(o, None), r"gives Named \{inputs: float32 \(\d, 3\), targets: None\}"),
    (lambda o: o.sum(), r"gives float32 \(\); it must give one tensor with a row for each"),
    (lambda o: o.T, r"gives float32 \(3, \d\); it must give one tensor with a row for each"),
    (lambda o: o.detach().numpy(), r"gives array float32 \(\d, 3\); it must"),
]


@pytest.mark.parametrize(("wrap", "text"), WRAPPED)
@pytest.mark.parametrize("in_training_alone", [False, True])
def test_outputs_that_are_not_one_row_for_each_sample_are_refused(wrap, text, in_training_alone):
    with pytest.raises(StageError, match=text):
        _train(Samples(_rows), model=Wraps(wrap, in_training_alone=in_training_alone))


LOSSES = [
    (lambda o, t: functional.cross_entropy(o, t, reduction="none"), r"is float32 \(6,\); it must be a tensor with one"),
    (lambda o, t: functional.cross_entropy(o, t).item(), "is float; it must be a tensor with one number"),
    (lambda o, t: functional.cross_entropy(o.detach(), t), "has no gradient, so nothing can be learned"),
    (lambda o, t: (o.argmax(1) != t).float().mean(), "has no gradient, so nothing can be learned"),
    (lambda o, t: {"loss": o.mean()}, r"is \{loss: float32 \(\)\}; it must be a tensor with one number"),
    (lambda o, t: None, "is None; it must be a tensor with one number"),
]


@pytest.mark.parametrize(("loss", "text"), LOSSES)
def test_losses_that_nothing_can_be_learned_by_are_refused(loss, text):
    with pytest.raises(StageError, match=f"task.loss: the loss of a batch {text}"):
        _train(Samples(_rows), objective=Objective(loss))
    own_step = replace(CROSS_ENTROPY, train_step=lambda model, batch: loss(model(batch[0]), batch[1]))
    with pytest.raises(StageError, match=f"task.train_step: the loss of a batch {text}"):
        _train(Samples(_rows), objective=own_step)


def test_the_loss_that_only_evaluation_calls_is_looked_at_before_training():
    objective = Objective(lambda o, t: o, train_step=lambda model, batch: model(batch[0]).square().mean())
    with pytest.raises(StageError, match=r"task.loss: the loss of a batch is float32 \(4, 3\)"):
        _train(Samples(_rows), objective=objective)


def test_the_look_changes_nothing_of_the_training():
    """Statistics of batch norm and dropout are those of a training without it."""

    def trained(check):
        with pytest.MonkeyPatch.context() as patch:
            if not check:
                patch.setattr("heliostat.training.loop.check_outputs", lambda *args, **options: None)
                patch.setattr("heliostat.training.loop.check_samples", lambda data: None)
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
            data = {"train": Samples(_rows), "val": Samples(_rows)}
            return fit(model, data, TrainConfig(epochs=2, batch_size=6), objective=CROSS_ENTROPY, seed=0).state

    assert all(torch.equal(*pair) for pair in zip(trained(True).values(), trained(False).values()))


def test_a_long_or_deep_structure_is_shown_in_short():
    assert describe({"a": [torch.ones(2)] * 9}) == "{a: [" + ", ".join(["float32 (2,)"] * 8) + ", … 9 in all]}"
    assert describe((1, "a", None, np.float32(2))) == "(int, str, None, float32)"
