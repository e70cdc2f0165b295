#!/usr/bin/env python3
"""What is in a learngene: sizes, parameters by part, recorded options, and the Des-Nets that it makes.

scripts/inspect_learngene.py output/lets/learngene.safetensors
scripts/inspect_learngene.py published_checkpoint.pth --gene-ema --plot learngene.png
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from common import console
from common.files import atomic_write
from models import lets, tleg
from models.vit import SIZES
from options import local_path, place

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure, SubFigure

# label → what the names of its tensors are or begin with, up to an underscore
PARTS = {
    "lets": {
        "layers of the learngene": lets.MODULES,
        "patch embedding of the learngene": ("patch_embed",),
        "final norm of the learngene": ("fc_norm",),
        "head of the learngene": ("head",),
        "E, width of the embedding": ("E",),
        "C, width of the head's input": ("C",),
        "Q, width of the queries": ("Q",),
        "K, width of the keys": ("K",),
        "V, width of the values": ("V",),
        "M, width of the hidden layers": ("M",),
        "g, depth coefficients of weights": ("g",),
        "h, depth coefficients of biases": ("h",),
        "position embedding of the Aux-Net": ("pos_embed",),
    },
    "tleg": {
        "A, slope of the layers": ("A",),
        "B, layer at position 0": ("B",),
        "patch embedding": ("patch_embed",),
        "position embedding": ("pos_embed",),
        "final norm": ("norm",),
        "head": ("head",),
    },
}


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Lines with the cells in columns, those of the columns ``left`` flush left, the others flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The sections of the text
# ---------------------------------------------------------------------------------------------------------------------


def learngene_arch(gene: models.Learngene) -> models.ViTArch:
    """The sizes of the layers that the learngene stores; those of TLEG are as wide as the Aux-Net."""
    return models.ViTArch(**gene.config["src_arch"]) if gene.method == "lets" else gene.arch


def sizes(gene: models.Learngene) -> list[str]:
    rows = [("", "layers", "width", "heads", "neurons per head", "patch", "image")]
    nets = {"learngene": learngene_arch(gene)} if gene.method == "lets" else {}
    for name, a in {**nets, "Aux-Net": gene.arch}.items():
        numbers = (a.depth, a.width, a.num_heads, a.head_dim)
        rows.append((name, *map(str, numbers), f"{a.patch_size} px", f"{a.img_size} px"))
    lines = [*table(rows), f"  {gene.num_classes} classes, {gene.config['in_chans']} input channels"]
    if gene.method == "lets":
        shared, count = gene.config["layers_per_row"], gene.tensors["g"].shape[1]
        lines.append(f"  Aux layers per row of depth coefficients: {shared} ({count} rows)")
    return lines


def part_sizes(gene: models.Learngene) -> dict[str, int]:
    """Label → number of parameters; every tensor belongs to one part."""
    count = dict.fromkeys(PARTS[gene.method], 0)
    for name, tensor in gene.tensors.items():
        label = next(
            label
            for label, stems in PARTS[gene.method].items()
            if any(name == stem or name.startswith(f"{stem}_") for stem in stems)
        )
        count[label] += tensor.numel()
    return count


def share(part: int, total: int) -> str:
    return "<0.1%" if 0 < part < total / 1000 else f"{part / total:.1%}"


def parameters(gene: models.Learngene) -> list[str]:
    parts = part_sizes(gene)
    total = sum(parts.values())
    plain = sum(p.numel() for p in gene.empty_aux_net().vit.parameters())
    return [
        *table([(label, f"{count:,}", share(count, total)) for label, count in {**parts, "total": total}.items()]),
        f"  a plain ViT of the Aux-Net's sizes has {plain:,} parameters, {plain / total:.2f} times as many",
    ]


def options(gene: models.Learngene) -> list[str]:
    """One line per option; a file's control characters, which would command the terminal, are escaped."""
    lines = [f"{name}: {gene.options[name]}" for name in sorted(gene.options, key=str)]
    return [f"  {line if line.isprintable() else ascii(line)}" for line in lines] or ["  nothing"]


def des_nets(gene: models.Learngene) -> list[str]:
    """One line per number of heads that the learngene makes a Des-Net of.

    Which these are is asked of `Learngene.descend`, for one layer: depth is free, and each further layer adds the
    parameters of that one.
    """
    aux = gene.arch
    depths = sorted({max(1, aux.depth * quarter // 4) for quarter in (1, 2, 3, 4)})
    rows = [("heads", "width", *(f"L{depth}" for depth in depths), "from the learngene's heads")]
    made, refusal = [], []
    for heads in range(1, aux.num_heads + 2):
        arch = replace(aux, width=heads * aux.head_dim, num_heads=heads, depth=1)
        try:
            vit = gene.descend(arch)
        except models.InputError as error:
            refusal = [f"  not with {heads} heads: {error}"]
            continue
        layer, first = (sum(p.numel() for p in part.parameters()) for part in (vit.blocks[0], vit))
        counts = (f"{first + (depth - 1) * layer:,}" for depth in depths)
        rows.append((str(heads), str(arch.width), *counts, source(heads, learngene_arch(gene).num_heads)))
        made.append(arch)
    return [
        f"  of any depth, with heads of {aux.head_dim} neurons; parameters by number of layers:",
        *table(rows, left=(len(rows[0]) - 1,)),
        f"  the smallest of these: {name_of(replace(made[0], depth=depths[0]))}",
        f"  the largest of these: {name_of(replace(made[-1], depth=depths[-1]))}",
        *refusal,
    ]


def source(heads: int, own: int) -> str:
    """Where the heads of a Des-Net come from, if the learngene has ``own`` heads."""
    if heads < own:
        return f"first {heads} of {own}"
    return f"all {own}" + f" + {heads - own} by width matrices" * (heads > own)


def name_of(arch: models.ViTArch) -> str:
    """A name of the grammar that stands for ``arch``, without its number of heads if there is one, or else Python."""
    for suffix in ("", f"_H{arch.num_heads}"):
        for size in reversed(SIZES):
            name = f"deit_{size}_patch{arch.patch_size}_{arch.img_size}_L{arch.depth}{suffix}"
            if models.parse_arch(name) == arch:
                return name
    return f"models.{arch!r}, which has no name"


# ---------------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------------


def check_plot(path: Path) -> None:
    """Raises InputError unless a picture can be written to ``path``."""
    formats = FigureCanvasBase.get_supported_filetypes().keys() - {"avif", "pgf"}  # which need more than matplotlib
    if path.suffix[1:].lower() not in formats:
        raise models.InputError(f"--plot {path} is no kind of picture: expected .{', .'.join(sorted(formats))}")
    if path.is_dir() or not path.parent.is_dir():
        fault = "is a directory" if path.is_dir() else f"is in {path.parent}, which is no directory"
        raise models.InputError(f"--plot {path} {fault}: expected a file in a directory that exists")


def write_plot(gene: models.Learngene, path: Path) -> None:
    if gene.method == "tleg":
        figure = Figure(figsize=(13, 5), layout="constrained")
        draw_tleg(figure, gene)
    elif gene.tensors["E"].numel():
        figure = Figure(figsize=(13, 8), layout="constrained")
        depth, width = figure.subfigures(2, 1)
        draw_depth(depth, gene)
        draw_width(width, gene)
    else:  # an Aux-Net as wide as its learngene
        figure = Figure(figsize=(13, 4.5), layout="constrained")
        draw_depth(figure, gene)
    figure.suptitle(textwrap.fill(str(gene), 110), fontsize="medium")
    try:
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, dpi=150, format=path.suffix[1:].lower())
    except OSError as error:
        raise models.InputError(f"--plot {path} cannot be written: {error.strerror}") from error


def draw_depth(figure: Figure | SubFigure, gene: models.Learngene) -> None:
    """The depth coefficients, one column per row of them and layer of the group (in LeTs: pair)."""
    per_row, (_, rows, size) = gene.config["layers_per_row"], gene.tensors["g"].shape
    last = [min(first + per_row, gene.arch.depth) - 1 for first in range(0, gene.arch.depth, per_row)]
    labels = [f"{r * per_row}–{end}" if end > r * per_row else f"{end}" for r, end in enumerate(last)]
    step = -(-rows // 12)  # more labels would overlap
    limit = max(gene.tensors[name].abs().max().item() for name in "gh")
    both = figure.subplots(1, 2, sharey=True)
    for axes, name, kind in zip(both, "gh", ("weights", "biases"), strict=True):
        image = axes.imshow(
            gene.tensors[name].float().flatten(1).numpy(),
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            aspect="auto",
            interpolation="none",
        )
        for r in range(1, rows):
            axes.axvline(size * r - 0.5, color="black", linewidth=1)
        axes.set_xticks([size * r + (size - 1) / 2 for r in range(0, rows, step)], labels[::step])
        axes.set_yticks(range(len(lets.MODULES)), lets.MODULES)
        axes.set_title(f"depth coefficients {name}, of {kind}", fontsize="medium")
    columns = "two columns: first and second learngene layer of the pair"
    if size != 2:
        columns = f"{size} columns: the learngene layers of the group"
    figure.supxlabel(f"Aux layers that share a row; its {columns}", fontsize="medium")
    both[0].set_ylabel("module")
    figure.colorbar(image, ax=both, label="coefficient")


def draw_width(figure: SubFigure, gene: models.Learngene) -> None:
    """The norms of the rows of the width matrices, each of which makes one new neuron."""
    panels = figure.subplots(1, 5, sharey=True)
    layers = gene.tensors["Q"].shape[0]
    scale = ScalarMappable(BoundaryNorm([j - 0.5 for j in range(layers + 1)], 256), "viridis")
    for name, colour, style in (("E", "black", "-"), ("C", "tab:red", "--")):
        panels[0].plot(sorted_norms(gene.tensors[name]), style, color=colour, label=name)
    panels[0].legend(frameon=False)
    panels[0].set_title("E and C, whole network", fontsize="medium")
    for axes, name in zip(panels[1:], "QKVM", strict=True):
        for j, norms in enumerate(sorted_norms(gene.tensors[name])):
            axes.plot(norms, color=scale.to_rgba(j), linewidth=1)
        axes.set_title(f"{name}, per layer", fontsize="medium")
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.set_xlabel("row, by falling norm")
    panels[0].set_ylabel("l2 norm of a row")
    figure.colorbar(scale, ax=panels, label="learngene layer", ticks=range(0, layers, -(-layers // 12)))


def sorted_norms(matrix: torch.Tensor) -> np.ndarray:
    """The l2 norms of the rows of ``matrix`` (…, rows, columns), the largest first: (…, rows)."""
    return torch.linalg.vector_norm(matrix.float(), dim=-1).sort(descending=True).values.numpy()


def draw_tleg(figure: Figure, gene: models.Learngene) -> None:
    """How large A and B are, per module."""
    size = {
        (half, kind): [root_mean_square(gene.tensors[f"{half}_{module}_{kind}"]) for module in tleg.MODULES]
        for half in "AB"
        for kind in ("weight", "bias")
    }
    positive = [value for values in size.values() for value in values if value > 0] or [1.0]
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].set_yscale("log")
    panels[0].set_ylim(min(positive) / 4, max(positive) * 3)
    panels[0].set_ylabel("root mean square of a tensor's elements")
    for axes, kind, title in zip(panels, ("weight", "bias"), ("weights", "biases"), strict=True):
        draw_halves(axes, size["A", kind], size["B", kind])
        axes.set_title(f"{title}; the numbers are ‖A‖ / ‖B‖", fontsize="medium")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")


def draw_halves(axes: Axes, A: Sequence[float], B: Sequence[float]) -> None:
    """The sizes of A and of B in the modules; the line that joins them is as long as their ratio is far from 1."""
    modules = range(len(tleg.MODULES))
    aside = 0.1  # so that neither marker hides the other
    axes.plot([x - aside for x in modules], A, "o", color="#c4572e", label="A")
    axes.plot([x + aside for x in modules], B, "s", color="#0b6e99", label="B")
    for x, (a, b) in enumerate(zip(A, B, strict=True)):
        if a and b:
            axes.plot((x - aside, x + aside), (a, b), color="lightgrey", linewidth=3, zorder=0)
            note = f"{a / b:#.3g}"
        else:  # a logarithmic axis has no place for zero, and a ratio to zero is none
            note = " = ".join(["A"] * (a == 0) + ["B"] * (b == 0) + ["0"])
        y = max(a, b, axes.get_ylim()[0])
        axes.annotate(note, (x, y), (0, 8), textcoords="offset points", ha="center", fontsize="small")
    axes.set_xticks(modules, tleg.MODULES)
    axes.set_xlim(-0.6, len(modules) - 0.4)
    axes.set_xlabel("module")
    axes.grid(alpha=0.25, axis="y")


def root_mean_square(tensor: torch.Tensor) -> float:
    return tensor.float().square().mean().sqrt().item()


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "file", type=place, metavar="FILE", help="learngene file, published checkpoint, or the address of one"
    )
    p.add_argument("--head-dim", type=int, default=64, help="neurons of an attention head, for published checkpoints")
    p.add_argument("--gene-ema", action="store_true", help="take the averaged weights of a checkpoint")
    p.add_argument(
        "--plot", type=local_path, metavar="PICTURE", help="also draw what stage 1 learned, e.g. as learngene.png"
    )
    return p.parse_args()


def inspect(args: argparse.Namespace) -> None:
    if args.head_dim < 1:
        raise models.InputError(f"--head-dim {args.head_dim} is too small: at least 1")
    if args.plot:
        check_plot(args.plot)
    gene = models.load_learngene(args.file, args.head_dim, args.gene_ema)
    sections = {"Sizes": sizes, "Parameters": parameters, "Des-Nets": des_nets, "Options of stage 1": options}
    text = [str(gene)]
    for title, section in sections.items():
        text += ["", title, *section(gene)]
    if args.plot:
        write_plot(gene, args.plot)
    print("\n".join(text))


def main() -> int:
    try:
        inspect(parse())
    except models.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    console.accept_any_text()
    sys.exit(main())
