"""The archives of a study: runs.tar.gz with log.txt, args.yaml and run.json of every finished run, and weights.tar.gz.

The same files give the same bytes: entries are sorted, and times and owners are left out.
"""

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from common.errors import InputError, one_line
from common.files import atomic_write
from study.results import Row, slug

ARCHIVE = "runs.tar.gz"
WEIGHTS_ARCHIVE = "weights.tar.gz"  # of finished runs that others wait for
LIMIT = 2**28  # bytes of an unpacked archive; 500 runs take a hundredth of it


def write_archive(path: Path, files: Mapping[str, bytes], level: int = 9) -> None:
    """Write an archive atomically. ``files`` maps names to contents; ``level`` is that of gzip."""
    with atomic_write(path) as unfinished, open(unfinished, "wb") as file:  # noqa: SIM117
        with gzip.GzipFile("", "wb", level, fileobj=file, mtime=0) as packed:
            with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
                for name in sorted(files):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(files[name])
                    tar.addfile(entry, io.BytesIO(files[name]))


def read_archive(path: Path) -> dict[str, str]:
    """The texts of an archive by their names. Nothing is written to the disk.

    Raises:
        InputError: the file is missing, is not such an archive, or unpacks to more than `LIMIT` bytes.
    """
    try:
        return {name: content.decode() for name, content in read_files(path).items()}
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}): expected the archive of a study") from error


def read_files(path: Path) -> dict[str, bytes]:
    """The contents of an archive by their names. Nothing is written to the disk.

    Raises:
        InputError: see `read_archive`.
    """
    try:
        with gzip.open(path) as packed:
            content = packed.read(LIMIT + 1)
        if len(content) > LIMIT:
            raise InputError(f"{path} unpacks to more than {LIMIT:,} bytes: expected the archive of a study")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            return dict(_files(tar, path))
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read ({one_line(error)}): expected the archive of a study") from error


def _files(tar: tarfile.TarFile, path: Path) -> Iterable[tuple[str, bytes]]:
    for entry in tar:
        name = PurePosixPath(entry.name)
        if not entry.isreg() or name.is_absolute() or ".." in name.parts:
            raise InputError(f"{path} holds {entry.name!r:.100}: expected files of runs alone")
        yield entry.name, tar.extractfile(entry).read()


def check_rows(path: Path, rows: Iterable[Row]) -> None:
    """Compare the accuracies of results.csv with the logs in an archive.

    Raises:
        InputError: a row has no log, or another accuracy than its log.
    """
    logs: dict[tuple, dict[int, str]] = {}  # group, size, seed → epochs → log
    for name, text in read_archive(path).items():
        top, *folder = PurePosixPath(name).parent.parts or [""]
        if PurePosixPath(name).name == "log.txt" and top == "runs" and len(folder) >= 3:
            group, *size, epochs, seed = folder
            logs.setdefault((group, "".join(size), seed), {})[int(epochs)] = text
    for row in rows:
        of_epochs = logs.get((slug(row.group), row.size, str(row.seed)), {})
        # the accuracy before training is in the log of the shortest run
        text = of_epochs.get(row.epochs) or (of_epochs[min(of_epochs)] if of_epochs and row.epochs == 0 else "")
        found = [line["test_acc1"] for line in map(json.loads, text.splitlines()) if line["epoch"] == row.epochs - 1]
        if found != [row.accuracy]:
            what = " ".join(filter(None, (row.group, row.size)))
            raise InputError(
                f"{path}: {what}, {row.epochs} epochs, seed {row.seed} has accuracy {found[0] if found else 'missing'} "
                f"in its log, but {row.accuracy} in results.csv: run the study again, or restore both files"
            )
