"""The names of the classes that weights were trained on, where their file has them."""

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.files import _in_utf8, read_checkpoint, read_json

from safetensors import SafetensorError, safe_open


def class_names(path: str | os.PathLike, content: Mapping | None = None) -> list[str] | None:
    """The names of the classes in the order of the logits, or None where the file does not have them.

    Checkpoints of this program and learngene files hold them; a model folder has them in ``config.json``. Errors in
    the file are left to its reader.

    Args:
        content: what `read_checkpoint` read from ``path``; saves reading a large file twice.
    """
    try:
        with open(path, "rb") as file:
            safe = file.read(9)[8:] == b"{"
        if safe:
            return _checked(_beside(Path(path)))
        if content is None:
            if not _mentions_classes(path):
                return None
            content = read_checkpoint(path, mapped=True)  # its reader reads the tensors
        return _checked(content.get("classes"))
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError):
        return None


def _beside(path: Path) -> object:
    """The names in the header of a safetensors file, or in the ``config.json`` of its folder."""
    with open(path, "rb") as named, safe_open(_in_utf8(path, named), framework="pt") as file:
        metadata = file.metadata() or {}
    if "learngene" in metadata:
        return json.loads(metadata.get("classes", "null"))
    config = read_json(path.with_name("config.json"))
    return config.get("label_names") if isinstance(config, Mapping) else None


def _mentions_classes(path: str | os.PathLike) -> bool:
    """Whether a checkpoint can hold names of classes. Most files of other programs do not, and need not be read."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"classes") >= 0  # torch compresses nothing, in any of its formats


def _checked(names: object) -> list[str] | None:
    plain = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return list(names) if plain else None


def first_difference(theirs: Sequence[str] | None, ours: Sequence[str] | None) -> str | None:
    """A description of the first class whose two names differ, or None.

    Lists of different lengths are not compared: what a different number of classes means depends on the file.
    """
    if not theirs or not ours or len(theirs) != len(ours):
        return None
    for number, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        if their != our:
            return f"class {number} is {_shown(their)} there, {_shown(our)} in the data"
    return None


def _shown(name: str) -> str:
    return repr(name if len(name) <= 50 else name[:50] + "…")
