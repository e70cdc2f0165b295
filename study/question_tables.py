"""The numbers behind the answers to the questions of `study.questions`, size by size and method by method."""

from collections.abc import Iterable, Sequence

from study.claims import to_come
from study.questions import (
    ALONE,
    COUNTS,
    EARLY,
    FAMILY,
    OFFER_COLUMNS,
    ONE_BY_ONE,
    SCRATCH,
    TITLES,
    ahead,
    ahead_on_average,
    by_parameters,
    costs_before,
    curves,
    end,
    from_on,
    last,
    listed,
    offers,
    paired,
    passes_after,
    storage,
)
from study.results import NONE, Results, after, cell, in_short, in_units, table

LINEAR_PROBE = ", linear probe"  # ends the names of methods that train a head alone


def name_of(method: str, epochs: int) -> str:
    return f"{method}, {after(epochs)}"


# ---------------------------------------------------------------------------------------------------------------------
# Members and their twins
# ---------------------------------------------------------------------------------------------------------------------


def members_table(study: Results) -> list[str]:
    """Each size: members before training and after each number of epochs, their twins, and how far they are ahead."""
    questions, seeds = study.questions, len(study.seeds)
    columns = [(questions.family, n) for n in study.planned_epochs(questions.family, questions.data)]
    twins = (questions.alone, questions.scratch)
    columns += [(twin, end(study, twin)) for twin in twins]
    lines = []
    for sizes, title in ((questions.sizes, "mean"), (questions.between, "mean of the sizes between")):
        for size in sizes:
            each = [study.accuracies(method, questions.data, size, n).values() for method, n in columns]
            gaps = [ahead(study, size, 0, twin) for twin in twins]
            parameters = study.parameters(size)
            line = [size, NONE if parameters is None else f"{parameters:,}", *(cell(a, seeds) for a in each)]
            lines.append([*line, *(cell(gap, seeds, "+") for gap in gaps)])
        if sizes:
            each = [study.over_sizes(method, questions.data, sizes, n).values() for method, n in columns]
            gaps = [ahead_on_average(study, sizes, 0, twin) for twin in twins]
            line = [f"**{title}**", NONE, *(cell(a, seeds) for a in each)]
            lines.append([*line, *(cell(gap, seeds, "+") for gap in gaps)])
    header = ["size", "parameters", *(name_of(*column) for column in columns)]
    return table([*header, *(f"untouched − {twin}" for twin in twins)], lines)


def fine_tuning_table(study: Results) -> list[str]:
    """Each size: when its member passes its twins, and how far it is ahead at the end."""
    questions, seeds = study.questions, len(study.seeds)
    lines = []
    for size in questions.sizes:
        line, longest = [size], last(study, size)
        for twin in (questions.scratch, questions.alone):
            first = passes_after(study, size, twin)
            line.append(NONE if first is None else str(first))
            line.append(cell(ahead(study, size, longest, twin), seeds, "+"))
        lines.append([*line, str(longest)])
    header = ["size"]
    for twin in (questions.scratch, questions.alone):
        header += [f"epochs to pass {twin}", f"ahead of {twin} at the end"]
    return table([*header, "epochs at the end"], lines)


# ---------------------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------------------


def cost_table(study: Results) -> list[str]:
    """What 1, 2, … sizes cost and store, and from which number of sizes on the family is cheaper."""
    columns = {}
    for unit in ("macs", "seconds"):
        for name, values in curves(study, unit).items():
            shown = {"macs": in_units, "seconds": "{:,.0f}".format}[unit]
            columns[f"{name}, {'MACs' if unit == 'macs' else 's'}"] = values and [*map(shown, values)]
    stored = storage(study)
    for name, values in stored.items():
        columns[f"{name}, stored parameters"] = values and [f"{value:,.0f}" for value in values]
    rows = [[str(k), *(NONE if v is None else v[i] for v in columns.values())] for i, k in enumerate(COUNTS)]
    lines = table(["sizes", *columns], rows)
    parts = []
    for unit in ("macs", "seconds"):
        found = curves(study, unit)
        ends = (f"than {name} {from_on(found, FAMILY, name)}" for name in (SCRATCH, ALONE))
        parts.append(f"in {'MACs' if unit == 'macs' else unit} {', '.join(ends)}")
    text = f"The family is cheaper {'; '.join(parts)}; it stores less {from_on(stored, FAMILY, ONE_BY_ONE)}. "
    text += "Seconds are those of runs as they were measured, start and evaluation included."
    return [*lines, "", text]


# ---------------------------------------------------------------------------------------------------------------------
# Methods
# ---------------------------------------------------------------------------------------------------------------------


def offer_tables(study: Results) -> Iterable[str]:
    """All methods of each situation, the best first."""
    for situation, methods in study.questions.who.items():
        sizes, found = offers(study, methods)
        yield from ["", f"### {situation}", "", f"Means of {in_short(sizes, study.questions.sizes)}.", ""]
        lines = [[offer.method, *offer.cells(len(study.seeds))] for offer in found]
        yield from table(["method", *OFFER_COLUMNS], lines)


def variants_table(study: Results) -> list[str]:
    """Members before training, of the family and of its variants, each over the sizes that the variant has."""
    questions, seeds = study.questions, len(study.seeds)
    data, varied = questions.data, questions.varied or questions.family
    ordered = sorted(questions.sizes, key=lambda size: study.parameters(size) or 0)
    ends = [ordered[0], ordered[-1]]
    lines = []
    for method, change in {questions.family: "–", **questions.variants}.items():
        planned = study.planned_epochs(method, data).get(0, [])
        sizes = [size for size in questions.sizes if size in planned]
        means = study.over_sizes(method, data, sizes, 0)
        macs = in_units(costs_before(study, method, data, sizes)[1])
        gap = [] if method == varied else paired(means, study.over_sizes(varied, data, sizes, 0))
        each = [study.accuracies(method, data, size, 0).values() for size in ends]
        line = [method, change, macs, in_short(sizes, questions.sizes), cell(means.values(), seeds)]
        lines.append([*line, cell(gap, seeds, "+"), *(cell(a, seeds) for a in each)])
    header = ["method", "what is changed", "stage 1, MACs", "sizes", "mean", f"mean − {varied}", *ends]
    return table(header, lines)


def methods_table(study: Results) -> list[str]:
    """Means over the sizes of the family, of all methods: one line for each list of sizes that a method has."""
    questions, seeds, data = study.questions, len(study.seeds), study.questions.data
    methods = dict.fromkeys(row.method for row in study.rows if row.kind == "vit" and row.data == data)
    planned = {}  # method, sizes → numbers of epochs
    for method in methods:
        for n, there in study.planned_epochs(method, data).items():
            if sizes := tuple(size for size in questions.sizes if size in there):
                planned.setdefault((method, sizes), []).append(n)
    epochs = sorted({n for lengths in planned.values() for n in lengths})
    lines = []
    for (method, sizes), lengths in planned.items():
        means = (study.over_sizes(method, data, sizes, n).values() if n in lengths else () for n in epochs)
        lines.append([method, in_short(sizes, questions.sizes), *(cell(mean, seeds) for mean in means)])
    return table(["method", "mean of", *map(after, epochs)], lines)


def second_table(study: Results, data: str, methods: Sequence[str]) -> list[str]:
    """Means over the sizes that all of the methods have for another data set."""
    seeds = len(study.seeds)
    planned = {method: study.planned_epochs(method, data) for method in methods}
    sizes = [size for size in study.sizes if all(size in study.sizes_for([method], data) for method in methods)]
    epochs = sorted({n for lengths in planned.values() for n in lengths})
    lines = [
        [method, *(cell(study.over_sizes(method, data, sizes, n).values(), seeds) for n in epochs)]
        for method in methods
    ]
    return [*table(["method", *map(after, epochs)], lines), "", f"Means of {in_short(sizes, study.sizes)}."]


def has_curve(study: Results) -> bool:
    """Whether a ViT from scratch was measured on images held out."""
    return bool(study.epochs([study.questions.scratch], study.questions.held_out))


def curve_table(study: Results) -> list[str]:
    """Accuracy from scratch on images held out, for each size and number of epochs."""
    data, scratch = study.questions.held_out, study.questions.scratch
    seeds = len(study.seeds_for(data))
    epochs = [*study.planned_epochs(scratch, data)]
    lines = [
        [size, *(cell(study.accuracies(scratch, data, size, n).values(), seeds) for n in epochs)]
        for size in study.sizes_for([scratch], data)
    ]
    return table(["size", *map(after, epochs)], lines)


def trials_table(study: Results, tried: Sequence[str]) -> list[str]:
    """Trials of the family's recipe on images held out: means over the sizes that all have, and single sizes."""
    data = study.questions.held_out
    seeds = len(study.seeds_for(data))
    planned = {method: study.planned_epochs(method, data) for method in tried}
    common = [size for size in study.sizes if all(size in study.sizes_for([method], data) for method in tried)]
    sizes = by_parameters(study, common)
    epochs = sorted({n for lengths in planned.values() for n in lengths})
    lines = []
    for method in tried:
        means = (cell(study.over_sizes(method, data, sizes, n).values(), seeds) for n in epochs)
        each = (cell(study.accuracies(method, data, size, epochs[0]).values(), seeds) for size in sizes)
        lines.append([method, in_units(costs_before(study, method, data, sizes)[1]), *means, *each])
    header = ["method", "stage 1, MACs", *(f"mean, {after(n)}" for n in epochs), *sizes]
    return table(header, lines)


def in_a_line(study: Results, method: str) -> str | None:
    """What the README and model cards quote of a method with a stage 1; None for others, and where ViTs are missing."""
    questions, seeds, data = study.questions, len(study.seeds), study.questions.data
    sizes = [size for size in study.sizes_for([method], data) if size in questions.sizes]
    if costs_before(study, method, data, sizes)[1] is None or not study.over_sizes(method, data, sizes, 0):
        return None

    def mean_of(name: str, epochs: int) -> str:
        return f"{cell(study.over_sizes(name, data, sizes, epochs).values(), seeds)} %"

    own = ", ".join(f"{mean_of(method, n)} {'after ' * (n > 0)}{after(n)}" for n in EARLY)
    twins = {SCRATCH: questions.scratch, ALONE: questions.alone}
    others = ", ".join(f"{label} {mean_of(name, end(study, name))}" for label, name in twins.items())
    return f"{own}; the same ViTs to the end: {others} (mean of {in_short(sizes, questions.sizes)})"


# ---------------------------------------------------------------------------------------------------------------------
# All
# ---------------------------------------------------------------------------------------------------------------------


def details(study: Results) -> list[str]:
    """The lines of details.md."""
    questions = study.questions
    lines = [f"# Results of the study “{study.name}”", "", *to_come(study)]
    lines += [
        "Test top-1 accuracy in %, after the last epoch: mean ± standard deviation (of a sample) over "
        f"{len(study.seeds)} seeds; in brackets the number of seeds where there are others than that many. Differences "
        f"are paired by seed. {NONE}: not run. The end of “{questions.alone}” and “{questions.scratch}” is their "
        "largest number of epochs."
    ]
    sections = (members_table, cost_table, fine_tuning_table)
    for number, (title, section) in enumerate(zip(TITLES, sections, strict=False), start=1):
        lines += ["", f"## {number}. {title}", "", *section(study)]
    if questions.who:
        lines += ["", f"## {len(TITLES)}. {TITLES[-1]}", *offer_tables(study)]
    if questions.variants:
        lines += ["", f"## Variants of “{questions.family}”, before training", "", *variants_table(study)]
    lines += ["", "## All methods", "", *methods_table(study)]
    for data in questions.second:
        found = {row.method: None for row in study.rows if row.kind == "vit" and row.data == data}
        probes = [method for method in found if method.endswith(LINEAR_PROBE)]
        others = [method for method in found if method not in probes]
        for title, methods in ((f"{data}, fine-tuned", others), (f"{data}, linear probe", probes)):
            if methods:
                lines += ["", f"## {title}", "", *second_table(study, data, methods)]
    if data := questions.held_out:
        tried = {row.method: None for row in study.rows if row.kind == "vit" and row.data == data}
        tried = [method for method in tried if method != questions.scratch]
        where = f"on images held out, seed {listed([*map(str, study.seeds_for(data))])}"
        if has_curve(study):
            lines += ["", f"## {questions.scratch}, {where}", "", *curve_table(study)]
        if tried:
            lines += ["", f"## Trials of “{questions.family}”, {where}", "", *trials_table(study, tried)]
    quotes = {method: in_a_line(study, method) for method in questions.offered}
    lines += ["", "## In a line", ""]
    lines += [f"- **{method}**: {quote}" for method, quote in quotes.items() if quote]
    return lines
