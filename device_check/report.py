"""The report of a check, report.json and report.md: what is in one is in the other."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common.files import atomic_write

NOT_FINISHED = "not finished"
STATES = ("all right", "not all right", "left out", NOT_FINISHED)


@dataclass
class Table:
    """Rows of numbers and texts by column."""

    title: str
    rows: list[dict]
    remark: str = ""

    @property
    def columns(self) -> list[str]:
        """All columns that a row has, in order, with what there is to note last."""
        names = dict.fromkeys(name for row in self.rows for name in row if name != "note")
        return [*names, *["note"] * any(row.get("note") for row in self.rows)]


@dataclass
class Part:
    """A part of the check.

    Attributes:
        state: one of `STATES`.
        problems: what went wrong, a line each.
        notes: what to know about its numbers, and what was left out.
        outputs: what a failure printed, by its name.
    """

    name: str
    title: str
    state: str = NOT_FINISHED
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    outputs: dict[str, str] = field(default_factory=dict)


@dataclass
class Report:
    """What is known so far. `write` after every change that may not be lost."""

    folder: Path
    head: dict[str, str | float | int]
    parts: list[Part]

    @property
    def status(self) -> int:
        """The exit status: 0 if every part is all right or was left out, else 1."""
        return int(any(part.state in ("not all right", NOT_FINISHED) for part in self.parts))

    def write(self) -> None:
        content = {"status": self.status, "head": self.head, "parts": [asdict(part) for part in self.parts]}
        for name, text in (("report.json", json.dumps(content, indent=1)), ("report.md", "\n".join(self.lines()))):
            with atomic_write(self.folder / name) as unfinished:
                Path(unfinished).write_text(text + "\n", encoding="utf-8")

    def lines(self) -> list[str]:
        """The lines of report.md."""
        title = "all right" if self.status == 0 else "not all right, or not finished"
        lines = [f"# Check of {self.head.get('device', 'a device')}: {title}", ""]
        lines += table_lines([{"": name, "value": value} for name, value in self.head.items()], ["", "value"])
        lines += ["", *table_lines(*self.summary())]
        for number, part in enumerate(self.parts, 1):
            lines += ["", f"## {number}. {part.title}: {part.state}", ""]
            lines += [f"- **{problem}**" for problem in part.problems] + [f"- {note}" for note in part.notes]
            for table in part.tables:
                lines += ["", f"### {table.title}", "", *table_lines(table.rows, table.columns)]
                lines += ["", table.remark] if table.remark else []
            for name, text in part.outputs.items():
                lines += ["", f"### {name}", "", "```", *text.replace("```", "'''").splitlines(), "```"]
        return [line for i, line in enumerate(lines) if line or i == 0 or lines[i - 1]]

    def summary(self) -> tuple[list[dict], list[str]]:
        columns = ["part", "result", "seconds", "problems"]
        rows = [
            {"part": part.title, "result": part.state, "seconds": part.seconds, "problems": len(part.problems)}
            for part in self.parts
        ]
        return rows, columns


def table_lines(rows: Sequence[dict], columns: Sequence[str]) -> list[str]:
    """A table in Markdown; numbers to the right."""
    values = [[row.get(name) for row in rows if row.get(name) not in (None, "")] for name in columns]
    numbers = [bool(column) and all(isinstance(value, (int, float)) for value in column) for column in values]
    lines = [columns, ["---:" if number else "---" for number in numbers]]
    lines += [[shown(row.get(name)) for name in columns] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def shown(value: object) -> str:
    """A cell: numbers with four significant digits, thousands grouped; – for nothing."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        digits = f"{value:.4g}"
        return f"{float(digits):,.0f}" if abs(value) >= 1000 else digits
    if isinstance(value, int):
        return f"{value:,}"
    return " ".join(str(value).replace("|", "\\|").split())
