#!/usr/bin/env bash
# Lint, types and tests, on this machine: makes .venv, installs, runs.
#
#   bash launch/test.sh [arguments of pytest]
#   bash launch/test.sh tests/diffusion -k ddim
#
# The parity tests want PyTorch, which needs Python 3.11; on another one they are skipped, with the reason.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
make_environment "$root" requirements-test.txt

cd "$root"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$root/.jax_cache}"
.venv/bin/python -m ruff check --quiet .
.venv/bin/python -m mypy --no-error-summary
exec .venv/bin/python -m pytest "$@"
