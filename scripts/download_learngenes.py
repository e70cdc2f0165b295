#!/usr/bin/env python3
"""List known learngenes, or download them.

scripts/download_learngenes.py             list the registry
scripts/download_learngenes.py NAME…       download these; existing files are not downloaded again

A registry is a YAML file like learngenes.yaml beside this script. Learngenes of this repository are not downloaded.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from common import console
from common.download import fetch
from common.errors import InputError
from common.files import atomic_write, sha256
from models.listed import DRIVE_FILE, DRIVE_FOLDER, KEYS, LIST, Entry, read_list
from options import local_path

import gdown
import torch
from filelock import FileLock

TIMEOUT = 60.0  # seconds


# ---------------------------------------------------------------------------------------------------------------------
# The registry
# ---------------------------------------------------------------------------------------------------------------------


def table(entries: Sequence[Entry]) -> str:
    """The registry as a text table; an entry takes one line per architecture."""
    rows: list[Sequence[str]] = [("name", "method", "architectures", "address", "sha256", "note")]
    for entry in entries:
        cells = {**asdict(entry), "sha256": "known" if entry.sha256 else "unknown"}
        columns = [cells[key] if key == "architectures" else [cells[key]] for key in KEYS]
        rows += zip_longest(*columns, fillvalue="")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


# ---------------------------------------------------------------------------------------------------------------------
# Fetching
# ---------------------------------------------------------------------------------------------------------------------


def fetch_entry(entry: Entry, folder: Path) -> list[Path]:
    """Download the files of an entry to ``folder``, except existing ones.

    Raises:
        InputError: a file cannot be downloaded or written, or its SHA-256 differs from the registry's.
    """
    if entry.is_here:
        print(f"{entry.source} is part of this repository")
        return [Path(entry.source)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = drive_files(entry, folder) if entry.on_drive else {folder / (entry.name + entry.suffix): ""}
        for path, drive_id in files.items():
            if path.exists():
                print(f"{path} already exists")
                check_hash(entry, path, "remove it to download it again")
            elif drive_id:
                fetch_from_drive(entry, folder, drive_id, path)
            else:
                kept = fetch(entry.source, on_hub="learngene.safetensors")
                with atomic_write(path) as unfinished:
                    shutil.copyfile(kept, unfinished)
    except OSError as error:
        raise InputError(f"--output-dir {folder} cannot be written: {error}") from error
    return [*files]


def check_hash(entry: Entry, path: Path, consequence: str) -> None:
    """Raises InputError if the registry has a SHA-256 and the file has another one."""
    if entry.sha256 and (found := sha256(path)) != entry.sha256.lower():
        raise InputError(f"{path} has the SHA-256 {found}, expected {entry.sha256} of {entry.name}: {consequence}")


def drive_files(entry: Entry, folder: Path) -> dict[Path, str]:
    """The files of an entry on Google Drive: destination → Google Drive's id."""
    options = dict(skip_download=True, quiet=True, use_cookies=False, timeout=TIMEOUT)
    with drive_errors(entry, folder):
        if match := DRIVE_FILE.match(entry.address):
            file = gdown.download(id=match[1], **options)
            return {folder / (entry.name + Path(file.path).suffix): file.id}
        files = gdown.download_folder(id=DRIVE_FOLDER.match(entry.address)[1], **options)
        if not files:  # an empty or a private folder
            raise gdown.DownloadError("the folder has no files visible to the public")
    return {folder / entry.name / file.path: file.id for file in files}


def fetch_from_drive(entry: Entry, folder: Path, drive_id: str, path: Path) -> None:
    """Download a file of Google Drive to ``path``, resuming an earlier attempt.

    A partial file is kept in torch's hub folder, like those of other downloads.
    """
    received = Path(torch.hub.get_dir(), "checkpoints", f"drive-{drive_id}")
    received.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{received}.lock"):  # gdown would resume a file that another process is writing
        with drive_errors(entry, folder):
            print(f"downloading {path} from Google Drive", file=sys.stderr)
            options = dict(resume=True, quiet=not sys.stderr.isatty(), use_cookies=False, timeout=TIMEOUT)
            gdown.download(id=drive_id, output=str(received), **options)
        try:
            check_hash(entry, received, "it is another file")
        except InputError:
            received.unlink()
            raise
        with atomic_write(path) as unfinished:
            shutil.move(received, unfinished)


@contextmanager
def drive_errors(entry: Entry, folder: Path) -> Iterator[None]:
    """Turn gdown's errors into an InputError with advice."""
    try:
        yield
    except (gdown.DownloadError, OSError) as error:
        first = error
        while cause := first.__cause__ or first.__context__:
            first = cause
        reason = " ".join(str(first).split()) or type(first).__name__
        raise InputError(
            f"{entry.name} could not be downloaded from Google Drive ({reason}): try again later, "
            f"or open {entry.address} in a browser and save the files in {folder}"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def describe(paths: Sequence[Path], head_dim: int) -> None:
    """Print a line about each learngene among the files. Raises InputError if there is none."""
    others = []
    for path in paths:
        try:
            print(f"{path}: {models.load_learngene(path, head_dim)}")
        except InputError as error:
            others.append(f"not a learngene, but kept: {error}")
    if len(others) == len(paths):
        raise InputError("; ".join(others))
    for line in others:
        print(line)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="NAME", help="learngenes to download; default: list the registry")
    p.add_argument("--registry", type=local_path, default=LIST, metavar="FILE", help="default: %(default)s")
    p.add_argument(
        "--output-dir", type=local_path, default=Path("learngenes"), metavar="DIR", help="default: %(default)s"
    )
    p.add_argument("--head-dim", type=int, default=64, help="neurons of an attention head, to read published files")
    args = p.parse_args()
    try:
        if args.head_dim < 1:  # before anything is downloaded
            raise InputError(f"--head-dim {args.head_dim} is too small: at least 1")
        entries = read_list(args.registry)
        for name in args.names:
            if name not in entries:
                raise InputError(f"{args.registry} has no learngene {name!r}: expected one of {', '.join(entries)}")
        if not args.names:
            print(table([*entries.values()]))
        for name in dict.fromkeys(args.names):
            describe(fetch_entry(entries[name], args.output_dir), args.head_dim)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    console.accept_any_text()
    sys.exit(main())
