"""Learngenes: Aux-Nets that train them, Des-Nets that are initialised from them.

gene = models.load_learngene("learngene.safetensors")
vit = gene.descend("deit_base_patch16_224_L12")         # a plain timm VisionTransformer
aux_net = models.create_aux_net("deit_small_patch16_224_L8", "deit_base_patch16_224_L16_H12")
"""

from . import torchvision_ops  # noqa: F401, I001  before timm, which imports torchvision

import timm
from torch import nn

from .aux_net import AuxNet
from .files import (
    check_archive,
    fetch,
    flush_to_disk,
    find_weights,
    found_in,
    optimizer_state_of,
    read_checkpoint,
    read_json,
    read_yaml,
    receive,
    remove_unfinished,
    sha256,
    weights_of,
    written_whole,
)
from .classes import class_names, first_difference
from .directory import AVERAGED_FOLDER, averaged_folder, read_model, save_model
from .foreign import fit_names, shapes_in, without_training_parts
from .hub import check_upload, model_card, upload
from .learngene import PARTS, Learngene, load_learngene, save_published, to_published
from .published import fuse_qkv, is_published, published_moments, published_names
from .levit import rename_levit
from .lets import DEPTH_SCHEMES, WIDTH_SCHEMES, LeTs, mapping_or_default
from .rivals import RIVALS, source_arch
from .selection import WIDTH_SELECTIONS
from .tleg import TLEG
from .vit import (
    GRAMMAR,
    PUBLISHED_NAMES,
    InputError,
    ViTArch,
    adapt_channels,
    create_vit,
    dropout_rates,
    follows_grammar,
    in_a_line,
    is_aux_name,
    nearest,
    parse_arch,
    shown,
    timm_kwargs,
)

__all__ = [
    "AVERAGED_FOLDER",
    "DEPTH_SCHEMES",
    "PARTS",
    "RIVALS",
    "TLEG",
    "WIDTH_SCHEMES",
    "WIDTH_SELECTIONS",
    "AuxNet",
    "InputError",
    "LeTs",
    "Learngene",
    "ViTArch",
    "adapt_channels",
    "averaged_folder",
    "check_archive",
    "check_upload",
    "class_names",
    "create_aux_net",
    "create_model",
    "create_vit",
    "dropout_rates",
    "fetch",
    "find_weights",
    "first_difference",
    "fit_names",
    "flush_to_disk",
    "follows_grammar",
    "found_in",
    "fuse_qkv",
    "in_a_line",
    "is_aux_name",
    "is_published",
    "load_learngene",
    "mapping_or_default",
    "model_card",
    "nearest",
    "optimizer_state_of",
    "parse_arch",
    "published_moments",
    "published_names",
    "read_checkpoint",
    "read_json",
    "read_model",
    "read_yaml",
    "receive",
    "remove_unfinished",
    "rename_levit",
    "save_model",
    "save_published",
    "sha256",
    "shapes_in",
    "shown",
    "source_arch",
    "timm_kwargs",
    "to_published",
    "upload",
    "weights_of",
    "without_training_parts",
    "written_whole",
]


def create_model(name: str, **kwargs) -> nn.Module:
    """Any name of this project's grammar (`parse_arch`), or any timm name.

    Args:
        kwargs: passed on to the model, as in ``timm.create_model``.

    Raises:
        InputError: the name is neither; the message shows the grammar and the nearest names.
    """
    if follows_grammar(name):
        return (TLEG if is_aux_name(name) else create_vit)(parse_arch(name), **kwargs)
    if not timm.is_model(name):
        near = nearest(name, (*PUBLISHED_NAMES, *timm.list_models()))
        raise InputError(f"unknown model {name!r}: expected {GRAMMAR}, or a name of timm's{near}")
    return timm.create_model(name, **kwargs)


def create_aux_net(src_arch: str | ViTArch, tgt_arch: str | ViTArch, **kwargs) -> LeTs:
    """An untrained LeTs Aux-Net of ``tgt_arch`` sizes over a learngene of ``src_arch`` sizes.

    Args:
        kwargs: as in `LeTs`.

    Raises:
        InputError: a name does not parse, or the sizes do not fit each other.
    """
    src, tgt = (parse_arch(a) if isinstance(a, str) else a for a in (src_arch, tgt_arch))
    return LeTs(src, tgt, **kwargs)
