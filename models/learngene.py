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
from models import lets, tleg
from models.aux_net import AuxNet, WeightsOnMeta, random_vit_weights, vit_from_weights
from models.formats import published
from models.formats.class_names import class_names
from models.formats.foreign import without_prefix
from models.formats.weights import find_weights, found_in, weights_of
from models.vit import ViTArch, adapt_to_images, parse_arch

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

METHODS = {"lets": "LeTs", "tleg": "TLEG"}
# part of a ViT → what stands in the names of its weights, and in no others
PARTS = {"attn": ".attn.", "mlp": ".mlp.", "norm": "norm", "patch_embed": "patch_embed.", "pos_embed": "pos_embed"}


@dataclass
class Learngene:
    """The trained weights that Des-Nets are initialised from.

    Attributes:
        method: ``lets`` or ``tleg``.
        tensors: the parameters of the Aux-Net, as listed at the top of ``lets.py`` and ``tleg.py``.
        config: the sizes, as in `AuxNet.config`; for LeTs also `lets.EXPANSION`.
        options: what stage 1 recorded of its own options, plain data.
        averaged: whether these are the weights' exponential moving average over the training steps.
        origin: what kind of file it was read from, for people to read.
        classes: their names, in the order of the logits, where they are known.
    """

    method: str
    tensors: dict[str, Tensor]
    config: dict
    options: dict = field(default_factory=dict)
    averaged: bool = False
    origin: str = "made in memory"
    classes: list[str] | None = None

    @classmethod
    def of(
        cls,
        aux_net: AuxNet,
        options: dict | None = None,
        averaged: bool = False,
        classes: list[str] | None = None,
    ) -> "Learngene":
        """The learngene inside an Aux-Net. The tensors are the Aux-Net's own, not copies."""
        sizes = aux_net.config
        return cls(aux_net.method, aux_net.state_dict(), sizes, options or {}, averaged, classes=classes)

    @property
    def header(self) -> dict:
        """What a learngene file says besides the tensors."""
        return {"method": self.method, **self.config, "averaged": self.averaged, "options": self.options}

    @property
    def arch(self) -> ViTArch:
        """The sizes of the Aux-Net."""
        return ViTArch(**self.config["tgt_arch"])

    @property
    def num_classes(self) -> int:
        return self.config["num_classes"]

    def __str__(self) -> str:
        src = f"{ViTArch(**self.config['src_arch'])} → " if "src_arch" in self.config else ""
        params = sum(t.numel() for t in self.tensors.values())
        sizes = f"{src}{self.arch}, {self.num_classes} classes, {params:,} parameters"
        origin = self.origin + ", averaged weights" * self.averaged
        return f"{METHODS[self.method]} learngene ({origin}), {sizes}"

    def aux_net(self, **kwargs) -> AuxNet:
        """The Aux-Net that the learngene was trained in, in evaluation mode.

        Args:
            kwargs: passed on to timm's ``VisionTransformer``.
        """
        aux_net = self.empty_aux_net(**kwargs)
        aux_net.load_state_dict({name: t.clone() for name, t in self.tensors.items()}, assign=True)
        return aux_net.eval()

    def empty_aux_net(self, **kwargs) -> AuxNet:
        """The Aux-Net with its parameters on the meta device: names and shapes only."""
        kwargs = {key: self.config[key] for key in ("num_classes", "in_chans")} | kwargs
        with WeightsOnMeta():
            if self.method == "tleg":
                return tleg.TLEG(self.arch, **kwargs)
            expansion = {key: self.config[key] for key in lets.EXPANSION}
            return lets.LeTs(ViTArch(**self.config["src_arch"]), self.arch, **expansion, **kwargs)

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
    ) -> VisionTransformer:
        """A Des-Net: a plain timm ViT of ``arch`` sizes, initialised from this learngene.

        Args:
            arch: a name of the grammar, or the sizes.
            mapping_layer: LeTs: for each layer, the Aux layer whose learngene pair is used (default: spread evenly).
            mapping_layer_coeff: LeTs: for each layer, the Aux layer whose coefficient row is used.
            width_select: which rows of the width matrices (LeTs) or which neurons (TLEG) a Des-Net narrower than the
                Aux-Net keeps, one of `WIDTH_SELECTIONS`.
            depth_select: LeTs, without the mapping lists: how they are made, as in `lets.select_depth`.
            skip_init: `PARTS` that stay as timm initialises them, for the papers' ablation of components.
            num_classes: ``None`` keeps the learngene's head, another number than its own gives a fresh one.
            vit_kwargs: passed on to timm's ``VisionTransformer``; ``img_size`` and ``patch_size`` replace those of
                ``arch``. For other images than the learngene's, the position embedding and the patch embedding are
                resampled; ``in_chans`` other than its own spreads or sums the channels.

        Raises:
            InputError: the learngene cannot make this Des-Net; the message says what it can.
        """
        arch = parse_arch(arch) if isinstance(arch, str) else arch
        arch = replace(
            arch, **{size: vit_kwargs.pop(size) for size in ("img_size", "patch_size") if size in vit_kwargs}
        )
        in_chans = vit_kwargs.pop("in_chans", self.config["in_chans"])
        if self.method == "lets":
            mapping = mapping_layer, mapping_layer_coeff, width_select, depth_select
            weights = lets.descend(self.tensors, self.config, arch, *mapping)
        else:
            for name, given in (
                ("mapping_layer", mapping_layer is not None),
                ("mapping_layer_coeff", mapping_layer_coeff is not None),
                ("depth_select", depth_select != "default"),
            ):
                if given:
                    raise InputError(f"{name} belongs to LeTs; this is a TLEG learngene, which has no such choice")
            weights = tleg.descend(self.tensors, self.config, arch, width_select)
        if num_classes not in (None, self.num_classes):
            head = weights["head.weight"]
            weights["head.weight"] = nn.init.trunc_normal_(head.new_empty(num_classes, arch.width), std=0.02)
            weights["head.bias"] = head.new_zeros(num_classes)
        weights = adapt_to_images(weights, arch, in_chans)
        if unknown := set(skip_init) - PARTS.keys():
            raise InputError(f"skip_init names {min(unknown)}: expected {', '.join(PARTS)}")
        if skip_init:
            fresh = random_vit_weights(arch, num_classes=len(weights["head.bias"]), in_chans=in_chans)
            skipped = tuple(PARTS[part] for part in skip_init)
            weights |= {name: tensor for name, tensor in fresh.items() if any(key in name for key in skipped)}
        return vit_from_weights(arch, weights, num_classes=len(weights["head.bias"]), in_chans=in_chans, **vit_kwargs)

    def save(self, path: str | os.PathLike) -> None:
        """Write the learngene file, whole or not at all."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}
        metadata = {"learngene": json.dumps(self.header)}
        if self.classes:
            metadata["classes"] = json.dumps(self.classes)  # beside the header, which holds sizes for all readers
        with atomic_write(path) as unfinished:
            save_file(tensors, unfinished, metadata=metadata)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing
# ---------------------------------------------------------------------------------------------------------------------


def load_learngene(path_or_url: str | os.PathLike, head_dim: int = 64, use_ema: bool = False) -> Learngene:
    """Read this project's learngene file, a checkpoint of this program, or a published LeTs or TLEG checkpoint.

    Which of them it is shows in the content, whatever the name of the file.

    Args:
        path_or_url: a file or an address, as in `fetch`.
        head_dim: neurons of an attention head, which the published files do not say.
        use_ema: take ``model_ema`` of a checkpoint instead of ``model``.

    Raises:
        InputError: the file is missing, damaged, no learngene, or holds anything but tensors and plain data.
    """
    if head_dim < 1:
        raise InputError(f"head_dim {head_dim} is too small: at least 1")
    path = fetch(path_or_url, on_hub="learngene_ema.safetensors" if use_ema else "learngene.safetensors")
    content = read_checkpoint(path)
    try:
        gene = _recognise(content, path, head_dim, use_ema)
        _check_tensors(gene)
        gene.classes = class_names(path, content)
    except InputError as error:
        raise InputError(f"{path} is not a learngene that can be used: {error}") from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"{path} is an incomplete learngene: {type(error).__name__} {one_line(error)}") from error
    return gene


def _recognise(content: Mapping, path: str | os.PathLike, head_dim: int, use_ema: bool) -> Learngene:
    """The learngene in the ``content`` of a file; its tensors can still have any names and shapes."""
    header = content.get("learngene", {})
    if not isinstance(header, Mapping):
        raise InputError("its header is no mapping")
    options = published.options_of(header.get("options", content.get("args")))
    # what is averaged stands beside the rest in a checkpoint, and alone in learngene_ema.safetensors
    if use_ema and not header.get("averaged"):
        weights, remarks = weights_of(content, path, "model_ema"), []
    else:
        weights, remarks = find_weights(content, path)
    weights = without_prefix(weights, published.KEYS)
    averaged = use_ema or bool(header.get("averaged"))
    config = {key: value for key, value in header.items() if key not in ("method", "options", "averaged")}
    if "src_arch" in config:
        config.setdefault("group_size", 2)  # which earlier files do not state
        config.setdefault("full_width", False)
    if method := published.method_of(weights):
        config = config or published.config_of(weights, head_dim, content.get("args"))
        _check_config(config)
        tensors = published.rename_from_published(weights, published.layout_of(method, config))
        kind = "published checkpoint" if "optimizer" in content else "published weights"
        return Learngene(method, tensors, config, options, averaged, ", ".join([kind, *remarks]))
    if not header:
        known = any(name.endswith("blocks.0.norm1.weight") for name in weights)
        kind = "the weights of a single ViT, which --finetune takes" if known else "something else"
        raise InputError(
            f"it holds {kind} ({found_in(weights)}); expected a file of this project, or a published LeTs or TLEG "
            "checkpoint"
        )
    if header["method"] not in METHODS:
        raise InputError(f"unknown method {shown(header['method'])!r}")
    _check_config(config)
    kind = "checkpoint of this program" if "optimizer" in content else "learngene file"
    return Learngene(header["method"], weights, config, options, averaged, ", ".join([kind, *remarks]))


def _check_config(config: Mapping) -> None:
    """Raises InputError unless all sizes are whole numbers, and none so large that a model cannot even be described."""
    for key, value in config.items():
        for name, size in (value if isinstance(value, Mapping) else {key: value}).items():
            if type(size) is not (bool if name == "full_width" else int):
                expected = "true or false" if name == "full_width" else "a whole number"
                raise InputError(f"{name} is {shown(size)!r}, expected {expected}")
        if isinstance(value, Mapping):
            ViTArch(**value)


def _check_tensors(gene: Learngene) -> None:
    """Raises InputError unless the tensors have the names and shapes of the method at these sizes."""
    expected = {name: tuple(t.shape) for name, t in gene.empty_aux_net().state_dict().items()}
    found = {name: tuple(t.shape) for name, t in gene.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise InputError(f"{name} has shape {found.get(name)}, expected {expected.get(name)}")
        if not gene.tensors[name].is_floating_point():
            raise InputError(f"{name} holds {gene.tensors[name].dtype}, expected floating-point numbers")


def to_published(gene: Learngene) -> dict[str, Tensor]:
    """The state dict that the published implementation of the method reads."""
    return published.rename_to_published(gene.tensors, published.layout_of(gene.method, gene.config))


def save_published(gene: Learngene, path: str | os.PathLike) -> None:
    """Write a checkpoint that the published implementation of the method reads, whole or not at all.

    Besides ``model`` it holds the recorded options as the published ``args``, and this project's header, from which
    `load_learngene` restores what the published format cannot say.
    """
    content = {"model": to_published(gene), "args": Namespace(**gene.options), "learngene": gene.header}
    if gene.classes:
        content["classes"] = gene.classes
    with atomic_write(path) as unfinished:
        torch.save(content, unfinished)
