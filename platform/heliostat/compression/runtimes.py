"""How the file of an artifact is run, one function for each format: from its folder to a callable for so many threads.

A `.tflite` and a `.pte` take one row at a time, as devices do, so a batch is as many runs. A runtime that comes with an
extra is imported when it is needed, and what is missing is named with the extra that brings it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heliostat.compression.quiet import quiet
from heliostat.core.extras import missing
from heliostat.errors import ArtifactError

Run = Callable[[Tensor], Tensor]
RunOn = Callable[[int], Run]
"""For a number of threads, the function that runs the model on that many."""


def on_torch_threads(model: Run) -> RunOn:
    """A torch module, or what is called like one, on as many of torch's threads as wanted."""

    def run_on(threads: int) -> Run:
        def run(batch: Tensor) -> Tensor:
            before = torch.get_num_threads()
            if before == threads:
                return model(batch)
            torch.set_num_threads(threads)
            try:
                return model(batch)
            finally:
                torch.set_num_threads(before)

        return run

    return run_on


def row_by_row(run_row: Run) -> Run:
    """What takes one row, as what takes a batch."""
    return lambda batch: (
        run_row(batch) if len(batch) == 1 else torch.cat([run_row(row) for row in torch.split(batch, 1)])
    )


def run_onnx(folder: Path, record: Mapping[str, Any]) -> RunOn:
    """`model.onnx` by ONNX Runtime."""
    import onnxruntime

    file = folder / "model.onnx"

    def run_on(threads: int) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors; the warnings are about the graph's optimisation
        with _blamed_on(file):  # its exceptions have no common base but Exception
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        name, output = session.get_inputs()[0].name, session.get_outputs()[0].name

        def run(batch: Tensor) -> Tensor:
            return torch.from_numpy(session.run([output], {name: batch.numpy()})[0])

        return run

    return run_on


def run_pt2(folder: Path, record: Mapping[str, Any]) -> RunOn:
    """`model.pt2` by torch, operator by operator. It is read by `torch.export.load`, which trusts the file."""
    file = folder / "model.pt2"
    with _blamed_on(file), quiet():
        if record["quantization"]:
            import torchao.quantization.pt2e  # noqa: F401  # registers the operators of a quantised graph
        program = torch.export.load(file)
    return on_torch_threads(program.module(check_guards=False))


def run_tflite(folder: Path, record: Mapping[str, Any]) -> RunOn:
    """`model.tflite` by LiteRT."""
    file = folder / "model.tflite"
    _require("ai_edge_litert", file)
    from ai_edge_litert.interpreter import Interpreter

    def run_on(threads: int) -> Run:
        with _blamed_on(file):
            interpreter = Interpreter(str(file), num_threads=threads)
            interpreter.allocate_tensors()
        (given,), (answer,) = interpreter.get_input_details(), interpreter.get_output_details()

        def run_row(row: Tensor) -> Tensor:
            interpreter.set_tensor(given["index"], row.numpy().astype(given["dtype"], copy=False))  # tokens are int32
            interpreter.invoke()
            return torch.from_numpy(interpreter.get_tensor(answer["index"]))

        return row_by_row(run_row)

    return run_on


def run_pte(folder: Path, record: Mapping[str, Any]) -> RunOn:
    """`model.pte` by ExecuTorch, whose threads are the process's: the number holds for every `.pte` in it."""
    file = folder / "model.pte"
    _require("executorch", file)
    with quiet():
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

    def load() -> Any:
        with _blamed_on(file):
            return Runtime.get().load_program(file).load_method("forward")

    def run_on(threads: int) -> Run:
        loaded: dict[int, Any] = {}
        """The method, by the number of changes of the threads before it was loaded: it dies with its threads."""

        def run_row(row: Tensor) -> Tensor:
            if portable_lib._threadpool_get_thread_count() != threads:
                portable_lib._unsafe_reset_threadpool(threads)
                _thread_changes.append(threads)
            if (now := len(_thread_changes)) not in loaded:
                loaded.clear()
                loaded[now] = load()
            (answer,) = loaded[now].execute([row])
            return torch.clone(answer)  # the memory is the program's, which the next run overwrites

        return row_by_row(run_row)

    load()
    return run_on


_thread_changes: list[int] = []
"""The numbers of threads that ExecuTorch has had in this process, after the first."""


def _require(package: str, file: Path) -> None:
    if (problem := missing(package)) is not None:
        raise ArtifactError(f"{file} cannot be run: {problem}")


@contextmanager
def _blamed_on(file: Path) -> Iterator[None]:
    """What a runtime raises while it reads `file`, as an ArtifactError."""
    try:
        yield
    except Exception as error:  # runtimes raise all kinds
        raise ArtifactError(f"{file} is damaged or does not run here: {error}") from error
