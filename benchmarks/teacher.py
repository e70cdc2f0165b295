#!/usr/bin/env python3
"""Time of a stage-1 training step without a teacher, with one, and with the teacher-logit cache.

All alternate in one process; ratios are taken turn by turn. What the cache does once per file is timed separately and
divided by the steps of a file. Without optimiser and data loading.

    benchmarks/teacher.py                                                LeTs and LeViT-384 at published sizes
    benchmarks/teacher.py --model aux_deit_small_patch16_224 --keep 50   TLEG, fewer classes kept
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from benchmarks.interleaved import in_turn, machine, ratio
from common import console
from common.devices import accelerator, synchronize
from losses import DistillationLoss
from training.build import autocast_of
from training.teacher import STEPS_OF_A_FILE, Teacher, TeacherCache

import torch
from torch import Tensor, nn

CLASSES = 1000


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--src-arch", default="deit_small_patch16_224_L8")
    p.add_argument("--tgt-arch", default="deit_base_patch16_224_L16_H12")
    p.add_argument("--model", help="a TLEG Aux-Net, instead of LeTs")
    p.add_argument("--teacher-model", default="levit_384", help="timm's name; its weights are random here")
    p.add_argument("--keep", type=int, help="--teacher-cache-top of the cache that is timed; default: all classes")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--amp-dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    p.add_argument("--device", default=accelerator())
    p.add_argument("--repeats", type=int, default=5, help="after two warm-ups")
    p.add_argument("--compile", action="store_true")
    return p.parse_args()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def cache_of(teacher: Callable[[Tensor], Tensor], folder: Path, top: int | None, images: Tensor) -> TeacherCache:
    return TeacherCache(teacher, folder, {}, CLASSES, len(images), top, device=images.device)


def fill(cache: TeacherCache, images: Tensor) -> float:
    """Fill a file of ``cache``; returns the seconds to write it."""
    for _ in range(STEPS_OF_A_FILE):
        cache(images)
    return seconds(cache.flush, images.device)


def bytes_per_image(teacher: Callable[[Tensor], Tensor], images: Tensor, top: int | None) -> float:
    with tempfile.TemporaryDirectory() as folder:
        fill(cache_of(teacher, Path(folder), top, images), images)
        (file,) = Path(folder).glob("*/*")
        return file.stat().st_size / STEPS_OF_A_FILE / len(images)


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    device = torch.device(args.device)
    autocast, _ = autocast_of(args.amp_dtype, device)
    aux_net = models.create_model(args.model) if args.model else models.create_aux_net(args.src_arch, args.tgt_arch)
    aux_net, network = aux_net.to(device).train(), models.create_model(args.teacher_model).to(device)
    if args.compile:
        aux_net, network = torch.compile(aux_net), torch.compile(network)
    teacher = Teacher(network, getattr(torch, args.amp_dtype))
    size = models.parse_arch(args.model or args.tgt_arch).img_size
    images = torch.randn(args.batch_size, 3, size, size, device=device)
    labels = torch.randint(CLASSES, (args.batch_size,), device=device)

    def step(teacher: Callable[[Tensor], Tensor] | None) -> None:
        aux_net.zero_grad(set_to_none=True)
        criterion = DistillationLoss(nn.CrossEntropyLoss(), "none" if teacher is None else "soft", 1.0, 1.0)
        with autocast:
            teacher_logits = None if teacher is None else teacher(images)
            loss = criterion(aux_net(images), labels, teacher_logits)
        loss.backward()

    with autocast:
        logits = teacher(images)
    with tempfile.TemporaryDirectory() as folder:
        written, read = (cache_of(teacher, Path(folder) / name, args.keep, images) for name in ("written", "read"))
        once = {"cache written": fill(cache_of(lambda _: logits, read.folder, args.keep, images), images)}
        once["cache read"] = seconds(lambda: read(images), device)
        variants = {"no teacher": None, "teacher": teacher, "cache written": written, "cache read": read}
        times = in_turn(
            {name: lambda use=use: seconds(lambda: step(use), device) for name, use in variants.items()}, args.repeats
        )
    report(args, times, once)
    for top in (1, 10, 100, None):
        print(f"kept of {top or 'all'} classes: {bytes_per_image(lambda _: logits, images, top):.0f} bytes per image")


def report(args: argparse.Namespace, times: dict[str, list[float]], once: dict[str, float]) -> None:
    name = args.model or f"{args.src_arch} → {args.tgt_arch}"
    compiled = ", compiled" * args.compile
    print(f"{name}, teacher {args.teacher_model}, batch {args.batch_size}, {args.amp_dtype}{compiled}")
    print(machine(args.device))
    times = {
        variant: [time + once.get(variant, 0) / STEPS_OF_A_FILE for time in seconds]
        for variant, seconds in times.items()
    }
    for variant in times:
        print(f"{variant}: {statistics.median(times[variant]):.4f} s per step", end="")
        print(f"; over a step with the teacher {ratio(times[variant], times['teacher'])}" * (variant != "teacher"))
    shared = ", ".join(f"{name.removeprefix('cache ')} in {time:.3f} s" for name, time in once.items())
    print(f"of this a file of {STEPS_OF_A_FILE} steps, {shared}")


if __name__ == "__main__":
    console.accept_any_text()
    main()
