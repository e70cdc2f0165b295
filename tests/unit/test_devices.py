"""Devices other than the CPU, without one: the emulated accelerator, and what is asked of torch."""

import warnings
from collections.abc import Callable

import utils
from common import devices
from common.errors import InputError
from training.build import autocast_of, check_scaler

import emulated_device
import pytest
import torch
from conftest import fork_server
from device_cases import CASES, SLOW, run_cases

emulated = pytest.mark.skipif(not emulated_device.POSSIBLE, reason="this torch emulates no device without C++")


@pytest.fixture(scope="module")
def problems(all_tests) -> dict[str, str]:
    """What went wrong in each of `CASES`: nothing, or a traceback."""
    names = [name for name in CASES if all_tests or name not in SLOW]
    reader, writer = fork_server().Pipe(duplex=False)
    process = fork_server().Process(target=run_cases, args=(names, writer))
    process.start()
    writer.close()
    try:
        return dict(iter(reader.recv, None))
    finally:
        process.join()


@emulated
@pytest.mark.parametrize("case", [pytest.param(n, marks=pytest.mark.full if n in SLOW else ()) for n in CASES])
def test_on_another_device(problems, case):
    assert not problems[case], problems[case]


# ---------------------------------------------------------------------------------------------------------------------
# What is asked of torch
# ---------------------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.fixture
def accelerator(monkeypatch) -> Callable[[str], None]:
    """Let torch find one device of a kind."""

    def find(kind: str) -> None:
        monkeypatch.setattr(devices, "accelerator", lambda: kind)
        monkeypatch.setattr(f"torch.{kind}.device_count", lambda: 1)
        monkeypatch.setattr("torch.distributed.is_backend_available", lambda backend: True)

    return find


def test_without_an_accelerator_auto_is_the_cpu():
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    assert devices.accelerator() == devices.type_of("auto") == "cpu"
    assert devices.device_of("auto") == CPU
    assert devices.default_dtype(CPU) == torch.float32
    assert not devices.can_pin(CPU)
    assert devices.peak_memory(CPU) > 2**20


def test_memory_of_work_is_that_of_the_tensors_that_live_at_a_time():
    kept = torch.zeros(1000)

    def work() -> None:
        first = kept + 1  # 4,000 bytes
        second = first.view(10, 100).t() * 2  # as many; the view has none
        del first
        second.double()  # 8,000 more
        kept.add_(1)

    assert devices.memory_of(work, CPU) == 12_000
    assert devices.memory_of(lambda: kept.view(10, 100), CPU) == 0
    layer = torch.nn.Linear(100, 50)
    with torch.no_grad():
        assert devices.memory_of(lambda: layer(torch.ones(8, 100)), CPU) == 4 * 8 * (100 + 50)
    assert devices.free_memory(CPU) > 2**20
    with devices.no_waiting(CPU):
        assert torch.ones(1).item() == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "found no such kind of device in torch; expected auto, cpu, cuda, cuda:N, xpu, xpu:N or mps"),
        ("meta", "found no such kind"),
        ("cpu:1", "found no such kind"),
        ("cuda:", "found no such kind"),
        ("cuda:1", "found 1 cuda device here, and no number 1; expected one of 0 to 0"),
        ("mps", "found no mps device here; expected --device cpu"),
    ],
)
def test_a_device_that_is_not_there(accelerator, name, message):
    accelerator("cuda")
    with pytest.raises(InputError) as error:
        devices.device_of(name)
    assert str(error.value).startswith(f"--device {name}: {message}")


def test_several_processes_need_a_device_each_and_a_backend(accelerator, monkeypatch):
    accelerator("mps")
    monkeypatch.setattr("torch.distributed.Backend.default_device_backend_map", {"cpu": "gloo", "mps": "gloo"})
    assert devices.device_of("mps", 0, alone=False) == torch.device("mps", 0)
    with pytest.raises(InputError, match="found 1 mps device here, and no number 1; expected one for each process"):
        devices.device_of("mps", 1, alone=False)
    monkeypatch.setattr("torch.distributed.Backend.default_device_backend_map", {"cpu": "gloo"})  # as in torch 2.6
    assert devices.device_of("mps") == torch.device("mps", 0)
    with pytest.raises(
        InputError, match=r"--device mps: found several processes, which torch .* cannot connect on mps"
    ):
        devices.device_of("mps", 0, alone=False)


@pytest.mark.parametrize(
    ("kind", "name", "shared", "backends"),
    [
        ("cuda", "auto", True, "cpu:gloo,cuda:nccl"),
        ("cuda", "cuda", True, "cpu:gloo,cuda:nccl"),
        ("cuda", "cuda:0", True, "cpu:gloo,cuda:gloo"),  # NCCL refuses two processes on one device
        ("cuda", "cuda:0", False, "cpu:gloo,cuda:nccl"),
        ("cuda", "cpu", True, "gloo"),
        ("cuda", "xpu", True, "gloo"),  # there is none, which is said when all processes are connected
        ("xpu", "auto", True, "cpu:gloo,xpu:xccl"),
    ],
)
def test_backends_of_a_process_group(accelerator, kind, name, shared, backends):
    accelerator(kind)
    assert devices.backends_of(name, shared) == backends


def test_what_torch_cannot_do_on_a_device_is_one_line():
    mps = (
        "The operator 'aten::_linalg_solve_ex.result' is not currently implemented for the MPS device. If you want "
        "this op to be considered for addition"
    )
    other = "Could not run 'aten::empty_strided' with arguments from the 'chip' backend. This could be because"
    for message, operator in ((mps, "aten::_linalg_solve_ex.result"), (other, "aten::empty_strided")):
        said = utils.known_cause(NotImplementedError(message))
        assert operator in said
        assert "--device cpu" in said
        assert "\n" not in said
    assert utils.known_cause(NotImplementedError("not yet")) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_precision_that_torch_cannot_use_is_one_line(monkeypatch, dtype):
    def no_autocast(kind: str, dtype: torch.dtype) -> None:
        warnings.warn("In MPS autocast, but the target dtype is not supported. Disabling autocast.", stacklevel=1)

    monkeypatch.setattr("torch.autocast", no_autocast)
    with pytest.raises(InputError, match=f"--amp-dtype {dtype} cannot be used on cpu .In MPS autocast.*float32"):
        autocast_of(dtype, CPU)


def test_gradients_that_torch_cannot_scale_are_one_line(monkeypatch):
    def fail(self: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    check_scaler(CPU)
    monkeypatch.setattr("torch.amp.GradScaler.unscale_", fail)
    with pytest.raises(InputError, match=r"--amp-dtype float16 cannot be used: .*float64.*expected --amp-dtype b"):
        check_scaler(CPU)
