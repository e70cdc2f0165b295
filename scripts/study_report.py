#!/usr/bin/env python3
"""Write the tables and plots of a study; see `study.report`, or --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import console
from study.report import main

if __name__ == "__main__":
    console.accept_any_text()
    sys.exit(main(sys.argv[1:]))
