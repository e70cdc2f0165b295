"""Loading batches: seeded augmentation, unreadable images, failing data workers."""

import hashlib
import random
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from errno import EMFILE, ENFILE, ENOMEM
from typing import NamedTuple

import utils
from common.errors import InputError, one_line
from common.workers import ExitPipe, WorkerError, as_worker_error, raise_exit_reason
from pipeline.images import Normalise, RawBatch, RawImage, collate_raw
from pipeline.shards import Shards
from samplers import Key

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset, default_collate, get_worker_info

# raised by Pillow and the file system for a missing, truncated or invalid image
READ_ERRORS = (OSError, EOFError, SyntaxError, ValueError, IndexError, struct.error, zlib.error)
READ_ERRORS += (Image.DecompressionBombError,)
RESOURCE_ERRORS = (EMFILE, ENFILE, ENOMEM)  # errno values that are not about the image
MAX_UNREADABLE = 10  # images of a batch; more suggest that the data have disappeared


class Sample(NamedTuple):
    """An image and its label, both None if the image cannot be read.

    Attributes:
        unreadable: names of images that could not be read; an exception ends the run.
    """

    image: Tensor | RawImage | None
    label: int | None
    unreadable: list[str | InputError | WorkerError]


class CheckedDataset(Dataset):
    """A data set that returns the name of an image that cannot be read instead of raising."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        try:
            return Sample(*self.dataset[index], [])
        except InputError as error:  # a data worker would lose the message
            return Sample(None, None, [error])
        except Exception as error:
            name = image_name(self.dataset, index)
            if isinstance(error, READ_ERRORS) and getattr(error, "errno", None) not in RESOURCE_ERRORS:
                return Sample(None, None, [f"{name} ({one_line(error)})"])
            if get_worker_info() is None and not isinstance(error, OSError):
                raise
            return Sample(None, None, [as_worker_error(error, f" at {one_line(name)}")])


class SeededDataset(CheckedDataset):
    """A data set whose augmentation depends on the seed in the key only, not on the process that loads it.

    Args:
        replacements: how many of the following images are tried in place of one that cannot be read.
    """

    def __init__(self, dataset: Dataset, replacements: int = 0):
        super().__init__(dataset)
        self.replacements = replacements

    def __getitem__(self, key: Key) -> Sample:
        (index, seed), unreadable = key, []
        for i in range(index, index + 1 + self.replacements):
            # timm's transforms use all three; torch.manual_seed would also seed every accelerator
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            sample = super().__getitem__(i % len(self))
            unreadable += sample.unreadable
            if sample.image is not None or isinstance(unreadable[-1], Exception):
                break
        return sample._replace(unreadable=unreadable)


def image_name(dataset: Dataset, index: int) -> str:
    """The path of an image, or its number if it is held in memory."""
    if isinstance(dataset, Subset):
        return image_name(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, Shards):
        return dataset.name_of(index)
    return str(dataset.samples[index][0]) if hasattr(dataset, "samples") else f"image {index}"


def dataset_fingerprint(dataset: Dataset) -> str:
    """SHA-256 over the names of all images in order, without the path of the data set on this machine.

    For images in memory (`TensorDataset`) it is over their pixels.
    """
    if isinstance(dataset, TensorDataset):
        return hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in dataset.tensors)).hexdigest()
    if isinstance(dataset, CheckedDataset):
        dataset = dataset.dataset
    if isinstance(dataset, Shards):  # reading the names would download the shards
        names = dataset.digests
    else:
        names = ("/".join(image_name(dataset, index).split("/")[-2:]) for index in range(len(dataset)))
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


def collate(samples: list[Sample]) -> tuple[Tensor | RawBatch, Tensor, list[str | InputError | WorkerError]]:
    """Images, labels, and the names of images that could not be read, which are left out."""
    images = [sample.image for sample in samples if sample.image is not None]
    labels = torch.tensor([sample.label for sample in samples if sample.image is not None], dtype=torch.int64)
    unreadable = [name for sample in samples for name in sample.unreadable]
    if not images:
        return torch.empty(0), labels, unreadable
    return (collate_raw if isinstance(images[0], RawImage) else default_collate)(images), labels, unreadable


class CheckedLoader:
    """Images and labels of a DataLoader. Unreadable images raise, or are skipped with a warning.

    Attributes:
        skipped: how many images this process skipped since this was set to 0; in training others replace them, in
            evaluation they are left out.
    """

    def __init__(self, loader: DataLoader, skip_bad: bool, device: torch.device, **normalisation: Sequence[float]):
        """
        Args:
            device: where uint8 images are normalised.
            normalisation: ``mean`` and ``std``, as in `Normalise`.
        """
        self.loader, self.skip_bad, self.normalise = loader, skip_bad, Normalise(device, **normalisation)
        self.skipped, self.warned = 0, set()
        self.exit_pipe = ExitPipe(loader)

    @property
    def dataset(self) -> Dataset:
        return self.loader.dataset

    @property
    def sampler(self) -> Sampler:
        return self.loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def close(self) -> None:
        """Shut down persistent data workers, which ignore the signal that they get when this process exits.

        Deleting the last reference would do the same, but a stored exception may keep references alive.
        """
        self.exit_pipe.close()
        if self.loader._iterator is not None:  # there is no public API
            self.loader._iterator._shutdown_workers()

    def _start(self) -> Iterator:
        """The loader's iterator. Signals do not interrupt a fork, whose hooks hold locks and swallow exceptions.

        Persistent workers are not forked again; waiting for busy ones is interruptible.
        """
        self.exit_pipe.open()
        with nullcontext() if self.loader._iterator is None else utils.interruptible():
            return iter(self.loader)

    def _load(self) -> Iterator[tuple[Tensor | RawBatch, Tensor, list[str | InputError | WorkerError]]]:
        """Batches as `collate` makes them; stop signals interrupt the wait for one.

        Raises:
            WorkerError: data workers failed or could not be started.
        """
        batches, complete = None, False
        try:
            while True:
                try:
                    if batches is None:
                        batches = self._start()
                    with utils.interruptible():
                        batch = next(batches)
                except StopIteration:
                    complete = True
                    return
                except Exception as error:
                    if self.loader.num_workers == 0 or isinstance(error, InputError):
                        raise
                    ended = isinstance(error, (ConnectionError, EOFError)) or "exited unexpectedly" in str(error)
                    iterator = batches or self.loader._iterator  # None: persistent workers failed on reset
                    if ended and iterator is not None:
                        raise_exit_reason(iterator._workers)  # raises with the cause
                    raise as_worker_error(error) from error
                yield batch
        finally:
            if not complete and not self.loader.persistent_workers:
                self.exit_pipe.close()  # or the exit would wait for blocked workers

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, unreadable in self._load():
            for error in unreadable:
                if isinstance(error, Exception):
                    raise error
            if unreadable and not self.skip_bad:
                raise InputError(f"{unreadable[0]} cannot be read as an image: --skip-bad-images goes on without it")
            if len(unreadable) > MAX_UNREADABLE:
                raise InputError(
                    f"{len(unreadable)} images of one batch cannot be read, among them {unreadable[0]}: are the data "
                    "still there?"
                )
            for name in unreadable:
                if name not in self.warned:
                    print(f"warning: {name} cannot be read, and is not used", file=sys.stderr, flush=True)
            self.warned.update(unreadable)
            self.skipped += len(unreadable)
            yield self.normalise(images) if isinstance(images, RawBatch) else images, labels
