"""Distributed set-up, checkpoints and logging."""

import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from errno import EMFILE, ENFILE
from types import FrameType
from typing import TYPE_CHECKING

from common.errors import InputError, one_line
from common.launchers import World, find_world
from common.workers import WorkerError, describe, is_of_worker, worker_error_behind

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    pass

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
            f"{timeout.total_seconds() / 60:g} minutes (--dist-timeout): {one_line(error)[:300]}"
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
        return f"too many open files: raise the limit with 'ulimit -n' ({one_line(error)[:300]})"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or OUT_OF_MEMORY.search(str(error)):
        return (
            f"out of memory on process {rank()} of {world_size()} ({one_line(error)[:300]}); a smaller --batch-size "
            "with a larger --accum-iter, --grad-checkpointing, or fewer --num-workers need less"
        )
    if isinstance(error, RuntimeError) and world_size() > 1 and LOST.search(str(error)):
        return (
            f"process {rank()} of {world_size()} has lost its connection to the others: one of them was killed, or the "
            f"network is down ({one_line(error)[:300]})"
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
# Logging
# ---------------------------------------------------------------------------------------------------------------------


def print_main(line: str) -> None:
    """Print a line once, however many processes there are."""
    if is_main():
        tqdm.write(line)  # above a bar, if there is one
        sys.stdout.flush()
