"""Weights of other programs, and those that timm offers, fitted to a model."""

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

import models
from common.download import fetch
from common.errors import InputError, error_context, one_line
from common.files import read_checkpoint
from common.hub import hub_errors
from models.formats.foreign import fit_names, shapes_in, without_training_parts
from models.formats.levit import rename_levit
from models.formats.published import fuse_qkv
from models.formats.weights import find_weights, found_in, load_weights
from models.kinds import check_tag
from models.resize import adapt_channels
from utils import print_main

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn


def fetch_tag(name: str) -> Path | None:
    """Download the weights that timm offers under a name, if necessary, and return their file.

    Args:
        name: an architecture of timm with its tag; without one, timm's default tag is meant.

    Returns:
        None for the few that are not on the Hub: timm downloads them when the model is created.

    Raises:
        InputError: the tag is unknown or has no weights, or they cannot be downloaded.
    """
    if not timm.is_model(name):
        raise InputError(f"timm has no weights of {name}: expected the name of an architecture of timm's, with its tag")
    check_tag(name)
    offered = get_pretrained_cfg(name)
    if offered is None or not offered.has_weights:
        raise InputError(f"timm has no weights of {name}")
    if not offered.hf_hub_id:
        return None
    # not by timm, which retries for most of a minute without a network, even if the file is in the cache
    return fetch(f"hf-hub:{offered.hf_hub_id}", on_hub=offered.hf_hub_filename or "model.safetensors")


def timm_weights(name: str, **kwargs: int) -> dict[str, torch.Tensor]:
    """The weights of a tag of timm's (`fetch_tag`), through timm's own filter for them.

    Args:
        kwargs: ``num_classes`` and ``img_size``, to which timm fits head and positions.

    Returns:
        The state dict of ``timm.create_model(name, pretrained=True, **kwargs)``.

    Raises:
        InputError: as `fetch_tag`; or the weights do not fit.
    """
    path, overlay = fetch_tag(name), {}
    if path is not None:
        overlay["state_dict"], _ = find_weights(read_checkpoint(path), path)
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    except (*hub_errors(), LookupError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(f"the weights of {name} cannot be loaded: {one_line(error)}") from error
    offered = get_pretrained_cfg(name)
    classes, size = offered.num_classes, max(offered.input_size[1:])
    if kwargs.get("num_classes", classes) != classes:
        print_main(f"timm's {name} has {classes} classes, {of_head(kwargs['num_classes'])}")
    if kwargs.get("img_size", size) != size and hasattr(model, "pos_embed"):
        print_main(f"timm's {name} is for {size} pixels, here are {kwargs['img_size']}: its positions are resampled")
    return model.state_dict()


def load_foreign_weights(model: nn.Module, source: str, option: str, other_head: bool) -> None:
    """Weights from a file or address, through timm's own filter for checkpoints of this architecture.

    Args:
        other_head: re-initialise a head for another number of classes, instead of raising an error.
    """
    with error_context(option):
        if isinstance(model, models.AuxNet):
            gene = models.load_learngene(source, head_dim=model.arch.head_dim)
            print_main(f"{source}: {gene}")
            return load_weights(model, gene.tensors, f"{option} {source}")
        weights = read_foreign_weights(source, model)
    found = list(weights)
    with error_context(f"{option} {source}"):
        weights, remarks = fit_head(fit_images(weights, model, source), model, other_head)
        weights, more = without_training_parts(weights, model.state_dict().keys())
    load_weights(model, weights, f"{option} {source}", found)
    for remark in remarks + more:
        print_main(f"{source}: {remark}")


def read_foreign_weights(source: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights in a file or at an address, under the names of ``model``, and a line for what is not as it is there.

    Raises:
        InputError: there are none.
    """
    path = fetch(source)
    weights, remarks = find_weights(read_checkpoint(path), path)
    weights, more = fit_names(fuse_qkv(weights), model)
    for remark in remarks + more:
        print_main(f"{source}: {remark}")
    return weights


def fit_images(weights: dict[str, torch.Tensor], model: nn.Module, source: str) -> dict[str, torch.Tensor]:
    """Weights of another implementation, resolution or number of channels, fitted to ``model`` by timm's functions."""
    weights = rename_levit(weights, model)
    module = sys.modules[type(model).__module__]
    filter_fn = getattr(module, "checkpoint_filter_fn", getattr(module, "_filter_fn", None))
    first = as_list(model.pretrained_cfg.get("first_conv"))
    positions, kernels = weights.get("pos_embed"), {name: weights.get(f"{name}.weight") for name in first}
    if filter_fn is not None:
        try:
            parameters = inspect.signature(filter_fn).parameters
            layer_scale = {"adapt_layer_scale": True} if "adapt_layer_scale" in parameters else {}  # as in DeiT III
            takes_model = len(parameters) > 1  # as most, but not all of timm's do
            weights = filter_fn(weights, model, **layer_scale) if takes_model else filter_fn(weights)
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as e:
            lacks = "".join(f", it has no {t}" for t in model.state_dict() if "token" in t and t not in weights)
            found = f"found {shapes_in(weights)}"
            raise InputError(f"does not fit {type(model).__name__}{lacks}: {found} ({one_line(e)})") from e
    if positions is not None and "pos_embed" in weights and positions.shape != weights["pos_embed"].shape:
        before, now = tuple(positions.shape), tuple(weights["pos_embed"].shape)
        print_main(f"{source} has positions {before}, here are {now}: they are resampled")
    for name in first:
        kernel, own = weights.get(f"{name}.weight"), model.get_submodule(name).weight
        if kernel is not None and kernels[name] is not None and kernels[name].shape != kernel.shape:
            print_main(
                f"{source} has patches {tuple(kernels[name].shape)}, here are {tuple(kernel.shape)}: they are resampled"
            )
        if kernel is not None and kernel.ndim == own.ndim == 4 and kernel.shape[1] != own.shape[1]:
            print_main(
                f"{source} is for images of {kernel.shape[1]} channel(s), here are {own.shape[1]}: it is adapted"
            )
            weights = {**weights, f"{name}.weight": adapt_channels(kernel, own.shape[1])}
    return weights


def fit_head(
    weights: dict[str, torch.Tensor], model: nn.Module, other_head: bool
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The head of ``model`` in place of none, another kind, or one for another number of classes, and a line for each.

    Raises:
        InputError: that is so, without ``other_head``.
    """
    remarks = []
    for name in as_list(model.pretrained_cfg["classifier"]):
        own = {key: value for key, value in model.state_dict().items() if key.startswith(f"{name}.")}
        theirs = [key for key in weights if key.startswith(f"{name}.")]
        head = weights.get(f"{name}.weight")
        if own and set(theirs) != own.keys():
            if not other_head:
                missing = next((key for key in own if key not in theirs), f"{name} of this kind")
                raise InputError(f"has no {missing}, the head that is needed: found {found_in(weights)}")
            remarks.append(f"it has {'another' if theirs else 'no'} head ({name}): it is re-initialised")
            norm = pooled_norm(weights, model)
            remarks += ["it has no fc_norm: it is re-initialised"] if norm else []
            own |= norm
        elif head is not None and head.ndim and head.shape[0] != model.num_classes:
            if not other_head:
                raise InputError(f"has {head.shape[0]} classes, the data {model.num_classes}")
            remarks.append(f"it has {head.shape[0]} classes, {of_head(model.num_classes)}")
        else:
            continue
        weights = {key: value for key, value in weights.items() if key not in theirs} | own
    return weights, remarks


def of_head(num_classes: int) -> str:
    """What happens to a head for another number of classes, for messages."""
    return f"the data {num_classes}: the head is re-initialised" if num_classes else "the head is left out"


def pooled_norm(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The fc_norm of ``model`` where ``weights`` have none, which belongs to the head in those who leave that out."""
    return {key: t for key, t in model.state_dict().items() if key.startswith("fc_norm.") and key not in weights}


def as_list(names: str | Sequence[str] | None) -> Sequence[str]:
    """Names as timm's configurations give them: one, several, or none."""
    return (names,) if isinstance(names, str) else names or ()
