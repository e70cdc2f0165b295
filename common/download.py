"""Downloads: cached, resumed after a broken connection, checked by SHA-256."""

import hashlib
import os
import re
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from common.errors import InputError
from common.files import sha256
from common.hub import fetch_from_hub

import torch
from filelock import FileLock
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Fetching
# ---------------------------------------------------------------------------------------------------------------------


def fetch(source: str | os.PathLike, on_hub: str = "model.safetensors", timeout: float = 30.0) -> Path:
    """The local path of a file; addresses are downloaded to a cache.

    Args:
        source: a file, or a folder that holds it; ``http(s)://…`` or ``hf-hub:owner/name[/file][@revision]``, each
            optionally with ``#sha256=`` and the expected 64 digits.
        on_hub: the file of a folder, and of a Hugging Face repository if the address does not name one.
        timeout: seconds without a response after which an ``http(s)`` download fails.

    Raises:
        InputError: the file does not exist or cannot be downloaded.
    """
    address = str(source)
    if address.startswith("hf-hub:"):
        where, expected = split_digest(address)
        path = fetch_from_hub(where, on_hub)
        check_digest(path, expected, where)
        return path
    if address.startswith(("http://", "https://")):
        return _download(address, timeout)
    path = Path(address)
    if path.is_dir() and (path / on_hub).is_file():
        return path / on_hub
    if not path.is_file():
        found = f"is a directory without {on_hub}" if path.is_dir() else "is missing"
        raise InputError(f"{path} {found}: expected a file of weights")
    return path


def split_digest(address: str) -> tuple[str, str]:
    """An address without ``#sha256=``, and the SHA-256 that its file should have; empty for any."""
    where, _, fragment = address.partition("#")
    if fragment and not re.fullmatch(r"sha256=[0-9a-fA-F]{64}", fragment):
        raise InputError(f"{address} ends in #{fragment}: expected #sha256= and 64 hexadecimal digits, or nothing")
    return where, fragment.removeprefix("sha256=").lower()


def check_digest(path: Path, expected: str, address: str) -> None:
    """Raises InputError if the file of ``address`` has another SHA-256."""
    if expected and (found := sha256(path)) != expected:
        raise InputError(f"{address} has the SHA-256 {found}, expected {expected}: it is another file")


def _download(address: str, timeout: float) -> Path:
    """Download to torch's hub folder; the file name is derived from the address."""
    url, expected = split_digest(address)
    try:
        name = hashlib.sha256(url.encode()).hexdigest()[:16] + "-" + Path(urlsplit(url).path).name
    except ValueError as error:
        raise InputError(f"{url} is not a valid address: {error}") from error
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # other processes wait, and then find the file
            if not path.exists() or (expected and sha256(path) != expected):
                print(f"downloading {url}", file=sys.stderr)
                download_file(url, path.with_name(name + ".part"), timeout)
                try:
                    check_digest(path.with_name(name + ".part"), expected, url)
                except InputError:
                    path.with_name(name + ".part").unlink()
                    raise
                os.replace(path.with_name(name + ".part"), path)
    except OSError as error:
        raise InputError(f"{url} could not be kept in {path.parent}: {error}") from error
    return path


def download_file(url: str, partial: Path, timeout: float = 30.0, shown: bool = True) -> None:
    """Download ``url`` to ``partial``. A broken connection is resumed, in this run or in a later one.

    Args:
        timeout: seconds without a response after which the download fails.
        shown: show a progress bar on a terminal.

    Raises:
        InputError: the download failed; its cause is the server's HTTPError if there was one.
    """
    received = -1
    while True:
        try:
            return _download_rest(url, partial, timeout, shown)
        except InputError:
            partial.unlink(missing_ok=True)
            _version_file(partial).unlink(missing_ok=True)
            raise
        except HTTPError as error:
            if error.code != 416:  # the file on the server has changed
                raise InputError(f"{url} could not be downloaded: {error}") from error
            partial.unlink()
        except (OSError, HTTPException, ValueError) as error:  # ValueError: a broken address, or length
            kept = partial.stat().st_size if partial.exists() else 0
            if kept <= received or kept == 0:  # no progress since the last attempt
                resumable = kept and _version_file(partial).exists()
                later = f"; the {kept:,} bytes received are kept for the next attempt" if resumable else ""
                raise InputError(f"{url} could not be downloaded: {getattr(error, 'reason', error)}{later}") from error
            received = kept


def _download_rest(url: str, partial: Path, timeout: float, shown: bool) -> None:
    """Append the missing bytes of ``url`` to ``partial``.

    Raises:
        OSError, HTTPException: the connection failed; ``partial`` holds the bytes received so far.
    """
    version = _version_file(partial)
    headers = {"User-Agent": "learngenes", "Accept-Encoding": "identity"}
    if partial.exists() and version.exists():
        headers |= {"Range": f"bytes={partial.stat().st_size}-", "If-Range": version.read_text()}
    with urlopen(Request(url, headers=headers), timeout=timeout) as response:
        tag = response.headers["ETag"] or ""
        tag = response.headers["Last-Modified"] if tag[:1] != '"' else tag  # weak tags do not identify the bytes
        begin = partial.stat().st_size if response.status == 206 else 0
        range_begins = str(response.headers["Content-Range"]).startswith(f"bytes {begin}-")
        if begin and not (range_begins and tag in (None, version.read_text())):  # another version of the file
            partial.unlink()
            return _download_rest(url, partial, timeout, shown)
        if response.headers.get_content_type() == "text/html":
            raise InputError(f"{url} is a web page: expected the address of the file itself")
        total = begin + int(response.headers["Content-Length"]) if response.headers["Content-Length"] else None
        if begin == 0:
            version.unlink(missing_ok=True)
            if tag:
                version.write_text(tag)
        bar = dict(unit="B", unit_scale=True, leave=False, disable=None if shown else True)  # None: only on a terminal
        with open(partial, "ab" if begin else "wb") as file, tqdm(total=total, initial=begin, **bar) as progress:
            while block := response.read(2**16):
                if file.tell() == 0 and block.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
                    raise InputError(f"{url} is a web page: expected the address of the file itself")
                file.write(block)
                progress.update(len(block))
            if file.tell() == 0:
                raise InputError(f"{url} is empty: expected the address of the file itself")
            if total is not None and file.tell() < total:
                raise ConnectionError(f"the connection broke after {file.tell():,} of {total:,} bytes")
    version.unlink(missing_ok=True)


def _version_file(partial: Path) -> Path:
    """Stores the ETag or date of a partial download, so that parts of different versions are not joined."""
    return partial.with_name(partial.name + ".version")
