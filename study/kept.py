"""The files that a study keeps of its finished runs: archives to continue from (`study.restore`), and three tables."""

import csv
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from common.files import atomic_write
from study.archive import ARCHIVE, WEIGHTS_ARCHIVE, write_archive
from study.plan import OUTPUT, Run
from study.records import RECORD
from study.restore import LOGS, OPTIONS, WITH_WEIGHTS
from study.runner import Runner

COLUMNS = ("study", "group", "kind", "method", "data", "size", "seed", "epochs", "lr", "accuracy", "images_seen")
COLUMNS += ("macs", "parameters", "stored_parameters", "seconds", "device")
TUNING_COLUMNS = ("group", "epochs", "tuned_by_epochs", "lr", "held_out_accuracy", "chosen", "at_edge")
PROGRESS_COLUMNS = ("group", "tuning", "runs", "done", "begun", "macs", "macs_done")
WEIGHTS_LIMIT = 22 * 2**20  # bytes of weights that are kept: results are committed and copied


def write_results(runner: Runner, results: Path, config: Path) -> None:
    """Write the archives and the tables of the runs that are done, and a copy of the study's YAML file."""
    results.mkdir(parents=True, exist_ok=True)
    files = {}
    for run in filter(runner.is_settled, runner.study.all_runs):
        for name in (RECORD,) if run.tuning else (RECORD, *LOGS):
            content = (runner.root / run.folder / name).read_bytes()
            files[f"{run.folder}/{name}"] = as_by_default(content, runner) if name == OPTIONS else content
    write_archive(results / ARCHIVE, files)
    if weights := awaited_weights(runner):
        contents = {name: path.read_bytes() for name, path in weights.items()}
        write_archive(results / WEIGHTS_ARCHIVE, contents, level=1)
    else:
        (results / WEIGHTS_ARCHIVE).unlink(missing_ok=True)
    with atomic_write(results / "study.yaml") as unfinished:
        shutil.copyfile(config, unfinished)
    write_csv(results / "results.csv", COLUMNS, rows_of(runner))
    write_csv(results / "tuning.csv", TUNING_COLUMNS, tuning_rows(runner))
    write_csv(results / "progress.csv", PROGRESS_COLUMNS, progress_rows(runner, runner.study.all_runs))


def as_by_default(options: bytes, runner: Runner) -> bytes:
    """The options of a run as they are where the study is in its default folder: results name no folder elsewhere."""
    place = rf"(?<=[ '\"]){re.escape(str(runner.root))}(?=/)"
    return re.sub(place.encode(), f"{OUTPUT}/{runner.study.name}".encode(), options)


def awaited_weights(runner: Runner) -> dict[str, Path]:
    """The weights of finished runs that others wait for, as many as `WEIGHTS_LIMIT` allows, by their names."""
    study = runner.study
    left = [run for run in study.all_runs if not runner.is_done(run)]
    awaited = {needed for run in left for needed in run.needs.values() if runner.is_settled(needed)}
    paths = {run: [runner.root / run.folder / name for name in WITH_WEIGHTS] for run in study.all_runs}
    paths = {run: [path for path in of_run if path.exists()] for run, of_run in paths.items()}
    sizes = {run: sum(path.stat().st_size for path in of_run) for run, of_run in paths.items()}
    kept = that_fit(awaited, sizes, WEIGHTS_LIMIT, study.place_of)
    return {f"{run.folder}/{path.name}": path for run in kept for path in paths[run]}


def that_fit(awaited: set[Run], sizes: Mapping[Run, int], limit: int, place_of: Callable) -> list[Run]:
    """The first of the runs whose weights others wait for, as many as have ``limit`` bytes together.

    Where the weights of one are not kept, it will be done again, and then it waits for those that it was made from.
    """
    while True:
        kept, size = [], 0
        for run in sorted(awaited, key=place_of):
            if size + sizes[run] <= limit:
                kept.append(run)
                size += sizes[run]
        more = {needed for run in awaited - {*kept} for needed in run.needs.values()} - awaited
        if not more:
            return kept
        awaited = awaited | more


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


def progress_rows(runner: Runner, all_runs: Collection[Run]) -> Iterable[dict]:
    """One row per group, and one for its tuning: how many of these runs there are, done and begun."""
    for group in runner.study.groups.values():
        for tuning in (True, False):
            runs = [run for run in all_runs if run.group is group and run.tuning is tuning]
            done = [run for run in runs if runner.is_done(run)]
            if runs:
                yield {
                    "group": group.name,
                    "tuning": "yes" if tuning else "",
                    "runs": len(runs),
                    "done": len(done),
                    "begun": sum(runner.records[run] is not None for run in runs) - len(done),
                    "macs": sum(run.macs for run in runs),
                    "macs_done": sum(run.macs for run in done),
                }


def tuning_rows(runner: Runner) -> Iterable[dict]:
    """One row per learning rate that was tried, with its accuracy on the images held out."""
    for (name, epochs), grid in runner.study.grids.items():
        done = [run for run in grid if runner.is_done(run)]
        best = max(done, key=lambda run: runner.records[run].tuned_on, default=None)
        for run in done:
            chosen = run is best and len(done) == len(grid)
            yield {
                "group": name,
                "epochs": epochs,
                "tuned_by_epochs": run.epochs,
                "lr": run.lr,
                "held_out_accuracy": round(runner.records[run].tuned_on, 3),
                "chosen": "yes" if chosen else "",
                "at_edge": "yes" if chosen and run in (grid[0], grid[-1]) else "",
            }


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    with atomic_write(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
