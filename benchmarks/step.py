#!/usr/bin/env python3
"""Time, memory and multiply-accumulates of a stage-1 training step against those of a plain ViT of the same size.

    benchmarks/step.py                                                   LeTs at published sizes
    benchmarks/step.py --model aux_deit_base_patch16_224                 TLEG
    benchmarks/step.py --memory                                          peak memory instead of time
    benchmarks/step.py --whole --compile --dtype bfloat16 --batch-size 128 --peak-tflops 989       on an H200

A step is a forward and a backward pass; with --whole also AdamW and EMA, as in main.py. On CUDA a host–device
synchronisation within a step is an error, and with --compile a graph break.
"""

import argparse
import multiprocessing
import statistics
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from benchmarks.interleaved import in_turn, machine, ratio, seconds_of
from common import console
from common.devices import CPU, accelerator, peak_memory
from models.compiled import compiled_for_training

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

KINDS = ("Aux-Net", "plain ViT")


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--src-arch", default="deit_small_patch16_224_L8")
    p.add_argument("--tgt-arch", default="deit_base_patch16_224_L16_H12")
    p.add_argument("--model", help="a TLEG Aux-Net, instead of LeTs")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of autocast")
    p.add_argument("--device", default=accelerator())
    p.add_argument("--repeats", type=int, default=5, help="pairs, after two warm-ups")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--whole", action="store_true", help="with optimiser and EMA")
    p.add_argument("--peak-tflops", type=float, help="of the device in --dtype, to print the utilisation")
    p.add_argument("--memory", action="store_true", help="measure peak memory instead, each network in its own process")
    return p.parse_args()


class Step:
    """A training step of the Aux-Net, or of the plain ViT."""

    def __init__(self, args: argparse.Namespace, kind: str):
        torch.manual_seed(0)
        model = models.create_model(args.model) if args.model else models.create_aux_net(args.src_arch, args.tgt_arch)
        size, device = model.arch.img_size, torch.device(args.device)
        model = (model if kind == "Aux-Net" else models.create_vit(model.arch)).to(device).train()
        self.model, self.device, self.whole = model, device, args.whole
        self.compiled = ExitStack()  # until the program ends
        if args.compile:  # as main.py does
            self.compiled.enter_context(compiled_for_training(model))
        self.images = torch.randn(args.batch_size, 3, size, size, device=device)
        self.labels = torch.randint(1000, (args.batch_size,), device=device)
        dtype = getattr(torch, args.dtype)
        self.autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
        if self.whole:
            self.optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.05, fused=True)
            self.ema = ModelEmaV3(model, decay=0.9999)

    def __call__(self) -> None:
        with self.autocast:
            loss = cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        if self.whole:
            self.optimizer.step()
            self.ema.update(self.model)
        for p in self.model.parameters():
            p.grad = None

    def seconds(self) -> float:
        return seconds_of(self, self.device)

    def macs(self) -> float:
        """Multiply-accumulates of one step, as torch counts them: matrix products, convolutions and attention."""
        with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
            self()
        return counter.get_total_flops() / 2


def memory_of(args: argparse.Namespace, kind: str) -> int:
    """Peak memory of three steps in bytes, without what the process used before it built the network."""
    device = torch.device(args.device)
    before = peak_memory(device)
    step = Step(args, kind)
    for _ in range(3):
        step()
    return peak_memory(device) - before


def main() -> None:
    args = parse()
    name = args.model or f"{args.src_arch} → {args.tgt_arch}"
    mode = ", compiled" * args.compile + (", with optimiser and average" if args.whole else "")
    print(f"{name}, batch {args.batch_size}, {args.dtype}{mode}")
    print(machine(args.device), flush=True)
    if args.memory:
        memory = {}
        for kind in KINDS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory[kind] = pool.apply(memory_of, (args, kind))
            print(f"{kind}: {memory[kind] / 2**20:,.0f} MiB at most", flush=True)
        print(f"ratio of peak memory {memory['Aux-Net'] / memory['plain ViT']:.3f}")
        return
    steps = {kind: Step(args, kind) for kind in KINDS}
    seconds = in_turn({kind: step.seconds for kind, step in steps.items()}, args.repeats)
    macs = {kind: step.macs() for kind, step in steps.items()}
    for kind in KINDS:
        median = statistics.median(seconds[kind])
        line = f"{kind}: {median:.4g} s, {args.batch_size / median:.4g} images/s, {macs[kind] / 1e9:,.1f} GMACs"
        if args.peak_tflops:  # MACs of the plain ViT for both, as in model FLOPs utilisation
            line += f", {2 * macs['plain ViT'] / median / 1e12 / args.peak_tflops:.1%} of {args.peak_tflops:g} TFLOP/s"
        if args.device != CPU and (peak := peak_memory(torch.device(args.device))) is not None:
            line += f", {peak / 2**20:,.0f} MiB for both networks"
        print(line)
    print(f"ratio {ratio(*(seconds[kind] for kind in KINDS))}; of the MACs {macs['Aux-Net'] / macs['plain ViT']:.3f}")


if __name__ == "__main__":
    console.accept_any_text()
    main()
