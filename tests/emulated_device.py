"""An accelerator that is emulated on the CPU: torch's PrivateUse1 renamed, with tensors that hold their numbers there.

A tensor of the CPU is refused beside one of the device, as on a GPU, and every place is noted where the process would
wait for a GPU. The numbers are those of the CPU, so a run on it has the results of a run on the CPU. The rename cannot
be taken back: use it in a process of its own.

    emulated_device.activate()          before anything else
"""

import traceback
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

REPOSITORY = Path(__file__).resolve().parents[1]
NAME = "chip"
OWN_NAME = Path(__file__).name
POSSIBLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # older torch needs C++ for it
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default)


class Module:
    """What ``torch.chip`` is."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: torch.device) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: torch.device) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: torch.device) -> None:
        torch.set_rng_state(state)


class Generator(torch.Generator):
    """Random numbers of the device are those of the CPU: a new generator cannot be made without C++."""

    def __new__(cls, device: torch.device | str = "cpu") -> "Generator":
        return super().__new__(cls, "cpu" if torch.device(device).type == NAME else device)


def register() -> None:
    """Let this process have the accelerator."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    torch.Generator = Generator
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(numbers, device=…) copies from the CPU


class EmulatedTensor(Tensor):
    """A tensor of the emulated device.

    Attributes:
        inner: its numbers, on the CPU.
    """

    @staticmethod
    def __new__(cls, inner: Tensor) -> "EmulatedTensor":
        layout = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        return Tensor._make_wrapper_subclass(cls, inner.size(), **layout, device=f"{NAME}:0")

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __reduce_ex__(self, protocol: int) -> object:  # in a file its numbers are
        return self.inner.__reduce_ex__(protocol)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> list:
        return self.cpu().tolist()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: "EmulatedTensor") -> None:
        Tensor.data.__set__(self, value)
        self.inner = value.inner

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        return EmulatedDevice.current.run(func, args, kwargs or {})


class EmulatedDevice(TorchDispatchMode):
    """A context in which the device can be used.

    Attributes:
        waits: operators for which the process would wait for a GPU, each with the lines of this repository.
        has_float64: whether the device has it; else tensors of this type are refused there.
    """

    current: "EmulatedDevice | None" = None

    def __init__(self, has_float64: bool = True):
        super().__init__()
        self.waits: list[str] = []
        self.has_float64 = has_float64
        EmulatedDevice.current = self  # for threads of the backward pass

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        return self.run(func, args, kwargs or {})

    def run(self, func: object, args: tuple, kwargs: dict) -> object:
        """The result of an operator, computed on the CPU.

        Raises:
            RuntimeError: it has tensors of the device and of the CPU.
        """
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, EmulatedTensor)]
        device = kwargs.get("device")
        on_device = bool(ours) if device is None else torch.device(device).type == NAME
        if not ours and not on_device:
            return func(*args, **kwargs)
        if func is aten._fused_sdp_choice.default:
            return 0  # the one that is made of other operators
        self.check(func, tensors, ours, on_device, args, kwargs)
        if device is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        owners = {id(tensor.inner): tensor for tensor in ours}
        plain = tree_map(lambda x: x.inner if isinstance(x, EmulatedTensor) else x, (args, kwargs))
        result = func(*plain[0], **plain[1])
        if func is aten.copy_.default:
            return args[0]
        if not on_device:
            return result
        return tree_map(lambda x: self.wrap(func, x, owners) if isinstance(x, Tensor) else x, result)

    def wrap(self, func: object, result: Tensor, owners: dict[int, EmulatedTensor]) -> EmulatedTensor:
        """A result as a tensor of the device: the tensor itself, if the operator has changed it in place."""
        if (owner := owners.get(id(result))) is not None:
            assert owner.shape == result.shape, f"{func} changes a shape in place, which is not emulated"
            return owner
        if result.dtype == torch.float64 and not self.has_float64:
            raise TypeError(f"{func}: {NAME} has no float64")
        return EmulatedTensor(result)

    def check(
        self, func: object, tensors: list[Tensor], ours: list[Tensor], on_device: bool, args: tuple, kwargs: dict
    ) -> None:
        """Refuse tensors of the CPU, and note where the process would wait."""
        if func in MOVES:
            target = on_device if func is aten._to_copy.default else isinstance(args[0], EmulatedTensor)
            source = isinstance(args[-1 if func is aten.copy_.default else 0], EmulatedTensor)
            non_blocking = kwargs.get("non_blocking", False)
            if target != source and not (target and non_blocking):  # to the CPU even non-blocking copies are waited for
                self.note(func)
            return
        strangers = [x for x in tensors if not isinstance(x, EmulatedTensor) and x.ndim > 0]
        if strangers:
            found = ", ".join(str(tuple(x.shape)) for x in strangers)
            raise RuntimeError(f"{func}: expected all tensors on {NAME}:0, found those of shape {found} on the CPU")
        if func in READS or (func is aten.index.Tensor and any(x.dtype == torch.bool for x in ours[1:])):
            self.note(func)

    def note(self, func: object) -> None:
        frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_stack()]
        ours = [(path, line) for path, line in frames if path.is_relative_to(REPOSITORY) and path.name != OWN_NAME]
        where = [f"{path.relative_to(REPOSITORY)}:{line}" for path, line in ours if "site-packages" not in path.parts]
        self.waits.append(f"{func} in {' > '.join(where[-4:])}")


def activate() -> EmulatedDevice:
    """Give this process the accelerator, to its end."""
    register()
    device = EmulatedDevice()
    device.__enter__()
    return device
