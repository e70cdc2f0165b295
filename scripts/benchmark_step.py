#!/usr/bin/env python3
"""Time one stage-1 training step (forward and backward) against a plain ViT of the same shape.

Both run in one process, in turn, so that a slow moment of the machine meets both; the ratio is taken pair by pair.

    scripts/benchmark_step.py                                                   LeTs at published sizes
    scripts/benchmark_step.py --model aux_deit_base_patch16_224                 TLEG
"""

import argparse
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models

import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import trange


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--src-arch", default="deit_small_patch16_224_L8")
    p.add_argument("--tgt-arch", default="deit_base_patch16_224_L16_H12")
    p.add_argument("--model", help="a TLEG Aux-Net, instead of LeTs")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of autocast")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--repeats", type=int, default=9, help="counted pairs of steps, after two that are not")
    p.add_argument("--compile", action="store_true")
    return p.parse_args()


def step_time(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, autocast) -> float:
    """Seconds of one forward and backward pass."""
    for p in model.parameters():
        p.grad = None
    synchronise = torch.cuda.synchronize if images.is_cuda else lambda: None
    synchronise()
    start = time.perf_counter()
    with autocast:
        loss = cross_entropy(model(images), labels)
    loss.backward()
    synchronise()
    return time.perf_counter() - start


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    if args.model:
        name, aux_net = args.model, models.create_model(args.model)
    else:
        name, aux_net = f"{args.src_arch} → {args.tgt_arch}", models.create_aux_net(args.src_arch, args.tgt_arch)
    pair = [aux_net.to(args.device).train(), models.create_vit(aux_net.arch).to(args.device).train()]
    if args.compile:
        pair = [torch.compile(model) for model in pair]
    size = aux_net.arch.img_size
    images = torch.randn(args.batch_size, 3, size, size, device=args.device)
    labels = torch.randint(1000, (args.batch_size,), device=args.device)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)

    pairs = []
    for i in trange(args.repeats + 2, desc="steps", leave=False):
        seconds = [step_time(model, images, labels, autocast) for model in pair]
        if i >= 2:
            pairs.append(seconds)
    ratios = sorted(aux / plain for aux, plain in pairs)
    aux, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, batch {args.batch_size}, {args.dtype}, {where}, seed 0")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}")
    print(f"Aux-Net {aux:.3f} s, plain ViT {plain:.3f} s (medians of {len(pairs)})")
    print(f"ratio {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}")


if __name__ == "__main__":
    main()
