"""What surrounds a run: temporary folders, file systems, encodings, start methods, launchers, terminals."""

import fcntl
import json
import multiprocessing
import os
import pty
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import traceback
from importlib import import_module
from itertools import count
from multiprocessing.resource_sharer import DupFd
from pathlib import Path
from typing import NamedTuple

import utils
from common import launchers, workers
from common.errors import InputError
from common.files import atomic_write, read_checkpoint
from common.launchers import World
from pipeline.loader import CheckedLoader, Sample, collate
from samplers import TrainSampler
from training.build import device_of
from training.config import parse_options
from training.logs import Output

import pytest
import torch
from conftest import ENVIRONMENT, MAIN, PYTHONPATH, SECONDS
from PIL import Image
from torch.utils.data import DataLoader, Dataset

TINY = "--model deit_nano_patch8_16_L2_H1 --warmup-epochs 0 --min-lr 0 --device cpu --log-interval 1 --epochs"
DIGITS = f"--data-set DIGITS --batch-size 32 --train-images 64 --num-workers 0 {TINY}"
PICTURES = f"--data-set FOLDER --input-size 16 --batch-size 6 --no-repeated-aug {TINY}"
UNWRITTEN = ("long TMPDIR", "no TMPDIR", "spawn", "forkserver")  # cases without --output-dir
SCRIPTS = MAIN.parent / "scripts"
OPENED = """
import os
import PIL.Image
before, main = PIL.Image.open, os.getpid()
def opened(file, *args, **kwargs):
    if os.getpid() != main and file.name.endswith("IMAGE"):
        {0}
    return before(file, *args, **kwargs)
PIL.Image.open = opened
"""
PLOTTED = """
import multiprocessing, os
from matplotlib.figure import Figure
def savefig(*args, **kwargs):
    for worker in multiprocessing.active_children():
        worker.kill()
        {0}
    raise OSError(28, "No space left on device")
Figure.savefig = savefig
"""
WAITED = "os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)"


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


# ---------------------------------------------------------------------------------------------------------------------
# Running the cases: this file is also a program, whose forks they are, so that it alone imports what they need
# ---------------------------------------------------------------------------------------------------------------------


def run_cases(cases: dict[str, Case], folder: Path) -> dict[str, Outcome]:
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {**ENVIRONMENT, "PYTHONPATH": PYTHONPATH}
    subprocess.run([sys.executable, __file__, str(folder)], env=environment, check=True, timeout=3 * SECONDS)
    return {name: Outcome(*found) for name, found in json.loads((folder / "outcomes.json").read_text()).items()}


def fork_cases(folder: Path) -> None:
    for module in ("training.loop", "sklearn.datasets", "sklearn.model_selection", "torch.utils.tensorboard"):
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
    code = 1
    try:
        exec(case.code, {})
        sys.argv = [str(MAIN), *case.args]
        runpy.run_path(str(MAIN), run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# The cases
# ---------------------------------------------------------------------------------------------------------------------


def make_pictures(root: Path) -> Path:
    """Two classes of 6 images to train and 2 to test."""
    for split, number in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (20, 20), (40 * i, 90, 60)).save(root / split / name / f"{i}.png")
    return root


def make_pipe(path: Path) -> None:
    """In place of an image: who opens it waits."""
    path.unlink()
    os.mkfifo(path)


def free_job() -> int:
    """The number of a job whose tasks can meet at the port that follows from it."""
    for job in count(10 * os.getpid()):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", launchers.FIRST_PORT + job % launchers.PORTS))
            except OSError:
                continue
            return job


def tasks_of_slurm(job: int, started_by: str) -> list[dict[str, str]]:
    """The variables of the tasks of a job of two tasks on one host: those of srun, or that of a batch script."""
    common = {"SLURM_JOB_ID": job, "SLURM_NTASKS": 2, "SLURM_JOB_NODELIST": "no-such-host", "SLURM_NNODES": 1}
    if started_by == "srun":
        common |= {"SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_NODELIST": "no-such-host"}
    ranks = range(2 if started_by == "srun" else 1)
    return [texts(common | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in ranks]


def tasks_of_mpirun() -> list[dict[str, str]]:
    def variables(rank: int, size: int) -> dict[str, int]:
        names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        return {f"OMPI_COMM_WORLD_{name}": n for name, n in zip(names, (rank, size, rank, size), strict=True)}

    return [texts(variables(rank, 2)) for rank in range(2)]


def texts(variables: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in variables.items()}


def refusing(what: str, number: int) -> str:
    """Code after which the functions ``what`` of os fail."""
    return f"import os\ndef fail(*args, **kwargs): raise OSError({number}, os.strerror({number}))\n" + "".join(
        f"os.{name} = fail\n" for name in what.split()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("surroundings")


@pytest.fixture(scope="module")
def outcomes(folder) -> dict[str, Outcome]:
    pictures = make_pictures(folder / "pictures")
    odd = make_pictures(folder / os.fsdecode(b"pictures\xff\xe9"))
    for split in ("train", "val"):
        os.rename(odd / split / "dog", odd / split / os.fsdecode(b"d\xf6g"))
    index = [index for index, _ in TrainSampler(12, 6)][-1]
    last = f"{('cat', 'dog')[index // 6]}/{index % 6}.png"  # the image that the last step of epoch 0 needs
    slow = make_pictures(folder / "slow")
    make_pipe(slow / "train" / last)
    untested = make_pictures(folder / "untested")
    for name in ("cat", "dog"):
        make_pipe(untested / "val" / name / "1.png")
    long = folder / ("x" * 110)
    long.mkdir()

    def case(name: str, options: str, *args: object, **more: object) -> Case:
        output = [] if name in UNWRITTEN else ["--output-dir", folder / name]
        return Case([*options.split(), *map(str, (*args, *output))], **more)

    def of(data: Path, workers: int, epochs: int = 1) -> str:
        return f"{PICTURES} {epochs} --num-workers {workers} --data-path {data}"

    def failing(how: str) -> dict[str, str]:
        return {"code": OPENED.format(how).replace("IMAGE", last)}

    ranks = [texts({"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}) for rank in range(2)]
    term, hup = signal.SIGTERM.value, signal.SIGHUP.value
    cases = {
        "long TMPDIR": ({"environments": [{"TMPDIR": str(long)}]}, of(pictures, 1)),
        "no TMPDIR": ({"environments": [{"TMPDIR": str(folder / "nowhere")}]}, of(pictures, 1)),
        "no short folder": (
            {
                "environments": [{"TMPDIR": str(long)}],
                "code": "import common.workers as w\nw.SHORT_FOLDERS = ('/nowhere',)",
            },
            of(pictures, 1),
        ),
        "cannot send": (
            {"code": "import common.workers as w\nw.SOCKET_PATH = 1000", "environments": [{"TMPDIR": str(long)}]},
            of(pictures, 1),
        ),
        "spawn": ({"code": "import multiprocessing as m\nm.set_start_method('spawn', force=True)"}, of(pictures, 1)),
        "forkserver": (
            {"code": "import multiprocessing as m\nm.set_start_method('forkserver', force=True)"}, of(pictures, 1)
        ),
        "no modes": ({"code": refusing("chmod fchmod", 1)}, f"{DIGITS} 1"),
        "no links": ({"code": refusing("link", 1)}, f"{DIGITS} 1"),
        "no fsync": ({"code": refusing("fsync", 22)}, f"{DIGITS} 1"),
        "broken disk": ({"code": refusing("fsync", 5)}, f"{DIGITS} 1"),
        "no replace": ({"code": refusing("replace", 13)}, f"{DIGITS} 1"),
        "no pictures": (
            {"code": "import sys\nsys.modules.update({'torch.utils.tensorboard': None, 'matplotlib.figure': None})"},
            f"{DIGITS} 1",
        ),
        "exception": (failing("raise KeyError('label')"), of(pictures, 1, 2), "--save-every-steps", 1),
        "killed": (failing("os.kill(os.getpid(), 9)"), of(pictures, 1)),
        "killed at a plot": ({"code": PLOTTED.format(WAITED)}, of(pictures, 1, 2)),
        "killed unseen": ({"code": PLOTTED.format("worker.join()")}, of(pictures, 1, 2)),  # by torch's handler
        "bus error": (failing("os.kill(os.getpid(), 7)"), of(pictures, 1)),
        "open files": (failing("raise OSError(24, 'Too many open files')"), of(pictures, 1), "--skip-bad-images"),
        "any bytes": ({}, of(odd, 1)),
        "slow, 0 workers": ({"signal": ("training 1/2", term)}, of(slow, 0)),
        "slow, 1 worker": ({"signal": ("training 1/2", term)}, of(slow, 1)),
        "slow evaluation": (
            {"signal": ("training 3/3", term), "environments": ranks}, of(untested, 1), "--batch-size", 2
        ),
        "SIGHUP": ({"signal": ("training 1/", hup)}, f"{DIGITS} 50"),
        "nohup": (
            {"signal": ("training 1/", hup), "code": "import signal as s\ns.signal(s.SIGHUP, s.SIG_IGN)"}, f"{DIGITS} 3"
        ),
        "closed terminal": ({"signal": ("loss=", 0)}, f"{DIGITS} 500"),
        "srun": ({"environments": tasks_of_slurm(free_job(), "srun")}, f"{DIGITS} 1"),
        "batch script": ({"environments": tasks_of_slurm(free_job(), "sbatch")}, f"{DIGITS} 1"),
        "mpirun": ({"environments": tasks_of_mpirun()}, f"{DIGITS} 1"),
        "half": ({"environments": [{"RANK": "0"}, {"RANK": "1"}]}, f"{DIGITS} 1"),
    }  # fmt: skip
    return run_cases(
        {name: case(name, options, *more, **how) for name, (how, options, *more) in cases.items()}, folder / "outcomes"
    )


def position_of(path: Path) -> tuple[int, int]:
    content = read_checkpoint(path)
    return content["epoch"] + 1, content["position"]["images"]


@pytest.mark.parametrize(
    "name",
    [
        "long TMPDIR",
        "no TMPDIR",
        "spawn",
        "forkserver",
        "no modes",
        "no links",
        "no fsync",
        "any bytes",
        "batch script",
    ],
)
def test_works(folder, outcomes, name):
    """With the results of any other run, and without a word about it."""
    outcome = outcomes[name]
    assert outcome.codes == [0], outcome.said
    assert "warning" not in outcome.said[0]
    assert "1 process(es)" in outcome.said[0]
    assert "epoch 0: test_acc1" in outcome.said[0]
    if name in UNWRITTEN:
        return
    names = {path.name for path in (folder / name).iterdir()}
    assert {"model.safetensors", "config.json", "checkpoint.pth", "log.txt", "curves.png"} <= names
    assert position_of(folder / name / "checkpoint.pth") == (1, 0)


@pytest.mark.parametrize(
    ("name", "status", "expected"),
    [
        ("no short folder", 2, ("TMPDIR is", "temporary folder with a path of less than 75", "--num-workers 0")),
        ("cannot send", 1, ("AF_UNIX path too long", "--num-workers 0")),
        ("broken disk", 2, ("--output-dir", "cannot be written: Input/output error")),
        ("no replace", 2, ("--output-dir", "cannot be written: Permission denied")),
        ("exception", 1, (".png: KeyError: 'label'", "--num-workers 0", "shows where")),
        ("killed", 1, ("killed", "memory", "fewer --num-workers", "smaller --batch-size")),
        ("killed unseen", 1, ("killed", "memory", "fewer --num-workers", "smaller --batch-size")),
        ("killed at a plot", 1, ("killed", "memory", "fewer --num-workers", "smaller --batch-size")),
        ("bus error", 1, ("/dev/shm", "--shm-size", "--num-workers 0")),
        ("open files", 1, ("too many open files", "ulimit -n", "--num-workers")),
    ],
)
def test_is_said_in_one_line(folder, outcomes, name, status, expected):
    outcome = outcomes[name]
    assert outcome.codes == [status], outcome.said
    (error,) = outcome.errors
    assert outcome.said[0].splitlines()[-1] == error
    assert all(words in error for words in expected), error
    assert "Traceback" not in outcome.said[0]


def test_a_failing_worker_leaves_the_last_checkpoint_whole(folder, outcomes):
    assert "training 1/" in outcomes["exception"].said[0]
    assert position_of(folder / "exception" / "checkpoint.pth") == (0, 6)


def test_what_is_to_be_looked_at_alone_costs_no_run(folder, outcomes):
    outcome = outcomes["no pictures"]
    assert outcome.codes == [0], outcome.said
    assert outcome.said[0].count("warning: TensorBoard's events cannot be written (ModuleNotFoundError") == 1
    assert outcome.said[0].count("curves.png cannot be written (ModuleNotFoundError") == 1
    assert (folder / "no pictures" / "model.safetensors").exists()


class Numbers(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        return Sample(torch.zeros(1), index, [])


def batches_of(num_workers: int, persistent: bool = False) -> CheckedLoader:
    loader = DataLoader(Numbers(), 2, num_workers=num_workers, persistent_workers=persistent, collate_fn=collate)
    return CheckedLoader(loader, False, torch.device("cpu"))


KILLED = "DataLoader worker (pid 7) is killed by signal: Killed. "


def wrapped() -> Exception:
    """What is raised by a library that handles an error of a worker, and fails in turn."""
    try:
        try:
            raise RuntimeError(KILLED)
        except RuntimeError:
            raise OSError(28, "No space left on device")  # noqa: B904  so that it is the context alone
    except OSError as error:
        return error


@pytest.mark.parametrize("error", [RuntimeError(KILLED), wrapped()])
@pytest.mark.parametrize("attempt", ["attempt", "attempt_extra"])
def test_a_dead_worker_is_no_file_that_cannot_be_written(tmp_path, capfd, monkeypatch, attempt, error):
    """Torch raises that in the main process wherever it is, here where a plot is written."""
    left = []
    monkeypatch.setattr("utils.abort", left.append)
    output, path = Output(), tmp_path / "curves.png"
    with pytest.raises(type(error)), utils.failures_reported_once():  # noqa: SIM117
        with getattr(output, attempt)(str(path)), atomic_write(path):
            raise error
    assert (left, output.failed, list(tmp_path.iterdir())) == ([1], {}, [])
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: no memory is left for the images, or a data worker was killed")


def test_a_dead_worker_is_no_checkpoint_that_does_not_fit(tmp_path, capfd, monkeypatch):
    left = []
    monkeypatch.setattr("utils.abort", left.append)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {}}, path)
    monkeypatch.setattr("torch.load", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError(KILLED)))
    with pytest.raises(InputError), utils.failures_reported_once():
        read_checkpoint(path)
    assert left == [1]
    assert capfd.readouterr().err.startswith("error: no memory is left for the images, or a data worker was killed")


@pytest.mark.parametrize("persistent", [False, True])
def test_no_signal_interrupts_the_start_of_workers(monkeypatch, persistent):
    """It ends the wait that follows, and so no hook of a fork meets an exception."""
    batches, started = batches_of(1, persistent), []
    start = multiprocessing.process.BaseProcess.start

    def signalled(process):
        signal.raise_signal(signal.SIGTERM)
        started.append(process)
        start(process)

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", signalled)
    with utils.StopSignals() as signals:
        with pytest.raises(utils.Stopped):
            next(iter(batches))
        assert (len(started), signals.noted) == (1, signal.SIGTERM)
    batches.close()


def test_a_signal_interrupts_the_wait_for_workers_that_stay(monkeypatch):
    batches = batches_of(1, persistent=True)
    with utils.StopSignals() as signals:
        assert len([*batches]) == 2
        waits = []
        monkeypatch.setattr(type(batches.loader._iterator), "_reset", lambda *args: waits.append(signals.waiting))
        iter(batches._start())
    batches.close()
    assert waits == [True]


def test_a_worker_that_only_exited_is_asked_for_the_signal(monkeypatch):
    """Torch 2.6 does not say what ended a worker that would leave a core dump."""
    batches = batches_of(1)

    def broken(iterator):
        (worker,) = iterator._workers
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        raise RuntimeError(f"DataLoader worker (pid(s) {worker.pid}) exited unexpectedly")

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._next_data", broken)
    with pytest.raises(RuntimeError, match="is killed by signal: Killed"):
        next(iter(batches))


def test_a_worker_whose_main_process_stops_receiving_is_silent(capfd):
    """A broken connection to the thread from which the main process takes tensors ends without a traceback."""
    batches = batches_of(1)
    batches.exit_pipe.open()

    def work() -> None:
        batches.exit_pipe.init_worker(0)
        shared = DupFd(0)
        with socket.socket(socket.AF_UNIX) as broken:
            broken.connect(shared._id[0])
        os.close(shared.detach())  # which that thread serves after the broken connection

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    batches.close()
    assert (process.exitcode, capfd.readouterr().err) == (0, "")


def test_an_exit_pipe_without_workers_opens_nothing(monkeypatch):
    monkeypatch.setattr("os.pipe", lambda: pytest.fail("a pipe is opened"))
    monkeypatch.setattr("common.workers.use_short_socket_folder", lambda: pytest.fail("TMPDIR is looked at"))
    assert len([*batches_of(0)]) == 2


def test_an_exit_pipe_closes_its_descriptors_once(monkeypatch):
    monkeypatch.setattr("common.workers._exit_pipes", set())
    exit_pipe = batches_of(1).exit_pipe
    exit_pipe.open()
    number = exit_pipe.write
    workers.close_exit_pipes()
    assert os.dup2(0, number) == number  # a file that is opened later
    exit_pipe.close()
    os.close(number)


@pytest.mark.parametrize("name", ["slow, 0 workers", "slow, 1 worker"])
def test_a_signal_interrupts_the_wait_for_data(folder, outcomes, name):
    outcome = outcomes[name]
    assert outcome.codes == [128 + signal.SIGTERM], outcome.said
    assert "stopped by SIGTERM, in epoch 0 after 1 steps: --resume auto continues" in outcome.said[0]
    assert position_of(folder / name / "checkpoint.pth") == (0, 6)


def test_processes_that_all_wait_for_data_stop_together(folder, outcomes):
    outcome = outcomes["slow evaluation"]
    assert outcome.codes == [128 + signal.SIGTERM] * 2, outcome.said
    assert outcome.said[0].count("stopped by SIGTERM") == 1
    assert position_of(folder / "slow evaluation" / "checkpoint.pth") == (0, 12)


@pytest.mark.parametrize("name", ["SIGHUP", "closed terminal"])
def test_a_closed_terminal_saves_and_stops(folder, outcomes, name):
    outcome = outcomes[name]
    assert outcome.codes == [128 + signal.SIGHUP], outcome.said
    epoch, images = position_of(folder / name / "checkpoint.pth")
    assert (epoch, images) >= (0, 32)
    assert "Traceback" not in outcome.said[0]


def test_a_run_under_nohup_ignores_the_terminal(folder, outcomes):
    outcome = outcomes["nohup"]
    assert outcome.codes == [0], outcome.said
    assert position_of(folder / "nohup" / "checkpoint.pth") == (3, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["srun", "mpirun"])
def test_tasks_join_one_run(folder, outcomes, name):
    outcome = outcomes[name]
    assert outcome.codes == [0, 0], outcome.said
    assert "2 process(es)" in outcome.said[0]
    assert outcome.said[1] == ""
    assert len([*(folder / name).glob("events*")]) == 1


def test_half_of_a_launchers_variables_is_refused(folder, outcomes):
    outcome = outcomes["half"]
    assert outcome.codes == [2, 2]
    for rank in range(2):
        assert f"error: RANK is {rank} in the environment, but WORLD_SIZE is not set" in outcome.said[rank]
    assert not (folder / "half").exists()


STEP = {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 2, "SLURM_PROCID": 1, "SLURM_LOCALID": 0, "SLURM_STEP_NUM_TASKS": 4}
BATCH = {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 4, "SLURM_PROCID": 0, "SLURM_LOCALID": 0}
TWO_NODES = {"SLURM_STEP_NUM_NODES": 2, "SLURM_STEP_NODELIST": "gpu[07-08],cpu1"}
TORCHRUN = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "host", "MASTER_PORT": 29500}
MPI = {"OMPI_COMM_WORLD_RANK": 1, "OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_LOCAL_RANK": 1}
JSM = {"JSM_NAMESPACE_RANK": 1, "JSM_NAMESPACE_SIZE": 2, "JSM_NAMESPACE_LOCAL_RANK": 1}
HYDRA = {"PMI_RANK": 1, "PMI_SIZE": 2, "MPI_LOCALRANKID": 1, "MPI_LOCALNRANKS": 2}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": 1}, None),  # of a container
        ({"RANK": "", "WORLD_SIZE": ""}, None),
        ({"LOCAL_RANK": 0, "PMIX_RANK": 0}, None),
        ({"PMIX_RANK": 1, "PMIX_NAMESPACE": "a"} | MPI, (1, 2, 1, "127.0.0.1", None)),
        (JSM, (1, 2, 1, "127.0.0.1", None)),
        (JSM | {"JSM_NAMESPACE_LOCAL_RANK": 0, "MASTER_ADDR": "host"}, (1, 2, 0, "host", None)),
        (BATCH | {"SLURM_PROCID": 1} | TORCHRUN, (1, 2, 1, "host", 29500)),
        (TORCHRUN, (1, 2, 1, "host", 29500)),
        ({"OMPI_COMM_WORLD_RANK": 0, "OMPI_COMM_WORLD_SIZE": 1}, None),
        (MPI, (1, 2, 1, "127.0.0.1", None)),
        (HYDRA, (1, 2, 1, "127.0.0.1", None)),
        ({"PMI_RANK": 1, "PMI_SIZE": 2}, (1, 2, 1, "127.0.0.1", None)),
        (MPI | {"MASTER_ADDR": "host", "MASTER_PORT": 5}, (1, 2, 1, "host", 5)),
        (STEP | TWO_NODES, (1, 4, 0, "gpu07", 10000 + 7 + 2 * 1009)),
        (STEP | {"SLURM_STEP_NODELIST": "gpu07"}, (1, 4, 0, "127.0.0.1", None)),
        (STEP | TWO_NODES | {"MASTER_ADDR": "host"}, (1, 4, 0, "host", None)),
        (STEP | {"SLURM_STEP_NUM_TASKS": 1, "SLURM_PROCID": 0}, None),
        (BATCH, None),
        (BATCH | {"SLURM_STEP_ID": 4294967291}, None),  # of the batch script itself
        (STEP | TORCHRUN, (1, 2, 1, "host", 29500)),  # srun torchrun
        (STEP | TWO_NODES | {"WORLD_SIZE": 4}, (1, 4, 0, "gpu07", None)),  # exported by the batch script
        (STEP | {"SLURM_STEP_NUM_TASKS": 2} | MPI, (1, 2, 1, "127.0.0.1", None)),  # mpirun, which used srun
        (STEP | {"PMI_RANK": 1, "PMI_SIZE": 4} | TWO_NODES, (1, 4, 0, "gpu07", None)),  # srun --mpi=pmi2
    ],
)
def test_launchers(environment, expected):
    found = launchers.find_world(texts(environment))
    if expected is None:
        assert found is None
    else:
        rank, size, local_rank, address, port = expected
        assert found[:3] == (rank, size, local_rank)
        assert found.address == address
        assert found.port == port or port is None


@pytest.mark.parametrize(
    ("devices", "environment", "number"),
    [
        (1, {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1"}, 0),  # --gpus-per-task: its own alone
        (2, {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1"}, 1),
        (1, {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "TORCHELASTIC_RUN_ID": "a"}, None),
        (1, {}, None),
    ],
)
def test_device_of_a_task(monkeypatch, devices, environment, number):
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("utils._world", World(1, 2, 1, 2, "127.0.0.1", 1))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = parse_options(["--device", "cuda"])
    if number is None:
        with pytest.raises(InputError, match="CUDA device 1 is needed, there are 1 here"):
            device_of(args)
    else:
        assert device_of(args) == torch.device("cuda", number)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": 1}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": 2}, "RANK is not set"),
        (TORCHRUN | {"RANK": "one"}, "RANK is 'one' in the environment: expected a whole number"),
        (TORCHRUN | {"RANK": -1}, "RANK is '-1'"),
        (TORCHRUN | {"RANK": 2}, "RANK is 2 and WORLD_SIZE is 2: expected ranks from 0"),
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        (TORCHRUN | {"MASTER_PORT": 70000}, "MASTER_PORT is 70000"),
        ({"RANK": 0, "WORLD_SIZE": 2}, "MASTER_ADDR is not set in the environment of process 0 of 2"),
        ({"OMPI_COMM_WORLD_RANK": 1}, "OMPI_COMM_WORLD_SIZE is not set"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": 0}, "MASTER_ADDR is not set"),  # on another host
        ({"LOCAL_RANK": 1}, "LOCAL_RANK is 1 in the environment, but no variable gives the number"),
        ({"LOCAL_RANK": 1, "WORLD_SIZE": 1}, "LOCAL_RANK is 1"),
        (
            {"PMIX_RANK": 1, "PMIX_NAMESPACE": "a"},
            "PMIX_RANK is 1 in the environment, but no variable gives the number",
        ),
        ({"JSM_NAMESPACE_RANK": 1}, "JSM_NAMESPACE_SIZE is not set"),
        (BATCH | {"SLURM_PROCID": 1}, "SLURM_PROCID is 1 in the environment, but SLURM_STEP_ID is missing"),
        (STEP | {"RANK": 0, "WORLD_SIZE": 1}, "but this is process 1 of 4 of srun"),
        (STEP | {"WORLD_SIZE": 2}, "but this is process 1 of 4 of srun"),
    ],
)
def test_launchers_that_cannot_be_right(environment, expected):
    with pytest.raises(InputError, match=r"RANK|PROCID|WORLD_SIZE|MASTER") as error:
        launchers.find_world(texts(environment))
    assert expected in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Encodings
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        *({"PYTHONIOENCODING": name} for name in ("latin-1", "ascii", "cp1252")),
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_help_is_printed_whatever_the_encoding(environment):
    done = subprocess.run([sys.executable, MAIN, "--help"], env={**os.environ, **environment}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"--output-dir" in done.stdout


@pytest.mark.parametrize("redirection", ["| head -c 1", ">&-", "> /dev/full"])
def test_help_that_nobody_can_read(redirection):
    command = f"set -o pipefail; '{sys.executable}' '{MAIN}' --help {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_script_accepts_any_text():
    scripts = [MAIN, *SCRIPTS.glob("*.py"), *MAIN.parent.glob("benchmarks/*.py")]
    programs = [path for path in scripts if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
    assert len(programs) > 10
    for path in programs:
        assert '__main__":\n    console.accept_any_text(' in path.read_text(encoding="utf-8"), path


if __name__ == "__main__":
    fork_cases(Path(sys.argv[1]))
