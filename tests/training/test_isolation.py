import torch

from heliostat.training.isolation import fresh_process_state


def test_the_switches_of_torch_are_as_in_a_new_process() -> None:
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    torch.autograd.set_detect_anomaly(True)
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)
    torch.backends.cudnn.benchmark = True
    torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, outputs: outputs * 0)

    fresh_process_state(num_threads=1)

    assert torch.is_grad_enabled()
    made = torch.ones(2, 2)
    assert (made.dtype, made.device.type) == (torch.float32, "cpu")
    assert torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_anomaly_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_autocast_dtype("cpu") is torch.bfloat16
    assert (made @ made).dtype is torch.float32
    assert not torch.backends.cudnn.benchmark
    assert torch.nn.Identity()(made).sum() == 4
