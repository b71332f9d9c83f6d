#!/usr/bin/env bash
# Tunes the model that ships with the package, on this machine: makes a virtual environment, installs, runs.
#
#   bash launch/local.sh [--dry_run] [flags of vpo_jax.main]
#   bash launch/local.sh --config=configs/vpo.py:tiny --workdir=runs/try
#
# The same command again continues an interrupted run. Paths are seen from where you are. VPO_JAX_FLAGS names a file
# of launch/flags (a GPU takes gpu.env by itself, a CPU cpu.env); what is set already stays.
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

flags="${VPO_JAX_FLAGS:-}"
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    requirements="requirements-cuda12.txt"
    flags="${flags:-launch/flags/gpu.env}"
elif has_tpu; then
    requirements="requirements-tpu.txt"
else
    requirements="requirements.txt"
    flags="${flags:-launch/flags/cpu.env}"
fi
if [ "$dry_run" = 1 ]; then
    show make_environment "$root" "$requirements"
else
    make_environment "$root" "$requirements"
fi
[ -z "$flags" ] || load_flags "$root/$flags"

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
venv="$(environment_of "$root")"
job=("$venv/bin/python" -m vpo_jax.main "--config=$root/configs/vpo.py" "$@")
if [ "$dry_run" = 1 ]; then
    show "${job[@]}"
else
    exec "${job[@]}"
fi
