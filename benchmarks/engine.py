#!/usr/bin/env python3
"""Time per step of this program's training loop against timm's, with the same model, batches and precision.

    benchmarks/engine.py
    benchmarks/engine.py --model deit_base_patch16_224_L12 --batch-size 128 --dtype bfloat16       on a GPU

timm's loop is in its repository's train.py and not in its package; `timm_epoch` reproduces it with timm's own mixup,
optimiser, gradient scaler, EMA and meters. Both loops read the same images from memory.
"""

import argparse
import copy
import logging
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from benchmarks.interleaved import in_turn, machine, ratio, write_rows
from common import console
from common.devices import accelerator, synchronize
from engine import train_one_epoch
from options import place

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter, ModelEmaV3, NativeScaler
from torch import Tensor

LOG_INTERVAL = 50
log = logging.getLogger("train")


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="deit_nano_patch8_32_L4", help="small, to expose the overhead of the loop")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--steps", type=int, default=50, help="of an epoch")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    p.add_argument("--device", default=accelerator())
    p.add_argument("--json", type=place, metavar="FILE", help="write the numbers there, too")
    return p.parse_args()


class Training:
    """Model, optimiser, EMA, mixup and precision of a loop."""

    def __init__(self, args: argparse.Namespace, fused: bool):
        torch.manual_seed(0)
        self.device, dtype = torch.device(args.device), getattr(torch, args.dtype)
        self.model = models.create_model(args.model, num_classes=10).to(self.device)
        self.optimizer = create_optimizer_v2(
            self.model, opt="adamw", lr=1e-4, weight_decay=0.05, **({"fused": True} if fused else {})
        )
        self.ema = ModelEmaV3(self.model, decay=0.9999)
        self.mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
        self.autocast = nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype=dtype)
        self.half = dtype == torch.float16


def own_epoch(t: Training, batches: list[tuple[Tensor, Tensor]]) -> None:
    loss = SoftTargetCrossEntropy()
    train_one_epoch(
        t.model,
        lambda logits, targets, teacher_logits: loss(logits, targets),
        batches,
        t.optimizer,
        t.device,
        0,
        scaler=torch.amp.GradScaler(t.device.type, enabled=t.half),
        autocast=t.autocast,
        mixup=t.mixup,
        ema=t.ema,
        ema_source=t.model,
        log_interval=LOG_INTERVAL,
    )


def timm_epoch(t: Training, batches: list[tuple[Tensor, Tensor]]) -> None:
    loss_of, losses, step_times, data_times = SoftTargetCrossEntropy(), AverageMeter(), AverageMeter(), AverageMeter()
    scaler = NativeScaler(device=t.device.type) if t.half else None
    t.model.train()
    t.optimizer.zero_grad()
    end = time.time()
    for i, (images, targets) in enumerate(batches):
        images, targets = t.mixup(images.to(t.device), targets.to(t.device))
        data_times.update(time.time() - end)
        with t.autocast:
            loss = loss_of(t.model(images), targets)
        if scaler is None:
            loss.backward()
            t.optimizer.step()
        else:
            scaler(loss, t.optimizer, parameters=t.model.parameters())
        losses.update(loss.item(), images.size(0))
        t.optimizer.zero_grad()
        t.ema.update(t.model, step=i)
        step_times.update(time.time() - end)
        if (i + 1) % LOG_INTERVAL == 0:
            log.info("loss %.4f, step %.3f s, data %.3f s", losses.avg, step_times.avg, data_times.avg)
        end = time.time()


def seconds(epoch: Callable, training: Training, batches: list[tuple[Tensor, Tensor]]) -> float:
    synchronize(training.device)
    start = time.perf_counter()
    epoch(training, batches)
    synchronize(training.device)
    return (time.perf_counter() - start) / len(batches)


def main() -> None:
    args = parse()
    size = models.parse_arch(args.model).img_size
    batch = torch.randn(args.batch_size, 3, size, size), torch.randint(10, (args.batch_size,))
    batches = [copy.deepcopy(batch) for _ in range(4)] * -(-args.steps // 4)
    loops = {
        "this program": (own_epoch, Training(args, fused=True)),
        "timm's loop": (timm_epoch, Training(args, fused=False)),
        "timm's loop with this program's optimiser": (timm_epoch, Training(args, fused=True)),
    }
    times = in_turn(
        {name: lambda loop=loop: seconds(*loop, batches) for name, loop in loops.items()}, args.repeats, warm_up=1
    )
    print(f"{args.model}, batch {args.batch_size}, {args.dtype}, {len(batches)} steps; {machine(args.device)}")
    if args.json:
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        of_model = {"model": args.model, "batch": args.batch_size, "dtype": args.dtype}
        of_loops = ({"loop": name, "ms per step": 1000 * median} for name, median in medians.items())
        write_rows(
            args.json, [of_model | row | {"images/s": args.batch_size * 1000 / row["ms per step"]} for row in of_loops]
        )
    for name in loops:
        line = f"{name}: {1000 * statistics.median(times[name]):.2f} ms per step"
        print(line + (f", ratio to it {ratio(times['this program'], times[name])}" if name != "this program" else ""))


if __name__ == "__main__":
    console.accept_any_text()
    main()
