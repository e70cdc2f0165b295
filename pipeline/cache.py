"""Data sets of small images held in memory, on the device that trains, and augmented there in batches."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import utils
from common.errors import InputError
from pipeline.batch_augment import BatchAugment
from pipeline.batch_ops import normalised, sent, to_pixels
from pipeline.loader import CheckedLoader, ReadDataset
from samplers import ExactSampler, TrainSampler

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

AT_ONCE = 2**21  # pixels augmented together: enough to hide what the calls cost


def check_memory(images: int, input_size: int, device: torch.device) -> None:
    """Raises InputError if so many images do not fit into the memory that is free."""
    needed = images * input_size**2 * 4
    if device.type == "cuda":
        free, place = torch.cuda.mem_get_info(device)[0], "the GPU's memory"
    else:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free, place = 1024 * int(lines["MemAvailable"].split()[0]), "memory"
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # every process holds all of them
    if needed > free:
        raise InputError(
            f"--cache-data needs {needed / 1e9:.1f} GB for {images} images of {input_size}×{input_size} pixels, and "
            f"{free / 1e9:.1f} GB of {place} are free"
        )


def resized(transform: transforms.Compose) -> transforms.Compose:
    """What of a transform of `datasets.build_transform` is done once: to the input size, and into a tensor."""
    return transforms.Compose([transform.transforms[0], to_pixels])


def read_all(
    input_size: int, device: torch.device, skip_bad: bool, dataset: ReadDataset, keys: Sequence, **loading: object
) -> tuple[TensorDataset, int]:
    """Images (count, input_size, input_size, 4) in uint8 and labels (count,), on ``device``; and how many are missing.

    Args:
        skip_bad: whether images that cannot be read are an error, as `datasets.CheckedLoader` has it.
        dataset: images that are `resized`.
        keys: of all its images.
        loading: arguments of the DataLoader that reads them.
    """
    reader = CheckedLoader(DataLoader(dataset, batch_size=256, sampler=keys, **loading), skip_bad, device)
    images = torch.empty(len(keys), input_size, input_size, 4, dtype=torch.uint8, device=device)
    labels, done = torch.empty(len(keys), dtype=torch.int64, device=device), 0
    for some, some_labels in reader:
        rows = slice(done, done + len(some_labels))
        if len(some_labels):  # or none of them could be read
            images[rows], labels[rows] = some, some_labels
        done = rows.stop
    return TensorDataset(images[:done], labels[:done]), reader.skipped


class CachedBatches:
    """The test images of a process in batches, as those of `datasets.CheckedLoader`, from tensors in memory.

    Attributes:
        skipped: see `CheckedLoader`; here images are read once for all epochs, and counted by the main process.
    """

    def __init__(self, dataset: TensorDataset, skipped: int, batch_size: int, **process: int):
        """
        Args:
            dataset, skipped: what `read_all` has read.
            process: its rank and world_size.
        """
        self.dataset, self.skipped = dataset, skipped if utils.is_main() else 0
        self.sampler, self.batch_size = ExactSampler(len(dataset), **process), batch_size

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.dataset.tensors
        for first in range(0, len(self.sampler), self.batch_size):
            some = sent(np.array(self.sampler.indices[first : first + self.batch_size]), images)
            yield normalised(images.index_select(0, some)), labels.index_select(0, some)


class AugmentedBatches:
    """The training images of a process in batches, augmented several batches at a time.

    An image's augmentation follows from the run's seed, the epoch and the image's place in it alone.

    Attributes:
        skipped: see `CachedBatches`.
    """

    def __init__(
        self, dataset: TensorDataset, skipped: int, sampler: TrainSampler, batch_size: int, augment: BatchAugment
    ):
        """
        Args:
            dataset, skipped: what `read_all` has read.
        """
        self.dataset, self.skipped = dataset, skipped if utils.is_main() else 0
        self.sampler, self.batch_size, self.augment = sampler, batch_size, augment

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def close(self) -> None:
        """As `datasets.CheckedLoader` does; no data workers are left here."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.dataset.tensors
        steps = self.sampler.steps()
        at_once = max(1, AT_ONCE // (self.batch_size * images.shape[1] * images.shape[2]))
        while group := [*islice(steps, at_once)]:
            indices, places = map(np.concatenate, zip(*group, strict=True))
            some = sent(indices, images)
            with one_thread():
                augmented = self.augment(images.index_select(0, some), self.sampler.seeds(places))
            some_labels = labels.index_select(0, some)
            yield from zip(augmented.split(self.batch_size), some_labels.split(self.batch_size), strict=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """The operations are so short that several threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
