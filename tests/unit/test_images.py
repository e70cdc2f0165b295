"""Images to train on: what the program makes of them is what timm's and torchvision's own steps make, but sooner."""

import io
import random
from collections.abc import Callable
from pathlib import Path

from datasets import build_dataset, build_transform
from pipeline import images
from pipeline.images import RawImage
from pipeline.loader import CheckedLoader, Sample, SeededDataset, collate
from samplers import TrainSampler

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_STD, auto_augment
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets.folder import default_loader

CPU = torch.device("cpu")
LEVEL = 1 / 255 / min(IMAGENET_DEFAULT_STD)  # at most so much of the model's input is one of an image's 256 levels
SIZES = ((200, 150), (500, 375), (90, 400), (700, 710))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth, with noise and an edge."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(256, size=(7, 9, 3), dtype=np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC)) // 2 + rng.integers(
        50, size=(height, width, 3), dtype=np.uint8
    )
    pixels[height // 3 :, : width // 2] += 70
    return Image.fromarray(pixels)


def finished(raw: RawImage) -> Tensor:
    """As the model gets it, a batch of one."""
    batch, _, _ = collate([Sample(raw, 0, [])])
    pinned = batch._replace(shapes=[[*shape] for shape in batch.shapes], places=[[*place] for place in batch.places])
    return images.Normalise(CPU)(pinned)[0]  # as DataLoader's pinning of memory leaves it


def states() -> tuple:
    return random.getstate(), np.random.get_state()[1:], torch.get_rng_state()


def both(image: Image.Image, seed: int, **options) -> tuple[Tensor, Tensor]:
    """The image by the program and by timm's and torchvision's steps, after as many random numbers."""
    found, ends = [], []
    for change in (images.fast_transform, lambda transform: transform):
        transform = change(build_transform("FOLDER", True, 224, **options))
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        found.append(transform(image))
        ends.append(states())
    for a, b in zip(*(end[1] for end in ends), strict=True):
        np.testing.assert_array_equal(a, b)
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][2], ends[1][2])
    return finished(found[0]), found[1]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_crops_and_mirroring_are_the_published_ones(interpolation: str):
    for seed in range(12):
        image = picture(*SIZES[seed % len(SIZES)], seed)
        ours, published = both(image, seed, aa=None, color_jitter=0.0, reprob=0.0, interpolation=interpolation)
        assert ours.shape == published.shape == (3, 224, 224)
        assert ours.is_contiguous()
        assert (ours - published).abs().max() < 2.01 * LEVEL
        assert (ours - published).abs().mean() < 0.05 * LEVEL


@pytest.mark.parametrize("remode", ["pixel", "rand", "const"])
def test_erased_parts_are_the_published_ones(remode: str):
    changed = 0
    for seed in range(8):
        image = picture(250, 240, seed)
        options = dict(aa=None, color_jitter=0.0)
        ours, published = both(image, seed, reprob=0.9, remode=remode, recount=2, **options)
        assert (ours - published).abs().max() < 2.01 * LEVEL  # the noise is exactly there
        changed += not torch.equal(published, both(image, seed, reprob=0.0, **options)[1])
    assert changed > 4


def test_the_recipe_is_the_published_one():
    """A level more or less is much to an operation with a threshold: hence not every pixel is so near."""
    means = []
    for seed in range(80):
        ours, published = both(picture(*SIZES[seed % 2], seed), seed)
        difference = (ours - published).abs()
        assert (difference > 4 * LEVEL).float().mean() < 0.1
        means.append(difference.mean().item())
    assert np.quantile(means, 0.9) < 0.1 * LEVEL
    assert max(means) < 5 * LEVEL


@pytest.mark.parametrize("jitter", [0.0, 0.3])
@pytest.mark.parametrize("aa", [None, "3a", "augmix-m5-w2", "original", "rand-m9-mstd0.5-inc1-n3-p1"])
def test_other_policies_draw_the_same(aa: str | None, jitter: float):
    for seed in range(3):
        ours, published = both(picture(120, 100, seed), seed, aa=aa, color_jitter=jitter)
        assert (ours - published).abs().median() <= 2.01 * LEVEL


@pytest.mark.parametrize("amount", [0.0, 0.3, -0.3, 0.45, -0.123, 1.0, -2.5])
@pytest.mark.parametrize("size", [(40, 30), (30, 41)])
@pytest.mark.parametrize("operation", images.FAST_OPERATIONS)
def test_moved_rows_are_those_of_pillow(operation: Callable, size: tuple[int, int], amount: float):
    kwargs = dict(resample=Image.Resampling.BICUBIC, fillcolor=(124, 116, 104))
    ours, pillows = (
        np.asarray(way(picture(*size), amount, **kwargs), dtype=int)
        for way in (images.FAST_OPERATIONS[operation], operation)
    )
    assert ours.shape == pillows.shape
    assert np.abs(ours - pillows).max() <= 1
    assert ((ours == (124, 116, 104)).all(-1) == (pillows == (124, 116, 104)).all(-1)).mean() > 0.99


def test_random_interpolation_keeps_timms_operations():
    transform = images.fast_transform(build_transform("FOLDER", True, 224, interpolation="random"))
    assert all(op.aug_fn is auto_augment.NAME_TO_OP[op.name] for op in transform.transforms[2].ops)


@pytest.mark.parametrize(
    ("name", "size", "is_train"), [("DIGITS", 32, True), ("CIFAR10", 32, True), ("IMNET", 224, False)]
)
def test_small_images_and_evaluation_are_left_alone(name: str, size: int, is_train: bool):
    transform = build_transform(name, is_train, size)
    assert images.fast_transform(transform) is transform


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["L", "LA", "1", "P", "RGBA", "CMYK", "RGB"])
def test_every_kind_of_image_becomes_rgb_as_torchvision_makes_it(kind: str, tmp_path: Path):
    image = picture(30, 20).convert(kind)
    path = tmp_path / "image"
    image.save(path, format="TIFF" if kind == "CMYK" else "PNG")
    found = images.load_image(str(path))
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.asarray(default_loader(path)))


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.98])
@pytest.mark.parametrize("suffix", ["JPEG", "PNG"])
def test_a_file_that_is_cut_off_is_no_image(suffix: str, kept: float):
    buffer = io.BytesIO()
    picture(300, 200).save(buffer, format=suffix)
    content = buffer.getvalue()[: int(kept * buffer.tell())]
    messages = set()
    for _ in range(2):
        with pytest.raises(OSError) as raised:  # noqa: PT011  Pillow has several messages
            images.decode(io.BytesIO(content))
        messages.add(str(raised.value))
    assert len(messages) == 1  # a warning is given once for the same message


def make_folder(root: Path, count: int = 3) -> str:
    for part in ("train", "val"):
        for i in range(count):
            path = root / part / "a" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(60, 50, i).save(path)
    return str(root)


def training_images(root: str, **options) -> SeededDataset:
    dataset, _ = build_dataset(
        "FOLDER", root, True, images.fast_transform(build_transform("FOLDER", True, 32, **options))
    )
    return SeededDataset(dataset)


def test_a_repeated_image_is_read_once(tmp_path: Path):
    dataset = training_images(make_folder(tmp_path), aa=None, color_jitter=0.0, reprob=0.0)

    def is_black(index: int) -> bool:
        return all(int(dataset[index, seed].image.pixels.max()) == 0 for seed in range(3))

    assert not is_black(1)
    assert not is_black(0)
    Image.new("RGB", (60, 50)).save(tmp_path / "train" / "a" / "0.png")
    assert not is_black(0)
    assert not is_black(1)
    assert is_black(0)


def test_what_is_kept_of_an_image_does_not_change(tmp_path: Path):
    dataset = training_images(make_folder(tmp_path), aa="rand-m9-mstd0.5-inc1-n4-p1", reprob=0.5)
    first = [dataset[0, seed].image.pixels for seed in range(40)]
    for seed in reversed(range(40)):
        assert torch.equal(dataset[0, seed].image.pixels, first[seed])
    dataset[1, 0]
    for seed in range(40):
        dataset[1, seed]
        assert torch.equal(dataset[0, seed].image.pixels, first[seed])  # read anew


def test_batches_do_not_depend_on_the_workers(tmp_path: Path):
    dataset = training_images(make_folder(tmp_path, 12), reprob=0.5)

    def batches(workers: int, repeats: int) -> list[tuple[Tensor, Tensor]]:
        sampler = TrainSampler(len(dataset), 4, repeats, seed=1)
        loader = DataLoader(dataset, 4, sampler=sampler, num_workers=workers, collate_fn=collate)
        return list(CheckedLoader(loader, skip_bad=False, device=CPU))

    for repeats in (1, 3):
        expected = batches(0, repeats)
        assert len(expected) == 3
        for workers in (1, 2):
            for (inputs, labels), (same, same_labels) in zip(expected, batches(workers, repeats), strict=True):
                assert inputs.shape == (4, 3, 32, 32)
                assert torch.equal(inputs, same)
                assert torch.equal(labels, same_labels)
