"""Runs from Python, without a command line."""

from dataclasses import dataclass

import utils
from training import loop
from training.build_model import Builder
from training.config import Config
from training.launch import check_written, prepare, share_findings
from training.outputs import push
from training.setup import set_up

from torch import nn


@dataclass(frozen=True)
class Result:
    """What a run has trained.

    Attributes:
        model: an Aux-Net after stage 1, else the network itself.
        ema: the same with the averaged weights, or None without them.
        epochs: the lines of log.txt, one for each evaluation.
        status: 0, or 128 + the number of the signal that stopped the run.
    """

    model: nn.Module
    ema: nn.Module | None
    epochs: list[dict[str, float]]
    status: int


def train(config: Config, build: Builder) -> Result:
    """Train a model, as ``main.py`` does with the same options.

    Args:
        build: builds the model: `build_aux_net` (stage 1), `build_des_net` (stage 2) or `build_plain_model`.

    Raises:
        InputError: options or files that cannot be used.
    """
    run = set_up(share_findings(prepare(config)), build)
    status = loop.train(run)
    if status == 0:
        check_written(run)
        if config.output.push_to_hub and utils.is_main():
            push(run)
    return Result(run.model, None if run.ema is None else run.ema.module, run.epochs, status)


def evaluate(config: Config, build: Builder) -> dict[str, float]:
    """Loss and accuracies of a model on the test images, as ``main.py --eval`` prints them.

    Args:
        build: builds the model, as in `train`.

    Raises:
        InputError: options or files that cannot be used.
    """
    config = share_findings(prepare(config.with_options(eval=True)))
    run = set_up(config, build)
    return loop.evaluate_run(run, run.model)
