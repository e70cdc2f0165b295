"""The operations of RandAugment on batches of uint8 images."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

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


def sent(numbers: np.ndarray, x: Tensor) -> Tensor:
    """``numbers`` on the device of ``x``, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    return tensor.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else tensor.to(x.device)


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
