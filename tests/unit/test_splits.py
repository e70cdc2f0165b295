"""Training on some of the images, choosing on others, and evaluating now and then."""

import json
from collections import Counter
from pathlib import Path

from common.files import read_checkpoint
from datasets import ImageList, build_dataset, build_transform, train_holdout_split
from pipeline.loader import name_of_image, names_digest
from training.build_data import build_sets
from training.command_line import parse_options

import pytest
import torch
from conftest import Run, assert_same_result, run_many
from torch.utils.data import Subset

DIGITS = "--data-set DIGITS --num-workers 0 --batch-size 32"
LETS = "--src-arch deit_nano_patch8_16_L2_H1 --tgt-arch deit_nano_patch8_16_L4_H2 --warmup-epochs 1"
VIT = "deit_nano_patch8_16_L2_H1"
SMALL = f"{DIGITS} --train-images 160 --holdout 100"  # five steps per epoch
RARELY = f"{SMALL} {LETS} --epochs 4 --eval-interval 3 --save-every-steps 2 --keep-checkpoints 10"


def sets_of(options: str):
    config = parse_options(f"{DIGITS} --model {VIT} --input-size 16 {options}".split())
    return build_sets(config.data, config.augment, config.runtime.eval)[:2]


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Which images
# ---------------------------------------------------------------------------------------------------------------------


def test_the_images_are_those_of_every_seed_and_never_in_both_parts():
    train, held_out = sets_of("--train-images 600 --holdout 200 --seed 1")
    others, _ = sets_of("--train-images 600 --holdout 200 --seed 2")
    more, _ = sets_of("--train-images 700")
    rest, _ = sets_of("--holdout 200")
    assert (len(train), len(held_out), len(rest)) == (600, 200, 1237)
    assert train.indices == others.indices
    assert set(train.indices) < set(more.indices)
    assert not set(held_out.indices) & set(train.indices)
    assert set(held_out.indices) | set(rest.indices) == set(range(1437))
    digests = {names_digest(dataset) for dataset in (train, more, rest, held_out)}
    assert names_digest(train) == names_digest(others)
    assert len(digests) == 4


def test_each_class_has_its_share_of_both_parts():
    labels = [0] * 50 + [2] * 30 + [3] * 20  # no image of class 1
    train, held_out = train_holdout_split(labels, 20, 10)
    assert Counter(labels[i] for i in train) == {0: 10, 2: 6, 3: 4}
    assert Counter(labels[i] for i in held_out) == {0: 5, 2: 3, 3: 2}


def test_images_that_are_held_out_are_not_augmented():
    _, held_out = sets_of("--holdout 5")
    expected, _ = build_dataset("DIGITS", None, True, build_transform("DIGITS", False, 16))
    for place, index in enumerate(held_out.indices):
        assert torch.equal(held_out[place][0], expected[index][0])
        assert held_out[place][1] == expected[index][1]


def test_an_unreadable_image_of_a_part_has_its_name():
    files = ImageList([(f"{i}.png", 0) for i in range(4)], ["a"])
    assert name_of_image(Subset(files, [3, 1]), 1) == "1.png"
    train, _ = sets_of("--train-images 3")
    assert name_of_image(train, 2) == f"image {train.indices[2]}"


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("splits")

    def run_all(runs: dict[str, tuple[str, int]], name: str):
        lines = {run: Run(f"{line} --output-dir {out / run}".split(), n) for run, (line, n) in runs.items()}
        return run_many(lines, out / name)

    first = {
        "always": (f"{SMALL} {LETS} --epochs 4", 1),
        "rarely": (RARELY, 1),
        "vit": (f"{SMALL} --model {VIT} --epochs 1", 1),
        "two": (f"{SMALL} --batch-size 16 --model {VIT} --epochs 2 --eval-interval 2 --cache-data", 2),
    }
    outcomes = run_all(first, "first")
    paths = {}
    for path in (out / "rarely").glob("checkpoint*.pth"):
        content = read_checkpoint(path)
        paths[content["epoch"] + 1, content["position"]["steps"]] = path
    weights = out / "vit" / "model.safetensors"
    second = {
        "middle": (f"{RARELY} --num-workers 2 --resume {paths[1, 1]}", 1),
        "boundary": (f"{RARELY} --resume {paths[1, 5]}", 1),
        "finetune": (f"{SMALL} --model {VIT} --finetune {weights} --epochs 1", 1),
        "init": (f"{SMALL} --model {VIT.replace('L2', 'L4')} --init stacking --init-path {weights} --epochs 1", 1),
    }
    outcomes |= run_all(second, "second")
    for name, outcome in outcomes.items():
        assert set(outcome.codes) == {0}, (name, outcome.stderr)
    return out, outcomes, set(paths)


def test_epochs_between_two_evaluations_only_train(runs):
    out, outcomes, _ = runs
    always, rarely = log_of(out / "always"), log_of(out / "rarely")
    assert [line["epoch"] for line in rarely] == [2, 3]
    assert rarely == always[2:]
    assert outcomes["rarely"].stdout.count(": test_acc1") == 2
    assert [line["epoch"] for line in log_of(out / "two")] == [1]


def test_checkpoints_every_n_steps_are_counted_across_epochs(runs):
    # two steps after the last one; after evaluations, at (3, 0) and (4, 0), the count begins anew
    assert runs[2] == {(0, 2), (0, 4), (1, 1), (1, 3), (1, 5), (2, 2), (2, 4), (3, 0), (3, 2), (3, 4), (4, 0)}


@pytest.mark.parametrize("name", ["middle", "boundary"])
def test_a_run_resumed_between_evaluations_is_bit_for_bit_the_undisturbed_one(runs, name):
    assert_same_result(runs[0] / name, runs[0] / "rarely")


def test_the_images_held_out_are_those_evaluated(runs):
    accuracies = [line["test_acc1"] for name in ("always", "two") for line in log_of(runs[0] / name)]
    assert all(round(accuracy, 9).is_integer() for accuracy in accuracies)  # per cent, of a hundred images


def test_what_starts_from_weights_is_evaluated_before_training(runs):
    finetuned, initialised = (log_of(runs[0] / name) for name in ("finetune", "init"))
    assert [line["epoch"] for line in finetuned] == [line["epoch"] for line in initialised] == [-1, 0]
    assert finetuned[0]["test_loss"] == log_of(runs[0] / "vit")[0]["test_loss"]
