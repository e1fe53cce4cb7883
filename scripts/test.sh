#!/usr/bin/env bash
# Sets up .venv, then runs the linter, the type checker and all tests, a process to a core.  Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

failed=""
step() {
    echo "== $*"
    "$@" || failed="$failed $1"
}
step ruff check .
step mypy
step pytest -n auto --maxprocesses 4 --dist loadfile "$@"

if [ -n "$failed" ]; then
    echo "FAILED:$failed"
    exit 1
fi
echo "all passed: ruff, mypy, pytest"
