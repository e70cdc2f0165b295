"""``family.html``: the family as one file that a browser opens without a network.

Plotly draws; ``page.html`` is the frame, and ``page.js`` chooses the axis, the limits and the best size. Its data:

    axes     name, title, unit, format of the ticks, whether more is better (``most``); for each member ``values``,
             ``low``, ``high``, ``texts``, and ``rank``: its place among the values, 0 the most demanding; ``front``:
             the members of the Pareto front
    members  title, size, number of its learngene, accuracy, numbers to show, command and Python that make it
"""

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from family.plan import Family, Member
from family.plots import COLOURS, FRONT_COLOUR, pareto_front
from family.records import SPREAD
from models import ViTArch, parse_arch
from models.learngene import DEFAULT_CHOICES
from models.names import name_of

import plotly.graph_objects as go

HERE = Path(__file__).resolve().parent
COLUMNS = 64  # of a line of the command
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")


@dataclass(frozen=True)
class Axis:
    """What accuracy is shown against.

    Attributes:
        title: with what it is counted on.
        of: a member's value, ``part`` one of `SPREAD`.
        text: of a value, without its ``unit``.
        ticks: their format, in d3's language.
        most: whether more is better.
    """

    name: str
    title: str
    of: Callable[[Member, str], float]
    text: Callable[[float], str]
    unit: str = ""
    ticks: str = "~s"
    most: bool = False

    def shown(self, member: Member) -> str:
        """The value and, where measurements differ, their quartiles."""
        value, low, high = (self.text(self.of(member, part)) for part in SPREAD)
        return f"{value if low == high else f'{value} ({low} to {high})'} {self.unit}".strip()


def measured(quantity: str, unit: float = 1) -> Callable[[Member, str], float]:
    return lambda member, part: unit * member.record[quantity + part]


def three_digits(value: float) -> str:
    """A number above 0 with three digits or more: ``0.392``, ``12.0``, ``1,234``."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


AXES = (
    Axis("parameters", "parameters", lambda m, part: m.params, "{:,}".format),
    Axis("MACs", "MACs of one image", lambda m, part: m.macs, "{:,}".format),
    Axis("latency", "latency of one image", measured("latency_ms_1"), three_digits, "ms", "~g"),
    Axis("throughput", "images per second, batches of 64", measured("images_per_s_64"), "{:,.0f}".format, most=True),
    Axis("memory, 1 image", "memory for one image", measured("memory_bytes_1", 1e-6), three_digits, "MB", "~g"),
    Axis("memory, 64 images", "memory for 64 images", measured("memory_bytes_64", 1e-6), three_digits, "MB", "~g"),
)
CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["select2d", "lasso2d"],
    "showSendToCloud": False,  # nothing is sent anywhere
    "plotlyServerURL": "",
}
NOTES = (
    "Latency and throughput are medians of repeated forward passes, with their quartiles; memory is that of weights, "
    "images and what a pass adds at its peak, without Python and torch. Measured on {}. Drag to zoom, double-click "
    "to see all; a click on a learngene in the legend hides it."
)


def family_page(made: Mapping[Family, Sequence[Member]], title: str) -> str:
    """The text of the page.

    Args:
        made: the members of each learngene, evaluated and measured.
    """
    pairs = [(family, member) for family, members in made.items() for member in members]
    data = {
        "axes": [described(axis, [member for _, member in pairs]) for axis in AXES],
        "members": [
            {
                "title": member.title,
                "size": member.arch.label,
                "learngene": list(made).index(family),
                "accuracy": member.accuracy,
                "numbers": numbers(member),
                "command": command_of(member, family),
                "python": python_of(member, family),
            }
            for family, member in pairs
        ],
    }
    plot = figure(made).to_html(full_html=False, include_plotlyjs=True, div_id="plot", config=CONFIG)
    devices = "; ".join(sorted({member.record["device"] for _, member in pairs}))
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        plot=plot,
        notes=escape(NOTES.format(devices)),
        data=json.dumps(data).replace("<", "\\u003c"),  # no text can end the element
        script=(HERE / "page.js").read_text(encoding="utf-8"),
    )


def described(axis: Axis, members: Sequence[Member]) -> dict[str, object]:
    """An axis, as the data of the page have it."""
    values = [axis.of(member, "") for member in members]
    places = {value: place for place, value in enumerate(sorted(set(values), reverse=axis.most))}
    points = [(-value if axis.most else value, member.accuracy) for value, member in zip(values, members, strict=True)]
    return {
        "name": axis.name,
        "title": axis.title,
        "unit": axis.unit,
        "ticks": axis.ticks,
        "most": axis.most,
        "values": values,
        "low": [axis.of(member, "_low") for member in members],
        "high": [axis.of(member, "_high") for member in members],
        "texts": [f"{axis.text(value)} {axis.unit}".strip() for value in values],
        "rank": [places[value] for value in values],
        "front": [points.index(point) for point in pareto_front(points)],
    }


def numbers(member: Member) -> list[tuple[str, str]]:
    """What is shown of a member."""
    arch, record = member.arch, member.record
    accuracies = {"accuracy, untrained": "accuracy_before", "accuracy, fine-tuned": "accuracy_after"}
    shown = [(what, f"{record[key]:.2f} %") for what, key in accuracies.items() if record[key] is not None]
    sizes = f"depth {arch.depth}, heads {arch.num_heads}, width {arch.width}, hidden {arch.hidden}"
    return [("size", sizes), *shown, *((axis.title, axis.shown(member)) for axis in AXES)]


def figure(made: Mapping[Family, Sequence[Member]]) -> go.Figure:
    """A trace for each learngene, the Pareto front, and a ring around the best; the page moves them to its axis."""
    chart, first = go.Figure(), 0
    for i, (family, members) in enumerate(made.items()):
        texts = [[f"<b>{escape(m.title)}</b>", *(f"{escape(a)}: {b}" for a, b in numbers(m))] for m in members]
        chart.add_scatter(
            name=escape(family.name),
            mode="markers",
            customdata=list(range(first, first + len(members))),
            hovertext=["<br>".join(lines) for lines in texts],
            hoverinfo="text",
            marker={"size": 10, "color": COLOURS[i % len(COLOURS)], "symbol": SYMBOLS[i % len(SYMBOLS)]},
            error_x={"type": "data", "symmetric": False, "thickness": 1, "width": 0},
        )
        first += len(members)
    quiet = {"hoverinfo": "skip"}
    line = {"color": FRONT_COLOUR, "width": 1.5}
    chart.add_scatter(name="Pareto front", mode="lines+text", line=line, textposition="bottom right", **quiet)
    ring = {"size": 20, "symbol": "circle-open", "color": "#222", "line": {"width": 2}}
    chart.add_scatter(name="best that fits", mode="markers", marker=ring, **quiet)
    chart.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        xaxis={"type": "log", "dtick": "D2"},
        yaxis={"title": {"text": "test accuracy, %"}},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        showlegend=True,
    )
    return chart


def command_of(member: Member, family: Family) -> str:
    """The command of main.py that makes a member, with its accuracy: fine-tuned, or with the head of a linear probe."""
    gene = "--load-gene="
    options = [gene + family.source if option.startswith(gene) else option for option in family.command]
    probe = ["--linear-probe"] if family.probe_loader is not None and not family.options.epochs else []
    folder = f"output/{member.title.replace(' ', '-')}"
    own = [f"--des-arch={name_in_family(member.arch, family)}", f"--output-dir={folder}"]
    words, lines = map(shlex.quote, ["python", "main.py", *options, *probe, *own]), [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > COLUMNS:
            lines.append("")
        lines[-1] += f"{word} "
    return "\\\n    ".join(lines).rstrip()


def python_of(member: Member, family: Family) -> str:
    """Two lines that make a member: of the learngene; of its folder, where training or chance had a part in it."""
    new_head = family.shape["num_classes"] != family.gene.num_classes
    if member.record["accuracy_after"] is not None or new_head or family.choices["skip_init"]:
        return f"import timm\nvit = timm.create_model({'local-dir:' + str(member.folder)!r}, pretrained=True)"
    gene, name = family.gene, name_in_family(member.arch, family)
    loading = {"head_dim": (family.options.head_dim, 64), "use_ema": (family.options.gene_ema, False)}
    making = {"img_size": (member.arch.img_size, parse_arch(name, gene.arch).img_size)}
    making |= {"in_chans": (family.shape["in_chans"], gene.config["in_chans"])}
    making |= {key: (family.choices[key], DEFAULT_CHOICES[key]) for key in DEFAULT_CHOICES}
    load, make = (
        ", ".join([repr(first), *(f"{key}={value!r}" for key, (value, usual) in options.items() if value != usual)])
        for first, options in ((family.source, loading), (name, making))
    )
    return f"import models\nvit = models.load_learngene({load}).descend({make})"


def name_in_family(arch: ViTArch, family: Family) -> str:
    """``@L4-H2``, which takes the rest from the learngene; a full name where the learngene has another MLP ratio."""
    name = f"@{arch.label}"
    return name if parse_arch(name, family.gene.arch).hidden == arch.hidden else name_of(arch)
