"""Rank and world size from the environment variables of torchrun, mpirun, jsrun and srun.

A process is part of a distributed run if a launcher gives it a rank and a size. Incomplete or contradictory variables
are an error: otherwise every process would train a run of its own in the same folder.
"""

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from typing import NamedTuple

from common.errors import InputError

Environment = Mapping[str, str]
FIRST_PORT, PORTS = 10000, 20000  # range of the default port, as in scripts/slurm.sh


class World(NamedTuple):
    """The place of this process in a distributed run.

    Attributes:
        local_rank: the rank on this host.
        local_size: the number of processes on this host; None if unknown.
        address, port: of the rendezvous.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int | None
    address: str
    port: int

    def environment(self) -> dict[str, str]:
        """The environment variables that torch reads."""
        values = {"RANK": self.rank, "WORLD_SIZE": self.size, "LOCAL_RANK": self.local_rank}
        values |= {"MASTER_ADDR": self.address, "MASTER_PORT": self.port}
        values |= {} if self.local_size is None else {"LOCAL_WORLD_SIZE": self.local_size}
        return {name: str(value) for name, value in values.items()}


class Launcher(NamedTuple):
    """The names of a launcher's variables; ``job`` identifies the run."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    job: str


TORCHRUN = Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
MPI_SUFFIXES = ("COMM_WORLD_RANK", "COMM_WORLD_SIZE", "COMM_WORLD_LOCAL_RANK", "COMM_WORLD_LOCAL_SIZE")
OPEN_MPI = Launcher("mpirun", *(f"OMPI_{name}" for name in MPI_SUFFIXES), "PMIX_NAMESPACE")
MVAPICH = Launcher("mpirun", *(f"MV2_{name}" for name in MPI_SUFFIXES), "PMI_JOBID")
MPICH = Launcher("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMI_JOBID")  # also Intel MPI
JSM_SUFFIXES = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")  # IBM's
JSRUN = Launcher("jsrun", *(f"JSM_NAMESPACE_{name}" for name in JSM_SUFFIXES), "PMIX_NAMESPACE")
SRUN = Launcher(
    "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID"
)
STEP_VARIABLES = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
STEP_VARIABLES += ("SLURM_SRUN_COMM_HOST",)
# IDs of the steps that are the shells of sbatch and salloc: one process, however many tasks the job has.
SHELL_STEPS = {"batch", "interactive", "extern", *map(str, range(2**32 - 16, 2**32))}


def find_world(environment: Environment = os.environ) -> World | None:
    """The distributed run that this process is part of; None for a single process.

    torchrun's variables take precedence over those of mpirun and srun, which may have started torchrun.

    Raises:
        InputError: the variables are incomplete, or contradict each other.
    """
    given = {name: value for name, value in environment.items() if value}
    environment = current_slurm_names(given)
    rank, size = rank_and_size(TORCHRUN, environment)
    other = next(iter(other_launchers(environment)), None)
    if None in (rank, size):
        if other is None and rank is None and size in (None, 1):  # some containers set WORLD_SIZE=1
            check_alone(given)
            return None
        if other is None:
            raise incomplete_error(TORCHRUN, environment)
        if (rank, size) != (None, None):  # exported by a batch script
            found = rank_and_size(other, environment)
            if rank not in (None, found[0]) or size not in (None, found[1]):
                raise contradiction_error(other, environment)
        return complete_world(other, environment)
    if size == 1 and other is not None and TORCHRUN.job not in environment:
        raise contradiction_error(other, environment)
    if size == 1 and "MASTER_ADDR" not in environment:
        return None
    return complete_world(TORCHRUN, environment)


def check_alone(environment: Environment) -> None:
    """Raises InputError if a variable gives a rank above 0, but none gives the number of processes."""
    for name in (TORCHRUN.local_rank, "PMIX_RANK", SRUN.rank):
        number = whole_number(name, environment)
        if not number:
            continue
        missing = "no variable gives the number of processes: torchrun, mpirun and srun do"
        if name == SRUN.rank:
            missing = "SLURM_STEP_ID is missing: process 0 would take itself for a batch script, and train alone"
        raise InputError(f"{name} is {number} in the environment, but {missing}; for a run of one process unset {name}")


def other_launchers(environment: Environment) -> list[Launcher]:
    """Which of mpirun, jsrun and srun started several processes, the launcher of this process first.

    In a SLURM job mpirun starts helpers with srun, and its processes inherit their variables. srun itself sets some
    of MPICH's variables (--mpi=pmi2), but not the local rank.
    """
    last = (MPICH, SRUN) if MPICH.local_rank in environment else (SRUN, MPICH)
    found = []
    for launcher in (OPEN_MPI, MVAPICH, JSRUN, *last):
        rank, size = rank_and_size(launcher, environment)
        if (rank is None) != (size is None) and size != 1:
            raise incomplete_error(launcher, environment)
        if size is not None and size > 1:
            found.append(launcher)
    return found


def current_slurm_names(environment: dict[str, str]) -> dict[str, str]:
    """The environment with SLURM's variables under their current names; without them outside of a step of srun."""
    if not is_step(environment):
        return {name: value for name, value in environment.items() if not name.startswith("SLURM_")}
    older = {"SLURM_STEP_NUM_TASKS": ("SLURM_NTASKS", "SLURM_NPROCS"), "SLURM_STEP_ID": ("SLURM_STEPID",)}
    older |= {"SLURM_JOB_ID": ("SLURM_JOBID",), "SLURM_STEP_NUM_NODES": ("SLURM_NNODES", "SLURM_JOB_NUM_NODES")}
    older["SLURM_STEP_NODELIST"] = ("SLURM_JOB_NODELIST", "SLURM_NODELIST")
    names = {new: next((name for name in (new, *olds) if name in environment), None) for new, olds in older.items()}
    renamed = {new: environment[name] for new, name in names.items() if name is not None}
    return {**environment, **renamed}


def is_step(environment: Environment) -> bool:
    """Whether this process is a task of srun.

    A batch script also has SLURM_PROCID and the number of the job's tasks, but none of a step's variables.
    """
    shell = "SLURM_PTY_PORT" in environment and sys.stdin is not None and sys.stdin.isatty()  # srun --pty bash
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID"))
    if SRUN.rank not in environment or shell or step in SHELL_STEPS:
        return False
    return any(name in environment for name in STEP_VARIABLES)


def is_plain_task(environment: Environment = os.environ) -> bool:
    """Whether srun started this process directly, without a launcher in between that assigns devices by rank."""
    return is_step(environment) and TORCHRUN.job not in environment


def rank_and_size(launcher: Launcher, environment: Environment) -> tuple[int | None, int | None]:
    """The rank and the world size that a launcher sets; None for a variable that is not set.

    Raises:
        InputError: one is not a number, or the rank is not below the size.
    """
    rank, size = (whole_number(name, environment) for name in (launcher.rank, launcher.size))
    if size == 0 or (rank is not None and size is not None and rank >= size):
        given = f"{launcher.rank} is {rank} and " * (rank is not None)
        raise InputError(f"{given}{launcher.size} is {size}: expected ranks from 0 to the number of processes - 1")
    return rank, size


def whole_number(name: str, environment: Environment) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise InputError(f"{name} is {value[:50]!r} in the environment: expected a whole number")
    return int(value)


def incomplete_error(launcher: Launcher, environment: Environment) -> InputError:
    given, missing = launcher.rank, launcher.size
    if given not in environment:
        given, missing = missing, given
    return InputError(
        f"{given} is {environment[given]} in the environment, but {missing} is not set: several processes need both, "
        f"as {launcher.name} sets them; for a run of one process unset {given}"
    )


def contradiction_error(launcher: Launcher, environment: Environment) -> InputError:
    rank, size = rank_and_size(launcher, environment)
    ours = ", ".join(f"{name}={environment[name]}" for name in (TORCHRUN.rank, TORCHRUN.size) if name in environment)
    return InputError(
        f"the environment has {ours}, but this is process {rank} of {size} of {launcher.name}: unset RANK and "
        f"WORLD_SIZE, or start one process"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Rendezvous
# ---------------------------------------------------------------------------------------------------------------------


def complete_world(launcher: Launcher, environment: Environment) -> World:
    """The variables of ``launcher``, with defaults for local rank, address and port.

    Raises:
        InputError: the host of rank 0 is unknown.
    """
    rank, size = rank_and_size(launcher, environment)
    local_rank, local_size = whole_number(launcher.local_rank, environment), None
    if launcher is SRUN:  # "2" or "2(x3)": 2 on each of 3 hosts; "2(x3),1" varies
        match = re.fullmatch(r"(\d+)(\(x\d+\))?", environment.get(SRUN.local_size, ""))
        local_size = int(match[1]) if match else None
        first = first_host(environment)
    else:
        local_size = whole_number(launcher.local_size, environment)
        # rank 0 is on this host if all processes are, or if the local rank equals the rank
        here = size in (1, local_size) or local_rank == rank or (local_rank is None and launcher is not TORCHRUN)
        first = "127.0.0.1" if here else None
    address = environment.get("MASTER_ADDR", first)
    if address is None:
        raise InputError(
            f"MASTER_ADDR is not set in the environment of process {rank} of {size}: expected the host of process 0"
        )
    if local_rank is None:
        local_rank = 0 if launcher is TORCHRUN else rank
    return World(rank, size, local_rank, local_size, address, port_of(launcher, environment))


def first_host(environment: Environment) -> str | None:
    """The first host of a SLURM step, which runs task 0; None if unknown."""
    hosts = environment.get("SLURM_STEP_NODELIST", "")
    if environment.get("SLURM_STEP_NUM_NODES", "1" if re.fullmatch(r"[\w.-]*", hosts) else "") == "1":
        return "127.0.0.1"
    first = re.match(r"([^,\[]|\[[^]]*\])+", hosts)  # gpu[07-09,12],cpu3 → gpu07
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0]) if first else None


def port_of(launcher: Launcher, environment: Environment) -> int:
    """MASTER_PORT, or a port derived from what the processes of this run have in common."""
    port, job = whole_number("MASTER_PORT", environment), environment.get(launcher.job)
    if port is not None:
        if not 0 < port < 2**16:
            raise InputError(f"MASTER_PORT is {port} in the environment: expected 1 to 65535")
        return port
    if launcher is SRUN and job is not None and job.isdecimal():
        step = environment.get("SLURM_STEP_ID", "")
        number = int(job) + 1009 * int(step if step.isdecimal() else 0)  # steps of a job may run concurrently
    else:
        shared = [job] if job else [os.getuid(), os.getcwd(), *sys.argv]
        number = int(hashlib.sha256(repr(shared).encode(errors="surrogatepass")).hexdigest(), 16)
    return FIRST_PORT + number % PORTS
