"""Damaged and hostile files: each is read correctly or refused with one line, in little memory, and nothing runs.

Every format has readers and mutated files: cut off, bits flipped, blocks overwritten, and, where the format has names
and shapes, tensors missing, added, reshaped, emptied, not finite, or declared far larger than the file. They are read
in a process of its own, which reports how each read ended and how much its memory grew.
"""

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import models
from common.files import read_yaml
from models.learngene import save_published

import pytest
import torch
from conftest import fork_server
from hostile_files import FORMATS, mutate_bytes, report

COUNT, FEW = 180, 30  # mutated files of each format: of all tests, and of those that run first


@pytest.fixture
def in_a_process(tmp_path) -> Callable[..., dict]:
    """What a process of its own reports of reading a file or many."""

    def in_a_process(name: str, path: Path) -> dict:
        result = tmp_path / "result.json"
        process = fork_server().Process(target=report, args=(name, path, result))
        process.start()
        process.join()
        assert process.exitcode == 0
        return json.loads(result.read_text())

    return in_a_process


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_read_or_refused(name, tmp_path, all_tests, in_a_process):
    count = COUNT if all_tests else FEW
    structural = FORMATS[name].make(tmp_path)
    good = (tmp_path / "good").read_bytes()
    (tmp_path / "bad").mkdir()
    for seed in range(count):
        rng = random.Random(seed)
        mutant = mutate_bytes(good, rng) if seed % 2 else structural(rng)
        (tmp_path / "bad" / f"{seed:03}").write_bytes(mutant if seed else b"")
    found = in_a_process(name, tmp_path)
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
def test_bombs_are_refused_before_they_grow(bomb_files, name, in_a_process):
    found = in_a_process("bomb", bomb_files / name)
    assert "refused" in found["said"] or "damaged" in found["said"]
    assert found["grown"] < 10**8


def test_yaml_that_takes_quadratic_time_is_refused(bomb_files):
    with pytest.raises(models.InputError, match="a value of more than 1000 characters"):
        read_yaml(bomb_files / "base-60")


@pytest.mark.full
def test_memory_for_a_learngene_of_published_size(tmp_path, in_a_process):
    gene = models.Learngene.of(models.create_aux_net("deit_small_patch16_224_L8", "deit_base_patch16_224_L16_H12"))
    gene.save(tmp_path / "own")
    save_published(gene, tmp_path / "published")
    for path in (tmp_path / "own", tmp_path / "published"):
        found = in_a_process("large", path)
        assert found["grown"] < 2 * path.stat().st_size + 500 * 10**6
