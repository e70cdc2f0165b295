"""Which neurons a narrower ViT keeps of a wider ViT, or of the width matrices of LeTs.

One choice per axis keeps all weights aligned: embedding neurons for the whole network, heads for the whole network
(rows of q, k and v, columns of proj), hidden neurons for each layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

from common.errors import InputError

import torch
from torch import Tensor

WIDTH_SELECTIONS = ("continuous", "l1_top", "l1_bottom", "l2_top", "l2_bottom")


class Neurons(NamedTuple):
    """Indices of the neurons of a ViT that are kept."""

    embedding: Tensor | slice  # (width,)
    heads: Tensor | slice  # (width,): the rows of q, k and v, and the columns of proj
    hidden: Sequence[Tensor | slice]  # (4·width,) for each layer


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


def first_neurons(width: int, depth: int) -> Neurons:
    """The ``continuous`` choice, as slices: views need no index arithmetic in the backward pass of stage 1."""
    return Neurons(slice(width), slice(width), [slice(4 * width)] * depth)


def choose_neurons(vit: dict[str, Tensor], width: int, head_dim: int, how: str) -> Neurons:
    """The neurons that a ViT of ``width`` keeps of a wider one with the state dict ``vit``.

    Embedding neurons by their rows of the patch embedding, heads by their rows of q, k and v in all layers together,
    hidden neurons by their rows of fc1.
    """
    qkv, fc1 = (layers_of(vit, name) for name in ("attn.qkv.weight", "mlp.fc1.weight"))
    per_head = torch.stack(qkv).unflatten(1, (3, -1, head_dim)).movedim(2, 0).flatten(1)
    heads = choose_rows(per_head, width // head_dim, how)
    return Neurons(
        embedding=choose_rows(vit["patch_embed.proj.weight"].flatten(1), width, how),
        heads=rows_of_heads(heads, head_dim),
        hidden=[choose_rows(weight, 4 * width, how) for weight in fc1],
    )


def layers_of(vit: dict[str, Tensor], name: str) -> list[Tensor]:
    """The tensor ``name`` of every block, in order."""
    depth = sum(key.endswith(f".{name}") for key in vit)
    return [vit[f"blocks.{l}.{name}"] for l in range(depth)]


def keep_neurons(vit: dict[str, Tensor], neurons: Neurons) -> dict[str, Tensor]:
    """The state dict of the ViT that keeps only ``neurons`` of the one with the state dict ``vit``."""
    emb, heads, _ = neurons
    kept = {
        "pos_embed": vit["pos_embed"][..., emb],
        **{f"patch_embed.proj.{kind}": vit[f"patch_embed.proj.{kind}"][emb] for kind in ("weight", "bias")},
        **{f"fc_norm.{kind}": vit[f"fc_norm.{kind}"][emb] for kind in ("weight", "bias")},
    }
    if "head.weight" in vit and "head.bias" in vit:
        kept |= {"head.weight": vit["head.weight"][:, emb], "head.bias": vit["head.bias"]}
    for l, hidden in enumerate(neurons.hidden):
        block = {name.removeprefix(f"blocks.{l}."): w for name, w in vit.items() if name.startswith(f"blocks.{l}.")}
        qkv_weight, qkv_bias = (block[f"attn.qkv.{kind}"].unflatten(0, (3, -1)) for kind in ("weight", "bias"))
        narrow = {
            **{
                f"{norm}.{kind}": block[f"{norm}.{kind}"][emb]
                for norm in ("norm1", "norm2")
                for kind in ("weight", "bias")
            },
            "attn.qkv.weight": qkv_weight[:, heads][..., emb].flatten(0, 1),
            "attn.qkv.bias": qkv_bias[:, heads].flatten(),
            "attn.proj.weight": block["attn.proj.weight"][emb][:, heads],
            "attn.proj.bias": block["attn.proj.bias"][emb],
            "mlp.fc1.weight": block["mlp.fc1.weight"][hidden][:, emb],
            "mlp.fc1.bias": block["mlp.fc1.bias"][hidden],
            "mlp.fc2.weight": block["mlp.fc2.weight"][emb][:, hidden],
            "mlp.fc2.bias": block["mlp.fc2.bias"][emb],
        }
        kept |= {f"blocks.{l}.{name}": tensor for name, tensor in narrow.items()}
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# Of the matrices of LeTs
# ---------------------------------------------------------------------------------------------------------------------


def is_full_width(p: dict[str, Tensor]) -> bool:
    """Whether the width matrices have a row for every neuron of the Aux-Net, rather than for the new ones alone."""
    return p["E"].shape[0] == p["pos_embed"].shape[-1]


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
