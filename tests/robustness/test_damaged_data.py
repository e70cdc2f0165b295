"""Data sets with missing, empty or damaged files: the message names the file."""

import gzip
from collections.abc import Callable
from pathlib import Path

from common.errors import InputError
from datasets import DATA_SETS, build_dataset

import numpy as np
import pytest
from data_layouts import (
    idx,
    make_fmnist,
    make_folder,
    make_inat19,
    make_tiny_imagenet,
    message_of,
)
from torchvision import transforms

PIXELS = transforms.PILToTensor()


@pytest.mark.parametrize("name", sorted(DATA_SETS.keys() - {"DIGITS"}))
def test_wrong_path(name: str, tmp_path: Path):
    assert name in message_of(name, None)
    assert "missing-folder" in message_of(name, tmp_path / "missing-folder")
    for is_train in (True, False):
        assert str(tmp_path) in message_of(name, tmp_path, is_train)  # an empty folder


@pytest.mark.parametrize("name", ["FOLDER", "MINIIMNET", "TINYIMNET"])
def test_empty_class(name: str, tmp_path: Path):
    make_folder(tmp_path, DATA_SETS[name][1] or 3)
    for is_train, part in ((True, "train"), (False, "val")):
        (tmp_path / part / "n0001" / "0.JPEG").unlink()
        assert "n0001" in message_of(name, tmp_path, is_train)


@pytest.mark.parametrize("name", ["FOLDER", "IMNET", "MINIIMNET", "TINYIMNET"])
def test_class_in_one_part_alone(name: str, tmp_path: Path):
    make_folder(tmp_path, 3)
    (tmp_path / "val" / "n0001" / "0.JPEG").unlink()
    (tmp_path / "val" / "n0001").rmdir()
    for is_train in (True, False):
        message = message_of(name, tmp_path, is_train)
        assert all(part in message for part in ("3 classes in train/", "2 in val/", "n0001"))


@pytest.mark.parametrize("name", ["IMNET", "MINIIMNET", "TINYIMNET"])
def test_number_of_classes_is_that_of_the_data_set(name: str, tmp_path: Path):
    make_folder(tmp_path, 3)
    message = message_of(name, tmp_path)
    assert all(part in message for part in ("3 classes", str(DATA_SETS[name][1]), "FOLDER"))


def test_tiny_imagenet_class_without_folder(tmp_path: Path):
    make_tiny_imagenet(tmp_path)
    table = tmp_path / "val" / "val_annotations.txt"
    table.write_text(table.read_text() + "val_0.JPEG\tn9999\t0\t0\t62\t62\n")
    assert "n9999" in message_of("TINYIMNET", tmp_path)


def test_tiny_imagenet_class_without_test_images(tmp_path: Path):
    make_tiny_imagenet(tmp_path)
    table = tmp_path / "val" / "val_annotations.txt"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[1:]))
    assert "n0000" in message_of("TINYIMNET", tmp_path)


def test_tiny_imagenet_of_too_few_classes(tmp_path: Path):
    make_tiny_imagenet(tmp_path)
    for file in (tmp_path / "train" / "n0199").rglob("*.JPEG"):
        file.unlink()
    (tmp_path / "train" / "n0199" / "images").rmdir()
    (tmp_path / "train" / "n0199").rmdir()
    message = message_of("TINYIMNET", tmp_path, is_train=True)
    assert "199" in message
    assert "200" in message


@pytest.mark.parametrize("classes", [(4, 3), (3, 4)])
def test_inat19_classes_differ(classes: tuple[int, int], tmp_path: Path):
    make_inat19(tmp_path, *classes)
    assert "species 3" in message_of("INAT19", tmp_path)


def test_inat19_names_a_category_it_lacks(tmp_path: Path):
    make_inat19(tmp_path)
    with pytest.raises(InputError, match="genus"):
        build_dataset("INAT19", str(tmp_path), True, PIXELS, inat_category="genus")


FMNIST_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda content: content[: len(content) // 2],
    "no gzip": lambda content: b"x" + content[1:],
    "other byte": lambda content: content[:60] + bytes([content[60] ^ 255]) + content[61:],
    "other block": lambda content: content[:10] + b"\x07" + content[11:],  # a type of block that deflate does not know
    "too few": lambda _: gzip.compress(idx(np.zeros((3, 28, 28)))),
    "too small": lambda _: gzip.compress(idx(np.zeros((20, 20, 20)))),
}


@pytest.mark.parametrize("damage", FMNIST_DAMAGE)
def test_fmnist_damaged(damage: str, tmp_path: Path):
    make_fmnist(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(FMNIST_DAMAGE[damage](file.read_bytes()))
    message_of("FMNIST", tmp_path, is_train=True)


def test_fmnist_names_the_file_it_lacks(tmp_path: Path):
    make_fmnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    assert "t10k-labels-idx1-ubyte" in message_of("FMNIST", tmp_path)
