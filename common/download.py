"""Files from addresses: downloaded once, resumed where a connection broke, checked by SHA-256."""

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
from common.hub import from_hub

import torch
from filelock import FileLock
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Fetching
# ---------------------------------------------------------------------------------------------------------------------


def fetch(source: str | os.PathLike, on_hub: str = "model.safetensors", timeout: float = 30.0) -> Path:
    """A local path for a path or an address; what has to be downloaded is kept for the next time.

    Args:
        source: a path; ``http(s)://…``, perhaps with ``#sha256=`` and 64 digits that the file has to have; or
            ``hf-hub:owner/name[/file][@revision]``.
        on_hub: which file of a Hugging Face repository is meant where the address does not name one.
        timeout: seconds without an answer after which an ``http(s)`` server is given up.

    Raises:
        InputError: there is no such file, or the address gave none.
    """
    address = str(source)
    if address.startswith("hf-hub:"):
        return from_hub(address, on_hub)
    if address.startswith(("http://", "https://")):
        return _download(address, timeout)
    path = Path(address)
    if not path.is_file():
        raise InputError(f"{path} is {'a directory' if path.is_dir() else 'missing'}: expected a file of weights")
    return path


def _download(address: str, timeout: float) -> Path:
    """Into torch's hub folder, under a name that follows from the address."""
    url, _, fragment = address.partition("#")
    if fragment and not re.fullmatch(r"sha256=[0-9a-fA-F]{64}", fragment):
        raise InputError(f"{address} ends in #{fragment}: expected #sha256= and 64 hexadecimal digits, or nothing")
    expected = fragment.removeprefix("sha256=").lower()
    try:
        name = hashlib.sha256(url.encode()).hexdigest()[:16] + "-" + Path(urlsplit(url).path).name
    except ValueError as error:
        raise InputError(f"{url} is no address: {error}") from error
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # other processes wait, and then find the file
            if not path.exists() or (expected and sha256(path) != expected):
                print(f"downloading {url}", file=sys.stderr)
                receive(url, path.with_name(name + ".part"), timeout)
                if expected and (found := sha256(path.with_name(name + ".part"))) != expected:
                    path.with_name(name + ".part").unlink()
                    raise InputError(f"{url} has the SHA-256 {found}, expected {expected}: it is another file")
                os.replace(path.with_name(name + ".part"), path)
    except OSError as error:
        raise InputError(f"{url} could not be kept in {path.parent}: {error}") from error
    return path


def receive(url: str, partial: Path, timeout: float = 30.0, shown: bool = True) -> None:
    """Download ``url`` to ``partial``. A connection that breaks is taken up where it broke, now or in a later run.

    Args:
        timeout: seconds without an answer after which the server is given up.
        shown: whether a terminal shows how far it is.

    Raises:
        InputError: the server does not give the file, as a server's HTTPError or a broken connection says.
    """
    had = -1
    while True:
        try:
            return _receive_rest(url, partial, timeout, shown)
        except InputError:
            partial.unlink(missing_ok=True)
            _version_of(partial).unlink(missing_ok=True)
            raise
        except HTTPError as error:
            if error.code != 416:  # what was kept is not a beginning of what is there now
                raise InputError(f"{url} could not be downloaded: {error}") from error
            partial.unlink()
        except (OSError, HTTPException, ValueError) as error:  # ValueError: a broken address, or length
            kept = partial.stat().st_size if partial.exists() else 0
            if kept <= had or kept == 0:  # nothing came since the last attempt
                resumable = kept and _version_of(partial).exists()
                later = f"; the {kept:,} bytes that came are kept for the next attempt" if resumable else ""
                raise InputError(f"{url} could not be downloaded: {getattr(error, 'reason', error)}{later}") from error
            had = kept


def _receive_rest(url: str, partial: Path, timeout: float, shown: bool) -> None:
    """Append to ``partial`` what it lacks of ``url``.

    Raises:
        OSError, HTTPException: the connection failed; what came until then is in ``partial``.
    """
    version = _version_of(partial)
    headers = {"User-Agent": "learngenes", "Accept-Encoding": "identity"}
    if partial.exists() and version.exists():
        headers |= {"Range": f"bytes={partial.stat().st_size}-", "If-Range": version.read_text()}
    with urlopen(Request(url, headers=headers), timeout=timeout) as response:
        mark = response.headers["ETag"] or ""
        mark = response.headers["Last-Modified"] if mark[:1] != '"' else mark  # a weak mark says too little
        begin = partial.stat().st_size if response.status == 206 else 0
        range_begins = str(response.headers["Content-Range"]).startswith(f"bytes {begin}-")
        if begin and not (range_begins and mark in (None, version.read_text())):  # the rest of something else
            partial.unlink()
            return _receive_rest(url, partial, timeout, shown)
        if response.headers.get_content_type() == "text/html":
            raise InputError(f"{url} is a web page: expected the address of the file itself")
        total = begin + int(response.headers["Content-Length"]) if response.headers["Content-Length"] else None
        if begin == 0:
            version.unlink(missing_ok=True)
            if mark:
                version.write_text(mark)
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


def _version_of(partial: Path) -> Path:
    """Keeps the server's mark of the file's version, so that halves of different versions are not put together."""
    return partial.with_name(partial.name + ".version")
