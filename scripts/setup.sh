#!/usr/bin/env bash
# Creates .venv in the repository and installs requirements.txt in the tested versions (constraints.txt), unless that is
# done already. The variable PYTHON names the interpreter; default: python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
wanted=$(cat requirements.txt constraints.txt | sha256sum)
if [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ] && .venv/bin/python -c 'import torch' 2>/dev/null; then
    exit 0
fi

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: expected Python 3.10 or newer, but $python is $("$python" --version 2>&1); set PYTHON to another one" >&2
    exit 2
fi
if ! "$python" -c 'import ensurepip' 2>/dev/null; then # Debian keeps it in a package of its own
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -q && apt-get install -q -y python3-venv
    else
        echo "error: $python cannot create virtual environments: sudo apt-get install python3-venv" >&2
        exit 2
    fi
fi

echo "Installing into .venv; torch is a large download."
"$python" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
echo "$wanted" >.venv/installed
