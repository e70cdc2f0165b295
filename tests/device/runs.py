"""Short runs of every kind on the device under test, in this process, and what can be said about all of them."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median

import main
import models
import training.launch
from training.run import Run as TrainingRun

import pytest
import torch
from conftest import COMPARABLE, epochs_of
from safetensors.torch import load_file
from torch import Tensor

SIZE = 24  # pixels of an image
LEARNGENE, AUX, DES = (f"deit_nano_patch8_{SIZE}_{name}" for name in ("L2_H1", "L4_H2", "L3_H2"))
EPOCHS, BATCH = 2, 16
# Nothing is random but the order of the images and the place of each: runs that compute the same can be compared.
BASE = f"--data-set DIGITS --train-images 96 --holdout 48 --input-size {SIZE} --batch-size {BATCH} --num-workers 0"
BASE += f" --epochs {EPOCHS} --warmup-epochs 0 --unscale-lr --lr 2e-3 --clip-grad 10 --model-ema-decay 0.8 --mixup 0"
BASE += f" --cutmix 0 --aa none --reprob 0 --drop-path 0 --no-repeated-aug --log-interval 3 {COMPARABLE}"
LETS = f"--src-arch {LEARNGENE} --tgt-arch {AUX}"
ELASTIC = f"--src-arch {AUX} --src-path FILES/source --order-images 32 --depth-order output"
TEACHER = "--distillation-type soft --teacher-model test_resnet --teacher-path FILES/teacher/model.safetensors"
SOURCE = "--teacher-model source --distillation-type"
# kind of run → its options, where FILES has what the fixture `files` writes
KINDS = {
    "lets": f"{LETS} {TEACHER}",
    "descendants": f"{LETS} {TEACHER} --descendants 2",
    "tleg": f"--model aux_deit_nano_patch8_{SIZE}_L4 {TEACHER}",
    "elastic": f"{ELASTIC} {SOURCE} soft --order taylor",
    "features": f"{ELASTIC} {SOURCE} feature --order magnitude --descendant-sampling sandwich",
    "stage-2": f"--des-arch {DES} --load-gene FILES/learngene.safetensors {TEACHER}",
    "plain": f"--model test_convnext --input-size 32 {TEACHER}",
}
FLOAT32 = "--amp-dtype float32"


@dataclass(frozen=True)
class Variant:
    """One option more than `BASE` has.

    Attributes:
        drift: the largest `drift` from the run without it; None where it is another run.
        loss: the largest difference of the last epoch's loss, as a share of it.
        on_cpu: the kinds that try it on a CPU, too, unless all cells are asked for.
        common: options that both runs have.
    """

    options: str
    drift: float | None
    loss: float
    on_cpu: tuple[str, ...] = ()
    common: Mapping[str, str] = field(default_factory=dict)


# A CPU gives the same bits in all of these but "accumulated" (1e-5). A GPU adds in another order each time, and AdamW
# makes more of that; a step that is left out, or is half as long, is a drift of 0.05 and more.
SAME = 1e-3
ONE_SIZE = "--descendants 1 --descendant-depths 3 --descendant-heads 1"  # in all batches of a step
CACHE = "--teacher-cache OUT/teacher-cache"
VARIANTS = {
    "bfloat16": Variant("--amp-dtype bfloat16", None, 0.03, ("tleg",)),
    "float16": Variant("--amp-dtype float16", None, 0.05, ("stage-2",)),  # leaves out steps until it has its scale
    "cache-data": Variant("--cache-data", None, 0.1, ("elastic",)),  # moves each image to another place
    "teacher-cache": Variant(CACHE, SAME, SAME, ("lets",)),
    "grad-checkpointing": Variant("--grad-checkpointing", SAME, SAME, ("descendants",)),
    "ema-on-cpu": Variant("--model-ema-force-cpu", SAME, SAME, ("lets",)),
    "accumulated": Variant(
        f"--batch-size {BATCH // 2} --accum-iter 2",
        SAME,
        SAME,
        ("plain",),
        dict.fromkeys(("descendants", "elastic"), ONE_SIZE),
    ),
    "workers": Variant("--num-workers 2", SAME, SAME, ("stage-2",)),
}
# features are too many for --teacher-cache, and their loss is no mean over images
NONE = {("features", "teacher-cache"), ("features", "accumulated")}
CELLS = [cell for cell in product(KINDS, VARIANTS) if cell not in NONE]
NUMBERS = ("train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5", "ema_test_loss", "ema_test_acc1")
STEP_NUMBERS = {f"step/{name}" for name in ("loss", "lr", "gradient norm", "images/s", "waiting for data")}


def cells(*kinds: str) -> list:
    """The cells of some kinds, as parameters of a test; on a CPU ``-m "not full"`` runs few of them."""
    of_kinds = [cell for cell in CELLS if cell[0] in kinds]
    full = [() if kind in VARIANTS[name].on_cpu else pytest.mark.full for kind, name in of_kinds]
    return [pytest.param(*cell, marks=mark) for cell, mark in zip(of_kinds, full, strict=True)]


@dataclass
class Finished:
    """A run that has ended.

    Attributes:
        start: the weights before training, on the CPU.
        epochs: the lines of its log.
        shown: all numbers that it sent to TensorBoard, by name.
    """

    folder: Path
    run: TrainingRun
    start: dict[str, Tensor]
    epochs: list[dict] = field(default_factory=list)
    shown: dict[str, list[float]] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Tensor]:
        return copy_of(self.run.model.state_dict())

    @property
    def average(self) -> dict[str, Tensor]:
        return copy_of(self.run.ema.module.state_dict())

    @property
    def loss(self) -> float:
        return self.epochs[-1]["train_loss"]

    def note(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.shown.setdefault(name, []).append(value)


def copy_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


@contextmanager
def seen_runs() -> Iterator[list[Finished]]:
    """Every run that main.py starts inside, with the weights that it starts from."""
    found, begin = [], training.launch.start

    def start(*args: object) -> TrainingRun:
        run = begin(*args)
        found.append(Finished(run.output_dir, run, copy_of(run.model.state_dict())))
        if run.log is not None:
            run.log.mirror = found[-1].note
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.launch, "start", start)
        patch.setattr("training.logs.EpochLog._draw", lambda log: None)  # a third of the time of a short run
        yield found


class Runs:
    """Runs by kind and options; each is made once."""

    def __init__(self, device: torch.device, files: Path, out: Path):
        """
        Args:
            files: what the options of `KINDS` name.
            out: a folder for what the runs write.
        """
        self.device, self.files, self.out = device, files, out
        self.finished: dict[tuple[str, str], Finished] = {}

    def of(self, kind: str, more: str = FLOAT32) -> Finished:
        """The run of a kind with more options than `BASE`, which has ended well."""
        if (kind, more) not in self.finished:
            options = self.options(kind, f"{more} --output-dir OUT/{kind}-{len(self.finished)}")
            with seen_runs() as found:
                assert main.main(options) == 0
            self.finished[kind, more] = found[0]
            found[0].epochs = epochs_of(found[0].folder)
        return self.finished[kind, more]

    def options(self, kind: str, more: str) -> list[str]:
        line = f"{BASE} {KINDS[kind]} {more} --device {self.device}"
        return line.replace("FILES", str(self.files)).replace("OUT", str(self.out / kind)).split()

    def compare(self, kind: str, variant: Variant) -> tuple[Finished, Finished]:
        """The run of a cell, which is sound, after it has been held against the one without the variant."""
        common = variant.common.get(kind, "")
        base, found = self.of(kind, f"{FLOAT32} {common}"), self.of(kind, f"{FLOAT32} {common} {variant.options}")
        assert_sound(found)
        assert abs(found.loss / base.loss - 1) <= variant.loss
        norms = [median(run.shown["step/gradient norm"]) for run in (found, base)]
        assert 0.5 < norms[0] / norms[1] < 2
        if variant.drift is not None:
            apart = distance(found.start, base.start)  # before the assertion, which would show all weights
            assert apart == 0
            of_weights = drift(found.weights, base.weights, base.start)
            of_average = drift(found.average, base.average, base.start)
            assert max(of_weights, of_average) <= variant.drift
        return found, base


def assert_sound(finished: Finished) -> None:
    """The run has trained, its numbers are there and finite, and the files have what it has trained."""
    trained = [line for line in finished.epochs if line["epoch"] >= 0]
    assert [line["epoch"] for line in trained] == [*range(EPOCHS)]
    assert all(math.isfinite(line[name]) for line in trained for name in NUMBERS)
    of_steps = {name: values for name, values in finished.shown.items() if name.startswith("step/")}
    assert of_steps.keys() >= STEP_NUMBERS
    assert ("step/teacher" in of_steps) == (finished.run.teacher is not None)
    finite = [math.isfinite(value) for name, values in of_steps.items() for value in values if "norm" not in name]
    assert all(finite)
    assert min(of_steps["step/images/s"]) > 0
    assert min(finished.shown["memory"]) > 0
    weights, average, start = finished.weights, finished.average, finished.start
    assert all(tensor.isfinite().all() for tensors in (weights, average) for tensor in tensors.values())
    way_of_average, way_of_weights = distance(average, start), distance(weights, start)
    assert 0 < way_of_average < way_of_weights
    is_aux_net = isinstance(finished.run.model, models.AuxNet)
    stem, left_out = ("learngene", finished.run.model.training_only) if is_aux_net else ("model", ())
    for name, expected in ((stem, weights), (f"{stem}_ema", average)):
        written = load_file(finished.folder / f"{name}.safetensors")
        assert written.keys() == {key for key in expected if key.partition(".")[0] not in left_out}
        assert all(torch.equal(tensor, expected[key]) for key, tensor in written.items())


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The norm of the difference of all weights."""
    assert found.keys() == expected.keys()
    return math.sqrt(sum((found[key].double() - expected[key].double()).square().sum().item() for key in expected))


def drift(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """How far two runs end from each other, as a share of the way that they have trained."""
    return distance(found, expected) / distance(expected, start)
