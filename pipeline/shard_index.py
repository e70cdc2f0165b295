"""Which shards a data set has: index.json of scripts/make_shards.py, and the indexes of other programs.

index.json lists the shards, which are WebDataset's (`pipeline.shards`), with the names of the classes:

    {"version": 1, "classes": ["n01440764", …], "label_key": null,
     "train": [{"file": "train-000000.tar", "samples": 1000, "bytes": 110000000, "sha256": "…"}, …], "val": […]}

``label_key`` is the key of the label in the .json member of a sample, or null where the labels are .cls members. Two
others are read in a folder and on the Hub: index.json of the package wids, and _info.json, which timm reads. Neither
names the classes: classes.txt beside them does, or --nb-classes says how many there are.
"""

import hashlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError, one_line
from common.files import read_json, sha256
from common.hub_datasets import HubDataset, HubFile, download_to, small_file
from pipeline.folders import SPLITS
from pipeline.shard_cache import download_shard, is_remote, retry, shard_source

INDEX, INFO, CLASSES = "index.json", "_info.json", "classes.txt"
SHARD_NAME = re.compile(r"(\w[\w.+=-]*/)*\w[\w.+=-]*\.tar", re.ASCII)
NAMES_OF_SPLITS = (("train", "training"), ("val", "validation", "valid", "test"))


class Shard(NamedTuple):
    """An entry of the index."""

    file: str
    samples: int
    bytes: int
    sha256: str


class Index(NamedTuple):
    """The names of the classes in the order of their labels, the shards of the two splits, and the key of labels."""

    classes: list[str]
    train: list[Shard]
    val: list[Shard]
    label_key: str | None = None


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
        index = Index(content["classes"], train, val, content.get("label_key"))
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{source} is not an index of shards ({one_line(error)}): scripts/make_shards.py writes one"
        ) from error
    classes = index.classes
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or not classes or len(set(classes)) < len(classes):
        raise InputError(f"{source} names no classes, or one twice: expected a list of different names")
    if not isinstance(index.label_key, str | None):
        raise InputError(f"{source} has a label_key that is no text: expected the key of labels in .json, or null")
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


def read_index(data_path: str, needed: Sequence[str] = SPLITS, num_classes: int | None = None) -> Index:
    """Read the index of ``--data-path``: a folder, an address or a command.

    Args:
        needed: the splits that must have shards.
        num_classes: how many classes there are, for an index of another program that does not name them.

    Raises:
        InputError: it is missing or invalid, or the shards of a folder are missing or have other sizes.
    """
    if is_remote(data_path):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, INDEX)
            download_shard(data_path, INDEX, path)
            return parse_index(read_json(path), shard_source(data_path, INDEX), needed)
    folder = Path(data_path)

    def local(name: str) -> Path | None:
        return folder / name if (folder / name).is_file() else None

    def listed(name: str) -> HubFile | None:
        path = local(name) or local(name.rpartition("/")[2])
        return path and HubFile(path.relative_to(folder).as_posix(), path.stat().st_size, None)

    index = find_index(data_path, local, listed, needed, num_classes)
    if index is None:
        if next(folder.rglob("*.tar"), None) is not None:
            raise InputError(f"--data-path {folder} has no {INDEX}: scripts/make_shards.py --index {folder} writes it")
        raise InputError(
            f"--data-path {folder} has no {INDEX}: expected a folder that scripts/make_shards.py has written"
        )
    for shard in (shard for split in needed for shard in getattr(index, split)):
        try:
            size = (folder / shard.file).stat().st_size
        except OSError as error:
            raise InputError(f"{folder / shard.file} cannot be read: {error.strerror}") from error
        if size != shard.bytes:
            raise InputError(f"{folder / shard.file} has {size:,} bytes, {INDEX} says {shard.bytes:,}")
    return index


def read_hub_index(
    dataset: HubDataset, folder: Path, needed: Sequence[str] = SPLITS, num_classes: int | None = None
) -> Index:
    """`read_index` of a data set on the Hub; small files are kept in ``folder``."""

    def listed(name: str) -> HubFile | None:
        return dataset.file(name) or next((file for file in dataset.files if file.path.endswith(f"/{name}")), None)

    index = find_index(str(dataset), lambda name: small_file(dataset, name, folder), listed, needed, num_classes)
    if index is None:
        raise InputError(f"{dataset} has neither {INDEX} nor {INFO}: download it, and scripts/make_shards.py --index")
    return index


# ---------------------------------------------------------------------------------------------------------------------
# Of other programs
# ---------------------------------------------------------------------------------------------------------------------


def find_index(
    where: str,
    read: Callable[[str], Path | None],
    listed: Callable[[str], HubFile | None],
    needed: Sequence[str],
    num_classes: int | None,
) -> Index | None:
    """The index of a folder or a data set, of whichever program; None if there is none.

    Args:
        where: the folder or data set, for messages.
        read: the local path of a small file, or None.
        listed: path, size and SHA-256 of a shard, as far as they are known, or None.
        needed, num_classes: see `read_index`.
    """
    name = next((name for name in (INDEX, INFO) if read(name)), None)
    if name is None:
        return None
    content, source = read_json(read(name)), f"{where.rstrip('/')}/{name}"
    if name == INDEX and not (isinstance(content, dict) and "wids_version" in content):
        return parse_index(content, source, needed)
    try:
        shards, label_key = shards_of_wids(content) if name == INDEX else shards_of_timm(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{source} does not list shards as expected ({one_line(error)})") from error
    entries = {split: [] for split in SPLITS}
    for split, file, samples in shards:
        if split not in needed:
            continue
        found = listed(file)
        if found is None:
            raise InputError(f"{source} lists {file[:100]}, which is not there")
        digest = found.sha256 or hashlib.sha256(f"{file} {found.bytes} {samples}".encode()).hexdigest()
        entries[split].append(Shard(found.path, samples, found.bytes, digest)._asdict())
    names = read_names(read(CLASSES), num_classes)
    if names is None:
        raise InputError(f"--nb-classes is missing: {source} does not name the classes, and there is no {CLASSES}")
    return parse_index({"version": 1, "classes": names, "label_key": label_key, **entries}, source, needed)


def read_names(path: Path | None, num_classes: int | None) -> list[str] | None:
    """The names of the classes, one a line in a file, or numbers; None if nothing is known of them."""
    if path is not None:
        return path.read_text(encoding="utf-8").splitlines()
    return None if num_classes is None else [str(label) for label in range(num_classes)]


def shards_of_timm(content: Mapping) -> tuple[list[tuple[str, str, int]], str | None]:
    """(split, file, samples) of each shard in timm's _info.json, and the key of labels in .json members."""
    shards, key = [], None
    for split, names in zip(SPLITS, NAMES_OF_SPLITS, strict=True):
        info = next((content["splits"][name] for name in names if name in content["splits"]), None)
        if info is not None:
            key = info.get("alt_label") or key
            shards += [(split, *shard) for shard in zip(info["filenames"], info["shard_lengths"], strict=False)]
    return shards, key


def shards_of_wids(content: Mapping) -> tuple[list[tuple[str, str, int]], None]:
    """(split, file, samples) of each shard in an index of wids: one list, or one for each of several data sets."""
    shards = []
    for part in content.get("datasets") or [content]:
        for entry in part["shardlist"]:
            url = entry["url"]
            split = split_of(f"{part.get('name', '')}/{url.rpartition('/')[2]}") or split_of(url)
            if split is None:
                raise InputError(f"the index of wids lists {url[:100]}: expected train or val in every name")
            file = url.rpartition("/")[2] if "://" in url else url.removeprefix("./")
            shards.append((split, file, entry["nsamples"]))
    return shards, None


def split_of(name: str) -> str | None:
    """The split that the name of a shard, or of its folder, contains."""
    return next((split for split in SPLITS if split in name), None)


# ---------------------------------------------------------------------------------------------------------------------
# Remote shards
# ---------------------------------------------------------------------------------------------------------------------


def fetch_shard(shard: Shard, source: str | HubDataset, to: Path) -> None:
    """Download a shard, and compare it with the index.

    Args:
        source: an address, a command or a data set of the Hub.

    Raises:
        InputError: it cannot be downloaded, or differs from the index.
    """

    def fetch() -> None:
        if isinstance(source, HubDataset):
            download_to(source, shard.file, to)
            check_received(to, shard, f"{source}/{shard.file}")
        else:
            download_shard(source, shard.file, to)
            check_received(to, shard, shard_source(source, shard.file))

    retry(fetch)


def check_received(path: Path, shard: Shard, source: str) -> None:
    """Raises InputError, and removes the file, unless size and SHA-256 are those of the index."""
    size, digest = path.stat().st_size, sha256(path)
    if (size, digest) != (shard.bytes, shard.sha256):
        path.unlink()
        found = "other" if size == shard.bytes else f"{size:,}"
        raise InputError(f"{source} gave {found} bytes of {shard.file} than the {shard.bytes:,} of {INDEX}")
