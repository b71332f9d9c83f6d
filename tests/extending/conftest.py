"""The tiny model, its config and its scorer are those of the tests of training."""

import importlib.util
from pathlib import Path

_PATH = Path(__file__).resolve().parents[1] / "training" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("tiny_for_extending", _PATH)
_TINY = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_TINY)

pipeline, pipeline_of, run = _TINY.pipeline, _TINY.pipeline_of, _TINY.run
configure, toy_reward = _TINY.configure, _TINY.toy_reward
