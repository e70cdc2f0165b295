"""Training on several hosts: two network namespaces, which share nothing but a link, and scripts/slurm.sh."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, MAIN, SECONDS, assert_same_result, run_main

LETS = "--src-arch deit_nano_patch8_16_L2_H1 --tgt-arch deit_nano_patch8_16_L4_H2"
TRAINING = f"--data-set DIGITS --train-images 640 --batch-size 16 --warmup-epochs 0 --log-interval 1 {LETS} --epochs"
SHORT = f"{TRAINING} 1 --num-workers 0"
SCRIPT = MAIN.parent / "scripts" / "slurm.sh"
pytestmark = pytest.mark.full
LINK = "link0"
# The frames for an address that nobody has are received and passed over: no end of the link hears of an error.
NOBODY = "02:00:00:00:00:99"


@pytest.fixture(scope="module")
def one_host(tmp_path_factory) -> Path:
    """The output folder of a run with two processes on this host, which nobody disturbs."""
    folder = tmp_path_factory.mktemp("one-host")
    outcome = run_main(*SHORT.split(), "--output_dir", folder, processes=2)
    assert outcome.returncode == 0, outcome.stderr
    return folder


def await_training(process: subprocess.Popen[str], errors: Path) -> None:
    """Read what a run prints until it trains."""
    for line in process.stdout:
        if line.startswith("training "):
            return
    pytest.fail(f"the run has ended before it trained:\n{errors.read_text()}")


# ---------------------------------------------------------------------------------------------------------------------
# Two hosts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    """A network namespace."""

    name: str
    address: str

    def start(self, command: list[str], output: Path, **variables: object) -> subprocess.Popen[str]:
        """Start a command on this host; standard error goes to a file, and nobody has to read it meanwhile."""
        env = {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": LINK, **{name: str(value) for name, value in variables.items()}}
        command = ["ip", "netns", "exec", self.name, *command]
        with output.open("w") as errors:
            return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)

    def lose(self, other: "Host") -> None:
        """From now on nothing arrives that this host sends to the other."""
        ip("-n", self.name, "neighbor", "replace", other.address, "lladdr", NOBODY, "dev", LINK, "nud", "permanent")

    def remove(self) -> None:
        pids = ip("netns", "pids", self.name).split()
        for pid in map(int, pids):
            os.kill(pid, signal.SIGKILL)
        ip("netns", "delete", self.name)


def ip(*args: str) -> str:
    outcome = subprocess.run(["ip", *args], capture_output=True, text=True)
    if outcome.returncode:
        raise OSError(f"ip {' '.join(args)}: {outcome.stderr.strip()}")
    return outcome.stdout


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    if shutil.which("ip") is None:
        pytest.skip("two hosts are made by the command ip, which is not here")
    pair = tuple(Host(f"lets-{os.getpid()}-{i}", f"10.77.0.{i + 1}") for i in range(2))
    with ExitStack() as stack:
        try:
            for host in pair:
                ip("netns", "add", host.name)
                stack.callback(host.remove)
            first, second = (host.name for host in pair)
            ip("link", "add", LINK, "netns", first, "type", "veth", "peer", "name", LINK, "netns", second)
            for host in pair:
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", LINK)
                for device in ("lo", LINK):
                    ip("-n", host.name, "link", "set", device, "up")
        except OSError as error:
            pytest.skip(f"no network namespaces can be made here: {error}")
        yield pair


def test_two_hosts_train_as_one(hosts, one_host, tmp_path):
    launcher = f"-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --master_addr {hosts[0].address}"
    runs = []
    for rank, host in enumerate(hosts):
        place = ["--master_port", "29500", "--node_rank", str(rank)]
        command = [sys.executable, *launcher.split(), *place, str(MAIN), *SHORT.split()]
        runs.append(host.start([*command, "--output_dir", str(tmp_path / str(rank))], tmp_path / f"{rank}.stderr"))
    said = [run.communicate(timeout=SECONDS)[0] for run in runs]
    errors = [(tmp_path / f"{rank}.stderr").read_text() for rank in range(2)]
    assert [run.returncode for run in runs] == [0, 0], errors
    assert "2 process(es)" in said[0]
    assert said[1] == ""
    assert_same_result(tmp_path / "0", one_host)
    assert not (tmp_path / "1").exists()


def test_each_host_says_that_it_has_lost_the_other(hosts, tmp_path):
    options = f"{TRAINING} 10000 --num-workers 0 --dist-timeout 1 --output_dir {tmp_path}/run".split()
    world = {"WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": hosts[0].address, "MASTER_PORT": 29500}
    outputs = [tmp_path / f"{rank}.stderr" for rank in range(2)]
    command = [sys.executable, str(MAIN), *options]
    runs = [hosts[rank].start(command, outputs[rank], RANK=rank, **world) for rank in range(2)]
    await_training(runs[0], outputs[0])
    hosts[0].lose(hosts[1])
    hosts[1].lose(hosts[0])
    for run in runs:
        run.communicate(timeout=SECONDS)
    for rank, output in enumerate(outputs):
        assert runs[rank].returncode == 1, output.read_text()
        (said,) = [line for line in output.read_text().splitlines() if line.startswith("error: ")]
        assert said.startswith(f"error: process {rank} of 2 has lost its connection to the others")


# ---------------------------------------------------------------------------------------------------------------------
# SLURM
# ---------------------------------------------------------------------------------------------------------------------

# Starts the tasks of a job step, passes SIGUSR1 on to all that they have started, as SLURM's daemon does, and returns
# the highest status, or 128 + the number of a signal. SIGTERM ends it with its tasks, whatever they do.
SRUN = """#!{python}
import os, signal, subprocess, sys
from itertools import takewhile

options = list(takewhile(lambda word: word.startswith("-"), sys.argv[1:]))
command = sys.argv[1 + len(options) :]
counts = dict(option.removeprefix("--").split("=") for option in options)
tasks = []

def pass_on(number, frame):
    for task in tasks:
        if task.poll() is None:
            os.killpg(task.pid, signal.SIGKILL if number == signal.SIGTERM else number)

for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, pass_on)
for number in range(int(counts["ntasks"])):
    place = {{"SLURM_PROCID": number, "SLURM_LOCALID": number % int(counts["ntasks-per-node"])}}
    env = os.environ | {{"SLURM_NTASKS": counts["ntasks"]}} | {{name: str(value) for name, value in place.items()}}
    tasks.append(subprocess.Popen(command, env=env, start_new_session=True))
with open("{folder}/srun.pid", "w") as file:
    file.write(str(os.getpid()))
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """#!/bin/sh
case "$1" in
    show) echo localhost; echo another-host ;;
    *) echo "$@" >> {folder}/scontrol.txt ;;
esac
"""


class Cluster:
    """Commands in place of SLURM's, for jobs on two nodes of one GPU each, which are both this host.

    Attributes:
        asked: what scontrol was asked for besides names of hosts.
        process: the script that was started last.
    """

    def __init__(self, folder: Path):
        self.folder, self.job = folder, free_job()
        self.errors, self.pid = folder / "stderr", folder / "srun.pid"
        for name, program in (("srun", SRUN), ("scontrol", SCONTROL)):
            path = folder / name
            path.write_text(program.format(python=sys.executable, folder=folder))
            path.chmod(0o755)

    @property
    def asked(self) -> list[str]:
        path = self.folder / "scontrol.txt"
        return path.read_text().splitlines() if path.exists() else []

    def start(self, *args: object, python: str = sys.executable) -> subprocess.Popen[str]:
        """The script as sbatch starts it on the first node."""
        env = {**ENVIRONMENT, "PATH": f"{self.folder}:{ENVIRONMENT['PATH']}", "PYTHON": python}
        env |= {"SLURM_JOB_ID": str(self.job), "SLURM_JOB_NODELIST": "localhost,another-host"}
        env |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1"}
        command, pipe = ["bash", str(SCRIPT), *map(str, args)], subprocess.PIPE
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(command, env=env, cwd=MAIN.parent, stdout=pipe, stderr=errors, text=True)
        return self.process

    def signal(self, number: int) -> None:
        """Send a signal to the tasks that run."""
        os.kill(int(self.pid.read_text()), number)


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    folder = tmp_path / "cluster"
    folder.mkdir()
    cluster = Cluster(folder)
    yield cluster
    if cluster.process.poll() is None:
        cluster.signal(signal.SIGTERM)


def free_job() -> int:
    """The number of a job whose tasks can meet at the port that the script derives from it."""
    for job in count(os.getpid()):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", 10000 + job % 20000))
            except OSError:
                continue
            return job


def test_slurm_job_is_requeued_when_its_time_is_up_and_continues(cluster, one_host, tmp_path):
    folder = tmp_path / "run"
    options = [*TRAINING.split(), 1, "--num-workers", 1, "--output_dir", folder]
    job = cluster.start(*options)
    await_training(job, cluster.errors)
    cluster.signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == 128 + signal.SIGUSR1, cluster.errors.read_text()
    assert "stopped by SIGUSR1, in epoch 0 after " in said
    assert cluster.asked == [f"requeue {cluster.job}"]

    job = cluster.start(*options)
    said, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == 0, cluster.errors.read_text()
    assert f"continuing from {folder}/checkpoint.pth" in said
    assert "2 process(es)" in said
    assert cluster.asked == [f"requeue {cluster.job}"]
    assert_same_result(folder, one_host)


def test_slurm_job_that_fails_is_not_requeued(cluster):
    job = cluster.start(python="false")
    job.communicate(timeout=SECONDS)
    assert job.returncode == 1
    assert cluster.asked == []
