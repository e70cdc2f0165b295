"""Where the Parquet files of a data set are: in a folder, or on the Hugging Face Hub."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from common.errors import InputError
from common.files import atomic_write
from common.hub_datasets import ON_HUB, EndReader, HubDataset, HubFile, download_to, find_dataset, small_file
from pipeline.folders import files_below
from pipeline.shard_cache import ShardCache, retry

from filelock import FileLock

MAGIC = b"PAR1"  # at both ends of a file
END = 2**16  # bytes that are read first: most footers fit into them
FOOTER_LIMIT = 2**28  # bytes
READERS = 16  # concurrent reads of footers


class LocalFiles:
    """Parquet files below a folder."""

    def __init__(self, root: Path):
        self.root = root
        paths = (Path(path) for path in files_below(str(root)) if path.endswith(".parquet"))
        self.files = [HubFile(path.relative_to(root).as_posix(), path.stat().st_size, None) for path in paths]

    def __str__(self) -> str:
        return str(self.root)

    def card(self) -> Path | None:
        path = self.root / "README.md"
        return path if path.is_file() else None

    def footers(self, files: Sequence[HubFile]) -> list[bytes]:
        return [read_footer(file, self._read_end, self.name_of(file.path)) for file in files]

    def _read_end(self, file: HubFile, count: int) -> bytes:
        try:
            with open(self.root / file.path, "rb") as opened:
                opened.seek(file.bytes - count)
                return opened.read(count)
        except OSError as error:
            raise InputError(f"{self.root / file.path} cannot be read: {error.strerror}") from error

    def name_of(self, path: str) -> str:
        return str(self.root / path)

    def identity(self, path: str) -> str:
        """A text that changes with the content of a file."""
        place = (self.root / path).resolve()
        return f"{place} {place.stat().st_size} {place.stat().st_mtime_ns}"

    def bytes_to_fetch(self, path: str) -> int:
        return 0

    def fetch(self, path: str, to: Path) -> Path:
        """The path of a file of the data set; nothing is written to ``to``."""
        return self.root / path


class FilesOnHub:
    """Parquet files of a data set on the Hub; footers and README.md are kept in ``folder``."""

    def __init__(self, dataset: HubDataset, folder: Path):
        self.dataset, self.folder = dataset, folder
        self.files = [file for file in dataset.files if file.path.endswith(".parquet")]

    def __str__(self) -> str:
        return str(self.dataset)

    def card(self) -> Path | None:
        return small_file(self.dataset, "README.md", self.folder)

    def footers(self, files: Sequence[HubFile]) -> list[bytes]:
        kept = [self.folder / f"{self.identity(file.path)}.footer" for file in files]
        with FileLock(self.folder / "footers.lock"):  # other processes wait, and then find them
            missing = [(file, path) for file, path in zip(files, kept, strict=True) if not path.is_file()]
            if missing:
                read_end = EndReader(self.dataset)
                with ThreadPoolExecutor(READERS) as pool:
                    contents = pool.map(lambda m: read_footer(m[0], read_end, self.name_of(m[0].path)), missing)
                    for (_, path), content in zip(missing, contents, strict=True):
                        with atomic_write(path) as unfinished:
                            Path(unfinished).write_bytes(content)
        return [path.read_bytes() for path in kept]

    def name_of(self, path: str) -> str:
        return f"{self.dataset}/{path}"

    def identity(self, path: str) -> str:
        """A name of the content of a file."""
        return self.dataset.file(path).sha256 or hashlib.sha256(self.name_of(path).encode()).hexdigest()

    def bytes_to_fetch(self, path: str) -> int:
        return self.dataset.file(path).bytes

    def fetch(self, path: str, to: Path) -> Path:
        """Download a file of the data set to ``to``."""
        retry(partial(download_to, self.dataset, path, to))
        return to


def names_dataset(data_path: str) -> bool:
    """Whether ``--data-path`` of HF can only be a data set on the Hub."""
    return data_path.startswith(ON_HUB) or not (Path(data_path).is_dir() or data_path.startswith((".", "/", "~")))


def open_files(data_path: str, cache: ShardCache | None) -> LocalFiles | FilesOnHub:
    """The Parquet files of ``--data-path``: a folder, or the name of a data set on the Hub.

    Raises:
        InputError: it is neither, or has no Parquet files.
    """
    if not data_path.startswith(ON_HUB) and Path(data_path).is_dir():
        files = LocalFiles(Path(data_path))
    elif not names_dataset(data_path):
        raise InputError(f"--data-path {data_path} is not a folder: expected one, or the OWNER/NAME of a data set")
    elif cache is None:
        raise InputError(
            f"--shard-cache is missing: --data-path {data_path} is no folder, and a data set of the Hub needs one for "
            "its files"
        )
    else:
        cache.prepare()
        files = FilesOnHub(find_dataset(data_path, cache.folder), cache.folder)
    if not files.files:
        raise InputError(f"--data-path {data_path} does not hold HF: it has no Parquet files (*.parquet)")
    return files


def read_footer(file: HubFile, read_end: Callable[[HubFile, int], bytes], name: str) -> bytes:
    """The footer of a Parquet file, with its length and magic bytes, as pyarrow reads it.

    Raises:
        InputError: it is not a Parquet file.
    """
    end = read_end(file, min(file.bytes, END))
    length = 8 + int.from_bytes(end[-8:-4], "little")
    if end[-4:] != MAGIC or not 8 < length <= min(file.bytes - 4, FOOTER_LIMIT):
        raise InputError(f"{name} is damaged or no Parquet file")
    return MAGIC + (end if length <= len(end) else read_end(file, length))[-length:]
