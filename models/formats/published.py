"""The formats of the published implementations: learngenes of both methods, and trained Des-Nets.

A published checkpoint is ``{"model": …, "model_ema": …, "optimizer": …, "args": Namespace, …}``. The tables below say
where each of its tensors has its place here; reading and writing both follow them.
"""

import math
import os
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial

from common.errors import InputError, one_line
from models import lets, tleg
from models.formats.weights import weights_of
from models.vit import AUX_DEPTH, ViTArch, parse_arch

import torch
from torch import Tensor

LETS_KEY = "patch_embed.trans_width_emb.trans_weight"  # which method a file is of, shows in one of its keys
TLEG_KEY = "blocks.block.norm1.instances.0.weight_ilayer"
DES_NET_KEY = "blocks.0.attn.q.weight"
KEYS = {LETS_KEY, TLEG_KEY}

Layout = dict[str, tuple[str, tuple[int, ...]]]


def lets_layout(depth: int, rows: Sequence[int]) -> Layout:
    """Published LeTs key → name of the tensor here, and the place in its stacked axes."""
    layer = dict(q="attn_q", k="attn_k", v="attn_v", proj="attn_proj", fc1="mlp_fc1", fc2="mlp_fc2")
    layout = {"pos_embed": ("pos_embed", ())}
    for kind in ("weight", "bias"):
        layout[f"__sm_patch_embed_proj_{kind}"] = (f"patch_embed_{kind}", ())
        layout[f"__sm_fc_norm_{kind}"] = (f"fc_norm_{kind}", ())
        layout[f"__sm_head_{kind}"] = (f"head_{kind}", ())
        for m, name in enumerate(lets.MODULES):
            for j in range(depth):
                layout[f"__sm_{j}_{layer.get(name, name)}_{kind}"] = (f"{name}_{kind}", (j,))
            for k, r in enumerate(rows):
                module = layer.get(name, name).replace("_", ".")
                key = f"blocks.{r}.{module}.trans_depth_weight.trans_{kind}"
                layout[key] = ("g" if kind == "weight" else "h", (m, k))
    layout[LETS_KEY] = ("E", ())
    layout["trans_width_cls.trans_weight"] = ("C", ())
    for name, matrix in (("Q", "q"), ("K", "k"), ("V", "v"), ("M", "ffn")):
        for j in range(depth):
            layout[f"blocks.{j}.trans_width_{matrix}.trans_weight"] = (name, (j,))
    return layout


def tleg_layout() -> Layout:
    """Published TLEG key → name of the tensor here."""
    layout = {"pos_embed": ("pos_embed", ())}
    for kind in ("weight", "bias"):
        layout[f"patch_embed.proj.{kind}"] = (f"patch_embed_{kind}", ())
        layout[f"norm.{kind}"] = (f"norm_{kind}", ())
        layout[f"head.{kind}"] = (f"head_{kind}", ())
        for module, timm_name in zip(tleg.MODULES, tleg.TIMM_NAMES, strict=True):
            for half, published in (("A", "ilayer"), ("B", "base")):
                key = f"blocks.block.{timm_name}.instances.0.{kind}_{published}"
                layout[key] = (f"{half}_{module}_{kind}", ())
    return layout


def layout_of(method: str, config: Mapping) -> Layout:
    """The table of a learngene with the sizes in ``config`` (`AuxNet.config`)."""
    if method == "tleg":
        return tleg_layout()
    if config["group_size"] != 2:
        raise InputError(f"the published format mixes pairs of layers, this learngene groups of {config['group_size']}")
    if config["full_width"]:
        raise InputError("the published format keeps the old neurons, this learngene transforms them (full width)")
    rows = range(0, config["tgt_arch"]["depth"], config["layers_per_row"])
    return lets_layout(config["src_arch"]["depth"], rows)


def rename_to_published(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Tensors under this project's names, under the published ones."""
    return {key: tensors[name][place].clone() for key, (name, place) in layout.items()}


def rename_from_published(published: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Tensors under the published names, stacked under this project's.

    Raises:
        InputError: keys are missing or unknown, or shapes differ within a stack.
    """
    if unknown := published.keys() - layout.keys():
        raise InputError(f"{len(unknown)} keys do not belong to the published format, such as {min(unknown)}")
    if missing := layout.keys() - published.keys():
        raise InputError(f"{len(missing)} keys of the published format are missing, such as {min(missing)}")
    stacks: dict[str, dict[tuple[int, ...], Tensor]] = {}
    for key, (name, place) in layout.items():
        stack = stacks.setdefault(name, {})
        first = next(iter(stack.values()), published[key])
        if first.shape != published[key].shape:
            raise InputError(f"{key} has shape {tuple(published[key].shape)}, expected {tuple(first.shape)}")
        stack[place] = published[key].float()
    tensors = {}
    for name, stack in stacks.items():
        *_, last = sorted(stack)
        axes = [i + 1 for i in last]  # places are complete: the last one gives the length of each stacked axis
        tensors[name] = torch.stack([stack[place] for place in sorted(stack)]).unflatten(0, axes) if axes else stack[()]
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# Sizes, which the files do not state
# ---------------------------------------------------------------------------------------------------------------------


def method_of(weights: Mapping[str, Tensor]) -> str | None:
    """``lets`` or ``tleg`` where these are the weights of a published learngene."""
    return "lets" if LETS_KEY in weights else "tleg" if TLEG_KEY in weights else None


def config_of(weights: Mapping[str, Tensor], head_dim: int, args: object = None) -> dict:
    """The sizes of a published learngene, as in `AuxNet.config`.

    Args:
        head_dim: neurons of an attention head, which the weights do not show.
        args: the options that the file recorded.

    Raises:
        InputError: the width is no multiple of ``head_dim``.
    """
    if method_of(weights) == "tleg":
        width = weights["pos_embed"].shape[2]
        arch = _arch(width, AUX_DEPTH, head_dim, weights, "patch_embed.proj.weight")
        return {"tgt_arch": asdict(arch), **_head_and_channels(weights, "head.weight", "patch_embed.proj.weight")}
    new, s = weights[LETS_KEY].shape
    depth = sum(re.fullmatch(r"__sm_\d+_norm1_weight", key) is not None for key in weights)
    found = (re.fullmatch(r"blocks\.(\d+)\.norm1\.trans_depth_weight\.trans_weight", key) for key in weights)
    rows = sorted(int(match[1]) for match in found if match)
    layers_per_row = rows[1] - rows[0] if len(rows) > 1 else depth // 2
    # The last row may be shared by fewer layers; only the recorded options can say so.
    aux_depth = rows[-1] + layers_per_row
    with suppress(InputError):
        recorded = parse_arch(str(getattr(args, "tgt_arch", ""))).depth
        aux_depth = recorded if rows[-1] < recorded <= aux_depth else aux_depth
    patch_key = "__sm_patch_embed_proj_weight"
    src = _arch(s, depth, head_dim, weights, patch_key)
    tgt = _arch(s + new, aux_depth, head_dim, weights, patch_key)
    config = {"src_arch": asdict(src), "tgt_arch": asdict(tgt), "layers_per_row": layers_per_row}
    return {
        **config,
        "group_size": 2,
        "full_width": False,
        **_head_and_channels(weights, "__sm_head_weight", patch_key),
    }


def _arch(width: int, depth: int, head_dim: int, weights: Mapping[str, Tensor], patch_key: str) -> ViTArch:
    patch_size = weights[patch_key].shape[-1]
    if width % head_dim:
        raise InputError(f"its width {width} is no multiple of {head_dim}, the size of a head (head_dim)")
    return ViTArch(width, depth, width // head_dim, patch_size, patch_size * math.isqrt(weights["pos_embed"].shape[1]))


def _head_and_channels(weights: Mapping[str, Tensor], head_key: str, patch_key: str) -> dict:
    return {"num_classes": weights[head_key].shape[0], "in_chans": weights[patch_key].shape[1]}


def options_of(args: object) -> dict:
    """What a published checkpoint recorded of its options, as far as it is plain data."""
    recorded = vars(args) if isinstance(args, Namespace) else args if isinstance(args, Mapping) else {}
    plain = (str, int, float, bool, type(None))
    recorded = {name: value for name, value in recorded.items() if isinstance(name, plain)}  # tuples can be long text
    return {
        str(name): list(value) if isinstance(value, (list, tuple)) else value
        for name, value in recorded.items()
        if isinstance(value, plain) or (isinstance(value, (list, tuple)) and all(isinstance(v, plain) for v in value))
    }


# ---------------------------------------------------------------------------------------------------------------------
# Trained Des-Nets and training states
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
    """Whether a checkpoint was written by a published implementation, which keeps its options in a Namespace."""
    return isinstance(content.get("args"), Namespace)


def published_names(content: Mapping, path: str | os.PathLike, head_dim: int) -> Renaming:
    """The function that gives the weights of a checkpoint, and what goes with them, the names used here.

    Args:
        content: what `read_checkpoint` read from ``path``; one of this program keeps its names.
        head_dim: neurons of an attention head, for a learngene.

    Raises:
        InputError: the weights are not what their names say.
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
