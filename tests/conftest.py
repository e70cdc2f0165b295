"""Running main.py as its users do, in processes of its own."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
SECONDS = 600  # a run that lasts longer hangs, and is ended; a busy machine takes several times as long as an idle one
# AdamW follows rounding errors where the exact gradient is zero, as it is of the keys' biases, unless its epsilon is
# larger than they are: runs whose sums have another order can then be compared.
COMPARABLE = "--opt-eps 1e-6"


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


def run_many(runs: Mapping[str, Run], folder: Path) -> dict[str, Outcome]:
    """Run main.py many times, two processes at a time, and import its libraries only once.

    Several processes of one run find each other as under a launcher, but none of them is ended with the others.

    Args:
        folder: a new folder for what the runs print.
    """
    folder.mkdir()
    (folder / "runs.json").write_text(json.dumps([*runs.values()]))
    subprocess.run([sys.executable, __file__, str(folder)], env=ENVIRONMENT, check=True)
    codes = json.loads((folder / "codes.json").read_text())
    return {
        name: Outcome(codes[i], (folder / f"{i}.stdout").read_text(), (folder / f"{i}.stderr").read_text())
        for i, name in enumerate(runs)
    }


def fork_runs(folder: Path) -> None:
    """The other side of `run_many`: every process of every run is a fork of this one."""
    for module in ("training.launch", "sklearn.datasets", "sklearn.model_selection"):  # the seconds that are spent once
        import_module(module)
    runs = [Run(*run) for run in json.loads((folder / "runs.json").read_text())]
    codes: list[list[int]] = [[] for _ in runs]
    running: dict[int, int] = {}  # process → number of its run

    def wait_for_one() -> None:
        pid, status = os.wait()
        codes[running.pop(pid)].append(os.waitstatus_to_exitcode(status))

    for i, run in enumerate(runs):
        while running and len(running) + run.processes > 2:
            wait_for_one()
        port = free_port()
        for rank in range(run.processes):
            pid = os.fork()
            if pid == 0:
                become(run, rank, port, folder / str(i))
            running[pid] = i
    while running:
        wait_for_one()
    (folder / "codes.json").write_text(json.dumps(codes))


def become(run: Run, rank: int, port: int, output: Path) -> None:
    """Make this process that of one rank of ``run``, and end with it."""
    signal.alarm(SECONDS)  # would end the process
    if run.processes > 1:
        world = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=run.processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in world.items()})
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = [str(MAIN), *run.args]
    code = 0
    try:
        runpy.run_path(str(MAIN), run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)  # an orderly end would spend a second on taking down what was imported


if __name__ == "__main__":
    sys.path.insert(0, str(MAIN.parent))
    fork_runs(Path(sys.argv[1]))
