"""``family.png``: accuracy over parameters, MACs and latency."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from family.plan import Family, Member

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

COLOURS = ("#0b6e99", "#5a8f29", "#8e4ea8", "#d9a400", "#7a5230", "#3a3a3a")  # of the learngenes, in their order
FRONT_COLOUR = "#c4572e"


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, accuracy) points for which no cheaper or equally cheap point is more accurate, by ascending cost."""
    front = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def plot_family(made: Mapping[Family, Sequence[Member]], title: str) -> Figure:
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    costs = {
        "parameters": ("", lambda m: m.params),
        "MACs of one image": ("", lambda m: m.macs),
        "latency of one image": ("s", lambda m: m.record["latency_ms_1"] / 1000),
    }
    for axes, (label, (unit, cost_of)) in zip(panels, costs.items(), strict=True):
        axes.set_xlabel(label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(unit))
        axes.xaxis.set_minor_formatter(NullFormatter())
        plot_panel(axes, made, cost_of)
    panels[0].set_ylabel("test accuracy, %")
    legend = panels[0].legend(frameon=False)
    for text in (*legend.get_texts(), figure.suptitle(title)):
        text.set_parse_math(False)  # a learngene's name may have a $
    return figure


def plot_panel(axes: Axes, made: Mapping[Family, Sequence[Member]], cost_of: Callable[[Member], float]) -> None:
    """Hollow markers before fine-tuning, filled ones after it; the Pareto front of the final accuracies, with names."""
    for i, (family, members) in enumerate(made.items()):
        colour, of_gene = COLOURS[i % len(COLOURS)], f"{family.name}, " if len(made) > 1 else ""
        both = {"untrained": ("accuracy_before", "white"), "fine-tuned": ("accuracy_after", colour)}
        for label, (key, filled) in both.items():
            points = [(cost_of(m), m.record[key]) for m in members if m.record[key] is not None]
            if points:
                style = dict(color=colour, markerfacecolor=filled, label=of_gene + label, zorder=3)
                axes.plot(*zip(*points, strict=True), "o", **style)
    final = {(cost_of(m), m.accuracy): m.arch.label for members in made.values() for m in members}
    front = pareto_front(final)
    axes.plot(*zip(*front, strict=True), color=FRONT_COLOUR, linewidth=1.5, label="Pareto front", zorder=2)
    for point in front:
        style = dict(ha="left", va="top", rotation=-30, rotation_mode="anchor", fontsize="small")
        axes.annotate(final[point], point, (4, -5), textcoords="offset points", **style)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1, y=0.1)
