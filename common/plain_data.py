"""Plain data that people keep beside their weights in a pickle: numbers of NumPy, paths, dates, defaultdicts.

`torch.load(weights_only=True)` refuses every name that is neither torch's nor in this table. The functions of the table
run no code from the file and import nothing: they rebuild what a name stands for from numbers and text.
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
    """In the place of ``numpy.dtype``: a type of numbers or text, with its byte order."""

    def __init__(self, code: str, *_: object):
        if not isinstance(code, str) or not re.fullmatch(r"[biufcSU]\d{1,9}", code):
            # such as O, for Python objects, which are pickles again
            raise refused(f"numpy.dtype[{code[:20] if isinstance(code, str) else type(code).__name__}]")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _, order, *_ = state
        if order not in ("<", ">", "|", "="):
            raise refused("numpy.dtype")
        self.dtype = self.dtype.newbyteorder(order)


def elements_of(content: bytes, dtype: NumpyDtype, count: int) -> np.ndarray:
    """``count`` elements, all of which have to be in ``content``."""
    if not isinstance(content, bytes):
        raise refused("numpy.ndarray")
    return np.frombuffer(content, _plain(dtype), count)


def _plain(dtype: NumpyDtype) -> np.dtype:
    """NumPy's type. A pickle can turn a Namespace with attributes of its choice into a `NumpyDtype`."""
    if type(dtype) is not NumpyDtype or not isinstance(dtype.dtype, np.dtype) or dtype.dtype.kind not in "biufcSU":
        raise refused("numpy.dtype")
    return dtype.dtype


class NumpyArray:
    """In the place of ``numpy.ndarray``, which it holds."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, content = state
        if type(shape) is not tuple or len(shape) > AXES_LIMIT or not isinstance(content, bytes):
            raise refused("numpy.ndarray")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise refused("numpy.ndarray")
        if 0 not in shape and any(size > len(content) for size in shape):  # their product can be a huge number
            raise refused("numpy.ndarray")
        self.array = elements_of(content, dtype, math.prod(shape)).reshape(shape, order="F" if by_columns else "C")


class TorchVersion:
    """In the place of ``torch.torch_version.TorchVersion``: the version as text."""

    def __new__(cls, text: str):
        if not isinstance(text, str):
            raise refused("torch.torch_version.TorchVersion")  # the text of nested lists could be of any length
        return text


def numpy_scalar(dtype: NumpyDtype, content: bytes) -> bool | int | float | complex | str | bytes:
    """In the place of ``numpy.…multiarray.scalar``: Python's own number or text of the same value."""
    if content == b"" and _plain(dtype).kind in "SU":  # an empty text
        return dtype.dtype.type().item()
    value = elements_of(content, dtype, 1).item()
    return float(value) if isinstance(value, np.floating) else value  # Python has nothing longer for a longdouble


def numpy_array(*_: object) -> NumpyArray:
    """In the place of ``numpy.…multiarray._reconstruct``, which the array's content follows."""
    return NumpyArray()


def path_text(*parts: str) -> str:
    """In the place of pathlib's classes: the path as text."""
    # a path of paths of …, each twice as long, fits in few bytes of a pickle
    if not all(type(part) is str for part in parts) or sum(map(len, parts)) > PATH_LIMIT:
        raise refused("pathlib.Path")
    return str(PurePosixPath(*parts))


def no_bytes() -> bytes:
    """In the place of ``bytes``, which pickles of torch's protocol call for empty ones; with a size it takes memory."""
    return b""


def empty_dict(*_: object) -> dict:
    """In the place of ``collections.defaultdict``, whose items follow."""
    return {}


def factory(*_: object) -> None:
    """In the place of what a defaultdict makes of a missing key; here no key is missing."""


def refused(name: str) -> pickle.UnpicklingError:
    """As torch words that a name is not allowed."""
    return pickle.UnpicklingError(f"GLOBAL {name} was not an allowed global")


def _table() -> list[Callable | tuple[Callable, str]]:
    table: list[Callable | tuple[Callable, str]] = [argparse.Namespace, (argparse.Namespace, "types.SimpleNamespace")]
    for core in ("numpy.core", "numpy._core"):  # until NumPy 1, and since NumPy 2
        table += [(numpy_scalar, f"{core}.multiarray.scalar"), (numpy_array, f"{core}.multiarray._reconstruct")]
    table += [(NumpyDtype, "numpy.dtype"), (NumpyArray, "numpy.ndarray"), (no_bytes, "builtins.bytes")]
    for module in ("pathlib", "pathlib._local"):  # Python 3.13 has the second
        for system in ("Posix", "Windows"):
            table += [(path_text, f"{module}.{system}Path"), (path_text, f"{module}.Pure{system}Path")]
    table += [datetime.datetime, datetime.date, datetime.time, datetime.timedelta]
    table += [datetime.timezone, frozenset]
    table += [(TorchVersion, "torch.torch_version.TorchVersion"), (empty_dict, "collections.defaultdict")]
    return table + [(factory, f"builtins.{name}") for name in ("int", "float", "list", "dict", "str")]


PLAIN_DATA = _table()


@contextmanager
def plain_data_alone(size: int) -> Iterator[None]:
    """While it lasts, ``torch.load(weights_only=True)`` also reads `PLAIN_DATA`, and encodes text as latin1 alone.

    NumPy's pickles need that codec. With hex, which torch allows, a pickle can double bytes again and again.

    Args:
        size: of the file in bytes, which the encoded text cannot exceed.
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
        if own is None:  # this torch refuses it anyway
            yield
            return
        allowed["_codecs.encode"] = encode
        try:
            yield
        finally:
            allowed["_codecs.encode"] = own
