"""LeTs: learnable matrices expand a narrow, shallow learngene in width and in depth.

"Initializing Variable-sized Vision Transformers from Learngene with Learnable Transformation", NeurIPS 2024.

Notation. The learngene has n layers of width s, the Aux-Net N layers of width D. ⟨A⟩ = [I; A] keeps the old neurons
and adds one per row of A. E is shared by every use of the embedding axis, Q_j, K_j, V_j and M_j belong to learngene
layer j, C to the head. The learngene layers of pair p are 2p and 2p + 1. Tensors of one kind are stacked along a
leading axis over the layers, so that a step expands all of them in a handful of products.

    tensor                          shape               meaning
    E, C                            (D−s, s)            width matrices of the whole network
    Q, K, V                         (n, D−s, s)         width matrices of each layer's heads
    M                               (n, 4(D−s), 4s)     width matrices of each layer's hidden neurons (MLP ratio 4)
    g, h                            (8, rows, 2)        depth coefficients of weights and biases, per module
    q_weight, …, fc2_bias           (n, …)              the learngene's layers
    patch_embed_*, fc_norm_*, head_*                    the rest of the learngene
    pos_embed                       (1, patches, D)     the Aux-Net's own

Which matrix widens which axis of which parameter, of all kinds of ViT, is in `models.axes`.

With ``full_width`` the width matrices are those of LiGO (Wang et al., ICLR 2023): ⟨A⟩ is A itself, with a row for every
neuron of the Aux-Net, D instead of D−s, so that the old neurons are transformed too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

from common.errors import InputError
from models.aux_net import AuxNet
from models.axes import (
    AXES,
    Structure,
    axes_of,
    fuse,
    is_vector,
    module_of,
    stack_layers,
    tensor_name,
    widen,
    widen_out,
)
from models.depth_mapping import DepthPlan, depth_plan, des_plan, groups_of, mapping_or_default, rows_of_coefficients
from models.factored import FactoredInLinear, FactoredOutLinear
from models.figures import Curves, Figures, HeatMaps, sorted_norms
from models.formats import published_lets
from models.formats.layout import PublishedFormat
from models.initialisation import DEPTH_SCHEMES, WIDTH_SCHEMES, Row, init_depth, init_width
from models.names import is_aux_name, parse_arch
from models.registry import register_method
from models.selection import POOL, matrix_of, select_width
from models.stateless import random_vit_weights
from models.vit import ViTArch, check_kind, described

import torch
from torch import Tensor, nn
from torch.func import functional_call

MATRICES = (*"ECQKVMgh", *POOL.values(), "pos_embed")  # what is no tensor of the learngene's own ViT
EXPANSION = ("layers_per_row", "group_size", "full_width")  # what a learngene file states besides the sizes


# ---------------------------------------------------------------------------------------------------------------------
# The expansion: learngene → ViT state dict
# ---------------------------------------------------------------------------------------------------------------------


def depth_matrices(g: Tensor, plan: DepthPlan, modules: Sequence[str], n: int) -> dict[str, Tensor]:
    """G of each module, (distinct layers, n): the coefficients of a layer in the columns of its group, else 0."""
    G = torch.einsum("mrc,urp->mupc", g, plan.select.to(g.dtype)).flatten(2)[..., :n]
    return dict(zip(modules, G, strict=True))


def mix(G: Tensor, w: Tensor) -> Tensor:
    """W_i = Σ_j G[i, j] w_j over the learngene's layers j: (layers, n) and (n, …) → (layers, …).

    With the coefficients of a pair a, b in row r, as published, this is W_i = g[r, 0]·w_a + g[r, 1]·w_b.
    """
    return (G @ w.flatten(1)).view(G.shape[0], *w.shape[1:])


class Expansion(NamedTuple):
    """What the expansion of a learngene depends on besides its tensors.

    Attributes:
        plan: which learngene layers make which layer of the ViT.
        structure: of the ViT.
        full_width: ⟨A⟩ is A itself.
        factored: linear layers of a block that stay at width s on the axis of the embedding, with E beside them.
    """

    plan: DepthPlan
    structure: Structure
    full_width: bool
    factored: Sequence[str] = ()


def expand(p: dict[str, Tensor], how: Expansion) -> dict[str, Tensor]:
    """The state dict of a ViT, of width s + rows of E, from the learngene ``p`` (LeTs, section 3.2)."""
    vit = expand_parameters(p, [name for name in how.structure.names if not is_vector(name)], how)
    device = "cpu" if p["E"].is_meta else p["E"].device.type
    with torch.autocast(device, enabled=False):  # norms want float32, and vectors cost nothing
        vit.update(expand_parameters(p, [name for name in how.structure.names if is_vector(name)], how))
    layers = {name: layer for name, layer in vit.items() if name.startswith("blocks.")}
    vit = {name: tensor for name, tensor in vit.items() if name not in layers}
    for l, u in enumerate(how.plan.layers):  # torch 2.6 does not compile |=
        vit.update({name.replace("*", str(l)): layer[u] for name, layer in layers.items()})
        vit.update({f"blocks.{l}.{module}.E": p["E"] for module in how.factored})
    return vit


def expand_parameters(p: dict[str, Tensor], names: Sequence[str], how: Expansion) -> dict[str, Tensor]:
    """Some parameters of a ViT under timm's names; those of the distinct layers in a sequence.

    The matrices of a single layer come before the sum over layers. E is the same in all of them, so it moves out of
    the sum. Without gradients the matrices of every layer get memory of their own, which a ViT can take.
    """
    n, modules, full = len(p["norm1_weight"]), how.structure.modules, how.full_width
    G, H = (depth_matrices(p[name], how.plan, modules, n) if name in p else {} for name in "gh")
    of_layers = {axis: p[matrix_of(axis)] for axis in "QKVMqkvm" if matrix_of(axis) in p}
    of_network = {axis: p[axis] for axis in "EC" if axis in p}
    mixed = {}
    for name in names:
        w = widen(p[tensor_name(name)], axes_of(name), of_layers, full)
        if name.startswith("blocks."):
            w = mix((H if name.endswith(".bias") else G)[module_of(name)], w)
        mixed[name] = w
    vit, together = fuse(mixed, how.structure), torch.is_grad_enabled()
    for name, w in vit.items():
        axes = axes_of(how.structure.stored[name][0])
        if name == "pos_embed" or module_of(name).removeprefix("blocks.*.") in how.factored:
            axes = ""
        if not name.startswith("blocks."):
            vit[name] = widen(w, axes, of_network, full)
        elif together or w.ndim == 2:
            vit[name] = widen(w, axes, of_network, full).unbind()
        else:
            vit[name] = [widen(layer, axes, of_network, full) for layer in w]
    return vit


@register_method("lets")
class LeTs(AuxNet):
    """The LeTs Aux-Net: a ViT of ``tgt`` sizes whose every weight is expanded from a learngene of ``src`` sizes."""

    title = "LeTs"
    measured = (
        "53.2 (1) % before training, 76.4 (1) % after 1 epoch, 80.2 (1) % after 5 epochs; the same ViTs to "
        "the end: from scratch 84.3 ± 0.1 %, distilled alone 85.3 ± 0.1 % (mean of all 9 sizes)"
    )
    choices = ("mapping_layer", "mapping_layer_coeff", "width_select", "depth_select")
    parts: ClassVar = {
        "layers of the learngene": [tensor_name(module) for module in AXES if module.startswith("blocks.")],
        "patch embedding of the learngene": ("patch_embed",),
        "tokens of the learngene": ("cls_token", "reg_token", "dist_token"),
        "first norm of the learngene": ("norm_pre",),
        "final norm of the learngene": ("fc_norm", "norm_weight", "norm_bias"),
        "pooling block of the learngene": ("attn_pool",),
        "head of the learngene": ("head",),
        "E, width of the embedding": ("E",),
        "C, width of the head's input": ("C",),
        "Q, width of the queries": ("Q",),
        "K, width of the keys": ("K",),
        "V, width of the values": ("V",),
        "M, width of the hidden layers": ("M",),
        "matrices of the pooling block": ("pool",),
        "g, depth coefficients of weights": ("g",),
        "h, depth coefficients of biases": ("h",),
        "position embedding of the Aux-Net": ("pos_embed",),
    }
    published = PublishedFormat(published_lets.KEY, published_lets.layout, published_lets.config_of)
    flags = ("full_width",)
    arch_options: ClassVar = {"src_arch": "learngene", "tgt_arch": "Aux-Net"}
    options = (*EXPANSION, "src_path", "freeze_src", "trans_init_scheme", "trans_init_noise")
    usage = "--src-arch and --tgt-arch"

    def __init__(
        self,
        src: ViTArch,
        tgt: ViTArch,
        layers_per_row: int | None = None,
        group_size: int = 2,
        full_width: bool = False,
        init_scheme: Sequence[str] | None = None,
        init_noise: Sequence[float] = (0.03, 0.03),
        **kwargs,
    ):
        """
        Args:
            src: sizes of the learngene.
            tgt: sizes of the Aux-Net, which is of the same kind.
            layers_per_row: how many consecutive Aux layers share a coefficient row; 1 is no sharing. Default: 2, as
                published, of plain ViTs, and 1 of other kinds.
            group_size: how many learngene layers each Aux layer is a mixture of: 2 in LeTs, taken in pairs. All of
                them, with ``layers_per_row`` 1, is the depth expansion of LiGO (Wang et al., ICLR 2023).
            full_width: LiGO's width matrices, which transform the old neurons too and start by keeping them.
            init_scheme: initialisation of depth coefficients and of width matrices. Default: ``stackbert_noisy`` and
                ``rand``, as published, of plain ViTs; ``copy`` and ``rand`` of other kinds, so that the Des-Net of the
                learngene's own sizes is the learngene.
            init_noise: upper end of the uniform noise of the ``…_noisy`` schemes, for depth and for width.
            kwargs: passed on to timm's class.

        Raises:
            InputError: the sizes do not fit each other.
        """
        super().__init__(tgt, {}, **kwargs)
        tgt = self.arch
        sizes = {"img_size"} | (kwargs.keys() & {"patch_size"})
        src = replace(src, **{size: getattr(tgt, size) for size in sizes})  # its position embedding is not used
        plain = src.kind is None
        layers_per_row = (2 if plain else 1) if layers_per_row is None else layers_per_row
        check_sizes(src, tgt, layers_per_row, group_size)
        self.src, self.layers_per_row, self.group_size, self.full_width = src, layers_per_row, group_size, full_width
        self.structure = described(src, self.num_classes, self.in_chans).structure
        groups = groups_of(self.config)
        rows = rows_of_coefficients(groups, src.depth, group_size, layers_per_row)
        schemes = init_scheme or ("stackbert_noisy" if plain else "copy", "rand")
        self.add_parameters(self._initial(rows, schemes, init_noise))
        plan = depth_plan([(groups[i], i // layers_per_row) for i in range(tgt.depth)], len(rows), max(groups) + 1)
        self.register_buffer("_select", plan.select, persistent=False)
        self._plan_layers = plan.layers
        self._des_plans: dict[int, DepthPlan] = {}  # by depth
        self.factored = self._factor(self.vit)

    def _initial(self, rows: Sequence[Row], schemes: Sequence[str], noise: Sequence[float]) -> dict[str, Tensor]:
        """The parameters at the start: the learngene as timm initialises it, and random matrices."""
        src, tgt, n = self.src, self.arch, self.src.depth
        modules, names = self.structure.modules, self.structure.names
        depth_scheme, width_scheme = schemes
        depth_noise, width_noise = noise

        def width_matrix(axis: str, *layers: int) -> Tensor:
            new, old = tgt.neurons(axis) - src.neurons(axis), src.neurons(axis)
            A = init_width((*layers, new, old), width_scheme, width_noise)
            return widen_out(A, torch.eye(old, device=A.device).expand(*layers, -1, -1)) if self.full_width else A

        positions = {}
        if "pos_embed" in self.structure.stored:
            shape = described(tgt, self.num_classes, self.in_chans).shapes["pos_embed"]
            positions["pos_embed"] = nn.init.trunc_normal_(torch.empty(shape), std=0.02)
        size = dict(in_chans=self.in_chans, num_classes=self.num_classes)
        coefficients = "gh" if any(name.startswith("blocks.") and name.endswith(".bias") for name in names) else "g"
        return {
            **positions,
            **stack_layers(random_vit_weights(src, **size), self.structure),
            **{axis: width_matrix(axis) for axis in "EC" if axis == "E" or self.num_classes},
            **{axis: width_matrix(axis, n) for axis in "QKVM"},
            **{matrix_of(axis): width_matrix(axis) for axis in ("qkvm" if src.pool_hidden else "")},
            **{a: init_depth(len(modules), rows, depth_scheme, depth_noise, self.group_size) for a in coefficients},
        }

    def _factor(self, vit: nn.Module) -> list[str]:
        """Give ``vit`` linear layers that apply E to the activations, and return their names in a block."""
        factored = []
        for name, module in vit.blocks[0].named_modules():
            # EVA's attention takes the weight of its qkv and leaves the layer out
            if type(module) is nn.Linear and not (name == "attn.qkv" and hasattr(vit.blocks[0].attn, "q_bias")):
                factored.append(name)
        for name in factored:
            axes = axes_of(self.structure.stored[f"blocks.*.{name}.weight"][0])
            kind = FactoredInLinear if axes.endswith("E") else FactoredOutLinear
            for block in vit.blocks:
                block.set_submodule(name, kind(block.get_submodule(name), self.full_width))
        return factored

    @property
    def config(self) -> dict:
        expansion = {name: getattr(self, name) for name in EXPANSION}
        return {**super().config, "src_arch": self.src.as_dict(), **expansion}

    def expand(self, factored: Sequence[str] = ()) -> dict[str, Tensor]:
        plan = DepthPlan(self._select, self._plan_layers)
        return expand(dict(self.named_parameters()), Expansion(plan, self.structure, self.full_width, factored))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes). In training E is applied to the activations, which takes fewer multiplications."""
        if not self.training:  # the very weights of a Des-Net of these sizes
            return super().forward(images)
        return functional_call(self.vit, self.expand(self.factored), (images,))

    def des_vit(self, arch: ViTArch) -> nn.Module:
        vit = super().des_vit(arch)
        self._factor(vit)
        return vit

    def des_weights(self, arch: ViTArch) -> dict[str, Tensor]:
        plan = self._des_plans.get(arch.depth)
        if plan is None or plan.select.device != self.g.device:  # made once, as it is copied to the device
            plan = self._des_plans[arch.depth] = des_plan(self.config, arch, self.g.shape[1], device=self.g.device)
        cut = select_width(dict(self.named_parameters()), self.structure, self.src, arch, self.full_width)
        return expand(cut, Expansion(plan, self.structure, self.full_width, self.factored))

    @classmethod
    def is_meant_by(cls, config: object) -> bool:
        return bool(config.tgt_arch)

    @classmethod
    def check_config(cls, config: object) -> None:
        if config.finetune:
            raise InputError(f"--finetune belongs to another run: {cls.usage} train a learngene")
        if config.freeze_src and not config.src_path:
            raise InputError("--src-path is missing: --freeze-src trains what expands a trained ViT")
        for scheme, known in zip(config.trans_init_scheme or (), (DEPTH_SCHEMES, WIDTH_SCHEMES), strict=False):
            if scheme not in known:
                raise InputError(f"--trans-init-scheme {scheme} is unknown: expected one of {', '.join(known)}")

    @classmethod
    def archs_from_config(cls, config: object) -> tuple[ViTArch, ViTArch]:
        src = parse_arch(config.src_arch)
        return src, parse_arch(config.tgt_arch, src)

    @classmethod
    def from_config(cls, config: object, **vit: object) -> "LeTs":
        expansion = {name: getattr(config, name) for name in EXPANSION}
        init = {"init_scheme": config.trans_init_scheme, "init_noise": config.trans_init_noise}
        return cls(*cls.archs_from_config(config), **expansion, **init, **vit)

    @classmethod
    def check_names(cls, names: Sequence[str]) -> None:
        if len(names) != 2 or any(is_aux_name(name) for name in names):
            raise InputError("architectures of lets are two deit_… names: the learngene, the Aux-Net")

    @classmethod
    def complete_header(cls, header: dict) -> dict:
        return {"group_size": 2, "full_width": False, **header}

    @classmethod
    def from_header(cls, header: Mapping, **vit: object) -> "LeTs":
        archs, expansion = cls.archs(header), {name: header[name] for name in EXPANSION}
        return cls(archs["learngene"], archs["Aux-Net"], **expansion, **vit)

    @classmethod
    def archs(cls, header: Mapping) -> dict[str, ViTArch]:
        return {"learngene": ViTArch(**header["src_arch"]), **super().archs(header)}

    @classmethod
    def descend(
        cls,
        tensors: dict[str, Tensor],
        header: Mapping,
        arch: ViTArch,
        mapping_layer: Sequence[int] | None = None,
        mapping_layer_coeff: Sequence[int] | None = None,
        width_select: str = "continuous",
        depth_select: str = "default",
    ) -> dict[str, Tensor]:
        """The state dict of a Des-Net of ``arch`` sizes.

        Args:
            mapping_layer: for each Des-Net layer, the Aux layer whose pair of learngene layers it is made from.
            mapping_layer_coeff: for each Des-Net layer, the Aux layer whose coefficient row it takes.
            width_select: which rows of the width matrices a Des-Net narrower than the Aux-Net keeps.
            depth_select: without mapping lists, how they are made, as in `select_depth`.
        """
        g, src, full_width = tensors["g"], ViTArch(**header["src_arch"]), header["full_width"]
        mapping = mapping_layer, mapping_layer_coeff, depth_select
        plan = des_plan(header, arch, g.shape[1], *mapping, device=g.device)
        structure = described(src, header["num_classes"], header["in_chans"]).structure
        cut = select_width(tensors, structure, src, arch, full_width, width_select)
        return expand(cut, Expansion(plan, structure, full_width))

    @classmethod
    def remarks(cls, tensors: Mapping[str, Tensor], header: Mapping) -> list[str]:
        shared = header["layers_per_row"]
        rows = -(-header["tgt_arch"]["depth"] // shared)
        return [f"Aux layers per row of depth coefficients: {shared} ({rows} rows)"]

    @classmethod
    def facts(cls, header: Mapping, arch: ViTArch, **choices: object) -> dict[str, object]:
        lists = {name: choices.get(name) for name in ("mapping_layer", "mapping_layer_coeff")}
        both = mapping_or_default(header, arch.depth, *lists.values(), choices.get("depth_select", "default"))
        return dict(zip(lists, both, strict=True))

    @classmethod
    def figures(cls, tensors: Mapping[str, Tensor], header: Mapping) -> Figures:
        """The depth coefficients, and the norms of the rows of the width matrices: each row makes one new neuron."""
        depth, shared, size = header["tgt_arch"]["depth"], header["layers_per_row"], header["group_size"]
        modules = described(ViTArch(**header["tgt_arch"])).structure.modules
        rows = [range(first, min(first + shared, depth)) for first in range(0, depth, shared)]
        kinds = {"depth coefficients g, of weights": "g", "depth coefficients h, of biases": "h"}
        kinds = {title: name for title, name in kinds.items() if name in tensors}
        layers = "first and second learngene layer of the pair" if size == 2 else "the learngene layers of the group"
        coefficients = HeatMaps(
            {title: tensors[name].flatten(1) for title, name in kinds.items()},
            rows=[tensor_name(module) for module in modules],
            columns=[f"{row[0]}–{row[-1]}" if len(row) > 1 else f"{row[0]}" for row in rows],
            xlabel=f"Aux layers that share a row; its {size} columns: {layers}",
            ylabel="module",
            value="coefficient",
        )
        if not tensors["E"].numel():  # the Aux-Net is as wide as its learngene
            return [coefficients]
        panels = {"E and C, whole network": {name: sorted_norms(tensors[name]) for name in "EC" if name in tensors}}
        panels |= {f"{name}, per layer": dict(enumerate(sorted_norms(tensors[name]))) for name in "QKVM"}
        return [coefficients, Curves(panels, "row, by falling norm", "l2 norm of a row", scale="learngene layer")]

    def coefficients(self) -> dict[str, float]:
        """The depth coefficients of the weights, g."""
        return {
            f"g/{module}/row {r}, layer {c} of its group": value
            for module, rows in zip(map(tensor_name, self.structure.modules), self.g.tolist(), strict=True)
            for r, row in enumerate(rows)
            for c, value in enumerate(row)
        }

    @torch.no_grad()
    def start_from(self, vit: dict[str, Tensor]) -> None:
        """Take the learngene, and the first position embedding, from a trained ViT of ``src`` sizes.

        Args:
            vit: its state dict.
        """
        start = stack_layers(vit, self.structure)
        if "pos_embed" in vit:
            start["pos_embed"] = widen(vit["pos_embed"], "..E", {"E": self.E}, self.full_width)
        for name, tensor in start.items():
            self.get_parameter(name).copy_(tensor)

    def freeze_learngene(self) -> None:
        """Train the width matrices, depth coefficients and position embedding alone, as LiGO does."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in MATRICES)

    def no_weight_decay(self) -> set[str]:
        vectors = self.structure.vectors
        return {name for name, _ in self.named_parameters() if name in vectors} | {"g", "h", "pos_embed"}


def check_sizes(src: ViTArch, tgt: ViTArch, layers_per_row: int, group_size: int = 2) -> None:
    """Raises InputError where no Aux-Net of ``tgt`` sizes can be expanded from a learngene of ``src`` sizes."""
    if not 1 <= group_size <= src.depth:
        raise InputError(f"groups of {group_size} learngene layers cannot be made: expected 1 to {src.depth}")
    if tgt.depth < -(-src.depth // group_size):
        groups = "pairs" if group_size == 2 else "groups"
        raise InputError(f"the Aux-Net has {tgt.depth} layers, fewer than the {groups} of the {src.depth} to mix")
    check_kind(tgt, src)
    if tgt.width < src.width:
        raise InputError(f"the Aux-Net (width {tgt.width}) is narrower than the learngene (width {src.width})")
    if tgt.hidden < src.hidden:
        raise InputError(
            f"the Aux-Net has {tgt.hidden} hidden neurons in a layer, fewer than the learngene, which has {src.hidden}"
        )
    if tgt.head_dim != src.head_dim:
        raise InputError(
            f"the heads of learngene and Aux-Net differ in size, {src.head_dim} and {tgt.head_dim} neurons"
        )
    if tgt.patch_size != src.patch_size:
        raise InputError(f"the patches of learngene and Aux-Net differ, {src.patch_size} and {tgt.patch_size} pixels")
    if layers_per_row < 1:
        raise InputError(f"{layers_per_row} layers cannot share a coefficient row: at least 1")
