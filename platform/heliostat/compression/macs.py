"""The arithmetic of a model: how many multiplications with an addition one row takes."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode, sdpa_flop_count


def num_macs(model: nn.Module, example: Tensor) -> int:
    """Of convolutions, matrix products, attention and recurrent layers, for the first row of `example`.

    Zeros count like any other weight, as they do in what is executed.
    """
    training, fast = model.training, torch.backends.mha.get_fastpath_enabled()
    counter = FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH)
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # there an encoder is one operation that hides its own
        with torch.no_grad(), _Uncompiled(counter):
            model.eval()(example[:1])
    finally:
        model.train(training)
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2


class _Uncompiled(_FlopCounterMode):  # type: ignore[no-untyped-call]
    """What `FlopCounterMode` counts with, left as it was written.

    Torch wraps it to tell its compiler to leave it alone, and would load the compiler for that, for as long as it takes
    to load torch itself.
    """

    __torch_dispatch__ = inspect.unwrap(_FlopCounterMode.__torch_dispatch__)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def _recurrent_flops(
    inputs: Sequence[int], weight_ih: Sequence[int], weight_hh: Sequence[int], *more: Any, **named: Any
) -> int:
    """An LSTM's layer, from the shapes of its arguments; other recurrent layers are made of matrix products."""
    return 2 * math.prod(inputs[:-1]) * (math.prod(weight_ih) + math.prod(weight_hh))


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *more: Any, **named: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


UNKNOWN_TO_TORCH: dict[Any, Any] = {
    torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}
"""The operations of a CPU that torch's own counter passes over."""
