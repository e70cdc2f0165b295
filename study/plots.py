"""Plots of a study, for README pages about 900 pixels wide."""

import statistics
from collections.abc import Mapping, Sequence

from study.claims import family_macs
from study.results import NONE, Results, after, in_short, spread

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

# Okabe and Ito's colours, and one of Tol's, which the colour-blind can tell apart
LEARNGENES = ("#0072b2", "#d55e00", "#882255")
LINEAR, SCRATCH = "#009e73", "#6b6b6b"
OTHERS = ("#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = {"learngenes": "oDv", "others": "vP<X>*"}
NEAR = 0.05  # of an axis: names of sizes that are nearer than that move apart


def styles(study: Results) -> dict[str, dict[str, str]]:
    """Colour and marker of each method, the same in all plots."""
    report = study.report
    found = {}
    for i, method in enumerate(report.learngenes):
        found[method] = dict(color=LEARNGENES[i % 3], marker=MARKERS["learngenes"][i % 3])
    if report.linear:
        found.setdefault(report.linear, dict(color=LINEAR, marker="s"))
    found.setdefault(report.scratch, dict(color=SCRATCH, marker="^"))
    others = [method for method in report.baselines if method not in found]
    for i, method in enumerate(others):
        marker = MARKERS["others"][i % len(MARKERS["others"])]
        found[method] = dict(color=OTHERS[i % len(OTHERS)], marker=marker)
    return found


def tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_points(axes: Axes, points: Sequence[tuple[float, Sequence[float]]], **style) -> None:
    """Means with standard deviations as bars; a point is a place on the x axis and the values of its seeds."""
    x = [place for place, values in points if values]
    means = [statistics.mean(values) for _, values in points if values]
    bars = [spread(values) for _, values in points if values]
    axes.errorbar(x, means, bars, **{"markersize": 5, "linewidth": 1.5, "elinewidth": 1, "capsize": 2, **style})


def mark_sizes(axes: Axes, places: Mapping[str, float], fontsize: int = 8) -> None:
    """An x axis of parameters in thousands, with the names of sizes at their places on top."""
    axes.set_xlabel("parameters, thousands")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    tidy(axes)
    names = axes.secondary_xaxis("top")
    names.xaxis.set_minor_locator(NullLocator())
    ordered = sorted(places.items(), key=lambda item: item[1])
    names.set_xticks([place for _, place in ordered], [name for name, _ in ordered], rotation=90, fontsize=fontsize)
    names.spines["top"].set_visible(False)
    near = (ordered[-1][1] / ordered[0][1]) ** NEAR if ordered else 1.0
    labels = names.get_xticklabels()
    for i in range(len(ordered) - 1):
        if ordered[i + 1][1] < near * ordered[i][1]:
            labels[i].set_horizontalalignment("right")
            labels[i + 1].set_horizontalalignment("left")


def draw_rows(axes: Axes, names: Sequence[str], columns: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """One line for each name, with the mean and standard deviation of its values in each column as a point.

    Args:
        columns: labels of the legend → values of all names; the points of the first are hollow.
    """
    for (label, values), face in zip(columns.items(), ("white", LEARNGENES[0], LEARNGENES[1]), strict=False):
        color = LEARNGENES[0] if face == "white" else face
        style = dict(color=color, marker="o", linestyle="none", markerfacecolor=face, markersize=7)
        for y, of_name in enumerate(values):
            if of_name:
                axes.errorbar(statistics.mean(of_name), y, xerr=spread(of_name), capsize=2, **style)
        axes.plot([], [], label=label, **style)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    tidy(axes)


def legend(figure: Figure, entries: dict[str, dict], columns: int) -> None:
    """One for all axes, below them."""
    figure.legend(handles=handles_of(entries), loc="outside lower center", ncols=columns, frameon=False)


def handles_of(entries: dict[str, dict]) -> list[Line2D]:
    """What a legend shows of labels and their styles."""
    return [Line2D([], [], label=label, markersize=6, **style) for label, style in entries.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy over epochs
# ---------------------------------------------------------------------------------------------------------------------


def three_of(study: Results, data: str) -> list[str]:
    """The smallest, a middle and the largest size for a data set; the middle one is of the linear method, if it can."""
    report = study.report
    there = sorted(study.sizes_for(report.methods, data), key=lambda size: study.parameters(size) or 0)
    linear = [size for size in there[1:-1] if report.linear and size in study.sizes_for([report.linear], data)]
    middle = linear or there[1:-1]
    return [*there[:1], *middle[len(middle) // 2 :][:1], *there[1:][-1:]]


def draw_epochs(study: Results) -> Figure:
    """Accuracy over epochs of training, of up to three sizes, one row of axes for each data set."""
    sizes = {data: three_of(study, data) for data in (study.report.first, study.report.second) if data}
    figure = Figure(figsize=(9, 2.8 * len(sizes) + 0.8), layout="constrained")
    grid = figure.subplots(len(sizes), max(map(len, sizes.values())), sharey="row", squeeze=False)
    shown: dict[str, dict] = {}
    for row, data in zip(grid, sizes, strict=True):
        for axes in row[len(sizes[data]) :]:
            axes.set_axis_off()
        for axes, size in zip(row, sizes[data], strict=False):
            shown |= draw_size(axes, study, data, size)
            axes.set_title(f"{data}, {size}", fontsize=10)
            tidy(axes)
        row[0].set_ylabel("test accuracy, %")
    for axes in grid[-1]:
        axes.set_xlabel("epochs of training")
    legend(figure, {m: shown[m] for m in styles(study) if m in shown}, columns=4)
    return figure


def draw_size(axes: Axes, study: Results, data: str, size: str) -> dict[str, dict]:
    """All methods at one size. Returns the styles of those that have any runs."""
    shown = {}
    chosen = styles(study)
    lengths = study.epochs(chosen, data)
    for method, style in reversed(chosen.items()):  # the learngenes on top
        points = [(n, [*study.accuracies(method, data, size, n).values()]) for n in lengths]
        if any(values for _, values in points):
            shown[method] = style
            draw_points(axes, points, **style)
    ticks = [n for n in (0, 1, 10, 100, 300) if n <= max(lengths, default=1)]
    axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    return shown


# ---------------------------------------------------------------------------------------------------------------------
# The family
# ---------------------------------------------------------------------------------------------------------------------


def draw_family(study: Results) -> Figure:
    """Accuracy against parameters, before training and after 1 epoch, with the longest training from scratch."""
    report = study.report
    lengths = study.epochs([report.scratch], report.first)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    both = figure.subplots(1, 2)
    places = {size: count / 1e3 for size in study.sizes if (count := study.parameters(size))}
    entries = {}
    for axes, epochs in zip(both, (0, 1), strict=True):
        for method in report.descended:
            points = [(x, [*study.accuracies(method, report.first, s, epochs).values()]) for s, x in places.items()]
            entries[method] = styles(study)[method] | {"linestyle": "none"}
            draw_points(axes, points, **entries[method])
        if lengths:
            runs = [(x, study.accuracies(report.scratch, report.first, s, lengths[-1])) for s, x in places.items()]
            style = styles(study)[report.scratch] | {"linestyle": "none", "markerfacecolor": "white"}
            entries[f"{report.scratch}, {after(lengths[-1])}"] = style
            draw_points(axes, [(x, [*run.values()]) for x, run in runs], **style)
        axes.set_title(
            "learngenes before training" if epochs == 0 else f"learngenes after {after(epochs)}", fontsize=10
        )
        mark_sizes(axes, places)
    both[0].set_ylabel(f"{report.first}: test accuracy, %")
    legend(figure, entries, columns=len(entries))
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Ablations
# ---------------------------------------------------------------------------------------------------------------------


def draw_ablations(study: Results) -> Figure:
    """Mean accuracy of variants of a learngene before training and after 1 epoch."""
    first = study.report.first
    methods = list(dict.fromkeys([*study.report.learngenes, *study.report.ablations]))
    figure = Figure(figsize=(9, 1.1 + 0.34 * len(methods)), layout="constrained")
    axes = figure.subplots()
    columns = {}
    for epochs in (0, 1):
        sizes = study.shared_sizes(methods, first, epochs)
        label = f"{after(epochs)}, mean of {in_short(sizes, study.sizes)}"
        columns[label] = [[*study.over_sizes(method, first, sizes, epochs).values()] for method in methods]
    draw_rows(axes, methods, columns)
    axes.set_xlabel(f"{first}: test accuracy, %")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------------------


def draw_cost(study: Results) -> Figure:
    """Mean accuracy against the training cost of all sizes, and again of those sizes that the linear method has."""
    report = study.report
    families = {f"all {len(study.sizes)} sizes": study.sizes}
    if report.linear:
        sizes = study.sizes_for([report.linear], report.first)
        if 0 < len(sizes) < len(study.sizes):
            families[f"the {len(sizes)} sizes that {report.linear} has"] = sizes
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    row = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    entries = {}
    for axes, (title, sizes) in zip(row, families.items(), strict=True):
        entries |= draw_costs(axes, study, sizes)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.22)
        axes.set_xscale("log")
        axes.set_xlabel("training of the whole family, MACs")
        tidy(axes)
    row[0].set_ylabel(f"{report.first}: mean test accuracy, %")
    lengths = [str(n) for n in study.epochs(report.descended, report.first) if n > 0]
    figure.suptitle(
        f"from learngenes: before training (hollow), after {', '.join(lengths) or NONE} epochs", fontsize=11
    )
    order = [*styles(study), *entries]
    legend(figure, dict(sorted(entries.items(), key=lambda entry: order.index(entry[0]))), columns=5)
    return figure


def draw_costs(axes: Axes, study: Results, sizes: Sequence[str]) -> dict[str, dict]:
    """Each method after each number of epochs. Returns the entries of the legend."""
    report = study.report
    entries = {}
    for method in (*report.descended, report.scratch):
        points = []
        for n in study.epochs([method], report.first):
            values = [*study.over_sizes(method, report.first, sizes, n).values()]
            macs = family_macs(study, method, sizes, n)
            if values and macs:
                points.append((n, macs, values))
        if not points:
            continue
        style = entries[method] = styles(study)[method]
        draw_points(axes, [(macs, values) for _, macs, values in points], **style)
        places = [(macs, statistics.mean(values)) for _, macs, values in points]
        for (n, _, _), place in zip(points, places, strict=True):
            if n == 0:
                axes.plot(*place, markerfacecolor="white", markersize=5, zorder=5, **style)
            elif method == report.scratch:
                label = dict(ha="right", fontsize=9, color=style["color"])
                axes.annotate(after(n), place, (-7, 4), textcoords="offset points", **label)
        if method != report.scratch and (teacher := study.teacher_macs()):
            dotted = dict(linestyle=":", linewidth=1.2)
            axes.plot([x + teacher for x, _ in places], [y for _, y in places], color=style["color"], **dotted)
            entries["with the teacher's training"] = dict(color="black", **dotted)
    return entries
