"""Run main.py many times in changed surroundings, as forks of one process that has imported all modules.

This file is also the program that forks.
"""

import fcntl
import json
import os
import pty
import resource
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from conftest import ENVIRONMENT, MAIN, PYTHONPATH, SECONDS, run_and_exit


class Case(NamedTuple):
    """A run of main.py, in as many processes as ``environments`` has.

    Attributes:
        code: what each of them does first.
        signal: sent to all of them when the output of the first has this text; 0 closes its terminal.
    """

    args: list[str]
    environments: list[dict[str, str]] = [{}]  # noqa: RUF012  it is not changed
    code: str = ""
    signal: tuple[str, int] | None = None


class Outcome(NamedTuple):
    codes: list[int]
    said: list[str]  # by each process, both streams together

    @property
    def errors(self) -> list[str]:
        return [line for said in self.said for line in said.splitlines() if line.startswith("error: ")]


def run_cases(cases: dict[str, Case], folder: Path) -> dict[str, Outcome]:
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {**ENVIRONMENT, "PYTHONPATH": PYTHONPATH}
    subprocess.run([sys.executable, __file__, str(folder)], env=environment, check=True, timeout=3 * SECONDS)
    return {name: Outcome(*found) for name, found in json.loads((folder / "outcomes.json").read_text()).items()}


def fork_cases(folder: Path) -> None:
    for module in ("training.launch", "sklearn.datasets", "sklearn.model_selection", "torch.utils.tensorboard"):
        import_module(module)
    for module in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        import_module(module)
    cases = {name: Case(*fields) for name, fields in json.loads((folder / "cases.json").read_text()).items()}
    outcomes = {name: fork_case(case) for name, case in cases.items()}
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


def fork_case(case: Case) -> tuple[list[int], list[str]]:
    """One case, to the end of all that it has started: data workers keep the pipe open to which it prints."""
    pids, ends, said = [], [], {}
    for environment in case.environments:
        if case.signal is not None and case.signal[1] == 0:
            pid, end = pty.fork()
            if pid == 0:
                become(case, environment)
            fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))  # rows and columns
        else:
            end, written = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.dup2(written, 1)
                os.dup2(written, 2)
                become(case, environment)
            os.close(written)
        pids.append(pid)
        ends.append(end)
        said[end] = b""
    with selectors.DefaultSelector() as selector:
        for end in ends:
            selector.register(end, selectors.EVENT_READ)
        awaited = case.signal
        while selector.get_map():
            for key, _ in selector.select():
                block = os.read(key.fd, 2**16)
                said[key.fd] += block
                if not block:
                    selector.unregister(key.fd)
            if awaited is not None and awaited[0].encode() in said[ends[0]]:
                for pid in pids * bool(awaited[1]):
                    os.kill(pid, awaited[1])
                if awaited[1] == 0:
                    selector.unregister(ends[0])
                    os.close(ends[0])
                awaited = None
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return codes, [said[end].decode(errors="replace") for end in ends]


def become(case: Case, environment: dict[str, str]) -> None:
    """Make this process one of those that ``case`` starts, and end with it."""
    signal.alarm(SECONDS)  # would end the process
    os.environ.update(environment)
    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # writing a core dump can take longer than anybody waits for it
    run_and_exit(MAIN, case.args, before=lambda: exec(case.code, {}))


def texts(variables: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in variables.items()}


if __name__ == "__main__":
    sys.path.insert(0, str(MAIN.parent))
    fork_cases(Path(sys.argv[1]))
