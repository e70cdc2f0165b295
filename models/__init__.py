"""Learngenes: Aux-Nets that train them, Des-Nets that are initialised from them.

gene = models.load_learngene("learngene.safetensors")
vit = gene.descend("deit_base_patch16_224_L12")         # a plain timm VisionTransformer
aux_net = models.create_aux_net("deit_small_patch16_224_L8", "deit_base_patch16_224_L16_H12")
"""

from common import torchvision_ops  # noqa: F401, I001  before timm, which imports torchvision

import timm
from torch import nn

from common.errors import InputError, nearest
from models.aux_net import AuxNet
from models.elastic import Elastic
from models.learngene import Learngene, load_learngene
from models.lets import LeTs
from models.preprocessing import Preprocessing
from models.registry import register_method
from models.sizes import SizeSampler
from models.supernet import Supernet
from models.tleg import TLEG
from models.kinds import check_tag
from models.names import (
    GRAMMAR,
    PUBLISHED_NAMES,
    follows_grammar,
    is_aux_name,
    is_sized_name,
    is_vit,
    name_of,
    parse_arch,
)
from models.vit import ViTArch, create_vit

__all__ = [
    "TLEG",
    "AuxNet",
    "Elastic",
    "InputError",
    "LeTs",
    "Learngene",
    "Preprocessing",
    "SizeSampler",
    "Supernet",
    "ViTArch",
    "create_aux_net",
    "create_model",
    "create_vit",
    "follows_grammar",
    "is_aux_name",
    "is_vit",
    "load_learngene",
    "name_of",
    "parse_arch",
    "register_method",
]


def create_model(name: str, **kwargs) -> nn.Module:
    """A model of this project's grammar (`parse_arch`) or of timm.

    Args:
        kwargs: passed on to the model, as in ``timm.create_model``.

    Raises:
        InputError: the name is neither; the message shows the grammar and the nearest names.
    """
    if is_sized_name(name):
        if kwargs.pop("pretrained", False):
            raise InputError(f"{name} has no pretrained weights of its own: initialise it from a learngene")
        return create_vit(parse_arch(name), **kwargs)
    if follows_grammar(name):
        return (TLEG if is_aux_name(name) else create_vit)(parse_arch(name), **kwargs)
    if not timm.is_model(name):
        near = nearest(name, (*PUBLISHED_NAMES, *timm.list_models()))
        raise InputError(f"unknown model {name!r}: expected {GRAMMAR}, or a name of timm's{near}")
    check_tag(name)
    return timm.create_model(name, **kwargs)


def create_aux_net(src_arch: str | ViTArch, tgt_arch: str | ViTArch | None = None, **kwargs) -> LeTs | Elastic:
    """An untrained LeTs Aux-Net of ``tgt_arch`` sizes over a learngene of ``src_arch`` sizes.

    Args:
        tgt_arch: ``@L16-H12`` alone is of the kind of ``src_arch``. Without it, the result is `Elastic`.
        kwargs: as in `LeTs` or `Elastic`.

    Raises:
        InputError: a name does not parse, or the sizes do not fit each other.
    """
    src = parse_arch(src_arch) if isinstance(src_arch, str) else src_arch
    if tgt_arch is None:
        return Elastic(src, **kwargs)
    tgt = parse_arch(tgt_arch, src) if isinstance(tgt_arch, str) else tgt_arch
    return LeTs(src, tgt, **kwargs)
