#!/usr/bin/env bash
# Does it work on this machine's device, and how fast? Runs the tests of tests/device, the measurements of
# docs/performance.md, and a piece of the study for a GPU, and writes FOLDER/report.md and FOLDER/report.json.
#
# scripts/check_device.sh --minutes 9 --out FOLDER --data-path /path/to/fashion-mnist
# scripts/check_device.sh --small --device cpu --out FOLDER       small sizes, about two minutes on two cores
#
# Nothing is installed or downloaded. Python is $PYTHON, else that of .venv, else python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ ! -x .venv/bin/python ] || python=.venv/bin/python
fi
exec "$python" scripts/check_device.py "$@"
