#!/usr/bin/env bash
# Sourced by the launch scripts: makes a virtual environment in the checkout once for each state of its requirements
# and each version of Python.

# version_of PYTHON: prints its version as 3.13; fails where there is none, or none from 3.11 up.
version_of() {
    command -v "$1" >/dev/null 2>&1 &&
        "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2]); raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null
}

# find_python: prints PYTHON where it is set, else the first Python from 3.11 to 3.14 that is found.
find_python() {
    local python
    if [ -n "${PYTHON:-}" ]; then
        if version_of "$PYTHON" >/dev/null; then
            command -v "$PYTHON"
            return
        fi
        echo "error: PYTHON=$PYTHON is not Python 3.11 or newer; set it to another one, or leave it out" >&2
        return 2
    fi
    for python in python3 python3.11 python3.12 python3.13 python3.14; do
        case "$(version_of "$python" || true)" in
            3.11 | 3.12 | 3.13 | 3.14)
                command -v "$python"
                return
                ;;
        esac
    done
    echo "error: no Python 3.11 or newer found; install one, or set PYTHON=/path/to/python" >&2
    return 2
}

# environment_of ROOT: prints the folder of the virtual environment: $ROOT/.venv, or $ROOT/.venv-3.13 where PYTHON is
# set to a Python 3.13 and .venv is of another version. Each version keeps its own, so a change reinstalls nothing.
environment_of() {
    local root="$1" version
    if [ -z "${PYTHON:-}" ]; then
        echo "$root/.venv"
        return
    fi
    version="$(version_of "$(find_python)")" || return 2
    if [ "$(version_of "$root/.venv/bin/python" || true)" = "$version" ]; then
        echo "$root/.venv"
    else
        echo "$root/.venv-$version"
    fi
}

# Whether a TPU is here: /dev/accel* up to v4, and from v5e on a device of Google's bound to vfio.
has_tpu() {
    compgen -G '/dev/accel[0-9]*' >/dev/null ||
        { compgen -G '/dev/vfio/[0-9]*' >/dev/null && grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor; }
}

# make_environment ROOT REQUIREMENTS: environment_of ROOT with REQUIREMENTS installed; nothing to do when it is there
# already.
make_environment() {
    local root="$1" requirements="$2" venv python stamp wanted log
    venv="$(environment_of "$root")" || return
    stamp="$venv/requirements.stamp"
    wanted="$requirements $(cat "$root"/requirements*.txt | cksum)"
    if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && grep -qxF -- "$wanted" "$stamp"; then
        return
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)" || return
        echo "making $venv with $python" >&2
        "$python" -m venv "$venv" || {
            echo "error: $python has no venv module; install it (Debian: python3-venv), or set PYTHON" >&2
            return 2
        }
    fi
    echo "installing $requirements (a few minutes the first time)" >&2
    log="$venv/install.log"
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check -q -r "$root/$requirements" >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "error: $requirements could not be installed; $log has the whole output" >&2
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
