"""What `torch.export` starts: `.pt2` here; `.tflite` and `.pte` where their packages are installed."""

from importlib.util import find_spec

import pytest
import torch

from heliostat.compression.formats import deployed_files, load_model, read_record
from heliostat.compression.programs import save_program
from heliostat.compression.size import num_nonzero, num_params, size_mb
from heliostat.errors import ArtifactError, StageError


def _outputs(model, batch):
    with torch.no_grad():
        return model.eval()(batch)


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


FORMATS = [
    "pt2",
    pytest.param("tflite", marks=needs("litert_torch")),
    pytest.param("pte", marks=needs("executorch")),
]


@pytest.mark.parametrize("format", FORMATS)
def test_an_exported_file_computes_the_same_at_any_batch_size_and_on_any_threads_and_has_as_many_parameters(
    tmp_path, nets, images, format
):
    model = nets.ConvNet()
    assert save_program(model, tmp_path, example=images, format=format) == ["model.json", f"model.{format}"]
    loaded = load_model(tmp_path)
    assert (loaded.format, loaded.input_shape, loaded.input_dtype) == (format, (1, 8, 8), torch.float32)
    for batch in (images[:1], images[:5]):
        for threads in (1, 2, 1):
            assert torch.allclose(loaded.threads(threads)(batch), _outputs(model, batch), atol=1e-5)
    first, second = loaded(images[:1]), loaded(images[1:2])
    assert torch.allclose(first, _outputs(model, images[:1]), atol=1e-5)  # a runtime may use its memory again
    assert not torch.equal(first, second)

    count = sum(p.numel() for p in model.parameters())
    assert num_params(tmp_path) == count
    assert num_nonzero(tmp_path) == sum(int(p.count_nonzero()) for p in model.parameters())
    assert deployed_files(tmp_path) == [tmp_path / f"model.{format}"]
    assert size_mb(tmp_path) > count * 4 / 1e6
    assert read_record(tmp_path)["macs"] > 0
    assert images[0].numpy().tobytes() not in (tmp_path / f"model.{format}").read_bytes()


@pytest.mark.parametrize("name", ["Transformer", "Recurrent"])
def test_attention_and_recurrent_layers_are_exported(tmp_path, nets, sequences, name):
    model = getattr(nets, name)()
    inputs = torch.randint(50, (8, 7)) if name == "Transformer" else sequences
    save_program(model, tmp_path, example=inputs, format="pt2")
    assert torch.allclose(load_model(tmp_path)(inputs[:3]), _outputs(model, inputs[:3]), atol=1e-5)


@pytest.mark.slow
def test_an_exported_file_loads_without_the_training_code(tmp_path, nets, images, fresh_process):
    save_program(nets.ConvNet(), tmp_path / "model", example=images, format="pt2")
    source = (
        "import torch; from heliostat.compression.formats import load_model;"
        f"print(list(load_model({str(tmp_path / 'model')!r})(torch.zeros(3, 1, 8, 8)).shape))"
    )
    assert fresh_process(source) == "[3, 5]\n"


def test_control_flow_that_depends_on_data_is_refused_with_its_line_and_code(tmp_path, nets, capfd):
    with pytest.raises(StageError, match=r"nets\.py:\d+: `return self.head\(x\) if x.sum\(\) > 0 .*torch\.where"):
        save_program(nets.Branching(), tmp_path, example=torch.randn(4, 4), format="pt2")
    assert capfd.readouterr().out == ""


def test_a_model_with_several_outputs_is_refused(tmp_path):
    with pytest.raises(StageError, match="only a model with one output tensor"):
        save_program(torch.nn.GRU(6, 4), tmp_path, example=torch.randn(2, 3, 6), format="pt2")


def test_a_damaged_file_is_refused_by_name(tmp_path, nets, images):
    save_program(torch.nn.Flatten(), tmp_path, example=images, format="pt2")
    (tmp_path / "model.pt2").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match=r"model\.pt2 is damaged"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("format", "package", "extra"),
    [
        pytest.param(
            "tflite",
            "litert_torch",
            "litert",
            marks=pytest.mark.skipif(find_spec("litert_torch") is not None, reason="it is installed"),
        ),
        pytest.param(
            "pte",
            "executorch",
            "executorch",
            marks=pytest.mark.skipif(find_spec("executorch") is not None, reason="it is installed"),
        ),
    ],
)
def test_without_the_package_of_a_format_the_extra_that_brings_it_is_named(
    tmp_path, nets, images, format, package, extra
):
    text = rf"{package} is not installed; type: pip install 'heliostat\[{extra}\]'"
    with pytest.raises(StageError, match=text):
        save_program(nets.ConvNet(), tmp_path, example=images, format=format)
    save_program(nets.ConvNet(), tmp_path, example=images, format="pt2")
    file = (tmp_path / "model.pt2").rename(tmp_path / f"model.{format}")
    record = tmp_path / "model.json"
    record.write_text(record.read_text().replace('"pt2"', f'"{format}"'))
    with pytest.raises(ArtifactError, match=rf"{file.name} cannot be run: .* is not installed; type: pip install"):
        load_model(tmp_path)
