"""Baselines: initialisations from a trained ViT instead of a learngene.

Each takes the state dict of a ViT that `create_vit` made, and returns the state dict of another.
"""

from collections.abc import Callable, Sequence

from common.errors import InputError
from models.formats.weights import found_in
from models.selection import Neurons, keep_neurons
from models.vit import ViTArch

import torch
from torch import Tensor


def source_arch(vit: dict[str, Tensor], head_dim: int) -> ViTArch:
    """The sizes of the ViT with the state dict ``vit``, for square images.

    Raises:
        InputError: it is not the state dict of a plain ViT with heads of ``head_dim`` neurons.
    """
    needed = ("pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "fc_norm.weight")
    if missing := [name for name in needed if name not in vit]:
        found = f"found {found_in(vit)}"
        raise InputError(f"it has no {missing[0]}: expected the weights of a plain ViT without class token, {found}")
    width, patch_size = vit["patch_embed.proj.weight"].shape[0], vit["patch_embed.proj.weight"].shape[-1]
    if width % head_dim:
        raise InputError(f"its width {width} cannot be divided into heads of {head_dim} neurons")
    depth = sum(name.endswith(".attn.qkv.weight") for name in vit)
    return ViTArch(width, depth, width // head_dim, patch_size, patch_size * int(vit["pos_embed"].shape[1] ** 0.5))


def take_layers(vit: dict[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """The state dict of the ViT whose layer l is layer ``layers[l]`` of the given one."""
    rest = {name: tensor for name, tensor in vit.items() if not name.startswith("blocks.")}
    for l, source in enumerate(layers):
        prefix = f"blocks.{source}."
        rest |= {f"blocks.{l}.{n.removeprefix(prefix)}": t for n, t in vit.items() if n.startswith(prefix)}
    return rest


def evenly(count: int, of: int) -> Tensor:
    """``count`` numbers below ``of``, evenly spaced from the first to the last."""
    return torch.linspace(0, of - 1, count, dtype=torch.float64).round().long()


def weight_selection(vit: dict[str, Tensor], source: ViTArch, arch: ViTArch) -> dict[str, Tensor]:
    """The first layers of a larger ViT, and of them evenly spaced neurons.

    Xu et al., "Initializing Models with Larger Ones", ICLR 2024: first-N layer selection, uniform element selection.
    The neurons of q, k and v are spaced within each of the three, all heads together.
    """
    if arch.depth > source.depth or arch.width > source.width:
        raise InputError(f"weight selection needs a larger ViT than {arch}; it is {source}")
    neurons = Neurons(
        embedding=evenly(arch.width, source.width),
        heads=evenly(arch.width, source.width),
        hidden=[evenly(arch.hidden, source.hidden)] * arch.depth,
        pool_heads=evenly(arch.width, source.width),
        pool_hidden=evenly(arch.pool_hidden, source.pool_hidden),
    )
    return keep_neurons(take_layers(vit, range(arch.depth)), neurons)


def stacking(vit: dict[str, Tensor], source: ViTArch, arch: ViTArch) -> dict[str, Tensor]:
    """The layers of a shallower ViT one after the other, and again: layer l is layer l mod n.

    Gong et al., "Efficient Training of BERT by Progressively Stacking", ICML 2019.
    """
    check_width(source, arch)
    return take_layers(vit, [l % source.depth for l in range(arch.depth)])


def interpolation(vit: dict[str, Tensor], source: ViTArch, arch: ViTArch) -> dict[str, Tensor]:
    """Each layer of a shallower ViT several times in a row: layer l is layer ⌊l·n/L⌋.

    Chang et al., "Multi-level Residual Networks from Dynamical Systems View", ICLR 2018, and the depth growth that Chen
    et al., "bert2BERT", ACL 2022, compare with stacking.
    """
    check_width(source, arch)
    return take_layers(vit, [l * source.depth // arch.depth for l in range(arch.depth)])


def check_width(source: ViTArch, arch: ViTArch) -> None:
    """Raises InputError unless both ViTs have the same width."""
    if source.width != arch.width:
        raise InputError(f"depth alone is changed, and the widths differ: {source.width} and {arch.width}")


BASELINES: dict[str, Callable[[dict[str, Tensor], ViTArch, ViTArch], dict[str, Tensor]]] = {
    "weight_selection": weight_selection,
    "stacking": stacking,
    "interpolation": interpolation,
}
