"""Weights of a ViT for images, patches and channels other than those that it was trained with."""

from common.errors import InputError
from models.vit import ViTArch, pair

from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor


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


def adapt_to_images(weights: dict[str, Tensor], trained: ViTArch, arch: ViTArch, in_chans: int) -> dict[str, Tensor]:
    """The state dict of a ViT for images, patches and channels other than those that it was trained with.

    Patch embedding and position embedding are resampled with timm's functions.

    Args:
        trained: with the sizes of images and patches that ``weights`` are for.
        arch: with those to fit them to.
    """
    patch, position = weights["patch_embed.proj.weight"], weights.get("pos_embed")
    if arch.patch_size != trained.patch_size:
        patch = resample_patch_embed(patch, [*pair(arch.patch_size)])
    weights = {**weights, "patch_embed.proj.weight": adapt_channels(patch, in_chans)}
    if position is not None and arch.grid != trained.grid:
        prefix = position.shape[1] - trained.num_patches  # class token and others that have a position
        weights["pos_embed"] = resample_abs_pos_embed(position, [*arch.grid], [*trained.grid], prefix)
    return weights
