"""What Heliostat's compression is compared with: other tools on the same trained CNN, as their own guides use them.

`rival_compressors.py TOOL FOLDER` is run by `bench_peers.py` with the Python of an environment that has the tool. In
FOLDER lie the CNN (`weights.pt`, and `model.onnx` in float), its code, and the training data. What the tool makes of
the CNN is written to `FOLDER/points/NAME/`: `model.onnx`, or where it stays in torch `model.pt2`, or the state of the
module as `model.pt`.

https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
https://github.com/openvinotoolkit/nncf/blob/develop/docs/usage/training_time_compression/pruning/Usage.md
https://github.com/openvinotoolkit/nncf/blob/develop/docs/usage/post_training_compression/post_training_quantization/Usage.md
https://intel.github.io/neural-compressor/latest/docs/source/PT_StaticQuant.html
https://github.com/onnx/neural-compressor/blob/main/docs/quantization.md
https://docs.pytorch.org/ao/stable/pt2e_quantization/index.html
"""

import sys
import traceback
from pathlib import Path

import numpy as np

INPUT = "input"
CALIBRATION_SAMPLES, CALIBRATION_BATCH = 512, 64
PRUNED, EPOCHS, LR = 0.7, 10, 1e-3
"""NNCF's guide prunes its ResNet by so much; it gets as many epochs of fine-tuning as would be asked of a user."""


# --- what all of them are given -------------------------------------------------------------------------------------


def training_data(folder):
    """(n, 1, 28, 28) images and (n,) labels, as arrays."""
    with np.load(folder / "train.npz") as arrays:
        return arrays["images"], arrays["labels"]


def calibration_batches(folder):
    images, _ = training_data(folder)
    return np.split(images[:CALIBRATION_SAMPLES], CALIBRATION_SAMPLES // CALIBRATION_BATCH)


def torch_batches(folder):
    import torch

    return [torch.from_numpy(batch) for batch in calibration_batches(folder)]


def trained_cnn(folder):
    import cnn
    import torch

    model = cnn.build_model()
    model.load_state_dict(torch.load(folder / "weights.pt"))
    return model.eval()


def point(folder, name):
    made = folder / "points" / name
    made.mkdir(parents=True, exist_ok=True)
    return made


def save_exported(module, folder, name):
    import torch

    program = torch.export.export(module, (torch_batches(folder)[0],), dynamic_shapes=free_batch())
    torch.export.save(program, point(folder, name) / "model.pt2")


def free_batch():
    import torch

    return ({0: torch.export.Dim("batch", min=1, max=4096)},)


# --- ONNX Runtime ---------------------------------------------------------------------------------------------------


def onnxruntime_static(folder):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.feeds = iter([{INPUT: batch} for batch in calibration_batches(folder)])

        def get_next(self):
            return next(self.feeds, None)

    prepared = folder / "prepared.onnx"
    quant_pre_process(folder / "model.onnx", prepared)
    for name, options in {
        "onnxruntime static": {},
        "onnxruntime static per channel": {"per_channel": True, "reduce_range": True},
    }.items():
        target = point(folder, name) / "model.onnx"
        quantize_static(prepared, target, Reader(), quant_format=QuantFormat.QDQ, **options)


# --- NNCF -----------------------------------------------------------------------------------------------------------


def nncf_quantize(folder):
    import nncf
    import onnx

    data = nncf.Dataset(calibration_batches(folder), lambda batch: {INPUT: batch})
    quantized = nncf.quantize(onnx.load(folder / "model.onnx"), data)
    onnx.save(quantized, point(folder, "nncf quantize") / "model.onnx")


def nncf_prune(folder):
    import nncf
    import onnx
    import torch
    from mnist import Jitter
    from torch.nn import functional
    from torch.utils.data import DataLoader, TensorDataset

    class Whole(torch.nn.Module):
        """NNCF adds a module for its hooks to what it is given, which a `Sequential` would call like any of its own."""

        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images):
            return self.net(images)

    jitter, example = Jitter(), torch_batches(folder)[0]
    mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
    pruned = nncf.prune(Whole(trained_cnn(folder)), mode=mode, ratio=PRUNED, examples_inputs=example)
    train = TensorDataset(*map(torch.from_numpy, training_data(folder)))
    loader = DataLoader(train, batch_size=64, shuffle=True)
    optimizer = torch.optim.Adam(pruned.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    pruned.train()
    for _ in range(EPOCHS):
        for images, labels in loader:
            loss = functional.cross_entropy(pruned(jitter(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    bare = nncf.strip(pruned.eval(), strip_format=nncf.StripFormat.IN_PLACE, example_input=example)
    file = point(folder, "nncf prune") / "model.onnx"
    names = {"input_names": [INPUT], "output_names": ["output"]}
    torch.onnx.export(bare, (example,), file, dynamo=False, dynamic_axes={INPUT: {0: "batch"}}, **names)
    data = nncf.Dataset(calibration_batches(folder), lambda batch: {INPUT: batch})
    onnx.save(nncf.quantize(onnx.load(file), data), point(folder, "nncf prune and quantize") / "model.onnx")


# --- Intel Neural Compressor ----------------------------------------------------------------------------------------


def inc_pt2e(folder):
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import StaticQuantConfig, convert, prepare

    batches = torch_batches(folder)
    exported = export(trained_cnn(folder), (batches[0],), dynamic_shapes=free_batch())
    prepared = prepare(exported, quant_config=StaticQuantConfig())
    for batch in batches:
        prepared(batch)
    save_exported(convert(prepared), folder, "inc static pt2e")


def inc_onnx(folder):
    from onnx_neural_compressor import data_reader
    from onnx_neural_compressor.quantization import config, quantize

    class Reader(data_reader.CalibrationDataReader):
        def __init__(self):
            self.rewind()

        def get_next(self):
            return next(self.feeds, None)

        def rewind(self):
            self.feeds = iter([{INPUT: batch} for batch in calibration_batches(folder)])

    settings = config.StaticQuantConfig(calibration_data_reader=Reader())
    quantize(str(folder / "model.onnx"), str(point(folder, "inc static onnx") / "model.onnx"), settings)


# --- torchao --------------------------------------------------------------------------------------------------------


def torchao_pt2e(folder):
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    batches = torch_batches(folder)
    exported = torch.export.export(trained_cnn(folder), (batches[0],), dynamic_shapes=free_batch()).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    for batch in batches:
        prepared(batch)
    save_exported(convert_pt2e(prepared), folder, "torchao pt2e")


def torchao_eager(folder):
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    for name, config in {
        "torchao int8 dynamic": Int8DynamicActivationInt8WeightConfig(),
        "torchao int8 weight only": Int8WeightOnlyConfig(),
    }.items():
        model = trained_cnn(folder)
        quantize_(model, config)
        torch.save(model.state_dict(), point(folder, name) / "model.pt")


TOOLS = {
    "onnxruntime": [onnxruntime_static],
    "nncf": [nncf_quantize, nncf_prune],
    "inc_pt": [inc_pt2e],
    "inc_onnx": [inc_onnx],
    "torchao": [torchao_pt2e, torchao_eager],
}


def main(tool, folder):
    """Make what the tool makes; what does not work is told, and the rest goes on."""
    sys.path.insert(0, str(folder))
    problems = []
    for make in TOOLS[tool]:
        try:
            make(folder)
        except Exception:  # of whichever tool
            problems.append(f"{make.__name__}: {traceback.format_exc(limit=-3)}")
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
