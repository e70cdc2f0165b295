"""Baselines: initialisations from a trained ViT of other sizes instead of a learngene.

Each takes the state dict of a ViT of any kind, its sizes, and those of a ViT of the same kind and the same size of its
heads, and returns the state dict of the latter.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from common.errors import InputError
from models.cosine import front
from models.formats.weights import found_in
from models.pruning import check_smaller, prune
from models.selection import Neurons, keep_neurons, take_layers
from models.vit import ViTArch, described

import torch
from torch import Tensor

KERNEL = "patch_embed.proj.weight"


# ---------------------------------------------------------------------------------------------------------------------
# The source
# ---------------------------------------------------------------------------------------------------------------------


def source_arch(vit: Mapping[str, Tensor], arch: ViTArch) -> ViTArch:
    """The sizes of a trained ViT, which is taken to be of the kind of ``arch`` (`check_source`).

    The width is that of the patch embedding, hidden neurons are those of the first MLP, heads have as many neurons as
    those of ``arch``. The image is square, unless it has as many patches as that of ``arch``; without position
    embedding it is that of ``arch``.

    Args:
        vit: its state dict.

    Raises:
        InputError: it has no patch embedding or no layers, or its sizes do not fit each other.
    """
    kernel, layers = vit.get(KERNEL), {match[0] for name in vit if (match := re.match(r"blocks\.\d+\.", name))}
    if kernel is None or kernel.ndim != 4 or not layers:
        missing = "blocks.0" if not layers else f"{KERNEL} with four axes"
        raise InputError(f"it has no {missing}: expected the weights of {name_of_kind(arch)}, found {found_in(vit)}")
    width, _, *patch_size = kernel.shape
    if width % arch.head_dim:
        raise InputError(f"its width {width} cannot be divided into heads of {arch.head_dim} neurons")
    img_size, positions = arch.img_size, vit.get("pos_embed")
    own = described(arch).shapes.get("pos_embed")
    if own is not None and positions is not None and positions.ndim == 3:
        grid = grid_of(positions.shape[1] - (own[1] - arch.num_patches), arch)
        img_size = tuple(cells * pixels for cells, pixels in zip(grid, patch_size, strict=True))
    fc2 = vit.get("blocks.0.mlp.fc2.weight")
    return replace(
        arch,
        mlp_ratio=None if fc2 is None or fc2.ndim != 2 else fc2.shape[1] / width,
        width=width,
        depth=len(layers),
        num_heads=width // arch.head_dim,
        patch_size=tuple(patch_size),
        img_size=img_size,
    )


def grid_of(patches: int, arch: ViTArch) -> tuple[int, int]:
    """Rows and columns of so many patches: those of ``arch`` if it has as many, else those of a square.

    Raises:
        InputError: they are no square.
    """
    if patches == arch.num_patches:
        return arch.grid
    side = math.isqrt(max(patches, 0))
    if side == 0 or side**2 != patches:
        raise InputError(f"its pos_embed is for {patches} patches: expected those of a square image, or {arch.grid}")
    return side, side


def check_source(vit: Mapping[str, Tensor], source: ViTArch) -> None:
    """Raises InputError unless ``vit`` is the state dict of a ViT of ``source``, with any head or none."""
    head = vit.get("head.weight")
    shapes = described(source, 0 if head is None else len(head), vit[KERNEL].shape[1]).shapes
    expected = {
        name.replace("*", str(l)): shape
        for name, shape in shapes.items()
        for l in range(source.depth if "*" in name else 1)
    }
    kind = name_of_kind(source)
    if missing := [name for name in expected if name not in vit and not is_head(name)]:
        raise InputError(f"it has no {missing[0]}: expected the weights of {kind}, found {found_in(vit)}")
    if unknown := [name for name in vit if name not in expected and not is_head(name)]:
        raise InputError(f"it has {unknown[0]}, which {kind} does not have")
    for name, shape in expected.items():
        if name in vit and tuple(vit[name].shape) != shape:
            raise InputError(f"its {name} is {tuple(vit[name].shape)}, that of {kind} of its width is {shape}")


def is_head(name: str) -> bool:
    """Whether a parameter belongs to a classifier, which a trained ViT need not have."""
    return name.startswith(("head.", "head_dist."))


def name_of_kind(arch: ViTArch) -> str:
    """The kind of a ViT, for messages."""
    return arch.kind or "a plain ViT without class token"


# ---------------------------------------------------------------------------------------------------------------------
# Neurons of a larger ViT
# ---------------------------------------------------------------------------------------------------------------------


def evenly(count: int, of: int) -> Tensor:
    """``count`` numbers below ``of``, evenly spaced from the first to the last."""
    return torch.linspace(0, of - 1, count, dtype=torch.float64).round().long()


def weight_selection(vit: dict[str, Tensor], source: ViTArch, arch: ViTArch) -> dict[str, Tensor]:
    """The first layers of a larger ViT, and of them evenly spaced neurons.

    Xu et al., "Initializing Models with Larger Ones", ICLR 2024: first-N layer selection, uniform element selection.
    The neurons of q, k and v are spaced within each of the three, all heads together.

    Raises:
        InputError: ``arch`` is larger.
    """
    check_smaller("weight selection", source, arch)
    neurons = Neurons(
        embedding=evenly(arch.width, source.width),
        heads=[evenly(arch.width, source.width)] * arch.depth,
        hidden=[evenly(arch.hidden, source.hidden)] * arch.depth,
        pool_heads=evenly(arch.width, source.width),
        pool_hidden=evenly(arch.pool_hidden, source.pool_hidden),
    )
    return keep_neurons(take_layers(vit, range(arch.depth)), neurons)


# ---------------------------------------------------------------------------------------------------------------------
# Layers of a shallower ViT
# ---------------------------------------------------------------------------------------------------------------------


def stacking(vit: dict[str, Tensor], source: ViTArch, arch: ViTArch) -> dict[str, Tensor]:
    """The layers of a shallower ViT one after the other, and again: layer l is layer l mod n.

    Gong et al., "Efficient Training of BERT by Progressively Stacking", ICML 2019.

    Raises:
        InputError: the widths or the numbers of hidden neurons differ.
    """
    check_width(source, arch)
    return take_layers(vit, [l % source.depth for l in range(arch.depth)])


def interpolation(vit: dict[str, Tensor], source: ViTArch, arch: ViTArch) -> dict[str, Tensor]:
    """Each layer of a shallower ViT several times in a row: layer l is layer ⌊l·n/L⌋.

    Chang et al., "Multi-level Residual Networks from Dynamical Systems View", ICLR 2018, and the depth growth that Chen
    et al., "bert2BERT", ACL 2022, compare with stacking.

    Raises:
        InputError: the widths or the numbers of hidden neurons differ.
    """
    check_width(source, arch)
    return take_layers(vit, [l * source.depth // arch.depth for l in range(arch.depth)])


def check_width(source: ViTArch, arch: ViTArch) -> None:
    """Raises InputError unless both ViTs have the same width and number of hidden neurons."""
    if source.width != arch.width:
        raise InputError(f"depth alone is changed, and the widths differ: {source.width} and {arch.width}")
    if source.hidden != arch.hidden:
        raise InputError(
            f"depth alone is changed, and the hidden neurons of a layer differ: {source.hidden} and {arch.hidden}"
        )


BASELINES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "weight_selection": weight_selection,
    "stacking": stacking,
    "interpolation": interpolation,
    "magnitude": prune,
    "taylor": prune,  # with gradients
    "front": front,
}
NEED_GRADIENTS = ("taylor",)  # as a fourth argument: those of the loss, name → gradient
