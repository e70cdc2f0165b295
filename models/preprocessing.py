"""How an image becomes the input of a model, and which file of weights says so.

A model folder says it in ``config.json``, as timm does; learngene files and checkpoints of this program say it in the
entry ``preprocessing``, with the same keys. Those without the entry have the default.
"""

import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from common.errors import InputError, shown
from common.files import _in_utf8, read_checkpoint, read_json

from safetensors import SafetensorError, safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos")  # those of timm's resize
CROP_MODES = ("center", "squash", "border")  # timm's
LARGEST_CROP = 2  # timm's VOLO have 1.15: the image is resized to less than the crop, and padded
SMALL = 64  # pixels; up to this input size the images of small data sets are not cropped like photographs
WHOLE = {"crop_pct": 1.0, "crop_mode": "squash"}  # an evaluation of whole images
BESIDE_CONFIG = (".safetensors", ".bin")  # files of weights that the config.json of their folder is about


@dataclass(frozen=True)
class Preprocessing:
    """Normalisation, and resize and crop of an evaluation, with timm's names; the defaults are DeiT's and timm's.

    Attributes:
        mean, std: of red, green and blue, for pixels from 0 to 1.
        interpolation: of the resize.
        crop_pct: the side of the crop as a share of the resized image's.
        crop_mode: ``center`` resizes the shorter side, ``squash`` both, ``border`` the longer one.
    """

    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @classmethod
    def from_config(cls, config: Mapping) -> "Preprocessing":
        """The entries of a configuration with timm's keys; those that are missing or None have their defaults.

        Raises:
            InputError: a value is none that can be used.
        """
        given = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        for name, value in given.items():
            expected = problem_with(name, value)
            if expected:
                numbers = value[:4] if isinstance(value, (list, tuple)) else [value]
                found = " ".join(repr(v[:60]) if isinstance(v, str) else shown(v) for v in numbers)
                raise InputError(f"{name} is {found or 'empty'}, expected {expected}")
        for name in given.keys() & {"mean", "std"}:
            given[name] = tuple(map(float, given[name])) * (3 // len(given[name]))
        return cls(**given)

    def as_config(self) -> dict:
        """Plain data with timm's keys, for ``config.json`` and for `from_config`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


DEFAULT = Preprocessing()


def problem_with(name: str, value: object) -> str | None:
    """What is expected in the place of ``value``; None if it can be used. A grey image has one mean for all colours."""
    if name in ("mean", "std"):
        numbers = isinstance(value, (list, tuple)) and len(value) in (1, 3) and all(map(is_finite, value))
        if not (numbers and (name == "mean" or min(value) > 0)):
            return "three numbers" + " above 0" * (name == "std")
    elif name == "crop_pct":
        if not (is_finite(value) and 0 < value <= LARGEST_CROP):
            return f"a number above 0 and at most {LARGEST_CROP}"
    elif value not in (known := INTERPOLATIONS if name == "interpolation" else CROP_MODES):
        return f"one of {', '.join(known)}"
    return None


def is_finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


# ---------------------------------------------------------------------------------------------------------------------
# In files
# ---------------------------------------------------------------------------------------------------------------------


def preprocessing_in(path: str | os.PathLike, content: Mapping | None = None) -> Preprocessing | None:
    """What the file of weights at ``path``, or the ``config.json`` beside it, says; None if nothing does.

    Errors in the weights are left to their reader.

    Args:
        content: what `read_checkpoint` read from ``path``; saves reading a large file twice.

    Raises:
        InputError: a value cannot be used; the message names the file.
    """
    path, config = Path(path), None
    try:
        with open(path, "rb") as file:
            safe = file.read(9)[8:] == b"{"
        if safe:
            config = _in_header(path)
        elif content is not None or _mentions(path, b"preprocessing", b"schedule_lag"):
            content = read_checkpoint(path, mapped=True) if content is None else content
            config = content.get("preprocessing", {} if "schedule_lag" in content else None)
    except (OSError, ValueError, RecursionError, SafetensorError):
        return None
    if config is None and path.suffix in BESIDE_CONFIG:
        path = path.with_name("config.json")
        config = _in_folder(path)
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise InputError(f"{path}: its preprocessing is {shown(config)!r}, expected a mapping")
    try:
        return Preprocessing.from_config(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _in_header(path: Path) -> object:
    """The entry of a learngene file; None for another safetensors file."""
    with open(path, "rb") as named, safe_open(_in_utf8(path, named), framework="pt") as file:
        metadata = file.metadata() or {}
    return json.loads(metadata.get("preprocessing", "{}")) if "learngene" in metadata else None


def _in_folder(path: Path) -> object:
    """timm's configuration in a ``config.json``, of which older versions have no ``pretrained_cfg``; None without."""
    try:
        config = read_json(path)
    except InputError:
        return None
    config = config.get("pretrained_cfg", config) if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or "mean" not in config:
        return None
    small = isinstance(size := config.get("input_size"), list) and all(type(s) is int and s <= SMALL for s in size)
    if small and all(config.get(name) == value for name, value in WHOLE.items()):  # which is not about photographs
        return {name: value for name, value in config.items() if name not in WHOLE}
    return config


def _mentions(path: Path, *words: bytes) -> bool:
    """Whether a checkpoint can have one of the entries. Most files of other programs do not, and need not be read."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return any(content.find(word) >= 0 for word in words)  # torch compresses nothing, in any of its formats
