"""Single steps of training of every kind: they compute what the CPU does, and do not wait for the device."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import engine
import main
from common.devices import no_waiting
from device.runs import CACHE, FLOAT32, KINDS, copy_of, distance
from training.run import Run as TrainingRun

import pytest
import torch
from conftest import set_up_run
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# ---------------------------------------------------------------------------------------------------------------------
# The CPU's numbers
# ---------------------------------------------------------------------------------------------------------------------

TOLERANCE = 1e-4  # of the largest element
NEGLIGIBLE = 1e-3  # the largest element of a tensor counts as this share of the largest of all, if it is smaller


class Step(NamedTuple):
    """What a step computes, on the CPU."""

    outputs: dict[int, Tensor]
    loss: dict[int, Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def step_of(run: TrainingRun, images: Tensor, labels: Tensor, teaching: Tensor) -> Step:
    """A step as `engine.train_one_epoch` makes it, in the precision of the weights.

    Args:
        teaching: logits or features of the teacher.
    """
    dtype = next(run.model.parameters()).dtype
    images, labels, teaching = images.to(run.device, dtype), labels.to(run.device), teaching.to(run.device, dtype)
    if run.supernet is not None:
        run.supernet.drawn = run.sizes_of_step(0, 0)
    outputs = run.trained.train()(images)
    loss = run.criterion(outputs, labels, teaching)
    loss.backward()
    gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    found = [copy_of(tensors) for tensors in (dict(enumerate(tree_leaves(outputs))), {0: loss}, gradients)]
    engine.optimizer_step(run.trained, run.optimizer, run.scaler, run.config.optim.clip_grad, True, False)
    return Step(*found, copy_of(run.model.state_dict()))


def assert_like(found: Mapping[object, Tensor], expected: Mapping[object, Tensor], what: str) -> None:
    assert found.keys() == expected.keys()
    largest = {key: tensor.abs().max().double() for key, tensor in expected.items()}
    floor = NEGLIGIBLE * max(largest.values())
    for key, tensor in expected.items():
        error = (found[key].double() - tensor.double()).abs().max() / max(largest[key], floor)
        assert error <= TOLERANCE, f"{what} {key}: {error:.2e} of the largest element"


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_cpu_in_float64(runs, device, kind):
    # AdamW divides gradients by their size, rounding errors of a gradient of 0 as well unless its epsilon is larger
    options = runs.options(kind, f"{FLOAT32} --opt-eps 1e-3")
    ours, reference = set_up_run(options), set_up_run([*options, "--device", "cpu"])
    assert ours.device.type == device.type
    apart = distance(copy_of(ours.model.state_dict()), copy_of(reference.model.state_dict()))
    assert apart == 0
    images, labels = next(iter(reference.train_loader))
    teaching = reference.teacher(images)
    assert_like({0: ours.teacher(images.to(device)).cpu()}, {0: teaching}, "teacher")
    reference.trained.double()
    found, expected = (step_of(run, images, labels, teaching) for run in (ours, reference))
    for name, own, other in zip(Step._fields, found, expected, strict=True):
        assert_like(own, other, name)


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "v0"])
def test_images_of_cached_data_are_those_of_the_cpu(runs, device, aa):
    options = runs.options("plain", f"--cache-data --aa {aa} --reprob 0.5 --train-images 512 --batch-size 64")
    ours, reference = set_up_run(options), set_up_run([*options, "--device", "cpu"])
    for (images, labels), (expected, expected_labels) in zip(ours.train_loader, reference.train_loader, strict=True):
        assert images.device.type == device.type
        assert torch.equal(labels.cpu(), expected_labels)
        difference = (images.cpu() - expected).abs()
        assert (difference > 1e-5).float().mean() < 1e-3  # where rounding decides between two levels
    for (images, labels), (expected, expected_labels) in zip(ours.test_loader, reference.test_loader, strict=True):
        assert torch.equal(labels.cpu(), expected_labels)
        torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Waiting
# ---------------------------------------------------------------------------------------------------------------------

RECIPE = "--mixup 0.8 --cutmix 1 --drop-path 0.1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --log-interval 1000"


class NoReading(TorchFunctionMode):
    """Context in which no tensor is read by the host: what `no_waiting` is on CUDA, for the tensors of any device."""

    READS = ("item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "unique", "equal", "allclose")
    READS += ("is_nonzero", "__bool__", "__float__", "__int__", "__index__", "__contains__")

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if getattr(func, "__name__", "") in self.READS:
            raise AssertionError(f"the host reads a tensor, by {func.__name__}")
        return func(*args, **(kwargs or {}))


class Guard:
    """No waiting within an epoch, but where the engine logs.

    The first epoch is free: some tensors are copied to the device once.

    Attributes:
        epochs: that have been guarded.
        logs: how often the engine was about to wait in them.
    """

    def __init__(self, device: torch.device):
        self.device, self.epochs, self.logs, self.closed = device, -1, 0, False

    def around(self, train_one_epoch: Callable) -> Callable:
        def guarded(model: object, criterion: object, loader: object, *args: object, **kwargs: object) -> object:
            self.epochs += 1
            if self.epochs == 0:
                return train_one_epoch(model, criterion, loader, *args, **kwargs)
            self.closed = True
            try:
                with NoReading(), no_waiting(self.device):
                    return train_one_epoch(model, criterion, Unread(loader), *args, **kwargs)
            finally:
                self.closed = False

        return guarded

    def but_for(self, function: Callable) -> Callable:
        def free(*args: object, **kwargs: object) -> object:
            if not self.closed:
                return function(*args, **kwargs)
            self.logs += 1
            with torch._C.DisableTorchFunction(), may_wait(self.device):
                return function(*args, **kwargs)

        return free


class Unread:
    """A loader whose own tensors, on the host, may be read; it does not wait for the device either."""

    def __init__(self, loader: Iterable):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        with torch._C.DisableTorchFunction():
            batches = iter(self.loader)
        while True:
            with torch._C.DisableTorchFunction():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


@contextmanager
def may_wait(device: torch.device) -> Iterator[None]:
    """Lift `no_waiting`."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")


@pytest.fixture
def guard(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Guard:
    guard = Guard(device)
    monkeypatch.setattr("training.loop.train_one_epoch", guard.around(engine.train_one_epoch))
    for name in ("__init__", "flush", "epoch_mean"):
        monkeypatch.setattr(engine.StepMeter, name, guard.but_for(getattr(engine.StepMeter, name)))
    return guard


ON_CPU = ("descendants", "stage-2")  # the kinds that try it on a CPU, too, unless all tests are asked for


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        *(
            pytest.param(kind, "--amp-dtype float16", marks=() if kind in ON_CPU else pytest.mark.full)
            for kind in KINDS
        ),
        ("lets", f"{FLOAT32} --cache-data --grad-checkpointing --accum-iter 2"),
        ("tleg", f"{FLOAT32} --cache-data {CACHE}"),
        pytest.param("plain", "--num-workers 2", marks=pytest.mark.full),  # in the default precision
    ],
)
def test_no_step_waits_for_the_device(runs, guard, kind, more):
    assert main.main(runs.options(kind, f"{RECIPE} {more}")) == 0
    assert guard.epochs == 1
    assert guard.logs == 3  # at both ends, and the one log at the last step


def test_waiting_is_found(runs, guard, monkeypatch):
    step = engine.optimizer_step

    def waiting_step(*args: object) -> object:
        norm, stepped = step(*args)
        return norm, stepped and bool(next(args[0].parameters()).isfinite().all())

    monkeypatch.setattr(engine, "optimizer_step", waiting_step)
    with pytest.raises((AssertionError, RuntimeError), match=r"the host reads a tensor|synchroniz"):
        main.main(runs.options("stage-2", f"{RECIPE} {FLOAT32}"))
    assert guard.epochs == 1
