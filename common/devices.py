"""What torch knows about devices: the one place that asks which there are, and what each of them can do.

No other module tells one kind of device from another. A device is asked through torch's own names: its module
(``torch.cuda``, ``torch.xpu``, ``torch.mps``), `torch.accelerator` and `torch.distributed`.
"""

import os
import platform
import re
import resource
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

from common.errors import InputError
from common.launchers import is_plain_task

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = "cpu"
KINDS = ("cuda", "xpu", "mps")  # that torch has by itself; ROCm is "cuda", too
EXPECTED = f"auto, {CPU}, cuda, cuda:N, xpu, xpu:N or mps"


# ---------------------------------------------------------------------------------------------------------------------
# Which device
# ---------------------------------------------------------------------------------------------------------------------


def accelerator() -> str:
    """The type of the accelerator that torch finds on this machine, "cpu" if there is none."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else CPU


def type_of(name: str) -> str:
    """The type of device that a value of --device means: ``cuda`` for ``cuda:1``, `accelerator` for ``auto``."""
    return accelerator() if name == "auto" else name.partition(":")[0]


def device_of(name: str, local_rank: int = 0, alone: bool = True) -> torch.device:
    """The device of this process, which becomes the current one.

    Args:
        name: ``auto``, ``cpu``, or a kind of accelerator: the one of the local rank, or with ``:N`` number N.
        local_rank: of this process on its host.
        alone: whether it is the only process of the run.

    Raises:
        InputError: torch knows no such device, it is not on this machine, or it cannot be used by several processes.
    """
    kind, number = type_of(name), re.fullmatch(r"\w+(?::(\d+))?", name)
    known = {CPU, *KINDS, accelerator()}
    if number is None or kind not in known or (kind == CPU and number[1]):
        more = "".join(f", {kind}" for kind in known - {CPU, *KINDS})
        raise InputError(f"--device {name}: found no such kind of device in torch; expected {EXPECTED}{more}")
    if kind == CPU:
        return torch.device(CPU)
    index, available = int(number[1] or local_rank), torch.get_device_module(kind).device_count()
    if number[1] is None and available == 1 and is_plain_task():
        index = 0  # srun --gpus-per-task shows each task its own device alone
    if index >= available:
        found, right = f"no {kind} device here", "--device cpu"
        if available:
            found = f"{available} {kind} device{'s' * (available > 1)} here, and no number {index}"
            right = f"one of 0 to {available - 1}" if number[1] else "one for each process of this host"
        raise InputError(f"--device {name}: found {found}; expected {right}")
    if not alone and backend_of(kind) is None:
        raise InputError(
            f"--device {name}: found several processes, which torch {torch.__version__} cannot connect on {kind}; "
            "expected one process, or --device cpu"
        )
    device = torch.device(kind, index)
    if hasattr(module_of(device), "set_device"):  # there is but one of MPS
        module_of(device).set_device(device)
    return device


def backend_of(kind: str) -> str | None:
    """torch's backend of collectives for a type of device: nccl, xccl, gloo; None if this torch has none."""
    backend = dist.Backend.default_device_backend_map.get(kind)
    return backend if backend is not None and dist.is_backend_available(backend) else None


def backends_of(name: str, shared: bool) -> str:
    """The backends of a process group for tensors of the CPU and of --device ``name``, as torch takes them.

    Args:
        shared: whether several processes may be on this host. Those that share a device by its number cannot use NCCL
            or XCCL, which refuse that: gloo copies through the CPU.
    """
    kind = type_of(name)
    backend = backend_of(kind) if kind == accelerator() else None  # without the device it cannot start
    if kind == CPU or backend is None:
        return "gloo"
    return f"cpu:gloo,{kind}:{'gloo' if shared and ':' in name else backend}"


def module_of(device: torch.device) -> ModuleType:
    """torch's module of a device: ``torch.cuda`` and the like."""
    return torch.get_device_module(device.type)


def device_name(device: torch.device) -> str:
    """The name of a device's hardware, where it is known; else the kind of device."""
    if device.type == CPU:
        info = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
        model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
        return model[1] if model else platform.machine()
    name_of = getattr(module_of(device), "get_device_name", None)
    return name_of(device) if name_of is not None else f"{device.type} of {platform.machine()}"


# ---------------------------------------------------------------------------------------------------------------------
# What it can do
# ---------------------------------------------------------------------------------------------------------------------


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device says that it has it, float16 where it says that it has not, else float32.

    The CPU and MPS say nothing.
    """
    asked = getattr(module_of(device), "is_bf16_supported", None)
    if device.type == CPU or asked is None:
        return torch.float32
    try:
        has_bfloat16 = asked(including_emulation=False)
    except TypeError:  # a module without this argument
        has_bfloat16 = asked()
    return torch.bfloat16 if has_bfloat16 else torch.float16


def has_float64(device: torch.device) -> bool:
    """Whether the device has numbers of 64 bits: MPS has none, and some of Intel's GPUs have none."""
    if device.type == "xpu":
        return getattr(torch.xpu.get_device_properties(device), "has_fp64", True)
    return device.type != "mps"


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no float64."""
    return torch.float64 if has_float64(device) else torch.float32


def exact_device(device: torch.device) -> torch.device:
    """Where sums in float64 are kept of what ``device`` computes: there, or on the CPU if it has no float64."""
    return device if has_float64(device) else torch.device(CPU)


def exact(tensor: Tensor) -> Tensor:
    """A tensor in float64 on its `exact_device`; to move it waits for the device."""
    return tensor.to(exact_device(tensor.device)).double()


@cache
def can_pin(device: torch.device) -> bool:
    """Whether memory can be pinned, from which the device copies while the process goes on."""
    if device.type in (CPU, "mps"):  # with MPS it is the same memory
        return False
    try:
        return torch.empty(1).pin_memory().is_pinned()
    except (RuntimeError, NotImplementedError):  # a device without it
        return False


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on ``device``, without waiting for it.

    MPS would read memory that has been freed since: there it waits.
    """
    return tensor.to(device, non_blocking=device.type != "mps")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to."""
    if device.type != CPU:
        torch.accelerator.synchronize(device)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Raise RuntimeError where the process waits for the device inside. Only CUDA can tell; others check nothing."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def timer_event(device: torch.device) -> torch.Event | None:
    """An event that has been recorded on the device and measures time; None if it has none, as the CPU.

    ``start.elapsed_time(end)`` is in milliseconds, once the device has been waited for.
    """
    kind = getattr(module_of(device), "Event", None)
    if device.type == CPU or kind is None:
        return None
    event = kind(enable_timing=True)
    event.record()
    return event


def forked_rng(device: torch.device) -> AbstractContextManager[None]:
    """A context that leaves the random state of torch, on the CPU and on the device, as it was."""
    if device.type == CPU:
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that tensors had on the device since `reset_peak_memory`; None where torch does not count them.

    On the CPU it is the peak of the whole process.
    """
    if device.type == CPU:
        status = Path("/proc/self/status")  # getrusage includes the parent before a fork
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
        return 1024 * int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counted = getattr(module_of(device), "max_memory_allocated", None)
    return None if counted is None else counted(device)


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from here. The peak of a process on the CPU stays."""
    reset = getattr(module_of(device), "reset_peak_memory_stats", None)
    if reset is not None:
        reset(device)


class _LivingTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that operations return, as long as they live; views have none of their own."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0

    def __torch_dispatch__(
        self, function: Callable, types: Sequence[type], args: Sequence = (), kwargs: Mapping | None = None
    ) -> object:
        result = function(*args, **(kwargs or {}))
        given = storages_of((args, kwargs))
        for storage in (storage for address, storage in storages_of(result).items() if address not in given):
            self._change(storage.nbytes())
            weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, change: int) -> None:
        self.bytes += change
        self.peak = max(self.peak, self.bytes)


def storages_of(tree: object) -> dict[int, torch.UntypedStorage]:
    """The storages of the tensors in nested containers, by their addresses."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}


def memory_of(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors of ``work`` have at a time, besides those that there were before.

    An accelerator's allocator counts them, with the buffers of its kernels. On the CPU, and where torch's module of the
    device does not count, it is the tensors that operations return.
    """
    module = module_of(device)
    if device.type == CPU or not hasattr(module, "max_memory_allocated"):
        with _LivingTensors() as tensors:
            work()
        return tensors.peak
    reset_peak_memory(device)
    before = module.memory_allocated(device)
    work()
    synchronize(device)
    return peak_memory(device) - before


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on the device; None if that is unknown."""
    if device.type == CPU:
        info = Path("/proc/meminfo")
        found = re.search(r"MemAvailable:\s*(\d+) kB", info.read_text()) if info.is_file() else None
        return 1024 * int(found[1]) if found else None
    module = module_of(device)
    if hasattr(module, "mem_get_info"):
        return module.mem_get_info(device)[0]
    if hasattr(module, "recommended_max_memory"):  # MPS
        return module.recommended_max_memory() - module.driver_allocated_memory()
    return None


def processors() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
