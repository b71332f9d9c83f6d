"""FOLDER [PATIENCE]: a cache of encodings as one of several processes; "{}" in FOLDER is the process's number.

Prints what came out as JSON; a UserError goes to stderr, with exit code 2.
"""

import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np

from vpo_jax.data import text_cache
from vpo_jax.families.protocol import Text
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import BATCH, PARAMETER_RULES, constrain, infer_shardings, make_mesh
from vpo_jax.runtime.processes import fetch, free, join_processes, place
from vpo_jax.training.text import TextEncoding

PROMPTS = [f"prompt {i} of {'many' * (i % 3)}" for i in range(11)]
HOST = {"embedding": np.random.default_rng(0).normal(size=(128, 4)).astype(np.float32)}


def tokenize(prompts):
    return np.array([[ord(c) for c in prompt[:20].ljust(20)] for prompt in prompts], np.int32)


@jax.jit
def run(params, ids):
    # A lookup is the same to the bit however the table is sharded.
    text = Text(params["embedding"][ids], ids != ord(" "))
    return jax.tree.map(lambda x: constrain(x, BATCH), text)


def main(folder, patience=30.0):
    join_processes()
    text_cache._PATIENCE = float(patience)
    calls = []

    def encode(params, ids):
        calls.append(isinstance(params["embedding"], jax.core.Tracer))
        return run(params, ids)

    mesh = make_mesh(fsdp=2)
    with jax.set_mesh(mesh):
        params = place(HOST, infer_shardings(HOST, mesh, PARAMETER_RULES))
        encoding = TextEncoding(encode, params, tokenize, 4)
        fresh = fetch(encoding(PROMPTS[4:8]))
        encoding.cache(folder.format(jax.process_index()), [*PROMPTS, *PROMPTS[:2]])
        free(params, HOST)
        cached = fetch(encoding(PROMPTS[4:8]))
        jax.tree.map(np.testing.assert_array_equal, fresh, cached)
    files = sorted(Path(folder.format(jax.process_index())).iterdir())
    contents = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    freed = all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    print(json.dumps({"files": contents, "calls": len(calls), "freed": freed}))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
