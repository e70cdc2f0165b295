"""Remote shards, and the folder in which they are kept."""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit

from common.download import download_file
from common.errors import InputError
from common.files import flush_to_disk
from common.hub_datasets import ON_HUB
from samplers import LANES

from filelock import FileLock, Timeout

COMMAND = "pipe:"  # a data path that is a command line
RETRY_SECONDS = (1, 5, 25)  # delays between download attempts: object stores limit the request rate
KEPT = (".tar", ".arrow")  # suffixes of shards
# what there is of a shard while it is fetched, and after the process was killed
PARTIAL = re.compile(r"(.+\.(?:tar|arrow))\.(?:part|parquet|room)(?:\.hub|\.version)?")


def is_remote(data_path: str) -> bool:
    return data_path.startswith(("http://", "https://", COMMAND, ON_HUB))


def shard_source(data_path: str, name: str) -> str:
    """The address of a file of a remote data path, or the command that writes the file to standard output."""
    if data_path.startswith(COMMAND):
        return data_path.removeprefix(COMMAND).replace("{}", shlex.quote(name))
    parts = urlsplit(data_path)  # keeps a query such as a signature at the end
    return parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()


def download_shard(data_path: str, name: str, to: Path) -> None:
    """Download the file ``name`` of an address or a command to ``to``.

    Raises:
        InputError: the download or the command failed.
    """
    source = shard_source(data_path, name)
    if not data_path.startswith(COMMAND):
        return download_file(source, to, shown=False)
    if source == data_path.removeprefix(COMMAND):
        raise InputError(f"--data-path {data_path} has no {{}}, the placeholder for the name of a file")
    with open(to, "wb") as file:
        done = subprocess.run(source, shell=True, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE)
    if done.returncode != 0:
        output = done.stderr.decode(errors="replace").strip()[-300:] or "no output"
        found = f"exited with status {done.returncode}: {source} ({output})"
        raise InputError(f"--data-path: the command for {name} {found}")


def retry(fetch: Callable[[], None]) -> None:
    """Call ``fetch`` until it succeeds, at most once more than there are `RETRY_SECONDS`.

    Raises:
        InputError: of the last attempt.
    """
    for wait in (*RETRY_SECONDS, None):
        try:
            return fetch()
        except InputError as error:
            if wait is None or is_permanent(error):
                raise
            time.sleep(wait)


def is_permanent(error: InputError) -> bool:
    """Whether the server denied the file, so that retrying is useless."""
    cause = error.__cause__
    status = cause.code if isinstance(cause, HTTPError) else getattr(getattr(cause, "response", None), "status_code", 0)
    return status in (401, 403, 404, 410)


class Kept(NamedTuple):
    """A shard in the cache, or what a killed process has left of one; the first to be evicted is the smallest."""

    used: int
    bytes: int
    name: str
    paths: list[Path]


@dataclass
class ShardCache:
    """A local cache of shards, shared by the processes of this host and by later runs.

    Attributes:
        limit: bytes, with what is being fetched; the least recently opened shards are evicted. Processes that have one
            open can still read it.
    """

    folder: Path
    limit: int

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            InputError: it is not writable.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise InputError(f"--shard-cache {self.folder} cannot be written: {error.strerror}") from error

    def check(self, sizes: Sequence[int], besides: int = 0) -> None:
        """Check that shards of ``sizes`` in bytes can be read through the cache.

        Args:
            besides: bytes that fetching one takes for a while.

        Raises:
            InputError: the folder is too small, or not writable.
        """
        total, largest = sum(sizes) + besides, max(sizes)
        least = min(total, 2 * LANES * largest)
        if self.limit < least:
            raise InputError(
                f"--shard-cache-gb {self.limit / 1e9:g} is too little: shards of up to {largest / 1e6:.4g} MB, "
                f"of which {LANES} are read at a time, need {least / 1e9:.4g}"
            )
        self.prepare()
        try:
            with FileLock(self.folder / "room.lock"):
                free = shutil.disk_usage(self.folder).free + sum(kept.bytes for kept in self._contents()[0])
        except OSError as error:
            raise InputError(f"--shard-cache {self.folder} cannot be written: {error.strerror}") from error
        if free < min(total, self.limit):
            raise InputError(
                f"--shard-cache {self.folder} has room for {free / 1e9:.4g} GB, {min(total, self.limit) / 1e9:.4g} are "
                f"needed: --shard-cache-gb takes a smaller number, from {least / 1e9:.4g}"
            )

    def open(self, name: str, fetch: Callable[[Path], None], size: int) -> BinaryIO:
        """Open the shard that is kept under ``name``.

        Args:
            fetch: writes it to a path, if it is not there. What an earlier attempt left at the path may be resumed.
            size: bytes that fetching takes, for which room is made before.

        Raises:
            InputError: it cannot be fetched or stored.
        """
        path = self.folder / name
        try:
            while True:
                try:
                    file = open(path, "rb", buffering=0)  # noqa: SIM115  it stays open
                except FileNotFoundError:
                    self._fetch(path, fetch, size)
                else:
                    with suppress(OSError):  # a file of another user: its time stays
                        os.utime(file.fileno())
                    return file
        except OSError as error:
            raise InputError(f"--shard-cache {self.folder} cannot store {name}: {error.strerror}") from error

    def _fetch(self, path: Path, fetch: Callable[[Path], None], size: int) -> None:
        part, room = (path.with_name(f"{path.name}.{suffix}") for suffix in ("part", "room"))
        with FileLock(f"{path}.lock"):  # other processes wait, and then find the shard
            if path.exists():
                return
            try:
                with FileLock(self.folder / "room.lock"):
                    self._make_room(size, path.name)
                    room.write_text(str(size))
                fetch(part)
            finally:
                room.unlink(missing_ok=True)
            flush_to_disk(part)
            with FileLock(self.folder / "room.lock"):
                self._make_room(part.stat().st_size, path.name)
                os.replace(part, path)

    def _contents(self, own: str = "") -> tuple[list[Kept], int]:
        """What can be evicted, of all data paths, and the bytes of what processes are fetching, but for ``own``."""
        kept, partial, fetched = [], {}, 0
        for path in self.folder.iterdir():
            if match := PARTIAL.fullmatch(path.name):
                partial.setdefault(match[1], []).append(path)
            elif path.suffix in KEPT:
                kept.append(Kept(*used_and_bytes([path]), path.name, [path]))
        partial.pop(own, None)
        for name, paths in partial.items():
            used, size = used_and_bytes(paths)
            try:
                with FileLock(self.folder / f"{name}.lock", timeout=0):
                    kept.append(Kept(used, size, name, paths))
            except (Timeout, OSError):  # a process has it, or it is of another user
                fetched += max(size, self._reserved(name))
        return kept, fetched

    def _reserved(self, name: str) -> int:
        """Bytes that the process that fetches a shard has made room for."""
        try:
            return int((self.folder / f"{name}.room").read_text())
        except (OSError, ValueError):
            return 0

    def _make_room(self, size: int, own: str) -> None:
        """Evict what was used the longest ago until ``size`` bytes fit in, for the shard ``own``."""
        kept, fetched = self._contents(own)
        kept.sort(reverse=True)
        total = size + fetched + sum(one.bytes for one in kept)
        while kept and total > self.limit:
            oldest = kept.pop()
            if [path.name for path in oldest.paths] == [oldest.name]:
                oldest.paths[0].unlink()
            else:
                self._remove_partial(oldest)
            total -= oldest.bytes

    def _remove_partial(self, partial: Kept) -> None:
        """Remove what a killed process has left, unless another one has just begun to go on with it."""
        with suppress(Timeout), FileLock(self.folder / f"{partial.name}.lock", timeout=0):
            for path in partial.paths:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def used_and_bytes(paths: Sequence[Path]) -> tuple[int, int]:
    """(time of last use, bytes) of files and folders, some of which another process may be removing."""
    below = (Path(folder, name) for path in paths for folder, _, names in os.walk(path) for name in names)
    used = size = 0
    for path in (*paths, *below):
        with suppress(FileNotFoundError):
            found = path.stat()
            used, size = max(used, found.st_mtime_ns), size + (0 if path.is_dir() else found.st_size)
    return used, size
