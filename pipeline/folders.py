"""Data sets on disk: in which folder one lies, which image files are in it, and how to download it."""

import os
import re
import shutil
import socket
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError, one_line

from filelock import FileLock
from torchvision import datasets as tv
from torchvision.datasets.folder import IMG_EXTENSIONS

SPLITS = ("train", "val")
# folders that network drives, macOS and Windows add to those of others, partly with small copies of the images in them
NOT_OF_THE_DATA = {"@eaDir", "@Recycle", "#recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information"}
SHOWN = 6  # endings or names in a message
SECONDS = 30  # without an answer, after which a server is given up

# ---------------------------------------------------------------------------------------------------------------------
# Image files in folders that are classes
# ---------------------------------------------------------------------------------------------------------------------


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the data, such as .DS_Store, ._1.jpg or .ipynb_checkpoints."""
    return name.startswith(".") or name in NOT_OF_THE_DATA


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in ``folder`` that are not hidden, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))


def files_below(folder: str) -> Iterator[str]:
    """The paths of all files below ``folder`` that are not hidden, in torchvision's order."""
    places = []
    for place, inner, files in os.walk(folder, followlinks=True):
        inner[:] = [name for name in inner if not is_hidden(name) and not leads_back(os.path.join(place, name))]
        places.append((place, files))
    for place, files in sorted(places):
        yield from (os.path.join(place, name) for name in sorted(files) if not is_hidden(name))


def leads_back(path: str) -> bool:
    """Whether a folder is a link to one that it is in, and would be walked through again and again."""
    if not os.path.islink(path):
        return False
    target, place = os.path.realpath(path), os.path.dirname(path)
    ways = (Path(place), *Path(place).parents), Path(os.path.realpath(place)).parents
    return target in {os.path.realpath(folder) for way in ways for folder in way}


def ending_of(path: str) -> str:
    ending = os.path.splitext(path)[1].lower()
    return ending if re.fullmatch(r"\.[\w~-]{1,20}", ending, re.ASCII) else "another ending" if ending else "no ending"


def counted(endings: Counter) -> str:
    """'.gif 3, no ending 1', the most frequent ones first."""
    shown = [f"{ending} {count:,}" for ending, count in endings.most_common(SHOWN)]
    rest = endings.total() - sum(count for _, count in endings.most_common(SHOWN))
    return ", ".join([*shown, f"others {rest:,}"] if rest else shown)


class ImageFolder(tv.ImageFolder):
    """torchvision's, without what is hidden.

    Attributes:
        passed_over: how many files are not read, by their endings.
    """

    def __init__(self, root: Path, transform: Callable | None, loader: Callable):
        self.passed_over: Counter = Counter()
        super().__init__(root, transform, loader=loader)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = subfolders(Path(directory))
        if not classes:
            raise InputError(f"--data-path: {directory} has no folders: expected one folder of images per class")
        return classes, {name: label for label, name in enumerate(classes)}

    def make_dataset(self, directory: str | Path, class_to_idx: dict[str, int], **_: object) -> list[tuple[str, int]]:
        """(path, label) of every image, class by class.

        Raises:
            InputError: a class has none.
        """
        samples = []
        loose = [entry for entry in os.scandir(directory) if entry.is_file() and not is_hidden(entry.name)]
        if loose:
            self.passed_over["in no class"] = len(loose)
        for name, label in class_to_idx.items():
            before, others = len(samples), Counter()
            for path in files_below(os.path.join(directory, name)):
                if path.lower().endswith(IMG_EXTENSIONS):
                    samples.append((path, label))
                else:
                    others[ending_of(path)] += 1
            if len(samples) == before:
                found = f"its files end otherwise ({counted(others)})" if others else "it has no files"
                raise InputError(
                    f"--data-path: {os.path.join(directory, name)} holds no image of its class: {found}, "
                    f"expected {', '.join(IMG_EXTENSIONS)}"
                )
            self.passed_over += others
        return samples


def summary(split: str, dataset: object, classes: Sequence[str], root: str) -> str | None:
    """What was found, for people to read; None for data sets that are no image files.

    Args:
        dataset: the images of ``split``.
        root: where they were looked for.
    """
    if not hasattr(dataset, "samples"):
        return None
    line = f"{split}: {len(dataset):,} images of {len(classes):,} classes"
    if isinstance(dataset, ImageFolder):
        line += f" in {dataset.root}" * (Path(dataset.root).parent != Path(root))
        if dataset.passed_over:
            line += f"; {dataset.passed_over.total():,} files passed over ({counted(dataset.passed_over)})"
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Which folder is meant
# ---------------------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How the folder of a data set is called, as it is distributed, and what is in it of each split (a glob)."""

    name: str
    train: tuple[str, ...]
    val: tuple[str, ...]

    def of(self, splits: Sequence[str]) -> list[str]:
        """What is in the folder, if ``splits`` are."""
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


def own_folder(name: str, root: Path, splits: Sequence[str] = SPLITS) -> Path | None:
    """The folder that holds ``splits`` of the data set ``name`` itself, or None.

    It is ``root``, or in it under the name that it has as distributed, or either of these in one of its folders, as
    archives are often unpacked into a folder of their own name.

    Raises:
        InputError: several folders of ``root`` hold one.
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


def not_found(name: str, root: Path, splits: Sequence[str]) -> InputError:
    """The error that says which files and folders were looked for, and what is there."""
    layout = LAYOUTS[name]
    expected = " and ".join(entry.removesuffix("*") for entry in layout.of(splits))
    where = f", here or in {layout.name}/" if layout.name else ""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(root) if not is_hidden(entry.name))
    found = one_line(", ".join(names[:SHOWN] + ["…"] * (len(names) > SHOWN))) or "nothing"
    return InputError(f"--data-path {root} does not hold {name}: expected {expected}{where}; found {found}")


# ---------------------------------------------------------------------------------------------------------------------
# Download
# ---------------------------------------------------------------------------------------------------------------------

DOWNLOADS = {
    "CIFAR10": tv.CIFAR10,
    "CIFAR100": tv.CIFAR100,
    "FLOWERS": tv.Flowers102,
    "FMNIST": tv.FashionMNIST,
    "FOOD101": tv.Food101,
}


def download(name: str, path: str | None, splits: Sequence[str] = SPLITS) -> None:
    """Have torchvision download a data set to ``path``, unless ``splits`` of it are there.

    It is unpacked in a hidden folder and moved when it is whole.

    Raises:
        InputError: it is none that torchvision downloads, or that failed.
    """
    if name not in DOWNLOADS:
        why = "from where it was, it is gone" if name == "CARS" else "torchvision does not do it"
        raise InputError(f"--download cannot fetch {name} ({why}): only {', '.join(DOWNLOADS)}")
    if path is None:
        raise InputError(f"--data-set {name} needs --data-path, the folder to --download it to")
    root, unfinished = Path(path), Path(path, f".download-{name}")
    try:
        if root.is_dir() and own_folder(name, root, splits) is not None:  # perhaps where nothing can be written
            return
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".download.lock"):  # other machines may see this folder, too
            if own_folder(name, root, splits) is not None:
                return
            _check_no_part(name, root)
            if unfinished.exists():  # archives are used again, what was unpacked of them may not be whole
                _remove_folders(unfinished)
            print(f"downloading {name} to {root}", flush=True)
            unfinished.mkdir(exist_ok=True)
            with answers_expected():
                DOWNLOADS[name](unfinished, download=True)
            for entry in subfolders(unfinished):
                os.replace(unfinished / entry, root / entry)
            shutil.rmtree(unfinished)
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError, tarfile.TarError, HTTPException, zlib.error) as error:
        raise InputError(f"--download: {name} could not be fetched to {root}: {one_line(error)[:300]}") from error


def _check_no_part(name: str, root: Path) -> None:
    """Raises InputError if the place of a data set that was not found is taken."""
    place = root / Path(LAYOUTS[name].name).parts[0]
    if place.exists():
        raise InputError(f"--download: {place} is there, but not all of {name}: expected it to be moved or removed")


def _remove_folders(folder: Path) -> None:
    for name in subfolders(folder):
        shutil.rmtree(folder / name)


@contextmanager
def answers_expected() -> Iterator[None]:
    """torchvision would wait for ever for a server that does not answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
