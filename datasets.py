"""Data sets by name, checked when they are built, and their transforms."""

import copy
import gzip
import json
import re
import zlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from common.errors import InputError
from models.preprocessing import SMALL, WHOLE
from pipeline.folders import FOLDERS, LAYOUTS, SPLITS, ImageFolder, find_folder, not_found_error, subfolders
from pipeline.images import load_image
from pipeline.shard_cache import ShardCache
from pipeline.shards import Choices, ShardDataset

import numpy as np
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo, create_transform
from torch.utils.data import Dataset
from torchvision import datasets as tv
from torchvision import transforms
from torchvision.datasets.utils import check_integrity


class ArrayDataset(Dataset):
    """Grey images in memory, (count, height, width) in 0…255, returned as RGB."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: list[str], transform: Callable | None = None):
        self.classes = classes
        self.images, self.targets, self.transform = images.astype(np.uint8, copy=False), labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        image = Image.fromarray(self.images[index]).convert("RGB")
        return self.transform(image) if self.transform else image, self.targets[index]


class ImageList(Dataset):
    """Image files given as a list, for data sets without class folders."""

    def __init__(self, samples: list[tuple[str, int]], classes: list[str], transform: Callable | None = None):
        self.samples, self.classes, self.transform = samples, classes, transform
        self.targets = [label for _, label in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        image = load_image(path)
        return self.transform(image) if self.transform else image, label


# ---------------------------------------------------------------------------------------------------------------------
# One function per layout on disk: (root, is_train, transform) → dataset; root is what folders.find_folder finds
# ---------------------------------------------------------------------------------------------------------------------


def image_folder(
    root: Path, is_train: bool, transform: Callable, num_classes: int | None = None, single_split: bool = False
) -> Dataset:
    """``train/`` and ``val/`` with one folder per class, the same classes in both.

    Args:
        single_split: whether the other split may be missing.
    """
    own = SPLITS[not is_train]
    needed = (own,) if single_split else SPLITS
    for split in needed:
        if not (root / split).is_dir():
            expected = " and ".join(f"{name}/" for name in needed)
            raise InputError(f"--data-path {root} has no folder {split}/: expected {expected}")
    classes = {split: subfolders(root / split) for split in SPLITS if (root / split).is_dir()}
    both = [classes[own] if single_split and not classes.get(split) else classes[split] for split in SPLITS]
    check_classes(root, *both, expected=num_classes)
    return ImageFolder(root / own, transform, load_image)


def check_classes(
    root: Path,
    train: Collection[str],
    test: Collection[str],
    expected: int | None = None,
    places: tuple[str, str] = ("train/", "val/"),
) -> None:
    """Raises InputError unless training and test images have the same classes, ``expected`` of them."""
    train, test = set(train), set(test)
    if train != test:
        raise InputError(
            f"--data-path {root} has {len(train)} classes in {places[0]} and {len(test)} in {places[1]}; "
            f"the first that is in one alone is {min(train ^ test)}"
        )
    if expected not in (None, len(train)):
        raise InputError(
            f"--data-path {root} has {len(train)} classes, expected {expected}: --data-set FOLDER takes any number"
        )


def tiny_imagenet(root: Path, is_train: bool, transform: Callable, single_split: bool = False) -> Dataset:
    """Tiny ImageNet as distributed, with val/val_annotations.txt, or with val/ sorted into classes."""
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return image_folder(root, is_train, transform, 200, single_split)
    lines = [line.split("\t") for line in annotations.read_text().splitlines()]
    classes = sorted({label for _, label, *_ in lines})
    if not single_split or (root / "train").is_dir():
        check_classes(root, subfolders(root / "train"), classes, expected=200)
    if is_train:
        return ImageFolder(root / "train", transform, load_image)
    samples = [(str(root / "val" / "images" / name), classes.index(label)) for name, label, *_ in lines]
    return ImageList(samples, classes, transform)


def inat19(
    root: Path, is_train: bool, transform: Callable, category: str = "name", single_split: bool = False
) -> Dataset:
    """iNaturalist 2019 as distributed: ``train2019.json``, ``val2019.json``, ``categories.json``."""

    def read(name: str):
        return json.loads((root / name).read_text())

    species = {c["id"]: c for c in read("categories.json")}
    own, places = SPLITS[not is_train], [f"{split}2019.json" for split in SPLITS]
    splits = {split: read(place) for split, place in zip(SPLITS, places, strict=True) if (root / place).is_file()}
    labels = {
        name: {a["image_id"]: species[a["category_id"]][category] for a in split["annotations"]}
        for name, split in splits.items()
    }
    check_classes(root, *(labels.get(split, labels[own]).values() for split in SPLITS), places=tuple(places))
    classes = sorted(set(labels[own].values()))
    split, of_image = splits[own], labels[own]
    samples = [(str(root / image["file_name"]), classes.index(of_image[image["id"]])) for image in split["images"]]
    return ImageList(samples, classes, transform)


def fmnist(root: Path, is_train: bool, transform: Callable) -> Dataset:
    """Fashion-MNIST: any folder with the four idx files, gzipped or not."""
    part = "train" if is_train else "t10k"
    images = _read_idx(root, f"{part}-images-idx3-ubyte").reshape(-1, 28, 28)
    labels = _read_idx(root, f"{part}-labels-idx1-ubyte")
    if len(images) != len(labels):
        raise InputError(f"--data-path {root} has {len(images)} {part} images, but {len(labels)} labels")
    return ArrayDataset(images, labels, tv.FashionMNIST.classes, transform)


def _read_idx(folder: Path, name: str) -> np.ndarray:
    for path in (folder / (name + suffix) for suffix in ("", ".gz")):
        if path.is_file():
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            axes = content[3]  # the magic number ends with the number of axes, one 32-bit size each follows
            return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes)
    raise InputError(f"--data-path {folder} has no {name}, nor {name}.gz")


def digits(root: Path | None, is_train: bool, transform: Callable) -> Dataset:
    """scikit-learn's 1797 handwritten digits, 8×8 pixels: 1437 for training, 360 for testing, always the same split."""
    from sklearn.datasets import load_digits  # inside: the import takes half a second
    from sklearn.model_selection import train_test_split

    data = load_digits()
    labels = data.target
    parts = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    rows = parts[0 if is_train else 1]
    return ArrayDataset(data.images[rows] * (255 / 16), labels[rows], list(map(str, range(10))), transform)


# torchvision's readers do not cache an image for its repetitions, and expect one name for these folders


def flowers(root: Path, is_train: bool, transform: Callable) -> Dataset:
    """Oxford Flowers 102; training uses the official training and validation images, as is usual."""
    from scipy.io import loadmat

    for name, digest in (tv.Flowers102._file_dict[key] for key in ("label", "setid")):
        if not check_integrity(root / name, digest):
            raise InputError(f"{root / name} is damaged: its MD5 is not {digest}")
    labels, ids = (loadmat(root / name, squeeze_me=True) for name in ("imagelabels.mat", "setid.mat"))
    numbers = np.concatenate([np.atleast_1d(ids[part]) for part in (("trnid", "valid") if is_train else ("tstid",))])
    samples = [(str(root / "jpg" / f"image_{n:05d}.jpg"), int(labels["labels"][n - 1]) - 1) for n in numbers.tolist()]
    # newer versions of torchvision know the class names
    return ImageList(samples, getattr(tv.Flowers102, "classes", list(map(str, range(1, 103)))), transform)


def food101(root: Path, is_train: bool, transform: Callable) -> Dataset:
    of_class = json.loads((root / "meta" / ("train.json" if is_train else "test.json")).read_text())
    classes = sorted(of_class)
    samples = [
        (str(root / "images" / f"{name}.jpg"), classes.index(dish))
        for dish, names in of_class.items()
        for name in names
    ]
    return ImageList(samples, classes, transform)


def cars(root: Path, is_train: bool, transform: Callable) -> Dataset:
    """Stanford Cars; Kaggle's archives have the images in ``cars_train/cars_train/``."""
    from scipy.io import loadmat

    table = "devkit/cars_train_annos.mat" if is_train else "cars_test_annos_withlabels.mat"
    rows = np.atleast_1d(loadmat(root / table, squeeze_me=True)["annotations"])
    classes = loadmat(root / "devkit" / "cars_meta.mat", squeeze_me=True)["class_names"].tolist()
    images = root / ("cars_train" if is_train else "cars_test")
    images = images / images.name if (images / images.name).is_dir() else images
    samples = [(str(images / row["fname"]), int(row["class"]) - 1) for row in rows]
    return ImageList(samples, classes, transform)


class _Cifar(tv.CIFAR10):
    """torchvision's reader for a folder of any name; the files of the other split may be missing."""

    def __init__(self, root: Path, is_train: bool, transform: Callable):
        self.base_folder = root.resolve().name
        super().__init__(root.resolve().parent, is_train, transform)

    def _check_integrity(self) -> bool:
        """Check the MD5 of the files of this split before they are unpickled; torchvision checks the class names'."""
        files = self.train_list if self.train else self.test_list
        return all(check_integrity(Path(self.root, self.base_folder, name), digest) for name, digest in files)


class _Cifar10(_Cifar):
    pass


class _Cifar100(_Cifar, tv.CIFAR100):
    pass


def parquet(*args: object) -> Dataset:
    """A data set of the Hugging Face Hub, or of its format."""
    from pipeline.parquet import ParquetDataset  # inside: the import of pyarrow takes half a second

    return ParquetDataset(*args)


# name → (reader, number of classes or None to count them, native size in pixels or None where it varies)
DATA_SETS = {
    "IMNET": (partial(image_folder, num_classes=1000), 1000, None),
    "FOLDER": (image_folder, None, None),
    "CIFAR10": (_Cifar10, 10, 32),
    "CIFAR100": (_Cifar100, 100, 32),
    "INAT19": (inat19, None, None),
    "FOOD101": (food101, 101, None),
    "CARS": (cars, 196, None),
    "FLOWERS": (flowers, 102, None),
    "TINYIMNET": (tiny_imagenet, 200, 64),
    "MINIIMNET": (partial(image_folder, num_classes=100), 100, None),
    "FMNIST": (fmnist, 10, 28),
    "DIGITS": (digits, 10, 8),
    "HF": (parquet, None, SMALL),  # what is trained on at so few pixels is small: the files do not say it
    "WDS": (ShardDataset, None, None),
}
SHARDED = ("HF", "WDS")


def build_dataset(
    name: str,
    path: str | None,
    is_train: bool,
    transform: Callable,
    inat_category: str = "name",
    shard_cache: ShardCache | None = None,
    single_split: bool = False,
    choices: Choices = Choices(),  # noqa: B008  immutable
) -> tuple[Dataset, list[str]]:
    """The training or the test images of a data set, and the names of its classes in the order of their labels.

    Args:
        shard_cache: of remote shards.
        choices: about ``WDS`` and ``HF``.
        single_split: whether the other split may be missing; if it exists, its classes are compared.

    Raises:
        InputError: the path is missing or does not have the layout of the data set, a class has no images, or the
            classes of training and test images differ.
    """
    reader, num_classes, _ = DATA_SETS[name]
    if name == "INAT19":
        reader = partial(reader, category=inat_category)
    if name == "INAT19" or has_class_folders(name):
        reader = partial(reader, single_split=single_split)  # the other readers never need both splits
    root = None
    if name != "DIGITS":
        if path is None:
            raise InputError(f"--data-set {name} needs --data-path, the folder that holds it")
        if name in SHARDED:
            dataset = reader(path, is_train, transform, shard_cache, single_split, choices)
            return dataset, dataset.classes
        if not Path(path).is_dir():
            raise InputError(f"--data-path {path} is not a folder")
    try:
        if name in LAYOUTS:
            root = find_root(name, Path(path), is_train, single_split)
        dataset = reader(root, is_train, transform)
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, IndexError, EOFError, zlib.error) as error:
        # what torchvision and the readers above raise for a wrong layout
        reason = " ".join(str(error).split()).partition(". You can use download=True")[0]  # here it is --download
        raise InputError(f"--data-path {path} does not hold {name} in its usual layout: {reason}") from error
    classes = list(dataset.classes)
    if num_classes not in (None, len(classes)):
        raise InputError(f"--data-path {path} has {len(classes)} classes, {name} has {num_classes}")
    return dataset, classes


def with_transform(dataset: Dataset, transform: Callable) -> Dataset:
    """The images of a data set of `build_dataset` with another transform, without reading its folders again."""
    copied = copy.copy(dataset)
    copied.transform = transform
    return copied


def has_class_folders(name: str) -> bool:
    """Whether a data set is ``train/`` and ``val/`` with a folder per class."""
    return name in LAYOUTS and LAYOUTS[name].train == FOLDERS.train


def find_root(name: str, path: Path, is_train: bool, single_split: bool) -> Path:
    """The root folder for the reader; readers of class folders report missing folders themselves.

    Raises:
        InputError: ``path`` does not contain the data set.
    """
    splits = (SPLITS[not is_train],) if single_split else SPLITS
    root = find_folder(name, path, splits)
    if root is None and not has_class_folders(name):
        raise not_found_error(name, path, splits)
    return root or path


def train_holdout_split(labels: Sequence[int], train: int | None, holdout: int | None) -> tuple[list[int], list[int]]:
    """Stratified, disjoint subsets of the training images: ``train`` of them (default: all others), and ``holdout``.

    They are the beginning and the end of one order that depends on the labels only: runs of all seeds use the same
    images, and larger subsets contain the smaller ones.

    Args:
        labels: of all images, 0 … classes − 1.

    Returns:
        The indices of both subsets, ascending.

    Raises:
        InputError: there are too few images.
    """
    if (train or 1) + (holdout or 0) > len(labels):
        wanted = [f"--holdout {holdout}"] * (holdout is not None)
        wanted.append(f"--train-images {train}" if train else "one image to train")
        raise InputError(f"{' and '.join(wanted)}: more than the {len(labels)} training images of the data set")
    shuffled = np.random.RandomState(0).permutation(len(labels))  # NumPy guarantees its numbers
    of_shuffled = np.asarray(labels)[shuffled]
    grouped, sizes = np.argsort(of_shuffled, kind="stable"), np.bincount(of_shuffled)
    quantiles = np.empty(len(labels))  # of each image within its class
    quantiles[grouped] = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes if size])
    order = shuffled[np.argsort(quantiles, kind="stable")]
    end = len(order) - (holdout or 0)
    return sorted(order[: train or end].tolist()), sorted(order[end:].tolist())


def describe_classes(classes: list[str]) -> dict[str, str]:
    """Descriptions of class names that are WordNet IDs, such as ImageNet's; empty for other names."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return {}
    wordnet = ImageNetInfo("imagenet-22k")
    known = set(wordnet.label_names())
    return {name: wordnet.label_name_to_description(name) for name in classes if name in known}


# ---------------------------------------------------------------------------------------------------------------------
# Transforms
# ---------------------------------------------------------------------------------------------------------------------


def are_small(name: str, input_size: int) -> bool:
    """Whether the images of a data set are used whole at this input size."""
    return DATA_SETS[name][2] is not None and input_size <= SMALL


def build_transform(
    name: str,
    is_train: bool,
    input_size: int,
    color_jitter: float = 0.3,
    aa: str | None = "rand-m9-mstd0.5-inc1",
    interpolation: str = "bicubic",
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
    eval_crop_ratio: float = 0.875,
    crop_mode: str = "center",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    three_augment: bool = False,
    src: bool = False,
    crop_padding: int | None = None,
) -> transforms.Compose:
    """PIL image → normalised tensor (3, input_size, input_size); DeiT's recipe for photographs.

    Training uses random resized crops, evaluation timm's crop in the middle. At input sizes up to 64, data sets of
    small images are resized without a crop; training shifts them by up to an eighth.

    Args:
        eval_crop_ratio, crop_mode: of evaluation; see `models.preprocessing.Preprocessing`, as for ``mean``, ``std``
            and ``interpolation``.
        three_augment: DeiT III's 3-Augment (timm's policy ``3a``, then ``color_jitter``) instead of ``aa`` and random
            erasing.
        src: DeiT III's simple random crop: resize the shorter side, then shift by up to 4 pixels.
        crop_padding: another largest shift, in pixels, of images that are shifted.
    """
    small = are_small(name, input_size)
    if not is_train:
        crop = WHOLE if small else {"crop_pct": eval_crop_ratio, "crop_mode": crop_mode}
        return create_transform(input_size, interpolation=interpolation, mean=mean, std=std, **crop)
    try:
        transform = create_transform(
            input_size=input_size,
            is_training=True,
            color_jitter=color_jitter,
            auto_augment="3a" if three_augment else aa,
            interpolation=interpolation,
            mean=mean,
            std=std,
            hflip=0.0 if name == "DIGITS" else 0.5,  # mirrored digits are other symbols
            re_prob=0.0 if three_augment else reprob,
            re_mode=remode,
            re_count=recount,
        )
    except (AssertionError, ValueError) as error:
        raise InputError(f"--aa {aa} is unknown: expected a policy such as rand-m9-mstd0.5-inc1, or none") from error
    if small or src:  # the first step is timm's random crop for photographs
        mode = transforms.InterpolationMode("bicubic" if interpolation == "random" else interpolation)
        resize = transforms.Resize((input_size, input_size) if small else input_size, mode)
        transform.transforms[:1] = [resize, random_shift(input_size, src, crop_padding)]
    return transform


def random_shift(input_size: int, src: bool, pixels: int | None) -> transforms.RandomCrop:
    """Shift an image by up to ``pixels``; see `build_transform`."""
    if src:
        return transforms.RandomCrop(input_size, 4 if pixels is None else pixels, padding_mode="reflect")
    return transforms.RandomCrop(input_size, max(1, input_size // 8) if pixels is None else pixels)
