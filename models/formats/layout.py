"""How the tensors of a published learngene correspond to the tensors here."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from common.errors import InputError
from models.vit import ViTArch

import torch
from torch import Tensor

# published key → name of the tensor here, and the index into its stacked axes
Layout = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class PublishedFormat:
    """The published format of a method.

    Attributes:
        key: a key that all weights of this format have, and no others.
        layout: the sizes (`AuxNet.config`) → the layout. Raises InputError where the format cannot express them.
        config: (weights, head_dim, recorded options) → the sizes, which the files do not state.
    """

    key: str
    layout: Callable[[Mapping], Layout]
    config: Callable[[Mapping[str, Tensor], int, object], dict]


def rename_to_published(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Copies of the tensors under their published keys."""
    return {key: tensors[name][place].clone() for key, (name, place) in layout.items()}


def rename_from_published(published: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Published tensors, stacked in float32 under the names used here.

    Raises:
        InputError: keys are missing or unknown, or shapes differ within a stack.
    """
    if unknown := published.keys() - layout.keys():
        raise InputError(f"{len(unknown)} keys do not belong to the published format, such as {min(unknown)}")
    if missing := layout.keys() - published.keys():
        raise InputError(f"{len(missing)} keys of the published format are missing, such as {min(missing)}")
    stacks: dict[str, dict[tuple[int, ...], Tensor]] = {}
    for key, (name, place) in layout.items():
        stack = stacks.setdefault(name, {})
        first = next(iter(stack.values()), published[key])
        if first.shape != published[key].shape:
            raise InputError(f"{key} has shape {tuple(published[key].shape)}, expected {tuple(first.shape)}")
        stack[place] = published[key].float()
    tensors = {}
    for name, stack in stacks.items():
        *_, last = sorted(stack)
        axes = [i + 1 for i in last]  # no index is missing, so the last one gives the length of each stacked axis
        tensors[name] = torch.stack([stack[place] for place in sorted(stack)]).unflatten(0, axes) if axes else stack[()]
    return tensors


def arch_from_weights(width: int, depth: int, head_dim: int, patch: Tensor, pos_embed: Tensor) -> ViTArch:
    """The sizes of a ViT for square images, the sizes of its images and patches taken from the weights.

    Args:
        patch: the kernel of the patch embedding, (embedding, channels, patch, patch).
        pos_embed: (1, patches, embedding).

    Raises:
        InputError: the width is no multiple of ``head_dim``.
    """
    patch_size = patch.shape[-1]
    if width % head_dim:
        raise InputError(f"its width {width} is no multiple of {head_dim}, the size of a head (head_dim)")
    return ViTArch(width, depth, width // head_dim, patch_size, patch_size * math.isqrt(pos_embed.shape[1]))


def check_published_hidden(*archs: ViTArch) -> None:
    """Raises InputError unless all have the MLP ratio of the published ViTs."""
    for arch in archs:
        if arch.mlp_ratio is not None:
            raise InputError(f"the published format is for an MLP ratio of 4, this learngene has {arch.mlp_ratio:g}")


def config_from_weights(arch: ViTArch, head: Tensor, patch: Tensor) -> dict:
    """What `AuxNet.config` states for every method.

    Args:
        arch: the sizes of the Aux-Net.
        head: the weight of the head, (classes, embedding).
        patch: the kernel of the patch embedding, (embedding, channels, patch, patch).
    """
    return {"tgt_arch": arch.as_dict(), "num_classes": head.shape[0], "in_chans": patch.shape[1]}
