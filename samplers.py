"""Which image is the k-th of an epoch, on which process, and with which random numbers."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

Key = tuple[int, int]  # the image's index in the data set, the seed of its augmentation
LANES = 64  # see `shuffled`


def derived_seed(*numbers: int) -> int:
    """A 32-bit seed that is a function of ``numbers`` and nothing else."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def shuffled(shard_sizes: Sequence[int], seed: int, lanes: int = LANES) -> np.ndarray:
    """The images of all shards in a random order that needs only ``lanes`` shards, or one more for each, at a time.

    The shards are put in random order, as are the images of each; what results is cut into equal spans, the lanes, and
    place p of the order is taken from lane p mod lanes. 64 lanes put images of 64 shards beside each other. As
    processes take places in turn, each of 2, 4, …, 64 has lanes of its own, and few machines fetch the same shard.

    Args:
        shard_sizes: the number of images in each shard; of one shard, a data set in one piece, all are permuted.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = np.cumsum(shard_sizes)
    parts = [
        (torch.randperm(size, generator=generator) + end - size).numpy()
        for size, end in zip(shard_sizes, ends.tolist(), strict=True)
    ]
    images = np.concatenate([parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()])
    rows = [len(lane) for lane in np.array_split(images, min(lanes, len(parts)))]  # the first ones may be longer by 1
    begins = np.cumsum([0, *rows[:-1]])
    places = np.arange(len(images))
    return images[begins[places % len(rows)] + places // len(rows)]


def split_mix(seeds: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The numbers at ``places`` of SplitMix64's sequences from ``seeds``, which are broadcast together; all in uint64.

    Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    numbers = seeds + np.uint64(0x9E3779B97F4A7C15) * (places + np.uint64(1))  # 2⁶⁴ divided by the golden ratio
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class TrainSampler(Sampler[Key]):
    """An epoch of random order, dealt out to the processes step by step.

    With repeated augmentation (Hoffer et al., CVPR 2020; DeiT) every image stands ``repeats`` times in a row, each
    time with another augmentation, and the epoch ends after as many samples as there are images. The samples of a step
    are the same whatever the number of processes that share its images. As far as their batches can hold them, one
    process gets all repetitions of an image, which it then has to read only once (DeiT deals them to different ones).

    The seed of a sample is a function of the run's seed, the epoch and the sample's place in it: not of the process
    or worker that loads it, so that two processes see the images of one.
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
    ):
        """
        Args:
            batch_size: images of one process in a step; what is left for less than a whole step is not dealt out.
            shard_sizes: how the images lie in shards, if they do.
        """
        self.shard_sizes = [num_images] if shard_sizes is None else shard_sizes
        self.num_images, self.batch_size, self.repeats, self.seed = num_images, batch_size, repeats, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = 0, 0

    def set_position(self, epoch: int, images: int = 0) -> None:
        """Begin ``epoch`` after as many images of all processes; their number may have been another before."""
        self.epoch, self.start = epoch, images

    def __len__(self) -> int:
        return (self.num_images - self.start) // (self.batch_size * self.world_size) * self.batch_size

    def steps(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The images of this process in every step, and their places in the epoch."""
        order = shuffled(self.shard_sizes, derived_seed(self.seed, self.epoch))
        own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        images_per_step, end = self.batch_size * self.world_size, self.start + len(self) * self.world_size
        for first in range(self.start, end, images_per_step):
            step = np.arange(first, first + images_per_step)
            places = step[np.argsort(step // self.repeats % self.world_size, kind="stable")][own]
            yield order[places // self.repeats], places

    def seeds(self, places: np.ndarray) -> np.ndarray:
        """64-bit seeds of many samples of the epoch at once, a hundred times as fast as those of the keys."""
        epoch = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        return split_mix(epoch, places.astype(np.uint64))

    def __iter__(self) -> Iterator[Key]:
        for images, places in self.steps():
            for image, place in zip(images.tolist(), places.tolist(), strict=True):
                yield image, derived_seed(self.seed, self.epoch, place)


class ExactSampler(Sampler[int]):
    """Every image once over all processes, whatever their number; some processes get one image more.

    Each has a span of its own, so that few of them need the same shard.
    """

    def __init__(self, num_images: int, rank: int = 0, world_size: int = 1):
        self.indices = range(rank * num_images // world_size, (rank + 1) * num_images // world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
