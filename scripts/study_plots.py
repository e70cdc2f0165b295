"""Plots of a study, for README pages about 900 pixels wide."""

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from study_claims import family_macs
from study_results import Study, after, spread

# Okabe and Ito's colours, which the colour-blind can tell apart
LEARNGENES = ("#0072b2", "#d55e00")
LINEAR, SCRATCH = "#009e73", "#6b6b6b"
OTHERS = ("#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = {"learngenes": "oD", "others": "vP<X>*"}


def styles(study: Study) -> dict[str, dict[str, str]]:
    """Colour and marker of each method, the same in all plots."""
    report = study.report
    found = {}
    for i, method in enumerate(report.learngenes):
        found[method] = dict(color=LEARNGENES[i % 2], marker=MARKERS["learngenes"][i % 2])
    if report.linear:
        found.setdefault(report.linear, dict(color=LINEAR, marker="s"))
    found.setdefault(report.scratch, dict(color=SCRATCH, marker="^"))
    others = [method for method in report.rivals if method not in found]
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


def legend(figure: Figure, entries: dict[str, dict], columns: int) -> None:
    """One for all axes, below them."""
    handles = [Line2D([], [], label=label, markersize=6, **style) for label, style in entries.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy over epochs
# ---------------------------------------------------------------------------------------------------------------------


def three_of(study: Study) -> list[str]:
    """The smallest, a middle and the largest size of those that most methods have."""
    report = study.report
    shared = study.sizes_with(report.linear, report.first) if report.linear else []
    there = [size for size in study.sizes if study.parameters(size)]
    by_parameters = sorted(there, key=study.parameters)
    few = sorted(shared, key=study.parameters)
    chosen = {*by_parameters[:1], *few[len(few) // 2 : len(few) // 2 + 1], *by_parameters[-1:]}
    if len(chosen) < 3:
        chosen |= set(by_parameters[len(by_parameters) // 2 :][:1])
    return sorted(chosen, key=study.parameters)


def draw_epochs(study: Study) -> Figure:
    """Accuracy over epochs of training, of up to three sizes, one row of axes for each data set."""
    report = study.report
    data_sets = [data for data in (report.first, report.second) if data]
    sizes = three_of(study) or study.sizes[:1]
    figure = Figure(figsize=(9, 2.6 * len(data_sets) + 0.8), layout="constrained")
    grid = figure.subplots(len(data_sets), len(sizes), sharex=True, sharey="row", squeeze=False)
    shown: dict[str, dict] = {}
    for row, data in zip(grid, data_sets, strict=True):
        for axes, size in zip(row, sizes, strict=True):
            shown |= draw_size(axes, study, data, size)
            tidy(axes)
        row[0].set_ylabel(f"{data}\ntest accuracy, %")
    for axes, size in zip(grid[0], sizes, strict=True):
        axes.set_title(f"{size}, {study.parameters(size) or 0:,} parameters", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("epochs of training")
    legend(figure, {m: shown[m] for m in styles(study) if m in shown}, columns=min(4, max(1, len(shown))))
    return figure


def draw_size(axes: Axes, study: Study, data: str, size: str) -> dict[str, dict]:
    """All methods at one size. Returns the styles of those that have any runs."""
    shown = {}
    lengths = study.epochs(study.report.methods, data)
    for method, style in styles(study).items():
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


def draw_family(study: Study) -> Figure:
    """Accuracy against parameters, before training and after 1 epoch, with the longest training from scratch."""
    report = study.report
    lengths = study.epochs([report.scratch], report.first)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    descended = [*report.learngenes, *([report.linear] if report.linear else [])]
    places = {size: count / 1e3 for size in study.sizes if (count := study.parameters(size))}
    entries = {}
    for axes, epochs in zip(both, (0, 1), strict=True):
        for method in descended:
            points = [(x, [*study.accuracies(method, report.first, s, epochs).values()]) for s, x in places.items()]
            entries[method] = styles(study)[method] | {"linestyle": "none"}
            draw_points(axes, points, **entries[method])
        if lengths:
            runs = [(x, study.accuracies(report.scratch, report.first, s, lengths[-1])) for s, x in places.items()]
            style = styles(study)[report.scratch] | {"linestyle": "none", "markerfacecolor": "white"}
            entries[f"{report.scratch}, {after(lengths[-1])}"] = style
            draw_points(axes, [(x, [*run.values()]) for x, run in runs], **style)
        for size, x in places.items():
            axes.annotate(size, (x, 0), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                          rotation=90, ha="center", va="bottom", fontsize=7, color="#8a8a8a")  # fmt: skip
        axes.set_title(f"learngenes: {after(epochs)}", fontsize=10)
        axes.set_xlabel("parameters, thousands")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        tidy(axes)
    both[0].set_ylabel(f"{report.first}: test accuracy, %")
    legend(figure, entries, columns=len(entries))
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Ablations
# ---------------------------------------------------------------------------------------------------------------------


def draw_ablations(study: Study) -> Figure:
    """Mean accuracy of variants of a learngene before training and after 1 epoch."""
    first = study.report.first
    methods = list(dict.fromkeys([*study.report.learngenes, *study.report.ablations]))
    figure = Figure(figsize=(9, 0.9 + 0.36 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for epochs, colour, face in ((0, LEARNGENES[0], "white"), (1, LEARNGENES[0], LEARNGENES[0])):
        sizes = study.shared_sizes(methods, first, epochs)
        for y, method in enumerate(methods):
            values = [*study.over_sizes(method, first, sizes, epochs).values()]
            if values:
                axes.errorbar(statistics.mean(values), y, xerr=spread(values), color=colour, marker="o", capsize=2,
                              markerfacecolor=face, markersize=7)  # fmt: skip
        label = f"{after(epochs)}, mean of {', '.join(sizes) if len(sizes) < len(study.sizes) else 'all sizes'}"
        axes.plot([], [], "o", color=colour, markerfacecolor=face, label=label)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlabel(f"{first}: test accuracy, %")
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------------------


def draw_cost(study: Study) -> Figure:
    """Mean accuracy against the training cost of all sizes, and again of those sizes that the linear method has."""
    report = study.report
    families = {f"all {len(study.sizes)} sizes": study.sizes}
    if report.linear:
        sizes = study.sizes_with(report.linear, report.first)
        if 0 < len(sizes) < len(study.sizes):
            families[f"the {len(sizes)} sizes that {report.linear} has"] = sizes
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    row = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    entries = {}
    for axes, (title, sizes) in zip(row, families.items(), strict=True):
        entries |= draw_costs(axes, study, sizes)
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log")
        axes.set_xlabel("training of all of them, MACs")
        tidy(axes)
    row[0].set_ylabel(f"{report.first}: mean test accuracy, %")
    legend(figure, entries, columns=max(1, len(entries)))
    return figure


def draw_costs(axes: Axes, study: Study, sizes: Sequence[str]) -> dict[str, dict]:
    """Each method after each number of epochs. Returns the styles of those that have run."""
    report = study.report
    shown = {}
    for method in [*report.learngenes, *([report.linear] if report.linear else []), report.scratch]:
        points = []
        for n in study.epochs([method], report.first):
            values = [*study.over_sizes(method, report.first, sizes, n).values()]
            if method == report.scratch:
                macs = [study.macs(method, report.first, size, n) for size in sizes]
                cost = None if None in macs else sum(macs)
            else:
                cost = family_macs(study, method, sizes, n)
            if values and cost:
                points.append((cost, values, n))
        if not points:
            continue
        shown[method] = styles(study)[method]
        draw_points(axes, [(x, values) for x, values, _ in points], **shown[method])
        for x, values, n in points:
            axes.annotate(str(n), (x, statistics.mean(values)), (6, -9), textcoords="offset points", fontsize=8,
                          color=shown[method]["color"])  # fmt: skip
    return shown
