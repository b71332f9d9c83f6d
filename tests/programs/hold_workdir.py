"""Opens the workdir `argv[1]` with the JSON config `argv[2]`, says so and holds it for a minute."""

import json
import sys
import time

from vpo_jax.runtime.workdir import open_workdir

workdir = open_workdir(sys.argv[1], json.loads(sys.argv[2]))
print("held", flush=True)
time.sleep(60)
