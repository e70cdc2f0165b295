"""Batched augmentation of small images on the training device.

Applies timm's and torchvision's training transform, which processes one PIL image at a time, to a batch of tensors.
`BatchAugment` reads the steps and their parameters from the transform itself. Kornia and torchvision's v2 do not offer
this: they sample one magnitude, or one operation, for a whole batch, and their pixels differ from Pillow's.

NumPy draws all random numbers on the host, from the seeds of the samples, so that grouping the images by operation
needs no synchronisation with the device.
"""

from collections.abc import Callable
from itertools import pairwise, product
from typing import NamedTuple

from common.errors import InputError
from pipeline.batch_ops import (
    Warp,
    auto_contrast,
    brightness,
    color,
    contrast,
    equalize,
    invert,
    normalise,
    posterize,
    rotate,
    sharpness,
    shear_x,
    shear_y,
    shift_and_flip,
    solarize,
    solarize_add,
    to_device_of,
    translate_x,
    translate_y,
)
from samplers import splitmix64

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torchvision import transforms

# ---------------------------------------------------------------------------------------------------------------------
# Random numbers
# ---------------------------------------------------------------------------------------------------------------------


class SeededRandom:
    """Random numbers for a batch; those of a sample depend on its seed and on how many were drawn before.

    Args:
        seeds: (count,) in uint64.
    """

    def __init__(self, seeds: np.ndarray):
        self.seeds, self.drawn = seeds, 0

    def bits(self, numbers: int) -> np.ndarray:
        """(count, numbers) in uint64."""
        places = np.arange(self.drawn, self.drawn + numbers, dtype=np.uint64)
        self.drawn += numbers
        return splitmix64(self.seeds[:, None], places)

    def uniform(self, numbers: int) -> np.ndarray:
        """(count, numbers), from 0 to less than 1."""
        return (self.bits(numbers) >> np.uint64(11)) * 2.0**-53

    def normal(self, numbers: int) -> np.ndarray:
        """(count, numbers) of mean 0 and variance 1 (Box–Muller)."""
        radius = np.sqrt(-2 * np.log(1 - self.uniform(numbers)))
        return radius * np.cos(2 * np.pi * self.uniform(numbers))


# quantiles of the normal distribution, indexed by 16 random bits: ten times as fast as Box–Muller for noise
QUANTILES = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16).float().numpy()


def rgb_noise(bits: np.ndarray) -> np.ndarray:
    """Random bits (count,) in uint64 → normal numbers (count, 3), one per channel."""
    return QUANTILES[np.stack([(bits >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (48, 32, 16)], axis=1)]


# ---------------------------------------------------------------------------------------------------------------------
# The arguments of the operations as functions of the magnitude, as timm defines them
# ---------------------------------------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """One of timm's operations.

    Attributes:
        apply: (pixels, one argument per image) → pixels; geometric operations take a `Warp`, too.
        argument: (magnitude, usually 0 to 10; random sign) → argument.
    """

    apply: Callable[..., Tensor]
    argument: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda magnitude, sign: magnitude


GEOMETRIC = (shear_x, shear_y, translate_x, translate_y, rotate)


def enhancement_factor(magnitude: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return magnitude / 10 * 1.8 + 0.1


def increasing_factor(magnitude: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return np.maximum(0.1, 1 + sign * (magnitude / 10 * 0.9))


def signed_argument(most: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda magnitude, sign: sign * (magnitude / 10 * most)


OPERATIONS = {
    "AutoContrast": Operation(auto_contrast),
    "Equalize": Operation(equalize),
    "Invert": Operation(invert),
    "Posterize": Operation(posterize, lambda m, _: np.trunc(m / 10 * 4)),
    "PosterizeIncreasing": Operation(posterize, lambda m, _: 4 - np.trunc(m / 10 * 4)),
    "PosterizeOriginal": Operation(posterize, lambda m, _: 4 + np.trunc(m / 10 * 4)),
    "Solarize": Operation(solarize, lambda m, _: np.minimum(256, np.trunc(m / 10 * 256))),
    "SolarizeIncreasing": Operation(solarize, lambda m, _: 256 - np.minimum(256, np.trunc(m / 10 * 256))),
    "SolarizeAdd": Operation(solarize_add, lambda m, _: np.minimum(128, np.trunc(m / 10 * 110))),
    "ShearX": Operation(shear_x, signed_argument(0.3)),
    "ShearY": Operation(shear_y, signed_argument(0.3)),
    "TranslateXRel": Operation(translate_x, signed_argument(0.45)),
    "TranslateYRel": Operation(translate_y, signed_argument(0.45)),
    "Rotate": Operation(rotate, signed_argument(30)),
}
for _enhancement in (color, contrast, brightness, sharpness):
    _name = _enhancement.__name__.title()
    OPERATIONS[_name] = Operation(_enhancement, enhancement_factor)
    OPERATIONS[f"{_name}Increasing"] = Operation(_enhancement, increasing_factor)


class SampledOperations(NamedTuple):
    """The operations to apply to each image, in order.

    Attributes:
        names: keys of `OPERATIONS`.
        cubic: see `Warp`, for each of ``names``.
        choice: (count, layers): index into ``names``, or −1 for none.
        arguments: (count, layers): of the operations.
    """

    names: list[str]
    cubic: list[bool]
    choice: np.ndarray
    arguments: np.ndarray


class Policy:
    """RandAugment or AutoAugment, with the parameters of timm's object."""

    def __init__(self, policy: RandAugment | AutoAugment):
        self.random = isinstance(policy, RandAugment)
        groups = [policy.ops] if self.random else policy.policy
        self.turns = policy.num_layers if self.random else len(groups[0])
        self.groups = len(groups)
        ops: list[AugmentOp] = [op for group in groups for op in group]
        unknown = {op.name for op in ops} - OPERATIONS.keys()
        if unknown or (self.random and policy.choice_weights is not None):
            found = f"the operation {min(unknown)}" if unknown else "weighted choices"
            raise InputError(f"--cache-data cannot augment with {found}: {POLICIES}")
        resample = ops[0].kwargs["resample"]  # the same for all, as is fillcolor
        kinds = [kind == Image.Resampling.BICUBIC for kind in (resample if isinstance(resample, tuple) else [resample])]
        names = sorted({op.name for op in ops})
        self.kinds, self.fill = len(kinds), ops[0].kwargs["fillcolor"]
        self.names, self.cubic = zip(*product(names, kinds), strict=True)
        self.first = np.array([names.index(op.name) * len(kinds) for op in ops])
        self.probability = np.array([op.prob for op in ops])
        self.magnitude = np.array([op.magnitude for op in ops], dtype=np.float64)
        self.deviation = np.array([op.magnitude_std for op in ops], dtype=np.float64)
        self.highest = np.array([op.magnitude_max or 10 for op in ops], dtype=np.float64)

    def sample(self, draws: SeededRandom) -> SampledOperations:
        turns = self.turns
        if self.random:
            op = (draws.uniform(turns) * len(self.first)).astype(np.int64)
        else:
            group = (draws.uniform(1) * self.groups).astype(np.int64)
            op = group * turns + np.arange(turns)
        used = draws.uniform(turns) <= self.probability[op]
        mean, deviation = self.magnitude[op], self.deviation[op]
        uniform = np.isinf(deviation)
        spread = np.where(uniform, 0, deviation) * draws.normal(turns)
        magnitude = np.where(uniform, mean * draws.uniform(turns), mean + spread).clip(0, self.highest[op])
        sign = np.where(draws.uniform(turns) > 0.5, -1.0, 1.0)
        kind = (draws.uniform(turns) * self.kinds).astype(np.int64)
        choice = np.where(used, self.first[op] + kind, -1)
        arguments = np.zeros(choice.shape)
        for i, name in enumerate(self.names):
            met = choice == i
            arguments[met] = OPERATIONS[name].argument(magnitude[met], sign[met])
        return SampledOperations(self.names, self.cubic, choice, arguments)


POLICIES = "expected an --aa such as rand-m9-mstd0.5-inc1, original or v0, or none"


class Jitter:
    """torchvision's ColorJitter without hue: up to three enhancements in random order."""

    fill = (0, 0, 0)

    def __init__(self, jitter: transforms.ColorJitter):
        ranges = {"Brightness": jitter.brightness, "Contrast": jitter.contrast, "Color": jitter.saturation}
        self.ranges = {name: ends for name, ends in ranges.items() if ends is not None}

    def sample(self, draws: SeededRandom) -> SampledOperations:
        low, high = np.array([*self.ranges.values()]).reshape(-1, 2).T
        choice = draws.uniform(len(self.ranges)).argsort(1)
        factors = low[choice] + (high - low)[choice] * draws.uniform(len(self.ranges))
        return SampledOperations([*self.ranges], [False] * len(self.ranges), choice, factors)


# ---------------------------------------------------------------------------------------------------------------------
# Random erasing
# ---------------------------------------------------------------------------------------------------------------------

ATTEMPTS = 10  # to find a rectangle that is smaller than the image, as in timm


class ErasedPixels(NamedTuple):
    """Erased pixels of a batch: flat indices (pixels,) into (count, height, width), and their values (pixels, 3)."""

    places: np.ndarray
    values: np.ndarray


def sample_erasing(erasing: RandomErasing, draws: SeededRandom, height: int, width: int) -> list[ErasedPixels]:
    """Sample the erased rectangles of a batch; the i-th result holds the i-th rectangle of every image that has one."""
    count = len(draws.seeds)
    chosen = draws.uniform(1)[:, 0] <= erasing.probability
    least, most = erasing.min_count, erasing.max_count
    rectangles = least + (draws.uniform(1)[:, 0] * (most + 1 - least)).astype(np.int64)
    erased = []
    for i in range(most):
        share = erasing.min_area + (erasing.max_area - erasing.min_area) * draws.uniform(ATTEMPTS)
        low, high = erasing.log_aspect_ratio
        aspect = np.exp(low + (high - low) * draws.uniform(ATTEMPTS))
        area = share * height * width / rectangles[:, None]
        h, w = (np.rint(np.sqrt(side)).astype(np.int64) for side in (area * aspect, area / aspect))
        fits = (h < height) & (w < width)
        first = (np.arange(count), fits.argmax(1))
        h, w = h[first], w[first]
        top, left = ((draws.uniform(1)[:, 0] * (free + 1)).astype(np.int64) for free in (height - h, width - w))
        bits = draws.bits(1)[:, 0]
        which = np.flatnonzero(chosen & (i < rectangles) & fits.any(1))
        erased.append(fill_rectangles(erasing, which, Rectangles(top, left, h, w), bits, (height, width)))
    return erased


class Rectangles(NamedTuple):
    """One rectangle per image, in pixels, (count,) each."""

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray


def fill_rectangles(
    erasing: RandomErasing, which: np.ndarray, box: Rectangles, bits: np.ndarray, size: tuple[int, int]
) -> ErasedPixels:
    """The pixels of the rectangles of the images ``which``.

    Args:
        bits: (count,) in uint64, random.
        size: height and width of the images.
    """
    height, width = size
    areas = (box.height * box.width)[which]
    image = which.repeat(areas)
    place = np.arange(len(image)) - (areas.cumsum() - areas).repeat(areas)  # within its rectangle
    row, column = box.top[image] + place // box.width[image], box.left[image] + place % box.width[image]
    if erasing.per_pixel:
        values = rgb_noise(splitmix64(bits[image], place.astype(np.uint64)))
    elif erasing.rand_color:
        values = rgb_noise(bits[image])
    else:
        values = np.zeros((len(image), 3), dtype=np.float32)
    return ErasedPixels((image * height + row) * width + column, values)


# ---------------------------------------------------------------------------------------------------------------------
# The whole transform
# ---------------------------------------------------------------------------------------------------------------------


class BatchAugment:
    """A training transform of `datasets.build_transform` for batches of small images that are already resized."""

    def __init__(self, transform: transforms.Compose):
        """
        Raises:
            InputError: the transform has an unsupported step.
        """
        self.padding, self.flip, self.policy, self.erasing = 0, 0.0, None, None
        for step in transform.transforms:
            match step:
                case transforms.Resize() | MaybeToTensor():
                    pass
                case transforms.Normalize():
                    self.mean, self.std = (torch.as_tensor(values).tolist() for values in (step.mean, step.std))
                case transforms.RandomCrop():
                    self.padding = step.padding
                case transforms.RandomHorizontalFlip():
                    self.flip = step.p
                case RandAugment() | AutoAugment():
                    self.policy = Policy(step)
                case transforms.ColorJitter():
                    self.policy = Jitter(step)
                case RandomErasing():
                    self.erasing = step
                case _:
                    raise InputError(f"--cache-data cannot augment with {type(step).__name__}: {POLICIES}")

    def __call__(self, x: Tensor, seeds: np.ndarray) -> Tensor:
        """
        Args:
            x: (count, height, width, 4) in uint8, as `to_pixels` makes them.
            seeds: (count,) in uint64.

        Returns:
            (count, 3, height, width), normalised. The augmentation of an image depends on its seed only.
        """
        draws = SeededRandom(seeds)
        down, right = (draws.uniform(2) * (2 * self.padding + 1)).astype(np.int64).T - self.padding
        flip = draws.uniform(1)[:, 0] < self.flip
        x = shift_and_flip(x, *(to_device_of(numbers, x) for numbers in (down, right, flip)))
        if self.policy is not None:
            x = apply_operations(x, self.policy.sample(draws), self.policy.fill)
        images = normalise(x, self.mean, self.std)
        if self.erasing is not None:
            for erased in sample_erasing(self.erasing, draws, *x.shape[1:3]):
                erase(images, erased)
        return images


def apply_operations(x: Tensor, drawn: SampledOperations, fill: tuple[int, int, int]) -> Tensor:
    """Apply the sampled operations to ``x``; in every layer the images are sorted by operation."""
    fill = torch.full((), int.from_bytes(bytes((*fill, 0)), "little"), dtype=torch.int32, device=x.device)
    place = np.arange(len(x))  # the position of each image in `x`
    for choice, arguments in zip(drawn.choice.T, drawn.arguments.T, strict=True):
        order = choice.argsort(kind="stable")
        ends = np.searchsorted(choice[order], np.arange(len(drawn.names) + 1)).tolist()
        x, arguments = x.index_select(0, to_device_of(place[order], x)), to_device_of(arguments[order], x)
        place = order.argsort()
        groups = [x[: ends[0]]]
        for name, cubic, (start, end) in zip(drawn.names, drawn.cubic, pairwise(ends), strict=True):
            if start < end:
                apply = OPERATIONS[name].apply
                warp = (Warp(cubic, fill),) if apply in GEOMETRIC else ()
                groups.append(apply(x[start:end], arguments[start:end], *warp))
        x = torch.cat(groups)
    return x.index_select(0, to_device_of(place, x))


def erase(images: Tensor, erased: ErasedPixels) -> None:
    """Write the erased values to ``images`` (count, 3, height, width) in place."""
    places, values = to_device_of(erased.places, images), to_device_of(erased.values, images)
    area = images.shape[2] * images.shape[3]
    places = places + places // area * (2 * area)  # in the first of three channels
    places = places[:, None] + area * torch.arange(3, device=images.device)
    images.view(-1).index_copy_(0, places.flatten(), values.flatten())
