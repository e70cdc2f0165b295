"""TLEG: every layer is a linear function of its position.

"Transformer as Linear Expansion of Learngene", AAAI 2024.

Notation. A and B are two full sets of layer weights; layer l of L has the weights θ_l = B + (l/L)·A. Patch embedding,
position embedding, final norm and head are ordinary parameters.
"""

from dataclasses import replace

from common.errors import InputError
from models.aux_net import AuxNet, random_vit_weights
from models.selection import choose_neurons, keep_neurons
from models.vit import PUBLISHED_NAMES, ViTArch, is_aux_name, register

import torch
from torch import Tensor, nn

MODULES = ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")
TIMM_NAMES = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")

# The published Aux-Net: norm before the mean over patches, and torch's own epsilon.
AUX_VIT = dict(fc_norm=False, norm_layer=nn.LayerNorm)


class LinearExpansion(torch.autograd.Function):
    """θ_l = B + (l/L)·A for l = 0 … L−1, with ∂A = Σ_l (l/L)·∂θ_l and ∂B = Σ_l ∂θ_l.

    Left to autograd, the gradient of every layer is first multiplied into a tensor of its own for A, memory that is
    written and read once more.
    """

    @staticmethod
    def forward(ctx, A: Tensor, B: Tensor, L: int) -> tuple[Tensor, ...]:
        return tuple(torch.add(B, A, alpha=l / L) for l in range(L))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        L = len(gradients)
        of_A, of_B = torch.zeros_like(gradients[0]), gradients[0].clone()
        for l in range(1, L):
            of_A.add_(gradients[l], alpha=l / L)
            of_B.add_(gradients[l])
        return of_A, of_B, None


def expand(p: dict[str, Tensor], depth: int, norm: str = "norm") -> dict[str, Tensor]:
    """The state dict of a ViT of ``depth`` layers from the learngene ``p`` (TLEG, equation 5).

    Args:
        norm: the name of the ViT's final norm, ``norm`` (before the pooling) or ``fc_norm`` (after it).
    """
    blocks = {
        f"blocks.{l}.{timm_name}.{kind}": theta
        for module, timm_name in zip(MODULES, TIMM_NAMES, strict=True)
        for kind in ("weight", "bias")
        for l, theta in enumerate(LinearExpansion.apply(p[f"A_{module}_{kind}"], p[f"B_{module}_{kind}"], depth))
    }
    return {
        "pos_embed": p["pos_embed"],
        "patch_embed.proj.weight": p["patch_embed_weight"],
        "patch_embed.proj.bias": p["patch_embed_bias"],
        **blocks,
        f"{norm}.weight": p["norm_weight"],
        f"{norm}.bias": p["norm_bias"],
        "head.weight": p["head_weight"],
        "head.bias": p["head_bias"],
    }


class TLEG(AuxNet):
    """The TLEG Aux-Net: a ViT of ``arch`` sizes whose layers are θ_l = B + (l/L)·A."""

    method = "tleg"

    def __init__(self, arch: ViTArch, **kwargs):
        """
        Args:
            arch: sizes of the Aux-Net; the learngene has the same width.
            kwargs: passed on to timm's ``VisionTransformer``.
        """
        super().__init__(arch, AUX_VIT, **kwargs)
        # A and B are drawn like the first layers of a ViT: linear weights truncated normal, biases 0, norm scales 1
        size = dict(in_chans=self.in_chans, num_classes=self.num_classes)
        vit = random_vit_weights(replace(self.arch, depth=2), **AUX_VIT, **size)
        p = {"pos_embed": vit["pos_embed"]}
        for kind in ("weight", "bias"):
            p[f"patch_embed_{kind}"] = vit[f"patch_embed.proj.{kind}"]
            p[f"norm_{kind}"] = vit[f"norm.{kind}"]
            p[f"head_{kind}"] = vit[f"head.{kind}"]
            for module, timm_name in zip(MODULES, TIMM_NAMES, strict=True):
                p[f"A_{module}_{kind}"] = vit[f"blocks.0.{timm_name}.{kind}"]
                p[f"B_{module}_{kind}"] = vit[f"blocks.1.{timm_name}.{kind}"]
        for name in ("A_norm1_weight", "A_norm2_weight"):
            p[name] = torch.zeros_like(p[name])
        self.add_parameters(p)

    def expand(self) -> dict[str, Tensor]:
        return expand(dict(self.named_parameters()), self.arch.depth)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}  # norms and biases have one axis


def descend(p: dict[str, Tensor], config: dict, arch: ViTArch, width_select: str = "continuous") -> dict[str, Tensor]:
    """The state dict of a Des-Net of ``arch`` sizes, whose ``fc_norm`` is the Aux-Net's ``norm``.

    Args:
        width_select: which neurons a Des-Net narrower than the learngene keeps of one as wide, as in `choose_rows`.

    Raises:
        InputError: the Des-Net is wider than the learngene, or has heads of another size.
    """
    aux = ViTArch(**config["tgt_arch"])
    if arch.width > aux.width or arch.head_dim != aux.head_dim:
        raise InputError(
            f"the Des-Net has {arch.num_heads} heads of {arch.head_dim} neurons; this TLEG learngene makes Des-Nets of "
            f"up to {aux.num_heads} heads of {aux.head_dim} neurons (width {aux.width}), of any depth"
        )
    weights = expand(p, arch.depth, norm="fc_norm")
    if arch.width == aux.width:
        return weights
    return keep_neurons(weights, choose_neurons(weights, arch.width, aux.head_dim, width_select))


for _name in PUBLISHED_NAMES:
    if is_aux_name(_name):
        register(_name, TLEG)
