"""Train learngenes, initialise ViTs from them, and train any timm model.

stage 1, LeTs    main.py --src-arch deit_small_patch16_224_L8 --tgt-arch deit_base_patch16_224_L16_H12 …
stage 1, TLEG    main.py --model aux_deit_small_patch16_224 …
stage 2          main.py --des-arch deit_base_patch16_224_L12 --load-gene learngene.safetensors …
anything else    main.py --model resnet18 …           a teacher, or a baseline from scratch
"""

import signal
import sys
from collections.abc import Sequence

from options import option_parser


def main(argv: Sequence[str]) -> int:
    """Do what the command line ``argv`` says, and return the exit status."""
    if {"-h", "--help"} & set(argv):
        option_parser().print_help()
        return 0
    from run import main as run

    return run(argv)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before training, when there is nothing to keep
        sys.exit(128 + signal.SIGINT)
