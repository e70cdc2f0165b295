"""Batches of images: the data set in its workers, the loader, and what happens when either fails."""

import hashlib
import random
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from errno import EMFILE, ENFILE, ENOMEM
from typing import NamedTuple

import utils
from common.errors import InputError, one_line
from common.workers import ExitPipe, WorkerError, as_worker_error, raise_exit_reason, shorten
from pipeline.images import Normalise, RawBatch, RawImage, batch_of
from pipeline.shards import ShardDataset
from samplers import Key

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset, default_collate, get_worker_info


class Sample(NamedTuple):
    """An image and its label, or neither, and what could not be read on the way to them."""

    image: Tensor | RawImage | None
    label: int | None
    unreadable: list[str | InputError | WorkerError]  # an error is of more than this image, and ends the run


class ReadDataset(Dataset):
    """A data set that says of an image that cannot be read which one it is."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        try:
            return Sample(*self.dataset[index], [])
        except InputError as error:  # which would come out of a data worker without its sentence
            return Sample(None, None, [error])
        except Exception as error:
            name = name_of_image(self.dataset, index)
            if isinstance(error, UNREADABLE) and getattr(error, "errno", None) not in EXHAUSTED:
                return Sample(None, None, [f"{name} ({one_line(error)})"])
            if get_worker_info() is None and not isinstance(error, OSError):
                raise
            return Sample(None, None, [as_worker_error(error, f" at {shorten(name)}")])


class SeededDataset(ReadDataset):
    """A data set whose random augmentation follows from the seed in the key, in whatever process it is loaded.

    Args:
        replacements: how many images are tried in the place of one that cannot be read: those that follow it.
    """

    def __init__(self, dataset: Dataset, replacements: int = 0):
        super().__init__(dataset)
        self.replacements = replacements

    def __getitem__(self, key: Key) -> Sample:
        (index, seed), unreadable = key, []
        for i in range(index, index + 1 + self.replacements):
            # timm's transforms use all three; torch.manual_seed would look at every accelerator for each image
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            sample = super().__getitem__(i % len(self))
            unreadable += sample.unreadable
            if sample.image is not None or isinstance(unreadable[-1], Exception):
                break
        return sample._replace(unreadable=unreadable)


def name_of_image(dataset: Dataset, index: int) -> str:
    """The file of an image, or its number where it is held in memory."""
    if isinstance(dataset, Subset):
        return name_of_image(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, ShardDataset):
        return dataset.name_of(index)
    return str(dataset.samples[index][0]) if hasattr(dataset, "samples") else f"image {index}"


def names_digest(dataset: Dataset) -> str:
    """A fingerprint of the names of all images, in their order, without the folders of this machine.

    Of images in memory (`TensorDataset`), which have none, it is one of their pixels.
    """
    if isinstance(dataset, TensorDataset):
        return hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in dataset.tensors)).hexdigest()
    if isinstance(dataset, ReadDataset):
        dataset = dataset.dataset
    if isinstance(dataset, ShardDataset):  # which would have to be fetched for the names in it
        names = (shard.sha256 for shard in dataset.shards)
    else:
        names = ("/".join(name_of_image(dataset, index).split("/")[-2:]) for index in range(len(dataset)))
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


def collate(samples: list[Sample]) -> tuple[Tensor | RawBatch, Tensor, list[str | InputError | WorkerError]]:
    """Images, labels, and what could not be read and is not among them."""
    images = [sample.image for sample in samples if sample.image is not None]
    labels = torch.tensor([sample.label for sample in samples if sample.image is not None], dtype=torch.int64)
    unreadable = [name for sample in samples for name in sample.unreadable]
    if not images:
        return torch.empty(0), labels, unreadable
    return (batch_of if isinstance(images[0], RawImage) else default_collate)(images), labels, unreadable


class CheckedLoader:
    """A loader's images and labels, where images that cannot be read are an error, or warned of and counted.

    Attributes:
        skipped: how many of this process could not be read since this was set to 0; in training others take their
            places, in evaluation they are left out.
    """

    def __init__(self, loader: DataLoader, skip_bad: bool, device: torch.device):
        """
        Args:
            device: where images are normalised that workers send as bytes.
        """
        self.loader, self.skip_bad, self.normalise = loader, skip_bad, Normalise(device)
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
        """End data workers that would stay: they ignore the signal with which the end of this process would end them.

        The end of the last reference to them would do it, but a library that keeps an exception keeps all its callers.
        """
        self.exit_pipe.close()
        if self.loader._iterator is not None:  # there is no public way
            self.loader._iterator._shutdown_workers()

    def _started(self) -> Iterator:
        """The loader's iterator. No signal interrupts a fork, whose hooks hold locks and swallow exceptions.

        Workers that stay from an earlier iteration are not forked again, but waited for: they may be busy.
        """
        self.exit_pipe.open()
        with nullcontext() if self.loader._iterator is None else utils.interruptible():
            return iter(self.loader)

    def _loaded(self) -> Iterator[tuple[Tensor | RawBatch, Tensor, list[str | InputError | WorkerError]]]:
        """What the loader gives; a signal may interrupt the wait for it.

        Raises:
            WorkerError: data workers failed, or could not be started.
        """
        batches, complete = None, False
        try:
            while True:
                try:
                    if batches is None:
                        batches = self._started()
                    with utils.interruptible():
                        batch = next(batches)
                except StopIteration:
                    complete = True
                    return
                except Exception as error:
                    if self.loader.num_workers == 0 or isinstance(error, InputError):
                        raise
                    ended = isinstance(error, (ConnectionError, EOFError)) or "exited unexpectedly" in str(error)
                    iterator = batches or self.loader._iterator  # where workers that stay do not start again
                    if ended and iterator is not None:
                        raise_exit_reason(iterator._workers)  # by what, is not in the error
                    raise as_worker_error(error) from error
                yield batch
        finally:
            if not complete and not self.loader.persistent_workers:
                self.exit_pipe.close()  # those that wait for a file would be waited for

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, unreadable in self._loaded():
            for error in unreadable:
                if isinstance(error, Exception):
                    raise error
            if unreadable and not self.skip_bad:
                raise InputError(f"{unreadable[0]} cannot be read as an image: --skip-bad-images goes on without it")
            if len(unreadable) > SKIPPED_AT_ONCE:
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


# what Pillow and the file system raise for an image that is not there, not whole, or no image
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, IndexError, struct.error, zlib.error)
UNREADABLE += (Image.DecompressionBombError,)
EXHAUSTED = (EMFILE, ENFILE, ENOMEM)  # what no other image would change
SKIPPED_AT_ONCE = 10  # images of a batch; more are no accident
