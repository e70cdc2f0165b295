#!/usr/bin/env bash
# Makes .venv if it is missing and runs the tests; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# One thread per process: two test processes on two cores are faster than one that shares its work between them.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest --numprocesses auto --dist loadfile "$@"
