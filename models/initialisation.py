"""Initialisation of the matrices that LeTs learns: ``--trans-init-scheme`` and ``--trans-init-noise``."""

from collections.abc import Sequence
from typing import NamedTuple

from common.errors import InputError

import torch
from torch import Tensor

DEPTH_SCHEMES = ("stackbert_noisy", "stackbert", "alternate_noisy", "copy", "rand", "rand_softmax")
WIDTH_SCHEMES = ("rand", "rand_softmax", "sel", "sel_noisy")


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


class Row(NamedTuple):
    """What a row of depth coefficients belongs to."""

    number: int  # of the first Aux layer that uses it
    layers: int  # of the learngene, that it mixes
    nearest: int  # the one of these at the same relative position


def init_depth(modules: int, rows: Sequence[Row], scheme: str, noise: float, group_size: int) -> Tensor:
    """Depth coefficients (modules, rows, group_size); each row sums to 1, and is 0 beyond the layers of its group.

    ``stackbert``: row r takes layer r mod group_size of its group. ``stackbert_noisy``: the same over noise in
    (0, ``noise``), over the sum. ``alternate_noisy``: the same with the rows counted one by one, so that those of two
    layers, whose numbers r are even, do not all take the first of a pair. ``copy``: each row is the layer at its own
    relative position and nothing else; from as many rows as layers, no layer is lost. ``rand``: uniform in (0, 1), over
    the sum. ``rand_softmax``: the softmax of that noise.
    """
    shape = (modules, len(rows), group_size)
    if scheme == "rand":
        g = torch.rand(shape)
    elif scheme == "rand_softmax":
        g = torch.rand(shape).softmax(-1)
    elif scheme in ("stackbert", "stackbert_noisy", "alternate_noisy", "copy"):
        g = torch.rand(shape) * (noise if scheme.endswith("_noisy") else 0)
        for k, row in enumerate(rows):
            taken = {"alternate_noisy": k, "copy": row.nearest}.get(scheme, row.number)
            g[:, k, taken % row.layers] = 1.0
    else:
        raise InputError(
            f"unknown initialisation {scheme!r} of depth coefficients: expected {', '.join(DEPTH_SCHEMES)}"
        )
    for k, row in enumerate(rows):
        g[:, k, row.layers :] = 0
    return g / g.sum(-1, keepdim=True)
