"""Training with the rounding of int8."""

import pytest
import torch
from torch import nn

from heliostat.compression.export import save_onnx
from heliostat.compression.formats import load_model
from heliostat.compression.quantize.aware import attach, detach, without_rounding
from heliostat.compression.quantize.post_training import static
from heliostat.errors import SpecError, StageError


@pytest.fixture
def learner(nets, images):
    """A network that has seen its data once with the rounding, and is in eval mode."""
    model = nets.ConvNet()
    attach(model, per_channel=True, reduce_range=True)
    for _ in range(2):
        model.train()(images)
    return model.eval()


def test_the_error_that_training_sees_is_that_of_static_quantization(tmp_path, nets):
    model, inputs = nets.mlp(hidden=64), torch.randn(64, 6)
    attach(model, per_channel=True, reduce_range=True)
    model.train()(inputs)
    rounded = model.eval()(inputs)
    detach(model)
    save_onnx(model, tmp_path / "float", example=inputs)
    static(tmp_path / "float", tmp_path / "int8", calibration=[inputs], reduce_range=True)
    seen, real = ((outputs - model(inputs)).flatten() for outputs in (rounded, load_model(tmp_path / "int8")(inputs)))
    assert torch.corrcoef(torch.stack([seen, real]))[0, 1] > 0.7


def test_weights_and_inputs_are_on_the_grid_and_gradients_pass(learner, images):
    weight = learner.block.weight
    steps = weight.flatten(1) / weight.flatten(1).abs().amax(1, keepdim=True) * 64
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    seen = []
    learner.block.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    learner(images).sum().backward()
    assert len(seen[0].unique()) <= 256
    gradient = learner.block.parametrizations.weight.original.grad
    assert gradient.abs().max() > 0


def test_ranges_move_in_training_alone(learner, images):
    before = learner.stem.rounded_input.high.item()
    assert before == pytest.approx(images.max().item(), rel=1e-5)
    learner(10 * images)
    assert learner.stem.rounded_input.high.item() == before
    learner.train()(10 * images)
    assert learner.stem.rounded_input.high.item() > before


def test_taken_off_the_network_is_as_it_was(nets, images):
    model = nets.ConvNet().eval()
    names, outputs = set(model.state_dict()), model(images)
    attach(model, per_channel=False, reduce_range=False)
    assert not torch.equal(model(images), outputs)
    detach(model)
    assert set(model.state_dict()) == names
    assert torch.equal(model(images), outputs)


def test_what_reads_its_weights_by_itself_stays_exact_with_a_reason(nets, sequences):
    exact = attach(nets.Transformer(), per_channel=True, reduce_range=True, skip=["head"])
    assert exact["head"] == "matches the pattern 'head'"
    assert exact["encoder.layers.0.self_attn.out_proj"].startswith("MultiheadAttention")
    assert attach(nets.Recurrent("GRU"), per_channel=True, reduce_range=True)["layer"].startswith("GRU")
    with pytest.raises(SpecError, match="'haed' matches no layer"):
        attach(nets.ConvNet(), per_channel=True, reduce_range=True, skip=["haed"])
    with pytest.raises(StageError, match="nothing to quantize"):
        attach(nn.Flatten(), per_channel=True, reduce_range=True)


def _hook(layer, *given):
    return None


class Named(nn.Module):
    """Calls its layer by the name of its argument."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return self.layer(input=x)


NORMS = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "weight norm by hooks": nn.utils.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "spectral norm by hooks": nn.utils.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_layer_that_computes_its_weight_does_so_in_training_and_after_it(norm):
    model = nn.Sequential(norm(nn.Linear(6, 16)), nn.ReLU(), norm(nn.Linear(16, 3)))
    inputs = torch.randn(32, 6)
    names = set(model.state_dict())
    attach(model, per_channel=True, reduce_range=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        model.train()(inputs).square().mean().backward()
        optimizer.step()
    rounded, exactly = model.eval()(inputs), without_rounding(model)(inputs)
    detach(model)
    assert set(model.state_dict()) == names
    assert torch.equal(model(inputs), exactly)
    assert 0 < (rounded - exactly).abs().max() < 0.1
    if "spectral" in next(name for name, other in NORMS.items() if other is norm):
        assert torch.linalg.matrix_norm(model[0].weight, 2) < 1.3


def test_hooks_of_the_users_own_stay(images, nets):
    model = nets.ConvNet()
    model.stem.register_forward_pre_hook(_hook)
    model.stem.register_forward_hook(_hook)
    model.block.register_forward_pre_hook(lambda layer, given, named: None, with_kwargs=True)
    attach(model, per_channel=True, reduce_range=True)
    model.stem.register_forward_pre_hook(_hook)
    detach(model)
    assert list(model.stem._forward_pre_hooks.values()) == [_hook, _hook]
    assert list(model.stem._forward_hooks.values()) == [_hook]
    assert len(model.block._forward_pre_hooks) == len(model.block._forward_pre_hooks_with_kwargs) == 1
    model(images)


def test_layers_that_share_a_weight_still_do_and_what_is_passed_by_name_is_rounded():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    attach(model, per_channel=True, reduce_range=True)
    detach(model)
    assert model[2].weight is model[0].weight

    named, inputs = Named(), torch.randn(8, 6)
    exactly = named(inputs)
    attach(named, per_channel=True, reduce_range=True)
    assert 0 < (named.train()(inputs) - exactly).abs().max() < 0.1
    detach(named)
    assert torch.equal(named(inputs), exactly)
