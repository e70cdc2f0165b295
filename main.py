"""Train learngenes, initialise ViTs from them, and train any timm model: ``main.py --help``."""

import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common import console
from options import option_parser

if TYPE_CHECKING:
    from training.build_model import Builder
    from training.config import ModelConfig


def main(argv: Sequence[str]) -> int:
    """Do what the command line ``argv`` says, and return the exit status."""
    if {"-h", "--help"} & set(argv):
        option_parser().print_help()
        return 0
    from training.launch import finish, launched, start  # --help does not wait for torch and timm
    from training.loop import evaluate_only, train

    with launched(argv) as config:  # parsed and checked; addresses are downloaded
        run = start(config, builder_of(config.model))
        if config.runtime.eval:
            evaluate_only(run)
            return 0
        status = train(run)
        finish(run, status)
    return status


def builder_of(config: "ModelConfig") -> "Builder":
    """What builds the model. There are three kinds of run, and the options that are given say which is meant.

    Raises:
        InputError: they do not, or contradict each other.
    """
    from training.build_model import build_aux_net, build_des_net, build_plain_model
    from training.checks import PLAIN, STAGE_2, kind_of_run

    kind = kind_of_run(config)
    if kind == STAGE_2:  # --load-gene with --des-arch or --model: a plain ViT, initialised from a learngene
        return build_des_net
    if kind == PLAIN:  # any other --model: a teacher, or a baseline from scratch
        return build_plain_model
    # Stage 1 of a method: an Aux-Net, whose weights are expanded from a learngene in each step; the learngene is saved.
    # Each class of a method says which options ask for it (--src-arch and --tgt-arch: LeTs; --model aux_deit_…: TLEG);
    # --method names any.
    return build_aux_net


if __name__ == "__main__":
    console.accept_any_text(ignored=(*console.GONE, *console.FULL))  # a full disk of the log ends no run
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before training, when there is nothing to keep
        sys.exit(128 + signal.SIGINT)
