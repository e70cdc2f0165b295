"""The learngene: make Aux-Net and Des-Nets of it, save, load.

A learngene file is a safetensors file with the tensors of an Aux-Net and, in its header, what the tensors do not say.
"""

import json
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from common.download import fetch
from common.errors import InputError, one_line, shown
from common.files import atomic_write, read_checkpoint
from models.aux_net import AuxNet
from models.formats import layout, published
from models.formats.class_names import class_names
from models.formats.foreign import without_prefix
from models.formats.weights import find_weights, found_in, weights_of
from models.listed import source_of
from models.meta import WeightsOnMeta
from models.names import parse_arch
from models.preprocessing import DEFAULT, Preprocessing, preprocessing_in
from models.registry import METHODS, choices_of_methods, method_class
from models.resize import adapt_to_images
from models.stateless import fill_buffers, random_vit_weights, vit_from_weights
from models.vit import ViTArch, described

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

DEFAULT_CHOICES = {"width_select": "continuous", "depth_select": "default"}
# part of a ViT → what the names of its weights contain, and no other names
PARTS = {"attn": ".attn.", "mlp": ".mlp.", "norm": "norm", "patch_embed": "patch_embed.", "pos_embed": "pos_embed"}


@dataclass
class Learngene:
    """The trained weights that Des-Nets are initialised from.

    Attributes:
        method: a registered name, such as ``lets`` or ``tleg``.
        tensors: the parameters of the Aux-Net, as listed at the top of the method's file.
        config: the sizes, as in `AuxNet.config`.
        options: the options of stage 1, plain data.
        averaged: whether the weights are an exponential moving average over the training steps.
        origin: the kind of file it was read from, for messages.
        classes: their names, in the order of the logits, if they are known.
        preprocessing: of the images that it was trained on.
    """

    method: str
    tensors: dict[str, Tensor]
    config: dict
    options: dict = field(default_factory=dict)
    averaged: bool = False
    origin: str = "made in memory"
    classes: list[str] | None = None
    preprocessing: Preprocessing = DEFAULT

    @classmethod
    def of(
        cls,
        aux_net: AuxNet,
        options: dict | None = None,
        averaged: bool = False,
        classes: list[str] | None = None,
        preprocessing: Preprocessing = DEFAULT,
    ) -> "Learngene":
        """The learngene inside an Aux-Net. The tensors are the Aux-Net's own, not copies."""
        known = dict(averaged=averaged, classes=classes, preprocessing=preprocessing)
        tensors = without_training_only(aux_net.state_dict(), type(aux_net))
        return cls(aux_net.method, tensors, aux_net.config, options or {}, **known)

    @property
    def header(self) -> dict:
        """What a learngene file states besides the tensors."""
        return {"method": self.method, **self.config, "averaged": self.averaged, "options": self.options}

    @property
    def method_class(self) -> type[AuxNet]:
        """The Aux-Net class of the method.

        Raises:
            InputError: the method is not registered.
        """
        return method_class(self.method)

    @property
    def arch(self) -> ViTArch:
        """The sizes of the Aux-Net."""
        return ViTArch(**self.config["tgt_arch"])

    @property
    def num_classes(self) -> int:
        return self.config["num_classes"]

    @property
    def num_params(self) -> int:
        """The numbers that are trained."""
        return sum(tensor.numel() for tensor in self.tensors.values() if tensor.is_floating_point())

    def __str__(self) -> str:
        src = f"{ViTArch(**self.config['src_arch'])} → " if "src_arch" in self.config else ""
        sizes = f"{src}{self.arch}, {self.num_classes} classes, {self.num_params:,} parameters"
        origin = self.origin + ", averaged weights" * self.averaged
        return f"{self.method_class.title} learngene ({origin}), {sizes}"

    def aux_net(self, **kwargs) -> AuxNet:
        """The Aux-Net that the learngene was trained in, in evaluation mode.

        Args:
            kwargs: passed on to timm's ``VisionTransformer``.
        """
        aux_net = self.empty_aux_net(**kwargs)
        aux_net.load_state_dict({name: t.clone() for name, t in self.tensors.items()}, assign=True)
        fill_buffers(aux_net.vit, aux_net.arch, **kwargs)
        return aux_net.eval()

    def empty_aux_net(self, **kwargs) -> AuxNet:
        """The Aux-Net with its parameters on the meta device: names and shapes only."""
        kwargs = {key: self.config[key] for key in ("num_classes", "in_chans")} | kwargs
        with WeightsOnMeta():
            return self.method_class.from_header(self.config, **kwargs)

    @torch.no_grad()
    def descend(
        self,
        arch: str | ViTArch,
        mapping_layer: Sequence[int] | None = None,
        mapping_layer_coeff: Sequence[int] | None = None,
        width_select: str = "continuous",
        depth_select: str = "default",
        skip_init: Sequence[str] = (),
        num_classes: int | None = None,
        **vit_kwargs,
    ) -> nn.Module:
        """A Des-Net: a timm ViT of ``arch`` sizes and of the kind of this learngene, initialised from it.

        The method refuses choices that it does not have (`AuxNet.choices`). Choices of other methods than the ones
        below are given by name, too.

        Args:
            arch: a name of the grammar, or the sizes.
            mapping_layer: LeTs: for each layer, the Aux layer whose learngene pair is used (default: spread evenly).
            mapping_layer_coeff: LeTs: for each layer, the Aux layer whose coefficient row is used.
            width_select: which rows of the width matrices (LeTs) or which neurons (TLEG) a Des-Net narrower than the
                Aux-Net keeps, one of `WIDTH_SELECTIONS`.
            depth_select: LeTs, without the mapping lists: how they are made, as in `depth_mapping.select_depth`.
            skip_init: `PARTS` that keep timm's initialisation, for the papers' ablation of components.
            num_classes: None keeps the learngene's head; another number than its own re-initialises it.
            vit_kwargs: passed on to timm's ``VisionTransformer``; ``img_size`` and ``patch_size`` replace those of
                ``arch``. For other images than the learngene's, the position embedding and the patch embedding are
                resampled; ``in_chans`` other than its own spreads or sums the channels.

        Raises:
            InputError: the learngene cannot make this Des-Net; the message says what it can.
        """
        arch = parse_arch(arch, self.arch) if isinstance(arch, str) else arch
        arch = replace(
            arch, **{size: vit_kwargs.pop(size) for size in ("img_size", "patch_size") if size in vit_kwargs}
        )
        in_chans = vit_kwargs.pop("in_chans", self.config["in_chans"])
        given = {"mapping_layer": mapping_layer, "mapping_layer_coeff": mapping_layer_coeff}
        given |= {"width_select": width_select, "depth_select": depth_select}
        given |= {name: vit_kwargs.pop(name) for name in choices_of_methods() if name in vit_kwargs}
        weights = self.method_class.descend(self.tensors, self.config, arch, **self.own_choices(given))
        num_classes = self.num_classes if num_classes is None else num_classes
        weights = adapt_to_images(weights, self.arch, arch, in_chans)
        if unknown := set(skip_init) - PARTS.keys():
            raise InputError(f"skip_init names {min(unknown)}: expected {', '.join(PARTS)}")
        shape = dict(num_classes=num_classes, in_chans=in_chans)
        if num_classes != self.num_classes:
            weights = {name: w for name, w in weights.items() if not name.startswith("head")} | new_heads(arch, **shape)
        if skip_init:
            fresh, skipped = random_vit_weights(arch, **shape), tuple(PARTS[part] for part in skip_init)
            weights |= {name: tensor for name, tensor in fresh.items() if any(key in name for key in skipped)}
        vit = vit_from_weights(arch, weights, used=self.tensors.values(), **shape, **vit_kwargs)
        vit.pretrained_cfg = {**vit.pretrained_cfg, **self.preprocessing.as_config()}  # where timm looks it up
        return vit

    def own_choices(self, given: Mapping[str, object]) -> dict[str, object]:
        """The choices of a Des-Net that are ``given``: neither None nor a default.

        Raises:
            InputError: one belongs to another method.
        """
        chosen = {name: value for name, value in given.items() if value not in (None, DEFAULT_CHOICES.get(name))}
        for name in chosen:
            if name not in self.method_class.choices:
                others = " and ".join(choices_of_methods()[name])
                raise InputError(
                    f"{name} belongs to {others}; this is a {self.method_class.title} learngene, "
                    "which has no such choice"
                )
        return chosen

    def check(self, arch: ViTArch, **choices: object) -> None:
        """Raises InputError if it makes no Des-Net of ``arch``; nothing is computed.

        Args:
            choices: as in `descend`.
        """
        shapes = {name: tensor.to("meta") for name, tensor in self.tensors.items()}
        self.method_class.descend(shapes, self.config, arch, **self.own_choices(choices))

    def facts(self, arch: ViTArch, **choices: object) -> dict[str, object]:
        """The choices of a Des-Net of ``arch`` sizes as they are in effect, for a model card."""
        return self.method_class.facts(self.config, arch, **self.own_choices(choices))

    def save(self, path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> None:
        """Write the learngene file atomically.

        Args:
            dtype: of the floating-point tensors in the file; `load_learngene` reads them as float32.

        Raises:
            InputError: a value is too large for ``dtype``.
        """
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}
        cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        if too_large := [name for name, t in tensors.items() if (t.isfinite() & ~cast[name].isfinite()).any()]:
            raise InputError(f"{too_large[0]} has a value that is too large for {dtype}")
        # what is no size stands beside the header, whose entries all readers take for sizes
        metadata = {"learngene": json.dumps(self.header)}
        if self.preprocessing != DEFAULT:
            metadata["preprocessing"] = json.dumps(self.preprocessing.as_config())
        if self.classes:
            metadata["classes"] = json.dumps(self.classes)
        with atomic_write(path) as unfinished:
            save_file(cast, unfinished, metadata=metadata)


def without_training_only(tensors: Mapping[str, Tensor], method: type[AuxNet]) -> dict[str, Tensor]:
    """The tensors of a learngene, from the state of an Aux-Net in stage 1."""
    return {name: tensor for name, tensor in tensors.items() if name not in method.training_only}


def new_heads(arch: ViTArch, num_classes: int, in_chans: int) -> dict[str, Tensor]:
    """The heads of a ViT as timm initialises them; none for 0 classes."""
    shapes = described(arch, num_classes, in_chans).shapes
    weights = {name: torch.zeros(shape) for name, shape in shapes.items() if name.startswith("head")}
    return {name: nn.init.trunc_normal_(w, std=0.02) if w.ndim > 1 else w for name, w in weights.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing
# ---------------------------------------------------------------------------------------------------------------------


def load_learngene(path_or_url: str | os.PathLike, head_dim: int = 64, use_ema: bool = False) -> Learngene:
    """Read this project's learngene file, a checkpoint of this program, or a published checkpoint.

    The content decides which it is, not the name of the file.

    Args:
        path_or_url: a file or an address, as in `fetch`, or a name that ``scripts/learngenes.yaml`` lists.
        head_dim: neurons of an attention head, which published files do not state.
        use_ema: take ``model_ema`` of a checkpoint instead of ``model``.

    Raises:
        InputError: the file is missing, damaged, no learngene, or holds anything but tensors and plain data.
    """
    if head_dim < 1:
        raise InputError(f"head_dim {head_dim} is too small: at least 1")
    path = fetch(source_of(path_or_url), on_hub="learngene_ema.safetensors" if use_ema else "learngene.safetensors")
    content = read_checkpoint(path)
    try:
        gene = _recognise(content, path, head_dim, use_ema)
        _check_tensors(gene)
        gene.classes = class_names(path, content) if gene.num_classes else None
        gene.preprocessing = preprocessing_in(path, content) or DEFAULT
    except InputError as error:
        raise InputError(f"{path} is not a learngene that can be used: {error}") from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"{path} is an incomplete learngene: {type(error).__name__} {one_line(error)}") from error
    return gene


def _recognise(content: Mapping, path: str | os.PathLike, head_dim: int, use_ema: bool) -> Learngene:
    """The learngene in the ``content`` of a file, its tensors not checked yet."""
    header = content.get("learngene", {})
    if not isinstance(header, Mapping):
        raise InputError("its header is no mapping")
    options = published.options_of(header.get("options", content.get("args")))
    # a checkpoint has averaged weights beside the others, learngene_ema.safetensors has no others
    if use_ema and not header.get("averaged"):
        weights, remarks = weights_of(content, path, "model_ema"), []
    else:
        weights, remarks = find_weights(content, path)
    weights = without_prefix(weights, published.keys())
    averaged = use_ema or bool(header.get("averaged"))
    config = {key: value for key, value in header.items() if key not in ("method", "options", "averaged")}
    published_as = published.method_of(weights)
    if not (header or published_as):
        known = any(name.endswith("blocks.0.norm1.weight") for name in weights)
        kind = "the weights of a single ViT, which --finetune takes" if known else "something else"
        titles = " or ".join(cls.title for cls in METHODS.values() if cls.published is not None)
        raise InputError(
            f"it holds {kind} ({found_in(weights)}); expected a file of this project, or a published {titles} "
            "checkpoint"
        )
    method = method_class(published_as or header["method"])
    if published_as and not config:
        config = published.config_of(weights, head_dim, content.get("args"))
    config = method.complete_header(config)
    _check_config(config, method.flags)
    if published_as:
        kind = "published checkpoint" if "optimizer" in content else "published weights"
        weights = layout.rename_from_published(weights, published.layout_of(published_as, config))
    else:
        weights = without_training_only(weights, method)
        kind = "checkpoint of this program" if "optimizer" in content else "learngene file"
    return Learngene(method.method, weights, config, options, averaged, ", ".join([kind, *remarks]))


def _check_config(config: Mapping, flags: Sequence[str] = ()) -> None:
    """Raises InputError unless all sizes are numbers, and none so large that a model cannot even be described.

    Args:
        flags: entries that are true or false.
    """
    for key, value in config.items():
        for name, size in (value if isinstance(value, Mapping) else {key: value}).items():
            expected, kept = "a whole number", type(size) is int
            if name in flags:
                expected, kept = "true or false", isinstance(size, bool)
            elif name == "kind":
                expected, kept = "a name", isinstance(size, str)
            elif name == "mlp_ratio":
                expected, kept = "a number", type(size) in (int, float)
            elif name in ("img_size", "patch_size") and isinstance(size, (list, tuple)):
                expected, kept = "two whole numbers", [type(s) for s in size] == [int, int]
            if not kept:
                raise InputError(f"{name} is {shown(size)!r}, expected {expected}")
        if isinstance(value, Mapping):
            described(ViTArch(**value))  # timm has the kind, in these sizes


def _check_tensors(gene: Learngene) -> None:
    """Raises InputError unless the tensors have the names and shapes of the method at these sizes."""
    empty = gene.empty_aux_net().state_dict()
    floating = {name: t.is_floating_point() for name, t in empty.items()}
    expected = {name: tuple(t.shape) for name, t in empty.items()}
    found = {name: tuple(t.shape) for name, t in gene.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise InputError(f"{name} has shape {found.get(name)}, expected {expected.get(name)}")
        if gene.tensors[name].is_floating_point() != floating[name]:
            kind = "floating-point" if floating[name] else "whole"
            raise InputError(f"{name} holds {gene.tensors[name].dtype}, expected {kind} numbers")
    gene.method_class.check_tensors(gene.tensors, gene.config)


def to_published(gene: Learngene) -> dict[str, Tensor]:
    """The state dict that the published implementation of the method reads.

    Raises:
        InputError: there is no published format, or it cannot express the sizes of this learngene.
    """
    return layout.rename_to_published(gene.tensors, published.layout_of(gene.method, gene.config))


def save_published(gene: Learngene, path: str | os.PathLike) -> None:
    """Write a checkpoint that the published implementation of the method reads, atomically.

    Besides ``model`` it holds the options of stage 1 as the published ``args``, and the header of a learngene file,
    from which `load_learngene` takes what the published format does not state.
    """
    content = {"model": to_published(gene), "args": Namespace(**gene.options), "learngene": gene.header}
    content["preprocessing"] = gene.preprocessing.as_config()
    if gene.classes:
        content["classes"] = gene.classes
    with atomic_write(path) as unfinished:
        torch.save(content, unfinished)
