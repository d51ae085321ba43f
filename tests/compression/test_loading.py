"""The public `load_model`: what a folder that may come from somebody else can and cannot do."""

import io
import json
import pickle
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import heliostat
from heliostat.compression.export import save_onnx
from heliostat.compression.formats import save_torch
from heliostat.compression.programs import save_program
from heliostat.core.artifact import Record, digest_files, write_record
from heliostat.errors import ArtifactError


@pytest.fixture
def folder(tmp_path, nets, code, images) -> Path:
    """A torch artifact with its code."""
    folder = tmp_path / "torch"
    save_torch(nets.ConvNet(), folder, reference="nets:ConvNet", model_args={}, example=images, code=code)
    return folder


def rewrite(folder: Path, **fields: object) -> None:
    file = folder / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def recorded(folder: Path) -> None:
    """Make the folder that of a finished node."""
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    record = Record("model", "toy", "train", "train", "train", "f", {}, files=digest_files(folder, names))
    write_record(folder, record)


def test_a_torch_model_is_loaded_only_by_who_trusts_its_code(folder, images):
    with pytest.raises(ArtifactError, match=r"can run anything as you.*load_model\('.*torch', trust_code=True\)"):
        heliostat.load_model(folder)
    assert heliostat.load_model(folder, trust_code=True)(images).shape == (32, 5)


def test_a_model_json_that_names_any_function_runs_nothing(folder, tmp_path):
    marker = tmp_path / "ran"
    shutil.rmtree(folder / "code")
    rewrite(folder, reference="os:system", model_args={"command": f"touch {marker}"}, files={})
    with pytest.raises(ArtifactError, match="trust_code=True"):
        heliostat.load_model(folder)
    assert not marker.exists()


@pytest.mark.parametrize("is_node", [True, False])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda folder: (folder / "code/nets.py").write_text("open('ran', 'w')"), "nets.py is damaged or was changed"),
        (
            lambda folder: (folder / "code/torch.py").write_text("open('ran', 'w')"),
            "torch.py is no part of the artifact",
        ),
        (lambda folder: (folder / "code/nets.py").unlink(), "nets.py is missing"),
        (lambda folder: flip(folder / "weights.pt"), "weights.pt is damaged"),
    ],
)
def test_changed_code_or_weights_are_refused_before_anything_runs(folder, tmp_path, monkeypatch, is_node, change, text):
    monkeypatch.chdir(tmp_path)
    if is_node:
        recorded(folder)
    change(folder)
    with pytest.raises(ArtifactError, match=text):
        heliostat.load_model(folder, trust_code=True)
    assert not (tmp_path / "ran").exists()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_changed_model_json_of_a_finished_node_is_refused(folder):
    recorded(folder)
    rewrite(folder, reference="os:system", model_args={"command": "true"})
    with pytest.raises(ArtifactError, match=r"model\.json is damaged or was changed"):
        heliostat.load_model(folder, trust_code=True)


def test_an_onnx_model_needs_no_trust_and_is_checked_too(tmp_path, nets, images):
    save_onnx(nets.ConvNet(), tmp_path, example=images)
    assert heliostat.load_model(tmp_path)(images).shape == (32, 5)
    flip(tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match=r"model\.onnx is damaged or was changed"):
        heliostat.load_model(tmp_path)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_a_pt2_can_run_code_when_torch_reads_it_so_it_needs_trust(tmp_path, nets, images):
    folder, marker = tmp_path / "pt2", tmp_path / "ran"
    save_program(nets.ConvNet().eval(), folder, example=images, format="pt2")
    with pytest.raises(ArtifactError, match=r"unpickles objects in torch\.export\.load"):
        heliostat.load_model(folder)
    assert heliostat.load_model(folder, trust_code=True)(images).shape == (32, 5)
    poison(folder / "model.pt2", marker)
    with suppress(Exception):  # whatever torch makes of it then
        torch.export.load(folder / "model.pt2")
    assert marker.exists()  # what the refusal is for


def poison(file: Path, marker: Path) -> None:
    """Make the first weight of the archive a pickled object that touches a file when it is read."""
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in content if name.endswith("model_weights_config.json"))
    config = json.loads(content[name])
    payload = next(iter(config["config"].values()))
    payload["use_pickle"] = True
    buffer = io.BytesIO()
    torch.save(Evil(marker), buffer, pickle_module=pickle)
    content[f"{name.rpartition('/')[0]}/{payload['path_name']}"] = buffer.getvalue()
    content[name] = json.dumps(config).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for entry, data in content.items():
            archive.writestr(entry, data)
