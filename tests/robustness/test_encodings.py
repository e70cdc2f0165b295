"""Output of any text in any encoding, and to pipes that are closed."""

import os
import subprocess
import sys

import pytest
from conftest import MAIN

SCRIPTS = MAIN.parent / "scripts"


@pytest.mark.parametrize(
    "environment",
    [
        *({"PYTHONIOENCODING": name} for name in ("latin-1", "ascii", "cp1252")),
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_help_is_printed_whatever_the_encoding(environment):
    done = subprocess.run([sys.executable, MAIN, "--help"], env={**os.environ, **environment}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"--output-dir" in done.stdout


@pytest.mark.parametrize("redirection", ["| head -c 1", ">&-", "> /dev/full"])
def test_help_that_nobody_can_read(redirection):
    command = f"set -o pipefail; '{sys.executable}' '{MAIN}' --help {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_script_accepts_any_text():
    scripts = [MAIN, *SCRIPTS.glob("*.py"), *MAIN.parent.glob("benchmarks/*.py")]
    programs = [path for path in scripts if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
    assert len(programs) > 10
    for path in programs:
        assert '__main__":\n    console.accept_any_text(' in path.read_text(encoding="utf-8"), path
