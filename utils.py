"""Distributed set-up, checkpoints and logging."""

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from errno import EMFILE, ENFILE
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from launchers import World, find_world
from models import InputError, check_archive, found_in, in_a_line, written_whole
from workers import WorkerError, describe, is_of_worker, worker_error_behind

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

tqdm.set_lock(threading.RLock())  # its own is shared by processes, which print no bars here, and left behind by _exit

# ---------------------------------------------------------------------------------------------------------------------
# Distributed set-up
# ---------------------------------------------------------------------------------------------------------------------


# where the processes leave word for each other when they cannot reach each other's tensors any more
_store: dist.Store | None = None
_world: World | None = None


def init_distributed(timeout: timedelta) -> None:
    """Join the process group that a launcher (torchrun, srun, mpirun) describes in the environment.

    Args:
        timeout: how long one process waits for the others before it gives up.

    Raises:
        InputError: the others were not met, or the environment says half of what is needed.
    """
    global _store, _world
    _world = find_world()
    if _world is None:
        return
    os.environ.update(_world.environment())
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun restarts processes beside the store of those that failed, where they would find dead addresses
        _store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=_store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"process {_world.rank} of {_world.size} has not met the others at {_world.address}:{_world.port} within "
            f"{timeout.total_seconds() / 60:g} minutes (--dist-timeout): {in_a_line(error)[:300]}"
        ) from error


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """The number of this process on its machine."""
    return _world.local_rank if _world else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def maximum(*values: float) -> list[float]:
    """The largest of all processes, for each of ``values``; no device is waited for."""
    if dist.is_initialized():
        largest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()
    return list(values)


def from_main(value: object) -> object:
    """What the main process has, on all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def share_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of the first: batch norm's statistics are of each process's own images."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def leave_together() -> None:
    """End the process group when all processes have come here: with older torch, one that is left alone can hang."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def errors_reported_once(patience: timedelta) -> Iterator[None]:
    """An InputError on any process ends all of them with status 2, said once, by the first that met it.

    Every process has to pass here, and nothing inside may wait for another process.

    Args:
        patience: how much longer than another process one may need.
    """
    if dist.is_initialized():
        group = dist.new_group(backend="gloo", timeout=patience)
    message = None
    try:
        yield
    except InputError as error:
        message = str(error)
    messages = [message]
    if dist.is_initialized():
        messages = [None] * world_size()
        dist.all_gather_object(messages, message, group=group)
    failed = [r for r, m in enumerate(messages) if m is not None]
    if failed:
        if rank() == failed[0]:
            print(f"error: {message}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            dist.barrier()  # the launcher ends everybody as soon as one process is gone: not before it is said
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Failing and stopping
# ---------------------------------------------------------------------------------------------------------------------

LOST = re.compile(r"[Cc]onnection (was )?(closed|reset|refused)|[Bb]roken pipe|[Tt]imed? ?out|[Tt]imeout|Socket|socket")
OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|[Cc]annot allocate memory")


@contextmanager
def failures_reported_once() -> Iterator[None]:
    """Whatever goes wrong inside, on any process, is said once, and ends all processes.

    Unlike `errors_reported_once` it is for work in which the processes wait for each other: the first that fails says
    so and leaves, and the others, which then lose their connection to it, leave in silence.
    """
    try:
        yield
    except NotFiniteError as error:  # which all processes raise together
        if is_main():
            print(f"error: {error}", file=sys.stderr, flush=True)
        leave_together()
        sys.exit(1)
    except Exception as raised:
        error = worker_error_behind(raised) or raised
        known = what_happened(error)  # asked once: what a worker has left behind can be read once
        if known or world_size() > 1:
            message = f"error: {known}" if known else traceback.format_exc()
            if first_to_fail():
                where = f"process {rank()} of {world_size()} failed\n" if message.startswith("Traceback") else ""
                print(where + message, file=sys.stderr, flush=True)
            leave_at_once(2 if isinstance(error, InputError) else 1)
        raise


def what_happened(error: Exception) -> str | None:
    """One sentence about what the user can do something about; None for what should not happen."""
    if isinstance(error, (InputError, WorkerError)):
        return str(error)
    if is_of_worker(error):
        return str(describe(error))
    if isinstance(error, OSError) and error.errno in (EMFILE, ENFILE):
        return f"too many open files: raise the limit with 'ulimit -n' ({in_a_line(error)[:300]})"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or OUT_OF_MEMORY.search(str(error)):
        return (
            f"out of memory on process {rank()} of {world_size()} ({in_a_line(error)[:300]}); a smaller --batch-size "
            "with a larger --accum-iter, --grad-checkpointing, or fewer --num-workers need less"
        )
    if isinstance(error, RuntimeError) and world_size() > 1 and LOST.search(str(error)):
        return (
            f"process {rank()} of {world_size()} has lost its connection to the others: one of them was killed, or the "
            f"network is down ({in_a_line(error)[:300]})"
        )
    return None


def first_to_fail(patience: float = 10) -> bool:
    """Whether no other process has failed before this one; also true where the others cannot be asked any more."""
    answers: list[int] = []

    def ask() -> None:
        with suppress(RuntimeError):  # the store's process is gone
            answers.append(_store.add("failures", 1))

    if _store is not None:
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(patience)
    return not answers or answers[0] == 1


def leave_at_once(status: int, patience: float = 3) -> None:
    """End this process, with which the others lose their connection.

    Without torchrun the store is the main process's: it stays a moment, so that the others learn from it that they are
    not the first to fail.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main() and world_size() > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        end, others = time.monotonic() + patience, world_size() - 1
        closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
        closing.start()
        closing.join(patience)  # it can wait for what will never come
        while _store.add("failures", 0) <= others and time.monotonic() < end:
            time.sleep(0.02)
    os._exit(status)


class NotFiniteError(ArithmeticError):
    """The loss, or the gradient, is not a number any more."""


class Stopped(BaseException):
    """The run was asked to stop by a signal. It is no error, and nothing that handles errors is to keep it.

    Attributes:
        together: whether all processes raise this at the same place.
    """

    def __init__(self, number: int, together: bool = True):
        super().__init__(signal.Signals(number).name)
        self.status, self.together = 128 + number, together


class StopSignals:
    """Within this context SIGTERM, SIGUSR1, SIGINT and SIGHUP are noted; a second Ctrl-C ends the process as usual.

    A process that waits for data (`interruptible`) does not wait on: at once if it is alone, or if the batch does not
    come within some seconds, as the others may have it and wait for this process. A SIGHUP that was ignored before, by
    nohup, is ignored.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    PATIENCE = 5.0  # seconds
    current: "StopSignals | None" = None

    def __enter__(self) -> "StopSignals":
        self.noted, self.pid = 0, os.getpid()
        self.waiting = self.late = False
        self.alarm: threading.Timer | None = None
        numbers = [n for n in self.NUMBERS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._note) for number in numbers}
        StopSignals.current = self
        return self

    def __exit__(self, *exc_info: object) -> None:
        StopSignals.current = None
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:  # a data worker that has just been forked
            return
        if self.late:
            self.late = False
            if self.waiting:
                raise Stopped(self.noted, together=False)
            return
        if number == self.noted == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.noted = number
        if self.waiting:
            self._hurry()

    def _hurry(self) -> None:
        if world_size() == 1:
            raise Stopped(self.noted)
        if self.alarm is None:
            self.alarm = threading.Timer(self.PATIENCE, self._wake)
            self.alarm.daemon = True
            self.alarm.start()

    def _wake(self) -> None:
        """Interrupt what the main thread waits for."""
        self.late = True
        signal.pthread_kill(threading.main_thread().ident, self.noted)

    @contextmanager
    def wait(self) -> Iterator[None]:
        self.waiting = True
        try:
            if self.noted:
                self._hurry()
            yield
        finally:
            self.waiting = False
            if self.alarm is not None:
                self.alarm.cancel()
                self.alarm = None

    def check(self) -> None:
        """Raises Stopped, on all processes together, if any of them was asked to stop."""
        (number,) = maximum(self.noted)
        if number:
            raise Stopped(int(number))


def interruptible() -> AbstractContextManager[None]:
    """Around a wait for data, which the signals of the current `StopSignals` may interrupt by raising `Stopped`."""
    return nullcontext() if StopSignals.current is None else StopSignals.current.wait()


def all_are_at(place: str, patience: float = 5) -> bool:
    """Whether all processes come here within ``patience`` seconds, from the same ``place``: only then they go on."""
    if _store is None:
        return True
    try:
        _store.set(f"stopped {rank()}", place)
        names, end = [f"stopped {number}" for number in range(world_size())], time.monotonic() + patience
        while not _store.check(names) and time.monotonic() < end:
            time.sleep(0.05)
        return _store.check(names) and all(_store.get(name).decode() == place for name in names)
    except RuntimeError as error:  # the store's process is gone
        if is_of_worker(error):
            raise
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, content: dict, keep: int = 0) -> None:
    """Write tensors and plain data, whole or not at all; the ``keep`` files before it stay, as ``checkpoint.1.pth``, ….

    Raises:
        OSError: it cannot be written; ``path`` is then what it was before.
    """
    with written_whole(path) as unfinished:
        torch.save(content, unfinished)
        for age in range(keep, 1, -1):
            if older(path, age - 1).exists():
                os.replace(older(path, age - 1), older(path, age))
        if keep and path.exists():
            link(path, older(path, 1))
    age = keep + 1
    while older(path, age).exists():  # more were kept before
        older(path, age).unlink()
        age += 1


def older(path: Path, age: int) -> Path:
    """checkpoint.pth → checkpoint.2.pth"""
    return path.with_suffix(f".{age}{path.suffix}")


def link(path: Path, name: Path) -> None:
    """Make ``name`` the same file as ``path``, or a copy where the file system has no links."""
    with written_whole(name) as unfinished:
        Path(unfinished).unlink(missing_ok=True)  # a name of another file, if a process of this number was killed
        try:
            os.link(path, unfinished)
        except OSError:
            shutil.copyfile(path, unfinished)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run, passing over damaged ones with a warning; None if there is none."""
    ages = (re.fullmatch(r"checkpoint(?:\.(\d+))?\.pth", path.name) for path in folder.glob("checkpoint*.pth"))
    for match in sorted((match for match in ages if match), key=lambda match: int(match[1] or 0)):
        path = folder / match[0]
        try:
            check_archive(path)
            return path
        except InputError as error:
            print(f"warning: --resume auto passes over {error}", file=sys.stderr, flush=True)
    return None


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], source: str, found: Iterable[str] | None = None
) -> None:
    """``model.load_state_dict``, strictly.

    Args:
        found: the names in the file at ``source``, where they are not those of ``weights``.

    Raises:
        InputError: names or shapes differ; the message gives the first difference.
    """
    expected = model.state_dict()
    for name in [*expected, *weights]:
        ours = tuple(expected[name].shape) if name in expected else "nothing"
        theirs = tuple(weights[name].shape) if isinstance(weights.get(name), Tensor) else "nothing"
        if ours != theirs:
            names = sorted(weights if found is None else found, key=lambda name: name in expected)  # strange ones first
            raise InputError(
                f"{source} is of another architecture: {name} has {theirs}, this model {ours}; "
                f"found {found_in(dict.fromkeys(names))}"
            )
        if expected[name].is_floating_point() and not weights[name].is_floating_point():
            kind = str(weights[name].dtype).removeprefix("torch.")
            raise InputError(f"{source} holds {kind} in {name}, expected floating-point numbers: is it quantised?")
    model.load_state_dict(weights)


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The names of the optimiser's parameters in the order in which its state dict numbers them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


# ---------------------------------------------------------------------------------------------------------------------
# Logging
# ---------------------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Print a line once, however many processes there are."""
    if is_main():
        tqdm.write(line)  # above a bar, if there is one
        sys.stdout.flush()


class Output:
    """The files of a run. One that cannot be written, on a full disk say, is warned of, and the run goes on.

    Attributes:
        failed: what could not be written when it was last tried, and why.
    """

    def __init__(self):
        self.failed: dict[str, str] = {}
        self.warned: set[str] = set()

    @contextmanager
    def attempt(self, what: object) -> Iterator[None]:
        try:
            yield
            self.failed.pop(str(what), None)
        except OSError as error:
            if worker_error_behind(error):
                raise
            self.failed[str(what)] = error.strerror or str(error)
            self._warn(what, self.failed[str(what)])

    @contextmanager
    def attempt_extra(self, what: str) -> Iterator[None]:
        """The same for what is there to be looked at: no run fails for want of it, whatever its library raises."""
        try:
            yield
        except Exception as error:
            if worker_error_behind(error):
                raise
            reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {in_a_line(error)}"
            if what not in self.warned:
                self._warn(what, reason[:300])
            self.warned.add(what)

    def _warn(self, what: object, reason: str) -> None:
        tqdm.write(
            f"warning: {what} cannot be written ({reason}): the run goes on, what was written before is kept",
            file=sys.stderr,
        )


class Progress:
    """How far a long step is and the time it has left: a bar on a terminal, lines elsewhere; main process only."""

    def __init__(self, total: int, title: str, initial: int = 0):
        self.title, self.total, self.initial, self.done = title, total, initial, initial
        self.start = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            desc=title,
            initial=initial,
            disable=not (self.terminal and is_main()),
            leave=False,
            dynamic_ncols=True,
        )

    def advance(self, steps: int = 1) -> None:
        self.done += steps
        self.bar.update(steps)

    def show(self, numbers: Mapping[str, float]) -> None:
        """Numbers to stand beside the bar, or in the line that is printed now."""
        shown = {name: f"{value:.4g}" for name, value in numbers.items()}
        self.bar.set_postfix(shown)
        if is_main() and not self.terminal:
            seconds = (time.monotonic() - self.start) / (self.done - self.initial)
            left = tqdm.format_interval(seconds * (self.total - self.done))
            line = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"{self.title} {self.done}/{self.total}, {line}, {left} left", flush=True)

    def close(self) -> None:
        self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class EpochLog:
    """``log.txt``, one JSON object per epoch, and these and more numbers as TensorBoard events and ``curves.png``."""

    def __init__(self, folder: Path, epochs: Sequence[dict], output: Output, mirror: Callable[[dict, int], None]):
        """
        Args:
            epochs: the lines of the epochs before the first one of this run.
            mirror: called with all numbers and their place, in thousandths of an epoch, as TensorBoard gets them.
        """
        self.folder, self.epochs, self.output, self.mirror = folder, list(epochs), output, mirror
        self.path, self.curves = folder / "log.txt", folder / "curves.png"
        self.events = None

    def begin(self, place: int) -> None:
        """Keep what is before this run, and of the events those up to ``place`` thousandths of an epoch."""
        self.place = place
        self._write()
        if self.epochs:
            self._draw()

    def add(self, numbers: dict) -> None:
        """The numbers of an epoch."""
        self.epochs.append(numbers)
        self._write()
        self.show(numbers, numbers["epoch"] + 1)
        self._draw()

    def show(self, numbers: Mapping[str, float], epochs: float) -> None:
        """Numbers that are to be looked at alone, after so many ``epochs``."""
        self.mirror(numbers, round(1000 * epochs))
        with self.output.attempt_extra("TensorBoard's events"):
            try:
                if self.events is None:
                    from torch.utils.tensorboard import SummaryWriter  # seconds that other runs need not wait for

                    self.events = SummaryWriter(str(self.folder), purge_step=self.place + 1)
                for name, value in numbers.items():
                    self.events.add_scalar(name, value, round(1000 * epochs))
                self.events.flush()
            except Exception:
                self.events, self.place = None, round(1000 * epochs)  # another file for what comes after
                raise

    def close(self) -> None:
        if self.events is not None:
            with self.output.attempt_extra("TensorBoard's events"):
                self.events.close()

    def _write(self) -> None:
        with self.output.attempt(self.path), written_whole(self.path) as unfinished:
            Path(unfinished).write_text("".join(json.dumps(line) + "\n" for line in self.epochs))

    def _draw(self) -> None:
        with self.output.attempt_extra(str(self.curves)), written_whole(self.curves) as unfinished:
            self._figure().savefig(unfinished, format="png", dpi=120)

    def _figure(self) -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.5), layout="constrained")
        for axes, quantity, unit in zip(figure.subplots(1, 2), ("loss", "acc1"), ("loss", "accuracy, %"), strict=True):
            for name in sorted({name for line in self.epochs for name in line if name.endswith(quantity)}):
                points = [(line["epoch"] + 1, line[name]) for line in self.epochs if name in line]
                axes.plot(*zip(*points, strict=True), label=name.removesuffix("_" + quantity), marker=".")
            axes.set(xlabel="epoch", ylabel=unit)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        return figure
