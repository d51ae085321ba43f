"""Whether two forms of a model compute the same, and if they do not, the first layer where they part.

The layers are those of the torch model, by name. What each gives is taken from the model itself with hooks, and looked
for in the other form among the values that it computes inside that layer: another torch model, a graph of
`torch.export`, whose nodes know their modules, or an ONNX graph, whose nodes carry the names of theirs.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils.hooks import RemovableHandle

from heliostat.errors import StageError

TOLERANCE = 1e-3
"""The largest difference allowed, relative to the largest value (or to 1)."""

AT_ONCE = 64
"""How many rows are computed at once where nothing is said."""

Run = Callable[[Tensor], Tensor]
Values = Mapping[str, Sequence[Tensor]]
"""By layer, the values that are computed inside it when it is first called, in order."""


@dataclass(frozen=True)
class Divergence:
    """The first layer, in the order in which they end, whose output is not what it should be."""

    layer: str
    """Its name; empty for the model itself."""
    kind: str
    difference: float
    allowed: float
    agrees: str | None
    """The layer that ended last before it, which agrees, as all before it do."""

    def __str__(self) -> str:
        name = f"layer {self.layer!r} ({self.kind})" if self.layer else f"the model's own forward ({self.kind})"
        before = f"all layers up to {self.agrees!r} agree" if self.agrees is not None else "it is the first of all"
        return f"they part at {name}: max difference {self.difference:.3g}, tolerance {self.allowed:.3g}; {before}"


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest absolute difference; what is infinite or not a number in both is the same."""
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    return float(torch.where(same, 0.0, (found.double() - wanted.double()).abs()).max()) if found.numel() else 0.0


def allowed(wanted: Tensor, tolerance: float = TOLERANCE) -> float:
    """The largest difference from `wanted` that passes."""
    finite = wanted[wanted.isfinite()] if wanted.is_floating_point() else wanted
    return tolerance * max(1.0, float(finite.abs().max()) if finite.numel() else 0.0)


def apart(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether the difference is more than `allowed`. Not a number is apart from every number."""
    return not difference(found, wanted) <= allowed(wanted, tolerance)


def check_parity(
    model: nn.Module,
    other: Run,
    inputs: Tensor,
    *,
    what: str,
    values: Callable[[Tensor], Values],
    tolerance: float = TOLERANCE,
    batch_size: int = AT_ONCE,
) -> None:
    """Compare the outputs of `other` with those of the torch model it was made of, drawing the same random numbers.

    Args:
        what: what `other` is, for the error.
        values: for a batch, what `other` computes in which layer; asked only if the outputs are apart.
        batch_size: how many rows are computed at once.

    Raises:
        StageError: they are apart. It names the first layer that diverges.
    """
    wanted, found = (seeded(run, inputs, batch_size=batch_size) for run in (model, other))
    if found.shape != wanted.shape:
        raise StageError(f"{what} gives the shape {tuple(found.shape)} where the model gives {tuple(wanted.shape)}")
    if apart(found, wanted, tolerance):
        rows = inputs[_worst_row(found, wanted)]
        raise StageError(
            f"{what} does not answer as the model: outputs differ by {difference(found, wanted):.3g}, tolerance "
            f"{allowed(wanted, tolerance):.3g}. {explain(model, values(rows), rows, tolerance=tolerance)}"
        )


def explain(model: nn.Module, values: Values, batch: Tensor, *, tolerance: float = TOLERANCE) -> str:
    """Where the values part from those of the model, in words."""
    divergence = first_divergence(model, values, batch, tolerance=tolerance)
    return "No single layer is apart: small differences add up" if divergence is None else f"{divergence}"


def first_divergence(
    model: nn.Module, values: Values, batch: Tensor, *, tolerance: float = TOLERANCE
) -> Divergence | None:
    """The first layer whose last value is not its output in the model; one without a value of that shape passes."""
    agrees = None
    for layer, wanted in outputs_of(model, batch).items():
        of_that_shape = [value for value in values.get(layer, ()) if value.shape == wanted.shape]
        if not of_that_shape:
            continue
        if apart(of_that_shape[-1], wanted, tolerance):
            kind = type(model.get_submodule(layer)).__name__
            distance = difference(of_that_shape[-1], wanted)
            return Divergence(layer, kind, distance, allowed(wanted, tolerance), agrees)
        agrees = layer
    return None


def seeded(run: Run, batch: Tensor, *, batch_size: int | None = None) -> Tensor:
    """What `run` gives, without gradients, for all rows at once or for `batch_size` of them at a time.

    Random numbers that it draws are the same each time.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if batch_size is None or len(batch) <= batch_size:
            return run(batch)
        return torch.cat([run(rows) for rows in torch.split(batch, batch_size)])


def require_one_tensor(outputs: Any) -> None:
    """Raises StageError for what a model gives that no exported file does here."""
    if not isinstance(outputs, Tensor):
        raise StageError(
            f"only a model with one output tensor can be exported; this one gives a {type(outputs).__name__}"
        )


def _worst_row(found: Tensor, wanted: Tensor) -> slice:
    distances = (found.double() - wanted.double()).abs().reshape(len(found), -1).amax(1).nan_to_num(torch.inf)
    worst = int(distances.argmax())
    return slice(worst, worst + 1)


# --- what each form computes ----------------------------------------------------------------------------------------


def outputs_of(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """What each layer of a torch model gives when it is first called, in the order in which the calls end."""
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, given: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor):
                outputs.setdefault(name, first.detach().clone())

        return keep

    handles: list[RemovableHandle] = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)  # takes no hooks
    ]
    try:
        seeded(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def values_of_module(model: nn.Module, batch: Tensor) -> Values:
    """Of another torch model, whose layers have the same names."""
    return {name: [output] for name, output in outputs_of(model, batch).items()}


def values_of_program(program: ExportedProgram, batch: Tensor) -> Values:
    """Of a graph of `torch.export`: each node says in `nn_module_stack` which modules it is of."""
    computed: list[tuple[set[str], Tensor]] = []

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and "nn_module_stack" in n.meta:
                modules = {path for path, _ in n.meta["nn_module_stack"].values()}
                computed.append((modules, value.detach().clone()))
            return value

    seeded(Recorder(program.module(check_guards=False)).run, batch)
    return _by_layer(computed)


def values_of_graph(file: Path, model: nn.Module, batch: Tensor) -> Values:
    """Of an ONNX graph that one of torch's exporters made of `model`, run with every value as an output."""
    import onnx
    import onnxruntime

    graph = onnx.load(file)
    known = [name for name, _ in model.named_modules() if name]
    modules: dict[str, set[str]] = {}
    for node in graph.graph.node:
        recorded = {entry.key: entry.value for entry in node.metadata_props}
        if scopes := recorded.get("pkg.torch.onnx.name_scopes"):
            modules[node.output[0]] = _in_names(scopes, known)
        elif node.name.startswith("/"):  # others are constants, of no module
            modules[node.output[0]] = set(_in_path(node.name, known))
    already = {output.name for output in graph.graph.output}
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in modules if name not in already)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run(list(modules), {session.get_inputs()[0].name: batch.numpy()})
    return _by_layer((layers, torch.as_tensor(value)) for layers, value in zip(modules.values(), values))


def _by_layer(computed: Iterable[tuple[set[str], Tensor]]) -> Values:
    """The values of each layer, up to the first value outside of it: there its first call has ended."""
    values: dict[str, list[Tensor]] = {}
    inside: set[str] = set()
    ended: set[str] = set()
    for modules, value in computed:
        ended |= inside - modules - {""}
        inside = (modules | {""}) - ended
        for name in inside:
            values.setdefault(name, []).append(value)
    return values


def _in_names(scopes: str, known: Sequence[str]) -> set[str]:
    """Of the list that the `torch.export` exporter writes: `['', 'encoder', 'encoder.norm', 'layer_norm']`."""
    return set(re.findall(r"'([^']*)'", scopes)) & set(known)


def _in_path(node: str, known: Sequence[str]) -> Iterator[str]:
    """Of the path that the tracing exporter names a node by: `/encoder/layers.0/norm/Div` is in `encoder.layers.0`.

    And in `encoder`, and in its `norm`. A part is the end of a module's name, from the last word that is no number.
    """
    inside = ""
    for part in node.split("/")[1:-1]:
        below = [name for name in known if name.startswith(f"{inside}." if inside else "") and _last_word(name) == part]
        if not below:
            return
        inside = min(below, key=len)
        yield inside


def _last_word(name: str) -> str:
    parts = name.split(".")
    start = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[start:])
