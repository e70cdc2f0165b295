"""Which shards a data set has: index.json of scripts/make_shards.py, and the indexes of other programs.

index.json lists the shards, which are WebDataset's (`pipeline.shards`), with the names of the classes:

    {"version": 1, "classes": ["n01440764", …], "label_key": null,
     "train": [{"file": "train-000000.tar", "samples": 1000, "bytes": 110000000, "sha256": "…"}, …], "val": […]}

``label_key`` is the key of the label in the .json member of a sample, or null where the labels are .cls members. Two
others are read in a folder and on the Hub: index.json of the package wids, and _info.json, which timm reads. Neither
names the classes: classes.txt beside them does, or --nb-classes says how many there are.
"""

import hashlib
import os
import re
import tempfile
from collections import defaultdict
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
SPLIT_OF_WORD = {word: split for split, words in zip(SPLITS, NAMES_OF_SPLITS, strict=True) for word in words}
DIGEST = re.compile("[0-9a-f]{64}")

Listed = tuple[str, str, int]  # split, name, samples: a shard as another program lists it


class Shard(NamedTuple):
    """An entry of the index; ``sha256`` is None if nobody says it."""

    file: str
    samples: int
    bytes: int
    sha256: str | None

    @property
    def identity(self) -> str:
        """What tells its content from that of other shards of a data set: the SHA-256, if it is known."""
        return self.sha256 or hashlib.sha256(f"{self.file} {self.bytes} {self.samples}".encode()).hexdigest()


class Sources(NamedTuple):
    """What says how many samples, bytes and classes there are, for messages."""

    samples: str = INDEX
    bytes: str = INDEX
    classes: str = INDEX


class Index(NamedTuple):
    """The names of the classes in the order of their labels, the shards of the two splits, and the key of labels."""

    classes: list[str]
    train: list[Shard]
    val: list[Shard]
    label_key: str | None = None
    sources: Sources = Sources()


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
    check_index(index, source, needed)
    for shard in (*train, *val):
        if not isinstance(shard.sha256, str) or not DIGEST.fullmatch(shard.sha256):
            raise InputError(f"{source} has no SHA-256 of {shard.file}: expected 64 hexadecimal digits")
    return index


def check_index(index: Index, source: str, needed: Sequence[str]) -> None:
    """Raises InputError unless there are classes and, of the ``needed`` splits, shards, none of them twice."""
    classes = index.classes
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or not classes or len(set(classes)) < len(classes):
        raise InputError(f"{source} names no classes, or one twice: expected a list of different names")
    if not isinstance(index.label_key, str | None):
        raise InputError(f"{source} has a label_key that is no text: expected the key of labels in .json, or null")
    names = set()
    for split, shards in zip(SPLITS, (index.train, index.val), strict=True):
        if not shards and split in needed:
            raise InputError(f"{source} has no shards of {split}: {' and '.join(needed)} are needed")
        for shard in shards:
            check_shard(shard, source)
            if shard.file in names:
                raise InputError(f"{source} names {shard.file} twice")
            names.add(shard.file)


def check_shard(shard: Shard, source: str) -> None:
    """Raises InputError unless the file name and the numbers of ``shard`` are plausible."""
    if not isinstance(shard.file, str) or not SHARD_NAME.fullmatch(shard.file):
        raise InputError(f"{source} names the shard {str(shard.file)[:100]!r}: expected a file name such as a-0.tar")
    # a sample takes at least two headers and two blocks of content
    if type(shard.samples) is not int or type(shard.bytes) is not int or not 0 < 2048 * shard.samples <= shard.bytes:
        found = f"{str(shard.samples)[:20]} samples in {str(shard.bytes)[:20]} bytes"
        raise InputError(f"{source} lists {shard.file} with {found}, which is impossible")


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
        # not Path.is_file, which raises OSError for a name that is too long
        return folder / name if os.path.isfile(folder / name) else None

    def listed(name: str) -> list[HubFile]:
        path = local(name)
        return [HubFile(name, path.stat().st_size, None)] if path else []

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
            raise InputError(f"{folder / shard.file} has {size:,} bytes, {index.sources.bytes} says {shard.bytes:,}")
    return index


def read_hub_index(
    dataset: HubDataset, folder: Path, needed: Sequence[str] = SPLITS, num_classes: int | None = None
) -> Index:
    """`read_index` of a data set on the Hub; small files are kept in ``folder``."""

    by_name = defaultdict(list)
    for file in dataset.files:
        by_name[file.path.rpartition("/")[2]].append(file)

    def listed(name: str) -> list[HubFile]:
        return [file for file in by_name[name.rpartition("/")[2]] if f"/{file.path}".endswith(f"/{name}")]

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
    listed: Callable[[str], list[HubFile]],
    needed: Sequence[str],
    num_classes: int | None,
) -> Index | None:
    """The index of a folder or a data set, of whichever program; None if there is none.

    Args:
        where: the folder or data set, for messages.
        read: the local path of a small file, or None.
        listed: the files whose paths end with a name; their SHA-256 as far as it is known.
        needed, num_classes: see `read_index`.
    """
    name = next((name for name in (INDEX, INFO) if read(name)), None)
    if name is None:
        return None
    content, source = read_json(read(name)), f"{where.rstrip('/')}/{name}"
    if name == INDEX and not (isinstance(content, dict) and "wids_version" in content):
        return parse_index(content, source, needed)
    parse = shards_of_wids if name == INDEX else shards_of_timm
    try:
        shards, label_key = parse(content, source)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{source} does not list shards as expected ({one_line(error)})") from error
    found = find_shards(shards, listed, needed, source)
    path = read(CLASSES)
    names = read_names(path, num_classes, f"{where.rstrip('/')}/{CLASSES}")
    if names is None:
        raise InputError(f"--nb-classes is missing: {source} does not name the classes, and there is no {CLASSES}")
    sources = Sources(name, "the list of files", CLASSES if path else "--nb-classes")
    index = Index(names, found["train"], found["val"], label_key, sources)
    check_index(index, source, needed)
    return index


def read_names(path: Path | None, num_classes: int | None, source: str | None = None) -> list[str] | None:
    """The names of the classes, one a line in a file, or numbers; None if nothing is known of them.

    Args:
        source: of the file, for messages; None for its path.

    Raises:
        InputError: the file cannot be read, or does not have different names in all lines.
    """
    if path is None:
        return None if num_classes is None else [str(label) for label in range(num_classes)]
    source = source or str(path)
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        found = f"{error.object[error.start]:#04x} at byte {error.start}"
        raise InputError(f"{source} is not UTF-8 ({found}): expected the name of a class in each line") from error
    while names and not names[-1].strip():
        names.pop()
    lines: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise InputError(f"{source} has no name in line {number}: expected the name of a class in each line")
        if lines.setdefault(name, number) != number:
            found = f"{name[:60]!r} in lines {lines[name]} and {number}"
            raise InputError(f"{source} has {found}: expected different names")
    if not names:
        raise InputError(f"{source} is empty: expected the name of a class in each line")
    return names


def find_shards(
    shards: Sequence[Listed], listed: Callable[[str], list[HubFile]], needed: Sequence[str], source: str
) -> dict[str, list[Shard]]:
    """The shards of each of the ``needed`` splits, with the paths of their files.

    Args:
        listed: see `find_index`.
        source: of the list, for messages.

    Raises:
        InputError: a shard is not there, or several files may be it, or one file may be two shards.
    """
    entries, taken = {split: [] for split in SPLITS}, {}
    for split, name, samples in shards:
        tails = tails_of(name)
        tail, files = next(((tail, files) for tail in tails if (files := listed(tail))), ("", []))
        if len(files) > 1:  # the name itself, not its end
            files = [file for file in files if file.path == name.removeprefix("./")] or files
        if len(files) == 1 and is_of_other_split(files[0].path, tail, split):
            files = []
        if len(files) == 1:
            path = files[0].path
            if path in taken:  # also by a split that is not needed: one of the two would be read as the other
                found = f"{taken[path]!r} and {name[:100]!r}, but there is only {path} for both"
                raise InputError(f"{source} lists {found}: expected a file of each")
            taken[path] = name[:100]
        if split not in needed:
            continue
        if not tails:
            raise InputError(f"{source} names the shard {str(name)[:100]!r}: expected a file name such as a-0.tar")
        if len(files) != 1:
            found = f"may be {files[0].path} or {files[1].path}: expected one file" if files else "is not there"
            raise InputError(f"{source} lists {name[:100]!r}, which {found}")
        digest = files[0].sha256
        if digest is not None and not (isinstance(digest, str) and DIGEST.fullmatch(digest)):  # it names a file
            found = f"{path} with the SHA-256 {str(digest)[:70]!r}"
            raise InputError(f"the Hub lists {found} beside {source}: expected 64 hexadecimal digits")
        entries[split].append(Shard(path, samples, files[0].bytes, digest))
    return entries


def tails_of(name: object) -> list[str]:
    """The paths in the folder of an index that a shard of this name may have, the longest first.

    Of an address, or a path on another machine, the first folders say where the shards were; the others may be here.
    Empty if none is the path of a shard.
    """
    if not isinstance(name, str):
        return []
    _, is_address, rest = name.partition("://")
    path = rest.partition("?")[0] if is_address else name.removeprefix("./")
    if not is_address and not path.startswith("/") and not SHARD_NAME.fullmatch(path):
        return []
    parts = path.split("/")
    tails = ("/".join(parts[i:]) for i in range(len(parts)))
    return [tail for tail in tails if SHARD_NAME.fullmatch(tail)]


def is_of_other_split(path: str, tail: str, split: str) -> bool:
    """Whether a file that is found by the end of its path lies in a folder of another split."""
    return (word_in(tail) or split_of(tail)) is None and SPLIT_OF_WORD.get(word_in(path), split) != split


def shards_of_timm(content: Mapping, source: str) -> tuple[list[Listed], str | None]:
    """The shards in timm's _info.json, and the key of labels in .json members."""
    shards, key = [], None
    for split, names in zip(SPLITS, NAMES_OF_SPLITS, strict=True):
        info = next((content["splits"][name] for name in names if name in content["splits"]), None)
        if info is not None:
            key = info.get("alt_label") or key
            files, lengths = info["filenames"], info["shard_lengths"]
            if len(files) != len(lengths):
                found = f"{len(files)} filenames and {len(lengths)} shard_lengths of {split}"
                raise InputError(f"{source} has {found}: expected one length for each file")
            shards += [(split, *shard) for shard in zip(files, lengths, strict=True)]
    return shards, key


def shards_of_wids(content: Mapping, source: str) -> tuple[list[Listed], None]:
    """The shards in an index of wids: one list, or one for each of several data sets."""
    shards = defaultdict(list)
    for part in content.get("datasets") or [content]:
        for entry in part["shardlist"]:
            url = entry["url"]
            folders, _, file = url.rpartition("/")
            place = f"{folders}/{part.get('name', '')}/{file}"
            word = word_in(place) or split_of(place)
            if word is None:
                raise InputError(f"{source} lists {url[:100]!r}: expected train, val or test in every name")
            shards[word].append((url, entry["nsamples"]))
    chosen = []
    for split, names in zip(SPLITS, NAMES_OF_SPLITS, strict=True):  # as in timm's: test only where there is no val
        word = next((name for name in names if name in shards), "")
        chosen += [(split, *shard) for shard in shards[word]]
    return chosen, None


def word_in(path: str) -> str | None:
    """The first of `NAMES_OF_SPLITS` in a path, of its last part that has one."""
    for part in reversed(path.split("/")):
        for word in SPLIT_OF_WORD:
            if re.search(rf"(?<![a-zA-Z]){word}", part):  # not as in latest and retrieval
                return word
    return None


def split_of(name: str) -> str | None:
    """The split that the name of a shard, or of its folder, contains."""
    return next((split for split in SPLITS if split in name), None)


# ---------------------------------------------------------------------------------------------------------------------
# Remote shards
# ---------------------------------------------------------------------------------------------------------------------


def fetch_shard(shard: Shard, source: str | HubDataset, listing: str, to: Path) -> None:
    """Download a shard, and compare it with the index.

    Args:
        source: an address, a command or a data set of the Hub.
        listing: what says how many bytes it has, for messages.

    Raises:
        InputError: it cannot be downloaded, or differs from the index.
    """

    def fetch() -> None:
        if isinstance(source, HubDataset):
            download_to(source, shard.file, to)
            check_received(to, shard, f"{source}/{shard.file}", listing)
        else:
            download_shard(source, shard.file, to)
            check_received(to, shard, shard_source(source, shard.file), listing)

    retry(fetch)


def check_received(path: Path, shard: Shard, source: str, listing: str) -> None:
    """Raises InputError, and removes the file, unless the size, and the SHA-256 if it is known, are the listed ones."""
    size = path.stat().st_size
    if size != shard.bytes or (shard.sha256 is not None and sha256(path) != shard.sha256):
        path.unlink()
        found = "other" if size == shard.bytes else f"{size:,}"
        raise InputError(f"{source} gave {found} bytes of {shard.file} than the {shard.bytes:,} of {listing}")
