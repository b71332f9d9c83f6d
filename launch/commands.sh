#!/usr/bin/env bash
# Sourced by the launch scripts that call other programs: every command is shown, and with --dry_run only shown.

dry_run="${dry_run:-0}"

die() {
    echo "error: $1" >&2
    exit 2
}

# show COMMAND...: prints it as one line that a shell takes.
show() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
}

# call COMMAND...: shows it on stderr and runs it; with --dry_run shows it on stdout and succeeds.
call() {
    if [ "$dry_run" = 1 ]; then
        show "$@"
    else
        show "$@" >&2
        "$@"
    fi
}

# quoted WORDS...: the words as one string that a remote shell splits again as they were.
quoted() {
    local text
    printf -v text ' %q' "$@"
    printf '%s' "${text# }"
}

# usage FILE: the comment at the top of a script, without its marks.
usage() {
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$1"
}

# generation_of NAME: v4, v5e, v5p, v6e or tpu7x of an accelerator type (v5litepod-16) or a topology (v5e:4x4).
generation_of() {
    case "$1" in
        v4[-:]*) echo v4 ;;
        v5litepod-* | v5lite-* | v5e[-:]*) echo v5e ;;
        v5p[-:]*) echo v5p ;;
        v6e[-:]*) echo v6e ;;
        tpu7x[-:]*) echo tpu7x ;;
        *) die "$1: no TPU that this knows; give v4-8, v5litepod-16, v5p-8, v6e-8 or the like" ;;
    esac
}
