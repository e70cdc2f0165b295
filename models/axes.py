"""Width expansion along one axis of a weight, or of the activations.

⟨A⟩ = [I; A] is the identity stacked on A: it keeps the old neurons of an axis and adds a new one for each row of A.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def widen_out(A: Tensor, w: Tensor) -> Tensor:
    """⟨A⟩ w: the output axis of ``w`` (…, out, in) grows by the rows of A."""
    return torch.cat([w, A @ w], dim=-2)


def widen_in(w: Tensor, A: Tensor) -> Tensor:
    """w ⟨A⟩ᵀ: the input axis of ``w`` (…, out, in) grows by the rows of A; a vector counts as a row."""
    return torch.cat([w, w @ A.mT], dim=-1)


def widening(full_width: bool) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """`widen_out` and `widen_in`; for LiGO's full width matrices, where ⟨A⟩ is A itself, the plain products."""
    return (torch.matmul, lambda w, A: w @ A.mT) if full_width else (widen_out, widen_in)


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
