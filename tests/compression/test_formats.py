import json
import pickle
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from heliostat.compression.export import save_onnx
from heliostat.compression.formats import deployed_files, load_model, load_torch, read_record, save_torch
from heliostat.compression.prune.structured import structured
from heliostat.errors import ArtifactError, StageError


def _outputs(model, batch):
    with torch.no_grad():
        return model.eval()(batch)


@pytest.fixture
def saved(tmp_path, nets, code, images):
    model = nets.ConvNet(width=4)
    folder = tmp_path / "model"
    files = save_torch(
        model,
        folder,
        reference="nets:ConvNet",
        model_args={"width": 4},
        code=code,
        example=images,
        train_config={"epochs": 1},
    )
    return model, folder, files


def test_a_torch_model_loads_with_the_same_outputs(saved, images):
    model, folder, files = saved
    loaded = load_model(folder)
    assert torch.equal(loaded(images), _outputs(model, images))
    assert (loaded.format, loaded.input_shape, loaded.input_dtype) == ("torch", (1, 8, 8), torch.float32)
    assert sorted(files) == sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    assert read_record(folder)["train_config"] == {"epochs": 1}


def test_a_model_is_saved_and_traced_to_onnx_without_torch_loading_its_compiler(fresh_process):
    source = """
        import sys
        from pathlib import Path
        import torch
        from heliostat.compression.export import save_onnx
        from heliostat.compression.formats import load_model, save_torch

        model, rows = torch.nn.Linear(3, 2), torch.randn(4, 3)
        settings = {"in_features": 3, "out_features": 2}
        save_torch(model, Path("torch"), reference="torch.nn:Linear", model_args=settings, example=rows)
        save_onnx(model, Path("onnx"), example=rows)
        print([load_model(Path(folder))(rows).shape == (4, 2) for folder in ("torch", "onnx")])
        print("torch._dynamo" in sys.modules)
    """
    assert fresh_process(dedent(source)).split("\n")[-3:-1] == ["[True, True]", "False"]


def test_a_pruned_model_loads_in_a_fresh_process_away_from_its_code(tmp_path, nets, code, images, fresh_process):
    pruned, history = structured(nets.ConvNet(), example=images, sparsity=0.5)
    folder = tmp_path / "model"
    save_torch(pruned, folder, reference="nets:ConvNet", model_args={}, history=history, code=code, example=images)
    torch.save(images, tmp_path / "images.pt")
    source = (
        "import torch; from heliostat.compression.formats import load_model;"
        f"print(load_model({str(folder)!r})(torch.load({str(tmp_path / 'images.pt')!r})).tolist())"
    )
    assert torch.allclose(torch.tensor(json.loads(fresh_process(source))), _outputs(pruned, images), atol=1e-6)


def test_a_model_pruned_twice_is_rebuilt(tmp_path, nets, code, images):
    once, first = structured(nets.ConvNet(), example=images, sparsity=0.25)
    twice, second = structured(once, example=images, sparsity=0.5)
    history = [*first, *second]
    save_torch(twice, tmp_path, reference="nets:ConvNet", model_args={}, history=history, code=code, example=images)
    assert torch.equal(load_model(tmp_path)(images), _outputs(twice, images))


def test_two_artifacts_with_different_versions_of_one_module_load_in_one_process(tmp_path, images):
    for version in ("1", "2"):
        source = f"import torch\ndef build():\n    m = torch.nn.Flatten()\n    m.version = {version}\n    return m\n"
        save_torch(
            torch.nn.Flatten(),
            tmp_path / version,
            reference="user_model:build",
            model_args={},
            code={"user_model.py": source.encode()},
            example=images,
        )
    assert [load_torch(tmp_path / v).version for v in ("1", "2", "1")] == [1, 2, 1]


def test_an_installed_constructor_needs_no_code(tmp_path, sequences):
    save_torch(
        torch.nn.Linear(6, 2),
        tmp_path,
        reference="torch.nn:Linear",
        model_args={"in_features": 6, "out_features": 2},
        example=sequences,
    )
    assert load_model(tmp_path)(sequences).shape == (8, 7, 2)


def test_a_loaded_model_gives_no_gradients_and_its_outputs_can_be_trained_on(saved, images):
    outputs = load_model(saved[1])(images)
    assert not outputs.requires_grad
    weight = torch.ones(5, requires_grad=True)
    (outputs * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: (f / "model.json").unlink(), "model.json is missing"),
        (lambda f: (f / "model.json").write_text("{"), "model.json is damaged"),
        (lambda f: (f / "model.json").write_text('{"format": "onxx"}'), "did you mean 'onnx'"),
        (lambda f: (f / "weights.pt").unlink(), "weights.pt is missing"),
        (lambda f: (f / "weights.pt").write_bytes(b"PK"), "weights.pt is damaged"),
        (lambda f: (f / "code" / "nets.py").write_text("raise ValueError('run')"), "nets.py is damaged or was changed"),
        (
            lambda f: (f / "code" / "torch.py").write_text("raise ValueError('run')"),
            "torch.py is no part of the artifact",
        ),
    ],
)
def test_a_damaged_artifact_is_refused_by_name(saved, damage, text):
    damage(saved[1])
    with pytest.raises(ArtifactError, match=text):
        load_model(saved[1])


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(ArtifactError, match="no such folder"):
        load_model(tmp_path / "nothing")


def test_loading_weights_runs_no_code(saved, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "evil",))

    for write in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))):
        write({"stem.weight": Evil()}, saved[1] / "weights.pt")
        with pytest.raises(ArtifactError):
            load_model(saved[1])
    assert not (tmp_path / "evil").exists()


def test_only_weights_and_graph_count_as_deployed(saved, tmp_path, nets, images):
    assert deployed_files(saved[1]) == [saved[1] / "weights.pt"]
    save_onnx(nets.ConvNet(), tmp_path / "onnx", example=images)
    assert deployed_files(tmp_path / "onnx") == [tmp_path / "onnx" / "model.onnx"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ConvNet", {}),
        ("Recurrent", {"kind": "GRU", "bidirectional": True}),
        ("Recurrent", {"kind": "LSTM"}),
        ("Transformer", {}),
        ("mlp", {}),
    ],
)
def test_an_onnx_export_computes_the_same_at_any_batch_size(tmp_path, nets, images, sequences, name, arguments, capfd):
    model = getattr(nets, name)(**arguments)
    inputs = {"ConvNet": images, "Transformer": torch.randint(50, (8, 7)), "mlp": sequences[:, 0]}.get(name, sequences)
    assert save_onnx(model, tmp_path, example=inputs[:1]) == ["model.json", "model.onnx"]
    loaded = load_model(tmp_path)
    assert (loaded.format, loaded.input_dtype) == ("onnx", inputs.dtype)
    for batch in (inputs[:1], inputs[:5]):
        assert torch.allclose(loaded(batch), _outputs(model, batch), atol=1e-5)
        assert torch.allclose(loaded.threads(1)(batch), _outputs(model, batch), atol=1e-5)
    assert read_record(tmp_path)["exporter"] == "trace"
    assert capfd.readouterr() == ("", "")


def test_exporting_leaves_the_model_as_it_was(tmp_path, nets, images):
    model = nets.ConvNet().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_onnx(model, tmp_path, example=images)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_onnx_model_loads_without_the_training_code(tmp_path, nets, images, fresh_process):
    save_onnx(nets.ConvNet(), tmp_path / "model", example=images)
    source = (
        "import torch; from heliostat.compression.formats import load_model;"
        f"print(list(load_model({str(tmp_path / 'model')!r})(torch.zeros(3, 1, 8, 8)).shape))"
    )
    assert fresh_process(source) == "[3, 5]\n"


def test_control_flow_that_depends_on_data_is_refused_with_its_line(tmp_path, nets):
    with pytest.raises(StageError, match=r"nets\.py:\d+.*Python boolean"):
        save_onnx(nets.Branching(), tmp_path, example=torch.randn(4, 4))


def test_a_damaged_onnx_file_is_refused_by_name(tmp_path, nets, images):
    save_onnx(nets.ConvNet(), tmp_path, example=images)
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match=r"model\.onnx is damaged"):
        load_model(tmp_path)
