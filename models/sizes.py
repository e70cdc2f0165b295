"""Which sizes of Des-Nets a step of stage 1 trains."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean

from common.errors import InputError
from models.vit import ViTArch


@dataclass(frozen=True)
class SizeSampler:
    """Draws the sizes of each step.

    Attributes:
        macs: of all sizes, the MACs of an image.
        per_step: how many a step trains, at most.
        kind: ``random``; ``smallest``: the smallest and random ones; or ``sandwich``, as in "Universally Slimmable
            Networks" (Yu and Huang, ICCV 2019): the largest, the smallest, and random ones between.
        alone: whether the Aux-Net is left out of training. If not, it is the largest of each step.
        warmup_epochs: first epochs that train the largest alone.
        coarse_to_fine: whether the other epochs begin with few sizes: the smallest and largest depth, number of heads
            and MLP ratio; then those in the middle, too, and so on to all sizes, for equal numbers of epochs.
        epochs: of the run.
    """

    macs: Mapping[ViTArch, int]
    per_step: int
    kind: str = "random"
    alone: bool = False
    warmup_epochs: int = 0
    coarse_to_fine: bool = False
    epochs: int = 0

    def __post_init__(self):
        if not 1 <= self.per_step <= len(self.macs):
            raise InputError(
                f"{self.per_step} descendants in a step of {len(self.macs)} sizes: expected no more than there are"
            )
        if self.kind == "sandwich" and self.alone and self.per_step == 1:
            raise InputError("1 descendant in a step is no sandwich of largest and smallest: expected 2 or more")
        if self.kind == "smallest" and self.alone and self.per_step == 1:
            raise InputError("1 descendant in a step is always the smallest: expected 2 or more")

    @cached_property
    def archs(self) -> list[ViTArch]:
        """All sizes, by rising MACs."""
        return sorted(self.macs, key=self.macs.__getitem__)

    def draw(self, epoch: int, seed: int) -> list[ViTArch]:
        """The sizes of a step, from the largest to the smallest.

        Args:
            seed: of this step. All processes use the same, and a resumed run uses it again.
        """
        first, among = self._certain(epoch)
        count = min(self.per_step - len(first), len(among))
        drawn = [*first, *random.Random(seed).sample(among, count)] if count > 0 else first
        return sorted(drawn, key=self.macs.__getitem__, reverse=True)

    def mean_macs(self, epoch: int) -> float:
        """MACs of an image that passes through the sizes of a step, in the mean over the steps of an epoch."""
        first, among = self._certain(epoch)
        count = min(self.per_step - len(first), len(among))
        drawn = count * mean(self.macs[arch] for arch in among) if count > 0 else 0
        return sum(self.macs[arch] for arch in first) + drawn

    def _certain(self, epoch: int) -> tuple[list[ViTArch], list[ViTArch]]:
        """The sizes that are in every step of an epoch, and those that the rest is drawn from."""
        largest = self.archs[-1:] if self.alone else []
        if epoch < self.warmup_epochs:
            return largest, []
        among = self._offered(epoch)
        if self.kind == "random":
            return [], among
        if self.kind == "smallest":
            return among[:1], among[1:]
        ends = [*largest, among[0]] if among[:1] != largest else largest
        return ends, [arch for arch in among if arch not in ends]

    def _offered(self, epoch: int) -> list[ViTArch]:
        """The sizes on offer in an epoch after the warm-up, by rising MACs."""
        if not self.coarse_to_fine:
            return self.archs
        values = [sorted(set(of_axis)) for of_axis in zip(*map(axes_of_size, self.archs), strict=True)]
        levels = 1 + max(math.ceil(math.log2(max(1, len(of_axis) - 1))) for of_axis in values)
        after = self.epochs - self.warmup_epochs
        level = min((epoch - self.warmup_epochs) * levels // max(1, after), levels - 1)
        kept = [coarse(of_axis, level) for of_axis in values]
        return [
            arch
            for arch in self.archs
            if all(value in of_axis for value, of_axis in zip(axes_of_size(arch), kept, strict=True))
        ]


def axes_of_size(arch: ViTArch) -> tuple[float, float, float]:
    """Depth, heads and MLP ratio, where that of the architecture counts as the largest."""
    return arch.depth, arch.num_heads, math.inf if arch.mlp_ratio is None else arch.mlp_ratio


def coarse(values: Sequence[float], level: int) -> set[float]:
    """2^level + 1 of the values, evenly spaced from the first to the last."""
    steps, last = 2**level, len(values) - 1
    return {values[round(i * last / steps)] for i in range(steps + 1)}


def sizes_on_offer(
    smallest: ViTArch,
    aux: ViTArch,
    depths: Sequence[int] | None,
    heads: Sequence[int] | None,
    mlp_ratios: Sequence[float] | None,
    alone: bool,
) -> list[ViTArch]:
    """The sizes that stage 1 samples from. The Aux-Net's own is among them only if it is not trained anyway.

    Args:
        smallest: sizes from which depths and numbers of heads start, where they are not given.
        aux: the Aux-Net, whose MLP ratio all sizes have if none are given.
        alone: whether the Aux-Net itself is left out of training.
    """
    ratios = sorted(set(mlp_ratios)) if mlp_ratios else [aux.mlp_ratio]
    archs = [
        replace(aux, width=count * aux.head_dim, depth=depth, num_heads=count, mlp_ratio=ratio)
        for depth in sorted(set(depths or range(smallest.depth, aux.depth + 1)))
        for count in sorted(set(heads or range(smallest.num_heads, aux.num_heads + 1)))
        for ratio in ratios
    ]
    return [arch for arch in archs if arch != aux or alone]
