"""Datasets as a stream and the buffers that it refers to, which another process maps instead of copying them.

Pickle's protocol 5 (https://peps.python.org/pep-0574/) leaves the contents of NumPy arrays out of the stream; here it
does the same with those of tensors. What two datasets share they share again after unpacking.
"""

import io
import pickle
import warnings
from collections.abc import Sequence
from pickle import PickleBuffer
from typing import Any

import torch
from ray.cloudpickle import CloudPickler
from torch import Tensor

Packed = tuple[bytes, list[PickleBuffer]]


def pack(value: Any) -> Packed:
    """Raises whatever the value's own pickling raises."""
    stream, buffers = io.BytesIO(), list[PickleBuffer]()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    return stream.getvalue(), buffers


def unpack(packed: tuple[bytes, Sequence[Any]]) -> Any:
    """A new value over the same memory, which must not be written to."""
    stream, buffers = packed
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return pickle.loads(stream, buffers=buffers)


class _Pickler(CloudPickler):  # type: ignore[misc]
    def reducer_override(self, obj: Any) -> Any:
        is_plain = type(obj) is Tensor and obj.layout is torch.strided and obj.device.type == "cpu"
        if is_plain and obj.numel() and not (obj.requires_grad or obj.is_quantized or obj.is_conj() or obj.is_neg()):
            content = obj.contiguous().view(-1).view(torch.uint8).numpy()
            return _tensor, (PickleBuffer(content), obj.dtype, tuple(obj.shape))
        return super().reducer_override(obj)


def _tensor(content: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(content, dtype=dtype).view(shape)
