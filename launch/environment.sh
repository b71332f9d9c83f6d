#!/usr/bin/env bash
# Sourced by the launch scripts: makes a virtual environment in the checkout once for each state of its requirements.

# A Python from 3.11 up, 3.11 first: it alone has the torch of the parity tests.
find_python() {
    local python
    for python in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$python" ] && command -v "$python" >/dev/null 2>&1 &&
            "$python" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2])' 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    echo "error: no Python 3.11 or newer found; install one, or set PYTHON=/path/to/python" >&2
    return 2
}

# Whether a TPU is here: /dev/accel* up to v4, and from v5e on a device of Google's bound to vfio.
has_tpu() {
    compgen -G '/dev/accel[0-9]*' >/dev/null ||
        { compgen -G '/dev/vfio/[0-9]*' >/dev/null && grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor; }
}

# make_environment ROOT REQUIREMENTS: $ROOT/.venv with REQUIREMENTS installed; nothing to do when it is there already.
make_environment() {
    local root="$1" requirements="$2" python stamp wanted log
    stamp="$root/.venv/requirements.stamp"
    wanted="$requirements $(cat "$root"/requirements*.txt | cksum)"
    if [ -x "$root/.venv/bin/python" ] && [ -f "$stamp" ] && grep -qxF -- "$wanted" "$stamp"; then
        return
    fi
    if ! "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)" || return
        echo "making $root/.venv with $python" >&2
        "$python" -m venv "$root/.venv" || {
            echo "error: $python has no venv module; install it (Debian: python3-venv), or set PYTHON" >&2
            return 2
        }
    fi
    echo "installing $requirements (a few minutes the first time)" >&2
    log="$root/.venv/install.log"
    if ! "$root/.venv/bin/python" -m pip install --disable-pip-version-check -q -r "$root/$requirements" >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "error: $requirements could not be installed; $log has the whole story" >&2
        return 1
    fi
    # One line a requirements file that this environment holds; all go when any of the files changes.
    if [ -f "$stamp" ] && ! grep -qF -- "${wanted#* }" "$stamp"; then
        rm -f "$stamp"
    fi
    echo "$wanted" >>"$stamp"
}

# load_flags FILE: exports the KEY=VALUE lines of a file of launch/flags, but for what is set already.
load_flags() {
    local line key
    [ -f "$1" ] || {
        echo "error: there is no $1; VPO_JAX_FLAGS names a file of launch/flags" >&2
        return 2
    }
    while IFS= read -r line || [ -n "$line" ]; do
        key="${line%%=*}"
        case "$line" in "" | "#"*) continue ;; esac
        [ -n "${!key+set}" ] || export "$key=${line#*=}"
    done <"$1"
}
