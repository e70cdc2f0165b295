"""Losses that are not finite: the error, --on-nan skip and --on-nan rollback."""

import math
from collections.abc import Iterable
from contextlib import nullcontext

import engine
import main
import models
import utils
from losses import DistillationLoss
from training.loop import ROLLBACKS, train

import pytest
import torch
from conftest import epochs_of, set_up_run
from torch import nn

DIGITS = "--data-set DIGITS --num-workers 0 --warmup-epochs 0 --device cpu --log-interval 1"
TINY = "deit_nano_patch8_16_L2_H1"


def poisoned_epoch(bad: Iterable[int], count: int = 8, half: bool = False, **kwargs) -> tuple[nn.Module, dict, list]:
    """An epoch of ``count`` batches, in which the images of some are not finite."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 16, 16, generator=generator), torch.arange(4)) for _ in range(count)]
    for i in bad:
        batches[i][0][1] = math.inf
    torch.manual_seed(0)
    model, seen = models.create_model(TINY, num_classes=4), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = DistillationLoss(nn.CrossEntropyLoss(), "none", 0.5, 1.0)
    result = engine.train_one_epoch(
        model, criterion, batches, optimizer, torch.device("cpu"), 3,
        scaler=torch.amp.GradScaler("cpu", enabled=half), autocast=nullcontext(), log_interval=4,
        report=seen.append, **kwargs,
    )  # fmt: skip
    return model, result, seen


def test_the_step_of_a_loss_that_is_not_finite_is_named():
    """Also in a step that is not logged."""
    with pytest.raises(utils.NotFiniteError, match=r"not finite in epoch 3 at step 6, after a loss of \d.*1\.00e-01"):
        poisoned_epoch({5})


@pytest.mark.parametrize("half", [False, True])  # with the scaler of float16, which judges gradients itself
def test_steps_that_are_not_finite_can_be_left_out(half):
    model, result, seen = poisoned_epoch({1, 5, 6}, skip_nan=True, half=half)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert math.isfinite(result["loss"])
    assert [numbers["steps left out"] for numbers in seen] == [1, 2]


def test_leaving_steps_out_ends_where_all_of_them_are():
    with pytest.raises(utils.NotFiniteError, match="not finite in 50 steps in a row in epoch 3 at step 55"):
        poisoned_epoch(range(5, 60), 60, skip_nan=True)
    with pytest.raises(utils.NotFiniteError, match="no loss was finite"):
        poisoned_epoch(range(8), skip_nan=True)


class NotFiniteOnce(nn.Module):
    """A criterion whose loss is not finite in one step of a run."""

    def __init__(self, criterion: nn.Module, step: int):
        super().__init__()
        self.criterion, self.step, self.calls = criterion, step, 0

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.criterion(*args) * (math.nan if self.calls == self.step else 1)


def test_rolling_back_goes_on_after_the_batches_that_led_there(tmp_path, capsys):
    options = f"{DIGITS} --model {TINY} --batch-size 64 --epochs 2 --save-every-steps 10 --on-nan rollback"
    run = set_up_run([*options.split(), "--output-dir", str(tmp_path)])
    run.criterion = NotFiniteOnce(run.criterion, step=15)
    assert train(run) == 0
    said = capsys.readouterr().out
    assert said.count("back to the weights of") == 1
    assert "not finite in epoch 0 at step 15" in said
    assert [line["epoch"] for line in epochs_of(tmp_path)] == [0, 1]
    assert all(math.isfinite(value) for line in epochs_of(tmp_path) for value in line.values())
    assert run.criterion.calls == 44  # no batch twice
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_rolling_back_goes_to_no_other_run(tmp_path, capsys):
    """A folder that holds the checkpoint of an earlier run, and a loss that is not finite before the first of this."""
    options = f"{DIGITS} --model {TINY} --batch-size 64 --epochs 1 --on-nan rollback --output-dir {tmp_path}"
    assert main.main(options.split()) == 0
    run = set_up_run(options.split())
    run.criterion = NotFiniteOnce(run.criterion, step=3)
    with pytest.raises(utils.NotFiniteError, match="at step 3"):
        train(run)
    assert "back to the weights of" not in capsys.readouterr().out


def test_rolling_back_in_vain_stops(tmp_path, capsys):
    options = f"{DIGITS} --model {TINY} --batch-size 64 --epochs 2 --on-nan rollback --output-dir {tmp_path}"
    assert main.main(f"{options} --epochs 1".split()) == 0
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(SystemExit, match="1"):
        main.main(f"{options} --resume auto --lr 1e30 --unscale-lr".split())
    outcome = capsys.readouterr()
    assert outcome.out.count("back to the weights of") == ROLLBACKS
    assert outcome.err.count("error: the loss is not finite in epoch 1") == 1
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
