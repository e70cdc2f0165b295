"""--cache-data: data sets of small images in the memory of the training device, augmented there in batches."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import utils
from common.devices import CPU, free_memory
from common.errors import InputError
from pipeline.batch_augment import BatchAugment
from pipeline.batch_ops import normalise, to_device_of, to_pixels
from pipeline.loader import CheckedDataset, CheckedLoader
from samplers import ExactSampler, TrainSampler

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

PIXELS_PER_CHUNK = 2**21  # augmented together: enough to hide the overhead of the calls


def check_memory(images: int, input_size: int, device: torch.device) -> None:
    """Raises InputError if the images do not fit into free memory."""
    needed = images * input_size**2 * 4
    free, place = free_memory(device), f"the memory of {device}"
    if device.type == CPU:
        place = "memory"
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # every process holds a copy
    if free is not None and needed > free:
        raise InputError(
            f"--cache-data needs {needed / 1e9:.1f} GB for {images} images of {input_size}×{input_size} pixels, and "
            f"{free / 1e9:.1f} GB of {place} are free"
        )


def resize_only(transform: transforms.Compose) -> transforms.Compose:
    """The deterministic part of a transform of `datasets.build_transform`: resize and convert to a tensor."""
    return transforms.Compose([transform.transforms[0], to_pixels])


def load_into_memory(
    input_size: int, device: torch.device, skip_bad: bool, dataset: CheckedDataset, keys: Sequence, **loading: object
) -> tuple[TensorDataset, int]:
    """Load a data set to ``device``.

    Args:
        skip_bad: see `CheckedLoader`.
        dataset: with the transform of `resize_only`.
        keys: of all its images.
        loading: arguments of the DataLoader.

    Returns:
        Images (count, input_size, input_size, 4) in uint8 with labels (count,), and how many images were skipped.
    """
    reader = CheckedLoader(DataLoader(dataset, batch_size=256, sampler=keys, **loading), skip_bad, device)
    images = torch.empty(len(keys), input_size, input_size, 4, dtype=torch.uint8, device=device)
    labels, done = torch.empty(len(keys), dtype=torch.int64, device=device), 0
    for some, some_labels in reader:
        rows = slice(done, done + len(some_labels))
        if len(some_labels):  # a batch is empty if none of its images could be read
            images[rows], labels[rows] = some, some_labels
        done = rows.stop
    return TensorDataset(images[:done], labels[:done]), reader.skipped


class CachedBatches:
    """The test batches of a process, from tensors in memory.

    Attributes:
        skipped: see `CheckedLoader`; images are read once for all epochs, and the main process counts them.
    """

    def __init__(
        self,
        dataset: TensorDataset,
        skipped: int,
        batch_size: int,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        **process: int,
    ):
        """
        Args:
            dataset, skipped: from `load_into_memory`.
            mean, std: of each colour, for pixels from 0 to 1.
            process: rank and world_size.
        """
        self.mean, self.std = mean, std
        self.dataset, self.skipped = dataset, skipped if utils.is_main() else 0
        self.sampler, self.batch_size = ExactSampler(len(dataset), **process), batch_size

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.dataset.tensors
        for first in range(0, len(self.sampler), self.batch_size):
            some = to_device_of(np.array(self.sampler.indices[first : first + self.batch_size]), images)
            yield normalise(images.index_select(0, some), self.mean, self.std), labels.index_select(0, some)


class AugmentedBatches:
    """The training batches of a process, from tensors in memory; several batches are augmented at a time.

    The augmentation of an image depends on the run's seed, the epoch and the image's position in it only.

    Attributes:
        skipped: see `CachedBatches`.
    """

    def __init__(
        self, dataset: TensorDataset, skipped: int, sampler: TrainSampler, batch_size: int, augment: BatchAugment
    ):
        """
        Args:
            dataset, skipped: from `load_into_memory`.
        """
        self.dataset, self.skipped = dataset, skipped if utils.is_main() else 0
        self.sampler, self.batch_size, self.augment = sampler, batch_size, augment

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def close(self) -> None:
        """Nothing to do: see `CheckedLoader.close`."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.dataset.tensors
        steps = self.sampler.steps()
        at_once = max(1, PIXELS_PER_CHUNK // (self.batch_size * images.shape[1] * images.shape[2]))
        while group := [*islice(steps, at_once)]:
            indices, places = map(np.concatenate, zip(*group, strict=True))
            some = to_device_of(indices, images)
            with single_thread():
                augmented = self.augment(images.index_select(0, some), self.sampler.seeds(places))
            some_labels = labels.index_select(0, some)
            yield from zip(augmented.split(self.batch_size), some_labels.split(self.batch_size), strict=True)


@contextmanager
def single_thread() -> Iterator[None]:
    """The operations are so short that synchronising several threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
