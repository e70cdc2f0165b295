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

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

from common.errors import InputError
from models.aux_net import AuxNet, random_vit_weights
from models.axes import widen_in, widen_out
from models.depth_mapping import layers_of
from models.factored import FactoredInLinear, FactoredOutLinear
from models.selection import choose_rows, rows_of_heads
from models.vit import ViTArch

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

MODULES = ("norm1", "q", "k", "v", "proj", "norm2", "fc1", "fc2")  # the first axis of g and h
DEPTH_SCHEMES = ("stackbert_noisy", "stackbert", "alternate_noisy", "rand", "rand_softmax")
WIDTH_SCHEMES = ("rand", "rand_softmax", "sel", "sel_noisy")
EXPANSION = ("layers_per_row", "group_size", "full_width")  # what a learngene file states besides the sizes
# matrices of a layer whose input, or whose output, is the embedding
READERS, WRITERS = ("attn.qkv", "mlp.fc1"), ("attn.proj", "mlp.fc2")


# ---------------------------------------------------------------------------------------------------------------------
# The expansion: learngene → ViT state dict
# ---------------------------------------------------------------------------------------------------------------------


class DepthPlan(NamedTuple):
    """Which group (published: pair) of learngene layers, with which coefficient row, makes each layer of a ViT."""

    select: Tensor  # (distinct layers, rows, n/2), one 1 per distinct layer
    layers: list[int]  # for each layer of the ViT, its index among the distinct ones


def depth_plan(layers: Sequence[tuple[int, int]], num_rows: int, num_groups: int, device="cpu") -> DepthPlan:
    """The plan for a ViT whose layer l is made from group and row ``layers[l]``; equal layers are computed once."""
    distinct = sorted(set(layers))
    select = torch.zeros(len(distinct), num_rows, num_groups, device="cpu")
    for u, (group, row) in enumerate(distinct):
        select[u, row, group] = 1
    return DepthPlan(select.to(device), [distinct.index(layer) for layer in layers])


def widening(p: dict[str, Tensor]) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """`widen_out` and `widen_in`, or what takes their place for LiGO's matrices, where ⟨A⟩ is A itself."""
    if not is_full_width(p):
        return widen_out, widen_in
    return torch.matmul, lambda w, A: w @ A.mT


def is_full_width(p: dict[str, Tensor]) -> bool:
    """Whether the width matrices have a row for every neuron of the Aux-Net, rather than for the new ones alone."""
    return p["E"].shape[0] == p["pos_embed"].shape[-1]


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
        widen_embedding: or leave the linear layers at width s on the axis of the embedding, for `FactoredInLinear` and
            `FactoredOutLinear`.
    """
    out, into = widening(p)
    matrices = expand_matrices(p, plan)
    if widen_embedding:
        matrices.update({name: into(matrices[name], p["E"]) for name in keys(READERS, "weight")})
        matrices.update({name: out(p["E"], matrices[name]) for name in keys(WRITERS, "weight")})
    with torch.autocast(p["E"].device.type, enabled=False):  # norms want float32, and vectors cost nothing
        vectors = expand_vectors(p, plan)
        if widen_embedding:
            vectors.update({name: into(vectors[name], p["E"]) for name in keys(WRITERS, "bias")})
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


def keys(modules: Sequence[str], kind: str, layer: int | str = "*") -> list[str]:
    """What the ``kind`` of these modules is called in a state dict, in one layer or in a stack of all of them."""
    return [f"blocks.{layer}.{module}.{kind}" for module in modules]


def expand_matrices(p: dict[str, Tensor], plan: DepthPlan) -> dict[str, Tensor]:
    """The weight matrices of all distinct layers, stacked, at width s on the axis of the embedding.

    The matrices of a single layer come before the sum over layers. E is the same in all of them, so it moves out of
    the sum.
    """
    out, into = widening(p)
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
    _, into = widening(p)
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


class LeTs(AuxNet):
    """The LeTs Aux-Net: a ViT of ``tgt`` sizes whose every weight is expanded from a learngene of ``src`` sizes."""

    method = "lets"

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
                **{a: init_depth(rows, depth_scheme, depth_noise, group_size) for a in "gh"},
            }
        )
        plan = depth_plan(self.layers(), len(rows), n // group_size)
        self.register_buffer("_select", plan.select, persistent=False)
        self._plan_layers = plan.layers
        self._compute_with_factors(self.vit)
        self.descendants: list[ViTArch] = []
        self.per_step, self.alone = 0, False

    def _compute_with_factors(self, vit: VisionTransformer) -> None:
        for block in vit.blocks:
            for kind, names in ((FactoredInLinear, READERS), (FactoredOutLinear, WRITERS)):
                for name in names:
                    block.set_submodule(name, kind(block.get_submodule(name), self.full_width))

    @property
    def config(self) -> dict:
        expansion = {name: getattr(self, name) for name in EXPANSION}
        return {**super().config, "src_arch": asdict(self.src), **expansion}

    def layers(self) -> list[tuple[int, int]]:
        """The group of learngene layers and the coefficient row of each Aux layer."""
        layers_per_group = self.arch.depth // (self.src.depth // self.group_size)
        return [(i // layers_per_group, i // self.layers_per_row) for i in range(self.arch.depth)]

    def expand(self) -> dict[str, Tensor]:
        return expand(dict(self.named_parameters()), DepthPlan(self._select, self._plan_layers))

    def train_descendants(self, archs: Sequence[ViTArch], per_step: int, alone: bool = False) -> None:
        """Train Des-Nets beside the Aux-Net, all of them functions of the same learngene.

        Args:
            archs: the sizes that are drawn from, each step others.
            per_step: how many are drawn, without repetition.
            alone: without the Aux-Net, which costs more than most of them.

        Raises:
            InputError: there are fewer sizes than ``per_step``, or the learngene makes no Des-Nets of one of them.
        """
        if not 1 <= per_step <= len(archs):
            raise InputError(f"{per_step} descendants in a step of {len(archs)} sizes: expected no more than there are")
        self._descendant_layers: dict[int, list[int]] = {}  # by depth
        for arch in archs:
            if arch != self.arch:
                self._compute_with_factors(self.add_vit(arch))
            plan = depth_plan(layers_of(self.config, arch), self.g.shape[1], self.src.depth // self.group_size)
            self.register_buffer(f"_select_{arch.depth}", plan.select.to(self.g.device), persistent=False)
            self._descendant_layers[arch.depth] = plan.layers
        self.descendants = sorted(archs, key=lambda arch: arch.macs(self.num_classes, self.in_chans))
        self.per_step, self.alone = per_step, alone

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes); in training with descendants (1 + per step, batch, classes), its own first.

        Where descendants are trained alone, (per step, batch, classes).
        """
        if not self.training:  # the very weights of a Des-Net of these sizes
            return super().forward(images)
        p = dict(self.named_parameters())
        own = DepthPlan(self._select, self._plan_layers)
        if not self.descendants:
            return self._run(p, self.vit, own, images)
        # drawn by the generator that a step's number seeds, so that a run that was interrupted draws the same
        drawn = random.sample(self.descendants, self.per_step)
        logits = [] if self.alone else [self._run(p, self.vit, own, images)]
        for arch in drawn:
            plan = DepthPlan(self.get_buffer(f"_select_{arch.depth}"), self._descendant_layers[arch.depth])
            narrow = select_width(p, arch.width, self.src.head_dim)
            logits.append(self._run(narrow, self.vits[arch], plan, images))
        return torch.stack(logits)

    def _run(self, p: dict[str, Tensor], vit: VisionTransformer, plan: DepthPlan, images: Tensor) -> Tensor:
        """Logits (batch, classes) of ``vit`` with the weights that expand from ``p``."""
        weights = expand(p, plan, widen_embedding=False)
        for l in range(len(plan.layers)):
            weights.update(dict.fromkeys(keys(READERS + WRITERS, "E", layer=l), p["E"]))  # torch 2.6 compiles no |=
        return functional_call(vit, weights, (images,))

    def coefficients(self) -> dict[str, float]:
        """The depth coefficients of the weights, g, each under a name."""
        values = self.g.tolist()
        return {
            f"g/{module}/row {r}, layer {c} of its group": value
            for module, of_module in zip(MODULES, values, strict=True)
            for r, row in enumerate(of_module)
            for c, value in enumerate(row)
        }

    @torch.no_grad()
    def start_from(self, vit: dict[str, Tensor]) -> None:
        """Take the learngene, and the first position embedding, from a trained ViT of ``src`` sizes.

        Args:
            vit: its state dict.
        """
        _, into = widening(dict(self.named_parameters()))
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


def init_width(shape: tuple[int, ...], scheme: str, noise: float = 0.03) -> Tensor:
    """Width matrices (…, new neurons, old neurons); each row sums to 1.

    ``rand``: uniform in (0, 1), over the row's sum. ``rand_softmax``: the softmax of that noise. ``sel``: each new
    neuron copies a random old one. ``sel_noisy``: the same over noise in (0, ``noise``), over the row's sum.
    """
    if scheme == "rand":
        rows = torch.rand(shape)
    elif scheme == "rand_softmax":
        return torch.rand(shape).softmax(-1)
    elif scheme in ("sel", "sel_noisy"):
        rows = torch.rand(shape) * (noise if scheme == "sel_noisy" else 0)
        rows.scatter_(-1, torch.randint(shape[-1], (*shape[:-1], 1)), 1.0)
    else:
        raise InputError(f"unknown initialisation {scheme!r} of width matrices: expected {', '.join(WIDTH_SCHEMES)}")
    return rows / rows.sum(-1, keepdim=True)


def init_depth(rows: Sequence[int], scheme: str, noise: float = 0.03, group_size: int = 2) -> Tensor:
    """Depth coefficients (8, rows, group_size); each row sums to 1. ``rows`` are numbered by their first Aux layer.

    ``stackbert``: row r takes layer r mod group_size of its group. ``stackbert_noisy``: the same over noise in
    (0, ``noise``), over the sum. ``alternate_noisy``: the same with the rows counted one by one, so that those of two
    layers, whose numbers r are even, do not all take the first of a pair. ``rand``: uniform in (0, 1), over the sum.
    ``rand_softmax``: the softmax of that noise.
    """
    shape = (len(MODULES), len(rows), group_size)
    if scheme == "rand":
        g = torch.rand(shape)
    elif scheme == "rand_softmax":
        return torch.rand(shape).softmax(-1)
    elif scheme in ("stackbert", "stackbert_noisy", "alternate_noisy"):
        g = torch.rand(shape) * (0 if scheme == "stackbert" else noise)
        taken = range(len(rows)) if scheme == "alternate_noisy" else rows
        g[:, range(len(rows)), [r % group_size for r in taken]] = 1.0
    else:
        raise InputError(
            f"unknown initialisation {scheme!r} of depth coefficients: expected {', '.join(DEPTH_SCHEMES)}"
        )
    return g / g.sum(-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: the Des-Net
# ---------------------------------------------------------------------------------------------------------------------


def descend(
    p: dict[str, Tensor],
    config: dict,
    arch: ViTArch,
    mapping_layer: Sequence[int] | None = None,
    mapping_layer_coeff: Sequence[int] | None = None,
    width_select: str = "continuous",
    depth_select: str = "default",
) -> dict[str, Tensor]:
    """The state dict of a Des-Net of ``arch`` sizes.

    Args:
        p: the learngene's tensors.
        config: its sizes, as in `LeTs.config`.
        mapping_layer: for each Des-Net layer, the Aux layer whose pair of learngene layers it is made from.
        mapping_layer_coeff: for each Des-Net layer, the Aux layer whose coefficient row it takes.
        width_select: which rows of the width matrices a Des-Net narrower than the Aux-Net keeps.
        depth_select: without mapping lists, how they are made, as in `select_depth`.

    Raises:
        InputError: wider than the Aux-Net, other heads than the learngene's, or mapping lists that do not fit.
    """
    src = ViTArch(**config["src_arch"])
    mapping = mapping_layer, mapping_layer_coeff, depth_select
    plan = depth_plan(
        layers_of(config, arch, *mapping), p["g"].shape[1], src.depth // config["group_size"], device=p["g"].device
    )
    return expand(select_width(p, arch.width, src.head_dim, width_select), plan)


def select_width(p: dict[str, Tensor], width: int, head_dim: int, how: str = "continuous") -> dict[str, Tensor]:
    """The learngene cut down so that it expands to ``width``.

    Of full width matrices some rows are kept. Else, a width above the learngene's keeps some rows of the width
    matrices, and a width below it the first neurons of the learngene itself. One choice per axis: embedding neurons by
    E's rows for the whole network (C and the position embedding follow), heads by their rows in Q, K and V together
    for the whole network, hidden neurons by M's rows in each layer.

    Args:
        how: as in `choose_rows`.
    """
    s, full = p["E"].shape[1], is_full_width(p)
    if width == p["pos_embed"].shape[-1]:  # every row is kept
        return p
    old, new = (s, width) if full else (min(width, s), max(width - s, 0))
    emb = choose_rows(p["E"], new, how)
    per_head = torch.stack([p["Q"], p["K"], p["V"]]).unflatten(2, (-1, head_dim)).movedim(2, 0)
    heads = choose_rows(per_head.flatten(1), new // head_dim, how)
    head_rows = rows_of_heads(heads, head_dim)
    pos_embed = p["pos_embed"]
    hidden = choose_rows(p["M"], 4 * new, how)
    return {
        **p,
        "pos_embed": pos_embed[..., emb]
        if full
        else torch.cat([pos_embed[..., :old], pos_embed[..., s + emb]], dim=-1),
        "E": p["E"][emb, :old],
        "C": p["C"][emb, :old],
        **{a: p[a][:, head_rows, :old] for a in "QKV"},
        "M": p["M"].gather(1, hidden[..., None].expand(-1, -1, 4 * s))[:, :, : 4 * old],
        **{f"{m}_weight": p[f"{m}_weight"][:, :old, :old] for m in ("q", "k", "v", "proj")},
        **{f"{m}_bias": p[f"{m}_bias"][:, :old] for m in ("q", "k", "v", "proj", "norm1", "norm2", "fc2")},
        **{f"{m}_weight": p[f"{m}_weight"][:, :old] for m in ("norm1", "norm2")},
        "fc1_weight": p["fc1_weight"][:, : 4 * old, :old],
        "fc1_bias": p["fc1_bias"][:, : 4 * old],
        "fc2_weight": p["fc2_weight"][:, :old, : 4 * old],
        **{f"{m}_{kind}": p[f"{m}_{kind}"][:old] for m in ("patch_embed", "fc_norm") for kind in ("weight", "bias")},
        "head_weight": p["head_weight"][:, :old],
    }
