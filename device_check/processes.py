"""Processes with a time limit: forks of a server that has imported the libraries, and programs of their own."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path

from common.devices import processors
from common.forks import fork_server, print_to
from training.command_line import REPOSITORY

# imported once for all measurements
PRELOADED = ("device_check.processes", "benchmarks.device", "benchmarks.engine", "benchmarks.cache")
GRACE = 15  # seconds from being asked to end to being ended
INTERVAL = 0.2  # seconds between two looks


@dataclass(frozen=True)
class Ended:
    """How a process ended: ``status`` is that of subprocess, negative after a signal; ``late``: it ran out of time."""

    status: int
    seconds: float
    late: bool

    def __str__(self) -> str:
        return "ran out of time" if self.late else f"failed with status {self.status}"


class Started:
    """A running process, which leads a group of its own."""

    def __init__(self, process: BaseProcess | subprocess.Popen, seconds: float, ask: int = signal.SIGTERM):
        """
        Args:
            seconds: after which it is ended.
            ask: the signal that asks it to end.
        """
        self.process, self.ask, self.begin = process, ask, time.monotonic()
        self.deadline, self.asked = self.begin + seconds, False

    def status(self) -> int | None:
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def ended(self) -> Ended | None:
        """How it ended; None while it runs. Ends it where its time is over."""
        status, now = self.status(), time.monotonic()
        if status is not None:
            return Ended(status, now - self.begin, self.asked)
        if now > self.deadline + GRACE:
            self._signal(signal.SIGKILL)
        elif now > self.deadline and not self.asked:
            self.asked = True
            self._signal(self.ask, alone=True)
        return None

    def kill(self) -> None:
        """End it at once, with the processes that it has started."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int, alone: bool = False) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            (os.kill if alone else os.killpg)(self.process.pid, number)


def wait_for(started: Started, look: Callable[[], None] = lambda: None) -> Ended:
    """Wait until a process has ended; ``look`` is called meanwhile. It does not survive an exception here."""
    try:
        while (ended := started.ended()) is None:
            look()
            time.sleep(INTERVAL)
        return ended
    finally:
        started.kill()


def start_program(
    command: Sequence[str], output: Path, seconds: float, ask: int = signal.SIGTERM, environment: Mapping = {}
) -> Started:
    """Start ``python COMMAND`` in the repository, with both streams in a file."""
    with open(output, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    return Started(process, seconds, ask)


# ---------------------------------------------------------------------------------------------------------------------
# Forks
# ---------------------------------------------------------------------------------------------------------------------


@cache
def server() -> multiprocessing.context.BaseContext:
    """The server of which measurements are forks: to import the libraries takes longer than many of them."""
    return fork_server(PRELOADED, REPOSITORY)


def start_fork(function: Callable, arguments: Sequence, output: Path, seconds: float) -> Started:
    context = server()
    threads = int(os.environ.get("OMP_NUM_THREADS") or processors())
    process = context.Process(target=become, args=(function, arguments, output, threads))
    process.start()
    return Started(process, seconds)


def become(function: Callable, arguments: Sequence, output: Path, threads: int) -> None:
    """Call a function in this process, which was forked for it, with both streams in a file."""
    import torch

    os.setsid()
    threading.Thread(target=end_with_parent, daemon=True).start()
    print_to(output)
    torch.set_num_threads(threads)
    function(*arguments)


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


def run_benchmark(name: str, arguments: Sequence[str]) -> None:
    """Run ``benchmarks/NAME.py ARGUMENTS`` in this process."""
    sys.argv = [f"benchmarks/{name}.py", *arguments]
    print("python", *sys.argv, flush=True)
    module = sys.modules.get(f"benchmarks.{name}")
    if module is None:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    else:
        module.main()
