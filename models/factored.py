"""Linear layers that apply E to the activations instead of the weights."""

from models.axes import widen_in

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: the Aux-Net
# ---------------------------------------------------------------------------------------------------------------------


class ThroughE(nn.Module):
    """A linear layer of the Aux-Net, of which only the factor that belongs to the layer is made.

    ⟨E⟩ is the same in all layers. Applied to the activations instead of to every weight matrix, it also leaves narrower
    products to compute than a plain ViT has: with T tokens, a layer that reads D neurons and writes K multiplies
    T·((D−s)·s + s·K) times instead of T·D·K.
    """

    def __init__(self, linear: nn.Linear, full_width: bool):
        """Takes the place of ``linear``, whose weights are on the meta device, as all those of an Aux-Net's ViT."""
        super().__init__()
        self.weight, self.bias, self.full_width = linear.weight, linear.bias, full_width
        self.E = nn.Parameter(torch.empty(0, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, in) → (batch, tokens, out); where no E is given, the weight matrix is whole."""
        return F.linear(x, self.weight, self.bias) if self.E.is_meta else self.through(x)


class FactoredInLinear(ThroughE):
    """x (w ⟨E⟩ᵀ)ᵀ + b = (x ⟨E⟩) wᵀ + b with w (out, s)."""

    def through(self, x: Tensor) -> Tensor:
        if self.full_width:
            return F.linear(x @ self.E, self.weight, self.bias)
        old, new = x.flatten(0, 1).split([x.shape[-1] - self.E.shape[0], self.E.shape[0]], dim=-1)
        narrow = torch.addmm(old, new, self.E).unflatten(0, x.shape[:2])
        return F.linear(narrow, self.weight, self.bias)


class FactoredOutLinear(ThroughE):
    """x (⟨E⟩ w)ᵀ + ⟨E⟩ b = (x wᵀ + b) ⟨E⟩ᵀ with w (s, in)."""

    def through(self, x: Tensor) -> Tensor:
        narrow = F.linear(x, self.weight, self.bias)
        return narrow @ self.E.mT if self.full_width else widen_in(narrow, self.E)
