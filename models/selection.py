"""Which layers and neurons a smaller ViT keeps of a larger ViT, or of the width matrices of LeTs.

One choice per axis keeps all weights aligned: embedding neurons for the whole network, heads (rows of q, k and v,
columns of proj) and hidden neurons for each layer. `choose_neurons` and `select_width` choose the same heads in all
layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

from common.errors import InputError
from models.axes import Structure, axes_of, fuse, split, structure_of, take, tensor_name
from models.vit import ViTArch

import torch
from torch import Tensor

FC1 = ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x")  # of an MLP, or of a SwiGLU
WIDTH_SELECTIONS = ("continuous", "l1_top", "l1_bottom", "l2_top", "l2_bottom")


class Neurons(NamedTuple):
    """Indices of the neurons of a ViT that are kept; ``heads`` for the rows of q, k and v and the columns of proj."""

    embedding: Tensor | slice
    heads: Sequence[Tensor | slice]  # for each layer
    hidden: Sequence[Tensor | slice]  # for each layer
    pool_heads: Tensor | slice = slice(None)
    pool_hidden: Tensor | slice = slice(None)

    def along(self, axis: str, layer: int | None) -> Tensor | slice:
        """Those of an axis of `models.axes`."""
        if axis in "EC":
            return self.embedding
        if axis in "QKV":
            return self.heads[layer]
        if axis in "qkv":
            return self.pool_heads
        return self.hidden[layer] if axis == "M" else self.pool_hidden


def choose_rows(matrix: Tensor, count: int, how: str) -> Tensor:
    """Indices of ``count`` rows of ``matrix`` (…, rows, columns), in ascending order: (…, count).

    Args:
        how: ``continuous``, the first rows; or the rows of largest (``top``) or smallest (``bottom``) l1 or l2 norm.
    """
    if how not in WIDTH_SELECTIONS:
        raise InputError(f"unknown width selection {how!r}: expected {', '.join(WIDTH_SELECTIONS)}")
    if how == "continuous":
        return torch.arange(count, device=matrix.device).expand(*matrix.shape[:-2], count)
    norm, end = how.split("_")
    sizes = torch.linalg.vector_norm(matrix, ord=int(norm[1]), dim=-1)
    return sizes.topk(count, largest=end == "top").indices.sort().values


def rows_of_heads(heads: Tensor, head_dim: int) -> Tensor:
    """Indices of all neurons of the given heads: (heads,) → (heads·head_dim,)."""
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()


def first_neurons(arch: ViTArch) -> Neurons:
    """The ``continuous`` choice, as slices: views need no index arithmetic in the backward pass of stage 1."""
    width, pool_hidden = slice(arch.width), slice(arch.pool_hidden)
    return Neurons(width, [width] * arch.depth, [slice(arch.hidden)] * arch.depth, width, pool_hidden)


def choose_neurons(vit: dict[str, Tensor], arch: ViTArch, how: str) -> Neurons:
    """The neurons that a ViT of ``arch`` keeps of a larger one with the state dict ``vit``.

    Embedding neurons by their rows of the patch embedding, heads by their rows of q, k and v in all layers together,
    hidden neurons by their rows of fc1 (of a SwiGLU, of gate and value together).
    """
    parts = split(vit)

    def rows(prefix: str, modules: Sequence[str]) -> Tensor:
        return torch.cat([parts[f"{prefix}{m}.weight"] for m in modules if f"{prefix}{m}.weight" in parts], dim=1)

    def heads_of(matrices: Sequence[Tensor], head_dim: int) -> Tensor:
        """Of rows (width, columns), those of the heads that are kept."""
        per_head = torch.stack(list(matrices)).unflatten(1, (-1, head_dim)).movedim(1, 0).flatten(1)
        return rows_of_heads(choose_rows(per_head, arch.width // head_dim, how), head_dim)

    layers = [f"blocks.{l}." for l in range(arch.depth)]
    neurons = Neurons(
        embedding=choose_rows(vit["patch_embed.proj.weight"].flatten(1), arch.width, how),
        heads=[heads_of([rows(layer, ("attn.q", "attn.k", "attn.v")) for layer in layers], arch.head_dim)] * arch.depth,
        hidden=[choose_rows(rows(layer, FC1), arch.hidden, how) for layer in layers],
    )
    if not arch.pool_hidden:
        return neurons
    pool = [rows("attn_pool.", ("q", "k", "v"))]
    return neurons._replace(
        pool_heads=heads_of(pool, arch.pool_head_dim),
        pool_hidden=choose_rows(rows("attn_pool.", FC1), arch.pool_hidden, how),
    )


def take_layers(vit: dict[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """The state dict of the ViT whose layer l is layer ``layers[l]`` of the given one."""
    rest = {name: tensor for name, tensor in vit.items() if not name.startswith("blocks.")}
    for l, source in enumerate(layers):
        prefix = f"blocks.{source}."
        rest |= {f"blocks.{l}.{n.removeprefix(prefix)}": t for n, t in vit.items() if n.startswith(prefix)}
    return rest


def keep_neurons(vit: dict[str, Tensor], neurons: Neurons) -> dict[str, Tensor]:
    """The state dict of the ViT that keeps only ``neurons`` of the one with the state dict ``vit``."""
    structure = structure_of({name: tuple(tensor.shape) for name, tensor in vit.items()})
    kept = {}
    for name, tensor in split(vit, structure).items():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        for number, axis in enumerate(axes_of(name)):
            if axis != ".":
                tensor = take(tensor, number, neurons.along(axis, layer))
        kept[name] = tensor
    return fuse(kept, structure)


# ---------------------------------------------------------------------------------------------------------------------
# Of the matrices of LeTs
# ---------------------------------------------------------------------------------------------------------------------

POOL = {"q": "pool_Q", "k": "pool_K", "v": "pool_V", "m": "pool_M"}  # axis → its matrix; of other axes their letter


def matrix_of(axis: str) -> str:
    """The width matrix of an axis of `models.axes`, as a learngene names it."""
    return POOL.get(axis, axis)


def old_neurons(src: ViTArch, arch: ViTArch, axis: str) -> int:
    """How many neurons of a learngene of ``src`` sizes a ViT of ``arch`` sizes keeps on an axis."""
    return min(src.neurons(axis), arch.neurons(axis))


def select_width(
    p: dict[str, Tensor], structure: Structure, src: ViTArch, arch: ViTArch, full_width: bool, how: str = "continuous"
) -> dict[str, Tensor]:
    """The learngene cut down so that it expands to the width and the hidden neurons of ``arch``.

    Of full width matrices some rows are kept. Else, an axis longer than the learngene's keeps some rows of its width
    matrices, and one that is not the first neurons of the learngene itself. One choice per axis: embedding neurons by
    E's rows for the whole network (C and the position embedding follow), heads by their rows in Q, K and V together
    for the whole network, hidden neurons by M's rows in each layer; and so in a pooling block.

    Args:
        structure: of the ViT.
        src: the sizes of the learngene.
        how: as in `choose_rows`.
    """

    def old(axis: str) -> int:
        return src.neurons(axis) if full_width else old_neurons(src, arch, axis)

    def new(axis: str) -> int:
        return arch.neurons(axis) if full_width else arch.neurons(axis) - old(axis)

    own = [(axis, p[matrix_of(axis)]) for axis in "EMm" if matrix_of(axis) in p]
    if all((old(axis), new(axis)) == (src.neurons(axis), A.shape[-2]) for axis, A in own):  # every row is kept
        return p
    kept: dict[str, Tensor | slice] = {}
    for axes, head_dim in (("E", 0), ("QKV", src.head_dim), ("M", 0), ("qkv", src.pool_head_dim), ("m", 0)):
        matrices = [p[matrix_of(axis)] for axis in axes if matrix_of(axis) in p]
        if not matrices:
            continue
        if how == "continuous":
            rows = slice(new(axes[0]))
        elif head_dim:
            per_head = torch.stack(matrices).unflatten(-2, (-1, head_dim)).movedim(-3, 0)
            rows = rows_of_heads(choose_rows(per_head.flatten(1), new(axes[0]) // head_dim, how), head_dim)
        else:
            rows = choose_rows(matrices[0], new(axes[0]), how)
        kept |= dict.fromkeys(axes, rows)
    kept["C"] = kept["E"]

    cut = {**p}
    for axis, rows in kept.items():
        if (matrix := p.get(matrix_of(axis))) is not None:
            cut[matrix_of(axis)] = keep_rows(matrix, rows)[..., : old(axis)]
    for name in structure.names:
        if (tensor := tensor_name(name)) not in p or name == "pos_embed":
            continue
        for number, axis in enumerate(axes_of(name)):
            if axis != ".":
                stacked = int(name.startswith("blocks."))
                cut[tensor] = take(cut[tensor], number + stacked, slice(old(axis)))
    if (positions := p.get("pos_embed")) is not None:
        if full_width or how == "continuous":
            first = slice(arch.width) if how == "continuous" else kept["E"]
            cut["pos_embed"] = positions[..., first]
        else:
            cut["pos_embed"] = torch.cat([positions[..., : old("E")], positions[..., src.width + kept["E"]]], dim=-1)
    return cut


def keep_rows(matrix: Tensor, rows: Tensor | slice) -> Tensor:
    """Rows of a matrix (…, rows, columns), the same of all layers or, with indices (layers, count), of each its own."""
    if isinstance(rows, Tensor) and rows.ndim > 1:
        return matrix.gather(1, rows[..., None].expand(-1, -1, matrix.shape[-1]))
    return matrix[..., rows, :]
