"""How important the layers, heads and neurons of a trained ViT are, and the smaller ViT of the most important ones.

The score of a neuron is the sum over all numbers w of the weights that have it on one of their axes (`models.axes`):

    magnitude    Σ |w|
    Taylor       Σ |w · ∂loss/∂w|

The latter is the first-order estimate of what the loss changes by without w, as in Molchanov et al., "Importance
Estimation for Neural Network Pruning", CVPR 2019, but with the absolute value of each weight rather than the square.
A head has the sum of its neurons, a layer that of all its weights. There is one ranking for each axis: embedding
neurons (for the whole network), heads (for each layer), hidden neurons (for each layer), and layers. All of them are of
the whole ViT: what one ranking drops does not change another.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from common.devices import exact, exact_device
from common.errors import InputError
from models.axes import axes_of, split
from models.selection import Neurons, keep_neurons, rows_of_heads, take_layers
from models.vit import ViTArch

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """How important the parts of a ViT are.

    Attributes:
        embedding: (width,).
        heads: (layers, heads).
        hidden: (layers, hidden neurons).
        layers: (layers,).
        pool_heads, pool_hidden: of a pooling block, (heads,) and (hidden neurons,); of length 0 without one.
    """

    embedding: Tensor
    heads: Tensor
    hidden: Tensor
    layers: Tensor
    pool_heads: Tensor
    pool_hidden: Tensor


# axis of `models.axes` → the field of `Scores`
PARTS = {"E": "embedding", "C": "embedding", "M": "hidden", "m": "pool_hidden"}
PARTS |= dict.fromkeys("QKV", "heads") | dict.fromkeys("qkv", "pool_heads")


def scores_of(vit: Mapping[str, Tensor], source: ViTArch, gradients: Mapping[str, Tensor] | None = None) -> Scores:
    """The scores of the parts of a trained ViT: by Taylor with ``gradients``, else by magnitude.

    Args:
        vit: its state dict.
        source: its sizes.
        gradients: of the loss with respect to ``vit``, under the same names.
    """
    return sums_of({n: (w if gradients is None else w * gradients[n]).abs() for n, w in vit.items()}, source)


def sums_of(numbers: Mapping[str, Tensor], source: ViTArch) -> Scores:
    """Sums over all weights of each part of a ViT.

    Args:
        numbers: one for each weight, under the names of its state dict, all on one device.
        source: its sizes.
    """
    device = exact_device(next(iter(numbers.values())).device)
    lengths = dict(
        embedding=(source.width,),
        heads=(source.depth, source.width),
        hidden=(source.depth, source.hidden),
        layers=(source.depth,),
        pool_heads=(source.width if source.pool_head_dim else 0,),
        pool_hidden=(source.pool_hidden,),
    )
    found = {part: torch.zeros(length, dtype=torch.float64, device=device) for part, length in lengths.items()}
    for name, tensor in split(numbers).items():
        tensor = exact(tensor)
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        if layer is not None:
            found["layers"][layer] += tensor.sum()
        for number, axis in enumerate(axes_of(name)):
            if axis == ".":
                continue
            others = [other for other in range(tensor.ndim) if other != number]
            sums = found[PARTS[axis]][layer] if axis in "QKVM" else found[PARTS[axis]]
            sums += tensor.sum(others) if others else tensor
    for heads, head_dim in (("heads", source.head_dim), ("pool_heads", source.pool_head_dim)):
        if head_dim:
            found[heads] = found[heads].unflatten(-1, (-1, head_dim)).sum(-1)
    return Scores(**found)


def ranked(scores: Tensor) -> Tensor:
    """Indices of ``scores`` (n,) from the highest to the lowest; of equal ones the first comes first."""
    return scores.argsort(descending=True, stable=True)


def most_important(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest of ``scores`` (n,), ascending; of equal ones the first."""
    return ranked(scores)[:count].sort().values


def choose(scores: Scores, source: ViTArch, arch: ViTArch) -> tuple[list[int], Neurons]:
    """What a smaller ViT keeps: the layers, in order, and the neurons of these layers."""
    layers = most_important(scores.layers, arch.depth).tolist()
    heads = [rows_of_heads(most_important(scores.heads[l], arch.num_heads), source.head_dim) for l in layers]
    neurons = Neurons(
        embedding=most_important(scores.embedding, arch.width),
        heads=heads,
        hidden=[most_important(scores.hidden[l], arch.hidden) for l in layers],
    )
    if source.pool_head_dim:
        heads = most_important(scores.pool_heads, arch.width // source.pool_head_dim)
        neurons = neurons._replace(
            pool_heads=rows_of_heads(heads, source.pool_head_dim),
            pool_hidden=most_important(scores.pool_hidden, arch.pool_hidden),
        )
    return layers, neurons


def prune(
    vit: dict[str, Tensor], source: ViTArch, arch: ViTArch, gradients: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The smaller ViT of the most important layers, heads and neurons of a larger one, in their order there.

    Args:
        gradients: as in `scores_of`.

    Raises:
        InputError: ``arch`` is larger.
    """
    check_smaller("pruning", source, arch)
    layers, neurons = choose(scores_of(vit, source, gradients), source, arch)
    return keep_neurons(take_layers(vit, layers), neurons)


def check_smaller(what: str, source: ViTArch, arch: ViTArch) -> None:
    """Raises InputError unless ``arch`` is no larger than the source."""
    if arch.depth > source.depth or arch.width > source.width:
        raise InputError(f"{what} needs a larger ViT than {arch}; it is {source}")
    if arch.hidden > source.hidden:
        raise InputError(
            f"{what} needs a ViT of at least {arch.hidden} hidden neurons in a layer, as in {arch}; it has "
            f"{source.hidden}"
        )
