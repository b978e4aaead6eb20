#!/usr/bin/env bash
# Run the test suite: bash scripts/test.sh [pytest arguments, e.g. -m quick]
cd "$(dirname "$0")/.."
EXTRA=test
source scripts/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 WANDB_MODE=offline
python -m ruff check .
exec python -m pytest -q -n auto --dist loadfile "$@"
