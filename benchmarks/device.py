#!/usr/bin/env python3
"""Throughput, memory and utilisation of training steps on a device; scripts/check_device.sh runs all of it.

    benchmarks/device.py rates                                  matrix products and copies: what the device can do
    benchmarks/device.py lets tleg --batch-sizes 64 128 256     stage 1 at published sizes against a plain ViT
    benchmarks/device.py lets --compile
    benchmarks/device.py elastic descendants                    several sizes in a step, against the plain ViT
    benchmarks/device.py together                               several small runs at a time
    benchmarks/device.py photographs                            data workers on all processors

A step is forward and backward pass, AdamW and EMA. Networks take turns in one process, and ratios are taken pair by
pair. Memory is that of tensors, for each network alone. TFLOP/s count what the formulas of a network need, 2 for each
multiply-accumulate. With --json FILE, each number is in the file as soon as it is measured.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from benchmarks.interleaved import machine, write_rows
from benchmarks.loader import BATCH_SIZE, build_loaders, make_images
from common import console
from common.devices import CPU, accelerator, no_waiting, peak_memory, processors, reset_peak_memory, synchronize
from common.errors import one_line
from models.compiled import compiled_for_training
from models.sizes import SizeSampler
from models.supernet import Supernet
from options import place

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

CLASSES = 1000
WARM_UP = 3  # steps of each batch size
PHOTOGRAPHS = 64  # that are made; each is in the data set several times
WHILE_MEASURED = ExitStack()  # holds what is compiled until the process ends


@dataclass(frozen=True)
class Sizes:
    """The architectures that are measured."""

    learngene: str
    aux_net: str
    tleg: str
    source: str  # of an elastic family
    depths: tuple[int, ...]  # of its members and of Des-Nets
    heads: tuple[int, ...]
    together: str  # of which several are trained at a time


PUBLISHED = Sizes(
    "deit_small_patch16_224_L8",
    "deit_base_patch16_224_L16_H12",
    "aux_deit_base_patch16_224",
    "deit_base_patch16_224_L12_H12",
    (6, 8, 12),
    (6, 8, 12),
    "deit_nano_patch4_28_L6_H4",
)
SMALL = Sizes(
    "deit_nano_patch8_24_L2_H1",
    "deit_nano_patch8_24_L4_H2",
    "aux_deit_nano_patch8_24_L4_H2",
    "deit_nano_patch8_24_L4_H2",
    (2, 4),
    (1, 2),
    "deit_nano_patch8_24_L2_H1",
)


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="+", choices=sorted(MEASURED))
    p.add_argument("--batch-sizes", type=int, nargs="+", default=[128])
    p.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="of autocast")
    p.add_argument("--device", default=accelerator())
    p.add_argument("--compile", action="store_true")
    p.add_argument("--small", action="store_true", help="small networks, for a CPU")
    p.add_argument("--repeats", type=int, default=10, help=f"pairs, after {WARM_UP} warm-ups")
    p.add_argument("--seconds", type=float, default=3.0, help="of rates, and of runs that are trained together")
    p.add_argument("--json", type=place, metavar="FILE", help="write the numbers there, too")
    return p.parse_args()


# ---------------------------------------------------------------------------------------------------------------------
# What the device can do
# ---------------------------------------------------------------------------------------------------------------------


def rates(args: argparse.Namespace) -> Iterator[dict]:
    """TFLOP/s of a large matrix product of random numbers, and GB/s of a large copy, read and written."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    side, bytes_copied = (512, 2**24) if args.small else (8192, 2**31)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = repeated(lambda: a @ b, device, args.seconds)
    yield {"what": f"matrix product, {args.dtype}, {side}³", "TFLOP/s": 2 * side**3 / seconds / 1e12}
    source = torch.randint(255, (bytes_copied,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = repeated(lambda: target.copy_(source), device, args.seconds)
    yield {"what": f"copy of {bytes_copied / 2**20:,.0f} MiB on the device", "GB/s": 2 * bytes_copied / seconds / 1e9}


def repeated(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The mean seconds of ``work``, of a group of calls that takes about as long as asked."""
    for _ in range(3):
        work()
    calls, group = 1, 0.0
    while group < seconds / 4:
        calls *= 2
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        group = time.perf_counter() - start
    return group / calls


# ---------------------------------------------------------------------------------------------------------------------
# Steps against those of a plain ViT
# ---------------------------------------------------------------------------------------------------------------------


class TrainingStep:
    """A training step of a network, with AdamW and EMA."""

    def __init__(self, args: argparse.Namespace, side: int, network: nn.Module, trained: nn.Module | None = None):
        """
        Args:
            side: of an image, in pixels.
            trained: what a step calls, which gives logits (batch, classes), or (members, batch, classes) of a family.
        """
        self.device, self.side = torch.device(args.device), side
        before = allocated(self.device)
        self.network, self.trained = network.to(self.device).train(), (trained or network).train()
        dtype = getattr(torch, args.dtype)
        self.autocast = torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)
        self.optimizer = create_optimizer_v2(network, opt="adamw", lr=1e-4, weight_decay=0.05, fused=True)
        self.ema = ModelEmaV3(network, decay=0.9999)
        self.use_batch(args.batch_sizes[0])
        self.macs = self.count_macs()  # the first step, in which the optimiser allocates what it keeps
        if args.compile:  # as main.py does
            WHILE_MEASURED.enter_context(compiled_for_training(self.trained))
        self.kept = allocated(self.device) - before

    def use_batch(self, size: int) -> None:
        self.images = torch.randn(size, 3, self.side, self.side, device=self.device)
        self.labels = torch.randint(CLASSES, (size,), device=self.device)

    def __call__(self) -> None:
        with self.autocast:
            logits = self.trained(self.images)
        labels = self.labels.expand(logits.shape[:-1])  # one for each member of a family
        cross_entropy(logits.flatten(0, -2).float(), labels.flatten()).backward()
        self.optimizer.step()
        self.ema.update(self.network)
        for p in self.network.parameters():
            p.grad = None

    def seconds(self) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        self()
        synchronize(self.device)
        return time.perf_counter() - start

    def count_macs(self) -> float:
        """Multiply-accumulates of an image, as torch counts them: matrix products, convolutions and attention."""
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops() / 2 / len(self.images)

    def memory(self, others: int) -> float | None:
        """MiB of tensors in a step at most, without the bytes of ``others``; None where they are not counted."""
        if self.device.type == CPU or peak_memory(self.device) is None:
            return None
        reset_peak_memory(self.device)
        self()
        return (peak_memory(self.device) - others) / 2**20

    def waits(self) -> str:
        """Why the process waits for the device in a step; empty where it does not, or the device cannot tell."""
        try:
            with no_waiting(self.device):
                self()
        except RuntimeError as error:
            return one_line(error)[:200]
        return ""


def allocated(device: torch.device) -> int:
    """Bytes of tensors on the device now; 0 where they are not counted."""
    reset_peak_memory(device)
    return 0 if device.type == CPU else peak_memory(device) or 0


def family(aux_net: models.AuxNet, sizes: Sizes, alone: bool) -> tuple[models.AuxNet, Supernet]:
    """An Aux-Net, and what trains its members: the largest, a middle one and the smallest in every step.

    Args:
        alone: whether the members are trained without the Aux-Net; if not, two of them beside it.
    """
    archs = [models.parse_arch(f"@L{d}-H{h}", aux_net.arch) for d in sizes.depths for h in sizes.heads]
    macs = {arch: arch.macs(CLASSES) for arch in archs}
    supernet = Supernet(aux_net, SizeSampler(macs, 3 if alone else 2, alone=alone))
    by_macs = supernet.sampler.archs
    supernet.drawn = [by_macs[-1], by_macs[len(archs) // 2], by_macs[0]][not alone :]
    return aux_net, supernet


def networks(what: str, sizes: Sizes) -> dict[str, Callable[[], tuple[nn.Module, nn.Module | None]]]:
    """Name → the network and what a step calls. The last one is the plain ViT that the others are compared with."""
    make = {
        "lets": lambda: (models.create_aux_net(sizes.learngene, sizes.aux_net, num_classes=CLASSES), None),
        "tleg": lambda: (models.create_model(sizes.tleg, num_classes=CLASSES), None),
        "elastic": lambda: family(models.create_aux_net(sizes.source, num_classes=CLASSES), sizes, True),
        "descendants": lambda: family(
            models.create_aux_net(sizes.learngene, sizes.aux_net, num_classes=CLASSES), sizes, False
        ),
    }
    titles = {"lets": "LeTs", "tleg": "TLEG", "elastic": "elastic, 3 members", "descendants": "LeTs with 2 descendants"}
    plain = sizes.source if what in ("elastic", "tleg") else sizes.aux_net
    return {
        titles[what]: make[what],
        "plain ViT": lambda: (models.create_vit(models.parse_arch(plain), num_classes=CLASSES), None),
    }


def steps(args: argparse.Namespace, what: str) -> Iterator[dict]:
    """The networks of ``what`` in turn, at all batch sizes; one row for each."""
    trained = {}
    for name, make in networks(what, sizes_of(args)).items():
        torch.manual_seed(0)
        trained[name] = TrainingStep(args, models.parse_arch(sizes_of(args).source).img_size, *make())
    for batch in args.batch_sizes:
        try:
            yield from rows_of(args, trained, batch)
        except torch.OutOfMemoryError:
            for name, step in trained.items():
                step.optimizer.zero_grad()
                yield {"network": name, "batch": batch, "compiled": args.compile, "note": "out of memory"}


def rows_of(args: argparse.Namespace, trained: dict[str, TrainingStep], batch: int) -> Iterator[dict]:
    """Time, memory and rate of each network at one batch size."""
    first, waits = {}, {}
    for name, step in trained.items():
        step.use_batch(batch)
        first[name] = step.seconds()  # compiles
        waits[name] = step.waits()
        step.seconds()
    times = {name: [] for name in trained}
    for _ in range(args.repeats):
        for name, step in trained.items():
            times[name].append(step.seconds())
    plain = [*trained][-1]
    for name, step in trained.items():
        seconds = statistics.median(times[name])
        ratios = sorted(a / b for a, b in zip(times[name], times[plain], strict=True))
        yield {
            "network": name,
            "batch": batch,
            "compiled": args.compile,
            "ms per step": 1000 * seconds,
            "images/s": batch / seconds,
            "over the plain ViT": statistics.median(ratios) if name != plain else 1.0,
            "from": ratios[0],
            "to": ratios[-1],
            "MiB": step.memory(sum(other.kept for other in trained.values() if other is not step)),
            "TFLOP/s": 2 * step.macs * batch / seconds / 1e12,
            "first step, s": first[name],
            "note": f"waits for the device: {waits[name]}" if waits[name] else "",
        }


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


def together(args: argparse.Namespace) -> Iterator[dict]:
    """Images per second of all runs together, for rising numbers of runs of a small ViT, one process each."""
    most = 2 if args.small else min(16, processors())
    counts, count = [], 1
    while count <= most:
        counts.append(count)
        count *= 2
    context = multiprocessing.get_context("forkserver")  # a fork of a process that uses the device could not use it
    context.set_forkserver_preload([__name__])
    for count in counts:
        barrier, found = context.Barrier(count), context.Queue()
        runs = [context.Process(target=small_run, args=(args, count, barrier, found)) for _ in range(count)]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        if any(run.exitcode for run in runs):
            yield {"runs at a time": count, "note": "a run failed"}
            return
        speeds = [found.get() for _ in runs]
        yield {"runs at a time": count, "images/s of all": sum(speeds), "images/s of each": sum(speeds) / count}


def small_run(args: argparse.Namespace, count: int, barrier: object, found: object) -> None:
    """Train a small ViT for some seconds beside ``count`` − 1 others, and put its images per second into ``found``."""
    torch.set_num_threads(max(1, processors() // count))
    args.batch_sizes, args.compile = [64 if args.small else 512], False
    arch = models.parse_arch(sizes_of(args).together)
    step = TrainingStep(args, arch.img_size, models.create_vit(arch, num_classes=CLASSES))
    for _ in range(WARM_UP):
        step.seconds()
    barrier.wait(120)
    start, images = time.perf_counter(), 0
    while time.perf_counter() < start + args.seconds:
        for _ in range(1 if args.small else 10):
            step()
            images += len(step.images)
        synchronize(step.device)
    found.put(images / (time.perf_counter() - start))


def photographs(args: argparse.Namespace) -> Iterator[dict]:
    """Training photographs per second with one data worker per processor, of this program and of timm."""
    workers = processors()
    with tempfile.TemporaryDirectory() as root:
        make_images(Path(root), 8 if args.small else PHOTOGRAPHS)
        folder = Path(root, "train", "photograph")
        made = [*folder.iterdir()]
        batches = 1 + (2 if args.small else 4 * workers)
        for path in made:
            for copy in range(1, -(-batches * BATCH_SIZE // len(made))):
                os.link(path, path.with_name(f"{path.stem}_{copy}.JPEG"))
        loaders = build_loaders(root, argparse.Namespace(workers=workers, repeated_aug=False))
        for name in ("this program", "timm"):
            speeds = [wall_speed(loaders[name]) for _ in range(1 if args.small else 3)]
            yield {"loader": name, "workers": workers, "photographs/s": statistics.median(speeds)}


def wall_speed(loader: Iterable) -> float:
    """Images per second of an epoch, after the first batch, which waits for the workers to start."""
    batches = iter(loader)
    next(batches)
    start, images = time.perf_counter(), 0
    for some, _ in batches:
        images += len(some)
    return images / (time.perf_counter() - start)


MEASURED = {"rates": rates, "together": together, "photographs": photographs}
MEASURED |= {what: partial(steps, what=what) for what in ("lets", "tleg", "elastic", "descendants")}


def sizes_of(args: argparse.Namespace) -> Sizes:
    return SMALL if args.small else PUBLISHED


def main() -> None:
    args = parse()
    print(machine(args.device), flush=True)
    rows = []
    for what in args.what:
        for row in MEASURED[what](args):
            rows.append(row)
            shown = (
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
            print(", ".join(shown), flush=True)
            if args.json:
                write_rows(args.json, rows)


if __name__ == "__main__":
    console.accept_any_text()
    main()
