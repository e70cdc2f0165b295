"""Running main.py as its users do, in processes of its own."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from common.files import read_checkpoint

import pytest
import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from training.run import Run as TrainingRun

TESTS = Path(__file__).resolve().parent
MAIN = TESTS.parent / "main.py"
# of processes that tests start; a test file that runs as a program finds the project and this module
PYTHONPATH = os.pathsep.join([str(TESTS.parent), str(TESTS)])
# Tests share few processors, and a GPU would be one for all processes of a run.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
UNCHANGED = dict(ENVIRONMENT)  # tests change it
# modules that the runs import, some of them late
PRELOADED = ("training.launch", "sklearn.datasets", "sklearn.model_selection", "torch.utils.tensorboard")
PRELOADED += ("matplotlib.figure", "matplotlib.backends.backend_agg")
SECONDS = 600  # a run that lasts longer hangs, and is ended; a busy machine takes several times as long as an idle one
# AdamW follows rounding errors where the exact gradient is zero, as it is of the keys' biases, unless its epsilon is
# larger than they are: runs whose sums have another order can then be compared.
COMPARABLE = "--opt-eps 1e-6"


@pytest.fixture(scope="session")
def all_tests(request) -> bool:
    """Whether all tests run, and not only those of scripts/test.sh without --all."""
    return "not full" not in request.config.option.markexpr


class Run(NamedTuple):
    """A command line of main.py, and the number of processes that run it together."""

    args: list[str]
    processes: int = 1


class Outcome(NamedTuple):
    """What the processes of a run left behind: one exit status each, and what they printed."""

    codes: list[int]
    stdout: str
    stderr: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_main(
    *args: object, processes: int = 1, launcher: str = "torch.distributed.run"
) -> subprocess.CompletedProcess[str]:
    """``python main.py ARGS``; more than one process are started by ``python -m LAUNCHER``."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", launcher, "--nproc_per_node", str(processes), "--master_port", str(free_port())]
        if launcher == "torch.distributed.launch":
            command.append("--use_env")
    command += [str(MAIN), *map(str, args)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            stdout, stderr = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # a launcher that is killed would leave its processes behind
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


class Started:
    """A run of main.py whose output, both streams together, is read while it runs; the interface is Popen's."""

    def __init__(self, args: list[str]):
        context = fork_server()
        reader, writer = context.Pipe(duplex=False)
        self.process = context.Process(target=become, args=(Run(args), 0, 0, writer, os.getcwd()))
        self.process.start()
        writer.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()), errors="replace")
        reader.close()

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode

    def communicate(self) -> tuple[str, None]:
        with self.stdout:
            return self.stdout.read(), None


@contextmanager
def started(*args: object, launcher: tuple[str, ...] = ()) -> Iterator[Started | subprocess.Popen[str]]:
    """main.py in a process of its own, or in those that ``python LAUNCHER`` starts."""
    if not launcher:
        run = Started([*map(str, args)])
        try:
            yield run
        finally:
            run.terminate()
            run.wait()
        return
    command = [sys.executable, *launcher, str(MAIN), *map(str, args)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """The output up to the line that holds ``text``."""
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return read
    raise AssertionError(f"it ended without {text!r}:\n{read}")


def epochs_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def position_of(path: Path) -> tuple[int, int]:
    """The epoch that a checkpoint is in, and the images it has seen of it."""
    content = read_checkpoint(path)
    return content["epoch"] + 1, content["position"]["images"]


def assert_same_result(found: Path, expected: Path) -> None:
    """Two runs of stage 1 have left the same log and, bit for bit, the same weights."""
    assert (found / "log.txt").read_text() == (expected / "log.txt").read_text()
    for name in ("learngene.safetensors", "learngene_ema.safetensors"):
        a, b = load_file(found / name), load_file(expected / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def set_up_run(options: Sequence[str]) -> "TrainingRun":
    """The run that main.py makes of a command line, before training."""
    from main import builder_of
    from training.command_line import parse_options
    from training.launch import prepare
    from training.setup import set_up

    config = prepare(parse_options(options))
    return set_up(config, builder_of(config.model))


# ---------------------------------------------------------------------------------------------------------------------
# Runs as forks of a process that has imported the libraries of main.py
# ---------------------------------------------------------------------------------------------------------------------


@cache
def fork_server() -> multiprocessing.context.BaseContext:
    """Start the server of which all runs are forks: importing takes longer than most of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", *PRELOADED])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "PYTHONPATH": PYTHONPATH}.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def run_many(runs: Mapping[str, Run], folder: Path) -> dict[str, Outcome]:
    """Run main.py many times, two processes at a time.

    Several processes of one run find each other as under a launcher, but none of them is ended with the others.

    Args:
        folder: a new folder for what the runs print.
    """
    folder.mkdir()
    if ENVIRONMENT == UNCHANGED:
        codes = fork_runs([*runs.values()], folder)
    else:  # variables that are read when a library is imported: another server has to import them
        process = process_with(frozenset(ENVIRONMENT.items()))
        print(json.dumps([*runs.values(), str(folder), os.getcwd()]), file=process.stdin, flush=True)
        codes = json.loads(process.stdout.readline())
    return {
        name: Outcome(codes[i], (folder / f"{i}.stdout").read_text(), (folder / f"{i}.stderr").read_text())
        for i, name in enumerate(runs)
    }


def process_with(variables: frozenset[tuple[str, str]]) -> subprocess.Popen[str]:
    """This file as a program, with these variables; it stays for further runs until others are asked for."""
    if variables not in KEPT:
        while KEPT:
            with KEPT.popitem()[1] as process:
                process.stdin.close()  # which ends it
        command, environment = [sys.executable, __file__], {**dict(variables), "PYTHONPATH": PYTHONPATH}
        pipe = subprocess.PIPE
        KEPT[variables] = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
    return KEPT[variables]


KEPT: dict[frozenset[tuple[str, str]], subprocess.Popen[str]] = {}  # at most one


def fork_runs(runs: list[Run], folder: Path) -> list[list[int]]:
    """The exit statuses of the processes of each run."""
    context = fork_server()
    processes: list[list[multiprocessing.Process]] = []
    for i, run in enumerate(runs):
        while (running := running_of(processes)) and len(running) + run.processes > 2:
            wait([process.sentinel for process in running])
        port = free_port()
        places = [(run, rank, port, folder / str(i), os.getcwd()) for rank in range(run.processes)]
        processes.append([context.Process(target=become, args=place) for place in places])
        for process in processes[-1]:
            process.start()
    for process in running_of(processes):
        process.join()
    return [[process.exitcode for process in of_run] for of_run in processes]


def running_of(processes: list[list[multiprocessing.Process]]) -> list[multiprocessing.Process]:
    return [process for of_run in processes for process in of_run if process.exitcode is None]


def become(run: Run, rank: int, port: int, output: Path | Connection, folder: str) -> None:
    """Make this process that of one rank of ``run``, and end with it.

    Args:
        output: for both streams, or the path of two files without their suffixes.
    """
    signal.alarm(SECONDS)  # would end the process
    os.chdir(folder)
    if run.processes > 1:
        world = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=run.processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in world.items()})
    for stream, name in ((1, "stdout"), (2, "stderr")):
        if isinstance(output, Path):
            os.dup2(os.open(output.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        else:
            os.dup2(output.fileno(), stream)
    if not isinstance(output, Path):
        output.close()
    run_and_exit(MAIN, run.args)


def run_and_exit(program: Path, arguments: Sequence[str], before: Callable[[], object] = lambda: None) -> NoReturn:
    """Run a program in this process, which was forked for it, and end the process with its exit status."""
    code = 0
    try:
        before()
        sys.argv = [str(program), *arguments]
        runpy.run_path(str(program), run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)  # an orderly end would spend a second on taking down what was imported


# ---------------------------------------------------------------------------------------------------------------------
# Programs that start main.py
# ---------------------------------------------------------------------------------------------------------------------

CLIENT = """\
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    request = json.dumps([sys.argv[2:], os.getcwd()]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [1])
    server.sendall(request)
    sys.exit((server.recv(1) or b"\\1")[0])
"""


@pytest.fixture(scope="session")
def forking_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A value of sys.executable under which main.py is a fork, too, both of whose streams go to its stdout."""
    folder = tmp_path_factory.mktemp("py")
    client, program, address = folder / "client.py", folder / "python", folder / "socket"
    client.write_text(CLIENT)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{client}" "{address}" "$@"\n')
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address))
        server.listen()
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        yield str(program)


def answer(server: socket.socket) -> None:
    """Run main.py for one client after the other."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # it is closed
            return
        with connection:
            length, (stream,), _, _ = socket.recv_fds(connection, 8, 1)
            with connection.makefile("rb") as file:
                (program, *args), folder = json.loads(file.read(int.from_bytes(length, "big")))
            assert Path(program) == MAIN
            with Connection(stream) as output:
                process = fork_server().Process(target=become, args=(Run(args), 0, 0, output, folder))
                process.start()
            process.join()
            connection.sendall(bytes([process.exitcode % 256]))


if __name__ == "__main__":
    from conftest import fork_runs as fork  # which a fork can find by its name

    for line in sys.stdin:
        *given, printed, place = json.loads(line)
        os.chdir(place)
        print(json.dumps(fork([Run(*run) for run in given], Path(printed))), flush=True)
