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
TIMM_MODULES = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
# the tensors of a layer: their names here, after A_ or B_ → in a timm block
TIMM_NAMES = {
    f"{module}_{kind}": f"{timm_module}.{kind}"
    for module, timm_module in zip(MODULES, TIMM_MODULES, strict=True)
    for kind in ("weight", "bias")
}

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
    layers = {name: LinearExpansion.apply(p[f"A_{name}"], p[f"B_{name}"], depth) for name in TIMM_NAMES}
    return to_vit(p, layers, norm)


def to_vit(p: dict[str, Tensor], layers: Mapping[str, Sequence[Tensor]], norm: str) -> dict[str, Tensor]:
    """The state dict of a ViT with ``layers``, a tensor of each kind per layer; the rest is that of the learngene."""
    vit = {"pos_embed": p["pos_embed"]}
    for kind in ("weight", "bias"):
        vit[f"patch_embed.proj.{kind}"] = p[f"patch_embed_{kind}"]
        vit[f"{norm}.{kind}"] = p[f"norm_{kind}"]
        vit[f"head.{kind}"] = p[f"head_{kind}"]
    for name, timm_name in TIMM_NAMES.items():
        vit |= {f"blocks.{l}.{timm_name}": tensor for l, tensor in enumerate(layers[name])}
    return vit


def from_vit(vit: dict[str, Tensor], norm: str) -> dict[str, Tensor]:
    """The learngene whose A and B are the two layers of a ViT: the inverse of `to_vit`.

    Its order is that of the parameters, by which checkpoints number the state of the optimiser.
    """
    p = {"pos_embed": vit["pos_embed"]}
    for kind in ("weight", "bias"):
        p[f"patch_embed_{kind}"] = vit[f"patch_embed.proj.{kind}"]
        p[f"norm_{kind}"] = vit[f"{norm}.{kind}"]
        p[f"head_{kind}"] = vit[f"head.{kind}"]
        for name in (name for name in TIMM_NAMES if name.endswith(kind)):
            p |= {f"{half}_{name}": vit[f"blocks.{l}.{TIMM_NAMES[name]}"] for l, half in enumerate("AB")}
    return p


def keep_first_neurons(p: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """The learngene of the first neurons of ``p``, which expands to the first neurons of every layer."""
    vit = to_vit(p, {name: (p[f"A_{name}"], p[f"B_{name}"]) for name in TIMM_NAMES}, "fc_norm")
    return from_vit(keep_neurons(vit, first_neurons(width, depth=2)), "fc_norm")


def layout(config: Mapping) -> Layout:
    """The published layout, which is the same for all sizes."""
    keys: Layout = {"pos_embed": ("pos_embed", ())}
    for kind in ("weight", "bias"):
        keys[f"patch_embed.proj.{kind}"] = (f"patch_embed_{kind}", ())
        keys[f"norm.{kind}"] = (f"norm_{kind}", ())
        keys[f"head.{kind}"] = (f"head_{kind}", ())
    for name, timm_name in TIMM_NAMES.items():
        for half, published in (("A", "ilayer"), ("B", "base")):
            module, _, kind = timm_name.rpartition(".")
            keys[f"blocks.block.{module}.instances.0.{kind}_{published}"] = (f"{half}_{name}", ())
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
        p = from_vit(vit, "norm")
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
        if arch.width < aux.width and width_select == "continuous":  # A and B are cut once, not every layer
            return expand(keep_first_neurons(tensors, arch.width), arch.depth, norm="fc_norm")
        weights = expand(tensors, arch.depth, norm="fc_norm")
        if arch.width == aux.width:
            return weights
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
