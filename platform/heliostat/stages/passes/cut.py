"""What `prune` takes away in one go: weights, or channels and heads."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from heliostat.compression.parametrizations import baked_weights
from heliostat.compression.prune.heads import attention_layers, remove_heads
from heliostat.compression.prune.masks import Masks, Sparsity, below, magnitude, two_of_four
from heliostat.compression.prune.plan import Backward
from heliostat.compression.prune.structured import structured
from heliostat.stages.passes.workshop import Workshop
from heliostat.stages.prune import PruneConfig

IMPORTANCE_SAMPLES = 512
"""So many training samples give the gradients that `taylor` weighs channels and heads by."""

Steps = list[dict[str, Any]]


def cut(
    shop: Workshop, model: nn.Module, config: PruneConfig, sparsity: Sparsity
) -> tuple[nn.Module, Steps, Masks | None]:
    """The model pruned, the steps that rebuild its shapes, and the masks that keep its zeros."""
    if config.method == "semi_structured":
        return model, [], two_of_four(model, skip=config.skip)
    if config.method == "magnitude":
        if config.penalty is not None:
            return model, [], below(model, threshold=config.penalty.threshold, skip=config.skip)
        return model, [], magnitude(model, sparsity=sparsity, scope=config.ranked, skip=config.skip)
    channels, heads = channels_and_heads(model, config, sparsity)
    model, narrower = cut_channels(shop, model, config, channels, required=not heads)
    model, fewer = cut_heads(shop, model, config, heads)
    return model, [*narrower, *fewer], None


def channels_and_heads(model: nn.Module, config: PruneConfig, sparsity: Sparsity) -> tuple[Sparsity, Sparsity]:
    """What goes of the channels and what of the heads: the sparsities of a scan are of both, by the layer's name."""
    if not isinstance(sparsity, Mapping):
        return sparsity, config.head_sparsity
    attention = attention_layers(model, config.skip)
    return (
        {name: fraction for name, fraction in sparsity.items() if name not in attention},
        {name: fraction for name, fraction in sparsity.items() if name in attention},
    )


def cut_channels(
    shop: Workshop,
    model: nn.Module,
    config: PruneConfig,
    sparsity: Sparsity,
    *,
    of: Mapping[str, int] | None = None,
    kept: Mapping[str, str] = MappingProxyType({}),
    required: bool = True,
) -> tuple[nn.Module, Steps]:
    """`structured`, as the config says; the model as it is where no channels are to go."""
    threshold = config.penalty.threshold if config.penalty else None
    if threshold is None and not sparsity:
        return model, []
    return structured(
        model,
        example=shop.proof,
        sparsity=sparsity if threshold is None else None,
        of=of,
        threshold=threshold,
        importance=config.importance,
        backward=_gradients(shop, config),
        scope=config.ranked,
        skip=config.skip,
        kept=kept,
        required=required,
    )


def cut_heads(
    shop: Workshop, model: nn.Module, config: PruneConfig, sparsity: Sparsity, *, of: Mapping[str, int] | None = None
) -> tuple[nn.Module, Steps]:
    """`remove_heads`, as the config says; the model as it is where none are to go."""
    if not sparsity:
        return model, []
    return remove_heads(model, sparsity=sparsity, of=of, skip=config.skip, backward=_gradients(shop, config))


def _gradients(shop: Workshop, config: PruneConfig) -> Backward | None:
    return shop.backward_on(IMPORTANCE_SAMPLES) if config.importance == "taylor" else None


def described(steps: Sequence[Mapping[str, Any]], masks: Masks | None) -> dict[str, Any]:
    """For the record: what went of which layer, and why other layers were left alone."""
    found: dict[str, Any] = {}
    if masks is not None:
        found |= {"sparsity": masks.sparsity, "layers": masks.sparsities, "kept": dict(masks.kept)}
    for step in steps:
        if step["op"] == "bake":
            found["baked"] = baked_weights(step)
        elif step["op"] == "structured":
            removed = found.setdefault("channels_removed", {})
            for name, _, channels in step["groups"]:
                removed[name] = removed.get(name, 0) + len(channels)
            found["kept"] = step["kept"]
            if "approximate" in step:
                found["approximate"] = step["approximate"]
        else:
            found.setdefault("heads_left", {}).update({name: len(heads) for name, heads in step["layers"].items()})
    return found
