"""Learngenes with a name: ``scripts/learngenes.yaml`` lists those of this repository, and others to download."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from common.errors import InputError, nearest
from common.files import read_yaml
from models.names import parse_arch
from models.registry import METHODS

REPOSITORY = Path(__file__).resolve().parents[1]
LIST = REPOSITORY / "scripts" / "learngenes.yaml"
KEYS = {"name": str, "method": str, "architectures": list, "address": str, "sha256": str, "note": str}
OPTIONAL = ("sha256", "note")
KINDS = {str: "text", list: "a list"}

ADDRESS = re.compile(r"https?://[\w.:-]+/[^\s#]+|hf-hub:[\w.-]+/[\w./@-]+")
HERE = re.compile(r"learngenes/\w[\w.-]*\.safetensors")
DRIVE_HOSTS = ("drive.google.com", "docs.google.com")
DRIVE_FOLDER = re.compile(r"https://drive\.google\.com/drive/(?:u/\d+/)?folders/([-\w]{25,})")
DRIVE_FILE = re.compile(r"https://drive\.google\.com/(?:file/d/|(?:uc|open)\?(?:.*&)?id=)([-\w]{25,})")


@dataclass(frozen=True)
class Entry:
    """An entry of the list; the fields are its keys."""

    name: str
    method: str
    architectures: list[str]
    address: str
    sha256: str = ""
    note: str = ""

    @property
    def suffix(self) -> str:
        """The suffix of the file, such as ``.pth``."""
        if self.address.startswith("hf-hub:"):  # owner/name[/file][@revision]
            file = self.address.partition("@")[0].split("/", 2)[2:]
            return Path(*file).suffix or ".safetensors"
        return Path(urlsplit(self.address).path).suffix

    @property
    def is_here(self) -> bool:
        """Whether the file is part of this repository."""
        return HERE.fullmatch(self.address) is not None

    @property
    def on_drive(self) -> bool:
        """Whether it is on Google Drive, which has no addresses of files that `common.download.fetch` could take."""
        return urlsplit(self.address).hostname in DRIVE_HOSTS

    @property
    def source(self) -> str:
        """What `common.download.fetch` takes: the path of the file in this repository, or an address."""
        if self.is_here:
            return str(REPOSITORY / self.address)
        return self.address + (f"#sha256={self.sha256}" if self.sha256 else "")


def source_of(given: str | os.PathLike) -> str:
    """The file or address that a listed name stands for; any other file or address as it is.

    A file of that name in the current folder goes first.

    Raises:
        InputError: ``given`` is nearly a listed name, or that of files on Google Drive.
    """
    name = str(given)
    if not re.fullmatch(r"\w[\w.-]*", name) or os.path.lexists(name):
        return name
    entries = read_list(LIST)
    if name not in entries:
        if near := nearest(name, entries):
            raise InputError(f"{name} is no file, and no name of {LIST.relative_to(REPOSITORY)}{near}")
        return name
    if entries[name].on_drive:
        raise InputError(f"{name} is to be downloaded first, with scripts/download_learngenes.py {name}")
    return entries[name].source


def read_list(path: Path) -> dict[str, Entry]:
    """The entries of a file like ``scripts/learngenes.yaml``, by their names.

    Raises:
        InputError: the file cannot be read, or an entry is invalid.
    """
    content = read_yaml(path)
    if not isinstance(content, list):
        raise InputError(f"{path} holds a {type(content).__name__}: expected a list of learngenes")
    entries: dict[str, Entry] = {}
    for number, values in enumerate(content, start=1):
        try:
            entry = checked_entry(values)
            if entry.name in entries:
                raise InputError("another entry has this name, too")
        except InputError as error:
            name = values.get("name") if isinstance(values, dict) else None
            raise InputError(f"{path}, entry {number}{f' ({name!s:.100})' if name else ''}: {error}") from error
        entries[entry.name] = entry
    return entries


def checked_entry(values: object) -> Entry:
    """Validate an item of the list. Raises InputError if it is invalid."""
    if not isinstance(values, Mapping):
        raise InputError(f"it is {values!r:.200}, expected the keys {', '.join(KEYS)}")
    for key, value in values.items():
        if key not in KEYS:
            raise InputError(f"unknown key {key!r:.200}, expected {', '.join(KEYS)}")
        if not isinstance(value, KEYS[key]):
            raise InputError(f"{key} is {value!r:.200}, expected {KINDS[KEYS[key]]}")
    if missing := [key for key in KEYS if key not in values and key not in OPTIONAL]:
        raise InputError(f"{missing[0]} is missing")
    entry = Entry(**values)
    if not re.fullmatch(r"\w[\w.-]*", entry.name):
        raise InputError("name is used as a file name: expected letters, digits, '_', '-' and '.'")
    if entry.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", entry.sha256):
        raise InputError(f"sha256 is {entry.sha256!r:.200}, expected 64 hexadecimal digits")
    check_architectures(entry)
    check_address(entry)
    return entry


def check_architectures(entry: Entry) -> None:
    """Raises InputError unless the architectures fit the entry's method."""
    for name in entry.architectures:
        if not isinstance(name, str):
            raise InputError(f"architectures holds {name!r:.200}, expected names")
        parse_arch(name)
    if entry.method not in METHODS:
        raise InputError(f"method is {entry.method!r:.200}, expected {' or '.join(METHODS)}")
    METHODS[entry.method].check_names(entry.architectures)


def check_address(entry: Entry) -> None:
    """Raises InputError unless the address is supported."""
    if entry.is_here:
        if entry.sha256:
            raise InputError("sha256 is for a file to download, and the address is one of this repository")
        return
    if not ADDRESS.fullmatch(entry.address):
        raise InputError(
            f"address is {entry.address!r:.200}, expected http(s)://…/… without '#', hf-hub:owner/name, or "
            "learngenes/….safetensors for a file of this repository"
        )
    if entry.on_drive and not DRIVE_FILE.match(entry.address):
        if not DRIVE_FOLDER.match(entry.address):
            raise InputError(
                f"address is {entry.address!r:.200}, expected https://drive.google.com/drive/folders/… or …/file/d/…"
            )
        if entry.sha256:
            raise InputError("sha256 is that of a file, and the address is a folder of Google Drive")
