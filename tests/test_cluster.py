"""The scripts for clusters, against programs that only write down how they are called."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from vpo_jax.runtime.buckets import MOUNT_FLAGS

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
HERE = ["--name=try", "--zone=us-west4-a"]
IMAGE = ["--image=eu-docker.pkg.dev/p/r/vpo:1", "--bucket=gs://b/"]
STUB = """#!/usr/bin/env -S python3 -S -E
import json, os, sys
record = {"argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "stdin": sys.stdin.read()}
log = os.environ["STUB_LOG"]
with open(log, "a") as file:
    file.write(json.dumps(record) + "\\n")
words = " ".join(record["argv"])
for pattern, answers in json.loads(os.environ.get("STUB_ANSWERS", "{}")).items():
    if pattern in words:
        count = sum(pattern in " ".join(json.loads(line)["argv"]) for line in open(log)) - 1
        code, text = answers[min(count, len(answers) - 1)]
        print(text, file=sys.stderr if code else sys.stdout)
        raise SystemExit(code)
"""


class Cluster:
    """A checkout's launch folder and a PATH of stubs; `calls` is what the last script called."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        shutil.copytree(LAUNCH, self.root / "launch")
        (self.root / "requirements-cuda12.txt").write_text("# nothing\n")
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("gcloud", "sbatch", "srun", "scontrol", "kubectl", "docker"):
            (self.bin / name).write_text(STUB)
            (self.bin / name).chmod(0o755)
        self.log = folder / "log"
        self.calls: list[list[str]] = []
        self.records: list[dict] = []

    def run(self, script, *arguments, answers=None, **environment):
        self.log.write_text("")
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "VPO_"))} | environment
        env |= {"PATH": f"{self.bin}:{env['PATH']}", "STUB_LOG": str(self.log), "VPO_JAX_POLL": "0"}
        env |= {"STUB_ANSWERS": json.dumps(answers or {})}
        command = ["bash", str(self.root / "launch" / script), *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        self.records = [json.loads(line) for line in self.log.read_text().splitlines()]
        self.calls = [record["argv"] for record in self.records]
        return done

    def called(self, *words):
        return [call for call in self.calls if all(word in call for word in words)]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def remote(calls):
    """The shell commands that ssh was given."""
    return [word.removeprefix("--command=") for call in calls for word in call if word.startswith("--command=")]


def flag(call, name):
    return next((word.partition("=")[2] for word in call if word.startswith(f"--{name}=")), None)


ACTIVE = {"describe": [(0, "WAITING_FOR_RESOURCES"), (0, "ACTIVE")]}


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_create_asks_for_a_spot_tpu_of_the_generation_and_waits_until_it_is_there(cluster, kind, runtime):
    done = cluster.run("tpu_vm.sh", "create", *HERE, f"--type={kind}", "--project=p", answers=ACTIVE)
    assert done.returncode == 0, done.stderr
    (call,) = cluster.called("create")
    assert call[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "try"] and "--spot" in call
    assert flag(call, "accelerator-type") == kind and flag(call, "runtime-version") == runtime
    assert flag(call, "project") == "p" and flag(call, "zone") == "us-west4-a"
    assert len(cluster.called("describe")) == 2


def test_on_demand_is_asked_for_by_name(cluster):
    cluster.run("tpu_vm.sh", "create", *HERE, "--on_demand", answers=ACTIVE)
    assert "--spot" not in cluster.called("create")[0]


def test_a_request_that_fails_is_deleted(cluster):
    done = cluster.run("tpu_vm.sh", "create", *HERE, answers={"describe": [(0, "FAILED")]})
    assert done.returncode == 1 and len(cluster.called("delete", "--force")) == 1


def test_flags_reach_main_as_they_were_typed(cluster, tmp_path):
    flags = ["--config.data.prompts=my prompts.txt", "--config.rollout.negative_prompt=it's $HOME; bad"]
    done = cluster.run("tpu_vm.sh", "run", *HERE, "--type=v5litepod-8", "--bucket=b", "--", *flags)
    assert done.returncode == 0, done.stderr
    (text,) = remote(cluster.calls)
    # What the worker's shell makes of it.
    home = tmp_path / "worker"
    (home / "vpo_jax" / "launch").mkdir(parents=True)
    (home / "vpo_jax" / "launch" / "local.sh").write_text(
        'printf "%s\\n" "$@" >said; echo "$VPO_JAX_FLAGS" >>said; exit 3'
    )
    subprocess.run(["bash", "-c", f"{text}; wait"], cwd=home, check=True)
    said = (home / "vpo_jax" / "said").read_text().splitlines()
    assert said == ["--workdir=bucket/runs/try", *flags, "launch/flags/tpu_v5e.env"]
    assert (home / "vpo_jax" / "run.exit").read_text() == "3\n"


def test_several_workers_need_a_bucket(cluster):
    done = cluster.run("tpu_vm.sh", "run", *HERE, "--type=v5litepod-16")
    assert done.returncode == 2 and "error: --bucket:" in done.stderr and cluster.calls == []


def test_setup_copies_the_checkout_without_its_environment(cluster):
    (cluster.root / ".venv").mkdir()
    done = cluster.run("tpu_vm.sh", "setup", *HERE, "--bucket=b")
    assert done.returncode == 0, done.stderr
    assert cluster.called("scp", "--worker=all") and "--exclude=./.venv" in done.stderr
    assert any(f"gcsfuse {' '.join(MOUNT_FLAGS)} b bucket" in text for text in remote(cluster.calls))


def test_watch_asks_again_for_a_preempted_tpu_and_deletes_it_at_the_end(cluster):
    answers = {
        "describe": [(0, "SUSPENDED"), (0, "ACTIVE")],
        "cat vpo_jax/run.exit": [(1, "no such file"), (0, "0")],
    }
    done = cluster.run("tpu_vm.sh", "watch", *HERE, "--bucket=b", "--", "--config.train.steps=3", answers=answers)
    assert done.returncode == 0, done.stderr
    order = [
        next(w for w in call if w in ("create", "delete", "ssh", "scp", "describe", "list")) for call in cluster.calls
    ]
    assert order.index("delete") < order.index("create") < len(order) - 1 - order[::-1].index("delete")
    assert any("--config.train.steps=3" in text for text in remote(cluster.calls))


def test_watch_deletes_the_tpu_of_a_run_that_failed_and_says_so(cluster):
    answers = {"describe": [(0, "ACTIVE")], "cat vpo_jax/run.exit": [(0, "2")]}
    done = cluster.run("tpu_vm.sh", "watch", *HERE, answers=answers)
    assert done.returncode == 2 and "exit code 2" in done.stderr and cluster.called("delete")


def test_watch_never_deletes_because_the_network_is_down(cluster):
    answers = {"describe": [(1, "network"), (1, "network"), (0, "ACTIVE")], "cat vpo_jax/run.exit": [(0, "0")]}
    done = cluster.run("tpu_vm.sh", "watch", *HERE, answers=answers)
    assert done.returncode == 0 and len(cluster.called("delete")) == 1 and not cluster.called("create")


def test_a_tpu_that_could_not_be_deleted_is_an_error_with_what_is_left(cluster):
    done = cluster.run("tpu_vm.sh", "delete", *HERE, answers={"delete": [(1, "denied")]})
    assert done.returncode == 1 and "may still cost" in done.stderr and len(cluster.called("list")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "--zone=z"], "--name:"),
        (["create", "--name=try"], "--zone:"),
        (["create", "--name=a;b", "--zone=z"], "--name:"),
        (["destroy"], "destroy: no command"),
        (["create", *HERE, "--type=tpu7x-8"], "served by GKE only"),
        (["create", *HERE, "--type=k80-8"], "no TPU that this knows"),
        (["create", *HERE, "--config.seed=1"], "come after --"),
    ],
)
def test_a_wrong_option_calls_nothing(cluster, arguments, message):
    done = cluster.run("tpu_vm.sh", *arguments)
    assert done.returncode == 2 and message in done.stderr and cluster.calls == []


# SLURM.


def job_script(cluster, *arguments, answers=None, **environment):
    """The script as SLURM runs it: a copy, with a job's variables."""
    spool = cluster.bin.parent / "spool"
    spool.mkdir(exist_ok=True)
    (cluster.root / "launch" / "environment.sh").write_text(
        (LAUNCH / "environment.sh").read_text() + "\nmake_environment() { :; }\n"
    )
    shutil.copy(LAUNCH / "slurm.sbatch", spool / "slurm_script")
    original, cluster.root = cluster.root, spool
    (spool / "launch").mkdir(exist_ok=True)
    shutil.move(spool / "slurm_script", spool / "launch" / "slurm_script")
    try:
        return cluster.run(
            "slurm_script", *arguments, answers=answers, SLURM_JOB_ID="7", VPO_JAX_ROOT=str(original), **environment
        )
    finally:
        cluster.root = original


def test_slurm_submits_itself_with_the_options_before_the_flags(cluster):
    done = cluster.run("slurm.sbatch", "--nodes=2", "--", "--workdir=a b")
    assert done.returncode == 0, done.stderr
    (call,) = cluster.calls
    assert call[0] == "sbatch" and call[-3:] == ["--nodes=2", f"{cluster.root}/launch/slurm.sbatch", "--workdir=a b"]
    assert f"VPO_JAX_ROOT={cluster.root}" in flag(call, "export")


def test_the_slurm_header_has_one_task_a_gpu_term_ahead_of_time_and_requeue():
    text = (LAUNCH / "slurm.sbatch").read_text()
    header = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
    assert header["gpus-per-node"] == header["ntasks-per-node"] and header["signal"].startswith("TERM@")
    assert "requeue" in header and header["open-mode"] == "append"
    # sbatch reads no option after the first command.
    assert text.index("#SBATCH --signal") < text.index("\nset -euo")


def test_the_job_runs_main_on_every_task_and_ends_with_its_exit_code(cluster):
    done = job_script(cluster, "--workdir=a b", answers={"srun": [(2, "wrong input")]})
    assert done.returncode == 2, done.stderr
    (call,) = cluster.calls
    assert call[0] == "srun" and "--gpu-bind=none" in call
    assert call[-4:] == ["-m", "vpo_jax.main", f"--config={cluster.root}/configs/vpo.py", "--workdir=a b"]


def test_a_job_whose_run_was_stopped_ahead_of_time_is_requeued(cluster):
    done = job_script(cluster, answers={"srun": [(143, "stopped")]})
    assert done.returncode == 143 and cluster.calls[-1] == ["scontrol", "requeue", "7"]


def test_a_cancelled_job_is_not_requeued(cluster):
    (cluster.bin / "srun").write_text("#!/usr/bin/env bash\nkill -TERM $PPID\nsleep 0.3\nexit 143\n")
    done = job_script(cluster)
    assert done.returncode == 143 and cluster.calls == []


# Kubernetes.


def jobset(cluster, topology, *flags):
    yaml = pytest.importorskip("yaml")
    done = cluster.run("gke.sh", "yaml", "--name=try", *IMAGE, f"--topology={topology}", "--", *flags)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize(
    ("topology", "hosts", "resource", "selector"),
    [
        ("v5e:2x4", 1, {"google.com/tpu": 8}, "tpu-v5-lite-podslice"),
        ("v5e:4x4", 4, {"google.com/tpu": 4}, "tpu-v5-lite-podslice"),
        ("v5p:4x4x4", 16, {"google.com/tpu": 4}, "tpu-v5p-slice"),
        ("v6e:8x8", 16, {"google.com/tpu": 4}, "tpu-v6e-slice"),
        ("gpu:2xh100", 2, {"nvidia.com/gpu": 8}, "nvidia-h100-80gb"),
    ],
)
def test_a_jobset_has_a_pod_for_every_host_of_the_topology(cluster, topology, hosts, resource, selector):
    job = jobset(cluster, topology)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == hosts
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == resource and selector in pod["nodeSelector"].values()
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    bucket = next(volume["csi"]["volumeAttributes"] for volume in pod["volumes"] if volume["name"] == "bucket")
    options = [flag.removeprefix("--").replace("metadata-cache-", "metadata-cache:") for flag in MOUNT_FLAGS]
    options = [o.replace("ttl-secs=", "ttl-secs:") for o in options]
    assert bucket == {"bucketName": "b", "mountOptions": ",".join(options)}
    flags = re.search(r"load_flags (\S+)", container["command"][2])[1]
    assert (ROOT / flags).is_file()


def test_flags_reach_the_pod_as_they_were_typed(cluster):
    flags = ["--config.rollout.negative_prompt=it's: {bad} # $HOME", "--config.seed=1"]
    spec = jobset(cluster, "v5e:4x4", *flags)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    shell, option, text = spec["containers"][0]["command"]
    assert (shell, option) == ("bash", "-c")
    words = shlex.split(text.partition("exec ")[2])
    assert words == ["python", "-m", "vpo_jax.main", "--workdir=/bucket/runs/try", *flags]


def test_apply_gives_the_jobset_to_kubectl(cluster):
    done = cluster.run("gke.sh", "apply", "--name=try", *IMAGE)
    assert done.returncode == 0, done.stderr
    (record,) = cluster.records
    assert record["argv"] == ["kubectl", "--namespace=default", "apply", "--filename=-"]
    assert "kind: JobSet" in record["stdin"]


def test_build_makes_the_image_of_the_topology_and_pushes_it(cluster):
    cluster.run("gke.sh", "build", "--name=try", *IMAGE, "--topology=gpu:1xh100")
    build, push = cluster.calls
    assert "--build-arg=REQUIREMENTS=requirements-cuda12.txt" in build and push == [
        "docker",
        "push",
        flag(IMAGE, "image"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["apply", "--name=try", "--bucket=b"], "--image:"),
        (["apply", "--name=try", "--image=i"], "--bucket:"),
        (["apply", *IMAGE], "--name:"),
        (["apply", "--name=try", *IMAGE, "--topology=v5e:3x5"], "--topology:"),
        (["apply", "--name=try", *IMAGE, "--namespace=a\nb: c"], "letters"),
        (["apply", "--name=try", *IMAGE, "--config.seed=1"], "come after --"),
    ],
)
def test_a_wrong_option_of_gke_calls_nothing(cluster, arguments, message):
    done = cluster.run("gke.sh", *arguments)
    assert done.returncode == 2 and message in done.stderr and cluster.calls == []


def test_gke_delete_shows_what_is_left(cluster):
    cluster.run("gke.sh", "delete", "--name=try")
    assert [call[1:3] for call in cluster.calls[1:]] == [["--namespace=default", "get"], ["get", "nodes"]]


# All of them.

DRY = {
    "tpu_vm.sh": [[c, *HERE, "--bucket=b"] for c in ("up", "watch", "status", "logs", "stop", "fetch", "delete")],
    "slurm.sbatch": [[]],
    "gke.sh": [[c, "--name=try", *IMAGE] for c in ("build", "apply", "status", "logs", "delete")],
    "local.sh": [[]],
    "test.sh": [[]],
}


@pytest.mark.parametrize("script", DRY)
def test_a_dry_run_prints_every_command_and_calls_none(cluster, script):
    for command, *options in DRY[script] if DRY[script] != [[]] else [["--dry_run"]]:
        done = cluster.run(script, command, *options, *(["--dry_run"] if options else []))
        assert done.returncode == 0, done.stderr
        assert cluster.calls == [] and done.stdout.startswith("+ ")
        for line in done.stdout.splitlines():
            if line.startswith("+ "):
                shlex.split(line)


@pytest.mark.parametrize("path", sorted((LAUNCH / "flags").glob("*.env")), ids=lambda path: path.stem)
def test_flag_files_are_plain_and_what_is_set_stays(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[A-Z_]+=[^\"'$`]+", line) for line in lines)
    script = f"source {LAUNCH}/environment.sh; load_flags {path}; env"
    name, _, value = lines[-1].partition("=")
    for set_already, expected in ({}, value), ({name: "mine"}, "mine"):
        env = {"PATH": os.environ["PATH"]} | set_already
        done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
        assert f"{name}={expected}" in done.stdout.splitlines()


def test_every_generation_has_its_flags():
    names = {path.stem for path in (LAUNCH / "flags").glob("*.env")}
    assert names == {"cpu", "gpu", "tpu_v4", "tpu_v5e", "tpu_v5p", "tpu_v6e", "tpu_7x"}


def test_the_image_holds_what_a_run_needs():
    text = (LAUNCH / "Dockerfile").read_text()
    copied = {word for line in text.splitlines() if line.startswith("COPY") for word in line.split()[1:-1]}
    assert {"requirements-cuda12.txt", "configs", "launch", "vpo_jax"} <= copied
    assert all((ROOT / name).exists() for name in copied)
    kept = {line[1:] for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert all(name in kept or "requirements*.txt" in kept for name in copied)


def test_shellcheck_finds_nothing_in_the_batch_script():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", "-x", "launch/slurm.sbatch"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
