"""Data sets by name: every layout in which they are found, and those of arrays."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from datasets import build_dataset

import numpy as np
import pytest
import torch
from data_layouts import (
    colour,
    counts,
    make_cars,
    make_cifar,
    make_flowers,
    make_fmnist,
    make_folder,
    make_food101,
    make_inat19,
    make_tiny_imagenet,
    message_of,
)
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets as tv
from torchvision import transforms

PIXELS = transforms.PILToTensor()


def read(name: str, root: Path | None, is_train: bool, **kwargs) -> tuple[list[tuple[Tensor, int]], int]:
    """All images and labels, and the number of classes."""
    dataset, classes = build_dataset(name, root and str(root), is_train, PIXELS, **kwargs)
    return [dataset[i] for i in range(len(dataset))], len(classes)


# name of the case → data set, number of classes, its files
LAYOUTS: dict[str, tuple[str, int, Callable[[Path, pytest.MonkeyPatch], None]]] = {
    "FOLDER": ("FOLDER", 3, lambda root, _: make_folder(root)),
    "IMNET": ("IMNET", 1000, lambda root, _: make_folder(root, 1000)),
    "MINIIMNET": ("MINIIMNET", 100, lambda root, _: make_folder(root, 100)),
    "TINYIMNET": ("TINYIMNET", 200, lambda root, _: make_tiny_imagenet(root)),
    "TINYIMNET sorted": ("TINYIMNET", 200, lambda root, _: make_folder(root, 200, inner="images")),
    "INAT19": ("INAT19", 4, lambda root, _: make_inat19(root)),
    "FOOD101": ("FOOD101", 101, lambda root, _: make_food101(root)),
    "CARS": ("CARS", 196, lambda root, _: make_cars(root)),
    "FLOWERS": ("FLOWERS", 102, make_flowers),
    "CIFAR10": ("CIFAR10", 10, lambda root, patch: make_cifar(root, patch, tv.CIFAR10, 10)),
    "CIFAR100": ("CIFAR100", 100, lambda root, patch: make_cifar(root, patch, tv.CIFAR100, 100)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_picture_has_its_label(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name, expected_classes, make = LAYOUTS[layout]
    make(tmp_path, monkeypatch)
    for is_train in (True, False):
        pictures, num_classes = read(name, tmp_path, is_train)
        assert num_classes == expected_classes
        found = sorted((label, tuple(picture[:, 0, 0].tolist())) for picture, label in pictures)
        assert found == [(label, colour(label, n, is_train)) for label, n in counts(expected_classes, is_train)]


# layout → the data set's own folder in the one that it is made in
OWN_FOLDERS = {
    "FOLDER": ".",
    "TINYIMNET": ".",
    "INAT19": ".",
    "FOOD101": "food-101",
    "CARS": "stanford_cars",
    "FLOWERS": "flowers-102",
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
}


def labels_of(name: str, root: Path, is_train: bool = False, **kwargs) -> list[int]:
    """Of a data set whose first image can be read."""
    dataset, _ = build_dataset(name, str(root), is_train, PIXELS, **kwargs)
    assert dataset[0][0].shape[0] == 3
    return sorted(dataset.targets)


@pytest.mark.parametrize("layout", OWN_FOLDERS)
def test_a_data_set_is_found_in_its_own_folder_and_when_it_is_nested_once_more(layout, tmp_path, monkeypatch):
    name, num_classes, make = LAYOUTS[layout]
    (tmp_path / "made").mkdir()
    make(tmp_path / "made", monkeypatch)
    own, usual = tmp_path / "made" / OWN_FOLDERS[layout], Path(OWN_FOLDERS[layout]).name or "images"
    assert labels_of(name, own) == list(range(num_classes))
    for nested in (tmp_path / "of another name", tmp_path / "outer" / usual, tmp_path / "twice" / usual / usual):
        nested.parent.mkdir(parents=True, exist_ok=True)
        own = own.rename(nested)
        (own.parent / ".hidden").mkdir(exist_ok=True)
        place = own if own.parent == tmp_path else own.parent
        assert labels_of(name, place) == list(range(num_classes))
    assert labels_of(name, own) == list(range(num_classes))
    if usual != "images":
        assert labels_of(name, tmp_path / "twice") == list(range(num_classes))


def test_kaggles_cars_have_their_images_one_folder_deeper(tmp_path: Path):
    make_cars(tmp_path)
    for part in ("cars_train", "cars_test"):
        (tmp_path / "stanford_cars" / part).rename(tmp_path / part)
        (tmp_path / "stanford_cars" / part).mkdir()
        (tmp_path / part).rename(tmp_path / "stanford_cars" / part / part)
    assert labels_of("CARS", tmp_path / "stanford_cars") == list(range(196))


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "FOOD101": "expected images and meta, here or in food-101/; found photos/, read.me",
        "CARS": "expected devkit and cars_train and cars_test, here or in stanford_cars/; found photos/, read.me",
        "FLOWERS": "expected jpg and imagelabels.mat and setid.mat, here or in flowers-102/; found photos/, read.me",
        "CIFAR10": "expected batches.meta and data_batch_1 and test_batch, here or in cifar-10-batches-py/; found",
        "CIFAR100": "expected meta and train and test, here or in cifar-100-python/; found photos/, read.me",
        "INAT19": "expected categories.json and train2019.json and val2019.json; found photos/, read.me",
        "FMNIST": "train-images-idx3-ubyte and t10k-images-idx3-ubyte, here or in FashionMNIST/raw/; found photos/",
    }.items(),
)
def test_the_layout_is_named_where_it_is_not_found(name: str, expected: str, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for file in ("read.me", ".DS_Store"):
        (tmp_path / file).touch()
    assert expected in message_of(name, tmp_path)


def test_two_data_sets_in_a_folder_are_not_chosen_from(tmp_path: Path):
    for name in ("a", "b"):
        make_folder(tmp_path / name)
    message = message_of("FOLDER", tmp_path)
    assert f"more than once, in {tmp_path}/a and {tmp_path}/b: name one of them" in message


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("layout", ["CIFAR10", "CIFAR100", "INAT19", "TINYIMNET", "TINYIMNET sorted", "FOLDER"])
def test_one_split_alone_is_enough_if_no_other_is_asked_for(layout, is_train, tmp_path, monkeypatch):
    name, num_classes, make = LAYOUTS[layout]
    make(tmp_path, monkeypatch)
    ending = {True: ("val", "val2019.json", "test_batch", "test"), False: ("train", "train2019.json", "data_batch_1")}
    for path in [*tmp_path.glob("*"), *tmp_path.glob("cifar*/*")]:
        if path.name in ending[is_train]:
            path.rename(tmp_path / "elsewhere")
    assert str(tmp_path) in message_of(name, tmp_path, is_train)
    assert set(labels_of(name, tmp_path, is_train, single_split=True)) == set(range(num_classes))


def test_flowers_with_a_damaged_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_flowers(tmp_path, monkeypatch)
    (tmp_path / "flowers-102" / "setid.mat").write_bytes(b"damaged")
    assert "setid.mat is damaged" in message_of("FLOWERS", tmp_path)


def test_inat19_takes_another_category(tmp_path: Path):
    make_inat19(tmp_path)
    pictures, num_classes = read("INAT19", tmp_path, is_train=False, inat_category="kingdom")
    assert num_classes == 2
    assert [(picture[1, 0, 0].item(), label) for picture, label in pictures] == [(0, 0), (1, 1), (2, 0), (3, 1)]


def test_grey_picture_in_a_folder(tmp_path: Path):
    make_folder(tmp_path)
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "val" / "n0000" / "0.JPEG", format="PNG")
    pictures, _ = read("FOLDER", tmp_path, is_train=False)
    assert pictures[0][0].shape == (3, 8, 8)
    assert all(np.array_equal(channel, grey) for channel in pictures[0][0])


# ---------------------------------------------------------------------------------------------------------------------
# Data sets of arrays
# ---------------------------------------------------------------------------------------------------------------------


def test_digits_are_all_of_the_real_ones():
    real = load_digits()
    parts = [read("DIGITS", None, is_train) for is_train in (True, False)]
    assert [len(pictures) for pictures, _ in parts] == [1437, 360]
    assert [num_classes for _, num_classes in parts] == [10, 10]

    def key(image: np.ndarray, label: int) -> tuple[bytes, int]:
        return np.round(image / 255 * 16).astype(np.uint8).tobytes(), int(label)

    expected = Counter(key(image * 255 / 16, label) for image, label in zip(real.images, real.target, strict=True))
    found = Counter(key(picture[0].numpy(), label) for pictures, _ in parts for picture, label in pictures)
    assert found == expected  # every digit is in one of the parts, and none in both
    for pictures, _ in parts:
        assert all((picture == picture[:1]).all() and picture.shape == (3, 8, 8) for picture, _ in pictures)


def test_digits_are_split_the_same_every_time():
    first, _ = read("DIGITS", None, is_train=False)
    np.random.seed(7)
    torch.manual_seed(7)
    again, _ = read("DIGITS", None, is_train=False)
    for (picture, label), (same_picture, same_label) in zip(first, again, strict=True):
        assert label == same_label
        assert torch.equal(picture, same_picture)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inner", [".", "FashionMNIST/raw"])
def test_fmnist(inner: str, zipped: bool, tmp_path: Path):
    arrays = make_fmnist(tmp_path / inner, zipped)
    for is_train, part in ((True, "train"), (False, "t10k")):
        pictures, num_classes = read("FMNIST", tmp_path, is_train)
        assert num_classes == 10
        assert [label for _, label in pictures] == arrays[f"{part}-labels-idx1-ubyte"].tolist()
        for (picture, _), array in zip(pictures, arrays[f"{part}-images-idx3-ubyte"], strict=True):
            assert picture.shape == (3, 28, 28)
            assert all(np.array_equal(channel, array) for channel in picture)


# The real images, from Debian's package or the folder that LEARNGENE_FMNIST names, are read where there are any.
FMNIST_FOLDERS = [os.environ.get("LEARNGENE_FMNIST", ""), "/usr/share/datasets/fashion-mnist"]
FMNIST_SOURCES = {"generated": (None, 20, 10)} | {
    f: (f, 60000, 10000) for f in FMNIST_FOLDERS if f and Path(f).is_dir()
}


@pytest.mark.parametrize("source", FMNIST_SOURCES)
def test_fmnist_has_as_many_images_of_each_class(source: str, tmp_path: Path):
    folder, *sizes = FMNIST_SOURCES[source]
    if folder is None:
        make_fmnist(tmp_path)
    for is_train, size in zip((True, False), sizes, strict=True):
        dataset, _ = build_dataset("FMNIST", folder or str(tmp_path), is_train, PIXELS)
        assert Counter(dataset.targets) == dict.fromkeys(range(10), size // 10)
        assert dataset[size - 1][0].shape == (3, 28, 28)
