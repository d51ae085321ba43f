"""What a module may carry beside its weights: all of it arrives in the saved model, and through a checkpoint."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from heliostat.compression.formats import load_torch
from heliostat.core.imports import use_root
from heliostat.core.spec import Task
from heliostat.core.state import map_state
from heliostat.errors import SpecError, StageError
from heliostat.stages.passes.workshop import Workshop
from heliostat.training.config import TrainConfig
from heliostat.training.seeding import seed_everything
from heliostat.training.task import build_data, build_model
from heliostat.training.weights import load_weights

ZOO = '''
import random

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.data import TensorDataset


class Versioned(nn.Linear):
    """Loads nothing that does not say which version it is of, as torchvision's MNASNet."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError(f"version should be 2, not {local_metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


class Counting(nn.Linear):
    """Has state that is no tensor, and changes in training."""

    def __init__(self, *args):
        super().__init__(*args)
        self.calls, self.shift = 0, torch.zeros(4)

    def forward(self, x):
        if self.training:
            self.calls, self.shift = self.calls + 1, self.shift + 0.5
        return super().forward(x) * self.calls + self.shift

    def get_extra_state(self):
        return {"calls": self.calls, "shift": self.shift}

    def set_extra_state(self, state):
        self.calls, self.shift = state["calls"], state["shift"]


class Buffers(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("phase", torch.ones(4, dtype=torch.complex64))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("missing", None)
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.register_buffer("tenth", torch.arange(40.0)[8:12])

    def forward(self, x):
        if self.training:
            self.steps += 1
            self.phase = self.phase * 1j
        return super().forward(x) * self.mask + self.steps + self.phase.real + self.table + self.tenth


class Drawing(nn.Linear):
    """Draws what is no part of its state, once."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("frequencies", torch.randn(4), persistent=False)
        self.shift = [torch.rand(4), np.random.rand(), random.random()]

    def forward(self, x):
        return super().forward(x * self.frequencies) + sum(self.shift)


class Renamed(nn.Module):
    """Its state has other names than its attributes, by hooks of its own; another hook scales what it gives."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_state_dict_post_hook(self._rename)
        self.register_load_state_dict_pre_hook(self._name_back)
        self.inner.register_forward_hook(lambda module, args, output: output * 2)

    @staticmethod
    def _rename(module, state, prefix, metadata):
        for name in [name for name in state if name.startswith(prefix + "inner.")]:
            state[name.replace("inner.", "outer.")] = state.pop(name)

    @staticmethod
    def _name_back(module, state, prefix, *rest):
        for name in [name for name in state if name.startswith(prefix + "outer.")]:
            state[name.replace("outer.", "inner.")] = state.pop(name)

    def forward(self, x):
        return self.inner(x)


def tied():
    first, last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    last.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), last)


def normed():
    return nn.Sequential(
        weight_norm(nn.Linear(4, 4)),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        parametrizations.spectral_norm(nn.Linear(4, 4)),
        nn.utils.spectral_norm(nn.Linear(4, 4)),
        parametrizations.orthogonal(nn.Linear(4, 4)),
    )


KINDS = {
    "versioned": lambda: Versioned(4, 4),
    "extra_state": lambda: Counting(4, 4),
    "buffers": lambda: Buffers(4, 4),
    "drawing": lambda: Drawing(4, 4),
    "renamed": Renamed,
    "tied": tied,
    "normed": normed,
    "lazy": lambda: nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()),
    "wrapped": lambda: nn.DataParallel(nn.Linear(4, 4)),
    "compiled": lambda: torch.compile(nn.Linear(4, 4), backend="eager"),
    "half": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(torch.bfloat16),
}


def build_model(kind):
    model = KINDS[kind]()
    if kind == "lazy":
        model(torch.zeros(2, 4))
    return model


def build_data(kind=""):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 4, generator=generator)
    x, y = x.to(torch.bfloat16 if kind == "half" else x.dtype), torch.arange(24) % 4
    return {"train": TensorDataset(x, y), "val": TensorDataset(x, y)}
'''
KINDS = (
    "versioned",
    "extra_state",
    "buffers",
    "drawing",
    "renamed",
    "tied",
    "normed",
    "lazy",
    "wrapped",
    "compiled",
    "half",
)


def _workshop(tmp_path: Path, kind: str, **settings) -> Workshop:
    (tmp_path / "zoo.py").write_text(ZOO)
    use_root(tmp_path)
    task = Task(model="zoo:build_model", data="zoo:build_data", loss="torch.nn.functional:cross_entropy")
    recipe = TrainConfig(
        epochs=2,
        batch_size=8,
        model_args={"kind": kind},
        data_args={"kind": kind} if kind == "half" else {},
        **settings,
    )
    data = build_data(task, recipe.data_args)
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    return Workshop(task, recipe, data, 0, tmp_path, folder, on_epoch=lambda epoch, row: None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ema_decay", [None, 0.5], ids=["plain", "ema"])
def test_a_module_of_any_kind_is_saved_as_it_was_trained(tmp_path, kind, ema_decay):
    shop = _workshop(tmp_path, kind, ema_decay=ema_decay)
    seed_everything(shop.seed)
    model = build_model(shop.task, shop.recipe.model_args)
    fitted = shop.fine_tune(model, shop.recipe)
    shop.save(model.eval())
    assert shop.reload_parity(model)["max_abs_diff"] < 1e-6

    state, saved = model.state_dict(), torch.load(shop.folder / "weights.pt", weights_only=True)
    assert saved._metadata == state._metadata == fitted.state._metadata
    assert list(saved) == list(state)

    # As in a resumed run: the same state from the checkpoint of the last epoch, into a model that is built anew.
    seed_everything(shop.seed)
    again = build_model(shop.task, shop.recipe.model_args)
    resumed = shop.fine_tune(again, shop.recipe)
    assert resumed.metrics == fitted.metrics
    assert resumed.state._metadata == state._metadata
    load = load_torch(shop.folder)
    inputs = shop.samples("val", 24)
    with torch.no_grad():
        assert torch.equal(again.eval()(inputs), load(inputs))


def test_weights_that_layers_share_are_stored_once(tmp_path):
    shop = _workshop(tmp_path, "tied")
    model = build_model(shop.task, shop.recipe.model_args)
    fitted = shop.fine_tune(model, shop.recipe)
    shop.save(model)
    for state in (
        torch.load(shop.folder / "weights.pt", weights_only=True),
        fitted.state,
        shop.checkpoints("").latest()["model"],
    ):
        assert state["0.weight"].data_ptr() == state["2.weight"].data_ptr()
    loaded = load_torch(shop.folder)
    assert loaded[0].weight is loaded[2].weight


def test_a_view_of_a_large_tensor_is_stored_without_the_rest_of_it(tmp_path):
    shop = _workshop(tmp_path, "buffers")
    shop.save(build_model(shop.task, shop.recipe.model_args))
    saved = torch.load(shop.folder / "weights.pt", weights_only=True)
    assert saved["tenth"].untyped_storage().nbytes() == 16


def test_an_artifact_without_versions_of_its_modules_still_loads(tmp_path):
    shop = _workshop(tmp_path, "buffers")
    model = build_model(shop.task, shop.recipe.model_args)
    shop.save(model)
    torch.save(dict(model.state_dict()), shop.folder / "weights.pt")  # as older versions wrote it
    assert shop.reload_parity(model)["max_abs_diff"] == 0


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_state_of_a_wrapped_model_loads_into_a_plain_one_and_the_other_way_round(wrapped):
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    wrapper = nn.DataParallel(torch.compile(copy.deepcopy(plain), backend="eager"))
    source, target = (wrapper, plain) if wrapped else (plain, wrapper)
    with torch.no_grad():
        source.state_dict()[next(iter(source.state_dict()))].fill_(7)
    load_weights(target, map_state(source.state_dict(), lambda tensor: tensor.clone()))
    assert next(iter(target.parameters()))[0, 0] == 7


def test_weights_of_another_model_are_refused_with_what_does_not_fit():
    with pytest.raises(StageError, match="do not fit the model"):
        load_weights(nn.Linear(2, 2), nn.Linear(3, 2).state_dict())


def test_state_that_could_not_be_read_back_is_refused_before_anything_is_trained(tmp_path):
    shop = _workshop(tmp_path, "extra_state")
    model = build_model(shop.task, shop.recipe.model_args)
    model.get_extra_state = lambda: {"where": Path("/")}
    with pytest.raises(SpecError, match=r"the state '_extra_state' is a dict .* let get_extra_state return"):
        shop.fine_tune(model, shop.recipe)
    assert shop.checkpoints("").is_empty()
