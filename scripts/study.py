#!/usr/bin/env python3
"""Run the trainings of a study; see `study.command_line`, or --help."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import console
from study.command_line import main

if __name__ == "__main__":
    console.accept_any_text()
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before the first run
        sys.exit(128 + signal.SIGINT)
