#!/usr/bin/env python3
"""CPU time to load training photographs: this program's loader, the published one, and timm's.

Creates synthetic JPEG files similar to ImageNet's unless the folder exists: 1/f spectra with occluding edges, 4:2:0,
quality 90, 468×394 pixels and 121 kB on average (ImageNet: 469×387, 110 kB); one in 32 has a side of more than 1000
pixels.

Each loader applies DeiT's augmentation and returns normalised batches in the main process. The CPU time of the main
process and the workers is measured, because other programs on the machine hardly affect it. The loaders alternate, and
ratios are taken turn by turn.

    benchmarks/loader.py                             every image once in an epoch
    benchmarks/loader.py --repeated-aug              three times in a row, DeiT's and this program's default
    benchmarks/loader.py --steps                     the milliseconds of each step of the transforms
"""

import argparse
import copy
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.interleaved import in_turn, machine, ratio
from common import console
from datasets import build_dataset, build_transform
from options import place
from pipeline.images import Normalise, RawImage, collate_raw, fast_transform, load_image
from pipeline.loader import CheckedLoader, SeededDataset, collate
from samplers import TrainSampler

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from timm.data import create_loader
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets
from tqdm import trange

# (width, height) → how many of 256
SIZES = {(500, 375): 100, (375, 500): 28, (500, 333): 34, (333, 500): 14, (500, 500): 8, (640, 480): 8, (400, 300): 12}
SIZES |= {(300, 225): 16, (250, 188): 14, (200, 200): 10, (800, 600): 4, (1024, 768): 4, (1200, 1600): 2}
SIZES |= {(1600, 1200): 1, (2048, 1536): 1}
BATCH_SIZE = 64


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=256, help=f"per epoch, at least {BATCH_SIZE}")
    p.add_argument("--folder", type=place, help="of the images; they are created and kept if it is empty")
    p.add_argument("--workers", type=int, default=1, help="of each loader, on as many cores")
    p.add_argument("--repeats", type=int, default=5, help="epochs of each loader, after one warm-up")
    p.add_argument("--repeated-aug", action="store_true", help="every image three times in a row")
    p.add_argument("--steps", action="store_true", help="time each step of the transforms instead")
    args = p.parse_args()
    if min(args.workers, args.repeats) < 1 or args.images < BATCH_SIZE:
        p.error(f"--workers and --repeats are at least 1, --images at least {BATCH_SIZE}")
    return args


def spectrum(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """1/f noise of mean 0 and standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency, (height, width))
    return (noise - noise.mean()) / noise.std()


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    picture = 128 + np.stack([spread * spectrum(rng, height, width) for spread in (38, 12, 12)], axis=-1)
    for _ in range(24):  # occluding ellipses
        radius = min(width, height) * rng.uniform(0.03, 0.35)
        thing = np.hypot((x - rng.uniform(0, width)) * rng.uniform(0.5, 2), y - rng.uniform(0, height)) < radius
        picture[thing] += rng.normal(0, (35, 10, 10))
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8), "YCbCr")


def make_images(root: Path, count: int) -> None:
    """``count`` training images, and the one test image that a data set needs."""
    rng = np.random.default_rng(0)
    sizes = [size for size, number in SIZES.items() for _ in range(number)]
    order = rng.permutation(len(sizes))
    for i in trange(count, desc="images", leave=False):
        path = root / "train" / "photograph" / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(rng, *sizes[order[i % len(sizes)]]).save(path, quality=90, subsampling="4:2:0")
    (root / "val" / "photograph").mkdir(parents=True)
    photograph(rng, 500, 375).save(root / "val" / "photograph" / "0.JPEG", quality=90, subsampling="4:2:0")


def build_loaders(root: str, args: argparse.Namespace) -> dict[str, Iterable]:
    published = torchvision.datasets.ImageFolder(Path(root) / "train", build_transform("FOLDER", True, 224))
    ours, _ = build_dataset("FOLDER", root, True, fast_transform(build_transform("FOLDER", True, 224)))
    repeats = 3 if args.repeated_aug else 1
    loaders = {}
    for name, dataset in (("this program", ours), ("published", published)):
        sampler = TrainSampler(len(dataset), BATCH_SIZE, repeats)
        loader = DataLoader(
            SeededDataset(dataset),
            BATCH_SIZE,
            sampler=sampler,
            num_workers=args.workers,
            collate_fn=collate,
            persistent_workers=True,
            drop_last=True,
        )
        loaders[name] = CheckedLoader(loader, skip_bad=False, device=torch.device("cpu"))
    # it repeats images in distributed runs only, and decodes each repetition
    loaders["timm"] = create_loader(
        torchvision.datasets.ImageFolder(Path(root) / "train"),
        input_size=(3, 224, 224),  # of timm < 1.0.16, too
        batch_size=BATCH_SIZE,
        is_training=True,
        interpolation="bicubic",
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.25,
        re_mode="pixel",
        num_workers=args.workers,
        device=torch.device("cpu"),
    )
    return loaders


def processor_time() -> float:
    """CPU seconds of this process and its workers."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # in user and in system mode
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def time_per_image(loader: Iterable) -> float:
    """CPU seconds per image of an epoch."""
    start, count = processor_time(), 0
    for images, _ in loader:
        count += len(images)
    return (processor_time() - start) / count


def time_steps(root: Path) -> dict[str, Counter]:
    """CPU milliseconds per image of each step of the published transform and of this program's."""
    published = build_transform("FOLDER", True, 224)
    pipelines = {
        "published": (datasets.folder.pil_loader, published.transforms, torch.stack),
        "this program": (load_image, fast_transform(copy.deepcopy(published)).transforms, finish),
    }
    files, times = sorted(map(str, root.glob("train/*/*"))), {name: Counter() for name in pipelines}
    for name, (read, steps, collated) in pipelines.items():
        images = []
        for path in files:
            image = path
            for step in (read, *steps):
                start = time.process_time()
                image = step(image)
                name_of_step = "decode" if step is read else type(step).__name__
                times[name][name_of_step] += 1000 * (time.process_time() - start) / len(files)
            images.append(image)
        start = time.process_time()
        for i in range(0, len(images), BATCH_SIZE):
            collated(images[i : i + BATCH_SIZE])
        times[name]["batch"] += 1000 * (time.process_time() - start) / len(files)
    return times


def finish(images: list[RawImage]) -> Tensor:
    return Normalise(torch.device("cpu"))(collate_raw(images))


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.workers])
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(args.folder or temporary)
        if not (root / "train").is_dir():
            make_images(root, args.images)
        sizes = [path.stat().st_size for path in root.glob("train/*/*")]
        if args.steps:
            rounds = [time_steps(root) for _ in range(args.repeats)]
            print(f"milliseconds of an image, median of {args.repeats} rounds; {machine()}")
            for name in rounds[0]:
                for step in rounds[0][name]:
                    print(f"{name}, {step}: {statistics.median(times[name][step] for times in rounds):.2f}")
            return
        loaders = build_loaders(str(root), args)
        measure = {name: partial(time_per_image, loader) for name, loader in loaders.items()}
        times = in_turn(measure, args.repeats, warm_up=1)
    how = "three times in a row" if args.repeated_aug else "once"
    print(
        f"{len(sizes)} images of {statistics.mean(sizes) / 1000:.0f} kB, each {how}, {args.workers} worker(s), seed 0"
    )
    print(f"{machine()}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}")
    for name in loaders:
        speed, faster_by = 1 / statistics.median(times[name]), ratio(times["published"], times[name])
        print(f"{name}: {speed:.0f} images per second and core; over the published {faster_by}")


if __name__ == "__main__":
    console.accept_any_text()
    main()
