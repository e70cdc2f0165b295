"""Stage 1 that trains Des-Nets ("subnets") beside the Aux-Net, or instead of it, for any method.

Every step draws some of the sizes. All Des-Nets are functions of the same learngene, so they share its parameters.
"""

from models.aux_net import AuxNet
from models.sizes import SizeSampler
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
        sampler: draws the sizes of a step.
        drawn: the sizes of the next step, from the largest to the smallest; whoever trains sets them.
    """

    def __init__(self, aux_net: AuxNet, sampler: SizeSampler):
        """
        Raises:
            InputError: the learngene makes no Des-Net of one of the sizes.
        """
        super().__init__()
        shapes = {name: tensor.to("meta") for name, tensor in aux_net.state_dict().items()}
        for arch in sampler.archs:
            aux_net.descend(shapes, aux_net.config, arch)
        self.aux_net, self.sampler = aux_net, sampler
        self.vits = {arch: aux_net.des_vit(arch) for arch in sampler.archs}  # not registered: they have no parameters
        self.drawn: list[ViTArch] = []

    def forward(self, images: Tensor) -> Tensor:
        """Logits (members, batch, classes) of the Aux-Net, unless it is left out, and of the sizes that are drawn.

        In evaluation mode the logits of the Aux-Net, (batch, classes).
        """
        if not self.training:
            return self.aux_net(images)
        logits = [] if self.sampler.alone else [self.aux_net(images)]
        for arch in self.drawn:
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
