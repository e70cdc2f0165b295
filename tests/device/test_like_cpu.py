"""Logits, and a step of training of every kind, against the CPU's in float64: float32 keeps four digits everywhere."""

from collections.abc import Mapping
from typing import NamedTuple

import engine
from training.run import Run as TrainingRun

import pytest
import torch
from conftest import set_up_run
from device.runs import KINDS, copy_of, distance
from torch import Tensor

TOLERANCE = 1e-4  # of the largest element


class Step(NamedTuple):
    """What a step computes, on the CPU in float64."""

    logits: dict[str, Tensor]
    loss: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def step_of(run: TrainingRun, images: Tensor, labels: Tensor, teaching: Tensor) -> Step:
    """A step as `engine.train_one_epoch` makes it."""
    dtype = next(run.model.parameters()).dtype
    images, labels, teaching = images.to(run.device, dtype), labels.to(run.device), teaching.to(run.device, dtype)
    model = run.trained.train()
    if run.supernet is not None:
        run.supernet.drawn = run.sizes_of_step(0, 0)
    outputs = model(images)
    loss = run.criterion(outputs, labels, teaching)
    loss.backward()
    parts = torch.utils._pytree.tree_leaves(outputs)
    gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    kept = [copy_of(tensors) for tensors in (dict(enumerate(parts)), {"loss": loss}, gradients)]
    engine.optimizer_step(model, run.optimizer, run.scaler, run.config.optim.clip_grad, True, False)
    return Step(*kept, copy_of(run.model.state_dict()))


def errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest difference of each tensor, as a share of its largest element."""
    assert found.keys() == expected.keys()
    pairs = {name: (found[name].double(), expected[name].double()) for name in found}
    return {name: ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_cpu(runs, device, kind):
    options = runs.options(kind, "--amp-dtype float32")
    there = set_up_run(options)
    expected = set_up_run([*options, "--device", "cpu"])
    assert distance(copy_of(there.model.state_dict()), copy_of(expected.model.state_dict())) == 0
    expected.trained.double()
    images, labels = next(iter(expected.train_loader))
    teaching = expected.teacher(images)
    found = [step_of(run, images, labels, teaching) for run in (there, expected)]
    for name, a, b in zip(Step._fields, *found, strict=True):
        print(kind, name, sorted(((v,k) for k,v in errors(a, b).items()), reverse=True)[:4])
