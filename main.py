"""Train learngenes, initialise ViTs from them, and train any timm model: ``main.py --help``."""

import signal
import sys
from collections.abc import Sequence

from common import console
from options import option_parser


def main(argv: Sequence[str]) -> int:
    """Do what the command line ``argv`` says, and return the exit status."""
    if {"-h", "--help"} & set(argv):
        option_parser().print_help()
        return 0
    from training.loop import main as run  # torch and timm take seconds to import, for which --help does not wait

    return run(argv)


if __name__ == "__main__":
    console.accept_any_text(ignored=(*console.GONE, *console.FULL))  # a full disk of the log ends no run
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before training, when there is nothing to keep
        sys.exit(128 + signal.SIGINT)
