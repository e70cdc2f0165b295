"""The loss of stage 1: a base criterion, and distillation from a teacher."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OF_LOGITS = ("none", "soft", "hard")


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


def soft_divergence(logits: Tensor, target_logits: Tensor, tau: float, mean: str) -> Tensor:
    """KL divergence between the softmax of ``target_logits`` and of ``logits`` at temperature τ, times τ².

    Args:
        logits, target_logits: (batch, classes).
        mean: over ``images``; or over ``logits``, as in DeiT, which divides by the number of classes, too: beside
            labels the divergence then weighs little.
    """
    divergence = F.kl_div(
        F.log_softmax(logits / tau, dim=1),
        F.log_softmax(target_logits / tau, dim=1),
        reduction="sum",
        log_target=True,
    )
    return divergence * tau**2 / (logits.numel() if mean == "logits" else len(logits))


class DistillationLoss(nn.Module):
    """(1 − α) · base criterion + α · distillation (DeiT, equations 2 and 3, without a distillation token).

    ``soft``: `soft_divergence` from the teacher at temperature τ. ``hard``: cross-entropy with the teacher's decision.
    ``none``: the base criterion alone.
    """

    def __init__(self, base_criterion: nn.Module, kind: str, alpha: float, tau: float, mean: str = "logits"):
        super().__init__()
        if kind not in OF_LOGITS:
            raise ValueError(f"unknown distillation {kind!r} of logits: expected {', '.join(OF_LOGITS)}")
        self.base_criterion, self.kind, self.alpha, self.tau, self.mean = base_criterion, kind, alpha, tau, mean

    def forward(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """The loss of ``logits`` (batch, classes), where the teacher has ``teacher_logits`` for the same images."""
        if self.kind == "none":
            return self.base_criterion(logits, targets)
        if self.kind == "soft":
            distillation = soft_divergence(logits, teacher_logits, self.tau, self.mean)
        else:
            distillation = F.cross_entropy(logits, teacher_logits.argmax(dim=1))
        return self.base_criterion(logits, targets) * (1 - self.alpha) + distillation * self.alpha


def unexplained_variance(features: Tensor, targets: Tensor) -> Tensor:
    """The share of the variance of ``targets`` that ``features`` leave unexplained: Σ |f − t|² / Σ |t|².

    Both (…, width) are centred first: a linear head has a bias. So 0 is perfect, and features that do not depend on the
    image have 1, whatever the width and the scale of the targets. One scale for all neurons, and none for each, keeps
    neurons that hardly vary from weighing as much as those that heads read. Normalising each target on its own instead,
    as in "data2vec" (Baevski et al., ICML 2022), would count what all images share, too.
    """
    features, targets = (x.float().flatten(0, -2) for x in (features, targets))
    features, targets = features - features.mean(dim=0), targets - targets.mean(dim=0)
    return (features - targets).square().sum() / targets.square().sum().clamp_min(1e-6)  # 0 of a single image


class FeatureLoss(nn.Module):
    """(1 − α) · base criterion + α · mean of `unexplained_variance` of the pooled feature and of those of the patches.

    Mean and variance are those of the batch: of the pooled feature over images, of the others over images and patches.
    With α = 1 there are no logits, and no labels are used.
    """

    def __init__(self, base_criterion: nn.Module, alpha: float):
        super().__init__()
        self.base_criterion, self.alpha = base_criterion, alpha

    def forward(self, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor, teacher: Tensor) -> Tensor:
        """
        Args:
            outputs: `models.features.Features` (batch, 1 + patches, width) of a member, unless α = 1 with its logits.
            teacher: those of the source.
        """
        features, logits = (outputs, None) if self.alpha == 1 else outputs
        parts = [unexplained_variance(features[:, i], teacher[:, i]) for i in (slice(1), slice(1, None))]
        loss = torch.stack(parts).mean()
        if logits is None:
            return loss
        return self.base_criterion(logits, targets) * (1 - self.alpha) + loss * self.alpha


class FamilyLoss(nn.Module):
    """(1 − w) · loss of the Aux-Net + w · mean loss of the descendants that are trained beside it.

    With w = 1 there is no Aux-Net. All of them have the same criterion. A share β of the loss of every member but the
    largest of its step is the divergence from the next larger one, as in "Scala" (Zhang et al., NeurIPS 2024):
    (1 − β) · criterion + β · `soft_divergence`, the mean over images.
    """

    def __init__(self, criterion: DistillationLoss | FeatureLoss, weight: float, chain_weight: float = 0.0):
        super().__init__()
        self.criterion, self.weight, self.chain_weight = criterion, weight, chain_weight

    def forward(self, logits: Tensor | Sequence, targets: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """The loss of ``logits`` (members, batch, classes), from the largest to the smallest.

        The first are the Aux-Net's unless w = 1. For `FeatureLoss`, what the members have instead.
        """
        losses = [self.criterion(own, targets, teacher_logits) for own in logits]
        if self.chain_weight:
            for i in range(1, len(losses)):
                chain = soft_divergence(logits[i], logits[i - 1].detach(), self.criterion.tau, "images")
                losses[i] = losses[i] * (1 - self.chain_weight) + chain * self.chain_weight
        losses = torch.stack(losses)
        if self.weight == 1 or len(losses) == 1:
            return losses.mean()
        return losses[0] * (1 - self.weight) + losses[1:].mean() * self.weight
