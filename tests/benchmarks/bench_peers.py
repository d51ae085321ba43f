"""The front that `compress` finds for a CNN on 5,000 MNIST digits, beside what other tools make of the same CNN.

The pipeline of `bench_compression.py` trains the CNN and searches. ONNX Runtime's own static quantization, NNCF, Intel
Neural Compressor and torchao alone are given the trained CNN and the same calibration data (`rival_compressors.py`).
Each tool has an environment of its own below FOLDER, which is made once; one that cannot be made, or does not run, is
named with the reason. All models are timed here, in turns, on one thread.

Prints one JSON line: of every model accuracy on test with its 95 % interval, size (as it is, and zipped) and latency at
batch 1 and 32; and for each model of a peer whether our front dominates it, and by which of its models: one of at most
its size and both latencies, with an accuracy at least as good (`dominated`), or whose interval overlaps (`tied`).

`--folder FOLDER` keeps the environments and the pipeline's store for the next time; by default it is
`heliostat-peers` among the temporary files. `--seed` is the pipeline's.
"""

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import venv
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_compression import compressed
from torch import Tensor

from heliostat.compression.bootstrap import confidence_interval
from heliostat.compression.export import save_onnx
from heliostat.compression.formats import deployed_files, load_model, load_torch
from heliostat.compression.measure import measure_speed
from heliostat.core.imports import use_root

HERE = Path(__file__).parent
TORCH = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
NEEDS: dict[str, list[str]] = {
    "onnxruntime": [],  # Heliostat's own environment has these two
    "torchao": [],
    "nncf": ["nncf", TORCH, "torchao", "onnx", "onnxruntime"],
    "inc_pt": ["neural-compressor-pt", TORCH],
    "inc_onnx": ["onnx-neural-compressor", "prettytable", "scipy"],  # it imports the others, and does not ask for them
}
"""What is installed for a tool, in an environment of its own."""
NOISE = 1.05
"""Two latencies of which one is no more above the other count as equal."""

Row = dict[str, Any]
Run = Callable[[Tensor], Tensor]


# --- what the tools are given, and make -----------------------------------------------------------------------------


def prepare(folder: Path, trained: Path) -> dict[str, Any]:
    """Write what `rival_compressors.py` reads; the data of the task."""
    use_root(folder)
    import cnn  # type: ignore[import-not-found]

    data: dict[str, Any] = cnn.build_data()
    model = torch.nn.Sequential(*list(load_torch(trained).children())[1:]).eval()  # without its augmentation
    torch.save(model.state_dict(), folder / "weights.pt")
    images, labels = data["train"].tensors
    np.savez(folder / "train.npz", images=images.numpy(), labels=labels.numpy())
    save_onnx(model, folder, example=images[:8])
    return data


def make(tool: str, folder: Path) -> str | None:
    """Let a tool make its models; why it did not make all, or None."""
    python = Path(sys.executable)
    if NEEDS[tool]:
        python = folder / "environments" / tool / "bin" / "python"
        if not (installed := python.parents[1] / "installed").exists():
            venv.create(python.parents[1], with_pip=True, clear=True)
            done = subprocess.run([python, "-m", "pip", "install", "-q", *NEEDS[tool]], capture_output=True, text=True)
            if done.returncode:
                return f"pip install {' '.join(NEEDS[tool])}: {_last(done.stderr)}"
            installed.touch()
    command = [python, HERE / "rival_compressors.py", tool, folder]
    done = subprocess.run(command, capture_output=True, text=True)
    return _last(done.stderr) if done.returncode else None


def _last(text: str) -> str:
    return " | ".join(text.strip().splitlines()[-3:])


# --- measuring ------------------------------------------------------------------------------------------------------


def peers(folder: Path) -> Iterator[tuple[str, Run, list[Path]]]:
    """The models that the tools made: name, how each is run, and the files that are deployed."""
    import cnn

    for made in sorted((folder / "points").iterdir()):
        if (file := made / "model.onnx").exists():
            shutil.copy(folder / "model.json", made)
            files = sorted(made.glob("model.onnx*"))  # some tools keep the weights beside the graph
            yield made.name, load_model(made), files
        elif (file := made / "model.pt2").exists():
            import torchao.quantization.pt2e  # noqa: F401  # registers the operators of a quantised graph

            module = torch.export.load(file).module()
            yield made.name, partial(_call, module), [file]
        elif (file := made / "model.pt").exists():
            model = cnn.build_model().eval()
            model.load_state_dict(torch.load(file, weights_only=False), assign=True)
            yield made.name, model, [file]


def _call(module: Any, batch: Tensor) -> Tensor:
    """An exported module raises when it is put into a mode, as modules are to be timed."""
    outputs: Tensor = module(batch)
    return outputs


def measure(models: Mapping[str, tuple[Run, list[Path]]], test: tuple[Tensor, Tensor], example: Tensor) -> list[Row]:
    """The figures of all models; they are timed in turns."""
    from cnn import accuracy

    images, labels = test
    rows = {}
    for name, (run, files) in models.items():
        with torch.inference_mode():
            outputs = torch.cat([run(batch) for batch in images.split(250)])
        low, high = confidence_interval(accuracy, outputs, labels)
        content = b"".join(file.read_bytes() for file in files)
        rows[name] = {
            "model": name,
            "test_accuracy": round(accuracy(outputs, labels), 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "size_mb": len(content) / 1e6,
            "size_zip_mb": round(len(zlib.compress(content)) / 1e6, 4),
        }
    speeds = measure_speed({name: (run, example) for name, (run, _) in models.items()}, min_seconds=0.2)
    for name, speed in speeds.items():
        rows[name] |= {metric: round(speed[metric], 4) for metric in ("latency_ms", "latency_ms_b32")}
    return list(rows.values())


def verdict(peer: Row, front: list[Row]) -> Row:
    """Whether a model of the front is as small and as fast as a peer's, and how its accuracy compares."""
    costs = {"size_mb": 1.0, "latency_ms": NOISE, "latency_ms_b32": NOISE}
    cheaper = [row for row in front if all(row[cost] <= noise * peer[cost] for cost, noise in costs.items())]
    if not cheaper:
        return {"peer": peer["model"], "verdict": "not beaten", "by": None}
    ours = max(cheaper, key=lambda row: (row["test_accuracy"], -row["latency_ms"]))
    if ours["test_accuracy"] >= peer["test_accuracy"]:
        found = "dominated"
    else:
        found = "tied" if ours["high"] >= peer["low"] else "not beaten"
    return {"peer": peer["model"], "verdict": found, "by": ours["model"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "heliostat-peers"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    nodes = compressed(folder, arguments.seed)
    trained, small = Path(nodes["train"]["path"]), Path(nodes["small"]["path"])
    data = prepare(folder, trained)
    shutil.rmtree(folder / "points", ignore_errors=True)
    problems = {tool: problem for tool in NEEDS if (problem := make(tool, folder)) is not None}

    table = json.loads((small / "record.json").read_text())["details"]["table"]
    folders = {row["model"]: small / row["folder"] for row in table if "folder" in row}
    ours = {name: (load_model(path), deployed_files(path)) for name, path in folders.items()}
    floats = {
        "eager fp32": (load_torch(trained).eval(), deployed_files(trained)),
        "onnxruntime fp32": (load_model(folder), [folder / "model.onnx"]),
    }
    theirs = {name: (run, files) for name, run, files in peers(folder)}
    test_images, test_labels = data["test"].tensors
    rows = measure({**floats, **ours, **theirs}, (test_images, test_labels), data["val"].tensors[0][:1])
    front = [row for row in rows if row["model"] in ours]
    figures = {
        "benchmark": "peers",
        "verdicts": [verdict(row, front) for row in rows if row["model"] in theirs],
        "models": rows,
        "not_run": problems,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
