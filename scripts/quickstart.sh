#!/usr/bin/env bash
# Creates .venv if it is missing, then trains two learngenes on handwritten digits and compares the ViTs that are
# initialised from them with the same ViTs from scratch (scripts/quickstart.py). Results: output/quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
exec .venv/bin/python scripts/quickstart.py "$@"
