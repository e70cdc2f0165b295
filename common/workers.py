"""Data workers: how they are started, when they end, and what is said when they fail."""

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

from common.errors import InputError

from torch.utils.data import DataLoader

SOCKET_PATH = 107  # bytes of the longest path of a Unix socket
SOCKET_NAME = len("/pymp-12345678/listener-12345678")  # multiprocessing's, in the temporary folder
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock")
CANNOT_SEND = 71  # exit status of a worker whose batches cannot reach the main process
WITHOUT = "--num-workers 0 loads images in the main process instead"

# what torch, multiprocessing and the system say → what is said here
CAUSES = {
    r"[Bb]us error|shared memory ?\(shm\)|No space left on device|shm_open": (
        "shared memory (/dev/shm) is full or too small for the batches of data workers: make it larger (docker run "
        "--shm-size), or use fewer --num-workers or a smaller --batch-size; --num-workers 0 needs none"
    ),
    r"Too many open files|items of ancdata": (
        "too many open files: raise the limit with 'ulimit -n', or use fewer --num-workers; --num-workers 0 needs the "
        "fewest"
    ),
    r"is killed by signal: (Killed|Terminated)|Connection(Reset|Refused)|EOFError"  # it ended while it was sending
    r"|MemoryError|[Cc]annot allocate memory|can't allocate memory": (
        "no memory is left for the images, or a data worker was killed, as the kernel does then: use fewer "
        "--num-workers or a smaller --batch-size"
    ),
}


class WorkerError(RuntimeError):
    """A data worker has failed; the message is a line that says what to change."""


def describe(error: BaseException, where: str = "") -> WorkerError:
    """What has failed in or around the data workers, in a line.

    Args:
        error: what a loader with data workers raised, or torch in their name.
        where: words that follow "a data worker failed".
    """
    text = (is_of_worker(error) and reason_of_worker()) or what_was_raised(error)
    for pattern, cause in CAUSES.items():
        if re.search(pattern, text):
            return WorkerError(f"{cause} ({shortened(text)})")
    return WorkerError(f"a data worker failed{where}: {shortened(text)}; {WITHOUT}, and shows where it fails")


def await_end_of_one(workers: Sequence[BaseProcess], seconds: float = 2) -> None:
    """After a connection to one of them broke: it is ending, and says why only by its exit status.

    Raises:
        RuntimeError: one has ended, and by what signal or with what status, in torch's words.
    """
    wait([worker.sentinel for worker in workers], seconds)  # torch may raise here already
    for worker in workers:
        if worker.exitcode:
            how = f"is killed by signal: {signal.strsignal(-worker.exitcode)}" if worker.exitcode < 0 else "exited"
            raise RuntimeError(f"DataLoader worker (pid {worker.pid}) {how}")


def is_of_worker(error: BaseException) -> bool:
    """Whether torch raised ``error`` in the name of a data worker, which it does at any place of the main process."""
    return "DataLoader worker" in str(error)


def worker_error_behind(error: BaseException | None) -> BaseException | None:
    """What torch raised in the name of a data worker, if that is ``error`` or what led to it; else None.

    Torch's handler of SIGCHLD raises it inside any library, which may wrap it, and inside any handler of errors, which
    must let it pass.
    """
    while error is not None and not isinstance(error, WorkerError):
        if is_of_worker(error):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def what_was_raised(error: BaseException) -> str:
    """The type and message of an exception; of one from a worker, those that it had there."""
    if error.__cause__ is not None and is_of_worker(error) and is_of_worker(error.__cause__):
        error = error.__cause__  # which says by what signal a worker ended
    text = str(error)
    match = re.search(r"Caught (\w+) in DataLoader worker process", text)
    if match:  # the message is the worker's traceback
        place = text.rfind(f"\n{match[1]}") if f"\n{match[1]}" in text else text.rfind(match[1])
        return text[place:].strip().strip(": ")
    return f"{type(error).__name__}: {text}".strip(": ")


def shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:297] + "…"


# ---------------------------------------------------------------------------------------------------------------------
# In the main process
# ---------------------------------------------------------------------------------------------------------------------

_lifelines: set[int] = set()  # write ends: workers end when the main process has none of them any more
_reasons: tuple[int, int] | None = None  # a pipe to the main process, for what a worker cannot say otherwise


class Lifeline:
    """Ties the workers of a loader to the main process; they end at once when it ends, or cuts it.

    They ignore the signals that would end them, and one that waits for a disk that does not answer would stay for ever.
    """

    def __init__(self, loader: DataLoader):
        self.read = self.write = None
        self.needed = loader.num_workers > 0
        if self.needed:
            # forks need not import anything, and the data set is not copied; other ways of starting are not needed here
            loader.multiprocessing_context = "fork"
            loader.worker_init_fn = self.tie

    def prepare(self) -> None:
        """Before the workers are started.

        Raises:
            InputError: there is no place for the sockets through which they send.
        """
        global _reasons
        if not self.needed:
            return
        use_short_folder()
        if _reasons is None:
            _reasons = os.pipe()
            os.set_blocking(_reasons[0], False)
        if self.write is None:
            self.read, self.write = os.pipe()
            _lifelines.add(self.write)

    def cut(self) -> None:
        if self.write is not None:
            if self.write in _lifelines:  # else `cut_all` has closed it, and its number may be another file's by now
                _lifelines.remove(self.write)
                os.close(self.write)
            os.close(self.read)
            self.read = self.write = None

    def tie(self, worker: int) -> None:
        """What a worker does first."""
        leave_signals_to_main(worker)
        for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
            signal.signal(number, signal.SIG_DFL)  # of which torch's handlers print a line, and the main process, too
        cut_all()  # the inherited ends, which only the main process may have
        sys.excepthook = unless_main_left
        threading.Thread(target=end_with_main, args=(self.read,), daemon=True).start()
        multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(cannot_send)


@atexit.register
def cut_all() -> None:
    """Before multiprocessing waits for the workers, which registered that earlier and so does it later."""
    while _lifelines:
        os.close(_lifelines.pop())


def use_short_folder() -> None:
    """Have multiprocessing's sockets in a folder whose path is short enough for them, whatever TMPDIR says."""
    folder = multiprocessing.process.current_process()._config.get("tempdir")
    with suppress(FileNotFoundError):  # no folder at all
        folder = folder or tempfile.gettempdir() + "/pymp-12345678"
    if folder and len(os.fsencode(folder)) + len("/listener-12345678") <= SOCKET_PATH:
        return
    before = tempfile.tempdir
    for tempfile.tempdir in SHORT_FOLDERS:
        with suppress(OSError):
            multiprocessing.util.get_temp_dir()  # which is kept for later
            break
    else:
        tempfile.tempdir = before
        raise InputError(
            f"TMPDIR is {os.environ.get('TMPDIR', 'not set')}, and none of {', '.join(SHORT_FOLDERS)} can be written: "
            f"data workers need a temporary folder with a path of less than {SOCKET_PATH - SOCKET_NAME} characters; "
            f"{WITHOUT}"
        )
    tempfile.tempdir = before


def reason_of_worker() -> str | None:
    """What a worker has left behind that could not send a batch."""
    with suppress(BlockingIOError):
        if _reasons is not None:
            return os.read(_reasons[0], 4096).decode(errors="replace").partition("\n")[0]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# In a worker
# ---------------------------------------------------------------------------------------------------------------------


def leave_signals_to_main(worker: int) -> None:
    """Data workers work on when their whole process group is asked to stop: the batch that is waited for is needed."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def end_with_main(lifeline: int) -> None:
    os.read(lifeline, 1)  # returns when nobody can write any more
    os._exit(0)


def unless_main_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an error of the thread that serves this worker's tensors, except a main process that stops receiving them.

    multiprocessing.resource_sharer calls sys.excepthook from that thread, and nothing else does in a worker.
    """
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def cannot_send(error: Exception, item: object) -> None:
    """End this worker when a batch cannot be sent: multiprocessing would drop it, and the main process wait for it."""
    with suppress(OSError):
        os.write(_reasons[1], (shortened(f"{type(error).__name__}: {error}") + "\n").encode(errors="replace")[:4000])
    os._exit(CANNOT_SEND)
