"""Reading untrusted files without executing code from them, and writing files atomically."""

import errno
import hashlib
import json
import mmap
import os
import pickle
import re
import secrets
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from common.errors import InputError, one_line
from common.plain_data import allow_plain_data

import torch
import yaml
from safetensors import SafetensorError, safe_open

YAML_LIMIT = 2**20  # bytes; this program's have about 1,000
JSON_LIMIT = 2**24  # bytes; the names and descriptions of all classes of ImageNet-22k take a twelfth
NESTING_LIMIT = 20  # levels of YAML: parsing time is quadratic
PLAIN_TAGS = {("!!", name) for name in ("bool", "float", "int", "null", "str")}  # used by published YAML files
SCALAR_LIMIT = 1000  # characters of a value in YAML: parsing time of some numbers is quadratic


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike, mapped: bool = False) -> dict:
    """Load a checkpoint without executing code from it; the weights are under ``model``.

    A bare state dict and a safetensors file become ``{"model": …}``; the header of a learngene file is added as
    ``learngene``. `plain_data` lists which types are loaded besides tensors, such as the ``argparse.Namespace`` of
    published checkpoints.

    Args:
        mapped: memory-map the tensors, where the format allows it.

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
    except Exception as error:  # damaged files make the parsers raise all kinds of errors
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
    with allow_plain_data(os.path.getsize(path)), warnings.catch_warnings(), open(path, "rb") as file:
        warnings.simplefilter("ignore")  # about the pickle's protocol; `read_checkpoint` reports errors
        # torch maps only files given by path, and interprets the suffix of the path: this one has none
        source = f"/proc/self/fd/{file.fileno()}" if mapped else file
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)


def _in_utf8(path: str | os.PathLike, file: IO) -> str | os.PathLike:
    """A name of the open ``file`` that is valid UTF-8, which safetensors requires."""
    try:
        os.fspath(path).encode()
        return path
    except UnicodeEncodeError:
        return f"/proc/self/fd/{file.fileno()}"


def _refuse_bombs(path: str | os.PathLike, zipped: bool) -> None:
    """Raises InputError for pickles and archives that expand to fill the memory; torch never writes such files."""
    size = os.path.getsize(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"bytearray") >= 0:  # a few bytes of a pickle can create one of any length
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
    """Whether torch reads the same directory of a zip archive as Python, which starts at ``start``.

    Python reads the directory directly before the end records, torch the one that the end records point to.

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


class _UniqueKeys(yaml.SafeLoader):
    """YAML's own loader silently takes the last value of a duplicate key; this one raises."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping, seen = super().construct_mapping(node, deep), set()
        for key, _ in node.value if len(mapping) < len(node.value) else ():
            if key.value in seen:
                raise yaml.YAMLError(f"duplicate key {key.value} in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return mapping


def read_yaml(path: str | os.PathLike) -> object:
    """The plain data of a YAML file.

    Raises:
        InputError: the file is missing, or as `parse_yaml`.
    """
    return parse_yaml(_read_text(path, YAML_LIMIT), path)


def parse_yaml(text: str, path: str | os.PathLike) -> object:
    """The plain data of YAML; ``path`` is for messages.

    Raises:
        InputError: it is not YAML, or contains duplicate keys, aliases, deep nesting, or tags other than those of plain
            values.
    """
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
                raise InputError(f"{path} contains {what}, which is not supported: write short, plain values")
        return yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not YAML of plain data: {one_line(error)}") from error


def read_json(path: str | os.PathLike) -> object:
    """The plain data of a JSON file.

    Raises:
        InputError: the file is missing or not JSON.
    """
    try:
        return json.loads(_read_text(path, JSON_LIMIT))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not JSON: {one_line(error)}") from error


def _read_text(path: str | os.PathLike, limit: int) -> str:
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
        raise InputError(f"{path} is not a text file: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[str]:
    """Write a file atomically: yields a temporary name, which is renamed to ``path`` unless an exception is raised."""
    path = Path(path)
    # random, because processes of several hosts may write there and have the same number
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{secrets.randbelow(10**6):06}")
    try:
        yield str(unfinished)
        umask = os.umask(0)  # there is no other way to read it
        os.umask(umask)
        with suppress(OSError):  # some network file systems have no modes
            unfinished.chmod(0o666 & ~umask)  # safetensors writes files that only the owner can read
        flush_to_disk(unfinished)  # before the rename, so that a crash cannot leave an empty file
        os.replace(unfinished, path)
    except (RuntimeError, SafetensorError) as error:
        if not re.search(r"inline_container|I/O error", str(error)):
            raise
        # torch and safetensors do not report the cause
        reason = errno.ENOSPC if shutil.disk_usage(path.parent).free < 2**16 else errno.EIO
        raise OSError(reason, os.strerror(reason), str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def hardlink_or_copy(path: Path, name: Path) -> None:
    """Make ``name`` a hard link to ``path``, or a copy where the file system has no hard links."""
    with atomic_write(name) as unfinished:
        Path(unfinished).unlink(missing_ok=True)  # left by a killed process with the same number
        try:
            os.link(path, unfinished)
        except OSError:
            shutil.copyfile(path, unfinished)


def flush_to_disk(path: str | os.PathLike) -> None:
    """Flush a file to disk with fsync, where the file system supports it.

    Raises:
        OSError: writing failed.
    """
    with open(path, "rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
                raise


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of `atomic_write` that killed processes left in a folder."""
    for left in folder.glob(".*.*"):
        if re.fullmatch(
            r"\.(best_checkpoint|checkpoint|learngene|model|config|log|curves|args|README|train-|val-|index|\.writable)\S*\.\d+",
            left.name,
        ):
            left.unlink(missing_ok=True)


def check_archive(path: Path) -> None:
    """Raises InputError unless the checksums of a checkpoint's zip archive are correct."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        _refuse_bombs(path, zipped=True)  # checks what the checksums do not cover
    except InputError as error:
        raise InputError(f"{path}, which is damaged: {error}") from error
    except (OSError, zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}, which is damaged or no checkpoint: {one_line(error)}") from error
    if damaged:
        raise InputError(f"{path}, which is damaged: the checksum of {damaged} is wrong")
