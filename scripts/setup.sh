#!/usr/bin/env bash
# Make .venv with the pinned requirements and those of EXTRA: EXTRA=test; source scripts/setup.sh
# Seconds when it is already there.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
EXTRA="${EXTRA:-}"
cd "$ROOT"

PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python 3.11 or newer is needed; set PYTHON to one (found: $("$PYTHON" --version 2>&1 || echo none))." >&2
    exit 2
fi
if [ ! -x .venv/bin/python ]; then
    "$PYTHON" -m venv .venv || {
        echo "error: python's venv module is missing; on Debian or Ubuntu: apt-get install python3-venv." >&2
        exit 2
    }
fi
WANTED="$(cat requirements.txt pyproject.toml | sha256sum | cut -d' ' -f1)"
# a stamp per set of extras: what holds an extra holds the plain requirements too
if ! grep -qsx "$WANTED" .venv/installed${EXTRA:+-$EXTRA} $([ -n "$EXTRA" ] || echo .venv/installed-*); then
    echo "Installing the requirements into .venv ..."
    .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt -e ".${EXTRA:+[$EXTRA]}"
    echo "$WANTED" > ".venv/installed${EXTRA:+-$EXTRA}"
fi
export PATH="$ROOT/.venv/bin:$PATH"
