"""The archive of a study's logs: reproducible bytes, reading in memory alone, and the comparison with results.csv."""

import gzip
import io
import json
import tarfile
from pathlib import Path

from common.errors import InputError
from study import archive
from study.archive import check_rows, read_archive, write_archive
from study.results import Row

import pytest


def write_log(path: Path, accuracies: dict[int, float]) -> Path:
    """A log.txt: epoch → accuracy."""
    path.write_text("".join(json.dumps({"epoch": e, "test_acc1": a}) + "\n" for e, a in accuracies.items()))
    return path


def packed(*entries: tarfile.TarInfo, content: bytes = b"") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for entry in entries:
            entry.size = len(content) if entry.isreg() else 0
            tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def test_same_files_give_the_same_bytes(tmp_path):
    texts = {"runs/b/1/0/log.txt": "{}\n", "runs/a/1/0/args.yaml": "lr: 0.1\n", "runs/ä/1/0/log.txt": "é"}
    for order, name in ((sorted(texts), "first"), (sorted(texts, reverse=True), "second")):
        write_archive(tmp_path / f"{name}.tar.gz", {key: texts[key].encode() for key in order})
    assert (tmp_path / "first.tar.gz").read_bytes() == (tmp_path / "second.tar.gz").read_bytes()
    assert read_archive(tmp_path / "first.tar.gz") == texts
    with tarfile.open(tmp_path / "first.tar.gz") as tar:
        assert {(entry.mtime, entry.uid, entry.uname) for entry in tar} == {(0, 0, "")}
        assert tar.getnames() == sorted(texts)


def link(name: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return entry


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"no archive", "cannot be read"),
        (packed(tarfile.TarInfo("a"), content=bytes(5000))[:60], "cannot be read"),
        (packed(tarfile.TarInfo("../a")), "holds '../a'"),
        (packed(tarfile.TarInfo("/a")), "holds '/a'"),
        (packed(link("a")), "holds 'a'"),
        (packed(tarfile.TarInfo("a"), content=b"\xff"), "cannot be read"),
        (gzip.compress(bytes(10**6)), "unpacks to more than 100,000 bytes"),
    ],
    ids=("empty", "text", "cut off", "parent folder", "absolute path", "link", "not text", "large"),
)
def test_other_files_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(archive, "LIMIT", 100_000)
    path = tmp_path / "runs.tar.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_archive(path)
    assert "\n" not in str(error.value)
    assert [*tmp_path.iterdir()] == [path]


def row(**changes: object) -> Row:
    values = dict(group="LeTs+ a", kind="vit", method="LeTs+", data="A", size="L1-H1", seed=0, epochs=1, accuracy=50.0)
    return Row(**values | dict(macs=0.0, parameters=1, stored_parameters=1) | changes)


def test_rows_are_compared_with_the_logs(tmp_path):
    files = {
        "runs/LeTs+_a/L1-H1/1/0/log.txt": write_log(tmp_path / "1", {-1: 20.0, 0: 50.0}),
        "runs/LeTs+_a/L1-H1/10/0/log.txt": write_log(tmp_path / "10", {-1: 20.0, 9: 70.0}),
        "runs/teacher/16/0/log.txt": write_log(tmp_path / "16", {15: 90.0}),
    }
    path = tmp_path / "runs.tar.gz"
    write_archive(path, {name: log.read_bytes() for name, log in files.items()})
    teacher = row(group="teacher", kind="teacher", size="", epochs=16, accuracy=90.0)
    check_rows(path, [row(), row(epochs=10, accuracy=70.0), row(epochs=0, accuracy=20.0), teacher])
    for wrong, found in ((row(accuracy=51.0), "50.0"), (row(seed=1), "missing"), (row(epochs=2), "missing")):
        with pytest.raises(
            InputError, match=rf"LeTs\+ a L1-H1, .* has accuracy {found} in its log, but {wrong.accuracy}"
        ):
            check_rows(path, [wrong])
