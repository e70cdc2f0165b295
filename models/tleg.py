"""TLEG: every layer is a linear function of its position.

"Transformer as Linear Expansion of Learngene", AAAI 2024.

Notation. A and B are two full sets of layer weights; layer l of L has the weights θ_l = B + (l/L)·A. Patch embedding,
position embedding, final norm and head are ordinary parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from common.errors import InputError
from models.aux_net import AuxNet, random_vit_weights
from models.figures import Figures, Points, root_mean_square
from models.formats.layout import Layout, PublishedFormat, arch_from_weights, config_from_weights
from models.registry import register_method
from models.selection import choose_neurons, first_neurons, keep_neurons
from models.vit import AUX_DEPTH, PUBLISHED_NAMES, ViTArch, is_aux_name, parse_arch, register

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


def layout(config: Mapping) -> Layout:
    """The published layout, which is the same for all sizes."""
    keys: Layout = {"pos_embed": ("pos_embed", ())}
    for kind in ("weight", "bias"):
        keys[f"patch_embed.proj.{kind}"] = (f"patch_embed_{kind}", ())
        keys[f"norm.{kind}"] = (f"norm_{kind}", ())
        keys[f"head.{kind}"] = (f"head_{kind}", ())
        for module, timm_name in zip(MODULES, TIMM_NAMES, strict=True):
            for half, published in (("A", "ilayer"), ("B", "base")):
                key = f"blocks.block.{timm_name}.instances.0.{kind}_{published}"
                keys[key] = (f"{half}_{module}_{kind}", ())
    return keys


def config_of(weights: Mapping[str, Tensor], head_dim: int, args: object) -> dict:
    """The sizes of a published learngene, whose Aux-Net has 12 layers."""
    patch, pos_embed = weights["patch_embed.proj.weight"], weights["pos_embed"]
    arch = arch_from_weights(pos_embed.shape[2], AUX_DEPTH, head_dim, patch, pos_embed)
    return config_from_weights(arch, weights["head.weight"], patch)


@register_method("tleg")
class TLEG(AuxNet):
    """The TLEG Aux-Net: a ViT of ``arch`` sizes whose layers are θ_l = B + (l/L)·A."""

    title = "TLEG"
    parts: ClassVar = {
        "A, slope of the layers": ("A",),
        "B, layer at position 0": ("B",),
        "patch embedding": ("patch_embed",),
        "position embedding": ("pos_embed",),
        "final norm": ("norm",),
        "head": ("head",),
    }
    published = PublishedFormat("blocks.block.norm1.instances.0.weight_ilayer", layout, config_of)
    usage = "--model aux_deit_…"

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

    @classmethod
    def is_meant_by(cls, config: object) -> bool:
        return is_aux_name(config.model or "") and not config.load_gene

    @classmethod
    def check_config(cls, config: object) -> None:
        if not is_aux_name(config.model):
            raise InputError(f"--model {config.model} is no Aux-Net of TLEG: expected a name aux_deit_…")

    @classmethod
    def check_names(cls, names: Sequence[str]) -> None:
        if not names or not all(is_aux_name(name) for name in names):
            raise InputError("architectures of tleg are one or more aux_deit_… names: the Aux-Nets")

    @classmethod
    def archs_from_config(cls, config: object) -> tuple[ViTArch, ViTArch]:
        aux = parse_arch(config.model)
        return replace(aux, depth=min(2, aux.depth)), aux  # as deep as the learngene, A and B

    @classmethod
    def from_config(cls, config: object, **vit: object) -> "TLEG":
        return cls(parse_arch(config.model), **vit)

    @classmethod
    def from_header(cls, header: Mapping, **vit: object) -> "TLEG":
        return cls(ViTArch(**header["tgt_arch"]), **vit)

    def expand(self) -> dict[str, Tensor]:
        return expand(dict(self.named_parameters()), self.arch.depth)

    @classmethod
    def descend(
        cls, tensors: dict[str, Tensor], header: Mapping, arch: ViTArch, width_select: str = "continuous"
    ) -> dict[str, Tensor]:
        """The state dict of a Des-Net of ``arch`` sizes, whose ``fc_norm`` is the Aux-Net's ``norm``.

        Args:
            width_select: which neurons a Des-Net narrower than the learngene keeps of one as wide, as in `choose_rows`.

        Raises:
            InputError: the Des-Net is wider than the learngene, or has heads of another size.
        """
        aux = ViTArch(**header["tgt_arch"])
        if arch.width > aux.width or arch.head_dim != aux.head_dim:
            raise InputError(
                f"the Des-Net has {arch.num_heads} heads of {arch.head_dim} neurons; this TLEG learngene makes "
                f"Des-Nets of up to {aux.num_heads} heads of {aux.head_dim} neurons (width {aux.width}), of any depth"
            )
        weights = expand(tensors, arch.depth, norm="fc_norm")
        if arch.width == aux.width:
            return weights
        if width_select == "continuous":
            return keep_neurons(weights, first_neurons(arch.width, arch.depth))
        return keep_neurons(weights, choose_neurons(weights, arch.width, aux.head_dim, width_select))

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}  # norms and biases have one axis

    @classmethod
    def figures(cls, tensors: Mapping[str, Tensor], header: Mapping) -> Figures:
        """The sizes of A and B, per module."""
        panels = {
            title: {half: [root_mean_square(tensors[f"{half}_{module}_{kind}"]) for module in MODULES] for half in "AB"}
            for title, kind in (("weights", "weight"), ("biases", "bias"))
        }
        return [Points(panels, MODULES, "module", "root mean square of a tensor's elements")]


for _name in PUBLISHED_NAMES:
    if is_aux_name(_name):
        register(_name, TLEG)
