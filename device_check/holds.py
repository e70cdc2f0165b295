"""Part 3, does it hold: a piece of a study, several runs at a time, with its results packed to be taken along."""

import csv
import io
import statistics
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from common.files import atomic_write
from device_check.processes import start_program, wait_for
from device_check.report import Part, Report, Table

PIECE = 15 * 2**20  # bytes of a file, as many places take no larger ones
OUT_OF_TIME, STOPPING = 3, 40  # exit status of the study; seconds that its runs may take to stop
LAST_LINES = 20


def run(
    report: Report, part: Part, study: Path, options: Sequence[str], results: Path, logs: Path, until: float
) -> None:
    """Run a study until about ``until``, a time of time.monotonic().

    Args:
        study: its YAML file.
        options: more options of scripts/study.py.
        results: the folder that it writes its results to.
    """
    seconds = until - time.monotonic()
    log, packed = logs / "study.log", 0.0
    if seconds < STOPPING + 20:
        part.state = "left out"
        part.notes.append("no time was left")
        return
    minutes = (seconds - STOPPING) / 60
    command = ["scripts/study.py", str(study), "--minutes", f"{minutes:.2f}", *options]
    before = rows_of(results / "results.csv")

    def look() -> None:
        nonlocal packed
        written = results / "progress.csv"
        if written.exists() and written.stat().st_mtime != packed:
            packed = written.stat().st_mtime
            describe(part, results, before)
            pack(results, report.folder)
            report.write()

    ended = wait_for(start_program(command, log, seconds - STOPPING / 2), look)
    describe(part, results, before)
    part.state = "all right"
    if ended.late or ended.status not in (0, OUT_OF_TIME):
        part.state = "not all right"
        part.problems.append(f"the study {ended}")
        part.outputs["The study"] = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
    if results.exists():
        pack(results, report.folder)


def rows_of(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def describe(part: Part, results: Path, before: Sequence[dict]) -> None:
    """Write into the part what this piece has done, and what is missing."""
    progress, rows = rows_of(results / "progress.csv"), rows_of(results / "results.csv")
    new = [row for row in rows if row not in before]
    fields = ("group", "size", "seed", "epochs", "accuracy", "images_seen", "seconds", "device")
    table = [{name: number(row[name]) for name in fields} | {"images/s": speed_of(row)} for row in new]
    missing = [
        {
            "group": row["group"] + ", tuning" * bool(row["tuning"]),
            "runs": int(row["runs"]),
            "done": int(row["done"]),
            "missing": int(row["runs"]) - int(row["done"]),
        }
        for row in progress
    ]
    left = sum(row["missing"] for row in missing)
    part.tables = [Table("Runs of this piece", table)] * bool(table)
    accuracies = accuracies_of(rows)
    part.tables += [Table("Accuracy so far, in %, mean over seeds", accuracies)] * bool(accuracies)
    part.tables += [Table("What is missing", missing)] * bool(missing)
    part.notes = [f"{len(new)} rows are new; {left} of {sum(row['runs'] for row in missing)} runs are missing"]
    done, macs = (sum(float(row[name]) for row in progress) for name in ("macs_done", "macs"))
    if macs:
        part.notes.append(f"{done / macs:.1%} of the multiply-accumulates of the whole study are done")


def accuracies_of(rows: Sequence[dict]) -> list[dict]:
    """One row per method and number of epochs, with the mean accuracy of each size over the seeds that have run."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        if row["kind"] == "vit":
            of_sizes = found.setdefault((row["method"], int(row["epochs"])), {})
            of_sizes.setdefault(row["size"], []).append(float(row["accuracy"]))
    return [
        {
            "method": method,
            "epochs": epochs,
            **{size: statistics.mean(values) for size, values in sorted(sizes.items())},
        }
        for (method, epochs), sizes in sorted(found.items())
    ]


def number(text: str) -> object:
    """A cell of a CSV file as what it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


def speed_of(row: dict[str, str]) -> float | None:
    seconds = float(row["seconds"])
    return int(row["images_seen"]) / seconds if seconds else None


def pack(results: Path, folder: Path) -> None:
    """Pack the results into ``study.tar.0``, ``study.tar.1``, … of at most `PIECE` bytes each.

    ``cat study.tar.* | tar -x -C results`` unpacks them, and the study continues there.
    """
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path in sorted(results.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                tar.add(path, f"{results.name}/{path.name}")
    content = file.getvalue()
    pieces = [content[i : i + PIECE] for i in range(0, len(content), PIECE)]
    for i, piece in enumerate(pieces):
        with atomic_write(folder / f"study.tar.{i}") as unfinished:
            Path(unfinished).write_bytes(piece)
    for old in folder.glob("study.tar.*"):
        if int(old.suffix[1:]) >= len(pieces):
            old.unlink()
