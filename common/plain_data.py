"""Plain data that pickles often contain beside weights: NumPy numbers and arrays, paths, dates, defaultdicts.

`torch.load(weights_only=True)` refuses every global that is neither torch's nor in this table. The functions of the
table stand in for the globals: they rebuild the values from numbers and text, execute no code from the file and import
nothing.
"""

import argparse
import datetime
import math
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

import numpy as np
import torch

PATH_LIMIT = 4096  # characters of a path, as in Linux
AXES_LIMIT = 64  # of an array, as in NumPy


class NumpyDtype:
    """Stands in for ``numpy.dtype``: a type of numbers or text, with its byte order."""

    def __init__(self, code: str, *_: object):
        if not isinstance(code, str) or not re.fullmatch(r"[biufcSU]\d{1,9}", code):
            # such as O, for Python objects, which are pickles themselves
            raise refused(f"numpy.dtype[{code[:20] if isinstance(code, str) else type(code).__name__}]")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _, order, *_ = state
        if order not in ("<", ">", "|", "="):
            raise refused("numpy.dtype")
        self.dtype = self.dtype.newbyteorder(order)


def elements_of(content: bytes, dtype: NumpyDtype, count: int) -> np.ndarray:
    """``count`` elements; raises if ``content`` holds fewer."""
    if not isinstance(content, bytes):
        raise refused("numpy.ndarray")
    return np.frombuffer(content, _plain(dtype), count)


def _plain(dtype: NumpyDtype) -> np.dtype:
    """The NumPy type, validated: a pickle can forge a `NumpyDtype` from a Namespace with arbitrary attributes."""
    if type(dtype) is not NumpyDtype or not isinstance(dtype.dtype, np.dtype) or dtype.dtype.kind not in "biufcSU":
        raise refused("numpy.dtype")
    return dtype.dtype


class NumpyArray:
    """Stands in for ``numpy.ndarray``; ``array`` is the real one."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, content = state
        if type(shape) is not tuple or len(shape) > AXES_LIMIT or not isinstance(content, bytes):
            raise refused("numpy.ndarray")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise refused("numpy.ndarray")
        if 0 not in shape and any(size > len(content) for size in shape):  # the product can be huge
            raise refused("numpy.ndarray")
        self.array = elements_of(content, dtype, math.prod(shape)).reshape(shape, order="F" if by_columns else "C")


class TorchVersion:
    """Stands in for ``torch.torch_version.TorchVersion``: the version as text."""

    def __new__(cls, text: str):
        if not isinstance(text, str):
            raise refused("torch.torch_version.TorchVersion")  # nested lists could expand to a text of any length
        return text


def numpy_scalar(dtype: NumpyDtype, content: bytes) -> bool | int | float | complex | str | bytes:
    """Stands in for ``numpy.…multiarray.scalar``: the Python number or text of the same value."""
    if content == b"" and _plain(dtype).kind in "SU":  # an empty text
        return dtype.dtype.type().item()
    value = elements_of(content, dtype, 1).item()
    return float(value) if isinstance(value, np.floating) else value  # a longdouble


def numpy_array(*_: object) -> NumpyArray:
    """Stands in for ``numpy.…multiarray._reconstruct``; the pickle then sets the state."""
    return NumpyArray()


def path_text(*parts: str) -> str:
    """Stands in for pathlib's classes: the path as text."""
    # nested paths, each twice as long as the one inside, take few bytes of a pickle
    if not all(type(part) is str for part in parts) or sum(map(len, parts)) > PATH_LIMIT:
        raise refused("pathlib.Path")
    return str(PurePosixPath(*parts))


def empty_bytes() -> bytes:
    """Stands in for ``bytes``, which pickles call only for empty ones; takes no size, which could fill the memory."""
    return b""


def empty_dict(*_: object) -> dict:
    """Stands in for ``collections.defaultdict``; the pickle then sets the items."""
    return {}


def ignored_factory(*_: object) -> None:
    """Stands in for the default factory of a defaultdict, which is not needed."""


def refused(name: str) -> pickle.UnpicklingError:
    """The error that torch raises for a global that is not allowed."""
    return pickle.UnpicklingError(f"GLOBAL {name} was not an allowed global")


def _table() -> list[Callable | tuple[Callable, str]]:
    table: list[Callable | tuple[Callable, str]] = [argparse.Namespace, (argparse.Namespace, "types.SimpleNamespace")]
    for core in ("numpy.core", "numpy._core"):  # until NumPy 1, and since NumPy 2
        table += [(numpy_scalar, f"{core}.multiarray.scalar"), (numpy_array, f"{core}.multiarray._reconstruct")]
    table += [(NumpyDtype, "numpy.dtype"), (NumpyArray, "numpy.ndarray"), (empty_bytes, "builtins.bytes")]
    for module in ("pathlib", "pathlib._local"):  # Python 3.13 has the second
        for system in ("Posix", "Windows"):
            table += [(path_text, f"{module}.{system}Path"), (path_text, f"{module}.Pure{system}Path")]
    table += [datetime.datetime, datetime.date, datetime.time, datetime.timedelta]
    table += [datetime.timezone, frozenset]
    table += [(TorchVersion, "torch.torch_version.TorchVersion"), (empty_dict, "collections.defaultdict")]
    return table + [(ignored_factory, f"builtins.{name}") for name in ("int", "float", "list", "dict", "str")]


PLAIN_DATA = _table()


@contextmanager
def allow_plain_data(size: int) -> Iterator[None]:
    """Within this context ``torch.load(weights_only=True)`` accepts `PLAIN_DATA`, and no text codec but latin1.

    NumPy's pickles need latin1. With hex, which torch allows, a pickle can double bytes repeatedly.

    Args:
        size: of the file in bytes, an upper limit for the encoded text.
    """
    left = size

    def encode(text: str, codec: str) -> bytes:
        nonlocal left
        if type(text) is not str or codec != "latin1" or len(text) > left:
            raise refused("_codecs.encode")
        left -= len(text)
        return text.encode(codec)

    allowed = torch._weights_only_unpickler._get_allowed_globals()  # a cached dictionary
    own = allowed.get("_codecs.encode")
    with torch.serialization.safe_globals(PLAIN_DATA):
        if own is None:  # this version of torch refuses it anyway
            yield
            return
        allowed["_codecs.encode"] = encode
        try:
            yield
        finally:
            allowed["_codecs.encode"] = own
