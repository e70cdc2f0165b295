"""Data sets of image files in their real layouts; the colour of a picture says its class, number and split."""

import gzip
import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

from common.errors import InputError
from datasets import build_dataset

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets as tv
from torchvision.transforms import PILToTensor


def colour(label: int, number: int, is_train: bool) -> tuple[int, int, int]:
    return label // 256, label % 256, 2 * number + is_train


def paint(path: Path, label: int, number: int, is_train: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), colour(label, number, is_train)).save(path, format="PNG")  # readers look at the content


def counts(num_classes: int, is_train: bool) -> Iterator[tuple[int, int]]:
    """(label, number) of every picture of one part: two in the last class of the training images, else one."""
    for label in range(num_classes):
        yield from ((label, number) for number in range(2 if is_train and label == num_classes - 1 else 1))


def make_folder(root: Path, num_classes: int = 3, parts: tuple[str, ...] = ("train", "val"), inner: str = "") -> None:
    for part in parts:
        for label, number in counts(num_classes, part == "train"):
            path = root / part / f"n{label:04}" / inner / f"{number}.JPEG"
            paint(path, label, number, part == "train")


def make_tiny_imagenet(root: Path) -> None:
    """As distributed: the test images in one folder, their classes in a table."""
    make_folder(root, 200, parts=("train",), inner="images")
    lines = []
    for label, number in counts(200, is_train=False):
        paint(root / "val" / "images" / f"val_{label}.JPEG", label, number, is_train=False)
        lines.append(f"val_{label}.JPEG\tn{label:04}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))


def make_inat19(root: Path, num_classes: int = 4, num_test_classes: int = 4) -> None:
    species = [{"id": 10 + c, "name": f"species {c}", "kingdom": "ab"[c % 2]} for c in range(4)]
    (root / "categories.json").write_text(json.dumps(species))
    for part, classes in (("train", num_classes), ("val", num_test_classes)):
        images, annotations = [], []
        for label, number in counts(classes, part == "train"):
            file_name = f"train_val2019/Birds/{label}/{part}{number}.jpg"
            paint(root / file_name, label, number, part == "train")
            annotations.insert(0, {"image_id": len(images), "category_id": 10 + label})
            images.append({"id": len(images), "file_name": file_name})
        (root / f"{part}2019.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def make_food101(root: Path) -> None:
    for part in ("train", "test"):
        names: dict[str, list[str]] = {}
        for label, number in counts(101, part == "train"):
            name = f"dish{label:03}/{part}{number}"
            paint(root / "food-101" / "images" / f"{name}.jpg", label, number, part == "train")
            names.setdefault(f"dish{label:03}", []).append(name)
        (root / "food-101" / "meta").mkdir(exist_ok=True)
        (root / "food-101" / "meta" / f"{part}.json").write_text(json.dumps(names))


def make_cars(root: Path) -> None:
    cars = root / "stanford_cars"
    (cars / "devkit").mkdir(parents=True)
    savemat(cars / "devkit" / "cars_meta.mat", {"class_names": np.array([f"car {c}" for c in range(196)], object)})
    for part, table in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = []
        for label, number in counts(196, part == "train"):
            rows.append((f"{label}_{number}.jpg", label + 1))
            paint(cars / f"cars_{part}" / rows[-1][0], label, number, part == "train")
        savemat(cars / table, {"annotations": np.array(rows, dtype=[("fname", object), ("class", np.uint16)])})


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def make_flowers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training images are in two lists, called training and validation."""
    folder = root / "flowers-102"
    labels, ids = [], {"trnid": [], "valid": [], "tstid": []}
    for is_train in (True, False):
        for label, number in counts(102, is_train):
            labels.append(label + 1)
            paint(folder / "jpg" / f"image_{len(labels):05}.jpg", label, number, is_train)
            ids[("trnid", "valid")[label % 2] if is_train else "tstid"].append(len(labels))
    savemat(folder / "imagelabels.mat", {"labels": np.array(labels)})
    savemat(folder / "setid.mat", {part: np.array(numbers) for part, numbers in ids.items()})
    table = {"label": "imagelabels.mat", "setid": "setid.mat"}
    monkeypatch.setattr(tv.Flowers102, "_file_dict", {key: (file, md5(folder / file)) for key, file in table.items()})


def make_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, kind: type[tv.CIFAR10], num_classes: int) -> None:
    folder = root / kind.base_folder
    folder.mkdir()
    label_key = "fine_labels" if num_classes == 100 else "labels"

    def write(file: str, is_train: bool, part: slice) -> list[str]:
        rows = list(counts(num_classes, is_train))[part]
        data = [np.repeat(np.array(colour(*row, is_train), np.uint8), 32 * 32) for row in rows]
        content = {"data": np.reshape(data, (-1, 3072)), label_key: [label for label, _ in rows]}
        (folder / file).write_bytes(pickle.dumps(content))
        return [file, md5(folder / file)]

    files = [file for file, _ in kind.train_list]
    train_list = [write(file, True, slice(i, None, len(files))) for i, file in enumerate(files)]
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: [f"thing {c}" for c in range(num_classes)]}))
    monkeypatch.setattr(kind, "train_list", train_list)
    monkeypatch.setattr(kind, "test_list", [write(kind.test_list[0][0], False, slice(None))])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})


def idx(array: np.ndarray) -> bytes:
    """The idx format of MNIST."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def make_fmnist(folder: Path, zipped: bool = True) -> dict[str, np.ndarray]:
    """The four files with random images; the arrays by the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 20), ("t10k", 10)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(count) % 10
    for name, array in arrays.items():
        file = folder / (f"{name}.gz" if zipped else name)
        file.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return arrays


def message_of(name: str, root: Path | None, is_train: bool = False) -> str:
    """The message with which a data set is refused."""
    with pytest.raises(InputError) as raised:
        build_dataset(name, root and str(root), is_train, PILToTensor())
    message = str(raised.value)
    assert "\n" not in message
    assert "download=True" not in message  # which is no option here
    assert "--data-path" in message or str(root) in message
    return message
