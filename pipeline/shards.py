"""Images in shards: tar archives of WebDataset with random access, local or remote.

A sample is some adjacent members of a tar, ``<key>.jpg`` (or another image format) and its label: ``<key>.cls``, in
digits, or ``<key>.json``, in which it has a key. `pipeline.shard_index` says which shards there are.

The package webdataset reads the same shards, but as streams, which cannot resume at a position; wids, which reads them
by index, unpickles .pkl members and passes addresses to a shell.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from common.errors import InputError, one_line
from common.hub_datasets import HubDataset, find_dataset, is_on_hub
from pipeline.folders import SPLITS, is_hidden
from pipeline.images import decode
from pipeline.shard_cache import ShardCache, is_remote
from pipeline.shard_index import INDEX, Shard, fetch_shard, read_hub_index, read_index
from samplers import LANES

from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

LABEL_DIGITS = 9
LABEL_BYTES = 2**20  # of a .json member
LABEL_KEY = "label"  # in .json members, unless another one is named
KEEP_OPEN_READS = 8 * LANES  # a process closes a shard that was not used in so many reads


class Choices(NamedTuple):
    """What options say about a data set in shards or of the Hub; None is taken from the data set.

    Attributes:
        num_classes: --nb-classes, where the data do not say.
        image_column, label_column: of Parquet files; the latter is also the key of labels in .json members of shards.
        train_split, val_split: the names of the splits on the Hub.
    """

    num_classes: int | None = None
    image_column: str | None = None
    label_column: str | None = None
    train_split: str | None = None
    val_split: str | None = None


class Member(NamedTuple):
    """A sample in a tar: name, offset and size in bytes of its image, and the label."""

    name: str
    offset: int
    size: int
    label: int


def read_members(file: BinaryIO, shard: str, label_key: str | None = None) -> list[Member]:
    """The samples of an open tar in order; hidden files, and files other than images and labels, are skipped.

    Args:
        label_key: of the label in .json members; None for .cls members, or `LABEL_KEY` in .json where there are none.

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
                if label_key is not None or not labels:
                    labels = [entry for entry, suffix in zip(plain, suffixes, strict=True) if suffix == ".json"]
                if (len(images), len(labels)) != (1, 1):
                    raise InputError(
                        f"{shard} has {len(images)} image(s) and {len(labels)} label(s) of {key}: expected one "
                        "label beside each image"
                    )
                label = read_label(file, labels[0], shard, label_key or LABEL_KEY)
                members.append(Member(images[0].name, images[0].offset_data, images[0].size, label))
    except InputError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        raise InputError(f"{shard} is damaged or no uncompressed tar: {one_line(error)}") from error
    return members


def read_label(file: BinaryIO, entry: tarfile.TarInfo, shard: str, key: str) -> int:
    """The label in a .cls or .json member of an open tar.

    Args:
        key: of the label in .json.

    Raises:
        InputError: it is none.
    """
    if entry.name.lower().endswith(".cls"):
        text = os.pread(file.fileno(), min(entry.size, LABEL_DIGITS + 1), entry.offset_data).strip()
    else:
        try:
            content = json.loads(os.pread(file.fileno(), min(entry.size, LABEL_BYTES), entry.offset_data))
            text = str(content[key]).encode()[: LABEL_DIGITS + 1]
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise InputError(f"{shard} has no label under the key {key} in {entry.name}: expected a number") from error
    if not re.fullmatch(rb"[0-9]{1,%d}" % LABEL_DIGITS, text):
        raise InputError(f"{shard} has the label {text!r} in {entry.name}: expected a whole number")
    return int(text)


class Opened(Protocol):
    """A shard that a process has open."""

    def content(self, number: int) -> bytes:
        """The file of an image, whose number may be counted from the end."""

    def label(self, number: int) -> int: ...

    def name(self, number: int) -> str:
        """The name of an image for messages."""

    def close(self) -> None: ...


class Shards(Dataset, ABC):
    """The images of one split, numbered across its shards.

    A process opens a shard at the first access, and closes shards that it no longer uses.

    Attributes:
        shard_sizes: the number of images in each shard.
        digests: a text that identifies the content, for each file.
        per_file: how many consecutive shards are parts of a file, for each file; None if every shard is a file.
    """

    shard_sizes: Sequence[int]
    digests: Sequence[str]
    per_file: Sequence[int] | None = None

    def __init__(self, shard_sizes: Sequence[int], digests: Sequence[str], transform: Callable | None):
        self.shard_sizes, self.digests, self.transform = shard_sizes, digests, transform
        self.ends = list(accumulate(shard_sizes))
        self.opened: dict[int, Opened] = {}
        self.last_read: dict[int, int] = {}
        self.reads = 0
        self.last: dict[int, Image.Image] = {}

    @abstractmethod
    def _open(self, number: int) -> Opened:
        """Open a shard.

        Raises:
            InputError: it cannot be read, or is not what was listed.
        """

    def __copy__(self) -> "Shards":
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__, opened={}, last_read={}, reads=0, last={})  # open shards are not shared
        return copied

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int):
        shard, number = self._find(index)
        if index not in self.last:  # repeated augmentation loads an image several times in a row
            self.last = {index: decode(io.BytesIO(shard.content(number)))}
        image = self.last[index]
        return self.transform(image) if self.transform else image, shard.label(number)

    def name_of(self, index: int) -> str:
        """The shard of an image and its name there."""
        shard, number = self._find(index)
        return "".join(c if c.isprintable() else " " for c in shard.name(number))  # printed to a terminal

    def _find(self, index: int) -> tuple[Opened, int]:
        """The open shard of an image, and the image's number in it, counted from the end."""
        number = bisect_right(self.ends, index)
        self.reads += 1
        if number not in self.opened:
            for old in [n for n, last in self.last_read.items() if last < self.reads - KEEP_OPEN_READS]:
                self.opened.pop(old).close()
                del self.last_read[old]
            self.opened[number] = self._open(number)
        self.last_read[number] = self.reads
        return self.opened[number], index - self.ends[number]


@dataclass
class OpenTar:
    """An open tar. It is read with ``pread``, because forked processes share the position of an open file."""

    file: BinaryIO
    members: list[Member]
    shard: str

    def content(self, number: int) -> bytes:
        member = self.members[number]
        return os.pread(self.file.fileno(), member.size, member.offset)

    def label(self, number: int) -> int:
        return self.members[number].label

    def name(self, number: int) -> str:
        return f"{self.shard}: {self.members[number].name}"

    def close(self) -> None:
        self.file.close()


class ShardDataset(Shards):
    """The images of one split in the shards of WebDataset."""

    def __init__(
        self,
        data_path: str,
        is_train: bool,
        transform: Callable | None,
        cache: ShardCache | None,
        single_split: bool = False,
        choices: Choices = Choices(),  # noqa: B008  immutable
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
        if not is_remote(data_path) and not Path(data_path).is_dir():
            raise InputError(
                f"--data-path {data_path} is not a folder, an address (https://…, hf-hub:datasets/…) or a command "
                "(pipe:…)"
            )
        needed = (SPLITS[not is_train],) if single_split else SPLITS
        self.source, self.cache = data_path, cache if is_remote(data_path) else None
        if is_on_hub(data_path):
            cache.prepare()
            self.source = find_dataset(data_path, cache.folder)
            index = read_hub_index(self.source, cache.folder, needed, choices.num_classes)
        else:
            index = read_index(data_path, needed, choices.num_classes)
        if self.cache is not None:
            self.cache.check([shard.bytes for shard in (*index.train, *index.val)])
        self.classes, self.label_key = index.classes, choices.label_column or index.label_key
        self.sources = index.sources
        self.shards = index.train if is_train else index.val
        super().__init__([shard.samples for shard in self.shards], [shard.identity for shard in self.shards], transform)

    def _open(self, number: int) -> OpenTar:
        shard = self.shards[number]
        if self.cache is None:
            path = Path(self.source, shard.file)
            try:
                file = open(path, "rb", buffering=0)  # noqa: SIM115  it stays open
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror}") from error
        else:
            file = open_cached(self.cache, shard, self.source, self.sources.bytes)
        members = read_members(file, shard.file, self.label_key)
        if len(members) != shard.samples:
            raise InputError(f"{shard.file} has {len(members)} samples, {self.sources.samples} says {shard.samples}")
        highest = max(members, key=lambda member: member.label)
        if highest.label >= len(self.classes):
            raise InputError(
                f"{shard.file} has the label {highest.label} of {highest.name}, "
                f"{self.sources.classes} says {len(self.classes)} classes"
            )
        return OpenTar(file, members, shard.file)


def open_cached(cache: ShardCache, shard: Shard, source: str | HubDataset, listing: str = INDEX) -> BinaryIO:
    """Open a shard of a remote ``source``, which is downloaded if necessary; see `fetch_shard`."""
    # without a SHA-256, a shard of the same name and size elsewhere, or of another commit, is another one
    digest = shard.sha256 or hashlib.sha256(f"{source}/{shard.file}".encode()).hexdigest()
    name = f"{digest[:16]}-{shard.file.replace('/', '-')}"
    return cache.open(name, partial(fetch_shard, shard, source, listing), shard.bytes)
