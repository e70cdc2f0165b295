"""Tables, answers and plots of a study, from what scripts/study.py measured.

Reads results.csv and study.yaml in the study's folder and writes beside them, for a study with a report, tables.md,
claims.md, summary.md, epochs.png, family.png, cost.png, and ablations.png if it has any; for one with questions,
answers.md, details.md, tables.md, answers.png, cost.png, finetuning.png, methods.png, and curve.png if it has a curve;
for others tables.md. A study that is not finished gives what it has so far.

scripts/study_report.py results/cpu
"""

import argparse
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import models
from common.files import atomic_write
from options import local_path
from study.archive import ARCHIVE, check_rows
from study.claims import claims, family_macs
from study.plots import draw_ablations, draw_cost, draw_epochs, draw_family
from study.question_plots import draw_answers, draw_costs, draw_curve, draw_fine_tuning, draw_methods
from study.question_tables import details, has_curve
from study.questions import answers, costs_before
from study.results import NONE, Results, after, cell, in_short, in_units, read_results, table

from matplotlib.figure import Figure

# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def columns(study: Results, data: str) -> list[tuple[str, int]]:
    """Methods and numbers of epochs of the main table; where nothing has run yet, those of the papers' claims."""
    report = study.report
    descended = [m for m in report.descended if m in report.learngenes or study.sizes_for([m], data)]
    few = study.epochs(descended, data) or [0, 1, 10]
    many = [n for n in study.epochs([report.scratch], data) if n > 0] or [1, 10, 100]
    made = [(method, n) for method in descended for n in few if study.is_planned(method, data, n)]
    return made + [(report.scratch, n) for n in many]


def main_table(study: Results, data: str) -> list[str]:
    """Accuracy per size, and means over all sizes and over those of the linear method."""
    chosen, seeds = columns(study, data), len(study.seeds)
    everything = study.sizes_for([method for method, _ in chosen], data)
    lines = [
        [size, *(cell(study.accuracies(m, data, size, n).values(), seeds) for m, n in chosen)] for size in everything
    ]
    groups = {f"mean of all {len(everything)}": everything}
    if study.report.linear:
        sizes = study.sizes_for([study.report.linear], data)
        if 0 < len(sizes) < len(everything):
            groups[f"mean of the {len(sizes)} of {study.report.linear}"] = sizes
    for name, sizes in groups.items():
        means = (cell(study.over_sizes(m, data, sizes, n).values(), seeds) for m, n in chosen)
        lines.append([f"**{name}**", *means])
    return table(["size", *(f"{method}, {after(n)}" for method, n in chosen)], lines)


def untrained_table(study: Results) -> list[str]:
    """Accuracy before training, per method and size, and what the method stores."""
    report = study.report
    lines = []
    for method in dict.fromkeys([*report.descended, *report.baselines]):
        own = study.sizes_of(method, report.first, 0)
        stored = study.stored(method)
        mean = cell(study.over_sizes(method, report.first, own, 0).values(), len(study.seeds))
        line = [method, NONE if stored is None else f"{stored:,}", f"{mean}, {len(own)} sizes" if own else NONE]
        for size in study.sizes:
            line.append(cell(study.accuracies(method, report.first, size, 0).values(), len(study.seeds)))
        lines.append(line)
    return table(["method", "stored parameters", "mean of its sizes", *study.sizes], lines)


def baselines_table(study: Results, data: str) -> list[str]:
    """Accuracy of every baseline over its own sizes, and of learngenes and scratch over the same."""
    report = study.report
    compared = [*report.learngenes, report.scratch]
    epochs = study.epochs([*compared, *report.baselines], data)
    lines = []
    for baseline in report.baselines:
        sizes = study.sizes_for([baseline], data)
        for method in [baseline, *compared] if sizes else []:
            means = (cell(study.over_sizes(method, data, sizes, n).values(), len(study.seeds)) for n in epochs)
            lines.append([in_short(sizes, study.sizes) if method == baseline else "", method, *means])
    return table(["mean over", "method", *map(after, epochs)], lines)


def variants_table(study: Results, methods: Sequence[str]) -> list[str]:
    """Mean accuracy of variants of a learngene over the sizes that all of those that have run have."""
    learngenes, first = study.report.learngenes, study.report.first
    epochs = study.epochs({*methods} - {*learngenes}, first) or [0, 1]
    methods = list(dict.fromkeys([*learngenes, *methods]))
    sizes = {n: study.shared_sizes(methods, first, n) for n in epochs}
    lines = [
        [m, *(cell(study.over_sizes(m, first, sizes[n], n).values(), len(study.seeds)) for n in epochs)]
        for m in methods
    ]
    of = "; ".join(f"{after(n)}: {in_short(sizes[n], study.sizes)}" for n in epochs)
    return [*table(["method", *map(after, epochs)], lines), "", f"Means over the sizes that all of them have: {of}."]


def cost_table(study: Results) -> list[str]:
    """What the family of each learngene, or of a variant with all sizes, costs and stores, and the same one by one."""
    report = study.report
    first = report.first
    variants = [m for m in report.ablations if study.sizes_for([m], first) == study.sizes]
    lines = []
    for method in dict.fromkeys([*report.descended, *variants]):
        sizes = study.sizes_for([method], first)
        stage_1 = study.stage_1_macs(method)
        total = family_macs(study, method, sizes, 1)
        lines.append([method, str(len(sizes)), in_units(stage_1)])
        lines[-1] += [NONE if None in (total, stage_1) else in_units(total - stage_1), in_units(total)]
        lines[-1] += storage(study, study.stored(method), sizes)
    for n in (n for n in study.epochs([report.scratch], first) if n > 0):
        sizes = study.sizes_of(report.scratch, first, n)
        total = sum(study.cost(report.scratch, first, size, n) for size in sizes)
        lines.append([f"{report.scratch}, {after(n)}", str(len(sizes)), NONE, in_units(total), in_units(total)])
        lines[-1] += storage(study, sum(study.parameters(size) for size in sizes), sizes)
    header = ["method", "sizes", "stage 1, MACs", "ViTs, MACs", "together, MACs", "stored parameters", "of all ViTs"]
    teacher = f"Training the teacher, which is not counted here, costs {in_units(study.teacher_macs())} MACs."
    return [*table([*header, "ratio"], lines), "", teacher]


def storage(study: Results, stored: int | None, sizes: Sequence[str]) -> list[str]:
    """Parameters stored, those of all ViTs, and how many times more these are."""
    each = [study.parameters(size) for size in sizes]
    if stored is None or None in each:
        return [NONE] * 3
    total = sum(each)
    return [f"{stored:,}", f"{total:,}", f"{total / stored:.1f} ×"]


def tables(study: Results) -> list[str]:
    """The lines of tables.md."""
    report = study.report
    sections = {f"{report.first}: accuracy": main_table(study, report.first)}
    if report.second:
        sections[f"{report.second}: accuracy"] = main_table(study, report.second)
    sections[f"{report.first}, before training"] = untrained_table(study)
    if report.baselines:
        for data in filter(None, (report.first, report.second)):
            sections[f"{data}: baselines"] = baselines_table(study, data)
    if report.ablations:
        sections[f"{report.first}: ablations"] = variants_table(study, report.ablations)
    if report.widths:
        sections[f"{report.first}: selections of width"] = variants_table(study, report.widths)
    sections["Cost and storage of the family, after 1 epoch of each Des-Net"] = cost_table(study)
    lines = [f"# Results of the study “{study.name}”", ""]
    lines += [
        "Test top-1 accuracy in %, after the last epoch: mean ± standard deviation (of a sample) over "
        f"{len(study.seeds)} seeds; in brackets the number of seeds where there are others than that many. "
        f"{NONE}: not run."
    ]
    for title, section in sections.items():
        lines += ["", f"## {title}", "", *section]
    return lines


def trials(study: Results) -> list[str]:
    """The lines of tables.md of all studies without a report: all methods, in the order of its file."""
    lines = [f"# Results of the study “{study.name}”", ""]
    lines += ["Accuracy in %. MACs are those of a method's own stage 1, without what that starts from.", ""]
    of_family = study.questions.sizes if study.questions else study.sizes
    methods = dict.fromkeys((row.data, row.method, row.epochs) for row in study.rows if row.kind == "vit")
    seeds, rows = len(study.seeds), []
    for data, method, epochs in methods:
        sizes = [size for size in study.sizes_of(method, data, epochs) if size in of_family]
        mean = cell(study.over_sizes(method, data, sizes, epochs).values(), seeds)
        each = (cell(study.accuracies(method, data, size, epochs).values(), seeds) for size in study.sizes)
        own = study.cost_of_groups("stage1", data, method)
        if own is None:  # it trained on images of another name
            own = study.cost_of_groups("stage1", method=method)
        cost = in_units(costs_before(study, method, data, sizes)[1] if own is None else own)
        rows.append([method, data, after(epochs), cost, mean, *each])
    return [*lines, *table(["method", "data", "after", "stage 1, MACs", "mean", *study.sizes], rows)]


def summary(study: Results) -> list[str]:
    """The lines of summary.md, a table for a README: accuracies as ranges over seeds."""
    report = study.report
    methods = dict.fromkeys([*report.descended, report.scratch])
    lines = []
    for method in methods:
        stored = study.stored(method) if method != report.scratch else None
        for n in study.planned_epochs(method, report.first):
            ranges = (in_range(study.accuracies(method, report.first, size, n).values()) for size in study.sizes)
            lines.append([f"{method}, {after(n)}", NONE if stored is None else f"{stored:,}", *ranges])
    parameters = (study.parameters(size) for size in study.sizes)
    lines.append(["parameters of each ViT", NONE, *(NONE if n is None else f"{n:,}" for n in parameters)])
    return table(["test accuracy, %", "stored parameters", *study.sizes], lines)


def in_range(values: Collection[float]) -> str:
    """The lowest and the highest value, or the only one."""
    if not values:
        return NONE
    ends = dict.fromkeys(f"{value:.1f}" for value in (min(values), max(values)))
    return "–".join(ends)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """What a report writes beside results.csv."""

    texts: Mapping[str, Callable[[Results], list[str]]]  # names of .md files → their lines
    plots: Mapping[str, Callable[[Results], Figure]]  # names of .png files


OF_REPORT = Files(
    {"tables": tables, "claims": claims, "summary": summary},
    {"epochs": draw_epochs, "family": draw_family, "cost": draw_cost},
)
OF_QUESTIONS = Files(
    {"answers": answers, "details": details, "tables": trials},
    {"answers": draw_answers, "cost": draw_costs, "finetuning": draw_fine_tuning, "methods": draw_methods},
)
OF_OTHERS = Files({"tables": trials}, {})


def write(folder: Path) -> None:
    """Write the tables, answers and plots of a study beside the results.csv and study.yaml in ``folder``.

    Of a study that does not say what to compare, under ``report`` or ``questions``, tables.md alone.

    Raises:
        InputError: study.yaml or results.csv is missing or malformed, or differs from the logs in the archive.
    """
    study = read_results(folder)
    if (folder / ARCHIVE).exists():
        check_rows(folder / ARCHIVE, study.rows)
    files = OF_REPORT if study.report else OF_QUESTIONS if study.questions else OF_OTHERS
    for name, lines in files.texts.items():
        with atomic_write(folder / f"{name}.md") as unfinished:
            Path(unfinished).write_text("\n".join(lines(study)) + "\n", encoding="utf-8")
    plots = dict(files.plots)
    if study.questions and has_curve(study):
        plots["curve"] = draw_curve
    if study.report and study.report.ablations:
        plots["ablations"] = draw_ablations
    for name, draw in plots.items():
        with atomic_write(folder / f"{name}.png") as unfinished:
            draw(study).savefig(unfinished, format="png", dpi=150, metadata={"Software": None})


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=local_path, help="where results.csv and study.yaml are, e.g. results/cpu")
    args = p.parse_args(argv)
    try:
        write(args.folder)
    except (models.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
