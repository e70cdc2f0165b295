"""Which learngene layers and coefficient rows of LeTs make each layer of an Aux-Net or Des-Net."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from common.devices import to_device
from common.errors import InputError
from models.initialisation import Row
from models.vit import ViTArch, check_hidden, check_kind

import torch
from torch import Tensor

DEPTH_STRATEGIES = ("default", "even", "first", "last")


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
    return DepthPlan(to_device(select, torch.device(device)), [distinct.index(layer) for layer in layers])


def groups_of_layers(depth: int, aux_depth: int, group_size: int, layers_per_row: int) -> list[int]:
    """The group (published: pair) of learngene layers that each Aux layer is a mixture of.

    Where groups of equal size divide the Aux layers, each has as many consecutive ones. Else the groups follow the
    coefficient rows, row k of K having that of learngene layer round(k·(n−1)/(K−1)).

    Args:
        depth: of the learngene, n. If ``group_size`` does not divide it, the last group is smaller.
    """
    groups = -(-depth // group_size)
    if depth % group_size == 0 and aux_depth % groups == 0:
        return [i * groups // aux_depth for i in range(aux_depth)]
    nearest = nearest_layers(depth, -(-aux_depth // layers_per_row))
    return [nearest[i // layers_per_row] // group_size for i in range(aux_depth)]


def nearest_layers(depth: int, num_rows: int) -> list[int]:
    """For each of K coefficient rows the learngene layer round(k·(n−1)/(K−1)): the same relative position."""
    return [round(k * (depth - 1) / max(1, num_rows - 1)) for k in range(num_rows)]


def rows_of_coefficients(groups: Sequence[int], depth: int, group_size: int, layers_per_row: int) -> list[Row]:
    """What the coefficient rows belong to.

    Args:
        groups: as `groups_of_layers` gives them, for each Aux layer.
        depth: of the learngene.
    """
    numbers = range(0, len(groups), layers_per_row)
    rows = []
    for number, nearest in zip(numbers, nearest_layers(depth, len(numbers)), strict=True):
        first = groups[number] * group_size
        layers = min(group_size, depth - first)
        rows.append(Row(number, layers, min(max(nearest - first, 0), layers - 1)))
    return rows


def groups_of(config: Mapping) -> list[int]:
    """`groups_of_layers` of a learngene with the sizes in ``config`` (`LeTs.config`)."""
    depths = config["src_arch"]["depth"], config["tgt_arch"]["depth"]
    return groups_of_layers(*depths, config["group_size"], config["layers_per_row"])


def des_plan(
    header: Mapping, arch: ViTArch, num_rows: int, *mapping: object, device: torch.device | str = "cpu"
) -> DepthPlan:
    """The plan of a Des-Net.

    Args:
        header: the sizes of the learngene, as in `LeTs.config`.
        num_rows: the number of coefficient rows.
        mapping: as in `layers_of`.
    """
    num_groups = -(-header["src_arch"]["depth"] // header["group_size"])
    return depth_plan(layers_of(header, arch, *mapping), num_rows, num_groups, device)


def layers_of(
    config: Mapping,
    arch: ViTArch,
    mapping_layer: Sequence[int] | None = None,
    mapping_layer_coeff: Sequence[int] | None = None,
    depth_select: str = "default",
) -> list[tuple[int, int]]:
    """The group of learngene layers and the coefficient row of each layer of a Des-Net.

    Args:
        config: the sizes of the learngene, as in `LeTs.config`.
        arch: the sizes of the Des-Net.
        mapping_layer, mapping_layer_coeff, depth_select: as in `LeTs.descend`.

    Raises:
        InputError: wider than the Aux-Net or of more hidden neurons, heads of another size, or mapping lists that do
            not fit.
    """
    src, tgt, layers_per_row = ViTArch(**config["src_arch"]), ViTArch(**config["tgt_arch"]), config["layers_per_row"]
    if arch.width > tgt.width:
        raise InputError(
            f"the Des-Net has width {arch.width}; the widest that this learngene can make is {tgt.width} "
            f"({tgt.num_heads} heads)"
        )
    check_kind(arch, tgt)
    if arch.head_dim != src.head_dim:
        raise InputError(
            f"the Des-Net has heads of {arch.head_dim} neurons; those of this learngene have {src.head_dim}"
        )
    check_hidden(arch, tgt)
    groups = groups_of(config)
    mapping = mapping_or_default(config, arch.depth, mapping_layer, mapping_layer_coeff, depth_select)
    return [(groups[a], r // layers_per_row) for a, r in zip(*mapping, strict=True)]


def mapping_or_default(
    config: Mapping, depth: int, layer: Sequence[int] | None, coeff: Sequence[int] | None, depth_select: str = "default"
) -> tuple[Sequence[int], Sequence[int]]:
    """Both mapping lists of a Des-Net of ``depth`` layers, checked; without them, those of ``depth_select``."""
    aux_depth, layers_per_row = config["tgt_arch"]["depth"], config["layers_per_row"]
    if layer is None and coeff is None:
        return select_depth(depth, groups_of(config), layers_per_row, depth_select)
    if depth_select != "default":
        raise InputError(f"depth_select {depth_select} and mapping lists both say which layers to take: give one")
    check_mapping(layer, coeff, depth, aux_depth)
    return layer, coeff


def select_depth(
    depth: int, groups: Sequence[int], layers_per_row: int, how: str = "default"
) -> tuple[list[int], list[int]]:
    """``mapping_layer`` and ``mapping_layer_coeff`` for a Des-Net of ``depth`` layers.

    Args:
        groups: as `groups_of_layers` gives them, for each Aux layer.
        how: which of the K coefficient rows the layers take. ``default``: up to K layers, rows evenly spaced, first and
            last among them; more, every row equally often, and those in the middle once more for the remainder, which
            for 12 of 16 layers are the published lists. ``even``: layer l of d takes row ⌊l·K/d⌋. ``first``, ``last``:
            every row equally often, and the first or last ones once more; up to K layers, only those.
            ``pairs:0,2``: as ``default``, of the rows of these pairs of learngene layers alone.

    Raises:
        InputError: ``how`` is unknown, or names a pair that there is not.
    """
    rows = list(range(0, len(groups), layers_per_row))
    if how.startswith("pairs:"):
        rows = [row for row in rows if groups[row] in pairs_of(how, max(groups) + 1)]
    elif how not in DEPTH_STRATEGIES:
        expected = ", ".join(DEPTH_STRATEGIES)
        raise InputError(
            f"unknown depth selection {how!r}: expected {expected}, or pairs: and numbers such as pairs:0,2"
        )
    times, rest = divmod(depth, len(rows))
    if how == "even":
        coeff = [rows[l * len(rows) // depth] for l in range(depth)]
    elif times == 0 and how not in ("first", "last"):
        places = torch.linspace(0, len(rows) - 1, depth, dtype=torch.float64, device="cpu")
        coeff = [rows[round(place)] for place in places.tolist()]
    else:
        first = {"first": 0, "last": len(rows) - rest}.get(how, (len(rows) - rest) // 2)
        coeff = [row for i, row in enumerate(rows) for _ in range(times + (first <= i < first + rest))]
    # Aux layers of one pair are counted up from its first, as in the published lists
    pairs = [groups[row] for row in coeff]
    layer = [groups.index(p) + pairs[:i].count(p) % groups.count(p) for i, p in enumerate(pairs)]
    return layer, coeff


def pairs_of(how: str, num_pairs: int) -> set[int]:
    """The numbers in ``pairs:0,2``."""
    numbers = how.removeprefix("pairs:").split(",")
    if not all(n.isdecimal() and int(n) < num_pairs for n in numbers):
        raise InputError(f"{how} names pairs of learngene layers: expected numbers from 0 to {num_pairs - 1}")
    return {int(n) for n in numbers}


def check_mapping(layer: Sequence[int] | None, coeff: Sequence[int] | None, depth: int, aux_depth: int) -> None:
    """Raises InputError unless both lists name one Aux layer for each Des-Net layer."""
    for name, numbers, other in (
        ("mapping_layer", layer, "mapping_layer_coeff"),
        ("mapping_layer_coeff", coeff, "mapping_layer"),
    ):
        if numbers is None:
            raise InputError(f"{other} is given without {name}: give both, or neither for the default mapping")
        if len(numbers) != depth:
            raise InputError(f"{name} has {len(numbers)} entries; a Des-Net of {depth} layers needs {depth}")
        for number in numbers:
            if not 0 <= number < aux_depth:
                raise InputError(f"{name} names layer {number}; the Aux-Net has layers 0 to {aux_depth - 1}")
