from html.parser import HTMLParser

import numpy as np
import pytest

from vpo_jax.evaluation.compare import Comparison, compare_scores
from vpo_jax.report import page
from vpo_jax.report.page import write_report
from vpo_jax.runtime.errors import UserError

PROMPTS = ('<script>alert("1")</script>', "", "a fox 🦊 & 'quotes' " + "word " * 500)
METRICS = [
    {"step": i, "reward/total": 0.1 * i, "eval/win_rate/<x>/y": 0.5, "held_out/j/overall": None, "time/step": 2.0}
    for i in range(5)
]


NAMES = ("<img src=x>/visual_quality", "judge/overall", "judge/speed", "frames/change")


def make_comparison(kept: int = 3, size: int = 8, names: tuple[str, ...] = NAMES) -> Comparison:
    rng = np.random.default_rng(0)
    base = {name: rng.normal(2, 1, (3, 1)).astype(np.float32) for name in names}
    tuned = {name: scores + 1 for name, scores in base.items()}
    videos = rng.integers(0, 256, (kept, 4, size, size, 3), dtype=np.uint8)
    rows = compare_scores(base, tuned, {"judge": "held out", "<img src=x>": "trained"})
    return Comparison(rows, PROMPTS, {"seed": 0, "samples": 1}, base, tuned, videos, videos)


class Reader(HTMLParser):
    """Collects tags, sources and text, and checks that what opens closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_whole_and_prompts_are_shown_as_text(tmp_path):
    write_report(tmp_path / "report.html", make_comparison(), METRICS, {"data": {"prompts": "</pre><script>"}})
    reader = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not reader.open
    assert "script" not in reader.tags
    for prompt in PROMPTS:
        assert not prompt or prompt in reader.words
    assert "(no words)" in reader.words
    assert reader.tags.count("figure") == 3 and reader.tags.count("img") == 6


def test_small_videos_stand_in_the_page_and_nothing_comes_from_elsewhere(tmp_path):
    write_report(tmp_path / "report.html", make_comparison(), METRICS)
    reader = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert all(source.startswith("data:image/webp;base64,") for source in reader.sources)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_large_videos_lie_beside_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "EMBED_BYTES", 10)
    write_report(tmp_path / "report.html", make_comparison(kept=1))
    reader = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert reader.sources == ["samples/base_0000.mp4", "samples/tuned_0000.mp4"]
    assert all((tmp_path / source).stat().st_size > 0 for source in reader.sources)


def test_every_row_and_its_role_are_in_the_table():
    reader = Reader(page.render_page(make_comparison()))
    for word in ("visual_quality", "overall", "speed", "change", "trained", "held out", "measured"):
        assert word in reader.words


def test_motion_is_a_ratio_of_dynamic_degrees_and_never_of_grades():
    assert "of the base's" not in " ".join(Reader(page.render_page(make_comparison())).words)
    names = ("mine/dynamic_degree", "judge/speed")
    words = " ".join(Reader(page.render_page(make_comparison(names=names))).words)
    assert words.count("of the base's dynamic degree (mine)") == words.count("of the base's") == 1


def test_curves_are_drawn_from_metrics_and_gaps_are_passed_over():
    text = page.render_page(make_comparison(), METRICS)
    assert "Combined reward of the rollouts" in text and "Fixed prompts, trained scorers: win rate over base" in text
    assert "Held-out scorers" not in text  # all of its values are None
    assert "The run" not in page.render_page(make_comparison(), [])


def test_a_metric_stands_in_one_chart_only():
    text = page.render_page(make_comparison(), METRICS)
    assert text.count("</i>reward/total</span>") == 1


def test_scores_that_are_not_finite_do_not_break_the_page():
    comparison = make_comparison()
    for scores in (comparison.base_scores, comparison.tuned_scores):
        for values in scores.values():
            values[:] = np.nan
    rows = compare_scores(comparison.base_scores, comparison.tuned_scores)
    comparison = Comparison(rows, *(getattr(comparison, f) for f in list(comparison.__dataclass_fields__)[1:]))
    assert not Reader(page.render_page(comparison)).open


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"report\.html"):
        write_report(tmp_path / "file" / "report.html", make_comparison(kept=0))
