#!/usr/bin/env bash
# A run on Cloud TPU VMs, by queued resources, spot unless you say otherwise.
#
#   bash launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [options] [-- flags of vpo_jax.main]
#
#   create   requests the TPU and waits for it
#   setup    copies this checkout to every worker and installs it
#   run      starts the run on every worker, in the background
#   up       create, setup and run
#   watch    waits for the end, requests a preempted TPU again and continues the run; then fetch and delete
#   status   the state of the request, and every TPU of the zone that you pay for
#   logs     follows the log of worker 0
#   stop     sends TERM to the run, which saves and exits; the TPU stays and costs money
#   fetch    copies the workdir's report, samples and export from worker 0 to runs/NAME
#   delete   deletes the TPU and its request, and shows what is left in the zone
#
#   --type=v5litepod-16       accelerator type: v4-N, v5litepod-N, v5p-N, v6e-N
#   --project=PROJECT         (default: gcloud's)
#   --on_demand               not spot
#   --runtime=VERSION         of the VM image (default: by type)
#   --valid_for=6h            the request is given up when there is no TPU within this time
#   --bucket=BUCKET           holds the workdir, as BUCKET/runs/NAME: workers share it, and it survives preemption
#   --service_account=EMAIL   of the workers, to read and write buckets
#   --dry_run                 prints every command and calls none
#
# A TPU costs money until it is deleted: end with `watch` or `delete`.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/commands.sh
source "$root/launch/commands.sh"

name="" zone="" type=v5litepod-16 project="" runtime="" valid_for=6h service_account="" bucket="" spot=1
# Seconds between two checks of the request or the run.
poll="${VPO_JAX_POLL:-30}"
remote=vpo_jax

command="${1:-}"
case "$command" in
    create | setup | run | up | watch | status | logs | stop | fetch | delete) shift ;;
    -h | --help | "") usage "${BASH_SOURCE[0]}" && exit 0 ;;
    *) die "$command: no command; --help lists them" ;;
esac
while [ $# -gt 0 ]; do
    case "$1" in
        --name=*) name="${1#*=}" ;;
        --zone=*) zone="${1#*=}" ;;
        --type=*) type="${1#*=}" ;;
        --project=*) project="${1#*=}" ;;
        --runtime=*) runtime="${1#*=}" ;;
        --valid_for=*) valid_for="${1#*=}" ;;
        --service_account=*) service_account="${1#*=}" ;;
        --bucket=*) bucket="${1#*=}" ;;
        --on_demand) spot=0 ;;
        --dry_run) dry_run=1 ;;
        --) shift && break ;;
        *) die "$1: unknown option; flags of vpo_jax.main come after --" ;;
    esac
    shift
done
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] || die "--name: '$name' is no name; small letters, digits and -"
[ -n "$zone" ] || die "--zone: not given; for instance --zone=us-west4-a"
generation="$(generation_of "$type")"
[[ "$type" =~ -[1-9][0-9]*$ ]] || die "--type: $type does not end in a number"
case "$generation" in
    v4) image=tpu-ubuntu2204-base ;;
    v5e) image=v2-alpha-tpuv5-lite ;;
    v5p) image=v2-alpha-tpuv5 ;;
    v6e) image=v2-alpha-tpuv6e ;;
    *) die "--type: $type is served by GKE only; see launch/gke.sh" ;;
esac

bucket="${bucket#gs://}"
bucket="${bucket%/}"
workdir="runs/$name"
[ -z "$bucket" ] || workdir="bucket/runs/$name"

where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")
tpus=(gcloud compute tpus)

# on WORKERS COMMAND: runs a shell command there.
on() {
    call "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}

# The request's state; GONE where there is none, UNREACHABLE where gcloud gives no answer.
state() {
    local text
    if text="$("${tpus[@]}" queued-resources describe "$name" "${where[@]}" "--format=value(state.state)" 2>&1)"; then
        tail -n 1 <<<"$text"
    elif grep -qi "not.found" <<<"$text"; then
        echo GONE
    else
        echo UNREACHABLE
    fi
}

create() {
    local request=(
        "${tpus[@]}" queued-resources create "$name" "--node-id=$name" "${where[@]}" "--accelerator-type=$type"
        "--runtime-version=${runtime:-$image}" "--valid-until-duration=$valid_for"
    )
    [ "$spot" = 0 ] || request+=(--spot)
    [ -z "$service_account" ] || request+=("--service-account=$service_account")
    call "${request[@]}"
    [ "$dry_run" = 0 ] || return 0
    local now="" last=""
    while true; do
        now="$(state)"
        [ "$now" = "$last" ] || echo "$name: $now" >&2
        case "$now" in
            ACTIVE) return 0 ;;
            FAILED | SUSPENDED | SUSPENDING)
                echo "error: $name is $now; its request is deleted" >&2
                delete || true
                return 1
                ;;
        esac
        last="$now"
        sleep "$poll"
    done
}

# As vpo_jax/runtime/buckets.py mounts: folders can be renamed, and every worker sees what the others wrote.
gcsfuse_flags="--implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0"
google=https://packages.cloud.google.com/apt
key=/usr/share/keyrings/cloud.google.asc
install_gcsfuse="command -v gcsfuse >/dev/null || { curl -fsSL $google/doc/apt-key.gpg | sudo tee $key >/dev/null \
&& echo \"deb [signed-by=$key] $google gcsfuse-\$(lsb_release -cs) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list \
&& sudo apt-get -q update && sudo apt-get -q -y install gcsfuse; }"

setup() {
    local archive
    archive="$(mktemp -d)/vpo_jax.tar.gz"
    call tar -czf "$archive" -C "$root" --exclude='./.git' --exclude='./.venv*' --exclude='./runs' \
        --exclude='__pycache__' --exclude='./.*_cache' .
    call "${tpus[@]}" tpu-vm scp "$archive" "$name:vpo_jax.tar.gz" "${where[@]}" --worker=all
    rm -rf "$(dirname "$archive")"
    # The images bring Python 3.10.
    on all "command -v python3.11 >/dev/null || { sudo apt-get -q update && sudo apt-get -q -y install python3.11-venv; }"
    on all "mkdir -p $remote && tar -xzf vpo_jax.tar.gz -C $remote && bash $remote/launch/local.sh --help >/dev/null"
    if [ -n "$bucket" ]; then
        on all "$install_gcsfuse"
        on all "cd $remote && mkdir -p bucket && { mountpoint -q bucket || gcsfuse $gcsfuse_flags $bucket bucket; }"
    fi
}

run() {
    # A v4 or v5p type counts cores, two a chip; a host has four chips (a v5e or v6e slice of eight is one host).
    local number="${type##*-}" chips=4
    case "$generation" in v4 | v5p) number=$((number / 2)) ;; *) [ "$number" != 8 ] || chips=8 ;; esac
    if [ "$number" -gt "$chips" ] && [ -z "$bucket" ]; then
        die "--bucket: $type has several workers, and they need a workdir that all of them see"
    fi
    local flags="launch/flags/tpu_$generation.env" line
    line="$(quoted bash launch/local.sh "--workdir=$workdir" "$@")"
    on all "cd $remote && rm -f run.exit && { VPO_JAX_FLAGS=$flags nohup bash -c $(quoted \
        "$line; echo \$? >run.exit") >>run.log 2>&1 </dev/null & }"
    [ "$dry_run" = 1 ] || echo "running; next: bash launch/tpu_vm.sh logs|watch|delete --name=$name --zone=$zone" >&2
}

fetch() {
    call mkdir -p "$root/runs/$name"
    local part
    for part in metrics.jsonl config.json report.html samples export; do
        call "${tpus[@]}" tpu-vm scp --recurse "$name:$remote/$workdir/$part" "$root/runs/$name/" \
            "${where[@]}" --worker=0 || echo "warning: there is no $part" >&2
    done
}

delete() {
    local code=0
    call "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet || code=$?
    [ "$code" = 0 ] || echo "error: $name could not be deleted and may still cost; see what is left" >&2
    echo "what is left in $zone:" >&2
    left
    return "$code"
}

left() {
    call "${tpus[@]}" queued-resources list "${where[@]}"
    call "${tpus[@]}" tpu-vm list "${where[@]}"
}

watch() {
    if [ "$dry_run" = 1 ]; then
        show "${tpus[@]}" queued-resources describe "$name" "${where[@]}" "--format=value(state.state)"
        on 0 "cat $remote/run.exit"
        fetch
        delete
        return
    fi
    local code
    while true; do
        case "$(state)" in
            SUSPENDED | SUSPENDING | FAILED | GONE)
                echo "$name was preempted: asking again" >&2
                [ -n "$bucket" ] || echo "warning: without --bucket the run starts from the beginning" >&2
                delete || true
                until create; do sleep "$poll"; done
                setup
                run "$@"
                ;;
            ACTIVE)
                code="$("${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=0 \
                    "--command=cat $remote/run.exit" 2>/dev/null || true)"
                if [ "$code" = 143 ]; then
                    # A preemption sends TERM first and then deletes the TPU; else a person stopped the run.
                    sleep "$((2 * poll))"
                    [ "$(state)" = ACTIVE ] || continue
                fi
                if [ -n "$code" ]; then
                    [ "$code" = 0 ] || on 0 "tail -n 40 $remote/run.log" || true
                    fetch
                    [ "$code" = 0 ] || echo "error: the run ended with exit code $code" >&2
                    delete
                    return "$code"
                fi
                ;;
        esac
        sleep "$poll"
    done
}

case "$command" in
    create) create ;;
    setup) setup ;;
    run) run "$@" ;;
    up)
        create
        setup
        run "$@"
        ;;
    watch) watch "$@" ;;
    status)
        call "${tpus[@]}" queued-resources describe "$name" "${where[@]}"
        left
        ;;
    logs) on 0 "tail -n 100 -F $remote/run.log" ;;
    # The shell that writes run.exit stays; main, its grandchild, gets the signal.
    stop) on all "pkill -TERM -f '[v]po_jax.main' || true" ;;
    fetch) fetch ;;
    delete) delete ;;
esac
