"""configs/downstream_*.yaml: each fine-tunes a Des-Net on its data set in the layout that people have, in miniature."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline.folders import DOWNLOADS
from training.checks import kind_of_run
from training.command_line import parse_options
from training.config import options_of, resolve
from training.loop import train

import pytest
from conftest import MAIN, epochs_of, set_up_run
from data_layouts import (
    make_cars,
    make_cifar,
    make_flowers,
    make_folder,
    make_food101,
    make_inat19,
    make_tiny_imagenet,
)
from safetensors.torch import load_file
from torchvision import datasets as tv


class Task(NamedTuple):
    """A data set, the number of classes of its miniature, and what makes that."""

    data_set: str
    classes: int
    make: Callable[[Path, pytest.MonkeyPatch], None]


TASKS = {
    "cifar10": Task("CIFAR10", 10, lambda root, patch: make_cifar(root, patch, tv.CIFAR10, 10)),
    "cifar100": Task("CIFAR100", 100, lambda root, patch: make_cifar(root, patch, tv.CIFAR100, 100)),
    "inat19": Task("INAT19", 4, lambda root, _: make_inat19(root)),
    "food101": Task("FOOD101", 101, lambda root, _: make_food101(root)),
    "cars": Task("CARS", 196, lambda root, _: make_cars(root)),
    "flowers": Task("FLOWERS", 102, make_flowers),
    "tiny_imagenet": Task("TINYIMNET", 200, lambda root, _: make_tiny_imagenet(root)),
    "mini_imagenet": Task("MINIIMNET", 100, lambda root, _: make_folder(root, 100)),
}
SMALL = "--device cpu --num-workers 0 --log-interval 1000"


@pytest.fixture(scope="module")
def gene(tmp_path_factory) -> Path:
    """A learngene of ten classes, untrained."""
    folder = tmp_path_factory.mktemp("gene")
    options = f"{SMALL} --model aux_deit_nano_patch8_16_L2_H1 --data-set DIGITS --epochs 0 --output-dir {folder}"
    assert train(set_up_run(options.split())) == 0
    return folder / "learngene.safetensors"


def test_every_config_is_run_here():
    assert {path.stem for path in (MAIN.parent / "configs").glob("downstream_*")} == {f"downstream_{n}" for n in TASKS}


@pytest.mark.parametrize("name", TASKS)
def test_config_trains_on_its_data_set(name, gene, tmp_path, monkeypatch):
    task, out = TASKS[name], tmp_path / "out"
    task.make(tmp_path, monkeypatch)
    batch = 4 if task.classes <= 10 else 32
    options = (
        f"--config /configs/downstream_{name}.yaml --load-gene {gene} --des-arch deit_nano_patch8_16_L3_H1 {SMALL}"
    )
    options += f" --data-path {tmp_path} --output-dir {out} --epochs 1 --batch-size {batch}"
    assert train(set_up_run(options.split())) == 0  # nothing is downloaded: the data are there
    before, after = epochs_of(out)
    assert (before["epoch"], after["epoch"]) == (-1, 0)
    assert math.isfinite(after["train_loss"])
    weights, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    assert weights["head.weight"].shape[0] == config["num_classes"] == len(config["label_names"]) == task.classes


def test_config_gives_the_accuracy_of_a_linear_probe(gene, tmp_path):
    make_folder(tmp_path, 100)
    options = f"--config /configs/downstream_mini_imagenet.yaml --load-gene {gene} --des-arch deit_nano_patch8_16_L3_H1"
    options += f" {SMALL} --data-path {tmp_path} --output-dir {tmp_path}/out --epochs 0 --linear-probe"
    assert train(set_up_run(options.split())) == 0
    (line,) = epochs_of(tmp_path / "out")
    assert line["test_acc1"] > 1.5  # of chance; the colour of an image says its class


@pytest.mark.parametrize("name", TASKS)
def test_config_holds_the_recipe_that_it_names(name):
    config = resolve(parse_options(["--config", f"/configs/downstream_{name}.yaml", "--load-gene", "gene"]))
    options, step = options_of(config), 4 * config.data.batch_size
    fine_grained = name == "inat19"
    expected = dict(
        data_set=TASKS[name].data_set,
        download=TASKS[name].data_set in DOWNLOADS,
        input_size=224,
        sched="cosine",
        warmup_epochs=5,
        aa="rand-m9-mstd0.5-inc1",
        mixup=0.8,
        cutmix=1.0,
        smoothing=0.1,
        repeated_aug=True,
        distillation_type="none",
    )
    if fine_grained:
        expected |= dict(opt="adamw", epochs=360, weight_decay=0.05, reprob=0.1, drop_path=0.1)
    else:
        expected |= dict(opt="sgd", epochs=1000, weight_decay=1e-4, momentum=0.9, reprob=0, drop_path=0)
    assert {**options, **expected} == options
    assert kind_of_run(config.model) == "descend"
    assert (step, options["unscale_lr"]) == (768, False)
    assert options["lr"] * step / 512 == pytest.approx(7.5e-5 if fine_grained else 0.01, rel=1e-3)
