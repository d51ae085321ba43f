"""What a pipeline is: frozen objects, the same whether they come from YAML or from Python.

A stage's config is held as it was written (a mapping); the config model of its kind, with every default filled in, is
what `plan` makes of it. So two files that mean the same have the same fingerprints.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from heliostat.core.capacity import ACCELERATOR, OF_THE_NODE
from heliostat.core.credentials import has_credentials, hide, redacted, without_user
from heliostat.core.imports import REFERENCE, reference_to
from heliostat.core.model import Count, Integer, NonNegative, NonNegativeInt, Positive, Spec
from heliostat.core.tracking_uri import SQLITE, resolved_uri, why_no_tracking_uri
from heliostat.errors import SpecError, nearest


def _to_reference(value: Any) -> Any:
    if callable(value):
        try:
            return reference_to(value)
        except SpecError as error:
            raise ValueError(str(error)) from None
    return value


def _is_reference(value: str) -> str:
    if not REFERENCE.fullmatch(value):
        raise ValueError(f"{value!r} is not a reference; write it as 'module:attribute'")
    return value


def _is_name(value: str) -> str:
    if value in {"", ".", ".."} or any(c in value for c in "/\\[],") or value != value.strip() or value.startswith("."):
        raise ValueError(f"{value!r} cannot be the name of a folder: no '/', '\\', '[', ']', ',', nor a leading '.'")
    if not value.isprintable() or len(value) > 100:
        raise ValueError(f"{value!r} cannot be the name of a folder: at most 100 printable characters")
    return value


Reference = Annotated[str, BeforeValidator(_to_reference), AfterValidator(_is_reference)]
"""`module:attribute`; a function or class in the Python form."""
Name = Annotated[str, AfterValidator(_is_name)]


class MetricRef(Spec):
    """A function `(outputs, targets) -> float` over a whole split; higher is better unless `mode` says `min`."""

    reference: Reference
    mode: Literal["max", "min"] = "max"

    @property
    def name(self) -> str:
        return self.reference.rpartition(":")[2].rpartition(".")[2]


def _to_metric(value: Any) -> Any:
    return {"reference": value} if isinstance(value, str) or callable(value) else value


class Task(Spec):
    """The user's code, by reference. `data_version` is any text: change it when the data changes outside the code.

    `train_step(model, batch)` returns the mean loss of a batch, in place of `loss(model(inputs), targets)` in training.
    `train_fn(context, config)` replaces the whole loop.
    """

    model: Reference
    data: Reference
    loss: Reference = "torch.nn.functional:cross_entropy"
    metrics: tuple[Annotated[MetricRef, BeforeValidator(_to_metric)], ...] = ()
    train_fn: Reference | None = None
    train_step: Reference | None = None
    data_version: str | None = None

    @field_validator("metrics")
    @classmethod
    def _named_once(cls, metrics: tuple[MetricRef, ...]) -> tuple[MetricRef, ...]:
        names = [m.name for m in metrics]
        for name in names:
            if names.count(name) > 1 or name == "loss":
                raise ValueError(f"two metrics would be called {name!r}; give the functions different names")
        return metrics

    @model_validator(mode="after")
    def _one_way_to_train(self) -> "Task":
        if self.train_fn and self.train_step:
            raise ValueError("train_fn replaces the loop that would call train_step; give one of them")
        return self

    @property
    def references(self) -> dict[str, str]:
        """Every reference with its place in the file."""
        found = {"model": self.model, "data": self.data, "loss": self.loss}
        found.update({f"metrics[{i}]": m.reference for i, m in enumerate(self.metrics)})
        own = {"train_fn": self.train_fn, "train_step": self.train_step}
        return found | {place: reference for place, reference in own.items() if reference}

    @property
    def metric_modes(self) -> dict[str, Literal["max", "min"]]:
        """Every metric that a model of this task reports for each split, with the direction that is better."""
        names: dict[str, Literal["max", "min"]] = {}
        for split in ("train", "val", "test"):
            names[f"{split}_loss"] = "min"
            if split != "train":
                names.update({f"{split}_{m.name}": m.mode for m in self.metrics})
        return names


BUCKET = re.compile(r"s3://[^/?]+(/[^?]*)?")
TOUCH = 0.001
"""What a worker holds of its node's kind of accelerator: next to nothing, as Ray's own `accelerator_type` does."""


class Resources(Spec):
    """How much of the machine a stage may use. Never part of identity."""

    workers: Count = 1
    """So many train together. `{min: 1, max: 4}` is elastic: as many as the nodes that there are have room for."""
    max_workers: Count | None = None
    """The `max` of an elastic training, of which `workers` is then the `min`."""
    workers_per_trial: Count = 1
    cpus_per_worker: Positive = 1.0
    gpus_per_worker: NonNegative = 0.0
    custom_resources: dict[str, Positive] = Field(default_factory=dict)
    """What else each worker holds, by the names that the cluster's nodes give it."""
    accelerator_type: str | None = None
    """The kind of accelerator that a worker's node must have, by Ray's name: `A100`, `T4`."""
    placement: Literal["pack", "spread"] = "pack"
    """Workers that train together go to few nodes, or to as many as there are."""
    hang_timeout_s: Count = 1800
    """How long a worker waits for the others of its training before one of them counts as dead.

    One that works alone, in a training, a trial or a stage that is a task, counts as dead after so long without a sign
    of life: an optimizer step or, where none is due since it builds data or evaluates, that it computes anything.
    """
    max_concurrent_trials: Count | None = None
    keep_checkpoints: Count = 2
    """So many of the newest checkpoints stay, besides the best epoch known to each."""

    @model_validator(mode="before")
    @classmethod
    def _range_of_workers(cls, value: Any) -> Any:
        told = value.get("workers") if isinstance(value, Mapping) else None
        if not isinstance(told, Mapping):
            return value
        for key in told:
            if key not in ("min", "max"):
                raise ValueError(f"workers.{key}: unknown field{nearest(str(key), ('min', 'max'))}")
        if len(told) < 2:
            raise ValueError(f"workers: {dict(told)} is half of a range; write {{min: 1, max: 4}}")
        return {**value, "workers": told["min"], "max_workers": told["max"]}

    @model_validator(mode="after")
    def _range_has_a_right_way_round(self) -> "Resources":
        if self.max_workers is not None and self.max_workers < self.workers:
            raise ValueError(f"workers: min {self.workers} is more than max {self.max_workers}")
        return self

    @field_validator("gpus_per_worker")
    @classmethod
    def _part_of_one_or_whole(cls, gpus: float) -> float:
        if gpus > 1 and not gpus.is_integer():
            raise ValueError(f"{gpus:g} GPUs: a worker has a part of one GPU, or whole ones")
        return gpus

    @field_validator("custom_resources")
    @classmethod
    def _has_no_field_of_its_own(cls, custom: dict[str, float]) -> dict[str, float]:
        fields = {"CPU": "cpus_per_worker", "GPU": "gpus_per_worker"}
        for name, count in custom.items():
            if name in fields:
                raise ValueError(f"{name} is no custom resource; set {fields[name]}")
            if name.startswith((*OF_THE_NODE, ACCELERATOR)):
                raise ValueError(f"{name!r} is what Ray says of a node itself, and cannot be held")
            if count > 1 and not count.is_integer():
                raise ValueError(f"{count:g} of {name}: Ray gives a part of one, or whole ones")
        return custom

    @property
    def most_workers(self) -> int:
        """How many workers there are at most; as many as at least, where the training is not elastic."""
        return self.max_workers or self.workers

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers follows the nodes that there are."""
        return self.most_workers > self.workers

    @property
    def per_worker(self) -> dict[str, float]:
        """What one worker holds of its node, by Ray's names."""
        held = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker, **self.custom_resources}
        if self.accelerator_type is not None:
            held[f"{ACCELERATOR}{self.accelerator_type}"] = TOUCH
        return {name: count for name, count in held.items() if count}


class Tracking(Spec):
    """Where MLflow keeps its history: by default SQLite under the storage root."""

    uri: Annotated[str, AfterValidator(without_user)] | None = None
    """A server's address, or `sqlite:///FILE` with a path from the pipeline file's folder. Without user and password,
    which MLflow is given apart from it."""
    experiment: str | None = None

    @field_validator("uri")
    @classmethod
    def _is_a_store(cls, uri: str | None) -> str | None:
        problem = why_no_tracking_uri(uri) if uri is not None else None
        if problem:
            raise ValueError(f"{uri!r}: {problem}")
        return uri


Inputs = Annotated[
    dict[str, tuple[str, ...]],
    BeforeValidator(
        lambda v: {k: (s,) if isinstance(s, str) else s for k, s in v.items()} if isinstance(v, Mapping) else v
    ),
]


class Stage(Spec):
    """One stage: `Stage("train", TrainConfig(epochs=3), inputs={"params": "search"})`, or an entry of `stages:`.

    `inputs` maps a slot to the names of earlier stages; `matrix` maps a path of the config to the values it takes, one
    node each.
    """

    name: Name
    uses: str
    inputs: Inputs = Field(default_factory=dict)
    matrix: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    resources: Resources = Resources()
    retries: NonNegativeInt = 0

    @model_validator(mode="after")
    def _holds_no_password(self) -> "Stage":
        hidden: dict[str, Any] = hide(self.config, place=self.name)
        object.__setattr__(self, "config", hidden)
        return self

    def __init__(self, name: Any = None, config: Any = None, **fields: Any) -> None:
        if name is not None:
            fields["name"] = name
        if isinstance(config, Spec):
            from heliostat.core.stage import kind_of_config

            fields.setdefault("uses", kind_of_config(type(config)))
            fields["config"] = config.model_dump(mode="json", exclude_unset=True)
        elif config is not None:
            fields["config"] = config
        if callable(fields.get("uses")):
            fields["uses"] = reference_to(fields["uses"])
        super().__init__(**fields)


class Pipeline(Spec):
    """A whole pipeline. `root` is the folder that the user's modules are looked up in; it is not part of identity."""

    name: Name
    task: Task
    stages: tuple[Stage, ...] = Field(min_length=1)
    storage: str | None = None
    tracking: Tracking = Tracking()
    seed: Integer = 0
    root: Path = Field(default_factory=Path.cwd, exclude=True, repr=False)

    @field_validator("storage")
    @classmethod
    def _is_a_folder_or_a_bucket(cls, storage: str | None) -> str | None:
        if storage is not None and "://" in storage and has_credentials(storage):
            raise ValueError(
                f"{redacted(storage)!r}: leave out the credentials, which would be stored with every record; they come "
                "from where AWS's own tools take them, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if storage is not None and "://" in storage and not BUCKET.fullmatch(storage):
            raise ValueError(f"{redacted(storage)!r} is neither a folder nor s3://BUCKET/PREFIX")
        return storage

    @field_validator("root")
    @classmethod
    def _absolute(cls, root: Path) -> Path:
        return root.resolve()

    @model_validator(mode="after")
    def _names_are_unique(self) -> "Pipeline":
        names = [stage.name for stage in self.stages]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(
                    f"stages[{index}] ({name}): duplicate stage name {name!r}; stages[{names.index(name)}] has it"
                )
        return self

    @property
    def storage_folder(self) -> Path:
        """The root of the store: `storage`, relative to the pipeline's folder, or `.heliostat/` in it.

        Where the storage is a bucket, that is what this machine has of it.
        """
        folder = self.storage if self.storage and not self.bucket_url else ".heliostat"
        return (self.root / Path(folder).expanduser()).resolve()

    @property
    def bucket_url(self) -> str | None:
        """The storage, if it is `s3://…`."""
        return self.storage if self.storage and BUCKET.fullmatch(self.storage) else None

    @property
    def tracking_uri(self) -> str:
        """The address of the MLflow store; a relative path in it leads from the pipeline's folder."""
        default = f"{SQLITE}{self.storage_folder / 'mlflow.db'}"
        return resolved_uri(self.tracking.uri, self.root) if self.tracking.uri else default

    @property
    def experiment(self) -> str:
        return self.tracking.experiment or self.name
