#!/usr/bin/env python3
"""Compiled blocks against compiled ViTs, and against none: seconds of compilation, graphs, seconds of a step.

    benchmarks/compile.py                                                        an elastic source, six sizes
    benchmarks/compile.py --depths 6 --heads 3                                   one size
    benchmarks/compile.py --src-arch deit_base_patch16_224_L12 --depths 6 9 12 --heads 6 8 10 12 --batch-size 128 \
        --dtype bfloat16                                                         for a GPU

Every size is trained for one step, a forward and a backward pass, in turn. The first pass over the sizes compiles,
with an empty cache; the number of graphs after a second pass is compared, as no graph may be new by then. On devices
that can say so, a host–device synchronisation within the later passes is an error.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from benchmarks.interleaved import in_turn, machine, ratio, seconds_of
from common import console
from common.devices import accelerator, synchronize
from models.compiled import compiled_for_training
from models.sizes import SizeSampler

import torch
from torch._dynamo.utils import counters
from torch.func import functional_call

CLASSES = 1000


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--src-arch", default="deit_tiny_patch16_224_L6_H3")
    p.add_argument("--tgt-arch", help="of LeTs, instead of an elastic learngene")
    p.add_argument("--depths", type=int, nargs="+", default=[2, 4, 6])
    p.add_argument("--heads", type=int, nargs="+", default=[2, 3])
    p.add_argument("--drop-path", type=float, default=0.1)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of autocast")
    p.add_argument("--device", default=accelerator())
    p.add_argument("--repeats", type=int, default=5, help="passes over the sizes, after two warm-ups")
    p.add_argument("--without-whole", action="store_true", help="leave whole ViTs out, which take long to compile")
    return p.parse_args()


class Passes:
    """Passes over all sizes of a learngene, in one of the ways to compile them."""

    def __init__(self, args: argparse.Namespace, way: str, stack: ExitStack):
        """
        Args:
            way: ``blocks``, ``whole`` ViTs, or ``none``.
            stack: what ends with the measurement.
        """
        torch.manual_seed(0)
        aux_net = models.create_aux_net(
            args.src_arch, args.tgt_arch, num_classes=CLASSES, drop_path_rate=args.drop_path
        ).to(args.device)
        largest = aux_net.arch
        sizes = [
            replace(largest, depth=depth, num_heads=heads, width=heads * largest.head_dim)
            for depth in args.depths
            for heads in args.heads
        ]
        sampler = SizeSampler({arch: arch.macs(CLASSES) for arch in sizes}, 1, alone=True)
        self.net = models.Supernet(aux_net, sampler).train()
        self.device = torch.device(args.device)
        self.images = torch.randn(args.batch_size, 3, largest.img_size, largest.img_size, device=self.device)
        dtype = getattr(torch, args.dtype)
        self.autocast = nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype=dtype)
        if way == "blocks":
            stack.enter_context(compiled_for_training(self.net))
        self.members = [self.member(arch) for arch in sizes]
        if way == "whole":
            self.members = [torch.compile(member, fullgraph=True, dynamic=False) for member in self.members]

    def member(self, arch: models.ViTArch) -> Callable[[torch.Tensor], torch.Tensor]:
        """Images → logits of a size, as `Supernet` computes them."""
        vit, aux_net = self.net.vits[arch], self.net.aux_net
        return lambda images: functional_call(vit, aux_net.des_weights(arch), (images,))

    def __call__(self) -> None:
        for member in self.members:
            with self.autocast:
                loss = member(self.images).float().square().mean()
            loss.backward()
            for p in self.net.parameters():
                p.grad = None

    def seconds(self) -> float:
        return seconds_of(self, self.device)


def compile_all(way: str, passes: Passes) -> None:
    """The first pass, which compiles, and a second one, which must not."""
    counters.clear()
    start = time.perf_counter()
    passes()
    synchronize(passes.device)
    seconds, graphs = time.perf_counter() - start, counters["stats"]["unique_graphs"]
    passes()
    new = counters["stats"]["unique_graphs"] - graphs
    print(f"{way}: {seconds:.1f} s until all sizes have made a step, {graphs} graphs, {new} more later", flush=True)
    if new:
        raise RuntimeError(f"{new} graphs were compiled again")


def main() -> None:
    args = parse()
    ways = ("none", "blocks", *(["whole"] if not args.without_whole else []))
    print(f"{args.src_arch}, depths {args.depths}, heads {args.heads}, batch {args.batch_size}, {args.dtype}")
    print(machine(args.device), flush=True)
    with ExitStack() as stack:
        # each graph is a new one, whatever was compiled before; torch reads the variable when it first compiles
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(torch._dynamo.config.patch(cache_size_limit=len(args.depths) * len(args.heads) + 8))
        passes = {way: Passes(args, way, stack) for way in ways}
        for way in ways:
            compile_all(way, passes[way])
        seconds = in_turn({way: passes[way].seconds for way in ways}, args.repeats)
    for way in ways:
        over = "" if way == "none" else f", {ratio(seconds[way], seconds['none'])} of those of none"
        print(f"{way}: {statistics.median(seconds[way]):.4g} s for a step of each size{over}")
    if "whole" in ways:
        print(f"blocks over whole: {ratio(seconds['blocks'], seconds['whole'])}")


if __name__ == "__main__":
    console.accept_any_text()
    main()
