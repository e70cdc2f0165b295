"""The Aux-Net of both methods: a ViT whose weights are computed from a learngene in every forward pass."""

from abc import ABC, abstractmethod
from dataclasses import asdict, replace

from models.vit import ViTArch, create_vit

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint


class WeightsOnMeta(TorchFunctionMode):
    """Within this context new weights are on the meta device: shapes without numbers, which nothing is computed for.

    ``with torch.device("meta")`` would do, but for `torch.linspace`, whose numbers timm ≤ 1.0.15 reads as drop-path
    rates.
    """

    CONSTRUCTORS = (torch.empty, torch.ones, torch.zeros, torch.rand, torch.randn, torch.randint)

    INITIALISERS = ("add_", "clamp_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensor = args[0] if args else kwargs.get("tensor")
        if func.__name__ in self.INITIALISERS and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        if func in self.CONSTRUCTORS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class AuxBlock(Block):
    """timm's block, with an activation checkpointing that knows of computed weights.

    The backward pass runs the block a second time, when the ViT no longer holds the weights of its forward pass:
    the checkpoint keeps them and hands them back.
    """

    recompute = False

    def forward(self, x: Tensor, recomputing: bool = False) -> Tensor:
        if not self.recompute or recomputing or not torch.is_grad_enabled():
            return super().forward(x)
        weights = dict(self.named_parameters(remove_duplicate=False))
        return checkpoint(functional_call, self, weights, (x,), {"recomputing": True}, use_reentrant=False)


class AuxNet(nn.Module, ABC):
    """A ViT without weights of its own: its parameters are those of the learngene, and `expand` computes the rest.

    Attributes:
        arch: the sizes of the ViT.
        vit: the ViT, its weights on the meta device. It is no registered submodule, so that parameters, state dict,
            gradients and averages of an Aux-Net are those of the learngene alone.
        vits: by their sizes, it and the other ViTs that are run with computed weights.
    """

    method: str

    def __init__(self, arch: ViTArch, vit_options: dict, **kwargs):
        """
        Args:
            arch: the sizes of the ViT.
            vit_options: how the ViT of this method differs from `create_vit`'s.
            kwargs: passed on to timm's ``VisionTransformer``; ``img_size`` and ``patch_size`` replace ``arch``'s.
        """
        super().__init__()
        sizes = {key: kwargs.pop(key) for key in ("img_size", "patch_size") if key in kwargs}
        self.arch = replace(arch, **sizes)
        self._vit_options = {**vit_options, **kwargs}
        self.vits: dict[ViTArch, VisionTransformer] = {}
        self.__dict__["vit"] = self.add_vit(self.arch)

    def add_vit(self, arch: ViTArch) -> VisionTransformer:
        """A ViT of ``arch`` sizes without weights, as one of `vits`."""
        with WeightsOnMeta():
            self.vits[arch] = create_vit(arch, block_fn=AuxBlock, weight_init="skip", **self._vit_options)
        return self.vits[arch]

    @abstractmethod
    def expand(self) -> dict[str, Tensor]:
        """The state dict of the ViT as a differentiable function of the learngene."""

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that stay out of weight decay, in addition to those with one axis."""

    @property
    def config(self) -> dict:
        """The sizes that the learngene file states besides the tensors, as plain data."""
        return {"tgt_arch": asdict(self.arch), "num_classes": self.num_classes, "in_chans": self.in_chans}

    @property
    def in_chans(self) -> int:
        return self.vit.patch_embed.proj.in_channels

    @property
    def num_classes(self) -> int:
        return self.vit.num_classes

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        return functional_call(self.vit, self.expand(), (images,))

    def train(self, mode: bool = True) -> "AuxNet":
        for vit in self.vits.values():
            vit.train(mode)
        return super().train(mode)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in the backward pass instead of keeping them."""
        for vit in self.vits.values():
            for block in vit.blocks:
                block.recompute = enable

    @torch.no_grad()
    def to_vit(self) -> VisionTransformer:
        """The same function as a plain ViT with weights of its own, in evaluation mode."""
        return vit_from_weights(self.arch, self.expand(), **self._vit_options).eval()

    def add_parameters(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


def vit_from_weights(arch: ViTArch, weights: dict[str, Tensor], **kwargs) -> VisionTransformer:
    """A ViT that owns ``weights``. Nothing is drawn at random only to be overwritten.

    Layers that share a tensor in ``weights`` each get a copy of their own, to be trained apart.
    """
    with WeightsOnMeta():
        vit = create_vit(arch, weight_init="skip", **kwargs)
    vit.load_state_dict({name: w.detach().clone() for name, w in weights.items()}, strict=True, assign=True)
    return vit


def random_vit_weights(arch: ViTArch, **kwargs) -> dict[str, Tensor]:
    """The state dict of a ViT as timm initialises it."""
    return create_vit(arch, **kwargs).state_dict()
