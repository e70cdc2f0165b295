"""What a study says about five claims of the papers, for each of its learngenes."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from study.results import NONE, Results, after, in_short, in_units, table

AS_LITTLE = 1.1  # a baseline stores as little if it stores at most this times what the larger of two learngenes does
FEWER = 10  # times, of claim 4
CHEAPER = 2  # times, of claim 5

CLAIMS = (
    "After 1 epoch a Des-Net beats the same ViT trained from scratch for 100 epochs, at every size.",
    "On a second data set it passes, within 10 epochs, the final accuracy of 300 epochs from scratch, at every size.",
    "Before training, Des-Nets beat those of linear expansion, and these those of every baseline that stores as "
    "little.",
    f"At least {FEWER} × fewer parameters are stored for the family than one by one.",
    f"Training the family, stage 1 included, costs at least {CHEAPER} × less than one by one at equal accuracy.",
)


@dataclass(frozen=True)
class Answer:
    """An answer, "yes", "no" or "not answered", and what it rests on, as lines of Markdown."""

    answer: str
    lines: list[str]


def in_words(verdict: bool | None) -> str:
    return {True: "yes", False: "no", None: "not answered"}[verdict]


def every(verdicts: Iterable[bool | None]) -> bool | None:
    """True if all are, False if one is, else None: not answered."""
    verdicts = list(verdicts)
    return False if False in verdicts else None if None in verdicts else True


def missing(gaps: Sequence[str]) -> list[str]:
    return ["", f"Missing: {'; '.join(gaps)}."] if gaps else []


def gap(study: Results, method: str, data: str, epochs: int, sizes: Sequence[str]) -> list[str]:
    """What is missing of a method, in words; nothing where it has all the sizes."""
    there = study.sizes_of(method, data, epochs)
    left = [size for size in sizes if size not in there]
    if not left:
        return []
    return [f"{method} on {data}, {after(epochs)}, at {'every size' if left == list(sizes) else ', '.join(left)}"]


# ---------------------------------------------------------------------------------------------------------------------
# Claims 1 and 2
# ---------------------------------------------------------------------------------------------------------------------


def against_scratch(study: Results, method: str, data: str, candidates: Sequence[int], longest: int) -> Answer:
    """Is a Des-Net after one of the numbers of epochs ``candidates`` better than a ViT after ``longest`` from scratch?

    The last of the candidates has to be there before the answer is no. Of several, each size takes the best.
    """
    scratch = study.report.scratch
    sizes = study.sizes_for([method], data)
    if not sizes:
        return Answer(in_words(None), [f"Missing: {method} on {data}."])
    verdicts, lines, margins, won, pairs = [], [], {}, 0, 0
    for size in sizes:
        ours = {epochs: study.mean(method, data, size, epochs) for epochs in candidates}
        ours = {epochs: mean for epochs, mean in ours.items() if mean is not None}
        theirs = study.mean(scratch, data, size, longest)
        best = max(ours, key=ours.__getitem__, default=None)
        line = [size, NONE, NONE, NONE if theirs is None else f"{theirs:.1f}", NONE, NONE]
        verdict = None
        if best is not None:
            line[1:3] = str(best), f"{ours[best]:.1f}"
        if best is not None and theirs is not None:
            margins[size] = ours[best] - theirs
            verdict = True if margins[size] > 0 else False if candidates[-1] in ours else None
            a = study.accuracies(method, data, size, best)
            b = study.accuracies(scratch, data, size, longest)
            both = a.keys() & b.keys()
            wins = sum(a[seed] > b[seed] for seed in both)
            won, pairs = won + wins, pairs + len(both)
            line[4:] = f"{margins[size]:+.1f}", f"{wins} of {len(both)}"
        verdicts.append(verdict)
        lines.append(line)
    text = []
    if len(sizes) < len(study.sizes):
        text.append(f"This data set has {len(sizes)} of the {len(study.sizes)} sizes.\n")
    if len(candidates) > 1:
        text.append("Of each size, the number of epochs with the highest mean accuracy counts.\n")
    if margins:
        least = min(margins, key=margins.__getitem__)
        text.append(
            f"Smallest margin: {margins[least]:+.1f} points, at {least}. "
            f"Of the pairs of size and seed, {won} of {pairs} win.\n"
        )
    text += table(["size", "epochs", method, f"{scratch}, {longest}", "margin", "seeds that win"], lines)
    verdict = every(verdicts)
    gaps = gap(study, method, data, candidates[-1], sizes) + gap(study, scratch, data, longest, sizes)
    return Answer(in_words(verdict), text + (missing(gaps) if verdict is None else []))


def claim_1(study: Results, method: str) -> Answer:
    return against_scratch(study, method, study.report.first, [1], 100)


def claim_2(study: Results, method: str) -> Answer:
    if study.report.second is None:
        return Answer(in_words(None), ["Missing: a second data set."])
    return against_scratch(study, method, study.report.second, range(1, 11), 300)


# ---------------------------------------------------------------------------------------------------------------------
# Claim 3
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Mean accuracies of two methods before training, over the sizes that both have."""

    a: str
    b: str
    sizes: list[str]
    mean_a: float
    mean_b: float

    @property
    def verdict(self) -> bool | None:
        return self.mean_a > self.mean_b if self.sizes else None


def compare(study: Results, a: str, b: str) -> Comparison:
    first = study.report.first
    sizes = [size for size in study.sizes_of(a, first, 0) if size in study.sizes_of(b, first, 0)]
    mean_a, mean_b = (
        statistics.mean(study.mean(method, first, size, 0) for size in sizes) if sizes else 0.0 for method in (a, b)
    )
    return Comparison(a, b, sizes, mean_a, mean_b)


def comparison_table(study: Results, comparisons: Sequence[Comparison], unit: int) -> list[str]:
    """One line per comparison; what the second method stores is in multiples of ``unit``."""
    lines = []
    for c in comparisons:
        means = [f"{c.mean_a:.1f}", f"{c.mean_b:.1f}", f"{c.mean_a - c.mean_b:+.1f}"] if c.sizes else [NONE] * 3
        stored = study.stored(c.b)
        relative = NONE if stored is None else f"{stored / unit:.2f} ×"
        lines.append([f"{c.a} > {c.b}", in_words(c.verdict), *means, relative, in_short(c.sizes, study.sizes)])
    header = ["claim", "holds", "mean of the first", "of the second", "margin", "the second stores", "sizes of both"]
    return table(header, lines)


def claim_3(study: Results, method: str) -> Answer:
    linear, first = study.report.linear, study.report.first
    baselines = [baseline for baseline in study.report.baselines if study.is_planned(baseline, first, 0)]
    if linear is None or not baselines:
        return Answer(in_words(None), ["Missing: a linear method, and baselines before training."])
    gaps = [
        text
        for name in (method, linear, *baselines)
        for text in gap(study, name, first, 0, study.sizes_for([name], first))
    ]
    unit = study.stored(method)
    if unit is None:
        return Answer(in_words(None), missing(gaps)[1:])
    stored = {baseline: study.stored(baseline) for baseline in baselines}
    little = AS_LITTLE * max(unit, study.stored(linear) or 0)
    small = [baseline for baseline, count in stored.items() if count is not None and count <= little]
    large = [baseline for baseline, count in stored.items() if count is not None and count > little]
    needed = [compare(study, method, linear)]
    needed += [compare(study, a, b) for b in small for a in (linear, method)]
    verdict = every([*(c.verdict for c in needed), None if gaps else True])
    lines = [f"{method} stores {unit:,} parameters. Baselines that store at most {little:,.0f}:\n"]
    lines += comparison_table(study, needed, unit)
    if large:
        lines += ["", "Baselines that store more, which the answer does not count:\n"]
        lines += comparison_table(study, [compare(study, method, baseline) for baseline in large], unit)
    answer = in_words(verdict) + ("" if small or gaps else ", but no baseline stores as little")
    return Answer(answer, lines + (missing(gaps) if verdict is None else []))


# ---------------------------------------------------------------------------------------------------------------------
# Claim 4
# ---------------------------------------------------------------------------------------------------------------------


def claim_4(study: Results, method: str) -> Answer:
    each = {size: study.parameters(size) for size in study.sizes_for([method], study.report.first)}
    stored = study.stored(method)
    gaps = [f"a ViT of {size}" for size, count in each.items() if count is None]
    if stored is None:
        gaps.append(f"a Des-Net of {method}")
    if gaps:
        return Answer(in_words(None), missing(gaps)[1:])
    total = sum(each.values())
    text = f"{len(each)} ViTs of together {total:,} parameters are made from {stored:,}: {total / stored:.1f} × fewer."
    return Answer(in_words(total / stored >= FEWER), [text])


# ---------------------------------------------------------------------------------------------------------------------
# Claim 5
# ---------------------------------------------------------------------------------------------------------------------


def family_macs(study: Results, method: str, sizes: Sequence[str], epochs: int) -> float | None:
    """Stage 1, once, if it is not from scratch, and training every size. None where one of these has not run."""
    costs = [study.cost(method, study.report.first, size, epochs) for size in sizes]
    if method != study.report.scratch:
        costs.append(study.stage_1_macs(method))
    return None if None in costs else sum(costs)


@dataclass(frozen=True)
class Trained:
    """A training from scratch."""

    epochs: int
    accuracy: float
    macs: float

    def __str__(self) -> str:
        return f"{after(self.epochs)}: {self.accuracy:.1f}"


@dataclass(frozen=True)
class Alone:
    """The training from scratch that makes a ViT of one size as accurate as a Des-Net, between two that were made."""

    size: str
    wanted: float  # accuracy of the Des-Net
    short: Trained | None  # the longest that is not enough
    enough: Trained | None  # the shortest that is; None: there is none

    @property
    def epochs(self) -> float:
        """With accuracy linear in the logarithm of the epochs between the two; where nothing is enough, the longest."""
        if self.short is None or self.enough is None:
            return (self.short or self.enough).epochs
        part = (self.wanted - self.short.accuracy) / (self.enough.accuracy - self.short.accuracy)
        return self.short.epochs * (self.enough.epochs / self.short.epochs) ** part

    @property
    def macs(self) -> float:
        of = self.short or self.enough
        return of.macs / of.epochs * self.epochs


def alone(study: Results, method: str, size: str, epochs: int, lengths: Sequence[int]) -> Alone | None:
    """Of one size; None where a run has not been made."""
    first, scratch = study.report.first, study.report.scratch
    wanted = study.mean(method, first, size, epochs)
    if wanted is None or not lengths or any(study.cost(scratch, first, size, n) is None for n in lengths):
        return None
    short = None
    for n in sorted(lengths):
        trained = Trained(n, study.mean(scratch, first, size, n), study.cost(scratch, first, size, n))
        if trained.accuracy >= wanted:
            return Alone(size, wanted, short, trained)
        short = trained
    return Alone(size, wanted, short, None)


def cost_ratio(study: Results, method: str, epochs: int) -> tuple[list[bool | None], list[str]]:
    """One by one against the family after ``epochs`` of each size, without and with the training of the teacher.

    Returns:
        For each of the two whether the claim holds, and Markdown.
    """
    first, scratch = study.report.first, study.report.scratch
    lengths = [n for n in study.epochs([scratch], first) if n > 0]
    sizes = study.sizes_for([method], first)
    each = [alone(study, method, size, epochs, lengths) for size in sizes]
    family = family_macs(study, method, sizes, epochs)
    if family is None or None in each:
        gaps = [] if study.stage_1_macs(method) else [f"stage 1 of {method}"]
        gaps += gap(study, method, first, epochs, sizes)
        gaps += [text for n in lengths or [100] for text in gap(study, scratch, first, n, sizes)]
        return [None, None], missing(gaps)[1:]
    bound = "" if all(one.enough for one in each) else "≥ "
    total, teacher = sum(one.macs for one in each), study.teacher_macs()
    verdicts, lines, gaps = [], [], []
    for name, cost in (("not counted", family), ("counted", None if teacher is None else family + teacher)):
        numbers = [bound + in_units(total), in_units(cost), NONE if cost is None else f"{bound}{total / cost:.2f} ×"]
        verdict = None
        if cost is None:
            gaps.append("the training of the teacher")
        elif total >= CHEAPER * cost or not bound:
            verdict = total >= CHEAPER * cost
        else:
            gaps = [f"runs from scratch of more than {lengths[-1]} epochs, where these are less accurate"]
        verdicts.append(verdict)
        lines.append([name, *numbers, in_words(verdict)])
    text = table(["training of the teacher", "one by one, MACs", f"{method}, MACs", "ratio", "holds"], lines)
    return verdicts, [*text, *missing(gaps), "", *alone_table(each, method, lengths)]


def alone_table(each: Sequence[Alone], method: str, lengths: Sequence[int]) -> list[str]:
    """What is counted of each size, and the two trainings that this lies between."""
    lines = []
    for one in each:
        bound = "" if one.enough else "≥ "
        line = [one.size, f"{one.wanted:.1f}", *(str(trained or NONE) for trained in (one.short, one.enough))]
        lines.append([*line, f"{bound}{one.epochs:.0f}", bound + in_units(one.macs)])
    text = (
        f"From scratch {', '.join(map(str, lengths))} epochs were tried; between two of these, accuracy is taken to "
        "grow linearly in the logarithm of the epochs.\n"
    )
    return [text, *table(["size", method, "from scratch, not enough", "enough", "epochs counted", "MACs"], lines)]


def claim_5(study: Results, method: str) -> Answer:
    (without, included), text = cost_ratio(study, method, 1)
    answer = in_words(without)
    if without != included:
        answer += f" without the training of the teacher, {in_words(included)} with it"
    lines = ["After 1 epoch of each Des-Net:\n", *text]
    if study.sizes_of(method, study.report.first, 10):
        lines += ["", "After 10 epochs of each Des-Net:\n", *cost_ratio(study, method, 10)[1]]
    return Answer(answer, lines)


# ---------------------------------------------------------------------------------------------------------------------
# All
# ---------------------------------------------------------------------------------------------------------------------


def to_come(study: Results) -> list[str]:
    """How many ViTs are missing; nothing of a study that is finished."""
    left = study.unfinished()
    text = f"The study is not finished: {left} of {len(study.planned)} ViTs are to come. Answers may change."
    return [text, ""] if left else []


def claims(study: Results) -> list[str]:
    """The lines of claims.md."""
    learngenes = study.report.learngenes
    functions = (claim_1, claim_2, claim_3, claim_4, claim_5)
    answers = [[function(study, method) for method in learngenes] for function in functions]
    lines = [f"# What the study “{study.name}” says about the papers' claims", ""]
    lines += to_come(study)
    lines += [
        "Accuracies are test top-1 in %, after the last epoch, mean over the seeds "
        f"{', '.join(map(str, study.seeds))}, or those of them that have run. MACs are of training alone: 3 × a "
        "forward pass for each image, 1 × for the teacher; choosing learning rates is not counted.\n"
    ]
    overview = zip(CLAIMS, answers, strict=True)
    lines += table(
        ["claim", *learngenes],
        [[f"{i}. {claim}", *(a.answer for a in row)] for i, (claim, row) in enumerate(overview, start=1)],
    )
    for number, (claim, row) in enumerate(zip(CLAIMS, answers, strict=True), start=1):
        lines += ["", f"## {number}. {claim}"]
        for method, answer in zip(learngenes, row, strict=True):
            lines += ["", f"### {method}: {answer.answer}", "", *answer.lines]
    return lines
