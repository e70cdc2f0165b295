"""Architecture names, and the entries of this project in timm's registry.

deit_{size}_patch{P}_{IMG}_L{depth}[_H{heads}]      a plain ViT
aux_deit_{size}_patch{P}_{IMG}                      a TLEG Aux-Net of 12 layers
NAME[.tag][@L{depth}-H{heads}[-M{ratio}]]           a ViT of the kind NAME, an architecture of timm
deit_…@L{depth}-H{heads}[-M{ratio}]                 a plain ViT of another depth, width and MLP ratio
@L{depth}-H{heads}[-M{ratio}]                       a ViT of the kind at hand, that of a learngene or of a source

M is the ratio of a layer's hidden neurons to the width: ``vit_small_patch16_224@L6-H3-M2.5``. Without it the ratio is
that of the ViT before the @, or of the one at hand.
"""

import re
from collections.abc import Callable
from dataclasses import fields, replace

from common.errors import InputError, nearest
from models.kinds import check_tag, is_kind, sizes_of, without_tag
from models.vit import ViTArch, create_vit

import timm
from torch import nn

# width and number of heads of each size; nano and micro are for small images
SIZES = {"nano": (64, 2), "micro": (128, 4), "tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
AUX_DEPTH = 12  # of the published TLEG Aux-Nets, whose names do not carry a depth

GRAMMAR = (
    "deit_{size}_patch{P}_{IMG}_L{depth}[_H{heads}] or aux_deit_{size}_patch{P}_{IMG}[_L{depth}][_H{heads}], "
    f"with size one of {', '.join(SIZES)}; or a ViT of timm's, NAME[.tag]; and of any of them "
    "NAME@L{depth}-H{heads}[-M{ratio}]"
)
_NUMBER = r"([1-9]\d{0,5})"
_STEM = rf"deit_({'|'.join(SIZES)})_patch{_NUMBER}_{_NUMBER}"
_PLAIN = re.compile(rf"{_STEM}_L{_NUMBER}(?:_H{_NUMBER})?")
_AUX = re.compile(rf"aux_{_STEM}(?:_L{_NUMBER})?(?:_H{_NUMBER})?")
_RATIO = r"(\d{1,3}(?:\.\d{1,30})?)"
_SIZED = re.compile(rf"([^@]*)@L{_NUMBER}-H{_NUMBER}(?:-M{_RATIO})?")

PUBLISHED_NAMES = (
    *(f"deit_{size}_patch16_224_L{depth}" for size in ("tiny", "small", "base") for depth in range(3, 13)),
    "deit_base_patch16_224_L16_H12",
    *(f"aux_deit_{size}_patch16_224" for size in ("tiny", "small", "base")),
)


def is_aux_name(name: str) -> bool:
    """Whether ``name`` follows the grammar of a TLEG Aux-Net."""
    return _AUX.fullmatch(name) is not None


def follows_grammar(name: str) -> bool:
    """Whether ``name`` is an architecture name of this project rather than one of timm's."""
    return _PLAIN.fullmatch(name) is not None or is_aux_name(name)


def is_sized_name(name: str) -> bool:
    """Whether ``name`` asks for a ViT of a kind in other sizes: ``NAME@L6-H3``, ``@L6-H3`` or ``@L6-H3-M2``."""
    return _SIZED.fullmatch(name) is not None


def is_vit(name: str) -> bool:
    """Whether ``name`` stands for a ViT that can have other sizes: one that `parse_arch` takes, but for its sizes."""
    return follows_grammar(name) or is_sized_name(name) or is_kind(name)


def parse_arch(name: str, base: ViTArch | None = None) -> ViTArch:
    """The sizes, and the kind, that an architecture name stands for.

    Args:
        base: the ViT at hand, of a learngene or of a source, whose kind and MLP ratio ``@L6-H3`` alone has.

    Raises:
        InputError: ``name`` does not parse, or is no ViT that can have other sizes; the message shows the grammar and
            the nearest names.
    """
    if match := _SIZED.fullmatch(name):
        of, depth, heads, ratio = match.groups()
        if not of and base is None:
            raise InputError(f"{name} alone is of the kind of a learngene or source, and there is none: add its name")
        base = parse_arch(of) if of else base
        sizes = dict(depth=int(depth), num_heads=int(heads), width=int(heads) * base.head_dim)
        return replace(base, **sizes, mlp_ratio=float(ratio) if ratio else base.mlp_ratio)
    match = _PLAIN.fullmatch(name) or _AUX.fullmatch(name)
    if match is None and timm.is_model(without_tag(name)):
        check_tag(name)
        sizes = sizes_of(without_tag(name))
        own = {field.name: sizes[field.name] for field in fields(ViTArch) if field.name in sizes}
        return ViTArch(**own, kind=without_tag(name))
    if match is None:
        raise InputError(f"unknown architecture {name!r}: expected {GRAMMAR}{nearest(name, known_names())}")
    size, patch, img, depth, heads = match.groups()
    width, num_heads = SIZES[size]
    if heads is not None:  # heads × head_dim of the size
        width, num_heads = int(heads) * (width // num_heads), int(heads)
    return ViTArch(width, int(depth or AUX_DEPTH), num_heads, int(patch), int(img))


def known_names() -> list[str]:
    """Names of this project and of timm, to find the nearest of."""
    return [*PUBLISHED_NAMES, *timm.list_models()]


def name_of(arch: ViTArch) -> str:
    """The name of ``arch`` in the grammar, the shortest there is; without one, how to write it in Python.

    The name of a kind does not say the size of the images, which ``--input-size`` does.
    """
    if arch.kind is not None:
        name = f"{arch.kind}@{arch.label}"
        return name if replace(parse_arch(name), img_size=arch.img_size) == arch else in_python(arch)
    if arch.mlp_ratio is not None:
        base = name_of(replace(arch, mlp_ratio=None))
        return f"{base}@{arch.label}" if follows_grammar(base) else f"{in_python(arch)}, which has no name"
    for suffix in ("", f"_H{arch.num_heads}"):
        for size in reversed(SIZES):
            name = f"deit_{size}_patch{arch.patch_size}_{arch.img_size}_L{arch.depth}{suffix}"
            if _PLAIN.fullmatch(name) and parse_arch(name) == arch:
                return name
    return f"{in_python(arch)}, which has no name"


def in_python(arch: ViTArch) -> str:
    return f"models.ViTArch({', '.join(f'{name}={value!r}' for name, value in arch.as_dict().items())})"


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
