"""One way to save and to load any model artifact: a folder with `model.json`, which says what it is, and its weights.

    torch   model.json, weights.pt, code/    the user's constructor, its arguments, the pruning history, a state dict
    onnx    model.json, model.onnx           the graph with its weights, as the next three; needs no training code
    pt2     model.json, model.pt2            of `torch.export`, run by torch
    tflite  model.json, model.tflite         run by LiteRT; one row at a time
    pte     model.json, model.pte            run by ExecuTorch; one row at a time

`load_model` gives the same callable for each: a batch in, the outputs out. It trusts the artifact, as a run trusts what
it made; for those of others there is `compression.loading.load_model`. A torch artifact is code: its constructor, whose
source travels in `code/` and is imported from there, is called by name, so that it works whatever becomes of the user's
folder. Its weights are read without unpickling other objects. A `.pt2` is unpickled by torch. The others run no code.
"""

import json
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from heliostat.compression.history import replay
from heliostat.compression.macs import num_macs
from heliostat.compression.runtimes import Run, RunOn, on_torch_threads, run_onnx, run_pt2, run_pte, run_tflite
from heliostat.core.carrier import Files
from heliostat.core.credentials import revealed
from heliostat.core.imports import call_isolated
from heliostat.core.integrity import check_files, digest_of, verify
from heliostat.core.state import map_state
from heliostat.errors import ArtifactError, HeliostatError, nearest


@dataclass(frozen=True)
class Model:
    """A loaded model. Calling it maps a batch to outputs, without gradients, on the CPU."""

    format: str
    input_shape: tuple[int, ...]
    """Of one row: without the batch."""
    input_dtype: torch.dtype
    _run_on: RunOn = field(repr=False)
    """For a number of threads, the function that runs the model on that many."""
    _run: Run = field(repr=False)

    def __call__(self, batch: Tensor) -> Tensor:
        with torch.no_grad():
            return self._run(batch)

    def threads(self, count: int) -> "Model":
        """The same model, running on `count` threads. As loaded it uses as many as torch has."""
        return replace(self, _run=self._run_on(count))


@dataclass(frozen=True)
class Format:
    """How artifacts of one format are loaded, and which of their files are deployed (code and records are not)."""

    deployed: tuple[str, ...]
    run_on: Callable[[Path, Mapping[str, Any]], RunOn]
    why_code: str | None = None
    """What loading runs that is the artifact's own; None where it is read as data."""


# --- any format -----------------------------------------------------------------------------------------------------


def load_model(path: Path | str) -> Model:
    """The model in the folder `path`, which may be the folder of a finished node.

    Raises:
        ArtifactError: there is no model, a file of it is missing or damaged, or its code does not run.
    """
    folder = Path(path)
    record = read_record(folder)
    dtype = getattr(torch, record["input"]["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"{folder / 'model.json'}: {record['input']['dtype']!r} is no dtype of torch")
    run_on = FORMATS[record["format"]].run_on(folder, record)
    return Model(
        format=record["format"],
        input_shape=tuple(record["input"]["shape"]),
        input_dtype=dtype,
        _run_on=run_on,
        _run=run_on(torch.get_num_threads()),
    )


def read_record(folder: Path) -> dict[str, Any]:
    """What `model.json` says. Raises ArtifactError if it, or a file that it stands for, is missing or damaged."""
    if not folder.is_dir():
        raise ArtifactError(f"no model at {folder}: there is no such folder")
    file = folder / "model.json"
    if not file.is_file():
        raise ArtifactError(f"no model in {folder}: model.json is missing")
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        name = record["format"]
        check_files(record.get("files", {}), place=str(file))
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} is damaged: {type(error).__name__}: {error}") from error
    if name not in FORMATS:
        raise ArtifactError(f"{file}: unknown format {name!r}{nearest(name, FORMATS)}")
    for needed in FORMATS[name].deployed:
        if not (folder / needed).is_file():
            raise ArtifactError(f"the model in {folder} is incomplete: {needed} is missing")
    return record


def deployed_files(folder: Path) -> list[Path]:
    """The files whose size counts: weights or graph, without the code and the record beside them."""
    return [folder / name for name in FORMATS[read_record(folder)["format"]].deployed]


def write_record(folder: Path, record: Mapping[str, Any], *, code: Iterable[str] = ()) -> None:
    """Write `model.json`, last: it has the digests of the deployed files and of those of `code`."""
    names = [*FORMATS[record["format"]].deployed, *code]
    files = {name: digest_of(folder / name) for name in names}
    text = json.dumps({**record, "files": files}, indent=2)
    (folder / "model.json").write_text(text + "\n", encoding="utf-8")


def describe_input(example: Tensor) -> dict[str, Any]:
    """The shape of one row of the batch `example`, and its dtype, as JSON values."""
    return {"shape": list(example.shape[1:]), "dtype": str(example.dtype).removeprefix("torch.")}


# --- torch ----------------------------------------------------------------------------------------------------------


def save_torch(
    model: nn.Module,
    folder: Path,
    *,
    reference: str,
    model_args: Mapping[str, Any],
    example: Tensor,
    history: Sequence[Mapping[str, Any]] = (),
    code: Mapping[str, bytes] | None = None,
    train_config: Mapping[str, Any] | None = None,
    macs: int | None = None,
    quantization: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> list[str]:
    """Save a torch model so that `load_model` can build it again. Returns the names of the files written.

    Args:
        reference: `module:attribute` of the constructor, which `model_args` are the keyword arguments of.
        example: a batch of inputs; its shape and dtype are recorded.
        history: what `replay` has to do to a freshly built model before the weights fit.
        code: the user's own source files that the constructor needs: path relative to the import root, and content.
        train_config: kept in the record for whoever trains the model on.
        macs: of one row; counted, unless given.
        quantization: what was quantised and how, for the record.
        seed: of the generators when the model was built: what its constructor draws and keeps out of its state, such
            as buffers that are not persistent, is drawn again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(map_state(model.state_dict(), _compact), folder / "weights.pt")
    for path, content in (code or {}).items():
        file = folder / "code" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    record = {
        "format": "torch",
        "reference": reference,
        "model_args": dict(model_args),
        "history": list(history),
        "input": describe_input(example),
        "macs": num_macs(model, example) if macs is None else macs,
        "quantization": None if quantization is None else dict(quantization),
        "train_config": None if train_config is None else dict(train_config),
        "seed": seed,
    }
    sources = [f"code/{path}" for path in code or {}]
    write_record(folder, record, code=sources)
    return ["model.json", "weights.pt", *sources]


def _compact(tensor: Tensor) -> Tensor:
    """The tensor on CPU, with no more memory behind it than its own: torch writes all that a view is a part of."""
    tensor = tensor.detach().cpu()
    is_plain = type(tensor) is Tensor and tensor.layout == torch.strided
    return tensor.clone() if is_plain and tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def load_torch(folder: Path) -> nn.Module:
    """The torch model in `folder`, in eval mode. Raises ArtifactError as `load_model` does."""
    record = read_record(folder)
    if record["format"] != "torch":
        raise ArtifactError(f"the model in {folder} is in the format {record['format']!r}, not a torch model")
    check_code(folder, record.get("files"))
    try:
        with _drawing_from(record.get("seed")):
            model: nn.Module = call_isolated(record["reference"], folder / "code", revealed(record["model_args"]))
            _materialize(model, record["input"])
        replay(model, record["history"])
    except HeliostatError as error:
        raise ArtifactError(f"the model in {folder} cannot be built: {error}") from error
    except Exception as error:  # the user's constructor may raise anything
        raise ArtifactError(f"the model in {folder} cannot be built: {type(error).__name__}: {error}") from error
    try:
        model.load_state_dict(torch.load(folder / "weights.pt", map_location="cpu", weights_only=True))
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ArtifactError(f"{folder / 'weights.pt'} is damaged or does not fit the model: {error}") from error
    return model.eval()


def _materialize(model: nn.Module, described: Mapping[str, Any]) -> None:
    """Give lazy layers their sizes, which the history and the weights need, by inputs as `describe_input` says."""
    if any(isinstance(module, LazyModuleMixin) for module in model.modules()):
        rows = torch.zeros(2, *described["shape"], dtype=getattr(torch, described["dtype"]))
        with torch.no_grad():
            model.eval()(rows)
            if any(isinstance(module, LazyModuleMixin) for module in model.modules()):
                model.train()(rows)  # buffers that it changes are loaded with the weights


@contextmanager
def _drawing_from(seed: int | None) -> Iterator[None]:
    """Within it random numbers are those of the seed, if there is one; after it they go on as before."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def check_code(folder: Path, files: Files | None) -> None:
    """Raise ArtifactError unless `code/` is as it was written. None is of old artifacts, which have no digests.

    A file too many counts as well: it may be imported in place of another, and so may bytecode in `__pycache__`.
    """
    if files is None:
        return
    found = {file.relative_to(folder).as_posix() for file in (folder / "code").rglob("*") if not file.is_dir()}
    if extra := sorted(found - files.keys()):
        raise ArtifactError(f"{folder / extra[0]} is no part of the artifact and would run with it; delete it")
    verify(folder, {name: entry for name, entry in files.items() if name.startswith("code/")})


def _run_torch(folder: Path, record: Mapping[str, Any]) -> RunOn:
    return on_torch_threads(load_torch(folder))


FORMATS: dict[str, Format] = {
    "torch": Format(deployed=("weights.pt",), run_on=_run_torch, why_code="calls the function that model.json names"),
    "onnx": Format(deployed=("model.onnx",), run_on=run_onnx),
    "pt2": Format(deployed=("model.pt2",), run_on=run_pt2, why_code="unpickles objects in torch.export.load"),
    "tflite": Format(deployed=("model.tflite",), run_on=run_tflite),
    "pte": Format(deployed=("model.pte",), run_on=run_pte),
}
"""Every format that `load_model` knows."""
