#!/usr/bin/env python3
"""Print docs/vit_kinds.md: every architecture of timm's modules of ViTs, and whether it can have other sizes.

scripts/vit_kinds.py > docs/vit_kinds.md
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from common import console
from models.meta import WeightsOnMeta
from models.vit import described

import timm
from torch import nn

MODULES = ("vision_transformer", "eva")
COLUMNS = ("architecture", "sizes", "tokens", "positions", "norms", "attention", "MLP", "LayerScale", "pooling", "head")
NORMS = ("patch_embed.norm", "norm_pre", "norm", "fc_norm")
POOLING = {"token": "class token", "avg": "average", "map": "attention", "": "none"}
PAGE = """\
# Kinds of ViT

```bash
python scripts/vit_kinds.py > docs/vit_kinds.md   # writes this page for the installed version of timm
```

A *kind* of ViT is an architecture of timm whose width, depth and number of heads are free. Everything else is that of
the architecture: tokens, pooling, norms, activations, position embedding, neurons of a head, and the ratio of hidden
neurons to the width. A learngene expands ViTs of its own kind: source, Aux-Net and Des-Nets are timm models of one
architecture in different sizes.

Of the {total} architectures of timm {version}'s modules {modules}, **{working} work** and
{refused} are refused. ViTs of its other modules, such as `deit_*`, work if the table of axes knows all their
parameters.

## Axes

Every parameter of a ViT has axes, and each axis counts one of a few things. `models/axes.py` has the table; expansion,
selection of neurons, and counts of parameters and multiplications read it.

| axis | counts | widened by | shared by |
|---|---|---|---|
| E | embedding neurons | ⟨E⟩ | the whole network |
| Q, K, V | neurons of the heads | ⟨Q_j⟩, ⟨K_j⟩, ⟨V_j⟩ | layer j |
| M | hidden neurons of the MLP (gate and value of a SwiGLU alike) | ⟨M_j⟩ | layer j |
| q, k, v, m | the same four of a pooling block (`attn_pool`) | matrices of its own | that block |
| C | embedding neurons, as the head reads them | ⟨C⟩ | the head |
| . | classes, tokens, channels, pixels, or the neurons of one head | – | – |

⟨A⟩ is the identity stacked on the matrix A: the old neurons of an axis stay, and each row of A adds a new one. The
parameters of the layers are also mixed over depth, each with coefficients of its own. A pooling block is a layer that
is not mixed.

| parameter, under timm's name | axes |
|---|---|
| `pos_embed`, `cls_token`, `reg_token`, `dist_token`, `attn_pool.latent` | ., ., E |
| `patch_embed.proj` | E, ., ., . |
| `patch_embed.norm`, `norm_pre`, `norm1`, `norm2`, `norm`, `fc_norm`, `attn_pool.norm` | E |
| `ls1`, `ls2`, `gamma_1`, `gamma_2` (LayerScale) | E |
| `attn.qkv`; `attn.q_proj`, `attn.k_proj`, `attn.v_proj`; `attn.q_bias`, `attn.v_bias` | Q, K or V; E |
| `attn.q_norm`, `attn.k_norm` | . |
| `attn.norm` | V |
| `attn.proj` | E, V |
| `mlp.fc1`, `mlp.fc1_g`, `mlp.fc1_x` | M, E |
| `mlp.norm` | M |
| `mlp.fc2` | E, M |
| `head`, `head_dist` | ., C |

A bias has the first axis of its weight. A ViT with any other parameter is refused, and the message names the parameter.

## Architectures that work

Sizes: layers and heads as in `NAME@L12-H12`, width, and pixels of a patch and of an image. Positions: `patches` or
`tokens` have a learned embedding, `rotary` is computed. Norms: those outside the layers. Attention: which of q, k and v
have a bias. MLP: activation, and hidden neurons over width. Head: `none` is a backbone, which gets one with
`--nb-classes` (`num_classes` in Python).

{table}

## Architectures that are refused

| architecture | why |
|---|---|
{reasons}
"""


def features(name: str) -> dict[str, str]:
    """What an architecture has, by the columns of the table.

    Raises:
        InputError: it cannot have other sizes.
    """
    arch = models.parse_arch(name)
    with WeightsOnMeta():
        vit = models.create_vit(replace(arch, depth=1))
    shapes = described(arch).shapes
    return {
        "architecture": f"`{name}`",
        "sizes": f"L{arch.depth}-H{arch.num_heads}, {arch.width}, {arch.patch_size}/{arch.img_size}",
        "tokens": ", ".join(tokens(shapes)) or "–",
        "positions": ", ".join(positions(vit)),
        "norms": ", ".join(norms(vit, shapes)),
        "attention": ", ".join(attention(shapes)),
        "MLP": ", ".join(mlp(vit, arch, shapes)),
        "LayerScale": "yes" if {"blocks.*.ls1.gamma", "blocks.*.gamma_1"} & shapes.keys() else "–",
        "pooling": POOLING.get(vit.global_pool, vit.global_pool),
        "head": f"{vit.num_classes}" if vit.num_classes else "none",
    }


def tokens(shapes: dict) -> list[str]:
    """Those beside the patches."""
    found = ["class"] if "cls_token" in shapes else []
    if registers := shapes.get("reg_token"):
        found.append(f"{registers[1]} register{'s' * (registers[1] > 1)}")
    return [*found, *(["distillation"] if "dist_token" in shapes else [])]


def positions(vit: nn.Module) -> list[str]:
    found = []
    if vit.pos_embed is not None:
        found.append("tokens" if vit.pos_embed.shape[1] > vit.patch_embed.num_patches else "patches")
    return [*found, *(["rotary"] if getattr(vit, "rope", None) is not None else [])]


def norms(vit: nn.Module, shapes: dict) -> list[str]:
    found = [f"`{name}`" for name in NORMS if f"{name}.weight" in shapes] or ["–"]
    if "Rms" in type(vit.blocks[0].norm1).__name__:
        found.append("RMS")
    if "Post" in type(vit.blocks[0]).__name__:
        found.append("after attention and MLP")
    return found


def attention(shapes: dict) -> list[str]:
    biases = [a for a in "qkv" if {f"blocks.*.attn.{a}_proj.bias", f"blocks.*.attn.{a}_bias"} & shapes.keys()]
    biases = ["qkv"] if "blocks.*.attn.qkv.bias" in shapes else biases
    found = [f"bias of {', '.join(biases)}"] if biases else ["no bias"]
    found += ["qk-norm"] if "blocks.*.attn.q_norm.weight" in shapes else []
    return [*found, *(["norm"] if "blocks.*.attn.norm.weight" in shapes else [])]


def mlp(vit: nn.Module, arch: models.ViTArch, shapes: dict) -> list[str]:
    module = vit.blocks[0].mlp
    hidden = module.fc2.in_features
    first = [shape[0] for name, shape in shapes.items() if name.startswith("blocks.*.mlp.fc1") and len(shape) > 1]
    gated = sum(first) == 2 * hidden
    kind = "SwiGLU" if gated else type(module.act).__name__
    found = [f"{kind} ×{hidden / arch.width:.3g}", *(["packed"] if gated and len(first) == 1 else [])]
    return [*found, *(["norm"] if "blocks.*.mlp.norm.weight" in shapes else [])]


def page(names: Sequence[str]) -> str:
    """The text of docs/vit_kinds.md with a row for each of the architectures ``names``."""
    rows, reasons = [], []
    for name in names:
        try:
            found = features(name)
            rows.append(" | ".join(found[column] for column in COLUMNS))
        except models.InputError as error:
            reasons.append(f"`{name}` | {str(error).removeprefix(f'{name} ')}")
    head = [" | ".join(COLUMNS), "|".join(["---"] * len(COLUMNS))]
    return PAGE.format(
        total=len(names),
        version=timm.__version__,
        modules=" and ".join(f"`{module}`" for module in MODULES),
        working=len(rows),
        refused=len(reasons),
        table="\n".join(f"|{row}|" if "---" in row else f"| {row} |" for row in head + rows),
        reasons="\n".join(f"| {row} |" for row in reasons),
    )


def main(argv: Sequence[str]) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    print(page([name for module in MODULES for name in timm.list_models(module=module)]), end="")


if __name__ == "__main__":
    console.accept_any_text()
    main(sys.argv[1:])
