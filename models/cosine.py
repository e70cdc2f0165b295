"""Weights of a ViT in a cosine basis, truncated or padded to other sizes.

Shen et al., "Breaking the Scale Barrier: One-Shot Knowledge Transfer via Frequency Transform" (FRONT), ICML 2026, as
the authors' program does it with its default options.
"""

import math
from collections.abc import Mapping

from models.axes import any_layer
from models.vit import ViTArch, described

import torch
from torch import Tensor

EPSILON = 1e-8  # added to a standard deviation


def front(vit: Mapping[str, Tensor], source: ViTArch, arch: ViTArch) -> dict[str, Tensor]:
    """A ViT of other sizes, smaller or larger, from the low frequencies of the weights of a trained one.

    Each tensor as timm stores it (q, k and v of a fused ``qkv`` are one axis) is normalised,

        z_j = (w_j − mean(w_j)) / (std(w_j) + 1e-8)          of layer j,

    then `resample` changes the lengths of its axes, and that of the axis that the n layers of one name form. The
    layers of the new ViT are

        W_i = z'_i · std(w_j) + mean(w_j)          with j = min(i, n − 1).

    The kernel of the patch embedding is a matrix (out · in, height · width) here. A tensor whose lengths do not change
    is kept as it is. As in the authors' program, lengths are changed without a scale factor (their --use_ratio is off
    by default): fluctuations around the mean grow by old/new on each axis that becomes shorter. Unlike there, each
    layer of a deeper ViT is the one that the inverse transform gives; the authors' program stores layers n − 1, n, …
    in one place, so that they all become the last.

    Args:
        vit: the state dict of the trained ViT, with images and patches of the sizes of ``arch``.
        source: its sizes.
    """
    classes = len(vit["head.weight"]) if "head.weight" in vit else 0
    shapes = described(arch, classes, vit["patch_embed.proj.weight"].shape[1]).shapes
    resized = {}
    for name in dict.fromkeys(map(any_layer, vit)):
        if not name.startswith("blocks."):
            resized[name] = _resized(vit[name][None], (1, *shapes[name]))[0]
            continue
        layers = torch.stack([vit[name.replace("*", str(l))] for l in range(source.depth)])
        layers = _resized(layers, (arch.depth, *shapes[name]))
        resized |= {name.replace("*", str(l)): layer for l, layer in enumerate(layers)}
    return resized


def _resized(layers: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Tensors of one name (layers, …) with the given shape."""
    if layers.shape == shape:
        return layers
    flat, new = layers, shape
    if len(shape) == 5:  # kernels
        flat = layers.flatten(3).flatten(1, 2)
        new = (shape[0], shape[1] * shape[2], shape[3] * shape[4])
    axes = tuple(range(1, flat.ndim))
    mean = flat.mean(axes, keepdim=True)
    std = flat.std(axes, keepdim=True) if flat[0].numel() > 1 else torch.zeros_like(mean)
    z = (flat - mean) / (std + EPSILON)
    for axis, length in enumerate(new):
        z = resample(z, axis, length)
    j = torch.arange(len(z)).clamp(max=len(layers) - 1)
    return (z * std[j] + mean[j]).reshape(shape)


def resample(x: Tensor, axis: int, length: int) -> Tensor:
    """Another length of an axis, by its coefficients in a cosine basis.

    With n the old length and n' the new one, m = min(n, n'):

        X_k  = Σ_t x_t cos(π k (2t + 1) / 2n)                                     k < m; 0 above
        x'_t = (X_0 + 2 Σ_{0<k<m} X_k cos(π k (2t + 1) / 2n')) / n'

    the discrete cosine transform (DCT-II) and its inverse. n' = n is the identity, and is not computed.
    """
    old = x.shape[axis]
    if old == length:
        return x
    m = min(old, length)
    inverse = 2 * cosines(length, m).T / length
    inverse[:, 0] /= 2
    matrix = (inverse @ cosines(old, m)).to(x.dtype)  # (length, old)
    return torch.tensordot(matrix, x, dims=([1], [axis])).movedim(0, axis)


def cosines(length: int, count: int) -> Tensor:
    """cos(π k (2t + 1) / 2·length) for k < count and t < length: (count, length), in float64."""
    k, t = torch.arange(count)[:, None], torch.arange(length)[None]
    return torch.cos(math.pi * k.double() * (2 * t + 1) / (2 * length))
