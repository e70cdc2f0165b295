"""Entry points of torch.hub: every published architecture, and learngenes from files or addresses.

    vit = torch.hub.load(path, "deit_small_patch16_224_L8", source="local", num_classes=10)
    gene = torch.hub.load(path, "learngene", "learngene.safetensors", source="local")
    vit = gene.descend("deit_small_patch16_224_L6")

``path`` is a folder that holds this repository; without ``source="local"`` it is its name on GitHub. The models have
random weights: trained ones come from a learngene, or from a model folder that timm reads.
"""

import collections.abc
import os
import pathlib

import models

import timm
from torch import nn

if pathlib.Path(models.__file__).resolve().parents[1] != pathlib.Path(__file__).resolve().parent:
    raise ImportError(f"the package 'models' is already imported from {models.__file__}: load this repository first")

import models.names

# Every public callable of this module is an entry point, so only modules are imported.

# What `import models` needs; torch.hub reports the ones that are not installed.
dependencies = ["filelock", "huggingface_hub", "numpy", "safetensors", "timm", "torch", "torchvision", "tqdm", "yaml"]


def learngene(file_or_address: str | os.PathLike, head_dim: int = 64, use_ema: bool = False) -> models.Learngene:
    """A learngene, from which ``learngene.descend(arch)`` initialises ViTs.

    Args:
        file_or_address: a file of this project, a published checkpoint, an ``https://`` or ``hf-hub:`` address, or a
            name of ``scripts/learngenes.yaml``.
        head_dim: neurons of an attention head, which published checkpoints do not record.
        use_ema: load the averaged weights of a checkpoint.

    Raises:
        InputError: the file is missing, damaged, or not a learngene.
    """
    return models.load_learngene(file_or_address, head_dim=head_dim, use_ema=use_ema)


def _entry_point(name: str) -> collections.abc.Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        return timm.create_model(name, pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"An untrained {name}: {models.parse_arch(name)}. ``kwargs`` are those of ``timm.create_model``."
    return create


globals().update({name: _entry_point(name) for name in models.names.PUBLISHED_NAMES})
