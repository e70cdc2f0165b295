"""TLEG: every layer is a linear function of its position.

"Transformer as Linear Expansion of Learngene", AAAI 2024.

Notation. A and B are two full sets of layer weights; layer l of L has the weights θ_l = B + (l/L)·A. Patch embedding,
position embedding, final norm and head are ordinary parameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

from common.errors import InputError
from models.aux_net import AuxNet
from models.axes import tensor_name
from models.figures import Figures, Points, root_mean_square
from models.formats.layout import (
    Layout,
    PublishedFormat,
    arch_from_weights,
    check_published_hidden,
    config_from_weights,
)
from models.names import AUX_DEPTH, PUBLISHED_NAMES, is_aux_name, is_vit, parse_arch, register
from models.registry import register_method
from models.selection import choose_neurons, first_neurons, keep_neurons
from models.stateless import random_vit_weights
from models.vit import ViTArch, check_hidden, check_kind, described

import torch
from torch import Tensor, nn

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


class Names(NamedTuple):
    """The parameters of a ViT, name in a learngene → timm's.

    Attributes:
        layers: of a layer, there after ``A_`` or ``B_``, here after ``blocks.{l}.``.
        others: those outside the layers.
    """

    layers: dict[str, str]
    others: dict[str, str]


def names_of(arch: ViTArch, num_classes: int) -> Names:
    """The parameters of the ViTs of a kind. Of plain ones the final norm is called ``norm``, wherever it is."""
    layers, others = {}, {}
    for name in described(arch, num_classes).shapes:
        if name.startswith("blocks.*."):
            layers[tensor_name(name)] = name.removeprefix("blocks.*.")
        else:
            others[tensor_name(name if arch.kind else name.replace("fc_norm", "norm"))] = name
    return Names(layers, others)


def expand(p: dict[str, Tensor], names: Names, depth: int) -> dict[str, Tensor]:
    """The state dict of a ViT of ``depth`` layers from the learngene ``p`` (TLEG, equation 5)."""
    layers = {name: LinearExpansion.apply(p[f"A_{name}"], p[f"B_{name}"], depth) for name in names.layers}
    return to_vit(p, names, layers)


def to_vit(p: dict[str, Tensor], names: Names, layers: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """The state dict of a ViT with ``layers``, a tensor of each kind per layer; the rest is that of the learngene."""
    vit = {timm_name: p[name] for name, timm_name in names.others.items()}
    for name, timm_name in names.layers.items():
        vit |= {f"blocks.{l}.{timm_name}": tensor for l, tensor in enumerate(layers[name])}
    return vit


def from_vit(vit: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The learngene whose A and B are the two layers of a ViT: the inverse of `to_vit`.

    Its order is that of the parameters, by which checkpoints number the state of the optimiser: tokens and positions,
    weights, biases, the rest.
    """

    def rank(timm_name: str) -> int:
        return {"weight": 0, "bias": 1}.get(timm_name.rpartition(".")[2], 2)

    p = {name: vit[timm_name] for name, timm_name in names.others.items() if "." not in timm_name}
    for r in range(3):
        p |= {name: vit[n] for name, n in names.others.items() if "." in n and rank(n) == r}
        for name, timm_name in names.layers.items():
            if rank(timm_name) == r:
                p |= {f"{half}_{name}": vit[f"blocks.{l}.{timm_name}"] for l, half in enumerate("AB")}
    return p


def keep_first_neurons(p: dict[str, Tensor], names: Names, arch: ViTArch) -> dict[str, Tensor]:
    """The learngene of the first neurons of ``p``, which expands to the first neurons of every layer."""
    vit = to_vit(p, names, {name: (p[f"A_{name}"], p[f"B_{name}"]) for name in names.layers})
    return from_vit(keep_neurons(vit, first_neurons(replace(arch, depth=2))), names)


def layout(config: Mapping) -> Layout:
    """The published layout, which is the same for all sizes.

    Raises:
        InputError: the learngene is of another kind than the plain ViT, or of another MLP ratio.
    """
    arch = ViTArch(**config["tgt_arch"])
    if arch.kind is not None:
        raise InputError(f"the published format is for plain ViTs, this learngene is of the kind {arch.kind}")
    check_published_hidden(arch)
    names = names_of(arch, config["num_classes"])
    keys: Layout = {timm_name.replace("fc_norm", "norm"): (name, ()) for name, timm_name in names.others.items()}
    for name, timm_name in names.layers.items():
        module, _, kind = timm_name.rpartition(".")
        for half, published in (("A", "ilayer"), ("B", "base")):
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
    measured = (
        "61.3 ± 4.4 % before training, 80.1 ± 0.5 % after 1 epoch, 82.9 ± 0.6 % after 5 epochs; the same ViTs"
        " to the end: from scratch 84.9 ± 0.3 %, distilled alone 85.9 ± 0.2 % (mean of L1-H3, L2-H3, L4-H3)"
    )
    parts: ClassVar = {
        "A, slope of the layers": ("A",),
        "B, layer at position 0": ("B",),
        "patch embedding": ("patch_embed",),
        "tokens": ("cls_token", "reg_token", "dist_token"),
        "position embedding": ("pos_embed",),
        "first norm": ("norm_pre",),
        "final norm": ("norm_weight", "norm_bias", "fc_norm"),
        "pooling block": ("attn_pool",),
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
        plain = arch.kind is None
        aux_vit = AUX_VIT if plain else {}
        super().__init__(arch, aux_vit, **kwargs)
        names = names_of(self.arch, self.num_classes)
        others = {name: timm_name.replace("fc_norm", "norm") for name, timm_name in names.others.items()}
        self.names = names._replace(others=others) if plain else names
        # A and B are drawn like the first layers of a ViT: linear weights truncated normal, biases 0, norm scales 1
        size = dict(in_chans=self.in_chans, num_classes=self.num_classes)
        vit = random_vit_weights(replace(self.arch, depth=2), **aux_vit, **size)
        p = from_vit(vit, self.names)
        for name, tensor in p.items():
            if name.startswith("A_") and tensor.ndim == 1:  # scales of norms; biases are 0
                p[name] = torch.zeros_like(tensor)
        self.add_parameters(p)

    @classmethod
    def is_meant_by(cls, config: object) -> bool:
        return is_aux_name(config.model or "") and not config.load_gene

    @classmethod
    def check_config(cls, config: object) -> None:
        if not is_vit(config.model):
            raise InputError(f"--model {config.model} is no Aux-Net of TLEG: expected a ViT, such as aux_deit_…")

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
        return expand(dict(self.named_parameters()), self.names, self.arch.depth)

    @classmethod
    def descend(
        cls, tensors: dict[str, Tensor], header: Mapping, arch: ViTArch, width_select: str = "continuous"
    ) -> dict[str, Tensor]:
        """The state dict of a Des-Net of ``arch`` sizes, whose ``fc_norm`` is the Aux-Net's ``norm``.

        Args:
            width_select: which neurons a Des-Net narrower than the learngene, or of fewer hidden neurons, keeps of one
                of its sizes, as in `choose_rows`.

        Raises:
            InputError: the Des-Net is wider than the learngene, has more hidden neurons, or heads of another size.
        """
        aux = ViTArch(**header["tgt_arch"])
        check_kind(arch, aux)
        if arch.width > aux.width or arch.head_dim != aux.head_dim:
            raise InputError(
                f"the Des-Net has {arch.num_heads} heads of {arch.head_dim} neurons; this TLEG learngene makes "
                f"Des-Nets of up to {aux.num_heads} heads of {aux.head_dim} neurons (width {aux.width}), of any depth"
            )
        check_hidden(arch, aux)
        smaller = arch.width < aux.width or arch.hidden < aux.hidden
        names = names_of(arch, header["num_classes"])
        if smaller and width_select == "continuous":  # A and B are cut once, not every layer
            return expand(keep_first_neurons(tensors, names, arch), names, arch.depth)
        weights = expand(tensors, names, arch.depth)
        if not smaller:
            return weights
        return keep_neurons(weights, choose_neurons(weights, arch, width_select))

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "reg_token", "dist_token"}  # norms and biases have one axis

    @classmethod
    def figures(cls, tensors: Mapping[str, Tensor], header: Mapping) -> Figures:
        """The sizes of A and B, per module."""
        names = names_of(ViTArch(**header["tgt_arch"]), header["num_classes"]).layers
        biases = [name for name in names if name.endswith("bias")]
        module_of = {name: name.removesuffix("_weight").removesuffix("_bias") for name in names}
        modules = [*dict.fromkeys(module_of.values())]

        def sizes(half: str, of: Sequence[str]) -> list[float]:
            """Of each module; not a number where it has no such parameter."""
            found = {module_of[name]: root_mean_square(tensors[f"{half}_{name}"]) for name in of}
            return [found.get(module, math.nan) for module in modules]

        parameters = {"weights": [name for name in names if name not in biases], "biases": biases}
        panels = {title: {half: sizes(half, of) for half in "AB"} for title, of in parameters.items()}
        return [Points(panels, modules, "module", "root mean square of a tensor's elements")]


for _name in PUBLISHED_NAMES:
    if is_aux_name(_name):
        register(_name, TLEG)
