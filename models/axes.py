"""Width expansion along the axes of a weight. ⟨A⟩ = [I; A] keeps the old neurons and adds one for each row of A."""

import torch
from torch import Tensor


def widen_out(A: Tensor, w: Tensor) -> Tensor:
    """⟨A⟩ w: the output axis of ``w`` (…, out, in) grows by the rows of A."""
    return torch.cat([w, A @ w], dim=-2)


def widen_in(w: Tensor, A: Tensor) -> Tensor:
    """w ⟨A⟩ᵀ: the input axis of ``w`` (…, out, in) grows by the rows of A; a vector counts as a row."""
    return torch.cat([w, w @ A.mT], dim=-1)
