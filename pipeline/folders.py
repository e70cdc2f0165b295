"""Data sets on disk: class folders, the folder of a known data set, download."""

import os
import re
import shutil
import socket
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from common.download import download_file
from common.errors import InputError, one_line

from filelock import FileLock
from torchvision import datasets as tv
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity, extract_archive

SPLITS = ("train", "val")
# added by network drives, macOS and Windows; some contain thumbnails of the images
SYSTEM_FOLDERS = {"@eaDir", "@Recycle", "#recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information"}
MAX_SHOWN = 6  # suffixes or names in a message
TIMEOUT = 30  # seconds

# ---------------------------------------------------------------------------------------------------------------------
# Class folders
# ---------------------------------------------------------------------------------------------------------------------


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not part of the data, such as .DS_Store, ._1.jpg or .ipynb_checkpoints."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def subfolders(folder: Path) -> list[str]:
    """The sorted names of the folders in ``folder``, without hidden ones."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))


def files_below(folder: str) -> Iterator[str]:
    """The paths of all files below ``folder`` in torchvision's order, without hidden ones."""
    places = []
    for place, inner, files in os.walk(folder, followlinks=True):
        inner[:] = [name for name in inner if not is_hidden(name) and not links_to_parent(os.path.join(place, name))]
        places.append((place, files))
    for place, files in sorted(places):
        yield from (os.path.join(place, name) for name in sorted(files) if not is_hidden(name))


def links_to_parent(path: str) -> bool:
    """Whether a folder is a symbolic link to one of its parents, which would be walked endlessly."""
    if not os.path.islink(path):
        return False
    target, place = os.path.realpath(path), os.path.dirname(path)
    ways = (Path(place), *Path(place).parents), Path(os.path.realpath(place)).parents
    return target in {os.path.realpath(folder) for way in ways for folder in way}


def suffix_of(path: str) -> str:
    ending = os.path.splitext(path)[1].lower()
    return ending if re.fullmatch(r"\.[\w~-]{1,20}", ending, re.ASCII) else "another ending" if ending else "no ending"


def format_counts(endings: Counter) -> str:
    """'.gif 3, no ending 1', the most frequent ones first."""
    shown = [f"{ending} {count:,}" for ending, count in endings.most_common(MAX_SHOWN)]
    rest = endings.total() - sum(count for _, count in endings.most_common(MAX_SHOWN))
    return ", ".join([*shown, f"others {rest:,}"] if rest else shown)


class ImageFolder(tv.ImageFolder):
    """torchvision's ImageFolder without hidden files and folders.

    Attributes:
        skipped_files: how many files are not images, by suffix.
    """

    def __init__(self, root: Path, transform: Callable | None, loader: Callable):
        self.skipped_files: Counter = Counter()
        super().__init__(root, transform, loader=loader)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = subfolders(Path(directory))
        if not classes:
            raise InputError(f"--data-path: {directory} has no folders: expected one folder of images per class")
        return classes, {name: label for label, name in enumerate(classes)}

    def make_dataset(self, directory: str | Path, class_to_idx: dict[str, int], **_: object) -> list[tuple[str, int]]:
        """(path, label) of every image, class by class.

        Raises:
            InputError: a class has no images.
        """
        samples = []
        loose = [entry for entry in os.scandir(directory) if entry.is_file() and not is_hidden(entry.name)]
        if loose:
            self.skipped_files["in no class"] = len(loose)
        for name, label in class_to_idx.items():
            before, others = len(samples), Counter()
            for path in files_below(os.path.join(directory, name)):
                if path.lower().endswith(IMG_EXTENSIONS):
                    samples.append((path, label))
                else:
                    others[suffix_of(path)] += 1
            if len(samples) == before:
                found = f"its files end otherwise ({format_counts(others)})" if others else "it has no files"
                raise InputError(
                    f"--data-path: {os.path.join(directory, name)} holds no image of its class: {found}, "
                    f"expected {', '.join(IMG_EXTENSIONS)}"
                )
            self.skipped_files += others
        return samples


def summary(split: str, dataset: object, classes: Sequence[str], root: str) -> str | None:
    """A line to print about a data set of image files, or of the Hub; None for others.

    Args:
        root: ``--data-path``.
    """
    if hasattr(dataset, "origin"):
        return f"{split}: {len(dataset):,} images of {len(classes):,} classes in {dataset.origin}"
    if not hasattr(dataset, "samples"):
        return None
    line = f"{split}: {len(dataset):,} images of {len(classes):,} classes"
    if isinstance(dataset, ImageFolder):
        line += f" in {dataset.root}" * (Path(dataset.root).parent != Path(root))
        if dataset.skipped_files:
            line += f"; {dataset.skipped_files.total():,} files passed over ({format_counts(dataset.skipped_files)})"
    return line


# ---------------------------------------------------------------------------------------------------------------------
# The folder of a data set
# ---------------------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """The name of a data set's folder as distributed, and the entries (globs) that each split needs."""

    name: str
    train: tuple[str, ...]
    val: tuple[str, ...]

    def of(self, splits: Sequence[str]) -> list[str]:
        """The entries that ``splits`` need."""
        return list(dict.fromkeys(entry for split in splits for entry in getattr(self, split)))


FOLDERS = Layout("", ("train",), ("val",))
LAYOUTS = {
    "IMNET": FOLDERS,
    "FOLDER": FOLDERS,
    "MINIIMNET": FOLDERS,
    "TINYIMNET": FOLDERS._replace(name="tiny-imagenet-200"),
    "CIFAR10": Layout("cifar-10-batches-py", ("batches.meta", "data_batch_1"), ("batches.meta", "test_batch")),
    "CIFAR100": Layout("cifar-100-python", ("meta", "train"), ("meta", "test")),
    "INAT19": Layout("", ("categories.json", "train2019.json"), ("categories.json", "val2019.json")),
    "FOOD101": Layout("food-101", ("images", "meta"), ("images", "meta")),
    "CARS": Layout("stanford_cars", ("devkit", "cars_train"), ("devkit", "cars_test")),
    "FLOWERS": Layout("flowers-102", *2 * [("jpg", "imagelabels.mat", "setid.mat")]),
    "FMNIST": Layout("FashionMNIST/raw", ("train-images-idx3-ubyte*",), ("t10k-images-idx3-ubyte*",)),
}


def find_folder(name: str, root: Path, splits: Sequence[str] = SPLITS) -> Path | None:
    """The folder that contains ``splits`` of the data set ``name``, or None.

    Candidates are ``root``, the folder's name as distributed below it, and both of these in every subfolder, because
    archives are often unpacked into a folder of their own name.

    Raises:
        InputError: several subfolders contain the data set.
    """
    layout = LAYOUTS[name]
    entries = layout.of(splits)

    def holds(folder: Path) -> bool:
        return all(next(folder.glob(entry), None) is not None for entry in entries)

    for folder in (root / layout.name, root):
        if holds(folder):
            return folder
    inner = (folder for child in subfolders(root) for folder in (root / child / layout.name, root / child))
    found = {folder.resolve(): folder for folder in inner if holds(folder)}
    if len(found) > 1:
        first, second, *_ = found.values()
        raise InputError(f"--data-path {root} holds {name} more than once, in {first} and {second}: name one of them")
    return next(iter(found.values()), None)


def not_found_error(name: str, root: Path, splits: Sequence[str]) -> InputError:
    """The error for a folder without the data set: what is expected, what was found."""
    layout = LAYOUTS[name]
    expected = " and ".join(entry.removesuffix("*") for entry in layout.of(splits))
    where = f", here or in {layout.name}/" if layout.name else ""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(root) if not is_hidden(entry.name))
    found = one_line(", ".join(names[:MAX_SHOWN] + ["…"] * (len(names) > MAX_SHOWN))) or "nothing"
    return InputError(f"--data-path {root} does not hold {name}: expected {expected}{where}; found {found}")


# ---------------------------------------------------------------------------------------------------------------------
# Download
# ---------------------------------------------------------------------------------------------------------------------

TORCHVISION = {
    "CIFAR10": tv.CIFAR10,
    "CIFAR100": tv.CIFAR100,
    "FLOWERS": tv.Flowers102,
    "FMNIST": tv.FashionMNIST,
    "FOOD101": tv.Food101,
}
INAT19 = "https://ml-inat-competition-datasets.s3.amazonaws.com/2019"  # AWS Open Data
# archives of data sets that torchvision does not unpack → their MD5, where the authors of the data set state it
ARCHIVES: dict[str, dict[str, str | None]] = {
    "INAT19": {
        f"{INAT19}/categories.json.tar.gz": None,
        f"{INAT19}/train2019.json.tar.gz": "b06a6683537867c0d5c7a45f407a306d",
        f"{INAT19}/val2019.json.tar.gz": "5cc5509b0fe495f1c8c1362612448497",
        f"{INAT19}/train_val2019.tar.gz": "c60a6e2962c9b8ccbd458d12c8582644",
    },
    "TINYIMNET": {"http://cs231n.stanford.edu/tiny-imagenet-200.zip": "90528d7ca1a48142e341f4ef8d21d0de"},
}
DOWNLOADS = (*TORCHVISION, *ARCHIVES)


def download(name: str, path: str | None, splits: Sequence[str] = SPLITS) -> None:
    """Download a data set to ``path``, unless ``splits`` of it exist.

    It is unpacked in a hidden folder and moved when it is complete.

    Raises:
        InputError: no public address of the data set is known, or the download failed.
    """
    if name not in DOWNLOADS:
        why = "it is no longer available" if name == "CARS" else "no public address of it is known"
        raise InputError(f"--download cannot fetch {name} ({why}): only {', '.join(DOWNLOADS)}")
    if path is None:
        raise InputError(f"--data-set {name} needs --data-path, the folder to --download it to")
    root, unfinished = Path(path), Path(path, f".download-{name}")
    try:
        if root.is_dir() and find_folder(name, root, splits) is not None:  # it may be read-only
            return
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".download.lock"):  # other hosts may share this folder
            if find_folder(name, root, splits) is not None:
                return
            _check_no_part(name, root)
            if unfinished.exists():  # keep the archives; what was unpacked may be incomplete
                _remove_folders(unfinished)
            print(f"downloading {name} to {root}", flush=True)
            unfinished.mkdir(exist_ok=True)
            with socket_timeout():
                if name in ARCHIVES:
                    _fetch_archives(ARCHIVES[name], unfinished)
                else:
                    TORCHVISION[name](unfinished, download=True)
            for entry in subfolders(unfinished):
                os.replace(unfinished / entry, root / entry)
            for entry in LAYOUTS[name].of(SPLITS):  # files, which say that the folders are complete
                if (unfinished / entry).is_file():
                    os.replace(unfinished / entry, root / entry)
            shutil.rmtree(unfinished)
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError, tarfile.TarError, HTTPException, zlib.error) as error:
        raise InputError(f"--download: {name} could not be fetched to {root}: {one_line(error)[:300]}") from error


def _fetch_archives(archives: Mapping[str, str | None], folder: Path) -> None:
    """Download archives to ``folder``, where a broken download is continued, and unpack them there.

    Args:
        archives: address → MD5, or None.

    Raises:
        InputError: a download failed, or its content is another one.
    """
    files = {folder / address.rpartition("/")[2]: address for address in archives}
    for file, address in files.items():
        if file.exists():  # a download that was killed while it unpacked
            continue
        partial = file.with_name(f"{file.name}.part")
        download_file(address, partial, TIMEOUT)
        if not check_integrity(partial, archives[address]):
            partial.unlink()
            raise InputError(f"--download: {address} is another file: its MD5 is not {archives[address]}")
        os.replace(partial, file)
    for file in files:
        extract_archive(file, folder)


def _check_no_part(name: str, root: Path) -> None:
    """Raises InputError if the destination exists, but holds an incomplete data set."""
    layout = LAYOUTS[name]
    for entry in Path(layout.name).parts[:1] or layout.of(SPLITS):
        if (place := root / entry).exists():
            raise InputError(f"--download: {place} is there, but not all of {name}: expected it to be moved or removed")


def _remove_folders(folder: Path) -> None:
    for name in subfolders(folder):
        shutil.rmtree(folder / name)


@contextmanager
def socket_timeout() -> Iterator[None]:
    """Without a timeout torchvision waits for ever for a server that does not respond."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
