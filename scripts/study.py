#!/usr/bin/env python3
"""The command line of `study.runner`; --help shows what it does."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import console
from study.runner import main

if __name__ == "__main__":
    console.accept_any_text()
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before the first run, when there is nothing to keep
        sys.exit(128 + signal.SIGINT)
