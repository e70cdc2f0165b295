"""WebDataset shards: images in tar archives with random access, local or remote.

A sample is two adjacent members of a tar, ``<key>.jpg`` (or another image format) and ``<key>.cls``, the label in
digits. index.json beside the shards, which scripts/make_shards.py writes, lists them:

    {"version": 1, "classes": ["n01440764", …],
     "train": [{"file": "train-000000.tar", "samples": 1000, "bytes": 110000000, "sha256": "…"}, …], "val": […]}

The package webdataset reads the same shards, but as streams, which cannot resume at a position; wids, which reads them
by index, unpickles .pkl members and passes addresses to a shell.
"""

import io
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit

from common.download import download_file
from common.errors import InputError, one_line
from common.files import flush_to_disk, read_json, sha256
from pipeline.folders import SPLITS, is_hidden
from pipeline.images import decode
from samplers import LANES

from filelock import FileLock
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

INDEX = "index.json"
COMMAND = "pipe:"  # a data path that is a command line
SHARD_NAME = re.compile(r"\w[\w.+=-]*\.tar", re.ASCII)
LABEL_DIGITS = 9
KEEP_OPEN_READS = 8 * LANES  # a process closes a shard that was not used in so many reads
RETRY_SECONDS = (1, 5, 25)  # delays between download attempts: object stores limit the request rate


# ---------------------------------------------------------------------------------------------------------------------
# The index
# ---------------------------------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """An entry of the index."""

    file: str
    samples: int
    bytes: int
    sha256: str


class Index(NamedTuple):
    """The names of the classes in the order of their labels, and the shards of the two splits."""

    classes: list[str]
    train: list[Shard]
    val: list[Shard]


def parse_index(content: object, source: str, needed: Sequence[str] = SPLITS) -> Index:
    """Validate the content of an index file.

    Args:
        source: of the content, for messages.
        needed: the splits that must have shards.

    Raises:
        InputError: it is not an index, has another version, or names a file outside of the folder.
    """
    try:
        if content["version"] != 1:
            raise InputError(f"{source} is of version {str(content['version'])[:20]}, expected 1")
        train, val = ([Shard(*(entry[key] for key in Shard._fields)) for entry in content[split]] for split in SPLITS)
        index = Index(content["classes"], train, val)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{source} is not an index of shards ({one_line(error)}): scripts/make_shards.py writes one"
        ) from error
    classes = index.classes
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or not classes or len(set(classes)) < len(classes):
        raise InputError(f"{source} names no classes, or one twice: expected a list of different names")
    names = set()
    for split, shards in zip(SPLITS, (train, val), strict=True):
        if not shards and split in needed:
            raise InputError(f"{source} has no shards of {split}: {' and '.join(needed)} are needed")
        for shard in shards:
            check_shard(shard, source)
            if shard.file in names:
                raise InputError(f"{source} names {shard.file} twice")
            names.add(shard.file)
    return index


def check_shard(shard: Shard, source: str) -> None:
    """Raises InputError unless the file name, the numbers and the SHA-256 of ``shard`` are plausible."""
    if not isinstance(shard.file, str) or not SHARD_NAME.fullmatch(shard.file):
        raise InputError(f"{source} names the shard {str(shard.file)[:100]!r}: expected a file name such as a-0.tar")
    # a sample takes at least two headers and two blocks of content
    if type(shard.samples) is not int or type(shard.bytes) is not int or not 0 < 2048 * shard.samples <= shard.bytes:
        found = f"{str(shard.samples)[:20]} samples in {str(shard.bytes)[:20]} bytes"
        raise InputError(f"{source} lists {shard.file} with {found}, which is impossible")
    if not isinstance(shard.sha256, str) or not re.fullmatch("[0-9a-f]{64}", shard.sha256):
        raise InputError(f"{source} has no SHA-256 of {shard.file}: expected 64 hexadecimal digits")


def read_index(data_path: str, needed: Sequence[str] = SPLITS) -> Index:
    """Read the index of ``--data-path``: a folder, an address or a command.

    Args:
        needed: the splits that must have shards.

    Raises:
        InputError: it is missing or invalid, or the shards of a folder are missing or have other sizes.
    """
    if is_remote(data_path):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, INDEX)
            download_shard(data_path, INDEX, path)
            return parse_index(read_json(path), shard_source(data_path, INDEX), needed)
    folder = Path(data_path)
    if not (folder / INDEX).is_file():
        if next(folder.glob("*.tar"), None) is not None:
            raise InputError(f"--data-path {folder} has no {INDEX}: scripts/make_shards.py --index {folder} writes it")
        raise InputError(
            f"--data-path {folder} has no {INDEX}: expected a folder that scripts/make_shards.py has written"
        )
    index = parse_index(read_json(folder / INDEX), str(folder / INDEX), needed)
    for shard in (shard for split in needed for shard in getattr(index, split)):
        try:
            size = (folder / shard.file).stat().st_size
        except OSError as error:
            raise InputError(f"{folder / shard.file} cannot be read: {error.strerror}") from error
        if size != shard.bytes:
            raise InputError(f"{folder / shard.file} has {size:,} bytes, {INDEX} says {shard.bytes:,}")
    return index


# ---------------------------------------------------------------------------------------------------------------------
# Remote shards
# ---------------------------------------------------------------------------------------------------------------------


def is_remote(data_path: str) -> bool:
    return data_path.startswith(("http://", "https://", COMMAND))


def shard_source(data_path: str, name: str) -> str:
    """The address of a file of a remote data path, or the command that writes the file to standard output."""
    if data_path.startswith(COMMAND):
        return data_path.removeprefix(COMMAND).replace("{}", shlex.quote(name))
    parts = urlsplit(data_path)  # keeps a query such as a signature at the end
    return parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()


def download_shard(data_path: str, name: str, to: Path) -> None:
    """Download the file ``name`` of a remote data path to ``to``.

    Raises:
        InputError: the download or the command failed.
    """
    source = shard_source(data_path, name)
    if not data_path.startswith(COMMAND):
        return download_file(source, to, shown=False)
    if source == data_path.removeprefix(COMMAND):
        raise InputError(f"--data-path {data_path} has no {{}}, the placeholder for the name of a file")
    with open(to, "wb") as file:
        done = subprocess.run(source, shell=True, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE)
    if done.returncode != 0:
        output = done.stderr.decode(errors="replace").strip()[-300:] or "no output"
        found = f"exited with status {done.returncode}: {source} ({output})"
        raise InputError(f"--data-path: the command for {name} {found}")


@dataclass
class ShardCache:
    """A local cache of remote shards, shared by the processes of this host and by later runs.

    Attributes:
        limit: bytes; the least recently opened shards are evicted. Processes that have one open can still read it.
    """

    folder: Path
    limit: int

    def check(self, index: Index) -> None:
        """Raises InputError if the folder is too small, or not writable."""
        shards = (*index.train, *index.val)
        total, largest = sum(shard.bytes for shard in shards), max(shard.bytes for shard in shards)
        least = min(total, 2 * LANES * largest)
        if self.limit < least:
            raise InputError(
                f"--shard-cache-gb {self.limit / 1e9:g} is too little: shards of up to {largest / 1e6:.4g} MB, "
                f"of which {LANES} are read at a time, need {least / 1e9:.4g}"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder), FileLock(self.folder / "room.lock"):
                free = shutil.disk_usage(self.folder).free + sum(size for _, size, _ in self._kept())
        except OSError as error:
            raise InputError(f"--shard-cache {self.folder} cannot be written: {error.strerror}") from error
        if free < min(total, self.limit):
            raise InputError(
                f"--shard-cache {self.folder} has room for {free / 1e9:.4g} GB, {min(total, self.limit) / 1e9:.4g} are "
                f"needed: --shard-cache-gb takes a smaller number, from {least / 1e9:.4g}"
            )

    def open(self, shard: Shard, data_path: str) -> BinaryIO:
        """Open a shard of a remote data path, downloading it if necessary.

        Raises:
            InputError: it cannot be downloaded or stored, or differs from the index.
        """
        path = self.folder / f"{shard.sha256[:16]}-{shard.file}"
        try:
            while True:
                try:
                    file = open(path, "rb", buffering=0)  # noqa: SIM115  it stays open
                except FileNotFoundError:
                    self._fetch(shard, data_path, path)
                else:
                    with suppress(OSError):  # a file of another user: its time stays
                        os.utime(file.fileno())
                    return file
        except OSError as error:
            raise InputError(f"--shard-cache {self.folder} cannot store {shard.file}: {error.strerror}") from error

    def _fetch(self, shard: Shard, data_path: str, path: Path) -> None:
        part = path.with_name(f"{path.name}.part")
        with FileLock(f"{path}.lock"):  # other processes wait, and then find the shard
            if path.exists():
                return
            for wait in (*RETRY_SECONDS, None):
                try:
                    download_shard(data_path, shard.file, part)
                    check_received(part, shard, shard_source(data_path, shard.file))
                    break
                except InputError as error:
                    if wait is None or is_permanent(error):
                        raise
                    time.sleep(wait)
            flush_to_disk(part)
            with FileLock(self.folder / "room.lock"):
                self._make_room(shard.bytes)
                os.replace(part, path)

    def _kept(self) -> list[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of the cached shards of all data paths."""
        return [(path.stat().st_mtime_ns, path.stat().st_size, path) for path in self.folder.glob("*.tar")]

    def _make_room(self, size: int) -> None:
        kept = sorted(self._kept(), reverse=True)
        total = size + sum(size for _, size, _ in kept)
        while kept and total > self.limit:
            _, size, path = kept.pop()
            path.unlink()
            total -= size


def is_permanent(error: InputError) -> bool:
    """Whether the server denied the file, so that retrying is useless."""
    return isinstance(error.__cause__, HTTPError) and error.__cause__.code in (401, 403, 404, 410)


def check_received(path: Path, shard: Shard, source: str) -> None:
    """Raises InputError, and removes the file, unless size and SHA-256 are those of the index."""
    size, digest = path.stat().st_size, sha256(path)
    if (size, digest) != (shard.bytes, shard.sha256):
        path.unlink()
        found = "other" if size == shard.bytes else f"{size:,}"
        raise InputError(f"{source} gave {found} bytes of {shard.file} than the {shard.bytes:,} of {INDEX}")


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A sample in a tar: name, offset and size in bytes of its image, and the label."""

    name: str
    offset: int
    size: int
    label: int


def read_members(file: BinaryIO, shard: str) -> list[Member]:
    """The samples of an open tar in order; hidden files, and files other than images and labels, are skipped.

    Raises:
        InputError: ``shard`` is damaged or not a tar, or an image and its label are not adjacent.
    """

    def is_shown(entry: tarfile.TarInfo) -> bool:
        if entry.size < 0:  # older versions of Python would loop
            raise InputError(f"{shard} is damaged: {entry.name} has {entry.size} bytes")
        return not any(is_hidden(part) for part in entry.name.split("/") if part not in (".", ".."))

    def key_of(entry: tarfile.TarInfo) -> str:
        folder, slash, name = entry.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    members = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for key, group in groupby((entry for entry in tar if is_shown(entry)), key_of):
                plain = [entry for entry in group if entry.isreg() and entry.sparse is None]
                suffixes = [entry.name.removeprefix(key).lower() for entry in plain]
                images = [entry for entry, suffix in zip(plain, suffixes, strict=True) if suffix in IMG_EXTENSIONS]
                labels = [entry for entry, suffix in zip(plain, suffixes, strict=True) if suffix == ".cls"]
                if not images and not labels:
                    continue
                if (len(images), len(labels)) != (1, 1):
                    raise InputError(
                        f"{shard} has {len(images)} image(s) and {len(labels)} label(s) of {key}: expected one "
                        "label beside each image"
                    )
                image, label = images[0], labels[0]
                text = os.pread(file.fileno(), min(label.size, LABEL_DIGITS + 1), label.offset_data).strip()
                if not re.fullmatch(rb"[0-9]{1,%d}" % LABEL_DIGITS, text):
                    raise InputError(f"{shard} has the label {text!r} in {label.name}: expected a whole number")
                members.append(Member(image.name, image.offset_data, image.size, int(text)))
    except InputError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        raise InputError(f"{shard} is damaged or no uncompressed tar: {one_line(error)}") from error
    return members


@dataclass
class OpenShard:
    file: BinaryIO
    members: list[Member]
    last_read: int = 0


class ShardDataset(Dataset):
    """The images of one split, numbered across its shards.

    A process opens a shard at the first access, and closes shards that it no longer uses. It reads with ``pread``,
    because forked processes share the position of an open file.

    Attributes:
        shard_sizes: the number of images in each shard.
    """

    def __init__(
        self,
        data_path: str,
        is_train: bool,
        transform: Callable | None,
        cache: ShardCache | None,
        single_split: bool = False,
    ):
        """
        Args:
            cache: of remote shards; None for a folder.
            single_split: whether the shards of the other split may be missing.

        Raises:
            InputError: as `read_index`, or the cache is missing or too small.
        """
        if is_remote(data_path) and cache is None:
            raise InputError("--shard-cache is missing: expected a folder for the remote shards")
        index = read_index(data_path, (SPLITS[not is_train],) if single_split else SPLITS)
        self.data_path, self.transform, self.classes = data_path, transform, index.classes
        self.cache = cache if is_remote(data_path) else None
        if self.cache is not None:
            self.cache.check(index)
        self.shards = index.train if is_train else index.val
        self.shard_sizes = [shard.samples for shard in self.shards]
        self.ends = list(accumulate(self.shard_sizes))
        self.opened: dict[int, OpenShard] = {}
        self.reads = 0
        self.last: dict[int, Image.Image] = {}

    def __copy__(self) -> "ShardDataset":
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__, opened={}, reads=0, last={})  # open shards are not shared
        return copied

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int):
        shard, member = self._find(index)
        if index not in self.last:  # repeated augmentation loads an image several times in a row
            self.last = {index: decode(io.BytesIO(os.pread(shard.file.fileno(), member.size, member.offset)))}
        image = self.last[index]
        return self.transform(image) if self.transform else image, member.label

    def name_of(self, index: int) -> str:
        """The shard of an image and its name there."""
        name = "".join(c if c.isprintable() else " " for c in self._find(index)[1].name)  # printed to a terminal
        return f"{self.shards[bisect_right(self.ends, index)].file}: {name}"

    def _find(self, index: int) -> tuple[OpenShard, Member]:
        number = bisect_right(self.ends, index)
        self.reads += 1
        if number not in self.opened:
            left = [n for n, shard in self.opened.items() if shard.last_read < self.reads - KEEP_OPEN_READS]
            for old in left:
                self.opened.pop(old).file.close()
            self.opened[number] = self._open(self.shards[number])
        shard = self.opened[number]
        shard.last_read = self.reads
        return shard, shard.members[index - self.ends[number]]  # counted from the end

    def _open(self, shard: Shard) -> OpenShard:
        if self.cache is None:
            path = Path(self.data_path, shard.file)
            try:
                file = open(path, "rb", buffering=0)  # noqa: SIM115  it stays open
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror}") from error
        else:
            file = self.cache.open(shard, self.data_path)
        members = read_members(file, shard.file)
        if len(members) != shard.samples:
            raise InputError(f"{shard.file} has {len(members)} samples, {INDEX} says {shard.samples}")
        highest = max(members, key=lambda member: member.label)
        if highest.label >= len(self.classes):
            raise InputError(
                f"{shard.file} has the label {highest.label} of {highest.name}, {INDEX} {len(self.classes)} classes"
            )
        return OpenShard(file, members)
