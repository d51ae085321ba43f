"""Weights that a layer computes from other tensors: copied, and made plain parameters, without a change of outputs."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as new
from torch.nn.utils import parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from heliostat.compression.history import replay
from heliostat.compression.parametrizations import bake, copied, parametrizations
from heliostat.errors import StageError

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


class Doubled(nn.Module):
    """A parametrization that torch does not know."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def doubled(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Doubled())


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": old_weight_norm,
    "weight norm, parametrized": new.weight_norm,
    "spectral norm": old_spectral_norm,
    "spectral norm, parametrized": new.spectral_norm,
    "L1Unstructured": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "Doubled": doubled,
}


def net(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = nn.Sequential(wrap(nn.Conv1d(4, 8, 3)), nn.ReLU(), nn.Flatten(), wrap(nn.Linear(48, 5)))
    inputs = torch.randn(6, 4, 8)
    for _ in range(3):  # as after a training: the hooks have computed weights with gradients
        model.train()(inputs).sum().backward()
    return model


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(6, 4, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_computes_the_same_and_shares_nothing(kind: str, inputs: torch.Tensor) -> None:
    model = net(KINDS[kind]).eval()
    twin = copied(model)
    assert torch.equal(twin(inputs), model(inputs))
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert parametrizations(twin) == parametrizations(model)


def test_a_copy_is_made_of_a_model_that_keeps_what_it_computed() -> None:
    model = nn.Linear(3, 2)
    model.last = [model(torch.randn(1, 3))]  # `copy.deepcopy` refuses it
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    assert torch.equal(copied(model).last[0], model.last[0])


@pytest.mark.parametrize("kind", KINDS)
def test_baking_leaves_plain_parameters_and_the_same_outputs(kind: str, inputs: torch.Tensor) -> None:
    model = net(KINDS[kind]).eval()
    before = model(inputs)
    (step,) = bake(model, inputs)
    assert step["tensors"] == {name: {"weight": kind.partition(",")[0]} for name in ("0", "3")}
    assert torch.allclose(model(inputs), before, atol=1e-6)
    assert set(dict(model.named_parameters())) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert not parametrizations(model)
    assert not list(model.buffers())
    assert type(model[0]) is nn.Conv1d


@pytest.mark.parametrize("kind", KINDS)
def test_a_freshly_built_model_takes_the_weights_of_a_baked_one_after_replay(kind: str, inputs: torch.Tensor) -> None:
    model = net(KINDS[kind]).eval()
    history = bake(model, inputs)
    fresh = replay(net(KINDS[kind]), history)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(inputs), model(inputs))


def test_baking_a_plain_model_changes_nothing_and_gives_no_history(inputs: torch.Tensor) -> None:
    assert bake(nn.Conv1d(4, 8, 3), inputs) == []


def test_baking_keeps_frozen_weights_frozen_and_the_mode_of_the_model() -> None:
    model = new.weight_norm(nn.Linear(4, 3)).requires_grad_(False)
    bake(model.train())
    assert isinstance(model.weight, nn.Parameter)
    assert not model.weight.requires_grad
    assert model.training


def test_baking_one_of_two_layers_that_share_an_original_leaves_the_other_as_it_is() -> None:
    plain = nn.Linear(4, 4)
    other = nn.Linear(4, 4)
    other.weight = plain.weight
    weight = plain.weight.detach().clone()
    model = nn.Sequential(plain, doubled(other))
    bake(model, torch.randn(2, 4))
    assert torch.equal(plain.weight, weight)
    assert torch.equal(other.weight, 2 * weight)


class ReadsItsOriginal(nn.Module):
    """Its forward reads what the weight is computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = doubled(nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if parametrize.is_parametrized(self.layer):
            return x @ self.layer.parametrizations.weight.original
        return self.layer(x)


def test_a_model_whose_outputs_baking_changes_is_refused() -> None:
    with pytest.raises(StageError, match=r"layer\.weight: Doubled"):
        bake(ReadsItsOriginal(), torch.randn(2, 4))


@pytest.mark.parametrize("first", ["copy", "model"])
def test_a_copy_and_its_model_are_baked_each_by_itself(first):
    norm = nn.utils.parametrizations.weight_norm
    model, inputs = nn.Sequential(norm(nn.Linear(4, 4)), norm(nn.Conv1d(4, 4, 1))), torch.randn(8, 4, 4)
    wanted = model(inputs)
    made = copied(model)
    baked, other = (made, model) if first == "copy" else (model, made)
    bake(baked)
    assert torch.allclose(other(inputs), wanted, atol=1e-6)
    bake(other)
    assert torch.allclose(other(inputs), baked(inputs), atol=1e-6)
