#!/usr/bin/env python3
"""Check a device; see `device_check.command_line`, or --help. scripts/check_device.sh finds Python for it."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import console
from device_check.command_line import main

if __name__ == "__main__":
    console.accept_any_text()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends what it has started, too
    sys.exit(main(sys.argv[1:]))
