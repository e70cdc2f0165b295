"""Images in Parquet files: data sets of the Hugging Face Hub, and folders of the same format.

The row groups are the shards of `samplers.shuffled`. A file from the Hub, or any file where there is a cache, is
unpacked into it as an Arrow file, which all processes of the host map into their memory: a row group of Parquet can
only be read as a whole. Without a cache, each process holds the row groups that it reads.
"""

import hashlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError, one_line
from common.hub_datasets import HubFile
from pipeline.folders import SPLITS
from pipeline.hub_layout import Columns, choose_columns, choose_split, files_of_splits, is_image, read_card
from pipeline.parquet_files import FilesOnHub, LocalFiles, open_files
from pipeline.shard_cache import ShardCache
from pipeline.shards import Choices, Shards
from samplers import LANES

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

HELD_LIMIT = 2**30  # bytes of row groups that a process holds without a cache
IMAGE, LABEL = "image", "label"  # columns of an unpacked file
ROW_BYTES = 16  # of a row in an unpacked file, besides its image


# ---------------------------------------------------------------------------------------------------------------------
# What the files hold
# ---------------------------------------------------------------------------------------------------------------------


class File(NamedTuple):
    """A Parquet file of a split.

    Attributes:
        identity: changes with the content, or its place.
        digest: of size and footer, on this machine and on the Hub alike.
        rows, bytes: of each row group: how many images, and how many bytes they have altogether.
        labels: the smallest and the largest; None if the file does not say it.
    """

    path: str
    identity: str
    digest: str
    rows: list[int]
    bytes: list[int]
    labels: tuple[int, int] | None


@contextmanager
def damage_of(name: str) -> Iterator[None]:
    """What pyarrow raises for a damaged file as InputError."""
    try:
        yield
    except InputError:
        raise
    except (pa.ArrowException, OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{name} is damaged or no Parquet file: {one_line(error)}") from error


def parse_file(
    source: LocalFiles | FilesOnHub, file: HubFile, footer: pq.FileMetaData, content: bytes, columns: Columns
) -> File:
    """What a footer says about the columns.

    Args:
        content: the bytes of the footer.

    Raises:
        InputError: one of them is missing, or of another type than in the first file.
    """
    name, schema = source.name_of(file.path), footer.schema.to_arrow_schema()
    paths = [footer.schema.column(i).path for i in range(footer.num_columns)]
    for column in (columns.bytes, columns.label):
        if column not in paths:
            raise InputError(f"{name} has no column {column}: expected the columns of the other files")
    check_type(schema, columns.label, pa.types.is_integer, "labels in whole numbers", name)
    check_type(schema, columns.image, is_image, "the bytes of images", name)
    image, label = paths.index(columns.bytes), paths.index(columns.label)
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)] if footer.num_rows else []
    if not all(group.num_rows for group in groups):
        raise InputError(f"{name} has an empty row group: expected images")
    found = [group.column(label).statistics for group in groups]
    labels = None
    if found and all(of_group is not None and of_group.has_min_max for of_group in found):
        labels = min(of_group.min for of_group in found), max(of_group.max for of_group in found)
    return File(
        file.path,
        source.identity(file.path),
        hashlib.sha256(b"%d " % file.bytes + content).hexdigest(),
        [group.num_rows for group in groups],
        [group.column(image).total_uncompressed_size for group in groups],
        labels,
    )


def check_type(schema: pa.Schema, column: str, fits: Callable[[pa.DataType], bool], expected: str, name: str) -> None:
    """Raises InputError if a column of the file ``name`` is not as in the first file, from which it was chosen."""
    found = schema.field(column).type
    if not fits(found):
        raise InputError(
            f"{name} has a column {column} of type {str(found)[:60]}: expected {expected}, as in the other files"
        )


class Split(NamedTuple):
    """The files of a split, and what the first of them says about the columns."""

    name: str
    files: list[File]
    columns: Columns


def read_split(source: LocalFiles | FilesOnHub, splits: dict, card: dict, is_train: bool, choices: Choices) -> Split:
    """The split to train on, or to evaluate on, from the footers of its files.

    Raises:
        InputError: there is none, its columns cannot be used, or a file is damaged.
    """
    origin = f"--data-path {source}"
    name = choose_split(splits, is_train, choices.train_split if is_train else choices.val_split, origin)
    paths = set(splits[name])
    files = sorted(file for file in source.files if file.path in paths)
    contents, columns, parsed = source.footers(files), None, []
    for file, content in zip(files, contents, strict=True):
        with damage_of(source.name_of(file.path)):
            footer = pq.read_metadata(pa.BufferReader(content))
            schema = footer.schema.to_arrow_schema()
        if columns is None:  # the card may be wrong, too: no damage of the file
            columns = choose_columns(schema, card, choices.image_column, choices.label_column, origin)
        with damage_of(source.name_of(file.path)):
            parsed.append(parse_file(source, file, footer, content, columns))
    if not any(file.rows for file in parsed):
        raise InputError(f"{origin} has no images in its split {name}")
    return Split(name, [file for file in parsed if file.rows], columns)


def classes_of(splits: Sequence[Split], num_classes: int | None, origin: str) -> list[str]:
    """The names of the classes: of the label's feature, or else numbers.

    Raises:
        InputError: the splits differ, there are labels without a class, or nothing says how many classes there are.
    """
    names = splits[0].columns.names
    if any(split.columns.names != names for split in splits):
        raise InputError(f"{origin} has other classes in its split {splits[1].name} than in {splits[0].name}")
    known = [(file.labels, split) for split in splits for file in split.files if file.labels is not None]
    complete = len(known) == sum(len(split.files) for split in splits)
    if names is None and num_classes is None and not complete:
        raise InputError(f"--nb-classes is missing: {origin} does not say how many classes it has")
    count = num_classes if names is None else len(names)
    if count is None:
        count = 1 + max(largest for (_, largest), _ in known)
    for (smallest, largest), split in known:
        if smallest < 0 or largest >= count:
            wrong = smallest if smallest < 0 else largest
            what = "images without a label" if smallest < 0 else f"a label that none of its {count} classes has"
            raise InputError(
                f"{origin} has {what} in its split {split.name}: {wrong}, expected 0 to {count - 1}; --hf-train-split "
                "and --hf-val-split name other splits"
            )
    return [str(label) for label in range(count)] if names is None else names


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_group(file: pq.ParquetFile, group: int, columns: Columns, name: str) -> pa.RecordBatch:
    """A row group as (image: large_binary, label: int64).

    Raises:
        InputError: it is damaged, or an image has no label.
    """
    with damage_of(name):
        table = file.read_row_group(group, [columns.bytes, columns.label], use_threads=False)
        images, labels = table.column(columns.image), table.column(columns.label)
        if pa.types.is_struct(images.type):  # of one field
            images = pc.struct_field(images, 0)
        images, labels = images.cast(pa.large_binary()).combine_chunks(), labels.cast(pa.int64()).combine_chunks()
    if labels.null_count:
        raise InputError(f"{name} has {labels.null_count} images without a label in the column {columns.label}")
    if images.null_count == len(images):
        raise InputError(f"{name} has no images in the column {columns.image}: only their paths, or nothing")
    batches = pa.table({IMAGE: images, LABEL: labels}).combine_chunks().to_batches()
    return batches[0]


def unpack(source: LocalFiles | FilesOnHub, file: File, columns: Columns, to: Path) -> None:
    """Write the row groups of a file to ``to`` as an Arrow file.

    Raises:
        InputError: the file cannot be fetched, is damaged, or cannot be written.
    """
    name = source.name_of(file.path)
    path = source.fetch(file.path, to.with_suffix(".parquet"))
    schema = pa.schema({IMAGE: pa.large_binary(), LABEL: pa.int64()})
    try:
        with open_parquet(path, name) as parquet, open(to, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for group in range(len(file.rows)):
                writer.write_batch(read_group(parquet, group, columns, name))
    finally:
        if isinstance(source, FilesOnHub):
            os.unlink(path)


@contextmanager
def open_parquet(path: Path, name: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; ``name`` is for messages."""
    with damage_of(name):
        file = pq.ParquetFile(path, pre_buffer=False)
    with file:
        yield file


class OpenGroup:
    """A row group, in memory or mapped from an unpacked file."""

    def __init__(self, batch: pa.RecordBatch, file: str, first_row: int):
        self.images, self.labels = batch.column(IMAGE), batch.column(LABEL)
        self.file, self.first_row = file, first_row

    def _row(self, number: int) -> int:
        return number % len(self.images)

    def content(self, number: int) -> bytes:
        buffer = self.images[self._row(number)].as_buffer()
        if buffer is None:
            raise ValueError("the row holds no image")
        return buffer.to_pybytes()

    def label(self, number: int) -> int:
        return self.labels[self._row(number)].as_py()

    def name(self, number: int) -> str:
        return f"{self.file}: row {self.first_row + self._row(number)}"

    def close(self) -> None:
        """Nothing to do: the memory is freed with the object."""


class ParquetDataset(Shards):
    """The images of one split of a data set of the Hub, whose shards are the row groups of its files.

    Attributes:
        origin: a text that says what was found where.
    """

    def __init__(
        self,
        data_path: str,
        is_train: bool,
        transform: Callable | None,
        cache: ShardCache | None,
        single_split: bool,
        choices: Choices,
    ):
        """
        Args:
            cache: of unpacked files; without one, files must be in a folder.
            single_split: whether the other split may be missing.

        Raises:
            InputError: the data set cannot be found or used, or the cache is missing or too small.
        """
        self.source, self.cache = open_files(data_path, cache), cache
        card = read_card(self.source.card())
        names = [file.path for file in self.source.files]
        splits = files_of_splits(names, card, f"--data-path {self.source}")
        needed = (SPLITS[not is_train],) if single_split else SPLITS
        found = {split: read_split(self.source, splits, card, split == "train", choices) for split in needed}
        own = found[SPLITS[not is_train]]
        self.files, self.columns = own.files, own.columns
        self.classes = classes_of([*found.values()], choices.num_classes, f"--data-path {self.source}")
        self.places = [(file, group) for file in self.files for group in range(len(file.rows))]
        self.per_file = [len(file.rows) for file in self.files]
        rows = [count for file in self.files for count in file.rows]
        super().__init__(rows, [file.digest for file in self.files], transform)
        self.origin = (
            f"{self.source} (split {own.name}, columns {self.columns.image} and {self.columns.label}, files: "
            f"{len(self.files)})"
        )
        if cache is None:
            self._check_memory()
        else:
            files = [file for split in found.values() for file in split.files]
            fetched = max(self.source.bytes_to_fetch(file.path) for file in files)
            cache.check([unpacked_size(file) for file in files], fetched)

    def _check_memory(self) -> None:
        """Raises InputError if the row groups that a process reads at a time would take much memory."""
        sizes = [size for file in self.files for size in file.bytes]
        held = min(LANES, len(sizes)) * max(sizes)
        if held > HELD_LIMIT:
            raise InputError(
                f"--shard-cache is missing: --data-path {self.source} has row groups of up to {max(sizes) / 1e6:.4g} "
                f"MB, of which each data worker would hold {held / 1e9:.4g} GB; it unpacks them to a folder"
            )

    def _open(self, number: int) -> OpenGroup:
        file, group = self.places[number]
        name = self.source.name_of(file.path)
        if self.cache is None:
            with open_parquet(self.source.root / file.path, name) as parquet:
                batch = read_group(parquet, group, self.columns, name)
        else:
            batch = self._unpacked(file, group)
        if len(batch) != file.rows[group]:
            raise InputError(f"{name} has {len(batch)} rows in row group {group}, its footer says {file.rows[group]}")
        labels = pc.min_max(batch.column(LABEL)).as_py()
        if labels["min"] < 0 or labels["max"] >= len(self.classes):
            wrong = labels["min"] if labels["min"] < 0 else labels["max"]
            raise InputError(f"{name} has the label {wrong}, expected 0 to {len(self.classes) - 1}")
        return OpenGroup(batch, name, sum(file.rows[:group]))

    def _unpacked(self, file: File, group: int) -> pa.RecordBatch:
        """A row group of a file in the cache, into which the file is unpacked first if it is not there."""
        content = f"{file.identity} {self.columns.bytes} {self.columns.label}"
        name = f"{hashlib.sha256(content.encode()).hexdigest()[:16]}-{Path(file.path).stem}.arrow"
        size = unpacked_size(file) + self.source.bytes_to_fetch(file.path)  # both are there while it is unpacked
        with self.cache.open(name, partial(unpack, self.source, file, self.columns), size) as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        with damage_of(str(self.cache.folder / name)):
            return pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped))).get_batch(group)


def unpacked_size(file: File) -> int:
    """Bytes that a file takes in the cache, about."""
    return sum(file.bytes) + ROW_BYTES * sum(file.rows)
