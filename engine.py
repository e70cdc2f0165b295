"""One epoch of training, and evaluation."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import utils
from samplers import derived_seed

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.utils import ModelEmaV3, dispatch_clip_grad, random_seed
from torch import Tensor, nn
from torch.optim import Optimizer


class NotFiniteError(ArithmeticError):
    """The loss is not a number any more."""


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor, Tensor], Tensor],
    loader: Iterable,
    optimizer: Optimizer,
    device: torch.device,
    epoch: int,
    *,
    scaler: torch.amp.GradScaler,
    autocast: AbstractContextManager,
    mixup: Mixup | None = None,
    clip_grad: float | None = None,
    accum_iter: int = 1,
    ema: ModelEmaV3 | None = None,
    ema_source: nn.Module | None = None,
    seed: int = 0,
    log_interval: int = 50,
    progress: utils.Progress | None = None,
) -> dict[str, float]:
    """Train on every batch of ``loader`` once.

    Args:
        criterion: (images, logits, targets) → loss, the mean over the batch.
        accum_iter: batches whose mean gradient makes one optimiser step; the last group of an epoch may be smaller.
        ema_source: the module, without wrappers, that ``ema`` averages.
        seed: the random numbers of a step (mixup, dropout, drop-path) follow from it, the epoch, the step and the
            process, so that they do not depend on what was drawn before.
        log_interval: steps between two looks at the loss, the only moments the device is waited for (float16 also
            looks at every step whether the scaled gradients overflowed).

    Returns:
        ``loss``, the mean over all processes, and ``lr`` of the first parameter group.

    Raises:
        NotFiniteError: the loss was not finite; all processes raise it at the same step.
    """
    model.train()
    num_batches = len(loader)
    total, pending = torch.zeros((), device=device), 0
    epoch_loss = 0.0
    for step, (images, targets) in enumerate(loader):
        random_seed(derived_seed(seed, epoch, step, utils.rank()))
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if mixup is not None:
            images, targets = mixup(images, targets)
        group = min(accum_iter, num_batches - step // accum_iter * accum_iter)
        last_of_group = step % accum_iter == group - 1
        synchronised = nullcontext() if last_of_group or not hasattr(model, "no_sync") else model.no_sync()
        with synchronised:
            with autocast:
                loss = criterion(images, model(images), targets)
            scaler.scale(loss / group).backward()
        if last_of_group:
            optimizer_step(model, optimizer, scaler, clip_grad)
            if ema is not None:
                ema.update(ema_source)
        total += loss.detach()
        pending += 1
        if progress is not None:
            progress.advance()
        if pending == log_interval or step == num_batches - 1:
            interval_loss = utils.mean_over_processes(total / pending).item()
            check_finite(
                interval_loss, f"the loss is {interval_loss} in epoch {epoch} before step {step + 1}", optimizer
            )
            epoch_loss += interval_loss * pending
            total.zero_()
            if progress is not None:
                progress.show(epoch=epoch, loss=interval_loss, lr=optimizer.param_groups[0]["lr"])
            pending = 0
    return {"loss": epoch_loss / num_batches, "lr": optimizer.param_groups[0]["lr"]}


def check_finite(value: float, finding: str, optimizer: Optimizer) -> None:
    """Raises NotFiniteError, with what was found and what may help, where ``value`` is no finite number."""
    if not math.isfinite(value):
        raise NotFiniteError(
            f"{finding}, at a learning rate of {optimizer.param_groups[0]['lr']:.2e}; a lower --lr, --clip-grad 1 or "
            "--amp-dtype float32 may help"
        )


def optimizer_step(
    model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler, clip_grad: float | None
) -> None:
    """Clip the gradient's norm, step, and forget the gradients."""
    if clip_grad is not None:
        scaler.unscale_(optimizer)
        dispatch_clip_grad(model.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    device: torch.device,
    autocast: AbstractContextManager,
    progress: utils.Progress | None = None,
) -> dict[str, float]:
    """Mean loss and accuracy in per cent over all images, each counted once whatever the number of processes.

    Returns:
        ``loss``, ``acc1`` and ``acc5``; with fewer than five classes ``acc5`` is over all of them.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, first right, among the first five, images
    count = 0
    for images, targets in loader:
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with autocast:
            logits = model(images)
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        sums[:3] += torch.stack([loss.double(), best[:, 0].sum().double(), best.sum().double()])
        count += len(targets)
        if progress is not None:
            progress.advance()
    sums[3] = count
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss, acc1, acc5, count = sums.tolist()
    return {"loss": loss / count, "acc1": 100 * acc1 / count, "acc5": 100 * acc5 / count}
