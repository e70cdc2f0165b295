"""The augmentation of small images, many at a time, on the device that trains.

What timm and torchvision do to one PIL image after the other is done here to a whole batch of tensors. The recipe is
read off their own transform, so that it exists once. Pixels are as Pillow keeps them, (count, height, width, 4) in
uint8 with a fourth byte that nothing looks at: one pixel is then one 32-bit number to copy. Neither library offers
this: Kornia and torchvision's v2 draw one magnitude, or one operation, for a whole batch, and their pixels are not
Pillow's.

Everything random is drawn by NumPy from the samples' seeds: which images an operation meets is then known without
asking the device, which nothing here waits for.
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
    normalised,
    posterize,
    rotate,
    sent,
    sharpness,
    shear_x,
    shear_y,
    shift_and_flip,
    solarize,
    solarize_add,
    translate_x,
    translate_y,
)
from samplers import split_mix

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


class Draws:
    """Random numbers of many samples, where those of a sample follow from its seed and from how many it has drawn.

    Args:
        seeds: (count,) in uint64.
    """

    def __init__(self, seeds: np.ndarray):
        self.seeds, self.drawn = seeds, 0

    def bits(self, numbers: int) -> np.ndarray:
        """(count, numbers) in uint64."""
        places = np.arange(self.drawn, self.drawn + numbers, dtype=np.uint64)
        self.drawn += numbers
        return split_mix(self.seeds[:, None], places)

    def uniform(self, numbers: int) -> np.ndarray:
        """(count, numbers), from 0 to less than 1."""
        return (self.bits(numbers) >> np.uint64(11)) * 2.0**-53

    def normal(self, numbers: int) -> np.ndarray:
        """(count, numbers), of mean 0 and variance 1, by the method of Box and Muller."""
        radius = np.sqrt(-2 * np.log(1 - self.uniform(numbers)))
        return radius * np.cos(2 * np.pi * self.uniform(numbers))


# Noise for single pixels: the normal distribution's quantiles, looked up with 16 random bits, at a tenth of the price
QUANTILES = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16).float().numpy()


def three_normals(bits: np.ndarray) -> np.ndarray:
    """(count,) in uint64 → (count, 3), one for each channel of a pixel."""
    return QUANTILES[np.stack([(bits >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (48, 32, 16)], axis=1)]


# ---------------------------------------------------------------------------------------------------------------------
# From magnitudes to what the operations take, as timm defines it
# ---------------------------------------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """One of timm's operations.

    Attributes:
        apply: (pixels, one number per image) → pixels; with a `Warp` if it moves them.
        argument: (magnitude from 0 to usually 10, random sign) → that number.
    """

    apply: Callable[..., Tensor]
    argument: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda magnitude, sign: magnitude


MOVING = (shear_x, shear_y, translate_x, translate_y, rotate)


def enhanced(magnitude: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return magnitude / 10 * 1.8 + 0.1


def enhanced_or_reduced(magnitude: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return np.maximum(0.1, 1 + sign * (magnitude / 10 * 0.9))


def signed(most: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
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
    "ShearX": Operation(shear_x, signed(0.3)),
    "ShearY": Operation(shear_y, signed(0.3)),
    "TranslateXRel": Operation(translate_x, signed(0.45)),
    "TranslateYRel": Operation(translate_y, signed(0.45)),
    "Rotate": Operation(rotate, signed(30)),
}
for _enhancement in (color, contrast, brightness, sharpness):
    _name = _enhancement.__name__.title()
    OPERATIONS[_name] = Operation(_enhancement, enhanced)
    OPERATIONS[f"{_name}Increasing"] = Operation(_enhancement, enhanced_or_reduced)


class Drawn(NamedTuple):
    """Which operations images meet, in turn.

    Attributes:
        names: keys of `OPERATIONS`.
        cubic: see `Warp`, for each of ``names``.
        choice: (count, turns): index into ``names``, or −1 for none.
        arguments: (count, turns): what the operations take.
    """

    names: list[str]
    cubic: list[bool]
    choice: np.ndarray
    arguments: np.ndarray


class Policy:
    """RandAugment and AutoAugment, with timm's reading of their names."""

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
        resample = ops[0].kwargs["resample"]  # the same for all, as is the colour
        kinds = [kind == Image.Resampling.BICUBIC for kind in (resample if isinstance(resample, tuple) else [resample])]
        names = sorted({op.name for op in ops})
        self.kinds, self.fill = len(kinds), ops[0].kwargs["fillcolor"]
        self.names, self.cubic = zip(*product(names, kinds), strict=True)
        self.first = np.array([names.index(op.name) * len(kinds) for op in ops])
        self.probability = np.array([op.prob for op in ops])
        self.magnitude = np.array([op.magnitude for op in ops], dtype=np.float64)
        self.deviation = np.array([op.magnitude_std for op in ops], dtype=np.float64)
        self.highest = np.array([op.magnitude_max or 10 for op in ops], dtype=np.float64)

    def draw(self, draws: Draws) -> Drawn:
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
        return Drawn(self.names, self.cubic, choice, arguments)


POLICIES = "expected an --aa such as rand-m9-mstd0.5-inc1, original or v0, or none"


class Jitter:
    """torchvision's ColorJitter without hue: three enhancements in random order."""

    fill = (0, 0, 0)

    def __init__(self, jitter: transforms.ColorJitter):
        ranges = {"Brightness": jitter.brightness, "Contrast": jitter.contrast, "Color": jitter.saturation}
        self.ranges = {name: ends for name, ends in ranges.items() if ends is not None}

    def draw(self, draws: Draws) -> Drawn:
        low, high = np.array([*self.ranges.values()]).reshape(-1, 2).T
        choice = draws.uniform(len(self.ranges)).argsort(1)
        factors = low[choice] + (high - low)[choice] * draws.uniform(len(self.ranges))
        return Drawn([*self.ranges], [False] * len(self.ranges), choice, factors)


# ---------------------------------------------------------------------------------------------------------------------
# Random erasing
# ---------------------------------------------------------------------------------------------------------------------

ATTEMPTS = 10  # timm's, to find a rectangle that is smaller than the image


class Erased(NamedTuple):
    """Pixels of a batch, at places (pixels,) of (count · height · width), and their values (pixels, 3)."""

    places: np.ndarray
    values: np.ndarray


def draw_erasing(erasing: RandomErasing, draws: Draws, height: int, width: int) -> list[Erased]:
    """The rectangles of a batch, one after the other for those that have several."""
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
        erased.append(fill_rectangles(erasing, which, top, left, h, w, bits, height, width))
    return erased


def fill_rectangles(
    erasing: RandomErasing,
    which: np.ndarray,
    top: np.ndarray,
    left: np.ndarray,
    h: np.ndarray,
    w: np.ndarray,
    bits: np.ndarray,
    height: int,
    width: int,
) -> Erased:
    """Every pixel of one rectangle in each of the images ``which``, among all that have places, sizes and bits."""
    sizes = (h * w)[which]
    image = which.repeat(sizes)
    place = np.arange(len(image)) - (sizes.cumsum() - sizes).repeat(sizes)  # within its rectangle
    row, column = top[image] + place // w[image], left[image] + place % w[image]
    if erasing.per_pixel:
        values = three_normals(split_mix(bits[image], place.astype(np.uint64)))
    elif erasing.rand_color:
        values = three_normals(bits[image])
    else:
        values = np.zeros((len(image), 3), dtype=np.float32)
    return Erased((image * height + row) * width + column, values)


# ---------------------------------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------------------------------


class BatchAugment:
    """A training transform of `datasets.build_transform` for many small images, that are resized already."""

    def __init__(self, transform: transforms.Compose):
        """
        Raises:
            InputError: the transform has a step that is not known here.
        """
        self.padding, self.flip, self.policy, self.erasing = 0, 0.0, None, None
        for step in transform.transforms:
            match step:
                case transforms.Resize() | MaybeToTensor() | transforms.Normalize():
                    pass
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
            (count, 3, height, width), normalised; what became of an image depends on it and its seed alone.
        """
        draws = Draws(seeds)
        down, right = (draws.uniform(2) * (2 * self.padding + 1)).astype(np.int64).T - self.padding
        flip = draws.uniform(1)[:, 0] < self.flip
        x = shift_and_flip(x, *(sent(numbers, x) for numbers in (down, right, flip)))
        if self.policy is not None:
            x = apply_operations(x, self.policy.draw(draws), self.policy.fill)
        images = normalised(x)
        if self.erasing is not None:
            for erased in draw_erasing(self.erasing, draws, *x.shape[1:3]):
                erase(images, erased)
        return images


def apply_operations(x: Tensor, drawn: Drawn, fill: tuple[int, int, int]) -> Tensor:
    """The images ``x`` after their operations; in every turn, those that meet the same one lie side by side."""
    fill = torch.full((), int.from_bytes(bytes((*fill, 0)), "little"), dtype=torch.int32, device=x.device)
    place = np.arange(len(x))  # of each image among those of `x`
    for choice, arguments in zip(drawn.choice.T, drawn.arguments.T, strict=True):
        order = choice.argsort(kind="stable")
        ends = np.searchsorted(choice[order], np.arange(len(drawn.names) + 1)).tolist()
        x, arguments = x.index_select(0, sent(place[order], x)), sent(arguments[order], x)
        place = order.argsort()
        groups = [x[: ends[0]]]
        for name, cubic, (start, end) in zip(drawn.names, drawn.cubic, pairwise(ends), strict=True):
            if start < end:
                apply = OPERATIONS[name].apply
                warp = (Warp(cubic, fill),) if apply in MOVING else ()
                groups.append(apply(x[start:end], arguments[start:end], *warp))
        x = torch.cat(groups)
    return x.index_select(0, sent(place, x))


def erase(images: Tensor, erased: Erased) -> None:
    """Put the values of ``erased`` into (count, 3, height, width)."""
    places, values = sent(erased.places, images), sent(erased.values, images)
    area = images.shape[2] * images.shape[3]
    places = places + places // area * (2 * area)  # of the first of three channels
    places = places[:, None] + area * torch.arange(3, device=images.device)
    images.view(-1).index_copy_(0, places.flatten(), values.flatten())
