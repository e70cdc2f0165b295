"""The augmentation of small images, many at a time, on the device that trains.

What timm and torchvision do to one PIL image after the other is done here to a whole batch of tensors. The recipe is
read off their own transform, so that it exists once. Pixels are as Pillow keeps them, (count, height, width, 4) in
uint8 with a fourth byte that nothing looks at: one pixel is then one 32-bit number to copy. Neither library offers
this: Kornia and torchvision's v2 draw one magnitude, or one operation, for a whole batch, and their pixels are not
Pillow's.

Everything random is drawn by NumPy from the samples' seeds: which images an operation meets is then known without
asking the device, which nothing here waits for.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise, product
from typing import NamedTuple

from models import InputError
from samplers import split_mix

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
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
# Pixels
# ---------------------------------------------------------------------------------------------------------------------


def to_pixels(image: Image.Image) -> Tensor:
    """A PIL image as (height, width, 4) in uint8."""
    return torch.from_numpy(np.array(image.convert("RGBX")))


def packed(x: Tensor) -> Tensor:
    """(count, height, width, 4) in uint8 as (count, height, width) in int32, the same memory."""
    return x.view(torch.int32).squeeze(-1)


def unpacked(x: Tensor) -> Tensor:
    return x.unsqueeze(-1).view(torch.uint8)


def planes(x: Tensor) -> Tensor:
    """(count, height, width, 4) → (count, 3, height · width) in int32: the channels apart, for what needs them so."""
    shifts = torch.arange(0, 24, 8, dtype=torch.int32, device=x.device)  # faster than to pick every fourth byte
    return (packed(x).flatten(1)[:, None] >> shifts[:, None]) & 255


def joined(channels: Tensor, like: Tensor) -> Tensor:
    """The opposite of `planes`, for whole numbers from 0 to 255 of any type."""
    red, green, blue = channels.int().unbind(1)
    return unpacked((red | green << 8 | blue << 16).view(like.shape[:3]))


def whole(levels: Tensor) -> Tensor:
    """float32 → uint8, cut off; in two steps, as the direct one is not vectorised and takes as long as all the rest."""
    return levels.clamp_(0, 255).to(torch.int16).to(torch.uint8)


def every_bit(mask: Tensor) -> Tensor:
    """A mask of packed pixels, in int32; torch.where would take longer than all the rest."""
    return mask.int().neg_()


def each(values: Tensor) -> Tensor:
    """One number per image, to be used with (count, height, width, 4)."""
    return values.view(-1, 1, 1, 1)


MEAN_AND_STD = np.array([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD], dtype=np.float32)


def normalised(x: Tensor) -> Tensor:
    """(count, height, width, 4) in uint8 → (count, 3, height, width): ToTensor and Normalize, bit for bit."""
    mean, std = (sent(values, x).view(3, 1, 1) for values in MEAN_AND_STD)
    images = x[..., :3].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return images.div_(255).sub_(mean).div_(std)


def shift_and_flip(x: Tensor, down: Tensor, right: Tensor, flip: Tensor) -> Tensor:
    """Images cut out ``down`` and ``right`` of where they are, black outside, then perhaps mirrored; each (count,)."""
    count, height, width = x.shape[:3]
    rows = torch.arange(height, device=x.device) + down[:, None]
    columns = torch.arange(width, device=x.device).expand(count, width)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + right[:, None]
    index = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    moved = packed(x).flatten(1).gather(1, index.flatten(1)).view_as(index)
    moved &= every_bit((rows >= 0) & (rows < height))[:, :, None]
    moved &= every_bit((columns >= 0) & (columns < width))[:, None, :]
    return unpacked(moved)


# ---------------------------------------------------------------------------------------------------------------------
# timm's operations: (x, one number per image) → pixels, exactly those of Pillow
# ---------------------------------------------------------------------------------------------------------------------


def auto_contrast(x: Tensor, _: Tensor) -> Tensor:
    levels = planes(x)
    low, high = levels.amin(2, keepdim=True).double(), levels.amax(2, keepdim=True).double()
    # in float64, as Pillow's, since many results lie at whole numbers; 255 / tensor would multiply with the inverse
    scale = torch.full_like(low, 255) / (high - low)
    scale, offset = torch.where(high > low, scale, 1), torch.where(high > low, -low * scale, 0)
    return joined(levels.double().mul_(scale).add_(offset).clamp_(0, 255), x)


def equalize(x: Tensor, _: Tensor) -> Tensor:
    levels = planes(x)
    count, channels, pixels = levels.shape
    brightest, levels = levels.amax(2, keepdim=True).long(), levels.long()
    histogram = torch.zeros(count, channels, 256, dtype=torch.int32, device=x.device)
    histogram.scatter_add_(2, levels, torch.ones_like(levels, dtype=torch.int32))
    step = (pixels - histogram.gather(2, brightest)) // 255
    below = histogram.cumsum(2, dtype=torch.int32) - histogram
    table = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, dtype=torch.int32, device=x.device))
    return joined(table.gather(2, levels), x)


def invert(x: Tensor, _: Tensor) -> Tensor:
    return 255 - x


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    return x & each((256 - 2 ** (8 - bits.clamp(0, 8))).to(torch.uint8))


def solarize(x: Tensor, threshold: Tensor) -> Tensor:
    bright = x.short() >= each(threshold.short())
    return x ^ bright.view(torch.uint8).neg_()  # 255 where bright


def solarize_add(x: Tensor, added: Tensor) -> Tensor:
    dark = (x >> 7) - 1  # 255 below 128, else 0
    return x + (each(added.to(torch.uint8)) & dark).minimum(255 - x)


def grey(x: Tensor) -> Tensor:
    """(count, height, width) in int32: Pillow's weights of the channels."""
    red, green, blue, _ = x.int().unbind(-1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def blend(degenerate: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """From ``degenerate`` at 0 over ``x`` at 1 to what is beyond it, cut off to whole numbers."""
    return whole((x.float() - degenerate).mul_(each(factor.float())).add_(degenerate))


def color(x: Tensor, factor: Tensor) -> Tensor:
    return blend(grey(x).float().unsqueeze(-1), x, factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    pixels = x.shape[1] * x.shape[2]
    mean = (2 * grey(x).sum((1, 2)) + pixels) // (2 * pixels)
    return blend(each(mean.float()), x, factor)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return whole(x.float().mul_(each(factor.float())))


def sharpness(x: Tensor, factor: Tensor) -> Tensor:
    levels = x.short()
    rows = levels[:, :-2] + levels[:, 1:-1] + levels[:, 2:]
    smooth = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * levels[:, 1:-1, 1:-1]
    degenerate = x.float()  # the outermost pixels stay
    degenerate[:, 1:-1, 1:-1] = (smooth.float() / 13 + 0.5).trunc_()
    return blend(degenerate, x, factor)


# ---------------------------------------------------------------------------------------------------------------------
# timm's operations that move pixels: to ±1 those of Pillow, which adds the same products in float64
# ---------------------------------------------------------------------------------------------------------------------


class Warp(NamedTuple):
    """How pixels are interpolated.

    Attributes:
        cubic: whether with Pillow's cubic polynomial (that of its transforms has a = −1) or linearly.
        fill: (), the colour outside of the image, packed.
    """

    cubic: bool
    fill: Tensor

    def weights(self, d: Tensor) -> list[Tensor]:
        """Of the four pixels around a place that is ``d`` after the second of them."""
        if not self.cubic:
            return [torch.zeros_like(d), 1 - d, d, torch.zeros_like(d)]
        square, cube = d * d, d * d * d
        return [2 * square - d - cube, 1 - 2 * square + cube, d + square - cube, cube - square]

    def finish(self, pixels: Tensor, inside: Tensor) -> Tensor:
        """``pixels``, and the colour outside."""
        inside = every_bit(inside)
        return unpacked(packed(pixels) & inside | self.fill & ~inside)


SLIGHTLY = 1e-3  # more than there is keeps levels that are whole already, where float32 gives a little less


def summed(products: Iterable[Tensor]) -> Tensor:
    """One added after the other, so that a sum is the same in a batch of any size."""
    total, *others = products
    for other in others:
        total += other
    return total


def move_rows(x: Tensor, by: Tensor, warp: Warp) -> Tensor:
    """Every row of pixels is taken ``by`` (count, height) pixels to the right of where it is."""
    width = x.shape[2]
    start = by.floor()
    places = torch.arange(-1, width + 2, device=x.device) + start.long().unsqueeze(-1)
    taps = unpacked(packed(x).gather(2, places.clamp_(0, width - 1))).float()
    weights = [w[:, :, None, None] for w in warp.weights((by - start).float())]
    pixels = whole(summed(taps[:, :, i : i + width] * w for i, w in enumerate(weights)).add_(SLIGHTLY))
    source = torch.arange(width, device=x.device) + 0.5 + by.unsqueeze(-1)
    return warp.finish(pixels, (source >= 0) & (source < width))


def transposed(x: Tensor) -> Tensor:
    return unpacked(packed(x).transpose(1, 2).contiguous())


def centres(size: int, x: Tensor) -> Tensor:
    return torch.arange(size, dtype=torch.float64, device=x.device) + 0.5


def shear_x(x: Tensor, factor: Tensor, warp: Warp) -> Tensor:
    return move_rows(x, factor[:, None] * centres(x.shape[1], x), warp)


def shear_y(x: Tensor, factor: Tensor, warp: Warp) -> Tensor:
    return transposed(shear_x(transposed(x), factor, warp))


def translate_x(x: Tensor, share: Tensor, warp: Warp) -> Tensor:
    return move_rows(x, (share * x.shape[2])[:, None].expand(len(x), x.shape[1]), warp)


def translate_y(x: Tensor, share: Tensor, warp: Warp) -> Tensor:
    return transposed(translate_x(transposed(x), share, warp))


def rotate(x: Tensor, degrees: Tensor, warp: Warp) -> Tensor:
    """Counter-clockwise about the middle."""
    height, width = x.shape[1:3]
    angle = torch.deg2rad(-degrees)[:, None, None]
    cos, sin = angle.cos().float(), angle.sin().float()
    across = torch.arange(width, device=x.device) + (0.5 - width / 2)
    down = (torch.arange(height, device=x.device) + (0.5 - height / 2))[:, None]
    to_x, to_y = cos * across + sin * down + width / 2, cos * down - sin * across + height / 2
    inside = (to_x >= 0) & (to_x < width) & (to_y >= 0) & (to_y < height)
    left, top = (to_x - 0.5).floor(), (to_y - 0.5).floor()
    across, down = (
        [w.flatten(1)[:, None] for w in warp.weights(to - 0.5 - first)] for to, first in ((to_x, left), (to_y, top))
    )
    rows = [(top.long() + i).clamp_(0, height - 1) * width for i in range(-1, 3)]
    columns = [(left.long() + i).clamp_(0, width - 1) for i in range(-1, 3)]
    source = planes(x).float()

    def taken(row: Tensor, column: Tensor) -> Tensor:
        return source.gather(2, (row + column).flatten(1)[:, None].expand(-1, 3, -1))

    lines = (summed(taken(row, column).mul_(w) for column, w in zip(columns, across, strict=True)) for row in rows)
    levels = summed(line.mul_(w) for line, w in zip(lines, down, strict=True)).add_(SLIGHTLY)
    return warp.finish(joined(levels.clamp_(0, 255), x), inside)


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


def sent(numbers: np.ndarray, x: Tensor) -> Tensor:
    """``numbers`` on the device of ``x``, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    return tensor.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else tensor.to(x.device)


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
