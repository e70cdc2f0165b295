"""Images to train on, faster than Pillow, torchvision and timm make them, with the same random numbers.

docs/performance.md has the times, and what was tried and is not here.
"""

import math
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, RandomResizedCropAndInterpolation, auto_augment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import default_collate
from torchvision import transforms


def decode(file: BinaryIO) -> Image.Image:
    """The pixels of an open image file, or of ``io.BytesIO`` of its content, as RGB.

    Raises:
        what Pillow does for content that is no image, or not the whole of one: nothing of it is left undecoded.
    """
    try:
        image = Image.open(file)
    except UnidentifiedImageError:  # whose message names the object in memory, another one each time
        raise UnidentifiedImageError("it is no image of a kind that Pillow knows") from None
    image.load()
    return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """A loaded image with 8 bits per channel, as RGB: deeper grey images, which Pillow clips, are scaled.

    Raises:
        ValueError: it has 32-bit numbers whose white is not known.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        rgb = Image.fromarray(eight_bits(image)).convert("RGB")
        rgb.info.update(image.info)  # with the orientation
        return rgb
    return image if image.mode == "RGB" else image.convert("RGB")  # convert copies even where it changes nothing


def eight_bits(image: Image.Image) -> np.ndarray:
    """The pixels (height, width) of a grey image with more than 8 bits, scaled to 0…255 in uint8."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})  # the tags of a TIFF file
    if image.mode.startswith("I;16"):
        white = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    elif image.format in ("PNG", "PPM"):  # which older Pillow reads as 32 bits; PPM's are scaled to 65535
        white = 1 if image.mode == "F" else 65535
    elif tags.get(BITS_PER_SAMPLE) == (16,):  # with a sign
        white = 32767
    else:
        white = white_of(values)
    if values.min() < 0 or not values.max() <= white:  # nan is not less than anything
        raise ValueError(f"its pixels go from {values.min():g} to {values.max():g}, expected 0 to {white}")
    scaled = np.rint(values * np.float32(255 / white)).astype(np.uint8)
    return 255 - scaled if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else scaled


def white_of(values: np.ndarray) -> int:
    """What stands for white among 32-bit numbers: 255 or 65535, up to which whole numbers go, or 1, for fractions.

    Raises:
        ValueError: negative numbers, fractions above 1, or larger numbers.
    """
    low, high = values.min(), values.max()
    if low >= 0 and high <= 1 and values.dtype.kind == "f":
        return 1
    if low >= 0 and high <= 65535 and (values.dtype.kind != "f" or (values == np.rint(values)).all()):
        return 255 if high <= 255 else 65535
    raise ValueError(
        f"its 32-bit pixels go from {low:g} to {high:g}: expected fractions up to 1, or whole numbers up to 255 or "
        "65535"
    )


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation, which cameras write, wants it shown."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of damaged metadata, in any way the parsers know: it says nothing then
        return image


BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value of the second


@lru_cache(maxsize=1)
def load(path: str | Path) -> Image.Image:
    """An image file as RGB, which is not to be changed in place.

    The last one is kept: repeated augmentation asks for it several times in a row.
    """
    with open(path, "rb") as file:
        return decode(file)


# ---------------------------------------------------------------------------------------------------------------------
# Steps of the transform, each with the random numbers of the one whose place it takes
# ---------------------------------------------------------------------------------------------------------------------


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, resized by torch in a third of Pillow's time: pixels differ by 2 of 255 at most."""

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        mode = random.choice(self.interpolation) if several(self) else self.interpolation
        crop = as_pixels(image.crop((left, top, left + width, top + height)))
        # a batch of one, so laid out that torch takes its vectorised way, and with the fourth byte for alignment
        pixels = torch.from_numpy(crop.view(np.uint8).reshape(1, height, width, 4)).permute(0, 3, 1, 2)
        resized = interpolate(pixels, self.size, mode=mode.value, antialias=True)
        return as_image(resized[0].permute(1, 2, 0).numpy())


def several(crop: RandomResizedCropAndInterpolation) -> bool:
    """Whether the crop is resized in one way or another, at random."""
    return isinstance(crop.interpolation, tuple)


def as_pixels(image: Image.Image) -> np.ndarray:
    """(height, width) numbers of 32 bits, Pillow's own form of a pixel, and so much faster than three bytes each."""
    pixels = np.frombuffer(bytearray(image.tobytes("raw", "RGBX")), np.uint32)
    return pixels.reshape(image.height, image.width)


def as_image(pixels: np.ndarray) -> Image.Image:
    """The other way round, from 32 bits or from four bytes."""
    height, width = pixels.shape[:2]
    return Image.frombytes("RGB", (width, height), np.ascontiguousarray(pixels).data, "raw", "RGBX")


def shift_rows(image: Image.Image, shifts: np.ndarray, fillcolor: tuple[int, int, int]) -> Image.Image:
    """Pillow's bicubic affine transform where row y is only moved, by ``shifts[y]`` pixels to the left.

    Pillow weighs 4×4 pixels for each in double precision; here it is 4×1. Pixels differ by 1 of 255 at most.
    """
    pixels, width = as_pixels(image), image.width
    whole = np.floor(shifts)
    places = np.arange(-1, width + 2) + whole.astype(np.int64)[:, None]
    places = np.clip(places, 0, width - 1) + np.arange(0, pixels.size, width)[:, None]
    values = torch.from_numpy(pixels.take(places).view(np.uint8)).float()
    tap = [values[:, 4 * i : 4 * (i + width)] for i in range(4)]
    d = torch.from_numpy((shifts - whole).astype(np.float32))[:, None]
    # Keys' kernel with a = −1
    weight = d * (-1 + d * (2 - d)), 1 + d * d * (d - 2), d * (1 + d * (1 - d)), d * d * (d - 1)
    moved = tap[0] * weight[0]
    for i in (1, 2, 3):
        moved.addcmul_(tap[i], weight[i])
    moved = moved.clamp_(0, 255).to(torch.uint8).numpy().view(np.uint32)
    source = np.arange(0.5, width) + shifts[:, None]
    moved[(source < 0) | (source >= width)] = np.array([*fillcolor, 255], np.uint8).view(np.uint32)
    return as_image(moved)


def shear_x(image: Image.Image, factor: float, fillcolor: tuple[int, int, int], resample: int) -> Image.Image:
    return shift_rows(image, factor * np.arange(0.5, image.height), fillcolor)


def translate_x(image: Image.Image, share: float, fillcolor: tuple[int, int, int], resample: int) -> Image.Image:
    return shift_rows(image, np.full(image.height, share * image.width), fillcolor)


def in_columns(of_rows: Callable) -> Callable:
    """The same along the other axis."""

    def of_columns(image: Image.Image, *args, **kwargs) -> Image.Image:
        turned = Image.Transpose.TRANSPOSE
        return of_rows(image.transpose(turned), *args, **kwargs).transpose(turned)

    return of_columns


# timm's operations of RandAugment → those that take their places
FASTER = {
    auto_augment.shear_x: shear_x,
    auto_augment.shear_y: in_columns(shear_x),
    auto_augment.translate_x_rel: translate_x,
    auto_augment.translate_y_rel: in_columns(translate_x),
}


def faster(transform: transforms.Compose) -> transforms.Compose:
    """DeiT's transform of photographs to train, as timm builds it, with what takes less time and gives a `RawImage`.

    Every step draws what timm's would, so that the same seeds give the same crops, operations and noise. The steps of
    ``transform`` are used, and its RandAugment is changed. Other transforms are returned as they are.
    """
    crop, *steps = transform.transforms
    if not isinstance(crop, RandomResizedCropAndInterpolation):
        return transform
    end = next(i for i, step in enumerate(steps) if isinstance(step, transforms.ToTensor))
    for step in steps[:end]:
        if isinstance(step, auto_augment.RandAugment):
            for op in step.ops:
                if op.kwargs["resample"] == Image.Resampling.BICUBIC:
                    op.aug_fn = FASTER.get(op.aug_fn, op.aug_fn)
    erasing = next((step for step in steps[end:] if isinstance(step, RandomErasing)), None)
    crop = RandomResizedCrop(crop.size, crop.scale, crop.ratio, "random" if several(crop) else crop.interpolation.value)
    return transforms.Compose([crop, *steps[:end], ToRawImage(erasing)])


# ---------------------------------------------------------------------------------------------------------------------
# From the workers to the device: bytes, a quarter of the size of the numbers that the model takes
# ---------------------------------------------------------------------------------------------------------------------


class RawImage(NamedTuple):
    """An augmented image, (3, height, width) in 0…255, that is still to be normalised and then partly erased."""

    pixels: Tensor
    erased: list[tuple[tuple[slice, ...], Tensor]]  # a place, and what is set there


class RawBatch(NamedTuple):
    """Such images, (count, 3, height, width), and what they are erased with: one tensor, because each that a worker
    sends takes an open file, and ``shapes`` of its pieces for the ``places`` in the batch."""

    pixels: Tensor
    noise: Tensor
    shapes: list[torch.Size]
    places: list[tuple[int | slice, ...]]


class ToRawImage:
    """The last step of the transform, in place of timm's conversion to a tensor, normalisation and random erasing."""

    def __init__(self, erasing: RandomErasing | None):
        self.erasing = erasing

    def __call__(self, image: Image.Image) -> RawImage:
        lines = torch.frombuffer(bytearray(image.tobytes("raw", "RGB;L")), dtype=torch.uint8)  # a colour after another
        pixels = lines.view(image.height, 3, image.width).transpose(0, 1).contiguous()
        later = ErasedLater(pixels.shape)
        if self.erasing:
            self.erasing(later)
        return RawImage(pixels, later.parts)


class ErasedLater:
    """Takes the place of the normalised image in timm's random erasing, which asks its size and sets parts of it."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size):
        self.shape, self.parts = shape, []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, place: tuple[slice, ...], values: Tensor) -> None:
        self.parts.append((place, values))


def batch_of(images: list[RawImage]) -> RawBatch:
    pixels = default_collate([image.pixels for image in images])  # in a worker, in memory shared with the main process
    erased = [((i, *place), values) for i, image in enumerate(images) for place, values in image.erased]
    noise = torch.cat([torch.empty(0), *(values.flatten() for _, values in erased)])
    return RawBatch(pixels, noise, [values.shape for _, values in erased], [place for place, _ in erased])


class Normalise:
    """The model's input on ``device`` from what the workers send. The device is not waited for."""

    def __init__(self, device: torch.device):
        self.device = device
        mean, std = (
            torch.tensor(c, device=device).view(3, 1, 1) for c in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        self.mean, self.factor = 255 * mean, 1 / (255 * std)

    def __call__(self, batch: RawBatch) -> Tensor:
        images = batch.pixels.to(self.device, non_blocking=True).float().sub_(self.mean).mul_(self.factor)
        pieces = batch.noise.to(self.device, non_blocking=True).split([math.prod(shape) for shape in batch.shapes])
        for place, shape, values in zip(batch.places, batch.shapes, pieces, strict=True):
            images[tuple(place)] = values.view(shape)  # DataLoader's pinning of memory makes lists of tuples
        return images
