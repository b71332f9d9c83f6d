"""Files of prompts that no person meant: prompts, or a UserError that names the file; nothing else."""

import json

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vpo_jax.data.prompt_files import ENDINGS, TEXTS, read_prompt_file
from vpo_jax.data.prompts import fingerprint
from vpo_jax.runtime.errors import UserError

WORDS = st.sampled_from(
    ["a cat", "", "0.mp4", '"', ",", "\t", "\r", "\n", "\ud800", "\0", "é", "[", "{", "#", "prompts"]
)
KEYS = st.one_of(st.sampled_from([*TEXTS, "Prompt", "video", "file", "prompts", "id", "negative_prompt"]), WORDS)
VALUES = st.recursive(
    st.one_of(WORDS, st.none(), st.booleans(), st.integers(), st.floats()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
ROWS = st.lists(st.lists(KEYS, min_size=1, max_size=4), max_size=4)
CONTENTS = st.one_of(
    st.binary(max_size=60),
    st.lists(WORDS, max_size=8).map("".join),
    VALUES.map(json.dumps),
    st.lists(VALUES, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows))),
    ROWS.map(lambda rows: "\n".join(",".join(row) for row in rows)),
    ROWS.map(lambda rows: "\n".join("\t".join(row) for row in rows)),
)


@given(content=CONTENTS, ending=st.sampled_from([*ENDINGS, ".JSON", ".md", ""]))
@example(content='{"prompt": {"a": "b", "c": 1}}', ending=".json")
@example(content='{"prompt": ["a"], "caption": ["b"]}', ending=".json")
@example(content='{"": []}', ending=".json")
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_read_or_refused_by_its_name(content, ending, tmp_path):
    path = tmp_path / f"p{ending}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        file = read_prompt_file(path, "data.prompts")
    except UserError as error:
        assert str(error).startswith("data.prompts: ") and path.name in str(error)
        return
    assert len(file.prompts) > 0 and all(isinstance(prompt, str) for prompt in file.prompts)
    assert fingerprint(file.prompts) and (file.names is None or len(file.names) == len(file.prompts))
