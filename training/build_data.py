"""Data sets, loaders and mixup of a run, from its options."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import utils
from common.devices import can_pin, processors
from common.errors import InputError
from datasets import build_dataset, build_transform, train_holdout_split, with_transform
from losses import BinaryCrossEntropy
from pipeline import cache
from pipeline.batch_augment import BatchAugment
from pipeline.cache import AugmentedBatches, CachedBatches
from pipeline.folders import SPLITS, summary
from pipeline.images import fast_transform
from pipeline.loader import MAX_UNREADABLE, CheckedDataset, CheckedLoader, SeededDataset, collate
from pipeline.shard_cache import ShardCache
from pipeline.shards import Choices
from samplers import ExactSampler, TrainSampler
from training.config import AugmentConfig, Config, DataConfig
from training.preprocessing import preprocessing_of
from utils import print_main

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------


def build_sets(
    data: DataConfig, augment: AugmentConfig, evaluates: bool
) -> tuple[Dataset, Dataset, list[str], BatchAugment | None]:
    """Training and test images, the names of the classes, and with --cache-data what augments the former.

    With --holdout some of the training images are in the place of the test images, which are not even read. A run that
    only evaluates has no training images, and they need not be there.
    """
    sets, batch_augment, shards, found = [], None, shard_cache_of(data), []
    splits = splits_needed(data, evaluates)
    for is_train in (False,) if evaluates else (True, False):
        transform = transform_of(data, augment, is_train)
        if data.cache_data:
            batch_augment = BatchAugment(transform) if is_train else batch_augment
            transform = cache.resize_only(transform)
        elif is_train:
            transform = fast_transform(transform)
        if data.holdout and sets:  # the test images are some of the training images, under their own transform
            sets.append((with_transform(sets[0][0], transform), sets[0][1]))
            break
        of_train = is_train or data.holdout is not None
        sets.append(
            build_dataset(
                data.data_set,
                data.data_path,
                of_train,
                transform,
                data.inat_category,
                shards,
                len(splits) == 1,
                choices_of(data),
            )
        )
        found.append(summary(SPLITS[not of_train], *sets[-1], data.data_path))
    for line in dict.fromkeys(filter(None, found)):
        print_main(line)
    (train, classes), (test, test_classes) = sets[0], sets[-1]
    if classes != test_classes:
        raise InputError(
            f"--data-path {data.data_path}: the {len(classes)} classes to train are not the {len(test_classes)} to test"
        )
    if data.holdout or (data.train_images and not evaluates):
        to_train, held_out = train_holdout_split(train.targets, data.train_images, data.holdout)
        train, test = Subset(train, to_train), Subset(test, held_out) if data.holdout else test
    return Subset(test, []) if evaluates else train, test, classes, batch_augment


def shard_cache_of(data: DataConfig) -> ShardCache | None:
    """Where remote shards are kept."""
    return ShardCache(Path(data.shard_cache), int(data.shard_cache_gb * 1e9)) if data.shard_cache else None


def choices_of(data: DataConfig) -> Choices:
    """What the options say about shards, or a data set of the Hub."""
    return Choices(data.nb_classes, data.hf_image_column, data.hf_label_column, data.hf_train_split, data.hf_val_split)


def transform_of(data: DataConfig, augment: AugmentConfig, is_train: bool) -> Callable:
    """The transform of a training or test image."""
    preprocessing = preprocessing_of(data)
    return build_transform(
        data.data_set,
        is_train,
        data.input_size,
        color_jitter=augment.color_jitter,
        aa=augment.aa,
        interpolation=augment.train_interpolation if is_train else preprocessing.interpolation,
        reprob=augment.reprob,
        remode=augment.remode,
        recount=augment.recount,
        eval_crop_ratio=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        mean=preprocessing.mean,
        std=preprocessing.std,
        three_augment=augment.three_augment,
        src=augment.src,
        crop_padding=augment.crop_padding,
    )


def splits_needed(data: DataConfig, evaluates: bool) -> tuple[str, ...]:
    """The splits of the data set that the run reads."""
    if data.holdout:
        return ("train",)
    return ("val",) if evaluates else SPLITS


# ---------------------------------------------------------------------------------------------------------------------
# Loaders
# ---------------------------------------------------------------------------------------------------------------------


def build_loaders(config: Config, device: torch.device) -> tuple[CheckedLoader, CheckedLoader, list[str]]:
    """Training and test images in batches, and the names of the classes.

    Raises:
        InputError: the data are not there, have other classes than expected, or fewer images than a step needs.
    """
    data, evaluates = config.data, config.runtime.eval
    train, test, classes, batch_augment = build_sets(data, config.augment, evaluates)
    if data.nb_classes not in (None, len(classes)):
        raise InputError(f"--nb-classes {data.nb_classes}: the data have {len(classes)} classes, expected as many")
    if data.batch_size * utils.world_size() > len(train) and config.trains:
        raise InputError(
            f"--batch-size {data.batch_size} on {utils.world_size()} process(es) is more than the {len(train)} "
            "training images"
        )
    process = dict(rank=utils.rank(), world_size=utils.world_size())
    preprocessing = preprocessing_of(data)
    normalisation = dict(mean=preprocessing.mean, std=preprocessing.std)
    workers = workers_of(data)
    pinned = data.pin_mem and can_pin(device)
    common = dict(num_workers=workers, pin_memory=pinned, collate_fn=collate)
    sampler = TrainSampler(
        len(train),
        data.batch_size,
        repeats=3 if config.augment.repeated_aug else 1,
        seed=config.runtime.seed,
        shard_sizes=getattr(train, "shard_sizes", None),
        per_file=getattr(train, "per_file", None),
        **process,
    )
    sizes = dict(train=data.batch_size, test=int(1.5 * data.batch_size))
    train, test = SeededDataset(train, MAX_UNREADABLE if data.skip_bad_images else 0), CheckedDataset(test)
    if data.cache_data:
        keys = [] if evaluates else [(i, 0) for i in range(len(train))]  # nothing is random yet
        cache.check_memory(len(keys) + len(test), data.input_size, device)
        read = partial(cache.load_into_memory, data.input_size, device, data.skip_bad_images, **common)
        train_loader = AugmentedBatches(*read(train, keys), sampler, sizes["train"], batch_augment)
        cached = CachedBatches(*read(test, range(len(test))), sizes["test"], **normalisation, **process)
        return train_loader, cached, classes
    train_loader = DataLoader(
        train,
        batch_size=sizes["train"],
        sampler=sampler,
        drop_last=True,
        persistent_workers=workers > 0,
        **common,
    )
    test_loader = DataLoader(test, batch_size=sizes["test"], sampler=ExactSampler(len(test), **process), **common)
    checked = partial(CheckedLoader, skip_bad=data.skip_bad_images, device=device, **normalisation)
    return checked(train_loader), checked(test_loader), classes


def order_loader(config: Config, device: torch.device) -> CheckedLoader:
    """The --order-images training images whose gradients say what is important, as test images are prepared.

    They are the same in each process.
    """
    return plain_loader(config, config.model.order_images, device)


def plain_loader(config: Config, count: int | None, device: torch.device, share: slice = slice(None)) -> CheckedLoader:
    """Training images as test images are prepared.

    They are the same for each seed, and of those that the run trains on: each class has its share, or, in shards, which
    hold images in a random order, they are the first; those of ``HF``, which may be sorted, are evenly spaced.

    Args:
        count: how many images, unless there are fewer; None: all.
        share: those that this process reads.
    """
    data = config.data
    transform = transform_of(data, config.augment, is_train=False)
    train, _ = build_dataset(
        data.data_set,
        data.data_path,
        True,
        transform,
        data.inat_category,
        shard_cache_of(data),
        single_split=True,
        choices=choices_of(data),
    )
    if data.data_set == "WDS":
        chosen = range(len(train))[:count]
    elif data.data_set == "HF":
        count = min(count or len(train), len(train))
        chosen = np.linspace(0, len(train) - 1, count, dtype=int).tolist()
    else:
        trained = data.train_images or len(train) - (data.holdout or 0)
        chosen = train_holdout_split(train.targets, min(count or trained, trained), data.holdout)[0]
    loader = DataLoader(
        CheckedDataset(Subset(train, chosen[share])),
        batch_size=data.batch_size,
        num_workers=workers_of(data),
        collate_fn=collate,
        generator=torch.Generator(),  # the random numbers of the run stay as they are
    )
    preprocessing = preprocessing_of(data)
    return CheckedLoader(loader, data.skip_bad_images, device, mean=preprocessing.mean, std=preprocessing.std)


def workers_of(data: DataConfig) -> int:
    """Data workers of this process: more than processors only get in each other's way."""
    return min(data.num_workers, processors())


# ---------------------------------------------------------------------------------------------------------------------
# Mixup
# ---------------------------------------------------------------------------------------------------------------------


def build_mixup(augment: AugmentConfig, input_size: int, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """Mixup and cutmix, and the criterion that fits their targets."""
    if not augment.mixes:
        if augment.bce_loss:
            return None, BinaryCrossEntropy(augment.smoothing)
        return None, LabelSmoothingCrossEntropy(augment.smoothing) if augment.smoothing else nn.CrossEntropyLoss()
    mixup = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        cutmix_minmax=augment.cutmix_minmax and box_sides(augment.cutmix_minmax, input_size),
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        mode=augment.mixup_mode,
        label_smoothing=0.0 if augment.bce_loss else augment.smoothing,  # its criterion smooths
        num_classes=num_classes,
    )
    return mixup, BinaryCrossEntropy(augment.smoothing) if augment.bce_loss else SoftTargetCrossEntropy()


def box_sides(minmax: Sequence[float], input_size: int) -> list[float]:
    """``--cutmix-minmax`` for timm, which draws sides in pixels below the upper end: equal ends would leave it none."""
    low, high = (int(share * input_size) for share in minmax)
    return [(side + 0.5) / input_size for side in (low, max(high, low + 1))]
