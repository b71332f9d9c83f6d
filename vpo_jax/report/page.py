"""The report: one HTML page with base and tuned videos side by side, the scores, and the run's curves."""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vpo_jax.evaluation.compare import Comparison, Row, interval, number, percent
from vpo_jax.evaluation.trend import describe_trend, reward_trend
from vpo_jax.report.plots import interval_bar, legend, line_chart
from vpo_jax.report.style import STYLE
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.files import write_text_atomically
from vpo_jax.runtime.video import webp_bytes, write_mp4

# Videos up to this size stand in the page itself, so that it can be sent as one file; larger ones lie beside it.
EMBED_BYTES = 250_000

_ROLE_HELP = {
    "trained": "the model was trained on this score",
    "used for selection": "this score chose the checkpoint or the reference",
    "held out": "this score was used neither for training nor for selection",
    "measured": "raw change between frames, 0 to 255; flicker counts too, so neither more nor less is better",
    "unknown": "it is not known whether the model was trained on this score",
}
# Charts of a run, where metrics.jsonl has the metrics: title, and names or their beginnings.
_CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Combined reward of the rollouts", ("reward/total",)),
    ("Scores of the rollouts", ("reward/",)),
    ("Held-out scorers", ("held_out/",)),
    ("Fixed prompts, trained scorers", ("eval/",)),
    ("Pairs kept", ("pair/kept",)),
    ("Share of pairs that the policy ranks rightly", ("loss/implicit_accuracy",)),
    ("Pairs dropped, by reason", ("pair/dropped",)),
    ("Winner's reward over the loser's", ("pair/margin",)),
    ("Preference loss", ("loss/preference",)),
    ("Change of the errors against the reference", ("loss/winner_error_change", "loss/loser_error_change")),
    ("Relative change of the first winners' error", ("policy/winner_error_change",)),
    ("Distance in weights", ("policy/distance",)),
    ("Gradient norm", ("loss/gradient_norm",)),
    ("Seconds", ("time/",)),
)


def write_report(
    path: str | Path,
    comparison: Comparison,
    metrics: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
    title: str = "Base against tuned",
    fps: int = 8,
) -> None:
    """Writes the page, and videos that are too large to stand in it as mp4 into `samples/` beside it.

    `metrics` are the lines of metrics.jsonl; `config` is shown as it is. All texts are escaped. Raises UserError
    where the page cannot be written.
    """
    path = Path(path)
    page = render_page(comparison, metrics, config, title, _show_videos(path.parent, comparison, fps))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, page)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; choose another folder") from error


def render_page(
    comparison: Comparison,
    metrics: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
    title: str = "Base against tuned",
    videos: Sequence[tuple[str, str]] = (),
) -> str:
    """The page's text. `videos` are (base, tuned) elements, <img> or <video>, of the first prompts."""
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{_summary(comparison)}</p>',
        _cards(comparison.rows),
        _video_section(comparison, videos),
        _table_section(comparison.rows),
        _chart_section(metrics),
        _config_section(comparison, config),
        "<footer>Win rate: share of prompts on which the tuned model's video scores higher than the base model's from "
        "the same initial noise; ties count one half. Intervals: 95 %, bootstrap over prompts.</footer>",
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _summary(comparison: Comparison) -> str:
    count, samples = len(comparison.prompts), int(comparison.settings.get("samples", 1))
    compared = f"{count} prompt{'s' if count != 1 else ''}"
    if samples > 1:
        compared += f", {samples} samples each"
    seed = comparison.settings.get("seed", 0)
    return f"{compared}, the same initial noise for both models (seed {escape(str(seed))})."


def _cards(rows: Sequence[Row]) -> str:
    judged = [row for row in rows if row.role != "measured"]
    cards = []
    for scorer in dict.fromkeys(row.scorer for row in judged):
        own = [row for row in judged if row.scorer == scorer]
        best = next((row for row in own if row.dimension == "overall"), None)
        if best is not None:
            value, what = percent(best.win_rate), f"win rate by {scorer}, overall"
        else:
            better = sum(row.low > 0.5 for row in own)
            worse = sum(row.high < 0.5 for row in own)
            value = f"{better} of {len(own)}"
            what = f"dimensions better by {scorer}" + (f", {worse} worse" if worse else "")
        cards.append(_card(value, f"{what} ({own[0].role})"))
    for row in rows:
        if row.dimension == "dynamic_degree" and row.base_mean > 0:  # grades have no ratio
            cards.append(_card(percent(row.tuned_mean / row.base_mean), f"of the base's dynamic degree ({row.scorer})"))
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(value: str, what: str) -> str:
    return f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>"


def _show_videos(folder: Path, comparison: Comparison, fps: int) -> list[tuple[str, str]]:
    def show(video: np.ndarray, name: str) -> str:
        data = webp_bytes(video, fps)
        if len(data) <= EMBED_BYTES:
            source = base64.b64encode(data).decode()
            return f'<img alt="{name}" src="data:image/webp;base64,{source}">'
        write_mp4(folder / "samples" / f"{name}.mp4", video, fps)
        return f'<video src="samples/{name}.mp4" autoplay loop muted playsinline controls></video>'

    pairs = zip(comparison.base_videos, comparison.tuned_videos, strict=True)
    return [(show(base, f"base_{i:04d}"), show(tuned, f"tuned_{i:04d}")) for i, (base, tuned) in enumerate(pairs)]


def _video_section(comparison: Comparison, videos: Sequence[tuple[str, str]]) -> str:
    if not videos:
        return ""
    figures = []
    for i, (base, tuned) in enumerate(videos):
        prompt = comparison.prompts[i]
        caption = escape(prompt) if prompt.strip() else '<span class="role">(no words)</span>'
        sides = "".join(
            f'<div>{video}<div class="who"><span>{name}</span><span>{_mean_score(scores, i)}</span></div></div>'
            for name, video, scores in (
                ("base", base, comparison.base_scores),
                ("tuned", tuned, comparison.tuned_scores),
            )
        )
        figures.append(f'<figure><div class="two">{sides}</div><figcaption>{caption}</figcaption></figure>')
    shown = next(iter(comparison.base_scores)).split("/")[0]
    return (
        f'<h2>Side by side</h2><p class="note">The first {len(videos)} prompts as they come, not chosen. The number is '
        f'the mean of {escape(shown)}\'s dimensions.</p><div class="videos">{"".join(figures)}</div>'
    )


def _mean_score(scores: Mapping[str, np.ndarray], prompt: int) -> str:
    first = next(iter(scores)).split("/")[0]
    return number(
        float(np.mean([values[prompt, 0] for name, values in scores.items() if name.startswith(first + "/")]))
    )


def _table_section(rows: Sequence[Row]) -> str:
    lines, previous = [], None
    for row in rows:
        judged = row.role != "measured"
        direction = "up" if judged and row.low > 0.5 else "down" if judged and row.high < 0.5 else ""
        lines.append(
            f'<tr class="{"" if row.scorer == previous else "first"}">'
            f"<td>{escape(row.scorer) if row.scorer != previous else ''}</td><td>{escape(row.dimension)}</td>"
            f'<td class="n">{number(row.base_mean)}</td><td class="n">{number(row.tuned_mean)}</td>'
            f'<td class="n {direction}">{row.difference:+.3g}</td>'
            f'<td class="n">{percent(row.win_rate) if judged else ""}</td>'
            f"<td>{interval_bar(row.win_rate, row.low, row.high) if judged else ''}</td>"
            f'<td class="n">{interval(row) + " %" if judged else ""}</td>'
            f'<td class="role" title="{escape(_ROLE_HELP.get(row.role, ""), quote=True)}">{escape(row.role)}</td></tr>'
        )
        previous = row.scorer
    roles = [role for role in _ROLE_HELP if any(row.role == role for row in rows)]
    help_text = " ".join(f"<b>{role}</b>: {_ROLE_HELP[role]}." for role in roles)
    return (
        f'<h2>Scores</h2><p class="note">{help_text}</p><div class="wide"><table><thead><tr>'
        '<th>scorer</th><th>dimension</th><th class="n">base</th><th class="n">tuned</th><th class="n">difference</th>'
        '<th class="n">win rate</th><th>0 to 100 %</th><th class="n">interval</th><th></th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _chart_section(metrics: Sequence[Mapping[str, Any]]) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                series.setdefault(name, []).append((float(line.get("step", 0)), float(value)))
    charts: list[str] = []
    drawn = {"reward/non_finite", "reward/all_non_finite", "time/videos_per_second"}
    for title, beginnings in _CHARTS:
        # A chart of one scale each: win rates are shares, and do not stand beside scores.
        chosen = [name for name in series if name.startswith(beginnings) and name not in drawn]
        drawn.update(chosen)
        shares = [name for name in chosen if "win_rate" in name]
        rest = [name for name in chosen if "win_rate" not in name]
        for part, heading in ((rest, title), (shares, f"{title}: win rate over base")):
            for first in range(0, len(part), 6):
                charts.append(_chart(heading, {name: series[name] for name in part[first : first + 6]}))
    if not charts:
        return ""
    found = reward_trend(metrics)
    said = f"{describe_trend(found).capitalize()}. " if found else ""
    return (
        f'<h2>The run</h2><p class="note">{escape(said)}Over steps. The loss of preference training is a poor progress '
        f'signal; look at rewards and held-out scorers.</p><div class="charts">{"".join(charts)}</div>'
    )


def _chart(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    drawing = line_chart(series)
    return f'<div class="chart"><h3>{escape(title)}</h3>{drawing}{legend(list(series))}</div>' if drawing else ""


def _config_section(comparison: Comparison, config: Mapping[str, Any] | None) -> str:
    shown = {"comparison": dict(comparison.settings)} | ({"config": dict(config)} if config else {})
    text = json.dumps(shown, indent=2, ensure_ascii=False, default=str)
    return f"<details><summary>Settings</summary><pre>{escape(text)}</pre></details>"
