import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from heliostat.runtime.packing import pack, unpack


def there_and_back(value):
    stream, buffers = pack(value)
    return unpack((stream, [buffer.raw() for buffer in buffers]))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(3, 4).T,
        torch.randn(6)[::2],
        torch.randn(4).bfloat16(),
        torch.tensor([True, False]),
        torch.tensor(3),
        torch.empty(0, 5),
        torch.randn(3, requires_grad=True),
        torch.eye(3).to_sparse(),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}-{tensor.layout}",
)
def test_a_tensor_of_any_form_comes_back_as_it_was(tensor):
    back = there_and_back(tensor)
    assert (back.dtype, back.shape, back.requires_grad) == (tensor.dtype, tensor.shape, tensor.requires_grad)
    assert torch.equal(back.to_dense(), tensor.to_dense())


def test_the_contents_of_tensors_and_arrays_are_not_in_the_stream():
    stream, buffers = pack({"a": torch.zeros(10_000), "b": np.zeros(10_000)})
    assert len(stream) < 2_000
    assert sum(buffer.raw().nbytes for buffer in buffers) == 120_000


def test_what_two_splits_share_they_share_again():
    whole = TensorDataset(torch.randn(10, 2), torch.arange(10))
    back = there_and_back({"train": Subset(whole, range(6)), "val": Subset(whole, range(6, 10))})
    assert back["train"].dataset is back["val"].dataset


def test_a_function_without_a_name_travels_and_an_open_file_does_not(tmp_path):
    assert there_and_back(lambda x: x + 1)(2) == 3
    with open(tmp_path / "file", "w") as file, pytest.raises((TypeError, pickle.PicklingError)):
        pack(file)
