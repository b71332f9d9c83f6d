#!/usr/bin/env bash
# A run on Google Kubernetes Engine: one JobSet over the hosts of a TPU slice or over GPU nodes, spot unless you say
# otherwise. The cluster has the JobSet controller and the Cloud Storage FUSE driver.
#
#   bash launch/gke.sh COMMAND --name=NAME [options] [-- flags of vpo_jax.main]
#
#   build    builds the image from launch/Dockerfile and pushes it
#   yaml     prints the JobSet
#   apply    creates it in the cluster
#   status   the JobSet, its pods, and the nodes that you pay for
#   logs     follows the log of the first pod
#   delete   deletes the JobSet; its nodes go when the node pool scales down
#
#   --topology=v5e:4x4        v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB, tpu7x:AxBxC, or gpu:NODESxKIND, as gpu:2xh100
#   --image=IMAGE             for instance REGION-docker.pkg.dev/PROJECT/REPOSITORY/vpo_jax:1
#   --bucket=BUCKET           holds the workdir, as BUCKET/runs/NAME
#   --service_account=NAME    of Kubernetes, that may write the bucket (default: default)
#   --namespace=NAMESPACE     (default: default)
#   --max_hours=24            the run is stopped after this time in any case
#   --on_demand               not spot
#   --dry_run                 prints every command and calls none
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/commands.sh
source "$root/launch/commands.sh"

name="" topology=v5e:4x4 image="" bucket="" service_account=default namespace=default max_hours=24 spot=1
command="${1:-}"
case "$command" in
    build | yaml | apply | status | logs | delete) shift ;;
    -h | --help | "") usage "${BASH_SOURCE[0]}" && exit 0 ;;
    *) die "$command: no command; --help lists them" ;;
esac
while [ $# -gt 0 ]; do
    case "$1" in
        --name=*) name="${1#*=}" ;;
        --topology=*) topology="${1#*=}" ;;
        --image=*) image="${1#*=}" ;;
        --bucket=*) bucket="${1#*=}" ;;
        --service_account=*) service_account="${1#*=}" ;;
        --namespace=*) namespace="${1#*=}" ;;
        --max_hours=*) max_hours="${1#*=}" ;;
        --on_demand) spot=0 ;;
        --dry_run) dry_run=1 ;;
        --) shift && break ;;
        *) die "$1: unknown option; flags of vpo_jax.main come after --" ;;
    esac
    shift
done
# JobSet adds to the name to make the pods' host names, which end at 63 letters.
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || die "--name: '$name' is no name; at most 40 of a-z, 0-9 and -"
[[ "$max_hours" =~ ^[1-9][0-9]{0,4}$ ]] || die "--max_hours: '$max_hours' is not a whole number of hours"
bucket="${bucket#gs://}"
bucket="${bucket%/}"
for word in "$image" "$bucket" "$service_account" "$namespace"; do
    [[ "$word" =~ ^[-a-zA-Z0-9._:/@]*$ ]] || die "'$word' has letters that no image, bucket, account or namespace has"
done

# Nodes, what they are called, what one has, and the flags they run with.
shape="${topology#*:}"
if [[ "$topology" =~ ^gpu:([1-9][0-9]*)x(a100|h100|h200|b200)$ ]]; then
    nodes="${BASH_REMATCH[1]}"
    flags=gpu requirements=requirements-cuda12.txt resource=nvidia.com/gpu chips=8
    declare -A kinds=(
        [a100]=nvidia-tesla-a100 [h100]=nvidia-h100-80gb [h200]=nvidia-h200-141gb [b200]=nvidia-b200
    )
    selector="cloud.google.com/gke-accelerator: ${kinds[${BASH_REMATCH[2]}]}"
elif [[ "$topology" =~ ^(v4|v5e|v5p|v6e|tpu7x):[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]]; then
    generation="${BASH_REMATCH[1]}"
    total=$((${shape//x/*}))
    # Slices of v5e and v6e up to 2x4 are one host; every other host has four chips.
    chips=4
    case "$generation" in v5e | v6e) [ "$total" -gt 8 ] || chips="$total" ;; esac
    [ "$total" -ge 4 ] || chips="$total"
    [ $((total % chips)) = 0 ] || die "--topology: $topology is not a whole number of hosts with $chips chips"
    nodes=$((total / chips))
    flags="tpu_${generation#tpu}" requirements=requirements-tpu.txt resource=google.com/tpu
    declare -A kinds=(
        [v4]=tpu-v4-podslice [v5e]=tpu-v5-lite-podslice [v5p]=tpu-v5p-slice [v6e]=tpu-v6e-slice [tpu7x]=tpu7x
    )
    printf -v selector 'cloud.google.com/gke-tpu-accelerator: %s\n                cloud.google.com/gke-tpu-topology: %s' \
        "${kinds[$generation]}" "$shape"
else
    die "--topology: $topology; give v5e:4x4, v5p:2x2x2, v6e:4x4, tpu7x:2x2x1 or gpu:2xh100"
fi

# scalar TEXT: as a YAML string in single quotes.
scalar() {
    printf "'%s'" "${1//\'/\'\'}"
}

yaml() {
    [ -n "$image" ] || die "--image: not given; for instance REGION-docker.pkg.dev/PROJECT/REPOSITORY/vpo_jax:1"
    [ -n "$bucket" ] || die "--bucket: not given; the workdir has to outlive the pods"
    local job
    job="source launch/environment.sh && load_flags launch/flags/$flags.env && exec $(quoted \
        python -m vpo_jax.main "--workdir=/bucket/runs/$name" "$@")"
    [ "$spot" = 0 ] || printf -v selector '%s\n                cloud.google.com/gke-spot: "true"' "$selector"
    # As vpo_jax/runtime/buckets.py mounts: folders can be renamed, and every pod sees what the others wrote.
    local mount_options="implicit-dirs,rename-dir-limit=200000,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"
    cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  namespace: $namespace
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  ttlSecondsAfterFinished: 86400
  network:
    enableDNSHostnames: true
  failurePolicy:
    maxRestarts: 100
    rules:
      # Wrong input (exit code 2) is not retried.
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: vpo
      replicas: 1
      template:
        spec:
          parallelism: $nodes
          completions: $nodes
          completionMode: Indexed
          backoffLimit: 0
          activeDeadlineSeconds: $((max_hours * 3600))
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: vpo
                  operator: In
                  values: [2]
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              restartPolicy: Never
              serviceAccountName: $service_account
              # Seconds between TERM and KILL, in which the run saves.
              terminationGracePeriodSeconds: 120
              nodeSelector:
                $selector
              tolerations:
                - key: cloud.google.com/gke-spot
                  operator: Exists
                - key: nvidia.com/gpu
                  operator: Exists
              containers:
                - name: vpo
                  image: $image
                  command: [bash, -c, $(scalar "$job")]
                  env:
                    - {name: JAX_COORDINATOR_ADDRESS, value: "$name-vpo-0-0.$name:8476"}
                    - {name: JAX_NUM_PROCESSES, value: "$nodes"}
                    - name: JAX_PROCESS_ID
                      valueFrom:
                        fieldRef:
                          fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
                  ports:
                    - containerPort: 8476
                  resources:
                    limits:
                      $resource: $chips
                  volumeMounts:
                    - {name: bucket, mountPath: /bucket}
                    - {name: memory, mountPath: /dev/shm}
              volumes:
                - name: bucket
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: $bucket
                      mountOptions: $mount_options
                - name: memory
                  emptyDir: {medium: Memory}
YAML
}

kubectl=(kubectl "--namespace=$namespace")
case "$command" in
    build)
        [ -n "$image" ] || die "--image: not given"
        call docker build "--file=$root/launch/Dockerfile" "--build-arg=REQUIREMENTS=$requirements" "--tag=$image" "$root"
        call docker push "$image"
        ;;
    yaml) yaml "$@" ;;
    apply)
        text="$(yaml "$@")"
        if [ "$dry_run" = 1 ]; then
            show "${kubectl[@]}" apply --filename=-
            echo "$text"
        else
            call "${kubectl[@]}" apply --filename=- <<<"$text"
            echo "next: bash launch/gke.sh logs|status|delete --name=$name --namespace=$namespace" >&2
        fi
        ;;
    status)
        call "${kubectl[@]}" get jobset "$name"
        call "${kubectl[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name" --output=wide
        call kubectl get nodes --label-columns=cloud.google.com/gke-tpu-topology,cloud.google.com/gke-spot
        ;;
    logs)
        call "${kubectl[@]}" logs --follow --tail=100 \
            "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
        ;;
    delete)
        call "${kubectl[@]}" delete jobset "$name" --ignore-not-found
        echo "what is left:" >&2
        call "${kubectl[@]}" get jobsets
        call kubectl get nodes --label-columns=cloud.google.com/gke-tpu-topology,cloud.google.com/gke-spot
        ;;
esac
