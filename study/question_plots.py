"""Plots of the answers to the questions of `study.questions`, for README pages about 900 pixels wide."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from study.plots import (
    LEARNGENES,
    LINEAR,
    MARKERS,
    OTHERS,
    SCRATCH,
    draw_points,
    draw_rows,
    handles_of,
    legend,
    mark_sizes,
    tidy,
)
from study.questions import (
    ALONE,
    COUNTS,
    EARLY,
    FAMILY,
    GIVEN,
    ONE_BY_ONE,
    Curves,
    break_even,
    by_parameters,
    curves,
    end,
    storage,
)
from study.questions import SCRATCH as FROM_SCRATCH
from study.results import Results, after, in_units

from matplotlib.axes import Axes
from matplotlib.figure import Figure

OF_FAMILY = dict(color=LEARNGENES[0], marker="o")
OF_ALONE = dict(color=LEARNGENES[1], marker="D")
OF_SCRATCH = dict(color=SCRATCH, marker="^")
CURVES = {
    FAMILY: dict(color=LEARNGENES[0]),
    GIVEN: dict(color=LEARNGENES[0], linestyle="--"),
    ALONE: dict(color=LEARNGENES[1]),
    FROM_SCRATCH: dict(color=SCRATCH),
    ONE_BY_ONE: dict(color="black"),
}
# curves of the family → those whose break-even with them is marked
MARKED = {FAMILY: (FROM_SCRATCH, ALONE, ONE_BY_ONE), GIVEN: (FROM_SCRATCH,)}


# ---------------------------------------------------------------------------------------------------------------------
# All in one picture
# ---------------------------------------------------------------------------------------------------------------------


def draw_answers(study: Results) -> Figure:
    """Left: accuracy of the members, untouched, and of their twins against parameters. Right: MACs of 1, 2, … sizes."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    in_corner = dict(frameon=False, fontsize=9)
    left.legend(handles=handles_of(draw_sizes(left, study)), loc="lower right", **in_corner)
    found = curves(study, "macs")
    draw_curves(right, found)
    shown = {name: CURVES[name] for name in found if found[name]}
    right.legend(handles=handles_of(shown), loc="upper left", **in_corner)
    right.set_ylabel("training, MACs")
    right.yaxis.set_major_formatter(lambda value, _: in_units(value))
    return figure


def draw_sizes(axes: Axes, study: Results) -> dict[str, dict]:
    """Members before training, hollow where stage 1 never sampled their size, and twins. Returns what is shown."""
    questions, data = study.questions, study.questions.data
    places = {size: study.parameters(size) / 1e3 for size in by_parameters(study, study.sizes)}
    hollow = OF_FAMILY | {"markerfacecolor": "white"}
    series = [
        (f"{questions.scratch}, {after(end(study, questions.scratch))}", questions.scratch, OF_SCRATCH, 0.97),
        (f"{questions.alone}, {after(end(study, questions.alone))}", questions.alone, OF_ALONE, 1.03),
        ("members, sizes never sampled", questions.family, hollow, 1.0),
        ("members, untouched", questions.family, OF_FAMILY, 1.0),
    ]
    shown = {}
    for name, method, style, shift in series:  # beside each other, as many are as good
        epochs = 0 if method == questions.family else end(study, method)
        sizes = questions.between if style is hollow else questions.sizes
        points = [
            (places[size] * shift, [*study.accuracies(method, data, size, epochs).values()])
            for size in sizes
            if size in places
        ]
        if any(values for _, values in points):
            shown[name] = style | {"linestyle": "none"}
            draw_points(axes, points, **shown[name])
    named = {*questions.sizes, *questions.between}
    mark_sizes(axes, {size: place for size, place in places.items() if size in named}, fontsize=7)
    axes.set_ylabel(f"{data}: test accuracy, %")
    return dict(reversed(shown.items()))


# ---------------------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------------------


def draw_curves(axes: Axes, found: Curves) -> None:
    """Cost against the number of sizes, with a ring at the first number where the family is cheaper."""
    for name, values in found.items():
        if values:
            axes.plot([*COUNTS], values, linewidth=1.8, marker=".", **CURVES[name])
    for family, others in MARKED.items():
        for other in others:
            if not found.get(family) or not found.get(other):
                continue
            if k := break_even(found[family], found[other]):
                place = k, found[family][k - 1]
                style = dict(marker="o", markersize=8, markerfacecolor="white", zorder=5)
                axes.plot(*place, **style, color=CURVES[other]["color"])
                axes.annotate(f"from {k}", place, (6, -13), textcoords="offset points", fontsize=9)
    axes.set_xlabel("number of sizes, of average cost")
    axes.set_xticks([*COUNTS])
    axes.set_ylim(bottom=0)
    tidy(axes)


def draw_costs(study: Results) -> Figure:
    """MACs, seconds and stored parameters of 1, 2, … sizes."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = {
        "MACs of training": curves(study, "macs"),
        "seconds of training": curves(study, "seconds"),
        "stored parameters": storage(study),
    }
    shown = {}
    for axes, (title, found) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        draw_curves(axes, found)
        axes.yaxis.set_major_formatter(lambda value, _: in_units(value))
        axes.set_title(title, fontsize=10)
        shown |= {name: CURVES[name] for name, values in found.items() if values}
    legend(figure, shown, columns=5)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning
# ---------------------------------------------------------------------------------------------------------------------


def three_of(study: Results) -> list[str]:
    """The smallest, the middle and the largest size of the family."""
    there = by_parameters(study, study.questions.sizes)
    return list(dict.fromkeys([*there[:1], *there[len(there) // 2 :][:1], *there[-1:]]))


def draw_fine_tuning(study: Results) -> Figure:
    """Accuracy over epochs of fine-tuning at three sizes, near that of the twins at their end, which are lines across.

    What methods have before that is in `draw_methods`.
    """
    questions, data = study.questions, study.questions.data
    methods = [m for m in questions.offered if m not in (questions.family, questions.alone, questions.scratch)]
    colors = (LINEAR, *OTHERS)
    styles = {
        method: dict(
            color=colors[i % len(colors)],
            marker=MARKERS["others"][i % len(MARKERS["others"])],
            linestyle="-" if i < len(colors) else ":",
        )
        for i, method in enumerate(methods)
    }
    styles[questions.family] = OF_FAMILY  # drawn last, on top
    sizes = three_of(study)
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    entries = {}
    for axes, size in zip(figure.subplots(1, 3, squeeze=False, sharey=True)[0], sizes, strict=False):
        entries |= draw_lengths(axes, study, size, styles)
        for twin, style in ((questions.alone, OF_ALONE), (questions.scratch, OF_SCRATCH)):
            accuracy = study.mean(twin, data, size, end(study, twin))
            if accuracy is not None:
                line = dict(color=style["color"], linestyle="--", linewidth=1.5)
                axes.axhline(accuracy, **line)
                entries[f"{twin}, {after(end(study, twin))}"] = line
        axes.set_title(size, fontsize=10)
        axes.set_xlabel("epochs of fine-tuning")
        tidy(axes)
    shown = {*styles, questions.alone, questions.scratch}
    trained = [row.accuracy for row in study.rows if row.method in shown and row.data == data and row.epochs > 1]
    if trained:
        figure.axes[0].set_ylim(min(trained) - 1, max(trained) + 1)
    figure.axes[0].set_ylabel(f"{data}: test accuracy, %")
    legend(figure, entries, columns=3)
    return figure


def draw_lengths(axes: Axes, study: Results, size: str, styles: Mapping[str, dict]) -> dict[str, dict]:
    """Methods that start from weights, at one size. Returns the styles of those that have any runs."""
    data, shown, ticks = study.questions.data, {}, set()
    for method, style in styles.items():
        lengths = study.planned_epochs(method, data)
        points = [(n, [*study.accuracies(method, data, size, n).values()]) for n in lengths]
        if 0 in lengths and sum(bool(values) for _, values in points) > 1:
            shown[method] = style
            ticks |= {n for n, values in points if values}
            draw_points(axes, points, **style)
    axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    axes.set_xticks(sorted(ticks or EARLY), [str(n) for n in sorted(ticks or EARLY)])
    axes.minorticks_off()
    return shown


# ---------------------------------------------------------------------------------------------------------------------
# Methods
# ---------------------------------------------------------------------------------------------------------------------


def draw_methods(study: Results) -> Figure:
    """Mean accuracy over the sizes that each has: above of the methods to choose from, below of the variants."""
    questions = study.questions
    panels = []
    for methods in ([questions.family, *questions.offered], [questions.family, *questions.variants]):
        sizes = sizes_untrained(study, dict.fromkeys(methods))
        if len(sizes) > 1 or not panels:
            panels.append(sizes)
    heights = [1 + len(sizes) for sizes in panels]
    figure = Figure(figsize=(9, 1.2 + 0.3 * sum(heights)), layout="constrained")
    for axes, sizes in zip(
        figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0], panels, strict=True
    ):
        draw_means(axes, study, sizes)
    axes.set_xlabel(f"{questions.data}: test accuracy, %, mean of sizes")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def sizes_untrained(study: Results, methods: Iterable[str]) -> dict[str, Sequence[str]]:
    """The sizes of the family that each method has before training; of methods that have run."""
    questions, data, found = study.questions, study.questions.data, {}
    for method in methods:
        planned = study.planned_epochs(method, data).get(0, [])
        there = [size for size in questions.sizes if size in planned]
        if there and any(study.over_sizes(method, data, there, n) for n in EARLY):
            found[method] = there
    return found


def draw_means(axes: Axes, study: Results, sizes: Mapping[str, Sequence[str]]) -> None:
    """One line for each method, the best before training first."""
    questions, data = study.questions, study.questions.data
    untrained = {method: [*study.over_sizes(method, data, there, 0).values()] for method, there in sizes.items()}
    order = sorted(sizes, key=lambda m: statistics.mean(untrained[m]) if untrained[m] else 0, reverse=True)
    total = len(questions.sizes)
    names = [m if len(sizes[m]) == total else f"{m} ({len(sizes[m])} of {total} sizes)" for m in order]
    columns = {after(n): [[*study.over_sizes(m, data, sizes[m], n).values()] for m in order] for n in EARLY}
    draw_rows(axes, names, columns)


def draw_curve(study: Results) -> Figure:
    """How accuracy on images held out grows with the epochs from scratch, for each size that has a curve."""
    data, scratch = study.questions.held_out, study.questions.scratch
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    lengths, entries = [*study.planned_epochs(scratch, data)], {}
    colors = (*LEARNGENES, LINEAR, *OTHERS)
    sizes = sorted(study.sizes_for([scratch], data), key=lambda size: study.parameters(size) or 0)
    for i, size in enumerate(sizes):
        points = [(n, [*study.accuracies(scratch, data, size, n).values()]) for n in lengths]
        if any(values for _, values in points):
            marker = MARKERS["others"][i % len(MARKERS["others"])]
            entries[size] = dict(color=colors[i % len(colors)], marker=marker)
            draw_points(axes, points, **entries[size])
    axes.set_xscale("log")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()
    axes.set_xlabel("epochs from scratch")
    axes.set_ylabel("accuracy on images held out, %")
    tidy(axes)
    legend(figure, entries, columns=4)
    return figure
