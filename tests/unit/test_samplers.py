"""Samplers: exact evaluation, repeated augmentation, resuming within an epoch, and seeded augmentation."""

from itertools import combinations, product

from datasets import build_dataset, build_transform
from pipeline.loader import SeededDataset, collate
from samplers import ExactSampler, TrainSampler

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 13])
@pytest.mark.parametrize("num_images", [0, 1, 2, 3, 7, 8, 9, 64, 359, 360])
def test_exact_sampler_covers_every_image_once(num_images: int, world_size: int):
    samplers = [ExactSampler(num_images, rank, world_size) for rank in range(world_size)]
    lists = [list(sampler) for sampler in samplers]
    assert sorted(index for indices in lists for index in indices) == list(range(num_images))
    assert [len(indices) for indices in lists] == [len(sampler) for sampler in samplers]
    assert max(map(len, lists)) - min(map(len, lists)) <= 1


@pytest.mark.parametrize("repeats", [1, 2, 3, 5])
def test_train_sampler_repeats_each_image_in_a_row(repeats: int):
    for num_images in range(1, 301):
        sampler = TrainSampler(num_images, 1, repeats)
        keys = list(sampler)
        assert len(keys) == len(sampler) == num_images
        indices = [index for index, _ in keys]
        order = indices[::repeats]
        assert len(set(order)) == len(order)  # another image after the last repeat
        assert set(order) <= set(range(num_images))
        assert indices == [index for index in order for _ in range(repeats)][:num_images]
        assert len(set(keys)) == num_images  # each time with another augmentation


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("repeats", [1, 3])
def test_every_step_has_the_samples_of_one_process(repeats: int, world_size: int):
    for num_images, batch_size in product(range(1, 100), (1, 4, 6)):
        alone = TrainSampler(num_images, batch_size * world_size, repeats, seed=5)
        ranks = [TrainSampler(num_images, batch_size, repeats, 5, rank, world_size) for rank in range(world_size)]
        for sampler in (alone, *ranks):
            sampler.set_position(2)
        keys = list(alone)
        assert len(keys) == len(alone) == num_images // (batch_size * world_size) * batch_size * world_size
        dealt = [list(sampler) for sampler in ranks]
        assert [len(sampler) for sampler in ranks] == [len(keys) // world_size] * world_size
        for step in range(len(keys) // (batch_size * world_size)):
            of_ranks = [key for own in dealt for key in own[step * batch_size : (step + 1) * batch_size]]
            assert sorted(of_ranks) == sorted(keys[step * len(of_ranks) : (step + 1) * len(of_ranks)])


def test_one_process_gets_the_repetitions_of_an_image():
    ranks = [TrainSampler(600, 12, 3, 5, rank, world_size=4) for rank in range(4)]
    images = [[index for index, _ in sampler] for sampler in ranks]
    assert all(own == [image for image in own[::3] for _ in range(3)] for own in images)
    assert all(set(a).isdisjoint(b) for a, b in combinations(images, 2))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (4, 2)])
def test_another_number_of_processes_continues_an_epoch_without_repeating_or_missing_an_image(before, after):
    """Each with 24 images of all processes in a step, three steps by the first ones."""
    alone = list(TrainSampler(200, 24, 3, 5))
    begun = [list(TrainSampler(200, 24 // before, 3, 5, rank, before))[: 3 * 24 // before] for rank in range(before)]
    continued = [TrainSampler(200, 24 // after, 3, 5, rank, after) for rank in range(after)]
    for sampler in continued:
        sampler.set_position(0, images=72)
    keys = [key for keys in (*begun, *map(list, continued)) for key in keys]
    assert sorted(keys) == sorted(alone)
    assert len(alone) == 192


def test_train_sampler_follows_from_seed_and_epoch():
    def keys(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = TrainSampler(50, 1, 3, seed)
        sampler.set_position(epoch)
        torch.manual_seed(epoch)  # of no effect
        return list(sampler)

    first = keys(0, 0)
    assert keys(0, 0) == first
    for other in (keys(0, 1), keys(1, 0)):
        assert [index for index, _ in other] != [index for index, _ in first]
        assert not {seed for _, seed in other} & {seed for _, seed in first}


def test_train_sampler_takes_all_images_in_the_long_run():
    sampler = TrainSampler(20, 4, repeats=3)
    seen = set()
    for epoch in range(30):
        sampler.set_position(epoch)
        seen |= {index for index, _ in sampler}
    assert seen == set(range(20))


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation that follows from the key
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def augmented_digits() -> Dataset:
    dataset, _ = build_dataset("DIGITS", None, True, build_transform("DIGITS", True, 32, reprob=0.5))
    return SeededDataset(dataset)


def test_augmentation_follows_from_the_key(augmented_digits: Dataset):
    for index, seed in ((0, 1), (3, 2**32 - 1)):
        torch.manual_seed(0)
        first, label, _ = augmented_digits[index, seed]
        torch.manual_seed(1)
        again, same_label, _ = augmented_digits[index, seed]
        assert torch.equal(first, again)
        assert label == same_label == augmented_digits.dataset.targets[index]
    versions = {augmented_digits[0, seed][0].numpy().tobytes() for seed in range(20)}
    assert len(versions) == 20
    assert len(augmented_digits) == 1437


def test_batches_do_not_depend_on_the_workers(augmented_digits: Dataset):
    def batches(num_workers: int) -> list[tuple[Tensor, Tensor]]:
        torch.manual_seed(num_workers)  # of no effect
        sampler = TrainSampler(len(augmented_digits), 16, repeats=3, seed=1)
        loader = DataLoader(
            augmented_digits, batch_size=16, sampler=sampler, num_workers=num_workers, collate_fn=collate
        )
        return [batch[:2] for batch, _ in zip(loader, range(6), strict=False)]

    expected = batches(0)
    for num_workers in (1, 2):
        for (images, labels), (same_images, same_labels) in zip(expected, batches(num_workers), strict=True):
            assert torch.equal(images, same_images)
            assert torch.equal(labels, same_labels)


def test_two_processes_see_the_images_of_one(augmented_digits: Dataset):
    def images(rank: int, world_size: int) -> set[bytes]:
        keys = TrainSampler(48, 24 // world_size, 3, 0, rank, world_size)
        return {augmented_digits[key][0].numpy().tobytes() for key in keys}

    assert images(0, 2) | images(1, 2) == images(0, 1)
    assert len(images(0, 1)) == 48
