"""Kinds of ViT: the architectures of timm that can have another width and depth.

A kind is the name of an architecture of timm, without the tag of its weights. A ViT of a kind differs from timm's in
the sizes that `ViTArch` lists, and in nothing else: tokens, pooling, norms, activations and position embedding are
those of the architecture, and so is the ratio of hidden neurons to the width unless the sizes give another.
"""

from functools import cache

from common.errors import InputError, one_line
from models.axes import structure_of
from models.meta import WeightsOnMeta

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, is_model_in_modules
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

Size = int | tuple[int, int]
MODULES = {"vision_transformer", "deit", "eva"}  # of timm, whose architectures may be kinds


def without_tag(name: str) -> str:
    """The architecture in a name of timm's: ``vit_small_patch14_dinov2`` of ``vit_small_patch14_dinov2.lvd142m``."""
    return name.partition(".")[0]


def check_tag(name: str) -> None:
    """Raises InputError where a name of timm's has a tag that timm does not know for its architecture."""
    arch, _, tag = name.partition(".")
    if tag and name not in (known := [*get_arch_pretrained_cfgs(arch)]):
        tags = ", ".join(known).replace(f"{arch}.", "") or "none"
        raise InputError(f"unknown tag {tag!r} of {arch}: the tags that timm knows are {tags}")


def is_kind(name: str) -> bool:
    """Whether an architecture of timm, with or without a tag, is a ViT that can have other sizes."""
    if not is_model_in_modules(name, MODULES):
        return False
    try:
        return bool(sizes_of(without_tag(name)))
    except InputError:
        return False


def plain_size(size: object) -> Size:
    """Height and width in pixels as one number if they are equal."""
    if isinstance(size, (list, tuple)):
        height, width = size
        return height if height == width else (height, width)
    return size


@cache
def sizes_of(kind: str) -> dict[str, Size]:
    """Sizes of the architecture as timm has it: the fields of `ViTArch` but ``kind`` and ``mlp_ratio``, and three more.

    ``pool_head_dim`` are the neurons of a head of its pooling block, ``packed`` the rows of a weight that holds both
    gate and value of a SwiGLU; 0 without such. The hidden neurons of a layer are a multiple of ``hidden_unit``.

    Raises:
        InputError: timm does not know the architecture, or it is no ViT that can have other sizes.
    """
    vit = _without_weights(kind)
    pool = getattr(vit, "attn_pool", None)
    sizes = {
        "width": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": vit.blocks[0].attn.num_heads,
        "patch_size": plain_size(vit.patch_embed.patch_size),
        "img_size": plain_size(vit.patch_embed.img_size),
        "pool_head_dim": 0 if pool is None else pool.head_dim,
        "packed": _packed_rows(vit) if isinstance(vit, VisionTransformer) else 0,  # of Eva always even
    }
    rows = 2 if sizes["packed"] else 1  # of one hidden neuron
    try:  # whether the sizes of all layers are given at once
        smallest = _without_weights(kind, depth=1, mlp_ratio=ratio_for(rows, vit.embed_dim))
    except AssertionError as error:
        raise InputError(f"{kind} cannot have another depth: {one_line(error)}") from error
    return sizes | {"hidden_unit": smallest.blocks[0].mlp.fc2.in_features}


def _packed_rows(vit: nn.Module) -> int:
    fc1, fc2 = getattr(vit.blocks[0].mlp, "fc1", None), vit.blocks[0].mlp.fc2
    return fc1.out_features if fc1 is not None and fc1.out_features == 2 * fc2.in_features else 0


def _without_weights(kind: str, **kwargs: object) -> nn.Module:
    """The architecture on the meta device, checked.

    Raises:
        InputError: as `sizes_of`.
    """
    if not timm.is_model(kind) or kind != without_tag(kind):
        raise InputError(f"timm has no architecture {kind[:100]!r}")
    try:
        with WeightsOnMeta():
            vit = timm.create_model(kind, **kwargs)
    except RuntimeError:  # some compute their first weights, from numbers that are no weights
        with torch.device("meta"):
            vit = timm.create_model(kind, **kwargs)
    try:
        structure_of({name: tuple(tensor.shape) for name, tensor in vit.state_dict().items()})
    except InputError as error:
        raise InputError(f"{kind} cannot be changed in size: {error}") from None
    if not isinstance(vit, (VisionTransformer, Eva)):
        raise InputError(f"{kind} cannot be changed in size: it is a {type(vit).__name__}, expected a ViT")
    return vit


def hidden_neurons(ratio: float, width: int, kind: str | None = None) -> int:
    """Hidden neurons of a layer: ``ratio * width``, rounded down as timm does, then up to the unit of the kind."""
    unit = 1 if kind is None else sizes_of(kind)["hidden_unit"]
    count = int(ratio * width + 1e-6)  # 2.3 * 30 is 68.99…
    return -(-count // unit) * unit


def ratio_for(rows: int, width: int) -> float:
    """The ratio of which timm makes ``rows = int(ratio * width)``."""
    ratio = rows / width
    return ratio if int(ratio * width) == rows else (rows + 0.5) / width


def kind_args(
    kind: str,
    width: int,
    depth: int,
    num_heads: int,
    patch_size: Size,
    img_size: Size,
    mlp_ratio: float | None = None,
) -> dict:
    """What ``timm.create_model(kind, **kind_args(kind, …))`` needs to make a ViT of these sizes; plain data.

    Its ``mlp_ratio`` is timm's, which counts both gate and value of a packed SwiGLU; pooling blocks of timm's
    ``VisionTransformer`` have it, too.

    Raises:
        InputError: as `sizes_of`; or the heads of a pooling block do not fit the width.
    """
    sizes = sizes_of(kind)
    args = dict(embed_dim=width, depth=depth, num_heads=num_heads, patch_size=patch_size, img_size=img_size)
    pool = sizes["pool_head_dim"]
    if pool and pool != sizes["width"] // sizes["num_heads"]:
        if width % pool:
            raise InputError(f"attn_pool of {kind} has heads of {pool} neurons, of which width {width} is no multiple")
        args["attn_pool_num_heads"] = width // pool
    rows = sizes["packed"] * width // sizes["width"]
    if mlp_ratio is not None:
        args["mlp_ratio"] = ratio_for(hidden_neurons(mlp_ratio, width, kind) * (2 if rows else 1), width)
    elif rows % 2:  # timm rounds down, and then cannot take gate and value apart
        args["mlp_ratio"] = (rows + 1.5) / width
    return args
