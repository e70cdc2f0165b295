"""--cache-data: pixels and distributions against timm's and torchvision's steps on single images, and whole runs."""

import random
from pathlib import Path

from common.errors import InputError
from common.files import read_checkpoint
from datasets import build_dataset, build_transform
from pipeline import cache
from pipeline.batch_augment import (
    GEOMETRIC,
    OPERATIONS,
    BatchAugment,
    Policy,
    SeededRandom,
    sample_erasing,
    to_device_of,
)
from pipeline.batch_ops import Warp, to_pixels
from pipeline.loader import CheckedDataset, SeededDataset, collate
from samplers import ExactSampler, TrainSampler

import numpy as np
import pytest
import torch
import yaml
from conftest import Run, assert_same_result, run_many
from PIL import Image
from timm.data import auto_augment

CPU = torch.device("cpu")
FILL = (124, 116, 104)
CUBIC, LINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def pictures(size: int) -> list[Image.Image]:
    """Noise, smooth ones, some of a few levels, and flat ones."""
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(6)]
    small = [generator.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(6)]
    arrays += [np.asarray(Image.fromarray(array).resize((size, size), CUBIC)) for array in small]
    arrays += [array // 60 * 60 for array in arrays[:4]] + [np.full((size, size, 3), 77, dtype=np.uint8)]
    arrays.append(np.zeros((size, size, 3), dtype=np.uint8))
    arrays[-1][2] = 200
    return [Image.fromarray(array) for array in arrays]


def seeds(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint64) * np.uint64(2**40 + 1)


def fine(count: int, deviation: float = 1.0) -> float:
    """Five standard errors of a mean over ``count``."""
    return 5 * deviation / count**0.5


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("size", [8, 29])
def test_an_operation_gives_the_pixels_of_timm(monkeypatch, name, size):
    images, operation, generator = pictures(size), OPERATIONS[name], np.random.default_rng(1)
    magnitude = np.concatenate([[0.0, 10.0], generator.uniform(0, 10, len(images) - 2)])
    sign = generator.choice([-1.0, 1.0], len(images))
    arguments = operation.argument(magnitude, sign)
    x = torch.stack([*map(to_pixels, images)])
    fill = torch.tensor(int.from_bytes(bytes((*FILL, 0)), "little"), dtype=torch.int32)
    for resample in (CUBIC, LINEAR) if operation.apply in GEOMETRIC else (CUBIC,):
        warp = (Warp(resample == CUBIC, fill),) if operation.apply in GEOMETRIC else ()
        found = operation.apply(x, torch.from_numpy(arguments), *warp)[..., :3].int()
        expected = []
        for i, image in enumerate(images):
            monkeypatch.setattr(auto_augment, "_randomly_negate", lambda level, i=i: sign[i] * level)
            level = auto_augment.LEVEL_TO_ARG[name]
            given = level(magnitude[i], {}) if level else ()
            assert not given or given[0] == pytest.approx(arguments[i], abs=1e-12)
            expected.append(np.array(auto_augment.NAME_TO_OP[name](image, *given, fillcolor=FILL, resample=resample)))
        difference = (found - torch.tensor(np.stack(expected)).int()).abs()
        assert difference.max() <= (operation.apply in GEOMETRIC)
        assert (difference > 0).float().mean() < 0.01


def test_test_images_are_bit_for_bit_those_read_one_by_one():
    transform = build_transform("DIGITS", False, 16)
    one_by_one = build_dataset("DIGITS", None, False, transform)[0]
    read = CheckedDataset(build_dataset("DIGITS", None, False, cache.resize_only(transform))[0])
    cached = cache.load_into_memory(16, CPU, False, read, range(len(read)), collate_fn=collate)
    for rank in range(2):
        batches = [*cache.CachedBatches(*cached, 50, rank=rank, world_size=2)]
        assert [len(labels) for _, labels in batches] == [50, 50, 50, 30]
        expected = [one_by_one[i] for i in ExactSampler(len(one_by_one), rank, 2)]
        assert torch.equal(torch.cat([images for images, _ in batches]), torch.stack([x for x, _ in expected]))
        assert torch.cat([labels for _, labels in batches]).tolist() == [label for _, label in expected]


# ---------------------------------------------------------------------------------------------------------------------
# Distributions
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"aa": None}, {"aa": "original-mstd0.5", "interpolation": "random"}])
def test_pixels_have_the_distribution_of_those_augmented_one_by_one(options):
    count, size = 1500, 12
    transform = build_transform("FMNIST", True, size, **options)
    picture = pictures(size)[8]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    expected = torch.stack([transform(picture) for _ in range(count)])
    found = BatchAugment(transform)(to_pixels(picture).expand(count, -1, -1, -1), seeds(count))
    statistics = [
        (x.mean((1, 2, 3)), x.var((1, 2, 3)), x[:, 0].diff(dim=1).abs().mean((1, 2))) for x in (found, expected)
    ]
    for a, b in zip(*statistics, strict=True):
        assert abs(a.mean() - b.mean()) < fine(count, float((a.var() + b.var()) ** 0.5))
    # every place and channel by itself: the largest of 432 differences, in standard errors
    error = ((found.var(0) + expected.var(0)) / count).sqrt()
    assert ((found.mean(0) - expected.mean(0)).abs() / error).max() < 5


@pytest.mark.parametrize("pixels", [0, 3])
def test_shifts_are_as_large_as_those_of_single_images(pixels):
    transform = build_transform("DIGITS", True, 12, aa=None, color_jitter=0.0, reprob=0.0, crop_padding=pixels)
    picture = pictures(12)[0]
    torch.manual_seed(0)
    expected = {transform(picture).numpy().tobytes() for _ in range(800)}
    found = BatchAugment(transform)(to_pixels(picture).expand(800, -1, -1, -1), seeds(800))
    assert {image.numpy().tobytes() for image in found} == expected
    assert len(expected) == (2 * pixels + 1) ** 2


def test_operations_are_drawn_as_often_as_timm_draws_them():
    count = 20_000
    policy = Policy(build_transform("FMNIST", True, 28, aa="rand-m9-n3-mstd0.5-inc1").transforms[3])
    drawn = policy.sample(SeededRandom(seeds(count)))
    assert drawn.choice.shape == (count, 3)
    for kind in range(15):
        per_turn = (drawn.choice == kind).mean(0)
        assert np.abs(per_turn - 0.5 / 15).max() < fine(count, (0.5 / 15) ** 0.5)
    together = ((drawn.choice[:, 0] >= 0) & (drawn.choice[:, 1] >= 0)).mean()
    assert abs(together - 0.25) < fine(count, 0.5)
    turned = drawn.arguments[drawn.choice == drawn.names.index("Rotate")]
    assert abs((turned > 0).mean() - 0.5) < fine(len(turned), 0.5)
    magnitude = np.abs(turned) / 3
    clipped = np.random.default_rng(0).normal(9, 0.5, 10**6).clip(0, 10)
    assert abs(magnitude.mean() - clipped.mean()) < fine(len(turned), 0.5)
    assert abs(magnitude.std() - clipped.std()) < fine(len(turned), 0.5)


@pytest.mark.parametrize(("mode", "recount"), [("pixel", 1), ("rand", 2), ("const", 3)])
def test_erased_rectangles_are_those_of_timm(mode, recount):
    count, size = 4000, 16
    erasing = build_transform("DIGITS", True, size, reprob=0.5, remode=mode, recount=recount).transforms[-1]
    random.seed(0)
    torch.manual_seed(0)
    expected = erasing(torch.full((count, 3, size, size), 9.0))
    found = torch.full((count, 3, size, size), 9.0)
    for erased in sample_erasing(erasing, SeededRandom(seeds(count)), size, size):
        places = erased.places // size**2, slice(None), erased.places // size % size, erased.places % size
        found[places] = torch.from_numpy(erased.values)
    gone = [(x != 9).all(1).float() for x in (found, expected)]
    for measure in (lambda x: (x.sum((1, 2)) > 0).float(), lambda x: x.mean((1, 2)), lambda x: x[:, 0, 0]):
        a, b = map(measure, gone)
        assert abs(a.mean() - b.mean()) < fine(count, float((a.var() + b.var()) ** 0.5))
    assert ((gone[0].mean(0) - gone[1].mean(0)).abs() < fine(count, 0.5 * 2**0.5)).all()
    values = found[found != 9]
    rectangles = count if mode == "rand" else len(values)  # at least half as many as there are independent numbers
    if mode == "const":
        assert not values.any()
    else:
        assert abs(values.mean()) < fine(rectangles)
        assert abs(values.std() - 1) < fine(rectangles)


def test_random_numbers_are_uniform_and_do_not_repeat():
    bits = SeededRandom(seeds(1000)).bits(100)
    assert len(np.unique(bits)) == bits.size
    numbers = SeededRandom(seeds(1000)).uniform(100)
    assert abs(numbers.mean() - 0.5) < fine(numbers.size, 12**-0.5)
    assert np.abs(np.corrcoef(numbers.T) - np.eye(100)).max() < fine(1000)


# ---------------------------------------------------------------------------------------------------------------------
# What an augmentation depends on
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", None])
def test_an_image_is_augmented_the_same_in_any_batch(aa):
    augment = BatchAugment(build_transform("FMNIST", True, 28, aa=aa, interpolation="random", recount=2))
    x = torch.stack([to_pixels(picture) for picture in pictures(28)] * 40)
    together = augment(x, seeds(len(x)))
    for places in (np.arange(7), np.array([300]), np.arange(0, len(x), 3)[::-1].copy()):
        assert torch.equal(augment(x[places], seeds(len(x))[places]), together[places])


def augmented(batch_size: int, epoch: int = 0, start: int = 0, **process: int) -> torch.Tensor:
    transform = build_transform("DIGITS", True, 8)
    read = SeededDataset(build_dataset("DIGITS", None, True, cache.resize_only(transform))[0])
    cached = cache.load_into_memory(8, CPU, False, read, [(i, 0) for i in range(len(read))], collate_fn=collate)
    sampler = TrainSampler(len(read), batch_size, repeats=3, seed=1, **process)
    sampler.set_position(epoch, start)
    batches = cache.AugmentedBatches(*cached, sampler, batch_size, BatchAugment(transform))
    found = [images for images, _ in batches]
    assert len(found) == len(batches)
    assert {len(images) for images in found} == {batch_size}
    return torch.cat(found)


def test_processes_and_a_resumed_epoch_see_the_images_of_a_whole_one():
    whole = augmented(48)
    assert torch.equal(augmented(48, start=480), whole[480:])
    halves = torch.stack([augmented(24, rank=rank, world_size=2) for rank in range(2)])
    of_step, expected = halves[:, :24].flatten(0, 1), whole[:48]
    assert sorted(map(bytes, of_step.numpy())) == sorted(map(bytes, expected.numpy()))
    assert not torch.equal(augmented(48, epoch=1), whole)


def test_nothing_waits_for_the_device():
    """On the device "meta" there are no pixels to look at."""
    augment = BatchAugment(build_transform("FMNIST", True, 28, interpolation="random", recount=2))
    images = augment(torch.empty(500, 28, 28, 4, dtype=torch.uint8, device="meta"), seeds(500))
    assert images.shape == (500, 3, 28, 28)
    assert images.is_meta
    assert to_device_of(np.arange(3), images).is_meta


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------

LETS = "--src-arch deit_nano_patch8_16_L2_H1 --tgt-arch deit_nano_patch8_16_L4_H2 --log-interval 1"
DIGITS = f"--data-set DIGITS --batch-size 48 --num-workers 0 --warmup-epochs 0 --epochs 2 --lr 5e-3 {LETS}"
MODEL = "deit_nano_patch8_16_L2_H1"
FILES = f"--data-set TINYIMNET --num-workers 0 --warmup-epochs 0 --epochs 1 --model {MODEL} --batch-size 40"
UNUSABLE = {  # options → what the message names
    "--data-set FOLDER --data-path .": ["--data-set FOLDER", "CIFAR10, CIFAR100, TINYIMNET, FMNIST, DIGITS"],
    "--input-size 72": ["--input-size", "64", "72"],
    "--aa augmix-m5": ["--cache-data", "AugMixAugment", "rand-m9"],
    "--aa rand-m9-tweights": ["--cache-data", "weighted", "rand-m9"],
    "--aa 3a": ["--cache-data", "Desaturate", "rand-m9"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("cached")
    options = {f"unusable{i}": (f"{DIGITS} {given}", 1) for i, given in enumerate(UNUSABLE)}
    options |= {
        "whole": (f"{DIGITS} --save-every-steps 11 --keep-checkpoints 9", 1),
        "two": (f"{DIGITS} --batch-size 24 --epochs 1", 2),
        "strict": (f"{FILES} --data-path {tiny_imagenet(out / 'files')}", 1),
        "lenient": (f"{FILES} --data-path {out / 'files'} --skip-bad-images", 1),
    }
    first = {
        name: Run(f"--cache-data {given} --output-dir {out / name}".split(), n) for name, (given, n) in options.items()
    }
    outcomes = run_many(first, out / "first")
    older = sorted((out / "whole").glob("checkpoint*.pth"), key=lambda path: path.stat().st_mtime_ns)
    middle = next(path for path in older if read_checkpoint(path)["position"]["steps"])
    resumed = f"--cache-data {DIGITS} --num-workers 2 --output-dir {out / 'resumed'} --resume {middle}"
    return out, outcomes | run_many({"resumed": Run(resumed.split())}, out / "second")


def tiny_imagenet(folder: Path) -> Path:
    """The one data set of small images that lie in files, two of which are no images."""
    for i, split in [(i, split) for i in range(200) for split in ("train", "val")]:
        path = folder / split / f"c{i:03}" / "0.png"
        path.parent.mkdir(parents=True)
        if (i, split) in ((7, "train"), (9, "val")):
            path.write_bytes(b"no image")
        else:
            Image.new("RGB", (64, 64), (i, i, i)).save(path)
    return folder


def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(runs):
    out, outcomes = runs
    assert [*outcomes["resumed"].codes, *outcomes["whole"].codes] == [0, 0], outcomes["resumed"].stderr
    assert_same_result(out / "resumed", out / "whole")
    assert yaml.safe_load((out / "whole" / "args.yaml").read_text())["cache_data"] is True


def test_two_processes_train(runs):
    outcome = runs[1]["two"]
    assert outcome.codes == [0, 0], outcome.stderr
    assert "epoch 0: test_acc1" in outcome.stdout


def test_images_that_cannot_be_read_are_an_error_or_replaced(runs):
    strict, lenient = runs[1]["strict"], runs[1]["lenient"]
    assert strict.codes == [2]
    assert "c007/0.png" in strict.stderr
    assert "--skip-bad-images" in strict.stderr
    assert lenient.codes == [0], lenient.stderr
    assert "unreadable images: 1 replaced, 1 left out of the test" in lenient.stdout


@pytest.mark.parametrize("number", range(len(UNUSABLE)), ids=[*UNUSABLE])
def test_what_cannot_be_cached_is_said_in_one_sentence(runs, number):
    outcome = runs[1][f"unusable{number}"]
    assert outcome.codes == [2]
    (line,) = outcome.stderr.splitlines()
    assert all(part in line for part in [*UNUSABLE.values()][number]), line


def test_too_little_memory_is_said_with_numbers():
    with pytest.raises(InputError, match=r"--cache-data needs 163840\.0 GB for 10000000000 images of 64×64 .* GB of"):
        cache.check_memory(10**10, 64, CPU)
