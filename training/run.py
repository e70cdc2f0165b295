"""The state of a run."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import models
import utils
from engine import ALL_PROCESSES, Position
from losses import DistillationLoss, FamilyLoss
from models.vit import FORWARD_AND_BACKWARD
from pipeline.loader import CheckedLoader
from samplers import derived_seed
from training.config import Config
from training.logs import EpochLog, Output, Progress
from training.teacher import Teacher, TeacherCache

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn


@dataclass
class Run:
    """Everything that training and evaluation need. ``model`` is without the wrappers of `trained` and DDP."""

    config: Config
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
    epoch: int  # the current one
    facts: dict[str, object]  # for the model card
    position: Position = field(default_factory=Position)  # in the current epoch
    output: Output = field(default_factory=Output)
    log: EpochLog | None = None
    progress: Progress | None = None
    epochs: list[dict] = field(default_factory=list)  # the lines of log.txt, those of a resumed checkpoint first
    checkpoint: Path | None = None  # the newest one of this run; known to the main process alone
    schedule_lag: int = 1  # DeiT steps the schedule after each epoch; 0 for a run begun when this program did not
    rollbacks: int = 0  # since the newest checkpoint
    supernet: models.Supernet | None = None  # around the model, where descendants are trained
    # what a head is fitted to in each evaluation, where the model has none, or with --linear-probe
    probe_loader: CheckedLoader | None = None
    epoch_macs: list[int] = field(default_factory=list)  # of the epochs that are counted already

    @property
    def trained(self) -> nn.Module:
        """The module that is trained: the model, or the wrapper that samples its descendants."""
        return self.model if self.supernet is None else self.supernet

    @property
    def steps(self) -> int:
        """Batches of each process in a whole epoch."""
        return len(self.train_loader.dataset) // utils.world_size() // self.config.data.batch_size

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps + self.position.steps

    @property
    def epochs_done(self) -> float:
        return self.epoch + self.position.steps / max(1, self.steps)

    @property
    def evaluated_members(self) -> list[models.ViTArch]:
        """The smallest and the largest Des-Net, where they are trained without their Aux-Net; else none."""
        if self.supernet is None or not self.supernet.sampler.alone:
            return []
        archs = self.supernet.sampler.archs
        return [*dict.fromkeys([archs[0], archs[-1]])]

    def sizes_of_step(self, epoch: int, step: int) -> list[models.ViTArch]:
        """The sizes of the Des-Nets that a step trains: the same in all processes, and after a resume."""
        return self.supernet.sampler.draw(epoch, derived_seed(self.config.runtime.seed, epoch, step, ALL_PROCESSES))

    def macs_of_steps(self, epoch: int, steps: range) -> int:
        """Multiply-accumulates of some steps of stage 1, forward and backward, in all processes together.

        Without those of a teacher, and those that compute the weights.
        """
        sampler, arch, shape = self.supernet.sampler, self.model.arch, (self.model.num_classes, self.model.in_chans)
        aux = 0 if sampler.alone else arch.macs(*shape) * len(steps)
        members = sum(sampler.macs[drawn] for step in steps for drawn in self.sizes_of_step(epoch, step))
        return FORWARD_AND_BACKWARD * (aux + members) * self.config.data.batch_size * utils.world_size()

    def macs_of_epochs(self) -> int:
        """`macs_of_steps` of all epochs that are done; it follows from the options, also after a resume."""
        for epoch in range(len(self.epoch_macs), self.epoch):
            self.epoch_macs.append(self.macs_of_steps(epoch, range(self.steps)))
        return sum(self.epoch_macs[: self.epoch])

    def set_learning_rate(self) -> None:
        """Epoch e trains at s(max(e − 1, 0)) of the schedule s, as in the published programs.

        The schedule follows from the epoch and the options of this run, not from those of a run that it resumes.
        """
        self.scheduler.step(max(self.epoch - self.schedule_lag, 0))


def accuracy(epoch: Mapping[str, float]) -> float:
    return epoch["test_acc1"]


def describe(model: nn.Module) -> str:
    return f"{type(model).__name__} with {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters"
