"""The weights in the content of a checkpoint, whatever program wrote it."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from common.errors import InputError, shown

import torch
from timm.models import clean_state_dict
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], source: str, found: Iterable[str] | None = None
) -> None:
    """``model.load_state_dict``, strictly.

    Args:
        found: the names in the file at ``source``, where they are not those of ``weights``.

    Raises:
        InputError: names or shapes differ; the message gives the first difference.
    """
    expected = model.state_dict()
    for name in [*expected, *weights]:
        ours = tuple(expected[name].shape) if name in expected else "nothing"
        theirs = tuple(weights[name].shape) if isinstance(weights.get(name), Tensor) else "nothing"
        if ours != theirs:
            names = sorted(weights if found is None else found, key=lambda name: name in expected)  # strange ones first
            raise InputError(
                f"{source} is of another architecture: {name} has {theirs}, this model {ours}; "
                f"found {found_in(dict.fromkeys(names))}"
            )
        if expected[name].is_floating_point() and not weights[name].is_floating_point():
            kind = str(weights[name].dtype).removeprefix("torch.")
            raise InputError(f"{source} holds {kind} in {name}, expected floating-point numbers: is it quantised?")
    model.load_state_dict(weights)


DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8} | {
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
}
# read by their values; files that need scales besides have tensors of other names, which do not fit a model
DTYPES |= {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}

# of several dictionaries of tensors in a file the first of these is taken
WEIGHT_KEYS = (
    "model",
    "state_dict",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "module",
    "params",
    "weights",
)
WEIGHT_KEYS += ("teacher", "student", "backbone", "encoder")
AVERAGED = re.compile(r"(?<![a-z])(ema|swa)(?![a-z])|momentum|averag", re.IGNORECASE)  # taken only if alone
# what has tensors, or dictionaries of them, and is no model
NO_WEIGHTS = re.compile(
    r"(?<![a-z])(optim|sched|scaler|loss|criterion|amp$|rng|callback|hyper_param|args|config)", re.I
)
NESTING = 5  # dictionaries in each other that are searched for weights
SHOWN = 6  # keys of a file that a message names
TIES_LIMIT = 100  # names of one tensor, such as of a layer that is repeated


def weights_of(content: Mapping, path: str | os.PathLike, key: str = "model") -> dict[str, Tensor]:
    """The state dict under ``key`` of what `read_checkpoint` read from ``path``, without the prefixes of wrappers.

    Floating-point tensors become float32, whatever precision the file has; others stay as they are.

    Raises:
        InputError: there is none, or it holds anything but whole tensors of finite numbers.
    """
    weights = _state_dict_in(content, key)
    if weights is None:
        raise InputError(
            f"{path} holds no weights under {key!r}: expected a checkpoint or a state dict, found {found_in(content)}"
        )
    return _checked(weights, path)


def find_weights(content: Mapping, path: str | os.PathLike) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in a file of any program, wherever in ``content`` they are; as `weights_of` gives them.

    Dictionaries with less than half of the tensors of the largest are left out. Of the rest averages come last, the
    names of `WEIGHT_KEYS` first, in their order, then the one with most tensors.

    Returns:
        The weights, and remarks to print: which of several were taken, a precision other than float32.

    Raises:
        InputError: as `weights_of`.
    """
    found = _all_state_dicts(content)
    if not found:
        raise InputError(f"{path} holds no weights: expected a checkpoint or a state dict, found {found_in(content)}")

    def rank(place: tuple[str, ...]) -> tuple:
        averaged = any(AVERAGED.search(key) for key in place)
        known = [WEIGHT_KEYS.index(key) if key in WEIGHT_KEYS else len(WEIGHT_KEYS) for key in place]
        return averaged, known, -_count(found[place])

    largest = max(map(_count, found.values()))
    places = sorted((place for place in found if 2 * _count(found[place]) >= largest), key=rank)
    weights, remarks = found[places[0]], []
    others = places[1:]
    if places[0] == ("model",):  # its average, model_ema, is taken by an option
        others = [place for place in others if place != ("model_ema",)]
    if others:
        below = int([*content] == ["model"])  # a key that `read_checkpoint` may have added
        keys = [".".join(place[below:] or place) for place in (places[0], *others)]
        remarks += [f"the weights under {keys[0]!r} are taken, not those under {', '.join(keys[1:SHOWN])}"]
    rest = [shown(name) for name, value in weights.items() if not isinstance(value, Tensor)]
    if rest:
        remarks += [f"what is no tensor is left out: {', '.join(rest[:SHOWN])}"]
    weights = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    checked = _checked(weights, path)
    cast = {str(t.dtype)[6:] for t in weights.values() if t.is_floating_point()} - {"float32"}
    if cast:
        remarks += [f"its {', '.join(sorted(cast))} tensors are read as float32"]
    return checked, remarks


def _state_dict_in(content: Mapping, key: str) -> Mapping | None:
    weights = content.get(key)
    weights = weights.get("state_dict", weights) if isinstance(weights, Mapping) else None
    return weights if isinstance(weights, Mapping) and _count(weights) else None


def _all_state_dicts(content: Mapping) -> dict[tuple[str, ...], Mapping]:
    """Every dictionary of tensors in ``content`` that can be a model: the keys that lead to it → itself."""
    found, seen = {}, set()  # an object with several places is visited once

    def search(part: object, place: tuple[str, ...]) -> None:
        if not isinstance(part, (Mapping, list, tuple)) or len(place) > NESTING or id(part) in seen:
            return
        seen.add(id(part))
        parts = part if isinstance(part, Mapping) else {str(number): value for number, value in enumerate(part)}
        if isinstance(part, Mapping) and place and _count(part):
            found[place] = part
        for key, value in parts.items():
            if isinstance(key, str) and not re.search(NO_WEIGHTS, key.lower()):
                search(value, (*place, key))

    search(content, ())
    return found


def _count(weights: Mapping) -> int:
    return sum(isinstance(tensor, Tensor) for tensor in weights.values())


def found_in(content: Mapping) -> str:
    """The first keys of a file's content, for a message; those below a single ``model`` where there are any."""
    model = content.get("model")
    keys = [*model] if isinstance(model, Mapping) and len(content) == 1 else [*content]
    if not keys:
        return "no keys"
    return f"the keys {', '.join(map(shown, keys[:SHOWN]))}" + ", …" * (len(keys) > SHOWN)


def _checked(weights: Mapping, path: str | os.PathLike) -> dict[str, Tensor]:
    """A state dict in float32, checked before memory is allocated; `weights_of` lists what is refused."""
    if not all(isinstance(name, str) for name in weights):
        raise InputError(f"{path} is damaged: a name of its weights is no text")
    for name, tensor in weights.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.dtype not in DTYPES:
            raise InputError(f"{path} is refused: {name} is no ordinary tensor")
    weights = in_float32(weights, path)
    for name, tensor in {id(tensor): (name, tensor) for name, tensor in weights.items()}.values():
        if tensor.is_floating_point() and not all_finite([tensor]):
            raise InputError(f"{path} cannot be used: {name} holds values that are not finite")
    return clean_state_dict(weights)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element of floating-point tensors is inf or nan. Waits for their device once.

    Both stay in a norm, which writes nothing, unlike ``isfinite``. Large numbers can make a norm infinite, too.
    """
    return bool(get_total_norm(tensors).isfinite()) or all(bool(tensor.isfinite().all()) for tensor in tensors)


def in_float32(tensors: Mapping, path: str | os.PathLike) -> dict:
    """Tensors and other values by name, the floating-point tensors among them in float32; tied ones stay tied.

    Raises:
        InputError: the tensors are larger than the file at ``path``, or one has more than `TIES_LIMIT` names.
    """
    views = {name: _view_of(value) for name, value in tensors.items() if isinstance(value, Tensor)}
    distinct = {view: tensors[name] for name, view in views.items()}
    # views of one storage can declare any number of elements, which a conversion would write out
    declared = sum(t.numel() * t.element_size() for t in distinct.values())
    if declared > os.path.getsize(path):
        raise InputError(f"{path} is refused: it has {os.path.getsize(path):,} bytes and declares {declared:,}")
    if max(Counter(views.values()).values(), default=0) > TIES_LIMIT:
        raise InputError(f"{path} is refused: a tensor has more than {TIES_LIMIT} names in it")
    cast = {view: t.detach().float() if t.is_floating_point() else t for view, t in distinct.items()}
    return {name: cast[views[name]] if name in views else value for name, value in tensors.items()}


def _view_of(tensor: Tensor) -> tuple:
    """Equal for two tensors if they are the same elements of the same storage."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.numel():
        return (id(tensor),)
    place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *place, tensor.dtype, tensor.shape, tensor.stride()


def optimizer_state_of(content: Mapping, path: str | os.PathLike) -> Mapping:
    """The state of the optimiser in a checkpoint, number of the parameter → name → tensor or number.

    Where the weights are in another precision than float32, the whole file was cast, and the state is converted to
    float32. Else the precision of the state is the optimiser's choice, and is kept.

    Raises:
        InputError: the tensors are larger than the file at ``path``.
        KeyError, TypeError, AttributeError: there is none.
    """
    state = content["optimizer"]["state"]
    weights = (_state_dict_in(content, "model") or {}).values()
    if all(t.dtype == torch.float32 for t in weights if isinstance(t, Tensor) and t.is_floating_point()):
        return state
    flat = in_float32({(n, name): value for n, values in state.items() for name, value in values.items()}, path)
    return {n: {name: flat[n, name] for name in values} for n, values in state.items()}
