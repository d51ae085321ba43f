import pytest
import torch

from heliostat.compression.export import save_onnx
from heliostat.compression.formats import load_model, read_record, save_torch
from heliostat.compression.measure import compare_outputs
from heliostat.compression.quantize.post_training import dynamic, layers_of, static, weight_only
from heliostat.compression.size import num_params, size_mb
from heliostat.compression.verdict import has_int8_instructions
from heliostat.errors import ArtifactError, SpecError, StageError


@pytest.fixture
def exported(tmp_path, nets, images):
    model = nets.ConvNet(width=32)
    save_onnx(model, tmp_path / "float", example=images)
    return tmp_path / "float"


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_static_int8_stays_close_to_the_float_model(tmp_path, exported, images, method, capfd):
    static(exported, tmp_path / "int8", calibration=images.split(8), method=method)
    figures = compare_outputs(load_model(exported), load_model(tmp_path / "int8"), images)
    assert figures["mean_abs_diff"] < 0.02
    quantization = read_record(tmp_path / "int8")["quantization"]
    assert quantization["calibration_rows"] == 32
    assert quantization["int8_ops"] == {"Conv": 4, "Gemm": 1}
    assert quantization["float_ops"] == {}
    assert capfd.readouterr() == ("", "")


def test_static_int8_is_a_smaller_file_with_the_same_parameters(tmp_path, exported, images):
    static(exported, tmp_path / "int8", calibration=[images])
    assert size_mb(tmp_path / "int8") < 0.75 * size_mb(exported)
    assert num_params(tmp_path / "int8") == num_params(exported)


def test_a_quantised_model_takes_any_batch_size(tmp_path, exported, images):
    static(exported, tmp_path / "int8", calibration=[images[:4]])
    model = load_model(tmp_path / "int8")
    assert [model(images[:n]).shape[0] for n in (1, 3, 32)] == [1, 3, 32]


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ([], "no data"),
        ([torch.zeros(0, 1, 8, 8)], "no data"),
        ([torch.zeros(2, 1, 8, 8), torch.full((2, 1, 8, 8), float("nan"))], "rows 2 to 3 are not finite"),
        ([torch.full((2, 1, 8, 8), float("inf"))], "not finite"),
    ],
)
def test_empty_or_non_finite_calibration_data_is_refused(tmp_path, exported, batches, text):
    with pytest.raises(StageError, match=text):
        static(exported, tmp_path / "int8", calibration=batches)


def test_an_unknown_calibration_method_is_refused(tmp_path, exported, images):
    with pytest.raises(SpecError, match="minmax, entropy, percentile"):
        static(exported, tmp_path / "int8", calibration=[images], method="mean")


def test_dynamic_leaves_convolutions_in_float_unless_told(tmp_path, exported, images, capfd):
    dynamic(exported, tmp_path / "some")
    dynamic(exported, tmp_path / "all", convolutions=True)
    some, every = (read_record(tmp_path / n)["quantization"] for n in ("some", "all"))
    assert (some["int8_ops"], some["float_ops"]) == ({"MatMul": 1}, {"Conv": 4})
    assert (every["int8_ops"], every["float_ops"]) == ({"Conv": 4, "MatMul": 1}, {})
    assert num_params(tmp_path / "all") == num_params(exported)
    for name in ("some", "all"):
        assert compare_outputs(load_model(exported), load_model(tmp_path / name), images)["mean_abs_diff"] < 0.02
    assert capfd.readouterr() == ("", "")


def test_dynamic_without_anything_to_quantise_points_to_static(tmp_path, images):
    save_onnx(torch.nn.Conv2d(1, 2, 3), tmp_path / "float", example=images)
    with pytest.raises(StageError, match=r"1 Conv.*static"):
        dynamic(tmp_path / "float", tmp_path / "int8")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("Recurrent", {"kind": "LSTM"}), ("Recurrent", {"kind": "GRU"}), ("Transformer", {}), ("mlp", {})],
)
@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_every_kind_of_network_quantises(tmp_path, nets, sequences, name, arguments, method):
    model = getattr(nets, name)(**arguments)
    inputs = {"Transformer": torch.randint(50, (8, 7)), "mlp": sequences[:, 0]}.get(name, sequences)
    save_onnx(model, tmp_path / "float", example=inputs)
    if method == "static":
        static(tmp_path / "float", tmp_path / "int8", calibration=[inputs])
    else:
        dynamic(tmp_path / "float", tmp_path / "int8")
    quantization = read_record(tmp_path / "int8")["quantization"]
    assert (
        compare_outputs(load_model(tmp_path / "float"), load_model(tmp_path / "int8"), inputs)["mean_abs_diff"] < 0.05
    )
    if arguments.get("kind") == "GRU":
        assert quantization["float_ops"] == {"GRU": 1}


def test_only_a_float_onnx_artifact_can_be_quantised(tmp_path, exported, images):
    save_torch(torch.nn.Flatten(), tmp_path / "torch", reference="torch.nn:Flatten", model_args={}, example=images)
    with pytest.raises(ArtifactError, match="export it to ONNX"):
        dynamic(tmp_path / "torch", tmp_path / "int8")
    dynamic(exported, tmp_path / "int8")
    with pytest.raises(ArtifactError, match="quantised already"):
        static(tmp_path / "int8", tmp_path / "again", calibration=[images])


def test_skipped_layers_stay_in_float_and_a_pattern_that_matches_none_is_refused(tmp_path, exported, images):
    layers = layers_of(exported)
    assert len(layers) == 5
    static(exported, tmp_path / "int8", calibration=[images], skip=["/head/*", "/stem/*"])
    quantization = read_record(tmp_path / "int8")["quantization"]
    assert (quantization["int8_ops"], quantization["float_ops"]) == ({"Conv": 3}, {"Conv": 1, "Gemm": 1})
    with pytest.raises(SpecError, match=r"skip: '/haed/\*' matches no layer"):
        static(exported, tmp_path / "int8", calibration=[images], skip=["/haed/*"])


def test_the_record_says_what_ran_and_whether_the_processor_is_fast_at_it(tmp_path, exported, images):
    static(exported, tmp_path / "int8", calibration=[images])
    quantization = read_record(tmp_path / "int8")["quantization"]
    assert quantization["backend"] == "onnxruntime"
    assert quantization["int8_instructions"] is has_int8_instructions()


@pytest.mark.parametrize(("bits", "off_by"), [(8, 0.01), (4, 0.2)])
def test_weight_only_shrinks_the_matrix_products_of_a_transformer(tmp_path, nets, bits, off_by):
    tokens = torch.randint(50, (8, 7))
    save_onnx(nets.Transformer(), tmp_path / "float", example=tokens)
    weight_only(tmp_path / "float", tmp_path / "small", bits=bits, group_size=16)
    figures = compare_outputs(load_model(tmp_path / "float"), load_model(tmp_path / "small"), tokens)
    assert 0 < figures["mean_abs_diff"] < off_by
    quantization = read_record(tmp_path / "small")["quantization"]
    assert quantization["bits"] == bits
    assert quantization["int8_ops"] == {"MatMul": 9}
    assert quantization["float_ops"] == {}


def test_fewer_bits_make_a_smaller_file_and_skipped_layers_stay_exact(tmp_path, nets):
    inputs = torch.randn(4, 64)
    save_onnx(nets.mlp(64, 256, 5), tmp_path / "float", example=inputs)
    weight_only(tmp_path / "float", tmp_path / "8", bits=8)
    weight_only(tmp_path / "float", tmp_path / "4", bits=4)
    assert size_mb(tmp_path / "4") < 0.7 * size_mb(tmp_path / "8")
    assert size_mb(tmp_path / "8") < 0.4 * size_mb(tmp_path / "float")
    first, second = layers_of(tmp_path / "float")
    weight_only(tmp_path / "float", tmp_path / "some", bits=8, skip=[first])
    assert read_record(tmp_path / "some")["quantization"]["int8_ops"] == {"MatMul": 1}
    assert second not in first
