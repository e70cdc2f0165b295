"""A study: many runs of main.py that one YAML file describes, and their results in one table.

scripts/study.py configs/study_cpu.yaml
scripts/study.py configs/study_gpu.yaml --minutes 110

The same command continues where it was stopped: with --minutes, by Ctrl-C, or by whatever has ended it. Learning rates
are chosen on training images held out, before the runs that need them. output/study/NAME has everything that the runs
write; results/NAME what is kept: their log.txt and args.yaml, results.csv, tuning.csv, tables and plots.
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import TopologicalSorter
from multiprocessing.connection import wait
from pathlib import Path

from common import console
from common.errors import InputError, nearest
from common.files import atomic_write, read_json, sha256
from main import main as run_main
from options import at_least, local_path, positive
from study.plan import WEIGHTS, Run, Study, order_of, read_study
from study.report import write
from training.command_line import REPOSITORY, Parser
from utils import StopSignals

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open

# what a run imports late, and what would then take seconds in each of them
LATE = ("torch.utils.tensorboard", "matplotlib.figure", "matplotlib.backends.backend_agg")
LATE += ("sklearn.datasets", "sklearn.model_selection")
STOPPED = {128 + number for number in StopSignals.NUMBERS} | {-signal.SIGTERM}  # exit statuses
OUT_OF_TIME = 3  # exit status
COLUMNS = ("study", "group", "kind", "method", "data", "size", "seed", "epochs", "lr", "accuracy", "images_seen")
COLUMNS += ("macs", "parameters", "stored_parameters", "seconds", "device")
TUNING_COLUMNS = ("group", "epochs", "tuned_by_epochs", "lr", "held_out_accuracy", "chosen", "at_edge")


def be_main(arguments: list[str], output: Path, threads: int) -> None:
    """Make this process one of ``python main.py ARGUMENTS`` that prints into ``output``."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # of a terminal: the study passes it on as SIGTERM
    threading.Thread(target=stop_with_study, daemon=True).start()
    printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    console.accept_any_text()
    torch.set_num_threads(threads)
    print(shlex.join(["python", "main.py", *arguments]), flush=True)
    sys.exit(run_main(arguments))


def stop_with_study() -> None:
    """A study that is killed cannot stop its runs."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


# ---------------------------------------------------------------------------------------------------------------------
# What is known of a run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What ``run.json`` in the folder of a run says; ``result`` is None until it is done."""

    identity: dict  # options and the like that the result follows from
    lr: float | None
    made_from: dict[str, str]  # reference → SHA-256 of the weights that it has led to
    seconds: float = 0
    device: str = ""
    result: dict | None = None

    def write(self, folder: Path) -> None:
        with atomic_write(folder / "run.json") as unfinished:
            Path(unfinished).write_text(json.dumps(vars(self), indent=1) + "\n")


def read_record(path: Path) -> Record | None:
    """None where the run was not begun."""
    if not path.exists():
        return None
    content = read_json(path)
    try:
        return Record(**content)
    except TypeError as error:
        raise InputError(f"{path} is no record of a run: remove its folder to run it again") from error


def result_of(folder: Path) -> dict:
    """What a run of main.py that has ended left in its folder."""
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    weights = next(folder / name for name in WEIGHTS if (folder / name).exists())
    with safe_open(weights, framework="pt") as file:
        stored = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return {
        "accuracy": log[-1]["test_acc1"],
        "before": log[0]["test_acc1"] if log[0]["epoch"] == -1 else None,
        "parameters": log[-1]["n_parameters"],
        "stored": stored,
        "sha256": sha256(weights),
    }


def not_finite(folder: Path) -> str | None:
    """What main.py has said of numbers that were not finite, if that has ended it."""
    return next((line for line in last_printed(folder, 3) if line.startswith("error: ") and "finite" in line), None)


def last_printed(folder: Path, lines: int) -> list[str]:
    """The last lines of what a run has printed; none if it did not get that far."""
    output = folder / "output.txt"
    return output.read_text(errors="replace").splitlines()[-lines:] if output.exists() else []


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Process:
    """A run that is under way."""

    run: Run
    process: multiprocessing.Process
    start: float


@dataclass
class Runner:
    """Does what is left of a study, several runs at a time."""

    study: Study
    root: Path  # of what the runs write
    jobs: int
    chosen: list[Run]  # what is to be done, each run after those that it needs
    records: dict[Run, Record | None] = field(default_factory=dict)
    running: list[Process] = field(default_factory=list)
    spent: float = 0  # seconds of runs that ended in this piece
    cost: int = 0  # of these runs

    def __post_init__(self):
        """Read what is done already.

        Raises:
            InputError: a folder holds a run with other options.
        """
        for run in order_of(self.study.all_runs):
            self.records[run] = read_record(self.root / run.folder / "run.json")
            self.check(run)

    @cached_property
    def context(self) -> multiprocessing.context.BaseContext:
        """Processes that have imported everything already: forks of one that has done nothing else."""
        os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        context = multiprocessing.get_context("forkserver")
        # this script, too, or each process would import it again, and find what has been edited since
        context.set_forkserver_preload(["__main__", "training.launch", "study.plan", *LATE])
        return context

    @property
    def threads(self) -> int:
        return max(1, len(os.sched_getaffinity(0)) // self.jobs)

    def device_of(self, run: Run) -> str:
        if run.options.get("device") != "cpu" and torch.cuda.is_available():
            return torch.cuda.get_device_name()
        return f"cpu, {self.threads} thread{'s' * (self.threads > 1)}"

    def is_done(self, run: Run) -> bool:
        return self.records[run] is not None and self.records[run].result is not None

    def is_settled(self, run: Run) -> bool:
        """Whether it is done, and so is all that it follows from, of which a folder may have been removed."""
        return all(map(self.is_done, {run, *run.after}))

    def learning_rate(self, run: Run) -> float | None:
        """Given, or chosen: the one with the highest accuracy on the images held out; None if not known yet."""
        if not run.tuned_by or not all(self.is_done(tuning) for tuning in run.tuned_by):
            return run.lr
        return max(run.tuned_by, key=lambda tuning: self.records[tuning].result["accuracy"]).lr

    def made_from(self, run: Run) -> dict[str, str]:
        return {name: self.records[of].result["sha256"] for name, of in run.needs.items() if self.is_done(of)}

    def check(self, run: Run) -> None:
        """Raises InputError if the run was begun with something else than is asked for, as far as that is known."""
        record, folder = self.records[run], self.root / run.folder
        if record is None:
            return
        lr = self.learning_rate(run)
        asked = json.loads(json.dumps(run.identity)) | ({} if lr is None else {"lr": lr})
        found = record.identity | ({} if lr is None else {"lr": record.lr})
        for name in [*asked, *found]:
            if asked.get(name) != found.get(name):
                found, asked = found.get(name, "nothing"), asked.get(name, "nothing")
                raise InputError(
                    f"{folder} holds {run} with {name} {found}, not {asked}: remove this folder to run it again"
                )
        for name, digest in self.made_from(run).items():
            if record.made_from.get(name) != digest:
                raise InputError(
                    f"{folder} holds {run}, made from another run of {name}: remove this folder to run it again"
                )

    def ranks(self) -> dict[Run, int]:
        """Of each run, the cost of the longest chain that it begins and that is not done."""
        ranks = dict.fromkeys(self.chosen, 0)
        for run in reversed(self.chosen):
            ranks[run] += 0 if self.is_done(run) else run.cost
            for needed in run.after:
                ranks[needed] = max(ranks[needed], ranks[run])
        return ranks

    def run_all(self, deadline: float) -> int:
        """Run what is left until that is done, fails, is to be stopped, or ``deadline`` of time.monotonic().

        Returns:
            The exit status.
        """
        left = {run for run in self.chosen if not self.is_settled(run)}
        order = TopologicalSorter({run: run.after & left for run in left})
        order.prepare()
        ranks, ready, status = self.ranks(), [], 0
        with StopSignals() as signals:
            try:
                while order.is_active() and not status:
                    late = OUT_OF_TIME if time.monotonic() > deadline else 0
                    status = 128 + signals.noted if signals.noted else late
                    if status == 0:
                        ready = self.start_ready([*ready, *order.get_ready()], ranks, order)
                    for ended in self.ended():
                        status = self.finish(ended) or status
                        order.done(*[ended.run] * self.is_done(ended.run))
            finally:
                self.stop()
        return status

    def start_ready(self, ready: list[Run], ranks: Mapping[Run, int], order: TopologicalSorter) -> list[Run]:
        """Begin as many runs as there are places for, and return those that have to wait.

        Raises:
            InputError: one was made from something else than is there now.
        """
        waiting = []
        for run in sorted(ready, key=ranks.__getitem__, reverse=True):
            self.check(run)
            if self.is_done(run):
                order.done(run)
            elif len(self.running) < self.jobs:
                self.start(run)
            else:
                waiting.append(run)
        return waiting

    def start(self, run: Run) -> None:
        folder, lr = self.root / run.folder, self.learning_rate(run)
        folder.mkdir(parents=True, exist_ok=True)
        if self.records[run] is None:
            self.records[run] = Record(run.identity, lr, self.made_from(run))
            self.records[run].write(folder)
        arguments = [*run.arguments(self.root, lr), "--resume=auto"]
        process = self.context.Process(target=be_main, args=(arguments, folder / "output.txt", self.threads))
        process.start()
        self.running.append(Process(run, process, time.monotonic()))

    def ended(self) -> list[Process]:
        """The processes that have ended, after waiting for one a moment."""
        sentinels = [running.process.sentinel for running in self.running]
        ended = (
            [self.running[sentinels.index(sentinel)] for sentinel in wait(sentinels, timeout=0.2)] if sentinels else []
        )
        self.running = [running for running in self.running if running not in ended]
        return ended

    def finish(self, ended: Process) -> int:
        """Record what a run has come to, and return the exit status of the study if that ends with it, else 0."""
        run, folder, record = ended.run, self.root / ended.run.folder, self.records[ended.run]
        seconds, code = time.monotonic() - ended.start, ended.process.exitcode
        record.seconds, record.device = record.seconds + seconds, self.device_of(run)
        if run.tuning and code == 1 and (reason := not_finite(folder)):
            record.result, code = {"accuracy": 0.0}, 0  # a learning rate that is not chosen
            print(f"{run}: {reason}", flush=True)
        elif code == 0:
            record.result = result_of(folder)
            for checkpoint in [*folder.glob("checkpoint*.pth"), *folder.glob("best_checkpoint.pth")]:
                checkpoint.unlink()
        record.write(folder)
        if code == 0:
            self.spent, self.cost = self.spent + seconds, self.cost + run.cost
            done = sum(map(self.is_done, self.chosen))
            result = f"{record.result['accuracy']:.2f} %, {record.seconds:.0f} s"
            print(f"[{done}/{len(self.chosen)}] {run}: {result}{self.time_left()}", flush=True)
        elif code not in STOPPED:
            print(f"error: {run} has failed with status {code}, see {folder}/output.txt:", file=sys.stderr)
            print("\n".join(last_printed(folder, 20)), file=sys.stderr, flush=True)
            return 1
        return 128 + signal.SIGTERM if code in STOPPED else 0

    def time_left(self) -> str:
        left = sum(run.cost for run in self.chosen if not self.is_done(run))
        minutes = left / self.cost * self.spent / self.jobs / 60
        return f"; about {minutes:.0f} min left" if left else ""

    def stop(self) -> None:
        """Ask the runs under way to save what they have and end, and wait until they have."""
        for running in self.running:
            running.process.terminate()
        for running in self.running:
            running.process.join()
            self.finish(running)
        self.running = []


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def write_results(runner: Runner, results: Path, config: Path) -> None:
    """What is kept of the runs that are done: logs, options, and tables."""
    for run in filter(runner.is_settled, runner.study.runs.values()):
        (results / run.folder).mkdir(parents=True, exist_ok=True)
        for name in ("log.txt", "args.yaml"):
            copy_whole(runner.root / run.folder / name, results / run.folder / name)
    results.mkdir(parents=True, exist_ok=True)
    copy_whole(config, results / "study.yaml")
    write_csv(results / "results.csv", COLUMNS, rows_of(runner))
    write_csv(results / "tuning.csv", TUNING_COLUMNS, tuning_rows(runner))


def copy_whole(source: Path, target: Path) -> None:
    with atomic_write(target) as unfinished:
        shutil.copyfile(source, unfinished)


def rows_of(runner: Runner) -> Iterable[dict]:
    """A row for each run that is done, and one for what it was before training where the group asks for that."""
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
    """The accuracy of every learning rate that was tried, and which one was chosen for what."""
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


def show_plan(runner: Runner) -> None:
    """The groups, and how far each is."""
    for group in runner.study.groups.values():
        runs = [run for run in runner.chosen if run.group is group]
        for tuning in (True, False):
            some = [run for run in runs if run.tuning is tuning]
            done = sum(map(runner.is_done, some))
            begun = sum(runner.records[run] is not None for run in some) - done
            states = f"{done} done, {begun} begun, {len(some) - done - begun} to do"
            macs = sum(run.macs for run in some)
            if some:
                print(f"{group.name}{', tuning' * tuning}: {len(some)} runs ({states}), {macs:.2e} MACs")
    print(f"{len(runner.chosen)} runs, {sum(run.macs for run in runner.chosen):.2e} MACs")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("config", type=local_path, help="the YAML file of the study")
    p.add_argument("--jobs", type=at_least(1), help="runs at a time; default: one per processor, on a GPU 4")
    p.add_argument("--minutes", type=positive, default=math.inf, help="stop after so many; later calls continue")
    p.add_argument("--only", nargs="+", metavar="GROUP", help="these groups alone, and what they need")
    p.add_argument(
        "--results", type=local_path, default=Path("results"), metavar="DIR", help="what is kept goes to DIR/NAME"
    )
    p.add_argument(
        "--output", type=local_path, default=Path("output/study"), metavar="DIR", help="all the rest to DIR/NAME"
    )
    p.add_argument("--list", action="store_true", help="print what there is to do, and do nothing")
    return p.parse_args(argv)


def chosen_runs(study: Study, only: list[str] | None) -> list[Run]:
    """The runs of these groups, or of all, each after those that it needs."""
    if only is None:
        return order_of(study.all_runs)
    for name in only:
        if name not in study.groups:
            raise InputError(f"--only {name} is no group{nearest(name, study.groups)}")
    chosen, found = [run for run in study.runs.values() if run.group.name in only], set()
    while chosen:
        run = chosen.pop()
        found.add(run)
        chosen += run.after - found
    return [run for run in order_of(study.all_runs) if run in found]


def work(args: argparse.Namespace, deadline: float) -> int:
    """Do what the command line says, and return the exit status."""
    study = read_study(args.config)
    root, results = args.output / study.name, args.results / study.name
    jobs = args.jobs or (4 if torch.cuda.is_available() else len(os.sched_getaffinity(0)))
    if args.list:
        show_plan(Runner(study, root, jobs, chosen_runs(study, args.only)))
        return 0
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / ".lock", timeout=0):
            runner = Runner(study, root, jobs, chosen_runs(study, args.only))
            status = 1
            try:
                status = runner.run_all(deadline)
            finally:
                write_results(runner, results, args.config)
    except Timeout as error:
        raise InputError(f"{root} is used by another process of this study: wait for it, or stop it") from error
    done = sum(map(runner.is_done, runner.chosen))
    if status:
        print(f"{done} of {len(runner.chosen)} runs are done; the same command continues", flush=True)
    elif all(map(runner.is_done, study.all_runs)):
        write(results)
        print(f"all {done} runs are done: {results}", flush=True)
    else:
        print(f"these {done} runs are done: {results}", flush=True)
    return status


def main(argv: Sequence[str]) -> int:
    began = time.monotonic()
    try:
        args = parse(argv)
        return work(args, began + 60 * args.minutes)
    except (InputError, OSError) as error:  # an OSError names the file that cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2
