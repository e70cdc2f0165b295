"""Data sets, loaders and mixup of a run, from its options."""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import utils
from common.errors import InputError
from datasets import DATA_SETS, SMALL, build_dataset, build_transform, train_holdout_split, with_transform
from losses import BinaryCrossEntropy
from pipeline import cache
from pipeline.batch_augment import BatchAugment
from pipeline.cache import AugmentedBatches, CachedBatches
from pipeline.folders import SPLITS, summary
from pipeline.images import fast_transform
from pipeline.loader import MAX_UNREADABLE, CheckedDataset, CheckedLoader, SeededDataset, collate
from pipeline.shards import ShardCache
from samplers import ExactSampler, TrainSampler
from utils import print_main

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

# ---------------------------------------------------------------------------------------------------------------------
# Data, optimiser, average
# ---------------------------------------------------------------------------------------------------------------------


def build_sets(args: argparse.Namespace) -> tuple[Dataset, Dataset, list[str], BatchAugment | None]:
    """Training and test images, the names of the classes, and with --cache-data what augments the former.

    With --holdout some of the training images are in the place of the test images, which are not even read. With --eval
    there are no training images, and need not be.
    """
    if args.cache_data:
        check_small(args.data_set, args.input_size)
    sets, augment, shards, found = [], None, None, []
    if args.shard_cache is not None:
        shards = ShardCache(Path(args.shard_cache), int(args.shard_cache_gb * 1e9))
    for is_train in (False,) if args.eval else (True, False):
        transform = build_transform(
            args.data_set,
            is_train,
            args.input_size,
            color_jitter=args.color_jitter,
            aa=args.aa,
            interpolation=args.train_interpolation if is_train else "bicubic",
            reprob=args.reprob,
            remode=args.remode,
            recount=args.recount,
            eval_crop_ratio=args.eval_crop_ratio,
            three_augment=args.three_augment,
            src=args.src,
        )
        if args.cache_data:
            augment = BatchAugment(transform) if is_train else augment
            transform = cache.resize_only(transform)
        elif is_train:
            transform = fast_transform(transform)
        of_train = is_train or args.holdout is not None
        if args.holdout and sets:
            sets.append((with_transform(sets[0][0], transform), sets[0][1]))
            break
        alone = len(splits_needed(args)) == 1
        sets.append(
            build_dataset(args.data_set, args.data_path, of_train, transform, args.inat_category, shards, alone)
        )
        found.append(summary(SPLITS[not of_train], *sets[-1], args.data_path))
    for line in dict.fromkeys(filter(None, found)):
        print_main(line)
    (train, classes), (test, test_classes) = sets[0], sets[-1]
    if classes != test_classes:
        raise InputError(
            f"--data-path {args.data_path}: the {len(classes)} classes to train are not the {len(test_classes)} to test"
        )
    if args.holdout or (args.train_images and not args.eval):
        to_train, held_out = train_holdout_split(train.targets, args.train_images, args.holdout)
        train, test = Subset(train, to_train), Subset(test, held_out) if args.holdout else test
    return Subset(test, []) if args.eval else train, test, classes, augment


def splits_needed(args: argparse.Namespace) -> tuple[str, ...]:
    """The splits of the data set that the run reads."""
    if args.holdout:
        return ("train",)
    return ("val",) if args.eval else SPLITS


def build_loaders(args: argparse.Namespace, device: torch.device) -> tuple[CheckedLoader, CheckedLoader, list[str]]:
    """Training and test images in batches, and the names of the classes."""
    train, test, classes, augment = build_sets(args)
    if args.nb_classes not in (None, len(classes)):
        raise InputError(f"--nb-classes {args.nb_classes}: the data have {len(classes)} classes, expected as many")
    if args.batch_size * utils.world_size() > len(train) and args.epochs > 0 and not args.eval:
        raise InputError(
            f"--batch-size {args.batch_size} on {utils.world_size()} process(es) is more than the {len(train)} "
            "training images"
        )
    process = dict(rank=utils.rank(), world_size=utils.world_size())
    workers = min(args.num_workers, len(os.sched_getaffinity(0)))  # more than processors only get in each other's way
    pinned = args.pin_mem and device.type == "cuda"
    common = dict(num_workers=workers, pin_memory=pinned, collate_fn=collate)
    sampler = TrainSampler(
        len(train),
        args.batch_size,
        repeats=3 if args.repeated_aug else 1,
        seed=args.seed,
        shard_sizes=getattr(train, "shard_sizes", None),
        **process,
    )
    sizes = dict(train=args.batch_size, test=int(1.5 * args.batch_size))
    train, test = SeededDataset(train, MAX_UNREADABLE if args.skip_bad_images else 0), CheckedDataset(test)
    if args.cache_data:
        keys = [] if args.eval else [(i, 0) for i in range(len(train))]  # nothing is random yet
        cache.check_memory(len(keys) + len(test), args.input_size, device)
        read = partial(cache.load_into_memory, args.input_size, device, args.skip_bad_images, **common)
        train_loader = AugmentedBatches(*read(train, keys), sampler, sizes["train"], augment)
        return train_loader, CachedBatches(*read(test, range(len(test))), sizes["test"], **process), classes
    train_loader = DataLoader(
        train,
        batch_size=sizes["train"],
        sampler=sampler,
        drop_last=True,
        persistent_workers=workers > 0,
        **common,
    )
    test_loader = DataLoader(test, batch_size=sizes["test"], sampler=ExactSampler(len(test), **process), **common)
    return *(CheckedLoader(loader, args.skip_bad_images, device) for loader in (train_loader, test_loader)), classes


def build_mixup(args: argparse.Namespace, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """Mixup and cutmix, and the criterion that fits their targets."""
    if args.mixup <= 0 and args.cutmix <= 0 and args.cutmix_minmax is None:
        smoothed = args.smoothing > 0
        if args.bce_loss:
            return None, BinaryCrossEntropy(args.smoothing)
        return None, LabelSmoothingCrossEntropy(args.smoothing) if smoothed else nn.CrossEntropyLoss()
    if args.batch_size % 2 and args.epochs > 0 and not args.eval:
        raise InputError(f"--batch-size {args.batch_size} is odd: --mixup and --cutmix pair the images of a batch")
    mixup = Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax and box_sides(args.cutmix_minmax, args.input_size),
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=0.0 if args.bce_loss else args.smoothing,  # its criterion smooths
        num_classes=num_classes,
    )
    return mixup, BinaryCrossEntropy(args.smoothing) if args.bce_loss else SoftTargetCrossEntropy()


def box_sides(minmax: Sequence[float], input_size: int) -> list[float]:
    """``--cutmix-minmax`` for timm, which draws sides in pixels below the upper end: equal ends would leave it none.

    Raises:
        InputError: no box has such sides.
    """
    low, high = (int(share * input_size) for share in minmax)
    if low > high or low >= input_size:
        raise InputError(
            f"--cutmix-minmax {minmax[0]:g} {minmax[1]:g}: expected MIN ≤ MAX, and MIN below the whole image"
        )
    return [(side + 0.5) / input_size for side in (low, max(high, low + 1))]


def check_small(name: str, input_size: int) -> None:
    """Raises InputError unless the images of a data set are small, and used whole."""
    if DATA_SETS[name][2] is None:
        small = ", ".join(known for known, (_, _, size) in DATA_SETS.items() if size is not None)
        raise InputError(f"--cache-data cannot hold --data-set {name}, whose images are large: expected one of {small}")
    if input_size > SMALL:
        raise InputError(f"--cache-data is for an --input-size of up to {SMALL} pixels, found {input_size}")
