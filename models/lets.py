"""LeTs: learnable matrices expand a narrow, shallow learngene in width and in depth.

"Initializing Variable-sized Vision Transformers from Learngene with Learnable Transformation", NeurIPS 2024.

Notation. The learngene has n layers of width s, the Aux-Net N layers of width D. ⟨A⟩ = [I; A] keeps the old neurons
and adds one per row of A. E is shared by every use of the embedding axis, Q_j, K_j, V_j and M_j belong to learngene
layer j, C to the head. The learngene layers of pair p are 2p and 2p + 1. Tensors of one kind are stacked along a
leading axis over the layers, so that a step expands all of them in a handful of products.

    tensor                          shape               meaning
    E, C                            (D−s, s)            width matrices of the whole network
    Q, K, V                         (n, D−s, s)         width matrices of each layer's heads
    M                               (n, 4(D−s), 4s)     width matrices of each layer's hidden neurons
    g, h                            (8, rows, 2)        depth coefficients of weights and biases, per module; instead
                                                        of pairs, groups of any number of layers can be mixed
    q_weight, …, fc2_bias           (n, …)              the learngene's layers
    patch_embed_*, fc_norm_*, head_*                    the rest of the learngene
    pos_embed                       (1, patches, D)     the Aux-Net's own

With ``full_width`` the width matrices are those of LiGO (Wang et al., ICLR 2023): ⟨A⟩ is A itself, with a row for every
neuron of the Aux-Net, D instead of D−s, so that the old neurons are transformed too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import ClassVar

from common.errors import InputError
from models.aux_net import AuxNet, random_vit_weights
from models.axes import FactoredInLinear, FactoredOutLinear, widen_out, widening
from models.depth_mapping import DepthPlan, depth_plan, des_plan, mapping_or_default
from models.figures import Curves, Figures, HeatMaps, sorted_norms
from models.formats import published_lets
from models.formats.layout import PublishedFormat
from models.initialisation import DEPTH_SCHEMES, WIDTH_SCHEMES, init_depth, init_width
from models.registry import register_method
from models.selection import is_full_width, select_width
from models.vit import ViTArch, is_aux_name, parse_arch

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

MODULES = ("norm1", "q", "k", "v", "proj", "norm2", "fc1", "fc2")  # the first axis of g and h
EXPANSION = ("layers_per_row", "group_size", "full_width")  # what a learngene file states besides the sizes
# linear layers whose input axis, or whose output axis, is the embedding
FROM_EMBEDDING, TO_EMBEDDING = ("attn.qkv", "mlp.fc1"), ("attn.proj", "mlp.fc2")


# ---------------------------------------------------------------------------------------------------------------------
# The expansion: learngene → ViT state dict
# ---------------------------------------------------------------------------------------------------------------------


def depth_matrices(g: Tensor, plan: DepthPlan) -> dict[str, Tensor]:
    """G of each module, (distinct layers, n): the coefficients of a layer in the columns of its group, else 0."""
    G = torch.einsum("mrc,urp->mupc", g, plan.select).flatten(2)
    return dict(zip(MODULES, G, strict=True))


def mix(G: Tensor, w: Tensor) -> Tensor:
    """W_i = Σ_j G[i, j] w_j over the learngene's layers j: (layers, n) and (n, …) → (layers, …)."""
    return (G @ w.flatten(1)).view(G.shape[0], *w.shape[1:])


def expand(p: dict[str, Tensor], plan: DepthPlan, widen_embedding: bool = True) -> dict[str, Tensor]:
    """The state dict of a ViT, of width s + rows of E, from the learngene ``p`` (LeTs, section 3.2).

    Args:
        widen_embedding: or keep linear layers at width s on the axis of the embedding, as in `expand_factors`.
    """
    out, into = widening(is_full_width(p))
    matrices = expand_matrices(p, plan)
    if widen_embedding:
        matrices.update({name: into(matrices[name], p["E"]) for name in keys(FROM_EMBEDDING, "weight")})
        matrices.update({name: out(p["E"], matrices[name]) for name in keys(TO_EMBEDDING, "weight")})
    device = "cpu" if p["E"].is_meta else p["E"].device.type
    with torch.autocast(device, enabled=False):  # norms want float32, and vectors cost nothing
        vectors = expand_vectors(p, plan)
        if widen_embedding:
            vectors.update({name: into(vectors[name], p["E"]) for name in keys(TO_EMBEDDING, "bias")})
    patch = p["patch_embed_weight"]
    stacked = {**matrices, **vectors}
    layers = {name: tensor.unbind() for name, tensor in stacked.items() if name.startswith("blocks.")}
    return {
        "pos_embed": p["pos_embed"],
        "patch_embed.proj.weight": out(p["E"], patch.flatten(1)).view(-1, *patch.shape[1:]),
        "patch_embed.proj.bias": vectors["patch_embed.proj.bias"],
        **{name.replace("*", str(l)): layer[u] for l, u in enumerate(plan.layers) for name, layer in layers.items()},
        "fc_norm.weight": vectors["fc_norm.weight"],
        "fc_norm.bias": vectors["fc_norm.bias"],
        "head.weight": into(p["head_weight"], p["C"]),
        "head.bias": p["head_bias"],
    }


def expand_factors(p: dict[str, Tensor], plan: DepthPlan) -> dict[str, Tensor]:
    """`expand` for a ViT with `FactoredInLinear` and `FactoredOutLinear`: matrices of width s, and E beside them."""
    weights = expand(p, plan, widen_embedding=False)
    for l in range(len(plan.layers)):  # torch 2.6 does not compile |=
        weights.update(dict.fromkeys(keys(FROM_EMBEDDING + TO_EMBEDDING, "E", layer=l), p["E"]))
    return weights


def keys(modules: Sequence[str], kind: str, layer: int | str = "*") -> list[str]:
    """The state dict keys of the ``kind`` of these modules, in one layer or, with ``*``, in the stack of all layers."""
    return [f"blocks.{layer}.{module}.{kind}" for module in modules]


def expand_matrices(p: dict[str, Tensor], plan: DepthPlan) -> dict[str, Tensor]:
    """The weight matrices of all distinct layers, stacked, at width s on the axis of the embedding.

    The matrices of a single layer come before the sum over layers. E is the same in all of them, so it moves out of
    the sum.
    """
    out, into = widening(is_full_width(p))
    Q, K, V, M = (p[name] for name in "QKVM")
    G = depth_matrices(p["g"], plan)
    own = {  # the axis with a matrix of its own in each learngene layer
        "q": out(Q, p["q_weight"]),
        "k": out(K, p["k_weight"]),
        "v": out(V, p["v_weight"]),
        "proj": into(p["proj_weight"], V),
        "fc1": out(M, p["fc1_weight"]),
        "fc2": into(p["fc2_weight"], M),
    }
    W = {name: mix(G[name], weight) for name, weight in own.items()}
    return {
        "blocks.*.attn.qkv.weight": torch.cat([W["q"], W["k"], W["v"]], dim=1),
        "blocks.*.attn.proj.weight": W["proj"],
        "blocks.*.mlp.fc1.weight": W["fc1"],
        "blocks.*.mlp.fc2.weight": W["fc2"],
    }


def expand_vectors(p: dict[str, Tensor], plan: DepthPlan) -> dict[str, Tensor]:
    """The norms and biases: those of all distinct layers, stacked, and those outside the layers.

    The biases that are added to the embedding are at width s, as the matrices beside them.
    """
    _, into = widening(is_full_width(p))
    E = p["E"]
    G, H = depth_matrices(p["g"], plan), depth_matrices(p["h"], plan)
    own = {name: p[f"{name}_bias"] for name in MODULES}
    for name, A in (("q", p["Q"]), ("k", p["K"]), ("v", p["V"]), ("fc1", p["M"])):
        own[name] = into(own[name].unsqueeze(1), A).squeeze(1)
    b = {name: mix(H[name], bias) for name, bias in own.items()}
    return {
        "blocks.*.norm1.weight": into(mix(G["norm1"], p["norm1_weight"]), E),
        "blocks.*.norm1.bias": into(b["norm1"], E),
        "blocks.*.attn.qkv.bias": torch.cat([b["q"], b["k"], b["v"]], dim=1),
        "blocks.*.attn.proj.bias": b["proj"],
        "blocks.*.norm2.weight": into(mix(G["norm2"], p["norm2_weight"]), E),
        "blocks.*.norm2.bias": into(b["norm2"], E),
        "blocks.*.mlp.fc1.bias": b["fc1"],
        "blocks.*.mlp.fc2.bias": b["fc2"],
        "patch_embed.proj.bias": into(p["patch_embed_bias"], E),
        "fc_norm.weight": into(p["fc_norm_weight"], E),
        "fc_norm.bias": into(p["fc_norm_bias"], E),
    }


@register_method("lets")
class LeTs(AuxNet):
    """The LeTs Aux-Net: a ViT of ``tgt`` sizes whose every weight is expanded from a learngene of ``src`` sizes."""

    title = "LeTs"
    choices = ("mapping_layer", "mapping_layer_coeff", "width_select", "depth_select")
    parts: ClassVar = {
        "layers of the learngene": MODULES,
        "patch embedding of the learngene": ("patch_embed",),
        "final norm of the learngene": ("fc_norm",),
        "head of the learngene": ("head",),
        "E, width of the embedding": ("E",),
        "C, width of the head's input": ("C",),
        "Q, width of the queries": ("Q",),
        "K, width of the keys": ("K",),
        "V, width of the values": ("V",),
        "M, width of the hidden layers": ("M",),
        "g, depth coefficients of weights": ("g",),
        "h, depth coefficients of biases": ("h",),
        "position embedding of the Aux-Net": ("pos_embed",),
    }
    published = PublishedFormat(published_lets.KEY, partial(published_lets.layout, MODULES), published_lets.config_of)
    flags = ("full_width",)
    arch_options: ClassVar = {"src_arch": "learngene", "tgt_arch": "Aux-Net"}
    options = (*EXPANSION, "src_path", "freeze_src", "trans_init_scheme", "trans_init_noise")
    usage = "--src-arch and --tgt-arch"

    def __init__(
        self,
        src: ViTArch,
        tgt: ViTArch,
        layers_per_row: int = 2,
        group_size: int = 2,
        full_width: bool = False,
        init_scheme: Sequence[str] = ("stackbert_noisy", "rand"),
        init_noise: Sequence[float] = (0.03, 0.03),
        **kwargs,
    ):
        """
        Args:
            src: sizes of the learngene, an even number of layers.
            tgt: sizes of the Aux-Net.
            layers_per_row: how many consecutive Aux layers share a coefficient row; 1 is no sharing.
            group_size: how many learngene layers each Aux layer is a mixture of: 2 in LeTs, taken in pairs. All of
                them, with ``layers_per_row`` 1, is the depth expansion of LiGO (Wang et al., ICLR 2023).
            full_width: LiGO's width matrices, which transform the old neurons too and start by keeping them.
            init_scheme: initialisation of depth coefficients and of width matrices.
            init_noise: upper end of the uniform noise of the ``…_noisy`` schemes, for depth and for width.
            kwargs: passed on to timm's ``VisionTransformer``.

        Raises:
            InputError: the sizes do not fit each other.
        """
        super().__init__(tgt, {}, **kwargs)
        tgt = self.arch
        src = replace(src, img_size=tgt.img_size)  # the learngene has no position embedding of its own
        check_sizes(src, tgt, layers_per_row, group_size)
        self.src, self.layers_per_row, self.group_size, self.full_width = src, layers_per_row, group_size, full_width
        new, s, n = tgt.width - src.width, src.width, src.depth
        size = dict(in_chans=self.in_chans, num_classes=self.num_classes)
        depth_scheme, width_scheme = init_scheme
        depth_noise, width_noise = init_noise

        def width_matrix(*shape: int) -> Tensor:
            A = init_width(shape, width_scheme, width_noise)
            return widen_out(A, torch.eye(shape[-1], device=A.device).expand(*shape[:-2], -1, -1)) if full_width else A

        rows = range(0, tgt.depth, layers_per_row)
        self.add_parameters(
            {
                "pos_embed": nn.init.trunc_normal_(torch.empty(1, tgt.num_patches, tgt.width), std=0.02),
                **stack_layers(random_vit_weights(src, **size), n),
                **{a: width_matrix(new, s) for a in "EC"},
                **{a: width_matrix(n, new, s) for a in "QKV"},
                "M": width_matrix(n, 4 * new, 4 * s),
                **{a: init_depth(len(MODULES), rows, depth_scheme, depth_noise, group_size) for a in "gh"},
            }
        )
        layers_per_group = tgt.depth // (n // group_size)
        layers = [(i // layers_per_group, i // layers_per_row) for i in range(tgt.depth)]  # group and row of each
        plan = depth_plan(layers, len(rows), n // group_size)
        self.register_buffer("_select", plan.select, persistent=False)
        self._plan_layers = plan.layers
        self._des_plans: dict[int, DepthPlan] = {}  # by depth
        self._factor(self.vit)

    def _factor(self, vit: VisionTransformer) -> VisionTransformer:
        """``vit`` with linear layers that apply E to the activations."""
        for block in vit.blocks:
            for kind, names in ((FactoredInLinear, FROM_EMBEDDING), (FactoredOutLinear, TO_EMBEDDING)):
                for name in names:
                    block.set_submodule(name, kind(block.get_submodule(name), self.full_width))
        return vit

    @property
    def config(self) -> dict:
        expansion = {name: getattr(self, name) for name in EXPANSION}
        return {**super().config, "src_arch": asdict(self.src), **expansion}

    def expand(self) -> dict[str, Tensor]:
        return expand(dict(self.named_parameters()), DepthPlan(self._select, self._plan_layers))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes). In training E is applied to the activations, which takes fewer multiplications."""
        if not self.training:  # the very weights of a Des-Net of these sizes
            return super().forward(images)
        plan = DepthPlan(self._select, self._plan_layers)
        return functional_call(self.vit, expand_factors(dict(self.named_parameters()), plan), (images,))

    def des_vit(self, arch: ViTArch) -> VisionTransformer:
        return self._factor(super().des_vit(arch))

    def des_weights(self, arch: ViTArch) -> dict[str, Tensor]:
        plan = self._des_plans.get(arch.depth)
        if plan is None or plan.select.device != self.g.device:  # made once, as it is copied to the device
            plan = self._des_plans[arch.depth] = des_plan(self.config, arch, self.g.shape[1], device=self.g.device)
        return expand_factors(select_width(dict(self.named_parameters()), arch.width, self.src.head_dim), plan)

    @classmethod
    def is_meant_by(cls, config: object) -> bool:
        return bool(config.src_arch or config.tgt_arch)

    @classmethod
    def check_config(cls, config: object) -> None:
        if config.finetune:
            raise InputError(f"--finetune belongs to another run: {cls.usage} train a learngene")
        if config.freeze_src and not config.src_path:
            raise InputError("--src-path is missing: --freeze-src trains what expands a trained ViT")
        for scheme, known in zip(config.trans_init_scheme, (DEPTH_SCHEMES, WIDTH_SCHEMES), strict=True):
            if scheme not in known:
                raise InputError(f"--trans-init-scheme {scheme} is unknown: expected one of {', '.join(known)}")

    @classmethod
    def archs_from_config(cls, config: object) -> tuple[ViTArch, ViTArch]:
        return parse_arch(config.src_arch), parse_arch(config.tgt_arch)

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
        g, head_dim = tensors["g"], cls.archs(header)["learngene"].head_dim
        mapping = mapping_layer, mapping_layer_coeff, depth_select
        plan = des_plan(header, arch, g.shape[1], *mapping, device=g.device)
        return expand(select_width(tensors, arch.width, head_dim, width_select), plan)

    @classmethod
    def remarks(cls, header: Mapping) -> list[str]:
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
        rows = [range(first, min(first + shared, depth)) for first in range(0, depth, shared)]
        kinds = {"depth coefficients g, of weights": "g", "depth coefficients h, of biases": "h"}
        layers = "first and second learngene layer of the pair" if size == 2 else "the learngene layers of the group"
        coefficients = HeatMaps(
            {title: tensors[name].flatten(1) for title, name in kinds.items()},
            rows=MODULES,
            columns=[f"{row[0]}–{row[-1]}" if len(row) > 1 else f"{row[0]}" for row in rows],
            xlabel=f"Aux layers that share a row; its {size} columns: {layers}",
            ylabel="module",
            value="coefficient",
        )
        if not tensors["E"].numel():  # the Aux-Net is as wide as its learngene
            return [coefficients]
        panels = {"E and C, whole network": {name: sorted_norms(tensors[name]) for name in "EC"}}
        panels |= {f"{name}, per layer": dict(enumerate(sorted_norms(tensors[name]))) for name in "QKVM"}
        return [coefficients, Curves(panels, "row, by falling norm", "l2 norm of a row", scale="learngene layer")]

    def coefficients(self) -> dict[str, float]:
        """The depth coefficients of the weights, g."""
        return {
            f"g/{module}/row {r}, layer {c} of its group": value
            for module, rows in zip(MODULES, self.g.tolist(), strict=True)
            for r, row in enumerate(rows)
            for c, value in enumerate(row)
        }

    @torch.no_grad()
    def start_from(self, vit: dict[str, Tensor]) -> None:
        """Take the learngene, and the first position embedding, from a trained ViT of ``src`` sizes.

        Args:
            vit: its state dict.
        """
        _, into = widening(self.full_width)
        start = {**stack_layers(vit, self.src.depth), "pos_embed": into(vit["pos_embed"], self.E)}
        for name, tensor in start.items():
            self.get_parameter(name).copy_(tensor)

    def freeze_learngene(self) -> None:
        """Train the width matrices, depth coefficients and position embedding alone, as LiGO does."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.endswith(("_weight", "_bias")))

    def no_weight_decay(self) -> set[str]:
        # vectors before they were stacked: the published recipe leaves them out
        names = {name for name, _ in self.named_parameters()}
        return {name for name in names if name.endswith("_bias") or "norm" in name} | {"g", "h", "pos_embed"}


def check_sizes(src: ViTArch, tgt: ViTArch, layers_per_row: int, group_size: int = 2) -> None:
    """Raises InputError where no Aux-Net of ``tgt`` sizes can be expanded from a learngene of ``src`` sizes."""
    if not 1 <= group_size <= src.depth:
        raise InputError(f"groups of {group_size} learngene layers cannot be made: expected 1 to {src.depth}")
    if src.depth % group_size:
        taken = "in pairs and needs an even number" if group_size == 2 else f"in groups of {group_size}"
        raise InputError(f"the learngene has {src.depth} layers; LeTs takes them {taken}")
    if tgt.depth % (src.depth // group_size):
        groups = f"{src.depth // group_size} {'pairs' if group_size == 2 else 'groups'}"
        raise InputError(f"the Aux-Net has {tgt.depth} layers, which the {groups} of learngene layers do not divide")
    if tgt.width < src.width:
        raise InputError(f"the Aux-Net (width {tgt.width}) is narrower than the learngene (width {src.width})")
    if tgt.head_dim != src.head_dim:
        raise InputError(
            f"the heads of learngene and Aux-Net differ in size, {src.head_dim} and {tgt.head_dim} neurons"
        )
    if tgt.patch_size != src.patch_size:
        raise InputError(f"the patches of learngene and Aux-Net differ, {src.patch_size} and {tgt.patch_size} pixels")
    if layers_per_row < 1:
        raise InputError(f"{layers_per_row} layers cannot share a coefficient row: at least 1")


def stack_layers(vit: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The learngene's tensors from a ViT state dict: layers stacked, qkv taken apart, without position embedding."""
    layer = {"norm1": "norm1", "proj": "attn.proj", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    p = {}
    for kind in ("weight", "bias"):
        for name, key in layer.items():
            p[f"{name}_{kind}"] = torch.stack([vit[f"blocks.{j}.{key}.{kind}"] for j in range(depth)])
        qkv = torch.stack([vit[f"blocks.{j}.attn.qkv.{kind}"] for j in range(depth)])
        p[f"q_{kind}"], p[f"k_{kind}"], p[f"v_{kind}"] = (t.clone() for t in qkv.chunk(3, dim=1))
        p[f"patch_embed_{kind}"] = vit[f"patch_embed.proj.{kind}"]
        p[f"fc_norm_{kind}"] = vit[f"fc_norm.{kind}"]
        p[f"head_{kind}"] = vit[f"head.{kind}"]
    return p
