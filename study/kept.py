"""The files that a study keeps of its finished runs: an archive of logs and options, and two tables."""

import csv
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.files import atomic_write
from study.archive import ARCHIVE, write_archive
from study.runner import Runner

COLUMNS = ("study", "group", "kind", "method", "data", "size", "seed", "epochs", "lr", "accuracy", "images_seen")
COLUMNS += ("macs", "parameters", "stored_parameters", "seconds", "device")
TUNING_COLUMNS = ("group", "epochs", "tuned_by_epochs", "lr", "held_out_accuracy", "chosen", "at_edge")
LOGS = ("log.txt", "args.yaml")  # of each run


def write_results(runner: Runner, results: Path, config: Path) -> None:
    """Write the archive and the tables of the runs that are done, and a copy of the study's YAML file."""
    results.mkdir(parents=True, exist_ok=True)
    folders = [run.folder for run in filter(runner.is_settled, runner.study.runs.values())]
    files = {str(folder / name): runner.root / folder / name for folder in folders for name in LOGS}
    write_archive(results / ARCHIVE, files)
    with atomic_write(results / "study.yaml") as unfinished:
        shutil.copyfile(config, unfinished)
    write_csv(results / "results.csv", COLUMNS, rows_of(runner))
    write_csv(results / "tuning.csv", TUNING_COLUMNS, tuning_rows(runner))


def rows_of(runner: Runner) -> Iterable[dict]:
    """One row per finished run, and one with the accuracy before training where the group asks for it."""
    for run in filter(runner.is_settled, runner.study.runs.values()):
        group, record = run.group, runner.records[run]
        stored = [runner.records[of].result["stored"] for of in run.stored or [run]]
        row = {
            "study": runner.study.name,
            "group": group.name,
            "kind": group.kind,
            "method": group.method,
            "data": group.data,
            "size": run.size,
            "seed": run.seed,
            "epochs": run.epochs,
            "lr": record.lr,
            "accuracy": record.result["accuracy"],
            "images_seen": run.images,
            "macs": run.macs,
            "parameters": record.result["parameters"],
            "stored_parameters": sum(stored),
            "seconds": round(record.seconds, 2),
            "device": record.device,
        }
        if group.before and run.epochs == min(group.epochs):
            before = {"epochs": 0, "lr": None, "images_seen": 0, "macs": 0, "seconds": 0}
            yield row | before | {"accuracy": record.result["before"]}
        yield row


def tuning_rows(runner: Runner) -> Iterable[dict]:
    """One row per learning rate that was tried, with its accuracy on the images held out."""
    for (name, epochs), grid in runner.study.grids.items():
        done = [run for run in grid if runner.is_done(run)]
        best = max(done, key=lambda run: runner.records[run].result["accuracy"], default=None)
        for run in done:
            chosen = run is best and len(done) == len(grid)
            yield {
                "group": name,
                "epochs": epochs,
                "tuned_by_epochs": run.epochs,
                "lr": run.lr,
                "held_out_accuracy": runner.records[run].result["accuracy"],
                "chosen": "yes" if chosen else "",
                "at_edge": "yes" if chosen and run in (grid[0], grid[-1]) else "",
            }


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    with atomic_write(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
