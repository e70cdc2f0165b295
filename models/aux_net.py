"""The Aux-Net of every method: a ViT whose weights are computed from a learngene in each forward pass."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from models.figures import Figures, Points, root_mean_square
from models.formats.layout import PublishedFormat
from models.names import parse_arch
from models.stateless import move_buffers, recompute_activations, vit_from_weights, vit_without_weights
from models.vit import ViTArch

import torch
from torch import Tensor, nn
from torch.func import functional_call


class AuxNet(nn.Module, ABC):
    """A ViT without weights of its own: its parameters are those of the learngene, and `expand` computes the rest.

    A method is a subclass of this one. All other code asks the class and knows no method by name.

    Attributes:
        arch: the sizes of the ViT.
        vit: the ViT, its weights on the meta device. It is no registered submodule, so that parameters, state dict,
            gradients and averages of an Aux-Net are those of the learngene alone.
        method: the name in learngene files and of ``--method``; `register_method` sets it.
        title: the name in messages.
        choices: arguments of `Learngene.descend` that the method takes; others are refused.
        parts: groups of parameters: label → what their names are, or begin with up to an underscore.
        published: the published format of its learngenes, or None.
        training_only: parameters that stage 1 alone needs: they are no part of the learngene.
        flags: entries of `config` that are true or false. All others are whole numbers, or sizes of a ViT.
        arch_options: options of main.py that give the sizes in stage 1, and what they name on a model card.
        options: options of main.py that stage 1 of no other method takes.
        defaults: what options of stage 1 are unless they are given.
        usage: how a command asks for stage 1, for messages; default: ``--method`` and the name.
        measured: accuracies of its ViTs in results/family, for model cards; None if the study has none.
    """

    method: str
    title: str
    choices: tuple[str, ...] = ("width_select",)
    parts: Mapping[str, Sequence[str]] = {}
    published: PublishedFormat | None = None
    training_only: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    arch_options: Mapping[str, str] = {"model": "architecture"}
    options: tuple[str, ...] = ()
    defaults: Mapping[str, object] = {
        "descendants": 0,
        "descendant_weight": 0.5,
        "descendant_sampling": "random",
        "descendant_warmup_epochs": 0,
        "descendant_coarse_to_fine": False,
        "chain_weight": 0.0,
        "distillation_mean": "logits",
    }
    usage: str | None = None
    measured: str | None = None

    def __init__(self, arch: ViTArch, vit_options: dict, **kwargs):
        """
        Args:
            arch: the sizes of the ViT.
            vit_options: how the Aux-Net of this method differs from the ViT of `create_vit`.
            kwargs: passed on to timm's class; ``img_size`` and ``patch_size`` replace ``arch``'s.
        """
        super().__init__()
        sizes = {key: kwargs.pop(key) for key in ("img_size", "patch_size") if key in kwargs}
        self.arch = replace(arch, **sizes)
        self._vit_options, self._des_options = {**vit_options, **kwargs}, kwargs
        self.__dict__["vit"] = vit_without_weights(self.arch, **self._vit_options)

    # -----------------------------------------------------------------------------------------------------------------
    # What a method defines
    # -----------------------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def from_config(cls, config: object, **vit: object) -> "AuxNet":
        """The untrained Aux-Net of stage 1.

        Args:
            config: an object whose attributes are the options of main.py, as in `training.config.ModelConfig`.
            vit: passed on to timm's class.

        Raises:
            InputError: the options describe no Aux-Net.
        """

    @classmethod
    @abstractmethod
    def from_header(cls, header: Mapping, **vit: object) -> "AuxNet":
        """The Aux-Net of a learngene file, its parameters not loaded yet.

        Args:
            header: the sizes that the file states, as in `config`.
            vit: passed on to timm's class.
        """

    @abstractmethod
    def expand(self) -> dict[str, Tensor]:
        """The state dict of the ViT as a differentiable function of the learngene."""

    @classmethod
    @abstractmethod
    def descend(
        cls, tensors: dict[str, Tensor], header: Mapping, arch: ViTArch, **choices: object
    ) -> dict[str, Tensor]:
        """The state dict of a Des-Net as a differentiable function of the learngene.

        Args:
            tensors: the parameters of the Aux-Net.
            header: the sizes of the learngene, as in `config`.
            arch: the sizes of the Des-Net.
            choices: some of `choices`; each has a default.

        Raises:
            InputError: the learngene cannot make this Des-Net.
        """

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that stay out of weight decay, in addition to those with one axis."""

    # -----------------------------------------------------------------------------------------------------------------
    # What a method may define
    # -----------------------------------------------------------------------------------------------------------------

    @classmethod
    def is_meant_by(cls, config: object) -> bool:
        """Whether options without ``--method`` ask for stage 1 of this method."""
        return False

    @classmethod
    def check_config(cls, config: object) -> None:
        """Raises InputError where options of stage 1 exclude each other; ``arch_options`` are given."""

    @classmethod
    def check_names(cls, names: Sequence[str]) -> None:
        """Raises InputError unless ``names`` are the architectures of learngenes of this method."""

    @classmethod
    def archs_from_config(cls, config: object) -> tuple[ViTArch, ViTArch]:
        """The smallest Des-Net that stage 1 trains unless other sizes are given, and the Aux-Net."""
        aux = parse_arch(config.model)
        return replace(aux, depth=1), aux

    @classmethod
    def complete_header(cls, header: dict) -> dict:
        """``header`` with the entries that files of earlier versions do not have."""
        return header

    @classmethod
    def check_tensors(cls, tensors: Mapping[str, Tensor], header: Mapping) -> None:
        """Raises InputError where tensors of the right names and shapes, as a file has them, cannot be used."""

    @classmethod
    def archs(cls, header: Mapping) -> dict[str, ViTArch]:
        """The ``Aux-Net`` of a learngene, and before it the ViT whose heads the learngene stores, if that differs."""
        return {"Aux-Net": ViTArch(**header["tgt_arch"])}

    @classmethod
    def remarks(cls, tensors: Mapping[str, Tensor], header: Mapping) -> list[str]:
        """Lines on the sizes of a learngene, besides those of `archs`."""
        return []

    @classmethod
    def facts(cls, header: Mapping, arch: ViTArch, **choices: object) -> dict[str, object]:
        """The choices of a Des-Net for a model card, where defaults depend on its sizes."""
        return {}

    @classmethod
    def figures(cls, tensors: Mapping[str, Tensor], header: Mapping) -> Figures:
        """What to draw of a learngene."""
        parts = {label: cls.tensors_of(label, tensors) for label in cls.parts}
        sizes = [root_mean_square(torch.cat([t.flatten() for t in part])) for part in parts.values()]
        return [Points({"parameters": {"": sizes}}, [*parts], "part", "root mean square of the elements")]

    def coefficients(self) -> dict[str, float]:
        """Single numbers of the learngene to log after each epoch, each under a name."""
        return {}

    def des_vit(self, arch: ViTArch) -> nn.Module:
        """A Des-Net of ``arch`` without weights, to be run with `des_weights` in stage 1."""
        vit = vit_without_weights(arch, **self._des_options)
        move_buffers(vit, next(self.parameters()).device)
        return vit

    def des_weights(self, arch: ViTArch) -> dict[str, Tensor]:
        """The weights for `des_vit`, with gradients."""
        return self.descend(dict(self.named_parameters()), self.config, arch)

    # -----------------------------------------------------------------------------------------------------------------
    # What all methods share
    # -----------------------------------------------------------------------------------------------------------------

    @classmethod
    def tensors_of(cls, part: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors of one of `parts`."""
        stems = cls.parts[part]
        return [t for name, t in tensors.items() if any(name == s or name.startswith(f"{s}_") for s in stems)]

    @property
    def config(self) -> dict:
        """The sizes that the learngene file states besides the tensors, as plain data."""
        return {"tgt_arch": self.arch.as_dict(), "num_classes": self.num_classes, "in_chans": self.in_chans}

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
        self.vit.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AuxNet":
        super()._apply(fn, recurse)
        move_buffers(self.vit, next(self.parameters()).device)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in the backward pass instead of keeping them."""
        recompute_activations(self.vit, enable)

    @torch.no_grad()
    def to_vit(self) -> nn.Module:
        """The same function as a plain ViT with weights of its own, in evaluation mode."""
        used = [*self.parameters(), *self.buffers()]
        return vit_from_weights(self.arch, self.expand(), used, **self._vit_options).eval()

    def add_parameters(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))
