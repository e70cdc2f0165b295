"""What a study has measured: its results.csv, and what its study.yaml planned and compares."""

import csv
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path

from common.errors import InputError, one_line
from common.files import read_yaml
from study.compared import Questions, Report, read_compared
from study.groups import Ancestor, ancestors, groups_of, planned_vits

NONE = "–"  # what stands in a table where there is no run yet


def slug(name: str) -> str:
    """A name of a group as that of a folder."""
    return re.sub(r"[^\w.+-]+", "_", name)


# ---------------------------------------------------------------------------------------------------------------------
# results.csv
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One run of the study, or one network before its training."""

    group: str  # of runs in the study's YAML file
    kind: str  # teacher, stage1 or vit
    method: str
    data: str
    size: str  # "" for a teacher and for stage 1
    seed: int
    epochs: int
    accuracy: float  # on the test images after the last epoch, in %
    macs: float  # of this run's training
    parameters: int  # of the network of this run
    stored_parameters: int  # to make the whole family
    seconds: float = 0.0  # wall clock of the run
    device: str = ""


OF_VITS = ("accuracy", "stored_parameters")  # a teacher and stage 1 may leave these empty


def read_rows(path: Path) -> list[Row]:
    """The rows of results.csv.

    Raises:
        InputError: there is no such file, it lacks a column, or a value is not what its column holds.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            needed = [part.name for part in fields(Row) if part.default is MISSING]
            missing = [name for name in needed if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path} has no column {missing[0]}: expected the results.csv of a study")
            return [read_row(values, f"{path}, line {reader.line_num}") for values in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}): expected a study's results") from error


def read_row(values: Mapping[str, str | None], where: str) -> Row:
    """One line of results.csv. Raises InputError, beginning with ``where``, if a value is no number."""
    converted = {}
    for part in fields(Row):
        text = values.get(part.name) or ""
        if not text and (part.default == 0 or (part.name in OF_VITS and values["kind"] != "vit")):
            text = "0"
        try:
            converted[part.name] = part.type(text)
        except ValueError as error:
            raise InputError(f"{where}: {part.name} is {text!r:.100}: expected a number") from error
    return Row(**converted)


@dataclass(frozen=True)
class Results:
    """The results of a study, and what its report is about."""

    name: str
    sizes: list[str]
    seeds: list[int]
    compared: Report | Questions | None
    planned: set[tuple[str, str, str, int, int]]  # all ViTs: method, data set, size, number of epochs, seed
    rows: list[Row]
    ancestors: dict[tuple[str, str, str], set[Ancestor]]  # of the ViTs of a method, data set and size
    _runs: dict[tuple, dict[int, Row]] = field(default_factory=dict, init=False)  # what `runs` looks up

    def __post_init__(self):
        for row in self.rows:
            which = (row.size, row.epochs) if row.kind == "vit" else (row.group,)
            of_seeds = self._runs.setdefault((row.kind, row.method, row.data, *which), {})
            if row.seed in of_seeds:
                what = " ".join(filter(None, (row.group, row.kind, row.method, row.data, row.size)))
                raise InputError(
                    f"results.csv has two rows for {what}, {row.epochs} epochs, seed {row.seed}: expected one"
                )
            of_seeds[row.seed] = row

    @cached_property
    def device(self) -> str | None:
        """That the source of the family was trained on; seconds are compared on one alone."""
        method, size = self.questions.source if self.questions else ("", "")
        rows = [row for row in self.rows if (row.kind, row.method, row.size) == ("vit", method, size) and row.seconds]
        return rows[0].device if rows else None

    def mean_cost(self, runs: Collection[Row], unit: str) -> float | None:
        """MACs or seconds, mean over runs, seconds over those on `device`; None if there are none."""
        if unit == "seconds":
            runs = [row for row in runs if self.device in (None, row.device)]
        return statistics.mean(getattr(row, unit) for row in runs) if runs else None

    @property
    def report(self) -> Report | None:
        return self.compared if isinstance(self.compared, Report) else None

    @property
    def questions(self) -> Questions | None:
        return self.compared if isinstance(self.compared, Questions) else None

    def runs(self, method: str, data: str, size: str, epochs: int) -> dict[int, Row]:
        """The ViTs of one size, by their seeds."""
        return self._runs.get(("vit", method, data, size, epochs), {})

    def stage_1_macs(self, method: str) -> float | None:
        """Of a method's stage 1 on the first data set, all its groups together: mean over seeds."""
        return self.cost_of_groups("stage1", self.compared.first, method)

    def teacher_macs(self) -> float | None:
        """Of training all teachers of the first data set, each once: mean over seeds."""
        return self.cost_of_groups("teacher", self.compared.first)

    def cost_of_groups(
        self, kind: str, data: str | None = None, method: str | None = None, unit: str = "macs"
    ) -> float | None:
        """MACs or seconds of all groups of a kind, perhaps of one data set or method, together: means over seeds."""
        groups = [
            runs
            for key, runs in self._runs.items()
            if key[0] == kind and method in (None, key[1]) and data in (None, key[2])
        ]
        costs = [self.mean_cost(runs.values(), unit) for runs in groups]
        return sum(costs) if costs and None not in costs else None

    def accuracies(self, method: str, data: str, size: str, epochs: int) -> dict[int, float]:
        return {seed: row.accuracy for seed, row in self.runs(method, data, size, epochs).items()}

    def mean(self, method: str, data: str, size: str, epochs: int) -> float | None:
        """Mean accuracy over seeds."""
        values = self.accuracies(method, data, size, epochs).values()
        return statistics.mean(values) if values else None

    def over_sizes(self, method: str, data: str, sizes: Sequence[str], epochs: int) -> dict[int, float]:
        """Mean accuracy over sizes, by those seeds that have all of them."""
        runs = [self.accuracies(method, data, size, epochs) for size in sizes]
        seeds = set.intersection(*map(set, runs)) if runs else ()
        return {seed: statistics.mean(run[seed] for run in runs) for seed in sorted(seeds)}

    def cost(self, method: str, data: str, size: str, epochs: int, unit: str = "macs") -> float | None:
        """MACs or seconds of training one ViT: mean over seeds."""
        return self.mean_cost(self.runs(method, data, size, epochs).values(), unit)

    def ancestors_of(self, method: str, data: str, sizes: Iterable[str]) -> set[Ancestor]:
        """The runs that the ViTs of these sizes need."""
        return {run for size in sizes for run in self.ancestors.get((method, data, size), ())}

    def cost_of_runs(self, runs: Collection[Ancestor], unit: str = "macs") -> float | None:
        """MACs or seconds of runs together, means over seeds; None if there are none, or one of them has not run."""
        found: dict[Ancestor, list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.group, row.size, str(row.epochs)), []).append(row)
        if not runs or not all(run in found for run in runs):
            return None
        costs = [self.mean_cost(found[run], unit) for run in runs]
        return sum(costs) if None not in costs else None

    def epochs(self, methods: Iterable[str], data: str) -> list[int]:
        """All numbers of epochs after which there is a ViT of one of the methods."""
        methods = set(methods)
        return sorted({r.epochs for r in self.rows if r.kind == "vit" and r.method in methods and r.data == data})

    def sizes_of(self, method: str, data: str, epochs: int) -> list[str]:
        return [size for size in self.sizes if self.runs(method, data, size, epochs)]

    def sizes_for(self, methods: Iterable[str], data: str) -> list[str]:
        """The sizes that one of the methods is to make for a data set."""
        methods = set(methods)
        planned = {size for method, data_set, size, _, _ in self.planned if method in methods and data_set == data}
        return [size for size in self.sizes if size in planned]

    def seeds_for(self, data: str) -> list[int]:
        """The seeds of all ViTs that are to be made for a data set."""
        return sorted({row[4] for row in self.planned if row[1] == data})

    def planned_epochs(self, method: str, data: str) -> dict[int, list[str]]:
        """All numbers of epochs that ViTs of the method are to be trained for, and the sizes of those ViTs."""
        planned = {(row[3], row[2]) for row in self.planned if row[:2] == (method, data)}
        return {n: [size for size in self.sizes if (n, size) in planned] for n in sorted({n for n, _ in planned})}

    def is_planned(self, method: str, data: str, epochs: int) -> bool:
        """Whether the method is to make ViTs that are trained for so many epochs."""
        return any((row[0], row[1], row[3]) == (method, data, epochs) for row in self.planned)

    def unfinished(self) -> int:
        """How many of the planned ViTs have not run."""
        return len(self.planned - {(r.method, r.data, r.size, r.epochs, r.seed) for r in self.rows})

    def shared_sizes(self, methods: Iterable[str], data: str, epochs: int) -> list[str]:
        """The sizes that all those methods have that have any."""
        found = [set(sizes) for method in methods if (sizes := self.sizes_of(method, data, epochs))]
        return [size for size in self.sizes if found and all(size in sizes for sizes in found)]

    def parameters(self, size: str) -> int | None:
        """Of the ViT for the first data set."""
        found = {r.parameters for r in self.rows if (r.kind, r.data, r.size) == ("vit", self.compared.first, size)}
        return max(found, default=None)

    def stored(self, method: str, sizes: Collection[str] | None = None) -> int | None:
        """Parameters to be stored for these sizes, or all; what several are made from counts once."""
        first = self.compared.first
        rows = [r for r in self.rows if (r.kind, r.method, r.data) == ("vit", method, first)]
        found = {r.stored_parameters for r in rows if sizes is None or r.size in sizes}
        return sum(found) if found else None


def read_results(folder: Path) -> Results:
    """The study whose results are in ``folder``.

    Raises:
        InputError: study.yaml or results.csv is missing, or is not what a study leaves.
    """
    path = folder / "study.yaml"
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}: expected a study")
    for key, kind in (("sizes", dict), ("seeds", list), ("runs", dict), ("data", dict)):
        if not isinstance(content.get(key), kind):
            raise InputError(f"{path}: {key} is {content.get(key)!r:.100}: expected that of a study")
    rows = read_rows(folder / "results.csv")
    sizes = list(content["sizes"])
    for row in rows:
        if row.kind == "vit" and row.size not in sizes:
            raise InputError(
                f"{folder / 'results.csv'}: size {row.size!r:.100} is none of study.yaml's: {', '.join(sizes)}"
            )
    try:
        content = {**content, "runs": groups_of(content["runs"])}
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    planned = planned_vits(content, path)
    methods = {group.get("method", name) for name, group in content["runs"].items()}
    try:
        compared = read_compared(content, methods, sizes, content["data"].keys())
        needed = ancestors(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return Results(str(content.get("study", folder.name)), sizes, content["seeds"], compared, planned, rows, needed)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers as text
# ---------------------------------------------------------------------------------------------------------------------


def spread(values: Collection[float]) -> float:
    """The standard deviation of a sample; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def cell(values: Collection[float], seeds: int, sign: str = "") -> str:
    """Mean ± standard deviation; in brackets the number of values, where it is not ``seeds``.

    With "+" as ``sign`` the mean of what is a difference has a sign, also where it is positive.
    """
    if not values:
        return NONE
    text = f"{statistics.mean(values):{sign}.1f}"
    if len(values) > 1:
        text += f" ± {spread(values):.1f}"
    return text if len(values) == seeds else f"{text} ({len(values)})"


def after(epochs: int) -> str:
    return "before training" if epochs == 0 else "1 epoch" if epochs == 1 else f"{epochs} epochs"


def in_short(sizes: Sequence[str], of: Sequence[str]) -> str:
    """Names of sizes, or that it is all of them."""
    return f"all {len(of)} sizes" if len(sizes) == len(of) else ", ".join(sizes) or NONE


def in_units(value: float | None) -> str:
    """Three digits of a large number, with the letter of its power of ten."""
    if value is None:
        return NONE
    value = float(f"{value:.3g}")
    for power, letter in ((15, " P"), (12, " T"), (9, " G"), (6, " M"), (3, " k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g}{letter}"
    return f"{value:.3g}"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table: text in its first column, numbers in the others."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return [f"| {' | '.join(line)} |" for line in (header, rule, *lines)]
