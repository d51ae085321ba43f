"""Training on a GPU, beside the same training on the CPU. `make test-gpu` runs this on a machine that has one."""

from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import TrainConfig
from heliostat.training.loop import Fit, fit
from heliostat.training.task import Objective
from heliostat.training.world import World

pytestmark = pytest.mark.gpu

OBJECTIVE = Objective(nn.functional.cross_entropy)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.encoder(self.embedding(tokens)).mean(dim=1))
        return outputs


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)),
    )


MODELS = {
    "mlp": (mlp, lambda: torch.randn(200, 8)),
    "cnn": (cnn, lambda: torch.randn(200, 1, 8, 8)),
    "transformer": (Transformer, lambda: torch.randint(0, 100, (200, 12))),
}


def train(name: str, device: torch.device, **settings: object) -> Fit:
    """Five epochs of five steps, the same on every device but for its arithmetic."""
    checkpoints = settings.pop("checkpoints", None)
    on_epoch = settings.pop("on_epoch", None)
    torch.manual_seed(0)
    build, make_inputs = MODELS[name]
    inputs, targets = make_inputs(), torch.randint(0, 5, (200,))
    data = {"train": TensorDataset(inputs[:160], targets[:160]), "val": TensorDataset(inputs[160:], targets[160:])}
    config = TrainConfig.model_validate(
        {"epochs": 5, "batch_size": 32, "optimizer": {"name": "sgd", "lr": 0.05}, **settings}
    )
    return fit(
        build(),
        data,
        config,
        objective=OBJECTIVE,
        seed=0,
        world=World(device=device),
        checkpoints=checkpoints,
        on_epoch=on_epoch,
    )


def losses(found: Fit) -> list[float]:
    return [row[name] for row in found.history for name in ("train_loss", "val_loss")]


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_curve_is_that_of_the_cpu(name):
    assert losses(train(name, GPU)) == pytest.approx(losses(train(name, CPU)), abs=1e-4)


@pytest.mark.parametrize("options", [{"accumulate_steps": 2, "clip_grad_norm": 0.5}, {"ema_decay": 0.9}])
def test_so_it_is_with_the_options_of_the_loop(options):
    assert losses(train("cnn", GPU, **options)) == pytest.approx(losses(train("cnn", CPU, **options)), abs=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_stays_close_to_it(name, precision):
    assert losses(train(name, GPU, precision=precision)) == pytest.approx(losses(train(name, CPU)), abs=0.02)


def test_a_compiled_model_trains_the_same_curve():
    assert losses(train("mlp", GPU, compile=True)) == pytest.approx(losses(train("mlp", CPU)), abs=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_interrupted_run_equals_an_uninterrupted_one_bit_for_bit_in_deterministic_mode(tmp_path, precision):
    def interrupt(epoch, row):
        if epoch == 3:
            raise KeyboardInterrupt

    settings = {"precision": precision, "deterministic": True, "optimizer": {"name": "adamw"}}
    with suppress(KeyboardInterrupt):
        train("transformer", GPU, checkpoints=Checkpoints(tmp_path), on_epoch=interrupt, **settings)
    resumed = train("transformer", GPU, checkpoints=Checkpoints(tmp_path), **settings)
    whole = train("transformer", GPU, **settings)
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(resumed.state[name], whole.state[name]) for name in whole.state)
