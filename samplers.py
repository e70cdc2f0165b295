"""Samplers: repeated augmentation and exact evaluation, reproducible for any number of processes and workers."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

Key = tuple[int, int]  # the image's index in the data set, the seed of its augmentation
LANES = 64  # see `shuffled`


def derived_seed(*numbers: int) -> int:
    """A 32-bit seed computed from ``numbers``."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def shuffled(
    shard_sizes: Sequence[int], seed: int, lanes: int = LANES, per_file: Sequence[int] | None = None
) -> np.ndarray:
    """A random order of the images of all shards in which at most two shards per lane are open at a time.

    The shards are shuffled, and so are the images within each. The result is split into equal spans, the lanes, and
    position p of the order comes from lane p mod lanes: 64 lanes mix images of 64 shards. Because processes take
    positions in turn, each of 2, 4, …, 64 processes has lanes of its own, and few hosts need the same shard.

    Args:
        shard_sizes: the number of images in each shard; a single shard is a full permutation.
        per_file: how many consecutive shards are parts of a file, for each file. The files are then shuffled, and the
            shards within each: few files are needed at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = np.cumsum(shard_sizes)
    parts = [
        (torch.randperm(size, generator=generator) + end - size).numpy()
        for size, end in zip(shard_sizes, ends.tolist(), strict=True)
    ]
    files = torch.randperm(len(parts if per_file is None else per_file), generator=generator).tolist()
    order = (
        files if per_file is None else [shard for file in files for shard in shuffled_parts(per_file, file, generator)]
    )
    images = np.concatenate([parts[shard] for shard in order])
    rows = [len(lane) for lane in np.array_split(images, min(lanes, len(parts)))]  # may differ by 1
    begins = np.cumsum([0, *rows[:-1]])
    places = np.arange(len(images))
    return images[begins[places % len(rows)] + places // len(rows)]


def shuffled_parts(per_file: Sequence[int], file: int, generator: torch.Generator) -> list[int]:
    """The numbers of the shards that are parts of ``file``, in a random order; see `shuffled`."""
    return (torch.randperm(per_file[file], generator=generator) + sum(per_file[:file])).tolist()


def splitmix64(seeds: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The numbers at ``places`` of SplitMix64's sequences from ``seeds``; both are broadcast, all in uint64.

    Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    numbers = seeds + np.uint64(0x9E3779B97F4A7C15) * (places + np.uint64(1))  # 2⁶⁴ divided by the golden ratio
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class TrainSampler(Sampler[Key]):
    """A shuffled epoch, distributed over the processes step by step.

    With repeated augmentation (Hoffer et al., CVPR 2020; DeiT) every image occurs ``repeats`` times in a row, each
    time with another augmentation, and the epoch ends after as many samples as there are images. The samples of a step
    do not depend on the number of processes. Where the batch size allows it, one process gets all repetitions of an
    image and reads it only once (DeiT distributes them over processes).

    The seed of a sample depends on the run's seed, the epoch and the sample's position in it, not on the process or
    worker that loads it.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        repeats: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shard_sizes: Sequence[int] | None = None,
        per_file: Sequence[int] | None = None,
    ):
        """
        Args:
            batch_size: images of one process in a step; an incomplete last step is dropped.
            shard_sizes: images per shard; None without shards.
            per_file: shards per file; see `shuffled`.
        """
        self.per_file = per_file
        self.shard_sizes = [num_images] if shard_sizes is None else shard_sizes
        self.num_images, self.batch_size, self.repeats, self.seed = num_images, batch_size, repeats, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = 0, 0

    def set_position(self, epoch: int, images: int = 0) -> None:
        """Start ``epoch`` after ``images`` of all processes; the number of processes may have changed since."""
        self.epoch, self.start = epoch, images

    def __len__(self) -> int:
        return (self.num_images - self.start) // (self.batch_size * self.world_size) * self.batch_size

    def steps(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For every step: the images of this process, and their positions in the epoch."""
        order = shuffled(self.shard_sizes, derived_seed(self.seed, self.epoch), per_file=self.per_file)
        own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        images_per_step, end = self.batch_size * self.world_size, self.start + len(self) * self.world_size
        for first in range(self.start, end, images_per_step):
            step = np.arange(first, first + images_per_step)
            places = step[np.argsort(step // self.repeats % self.world_size, kind="stable")][own]
            yield order[places // self.repeats], places

    def seeds(self, places: np.ndarray) -> np.ndarray:
        """64-bit seeds of many samples at once, a hundred times as fast as the seeds of the keys."""
        epoch = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        return splitmix64(epoch, places.astype(np.uint64))

    def __iter__(self) -> Iterator[Key]:
        for images, places in self.steps():
            for image, place in zip(images.tolist(), places.tolist(), strict=True):
                yield image, derived_seed(self.seed, self.epoch, place)


class ExactSampler(Sampler[int]):
    """Every image exactly once over all processes; some processes get one image more.

    Each process gets a contiguous span, so that few of them need the same shard.
    """

    def __init__(self, num_images: int, rank: int = 0, world_size: int = 1):
        self.indices = range(rank * num_images // world_size, (rank + 1) * num_images // world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
