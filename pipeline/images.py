"""Decoding, and a faster version of timm's training transform with the same random numbers.

docs/performance.md has the timings, and the alternatives that were measured.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common.devices import to_device

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
    """Decode an open image file, or ``io.BytesIO`` of its content, to RGB.

    Raises:
        Pillow's exceptions for content that is not an image, or truncated.
    """
    try:
        image = Image.open(file)
    except UnidentifiedImageError:  # its message contains the address of the object
        raise UnidentifiedImageError("not an image format that Pillow knows") from None
    image.load()
    return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image to RGB with 8 bits per channel; deeper grey images, which Pillow clips, are scaled.

    Raises:
        ValueError: 32-bit pixels whose white level is unknown.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        rgb = Image.fromarray(to_uint8(image)).convert("RGB")
        rgb.info.update(image.info)  # with the orientation
        return rgb
    return image if image.mode == "RGB" else image.convert("RGB")  # convert always copies


def to_uint8(image: Image.Image) -> np.ndarray:
    """The pixels (height, width) of a grey image with more than 8 bits, scaled to 0…255."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})  # of TIFF files
    if image.mode.startswith("I;16"):
        white = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    elif image.format in ("PNG", "PPM"):  # older Pillow reads them as 32 bits, PPM scaled to 65535
        white = 1 if image.mode == "F" else 65535
    elif tags.get(BITS_PER_SAMPLE) == (16,):  # signed
        white = 32767
    else:
        white = white_level(values)
    if values.min() < 0 or not values.max() <= white:  # `not <=` catches NaN
        raise ValueError(f"its pixels go from {values.min():g} to {values.max():g}, expected 0 to {white}")
    scaled = np.rint(values * np.float32(255 / white)).astype(np.uint8)
    return 255 - scaled if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else scaled


def white_level(values: np.ndarray) -> int:
    """The white level of 32-bit pixels: 1 for fractions, 255 or 65535 for whole numbers.

    Raises:
        ValueError: negative numbers, fractions above 1, or numbers above 65535.
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


def apply_orientation(image: Image.Image) -> Image.Image:
    """Rotate and flip the image as its EXIF orientation says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata make the parsers raise all kinds of errors
        return image


BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value of the second


@lru_cache(maxsize=1)
def load_image(path: str | Path) -> Image.Image:
    """Load an image file as RGB. Do not modify the result: it is cached.

    The cache holds one image, because repeated augmentation loads the same one several times in a row.
    """
    with open(path, "rb") as file:
        return decode(file)


# ---------------------------------------------------------------------------------------------------------------------
# Steps of the transform; each draws the same random numbers as the step that it replaces
# ---------------------------------------------------------------------------------------------------------------------


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, resized by torch in a third of Pillow's time; pixels differ by at most 2 of 255."""

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        mode = random.choice(self.interpolation) if has_random_interpolation(self) else self.interpolation
        crop = to_packed(image.crop((left, top, left + width, top + height)))
        # channels last with four bytes per pixel: torch then uses its vectorised kernel
        pixels = torch.from_numpy(crop.view(np.uint8).reshape(1, height, width, 4)).permute(0, 3, 1, 2)
        resized = interpolate(pixels, self.size, mode=mode.value, antialias=True)
        return from_packed(resized[0].permute(1, 2, 0).numpy())


def has_random_interpolation(crop: RandomResizedCropAndInterpolation) -> bool:
    """Whether the crop chooses between several interpolation modes."""
    return isinstance(crop.interpolation, tuple)


def to_packed(image: Image.Image) -> np.ndarray:
    """(height, width) in uint32, Pillow's own layout of RGB, much faster to copy than three bytes per pixel."""
    pixels = np.frombuffer(bytearray(image.tobytes("raw", "RGBX")), np.uint32)
    return pixels.reshape(image.height, image.width)


def from_packed(pixels: np.ndarray) -> Image.Image:
    """The inverse of `to_packed`; also takes (height, width, 4) in uint8."""
    height, width = pixels.shape[:2]
    return Image.frombytes("RGB", (width, height), np.ascontiguousarray(pixels).data, "raw", "RGBX")


def shift_rows(image: Image.Image, shifts: np.ndarray, fillcolor: tuple[int, int, int]) -> Image.Image:
    """Shift row y by ``shifts[y]`` pixels to the left with bicubic interpolation.

    Pillow's affine transform sums 4×4 pixels in double precision, this 4×1; pixels differ by at most 1 of 255.
    """
    pixels, width = to_packed(image), image.width
    whole = np.floor(shifts)
    places = np.arange(-1, width + 2) + whole.astype(np.int64)[:, None]
    places = np.clip(places, 0, width - 1) + np.arange(0, pixels.size, width)[:, None]
    values = torch.from_numpy(pixels.take(places).view(np.uint8)).float()
    tap = [values[:, 4 * i : 4 * (i + width)] for i in range(4)]
    d = torch.from_numpy((shifts - whole).astype(np.float32))[:, None]
    # Keys' cubic kernel with a = −1
    weight = d * (-1 + d * (2 - d)), 1 + d * d * (d - 2), d * (1 + d * (1 - d)), d * d * (d - 1)
    moved = tap[0] * weight[0]
    for i in (1, 2, 3):
        moved.addcmul_(tap[i], weight[i])
    moved = moved.clamp_(0, 255).to(torch.uint8).numpy().view(np.uint32)
    source = np.arange(0.5, width) + shifts[:, None]
    moved[(source < 0) | (source >= width)] = np.array([*fillcolor, 255], np.uint8).view(np.uint32)
    return from_packed(moved)


def shear_x(image: Image.Image, factor: float, fillcolor: tuple[int, int, int], resample: int) -> Image.Image:
    return shift_rows(image, factor * np.arange(0.5, image.height), fillcolor)


def translate_x(image: Image.Image, share: float, fillcolor: tuple[int, int, int], resample: int) -> Image.Image:
    return shift_rows(image, np.full(image.height, share * image.width), fillcolor)


def transposed_operation(operation: Callable) -> Callable:
    """The same operation along the other axis."""

    def transposed(image: Image.Image, *args, **kwargs) -> Image.Image:
        transpose = Image.Transpose.TRANSPOSE
        return operation(image.transpose(transpose), *args, **kwargs).transpose(transpose)

    return transposed


# timm's operations of RandAugment → their replacements
FAST_OPERATIONS = {
    auto_augment.shear_x: shear_x,
    auto_augment.shear_y: transposed_operation(shear_x),
    auto_augment.translate_x_rel: translate_x,
    auto_augment.translate_y_rel: transposed_operation(translate_x),
}


def fast_transform(transform: transforms.Compose) -> transforms.Compose:
    """Replace the slow steps of timm's training transform for photographs; the result returns a `RawImage`.

    The random numbers stay the same: the same seeds give the same crops, operations and noise. The steps of
    ``transform`` are reused, and its RandAugment is modified in place. Other transforms are returned unchanged.
    """
    crop, *steps = transform.transforms
    if not isinstance(crop, RandomResizedCropAndInterpolation):
        return transform
    end = next(i for i, step in enumerate(steps) if isinstance(step, transforms.ToTensor))
    for step in steps[:end]:
        if isinstance(step, auto_augment.RandAugment):
            for op in step.ops:
                if op.kwargs["resample"] == Image.Resampling.BICUBIC:
                    op.aug_fn = FAST_OPERATIONS.get(op.aug_fn, op.aug_fn)
    erasing = next((step for step in steps[end:] if isinstance(step, RandomErasing)), None)
    crop = RandomResizedCrop(
        crop.size, crop.scale, crop.ratio, "random" if has_random_interpolation(crop) else crop.interpolation.value
    )
    return transforms.Compose([crop, *steps[:end], ToRawImage(erasing)])


# ---------------------------------------------------------------------------------------------------------------------
# From the workers to the device: uint8, a quarter of the size of float32
# ---------------------------------------------------------------------------------------------------------------------


class RawImage(NamedTuple):
    """An augmented image, (3, height, width) in uint8, before normalisation and random erasing."""

    pixels: Tensor
    erased: list[tuple[tuple[slice, ...], Tensor]]  # indices and values


class RawBatch(NamedTuple):
    """A batch of `RawImage`.

    Attributes:
        pixels: (count, 3, height, width) in uint8.
        noise: the values of all erased regions, flat: one tensor, because every tensor sent by a worker takes an open
            file.
        shapes: of the values of each region.
        places: indices of each region in the batch.
    """

    pixels: Tensor
    noise: Tensor
    shapes: list[torch.Size]
    places: list[tuple[int | slice, ...]]


class ToRawImage:
    """The last step of the transform; replaces timm's ToTensor, normalisation and random erasing."""

    def __init__(self, erasing: RandomErasing | None):
        self.erasing = erasing

    def __call__(self, image: Image.Image) -> RawImage:
        lines = torch.frombuffer(bytearray(image.tobytes("raw", "RGB;L")), dtype=torch.uint8)  # one line per channel
        pixels = lines.view(image.height, 3, image.width).transpose(0, 1).contiguous()
        later = DeferredErasing(pixels.shape)
        if self.erasing:
            self.erasing(later)
        return RawImage(pixels, later.parts)


class DeferredErasing:
    """Stands in for the normalised image in timm's RandomErasing, and records the regions that it sets."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size):
        self.shape, self.parts = shape, []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, place: tuple[slice, ...], values: Tensor) -> None:
        self.parts.append((place, values))


def collate_raw(images: list[RawImage]) -> RawBatch:
    pixels = default_collate([image.pixels for image in images])  # in shared memory if called in a worker
    erased = [((i, *place), values) for i, image in enumerate(images) for place, values in image.erased]
    noise = torch.cat([torch.empty(0), *(values.flatten() for _, values in erased)])
    return RawBatch(pixels, noise, [values.shape for _, values in erased], [place for place, _ in erased])


class Normalise:
    """`RawBatch` → normalised images on ``device``, without synchronisation.

    Args:
        mean, std: of each colour, for pixels from 0 to 1.
    """

    def __init__(
        self,
        device: torch.device,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ):
        self.device = device
        mean, std = (torch.tensor(c, dtype=torch.float32, device=device).view(3, 1, 1) for c in (mean, std))
        self.mean, self.factor = 255 * mean, 1 / (255 * std)

    def __call__(self, batch: RawBatch) -> Tensor:
        images = to_device(batch.pixels, self.device).float().sub_(self.mean).mul_(self.factor)
        pieces = to_device(batch.noise, self.device).split([math.prod(shape) for shape in batch.shapes])
        for place, shape, values in zip(batch.places, batch.shapes, pieces, strict=True):
            images[tuple(place)] = values.view(shape)  # DataLoader's pin_memory turns tuples into lists
        return images
