"""What surrounds a run: temporary folders, file systems, start methods, launchers, terminals."""

import os
import signal
import socket
from itertools import count
from pathlib import Path
from typing import NamedTuple

from common import launchers
from samplers import TrainSampler

import pytest
from conftest import MAIN, position_of
from forked_cases import Case, Outcome, run_cases, texts
from PIL import Image

pytestmark = pytest.mark.full  # its runs take minutes

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
WORKERS = "from common import workers\nworkers"
WAITED = "os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)"


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


def refusing(what: str, number: int) -> str:
    """Code after which the functions ``what`` of os fail."""
    return f"import os\ndef fail(*args, **kwargs): raise OSError({number}, os.strerror({number}))\n" + "".join(
        f"os.{name} = fail\n" for name in what.split()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("surroundings")


class Inputs(NamedTuple):
    """Data sets that the cases read, in ``folder``.

    Attributes:
        odd: with names that are not UTF-8.
        slow: the image of the last training step is a pipe that nobody writes to.
        untested: an image of each class to test is such a pipe.
        long: a folder with a long path.
        last: the image that the last step of epoch 0 needs.
    """

    folder: Path
    pictures: Path
    odd: Path
    slow: Path
    untested: Path
    long: Path
    last: str

    def failing(self, how: str) -> dict[str, str]:
        """A data worker that runs ``how`` when it opens the last image."""
        return {"code": OPENED.format(how).replace("IMAGE", self.last)}


def make_inputs(folder: Path) -> Inputs:
    pictures = make_pictures(folder / "pictures")
    odd = make_pictures(folder / os.fsdecode(b"pictures\xff\xe9"))
    for split in ("train", "val"):
        os.rename(odd / split / "dog", odd / split / os.fsdecode(b"d\xf6g"))
    index = [index for index, _ in TrainSampler(12, 6)][-1]
    last = f"{('cat', 'dog')[index // 6]}/{index % 6}.png"
    slow = make_pictures(folder / "slow")
    make_pipe(slow / "train" / last)
    untested = make_pictures(folder / "untested")
    for name in ("cat", "dog"):
        make_pipe(untested / "val" / name / "1.png")
    long = folder / ("x" * 110)
    long.mkdir()
    return Inputs(folder, pictures, odd, slow, untested, long, last)


def of(data: Path, workers: int, epochs: int = 1) -> str:
    return f"{PICTURES} {epochs} --num-workers {workers} --data-path {data}"


def system_cases(inputs: Inputs) -> dict[str, tuple]:
    """Temporary folders, start methods and file systems."""
    folder, pictures, long = inputs.folder, inputs.pictures, inputs.long
    return {
        "long TMPDIR": ({"environments": [{"TMPDIR": str(long)}]}, of(pictures, 1)),
        "no TMPDIR": ({"environments": [{"TMPDIR": str(folder / "nowhere")}]}, of(pictures, 1)),
        "no short folder": (
            {"environments": [{"TMPDIR": str(long)}], "code": f"{WORKERS}.SHORT_FOLDERS = ('/nowhere',)"},
            of(pictures, 1),
        ),
        "cannot send": (
            {"code": f"{WORKERS}.SOCKET_PATH = 1000", "environments": [{"TMPDIR": str(long)}]},
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
    }  # fmt: skip


def worker_cases(inputs: Inputs) -> dict[str, tuple]:
    """Data workers that fail or are killed."""
    pictures, failing = inputs.pictures, inputs.failing
    return {
        "exception": (failing("raise KeyError('label')"), of(pictures, 1, 2), "--save-every-steps", 1),
        "killed": (failing("os.kill(os.getpid(), 9)"), of(pictures, 1)),
        "killed at a plot": ({"code": PLOTTED.format(WAITED)}, of(pictures, 1, 2)),
        "killed unseen": ({"code": PLOTTED.format("worker.join()")}, of(pictures, 1, 2)),  # by torch's handler
        "bus error": (failing("os.kill(os.getpid(), 7)"), of(pictures, 1)),
        "open files": (failing("raise OSError(24, 'Too many open files')"), of(pictures, 1), "--skip-bad-images"),
        "any bytes": ({}, of(inputs.odd, 1)),
    }


def signal_and_launcher_cases(inputs: Inputs) -> dict[str, tuple]:
    """Signals, closed terminals, and processes that launchers start."""
    ranks = [texts({"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}) for rank in range(2)]
    term, hup = signal.SIGTERM.value, signal.SIGHUP.value
    hangs_up = "import signal as s\ns.signal(s.SIGHUP, s.SIG_DFL)"  # also where the tests run under nohup
    return {
        "slow, 0 workers": ({"signal": ("training 1/2", term)}, of(inputs.slow, 0)),
        "slow, 1 worker": ({"signal": ("training 1/2", term)}, of(inputs.slow, 1)),
        "slow evaluation": (
            {"signal": ("training 3/3", term), "environments": ranks}, of(inputs.untested, 1), "--batch-size", 2
        ),
        "SIGHUP": ({"signal": ("training 1/", hup), "code": hangs_up}, f"{DIGITS} 50"),
        "nohup": (
            {"signal": ("training 1/", hup), "code": "import signal as s\ns.signal(s.SIGHUP, s.SIG_IGN)"}, f"{DIGITS} 3"
        ),
        "closed terminal": ({"signal": ("loss=", 0), "code": hangs_up}, f"{DIGITS} 500"),
        "srun": ({"environments": tasks_of_slurm(free_job(), "srun")}, f"{DIGITS} 1"),
        "batch script": ({"environments": tasks_of_slurm(free_job(), "sbatch")}, f"{DIGITS} 1"),
        "mpirun": ({"environments": tasks_of_mpirun()}, f"{DIGITS} 1"),
        "half": ({"environments": [{"RANK": "0"}, {"RANK": "1"}]}, f"{DIGITS} 1"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(folder) -> dict[str, Outcome]:
    inputs = make_inputs(folder)
    cases = system_cases(inputs) | worker_cases(inputs) | signal_and_launcher_cases(inputs)

    def case(name: str, how: dict, options: str, *args: object) -> Case:
        output = [] if name in UNWRITTEN else ["--output-dir", folder / name]
        return Case([*options.split(), *map(str, (*args, *output))], **how)

    return run_cases({name: case(name, *fields) for name, fields in cases.items()}, folder / "outcomes")


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
