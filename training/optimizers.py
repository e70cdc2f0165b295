"""timm's optimisers: created from the options, tried before training starts, and resumed exactly.

An optimiser's state may be tensors of any shape, numbers, lists, counters in its parameter groups, or a random
generator. There is no list of optimisers or of their entries here: a second optimiser with the same options is stepped
on throw-away parameters, and its state shows what belongs to it.
"""

import copy
import difflib
import io
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import utils
from common.devices import forked_rng
from common.errors import InputError, one_line, shown
from samplers import derived_seed
from training.config import OptimConfig

import numpy as np
import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.optim.kron import Kron
from timm.utils import random_seed
from torch import Tensor, nn
from torch.backends import opt_einsum
from torch.optim import Optimizer

HALF = 8  # steps before and after the trial resumes: Lookahead averages after every 6th, RAdam changes its rule at 6
# of the parameters that an optimiser is tried on: vectors, matrices that are factored or not, kernels of a convolution
SHAPES = ((1,), (24,), (24, 20), (3, 24), (1, 5, 24), (18, 3, 4, 4))
LARGEST = 2**53  # of a number in a state: up to here float64 has all whole numbers

Kind = tuple[int, torch.Size, torch.dtype]  # a group, a shape, a type: parameters that share them have like states

# ---------------------------------------------------------------------------------------------------------------------
# From options
# ---------------------------------------------------------------------------------------------------------------------


def scaled_lr(optim: OptimConfig, batch_size: int) -> float:
    """The learning rate: ``--lr`` is for 512 images per optimiser step."""
    return optim.lr if optim.unscale_lr else optim.lr * images_per_step(optim, batch_size) / 512


def images_per_step(optim: OptimConfig, batch_size: int) -> int:
    """Images of all processes that make one optimiser step.

    Args:
        batch_size: of one process.
    """
    return batch_size * utils.world_size() * optim.accum_iter


def create_optimizer(optim: OptimConfig, lr: float, parameters: nn.Module | list[dict]) -> Optimizer:
    """The optimiser of ``--opt``, for a model or for groups of parameters.

    Args:
        lr: of an optimiser step, `scaled_lr`.

    Raises:
        InputError: timm has no such optimiser, or it does not take these options, or a package is missing.
    """
    prefix, _, name = optim.opt.lower().rpartition("_")
    if name not in list_optimizers() or prefix not in ("", "lookahead"):
        raise InputError(f"--opt {optim.opt} is unknown: did you mean {nearest(optim.opt)}?")
    options = dict(lr=lr, weight_decay=optim.weight_decay, momentum=optim.momentum, eps=optim.opt_eps)
    if optim.opt_betas is not None:
        options["betas"] = list(optim.opt_betas)
    if optim.opt in ("adam", "adamw"):
        options["fused"] = True  # one pass over the weights instead of a dozen
    try:
        return create_optimizer_v2(parameters, opt=optim.opt, **options)
    except (ValueError, TypeError, LookupError, AssertionError, ImportError, RuntimeError) as error:
        raise unusable(optim, error) from error


def nearest(opt: str) -> str:
    """Another optimiser, of the most similar name, that needs neither another package nor second derivatives."""
    name = opt.lower().removeprefix("lookahead_")
    known = [n for n in list_optimizers(exclude_filters=["fused*", "bnb*", "*hessian", "kron*"]) if n != name]
    name = name.rpartition("_")[2].removeprefix("fused").removeprefix("bnb").removesuffix("8bit")
    return (difflib.get_close_matches(name, known, n=1) or ["adamw"])[0]


def unusable(optim: OptimConfig, error: Exception) -> InputError:
    """The error for an optimiser that fails with these options."""
    reason, takes = one_line(error) or type(error).__name__, get_optimizer_info(optim.opt.rpartition("_")[2]).num_betas
    if isinstance(error, (AssertionError, ImportError, TypeError)):  # CUDA, a package or an argument is missing
        reason += f"; --opt {nearest(optim.opt)} can"
    elif optim.opt_betas and len(optim.opt_betas) != takes:
        reason = f"it takes {takes} betas"
    betas = f" with --opt-betas {' '.join(map(str, optim.opt_betas))}" if optim.opt_betas else ""
    return InputError(f"--opt {optim.opt}{betas} cannot be used: {reason}")


# ---------------------------------------------------------------------------------------------------------------------
# A sample, and its state
# ---------------------------------------------------------------------------------------------------------------------


class Sample:
    """An optimiser of the same options as that of a run, with one parameter of each kind.

    Attributes:
        order: the kinds of its parameters, as the state dict numbers them.
        always: the state of each kind after one step.
    """

    def __init__(
        self, optim: OptimConfig, lr: float, groups: Sequence[float], kinds: Sequence[Kind], device: torch.device
    ):
        """
        Args:
            lr: of a step.
            groups: the weight decay of each, the only thing in which the groups of a run differ.
            kinds: of the parameters, whose values are random.
        """
        self.order = sorted(dict.fromkeys(kinds), key=lambda kind: kind[0])
        self.parameters: list[nn.Parameter] = []
        members = [{"params": [], "weight_decay": decay} for decay in groups]
        for number, (group, shape, dtype) in enumerate(self.order):
            self.parameters.append(nn.Parameter(random_like(torch.empty(shape, dtype=dtype, device=device), number)))
            members[group]["params"].append(self.parameters[-1])
        self.optimizer = create_optimizer(optim, lr, members)
        self.steps, self.always = 0, {}
        self.options = copy.deepcopy(self._values_of_groups())

    def step(self, count: int) -> None:
        """Step ``count`` times; gradients and random numbers are functions of the number of the step."""
        for _ in range(count):
            self.steps += 1
            for number, parameter in enumerate(self.parameters):
                parameter.grad = random_like(parameter, derived_seed(self.steps, number))
            random_seed(self.steps)
            self.optimizer.step()
            self.always = self.always or {kind: dict(values) for kind, values in self.state().items()}

    def resume(self, other: "Sample") -> None:
        """Load the state of ``other`` from a checkpoint of it."""
        file = io.BytesIO()
        torch.save({"weights": other.parameters, "optimizer": other.optimizer.state_dict()}, file)
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for parameter, weights in zip(self.parameters, content["weights"], strict=True):
                parameter.copy_(weights)
        load_state(self.optimizer, content["optimizer"], [str(tuple(shape)) for _, shape, _ in self.order], other)
        self.steps = other.steps

    def state(self) -> dict[Kind, dict]:
        """The state of each kind now: that of the first step, and perhaps more."""
        state = self.optimizer.state_dict()["state"]
        return {kind: state.get(number, {}) for number, kind in enumerate(self.order)}

    def counters(self) -> list[dict]:
        """For each group the values that the steps have changed; the others are options."""
        return [
            {name: value for name, value in now.items() if name not in before or not same(value, before[name])}
            for before, now in zip(self.options, self._values_of_groups(), strict=True)
        ]

    def _values_of_groups(self) -> list[dict]:
        return [{n: v for n, v in group.items() if n != "params"} for group in self.optimizer.param_groups]


def random_like(tensor: Tensor, seed: int) -> Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor)


def kinds_of(optimizer: Optimizer) -> list[Kind]:
    """The kinds of all parameters, as the state dict numbers them."""
    return [(number, p.shape, p.dtype) for number, group in enumerate(optimizer.param_groups) for p in group["params"]]


def sample_of(optim: OptimConfig, lr: float, optimizer: Optimizer) -> Sample:
    """A sample that shows the state of the parameters of ``optimizer``."""
    groups = optimizer.param_groups
    device = groups[0]["params"][0].device
    with trying(device):
        sample = Sample(optim, lr, [group["weight_decay"] for group in groups], kinds_of(optimizer), device)
        sample.step(HALF)
    return sample


@contextmanager
def trying(device: torch.device) -> Iterator[None]:
    """Disable compilation and warnings inside, and restore the random state afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with forked_rng(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the run's own optimiser are shown
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def same(a: object, b: object) -> bool:
    """Whether two values of a state are equal in type and to the last bit; NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
            return False
        return bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------


def load_state(optimizer: Optimizer, saved: Mapping, names: Sequence[str], sample: Sample) -> None:
    """Resume the optimiser from the state dict ``saved``; learning rate, decay and the like stay those of the options.

    Args:
        names: of the parameters, in the order of their numbers, for messages.
        sample: of this optimiser, which has stepped: it shows what ``saved`` has to hold.

    Raises:
        InputError: the state is not that of this optimiser and these parameters.
    """
    own, last = optimizer.state_dict(), sample.state()
    state, kinds = {}, dict(enumerate(kinds_of(optimizer)))
    for number, values in saved["state"].items():
        if number not in kinds:
            raise InputError(f"its optimizer has a parameter {shown(number)!r}, this model {len(kinds)} parameters")
        kind, name = kinds[number], names[number]
        if missing := sample.always[kind].keys() - values.keys():
            raise InputError(f"its optimizer has no {min(missing)} of {name}")
        if foreign := values.keys() - last[kind].keys():
            raise InputError(f"its optimizer has {shown(min(foreign))} of {name}, which this one does not have")
        state[number] = {key: fitted(value, last[kind][key], f"{key} of {name}") for key, value in values.items()}
    groups = []
    for group, theirs, counters in zip(own["param_groups"], saved["param_groups"], sample.counters(), strict=True):
        if missing := [name for name in counters if state and name not in theirs]:
            raise InputError(f"its optimizer has no {missing[0]}")
        options = {name: value for name, value in group.items() if name not in counters}
        counted = {name: fitted(theirs[name], counters[name], name) for name in counters if name in theirs}
        groups.append({**options, **counted})
    more = {name: saved[name] for name in own.keys() & saved.keys() if name not in ("state", "param_groups")}
    optimizer.load_state_dict({**more, "state": state, "param_groups": groups})
    for number, values in optimizer.state_dict()["state"].items():  # which torch has cast as it casts parameters
        values.update({key: placed(value, last[kinds[number]][key]) for key, value in state[number].items()})


def fitted(value: object, example: object, what: str) -> object:
    """A value of a saved state in the form of ``example``: a scalar may have been saved as tensor or number.

    Raises:
        InputError: it is of another form, or not finite.
    """
    if isinstance(example, (list, tuple)) and isinstance(value, (list, tuple)) and len(value) == len(example):
        return type(example)(fitted(v, e, what) for v, e in zip(value, example, strict=True))
    if is_scalar(example) and is_scalar(value):
        number = value.item() if isinstance(value, Tensor) else value
        counts = isinstance(example, int) or what.startswith("step")
        if abs(number) < LARGEST and not (counts and (number < 0 or number != int(number))):  # NaN is not less
            return example.new_tensor(number) if isinstance(example, Tensor) else type(example)(number)
    elif isinstance(example, Tensor) and isinstance(value, Tensor) and value.shape == example.shape:
        floating = value.is_floating_point() and example.is_floating_point()
        if value.layout == torch.strided and (floating or value.dtype == example.dtype) and value.isfinite().all():
            return value
    elif type(value) is type(example) and isinstance(value, (bool, str, type(None))) and value == example:
        return value
    raise InputError(f"its optimizer's {what} is not that of this model")


def is_scalar(value: object) -> bool:
    """Whether a value is one real number."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.dtype != torch.bool and not value.is_complex()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def placed(value: object, example: object) -> object:
    """A value with the type and on the device of ``example``."""
    if isinstance(value, (list, tuple)):
        return type(value)(placed(v, e) for v, e in zip(value, example, strict=True))
    return value.to(example.device, example.dtype) if isinstance(value, Tensor) else value


def tensors_in(value: object) -> list[Tensor]:
    """All tensors of a state, at whatever depth."""
    if isinstance(value, (Mapping, list, tuple)):
        parts = value.values() if isinstance(value, Mapping) else value
        return [tensor for part in parts for tensor in tensors_in(part)]
    return [value] if isinstance(value, Tensor) else []


# ---------------------------------------------------------------------------------------------------------------------
# Check before training
# ---------------------------------------------------------------------------------------------------------------------


def check_optimizer(optim: OptimConfig, device: torch.device) -> Optimizer:
    """Check on a few small parameters that ``--opt`` can train, and resumes exactly.

    Returns:
        The optimiser of the check.

    Raises:
        InputError: it cannot.
    """
    kinds = [(group, torch.Size(shape), torch.float32) for group in (0, 1) for shape in SHAPES]
    lr = 0.01  # a tiny one changes no weight
    with trying(device):
        whole, resumed = (Sample(optim, lr, [0.0, optim.weight_decay], kinds, device) for _ in range(2))
        if getattr(whole.optimizer, "is_second_order", False):
            raise InputError(
                f"--opt {optim.opt} cannot be used: it needs second derivatives, which are not computed here; "
                f"--opt {nearest(optim.opt)} can"
            )
        if isinstance(without_wrapper(whole.optimizer), Kron) and not opt_einsum.is_available():
            raise InputError(
                f"--opt {optim.opt} cannot be used: it needs opt_einsum, a package, to step within minutes; "
                f"--opt {nearest(optim.opt)} can"
            )
        try:
            whole.step(HALF)
        except Exception as error:  # whatever an optimiser finds wrong with its options
            raise unusable(optim, error) from error
        try:
            resumed.resume(whole)
            for sample in (whole, resumed):
                sample.step(HALF)
        except Exception as error:
            raise not_resumable(optim, one_line(error)) from error
    ends = [[*sample.parameters, sample.optimizer.state_dict()] for sample in (whole, resumed)]
    if not same(*ends):
        raise not_resumable(optim, "it keeps something that its checkpoints do not hold")
    return whole.optimizer


def not_resumable(optim: OptimConfig, why: str) -> InputError:
    return InputError(
        f"--opt {optim.opt} cannot be used: a run could not be resumed exactly, as {why}; "
        f"--opt {nearest(optim.opt)} can"
    )


def compiles(optimizer: Optimizer) -> bool:
    """Whether an optimiser calls torch.compile by itself."""
    return any(hasattr(part, "_torchdynamo_orig_callable") for part in vars(without_wrapper(optimizer)).values())


def without_wrapper(optimizer: Optimizer) -> Optimizer:
    """The optimiser that Lookahead wraps, or the optimiser itself."""
    return getattr(optimizer, "_base_optimizer", optimizer)
