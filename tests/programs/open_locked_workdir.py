"""As nobody, opens a workdir inside `argv[1]`/locked and prints the error that this gives."""

import os
import sys
from pathlib import Path

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.workdir import open_workdir

folder = Path(sys.argv[1])
if os.getuid() == 0:
    for path in folder.parents[:3]:
        if path != Path("/tmp"):
            os.chmod(path, 0o755)
    os.setuid(65534)
try:
    open_workdir(folder / "locked" / "run", {})
except UserError as error:
    print(error)
