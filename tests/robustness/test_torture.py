"""Killed at random moments and continued, a run gives what it would have given."""

import re
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, MAIN, SECONDS


@pytest.mark.full
def test_runs_that_are_killed_give_what_they_would_have_given():
    """6 kills, of runs in one process and in two; the script compares log.txt, weights and optimiser bit for bit."""
    command = [sys.executable, MAIN.parent / "scripts" / "torture.py", "--kills", "6", "--seed", "0"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=2 * SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {name: int(count) for count, name in re.findall(r"^ *(\d+) (.*)$", done.stdout, re.MULTILINE)}
    assert counts["kills"] == 6
    assert counts["differences"] == 0
    assert counts["checkpoints read"] > 0
    assert counts["rounds"] >= 1
