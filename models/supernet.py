"""Stage 1 that trains Des-Nets ("subnets") beside the Aux-Net, or instead of it, for any method.

Every step draws some of the sizes. All Des-Nets are functions of the same learngene, so they share its parameters.
"""

from models.aux_net import AuxNet
from models.features import Features
from models.learngene import Learngene
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
        features: whether its members give features instead of logits.
        drawn: the sizes of the next step, from the largest to the smallest; whoever trains sets them.
    """

    def __init__(self, aux_net: AuxNet, sampler: SizeSampler, features: bool = False):
        """
        Args:
            features: let the members give features, for which the Aux-Net, an `Elastic`, has maps.

        Raises:
            InputError: the learngene makes no Des-Net of one of the sizes.
        """
        super().__init__()
        gene = Learngene.of(aux_net)
        for arch in sampler.archs:
            gene.check(arch)
        self.aux_net, self.sampler, self.features = aux_net, sampler, features
        self.vits = {arch: aux_net.des_vit(arch) for arch in sampler.archs}  # not registered: they have no parameters
        self.drawn: list[ViTArch] = []

    def forward(self, images: Tensor) -> Tensor | list[Tensor] | list[tuple[Tensor, Tensor]]:
        """Logits (members, batch, classes) of the Aux-Net, unless it is left out, and of the sizes that are drawn.

        With ``features`` a list of their `Features` (batch, 1 + patches, width of the source), through the maps of the
        Aux-Net; each with the member's logits, if it has a head. In evaluation mode the logits of the Aux-Net, (batch,
        classes).
        """
        if not self.training:
            return self.aux_net(images)
        outputs = [] if self.sampler.alone else [self._run(self.aux_net.vit, self.aux_net.expand(), images)]
        outputs += [self._run(self.vits[arch], self.aux_net.des_weights(arch), images) for arch in self.drawn]
        return outputs if self.features else torch.stack(outputs)

    def _run(self, vit: nn.Module, weights: dict[str, Tensor], images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.features:
            return functional_call(vit, weights, (images,))
        has_head = self.aux_net.num_classes > 0
        found = functional_call(Features(vit, has_head), {f"vit.{name}": w for name, w in weights.items()}, (images,))
        if not has_head:
            return self.aux_net.map_features(found)
        features, logits = found
        return self.aux_net.map_features(features), logits

    def train(self, mode: bool = True) -> "Supernet":
        for vit in self.vits.values():
            vit.train(mode)
        return super().train(mode)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, as `AuxNet.set_grad_checkpointing`."""
        self.aux_net.set_grad_checkpointing(enable)
        for vit in self.vits.values():
            recompute_activations(vit, enable)
