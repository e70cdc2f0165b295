#!/usr/bin/env python3
"""Print the content of a learngene: sizes, parameters by part, options of stage 1, and the Des-Nets that it makes.

scripts/inspect_learngene.py output/lets/learngene.safetensors
scripts/inspect_learngene.py published_checkpoint.pth --gene-ema --plot learngene.png
"""

import argparse
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from common import console
from common.files import atomic_write
from models.figures import Curves, HeatMaps, Points
from models.names import name_of
from models.preprocessing import DEFAULT
from models.vit import shown_size
from options import local_path, place

from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure, SubFigure


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


def sizes(gene: models.Learngene) -> list[str]:
    rows = [("", "layers", "width", "heads", "neurons per head", "patch", "image")]
    for name, a in gene.method_class.archs(gene.config).items():
        numbers = (a.depth, a.width, a.num_heads, a.head_dim)
        rows.append((name, *map(str, numbers), f"{shown_size(a.patch_size)} px", f"{shown_size(a.img_size)} px"))
    lines = [*table(rows), f"  {gene.num_classes} classes, {gene.config['in_chans']} input channels"]
    if gene.arch.kind is not None:
        lines.append(f"  ViTs of the kind {gene.arch.kind} of timm's")
    if gene.preprocessing != DEFAULT:
        prepared = (f"{name} {value}" for name, value in gene.preprocessing.as_config().items())
        lines.append(f"  images are prepared with {', '.join(prepared)}")
    return lines + [f"  {remark}" for remark in gene.method_class.remarks(gene.tensors, gene.config)]


def part_sizes(gene: models.Learngene) -> dict[str, int]:
    """Label → number of parameters. Every tensor belongs to one part, and parts that the kind of ViT lacks are out."""
    found = {part: gene.method_class.tensors_of(part, gene.tensors) for part in gene.method_class.parts}
    return {part: sum(tensor.numel() for tensor in tensors) for part, tensors in found.items() if tensors}


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
    """One line per option. Control characters of the file are escaped, as a terminal would obey them."""
    lines = [f"{name}: {gene.options[name]}" for name in sorted(gene.options, key=str)]
    return [f"  {line if line.isprintable() else ascii(line)}" for line in lines] or ["  nothing"]


def des_nets(gene: models.Learngene) -> list[str]:
    """One line per number of heads of which the learngene makes a Des-Net.

    `Learngene.descend` is called for one layer: each further layer has as many parameters.
    """
    aux, own = gene.arch, next(iter(gene.method_class.archs(gene.config).values())).num_heads
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
        rows.append((str(heads), str(arch.width), *counts, source(heads, own)))
        made.append(arch)
    return [
        f"  of {depths_of(gene)}, with heads of {aux.head_dim} neurons, up to {aux.hidden} hidden neurons in a layer;",
        "  parameters by number of layers:",
        *table(rows, left=(len(rows[0]) - 1,)),
        f"  the smallest of these: {name_of(replace(made[0], depth=depths[0]))}",
        f"  the largest of these: {name_of(replace(made[-1], depth=depths[-1]))}",
        *refusal,
    ]


def depths_of(gene: models.Learngene) -> str:
    """How deep its Des-Nets can be, in words."""
    try:
        gene.check(replace(gene.arch, depth=gene.arch.depth + 1))
    except models.InputError:
        return f"up to {gene.arch.depth} layers"
    return "any depth"


def source(heads: int, own: int) -> str:
    """Where the heads of a Des-Net come from, if the learngene has ``own`` heads."""
    if heads < own:
        return f"first {heads} of {own}"
    return f"all {own}" + f" + {heads - own} new" * (heads > own)


# ---------------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------------


def check_plot(path: Path) -> None:
    """Raises InputError unless matplotlib can write a picture to ``path``."""
    formats = FigureCanvasBase.get_supported_filetypes().keys() - {"avif", "pgf"}  # which need more than matplotlib
    if path.suffix[1:].lower() not in formats:
        raise models.InputError(f"--plot {path} is no kind of picture: expected .{', .'.join(sorted(formats))}")
    if path.is_dir() or not path.parent.is_dir():
        fault = "is a directory" if path.is_dir() else f"is in {path.parent}, which is no directory"
        raise models.InputError(f"--plot {path} {fault}: expected a file in a directory that exists")


def write_plot(gene: models.Learngene, path: Path) -> None:
    draw = {HeatMaps: draw_heat_maps, Curves: draw_curves, Points: draw_points}
    rows = gene.method_class.figures(gene.tensors, gene.config)
    figure = Figure(figsize=(13, 0.5 + 4 * len(rows)), layout="constrained")
    for part, row in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        draw[type(row)](part, row)
    figure.suptitle(textwrap.fill(str(gene), 110), fontsize="medium")
    try:
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, dpi=150, format=path.suffix[1:].lower())
    except OSError as error:
        raise models.InputError(f"--plot {path} cannot be written: {error.strerror}") from error


def draw_heat_maps(figure: SubFigure, maps: HeatMaps) -> None:
    limit = max(matrix.abs().max().item() for matrix in maps.matrices.values())
    step = -(-len(maps.columns) // 12)  # more labels would overlap
    panels = figure.subplots(1, len(maps.matrices), sharey=True, squeeze=False)[0]
    for axes, (title, matrix) in zip(panels, maps.matrices.items(), strict=True):
        image = axes.imshow(
            matrix.float().numpy(),
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            aspect="auto",
            interpolation="none",
        )
        size = matrix.shape[1] // len(maps.columns)
        for column in range(1, len(maps.columns)):
            axes.axvline(size * column - 0.5, color="black", linewidth=1)
        places = [size * column + (size - 1) / 2 for column in range(0, len(maps.columns), step)]
        axes.set_xticks(places, maps.columns[::step])
        axes.set_yticks(range(len(maps.rows)), maps.rows)
        axes.set_title(title, fontsize="medium")
    figure.supxlabel(maps.xlabel, fontsize="medium")
    panels[0].set_ylabel(maps.ylabel)
    figure.colorbar(image, ax=panels, label=maps.value)


def draw_curves(figure: SubFigure, curves: Curves) -> None:
    numbers = [label for panel in curves.panels.values() for label in panel if isinstance(label, int)]
    count = max(numbers, default=0) + 1
    scale = ScalarMappable(BoundaryNorm([j - 0.5 for j in range(count + 1)], 256), "viridis")
    panels = figure.subplots(1, len(curves.panels), sharey=True, squeeze=False)[0]
    for axes, (title, panel) in zip(panels, curves.panels.items(), strict=True):
        named = [label for label in panel if isinstance(label, str)]
        for label, values in panel.items():
            if isinstance(label, int):
                axes.plot(values.numpy(), color=scale.to_rgba(label), linewidth=1)
            else:
                style = ("-", "--", ":")[named.index(label) % 3]
                axes.plot(values.numpy(), style, color="black" if style == "-" else "tab:red", label=label)
        if named:
            axes.legend(frameon=False)
        axes.set_title(title, fontsize="medium")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.set_xlabel(curves.xlabel)
    panels[0].set_ylabel(curves.ylabel)
    if numbers:
        figure.colorbar(scale, ax=panels, label=curves.scale, ticks=range(0, count, -(-count // 12)))


def draw_points(figure: SubFigure, points: Points) -> None:
    values = [value for panel in points.panels.values() for series in panel.values() for value in series]
    positive = [value for value in values if value > 0] or [1.0]
    panels = figure.subplots(1, len(points.panels), sharey=True, squeeze=False)[0]
    panels[0].set_yscale("log")
    panels[0].set_ylim(min(positive) / 4, max(positive) * 3)
    panels[0].set_ylabel(points.ylabel)
    for axes, (title, panel) in zip(panels, points.panels.items(), strict=True):
        draw_series(axes, panel)
        names = [*panel]
        ratio = f"; the numbers are {names[0]} / {names[1]}" if len(names) == 2 else ""
        axes.set_title(title + ratio, fontsize="medium")
        axes.set_xticks(range(len(points.names)), [textwrap.fill(name, 14) for name in points.names])
        axes.set_xlim(-0.6, len(points.names) - 0.4)
        axes.set_xlabel(points.xlabel)
        axes.grid(alpha=0.25, axis="y")
    if handles := [handle for handle in panels[0].get_legend_handles_labels()[0] if handle.get_label()]:
        figure.legend(handles=handles, loc="outside right upper")


def draw_series(axes: Axes, panel: Mapping[str, Sequence[float]]) -> None:
    """The points of each series; two series are joined, and noted with their ratio."""
    aside = 0.1 if len(panel) > 1 else 0  # so that no marker hides another
    styles = (("o", "#c4572e", -aside), ("s", "#0b6e99", aside), ("^", "#5a7d2a", 0))
    for (label, series), (marker, colour, offset) in zip(panel.items(), styles, strict=False):
        axes.plot([x + offset for x in range(len(series))], series, marker, color=colour, label=label)
    if len(panel) != 2:
        return
    (one, first), (two, second) = panel.items()
    for x, (a, b) in enumerate(zip(first, second, strict=True)):
        if math.isnan(a) or math.isnan(b):  # the module has no such parameter
            continue
        if a and b:
            axes.plot((x - aside, x + aside), (a, b), color="lightgrey", linewidth=3, zorder=0)
            note = f"{a / b:#.3g}"
        else:  # a logarithmic axis has no zero, and there is no ratio to it
            note = " = ".join([one] * (a == 0) + [two] * (b == 0) + ["0"])
        y = max(a, b, axes.get_ylim()[0])
        axes.annotate(note, (x, y), (0, 8), textcoords="offset points", ha="center", fontsize="small")


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "file", type=place, metavar="FILE", help="learngene file, published checkpoint, or the address of one"
    )
    p.add_argument("--head-dim", type=int, default=64, help="neurons of an attention head, for published checkpoints")
    p.add_argument("--gene-ema", action="store_true", help="take the averaged weights of a checkpoint")
    p.add_argument(
        "--plot", type=local_path, metavar="PICTURE", help="also draw what stage 1 learned, e.g. to learngene.png"
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
