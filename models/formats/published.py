"""Files of the published implementations: learngenes of any method, trained Des-Nets, and training states.

A published checkpoint is ``{"model": …, "model_ema": …, "optimizer": …, "args": Namespace, …}``. Each method says in
`AuxNet.published` how its tensors are laid out there.
"""

import os
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from common.errors import InputError, one_line
from models.formats.layout import Layout, PublishedFormat, rename_from_published
from models.formats.weights import weights_of
from models.registry import METHODS, method_class

import torch
from torch import Tensor

DES_NET_KEY = "blocks.0.attn.q.weight"

# ---------------------------------------------------------------------------------------------------------------------
# Learngenes
# ---------------------------------------------------------------------------------------------------------------------


def keys() -> set[str]:
    """The keys by which published learngenes are recognised."""
    return {cls.published.key for cls in METHODS.values() if cls.published is not None}


def method_of(weights: Mapping[str, Tensor]) -> str | None:
    """The method whose published format ``weights`` have, or None."""
    for name, cls in METHODS.items():
        if cls.published is not None and cls.published.key in weights:
            return name
    return None


def format_of(method: str) -> PublishedFormat:
    """The published format of a method.

    Raises:
        InputError: it has none.
    """
    cls = method_class(method)
    if cls.published is None:
        raise InputError(f"{cls.title} has no published format: its learngenes are .safetensors files of this project")
    return cls.published


def config_of(weights: Mapping[str, Tensor], head_dim: int, args: object = None) -> dict:
    """The sizes of a published learngene, as in `AuxNet.config`.

    Args:
        head_dim: neurons of an attention head, which the weights do not show.
        args: the options that the file recorded.

    Raises:
        InputError: the width is no multiple of ``head_dim``.
    """
    return format_of(method_of(weights)).config(weights, head_dim, args)


def layout_of(method: str, config: Mapping) -> Layout:
    """The published layout of a learngene with the sizes in ``config`` (`AuxNet.config`).

    Raises:
        InputError: the method has no published format, or the format cannot express these sizes.
    """
    return format_of(method).layout(config)


def options_of(args: object) -> dict:
    """The options that a published checkpoint recorded, without those that are no plain data."""
    recorded = vars(args) if isinstance(args, Namespace) else args if isinstance(args, Mapping) else {}
    plain = (str, int, float, bool, type(None))
    recorded = {name: value for name, value in recorded.items() if isinstance(name, plain)}  # tuples can be long text
    return {
        str(name): list(value) if isinstance(value, (list, tuple)) else value
        for name, value in recorded.items()
        if isinstance(value, plain) or (isinstance(value, (list, tuple)) and all(isinstance(v, plain) for v in value))
    }


# ---------------------------------------------------------------------------------------------------------------------
# Trained Des-Nets, and training states
# ---------------------------------------------------------------------------------------------------------------------


def fuse_qkv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a published LeTs Des-Net, which keeps ``attn.q``, ``attn.k``, ``attn.v`` apart, under timm's names."""
    fused = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.*\.attn\.)([qkv])\.(weight|bias)", name):
            stem, letter, kind = match.groups()
            parts = [tensors.get(f"{stem}{part}.{kind}") for part in "qkv"]
            if any(part is None or part.shape != tensor.shape for part in parts):
                raise InputError(f"{stem}q, k and v do not fit each other: expected three tensors of one shape")
            if letter == "q":
                fused[f"{stem}qkv.{kind}"] = torch.cat(parts)
        else:
            fused[name] = tensor
    return fused


Renaming = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def is_published(content: Mapping) -> bool:
    """Whether a published implementation wrote the checkpoint: those record their options in a Namespace."""
    return isinstance(content.get("args"), Namespace)


def published_names(content: Mapping, path: str | os.PathLike, head_dim: int) -> Renaming:
    """The function that renames the weights of a checkpoint, and their moments, to the names used here.

    Args:
        content: what `read_checkpoint` read from ``path``. The names of this program's checkpoints stay.
        head_dim: neurons of an attention head, for a learngene.

    Raises:
        InputError: a learngene is incomplete.
    """
    weights = weights_of(content, path)
    if method := method_of(weights):
        try:
            return partial(
                rename_from_published, layout=layout_of(method, config_of(weights, head_dim, content.get("args")))
            )
        except (KeyError, ValueError, IndexError, ArithmeticError) as error:
            raise InputError(f"{path} is an incomplete learngene: {one_line(error)}") from error
    return fuse_qkv if DES_NET_KEY in weights else dict


def published_moments(
    state: Mapping, weights: Mapping[str, Tensor], rename: Renaming, names: Sequence[str]
) -> dict[int, dict[str, Tensor]]:
    """The state of a published checkpoint's AdamW, for parameters with the names used here.

    timm numbers the parameters of an optimiser group by group, those without weight decay (vectors, biases, position
    embedding) first, each in the order of the state dict.

    Args:
        weights: the checkpoint's, under their published names.
        rename: from published names to those used here.
        names: of the parameters here, in the order of their optimiser.

    Raises:
        InputError: numbers and shapes of the state are not those of ``weights``.
    """
    undecayed = [n for n, t in weights.items() if t.ndim <= 1 or n.endswith(".bias") or n == "pos_embed"]
    order = undecayed + [n for n in weights if n not in set(undecayed)]
    if len(state) != len(order):
        raise InputError(f"its optimizer has the state of {len(state)} parameters, its model {len(order)}")
    for number, name in enumerate(order):
        if state[number]["exp_avg"].shape != weights[name].shape:
            raise InputError(f"its optimizer's parameter {number} does not have the shape of {name}")
    moments = {
        moment: rename({name: state[number][moment] for number, name in enumerate(order)})
        for moment in ("exp_avg", "exp_avg_sq")
    }
    step = torch.tensor(float(state[0]["step"]))
    return {n: {"step": step.clone(), **{m: moments[m][name] for m in moments}} for n, name in enumerate(names)}
