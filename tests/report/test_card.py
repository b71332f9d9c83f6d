import json

import pytest
import yaml

from vpo_jax.report.card import ModelCard, licence_of, read_scores, render, write_card
from vpo_jax.runtime.errors import UserError


def card(base="damo-vilab/text-to-video-ms-1.7b", **changes):
    fields = {"licence": licence_of(base), "step": 3, "weights": "ema", "loading": ["import x"], "config": {"a.b": 1}}
    return ModelCard(base, **{**fields, **changes})


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize(
    ("base", "licence"),
    [
        ("damo-vilab/text-to-video-ms-1.7b", "cc-by-nc-4.0"),
        ("models/zeroscope_v2_576w", "cc-by-nc-4.0"),
        ("VideoCrafter/VideoCrafter2", "apache-2.0"),
        ("somebody/model", ""),
    ],
)
def test_the_header_names_the_licence_of_the_base(base, licence):
    text = render(card(base))
    assert header(text)["license"] == (licence or "other")
    assert ("not for commercial use" in text) == (licence == "cc-by-nc-4.0")
    assert ("look it up" in text) == (not licence)


def test_the_licence_is_what_the_base_s_own_card_says(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags:\n- x\nlicense: mit\n---\nlicense: gpl\n")
    assert licence_of(str(tmp_path)) == "mit"


def test_a_card_shows_steps_scores_settings_and_the_lines_that_load(tmp_path):
    row = {"scorer": "s", "dimension": "visual_quality", "base_mean": 1.5, "tuned_mean": 2.0, "win_rate": 0.75}
    rows = [row, {**row, "dimension": "dynamic_degree", "win_rate": None}]
    (tmp_path / "evaluation.json").write_text(json.dumps({"rows": rows}))
    text = render(card(scores=read_scores(tmp_path)))
    assert "| s/visual_quality | 1.5 | 2 | 0.750 |" in text and "dynamic_degree" not in text
    assert "after 3 steps" in text and "| a.b | `1` |" in text and "import x" in text
    assert read_scores(tmp_path / "elsewhere") == []


def test_a_strange_base_name_stays_one_string_of_the_header():
    name = 'a: "b"/[c]'
    assert header(render(card(name)))["base_model"] == name


def test_an_adapter_s_library_is_peft():
    assert header(render(card(library="peft")))["library_name"] == "peft"
    assert header(render(card()))["library_name"] == "diffusers"


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        write_card(tmp_path / "gone", card())
