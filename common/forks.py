"""Processes that are forks of a server, which imports the modules once."""

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

from common import console


def fork_server(modules: Sequence[str], folder: Path) -> multiprocessing.context.BaseContext:
    """The context of multiprocessing whose processes are forks of a server that has imported ``modules``.

    The server must not use an accelerator, or no fork of it could: whatever asks for a device runs in a fork.

    Args:
        folder: the first one that modules are looked for in.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*modules])
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork of a process that has threads of OpenMP waits for them forever
    forkserver.ensure_running()
    del os.environ["OMP_NUM_THREADS"]
    os.environ.update({} if before is None else {"OMP_NUM_THREADS": before})
    return context


def print_to(path: Path, append: bool = False) -> None:
    """Let both output streams of this process go to a file, whatever text they get."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC), 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    console.accept_any_text()
