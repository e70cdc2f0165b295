"""A study: many runs of main.py that one YAML file describes, and their results in one table.

scripts/study.py configs/study_cpu.yaml
scripts/study.py configs/study_gpu.yaml --minutes 110

The same command resumes a study that was stopped by --minutes, by Ctrl-C or in any other way. Learning rates are tuned
on training images held out, before the runs that use them. Runs write to output/study/NAME. results/NAME keeps log.txt
and args.yaml of every run in runs.tar.gz, results.csv, tuning.csv, progress.csv, tables and plots. Where there is no
output/study/NAME, as on another machine, the study continues from results/NAME, which has weights that are needed, too.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common.devices import CPU, processors, type_of
from common.errors import InputError, nearest
from options import at_least, local_path, positive
from study.kept import progress_rows, write_results
from study.plan import OUTPUT, Run, Study, order_of
from study.report import write
from study.restore import kept_runs, restore
from study.runner import Runner
from study.study_file import read_study
from training.command_line import Parser

from filelock import FileLock, Timeout

MOST_ON_DEVICE = 8  # runs at a time, by default


def parse(argv: Sequence[str]) -> argparse.Namespace:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("config", type=local_path, help="the YAML file of the study")
    p.add_argument(
        "--jobs", type=at_least(1), help="runs at a time; default: one per processor; on a GPU one per two, at most 8"
    )
    p.add_argument("--minutes", type=positive, default=math.inf, help="stop after so many; the same command resumes")
    p.add_argument("--only", nargs="+", metavar="GROUP", help="run these groups and those that they depend on")
    p.add_argument("--seeds", type=at_least(0), nargs="+", metavar="SEED", help="run these seeds alone")
    p.add_argument(
        "--data-path",
        type=local_path,
        metavar="DIR",
        help="the folder of data sets that have one, not the file's",
    )
    p.add_argument("--device", help="what the runs use, instead of what the file says")
    p.add_argument(
        "--results", type=local_path, default=Path("results"), metavar="DIR", help="write results to DIR/NAME"
    )
    p.add_argument(
        "--output",
        type=local_path,
        default=Path(OUTPUT),
        metavar="DIR",
        help="the runs write to DIR/NAME",
    )
    p.add_argument("--list", action="store_true", help="print the runs and their state, and exit")
    return p.parse_args(argv)


def show_plan(runner: Runner) -> None:
    """Print the groups, and how many runs of each are done, begun and to do."""
    for row in progress_rows(runner, runner.chosen):
        states = f"{row['done']} done, {row['begun']} begun, {row['runs'] - row['done'] - row['begun']} to do"
        name = f"{row['group']}{', tuning' * bool(row['tuning'])}"
        print(f"{name}: {row['runs']} runs ({states}), {row['macs']:.2e} MACs")
    print(f"{len(runner.chosen)} runs, {sum(run.macs for run in runner.chosen):.2e} MACs")


def chosen_runs(study: Study, only: list[str] | None, seeds: list[int] | None) -> list[Run]:
    """The runs of these groups and seeds, or of all, each after those that it depends on.

    Raises:
        InputError: the study has no such group or seed.
    """
    if only is seeds is None:
        return order_of(study.all_runs)
    for name in only or ():
        if name not in study.groups:
            raise InputError(f"--only {name} is no group{nearest(name, study.groups)}")
    known = sorted({run.seed for run in study.runs.values()})
    if unknown := [seed for seed in seeds or () if seed not in known]:
        raise InputError(f"--seeds {unknown[0]} is none of this study: expected {', '.join(map(str, known))}")
    chosen = [
        run for run in study.runs.values() if run.group.name in (only or study.groups) and run.seed in (seeds or known)
    ]
    if not chosen:
        raise InputError(f"--only {' '.join(only)} --seeds {' '.join(map(str, seeds))}: these groups have no such run")
    found: set[Run] = set()
    while chosen:
        run = chosen.pop()
        found.add(run)
        chosen += run.after - found
    return [run for run in order_of(study.all_runs) if run in found]


def default_jobs(kind: str) -> int:
    """Runs at a time on a kind of device.

    On an accelerator a run of small ViTs waits for its own processor, which starts one kernel after the other,
    more than for the device. The backward pass has a thread of its own: two processors for each run. Kernels of
    different processes take turns, so more than `MOST_ON_DEVICE` are expected to gain little: ``benchmarks/device.py
    together`` measures it.
    """
    return processors() if kind == CPU else max(1, min(MOST_ON_DEVICE, processors() // 2))


def work(args: argparse.Namespace, deadline: float) -> int:
    """Run the study, and return the exit status."""
    study = read_study(args.config, args.data_path, args.device)
    root, results = args.output / study.name, args.results / study.name
    jobs = args.jobs or default_jobs(type_of(study.options.get("device", "auto")))
    if args.list:
        runner = Runner(study, root, jobs, chosen_runs(study, args.only, args.seeds))
        runner.records |= {run: of_run.record for run, of_run in kept_runs(study, root, results).items()}
        show_plan(runner)
        return 0
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / ".lock", timeout=0):
            kept = kept_runs(study, root, results)
            restore(kept, root)
            runner = Runner(study, root, jobs, chosen_runs(study, args.only, args.seeds))
            runner.keep = partial(write_results, runner, results, args.config)
            if kept:
                done = sum(of_run.record.result is not None for of_run in kept.values())
                print(f"{done} runs are done already, as {results} has them", flush=True)
            status = 1
            try:
                status = runner.run_all(deadline)
            finally:
                runner.keep()
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
    except (InputError, OSError) as error:  # an OSError: a file that cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2
