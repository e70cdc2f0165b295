"""Four questions about the family of one ViT, and what a study answers (`study.compared.Questions` names what it has).

1. How far is each member, untouched, from the same ViT that is distilled alone to the end?
2. What does the family cost against ViTs one by one?
3. After how many epochs of fine-tuning does a member pass its twin from scratch?
4. Which method for whom?

"The end" of a method is the largest number of epochs that the study has for it.
"""

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from study.claims import every, to_come
from study.results import NONE, Results, after, cell, in_units, table

COUNTS = range(1, 13)  # numbers of sizes whose cost is compared
EARLY = (0, 1, 5)  # epochs of fine-tuning in the table of question 4
NEAR = 1.0  # points that a member may be behind its twin: the goal of question 1

FAMILY, GIVEN, ALONE, SCRATCH = "family", "family, with a trained source", "distilled alone", "from scratch"
ONE_BY_ONE = "one by one"
NOT_ANSWERED = "not answered"

TITLES = (
    "How far is each member, untouched, from the same ViT distilled alone to the end?",
    "What does the family cost against one by one?",
    "After how many epochs of fine-tuning does a member pass its twin from scratch, and does it stay ahead to the end?",
    "Which method for whom?",
)


def end(study: Results, method: str) -> int:
    """The largest number of epochs that ViTs of the method are to be trained for, on the first data set."""
    return max(study.planned_epochs(method, study.questions.data), default=0)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """The differences of the seeds that both have."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def ahead(study: Results, size: str, epochs: int, twin: str) -> list[float]:
    """How many points a member after ``epochs`` is ahead of its twin at the end, by seed."""
    data = study.questions.data
    theirs = study.accuracies(twin, data, size, end(study, twin))
    return paired(study.accuracies(study.questions.family, data, size, epochs), theirs)


def ahead_on_average(study: Results, sizes: Sequence[str], epochs: int, twin: str) -> list[float]:
    """The same for the means over sizes."""
    data = study.questions.data
    theirs = study.over_sizes(twin, data, sizes, end(study, twin))
    return paired(study.over_sizes(study.questions.family, data, sizes, epochs), theirs)


def by_parameters(study: Results, sizes: Iterable[str]) -> list[str]:
    """From the smallest size to the largest, without those of which no ViT has run."""
    return sorted(filter(study.parameters, sizes), key=study.parameters)


def listed(names: Sequence[str]) -> str:
    """Names as in a sentence."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


# ---------------------------------------------------------------------------------------------------------------------
# 1. Members and their twins
# ---------------------------------------------------------------------------------------------------------------------


def answer_1(study: Results) -> str:
    questions, seeds = study.questions, len(study.seeds)
    gaps = {size: gap for size in questions.sizes if (gap := ahead(study, size, 0, questions.alone))}
    if not gaps:
        return "Not answered yet."
    means = {size: statistics.mean(gap) for size, gap in gaps.items()}
    near = {size: round(mean, 6) >= -NEAR for size, mean in means.items()}
    known = by_parameters(study, questions.sizes)
    smallest = known[0] if len(known) == len(questions.sizes) else None
    verdict = every([*map(near.get, questions.sizes), means[smallest] > 0 if smallest in means else None])
    goal = {True: "Goal met", False: "Goal missed", None: "Not answered yet"}[verdict]
    so_far = " so far" if study.unfinished() and verdict is not None else ""
    text = f"{goal}{so_far}: at {sum(near.values())} of {len(near)} sizes a member is at most {NEAR:g} point behind"
    text += f" (goal: at all {len(questions.sizes)})"
    if smallest in gaps:
        text += f", and the smallest, {smallest}, differs by {cell(gaps[smallest], seeds, '+')} points (goal: above 0)"
    low, high = (of(means, key=means.__getitem__) for of in (min, max))
    ends = [f"{cell(gaps[size], seeds, '+')} ({size})" for size in dict.fromkeys((low, high))]
    text += f". Single sizes differ by {' to '.join(ends)} points"
    if total := ahead_on_average(study, questions.sizes, 0, questions.alone):
        both = ((questions.family, 0), (questions.alone, end(study, questions.alone)))
        ours, theirs = (
            cell(study.over_sizes(method, questions.data, questions.sizes, n).values(), seeds) for method, n in both
        )
        text += f"; their mean differs by {cell(total, seeds, '+')} points ({ours} against {theirs} %)"
    return f"{text}.{never_sampled(study)}"


def never_sampled(study: Results) -> str:
    """A sentence on the members of sizes that stage 1 never sampled; nothing where there are none."""
    questions, seeds = study.questions, len(study.seeds)
    between = questions.between
    ours = study.over_sizes(questions.family, questions.data, between, 0)
    if not ours:
        return ""
    one = len(between) == 1
    text = f" The {'size' if one else f'{len(between)} sizes'} that stage 1 never sampled, {listed(between)},"
    text += f" {'has' if one else 'have'} {cell(ours.values(), seeds)} %{'' if one else ' in the mean'}"
    twins = {"distilled alone": questions.alone, "from scratch": questions.scratch}
    gaps = {name: ahead_on_average(study, between, 0, twin) for name, twin in twins.items()}
    parts = [f"{cell(gap, seeds, '+')} points from ViTs {name}" for name, gap in gaps.items() if gap]
    return f"{text}{', ' * bool(parts)}{' and '.join(parts)}."


# ---------------------------------------------------------------------------------------------------------------------
# 2. Cost
# ---------------------------------------------------------------------------------------------------------------------


def total(*parts: float | None) -> float | None:
    return None if None in parts else sum(parts)


def mean_training(study: Results, method: str, unit: str) -> float | None:
    """Of one ViT, to the end: mean over the sizes of the family. None where one of these has not run."""
    data, epochs = study.questions.data, end(study, method)
    costs = [study.cost(method, data, size, epochs, unit) for size in study.questions.sizes]
    return None if None in costs else statistics.mean(costs)


def teacher_passes(study: Results) -> float | None:
    """MACs of the teacher's forward passes in a distilled run: what it has more than the same ViT from scratch."""
    questions = study.questions
    epochs = end(study, questions.alone)
    both = [
        [study.cost(method, questions.data, size, epochs) for method in (questions.alone, questions.scratch)]
        for size in questions.sizes
    ]
    more = [distilled - labels for distilled, labels in both if None not in (distilled, labels)]
    return statistics.mean(more) if more else None


Curves = Mapping[str, Sequence[float] | None]  # by `COUNTS`; None: a run is missing


def curves(study: Results, unit: str) -> Curves:
    """What so many sizes cost, in MACs or in seconds.

    The family costs its source and stage 1, however many sizes are taken from it. ViTs that are distilled alone need
    the same source, and share the teacher's logits, which are computed once (``--teacher-cache``): in MACs, of which
    every run counts its own, they are taken out of all but one; seconds were measured with them.
    """
    questions = study.questions
    method, size = questions.source
    source = study.cost(method, questions.data, size, end(study, method), unit) or None
    stage_1 = study.cost_of_groups("stage1", questions.data, questions.family, unit) or None
    scratch, alone = (mean_training(study, m, unit) or None for m in (questions.scratch, questions.alone))
    shared = teacher_passes(study) if unit == "macs" else 0.0
    once_and_each = {
        FAMILY: (total(source, stage_1), 0.0),
        GIVEN: (stage_1, 0.0),
        ALONE: (total(source, shared), total(alone, None if shared is None else -shared)),
        SCRATCH: (0.0, scratch),
    }
    return {
        name: None if None in (once, each) else [once + k * each for k in COUNTS]
        for name, (once, each) in once_and_each.items()
    }


def storage(study: Results) -> Curves:
    """Parameters to store for so many sizes."""
    questions = study.questions
    stored = study.stored(questions.family)
    parameters = [study.parameters(size) for size in questions.sizes]
    each = None if None in parameters else statistics.mean(parameters)
    return {
        FAMILY: None if stored is None else [stored] * len(COUNTS),
        ONE_BY_ONE: None if each is None else [k * each for k in COUNTS],
    }


def break_even(family: Sequence[float], others: Sequence[float]) -> int | None:
    """The smallest number of sizes from which the family is cheaper; None: up to the last of `COUNTS` it is not."""
    cheaper = (k for k, ours, theirs in zip(COUNTS, family, others, strict=True) if ours < theirs)
    return next(cheaper, None)


def from_on(found: Curves, family: str, others: str) -> str:
    """The break-even of two curves, in words."""
    if found[family] is None or found[others] is None:
        return NOT_ANSWERED
    k = break_even(found[family], found[others])
    if k is None:
        return f"not up to {COUNTS[-1]} sizes"
    return "from the first size on" if k == 1 else f"from {k} sizes on"


def answer_2(study: Results) -> str:
    macs, seconds, stored = curves(study, "macs"), curves(study, "seconds"), storage(study)
    if not any((macs[FAMILY], seconds[FAMILY], stored[FAMILY])):
        return "Not answered yet."
    text = ""
    if macs[FAMILY]:
        text = f"Source and stage 1 take {in_units(macs[FAMILY][0])} MACs, for any number of sizes"
        times = {name: macs[name][-1] / macs[FAMILY][-1] for name in (SCRATCH, ALONE) if macs[name]}
        ratios = [f"{ratio:.1f} × as much {name}" for name, ratio in times.items()]
        text += f"; {COUNTS[-1]} sizes take {' and '.join(ratios)}. " if ratios else ". "
    in_both = {"MACs": macs, "seconds": seconds}
    scratch = [
        f"in {unit} {from_on(found, FAMILY, SCRATCH)} (with a trained source {from_on(found, GIVEN, SCRATCH)})"
        for unit, found in in_both.items()
    ]
    alone = [f"in {unit} {from_on(found, FAMILY, ALONE)}" for unit, found in in_both.items()]
    text += f"The family is cheaper than ViTs from scratch: {', '.join(scratch)}; "
    text += f"than ViTs distilled alone: {', '.join(alone)}. "
    return f"{text}It stores fewer parameters than ViTs one by one: {from_on(stored, FAMILY, ONE_BY_ONE)}."


# ---------------------------------------------------------------------------------------------------------------------
# 3. Fine-tuning
# ---------------------------------------------------------------------------------------------------------------------


def last(study: Results, size: str) -> int:
    """The largest number of epochs that a member is to be fine-tuned for."""
    lengths = study.planned_epochs(study.questions.family, study.questions.data)
    return max((n for n, sizes in lengths.items() if size in sizes), default=0)


def passes_after(study: Results, size: str, twin: str) -> int | None:
    """The smallest number of epochs after which a member is ahead of its twin at the end; None: not yet."""
    lengths = study.planned_epochs(study.questions.family, study.questions.data)
    found = ((n, ahead(study, size, n, twin)) for n in lengths)
    return next((n for n, gap in found if gap and statistics.mean(gap) > 0), None)


def answer_3(study: Results) -> str:
    questions = study.questions
    counts = []
    for n in study.planned_epochs(questions.family, questions.data):
        gaps = [gap for size in questions.sizes if (gap := ahead(study, size, n, questions.scratch))]
        if gaps:
            won = sum(statistics.mean(gap) > 0 for gap in gaps)
            counts.append(f"at {won} of {len(gaps)} sizes {'untouched' if n == 0 else f'after {after(n)}'}")
    if not counts:
        return "Not answered yet."
    text = f"A member is ahead of its twin from scratch {', '.join(counts)}."
    seeds, data, sizes = len(study.seeds), questions.data, questions.sizes
    means = {n: study.over_sizes(questions.family, data, sizes, n).values() for n in EARLY}
    cells = [f"{cell(of_seeds, seeds)} % {'after ' * (n > 0)}{after(n)}" for n, of_seeds in means.items() if of_seeds]
    text += f" Members have {', '.join(cells)} (mean of all sizes)." if cells else ""
    lengths = sorted({last(study, size) for size in questions.sizes} - {0})
    parts = []
    for name, twin in (("from scratch", questions.scratch), ("distilled alone", questions.alone)):
        gaps = {size: ahead(study, size, n, twin) for size in questions.sizes if (n := last(study, size))}
        means = {size: statistics.mean(gap) for size, gap in gaps.items() if gap}
        if means:
            won = sum(mean > 0 for mean in means.values())
            parts.append(f"it is ahead of the twin {name} at {won} of {len(means)} sizes ({span(means)})")
    if parts:
        text += f" At the end, after {' or '.join(map(str, lengths))} epoch{'s' * (lengths != [1])},"
        text += f" {', and '.join(parts)}."
    return text


def span(means: Mapping[str, float]) -> str:
    """From the smallest difference to the largest, with the sizes that have them."""
    low, high = (of(means, key=means.__getitem__) for of in (min, max))
    ends = [f"{means[size]:+.1f} at {size}" for size in dict.fromkeys((low, high))]
    return f"{' to '.join(ends)}; mean {statistics.mean(means.values()):+.1f} points"


# ---------------------------------------------------------------------------------------------------------------------
# 4. Which method for whom
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Offer:
    """A method that a user may take, for some sizes.

    Attributes:
        untrained: mean accuracies over the sizes before training, of each seed; empty for ViTs one by one.
        epochs: of training; of fine-tuning, where the method has such.
        trained: mean accuracies after them.
        macs: of all that these ViTs need: source and teacher, stage 1, and the training of each.
        stored: parameters from which these ViTs are made.
    """

    method: str
    untrained: list[float]
    epochs: int
    trained: list[float]
    macs: float | None
    stored: int | None

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.trained) if self.trained else None

    def cells(self, seeds: int) -> list[str]:
        trained = f"{cell(self.trained, seeds)}{f' after {after(self.epochs)}' * bool(self.epochs)}"
        stored = NONE if self.stored is None else f"{self.stored:,}"
        return [cell(self.untrained, seeds), trained if self.trained else NONE, in_units(self.macs), stored]


OFFER_COLUMNS = ("before training", "trained", "MACs of all", "stored parameters")


def costs_before(study: Results, method: str, data: str, sizes: Iterable[str]) -> tuple[float | None, float | None]:
    """MACs behind the ViTs of these sizes: of what stage 1 starts from and learns from, and of stage 1.

    None where a run is missing, or where there is none.
    """
    stage_1_groups = {row.group for row in study.rows if row.kind == "stage1"}
    ancestors = study.ancestors_of(method, data, sizes)
    stage_1 = {run for run in ancestors if run[0] in stage_1_groups}
    return study.cost_of_runs(ancestors - stage_1), study.cost_of_runs(stage_1)


def offer_of(study: Results, method: str, sizes: Sequence[str]) -> Offer:
    data = study.questions.data
    epochs = offered_epochs(study, method)
    untrained, trained = (study.over_sizes(method, data, sizes, n) for n in (0, epochs))
    ancestors = study.ancestors_of(method, data, sizes)
    before = study.cost_of_runs(ancestors) if ancestors else 0.0
    macs = total(before, *(study.cost(method, data, size, epochs) for size in sizes))
    return Offer(method, [*untrained.values()], epochs, [*trained.values()], macs, study.stored(method, sizes))


def offered_epochs(study: Results, method: str) -> int:
    """The epochs after which a method is compared: the largest of `EARLY` that it has, or else its end."""
    planned = study.planned_epochs(method, study.questions.data)
    return max((n for n in planned if n in EARLY), default=end(study, method))


def offers(study: Results, methods: Collection[str]) -> tuple[list[str], list[Offer]]:
    """The sizes that all of the methods have that have any, and the methods, the best after training first."""
    questions = study.questions
    of_methods = [study.planned_epochs(method, questions.data).get(offered_epochs(study, method)) for method in methods]
    sizes = [size for size in questions.sizes if all(size in of_method for of_method in of_methods if of_method)]
    found = [offer_of(study, method, sizes) for method in methods]
    return sizes, sorted(found, key=lambda offer: offer.mean or 0, reverse=True)


def whom_table(study: Results) -> list[str]:
    """For each situation of a user, the method that is best after training, over the sizes that all have."""
    questions, seeds = study.questions, len(study.seeds)
    lines = []
    for situation, methods in questions.who.items():
        sizes, found = offers(study, methods)
        measured = [offer for offer in found if offer.mean is not None]
        if len(measured) < 2:  # the best of one is no answer
            lines.append([situation, NOT_ANSWERED, *[NONE] * (len(OFFER_COLUMNS) + 1)])
            continue
        best, second = measured[:2]
        planned = [method for method in methods if study.planned_epochs(method, questions.data)]
        name = best.method + (" so far" if len(measured) < len(planned) else "")
        if len(sizes) < len(questions.sizes):
            name += f" ({len(sizes)} of {len(questions.sizes)} sizes)"
        next_best = f"{second.method}: {second.cells(seeds)[1]}, {in_units(second.macs)} MACs"
        lines.append([situation, name, *best.cells(seeds), next_best])
    return table(["you have", "take", *OFFER_COLUMNS, "next best"], lines)


def answer_4(study: Results) -> str:
    if not study.questions.who:
        return "Not asked."
    return (
        f"The table has the method with the highest mean accuracy, initialised ViTs after {EARLY[-1]} epochs of "
        "fine-tuning, others trained to the end. “MACs of all” are those of the source, the teacher, stage 1, and the "
        "training of all sizes; who has a trained source pays the rest."
    )


def answers(study: Results) -> list[str]:
    """The lines of answers.md, with which the page of the study opens."""
    lines = to_come(study)
    functions = (answer_1, answer_2, answer_3, answer_4)
    for number, (title, answer) in enumerate(zip(TITLES, functions, strict=True), start=1):
        lines.append(f"{number}. **{title}** {answer(study)}")
    return [*lines, "", *whom_table(study)] if study.questions.who else lines
