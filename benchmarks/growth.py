#!/usr/bin/env python3
"""Scaling of times with sizes, plotted beside the expected growth.

    benchmarks/growth.py --plot docs/growth.png

Stage 1: time of a step of a LeTs Aux-Net (forward and backward, one thread) against width, depth and batch size; the
expected growth is that of the multiply-accumulates. Data parallelism: images per second of main.py in two processes
with one thread each, against one. Stage 2: time and memory to initialise Des-Nets of published sizes from a file.
Start-up: time of main.py --help, and of a run until its first checkpoint.
"""

import argparse
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import models
from common import console
from common.devices import peak_memory
from options import place

import matplotlib

matplotlib.use("Agg")
from benchmarks.interleaved import in_turn, machine, ratio
from benchmarks.step import Step

import matplotlib.pyplot as plt
import numpy as np
import torch

BATCH, DEPTH, HEADS = 4, 8, 4  # unless varied
BATCHES, DEPTHS, WIDTHS = (1, 2, 4, 8, 16), (4, 8, 16, 32), (2, 4, 6, 8, 12)
RUNS = {
    "LeTs": "--src-arch deit_tiny_patch16_224_L4_H2 --tgt-arch deit_tiny_patch16_224_L8_H4",
    "LeTs, with two descendants": "--src-arch deit_tiny_patch16_224_L4_H2 --tgt-arch deit_tiny_patch16_224_L8_H4 "
    "--descendants 2",
    "elastic, two sizes": "--src-arch deit_tiny_patch16_224_L8_H4",
}
INTERVALS = 4  # of five steps
DES_NETS = ("L3_H6", "L6_H6", "L12_H6", "L6_H12", "L12_H12", "L16_H12")

Panels = dict[str, tuple[list[float], list[float], list[float]]]  # title → sizes, measured and expected values


def options(batch: int = BATCH, depth: int = DEPTH, heads: int = HEADS) -> argparse.Namespace:
    """A LeTs Aux-Net of ``depth`` layers and ``heads`` heads of 64 neurons, from 4 layers with half as many heads."""
    return argparse.Namespace(
        src_arch=f"deit_tiny_patch16_224_L4_H{heads // 2}",
        tgt_arch=f"deit_tiny_patch16_224_L{depth}_H{heads}",
        model=None,
        batch_size=batch,
        dtype="float32",
        device="cpu",
        compile=False,
        whole=False,
    )


def measure_steps(sizes: dict[int, argparse.Namespace], repeats: int) -> dict[int, tuple[float, float]]:
    """For each size the median seconds of a step, and its multiply-accumulates."""
    steps = {size: Step(args, "Aux-Net") for size, args in sizes.items()}
    seconds = in_turn({size: step.seconds for size, step in steps.items()}, repeats, warm_up=1)
    return {size: (statistics.median(seconds[size]), step.macs()) for size, step in steps.items()}


def exponent(sizes: list[float], values: list[float]) -> float:
    """k of the power law values ∝ sizes^k, from a least-squares fit of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def in_process(function: Callable, *args: object):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def des_net(path: str, arch: str) -> tuple[float, int, int]:
    """Seconds and bytes of memory to initialise a Des-Net, and its number of parameters."""
    before, start = peak_memory(torch.device("cpu")), time.perf_counter()
    vit = models.load_learngene(path).descend(arch)
    seconds = time.perf_counter() - start
    return seconds, peak_memory(torch.device("cpu")) - before, sum(p.numel() for p in vit.parameters())


def images_per_second(kind: str, processes: int) -> float:
    """Throughput of all processes of a run, as main.py logs it: the median of `INTERVALS` after the first."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", REPOSITORY / "main.py"]
    options = f"--data-set DIGITS --input-size 224 --batch-size {BATCH} --num-workers 0 --log-interval 5 {RUNS[kind]}"
    with subprocess.Popen(
        [sys.executable, *launcher, *options.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # where the launcher says that it was ended
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        found = (match for line in process.stdout if (match := re.search(r"images/s ([\d.e+]+)", line)))
        numbers = [float(match[1]) for match in islice(found, 1 + INTERVALS)]
        process.terminate()
        process.communicate()
    if len(numbers) <= INTERVALS:
        raise RuntimeError(f"main.py {options} ended after {len(numbers)} lines of the log")
    return statistics.median(numbers[1:])


def start_up(*arguments: str, until: Path | None = None) -> float:
    """Seconds until main.py exits, or has written the file ``until``."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, REPOSITORY / "main.py", *arguments], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (until and until.exists()):
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        process.kill()
    return seconds


def first_checkpoint() -> float:
    with tempfile.TemporaryDirectory() as folder:
        run = "--data-set DIGITS --model deit_nano_patch8_32_L4 --num-workers 0 --epochs 1 --save-every-steps 1"
        return start_up(*run.split(), "--output-dir", folder, until=Path(folder, "checkpoint.pth"))


def measure_des_nets(repeats: int) -> dict[str, tuple[float, int, int]]:
    """For each Des-Net the median seconds, the memory and the parameters, each time in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "learngene.safetensors"))
        aux_net = models.create_aux_net("deit_small_patch16_224_L8", "deit_base_patch16_224_L16_H12")
        models.Learngene.of(aux_net).save(path)
        names = [f"deit_base_patch16_224_{size}" for size in DES_NETS]
        found = in_turn({name: partial(in_process, des_net, path, name) for name in names}, repeats, warm_up=0)
    return {name: tuple(map(statistics.median, zip(*runs, strict=True))) for name, runs in found.items()}


def draw(panels: Panels, path: str) -> None:
    """Measurements, and the expected growth through the middle one, on logarithmic axes."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4))
    for axis, (title, (sizes, measured, expected)) in zip(axes, panels.items(), strict=True):
        middle = len(sizes) // 2
        axis.loglog(sizes, [e * measured[middle] / expected[middle] for e in expected], "--", label="expected")
        axis.loglog(sizes, measured, "o", label="measured")
        axis.set_xlabel(title)
        axis.set_xticks(sizes, [f"{size:.3g}" for size in sizes], rotation=45)
        axis.minorticks_off()
        axis.set_ylabel("seconds")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def print_steps(repeats: int) -> Panels:
    panels = {}
    print("| step against | from … to | measured exponent | exponent of the MACs |\n|---|---|---:|---:|")
    for title, sizes in {
        "width of the Aux-Net": {64 * heads: options(heads=heads) for heads in WIDTHS},
        "layers of the Aux-Net": {depth: options(depth=depth) for depth in DEPTHS},
        "images of a batch": {batch: options(batch=batch) for batch in BATCHES},
    }.items():
        found = measure_steps(sizes, repeats)
        seconds, macs = (list(column) for column in zip(*found.values(), strict=True))
        panels[title] = [*found], seconds, macs
        print(
            f"| {title} | {min(found)} … {max(found)}, {min(seconds):.3f} … {max(seconds):.3f} s "
            f"| {exponent([*found], seconds):.2f} | {exponent([*found], macs):.2f} |",
            flush=True,
        )
    return panels


def print_processes(repeats: int) -> Panels:
    print("| stage 1, two processes against one | ratio of images/s |\n|---|---:|")
    for kind in RUNS:
        both = in_turn({n: partial(images_per_second, kind, n) for n in (1, 2)}, repeats, warm_up=0)
        print(f"| {kind} | {ratio(both[2], both[1])} |", flush=True)
    return {}


def print_des_nets(repeats: int) -> Panels:
    print("| Des-Net | parameters | seconds | memory, MiB |\n|---|---:|---:|---:|")
    found = measure_des_nets(repeats)
    for name, (seconds, memory, parameters) in found.items():
        print(f"| {name} | {parameters:,} | {seconds:.2f} | {memory / 2**20:,.0f} |", flush=True)
    seconds, _, parameters = (list(column) for column in zip(*found.values(), strict=True))
    return {"millions of parameters of the Des-Net": ([p / 1e6 for p in parameters], seconds, parameters)}


def print_start_up(repeats: int) -> Panels:
    starts = in_turn({"--help": lambda: start_up("--help"), "a run": first_checkpoint}, repeats, warm_up=1)
    for name, seconds in starts.items():
        print(f"{name}: {statistics.median(seconds):.2f} s ({min(seconds):.2f}–{max(seconds):.2f})")
    return {}


PARTS = {"steps": print_steps, "processes": print_processes, "des-nets": print_des_nets, "start-up": print_start_up}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="of the program, default: all")
    p.add_argument("--repeats", type=int, default=5, help="of each measurement")
    p.add_argument("--plot", type=place, help="file for the plot, of all parts")
    args = p.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    panels = {}
    for part in args.parts:
        print()
        panels |= PARTS[part](args.repeats)
    if args.plot:
        draw(panels, args.plot)


if __name__ == "__main__":
    console.accept_any_text()
    main()
