"""Run the trainings of a study, several at a time, each after those that it depends on."""

import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import TopologicalSorter
from multiprocessing.connection import wait
from pathlib import Path

from common.devices import CPU, device_name, processors, type_of
from common.errors import InputError
from common.forks import fork_server, print_to
from main import main as run_main
from study.plan import ROTATED, Run, Study, order_of
from study.records import RECORD, Record, differences, last_printed, not_finite, read_record, result_of
from study.rotated import write_rotated
from training.command_line import REPOSITORY
from utils import StopSignals

import torch

# modules that a run imports late, imported once for all runs
LATE = ("torch.utils.tensorboard", "matplotlib.figure", "matplotlib.backends.backend_agg")
LATE += ("sklearn.datasets", "sklearn.model_selection")
STOPPED = {128 + number for number in StopSignals.NUMBERS} | {-signal.SIGTERM}  # exit statuses
OUT_OF_TIME = 3  # exit status
KEEP_AFTER = 60  # seconds: a study that is killed loses no more of its results


def run_in_child(arguments: list[str], output: Path, threads: int) -> None:
    """Run ``python main.py ARGUMENTS`` in this process, with its output appended to a file."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the study forwards it as SIGTERM
    threading.Thread(target=watch_parent, daemon=True).start()
    print_to(output, append=True)
    torch.set_num_threads(threads)
    print(shlex.join(["python", "main.py", *arguments]), flush=True)
    sys.exit(run_main(arguments))


def watch_parent() -> None:
    """Stop this run when the process of the study ends, which cannot do it if it was killed."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class Process:
    """A run and the process that it runs in."""

    run: Run
    process: multiprocessing.Process
    start: float


@dataclass
class Runner:
    """Runs what is left of a study, several runs at a time."""

    study: Study
    root: Path  # the runs write to folders in it
    jobs: int
    chosen: list[Run]  # the runs to do, each after those that it depends on
    records: dict[Run, Record | None] = field(default_factory=dict)
    running: list[Process] = field(default_factory=list)
    keep: Callable[[], None] = lambda: None  # called from time to time, to write what is done
    spent: float = 0  # seconds of the runs that ended in this call
    cost: int = 0  # of these runs

    def __post_init__(self):
        """Read the records of the runs that are done or begun.

        Raises:
            InputError: a folder holds a run with other options.
        """
        for run in order_of(self.study.all_runs):
            self.records[run] = read_record(self.root / run.folder / RECORD)
            self.check(run)

    @cached_property
    def context(self) -> multiprocessing.context.BaseContext:
        """Start runs as forks of a server process that has imported all modules once."""
        # with the script itself: a process that imported it again would see later edits
        return fork_server(["__main__", "training.launch", "study.runner", *LATE], REPOSITORY)

    @property
    def threads(self) -> int:
        return max(1, processors() // self.jobs)

    def device_of(self, run: Run) -> str:
        kind = type_of(run.options.get("device", "auto"))
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if kind == CPU else ""
        return device_name(torch.device(kind)) + threads

    def is_begun(self, run: Run) -> bool:
        """Whether it was started; a run that has to be done again has a record before that (`study.restore`)."""
        record = self.records[run]
        return record is not None and record.made_from.keys() == run.needs.keys()

    def is_done(self, run: Run) -> bool:
        return self.records[run] is not None and self.records[run].result is not None

    def is_settled(self, run: Run) -> bool:
        """Whether the run and all that it depends on are done; folders of these may have been removed."""
        return all(map(self.is_done, {run, *run.after}))

    def learning_rate(self, run: Run) -> float | None:
        """The given one, or the one with the best accuracy on the images held out; None until all are tried."""
        if not run.tuned_by or not all(self.is_done(tuning) for tuning in run.tuned_by):
            return run.lr
        return max(run.tuned_by, key=lambda tuning: self.records[tuning].tuned_on).lr

    def made_from(self, run: Run) -> dict[str, str]:
        return {name: self.records[of].result["sha256"] for name, of in run.needs.items() if self.is_done(of)}

    def check(self, run: Run) -> None:
        """Raises InputError if the run was begun with other options, or from other runs, than it would be now."""
        record, folder = self.records[run], self.root / run.folder
        if record is None:
            return
        if (found := differences(run, record, self.learning_rate(run))) is not None:
            raise InputError(f"{folder} holds {run} with {found}: remove this folder to run it again")
        for name, of in run.needs.items() if self.is_begun(run) else ():
            if self.is_done(of) and record.made_from.get(name) not in self.records[of].trainings:
                raise InputError(
                    f"{folder} holds {run}, made from another run of {name}: remove this folder to run it again"
                )

    def ranks(self) -> dict[Run, int]:
        """Which runs are started first: those of the highest rank, that of the most urgent run that waits for them.

        In a study that runs in order, that is the first in its file; else one that starts the longest unfinished chain.
        """
        in_order = self.study.in_order
        ranks = dict.fromkeys(self.chosen, 0)
        if in_order:
            ranks = {run: -place for place, run in enumerate(sorted(self.chosen, key=self.study.place_of))}
        for run in reversed(self.chosen):
            ranks[run] += 0 if in_order or self.is_done(run) else run.cost
            for needed in run.after:
                ranks[needed] = max(ranks[needed], ranks[run])
        return ranks

    def run_all(self, deadline: float) -> int:
        """Run what is left, until a run fails, a signal arrives, or ``deadline`` of time.monotonic() has passed.

        Returns:
            The exit status.
        """
        left = {run for run in self.chosen if not self.is_settled(run)}
        order = TopologicalSorter({run: run.after & left for run in left})
        order.prepare()
        ranks, ready, status, kept = self.ranks(), [], 0, time.monotonic()
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
                    if time.monotonic() > kept + KEEP_AFTER:
                        self.keep()
                        kept = time.monotonic()
            finally:
                self.stop()
        return status

    def start_ready(self, ready: list[Run], ranks: Mapping[Run, int], order: TopologicalSorter) -> list[Run]:
        """Start as many runs as may run at a time, and return those that have to wait.

        Raises:
            InputError: a run was made from other weights than there are now.
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
        if ROTATED in run.options:
            write_rotated(run.options["data-path"], run.options[ROTATED], run.data_folder(self.root))
        if not self.is_begun(run):
            former = self.records[run].former if self.records[run] else []
            self.records[run] = Record(run.identity, lr, self.made_from(run), former=former)
            self.records[run].write(folder)
        arguments = [*run.arguments(self.root, lr), "--resume=auto"]
        process = self.context.Process(target=run_in_child, args=(arguments, folder / "output.txt", self.threads))
        process.start()
        self.running.append(Process(run, process, time.monotonic()))

    def ended(self) -> list[Process]:
        """The processes that have ended; waits up to 0.2 s for the first."""
        sentinels = [running.process.sentinel for running in self.running]
        ended = (
            [self.running[sentinels.index(sentinel)] for sentinel in wait(sentinels, timeout=0.2)] if sentinels else []
        )
        self.running = [running for running in self.running if running not in ended]
        return ended

    def finish(self, ended: Process) -> int:
        """Record the result of a run. Returns the exit status of the study if the study ends here, else 0."""
        run, folder, record = ended.run, self.root / ended.run.folder, self.records[ended.run]
        seconds, code = time.monotonic() - ended.start, ended.process.exitcode
        record.seconds, record.device = record.seconds + seconds, self.device_of(run)
        if run.tuning and code == 1 and (reason := not_finite(folder)):
            record.result, code = {"accuracy": 0.0}, 0  # a learning rate that diverges is never the best
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
        """Send SIGTERM to the runs, which then write a checkpoint, and wait until they have ended."""
        for running in self.running:
            running.process.terminate()
        for running in self.running:
            running.process.join()
            self.finish(running)
        self.running = []
