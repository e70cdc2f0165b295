#!/usr/bin/env python3
"""Write the images of train/ and val/ as WebDataset shards, in random order, for --data-set WDS.

scripts/make_shards.py --data-path imagenet --output-dir imagenet-shards
scripts/make_shards.py --index shards-of-others     only the index.json of shards that are there

The bytes of the images stay as they are. Started again, it goes on behind the shards that are whole. With --index, the
names of the shards say of which split they are (train or val is a part of them), and classes.txt in the same folder,
one name a line in the order of the labels, names the classes; without it they are called by their labels.
"""

import argparse
import io
import json
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import console
from common.errors import InputError
from common.files import atomic_write, remove_unfinished, sha256
from datasets import build_dataset, check_classes
from options import at_least, local_path, place_or_none, positive
from pipeline.folders import SPLITS, is_hidden, summary
from pipeline.shards import INDEX, Shard, members_of, parse_index
from samplers import derived_seed, shuffled
from training.command_line import Parser

from tqdm import tqdm

READERS = 16  # files that are read at a time: more than a disk needs, less than a network's delay would take


class Picture(NamedTuple):
    """An image file of the folders, and what it is called in a shard."""

    path: str
    bytes: int
    name: str  # class/file.jpg
    label: int


# ---------------------------------------------------------------------------------------------------------------------
# From folders
# ---------------------------------------------------------------------------------------------------------------------


def pictures_of(root: str, split: str, seed: int) -> tuple[list[Picture], list[str]]:
    """The images of a split in random order, and the names of the classes.

    A name in a shard begins with a key, which must not have a dot in its last part and must not occur twice.
    """
    folder, classes = build_dataset("FOLDER", root, split == "train", None)
    print(summary(split, folder, classes, root))
    pictures, keys = [], set()
    for i in shuffled([len(folder)], derived_seed(seed, SPLITS.index(split))):
        path, label = folder.samples[i]
        inside = Path(path).relative_to(folder.root)
        base = key = (inside.parent / inside.stem.replace(".", "-")).as_posix()
        number = 1
        while key in keys:  # a.jpg beside a.png
            number += 1
            key = f"{base}-{number}"
        keys.add(key)
        pictures.append(Picture(path, Path(path).stat().st_size, key + inside.suffix.lower(), label))
    return pictures, classes


def packed(pictures: Sequence[Picture], limit: float) -> Iterator[list[Picture]]:
    """``pictures`` in lists for shards of ``limit`` bytes, or up to one image more."""
    shard, size = [], 0
    for picture in pictures:
        shard.append(picture)
        size += picture.bytes + 2048  # two headers, the label, and what fills the blocks
        if size >= limit:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def tars_of(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.tar") if not is_hidden(path.name)]


def contents_of(pictures: Sequence[Picture]) -> list[tuple[str, int]]:
    """Names and sizes of the members of a shard."""
    sizes = ((p.name, p.bytes, str(p.label)) for p in pictures)
    return [member for name, size, label in sizes for member in ((name, size), (label_name(name), len(label)))]


def label_name(image: str) -> str:
    return image.rpartition(".")[0] + ".cls"


def is_written(path: Path, pictures: Sequence[Picture]) -> bool:
    """Whether a shard is there already, by the names and sizes in it; it has appeared whole."""
    try:
        with tarfile.open(path, "r:") as tar:
            return [(entry.name, entry.size) for entry in tar] == contents_of(pictures)
    except (OSError, tarfile.TarError):
        return False


def write_shard(path: Path, pictures: Sequence[Picture], pool: ThreadPoolExecutor) -> None:
    """Write images and labels side by side; the bytes of the shard follow from them alone."""
    with atomic_write(path) as unfinished, tarfile.open(unfinished, "w") as tar:
        for picture, content in zip(pictures, pool.map(lambda p: Path(p.path).read_bytes(), pictures), strict=True):
            for name, data in ((picture.name, content), (label_name(picture.name), str(picture.label).encode())):
                entry = tarfile.TarInfo(name)  # of no owner, and of the year 1970
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def make_shards(args: argparse.Namespace) -> None:
    """The shards of both splits and, when they are whole, their index."""
    start = time.monotonic()
    folder, splits, done = Path(args.output_dir), {}, 0
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    for split in SPLITS:
        pictures, classes = pictures_of(args.data_path, split, args.seed)
        lists = packed(pictures, args.shard_mb * 1e6)
        splits[split] = {folder / f"{split}-{i:06}.tar": pictures for i, pictures in enumerate(lists)}
    if others := sorted(set(tars_of(folder)) - {path for split in splits.values() for path in split}):
        raise InputError(
            f"--output-dir {folder} holds {others[0].name}, which is not of these shards: give a new folder"
        )
    (folder / INDEX).unlink(missing_ok=True)
    entries = {split: [] for split in SPLITS}
    total = sum(len(pictures) for split in splits.values() for pictures in split.values())
    with ThreadPoolExecutor(READERS) as pool, tqdm(total=total, unit="images", disable=None) as bar:
        for split, shards in splits.items():
            for path, pictures in shards.items():
                if not is_written(path, pictures):
                    write_shard(path, pictures, pool)
                    done += len(pictures)
                entries[split].append(entry_of(path, len(pictures)))
                bar.update(len(pictures))
    write_index(folder, classes, entries)
    seconds = time.monotonic() - start
    print(f"{done:,} images written, {total - done:,} were there, in {seconds:.1f} s: {done / seconds:,.0f} images/s")


# ---------------------------------------------------------------------------------------------------------------------
# The index
# ---------------------------------------------------------------------------------------------------------------------


def entry_of(path: Path, samples: int) -> dict:
    """What the index says of a shard."""
    return Shard(path.name, samples, path.stat().st_size, sha256(path))._asdict()


def write_index(folder: Path, classes: Sequence[str], entries: dict[str, list[dict]]) -> None:
    content = {"version": 1, "classes": list(classes), **entries}
    parse_index(content, str(folder / INDEX))
    with atomic_write(folder / INDEX) as unfinished:
        Path(unfinished).write_text(json.dumps(content, indent=1))
    for split, shards in entries.items():
        samples, size = (sum(shard[key] for shard in shards) for key in ("samples", "bytes"))
        print(f"{split}: {samples:,} images of {len(classes)} classes in {len(shards)} shards, {size:,} bytes")


def index_shards(folder: Path) -> None:
    """Write the index of shards that somebody else has made.

    Raises:
        InputError: there are none, one is damaged, or the classes of the two splits differ.
    """
    entries, labels = {split: [] for split in SPLITS}, {split: set() for split in SPLITS}
    for path in tqdm(sorted(tars_of(folder)), unit="shards", disable=None):
        split = next((split for split in SPLITS if split in path.name), None)
        if split is None:
            raise InputError(f"{path} is named neither train nor val: of which split it is has to stand in its name")
        with open(path, "rb", buffering=0) as file:
            members = members_of(file, path.name)
        entries[split].append(entry_of(path, len(members)))
        labels[split].update(member.label for member in members)
    for split in SPLITS:
        if not entries[split]:
            raise InputError(f"--index {folder} has no shards whose names say {split}: both train and val are needed")
    highest = max(max(of_split) for of_split in labels.values())
    listed = folder / "classes.txt"
    classes = (
        listed.read_text(encoding="utf-8").splitlines()
        if listed.is_file()
        else [str(label) for label in range(highest + 1)]
    )
    if len(classes) <= highest:
        raise InputError(f"{listed} names {len(classes)} classes, but there are labels up to {highest}")
    names = [{classes[label] for label in labels[split]} for split in SPLITS]
    check_classes(folder, *names, places=SPLITS)
    if empty := [name for name in classes if name not in names[0]]:
        raise InputError(
            f"--index {folder} has no images of {len(empty)} of {len(classes)} classes, such as {empty[0]}"
        )
    write_index(folder, classes, entries)


def main(argv: Sequence[str]) -> int:
    p = Parser("make_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--data-path", type=place_or_none, help="the folder with train/ and val/, one folder per class in each"
    )
    p.add_argument("--output-dir", type=place_or_none, help="where the shards are written")
    p.add_argument("--shard-mb", type=positive, default=100, help="size of a shard in MB")
    p.add_argument("--seed", type=at_least(0), default=0, help="of the order")
    p.add_argument("--index", type=local_path, metavar="FOLDER", help="write only the index of shards of other makers")
    try:
        args = p.parse_args(argv)
        if args.index is not None:
            index_shards(args.index)
        elif args.data_path is None or args.output_dir is None:
            raise InputError("--data-path and --output-dir are needed, or --index")
        else:
            make_shards(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    console.accept_any_text()
    sys.exit(main(sys.argv[1:]))
