#!/usr/bin/env bash
# Tunes the model that ships with the package, on this machine: makes .venv, installs, runs.
#
#   bash launch/local.sh [flags of vpo_jax.main]
#   bash launch/local.sh --config=configs/vpo.py:tiny --workdir=runs/try
#
# The same command again continues an interrupted run. Paths are seen from where you are.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    requirements="requirements-cuda12.txt"
elif has_tpu; then
    requirements="requirements-tpu.txt"
else
    requirements="requirements.txt"
fi
make_environment "$root" "$requirements"

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$root/.venv/bin/python" -m vpo_jax.main --config="$root/configs/vpo.py" "$@"
