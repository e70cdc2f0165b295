"""Distributed set-up, failures and stop signals, printing on the main process."""

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

from common.devices import backends_of
from common.errors import InputError, one_line
from common.launchers import World, find_world
from common.workers import WorkerError, as_worker_error, find_worker_error, is_worker_error

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # the default lock is shared between processes, and os._exit leaks it

# ---------------------------------------------------------------------------------------------------------------------
# Distributed set-up
# ---------------------------------------------------------------------------------------------------------------------


# the processes exchange messages through it when collectives no longer work
_store: dist.Store | None = None
_world: World | None = None


def init_distributed(timeout: timedelta, device: str = "auto") -> None:
    """Join the process group that a launcher (torchrun, srun, mpirun) describes in the environment.

    Args:
        timeout: of the rendezvous and of every collective.
        device: the value of --device, which decides how tensors of the device are exchanged.

    Raises:
        InputError: the rendezvous failed, or the environment variables are incomplete.
    """
    global _store, _world
    _world = find_world()
    if _world is None:
        return
    os.environ.update(_world.environment())
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun keeps the store when it restarts processes: the prefix hides the addresses of those that failed
        _store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backends = backends_of(device, shared=_world.local_size != 1)
        dist.init_process_group(backends, store=_store, rank=rank, world_size=world_size, timeout=timeout)
        if backends.count("gloo") > 1:
            print_main(f"tensors of --device {device} are exchanged through gloo, by way of the CPU")
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"process {_world.rank} of {_world.size} has not met the others at {_world.address}:{_world.port} within "
            f"{timeout.total_seconds() / 60:g} minutes (--dist-timeout): {one_line(error)[:300]}"
        ) from error


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """The rank of this process on its host."""
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


def max_over_processes(*values: float) -> list[float]:
    """The maximum over all processes, for each of ``values``. Does not wait for the device."""
    if dist.is_initialized():
        largest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()
    return list(values)


def broadcast_from_main(value: object) -> object:
    """The main process's ``value``, on all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers of rank 0 to all processes: batch norm's statistics differ, as each has its own images."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def broadcast_weights(model: nn.Module) -> None:
    """Copy the parameters and buffers of rank 0 to all processes, whose hardware may have rounded differently."""
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            whole = tensor.contiguous()  # the tensor itself, or a copy
            dist.broadcast(whole, src=0)
            tensor.copy_(whole)


def shutdown_distributed() -> None:
    """Destroy the process group after a barrier: with older torch a process that is left alone can hang."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def errors_reported_once(patience: timedelta) -> Iterator[None]:
    """End all processes with status 2 if any of them raises an InputError; only the lowest such rank prints it.

    All processes must enter this context, and no code inside may wait for another process.

    Args:
        patience: how long the processes wait for each other at the end.
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
            dist.barrier()  # the launcher ends all processes as soon as one exits: print first
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Failures and stop signals
# ---------------------------------------------------------------------------------------------------------------------

CONNECTION_LOST = re.compile(
    r"[Cc]onnection (was )?(closed|reset|refused)|[Bb]roken pipe|[Tt]imed? ?out|[Tt]imeout|Socket|socket"
)
NOT_ON_DEVICE = re.compile(
    r"operator '?[\w:.]+'? is not currently implemented for the \w+ device|"
    r"Could not run '[\w:.]+' with arguments from the '\w+' backend"
)
OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|[Cc]annot allocate memory")


@contextmanager
def failures_reported_once() -> Iterator[None]:
    """End all processes if any of them raises an exception; only the first to fail prints it.

    Unlike `errors_reported_once` this is for code in which the processes wait for each other: the first to fail prints
    its error and exits, the others then lose their connection to it and exit silently.
    """
    try:
        yield
    except NotFiniteError as error:  # raised by all processes together
        if is_main():
            print(f"error: {error}", file=sys.stderr, flush=True)
        shutdown_distributed()
        sys.exit(1)
    except Exception as raised:
        error = find_worker_error(raised) or raised
        known = known_cause(error)  # called once: it reads a worker's message from a pipe
        if known or world_size() > 1:
            message = f"error: {known}" if known else traceback.format_exc()
            if is_first_failure():
                where = f"process {rank()} of {world_size()} failed\n" if message.startswith("Traceback") else ""
                print(where + message, file=sys.stderr, flush=True)
            abort(2 if isinstance(error, InputError) else 1)
        raise


def known_cause(error: Exception) -> str | None:
    """The message for an error that the user can do something about; None for a bug."""
    if isinstance(error, (InputError, WorkerError)):
        return str(error)
    if is_worker_error(error):
        return str(as_worker_error(error))
    if isinstance(error, OSError) and error.errno in (EMFILE, ENFILE):
        return f"too many open files: raise the limit with 'ulimit -n' ({one_line(error)[:300]})"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or OUT_OF_MEMORY.search(str(error)):
        return (
            f"out of memory on process {rank()} of {world_size()} ({one_line(error)[:300]}); a smaller --batch-size "
            "with a larger --accum-iter, --grad-checkpointing, or fewer --num-workers need less"
        )
    if isinstance(error, NotImplementedError) and (found := NOT_ON_DEVICE.search(str(error))):
        return (
            f"torch {torch.__version__} lacks an operator of this run on the device ({found[0]}); expected --device "
            "cpu, or with Apple's MPS PYTORCH_ENABLE_MPS_FALLBACK=1 in the environment"
        )
    if isinstance(error, RuntimeError) and world_size() > 1 and CONNECTION_LOST.search(str(error)):
        return (
            f"process {rank()} of {world_size()} has lost its connection to the others: one of them was killed, or the "
            f"network is down ({one_line(error)[:300]})"
        )
    return None


def is_first_failure(patience: float = 10) -> bool:
    """Whether no other process failed before this one; also true if the store is unreachable."""
    answers: list[int] = []

    def ask() -> None:
        with suppress(RuntimeError):  # the process that holds the store has exited
            answers.append(_store.add("failures", 1))

    if _store is not None:
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(patience)
    return not answers or answers[0] == 1


def abort(status: int, patience: float = 3) -> None:
    """End this process at once; the others lose their connection to it.

    Without torchrun the main process holds the store: it waits a moment, so that the others can find out there that
    they are not the first to fail.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main() and world_size() > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        end, others = time.monotonic() + patience, world_size() - 1
        closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
        closing.start()
        closing.join(patience)  # it can block for ever
        while _store.add("failures", 0) <= others and time.monotonic() < end:
            time.sleep(0.02)
    os._exit(status)


class NotFiniteError(ArithmeticError):
    """The loss or the gradient is NaN or infinite."""


class Stopped(BaseException):
    """A signal asked the run to stop. Not an Exception, so that error handlers let it pass.

    Attributes:
        together: whether all processes raise this at the same place.
    """

    def __init__(self, number: int, together: bool = True):
        super().__init__(signal.Signals(number).name)
        self.status, self.together = 128 + number, together


class StopSignals:
    """Record SIGTERM, SIGUSR1, SIGINT and SIGHUP within this context; a second Ctrl-C ends the process as usual.

    The run stops after the current step. A process that waits for data (`interruptible`) stops waiting: at once if it
    is the only process, else after some seconds, because the others may have their batch and wait for this process. A
    SIGHUP that was ignored before, by nohup, is ignored.
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
        if os.getpid() != self.pid:  # a data worker that was just forked
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
        """Interrupt the wait of the main thread."""
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
        """Raises Stopped on all processes together if any of them received a signal."""
        (number,) = max_over_processes(self.noted)
        if number:
            raise Stopped(int(number))


def interruptible() -> AbstractContextManager[None]:
    """A context for a wait for data, which the signals of the current `StopSignals` interrupt by raising `Stopped`."""
    return nullcontext() if StopSignals.current is None else StopSignals.current.wait()


def all_processes_reach(place: str, patience: float = 5) -> bool:
    """Whether all processes call this within ``patience`` seconds with the same ``place``."""
    if _store is None:
        return True
    try:
        _store.set(f"stopped {rank()}", place)
        names, end = [f"stopped {number}" for number in range(world_size())], time.monotonic() + patience
        while not _store.check(names) and time.monotonic() < end:
            time.sleep(0.05)
        return _store.check(names) and all(_store.get(name).decode() == place for name in names)
    except RuntimeError as error:  # the process that holds the store has exited
        if is_worker_error(error):
            raise
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Printing
# ---------------------------------------------------------------------------------------------------------------------


def print_main(line: str) -> None:
    """Print a line once, however many processes there are."""
    if is_main():
        tqdm.write(line)  # above a progress bar
        sys.stdout.flush()
