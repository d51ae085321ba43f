"""Weights that a layer computes from other tensors: weight norm, spectral norm, and whatever else torch registers.

Compression cuts plain weights. `bake` replaces each computed weight by a parameter of its present value: the outputs
stay the same, and a later training does not normalise the weight again. The step that it returns makes a freshly built
model ready for the saved weights. Both kinds count: `torch.nn.utils.parametrize`, and the older hooks before a forward.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from heliostat.compression.parity import allowed, difference, seeded
from heliostat.errors import StageError

BAKE_TOLERANCE = 1e-5

HOOKS: dict[type, Callable[[nn.Module, str], Any]] = {
    WeightNorm: remove_weight_norm,
    SpectralNorm: remove_spectral_norm,
    prune.BasePruningMethod: prune.remove,
}
"""The hooks that compute a weight before every forward, each with torch's own way to take it away."""
KINDS = {
    "WeightNorm": "weight norm",
    "_WeightNorm": "weight norm",
    "SpectralNorm": "spectral norm",
    "_SpectralNorm": "spectral norm",
}


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model, the weights that its hooks computed included.

    `copy.deepcopy` refuses tensors with a gradient function, such as the `weight` under the older weight norm. And it
    leaves a parametrized module's copy in that module's own class, where torch keeps the computed weight as a property:
    to bake either would take it from both.
    """
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in pytree.tree_leaves(vars(module))
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    made = copy.deepcopy(model, memo)
    for module in made.modules():
        if parametrize.is_parametrized(module):
            kind = type(module)
            attributes = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, kind.__bases__, attributes)
    return made


def parametrizations(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return the computed tensors: layer name -> tensor name -> kind, such as `{"conv": {"weight": "weight norm"}}`."""
    found = {name: _of_layer(module) for name, module in model.named_modules()}
    return {name: tensors for name, tensors in found.items() if tensors}


def bake(model: nn.Module, example: Tensor | None = None) -> list[dict[str, Any]]:
    """Make every computed tensor of `model` a plain parameter, in place; return the history, empty if there is none.

    Args:
        example: a batch on which the outputs before and after are compared.

    Raises:
        StageError: the outputs differ, as they do where a forward reads the tensors that a weight is computed from.
    """
    found = parametrizations(model)
    if not found:
        return []
    training = model.training
    model.eval()  # in training mode, reading a spectral norm's weight updates its estimate
    before = None if example is None else seeded(model, example)
    for name, tensors in found.items():
        for tensor in tensors:
            _bake_tensor(model.get_submodule(name), tensor)
    if example is not None and isinstance(before, Tensor):
        after = seeded(model, example)
        if not difference(after, before) <= allowed(before, BAKE_TOLERANCE):
            raise StageError(
                f"outputs change by {difference(after, before):.3g} when the weights that are computed from other "
                f"tensors become plain ones ({described(found)}); remove the parametrization before compression"
            )
    model.train(training)
    return [{"op": "bake", "tensors": found}]


def replay(model: nn.Module, step: Mapping[str, Any]) -> None:
    """Make the tensors that the step names plain parameters, in place. Their values are to be loaded."""
    for name, tensors in step["tensors"].items():
        for tensor in tensors:
            _bake_tensor(model.get_submodule(name), tensor)


def baked_weights(step: Mapping[str, Any]) -> dict[str, str]:
    """Return what a step baked, for a record: `{"conv.weight": "weight norm"}`."""
    return {
        (f"{layer}.{name}" if layer else name): kind
        for layer, names in step["tensors"].items()
        for name, kind in names.items()
    }


def described(tensors: Mapping[str, Mapping[str, str]]) -> str:
    """Return them in words: `conv.weight: weight norm; ...`."""
    return "; ".join(f"{name}: {kind}" for name, kind in baked_weights({"tensors": tensors}).items())


def _of_layer(module: nn.Module) -> dict[str, str]:
    found = {}
    if parametrize.is_parametrized(module):
        for name, chain in module.parametrizations.items():  # type: ignore[union-attr, operator]
            found[name] = ", ".join(_kind(part) for part in chain)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, tuple(HOOKS)):
            found[_tensor_of(hook)] = _kind(hook)
    return found


def _kind(parametrization: object) -> str:
    name = type(parametrization).__name__
    return KINDS.get(name, name)


def _tensor_of(hook: Any) -> str:
    name: str = hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name
    return name


def _bake_tensor(module: nn.Module, name: str) -> None:
    for kind, remove in HOOKS.items():
        if any(isinstance(hook, kind) and _tensor_of(hook) == name for hook in module._forward_pre_hooks.values()):
            sources = [p for key, p in module.named_parameters(recurse=False) if key.startswith(f"{name}_")]
            remove(module, name)
            module.get_parameter(name).requires_grad_(any(p.requires_grad for p in sources))
            _forget_load_hooks(module, name)
            return
    chain: Any = module.parametrizations[name]  # type: ignore[index]
    originals = [tensor for key, tensor in chain.named_parameters(recurse=False) if key.startswith("original")]
    with torch.no_grad():
        value = getattr(module, name).detach().clone()
    # torch would write the value into the original tensor, which another layer may share.
    parametrize.remove_parametrizations(module, name, leave_parametrized=not chain.is_tensor)
    delattr(module, name)
    if originals:
        module.register_parameter(name, nn.Parameter(value, requires_grad=any(o.requires_grad for o in originals)))
    else:
        module.register_buffer(name, value)


def _forget_load_hooks(module: nn.Module, name: str) -> None:
    """Take away the hook that spectral norm loads by, which torch wraps and then no longer finds (2.13)."""
    hooks = module._load_state_dict_pre_hooks
    for key, wrapped in list(hooks.items()):
        hook = getattr(wrapped, "hook", wrapped)
        if isinstance(hook, SpectralNormLoadStateDictPreHook) and hook.fn.name == name:
            del hooks[key]
