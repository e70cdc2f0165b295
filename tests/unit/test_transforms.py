"""Transforms: sizes, crops and shifts of training and test images."""

import random

from datasets import DATA_SETS, build_transform

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, RandomResizedCropAndInterpolation
from torch.nn.functional import pad
from torchvision import transforms

PIXELS = transforms.PILToTensor()


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
@pytest.mark.parametrize("name", ["FMNIST", "CIFAR10", "CIFAR100", "DIGITS", "HF", "TINYIMNET"])
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


def drawn(transform: transforms.Compose, image: Image.Image, count: int) -> list[bytes]:
    """The pixels of training images that are made from ``image``."""
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append(((transform(image) * std + mean) * 255).round().to(torch.uint8).numpy().tobytes())
    return found


@pytest.mark.parametrize(
    ("name", "size", "mirrored"), [("FMNIST", 28, True), ("CIFAR10", 32, True), ("DIGITS", 32, False)]
)
def test_small_images_are_shifted_to_train_but_no_digit_is_mirrored(name: str, size: int, mirrored: bool):
    image = noise(size, size)
    straight = placements(image, size // 8)
    turned = placements(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), size // 8)
    transform = build_transform(name, True, size, **PLAIN)
    found = drawn(transform, image, 60)
    assert all(pixels in straight or pixels in turned for pixels in found)
    assert any(pixels in turned for pixels in found) == mirrored
    ways = {(straight | turned)[pixels] for pixels in found}
    assert len(ways) > 20
    assert {y for y, _ in ways} | {x for _, x in ways} == set(range(2 * (size // 8) + 1))


@pytest.mark.parametrize("shift", [0, 1, 5])
def test_crop_padding_is_the_largest_shift(shift: int):
    image = noise(28, 28)
    ways = placements(image, shift)
    found = {
        ways[pixels] for pixels in drawn(build_transform("DIGITS", True, 28, crop_padding=shift, **PLAIN), image, 80)
    }
    assert {y for y, _ in found} == {x for _, x in found} == set(range(2 * shift + 1))


def test_crop_padding_of_the_simple_random_crop():
    image = noise(28, 28)
    unmoved = {PIXELS(way).numpy().tobytes() for way in (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))}
    for shift, count in ((0, 2), (None, 40)):
        found = {*drawn(build_transform("IMNET", True, 28, src=True, crop_padding=shift, **PLAIN), image, 60)}
        assert len(found) >= count
        assert (found == unmoved) == (shift == 0)
