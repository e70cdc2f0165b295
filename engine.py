"""One epoch of training, and evaluation."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import count

import utils
from common.devices import exact, exact_device, timer_event, to_device
from common.errors import InputError
from samplers import derived_seed
from utils import NotFiniteError

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

ALL_PROCESSES = 2**32 - 1  # in place of a rank, for random numbers that all processes share
MAX_SKIPPED_IN_A_ROW = 50  # steps; float16 alone may skip 16 until it has found its scale


class Position:
    """The progress of an epoch, which a checkpoint stores so that training resumes with the next batch.

    Attributes:
        steps: batches of each process.
        images: of all processes together.
        sums: (2,): the sum of this process's losses over images, and the number of these images; losses that are not
            finite are left out. In float64 a sum of float32 numbers is exact, so interruptions do not change it.
    """

    def __init__(self, steps: int = 0, images: int = 0, loss: float = 0.0, counted: float = 0.0):
        self.steps, self.images = steps, images
        self.sums = torch.tensor([loss, counted], dtype=torch.float64)
        self.recent: list[tuple[Tensor, int]] = []  # losses and images that are not in the sums yet
        self.group: list[tuple[Tensor, int]] = []  # those of batches since the last optimiser step

    def add(self, loss: Tensor, images: int) -> None:
        """Add the mean ``loss`` () over ``images``; it counts after the optimiser step."""
        self.group.append((loss, images))

    def advance(self, steps: int, images: int) -> None:
        """Count an optimiser step: ``steps`` batches of each process so far, ``images`` more of all processes."""
        self.steps, self.images = steps, self.images + images
        self.recent += self.group
        self.group.clear()

    def totals(self) -> Tensor:
        """``sums`` over all processes; all of them have to call this together."""
        if self.recent:
            losses, images = zip(*self.recent, strict=True)
            losses, images = exact(torch.stack(losses)), torch.tensor(images, device=self.sums.device)
            finite = losses.isfinite()
            self.sums += torch.stack([(images * losses.where(finite, 0.0)).sum(), (images * finite).sum()])
            self.recent.clear()
        return utils.sum_over_processes(self.sums)

    def state(self) -> dict[str, float]:
        """Plain data that restore the position on the main process; the others start with empty sums."""
        loss, counted = self.totals().tolist()
        return {"steps": self.steps, "images": self.images, "loss": loss, "counted": counted}


class DeviceTimer:
    """The time that the device spends on what runs inside ``with``, measured without synchronisation.

    Where the device has no events, as on the CPU, it is the time of the process.
    """

    def __init__(self, device: torch.device):
        self.device, self.spans = device, []

    def __enter__(self) -> None:
        self.spans.append([self._now()])

    def __exit__(self, *exc_info: object) -> None:
        self.spans[-1].append(self._now())

    def _now(self) -> float | torch.Event:
        return timer_event(self.device) or time.perf_counter()

    def seconds(self) -> float:
        """The sum over all spans; of a device with events only valid after a synchronisation."""
        return sum(
            end - start if isinstance(end, float) else start.elapsed_time(end) / 1000 for start, end in self.spans
        )


class StepMeter:
    """Losses, throughput and waiting times of an epoch. The losses stay on the device; only `flush` synchronises."""

    def __init__(self, position: Position, device: torch.device, optimizer: Optimizer, epoch: int, skip_nan: bool):
        position.sums = position.sums.to(exact_device(device))
        self.position, self.optimizer, self.epoch, self.skip_nan = position, optimizer, epoch, skip_nan
        self.flushed = position.totals().tolist()
        self.last_loss = math.nan  # the last finite one before the last flush
        self.skipped_in_a_row = 0
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self.start, self.data_seconds, self.images, self.skipped = time.perf_counter(), 0.0, 0, 0
        self.losses: list[Tensor] = []
        self.teacher_timer = DeviceTimer(self.device)

    def timed(self, loader: Iterable) -> Iterator:
        """The batches of ``loader``, with the waiting time for each measured."""
        batches = iter(loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.data_seconds += time.perf_counter() - start
            if batch is None:
                return
            self.images += len(batch[0])
            yield batch

    def teacher_logits(self, teacher: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        with self.teacher_timer:
            return teacher(images)

    def add_loss(self, loss: Tensor, images: int) -> None:
        """Add the mean ``loss`` () over the ``images`` of a batch; nothing is computed until `flush`."""
        self.position.add(loss, images)
        self.losses.append(loss)

    def flush(self, norm: Tensor, check_norm: bool) -> dict[str, float]:
        """The numbers to log since the last flush, over all processes. Waits for the device.

        Args:
            norm: (), of the last gradient.
            check_norm: whether a gradient that is not finite is an error; with float16's loss scaling it is not.

        Returns:
            Loss, learning rate, norm of the gradient, images per second of all processes, and the shares of time spent
            waiting for data and with the teacher.

        Raises:
            NotFiniteError: a loss or the gradient is not finite; all processes raise it together.
        """
        # the one synchronisation
        *values, norm = torch.cat([self.position.totals(), exact(torch.stack([*self.losses, norm]))]).tolist()
        totals, losses = values[:2], values[2:]
        finite = [math.isfinite(loss) for loss in losses]
        behind = len(losses) - finite.index(False) if False in finite else 0  # steps since the first bad one
        behind = int(utils.max_over_processes(behind)[0])
        if not self.skip_nan and behind:
            raise self.not_finite("the loss is not finite", self.position.steps - behind + 1)
        if not self.skip_nan and check_norm and not math.isfinite(norm):
            raise self.not_finite("the gradient is not finite", self.position.steps)
        loss, counted = (now - before for now, before in zip(totals, self.flushed, strict=True))
        self.flushed, self.last_loss = totals, self.last_finite_loss(losses)
        seconds = time.perf_counter() - self.start
        numbers = {
            "loss": loss / counted if counted else math.nan,
            "lr": self.optimizer.param_groups[0]["lr"],
            "gradient norm": norm,
            "images/s": self.images * utils.world_size() / seconds,
            "waiting for data": self.data_seconds / seconds,
            **({"teacher": self.teacher_timer.seconds() / seconds} if self.teacher_timer.spans else {}),
            **({"steps left out": self.skipped} if self.skip_nan else {}),
        }
        self.reset()
        return numbers

    def count_step(self, stepped: bool) -> None:
        """Count an optimiser step or a skipped one; raises NotFiniteError if too many are skipped in a row."""
        self.skipped += not stepped
        self.skipped_in_a_row = 0 if stepped else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            finding = f"the gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row"
            raise self.not_finite(finding, self.position.steps)

    def epoch_mean(self) -> dict[str, float]:
        """``loss``, the mean over the epoch and all processes, and ``lr`` of the first parameter group.

        Raises:
            NotFiniteError: no loss was finite.
        """
        loss, counted = self.position.totals().tolist()
        if not counted:
            raise self.not_finite("no loss was finite", self.position.steps)
        return {"loss": loss / counted, "lr": self.optimizer.param_groups[0]["lr"]}

    def last_finite_loss(self, losses: list[float]) -> float:
        """The last finite loss, where ``losses`` are those since the last flush."""
        return next((loss for loss in reversed(losses) if math.isfinite(loss)), self.last_loss)

    def not_finite(self, finding: str, step: int) -> NotFiniteError:
        loss = self.last_finite_loss(torch.stack(self.losses).tolist() if self.losses else [])
        return not_finite(f"{finding} in epoch {self.epoch} at step {step}, after a loss of {loss:.4g}", self.optimizer)


def not_finite(finding: str, optimizer: Optimizer) -> NotFiniteError:
    return NotFiniteError(
        f"{finding}, at a learning rate of {optimizer.param_groups[0]['lr']:.2e}; a lower --lr, --clip-grad 1, "
        "--amp-dtype float32 or --on-nan rollback may help"
    )


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    loader: Iterable,
    optimizer: Optimizer,
    device: torch.device,
    epoch: int,
    *,
    scaler: torch.amp.GradScaler,
    autocast: AbstractContextManager,
    teacher: Callable[[Tensor], Tensor] | None = None,
    mixup: Mixup | None = None,
    clip_grad: float | None = None,
    accum_iter: int = 1,
    ema: ModelEmaV3 | None = None,
    ema_source: nn.Module | None = None,
    seed: int = 0,
    log_interval: int = 50,
    skip_nan: bool = False,
    position: Position | None = None,
    before_batch: Callable[[int], None] = lambda step: None,
    after_step: Callable[[], None] = lambda: None,
    report: Callable[[dict[str, float]], None] = lambda numbers: None,
) -> dict[str, float]:
    """Train on every batch of ``loader`` once. Arguments that are not listed are the options of the same name.

    Args:
        criterion: (logits, targets, teacher logits) → loss, the mean over the batch.
        loader: the batches of the epoch, or those left after ``position``, which advances with every optimiser step.
        teacher: images → logits; called once per batch, in order, before the model.
        ema_source: the module, without wrappers, that ``ema`` averages.
        seed: determines mixup, dropout and drop-path, together with the epoch, the step and the rank.
        log_interval: log every N steps; the only host–device synchronisation (``skip_nan`` adds one per step).
        before_batch, after_step, report: called before each batch with its number in the epoch; after each optimiser
            step; at each log with the numbers of `StepMeter.flush`.

    Returns:
        ``loss``, the mean over the epoch and all processes, and ``lr`` of the first parameter group.

    Raises:
        NotFiniteError: the loss or the gradient is not finite; all processes raise it at the same step.
    """
    model.train()
    meter = StepMeter(position := position or Position(), device, optimizer, epoch, skip_nan)
    first, num_batches = position.steps, len(loader)
    batches = restore_buffers_if_stopped(meter.timed(loader), model, accum_iter)
    batches = prepared(batches, device, mixup, seed, epoch, first, before_batch)
    groups = accumulate_gradients(batches, num_batches, accum_iter, model, criterion, teacher, scaler, autocast, meter)
    for done, images in groups:
        log_now = len(meter.losses) >= log_interval or done == num_batches
        random_seed(derived_seed(seed, epoch, first + done - 1, ALL_PROCESSES))  # for optimisers that draw numbers
        norm, stepped = optimizer_step(model, optimizer, scaler, clip_grad, log_now, skip_nan)
        if stepped and ema is not None:
            ema.update(ema_source)
        position.advance(first + done, images)
        meter.count_step(stepped)
        if log_now:
            report(meter.flush(norm, check_norm=not scaler.is_enabled()))
        after_step()
    return meter.epoch_mean()


def restore_buffers_if_stopped(batches: Iterator, model: nn.Module, accum_iter: int) -> Iterator:
    """Pass ``batches`` on; if a stop signal interrupts a group, restore the buffers from before its first batch.

    Buffers such as batch norm's statistics change in every forward pass; everything else that a checkpoint holds only
    changes with the optimiser step.
    """
    buffers, before = [*model.buffers()] if accum_iter > 1 else [], []
    for i in count():
        if i % accum_iter == 0:
            before = [buffer.clone() for buffer in buffers]
        try:
            batch = next(batches, None)
        except utils.Stopped:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            raise
        if batch is None:
            return
        yield batch


def prepared(
    batches: Iterable,
    device: torch.device,
    mixup: Mixup | None,
    seed: int,
    epoch: int,
    first: int,
    before_batch: Callable[[int], None],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Move batches to the device and apply mixup. Seeds the random numbers of each step, counted from ``first``."""
    for step, (images, targets) in enumerate(batches, first):
        before_batch(step)
        random_seed(derived_seed(seed, epoch, step, utils.rank()))
        images, targets = to_device(images, device), to_device(targets, device)
        yield (images, targets) if mixup is None else mixup(images, targets)


def accumulate_gradients(
    batches: Iterable[tuple[Tensor, Tensor]],
    num_batches: int,
    accum_iter: int,
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    teacher: Callable[[Tensor], Tensor] | None,
    scaler: torch.amp.GradScaler,
    autocast: AbstractContextManager,
    meter: StepMeter,
) -> Iterator[tuple[int, int]]:
    """Forward and backward; yields when the gradients of ``accum_iter`` batches are complete, or of the last ones.

    DDP synchronises the gradients only in the last backward pass of a group.

    Yields:
        The number of batches done, and the images of the group over all processes.
    """
    images_of_group = 0
    for i, (images, targets) in enumerate(batches):
        images_of_group += len(images) * utils.world_size()
        group = min(accum_iter, num_batches - i // accum_iter * accum_iter)
        last_of_group = i % accum_iter == group - 1
        with nullcontext() if last_of_group or not hasattr(model, "no_sync") else model.no_sync():
            with autocast:
                teacher_logits = None if teacher is None else meter.teacher_logits(teacher, images)
                loss = criterion(model(images), targets, teacher_logits)
            scaler.scale(loss / group).backward()
        meter.add_loss(loss.detach(), len(images))
        if last_of_group:
            yield i + 1, images_of_group
            images_of_group = 0


def optimizer_step(
    model: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    clip_grad: float | None,
    measure: bool,
    skip_nan: bool,
) -> tuple[Tensor | None, bool]:
    """Clip the norm of the gradient, step, and reset the gradients.

    Args:
        measure: compute the norm even without ``clip_grad``.

    Returns:
        The norm before clipping, or None if it is not needed, and whether the step was made.
    """
    norm, finite = None, True
    if clip_grad is not None or measure or skip_nan:
        scaler.unscale_(optimizer)
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = get_total_norm(parameter.grad for parameter in parameters)
        if clip_grad is not None:
            clip_grads_with_norm_(parameters, clip_grad, norm)
        finite = not skip_nan or bool(norm.isfinite())
    if finite:
        scaler.step(optimizer)  # with float16 and an optimiser that is not fused this synchronises, too
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    device: torch.device,
    autocast: AbstractContextManager,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean loss and accuracy in percent; every image counts once, whatever the number of processes.

    Args:
        after_batch: called after every batch, equally often on all processes.

    Returns:
        ``loss``, ``acc1`` and ``acc5``; with fewer than five classes ``acc5`` is over all of them.

    Raises:
        InputError: no image could be read.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=exact_device(device))  # loss, top-1, top-5, images
    count, most_batches = 0, int(utils.max_over_processes(len(loader))[0])
    for images, targets in loader:
        images, targets = to_device(images, device), to_device(targets, device)
        if len(images):  # a batch is empty if none of its images could be read
            with autocast:
                logits = model(images)
            logits = logits.float()
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
            loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
            sums[:3] += exact(torch.stack([loss, best[:, 0].sum().float(), best.sum().float()]))
        count += len(targets)
        after_batch()
    for _ in range(most_batches - len(loader)):  # another process may have one batch more
        after_batch()
    sums[3] = count
    loss, acc1, acc5, count = utils.sum_over_processes(sums).tolist()
    if not count:
        raise InputError("none of the test images can be read")
    return {"loss": loss / count, "acc1": 100 * acc1 / count, "acc5": 100 * acc5 / count}
