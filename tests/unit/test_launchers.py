"""The process group from the variables of torchrun, SLURM, Open MPI, Hydra and JSM."""

from common import launchers
from common.devices import device_of
from common.errors import InputError

import pytest
import torch
from forked_cases import texts

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
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if number is None:
        with pytest.raises(InputError, match="found 1 cuda device here, and no number 1; expected one for each"):
            device_of("cuda", 1, alone=False)
    else:
        assert device_of("cuda", 1, alone=False) == torch.device("cuda", number)


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
