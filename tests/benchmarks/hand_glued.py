"""The job of `pipelines/mnist.yaml`, glued by hand from the guides of Ray, MLflow, Torch-Pruning and ONNX Runtime.

What Heliostat is compared with. The model, the data, the search space, the numbers of trials and epochs and the
compression settings come from the pipeline's own files; the libraries are called as the guides call them.
Prints one JSON line: the wall seconds of each part, and what the models reach. Importing the libraries is outside of
them, and inside of what `bench_demo.py` measures.

https://docs.ray.io/en/latest/tune/examples/includes/mlflow_ptl_example.html
https://docs.ray.io/en/latest/train/getting-started-pytorch.html
https://github.com/VainF/Torch-Pruning
https://docs.pytorch.org/tutorials/beginner/knowledge_distillation_tutorial.html
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

import copy
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import mlflow
import onnx
import onnxruntime
import ray
import ray.train
import ray.train.torch
import torch
import torch_pruning
import yaml
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.hyperopt import HyperOptSearch
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

PIPELINES = Path(__file__).resolve().parents[2] / "pipelines"
sys.path.insert(0, str(PIPELINES))
os.environ["PYTHONPATH"] = str(PIPELINES)  # for the workers of Ray

import mnist  # noqa: E402

CALIBRATION_SAMPLES = 256
TEACHER_WEIGHT = 0.7


# --- training -------------------------------------------------------------------------------------------------------


def warmup_then_cosine(optimizer, *, epochs, warmup_epochs, steps_per_epoch):
    warmup, total = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    return LambdaLR(optimizer, factor)


def train_epoch(model, loader, optimizer, scheduler, loss_fn=None):
    model.train()
    for images, labels in loader:
        outputs = model(images)
        loss = loss_fn(outputs, images, labels) if loss_fn else functional.cross_entropy(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def evaluate(model, dataset):
    model.eval()
    with torch.no_grad():
        batches = [(model(images), labels) for images, labels in DataLoader(dataset, batch_size=256)]
    outputs, labels = (torch.cat(parts) for parts in zip(*batches))
    return {"loss": functional.cross_entropy(outputs, labels).item(), "accuracy": mnist.accuracy(outputs, labels)}


def fit(model, data, *, epochs, batch_size, lr, warmup_epochs=0.0, loss_fn=None):
    """Train in this process; yields the validation figures after every epoch."""
    loader = DataLoader(data["train"], batch_size=batch_size, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    scheduler = warmup_then_cosine(optimizer, epochs=epochs, warmup_epochs=warmup_epochs, steps_per_epoch=len(loader))
    for _ in range(epochs):
        train_epoch(model, loader, optimizer, scheduler, loss_fn)
        yield {f"val_{name}": value for name, value in evaluate(model, data["val"]).items()}


def fit_best(model, data, **options):
    """Train in this process and go back to the best epoch."""
    best_accuracy, best_state = -1.0, {}
    for row in fit(model, data, **options):
        if row["val_accuracy"] > best_accuracy:
            best_accuracy, best_state = row["val_accuracy"], copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return model


# --- search ---------------------------------------------------------------------------------------------------------


def trial(config):
    recipe = config["recipe"]
    rows = fit(
        mnist.build_model(width=config["model_args.width"]),
        mnist.build_data(),
        epochs=recipe["epochs"],
        batch_size=recipe["batch_size"],
        lr=config["optimizer.lr"],
        warmup_epochs=recipe["scheduler"]["warmup_epochs"],
    )
    for row in rows:
        tune.report(row)


def search(stage, *, tracking_uri, folder):
    dimensions = {"loguniform": lambda bounds: tune.loguniform(*bounds), "choice": tune.choice}
    space = {}
    for path, dimension in stage["space"].items():
        ((kind, argument),) = dimension.items()
        space[path] = dimensions[kind](argument)
    asha = stage["scheduler"]["asha"]
    tuner = tune.Tuner(
        trial,
        param_space={**space, "recipe": stage["train"]},
        tune_config=tune.TuneConfig(
            metric=stage["objective"]["metric"],
            mode=stage["objective"]["mode"],
            num_samples=stage["trials"],
            search_alg=HyperOptSearch(),
            scheduler=ASHAScheduler(
                max_t=stage["train"]["epochs"],
                grace_period=asha["grace_epochs"],
                reduction_factor=asha["reduction_factor"],
            ),
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=folder,
            callbacks=[MLflowLoggerCallback(tracking_uri=tracking_uri, experiment_name="by-hand")],
        ),
    )
    return tuner.fit().get_best_result().config


# --- distributed training -------------------------------------------------------------------------------------------


def train_worker(config):
    world_size = ray.train.get_context().get_world_size()
    data = mnist.build_data()
    model = ray.train.torch.prepare_model(mnist.build_model(width=config["width"]))
    loader = DataLoader(data["train"], batch_size=config["batch_size"] // world_size, shuffle=True)
    loader = ray.train.torch.prepare_data_loader(loader)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
    scheduler = warmup_then_cosine(
        optimizer,
        epochs=config["epochs"],
        warmup_epochs=config["scheduler"]["warmup_epochs"],
        steps_per_epoch=len(loader),
    )
    for epoch in range(config["epochs"]):
        if world_size > 1:
            loader.sampler.set_epoch(epoch)
        train_epoch(model, loader, optimizer, scheduler)
        metrics = {f"val_{name}": value for name, value in evaluate(model, data["val"]).items()}
        with tempfile.TemporaryDirectory() as checkpoint:
            if ray.train.get_context().get_world_rank() == 0:
                torch.save(model.module.state_dict(), Path(checkpoint) / "model.pt")
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(checkpoint))


def train(stage, *, workers, params, folder):
    width, lr = params["model_args.width"], params["optimizer.lr"]
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={**stage, "width": width, "lr": lr},
        scaling_config=ray.train.ScalingConfig(num_workers=workers),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=folder,
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="val_accuracy", checkpoint_score_order="max"
            ),
        ),
    )
    result = trainer.fit()
    checkpoint, metrics = max(result.best_checkpoints, key=lambda pair: pair[1]["val_accuracy"])
    model = mnist.build_model(width=width)
    with checkpoint.as_directory() as path:
        model.load_state_dict(torch.load(Path(path) / "model.pt"))
    with mlflow.start_run(run_name="train"):
        mlflow.log_params({"width": width, "lr": lr, **stage})
        mlflow.log_metrics({name: value for name, value in metrics.items() if name.startswith("val_")})
    return model.eval()


# --- compression ----------------------------------------------------------------------------------------------------


def prune(model, stage, *, sparsity, batch_size, data):
    model = copy.deepcopy(model)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        data["train"][:1][0],
        importance=torch_pruning.importance.GroupMagnitudeImportance(),
        pruning_ratio=sparsity,
        ignored_layers=[layer for layer in model.modules() if getattr(layer, "out_features", None) == 10],
    )
    pruner.step()
    return fit_best(model, data, epochs=stage["finetune_epochs"], batch_size=batch_size, lr=stage["optimizer"]["lr"])


def distill(teacher, stage, *, data):
    temperature = stage["temperature"]

    def loss_fn(outputs, images, labels):
        with torch.no_grad():
            soft_targets = functional.log_softmax(teacher(images) / temperature, dim=1)
        soft_outputs = functional.log_softmax(outputs / temperature, dim=1)
        soft_loss = functional.kl_div(soft_outputs, soft_targets, reduction="batchmean", log_target=True)
        hard_loss = functional.cross_entropy(outputs, labels)
        return TEACHER_WEIGHT * temperature**2 * soft_loss + (1 - TEACHER_WEIGHT) * hard_loss

    return fit_best(
        mnist.build_model(**stage["model_args"]),
        data,
        epochs=stage["epochs"],
        batch_size=stage["batch_size"],
        lr=stage["optimizer"]["lr"],
        warmup_epochs=stage["scheduler"]["warmup_epochs"],
        loss_fn=loss_fn,
    )


class Calibration(CalibrationDataReader):
    def __init__(self, images, batch_size=64):
        self.batches = iter(images.split(batch_size))

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}


def quantize(model, path, *, data):
    images = data["train"][:CALIBRATION_SAMPLES][0]
    torch.onnx.export(
        model.eval(),
        (images[:2],),
        path.with_suffix(".fp32.onnx"),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )
    quant_pre_process(path.with_suffix(".fp32.onnx"), path.with_suffix(".prepared.onnx"))
    quantize_static(
        path.with_suffix(".prepared.onnx"),
        path,
        Calibration(images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,  # the guide's advice for AVX2
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


# --- measuring and choosing -----------------------------------------------------------------------------------------


def latency_ms(model, images, *, runs):
    seconds = []
    with torch.no_grad():
        for _ in range(10):
            model(images)
        for _ in range(runs):
            start = time.perf_counter()
            model(images)
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def measure(model, path, *, data):
    figures = {"size_mb": path.stat().st_size / 1e6}
    for split in ("val", "test"):
        images, labels = data[split].tensors
        with torch.no_grad():
            figures[f"{split}_accuracy"] = mnist.accuracy(model(images), labels)
    images = data["val"].tensors[0]
    return figures | {
        "latency_ms": latency_ms(model, images[:1], runs=200),
        "latency_ms_b32": latency_ms(model, images[:32], runs=50),
    }


def compress(trained, stages, *, batch_size, data, folder):
    """Every variant, one after the other, with its figures."""
    models = {"train": trained}
    for sparsity in stages["prune"]["matrix"]["sparsity"]:
        models[f"prune {sparsity}"] = prune(
            trained, stages["prune"]["config"], sparsity=sparsity, batch_size=batch_size, data=data
        )
    models["student"] = distill(trained, stages["student"]["config"], data=data)
    torch.set_num_threads(1)
    figures = {}
    for name, model in models.items():
        path = folder / f"{name}.pt"
        torch.save(model.eval().state_dict(), path)
        figures[name] = measure(model, path, data=data)
        path = folder / f"{name} int8.onnx"
        figures[f"{name} int8"] = measure(quantize(model, path, data=data), path, data=data)
    return figures


def choose(figures, *, max_drop):
    lowest = figures["train"]["val_accuracy"] - max_drop - 1e-9
    allowed = [name for name, row in figures.items() if row["val_accuracy"] >= lowest]
    return min(allowed, key=lambda name: figures[name]["latency_ms"] * figures[name]["size_mb"])


def main():
    stages = {s["name"]: s for s in yaml.safe_load((PIPELINES / "mnist.yaml").read_text())["stages"]}
    seconds, last = {}, time.perf_counter()

    def lap(part):
        nonlocal last
        now = time.perf_counter()
        seconds[part], last = round(now - last, 1), now

    with tempfile.TemporaryDirectory() as folder:
        tracking_uri = f"sqlite:///{folder}/mlflow.db"
        ray.init()
        lap("ray_start")
        params = search(stages["search"]["config"], tracking_uri=tracking_uri, folder=folder)
        lap("search")
        mlflow.set_tracking_uri(tracking_uri)
        mlflow.set_experiment("by-hand")
        trained = train(
            stages["train"]["config"], workers=stages["train"]["resources"]["workers"], params=params, folder=folder
        )
        lap("training")
        batch_size = stages["train"]["config"]["batch_size"]
        figures = compress(trained, stages, batch_size=batch_size, data=mnist.build_data(), folder=Path(folder))
        chosen = choose(figures, max_drop=stages["best"]["config"]["max_drop"]["val_accuracy"])
        with mlflow.start_run(run_name="best"):
            mlflow.log_params({"chosen": chosen})
            mlflow.log_metrics(figures[chosen])
            if chosen.endswith("int8"):
                mlflow.onnx.log_model(onnx.load(Path(folder) / f"{chosen}.onnx"), name="model")
        lap("compression")
        ray.shutdown()

    figures = {name: {key: round(value, 4) for key, value in row.items()} for name, row in figures.items()}
    seconds["total"] = round(sum(seconds.values()), 1)
    print(
        json.dumps(
            {
                "benchmark": "hand_glued",
                "seconds": seconds,
                "params": {path: params[path] for path in stages["search"]["config"]["space"]},
                "chosen": chosen,
                "models": figures,
            }
        )
    )


if __name__ == "__main__":
    main()
