"""The state of a run."""

import argparse
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import utils
from engine import Position
from losses import DistillationLoss, FamilyLoss
from pipeline.loader import CheckedLoader
from training.logs import EpochLog, Output, Progress
from training.teacher import Teacher, TeacherCache

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Everything that training and evaluation need; the model is the one without wrappers."""

    args: argparse.Namespace
    kind: str
    output_dir: Path | None
    device: torch.device
    autocast: AbstractContextManager
    train_loader: CheckedLoader
    test_loader: CheckedLoader
    classes: list[str]
    model: nn.Module
    ema: ModelEmaV3 | None
    mixup: Mixup | None
    teacher: Teacher | TeacherCache | None
    criterion: DistillationLoss | FamilyLoss
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    epoch: int  # that is trained now, and how far it has come
    facts: dict[str, object]
    position: Position = field(default_factory=Position)
    output: Output = field(default_factory=Output)
    log: EpochLog | None = None
    progress: Progress | None = None
    earlier: list[dict] = field(default_factory=list)  # epochs that the checkpoint has on record
    checkpoint: Path | None = None  # the newest of this run, as far as the main process knows
    schedule_lag: int = 1  # DeiT steps the schedule after each epoch; 0 for a run begun when this program did not
    rollbacks: int = 0  # since that one

    @property
    def steps(self) -> int:
        """CheckedLoader of each process in a whole epoch."""
        return len(self.train_loader.dataset) // utils.world_size() // self.args.batch_size

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps + self.position.steps

    @property
    def epochs_done(self) -> float:
        return self.epoch + self.position.steps / max(1, self.steps)

    def set_learning_rate(self) -> None:
        """Epoch e trains at s(max(e − 1, 0)) of the schedule s, as in the published programs.

        The schedule is a function of the epoch, and of the options of this run rather than those it was begun with.
        """
        self.scheduler.step(max(self.epoch - self.schedule_lag, 0))


def accuracy(epoch: Mapping[str, float]) -> float:
    return epoch["test_acc1"]


def describe(model: nn.Module) -> str:
    return f"{type(model).__name__} with {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters"
