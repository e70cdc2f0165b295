"""Create models without memory for their weights."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WeightsOnMeta(TorchFunctionMode):
    """Context in which new weights are created on the meta device: shapes without memory, and no initialisation.

    ``with torch.device("meta")`` would do, but for `torch.linspace`, whose numbers timm ≤ 1.0.15 reads as drop-path
    rates.
    """

    CONSTRUCTORS = (torch.empty, torch.ones, torch.zeros, torch.rand, torch.randn, torch.randint)

    INITIALISERS = ("add_", "clamp_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_", "kaiming_uniform_")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensor = args[0] if args else kwargs.get("tensor")
        if func.__name__ in self.INITIALISERS and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        if func in self.CONSTRUCTORS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class NumbersOnCpu(TorchFunctionMode):
    """Context within ``torch.device("meta")`` in which `torch.linspace` has numbers, as timm ≤ 1.0.15 needs them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)
