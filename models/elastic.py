"""Elastic: a trained ViT is its own learngene, and smaller ViTs are parts of it.

Source, learngene and Aux-Net are one ViT of N layers. There are no matrices: a Des-Net has the first heads, embedding
neurons and hidden neurons of the source, and some of its layers. Stage 1 trains Des-Nets of many sizes (`Supernet`),
which share their weights, as in "Slimmable Neural Networks" (Yu et al., ICLR 2019) and DynaBERT (Hou et al., NeurIPS
2020). Before that, `models.order` can put neurons and heads in order of importance, so that the first ones are those
to keep.

    tensor                          shape               meaning
    q_weight, …, fc2_bias           (N, …)              the layers of the source, stacked
    pos_embed, patch_embed_*, …     (…)                 the rest of the source
    layers                          (N, N)              whole numbers: the first d of row d − 1 are the layers that a
                                                        Des-Net of d layers keeps, ascending

Which axis of which parameter is cut is in `models.axes`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from common.errors import InputError
from models.aux_net import AuxNet
from models.axes import Structure, axes_of, fuse, stack_layers, take, tensor_name
from models.depth_mapping import nearest_layers
from models.figures import Curves, Figures
from models.lets import LeTs
from models.names import is_aux_name, parse_arch
from models.registry import register_method
from models.stateless import random_vit_weights
from models.vit import ViTArch, check_kind, described

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def cut(p: Mapping[str, Tensor], structure: Structure, source: ViTArch, arch: ViTArch) -> dict[str, Tensor]:
    """The state dict of a ViT of ``arch``: the first neurons of every axis, in the layers that are kept.

    Args:
        p: the tensors of the learngene.
        structure: of the ViT.
        source: the sizes of the learngene.
    """
    kept = p["layers"][arch.depth - 1, : arch.depth]
    parts = {}
    for name in structure.names:
        w, of_layer = p[tensor_name(name)], name.startswith("blocks.")
        for number, axis in enumerate(axes_of(name)):
            if axis != "." and arch.neurons(axis) < source.neurons(axis):
                w = take(w, number + of_layer, slice(arch.neurons(axis)))
        if of_layer:  # all in one memory layout, so that compiled blocks of all depths are the same
            w = w.index_select(0, kept) if arch.depth < source.depth else w.contiguous()  # no synchronisation
        parts[name] = w
    vit = {}
    for name, w in fuse(parts, structure).items():
        layers = enumerate(w.unbind()) if name.startswith("blocks.") else [(0, w)]
        vit.update({name.replace("*", str(l)): layer for l, layer in layers})
    return vit


def table_of(kept: Sequence[Sequence[int]]) -> Tensor:
    """The tensor ``layers``, from the layers that each depth keeps."""
    return torch.tensor([[*layers, *[0] * (len(kept) - len(layers))] for layers in kept])


@register_method("elastic")
class Elastic(AuxNet):
    """A ViT whose parts are ViTs: the source itself, to be trained through Des-Nets of many sizes.

    Attributes:
        embedding_order: for each embedding neuron which one of the source's file it is, before training.
    """

    title = "Elastic"
    measured = (
        "85.8 ± 0.0 % before training, 85.7 ± 0.1 % after 1 epoch, 86.0 ± 0.1 % after 5 epochs; the same ViTs"
        " to the end: from scratch 84.3 ± 0.1 %, distilled alone 85.3 ± 0.1 % (mean of all 9 sizes)"
    )
    choices = ()
    parts: ClassVar = {
        **{
            label.replace(" of the learngene", ""): stems for label, stems in LeTs.parts.items() if "learngene" in label
        },
        "position embedding": ("pos_embed",),
    }
    arch_options: ClassVar = {"src_arch": "source"}
    options = ("src_path", "order", "depth_order")
    training_only = ("feature_maps",)
    usage = "--src-arch without --tgt-arch"
    defaults: ClassVar = AuxNet.defaults | {
        "descendants": 2,
        "descendant_weight": 1.0,
        "distillation_mean": "images",
        "order": "none",
        "depth_order": "even",
    }

    def __init__(self, arch: ViTArch, **kwargs):
        """
        Args:
            arch: sizes of the source.
            kwargs: passed on to timm's class.
        """
        super().__init__(arch, {}, **kwargs)
        size = dict(in_chans=self.in_chans, num_classes=self.num_classes)
        self.structure = described(self.arch, self.num_classes, self.in_chans).structure
        self.add_parameters(tensors_of_vit(random_vit_weights(self.arch, **size), self.structure))
        depth = self.arch.depth
        self.embedding_order = torch.arange(self.arch.width)
        self.register_buffer("layers", table_of([nearest_layers(depth, d) for d in range(1, depth + 1)]))

    @classmethod
    def is_meant_by(cls, config: object) -> bool:
        return bool(config.src_arch and not config.tgt_arch)

    @classmethod
    def check_config(cls, config: object) -> None:
        if config.finetune:
            raise InputError("--finetune belongs to another run: --src-path gives the weights of --src-arch")
        for option in ("order", "depth_order"):
            if getattr(config, option) in ("magnitude", "taylor", "output") and not config.src_path:
                name = option.replace("_", "-")
                raise InputError(f"--src-path is missing: --{name} {getattr(config, option)} is that of a trained ViT")

    @classmethod
    def check_names(cls, names: Sequence[str]) -> None:
        if len(names) != 1 or is_aux_name(names[0]):
            raise InputError("the architecture of elastic is one name of a ViT: the source")

    @classmethod
    def archs_from_config(cls, config: object) -> tuple[ViTArch, ViTArch]:
        source = parse_arch(config.src_arch)
        depth, heads = (-(-size // 2) for size in (source.depth, source.num_heads))
        return replace(source, depth=depth, num_heads=heads, width=heads * source.head_dim), source

    @classmethod
    def from_config(cls, config: object, **vit: object) -> "Elastic":
        return cls(parse_arch(config.src_arch), **vit)

    @classmethod
    def from_header(cls, header: Mapping, **vit: object) -> "Elastic":
        return cls(ViTArch(**header["tgt_arch"]), **vit)

    @classmethod
    def check_tensors(cls, tensors: Mapping[str, Tensor], header: Mapping) -> None:
        depth = header["tgt_arch"]["depth"]
        for d, row in enumerate(tensors["layers"].tolist(), 1):
            kept = row[:d]
            if kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < depth:
                raise InputError(f"layers of depth {d} are {kept[:20]}: expected {d} of 0 to {depth - 1}, ascending")

    def expand(self) -> dict[str, Tensor]:
        return self.des_weights(self.arch)

    @classmethod
    def descend(cls, tensors: dict[str, Tensor], header: Mapping, arch: ViTArch) -> dict[str, Tensor]:
        """The state dict of a Des-Net of ``arch`` sizes.

        Raises:
            InputError: it is larger than the source, of another kind, or has heads of another size.
        """
        source = ViTArch(**header["tgt_arch"])
        check_kind(arch, source)
        if arch.head_dim != source.head_dim:
            raise InputError(
                f"the Des-Net has heads of {arch.head_dim} neurons; those of the source have {source.head_dim}"
            )
        for size, unit in (("depth", "layers"), ("num_heads", "heads"), ("hidden", "hidden neurons in a layer")):
            asked, most = getattr(arch, size), getattr(source, size)
            if asked > most:
                raise InputError(
                    f"the Des-Net has {asked} {unit}, the source {most}: an elastic learngene makes parts of its source"
                )
        structure = described(source, header["num_classes"], header["in_chans"]).structure
        return cut(tensors, structure, source, arch)

    def des_weights(self, arch: ViTArch) -> dict[str, Tensor]:
        tensors = {**dict(self.named_parameters()), "layers": self.layers}
        return cut(tensors, self.structure, self.arch, arch)

    @torch.no_grad()
    def start_from(self, vit: Mapping[str, Tensor]) -> None:
        """Take the weights of a trained ViT of the same sizes.

        Args:
            vit: its state dict.
        """
        for name, tensor in tensors_of_vit(vit, self.structure).items():
            self.get_parameter(name).copy_(tensor)

    @torch.no_grad()
    def keep_layers(self, ranking: Sequence[int]) -> None:
        """Let a Des-Net of d layers keep the first d of ``ranking``, in their order in the source.

        Args:
            ranking: all layers, from the most to the least important. Without this call Des-Nets keep evenly spaced
                layers.
        """
        if sorted(ranking) != [*range(self.arch.depth)]:
            raise ValueError(f"{ranking} is no ranking of {self.arch.depth} layers")
        self.layers.copy_(table_of([sorted(ranking[:d]) for d in range(1, self.arch.depth + 1)]))

    @classmethod
    def archs(cls, header: Mapping) -> dict[str, ViTArch]:
        return {"source": ViTArch(**header["tgt_arch"])}

    @classmethod
    def remarks(cls, tensors: Mapping[str, Tensor], header: Mapping) -> list[str]:
        rows = enumerate(tensors["layers"].tolist(), 1)
        kept = [", ".join(map(str, row[:depth])) for depth, row in rows]
        return [f"layers of the source that a Des-Net keeps: {'; '.join(kept)}"]

    @classmethod
    def figures(cls, tensors: Mapping[str, Tensor], header: Mapping) -> Figures:
        """The norms of the neurons in their order: a Des-Net has the first ones."""
        norms = {
            "embedding, rows of fc2": dict(enumerate(tensors["fc2_weight"].norm(dim=2))),
            "hidden, columns of fc2": dict(enumerate(tensors["fc2_weight"].norm(dim=1))),
        }
        return [Curves(norms, "neuron, in the order in which Des-Nets keep them", "l2 norm", scale="layer")]

    def no_weight_decay(self) -> set[str]:
        # decay would only pull the maps from the identity, and nothing is left of them
        return self.structure.vectors | {"pos_embed", "feature_maps"}

    # -----------------------------------------------------------------------------------------------------------------
    # Features of the source as targets
    # -----------------------------------------------------------------------------------------------------------------

    def add_feature_maps(self) -> None:
        """Add the linear maps from features of each width to those of the source, which stage 1 alone needs.

        ``feature_maps`` (heads, 2, D, D) has for h heads, of w neurons together, the first w columns of entry h − 1:
        one map for the pooled feature and one for those of the patches. It is one tensor, as every parameter has to get
        a gradient in every step, whichever widths are drawn. At first every map sends a neuron to that of the source
        which it was, so that the source itself leaves nothing to learn.
        """
        identity = torch.eye(self.arch.width)[:, self.embedding_order].to(self.layers.device)
        self.feature_maps = nn.Parameter(identity.repeat(self.arch.num_heads, 2, 1, 1))

    def map_features(self, features: Tensor) -> Tensor:
        """The features (batch, 1 + patches, D) of a source of width D that those of a Des-Net stand for.

        Args:
            features: `models.features.Features` of a Des-Net, (batch, 1 + patches, width).
        """
        width = features.shape[-1]
        pooled, patches = self.feature_maps[width // self.arch.head_dim - 1, ..., :width]
        return torch.cat([F.linear(features[:, :1], pooled), F.linear(features[:, 1:], patches)], dim=1)


def tensors_of_vit(vit: Mapping[str, Tensor], structure: Structure) -> dict[str, Tensor]:
    """The parameters of the learngene from the state dict of a ViT."""
    positions = {"pos_embed": vit["pos_embed"].clone()} if "pos_embed" in vit else {}
    return {**positions, **stack_layers(vit, structure)}
