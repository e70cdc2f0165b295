"""Who started this process, and beside which others: the environment variables of all launchers, read in one place.

A process joins a run of several where a launcher gives it a rank and a size. Where the variables give half of that, or
contradict each other, each process would train a whole run of its own into the same folder: that is an error.
"""

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from typing import NamedTuple

from common.errors import InputError

Environment = Mapping[str, str]
FIRST_PORT, PORTS = 10000, 20000  # the range of a port that nobody has chosen, as in scripts/slurm.sh


class World(NamedTuple):
    """The processes of a run, as one of them sees them.

    Attributes:
        local_rank: the number of this process on its host.
        local_size: the number of processes on its host, or None where the launcher does not say it.
        address, port: where the processes meet.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int | None
    address: str
    port: int

    def environment(self) -> dict[str, str]:
        """The variables that torch reads."""
        values = {"RANK": self.rank, "WORLD_SIZE": self.size, "LOCAL_RANK": self.local_rank}
        values |= {"MASTER_ADDR": self.address, "MASTER_PORT": self.port}
        values |= {} if self.local_size is None else {"LOCAL_WORLD_SIZE": self.local_size}
        return {name: str(value) for name, value in values.items()}


class Launcher(NamedTuple):
    """The names of a launcher's variables; ``job`` has the same value in all processes of a run, and in no other's."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    job: str


TORCHRUN = Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
OF_MPI = ("COMM_WORLD_RANK", "COMM_WORLD_SIZE", "COMM_WORLD_LOCAL_RANK", "COMM_WORLD_LOCAL_SIZE")
OPEN_MPI = Launcher("mpirun", *(f"OMPI_{name}" for name in OF_MPI), "PMIX_NAMESPACE")
MVAPICH = Launcher("mpirun", *(f"MV2_{name}" for name in OF_MPI), "PMI_JOBID")
MPICH = Launcher("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMI_JOBID")  # Intel's, too
OF_JSM = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")  # IBM's
JSRUN = Launcher("jsrun", *(f"JSM_NAMESPACE_{name}" for name in OF_JSM), "PMIX_NAMESPACE")
SRUN = Launcher(
    "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID"
)
OF_STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_SRUN_COMM_HOST")
# The shells of sbatch and salloc are steps, too: of these numbers, and of one process, however many tasks the job has.
SHELLS = {"batch", "interactive", "extern", *map(str, range(2**32 - 16, 2**32))}


def find_world(environment: Environment = os.environ) -> World | None:
    """The processes of this run, or None if this process is alone.

    torchrun's variables count before those of mpirun and srun, which may have started torchrun.

    Raises:
        InputError: the variables give half of what is needed, or contradict each other.
    """
    given = {name: value for name, value in environment.items() if value}
    environment = newest_names(given)
    rank, size = place_in(TORCHRUN, environment)
    other = next(iter(beside_torchrun(environment)), None)
    if None in (rank, size):
        if other is None and rank is None and size in (None, 1):  # some containers set WORLD_SIZE=1
            check_alone(given)
            return None
        if other is None:
            raise half_of(TORCHRUN, environment)
        if (rank, size) != (None, None):  # a batch script exports one of them, and the launcher says the other
            found = place_in(other, environment)
            if rank not in (None, found[0]) or size not in (None, found[1]):
                raise contradiction(other, environment)
        return world_of(other, environment)
    if size == 1 and other is not None and TORCHRUN.job not in environment:
        raise contradiction(other, environment)
    if size == 1 and "MASTER_ADDR" not in environment:
        return None
    return world_of(TORCHRUN, environment)


def check_alone(environment: Environment) -> None:
    """Raises InputError where a variable numbers this process behind another one, though nothing gives their number."""
    for name in (TORCHRUN.local_rank, "PMIX_RANK", SRUN.rank):
        number = whole_number(name, environment)
        if not number:
            continue
        missing = "no variable gives the number of processes: torchrun, mpirun and srun do"
        if name == SRUN.rank:
            missing = "SLURM_STEP_ID is missing: process 0 would take itself for a batch script, and train alone"
        raise InputError(f"{name} is {number} in the environment, but {missing}; for a run of one process unset {name}")


def beside_torchrun(environment: Environment) -> list[Launcher]:
    """Those of mpirun, jsrun and srun that have started several processes, the one that started this process first.

    In a job of SLURM mpirun starts helpers with srun, and its processes inherit their variables. srun itself sets some
    of MPICH's variables (--mpi=pmi2), but not the rank on the host.
    """
    last = (MPICH, SRUN) if MPICH.local_rank in environment else (SRUN, MPICH)
    found = []
    for launcher in (OPEN_MPI, MVAPICH, JSRUN, *last):
        rank, size = place_in(launcher, environment)
        if (rank is None) != (size is None) and size != 1:
            raise half_of(launcher, environment)
        if size is not None and size > 1:
            found.append(launcher)
    return found


def newest_names(environment: dict[str, str]) -> dict[str, str]:
    """The environment with SLURM's variables under their newest names, and those of srun only where srun set them."""
    if not is_step(environment):
        return {name: value for name, value in environment.items() if not name.startswith("SLURM_")}
    older = {"SLURM_STEP_NUM_TASKS": ("SLURM_NTASKS", "SLURM_NPROCS"), "SLURM_STEP_ID": ("SLURM_STEPID",)}
    older |= {"SLURM_JOB_ID": ("SLURM_JOBID",), "SLURM_STEP_NUM_NODES": ("SLURM_NNODES", "SLURM_JOB_NUM_NODES")}
    older["SLURM_STEP_NODELIST"] = ("SLURM_JOB_NODELIST", "SLURM_NODELIST")
    names = {new: next((name for name in (new, *olds) if name in environment), None) for new, olds in older.items()}
    renamed = {new: environment[name] for new, name in names.items() if name is not None}
    return {**environment, **renamed}


def is_step(environment: Environment) -> bool:
    """Whether srun has started this process as one of its tasks.

    A batch script has SLURM_PROCID and the number of the job's tasks as well, but none of a step's variables.
    """
    shell = "SLURM_PTY_PORT" in environment and sys.stdin is not None and sys.stdin.isatty()  # srun --pty bash
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID"))
    if SRUN.rank not in environment or shell or step in SHELLS:
        return False
    return any(name in environment for name in OF_STEP)


def is_plain_task(environment: Environment = os.environ) -> bool:
    """Whether srun has started this process, and not a launcher in between that gives devices by their numbers."""
    return is_step(environment) and TORCHRUN.job not in environment


def place_in(launcher: Launcher, environment: Environment) -> tuple[int | None, int | None]:
    """The rank and the number of processes that a launcher gives, None for what it does not.

    Raises:
        InputError: one is no number, or they do not fit together.
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


def half_of(launcher: Launcher, environment: Environment) -> InputError:
    given, missing = launcher.rank, launcher.size
    if given not in environment:
        given, missing = missing, given
    return InputError(
        f"{given} is {environment[given]} in the environment, but {missing} is not set: several processes need both, "
        f"as {launcher.name} sets them; for a run of one process unset {given}"
    )


def contradiction(launcher: Launcher, environment: Environment) -> InputError:
    rank, size = place_in(launcher, environment)
    ours = ", ".join(f"{name}={environment[name]}" for name in (TORCHRUN.rank, TORCHRUN.size) if name in environment)
    return InputError(
        f"the environment has {ours}, but this is process {rank} of {size} of {launcher.name}: unset RANK and "
        f"WORLD_SIZE, or start one process"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Where the processes meet
# ---------------------------------------------------------------------------------------------------------------------


def world_of(launcher: Launcher, environment: Environment) -> World:
    """What ``launcher`` says, completed.

    Raises:
        InputError: it does not say which host has rank 0.
    """
    rank, size = place_in(launcher, environment)
    local_rank, local_size = whole_number(launcher.local_rank, environment), None
    if launcher is SRUN:  # "2" or "2(x3)": two on each of three hosts; "2(x3),1" is not the same on all
        match = re.fullmatch(r"(\d+)(\(x\d+\))?", environment.get(SRUN.local_size, ""))
        local_size = int(match[1]) if match else None
        first = first_host(environment)
    else:
        local_size = whole_number(launcher.local_size, environment)
        # the host of rank 0 is this one if all processes are here, as those of the same number on host and in run are
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
    """The first host of a step of SLURM, on which its task 0 runs; None if it is not said."""
    hosts = environment.get("SLURM_STEP_NODELIST", "")
    if environment.get("SLURM_STEP_NUM_NODES", "1" if re.fullmatch(r"[\w.-]*", hosts) else "") == "1":
        return "127.0.0.1"
    first = re.match(r"([^,\[]|\[[^]]*\])+", hosts)  # gpu[07-09,12],cpu3 → gpu07
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0]) if first else None


def port_of(launcher: Launcher, environment: Environment) -> int:
    """MASTER_PORT, or a port that follows from what the processes of this run share."""
    port, job = whole_number("MASTER_PORT", environment), environment.get(launcher.job)
    if port is not None:
        if not 0 < port < 2**16:
            raise InputError(f"MASTER_PORT is {port} in the environment: expected 1 to 65535")
        return port
    if launcher is SRUN and job is not None and job.isdecimal():
        step = environment.get("SLURM_STEP_ID", "")
        number = int(job) + 1009 * int(step if step.isdecimal() else 0)  # steps of a job may run side by side
    else:
        shared = [job] if job else [os.getuid(), os.getcwd(), *sys.argv]
        number = int(hashlib.sha256(repr(shared).encode(errors="surrogatepass")).hexdigest(), 16)
    return FIRST_PORT + number % PORTS
