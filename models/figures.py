"""What a method shows of its learngene, as plain data: scripts/inspect_learngene.py --plot draws it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeatMaps:
    """Matrices side by side on one colour scale, whose middle is zero.

    Attributes:
        matrices: title → values (rows, columns).
        rows: their labels.
        columns: their labels, each of as many neighbouring columns.
        xlabel, ylabel, value: labels of columns, rows and colours.
    """

    matrices: Mapping[str, Tensor]
    rows: Sequence[str]
    columns: Sequence[str]
    xlabel: str
    ylabel: str
    value: str


@dataclass(frozen=True)
class Curves:
    """Panels of curves side by side, over the position in each tensor.

    Attributes:
        panels: title → label → values (points,). Curves with an integer label are coloured by it.
        xlabel, ylabel: labels of the axes.
        scale: what the integer labels count.
    """

    panels: Mapping[str, Mapping[str | int, Tensor]]
    xlabel: str
    ylabel: str
    scale: str = ""


@dataclass(frozen=True)
class Points:
    """Panels of points side by side on a logarithmic axis, one point per series and name.

    Attributes:
        panels: title → series → values, one for each of ``names``. Between two series, their ratio is noted.
        names: of the positions.
        xlabel, ylabel: labels of the axes.
    """

    panels: Mapping[str, Mapping[str, Sequence[float]]]
    names: Sequence[str]
    xlabel: str
    ylabel: str


Figures = Sequence[HeatMaps | Curves | Points]


def root_mean_square(tensor: Tensor) -> float:
    return tensor.float().square().mean().sqrt().item()


def sorted_norms(matrix: Tensor) -> Tensor:
    """The l2 norms of the rows of ``matrix`` (…, rows, columns), the largest first: (…, rows)."""
    return torch.linalg.vector_norm(matrix.float(), dim=-1).sort(descending=True).values
