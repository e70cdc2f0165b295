"""Stage 1 that trains Des-Nets ("subnets") beside the Aux-Net, or instead of it, for any method.

Every step samples some of the sizes. All Des-Nets are functions of the same learngene, so they share its parameters.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from common.errors import InputError
from models.aux_net import AuxNet
from models.stateless import recompute_activations
from models.vit import ViTArch

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Supernet(nn.Module):
    """Wraps an Aux-Net for training, as DistributedDataParallel wraps a module.

    Optimiser, average, checkpoint and learngene file are those of the Aux-Net inside.

    Attributes:
        aux_net: the Aux-Net, whose parameters are the only ones.
        archs: the sizes that are sampled from, by rising MACs.
        per_step: how many Des-Nets a step trains.
        alone: whether the Aux-Net itself is left out, which costs more than most Des-Nets.
    """

    def __init__(self, aux_net: AuxNet, archs: Sequence[ViTArch], per_step: int, alone: bool = False):
        """
        Raises:
            InputError: there are fewer sizes than ``per_step``, or the learngene makes no Des-Net of one of them.
        """
        super().__init__()
        if not 1 <= per_step <= len(archs):
            raise InputError(f"{per_step} descendants in a step of {len(archs)} sizes: expected no more than there are")
        shapes = {name: p.detach().to("meta") for name, p in aux_net.named_parameters()}
        for arch in archs:
            aux_net.descend(shapes, aux_net.config, arch)
        self.aux_net, self.per_step, self.alone = aux_net, per_step, alone
        self.archs = sorted(archs, key=lambda arch: arch.macs(aux_net.num_classes, aux_net.in_chans))
        self.vits = {arch: aux_net.des_vit(arch) for arch in self.archs}  # not registered: they have no parameters

    def forward(self, images: Tensor) -> Tensor:
        """Logits (1 + per_step, batch, classes), the Aux-Net's first; (per_step, batch, classes) if it is left out.

        In evaluation mode the logits of the Aux-Net, (batch, classes).
        """
        if not self.training:
            return self.aux_net(images)
        # from the generator that each step seeds by its number, so that a resumed run samples the same sizes
        sampled = random.sample(self.archs, self.per_step)
        logits = [] if self.alone else [self.aux_net(images)]
        for arch in sampled:
            logits.append(functional_call(self.vits[arch], self.aux_net.des_weights(arch), (images,)))
        return torch.stack(logits)

    def train(self, mode: bool = True) -> "Supernet":
        for vit in self.vits.values():
            vit.train(mode)
        return super().train(mode)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, as `AuxNet.set_grad_checkpointing`."""
        self.aux_net.set_grad_checkpointing(enable)
        for vit in self.vits.values():
            recompute_activations(vit, enable)


def descendant_archs(
    smallest: ViTArch, aux: ViTArch, depths: Sequence[int] | None, heads: Sequence[int] | None, alone: bool
) -> list[ViTArch]:
    """The sizes that stage 1 samples from. The Aux-Net's own is among them only if it is not trained anyway.

    Args:
        smallest: sizes from which depths and numbers of heads start, where they are not given.
        aux: the Aux-Net.
        alone: whether the Aux-Net itself is left out of training.
    """
    return [
        replace(aux, width=count * aux.head_dim, depth=depth, num_heads=count)
        for depth in sorted(set(depths or range(smallest.depth, aux.depth + 1)))
        for count in sorted(set(heads or range(smallest.num_heads, aux.num_heads + 1)))
        if (depth, count) != (aux.depth, aux.num_heads) or alone
    ]
