"""Which neurons a narrower ViT keeps of a wider one, or of the matrices that make one wider.

One choice per axis, so that everything stays aligned: embedding neurons for the whole network, heads for the whole
network (the rows of q, k and v and the columns of proj), hidden neurons for each layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

from common.errors import InputError

import torch
from torch import Tensor

WIDTH_SELECTIONS = ("continuous", "l1_top", "l1_bottom", "l2_top", "l2_bottom")


class Neurons(NamedTuple):
    """The numbers of the neurons that are kept of a ViT."""

    embedding: Tensor  # (width,)
    heads: Tensor  # (width,): the rows of q, k and v, and the columns of proj
    hidden: Sequence[Tensor]  # (4·width,) for each layer


def choose_rows(matrix: Tensor, count: int, how: str) -> Tensor:
    """The numbers of ``count`` rows of ``matrix`` (…, rows, columns), in ascending order: (…, count).

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
    """The numbers of all neurons of the given heads: (heads,) → (heads·head_dim,)."""
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()


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
