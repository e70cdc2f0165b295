"""Files that somebody else may have written: fetched from addresses, read without running code from them.

Also the other direction: a file is written whole or not at all.
"""

import errno
import hashlib
import json
import mmap
import os
import pickle
import re
import secrets
import shutil
import sys
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
import yaml
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from timm.models import clean_state_dict
from torch import Tensor
from tqdm import tqdm

from .hub import from_hub
from .plain_data import plain_data_alone
from .vit import InputError, in_a_line, shown

YAML_LIMIT = 2**20  # bytes; those of this program have a thousandth of it
JSON_LIMIT = 2**24  # bytes; the names and meanings of all of ImageNet's classes take a twelfth of it
NESTING_LIMIT = 20  # levels of YAML, which takes quadratic time to read
PLAIN_TAGS = {("!!", name) for name in ("bool", "float", "int", "null", "str")}  # which are in published YAML files
SCALAR_LIMIT = 1000  # characters of a value in YAML; some numbers take quadratic time, too

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

# ---------------------------------------------------------------------------------------------------------------------
# Fetching
# ---------------------------------------------------------------------------------------------------------------------


def fetch(source: str | os.PathLike, on_hub: str = "model.safetensors", timeout: float = 30.0) -> Path:
    """A local path for a path or an address; what has to be downloaded is kept for the next time.

    Args:
        source: a path; ``http(s)://…``, perhaps with ``#sha256=`` and 64 digits that the file has to have; or
            ``hf-hub:owner/name[/file][@revision]``.
        on_hub: which file of a Hugging Face repository is meant where the address does not name one.
        timeout: seconds without an answer after which an ``http(s)`` server is given up.

    Raises:
        InputError: there is no such file, or the address gave none.
    """
    address = str(source)
    if address.startswith("hf-hub:"):
        return from_hub(address, on_hub)
    if address.startswith(("http://", "https://")):
        return _download(address, timeout)
    path = Path(address)
    if not path.is_file():
        raise InputError(f"{path} is {'a directory' if path.is_dir() else 'missing'}: expected a file of weights")
    return path


def _download(address: str, timeout: float) -> Path:
    """Into torch's hub folder, under a name that follows from the address."""
    url, _, fragment = address.partition("#")
    if fragment and not re.fullmatch(r"sha256=[0-9a-fA-F]{64}", fragment):
        raise InputError(f"{address} ends in #{fragment}: expected #sha256= and 64 hexadecimal digits, or nothing")
    expected = fragment.removeprefix("sha256=").lower()
    try:
        name = hashlib.sha256(url.encode()).hexdigest()[:16] + "-" + Path(urlsplit(url).path).name
    except ValueError as error:
        raise InputError(f"{url} is no address: {error}") from error
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # other processes wait, and then find the file
            if not path.exists() or (expected and sha256(path) != expected):
                print(f"downloading {url}", file=sys.stderr)
                receive(url, path.with_name(name + ".part"), timeout)
                if expected and (found := sha256(path.with_name(name + ".part"))) != expected:
                    path.with_name(name + ".part").unlink()
                    raise InputError(f"{url} has the SHA-256 {found}, expected {expected}: it is another file")
                os.replace(path.with_name(name + ".part"), path)
    except OSError as error:
        raise InputError(f"{url} could not be kept in {path.parent}: {error}") from error
    return path


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def receive(url: str, partial: Path, timeout: float = 30.0, shown: bool = True) -> None:
    """Download ``url`` to ``partial``. A connection that breaks is taken up where it broke, now or in a later run.

    Args:
        timeout: seconds without an answer after which the server is given up.
        shown: whether a terminal shows how far it is.

    Raises:
        InputError: the server does not give the file, as a server's HTTPError or a broken connection says.
    """
    had = -1
    while True:
        try:
            return _receive_rest(url, partial, timeout, shown)
        except InputError:
            partial.unlink(missing_ok=True)
            _version_of(partial).unlink(missing_ok=True)
            raise
        except HTTPError as error:
            if error.code != 416:  # what was kept is not a beginning of what is there now
                raise InputError(f"{url} could not be downloaded: {error}") from error
            partial.unlink()
        except (OSError, HTTPException, ValueError) as error:  # ValueError: a broken address, or length
            kept = partial.stat().st_size if partial.exists() else 0
            if kept <= had or kept == 0:  # nothing came since the last attempt
                resumable = kept and _version_of(partial).exists()
                later = f"; the {kept:,} bytes that came are kept for the next attempt" if resumable else ""
                raise InputError(f"{url} could not be downloaded: {getattr(error, 'reason', error)}{later}") from error
            had = kept


def _receive_rest(url: str, partial: Path, timeout: float, shown: bool) -> None:
    """Append to ``partial`` what it lacks of ``url``.

    Raises:
        OSError, HTTPException: the connection failed; what came until then is in ``partial``.
    """
    version = _version_of(partial)
    headers = {"User-Agent": "learngenes", "Accept-Encoding": "identity"}
    if partial.exists() and version.exists():
        headers |= {"Range": f"bytes={partial.stat().st_size}-", "If-Range": version.read_text()}
    with urlopen(Request(url, headers=headers), timeout=timeout) as response:
        mark = response.headers["ETag"] or ""
        mark = response.headers["Last-Modified"] if mark[:1] != '"' else mark  # a weak mark says too little
        begin = partial.stat().st_size if response.status == 206 else 0
        range_begins = str(response.headers["Content-Range"]).startswith(f"bytes {begin}-")
        if begin and not (range_begins and mark in (None, version.read_text())):  # the rest of something else
            partial.unlink()
            return _receive_rest(url, partial, timeout, shown)
        if response.headers.get_content_type() == "text/html":
            raise InputError(f"{url} is a web page: expected the address of the file itself")
        total = begin + int(response.headers["Content-Length"]) if response.headers["Content-Length"] else None
        if begin == 0:
            version.unlink(missing_ok=True)
            if mark:
                version.write_text(mark)
        bar = dict(unit="B", unit_scale=True, leave=False, disable=None if shown else True)  # None: only on a terminal
        with open(partial, "ab" if begin else "wb") as file, tqdm(total=total, initial=begin, **bar) as progress:
            while block := response.read(2**16):
                if file.tell() == 0 and block.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
                    raise InputError(f"{url} is a web page: expected the address of the file itself")
                file.write(block)
                progress.update(len(block))
            if file.tell() == 0:
                raise InputError(f"{url} is empty: expected the address of the file itself")
            if total is not None and file.tell() < total:
                raise ConnectionError(f"the connection broke after {file.tell():,} of {total:,} bytes")
    version.unlink(missing_ok=True)


def _version_of(partial: Path) -> Path:
    """Keeps the server's mark of the file's version, so that halves of different versions are not put together."""
    return partial.with_name(partial.name + ".version")


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike, mapped: bool = False) -> dict:
    """The content of a checkpoint, without running code from it: the weights are under ``model``.

    A bare state dict and a safetensors file become ``{"model": …}``; the header of a learngene file is added as
    ``learngene``. Plain data are what `plain_data` lists, such as the ``argparse.Namespace`` of the published
    checkpoints.

    Args:
        mapped: leave the tensors on the disk until they are used, where the format allows it.

    Raises:
        InputError: the file is missing or damaged, or holds objects other than tensors and plain data.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise InputError(f"{path} is empty: expected a file of weights")
    try:
        if start[8:] == b"{":  # safetensors: the header's length in eight bytes, then the header
            with open(path, "rb") as named, safe_open(_in_utf8(path, named), framework="pt") as file:
                header = (file.metadata() or {}).get("learngene")
                content = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
            return content if header is None else {**content, "learngene": json.loads(header)}
        _refuse_bombs(path, zipped=start.startswith(b"PK"))
        content = _unpickled(path, mapped and start.startswith(b"PK"))
    except InputError:
        raise
    except Exception as error:  # a damaged file can fail in any way the parsers know
        foreign = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if foreign:
            raise InputError(
                f"{path} is refused: besides tensors and plain data it holds {foreign[1]}; save the state dict alone"
            ) from error
        raise InputError(f"{path} is damaged or no file of weights: {type(error).__name__}") from error
    if isinstance(content, (list, tuple)):  # such as (weights, epoch)
        content = {str(number): part for number, part in enumerate(content)}
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}: expected a checkpoint or a state dict")
    return dict(content) if "model" in content else {"model": dict(content)}


def _unpickled(path: str | os.PathLike, mapped: bool) -> object:
    with plain_data_alone(os.path.getsize(path)), warnings.catch_warnings(), open(path, "rb") as file:
        warnings.simplefilter("ignore")  # of the pickle's protocol; `read_checkpoint` says what is wrong
        # torch maps only what has a path, and goes by the suffix of a path: this one has none
        source = f"/proc/self/fd/{file.fileno()}" if mapped else file
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)


def _in_utf8(path: str | os.PathLike, file: IO) -> str | os.PathLike:
    """A name of an open file that safetensors takes, which wants it in UTF-8."""
    try:
        os.fspath(path).encode()
        return path
    except UnicodeEncodeError:
        return f"/proc/self/fd/{file.fileno()}"


def _refuse_bombs(path: str | os.PathLike, zipped: bool) -> None:
    """Refuse pickles and archives that were made to fill the memory: torch writes none of what is refused here."""
    size = os.path.getsize(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"bytearray") >= 0:  # one of any length can stand in a few bytes of a pickle
            raise InputError(f"{path} is refused: besides tensors and plain data it holds a bytearray")
        tail = content[-98:]
    if not zipped:
        return
    with zipfile.ZipFile(path) as archive:
        declared = sum(entry.file_size for entry in archive.infolist())
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        agreed = _directory_is_at(archive.start_dir, tail, size)
    if compressed or declared > size or not agreed:
        raise InputError(
            f"{path} is refused: it has {size:,} bytes and declares {declared:,}, or is compressed, unlike torch's"
        )


def _directory_is_at(start: int, tail: bytes, size: int) -> bool:
    """Whether a zip archive's end records point to the directory that Python found, which torch then finds, too.

    Python takes the directory that stands before the end records, torch the one that they point to.

    Args:
        tail: the last 98 bytes of the archive's ``size``: a 64-bit end record, the pointer to it, the end record.
    """
    record, pointer, end = tail[:56], tail[56:76], tail[76:]
    if end[:4] != b"PK\5\6":
        return False
    stated = int.from_bytes(end[16:20], "little")
    if pointer[:4] != b"PK\6\7":
        return stated == start
    record_at, stated_64 = int.from_bytes(pointer[8:16], "little"), int.from_bytes(record[48:56], "little")
    return record[:4] == b"PK\6\6" and record_at == size - 98 and stated_64 == start and stated in (start, 2**32 - 1)


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
        The weights, and what is to be said of them: which were taken where there are several, another precision.

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
    if places[0] == ("model",):  # whose average has a name of its own, and an option
        others = [place for place in others if place != ("model_ema",)]
    if others:
        below = int([*content] == ["model"])  # which `read_checkpoint` may have put around all
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
    found, seen = {}, set()  # what stands in several places is looked at once, however often that is

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
    """A state dict in float32, made sure of before memory is given to it; `weights_of` says what is refused."""
    if not all(isinstance(name, str) for name in weights):
        raise InputError(f"{path} is damaged: a name of its weights is no text")
    for name, tensor in weights.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.dtype not in DTYPES:
            raise InputError(f"{path} is refused: {name} is no ordinary tensor")
    weights = in_float32(weights, path)
    for name, tensor in {id(tensor): (name, tensor) for name, tensor in weights.items()}.values():
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float64).isfinite():  # inf and nan stay in a sum
            raise InputError(f"{path} cannot be used: {name} holds values that are not finite")
    return clean_state_dict(weights)


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

    It is in float32 where the weights are in another precision: somebody has cast the whole file. Else its precision is
    the optimiser's own choice, and kept.

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


class _UniqueKeys(yaml.SafeLoader):
    """Of a key that is there twice, YAML's own loader takes the last value without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping, seen = super().construct_mapping(node, deep), set()
        for key, _ in node.value if len(mapping) < len(node.value) else ():
            if key.value in seen:
                raise yaml.YAMLError(f"the key {key.value} of line {key.start_mark.line + 1} is there twice")
            seen.add(key.value)
        return mapping


def read_yaml(path: str | os.PathLike) -> object:
    """The plain data of a YAML file.

    Raises:
        InputError: the file is missing, no YAML, holds a key twice, or what could make much of little: tags other than
            those of plain values, aliases, deep nesting.
    """
    text = _plain_text(path, YAML_LIMIT)
    try:
        depth = 0
        for token in yaml.scan(text):
            depth += type(token).__name__.endswith("StartToken") - type(token).__name__.endswith("EndToken")
            what = None
            if isinstance(token, yaml.AliasToken):
                what = f"the alias *{token.value}"
            elif isinstance(token, yaml.TagToken) and token.value not in PLAIN_TAGS:
                what = f"the tag {''.join(part or '' for part in token.value)}"
            elif isinstance(token, yaml.ScalarToken) and len(token.value) > SCALAR_LIMIT:
                what = f"a value of more than {SCALAR_LIMIT} characters"
            elif depth > NESTING_LIMIT:
                what = f"more than {NESTING_LIMIT} levels"
            if what:
                raise InputError(f"{path} holds {what}, which is not read here: write short, plain values")
        return yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not YAML of plain data: {in_a_line(error)}") from error


def read_json(path: str | os.PathLike) -> object:
    """The plain data of a JSON file.

    Raises:
        InputError: the file is missing or no JSON.
    """
    try:
        return json.loads(_plain_text(path, JSON_LIMIT))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not JSON: {in_a_line(error)}") from error


def _plain_text(path: str | os.PathLike, limit: int) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise InputError(f"{path} has more than {limit:,} bytes: expected a short text file")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[str]:
    """A name to write to, beside ``path``; it becomes ``path`` when all is written, and is removed if that fails."""
    path = Path(path)
    # processes of several machines may write there, and have the same number
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{secrets.randbelow(10**6):06}")
    try:
        yield str(unfinished)
        umask = os.umask(0)  # there is no other way to read it
        os.umask(umask)
        with suppress(OSError):  # some file systems of other machines have no modes: the file is kept as it is
            unfinished.chmod(0o666 & ~umask)  # safetensors writes files that only their owner can read
        flush_to_disk(unfinished)  # the name must not be there before the content, whatever happens to the machine
        os.replace(unfinished, path)
    except (RuntimeError, SafetensorError) as error:
        if not re.search(r"inline_container|I/O error", str(error)):
            raise
        # torch and safetensors do not say why they cannot write
        reason = errno.ENOSPC if shutil.disk_usage(path.parent).free < 2**16 else errno.EIO
        raise OSError(reason, os.strerror(reason), str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def flush_to_disk(path: str | os.PathLike) -> None:
    """Have the system write a file to its disk, where the file system can be asked to.

    Raises:
        OSError: it cannot be written.
    """
    with open(path, "rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
                raise


def remove_unfinished(folder: Path) -> None:
    """Remove what `written_whole` has left in a folder when its process was killed."""
    for left in folder.glob(".*.*"):
        if re.fullmatch(
            r"\.(best_checkpoint|checkpoint|learngene|model|config|log|curves|args|README|train-|val-|index|\.writable)\S*\.\d+",
            left.name,
        ):
            left.unlink(missing_ok=True)


def check_archive(path: Path) -> None:
    """Raises InputError unless every byte of a checkpoint is as it was written, by the sums of the archive it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        _refuse_bombs(path, zipped=True)  # which looks at what the sums do not cover
    except InputError as error:
        raise InputError(f"{path}, which is damaged: {error}") from error
    except (OSError, zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}, which is damaged or no checkpoint: {in_a_line(error)}") from error
    if damaged:
        raise InputError(f"{path}, which is damaged: {damaged} is not what was written")
