"""Which axis of which parameter of a ViT counts what, and how an axis is widened.

    letter     the axis counts                            widened by           shared by
    E          embedding neurons                          ⟨E⟩                  the whole network
    Q, K, V    neurons of the heads                       ⟨Q_j⟩, ⟨K_j⟩, ⟨V_j⟩  layer j
    M          hidden neurons of the MLP                  ⟨M_j⟩                layer j
    q, k, v, m the same four of a pooling block           matrices of its own  that block
    C          embedding neurons, as the head reads them  ⟨C⟩                  the head
    .          classes, tokens, channels, pixels, or the neurons of one head: never widened

⟨A⟩ = [I; A] is the identity stacked on A: it keeps the old neurons of an axis and adds a new one for each row of A. So
``mlp.fc1.weight``, whose axes are M and E, becomes ⟨M_j⟩ w ⟨E⟩ᵀ, and its bias ⟨M_j⟩ b.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from common.errors import InputError

import torch
from torch import Tensor

# The axes of a weight, scale, gamma or token. A bias has the first axis of its weight. Names are those of timm, but for
# tensors that it stores as one (`STORED_AS_ONE`) or under two names (`RENAMED`). The modules of a layer are in the
# order of the depth coefficients in learngene files.
AXES = {
    "pos_embed": "..E",
    "cls_token": "..E",
    "reg_token": "..E",
    "dist_token": "..E",
    "patch_embed.proj": "E...",
    "patch_embed.norm": "E",
    "norm_pre": "E",
    "blocks.*.norm1": "E",
    "blocks.*.attn.q": "QE",
    "blocks.*.attn.k": "KE",
    "blocks.*.attn.v": "VE",
    "blocks.*.attn.q_norm": ".",
    "blocks.*.attn.k_norm": ".",
    "blocks.*.attn.norm": "V",
    "blocks.*.attn.proj": "EV",
    "blocks.*.ls1": "E",
    "blocks.*.norm2": "E",
    "blocks.*.mlp.fc1": "ME",
    "blocks.*.mlp.fc1_g": "ME",  # the gate of a SwiGLU
    "blocks.*.mlp.fc1_x": "ME",  # its value
    "blocks.*.mlp.norm": "M",
    "blocks.*.mlp.fc2": "EM",
    "blocks.*.ls2": "E",
    "norm": "E",
    "attn_pool.latent": "..E",
    "attn_pool.q": "qE",
    "attn_pool.k": "kE",
    "attn_pool.v": "vE",
    "attn_pool.proj": "Ev",
    "attn_pool.norm": "E",
    "attn_pool.mlp.fc1": "mE",
    "attn_pool.mlp.fc2": "Em",
    "fc_norm": "E",
    "head": ".C",
    "head_dist": ".C",
}
ORDER = {module: number for number, module in enumerate(AXES)}

STORED_AS_ONE = {
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
    "attn_pool.kv": ("attn_pool.k", "attn_pool.v"),
    "mlp.fc1": ("mlp.fc1_g", "mlp.fc1_x"),  # of a packed SwiGLU alone
}
RENAMED = {
    "attn.q_proj": "attn.q",
    "attn.k_proj": "attn.k",
    "attn.v_proj": "attn.v",
    "attn.q_bias": "attn.q.bias",
    "attn.v_bias": "attn.v.bias",
    "gamma_1": "ls1.gamma",
    "gamma_2": "ls2.gamma",
}
_LAYER = re.compile(r"^blocks\.\d+\.")
_KINDS = ("weight", "bias", "gamma")


@dataclass(frozen=True, eq=False)
class Structure:
    """How the parameters of a ViT are made of those of `AXES`; the number of a layer is ``*``.

    Attributes:
        stored: timm's name → the parameters that are stored in it, in order.
    """

    stored: Mapping[str, tuple[str, ...]]

    @cached_property
    def names(self) -> list[str]:
        """The parameters, in the order of the table."""
        names = [name for names in self.stored.values() for name in names]
        return sorted(names, key=lambda name: ORDER[module_of(name)])

    @cached_property
    def modules(self) -> list[str]:
        """The modules of a layer that have parameters, in the order of the table."""
        return [*dict.fromkeys(module_of(name) for name in self.names if name.startswith("blocks."))]

    @cached_property
    def vectors(self) -> set[str]:
        """Tensors of a learngene that are vectors before they are stacked: the published recipe does not decay them."""
        return {tensor_name(name) for name in self.names if is_vector(name)}

    @cached_property
    def owner(self) -> dict[str, str]:
        """The first of the parameters that are stored as one → timm's name."""
        return {names[0]: name for name, names in self.stored.items()}


def any_layer(name: str) -> str:
    """``blocks.3.attn.q.weight`` as ``blocks.*.attn.q.weight``; other names as they are."""
    return _LAYER.sub("blocks.*.", name)


def module_of(name: str) -> str:
    """The module of a parameter, a key of `AXES`: ``blocks.*.attn.q`` of ``blocks.3.attn.q.weight``."""
    module, _, kind = any_layer(name).rpartition(".")
    return module if kind in _KINDS else any_layer(name)


def axes_of(name: str) -> str:
    """The axes of a parameter under its name here, a letter for each.

    Raises:
        InputError: the table does not know the parameter, so a ViT that has it cannot be changed in size.
    """
    axes = AXES.get(module_of(name))
    if axes is None:
        raise InputError(f"there is no rule for its parameter {name} (models/axes.py)")
    return axes[0] if name.endswith(".bias") else axes


def is_vector(name: str) -> bool:
    """Whether a parameter is a vector, or a token, rather than a matrix of products."""
    return len(axes_of(name)) == 1 or axes_of(name) == "..E"


# ---------------------------------------------------------------------------------------------------------------------
# Parameters that timm stores as one
# ---------------------------------------------------------------------------------------------------------------------


def structure_of(shapes: Mapping[str, tuple[int, ...]]) -> Structure:
    """How the parameters of a ViT are made of those of `AXES`, from the names and shapes in its state dict.

    Raises:
        InputError: it has a parameter that the table does not know.
    """
    shapes = {any_layer(name): shape for name, shape in shapes.items()}
    stored = {}
    for name, shape in shapes.items():
        stem = "blocks.*." * name.startswith("blocks.*.")
        module, _, kind = name.removeprefix(stem).rpartition(".")
        parts = STORED_AS_ONE.get(module, ())
        if module == "mlp.fc1" and shape[0] != 2 * shapes[f"{stem}mlp.fc2.weight"][1]:
            parts = ()  # no gate
        if parts:
            stored[name] = tuple(f"{stem}{part}.{kind}" for part in parts)
        elif module in RENAMED:
            stored[name] = (f"{stem}{RENAMED[module]}.{kind}",)
        else:
            stored[name] = (stem + RENAMED.get(name.removeprefix(stem), name.removeprefix(stem)),)
        for part in stored[name]:
            axes_of(part)
    return Structure(stored)


def split(vit: Mapping[str, Tensor], structure: Structure | None = None) -> dict[str, Tensor]:
    """The parameters of `AXES` in the state dict of a ViT: q, k and v apart, gate and value of a SwiGLU apart.

    Args:
        structure: of the ViT, if it is at hand.

    Raises:
        InputError: it has a parameter that the table does not know.
    """
    if structure is None:
        structure = structure_of({name: tuple(tensor.shape) for name, tensor in vit.items()})
    parts = {}
    for name, tensor in vit.items():
        names, prefix = structure.stored[any_layer(name)], layer_prefix(name)
        for part, piece in zip(names, tensor.chunk(len(names)) if len(names) > 1 else (tensor,), strict=True):
            parts[name_in(prefix, part)] = piece
    return parts


def fuse(parts: Mapping[str, Tensor], structure: Structure) -> dict[str, Tensor]:
    """The state dict of a ViT from parameters of `AXES`: the inverse of `split`.

    Args:
        parts: of single layers, ``blocks.3.…``; or of all layers, ``blocks.*.…``, stacked along a leading axis.
        structure: of the ViT.
    """
    vit = {}
    for first in parts:
        name = structure.owner.get(any_layer(first))
        if name is None:  # stored after another
            continue
        stem = layer_prefix(first)
        pieces = [parts[name_in(stem, part)] for part in structure.stored[name]]
        axis = int(stem == "blocks.*.")
        vit[name_in(stem, name)] = torch.cat(pieces, dim=axis) if len(pieces) > 1 else pieces[0]
    return vit


def layer_prefix(name: str) -> str:
    """``blocks.3.`` of ``blocks.3.attn.q.weight``; nothing of a parameter outside the layers."""
    return name[: name.index(".", len("blocks.")) + 1] if name.startswith("blocks.") else ""


def name_in(prefix: str, name: str) -> str:
    """``blocks.*.attn.q.weight`` in the layer ``prefix``."""
    return prefix + name.removeprefix("blocks.*.") if prefix else name


def tensor_name(name: str) -> str:
    """The name in a learngene, where the layers are stacked: ``q_weight`` of ``blocks.*.attn.q.weight``."""
    name = name.removeprefix("blocks.*.").replace("patch_embed.proj", "patch_embed")
    return re.sub(r"^(attn|mlp)\.(?!norm)", "", name).replace(".", "_")


def stack_layers(vit: dict[str, Tensor], structure: Structure) -> dict[str, Tensor]:
    """The learngene's tensors from a ViT state dict: layers stacked, qkv taken apart, without position embedding.

    Their order is that of the parameters, by which checkpoints number the state of the optimiser: weights, biases, the
    rest; in each the layers first, q, k and v at their end.
    """

    def order(name: str) -> tuple:
        kind = name.rpartition(".")[2]
        last = module_of(name).endswith(("attn.q", "attn.k", "attn.v"))
        return ("weight", "bias", kind).index(kind), not name.startswith("blocks."), last

    parts = split(vit, structure)
    depth = len({layer_prefix(name) for name in parts if name.startswith("blocks.")})
    stacked = {}
    for name in sorted((name for name in structure.names if name != "pos_embed"), key=order):
        if name.startswith("blocks."):
            stacked[tensor_name(name)] = torch.stack([parts[name_in(f"blocks.{j}.", name)] for j in range(depth)])
        else:
            stacked[tensor_name(name)] = parts[name].clone()
    return stacked


# ---------------------------------------------------------------------------------------------------------------------
# Widening
# ---------------------------------------------------------------------------------------------------------------------


def widen_out(A: Tensor, w: Tensor) -> Tensor:
    """⟨A⟩ w: the output axis of ``w`` (…, out, in) grows by the rows of A."""
    return torch.cat([w, A @ w], dim=-2)


def widen_in(w: Tensor, A: Tensor) -> Tensor:
    """w ⟨A⟩ᵀ: the input axis of ``w`` (…, out, in) grows by the rows of A; a vector counts as a row."""
    return torch.cat([w, w @ A.mT], dim=-1)


def widen(w: Tensor, axes: str, matrices: Mapping[str, Tensor], full_width: bool = False) -> Tensor:
    """Widen the axes of a parameter for which there is a matrix.

    Args:
        w: the parameter, or those of all layers, stacked along a leading axis.
        axes: of the parameter, as in `AXES`.
        matrices: axis → A (new, old), or those of all layers (n, new, old).
        full_width: ⟨A⟩ is A itself, as the full width matrices of LiGO are.
    """
    for number, axis in enumerate(axes):
        A = matrices.get(axis)
        if A is None:
            continue
        if number == len(axes) - 1:
            rows = w.unsqueeze(-2) if w.ndim < A.ndim else w  # vectors (n, old) of layers with a matrix each
            wide = rows @ A.mT if full_width else widen_in(rows, A)
            w = wide.reshape(*w.shape[:-1], -1)  # vectors again
        else:
            first = number - len(axes) + 1  # axis after this one, from the end; the rest of a kernel counts as one axis
            matrix = w.flatten(first)
            wide = A @ matrix if full_width else widen_out(A, matrix)
            w = wide.unflatten(-1, w.shape[first:])
    return w


# ---------------------------------------------------------------------------------------------------------------------
# Narrowing
# ---------------------------------------------------------------------------------------------------------------------


def take(tensor: Tensor, axis: int, kept: Tensor | slice) -> Tensor:
    """The elements ``kept`` of one axis; a view if they are a slice."""
    return tensor[(slice(None),) * axis + (kept,)]
