#!/usr/bin/env python3
"""Run both methods and both stages on scikit-learn's handwritten digits, in a few minutes on two CPU cores.

1. Train a small convolutional teacher.
2. Distil a LeTs and a TLEG Aux-Net from it, each with one learngene.
3. From each learngene, initialise ViTs of several sizes, evaluate them, and train them for one epoch; also train the
   same ViTs from scratch, for one epoch and for ten.

Every step is a main.py command, printed before it runs. Up to two run at a time, each on one thread.
"""

import argparse
import csv
import json
import os
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import console

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[1]
TEACHER = "test_resnet"  # the smallest of timm's ResNets
LETS = ("deit_nano_patch8_24_L4_H1", "deit_nano_patch8_24_L8_H3")  # learngene, Aux-Net
TLEG = "aux_deit_nano_patch8_24_L6_H3"
DES_NETS = {
    "LeTs": [f"deit_nano_patch8_24_L{depth}_H{heads}" for heads in (2, 3) for depth in (4, 6)],
    "TLEG": [f"deit_nano_patch8_24_L{depth}_H3" for depth in (4, 6, 8)],
}
FINE_TUNING, FROM_SCRATCH = 1, (1, 10)  # epochs
COLOURS = {"LeTs": "#0b6e99", "TLEG": "#c4572e", "scratch": "#8a8a8a"}


@dataclass
class Step:
    """One run of main.py, with its results in the folder ``name``."""

    name: str
    options: list[str]
    output: list[str] = field(default_factory=list)


def plan(out: Path, seed: int) -> list[list[Step]]:
    """The steps in groups; a group needs the results of the one before it."""

    def step(name: str, *options: str) -> Step:
        common = ["--config", "configs/quickstart.yaml", "--seed", str(seed)]
        return Step(name, [*common, *options, "--output_dir", str(out / name)])

    distil = ["--teacher-model", TEACHER, "--teacher-path", str(out / "teacher/model.safetensors")]
    distil += ["--distillation-type", "soft", "--distillation-alpha", "1.0", "--warmup-epochs", "3"]
    teacher = step("teacher", "--model", TEACHER, "--epochs", "8", "--lr", "3e-3")
    lets = step("LeTs", "--src-arch", LETS[0], "--tgt-arch", LETS[1], "--epochs", "36", *distil)
    tleg = step("TLEG", "--model", TLEG, "--epochs", "36", *distil)
    short = [
        step(f"{method}-{arch}", "--des-arch", arch, "--load-gene", str(out / method / "learngene.safetensors"),
             "--epochs", str(FINE_TUNING), "--lr", "2e-4")
        for method, archs in DES_NETS.items() for arch in archs
    ]  # fmt: skip
    scratch = [
        step(f"scratch{epochs}-{arch}", "--model", arch, "--epochs", str(epochs))
        for epochs in FROM_SCRATCH[::-1]
        for arch in dict.fromkeys(arch for archs in DES_NETS.values() for arch in archs)
    ]
    return [[teacher], [lets, tleg], scratch + short]


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


def run_group(steps: list[Step], threads: int) -> None:
    """Run the steps, up to two at a time."""
    waiting: queue.SimpleQueue[Step] = queue.SimpleQueue()
    for step in steps:
        waiting.put(step)
    failed: list[Step] = []
    slots = [
        threading.Thread(target=run_waiting, args=(slot, waiting, failed, threads))
        for slot in range(min(2, len(steps)))
    ]
    for slot in slots:
        slot.start()
    for slot in slots:
        slot.join()
    if failed:
        sys.exit(f"error: step {failed[0].name} failed:\n" + "".join(failed[0].output[-20:]))


def run_waiting(slot: int, waiting: "queue.SimpleQueue[Step]", failed: list[Step], threads: int) -> None:
    while not failed:
        try:
            step = waiting.get_nowait()
        except queue.Empty:
            return
        if not run(step, slot, threads):
            failed.append(step)


def run(step: Step, slot: int, threads: int) -> bool:
    """Run one main.py command, with a bar that follows the progress it prints. Returns whether it succeeded."""
    python = os.path.relpath(sys.executable, REPOSITORY) if sys.prefix != sys.base_prefix else sys.executable
    tqdm.write(f"OMP_NUM_THREADS={threads} {shlex.join([python, 'main.py', *step.options])}\n")
    process = subprocess.Popen(
        [sys.executable, "main.py", *step.options],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
    )
    with tqdm(desc=step.name, position=slot, leave=False, unit="step", disable=None) as bar:
        for line in process.stdout:
            step.output.append(line)
            if progress := re.match(r"training (\d+)/(\d+),", line):
                bar.total = int(progress[2])
                bar.update(int(progress[1]) - bar.n)
    return process.wait() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def size_of(arch: str) -> str:
    """``L4-H2`` of ``deit_nano_patch8_24_L4_H2``."""
    return "-".join(arch.split("_")[-2:])


def log_of(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / name / "log.txt").read_text().splitlines()]


def collect(out: Path) -> list[dict]:
    """One row per ViT, kind of start and number of epochs."""
    rows = []
    for method, archs in DES_NETS.items():
        stored = log_of(out, method)[-1]["n_parameters"]
        for arch in archs:
            runs = [(method, log_of(out, f"{method}-{arch}"), stored)]
            runs += [("scratch", log_of(out, f"scratch{epochs}-{arch}"), None) for epochs in FROM_SCRATCH]
            for start, log, stored_parameters in runs:
                parameters = log[-1]["n_parameters"]
                for line in log if start != "scratch" else log[-1:]:
                    rows.append({
                        "learngene": method, "arch": arch, "start": start, "epochs": line["epoch"] + 1,
                        "parameters": parameters, "stored_parameters": stored_parameters or parameters,
                        "accuracy": round(line["test_acc1"], 2),
                    })  # fmt: skip
    return rows


def accuracy(rows: list[dict], learngene: str, arch: str, start: str, epochs: int) -> float:
    wanted = (learngene, arch, start, epochs)
    return next(r["accuracy"] for r in rows if (r["learngene"], r["arch"], r["start"], r["epochs"]) == wanted)


def print_table(rows: list[dict]) -> None:
    one, ten = FROM_SCRATCH
    print(f"\n{'':<24}{'stored':>12}  {'from the learngene':^22}  {'from scratch':^22}")
    print(f"{'ViT':<12}{'parameters':>12}{'parameters':>12}  {'untrained':>10}{f'{FINE_TUNING} epoch':>12}", end="")
    print(f"  {f'{one} epoch':>10}{f'{ten} epochs':>12}")
    for method, archs in DES_NETS.items():
        for i, arch in enumerate(archs):
            row = next(r for r in rows if r["learngene"] == r["start"] == method and r["arch"] == arch)
            numbers = [accuracy(rows, method, arch, method, e) for e in (0, FINE_TUNING)]
            numbers += [accuracy(rows, method, arch, "scratch", e) for e in (one, ten)]
            stored = f"{row['stored_parameters']:,}" if i == 0 else '"'
            print(f"{f'{method} {size_of(arch)}':<12}{row['parameters']:>12,}{stored:>12}", end="")
            print("  {:>9.1f}%{:>11.1f}%  {:>9.1f}%{:>11.1f}%".format(*numbers))
        descended = [r for r in rows if r["learngene"] == r["start"] == method and r["epochs"] == 0]
        each = sum(r["parameters"] for r in descended)
        print(f"{method}: {descended[0]['stored_parameters']:,} stored parameters for ViTs of {each:,} altogether\n")


def write_csv(rows: list[dict], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def draw(rows: list[dict], out: Path, path: Path) -> None:
    """Accuracy against parameters, and against epochs."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    against_parameters, against_epochs = figure.subplots(1, 2, sharey=True)
    draw_parameters(against_parameters, rows)
    draw_epochs(against_epochs, rows, out)
    figure.suptitle("ViTs for handwritten digits, initialised from a learngene and from scratch")
    for axes in (against_parameters, against_epochs):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, 100)
    against_parameters.set_ylabel("test accuracy, %")
    figure.savefig(path, dpi=150)


def draw_parameters(axes: Axes, rows: list[dict]) -> None:
    starts = [("LeTs", 0, "o"), ("LeTs", FINE_TUNING, "o"), ("TLEG", 0, "s"), ("TLEG", FINE_TUNING, "s")]
    for start, epochs, marker in [*starts, *(("scratch", epochs, "^") for epochs in FROM_SCRATCH)]:
        chosen = [r for r in rows if (r["start"], r["epochs"]) == (start, epochs)]
        points = sorted({(r["parameters"] / 1e3, r["accuracy"]) for r in chosen})
        hollow = epochs in (0, FROM_SCRATCH[0]) and (start == "scratch" or epochs == 0)
        axes.plot(
            *zip(*points, strict=True),
            marker,
            color=COLOURS[start],
            markerfacecolor="white" if hollow else COLOURS[start],
            markersize=7,
            label=f"from {start}, " + ("untrained" if epochs == 0 else f"{epochs} epoch{'s' * (epochs > 1)}"),
        )
    axes.set_xlabel("parameters, thousands")
    axes.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.5))


def draw_epochs(axes: Axes, rows: list[dict], out: Path) -> None:
    for arch in {r["arch"] for r in rows}:
        log = log_of(out, f"scratch{FROM_SCRATCH[1]}-{arch}")
        axes.plot([x["epoch"] + 1 for x in log], [x["test_acc1"] for x in log], color=COLOURS["scratch"], lw=1.2)
    for method, archs in DES_NETS.items():
        for arch in archs:
            points = [accuracy(rows, method, arch, method, e) for e in (0, FINE_TUNING)]
            axes.plot((0, FINE_TUNING), points, "-o", color=COLOURS[method], markersize=5, lw=2)
    axes.set_xlabel("epochs of training")
    axes.text(6.2, 40, "from scratch", color=COLOURS["scratch"])
    for i, method in enumerate(DES_NETS):
        axes.text(1.4, 97 - 6 * i, f"from the {method} learngene", color=COLOURS[method])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="output/quickstart")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.chdir(REPOSITORY)
    out = Path(os.path.expanduser(args.output_dir))
    start = time.monotonic()
    for group in plan(out, args.seed):
        run_group(group, threads=2 if len(group) == 1 else 1)
    rows = collect(out)
    write_csv(rows, out / "summary.csv")
    draw(rows, out, out / "summary.png")
    print_table(rows)
    print(f"{out}/summary.csv, {out}/summary.png; {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    console.accept_any_text()
    main()
