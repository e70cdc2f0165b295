"""ViTs without weights of their own, to be run with computed ones; and ViTs of given weights."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache

from models.axes import any_layer
from models.meta import WeightsOnMeta
from models.vit import ViTArch, create_vit

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


class Recomputed:
    """Activation checkpointing of a block with computed weights.

    When the backward pass recomputes the block, the ViT no longer holds the weights of the forward pass. They are
    arguments of the checkpointed function, which keeps them. All of this is outside of ``forward``, which may be
    compiled.
    """

    recompute = False

    def __call__(self, x: Tensor, *args: object, recomputing: bool = False, **kwargs: object) -> Tensor:
        if not self.recompute or recomputing or not torch.is_grad_enabled():
            return super().__call__(x, *args, **kwargs)
        # an E that this pass does not use is on the meta device, which `checkpoint` would take for a second accelerator
        weights = {name: w for name, w in self.named_parameters(remove_duplicate=False) if not w.is_meta}
        kwargs["recomputing"] = True
        return checkpoint(functional_call, self, weights, (x, *args), kwargs, use_reentrant=False)


@cache
def recomputed(block: type[nn.Module]) -> type[nn.Module]:
    """The class of blocks ``block`` with `Recomputed`."""
    return type(f"Recomputed{block.__name__}", (Recomputed, block), {})


def vit_without_weights(arch: ViTArch, **kwargs: object) -> nn.Module:
    """A ViT whose weights are on the meta device, to be run with computed ones."""
    with WeightsOnMeta():
        vit = create_vit(arch, **kwargs)
    for block in vit.blocks:
        block.__class__ = recomputed(type(block))
    fill_buffers(vit, arch, **kwargs)
    return vit


def recompute_activations(vit: nn.Module, enable: bool) -> None:
    """Activation checkpointing of a `vit_without_weights`."""
    for block in vit.blocks:
        block.recompute = enable


def vit_from_weights(
    arch: ViTArch, weights: dict[str, Tensor], used: Iterable[Tensor] | None = None, **kwargs
) -> nn.Module:
    """A ViT with a copy of ``weights``, created without a random initialisation.

    Layers that share a tensor in ``weights`` get one copy each.

    Args:
        used: take ``weights`` themselves, unless they share memory with one of these tensors or with each other.
        kwargs: as those of `create_vit`.
    """
    with WeightsOnMeta():
        vit = create_vit(arch, **kwargs)
    fill_buffers(vit, arch, **kwargs)
    own = {name: w.detach().clone() for name, w in weights.items()} if used is None else unshared(weights, used)
    vit.load_state_dict(own, strict=True, assign=True)
    return vit


def unshared(weights: Mapping[str, Tensor], used: Iterable[Tensor]) -> dict[str, Tensor]:
    """``weights``, copies of those that share memory with a tensor in ``used`` or with another weight."""
    taken = {tensor.untyped_storage()._cdata for tensor in used}
    own = {}
    for name, weight in weights.items():
        memory = weight.untyped_storage()
        alone = memory._cdata not in taken and memory.nbytes() == weight.numel() * weight.element_size()
        own[name] = weight.detach() if alone else weight.detach().clone()
        taken.add(memory._cdata)
    return own


def fill_buffers(vit: nn.Module, arch: ViTArch, **kwargs: object) -> None:
    """Give ``vit`` the buffers that are no weights, such as rotary positions, if they are on the meta device.

    They are those of a ViT of one layer, as all layers have the same.
    """
    empty = [name for name, buffer in vit.named_buffers() if buffer.is_meta]
    if not empty:
        return
    with torch.random.fork_rng(devices=[]):  # the first random numbers of a run do not depend on the kind of ViT
        buffers = dict(create_vit(replace(arch, depth=1), **kwargs).named_buffers())
    for name in empty:
        module, _, own = name.rpartition(".")
        vit.get_submodule(module)._buffers[own] = buffers[any_layer(name).replace("*", "0")].clone()


def move_buffers(vit: nn.Module, device: torch.device) -> None:
    """Move the buffers of ``vit``, which is no registered submodule, to the device of its computed weights."""
    for module in vit.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and device.type != "meta":
                module._buffers[name] = buffer.to(device)


def classes_of(weights: Mapping[str, Tensor]) -> int:
    """The classes of the head in the state dict of a ViT; 0 without one."""
    return len(weights["head.weight"]) if "head.weight" in weights else 0


def random_vit_weights(arch: ViTArch, **kwargs) -> dict[str, Tensor]:
    """The state dict of a ViT as timm initialises it."""
    return create_vit(arch, **kwargs).state_dict()
