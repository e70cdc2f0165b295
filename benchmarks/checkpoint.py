#!/usr/bin/env python3
"""Time to write what a run keeps after an evaluation: of a LeTs Aux-Net at published sizes, with optimiser and EMA.

    benchmarks/checkpoint.py
    benchmarks/checkpoint.py --folder /scratch      on another disk

Only the third part could run beside the next steps; before it, they would have to wait for the copy, which the second
part measures. Training writes without that copy.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from benchmarks.interleaved import in_turn, machine
from benchmarks.step import Step
from common import console
from common.devices import accelerator, synchronize
from options import place
from training.checkpoints import check_state, save_checkpoint

import torch
from torch.utils._pytree import tree_map_only


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--src-arch", default="deit_small_patch16_224_L8")
    p.add_argument("--tgt-arch", default="deit_base_patch16_224_L16_H12")
    p.add_argument("--batch-size", type=int, default=8, help="of the step to compare with")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of autocast")
    p.add_argument("--device", default=accelerator())
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--folder", type=place, help="where to write, default: the system's folder for temporary files")
    return p.parse_args()


def parts_of(step: Step, folder: str) -> dict[str, Callable[[], object]]:
    """What takes time after an evaluation."""
    run = SimpleNamespace(model=step.model, ema=step.ema, optimizer=step.optimizer)

    def content() -> dict:
        averaged = step.ema.module.state_dict()
        return {"model": step.model.state_dict(), "optimizer": step.optimizer.state_dict(), "model_ema": averaged}

    def copied() -> dict:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), content())

    def learngenes() -> None:
        for name, model in (("learngene", step.model), ("learngene_ema", step.ema.module)):
            models.Learngene.of(model).save(Path(folder, f"{name}.safetensors"))

    return {
        "check that all numbers are finite": lambda: check_state(run),
        "copy of the state (not made)": copied,
        "checkpoint": lambda: save_checkpoint(Path(folder, "checkpoint.pth"), content(), keep=1),
        "learngene and its average": learngenes,
        f"for comparison, a step of batch {len(step.images)}": step,
    }


def main() -> None:
    args = parse()
    step = Step(SimpleNamespace(**vars(args), model=None, compile=False, whole=True), "Aux-Net")
    print(f"{args.src_arch} → {args.tgt_arch}, {args.dtype}; {machine(args.device)}", flush=True)
    step()  # the optimiser makes its state

    def timed(part: Callable[[], object]) -> float:
        synchronize(step.device)
        start = time.perf_counter()
        part()
        synchronize(step.device)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        parts = {name: lambda part=part: timed(part) for name, part in parts_of(step, folder).items()}
        seconds = in_turn(parts, args.repeats, warm_up=1)
        size = Path(folder, "checkpoint.pth").stat().st_size
    print(f"the checkpoint has {size / 2**20:,.0f} MiB\n\n| | seconds (range) |\n|---|---:|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f}) |")


if __name__ == "__main__":
    console.accept_any_text()
    main()
