"""Whether a saved model is the one that was validated.

A stage that trains says what the weights that it kept gave on `val` while they were in memory: `StageResult.validated`.
The saved model, loaded again, has to give the same. What differs legitimately is allowed for: the order in which a sum
is rounded, a sample or two at a decision's border, and figures that are random, such as those of a model that samples.
Training validates in the precision of the weights, whatever `precision` says, so nothing is allowed for that.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from heliostat.core.stage import StageResult, Validated
from heliostat.errors import StageError

if TYPE_CHECKING:
    from torch import nn

    from heliostat.stages.passes.workshop import Workshop
    from heliostat.training.task import Data

RELATIVE = 1e-3
"""Of the larger figure. The rounding of single precision, and that of convolutions in TF32, is well below that."""
RELATIVE_HALF = 2e-2
"""Of weights in half precision, whose sums depend on the batch that they are taken over."""
RELATIVE_OWN = 5e-2
"""Of what the user's own loop reports: it may take means of batches, or compute in half precision."""
ABSOLUTE = 1e-5
SAMPLES = 2.5
"""The number of samples by whose weight a metric may differ."""
OF_INTERVAL = 0.1
"""Or the share of its 95 % interval."""
DRAWS = 5
"""How often figures that are apart are computed again, to see whether they are random."""

Figures = Mapping[str, float]


def check_saved(
    folder: Path, validated: Validated, measured: Figures, *, data: "Data", again: Callable[[], Figures]
) -> None:
    """Compare what the saved model in `folder` was measured for with what was validated.

    Args:
        again: computes the measured figures once more, with other random numbers.

    Raises:
        StageError: they are apart. It names the figures, and the first layer where the two models part.
    """
    wanted = {
        name: figure for name, figure in validated.figures.items() if name.startswith("val_") and name in measured
    }
    num_samples = len(data["val"])  # type: ignore[arg-type]

    def apart(draws: list[Figures], relative: float) -> list[str]:
        return [
            name
            for name, figure in wanted.items()
            if not _is_one_of(
                figure, [draw[name] for draw in draws], _allowed(name, figure, measured, relative, num_samples)
            )
        ]

    if not apart([measured], RELATIVE):
        return
    relative = RELATIVE_OWN if validated.by_own_loop else _relative(folder)
    problems = apart([measured, *(again() for _ in range(DRAWS))], relative)
    if problems:
        figures = ", ".join(f"{name} {wanted[name]:.6g} validated, {measured[name]:.6g} saved" for name in problems)
        raise StageError(
            f"the saved model is not the one that was validated: {figures}. "
            + (_of_own_loop() if validated.by_own_loop else _where(folder, validated, data))
        )


def check_made(shop: "Workshop", result: StageResult) -> None:
    """Check the model that a pass saved in the workshop's folder, for callers that do not measure it."""
    if result.validated is None:
        return
    from heliostat.compression.formats import load_model
    from heliostat.training.config import TrainConfig
    from heliostat.training.evaluation import evaluate
    from heliostat.training.task import build_data, build_objective
    from heliostat.training.trained_loss import load_loss

    recipe = TrainConfig.model_validate(result.params["train"]) if result.params else shop.recipe
    data = shop.data if recipe.data_args == shop.recipe.data_args else build_data(shop.task, recipe.data_args)
    model, objective = load_model(shop.folder), build_objective(shop.task, load_loss(shop.folder))
    measure = partial(evaluate, model, data["val"], objective, split="val")
    check_saved(shop.folder, result.validated, measure(), data=data, again=measure)


def _is_one_of(figure: float, draws: list[float], allowed: float) -> bool:
    """Whether a figure may have been drawn as the others were, which are all the same unless the model is random."""
    if math.isnan(figure) or not math.isfinite(max(draws) - min(draws)):
        return any(figure == draw or (math.isnan(figure) and math.isnan(draw)) for draw in draws)
    middle, spread = (max(draws) + min(draws)) / 2, max(draws) - min(draws)
    return abs(figure - middle) <= allowed + 2 * spread


def _allowed(name: str, figure: float, measured: Figures, relative: float, num_samples: int) -> float:
    allowed = relative * max(abs(figure), abs(measured[name])) + ABSOLUTE
    if name == "val_loss":
        return allowed
    interval = measured.get(f"{name}_high", 0.0) - measured.get(f"{name}_low", 0.0)
    return max(allowed, SAMPLES / num_samples, OF_INTERVAL * interval if math.isfinite(interval) else 0.0)


def _relative(folder: Path) -> float:
    import torch

    state = _torch_model(folder).state_dict().values()
    half = any(isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16) for value in state)
    return RELATIVE_HALF if half else RELATIVE


def _where(folder: Path, validated: Validated, data: "Data") -> str:
    """The first layer where the saved model parts from the validated one, in words."""
    import torch

    from heliostat.training.batches import evaluation_shares, load_batches
    from heliostat.training.marks import first_apart, marking
    from heliostat.training.world import World

    advice = (
        "What a module computes with has to be in its state_dict, and the data must be the same in every process: seed "
        "what is drawn"
    )
    if not validated.layers:
        return f"{advice}."
    model = _torch_model(folder)
    num_rows = int(list(validated.layers.values())[-1][2])
    shares = evaluation_shares(len(data["val"]), batch_size=num_rows, world=World())[:1]  # type: ignore[arg-type]
    ((_, batch),) = load_batches(data["val"], shares, device=torch.device("cpu"))
    with torch.no_grad(), marking(model) as marks:
        model(batch[0])
    layer, agrees = first_apart(marks, validated.layers)
    if layer is None:
        return f"For the first {num_rows} samples of val all layers agree. {advice}."
    kind = type(model.get_submodule(layer)).__name__
    place = f"layer {layer!r} ({kind})" if layer else f"the model's own forward ({kind})"
    before = f"all layers up to {agrees!r} agree" if agrees is not None else "it is the first of all"
    return f"They part at {place}; {before}. {advice}."


def _of_own_loop() -> str:
    return (
        "task.train_fn reported the first of each with its checkpoint: pass the state of the weights that were "
        "validated, or report what task.loss and task.metrics do not compute under another name."
    )


def _torch_model(folder: Path) -> "nn.Module":
    from heliostat.compression.formats import load_torch

    return load_torch(folder)
