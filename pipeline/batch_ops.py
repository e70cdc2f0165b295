"""The operations of RandAugment on batches of uint8 images.

Pixels have Pillow's own layout, (count, height, width, 4) in uint8 with an unused fourth byte: copying a pixel is then
copying one 32-bit number.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from common.devices import can_pin, to_device, widest

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


def pack(x: Tensor) -> Tensor:
    """(count, height, width, 4) in uint8 as (count, height, width) in int32; a view of the same memory."""
    return x.view(torch.int32).squeeze(-1)


def unpack(x: Tensor) -> Tensor:
    return x.unsqueeze(-1).view(torch.uint8)


def to_planes(x: Tensor) -> Tensor:
    """(count, height, width, 4) → separate channels, (count, 3, height · width) in int32."""
    shifts = torch.arange(0, 24, 8, dtype=torch.int32, device=x.device)  # shifts are faster than strides
    return (pack(x).flatten(1)[:, None] >> shifts[:, None]) & 255


def from_planes(channels: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_planes`, for whole numbers from 0 to 255 of any type."""
    red, green, blue = channels.int().unbind(1)
    return unpack((red | green << 8 | blue << 16).view(like.shape[:3]))


def truncate(levels: Tensor) -> Tensor:
    """float32 → uint8 by truncation; in two steps, because the direct conversion is not vectorised."""
    return levels.clamp_(0, 255).to(torch.int16).to(torch.uint8)


def bit_mask(mask: Tensor) -> Tensor:
    """A boolean mask for packed pixels as int32, all bits or none; much faster than torch.where."""
    return mask.int().neg_()


def per_image(values: Tensor) -> Tensor:
    """(count,) → (count, 1, 1, 1), to broadcast with pixels."""
    return values.view(-1, 1, 1, 1)


def to_device_of(numbers: np.ndarray, x: Tensor) -> Tensor:
    """``numbers`` on the device of ``x``, without synchronisation; in float32 where it has no float64."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    if tensor.dtype == torch.float64:
        tensor = tensor.to(widest(x.device))
    return to_device(tensor.pin_memory() if can_pin(x.device) else tensor, x.device)


def normalise(
    x: Tensor, mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
) -> Tensor:
    """(count, height, width, 4) in uint8 → (count, 3, height, width), bit-identical to ToTensor and Normalize."""
    mean, std = (to_device_of(np.array(values, dtype=np.float32), x).view(3, 1, 1) for values in (mean, std))
    images = x[..., :3].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return images.div_(255).sub_(mean).div_(std)


def shift_and_flip(x: Tensor, down: Tensor, right: Tensor, flip: Tensor) -> Tensor:
    """Crop at an offset of ``down`` and ``right`` pixels, zero-padded, then mirror if ``flip``; (count,) each."""
    count, height, width = x.shape[:3]
    rows = torch.arange(height, device=x.device) + down[:, None]
    columns = torch.arange(width, device=x.device).expand(count, width)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + right[:, None]
    index = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    moved = pack(x).flatten(1).gather(1, index.flatten(1)).view_as(index)
    moved &= bit_mask((rows >= 0) & (rows < height))[:, :, None]
    moved &= bit_mask((columns >= 0) & (columns < width))[:, None, :]
    return unpack(moved)


# ---------------------------------------------------------------------------------------------------------------------
# timm's operations: (pixels, one argument per image) → pixels, bit-identical to Pillow
# ---------------------------------------------------------------------------------------------------------------------


def auto_contrast(x: Tensor, _: Tensor) -> Tensor:
    levels = to_planes(x)
    wide = widest(x.device)
    low, high = levels.amin(2, keepdim=True).to(wide), levels.amax(2, keepdim=True).to(wide)
    # float64 as in Pillow: many results are whole numbers; 255 / tensor would multiply with the reciprocal
    scale = torch.full_like(low, 255) / (high - low)
    scale, offset = torch.where(high > low, scale, 1), torch.where(high > low, -low * scale, 0)
    return from_planes(levels.to(wide).mul_(scale).add_(offset).clamp_(0, 255), x)


def equalize(x: Tensor, _: Tensor) -> Tensor:
    levels = to_planes(x)
    count, channels, pixels = levels.shape
    brightest, levels = levels.amax(2, keepdim=True).long(), levels.long()
    histogram = torch.zeros(count, channels, 256, dtype=torch.int32, device=x.device)
    histogram.scatter_add_(2, levels, torch.ones_like(levels, dtype=torch.int32))
    step = (pixels - histogram.gather(2, brightest)) // 255
    below = histogram.cumsum(2, dtype=torch.int32) - histogram
    table = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, dtype=torch.int32, device=x.device))
    return from_planes(table.gather(2, levels), x)


def invert(x: Tensor, _: Tensor) -> Tensor:
    return 255 - x


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    return x & per_image((256 - 2 ** (8 - bits.clamp(0, 8))).to(torch.uint8))


def solarize(x: Tensor, threshold: Tensor) -> Tensor:
    bright = x.short() >= per_image(threshold.short())
    return x ^ bright.view(torch.uint8).neg_()  # 255 where bright


def solarize_add(x: Tensor, added: Tensor) -> Tensor:
    dark = (x >> 7) - 1  # 255 below 128, else 0
    return x + (per_image(added.to(torch.uint8)) & dark).minimum(255 - x)


def grey(x: Tensor) -> Tensor:
    """(count, height, width) in int32, with Pillow's weights of the channels."""
    red, green, blue, _ = x.int().unbind(-1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def blend(degenerate: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Interpolate from ``degenerate`` (factor 0) to ``x`` (factor 1), or extrapolate, and truncate."""
    return truncate((x.float() - degenerate).mul_(per_image(factor.float())).add_(degenerate))


def color(x: Tensor, factor: Tensor) -> Tensor:
    return blend(grey(x).float().unsqueeze(-1), x, factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    pixels = x.shape[1] * x.shape[2]
    mean = (2 * grey(x).sum((1, 2)) + pixels) // (2 * pixels)
    return blend(per_image(mean.float()), x, factor)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return truncate(x.float().mul_(per_image(factor.float())))


def sharpness(x: Tensor, factor: Tensor) -> Tensor:
    levels = x.short()
    rows = levels[:, :-2] + levels[:, 1:-1] + levels[:, 2:]
    smooth = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * levels[:, 1:-1, 1:-1]
    degenerate = x.float()  # border pixels stay unchanged
    degenerate[:, 1:-1, 1:-1] = (smooth.float() / 13 + 0.5).trunc_()
    return blend(degenerate, x, factor)


# ---------------------------------------------------------------------------------------------------------------------
# timm's geometric operations; they differ from Pillow's by at most 1, as Pillow sums in float64
# ---------------------------------------------------------------------------------------------------------------------


class Warp(NamedTuple):
    """Interpolation of a geometric operation.

    Attributes:
        cubic: Pillow's cubic kernel (a = −1 in its transforms) instead of a linear one.
        fill: (), the packed colour outside of the image.
    """

    cubic: bool
    fill: Tensor

    def weights(self, d: Tensor) -> list[Tensor]:
        """The weights of four neighbouring pixels at a position ``d`` after the second one."""
        if not self.cubic:
            return [torch.zeros_like(d), 1 - d, d, torch.zeros_like(d)]
        square, cube = d * d, d * d * d
        return [2 * square - d - cube, 1 - 2 * square + cube, d + square - cube, cube - square]

    def finish(self, pixels: Tensor, inside: Tensor) -> Tensor:
        """Fill the pixels that are not ``inside``."""
        inside = bit_mask(inside)
        return unpack(pack(pixels) & inside | self.fill & ~inside)


EPSILON = 1e-3  # added before truncation, so that float32 rounding does not lower whole levels


def ordered_sum(products: Iterable[Tensor]) -> Tensor:
    """Sum in a fixed order, so that the result does not depend on the batch size."""
    total, *others = products
    for other in others:
        total += other
    return total


def move_rows(x: Tensor, by: Tensor, warp: Warp) -> Tensor:
    """Sample every row of pixels ``by`` (count, height) pixels further to the right."""
    width = x.shape[2]
    start = by.floor()
    places = torch.arange(-1, width + 2, device=x.device) + start.long().unsqueeze(-1)
    taps = unpack(pack(x).gather(2, places.clamp_(0, width - 1))).float()
    weights = [w[:, :, None, None] for w in warp.weights((by - start).float())]
    pixels = truncate(ordered_sum(taps[:, :, i : i + width] * w for i, w in enumerate(weights)).add_(EPSILON))
    source = torch.arange(width, device=x.device) + 0.5 + by.unsqueeze(-1)
    return warp.finish(pixels, (source >= 0) & (source < width))


def transpose_pixels(x: Tensor) -> Tensor:
    return unpack(pack(x).transpose(1, 2).contiguous())


def centres(size: int, x: Tensor) -> Tensor:
    return torch.arange(size, dtype=widest(x.device), device=x.device) + 0.5


def shear_x(x: Tensor, factor: Tensor, warp: Warp) -> Tensor:
    return move_rows(x, factor[:, None] * centres(x.shape[1], x), warp)


def shear_y(x: Tensor, factor: Tensor, warp: Warp) -> Tensor:
    return transpose_pixels(shear_x(transpose_pixels(x), factor, warp))


def translate_x(x: Tensor, share: Tensor, warp: Warp) -> Tensor:
    return move_rows(x, (share * x.shape[2])[:, None].expand(len(x), x.shape[1]), warp)


def translate_y(x: Tensor, share: Tensor, warp: Warp) -> Tensor:
    return transpose_pixels(translate_x(transpose_pixels(x), share, warp))


def rotate(x: Tensor, degrees: Tensor, warp: Warp) -> Tensor:
    """Rotate counter-clockwise about the centre."""
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
    source = to_planes(x).float()

    def taken(row: Tensor, column: Tensor) -> Tensor:
        return source.gather(2, (row + column).flatten(1)[:, None].expand(-1, 3, -1))

    lines = (ordered_sum(taken(row, column).mul_(w) for column, w in zip(columns, across, strict=True)) for row in rows)
    levels = ordered_sum(line.mul_(w) for line, w in zip(lines, down, strict=True)).add_(EPSILON)
    return warp.finish(from_planes(levels.clamp_(0, 255), x), inside)
