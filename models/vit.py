"""Architecture names, the plain ViT that all methods expand, and its entries in timm's registry.

deit_{size}_patch{P}_{IMG}_L{depth}[_H{heads}]      a plain ViT
aux_deit_{size}_patch{P}_{IMG}                      a TLEG Aux-Net of 12 layers
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from common.errors import InputError, nearest

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv, build_model_with_cfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

# width and number of heads of each size; nano and micro are for small images
SIZES = {"nano": (64, 2), "micro": (128, 4), "tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
MAX_DEPTH = 256  # no ViT comes near; it keeps a damaged or hostile file from filling the memory with layers
AUX_DEPTH = 12  # of the published TLEG Aux-Nets, whose names do not carry a depth
FORWARD_AND_BACKWARD = 3  # times the MACs of a forward pass: backward computes two products for each of its own

GRAMMAR = (
    "deit_{size}_patch{P}_{IMG}_L{depth}[_H{heads}] or aux_deit_{size}_patch{P}_{IMG}[_L{depth}][_H{heads}], "
    f"with size one of {', '.join(SIZES)}"
)
_NUMBER = r"([1-9]\d{0,5})"
_STEM = rf"deit_({'|'.join(SIZES)})_patch{_NUMBER}_{_NUMBER}"
_PLAIN = re.compile(rf"{_STEM}_L{_NUMBER}(?:_H{_NUMBER})?")
_AUX = re.compile(rf"aux_{_STEM}(?:_L{_NUMBER})?(?:_H{_NUMBER})?")

PUBLISHED_NAMES = (
    *(f"deit_{size}_patch16_224_L{depth}" for size in ("tiny", "small", "base") for depth in range(3, 13)),
    "deit_base_patch16_224_L16_H12",
    *(f"aux_deit_{size}_patch16_224" for size in ("tiny", "small", "base")),
)


@dataclass(frozen=True)
class ViTArch:
    """The sizes of a ViT. ``width`` is in neurons, ``patch_size`` and ``img_size`` in pixels."""

    width: int
    depth: int
    num_heads: int
    patch_size: int
    img_size: int

    def __post_init__(self):
        if min(self.width, self.depth, self.num_heads, self.patch_size, self.img_size) < 1:
            raise InputError(f"every size of an architecture is at least 1, not as in {self}")
        if self.depth > MAX_DEPTH:
            raise InputError(f"{self.depth} layers are too many: at most {MAX_DEPTH}")
        if self.width % self.num_heads:
            raise InputError(f"width {self.width} cannot be divided among {self.num_heads} heads")
        if self.img_size < self.patch_size:
            raise InputError(f"an image of {self.img_size} pixels has no patch of {self.patch_size}")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def num_patches(self) -> int:
        return (self.img_size // self.patch_size) ** 2

    def num_params(self, num_classes: int, in_chans: int = 3) -> int:
        """The parameters of `create_vit`'s model of these sizes, counted from shapes."""
        d, hidden = self.width, 4 * self.width
        patches = (in_chans * self.patch_size**2 + 1) * d + self.num_patches * d
        attention = (d + 1) * 3 * d + (d + 1) * d
        mlp = (d + 1) * hidden + (hidden + 1) * d
        norms = 2 * 2 * d
        return patches + self.depth * (norms + attention + mlp) + 2 * d + (d + 1) * num_classes

    def macs(self, num_classes: int, in_chans: int = 3) -> int:
        """Multiply-accumulate operations of one image's forward pass: its products of matrices, counted from shapes."""
        n, d, hidden = self.num_patches, self.width, 4 * self.width
        patches = n * in_chans * self.patch_size**2 * d
        linear = n * (3 * d * d + d * d + 2 * d * hidden)  # qkv, proj, fc1 and fc2
        attention = 2 * n * n * d  # q·kᵀ, and the mean of v
        return patches + self.depth * (linear + attention) + d * num_classes

    def __str__(self) -> str:
        return f"L{self.depth}-H{self.num_heads} (width {self.width}), patch {self.patch_size}, image {self.img_size}"


def is_aux_name(name: str) -> bool:
    """Whether ``name`` follows the grammar of a TLEG Aux-Net."""
    return _AUX.fullmatch(name) is not None


def follows_grammar(name: str) -> bool:
    """Whether ``name`` is an architecture name of this project rather than one of timm's."""
    return _PLAIN.fullmatch(name) is not None or is_aux_name(name)


def parse_arch(name: str) -> ViTArch:
    """The sizes that an architecture name stands for.

    Raises:
        InputError: ``name`` does not parse; the message shows the grammar and the nearest names.
    """
    match = _PLAIN.fullmatch(name) or _AUX.fullmatch(name)
    if match is None:
        raise InputError(f"unknown architecture {name!r}: expected {GRAMMAR}{nearest(name, PUBLISHED_NAMES)}")
    size, patch, img, depth, heads = match.groups()
    width, num_heads = SIZES[size]
    if heads is not None:  # heads × head_dim of the size
        width, num_heads = int(heads) * (width // num_heads), int(heads)
    return ViTArch(width, int(depth or AUX_DEPTH), num_heads, int(patch), int(img))


def name_of(arch: ViTArch) -> str:
    """The name of ``arch`` in the grammar, the shortest there is; without one, how to write it in Python."""
    for suffix in ("", f"_H{arch.num_heads}"):
        for size in reversed(SIZES):
            name = f"deit_{size}_patch{arch.patch_size}_{arch.img_size}_L{arch.depth}{suffix}"
            if parse_arch(name) == arch:
                return name
    return f"models.{arch!r}, which has no name"


def create_vit(arch: ViTArch, **kwargs) -> VisionTransformer:
    """A plain timm ViT without class token: patches → blocks → mean over patches → ``fc_norm`` → head.

    Args:
        kwargs: passed on to timm's ``VisionTransformer``, where ``num_classes``, ``in_chans``, ``drop_path_rate``,
            ``img_size`` and ``patch_size`` are the usual ones. ``drop_rate`` has the meaning of the published programs
            (`dropout_rates`).
    """
    sizes = dict(
        img_size=arch.img_size,
        patch_size=arch.patch_size,
        embed_dim=arch.width,
        depth=arch.depth,
        num_heads=arch.num_heads,
        class_token=False,
        global_pool="avg",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    sizes.update(dropout_rates(kwargs.pop("drop_rate", 0.0)) | kwargs)
    pretrained_cfg = dict(
        input_size=(sizes.get("in_chans", 3), sizes["img_size"], sizes["img_size"]),
        num_classes=1000,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        interpolation="bicubic",
        first_conv="patch_embed.proj",
        classifier="head",
    )
    return build_model_with_cfg(
        VisionTransformer,
        "vit_base_patch16_224",  # the entry of timm's registry whose sizes are replaced
        pretrained=False,
        pretrained_cfg=pretrained_cfg,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **sizes,
    )


def dropout_rates(drop_rate: float) -> dict[str, float]:
    """``drop_rate`` of a ViT in the published programs, in the words of timm ≥ 0.9, where it is that of the head alone.

    It applies to the position embedding, the output of the attention's projection, and both layers of the MLP.
    """
    return dict(pos_drop_rate=drop_rate, proj_drop_rate=drop_rate)


def adapt_channels(kernel: Tensor, in_chans: int) -> Tensor:
    """The kernel (out, in, height, width) of a first convolution for images of ``in_chans`` channels.

    timm's rule: summed for one channel, else repeated and rescaled. A kernel of one channel is first spread evenly over
    three, which changes nothing for grey images.

    Raises:
        InputError: the kernel has another number of channels than 1, 3 or ``in_chans``.
    """
    found = kernel.shape[1]
    if found == in_chans:
        return kernel
    if found not in (1, 3):
        raise InputError(f"weights for images of {found} channels cannot be used for {in_chans}: expected 1 or 3")
    return adapt_input_conv(in_chans, kernel if found == 3 else kernel.repeat(1, 3, 1, 1) / 3)


def adapt_to_images(weights: dict[str, Tensor], arch: ViTArch, in_chans: int) -> dict[str, Tensor]:
    """The state dict of a ViT for images, patches and channels other than those that it was trained with.

    Patch embedding and position embedding are resampled with timm's functions; ``arch`` says to what.
    """
    patch, position = weights["patch_embed.proj.weight"], weights["pos_embed"]
    if patch.shape[-1] != arch.patch_size:
        patch = resample_patch_embed(patch, [arch.patch_size, arch.patch_size])
    if position.shape[1] != arch.num_patches:
        grid = math.isqrt(arch.num_patches)
        position = resample_abs_pos_embed(position, [grid, grid], num_prefix_tokens=0)
    return {**weights, "patch_embed.proj.weight": adapt_channels(patch, in_chans), "pos_embed": position}


def timm_kwargs(arch: ViTArch) -> dict:
    """What ``timm.create_model('vit_base_patch16_224', **timm_kwargs(arch))`` needs to make the same ViT.

    Plain data, so that it can stand in a ``config.json`` that timm alone reads. timm's own default for the
    epsilon of its layer norms is the 1e-6 that is needed here.
    """
    return dict(
        img_size=arch.img_size,
        patch_size=arch.patch_size,
        embed_dim=arch.width,
        depth=arch.depth,
        num_heads=arch.num_heads,
        class_token=False,
        global_pool="avg",
    )


def register(name: str, create: Callable[..., nn.Module]) -> None:
    """Make ``timm.create_model(name, **kwargs)`` return ``create(parse_arch(name), **kwargs)``."""

    def entrypoint(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        if pretrained:
            raise InputError(f"{name} has no pretrained weights of its own: initialise it from a learngene")
        return create(parse_arch(name), **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"{parse_arch(name)}"
    timm.models.register_model(entrypoint)


for _name in PUBLISHED_NAMES:
    if not is_aux_name(_name):
        register(_name, create_vit)
