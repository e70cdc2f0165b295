"""What a study has measured: its results.csv, and the parts of its study.yaml that say what to compare."""

import csv
import itertools
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from common.errors import InputError, one_line
from common.files import read_yaml

NONE = "–"  # what stands in a table where there is no run yet


def slug(name: str) -> str:
    """A name of a group as that of a folder."""
    return re.sub(r"[^\w.+-]+", "_", name)


# ---------------------------------------------------------------------------------------------------------------------
# study.yaml
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What is compared with what: names of methods, and of two data sets."""

    learngenes: Sequence[str]
    scratch: str
    first: str
    linear: str | None = None
    second: str | None = None
    baselines: Sequence[str] = ()
    ablations: Sequence[str] = ()
    widths: Sequence[str] = ()

    @property
    def descended(self) -> list[str]:
        """The methods with a stage 1 whose families are compared."""
        return [*self.learngenes, *([self.linear] if self.linear else [])]

    @property
    def methods(self) -> list[str]:
        """All of them, each once."""
        names = [*self.descended, self.scratch, *self.baselines, *self.ablations, *self.widths]
        return list(dict.fromkeys(names))


KEYS = [part.name for part in fields(Report)]
LISTS = ("learngenes", "baselines", "ablations", "widths")


def read_report(content: Mapping, methods: Collection[str], data: Collection[str]) -> Report:
    """The part ``report`` of a study.

    Args:
        content: what the study's YAML file holds.
        methods: the methods that there are.
        data: the data sets that there are.

    Raises:
        InputError: a key is unknown, missing or of the wrong kind, or names a method or a data set that there is not.
    """
    report = content.get("report")
    if not isinstance(report, Mapping):
        raise InputError(f"report is {report!r:.100}: expected the names of what to compare, under {', '.join(KEYS)}")
    for key, value in report.items():
        if key not in KEYS:
            raise InputError(f"report has the unknown key {key!r:.100}: expected {', '.join(KEYS)}")
        names = value if key in LISTS and isinstance(value, list) else [value]
        if not all(isinstance(name, str) for name in names) or (key in LISTS) != isinstance(value, list):
            raise InputError(
                f"report: {key} is {value!r:.100}: expected {'names in a list' if key in LISTS else 'a name'}"
            )
    for key in ("learngenes", "scratch", "first"):
        if not report.get(key):
            raise InputError(f"report has no {key}: expected {'names in a list' if key in LISTS else 'a name'}")
    found = Report(**report)
    for name in found.methods:
        if name not in methods:
            raise InputError(f"report names the method {name!r:.100}: expected one of {', '.join(sorted(methods))}")
    for name in filter(None, (found.first, found.second)):
        if name not in data:
            raise InputError(f"report names the data set {name!r:.100}: expected one of {', '.join(sorted(data))}")
    return found


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


OF_VITS = ("accuracy", "stored_parameters")  # a teacher and stage 1 may leave these empty


def read_rows(path: Path) -> list[Row]:
    """The rows of results.csv.

    Raises:
        InputError: there is no such file, it lacks a column, or a value is not what its column holds.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [part.name for part in fields(Row) if part.name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path} has no column {missing[0]}: expected the results.csv of a study")
            return [read_row(values, f"{path}, line {reader.line_num}") for values in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}): expected a study's results") from error


def read_row(values: Mapping[str, str | None], where: str) -> Row:
    """One line of results.csv. Raises InputError, beginning with ``where``, if a value is no number."""
    converted = {}
    for part in fields(Row):
        text = values[part.name] or ""
        if not text and part.name in OF_VITS and values["kind"] != "vit":
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
    report: Report | None
    planned: set[tuple[str, str, str, int, int]]  # all ViTs: method, data set, size, number of epochs, seed
    rows: list[Row]
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

    def runs(self, method: str, data: str, size: str, epochs: int) -> dict[int, Row]:
        """The ViTs of one size, by their seeds."""
        return self._runs.get(("vit", method, data, size, epochs), {})

    def stage_1_macs(self, method: str) -> float | None:
        """Of a method's stage 1 on the first data set, all its groups together: mean over seeds."""
        return self.macs_of_groups("stage1", self.report.first, method)

    def teacher_macs(self) -> float | None:
        """Of training all teachers of the first data set, each once: mean over seeds."""
        return self.macs_of_groups("teacher", self.report.first)

    def macs_of_groups(self, kind: str, data: str | None = None, method: str | None = None) -> float | None:
        """Of all groups of a kind, perhaps of one data set or method, together: means over seeds."""
        groups = [
            runs
            for key, runs in self._runs.items()
            if key[0] == kind and method in (None, key[1]) and data in (None, key[2])
        ]
        return sum(statistics.mean(row.macs for row in runs.values()) for runs in groups) if groups else None

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

    def macs(self, method: str, data: str, size: str, epochs: int) -> float | None:
        """Of training one ViT: mean over seeds."""
        runs = self.runs(method, data, size, epochs).values()
        return statistics.mean(row.macs for row in runs) if runs else None

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
        found = {r.parameters for r in self.rows if (r.kind, r.data, r.size) == ("vit", self.report.first, size)}
        return max(found, default=None)

    def stored(self, method: str) -> int | None:
        """Parameters to be stored for the family; what several sizes are made from counts once."""
        first = self.report.first
        found = {r.stored_parameters for r in self.rows if (r.kind, r.method, r.data) == ("vit", method, first)}
        return sum(found) if found else None


def groups_of(runs: Mapping[str, Any]) -> dict[str, Any]:
    """The groups under ``runs``. One that is ``like`` another has all of it that it does not replace.

    Options are replaced one by one; null removes one.

    Raises:
        InputError: a group is like one that there is not, or groups are like each other in a circle.
    """

    def whole(name: str, seen: tuple[str, ...]) -> Any:
        group = runs[name]
        if not isinstance(group, Mapping) or "like" not in group:
            return group
        if group["like"] not in runs:
            raise InputError(f"runs, {name}: like is {group['like']!r:.100}, which is no group")
        if group["like"] in (seen := (*seen, name)):
            raise InputError(f"runs: {' → '.join([*seen, group['like']])}: groups are like each other in a circle")
        other = whole(group["like"], seen)
        own = {key: value for key, value in group.items() if key != "like"}
        parts = [entry.get("options", {}) for entry in (other, own) if isinstance(entry, Mapping)]
        if len(parts) < 2 or not all(isinstance(part, Mapping) for part in parts):
            return own  # what reads it says what is wrong
        options = {str(key).replace("_", "-"): value for part in parts for key, value in part.items()}
        return {**other, **own, "options": {key: value for key, value in options.items() if value is not None}}

    return {name: whole(name, ()) for name in runs}


def lists_of(group: Mapping, study: Mapping) -> dict[str, Any]:
    """Sizes, numbers of epochs and seeds of a group's runs: the study's where it has none of its own."""
    lists = {key: group.get(key, study.get(key)) for key in ("sizes", "epochs", "seeds")}
    if isinstance(lists["epochs"], int):
        lists["epochs"] = [lists["epochs"]]
    return lists


def planned_vits(content: Mapping, path: Path) -> set[tuple[str, str, str, int, int]]:
    """`Results.planned` of what study.yaml holds. Raises InputError, naming ``path``, if a group is none."""
    planned = set()
    for name, group in groups_of(content["runs"]).items():
        if not isinstance(group, Mapping):
            raise InputError(f"{path}: {name!s:.100} is {group!r:.100}: expected a group of runs")
        if group.get("kind") != "vit":
            continue
        lists = lists_of(group, content)
        for key, value in lists.items():
            if not isinstance(value, list | dict):
                raise InputError(f"{path}: {name!s:.100} has the {key} {value!r:.100}: expected a list")
        planned |= {(group.get("method", name), group.get("data"), *vit) for vit in itertools.product(*lists.values())}
    return planned


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
    planned = planned_vits(content, path)
    methods = {group.get("method", name) for name, group in groups_of(content["runs"]).items()}
    try:
        report = read_report(content, methods, content["data"].keys()) if "report" in content else None
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return Results(str(content.get("study", folder.name)), sizes, content["seeds"], report, planned, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers as text
# ---------------------------------------------------------------------------------------------------------------------


def spread(values: Collection[float]) -> float:
    """The standard deviation of a sample; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def cell(values: Collection[float], seeds: int) -> str:
    """Mean ± standard deviation; in brackets the number of values, where it is not ``seeds``."""
    if not values:
        return NONE
    text = f"{statistics.mean(values):.1f}"
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
