#!/usr/bin/env bash
# Makes .venv if it is missing, checks the style, and runs the tests.
#
# scripts/test.sh          every feature but uploads once, in about 9 minutes on two processor cores
# scripts/test.sh --all    all tests, also the long ones: interruption at random moments, hostile files, several hosts
#
# Further arguments go to pytest: scripts/test.sh tests/unit -k lets
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

selected=(-m "not full")
if [ "${1:-}" = --all ]; then
    selected=()
    shift
fi
scripts/setup.sh
# A test drives family.html in a browser; without one it is skipped.
if ! command -v chromium chromium-browser google-chrome google-chrome-stable >/dev/null &&
    [ "$(id -u)" = 0 ] && grep -qx 'ID=debian' /etc/os-release; then
    apt-get update -q && apt-get install -q -y --no-install-recommends chromium
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# One thread per process: two test processes on two cores are faster than one that shares its work between them.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest --numprocesses auto --dist loadfile ${selected[@]+"${selected[@]}"} "$@"
