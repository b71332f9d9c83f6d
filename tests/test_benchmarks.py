import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_throughput_script_measures_every_stage(job, tmp_path):
    output = tmp_path / "throughput.json"
    flags = [flag for flag in job if not flag.startswith("--config.held_out")]
    command = [sys.executable, ROOT / "benchmarks" / "throughput.py", *flags, "--repeats=2", f"--output={output}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result == json.loads(done.stdout)
    assert set(result["median"]) == {"rollout", "score", "pair", "update"}
    assert result["videos"] == 4 and result["videos_per_second"] > 0 and min(result["median"].values()) > 0
