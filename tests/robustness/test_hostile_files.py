"""Damaged and hostile files: each is read correctly or refused in one sentence, in little memory, and nothing runs.

Every format has readers and mutated files: cut off, bits flipped, blocks overwritten, and, where the format has names
and shapes, tensors missing, added, reshaped, emptied, not finite, or declared far larger than the file. They are read
in a process of its own, which reports how each read ended and how much its memory grew.
"""

import io
import json
import random
import resource
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import models
from common.files import read_yaml
from models.learngene import save_published

import pytest
import torch
from conftest import ENVIRONMENT, PYTHONPATH
from hostile_files import FORMATS, mutate_bytes

COUNT, FEW = 240, 30  # mutated files of each format: of all tests, and of those that run first
SECONDS = 120  # after which a file counts as one that hangs its reader


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Hang(BaseException):
    """Not an Exception: no reader may take it for what is wrong with the file."""


def hang(*_) -> None:
    raise Hang("the reader hangs")


def read_all(name: str, folder: Path) -> dict:
    """Read the mutated files of a format: how often what happened, and the growth of memory in bytes."""
    read = FORMATS[name].reader()
    good = read(folder / "good")  # which also imports what reading needs
    signal.signal(signal.SIGALRM, hang)
    before = peak()
    ends = {"read": 0, "refused": 0, "wrong": []}
    for path in sorted((folder / "bad").iterdir()):
        signal.alarm(SECONDS)
        try:
            found = read(path)
            ends["read"] += 1
            # a flipped bit can make a consistent file of another size, but not one of other parts
            if isinstance(good, models.Learngene) and found.tensors.keys() != good.tensors.keys():
                ends["wrong"].append(f"{path.name}: read as {found}")
        except models.InputError as error:
            ends["refused"] += 1
            if "\n" in str(error) or len(str(error)) > 1500:
                ends["wrong"].append(f"{path.name}: {str(error)[:2000]}")
        except (Exception, Hang) as error:
            ends["wrong"].append(f"{path.name}: {type(error).__name__}: {str(error)[:300]}")
        signal.alarm(0)
    return {**ends, "grown": peak() - before}


def read_large(path: Path) -> dict:
    """The growth of memory by reading a learngene, and by making a small Des-Net of it."""
    before = peak()
    models.load_learngene(path).descend("deit_base_patch16_224_L1_H1")
    return {"grown": peak() - before}


def read_bomb(path: Path) -> dict:
    """What is said of a file that is no learngene, and the growth of memory by reading it."""
    before = peak()
    try:
        models.load_learngene(path)
    except models.InputError as error:
        return {"said": str(error), "grown": peak() - before}
    return {"said": "read", "grown": peak() - before}


def in_a_process(*arguments: str) -> dict:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, "PYTHONPATH": PYTHONPATH})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_read_or_refused(name, tmp_path, all_tests):
    count = COUNT if all_tests else FEW
    structural = FORMATS[name].make(tmp_path)
    good = (tmp_path / "good").read_bytes()
    (tmp_path / "bad").mkdir()
    for seed in range(count):
        rng = random.Random(seed)
        mutant = mutate_bytes(good, rng) if seed % 2 else structural(rng)
        (tmp_path / "bad" / f"{seed:03}").write_bytes(mutant if seed else b"")
    found = in_a_process(name, str(tmp_path))
    assert found["wrong"] == []
    assert found["read"] + found["refused"] == count
    assert found["refused"] > count // 4  # the mutations do harm
    assert found["grown"] < 2 * len(good) + 500 * 10**6


def second_directory(archive: bytes) -> bytes:
    """A zip archive with a harmless directory where Python looks, before the end record, which points to the other."""
    end = archive.rindex(b"PK\5\6")
    size, begin = struct.unpack("<II", archive[end + 12 : end + 20])
    harmless = bytearray(archive[begin : begin + size])
    at = 0
    while at < size:
        harmless[at + 10 : at + 12] = bytes(2)  # stored
        harmless[at + 20 : at + 28] = struct.pack("<II", 4, 4)  # bytes, compressed and not
        at += 46 + sum(struct.unpack("<HHH", harmless[at + 28 : at + 34]))
    return archive[:end] + harmless + archive[end:]


def bombs() -> dict[str, bytes]:
    """Small files that would fill the memory of a reader that trusts them."""
    large = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(2**26)}}, large)  # 256 MiB
    packed = io.BytesIO()
    with zipfile.ZipFile(large) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    return {
        "bytearray": b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R.",
        "compressed": packed.getvalue(),
        "directories": second_directory(packed.getvalue()),
        "base-60": b"lr: " + b"1:" * 200_000 + b"1\n",
    }


@pytest.fixture(scope="module")
def bomb_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bombs")
    for name, content in bombs().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["bytearray", "compressed", "directories"])
def test_bombs_are_refused_before_they_grow(bomb_files, name):
    found = in_a_process("bomb", str(bomb_files / name))
    assert "refused" in found["said"] or "damaged" in found["said"]
    assert found["grown"] < 10**8


def test_yaml_that_takes_quadratic_time_is_refused(bomb_files):
    with pytest.raises(models.InputError, match="a value of more than 1000 characters"):
        read_yaml(bomb_files / "base-60")


@pytest.mark.full
def test_memory_for_a_learngene_of_published_size(tmp_path):
    gene = models.Learngene.of(models.create_aux_net("deit_small_patch16_224_L8", "deit_base_patch16_224_L16_H12"))
    gene.save(tmp_path / "own")
    save_published(gene, tmp_path / "published")
    for path in (tmp_path / "own", tmp_path / "published"):
        found = in_a_process("large", str(path))
        assert found["grown"] < 2 * path.stat().st_size + 500 * 10**6


if __name__ == "__main__":
    name, path = sys.argv[1], Path(sys.argv[2])
    readers = {"large": read_large, "bomb": read_bomb}
    print(json.dumps(readers[name](path) if name in readers else read_all(name, path)))
