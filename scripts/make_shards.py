#!/usr/bin/env python3
"""Convert train/ and val/ to WebDataset shards, in random order, for --data-set WDS.

scripts/make_shards.py --data-path imagenet --output-dir imagenet-shards
scripts/make_shards.py --index existing-shards      write only the index.json of existing shards

Images are copied without re-encoding. A second call resumes after the shards that are complete. With --index the name
of every shard, or of its folder, must contain its split (train or val); labels are in .cls files, or in .json files
under --label-key; classes.txt in the same folder lists the class names in the order of their labels, one per line;
without it the classes are named by their labels.
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
from common.files import atomic_write, read_json, remove_unfinished, sha256
from datasets import build_dataset, check_classes
from options import at_least, local_path, place_or_none, positive
from pipeline.folders import SPLITS, files_below, is_hidden, summary
from pipeline.shard_index import CLASSES, INDEX, Shard, parse_index, read_names, split_of
from pipeline.shards import read_members
from samplers import derived_seed, shuffled
from training.command_line import Parser

from tqdm import tqdm

READERS = 16  # concurrent reads, a compromise between disks and network file systems


class Picture(NamedTuple):
    """An image file and its name in a shard."""

    path: str
    bytes: int
    name: str  # class/file.jpg
    label: int


# ---------------------------------------------------------------------------------------------------------------------
# From folders
# ---------------------------------------------------------------------------------------------------------------------


def pictures_of(root: str, split: str, seed: int) -> tuple[list[Picture], list[str]]:
    """The images of a split in random order, and the class names.

    The name of an image in a shard is its key and the suffix; keys are unique, without a dot in the last component.
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


def split_by_size(pictures: Sequence[Picture], limit: float) -> Iterator[list[Picture]]:
    """Lists of pictures for shards of ``limit`` bytes, exceeded by at most one image."""
    shard, size = [], 0
    for picture in pictures:
        shard.append(picture)
        size += picture.bytes + 2048  # two headers, the label, padding
        if size >= limit:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def tars_of(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.tar") if not is_hidden(path.name)]


def tars_below(folder: Path) -> list[Path]:
    return [Path(path) for path in files_below(str(folder)) if path.endswith(".tar")]


def contents_of(pictures: Sequence[Picture]) -> list[tuple[str, int]]:
    """Names and sizes of the members of a shard."""
    sizes = ((p.name, p.bytes, str(p.label)) for p in pictures)
    return [member for name, size, label in sizes for member in ((name, size), (label_name(name), len(label)))]


def label_name(image: str) -> str:
    return image.rpartition(".")[0] + ".cls"


def is_written(path: Path, pictures: Sequence[Picture]) -> bool:
    """Whether a shard exists with these names and sizes; files are written atomically, so it is complete."""
    try:
        with tarfile.open(path, "r:") as tar:
            return [(entry.name, entry.size) for entry in tar] == contents_of(pictures)
    except (OSError, tarfile.TarError):
        return False


def write_shard(path: Path, pictures: Sequence[Picture], pool: ThreadPoolExecutor) -> None:
    """Write images and labels; the same pictures give the same bytes."""
    with atomic_write(path) as unfinished, tarfile.open(unfinished, "w") as tar:
        for picture, content in zip(pictures, pool.map(lambda p: Path(p.path).read_bytes(), pictures), strict=True):
            for name, data in ((picture.name, content), (label_name(picture.name), str(picture.label).encode())):
                entry = tarfile.TarInfo(name)  # without owner and time
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def make_shards(args: argparse.Namespace) -> None:
    """Write the shards of both splits, then their index."""
    start = time.monotonic()
    folder, splits, done = Path(args.output_dir), {}, 0
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    for split in SPLITS:
        pictures, classes = pictures_of(args.data_path, split, args.seed)
        lists = split_by_size(pictures, args.shard_mb * 1e6)
        splits[split] = {folder / f"{split}-{i:06}.tar": pictures for i, pictures in enumerate(lists)}
    if others := sorted(set(tars_of(folder)) - {path for split in splits.values() for path in split}):
        raise InputError(
            f"--output-dir {folder} holds {others[0].name}, which is not one of these shards: expected a new folder"
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
                entries[split].append(entry_of(path, len(pictures), folder))
                bar.update(len(pictures))
    write_index(folder, classes, entries)
    seconds = time.monotonic() - start
    print(f"{done:,} images written, {total - done:,} existed, in {seconds:.1f} s: {done / seconds:,.0f} images/s")


# ---------------------------------------------------------------------------------------------------------------------
# The index
# ---------------------------------------------------------------------------------------------------------------------


def entry_of(path: Path, samples: int, folder: Path) -> dict:
    """The entry of a shard in the index of ``folder``."""
    return Shard(path.relative_to(folder).as_posix(), samples, path.stat().st_size, sha256(path))._asdict()


def write_index(
    folder: Path, classes: Sequence[str], entries: dict[str, list[dict]], label_key: str | None = None
) -> None:
    content = {"version": 1, "classes": list(classes), "label_key": label_key, **entries}
    parse_index(content, str(folder / INDEX))
    with atomic_write(folder / INDEX) as unfinished:
        Path(unfinished).write_text(json.dumps(content, indent=1))
    for split, shards in entries.items():
        samples, size = (sum(shard[key] for shard in shards) for key in ("samples", "bytes"))
        print(f"{split}: {samples:,} images of {len(classes)} classes in {len(shards)} shards, {size:,} bytes")


def index_shards(folder: Path, label_key: str | None) -> None:
    """Write the index of existing shards.

    Args:
        label_key: of the label in .json members; see `read_members`.

    Raises:
        InputError: there are no shards, one is damaged, the classes of the two splits differ, or there is an index of
            another program, which would be lost.
    """
    if (folder / INDEX).is_file() and "version" not in read_json(folder / INDEX):
        raise InputError(f"{folder / INDEX} is of another program: --data-set WDS may read it; to replace it, move it")
    entries, labels = {split: [] for split in SPLITS}, {split: set() for split in SPLITS}
    for path in tqdm(sorted(tars_below(folder)), unit="shards", disable=None):
        split = split_of(path.relative_to(folder).as_posix())
        if split is None:
            raise InputError(f"{path} has neither train nor val in its name: expected the split")
        with open(path, "rb", buffering=0) as file:
            members = read_members(file, path.name, label_key)
        entries[split].append(entry_of(path, len(members), folder))
        labels[split].update(member.label for member in members)
    for split in SPLITS:
        if not entries[split]:
            raise InputError(f"--index {folder} has no shards named {split}: expected train or val in every name")
    highest = max(max(of_split) for of_split in labels.values())
    listed = folder / CLASSES
    classes = read_names(listed if listed.is_file() else None, highest + 1)
    if len(classes) <= highest:
        raise InputError(f"{listed} names {len(classes)} classes, but there are labels up to {highest}")
    names = [{classes[label] for label in labels[split]} for split in SPLITS]
    check_classes(folder, *names, places=SPLITS)
    if empty := [name for name in classes if name not in names[0]]:
        raise InputError(
            f"--index {folder} has no images of {len(empty)} of {len(classes)} classes, such as {empty[0]}"
        )
    write_index(folder, classes, entries, label_key)


def main(argv: Sequence[str]) -> int:
    p = Parser("make_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--data-path", type=place_or_none, help="folder with train/ and val/, each with one folder per class"
    )
    p.add_argument("--output-dir", type=place_or_none, help="folder for the shards")
    p.add_argument("--shard-mb", type=positive, default=100, help="size of a shard in MB")
    p.add_argument("--seed", type=at_least(0), default=0, help="of the random order")
    p.add_argument("--index", type=local_path, metavar="FOLDER", help="write only the index of existing shards")
    p.add_argument("--label-key", metavar="KEY", help="… whose labels are in .json files, under this key")
    try:
        args = p.parse_args(argv)
        if args.index is not None:
            index_shards(args.index, args.label_key)
        elif args.label_key is not None:
            raise InputError("--index is missing: --label-key is about existing shards")
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
