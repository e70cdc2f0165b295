"""The loss of stage 1: a base criterion, and distillation from a teacher."""

from options import DISTILLATION_TYPES

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BinaryCrossEntropy(nn.Module):
    """DeiT III's: one binary decision per class, with the target 1 for every class that mixup has put into an image.

    ``smoothing`` s then makes (1 − s) · t + s / classes of a target t; DeiT III has none. With timm's loss of this name
    mixup smooths before the targets are compared with a threshold.
    """

    def __init__(self, smoothing: float = 0.0):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of ``logits`` (batch, classes); targets are labels (batch,) or shares (batch, classes)."""
        classes = logits.shape[1]
        shares = F.one_hot(targets, classes) if targets.ndim == 1 else targets
        targets = (shares > 0).float() * (1 - self.smoothing) + self.smoothing / classes
        return F.binary_cross_entropy_with_logits(logits.float(), targets)


class DistillationLoss(nn.Module):
    """(1 − α) · base criterion + α · distillation (DeiT, equations 2 and 3, without a distillation token).

    ``soft``: KL divergence between the log-softmax of teacher and student at temperature τ, summed, over the number
    of logits, times τ². ``hard``: cross-entropy with the teacher's decision. ``none``: the base criterion alone.
    """

    def __init__(self, base_criterion: nn.Module, kind: str, alpha: float, tau: float):
        super().__init__()
        if kind not in DISTILLATION_TYPES:
            raise ValueError(f"unknown distillation {kind!r}: expected {', '.join(DISTILLATION_TYPES)}")
        self.base_criterion, self.kind, self.alpha, self.tau = base_criterion, kind, alpha, tau

    def forward(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """The loss of ``logits`` (batch, classes), where the teacher has ``teacher_logits`` for the same images."""
        if self.kind == "none":
            return self.base_criterion(logits, targets)
        if self.kind == "soft":
            distillation = F.kl_div(
                F.log_softmax(logits / self.tau, dim=1),
                F.log_softmax(teacher_logits / self.tau, dim=1),
                reduction="sum",
                log_target=True,
            )
            distillation = distillation * self.tau**2 / logits.numel()
        else:
            distillation = F.cross_entropy(logits, teacher_logits.argmax(dim=1))
        return self.base_criterion(logits, targets) * (1 - self.alpha) + distillation * self.alpha


class FamilyLoss(nn.Module):
    """(1 − w) · loss of the Aux-Net + w · mean loss of the descendants that are trained beside it.

    With w = 1 there is no Aux-Net. All of them have the same criterion.
    """

    def __init__(self, criterion: DistillationLoss, weight: float):
        super().__init__()
        self.criterion, self.weight = criterion, weight

    def forward(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """The loss of ``logits`` (1 + descendants, batch, classes), the Aux-Net's first unless w = 1."""
        losses = torch.stack([self.criterion(own, targets, teacher_logits) for own in logits])
        if self.weight == 1:
            return losses.mean()
        return losses[0] * (1 - self.weight) + losses[1:].mean() * self.weight
