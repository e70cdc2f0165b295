"""Part 1, right: the tests of tests/device, a process for each file."""

import json
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.devices import processors
from common.errors import InputError
from device_check.processes import INTERVAL, Ended, Started, start_program
from device_check.recorder import WHERE
from device_check.report import Part, Report, Table
from training.command_line import REPOSITORY

LAST_LINES = 12  # of the message of a failed test
OUTCOMES = ("passed", "failed", "skipped")


@dataclass
class Record:
    """What `device_check.recorder` has written of a file: its tests by outcome, and the one that runs."""

    tests: int | None = None  # None: they were not found
    ended: list[dict] = field(default_factory=list)
    running: str | None = None

    @classmethod
    def read(cls, path: Path) -> "Record":
        record = cls()
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else []):
            if "outcome" in line:
                record.ended.append(line)
                record.running = None
            record.tests, record.running = line.get("tests", record.tests), line.get("started", record.running)
        return record


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The test files among ``paths`` and in folders of them, by default in tests/device.

    Raises:
        InputError: there are none.
    """
    paths = paths or [REPOSITORY / "tests" / "device"]
    files = [file for path in paths for file in (sorted(path.glob("**/test_*.py")) if path.is_dir() else [path])]
    if not files or not all(file.is_file() for file in files):
        raise InputError(f"--tests {' '.join(map(str, paths))}: found no such test files; expected files or folders")
    return [file.resolve() for file in files]


def run(report: Report, part: Part, files: list[Path], device: str, all_tests: bool, logs: Path, until: float) -> None:
    """Run the tests of each file; several files at a time.

    Args:
        device: as for main.py.
        all_tests: whether those marked ``full`` run, too.
        until: time.monotonic() at which what still runs is interrupted.
    """
    waiting, running, done = list(files), {}, {}
    at_a_time = max(1, processors() // (1 if device == "cpu" else 2))
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                file = waiting.pop(0)
                running[file] = start(file, device, all_tests, logs, until, max(1, processors() // at_a_time))
            for file, started in [*running.items()]:
                if (ended := started.ended()) is not None:
                    del running[file]
                    done[file] = ended
                    describe(part, done, logs)
                    report.write()
            time.sleep(INTERVAL)
    finally:
        for started in running.values():
            started.kill()
    part.state = "not all right" if part.problems else "all right"


def start(file: Path, device: str, all_tests: bool, logs: Path, until: float, threads: int) -> Started:
    command = ["-m", "pytest", str(file), "-v", "--tb=short", "--color=no", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["-p", "device_check.recorder", *([] if all_tests else ["-m", "not full"])]
    command += [f"--device={device}"] if takes_device(file) else []
    seconds = max(1.0, until - time.monotonic())
    environment = {"OMP_NUM_THREADS": str(threads), WHERE: str(logs / f"{file.stem}.jsonl")}
    return start_program(command, logs / f"{file.stem}.log", seconds, signal.SIGINT, environment)


def takes_device(file: Path) -> bool:
    """Whether the tests beside a conftest.py with the option --device."""
    conftest = file.parent / "conftest.py"
    return conftest.exists() and '"--device"' in conftest.read_text(encoding="utf-8")


def describe(part: Part, done: dict[Path, Ended], logs: Path) -> None:
    """Write what the files that have ended have found into the part."""
    rows, reasons = [], Counter()
    part.problems, part.outputs = [], {}
    for file, ended in done.items():
        record = Record.read(logs / f"{file.stem}.jsonl")
        counts = Counter(test["outcome"] for test in record.ended)
        rows.append({"file": file.name, **{name: counts[name] for name in OUTCOMES}, "seconds": ended.seconds})
        for test in record.ended:
            if test["outcome"] == "failed":
                part.problems.append(f"{file.name}: {test['name']} failed")
                part.outputs[f"{file.name}: {test['name']}"] = last_lines(test["text"])
            elif test["outcome"] == "skipped":
                reasons[test["text"].removeprefix("Skipped: ")] += 1
        if ended.late or ended.status not in (0, 1) or (ended.status and not counts["failed"]):
            where = f" in {record.running}" if record.running else ""
            ran = f"after {len(record.ended)} of {record.tests} tests" if record.tests else "without a test"
            part.problems.append(f"{file.name} {ended} {ran}{where}")
            if not ended.late:
                part.outputs[file.name] = last_lines((logs / f"{file.stem}.log").read_text(errors="replace"))
    part.tables = [Table("Tests", rows)]
    if reasons:
        part.tables.append(Table("Skipped", [{"reason": reason, "tests": n} for reason, n in reasons.most_common()]))


def last_lines(text: str) -> str:
    return "\n".join(text.rstrip().splitlines()[-LAST_LINES:])
