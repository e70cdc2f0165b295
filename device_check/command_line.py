"""Does the program work on the device of this machine, and how fast? Three parts, each within its time:

1. right: the tests of tests/device, which say the same on every device.
2. fast:  the measurements of docs/performance.md that are for a device.
3. holds: a piece of configs/study_gpu.yaml, several runs at a time, which the next call continues.

FOLDER gets report.md and report.json, written again after every test file, measurement and run, so that a check that is
cut off leaves what it has found; logs.tar.gz; and study.tar.0, study.tar.1, …, the results of the study. Nothing is
installed or downloaded. Exit status: 0 all right, 1 not, or not finished, 2 wrong arguments.
"""

import argparse
import shlex
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from common.errors import InputError
from common.files import atomic_write, read_json
from device_check import fast, holds, right
from device_check.machine import describe
from device_check.processes import start_fork, wait_for
from device_check.report import Part, Report
from options import local_path, positive
from training.command_line import REPOSITORY, Parser

TITLES = {"right": "Right", "fast": "Fast", "holds": "Does it hold"}
SHARES = {"right": 2.2 / 9, "fast": 3.4 / 9, "holds": 1.0}  # of the time, at most; the last part has what is left
SMALL_SHARES = SHARES | {"right": 5 / 9}  # a CPU needs longer for the tests, and less for small networks
RESERVED = 8  # seconds to end in


def parse(argv: Sequence[str]) -> argparse.Namespace:
    p = Parser(
        prog="check_device.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--out", type=local_path, required=True, metavar="FOLDER", help="where the report goes")
    p.add_argument("--minutes", type=positive, default=9.0, help="for all parts together (9)")
    p.add_argument("--data-path", type=local_path, metavar="DIR", help="the folder of Fashion-MNIST, for part 3")
    p.add_argument("--device", default="auto", help="as for main.py")
    p.add_argument("--small", action="store_true", help="small networks, few tests and a small study, for a CPU")
    p.add_argument("--parts", nargs="+", choices=TITLES, default=[*TITLES], metavar="PART", help="some of the parts")
    p.add_argument("--tests", nargs="+", type=local_path, default=[], metavar="PATH", help="some of the tests")
    return p.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    try:
        args = parse(argv)
        files = right.files_of(args.tests)
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            return check(args, files, Path(folder), shlex.join(["scripts/check_device.sh", *argv]))
    except (InputError, OSError) as error:  # an OSError: a file that cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2


def check(args: argparse.Namespace, files: Sequence[Path], logs: Path, command: str) -> int:
    """Do the parts of the check in order, and return the exit status.

    Raises:
        InputError: there is no such device, or no Fashion-MNIST in the folder.
    """
    began = time.monotonic()
    end = began + 60 * args.minutes - RESERVED
    head = {"date": datetime.now(timezone.utc).isoformat(" ", "minutes"), "command": command, "minutes": args.minutes}
    head |= described(args, logs)
    kind = head.pop("kind")
    report = Report(args.out, head, [Part(name, TITLES[name]) for name in args.parts])
    report.write()
    try:
        for part in report.parts:
            start = time.monotonic()
            share = 1 if part is report.parts[-1] else (SMALL_SHARES if args.small else SHARES)[part.name]
            until = min(end, start + share * 60 * args.minutes)
            print(f"{part.title} …", flush=True)
            if part.name == "right":
                right.run(report, part, list(files), args.device, not args.small, logs, until)
            elif part.name == "fast":
                path = str(args.data_path) if args.data_path else None
                fast.run(report, part, fast.measurements(kind, args.small, path), kind, logs, until)
            else:
                hold(report, part, args, logs, until)
            part.seconds = time.monotonic() - start
            report.write()
            print(f"{part.title}: {part.state}, {part.seconds:.0f} s", *part.problems, sep="\n  ", flush=True)
    finally:
        report.head["seconds"] = time.monotonic() - began
        report.write()
        pack_logs(logs, args.out)
    print(f"{args.out / 'report.md'}: {'all right' if report.status == 0 else 'not all right'}", flush=True)
    return report.status


def described(args: argparse.Namespace, logs: Path) -> dict:
    """What the head of the report says of the machine, found by a fork, which may use the device.

    Raises:
        InputError: there is no such device, or no Fashion-MNIST in the folder.
    """
    found, printed = logs / "machine.json", logs / "machine.log"
    ended = wait_for(start_fork(describe, (args.device, args.data_path, found), printed, 120))
    if not found.exists():
        raise InputError(f"--device {args.device}: asking for it {ended}: {printed.read_text()[-300:]}")
    content = read_json(found)
    if "error" in content:
        raise InputError(content["error"])
    return content


def hold(report: Report, part: Part, args: argparse.Namespace, logs: Path, until: float) -> None:
    """Part 3, where there is Fashion-MNIST, or where it is small."""
    options = ["--device", args.device]
    if args.small:
        options += ["--output", str(logs / "output"), "--results", str(logs / "results"), "--jobs", "2"]
        study, results = REPOSITORY / "configs" / "study_small.yaml", logs / "results" / "small"
    elif args.data_path is None:
        part.state = "left out"
        part.notes.append("the study needs Fashion-MNIST: give its folder with --data-path")
        return
    else:
        options += ["--data-path", str(args.data_path.resolve())]
        study, results = REPOSITORY / "configs" / "study_gpu.yaml", REPOSITORY / "results" / "gpu"
    holds.run(report, part, study, options, results, logs, until)


def pack_logs(logs: Path, folder: Path) -> None:
    with atomic_write(folder / "logs.tar.gz") as unfinished, tarfile.open(unfinished, "w:gz") as tar:
        for path in sorted([*logs.glob("*.log"), *logs.glob("*.jsonl")]):
            tar.add(path, path.name)
