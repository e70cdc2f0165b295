"""The data sets from small files of their real layouts, the transforms, and the samplers."""

import gzip
import os
import random
from collections import Counter
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path

from common.errors import InputError
from datasets import DATA_SETS, build_dataset, build_transform
from pipeline.loader import SeededDataset, collate
from samplers import ExactSampler, TrainSampler

import numpy as np
import pytest
import torch
from data_layouts import (
    colour,
    counts,
    make_cars,
    make_cifar,
    make_flowers,
    make_folder,
    make_food101,
    make_inat19,
    make_tiny_imagenet,
)
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, RandomResizedCropAndInterpolation
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset
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


# ---------------------------------------------------------------------------------------------------------------------
# Files that are not as they should be
# ---------------------------------------------------------------------------------------------------------------------


def message_of(name: str, root: Path | None, is_train: bool = False) -> str:
    with pytest.raises(InputError) as raised:
        build_dataset(name, root and str(root), is_train, PIXELS)
    message = str(raised.value)
    assert "\n" not in message
    assert "download=True" not in message  # which is no option here
    assert "--data-path" in message or str(root) in message
    return message


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


# ---------------------------------------------------------------------------------------------------------------------
# Transforms
# ---------------------------------------------------------------------------------------------------------------------

NORMALISED = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
)
BICUBIC = transforms.InterpolationMode.BICUBIC
PLAIN = dict(aa=None, color_jitter=0.0, reprob=0.0)  # training images are only placed, and perhaps mirrored


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("name", DATA_SETS)
def test_shape(name: str, interpolation: str):
    native = DATA_SETS[name][2]
    image = noise(native, native) if native else noise(90, 70)
    for size in (24, 28, 32, 64, 224):
        for is_train in (True, False):
            tensor = build_transform(name, is_train, size, interpolation=interpolation if is_train else "bicubic")(
                image
            )
            assert tensor.shape == (3, size, size)
            assert tensor.dtype == torch.float32
            assert tensor.isfinite().all()


@pytest.mark.parametrize("size", [24, 28, 32])
@pytest.mark.parametrize("name", ["FMNIST", "CIFAR10", "CIFAR100", "DIGITS", "TINYIMNET"])
def test_small_images_are_used_whole(name: str, size: int):
    native = DATA_SETS[name][2]
    image = noise(native, native)
    expected = NORMALISED(transforms.Resize((size, size), BICUBIC)(image))
    assert torch.equal(build_transform(name, False, size)(image), expected)


@pytest.mark.parametrize("name", ["FMNIST", "CIFAR10", "CIFAR100", "TINYIMNET"])
def test_small_images_keep_every_pixel_at_their_own_size(name: str):
    native = DATA_SETS[name][2]
    image = noise(native, native)
    assert torch.equal(build_transform(name, False, native)(image), NORMALISED(image))


@pytest.mark.parametrize(("size", "resized"), [(224, 256), (32, 36)])
@pytest.mark.parametrize("name", [name for name in DATA_SETS if DATA_SETS[name][2] is None])
def test_photographs_are_resized_and_cut_from_the_middle(name: str, size: int, resized: int):
    image = noise(300, 200)
    cut = transforms.Compose([transforms.Resize(resized, BICUBIC), transforms.CenterCrop(size), NORMALISED])
    assert torch.equal(build_transform(name, False, size)(image), cut(image))


@pytest.mark.parametrize("name", ["CIFAR10", "FMNIST", "DIGITS"])
def test_small_images_at_224_are_treated_like_photographs(name: str):
    image = noise(32, 32)
    cut = transforms.Compose([transforms.Resize(256, BICUBIC), transforms.CenterCrop(224), NORMALISED])
    assert torch.equal(build_transform(name, False, 224)(image), cut(image))
    assert isinstance(build_transform(name, True, 224).transforms[0], RandomResizedCropAndInterpolation)


def test_crop_ratio():
    image = noise(300, 200)
    cut = transforms.Compose([transforms.Resize(224, BICUBIC), transforms.CenterCrop(224), NORMALISED])
    assert torch.equal(build_transform("IMNET", False, 224, eval_crop_ratio=1.0)(image), cut(image))


@pytest.mark.parametrize("size", [32, 224])
def test_photographs_are_cut_out_at_random_to_train(size: int):
    """Of an image with a red border, which is 0.36 of it, most cuttings show less red."""
    image = Image.new("RGB", (300, 300), (255, 0, 0))
    image.paste((0, 0, 255), (30, 30, 270, 270))
    transform = build_transform("IMNET", True, size, **PLAIN)
    random.seed(0)
    red = [(transform(image)[0] > 0).float().mean().item() for _ in range(20)]
    assert sum(share < 0.3 for share in red) > 15
    assert len(set(red)) > 5


def placements(image: Image.Image, shift: int) -> dict[bytes, tuple[int, int]]:
    """Every way to shift the pixels by up to ``shift``, black where nothing is left, and how it was done."""
    width = image.width
    padded = pad(PIXELS(image), [shift] * 4)
    ways = [(y, x) for y in range(2 * shift + 1) for x in range(2 * shift + 1)]
    return {padded[:, y : y + width, x : x + width].numpy().tobytes(): (y, x) for y, x in ways}


@pytest.mark.parametrize(
    ("name", "size", "mirrored"), [("FMNIST", 28, True), ("CIFAR10", 32, True), ("DIGITS", 32, False)]
)
def test_small_images_are_shifted_to_train_but_no_digit_is_mirrored(name: str, size: int, mirrored: bool):
    image = noise(size, size)
    straight = placements(image, size // 8)
    turned = placements(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), size // 8)
    transform = build_transform(name, True, size, **PLAIN)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    found = []
    for seed in range(60):
        torch.manual_seed(seed)
        pixels = ((transform(image) * std + mean) * 255).round().to(torch.uint8).numpy().tobytes()
        assert pixels in straight or pixels in turned
        found.append(pixels)
    assert any(pixels in turned for pixels in found) == mirrored
    ways = {(straight | turned)[pixels] for pixels in found}
    assert len(ways) > 20
    assert {y for y, _ in ways} | {x for _, x in ways} == set(range(2 * (size // 8) + 1))


# ---------------------------------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 13])
@pytest.mark.parametrize("num_images", [0, 1, 2, 3, 7, 8, 9, 64, 359, 360])
def test_exact_sampler_covers_every_image_once(num_images: int, world_size: int):
    samplers = [ExactSampler(num_images, rank, world_size) for rank in range(world_size)]
    lists = [list(sampler) for sampler in samplers]
    assert sorted(index for indices in lists for index in indices) == list(range(num_images))
    assert [len(indices) for indices in lists] == [len(sampler) for sampler in samplers]
    assert max(map(len, lists)) - min(map(len, lists)) <= 1


@pytest.mark.parametrize("repeats", [1, 2, 3, 5])
def test_train_sampler_repeats_each_image_in_a_row(repeats: int):
    for num_images in range(1, 301):
        sampler = TrainSampler(num_images, 1, repeats)
        keys = list(sampler)
        assert len(keys) == len(sampler) == num_images
        indices = [index for index, _ in keys]
        order = indices[::repeats]
        assert len(set(order)) == len(order)  # another image after the last repeat
        assert set(order) <= set(range(num_images))
        assert indices == [index for index in order for _ in range(repeats)][:num_images]
        assert len(set(keys)) == num_images  # each time with another augmentation


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("repeats", [1, 3])
def test_every_step_has_the_samples_of_one_process(repeats: int, world_size: int):
    for num_images, batch_size in product(range(1, 100), (1, 4, 6)):
        alone = TrainSampler(num_images, batch_size * world_size, repeats, seed=5)
        ranks = [TrainSampler(num_images, batch_size, repeats, 5, rank, world_size) for rank in range(world_size)]
        for sampler in (alone, *ranks):
            sampler.set_position(2)
        keys = list(alone)
        assert len(keys) == len(alone) == num_images // (batch_size * world_size) * batch_size * world_size
        dealt = [list(sampler) for sampler in ranks]
        assert [len(sampler) for sampler in ranks] == [len(keys) // world_size] * world_size
        for step in range(len(keys) // (batch_size * world_size)):
            of_ranks = [key for own in dealt for key in own[step * batch_size : (step + 1) * batch_size]]
            assert sorted(of_ranks) == sorted(keys[step * len(of_ranks) : (step + 1) * len(of_ranks)])


def test_one_process_gets_the_repetitions_of_an_image():
    ranks = [TrainSampler(600, 12, 3, 5, rank, world_size=4) for rank in range(4)]
    images = [[index for index, _ in sampler] for sampler in ranks]
    assert all(own == [image for image in own[::3] for _ in range(3)] for own in images)
    assert all(set(a).isdisjoint(b) for a, b in combinations(images, 2))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (4, 2)])
def test_another_number_of_processes_continues_an_epoch_without_repeating_or_missing_an_image(before, after):
    """Each with 24 images of all processes in a step, three steps by the first ones."""
    alone = list(TrainSampler(200, 24, 3, 5))
    begun = [list(TrainSampler(200, 24 // before, 3, 5, rank, before))[: 3 * 24 // before] for rank in range(before)]
    continued = [TrainSampler(200, 24 // after, 3, 5, rank, after) for rank in range(after)]
    for sampler in continued:
        sampler.set_position(0, images=72)
    keys = [key for keys in (*begun, *map(list, continued)) for key in keys]
    assert sorted(keys) == sorted(alone)
    assert len(alone) == 192


def test_train_sampler_follows_from_seed_and_epoch():
    def keys(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = TrainSampler(50, 1, 3, seed)
        sampler.set_position(epoch)
        torch.manual_seed(epoch)  # of no effect
        return list(sampler)

    first = keys(0, 0)
    assert keys(0, 0) == first
    for other in (keys(0, 1), keys(1, 0)):
        assert [index for index, _ in other] != [index for index, _ in first]
        assert not {seed for _, seed in other} & {seed for _, seed in first}


def test_train_sampler_takes_all_images_in_the_long_run():
    sampler = TrainSampler(20, 4, repeats=3)
    seen = set()
    for epoch in range(30):
        sampler.set_position(epoch)
        seen |= {index for index, _ in sampler}
    assert seen == set(range(20))


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation that follows from the key
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def augmented_digits() -> Dataset:
    dataset, _ = build_dataset("DIGITS", None, True, build_transform("DIGITS", True, 32, reprob=0.5))
    return SeededDataset(dataset)


def test_augmentation_follows_from_the_key(augmented_digits: Dataset):
    for index, seed in ((0, 1), (3, 2**32 - 1)):
        torch.manual_seed(0)
        first, label, _ = augmented_digits[index, seed]
        torch.manual_seed(1)
        again, same_label, _ = augmented_digits[index, seed]
        assert torch.equal(first, again)
        assert label == same_label == augmented_digits.dataset.targets[index]
    versions = {augmented_digits[0, seed][0].numpy().tobytes() for seed in range(20)}
    assert len(versions) == 20
    assert len(augmented_digits) == 1437


def test_batches_do_not_depend_on_the_workers(augmented_digits: Dataset):
    def batches(num_workers: int) -> list[tuple[Tensor, Tensor]]:
        torch.manual_seed(num_workers)  # of no effect
        sampler = TrainSampler(len(augmented_digits), 16, repeats=3, seed=1)
        loader = DataLoader(
            augmented_digits, batch_size=16, sampler=sampler, num_workers=num_workers, collate_fn=collate
        )
        return [batch[:2] for batch, _ in zip(loader, range(6), strict=False)]

    expected = batches(0)
    for num_workers in (1, 2):
        for (images, labels), (same_images, same_labels) in zip(expected, batches(num_workers), strict=True):
            assert torch.equal(images, same_images)
            assert torch.equal(labels, same_labels)


def test_two_processes_see_the_images_of_one(augmented_digits: Dataset):
    def images(rank: int, world_size: int) -> set[bytes]:
        keys = TrainSampler(48, 24 // world_size, 3, 0, rank, world_size)
        return {augmented_digits[key][0].numpy().tobytes() for key in keys}

    assert images(0, 2) | images(1, 2) == images(0, 1)
    assert len(images(0, 1)) == 48
