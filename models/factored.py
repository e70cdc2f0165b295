"""Linear layers of an Aux-Net that apply ⟨E⟩ to the activations instead of the weights."""

from abc import ABC, abstractmethod

from models.axes import widen_in

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FactoredLinear(nn.Module, ABC):
    """A linear layer whose weight is a product with ⟨E⟩, which is applied to the activations instead.

    All layers share ⟨E⟩, so only the other factor is computed per layer. The products are also smaller than those of a
    plain ViT: for T tokens, a layer from D neurons to K computes T·((D−s)·s + s·K) multiplications instead of T·D·K,
    where s is the width of the learngene.
    """

    def __init__(self, linear: nn.Linear, full_width: bool):
        """
        Args:
            linear: the layer to replace. Its weights are on the meta device, as all weights of an Aux-Net's ViT.
            full_width: ⟨E⟩ is E itself (LiGO), instead of [I; E].
        """
        super().__init__()
        self.weight, self.bias, self.full_width = linear.weight, linear.bias, full_width
        self.E = nn.Parameter(torch.empty(0, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, in) → (batch, tokens, out). Without an E, the weight is that of an ordinary layer."""
        return F.linear(x, self.weight, self.bias) if self.E.is_meta else self.apply_factors(x)

    @abstractmethod
    def apply_factors(self, x: Tensor) -> Tensor:
        """`forward` with an E."""


class FactoredInLinear(FactoredLinear):
    """Input axis widened by E: x (w ⟨E⟩ᵀ)ᵀ + b = (x ⟨E⟩) wᵀ + b with w (out, s)."""

    def apply_factors(self, x: Tensor) -> Tensor:
        if self.full_width:
            return F.linear(x @ self.E, self.weight, self.bias)
        old, new = x.flatten(0, 1).split([x.shape[-1] - self.E.shape[0], self.E.shape[0]], dim=-1)
        narrow = torch.addmm(old, new, self.E).unflatten(0, x.shape[:2])
        return F.linear(narrow, self.weight, self.bias)


class FactoredOutLinear(FactoredLinear):
    """Output axis widened by E: x (⟨E⟩ w)ᵀ + ⟨E⟩ b = (x wᵀ + b) ⟨E⟩ᵀ with w (s, in)."""

    def apply_factors(self, x: Tensor) -> Tensor:
        narrow = F.linear(x, self.weight, self.bias)
        return narrow @ self.E.mT if self.full_width else widen_in(narrow, self.E)
