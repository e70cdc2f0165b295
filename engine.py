"""One epoch of training, and evaluation."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import count

import utils
from common.errors import InputError
from samplers import derived_seed
from utils import NotFiniteError

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

ALL_PROCESSES = 2**32 - 1  # in place of the number of one of them
HOPELESS = 50  # steps left out in a row; float16 alone may need 16 to find its scale


class Position:
    """How far an epoch has come: what a checkpoint says so that the next batch comes next.

    Attributes:
        steps: batches of each process.
        images: of all processes together.
        sums: (2,): the losses of this process's images, and the number of these images, without losses that were not
            finite. In float64 a sum of float32 numbers is exact: it does not matter where it was interrupted.
    """

    def __init__(self, steps: int = 0, images: int = 0, loss: float = 0.0, counted: float = 0.0):
        self.steps, self.images = steps, images
        self.sums = torch.tensor([loss, counted], dtype=torch.float64)
        self.recent: list[tuple[Tensor, int]] = []  # losses and images that are not in the sums yet
        self.group: list[tuple[Tensor, int]] = []  # those of batches without an optimiser step so far

    def add(self, loss: Tensor, images: int) -> None:
        """The mean ``loss`` () over ``images``, which count when the optimiser has made its step with them."""
        self.group.append((loss, images))

    def advance(self, steps: int, images: int) -> None:
        """The optimiser has made a step: ``steps`` batches of each process, ``images`` more of all of them."""
        self.steps, self.images = steps, self.images + images
        self.recent += self.group
        self.group.clear()

    def totals(self) -> Tensor:
        """``sums`` over all processes, which have to ask together."""
        if self.recent:
            losses, images = zip(*self.recent, strict=True)
            losses, images = torch.stack(losses).double(), torch.tensor(images, device=self.sums.device)
            finite = losses.isfinite()
            self.sums += torch.stack([(images * losses.where(finite, 0.0)).sum(), (images * finite).sum()])
            self.recent.clear()
        return utils.sum_over_processes(self.sums)

    def state(self) -> dict[str, float]:
        """Plain data to make the position of again, on the main process; the others begin with empty sums."""
        loss, counted = self.totals().tolist()
        return {"steps": self.steps, "images": self.images, "loss": loss, "counted": counted}


class Stopwatch:
    """Seconds that a device is busy with what is done inside ``with``, if they are read when it is done with it."""

    def __init__(self, device: torch.device):
        self.on_device, self.spans = device.type == "cuda", []

    def __enter__(self) -> None:
        self.spans.append([self._now()])

    def __exit__(self, *exc_info: object) -> None:
        self.spans[-1].append(self._now())

    def _now(self) -> float | torch.cuda.Event:
        if not self.on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        return sum(start.elapsed_time(end) / 1000 if self.on_device else end - start for start, end in self.spans)


class StepMeter:
    """What there is to see of an epoch: losses, kept on the device, and where the time goes.

    Nothing waits for the device but `flush`.
    """

    def __init__(self, position: Position, device: torch.device, optimizer: Optimizer, epoch: int, skip_nan: bool):
        position.sums = position.sums.to(device)
        self.position, self.optimizer, self.epoch, self.skip_nan = position, optimizer, epoch, skip_nan
        self.seen = position.totals().tolist()
        self.last_loss = math.nan  # that was finite, before the losses of the steps since the last look
        self.skipped_in_a_row = 0
        self.device = device
        self.begin()

    def begin(self) -> None:
        self.start, self.waited, self.images, self.skipped = time.perf_counter(), 0.0, 0, 0
        self.losses: list[Tensor] = []
        self.teaching = Stopwatch(self.device)

    def timed(self, loader: Iterable) -> Iterator:
        """The batches of ``loader``, with the time that they are waited for."""
        batches = iter(loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            self.images += len(batch[0])
            yield batch

    def teacher_logits(self, teacher: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """What ``teacher`` says of ``images``, with the time that takes."""
        with self.teaching:
            return teacher(images)

    def add(self, loss: Tensor, images: int) -> None:
        """The mean ``loss`` () over the ``images`` of the next step, of which nothing is computed before the look."""
        self.position.add(loss, images)
        self.losses.append(loss)

    def flush(self, norm: Tensor, judge_norm: bool) -> dict[str, float]:
        """What happened since the last look, of all processes.

        Args:
            norm: (), of the last gradient.
            judge_norm: whether a gradient that is not finite is an error; scaled for float16, it is not.

        Raises:
            NotFiniteError: a loss or the gradient was not finite; all processes raise it together.
        """
        # the one wait for the device
        *values, norm = torch.cat([self.position.totals(), torch.stack([*self.losses, norm]).double()]).tolist()
        seen, losses = values[:2], values[2:]
        finite = [math.isfinite(loss) for loss in losses]
        behind = len(losses) - finite.index(False) if False in finite else 0  # steps since the first bad one
        behind = int(utils.maximum(behind)[0])
        if not self.skip_nan and behind:
            raise self.error("the loss is not finite", self.position.steps - behind + 1)
        if not self.skip_nan and judge_norm and not math.isfinite(norm):
            raise self.error("the gradient is not finite", self.position.steps)
        loss, counted = (now - then for now, then in zip(seen, self.seen, strict=True))
        self.seen, self.last_loss = seen, self.last_finite(losses)
        seconds = time.perf_counter() - self.start
        numbers = {
            "loss": loss / counted if counted else math.nan,
            "lr": self.optimizer.param_groups[0]["lr"],
            "gradient norm": norm,
            "images/s": self.images * utils.world_size() / seconds,
            "waiting for data": self.waited / seconds,
            **({"teacher": self.teaching.seconds() / seconds} if self.teaching.spans else {}),
            **({"steps left out": self.skipped} if self.skip_nan else {}),
        }
        self.begin()
        return numbers

    def count(self, stepped: bool) -> None:
        """An optimiser step, or one that was left out; raises NotFiniteError where all of them seem to be."""
        self.skipped += not stepped
        self.skipped_in_a_row = 0 if stepped else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == HOPELESS:
            raise self.error(f"the gradient was not finite in {HOPELESS} steps in a row", self.position.steps)

    def last_finite(self, losses: list[float]) -> float:
        """The last loss that was a finite number; ``losses`` are those since the last look."""
        return next((loss for loss in reversed(losses) if math.isfinite(loss)), self.last_loss)

    def error(self, finding: str, step: int) -> NotFiniteError:
        loss = self.last_finite(torch.stack(self.losses).tolist() if self.losses else [])
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
    after_step: Callable[[], None] = lambda: None,
    report: Callable[[dict[str, float]], None] = lambda numbers: None,
) -> dict[str, float]:
    """Train on every batch of ``loader`` once.

    Args:
        criterion: (logits, targets, the teacher's logits) → loss, the mean over the batch.
        loader: the batches of the epoch, or what is left of them after ``position``.
        teacher: images → logits; asked once for each batch, in their order, before the model.
        accum_iter: batches whose mean gradient makes one optimiser step; the last group of an epoch may be smaller.
        ema_source: the module, without wrappers, that ``ema`` averages.
        seed: the random numbers of a step (mixup, dropout, drop-path) follow from it, the epoch, the step and the
            process, so that they do not depend on what was drawn before.
        log_interval: steps between two looks at the loss, the only moments the device is waited for (``skip_nan``,
            and float16 with an optimiser that is not fused, look at every step whether the gradients are finite).
        skip_nan: leave out steps whose gradient is not finite.
        position: where to begin; it moves with every optimiser step.
        after_step: called after every optimiser step.
        report: called at every look with loss, learning rate, norm of the gradient, images per second of all
            processes, and the shares of time spent waiting for images and with the teacher.

    Returns:
        ``loss``, the mean over the whole epoch and all processes, and ``lr`` of the first parameter group.

    Raises:
        NotFiniteError: loss or gradient was not finite; all processes raise it at the same step.
    """
    model.train()
    position = Position() if position is None else position
    meter = StepMeter(position, device, optimizer, epoch, skip_nan)
    first, num_batches, images_of_group = position.steps, len(loader), 0
    batches = undone_if_stopped(meter.timed(loader), model, accum_iter)
    for place, (images, targets) in enumerate(mixed(batches, device, mixup, seed, epoch, first)):
        images_of_group += len(images) * utils.world_size()
        group = min(accum_iter, num_batches - place // accum_iter * accum_iter)
        last_of_group = place % accum_iter == group - 1
        synchronised = nullcontext() if last_of_group or not hasattr(model, "no_sync") else model.no_sync()
        with synchronised:
            with autocast:
                teacher_logits = None if teacher is None else meter.teacher_logits(teacher, images)
                loss = criterion(model(images), targets, teacher_logits)
            scaler.scale(loss / group).backward()
        meter.add(loss.detach(), len(images))
        if not last_of_group:
            continue
        log_now = len(meter.losses) >= log_interval or place == num_batches - 1
        # what the optimiser draws has to be the same in all processes
        random_seed(derived_seed(seed, epoch, first + place, ALL_PROCESSES))
        norm, stepped = optimizer_step(model, optimizer, scaler, clip_grad, log_now, skip_nan)
        if stepped and ema is not None:
            ema.update(ema_source)
        position.advance(first + place + 1, images_of_group)
        images_of_group = 0
        meter.count(stepped)
        if log_now:
            report(meter.flush(norm, judge_norm=not scaler.is_enabled()))
        after_step()
    loss, counted = position.totals().tolist()
    if not counted:
        raise meter.error("no loss was finite", position.steps)
    return {"loss": loss / counted, "lr": optimizer.param_groups[0]["lr"]}


def undone_if_stopped(batches: Iterator, model: nn.Module, accum_iter: int) -> Iterator:
    """``batches``; if the wait for one ends the run, the buffers are those before the optimiser step it belongs to.

    The rest of what a checkpoint holds changes with that step alone.
    """
    buffers, before = [*model.buffers()] if accum_iter > 1 else [], []
    for place in count():
        if place % accum_iter == 0:
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


def mixed(
    batches: Iterable, device: torch.device, mixup: Mixup | None, seed: int, epoch: int, first: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the device, mixed up; with each of them the random numbers of its step begin, from ``first`` on."""
    for step, (images, targets) in enumerate(batches, first):
        random_seed(derived_seed(seed, epoch, step, utils.rank()))
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        yield (images, targets) if mixup is None else mixup(images, targets)


def optimizer_step(
    model: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    clip_grad: float | None,
    measure: bool,
    skip_nan: bool,
) -> tuple[Tensor | None, bool]:
    """Clip the gradient's norm, step, and forget the gradients.

    Returns:
        The norm before it was clipped, if it was clipped or is to be measured, and whether the step was made.
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
        scaler.step(optimizer)
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
    """Mean loss and accuracy in per cent over all images, each counted once whatever the number of processes.

    Args:
        after_batch: called after every batch, on all processes equally often.

    Returns:
        ``loss``, ``acc1`` and ``acc5``; with fewer than five classes ``acc5`` is over all of them.

    Raises:
        InputError: there was no image, as none could be read.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, first right, among the first five, images
    count, most_batches = 0, int(utils.maximum(len(loader))[0])
    for images, targets in loader:
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if len(images):  # or none of them could be read
            with autocast:
                logits = model(images)
            logits = logits.float()
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
            loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
            sums[:3] += torch.stack([loss.double(), best[:, 0].sum().double(), best.sum().double()])
        count += len(targets)
        after_batch()
    for _ in range(most_batches - len(loader)):  # another process has one batch more
        after_batch()
    sums[3] = count
    loss, acc1, acc5, count = utils.sum_over_processes(sums).tolist()
    if not count:
        raise InputError("none of the test images can be read")
    return {"loss": loss / count, "acc1": 100 * acc1 / count, "acc5": 100 * acc5 / count}
