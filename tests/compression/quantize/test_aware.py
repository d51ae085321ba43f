"""Training with the rounding of int8."""

import pytest
import torch
from torch import nn

from heliostat.compression.export import save_onnx
from heliostat.compression.formats import load_model
from heliostat.compression.quantize.aware import attach, detach
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
