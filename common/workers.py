"""Data workers: start, exit, and error messages when they fail."""

import atexit
import multiprocessing.queues
import multiprocessing.util
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import TracebackType

from common.errors import InputError, one_line

from torch.utils.data import DataLoader

SOCKET_PATH = 107  # bytes of the longest path of a Unix socket
SOCKET_NAME = len("/pymp-12345678/listener-12345678")  # multiprocessing's sockets in the temporary folder
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock")
CANNOT_SEND = 71  # exit status of a worker that cannot send a batch
WITHOUT = "--num-workers 0 loads images in the main process instead"

# pattern in the messages of torch, multiprocessing and the system → the message to print
CAUSES = {
    r"[Bb]us error|shared memory ?\(shm\)|No space left on device|shm_open": (
        "shared memory (/dev/shm) is full or too small for the batches of data workers: make it larger (docker run "
        "--shm-size), or use fewer --num-workers or a smaller --batch-size; --num-workers 0 needs none"
    ),
    r"Too many open files|items of ancdata": (
        "too many open files: raise the limit with 'ulimit -n', or use fewer --num-workers; --num-workers 0 needs the "
        "fewest"
    ),
    r"is killed by signal: (Killed|Terminated)|Connection(Reset|Refused)|EOFError"  # it exited while sending
    r"|MemoryError|[Cc]annot allocate memory|can't allocate memory": (
        "no memory is left for the images, or a data worker was killed, as the kernel does then: use fewer "
        "--num-workers or a smaller --batch-size"
    ),
}


class WorkerError(RuntimeError):
    """A data worker failed; the message is one line and says what to change."""


def as_worker_error(error: BaseException, where: str = "") -> WorkerError:
    """A one-line error with cause and remedy.

    Args:
        error: raised by a loader with data workers, or by torch's SIGCHLD handler.
        where: appended to "a data worker failed".
    """
    text = (is_worker_error(error) and read_send_error()) or original_message(error)
    for pattern, cause in CAUSES.items():
        if re.search(pattern, text):
            return WorkerError(f"{cause} ({one_line(text)})")
    return WorkerError(f"a data worker failed{where}: {one_line(text)}; {WITHOUT}, and shows where it fails")


def raise_exit_reason(workers: Sequence[BaseProcess], seconds: float = 60) -> None:
    """After a connection to a worker broke, wait for its exit, which tells the cause. A core dump can delay it.

    Raises:
        RuntimeError: a worker exited; the message is torch's, with the signal.
    """
    ended = wait([worker.sentinel for worker in workers], seconds)  # torch may raise here already
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(seconds)  # the kernel closes its sentinel before its exit status can be read
        if worker.exitcode:
            how = f"is killed by signal: {signal.strsignal(-worker.exitcode)}" if worker.exitcode < 0 else "exited"
            raise RuntimeError(f"DataLoader worker (pid {worker.pid}) {how}")


def is_worker_error(error: BaseException) -> bool:
    """Whether torch raised ``error`` for a data worker; its SIGCHLD handler does so anywhere in the main process."""
    return "DataLoader worker" in str(error)


def find_worker_error(error: BaseException | None) -> BaseException | None:
    """The error that torch raised for a data worker, in the chain of causes of ``error``; None if there is none.

    Torch's SIGCHLD handler raises it inside any library, which may wrap it in another exception.
    """
    while error is not None and not isinstance(error, WorkerError):
        if is_worker_error(error):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def original_message(error: BaseException) -> str:
    """Type and message of an exception; for one that a worker raised, those of the worker's exception."""
    if error.__cause__ is not None and is_worker_error(error) and is_worker_error(error.__cause__):
        error = error.__cause__  # it names the signal
    text = str(error)
    match = re.search(r"Caught (\w+) in DataLoader worker process", text)
    if match:  # the message is the worker's traceback
        place = text.rfind(f"\n{match[1]}") if f"\n{match[1]}" in text else text.rfind(match[1])
        return text[place:].strip().strip(": ")
    return f"{type(error).__name__}: {text}".strip(": ")


# ---------------------------------------------------------------------------------------------------------------------
# In the main process
# ---------------------------------------------------------------------------------------------------------------------

_exit_pipes: set[int] = set()  # write ends in the main process
_send_errors: tuple[int, int] | None = None  # a pipe for the errors of workers that cannot send a batch


class ExitPipe:
    """A pipe from the main process to a loader's workers; they exit as soon as it is closed, or the process ends.

    Without it they would stay: they ignore the usual signals, and can be blocked by a disk that does not respond.
    """

    def __init__(self, loader: DataLoader):
        self.read = self.write = None
        self.needed = loader.num_workers > 0
        if self.needed:
            # a fork imports nothing and does not copy the data set
            loader.multiprocessing_context = "fork"
            loader.worker_init_fn = self.init_worker

    def open(self) -> None:
        """Open the pipe, before the workers are started.

        Raises:
            InputError: there is no folder for the workers' sockets.
        """
        global _send_errors
        if not self.needed:
            return
        use_short_socket_folder()
        if _send_errors is None:
            _send_errors = os.pipe()
            os.set_blocking(_send_errors[0], False)
        if self.write is None:
            self.read, self.write = os.pipe()
            _exit_pipes.add(self.write)

    def close(self) -> None:
        if self.write is not None:
            if self.write in _exit_pipes:  # otherwise it is closed, and its number may belong to another file
                _exit_pipes.remove(self.write)
                os.close(self.write)
            os.close(self.read)
            self.read = self.write = None

    def init_worker(self, worker: int) -> None:
        """Set up signals and error handling in a worker."""
        ignore_stop_signals(worker)
        for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
            signal.signal(number, signal.SIG_DFL)  # torch's handlers print a line, and so does the main process
        close_exit_pipes()  # the inherited write ends, which only the main process may hold
        sys.excepthook = report_unless_main_exited
        threading.Thread(target=exit_with_main, args=(self.read,), daemon=True).start()
        multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(exit_on_send_error)


@atexit.register
def close_exit_pipes() -> None:
    """At exit, before multiprocessing joins the workers: it registered that earlier, so it runs later."""
    while _exit_pipes:
        os.close(_exit_pipes.pop())


def use_short_socket_folder() -> None:
    """Have multiprocessing create its sockets in a folder whose path is short enough, whatever TMPDIR is."""
    folder = multiprocessing.process.current_process()._config.get("tempdir")
    with suppress(FileNotFoundError):  # no temporary folder at all
        folder = folder or tempfile.gettempdir() + "/pymp-12345678"
    if folder and len(os.fsencode(folder)) + len("/listener-12345678") <= SOCKET_PATH:
        return
    before = tempfile.tempdir
    for tempfile.tempdir in SHORT_FOLDERS:
        with suppress(OSError):
            multiprocessing.util.get_temp_dir()  # multiprocessing caches it
            break
    else:
        tempfile.tempdir = before
        raise InputError(
            f"TMPDIR is {os.environ.get('TMPDIR', 'not set')}, and none of {', '.join(SHORT_FOLDERS)} can be written: "
            f"data workers need a temporary folder with a path of less than {SOCKET_PATH - SOCKET_NAME} characters; "
            f"{WITHOUT}"
        )
    tempfile.tempdir = before


def read_send_error() -> str | None:
    """The error of a worker that could not send a batch, once."""
    with suppress(BlockingIOError):
        if _send_errors is not None:
            return os.read(_send_errors[0], 4096).decode(errors="replace").partition("\n")[0]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# In a worker
# ---------------------------------------------------------------------------------------------------------------------


def ignore_stop_signals(worker: int) -> None:
    """Keep working when the whole process group gets a stop signal: the main process still needs the current batch."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def exit_with_main(read_end: int) -> None:
    os.read(read_end, 1)  # returns when all write ends are closed
    os._exit(0)


def report_unless_main_exited(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """``sys.excepthook`` of a worker: ignore the broken connection when the main process stops receiving tensors.

    In a worker only the thread of multiprocessing.resource_sharer, which serves the tensors, calls it.
    """
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def exit_on_send_error(error: Exception, item: object) -> None:
    """Exit when a batch cannot be sent: multiprocessing would drop it, and the main process would wait for ever."""
    with suppress(OSError):
        os.write(_send_errors[1], (one_line(f"{type(error).__name__}: {error}") + "\n").encode(errors="replace")[:4000])
    os._exit(CANNOT_SEND)
