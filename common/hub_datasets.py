"""Data sets on the Hugging Face Hub: which files a revision has, parts of files, and their download.

huggingface_hub is imported inside functions, as in `common.hub`.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError, one_line
from common.files import atomic_write, read_json, sha256
from common.hub import TIMEOUT, hub_errors

from filelock import FileLock

ON_HUB = "hf-hub:datasets/"
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


class HubFile(NamedTuple):
    """A file of a data set; ``sha256`` is None of a small one, which lies in git itself."""

    path: str
    bytes: int
    sha256: str | None


class HubDataset(NamedTuple):
    """The files of one commit of a data set."""

    repo_id: str
    commit: str
    files: tuple[HubFile, ...]

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.commit}"

    def file(self, path: str) -> HubFile | None:
        return next((file for file in self.files if file.path == path), None)


def is_on_hub(data_path: str) -> bool:
    """Whether ``--data-path`` is ``hf-hub:datasets/owner/name[@revision]``."""
    return data_path.startswith(ON_HUB)


def find_dataset(address: str, folder: Path) -> HubDataset:
    """The files of ``[hf-hub:datasets/]owner/name[@revision]``.

    The answer is kept in ``folder``: once the commit of a revision is known, ``@COMMIT`` needs no network.

    Raises:
        InputError: it is no such name, the data set or revision does not exist, or the Hub is unreachable.
    """
    from huggingface_hub import HfApi

    repo_id, _, revision = address.removeprefix(ON_HUB).partition("@")
    if not REPOSITORY.fullmatch(repo_id):
        raise InputError(f"--data-path {address} names no data set of the Hub: expected OWNER/NAME[@REVISION]")
    listing = folder / _name_of(repo_id, revision, "files.json")
    if COMMIT.fullmatch(revision) and listing.is_file():
        return HubDataset(repo_id, revision, tuple(HubFile(*file) for file in read_json(listing)))
    with reported(f"--data-path {address}"):
        info = HfApi().dataset_info(repo_id, revision=revision or None, files_metadata=True, timeout=TIMEOUT)
    files = tuple(HubFile(file.rfilename, file.size or 0, file.lfs and file.lfs.sha256) for file in info.siblings or ())
    with atomic_write(folder / _name_of(repo_id, info.sha, "files.json")) as unfinished:
        Path(unfinished).write_text(json.dumps(files))
    return HubDataset(repo_id, info.sha, files)


def pinned(address: str, folder: Path) -> str:
    """``[hf-hub:datasets/]owner/name[@revision]`` with the commit that the revision is now, which does not change.

    Raises:
        InputError: as `find_dataset`.
    """
    return f"{address.partition('@')[0]}@{find_dataset(address, folder).commit}"


def small_file(dataset: HubDataset, path: str, folder: Path) -> Path | None:
    """The path of a small file of a data set, such as README.md, that is kept in ``folder``; None if there is none."""
    if dataset.file(path) is None:
        return None
    kept = folder / _name_of(dataset.repo_id, dataset.commit, path)
    with FileLock(f"{kept}.lock"):  # other processes wait, and then find the file
        if not kept.is_file():
            download_to(dataset, path, kept)
    return kept


def download_to(dataset: HubDataset, path: str, to: Path) -> None:
    """Download a file of a data set to ``to``. What a broken download has received is kept beside it.

    Raises:
        InputError: the download failed, or gave other bytes than the Hub lists.
    """
    from huggingface_hub import hf_hub_download

    place = to.with_name(f"{to.name}.hub")
    with reported(f"{dataset}/{path}"):
        got = hf_hub_download(dataset.repo_id, path, repo_type="dataset", revision=dataset.commit, local_dir=place)
    file = dataset.file(path)
    differs = file is not None and file.sha256 is not None and sha256(got) != file.sha256
    if not differs:
        os.replace(got, to)
    shutil.rmtree(place)
    if differs:
        raise InputError(f"{dataset}/{path} was received with another SHA-256 than the Hub lists")


class EndReader:
    """Reads the last bytes of files of a data set, without the rest of them."""

    def __init__(self, dataset: HubDataset):
        from huggingface_hub import HfFileSystem

        self.dataset, self.system = dataset, HfFileSystem()

    def __call__(self, file: HubFile, count: int) -> bytes:
        """The last ``count`` bytes.

        Raises:
            InputError: the Hub does not give them.
        """
        name = f"datasets/{self.dataset.repo_id}@{self.dataset.commit}/{file.path}"
        with (
            reported(f"{self.dataset}/{file.path}"),
            self.system.open(name, "rb", size=file.bytes, cache_type="none") as opened,
        ):
            opened.seek(file.bytes - count)
            return opened.read(count)


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Errors of huggingface_hub as InputError about ``what``."""
    try:
        yield
    except InputError:
        raise
    except hub_errors() as error:
        raise InputError(f"{what} could not be read from the Hub: {one_line(error)}") from error


def _name_of(repo_id: str, revision: str, file: str) -> str:
    return "--".join([*repo_id.split("/"), revision, *file.split("/")])
