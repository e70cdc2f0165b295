#!/usr/bin/env python3
"""Throughput of training images: --cache-data against a DataLoader that augments one image at a time.

Both alternate, and ratios are taken pair by pair. Without workers both use one core. With one worker per core the cache
still uses one core, or the GPU.

    benchmarks/cache.py                                                      DIGITS at 28 pixels
    benchmarks/cache.py --data-set FMNIST --data-path DIR --input-size 32
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from benchmarks.interleaved import in_turn, machine, ratio, write_rows
from common import console
from common.devices import accelerator, processors, synchronize
from datasets import DATA_SETS, build_dataset, build_transform
from options import place
from pipeline.batch_augment import BatchAugment
from pipeline.cache import AugmentedBatches, check_memory, load_into_memory, resize_only
from pipeline.loader import SeededDataset, collate
from samplers import TrainSampler
from training.checks import check_small

import torch
from torch.utils.data import DataLoader


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data-set", default="DIGITS", choices=sorted(DATA_SETS))
    p.add_argument("--data-path", type=place)
    p.add_argument("--input-size", type=int, default=28)
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--device", default=accelerator())
    p.add_argument("--repeats", type=int, default=5, help="after one warm-up")
    p.add_argument("--seconds", type=float, default=1.0, help="minimum length of a measurement")
    p.add_argument("--json", type=place, metavar="FILE", help="write the numbers there, too")
    return p.parse_args()


def images_per_second(loader: DataLoader | AugmentedBatches, seconds: float, device: torch.device) -> float:
    """Measured over at least ``seconds``, after the first batch of the workers."""
    batches = iter(loader)
    if isinstance(loader, DataLoader):
        next(batches)
    start, images = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        batch = next(batches, None)
        if batch is None:  # the next epoch
            batches = iter(loader)
        else:
            images += len(batch[1])
    synchronize(device)
    return images / (time.perf_counter() - start)


def build(args: argparse.Namespace) -> dict[str, DataLoader | AugmentedBatches]:
    """Loaders without workers and with one per core, and the cache."""
    device, seeded = torch.device(args.device), []
    transform = build_transform(args.data_set, True, args.input_size)
    for steps in (transform, resize_only(transform)):
        seeded.append(SeededDataset(build_dataset(args.data_set, args.data_path, True, steps)[0]))
    count = len(seeded[0])
    sampler = TrainSampler(count, args.batch_size, repeats=3)
    common = dict(batch_size=args.batch_size, sampler=sampler, collate_fn=collate)
    loaders = {f"{n} workers": DataLoader(seeded[0], num_workers=n, **common) for n in (0, processors())}
    check_memory(count, args.input_size, device)
    read = load_into_memory(
        args.input_size, device, False, seeded[1], [(i, 0) for i in range(count)], collate_fn=collate
    )
    return {**loaders, "cache": AugmentedBatches(*read, sampler, args.batch_size, BatchAugment(transform))}


def main() -> None:
    args = parse()
    check_small(args.data_set, args.input_size)
    print(f"{args.data_set} at {args.input_size} pixels, batch {args.batch_size}; {machine(args.device)}", flush=True)
    loaders = build(args)
    device = torch.device(args.device)
    measure = {name: partial(images_per_second, loader, args.seconds, device) for name, loader in loaders.items()}
    speeds = in_turn(measure, args.repeats, warm_up=1)
    if args.json:
        of_data = {"data": args.data_set, "pixels": args.input_size, "batch": args.batch_size}
        medians = {name: statistics.median(of_loader) for name, of_loader in speeds.items()}
        write_rows(args.json, [of_data | {"loader": name, "images/s": median} for name, median in medians.items()])
    for name, of_loader in speeds.items():
        print(f"{name}: {statistics.median(of_loader):,.0f} images/s", end="")
        print(f"; the cache over it {ratio(speeds['cache'], of_loader)}" * (name != "cache"))


if __name__ == "__main__":
    console.accept_any_text()
    try:
        main()
    except models.InputError as error:
        sys.exit(f"error: {error}")
