"""WebDataset shards: written from folders, read from this machine, a server and a command, and their order."""

import io
import os
import shutil
import tarfile
from collections import Counter
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

from common.errors import InputError
from common.files import sha256
from datasets import build_dataset
from pipeline import shards
from pipeline.loader import CheckedLoader, SeededDataset, collate
from pipeline.shard_cache import ShardCache
from pipeline.shard_index import Shard
from pipeline.shards import open_cached
from samplers import LANES, ExactSampler, TrainSampler, derived_seed, shuffled
from scripts import make_shards

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from shard_fixtures import (  # noqa: F401
    COUNTS,
    SCRIPT,
    SUFFIXES,
    Server,
    change,
    copy,
    folder,
    images_of,
    index_of,
    server,
    sharded,
    shards_of,
)
from torch.utils.data import DataLoader

# ---------------------------------------------------------------------------------------------------------------------
# Written
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_have_the_files_of_the_folder(folder, sharded, split):
    """Byte for byte, each before its label, under names that begin with a key of its own."""
    found, keys, classes = Counter(), [], index_of(sharded)["classes"]
    assert classes == [f"c.{label}" for label in range(10)]
    for shard in shards_of(sharded, split):
        path = sharded / shard.file
        assert (path.stat().st_size, sha256(path)) == (shard.bytes, shard.sha256)
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            assert len(members) == 2 * shard.samples
            assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
            for image, label in zip(members[::2], members[1::2], strict=True):
                keys.append(label.name.removesuffix(".cls"))
                assert "." not in keys[-1].rpartition("/")[2]
                assert image.name.removeprefix(keys[-1]) in (".jpeg", ".png", ".jpg", ".bmp")
                number = int(tar.extractfile(label).read())
                assert image.name.startswith(classes[number] + "/digit-")
                found[tar.extractfile(image).read(), number] += 1
    files = (path for path in (folder / split).rglob("*.*") if path.is_file())
    assert found == Counter((path.read_bytes(), int(path.parent.name[2:])) for path in files)
    assert len(set(keys)) == len(keys) == COUNTS[split]


def test_classes_are_mixed(sharded):
    for shard in shards_of(sharded, "train"):
        with tarfile.open(sharded / shard.file) as tar:
            assert shard.samples < 12 or len({name.partition("/")[0] for name in tar.getnames()}) > 3


def test_writing_goes_on_where_it_was_ended(folder, sharded, tmp_path, capsys):
    options = ["--data-path", str(folder), "--shard-mb", "0.04", "--output-dir"]
    shutil.copytree(sharded, tmp_path / "again")
    (tmp_path / "again" / "index.json").unlink()
    (tmp_path / "again" / "train-000003.tar").unlink()
    changed = tmp_path / "again" / "val-000001.tar"
    changed.write_bytes(changed.read_bytes()[:3000])
    assert make_shards.main([*options, str(tmp_path / "again")]) == 0
    count = shards_of(sharded, "train")[3].samples + shards_of(sharded, "val")[1].samples
    assert f"{count} images written, {380 - count} existed" in capsys.readouterr().out
    for path in sharded.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert make_shards.main([*options, str(tmp_path / "other"), "--seed", "1"]) == 0
    assert shards_of(tmp_path / "other", "train") != shards_of(sharded, "train")
    assert images_of("WDS", tmp_path / "other", True) == images_of("WDS", sharded, True)
    fewer = ["--data-path", str(folder), "--output-dir", str(tmp_path / "again")]
    capsys.readouterr()
    assert make_shards.main(fewer) == 2
    assert "train-000001.tar, which is not one of these shards" in capsys.readouterr().err


@pytest.mark.parametrize("classes", [None, "classes.txt"])
def test_index_of_shards_of_others(copy, sharded, classes):
    """Their names differ, there are other files in the samples, and nobody has counted."""
    (copy / "index.json").unlink()
    with pytest.raises(InputError, match=r"no index.json: scripts/make_shards.py --index .*copy writes it"):
        build_dataset("WDS", str(copy), True, None)
    for path in [*copy.glob("*.tar")]:
        path.rename(path.with_name(f"imagenet-{path.name.replace('val', 'validation')}"))
    with tarfile.open(copy / "imagenet-train-000000.tar", "a") as tar:
        for name, content in (
            ("a/more.json", b"{}"),
            ("a/more.PNG", png()),
            ("a/more.seg.png", b"x"),
            ("a/more.cls", b"7\n"),
        ):
            add(tar, name, content)
    if classes:
        (copy / classes).write_text("".join(f"c.{label}\n" for label in range(10)))
    assert make_shards.main(["--index", str(copy)]) == 0
    assert index_of(copy)["classes"] == [f"c.{label}" if classes else str(label) for label in range(10)]
    more = images_of("WDS", copy, True) - images_of("WDS", sharded, True)
    assert [label for _, label in more.elements()] == [7]
    assert images_of("WDS", copy, False) == images_of("WDS", sharded, False)


def png(size: int = 2) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size)).save(file, "PNG")
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def write(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            add(tar, name, content)
    return path


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "no shards named train"),
        (
            lambda path: write(path / "train-0.tar", ("a.png", png()), ("a.cls", b"0")),
            "no shards named val",
        ),
        (lambda path: write(path / "x.tar"), "x.tar has neither train nor val in its name"),
        (lambda path: write(path / "val-0.tar", ("a.png", png())), r"1 image\(s\) and 0 label\(s\) of a"),
        (lambda path: write(path / "val-0.tar", ("a.cls", b"0")), r"0 image\(s\) and 1 label\(s\) of a"),
        (lambda path: write(path / "val-0.tar", ("a.png", b""), ("a.cls", b"-1")), r"label b'-1' in a.cls"),
        (lambda path: (path / "val-0.tar").write_bytes(bytes(range(256)) * 4), "val-0.tar is damaged"),
        (lambda path: (path / "classes.txt").write_text("a\n") and make_two(path, 0, 1), "names 1 classes, but"),
        (lambda path: make_two(path, 0, 1), "1 classes in train and 1 in val; the first that is in one alone is 0"),
        (lambda path: make_two(path, 1, 1), "no images of 1 of 2 classes, such as 0"),
    ],
)
def test_shards_of_others_that_cannot_be_used(tmp_path, capsys, prepare, message):
    prepare(tmp_path)
    assert make_shards.main(["--index", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    with pytest.raises(InputError, match=message):
        raise InputError(error)
    assert not (tmp_path / "index.json").exists()


def make_two(path: Path, *labels: int) -> None:
    for split, label in zip(("train", "val"), labels, strict=True):
        write(path / f"{split}-0.tar", ("a.png", png()), ("a.cls", b"%d" % label))


# ---------------------------------------------------------------------------------------------------------------------
# Read
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_are_those_of_the_folder(folder, sharded, server, tmp_path, split):
    expected, cache = images_of("FOLDER", folder, split == "train"), ShardCache(tmp_path / "cache", 10**9)
    assert images_of("WDS", sharded, split == "train") == expected
    server.asked.clear()
    assert images_of("WDS", server.address, split == "train", cache) == expected
    assert sorted(server.asked) == sorted(["index.json", *(shard.file for shard in shards_of(sharded, split))])
    # what the server gave serves the command, too
    shutil.copy(sharded / "index.json", tmp_path)
    assert images_of("WDS", f"pipe:cat {tmp_path}/{{}}", split == "train", cache) == expected
    other = ShardCache(tmp_path / "other", 10**9)
    assert images_of("WDS", f"pipe:cat {sharded}/{{}}", split == "train", other) == expected


def test_room_is_made_by_the_shard_that_was_used_the_longest_ago(sharded, server, tmp_path):
    """One that is open stays readable, and is fetched again by the next who needs it."""
    first, second, third = shards_of(sharded, "train")[:3]
    cache = ShardCache(tmp_path, first.bytes + second.bytes + third.bytes - 1)
    content = (sharded / first.file).read_bytes()
    server.asked.clear()

    def read(shard: Shard) -> bytes:
        with open_cached(cache, shard, server.address) as file:
            return file.read()

    with open_cached(cache, first, server.address) as file:
        read(second)
        read(first)
        read(third)
        assert [path.name[17:] for path in sorted(tmp_path.glob("*.tar"))] == sorted([first.file, third.file])
        read(second)
        assert [path.name[17:] for path in sorted(tmp_path.glob("*.tar"))] == sorted([third.file, second.file])
        assert file.read() == content
    assert read(first) == content
    assert server.asked == [shard.file for shard in (first, second, third, second, first)]


def test_room_is_made_before_fetching_and_counts_what_others_fetch(tmp_path):
    """Each takes 40 bytes while it is fetched, and 30 afterwards."""
    cache, seen = ShardCache(tmp_path, 100), []

    def there() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("*.arrow*") if path.suffix != ".lock")

    def fetch(path: Path, inner: str = "") -> None:
        if inner:
            cache.open(f"{inner}.arrow", fetch, 40).close()
        seen.append(there())
        path.write_bytes(bytes(30))

    for name in "abc":
        cache.open(f"{name}.arrow", fetch, 40).close()
    assert seen == [["a.arrow.room"], ["a.arrow", "b.arrow.room"], ["a.arrow", "b.arrow", "c.arrow.room"]]
    seen.clear()
    cache.open("d.arrow", partial(fetch, inner="e"), 40).close()
    assert seen == [["d.arrow.room", "e.arrow.room"], ["d.arrow.room", "e.arrow"]]
    assert there() == ["d.arrow", "e.arrow"]


def test_what_a_killed_process_has_left_counts_and_is_evicted_unless_another_goes_on(tmp_path):
    left = ["a.tar.part", "a.tar.part.version", "b.arrow.parquet", "c.arrow.parquet.hub/x/y.incomplete", "d.tar.part"]
    for age, name in enumerate(left):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10))
        for place in (path, *(parent for parent in path.parents if tmp_path in parent.parents)):
            os.utime(place, (age + 1, age + 1))
    (tmp_path / "owner--name--files.json").write_text("{}")
    (tmp_path / "room.arrow.room").write_text("?")

    def names() -> set[str]:
        return {path.name for path in tmp_path.iterdir()} & {name.partition("/")[0] for name in left}

    with FileLock(tmp_path / "a.tar.lock"):  # a process goes on with it
        ShardCache(tmp_path, 75).open("e.tar", lambda path: path.write_bytes(bytes(30)), 30).close()
        assert names() == {*left[:2], "c.arrow.parquet.hub", "d.tar.part"}
        ShardCache(tmp_path, 55).open("f.tar", lambda path: path.write_bytes(bytes(30)), 30).close()
        assert names() == set(left[:2])
    ShardCache(tmp_path, 30).open("g.tar", lambda path: path.write_bytes(bytes(30)), 30).close()
    assert names() == set()
    assert (tmp_path / "owner--name--files.json").exists()
    assert [path.name for path in tmp_path.glob("*.tar")] == ["g.tar"]


def test_a_process_closes_shards_that_it_leaves(sharded, monkeypatch):
    monkeypatch.setattr(shards, "KEEP_OPEN_READS", 4)
    dataset, _ = build_dataset("WDS", str(sharded), True, None)
    first, others = dataset.shard_sizes[0], len(dataset.shard_sizes) - 1
    begins = np.cumsum([0, *dataset.shard_sizes])
    for number in range(others):
        assert dataset[0][0].size == (8, 8)  # comes back every time
        dataset[int(begins[number + 1])]
        assert len(dataset.opened) <= 4
    assert first == dataset.ends[0]
    assert 0 in dataset.opened


def test_unreadable_images_are_named_and_can_be_passed_over(copy, capsys):
    names = [shard.file for shard in shards_of(copy, "train")]
    content = bytearray((copy / names[1]).read_bytes())
    with tarfile.open(copy / names[1]) as tar:
        member = tar.getmembers()[2]
    content[member.offset_data : member.offset_data + member.size] = bytes(member.size)
    (copy / names[1]).write_bytes(content)
    dataset, _ = build_dataset("WDS", str(copy), True, lambda image: torch.zeros(1))
    bad = f"{names[1]}: {member.name}"
    for skipped in (0, 1):
        seeded = SeededDataset(dataset, skipped)
        loader = DataLoader(seeded, 20, sampler=TrainSampler(320, 20), num_workers=2, collate_fn=collate)
        batches = CheckedLoader(loader, bool(skipped), torch.device("cpu"))
        if skipped:
            assert sum(len(labels) for _, labels in batches) == 320
            assert batches.skipped == 1
            assert f"warning: {bad} (" in capsys.readouterr().err
        else:
            with pytest.raises(InputError, match=f"^{bad} .* cannot be read as an image: --skip-bad-images goes on"):
                list(batches)


# ---------------------------------------------------------------------------------------------------------------------
# The order
# ---------------------------------------------------------------------------------------------------------------------

SIZES = [[1], [7], [1, 1], [5, 1, 9], [10] * 7, [3, 50, 2, 2, 41], [16] * 100, [13] * 200 + [5]]


@pytest.mark.parametrize("lanes", [1, 2, 3, 8, LANES])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)} shards")
def test_each_lane_reads_shard_after_shard(sizes, lanes):
    order, number = shuffled(sizes, 3, lanes).tolist(), min(lanes, len(sizes))
    assert sorted(order) == list(range(sum(sizes)))
    assert order == shuffled(sizes, 3, lanes).tolist()
    assert sum(sizes) < 10 or order != shuffled(sizes, 4, lanes).tolist()
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    visits = 0
    for lane in range(number):
        visited = [shard for shard, _ in groupby(shard_of[order[lane::number]])]
        assert len(set(visited)) == len(visited)  # no way back
        visits += len(visited)
    assert visits <= len(sizes) + number - 1  # only where two lanes meet a shard is read by both
    if len(set(sizes)) == 1 and number > 1:
        assert all(a != b for a, b in pairwise(shard_of[order]))


def test_a_data_set_in_one_piece_is_permuted_as_before():
    sampler = TrainSampler(100, 1, seed=7)
    sampler.set_position(2)
    generator = torch.Generator().manual_seed(derived_seed(7, 2))
    assert [index for index, _ in sampler] == torch.randperm(100, generator=generator).tolist()


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_processes_need_few_shards_of_each_other(world_size, repeats):
    sizes = [30] * 192
    samplers = [TrainSampler(sum(sizes), 24, repeats, 1, rank, world_size, sizes) for rank in range(world_size)]
    needed = [{index // 30 for index, _ in sampler} for sampler in samplers]
    every = set.union(*needed)
    assert sum(map(len, needed)) <= (1.5 if repeats == 1 else 2.5) * len(every)
    tested = [{index // 30 for index in ExactSampler(sum(sizes), rank, world_size)} for rank in range(world_size)]
    assert sum(map(len, tested)) < 192 + world_size
