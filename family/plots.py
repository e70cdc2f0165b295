"""``family.png``: accuracy over parameters, MACs and latency."""

from collections.abc import Iterable, Sequence

from family.plan import Member

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, accuracy) points for which no cheaper or equally cheap point is more accurate, by ascending cost."""
    front = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def plot_family(members: Sequence[Member], title: str) -> Figure:
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    costs = [
        ("parameters", "", [m.params for m in members]),
        ("MACs of one image", "", [m.macs for m in members]),
        ("latency of one image", "s", [m.record["latency_ms_1"] / 1000 for m in members]),
    ]
    for axes, (label, unit, values) in zip(panels, costs, strict=True):
        axes.set_xlabel(label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(unit))
        axes.xaxis.set_minor_formatter(NullFormatter())
        plot_panel(axes, members, values)
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend(frameon=False)
    figure.suptitle(title)
    return figure


def plot_panel(axes: Axes, members: Sequence[Member], costs: Sequence[float]) -> None:
    """Hollow markers before fine-tuning, filled ones after it; the Pareto front of the final accuracies, with names."""
    both = {"untrained": ("accuracy_before", "white"), "fine-tuned": ("accuracy_after", "#0b6e99")}
    for label, (key, colour) in both.items():
        points = [(c, m.record[key]) for c, m in zip(costs, members, strict=True) if m.record[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color="#0b6e99", markerfacecolor=colour, label=label, zorder=3)
    final = {(cost, m.accuracy): m.name for cost, m in zip(costs, members, strict=True)}
    front = pareto_front(final)
    axes.plot(*zip(*front, strict=True), color="#c4572e", linewidth=1.5, label="Pareto front", zorder=2)
    for point in front:
        style = dict(ha="left", va="top", rotation=-30, rotation_mode="anchor", fontsize="small")
        axes.annotate(final[point], point, (4, -5), textcoords="offset points", **style)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1, y=0.1)
