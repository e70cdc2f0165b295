#!/usr/bin/env python3
"""Time to initialise a Des-Net from a learngene file, each time in a new process, without imports.

benchmarks/init.py                           the published 12-layer Des-Net, random weights
benchmarks/init.py --load-gene FILE --des-arch deit_base_patch16_224_L6_H9
benchmarks/init.py --against FOLDER             in turn with another checkout of this program
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from benchmarks.interleaved import in_turn, machine, ratio
from common import console
from options import place


def seconds(load_gene: str, des_arch: str) -> float:
    start = time.perf_counter()
    models.load_learngene(load_gene, head_dim=models.parse_arch(des_arch).head_dim).descend(des_arch)
    return time.perf_counter() - start


def in_process(program: str, options: list[str]) -> float:
    return float(subprocess.check_output([sys.executable, program, *options], text=True))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--load-gene", type=place, help="default: a LeTs learngene of published size with random weights")
    p.add_argument("--des-arch", default="deit_base_patch16_224_L12")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--against", type=place, metavar="FOLDER", help="a checkout to compare with")
    p.add_argument("--once", action="store_true", help="measure once, in this process")
    args = p.parse_args()
    if args.once:
        print(seconds(args.load_gene, args.des_arch))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.load_gene is None:
            args.load_gene = str(Path(folder, "learngene.safetensors"))
            aux_net = models.create_aux_net("deit_small_patch16_224_L8", "deit_base_patch16_224_L16_H12")
            models.Learngene.of(aux_net).save(args.load_gene)
        options = ["--once", "--load-gene", args.load_gene, "--des-arch", args.des_arch]
        programs = {"this": __file__} | ({"other": f"{args.against}/benchmarks/init.py"} if args.against else {})
        measure = {name: partial(in_process, program, options) for name, program in programs.items()}
        times = in_turn(measure, args.repeats, warm_up=1)
    print(f"{args.des_arch}; {machine()}")
    for name, found in times.items():
        print(f"{name}: {statistics.median(found):.2f} s ({min(found):.2f}–{max(found):.2f}, {len(found)} processes)")
    if args.against:
        print(f"this over other: {ratio(times['this'], times['other'])}")


if __name__ == "__main__":
    console.accept_any_text()
    main()
