"""The published format of LeTs: one tensor per layer, where this program stacks the layers of a learngene.

A coefficient row is numbered by the first Aux layer that uses it.
"""

import re
from collections.abc import Mapping
from contextlib import suppress

from common.errors import InputError
from models.axes import tensor_name
from models.formats.layout import Layout, arch_from_weights, check_published_hidden, config_from_weights
from models.names import parse_arch
from models.vit import ViTArch, described

from torch import Tensor

KEY = "patch_embed.trans_width_emb.trans_weight"
# modules whose published names differ
MODULE_NAMES = dict(q="attn_q", k="attn_k", v="attn_v", proj="attn_proj", fc1="mlp_fc1", fc2="mlp_fc2")


def layout(config: Mapping) -> Layout:
    """The layout for a learngene of the sizes in ``config``.

    Raises:
        InputError: the published format cannot express the expansion.
    """
    if config["group_size"] != 2:
        raise InputError(f"the published format mixes pairs of layers, this learngene groups of {config['group_size']}")
    if config["full_width"]:
        raise InputError("the published format keeps the old neurons, this learngene transforms them (full width)")
    src = ViTArch(**config["src_arch"])
    if src.kind is not None:
        raise InputError(f"the published format is for plain ViTs, this learngene is of the kind {src.kind}")
    check_published_hidden(src, ViTArch(**config["tgt_arch"]))
    modules = [tensor_name(module) for module in described(src).structure.modules]
    depth, rows = config["src_arch"]["depth"], range(0, config["tgt_arch"]["depth"], config["layers_per_row"])
    keys: Layout = {"pos_embed": ("pos_embed", ())}
    for kind in ("weight", "bias"):
        keys[f"__sm_patch_embed_proj_{kind}"] = (f"patch_embed_{kind}", ())
        keys[f"__sm_fc_norm_{kind}"] = (f"fc_norm_{kind}", ())
        keys[f"__sm_head_{kind}"] = (f"head_{kind}", ())
        for m, name in enumerate(modules):
            published = MODULE_NAMES.get(name, name)
            for j in range(depth):
                keys[f"__sm_{j}_{published}_{kind}"] = (f"{name}_{kind}", (j,))
            for k, r in enumerate(rows):
                key = f"blocks.{r}.{published.replace('_', '.')}.trans_depth_weight.trans_{kind}"
                keys[key] = ("g" if kind == "weight" else "h", (m, k))
    keys[KEY] = ("E", ())
    keys["trans_width_cls.trans_weight"] = ("C", ())
    for name, matrix in (("Q", "q"), ("K", "k"), ("V", "v"), ("M", "ffn")):
        for j in range(depth):
            keys[f"blocks.{j}.trans_width_{matrix}.trans_weight"] = (name, (j,))
    return keys


def config_of(weights: Mapping[str, Tensor], head_dim: int, args: object) -> dict:
    """The sizes of a published learngene, as in `LeTs.config`.

    Args:
        head_dim: neurons of an attention head, which the weights do not show.
        args: the options that the file recorded.

    Raises:
        InputError: the width is no multiple of ``head_dim``.
    """
    new, s = weights[KEY].shape
    depth = sum(re.fullmatch(r"__sm_\d+_norm1_weight", key) is not None for key in weights)
    found = (re.fullmatch(r"blocks\.(\d+)\.norm1\.trans_depth_weight\.trans_weight", key) for key in weights)
    rows = sorted(int(match[1]) for match in found if match)
    layers_per_row = rows[1] - rows[0] if len(rows) > 1 else depth // 2
    # The last row may be shared by fewer layers; only the recorded options can say so.
    aux_depth = rows[-1] + layers_per_row
    with suppress(InputError):
        recorded = parse_arch(str(getattr(args, "tgt_arch", ""))).depth
        aux_depth = recorded if rows[-1] < recorded <= aux_depth else aux_depth
    patch, pos_embed = weights["__sm_patch_embed_proj_weight"], weights["pos_embed"]
    src = arch_from_weights(s, depth, head_dim, patch, pos_embed)
    tgt = arch_from_weights(s + new, aux_depth, head_dim, patch, pos_embed)
    return {
        **config_from_weights(tgt, weights["__sm_head_weight"], patch),
        "src_arch": src.as_dict(),
        "layers_per_row": layers_per_row,
        "group_size": 2,
        "full_width": False,
    }
