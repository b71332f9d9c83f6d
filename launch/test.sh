#!/usr/bin/env bash
# Lint, format, types and tests, on this machine: makes a virtual environment, installs, runs.
#
#   bash launch/test.sh [--dry_run] [arguments of pytest]
#   bash launch/test.sh -m quick                        # without the slow tests: minutes
#   bash launch/test.sh tests/diffusion -k ddim
#   PYTHON=python3.13 bash launch/test.sh               # with another Python, in an environment of its own
#
# Two processes run tests, each a file at a time, in the order of tests/conftest.py: most of the time is compiling, on
# one core. -n 0 runs them in turn.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
# shellcheck source=launch/commands.sh
source "$root/launch/commands.sh"
if [ "${1:-}" = --dry_run ]; then
    dry_run=1
    shift
fi
venv="$(environment_of "$root")"
if [ "$dry_run" = 1 ]; then
    show make_environment "$root" requirements-test.txt
    show cd "$root"
    show "$venv/bin/python" -m ruff check --quiet .
    show "$venv/bin/python" -m ruff format --check .
    show "$venv/bin/python" -m mypy --no-error-summary
    show "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
    exit 0
fi
make_environment "$root" requirements-test.txt

cd "$root"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$root/.jax_cache}"
"$venv/bin/python" -m ruff check --quiet .
"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m mypy --no-error-summary
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
