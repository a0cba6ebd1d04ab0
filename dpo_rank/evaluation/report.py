"""An evaluation as files: a page that a person reads, JSON with every number, a summary for a pull request, scores of each row."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_rank.data.formats import Example
from dpo_rank.errors import MissingExtraError
from dpo_rank.evaluation import style
from dpo_rank.evaluation.evaluate import Evaluation
from dpo_rank.evaluation.intervals import Figure
from dpo_rank.files import appearing

if TYPE_CHECKING:
    from dpo_rank.ranker import TokenContribution

Explain = Callable[[Example, int], "Sequence[TokenContribution]"]
OURS, GREY, RED = "#1f6f54", "#9aa3a0", "#b23b3b"
_WORST = 8
_SHOWN = 600

STYLE = """
:root { --ink: #1c2422; --soft: #5c6865; --line: #dfe5e3; --ours: #1f6f54; --card: #ffffff; --page: #f5f7f6; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: .75rem 0; }
.headline { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; align-items: baseline; }
.big { font-size: 2.6rem; font-weight: 650; color: var(--ours); line-height: 1; }
.warn { border-left: 4px solid #c98a1b; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; overflow-wrap: anywhere; }
tr.ours td { font-weight: 650; color: var(--ours); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: .75rem; }
.plots figure { margin: 0; max-width: 36rem; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: var(--soft); }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .75rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; background: var(--page); border-radius: .35rem; padding: .6rem; }
details > summary { cursor: pointer; font-weight: 600; }
code { font-size: .85rem; overflow-wrap: anywhere; }
"""


def write_report(found: Evaluation, directory: str | os.PathLike[str], explain: Explain | None = None, command: str = "") -> Path:
    """Write ``index.html``, ``report.json``, ``summary.md`` and ``scores.jsonl``; each appears complete or not at all.

    Args:
        found: what was measured.
        directory: made where it is missing.
        explain: each token's part in the score of one candidate of a row, to shade the worst disagreements.
        command: what was run, for the page.

    Returns:
        the page.

    Raises:
        MissingExtraError: matplotlib is not installed.

    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    page = render(found, explain, command)
    _write(root / "report.json", json.dumps(finite(found.to_dict()), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    _write(root / "summary.md", summary(found))
    _write(root / "scores.jsonl", "".join(_row_lines(found)))
    _write(root / "index.html", page)
    return root / "index.html"


def _write(path: Path, text: str) -> None:
    with appearing(path) as file:
        file.write(text)
    path.chmod(0o644)


def finite(value: Any) -> Any:
    """``value`` with numbers that JSON does not know as null."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _row_lines(found: Evaluation) -> Iterator[str]:
    """One JSON object a row: where it stands, labels and scores, and whether the order was right."""
    for example, scores, agreement in zip(found.examples, found.scores, found.reports[0].values, strict=True):
        entry = {"where": example.where, "labels": example.scores, "scores": [float(s) for s in scores], "agreement": float(agreement)}
        yield json.dumps(entry, ensure_ascii=False) + "\n"


# -- words -------------------------------------------------------------------------------------------------------------


def headline(found: Evaluation) -> str:
    """The one sentence that matters."""
    mine = found.reports[0].agreement
    rules = [(c, r) for c, r in zip(found.comparisons, found.reports[1:], strict=True) if r.name in ("longest", "shortest")]
    words = (
        f"{found.name} agrees with the labels in {mine.value:.1%} of pairs ({mine.low:.1%} to {mine.high:.1%}, {mine.num_prompts} prompts)"
    )
    if not rules:
        return words + "."
    against, rule = max(rules, key=lambda pair: pair[1].agreement.value)
    gap = against.agreement
    if not gap.excludes_zero:
        verdict = "cannot be told from it"
    else:
        verdict = f"is {'above' if gap.value > 0 else 'below'} it by {abs(gap.value):.1%} ({gap.low:+.1%} to {gap.high:+.1%})"
    return f"{words}; the rule '{rule.name}' gets {rule.agreement.value:.1%}, and the ranker {verdict}."


def summary(found: Evaluation) -> str:
    """A short page in Markdown, for a pull request."""
    lines = [f"## {found.name} on `{Path(found.source).name}`", "", headline(found), ""]
    lines += [f"> {text}" for text in found.warnings] + ([""] if found.warnings else [])
    lines += ["| ranker | pairs in order (95 %) | difference (95 %) | ms a prompt |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in _ranker_rows(found)]
    lines += ["", f"Style: {found.length.verdict}. Length explains {found.explained['length']:.0%} of the scores' variance.", ""]
    if found.sureness:
        sure = found.sureness
        lines += [
            f"Calibration error {sure.stored.ece.value:.3f} at the stored temperature ({sure.stored.temperature:.3g}); a perfectly "
            f"calibrated model would show {sure.stored.ece_of_perfect:.3f} with this many pairs.",
            "",
        ]
    if found.published:
        lines += ["| benchmark | figure |", "|---|---|", *(f"| {name} | {value:.3f} |" for name, value in found.published.items()), ""]
    lines += [f"Data `{found.facts.get('data_sha256') or 'not a file'}`, artifact `{found.facts.get('artifact', 'none')}`."]
    return "\n".join(lines) + "\n"


def _ranker_rows(found: Evaluation) -> list[list[str]]:
    """Name, agreement, difference and time of every ranker, what was not run among them."""
    reports = {report.name: report for report in found.reports}
    against = {c.second: c for c in found.comparisons}
    rows = []
    for item in found.scored:
        if item.problem is not None:
            rows.append([item.name, f"not run: {item.problem}", "", ""])
            continue
        gap = against.get(item.name)
        time = "" if item.ms_a_prompt is None else f"{item.ms_a_prompt:.1f}" if item.ms_a_prompt >= 0.1 else "< 0.1"
        rows.append([item.name, str(reports[item.name].agreement), "" if gap is None else _signed(gap.agreement), time])
    return rows


def _signed(gap: Figure) -> str:
    return f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"


# -- the page ----------------------------------------------------------------------------------------------------------


def render(found: Evaluation, explain: Explain | None = None, command: str = "") -> str:
    """The page as HTML that needs nothing else.

    Raises:
        MissingExtraError: matplotlib is not installed.

    """
    mine = found.reports[0]
    parts = [
        f"<h1>{_e(found.name)}</h1><p class=soft>on {_e(found.source)}</p>",
        f"<div class=card><div class=headline><span class=big>{mine.agreement.value:.1%}</span>"
        f"<span>of labelled pairs in the labels' order<br><span class=soft>95 % interval {mine.agreement.low:.1%} to "
        f"{mine.agreement.high:.1%}, {mine.agreement.num_prompts} prompts</span></span></div><p>{_e(headline(found))}</p></div>",
        *(f"<div class='card warn'>{_e(text)}</div>" for text in found.warnings),
        "<h2>Beside what could embarrass it</h2>",
        "<p class=soft>The difference is paired, prompt by prompt: positive where the ranker is ahead. Where its interval holds 0 the two "
        "cannot be told apart on these rows.</p>",
        _table(["ranker", "pairs in order (95 %)", "the ranker's lead (95 %)", "ms a prompt"], _ranker_rows(found), ours=0),
        _plots([_of_rankers(found)]),
    ]
    if found.published:
        rows = [[name, f"{value:.1%}"] for name, value in found.published.items()]
        parts += ["<h2>The benchmark's own figures</h2>", _table(["part", "figure"], rows, ours=0)]
    if mine.measures:
        names = [report.name for report in found.reports]
        rows = [[name, *(f"{r.measures[name].value:.3f}" for r in found.reports)] for name in mine.measures]
        parts += [
            "<h2>Lists</h2>",
            f"<p class=soft>{mine.measures['regret'].num_prompts} prompts with three answers or more.</p>",
            _table(["measure", *names], rows),
            _plots([_of_curve(found)] if found.reports[0].curve else []),
        ]
    parts += ["<h2>Where</h2>", _plots([_of_slices(key, groups) for key, groups in mine.slices.items()]) if mine.slices else ""]
    parts += _style_section(found)
    parts += _sure_section(found)
    if found.people:
        people = found.people
        rows = [["with the majority", str(people.majority)], ["with one annotator", str(people.each)]]
        rows += [["an annotator with the majority of the others", str(people.ceiling)]] if people.ceiling else []
        rows += [["Krippendorff's alpha of the annotators", f"{people.alpha:.3f}"]]
        parts += ["<h2>Among people</h2>", _table(["agreement", "value (95 %)"], rows)]
    if found.movements:
        rows = [[m.name, f"{m.moved:.3f}", f"{m.promoted:+.2f}", f"{m.same_best:.0%}"] for m in found.movements]
        parts += [
            "<h2>Changes that should not matter</h2>",
            f"<p class=soft>{found.movements[0].num_prompts} prompts. Movement in standard deviations of a prompt's scores; promoted: "
            "share of dressed answers that rose in place minus that which fell.</p>",
            _table(["change", "moved", "promoted", "same best"], rows),
        ]
    parts += _worst_section(found, explain)
    facts = [[name, json.dumps(value) if isinstance(value, dict) else str(value)] for name, value in found.facts.items()]
    parts += [
        "<h2>How to get these figures again</h2>",
        f"<p><code>{_e(command)}</code></p>" if command else "",
        "<details><summary>Data, artifact, versions</summary><div class=card>"
        + "".join(f"<p><b>{_e(name)}</b> <code>{_e(value)}</code></p>" for name, value in facts)
        + "</div></details>",
        "<p class=soft>Every number stands in report.json, every row's scores in scores.jsonl.</p>",
    ]
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{_e(found.name)}: agreement</title><style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _style_section(found: Evaluation) -> list[str]:
    length, labels = found.length, found.labels
    rows = [
        ["all pairs", str(length.raw)],
        ["predicted at equal length", str(length.controlled)],
        [f"answers within {style.MATCHED:.0%} of each other's length", str(length.matched) if length.matched else "no such pair"],
    ]
    if found.correction:
        rows.append(["corrected for length (fitted on the other half of the prompts)", str(found.correction.after)])
    name, share = labels.strongest
    about = f"Of the labels: the strongest rule is '{name}', right in {share:.1%} of pairs"
    about += f"; all of style together, fitted on other prompts, {labels.together.value:.1%}." if labels.together else "."
    explained = [[name, f"{value:.1%}"] for name, value in found.explained.items()]
    return [
        "<h2>Is it only counting words?</h2>",
        f"<p><b>{_e(length.verdict[0].upper() + length.verdict[1:])}.</b> Length alone explains {found.explained['length']:.0%} of the "
        f"variance of the scores within prompts, style as a whole {found.explained['all']:.0%}. {_e(about)}</p>",
        _table(["agreement", "value (95 %)"], rows),
        _plots([_of_length(found)]),
        "<details><summary>Variance explained by each part of style</summary>" + _table(["style", "share"], explained) + "</details>",
    ]


def _sure_section(found: Evaluation) -> list[str]:
    sure = found.sureness
    if sure is None:
        return []
    rows = [
        [name, f"{r.temperature:.4g}", f"{r.ece.value:.3f} ({r.ece.low:.3f} to {r.ece.high:.3f})", f"{r.ece_of_perfect:.3f}",
         f"{r.brier:.4f}", f"{r.nll:.4f}"]
        for name, r in (("stored", sure.stored), ("best for these rows", sure.fitted))
    ]  # fmt: skip
    parts = [
        "<h2>How sure is it?</h2>",
        "<p class=soft>Expected calibration error over ten bins of equal mass, beside what a perfectly calibrated model would show with "
        "as many pairs; a coin has Brier 0.25 and 0.693 nats.</p>",
        _table(["temperature", "value", "calibration error (95 %)", "of a perfect model", "Brier", "nats"], rows),
        _plots([_of_reliability(found), _of_risk(found)]),
    ]
    if sure.promised is not None:
        rows = [[f"{risk:.0%}", f"{kept:.1%}", f"{wrong:.1%}" if kept else "none kept"] for risk, (kept, wrong) in sure.promised.items()]
        parts += [
            "<p><code>ranking.confident(max_risk)</code>, by thresholds from the ranker's own held-out rows, on these rows:</p>",
            _table(["max_risk", "kept here", "wrong among them"], rows),
        ]
    if sure.unfamiliar is not None:
        parts.append(f"<p>{sure.unfamiliar:.1%} of these rows are <code>unfamiliar</code> to it (about 4 % of rows like its own are).</p>")
    if sure.by_slice:
        rows = [[name, f"{value:.4g}"] for name, value in sorted(sure.by_slice.items())]
        parts.append(
            "<details><summary>The temperature that each slice alone would give</summary>"
            + _table(["slice", "temperature"], rows)
            + "</details>"
        )
    return parts


def _worst_section(found: Evaluation, explain: Explain | None) -> list[str]:
    """Rows where the ranker was furthest from the labels, to read."""
    worst = []
    for row, (example, scores) in enumerate(zip(found.examples, found.scores, strict=True)):
        labels = np.asarray(example.scores or ())
        preferred = int(np.flatnonzero(labels == labels.max())[np.argmax(np.asarray(scores)[labels == labels.max()])])
        first = int(np.argmax(scores))
        if labels[first] < labels[preferred]:
            worst.append((float(scores[first] - scores[preferred]), row, first, preferred))
    if not worst:
        return []
    parts = [
        "<h2>Where it disagrees most</h2>",
        "<p class=soft>Green tokens raised the score, red ones lowered it. Read them: they show whether labels or ranker are wrong.</p>",
    ]
    for margin, row, first, preferred in sorted(worst, key=lambda item: -item[0])[:_WORST]:
        example = found.examples[row]
        texts = "".join(
            f"<div><p class=soft>{title}, score {float(found.scores[row][index]):.3f}</p>{_answer(example, index, explain)}</div>"
            for title, index in (("the ranker's first", first), ("preferred by the labels", preferred))
        )
        parts.append(
            f"<div class=card><p class=soft>{_e(example.where)}, margin {margin:.3f}</p>"
            f"<div class=text>{_e(_short(style.text_of(example.prompt)))}</div><div class=texts>{texts}</div></div>"
        )
    return parts


def _answer(example: Example, index: int, explain: Explain | None) -> str:
    text = example.candidates[index].text
    if explain is None:
        return f"<div class=text>{_e(_short(text))}</div>"
    tokens = list(explain(example, index))
    most = max((abs(token.contribution) for token in tokens), default=1.0) or 1.0
    spans, shown = [], 0
    for token in tokens:
        strength = min(1.0, abs(token.contribution) / most)
        colour = "31,111,84" if token.contribution > 0 else "178,59,59"
        words = token.text if shown < _SHOWN else ""
        spans.append(f"<span style='background:rgba({colour},{0.55 * strength:.2f})' title='{token.contribution:+.3f}'>{_e(words)}</span>")
        shown += len(token.text)
        if shown >= _SHOWN:
            spans.append(" […]")
            break
    return f"<div class=text>{''.join(spans)}</div>"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " […]"


def _e(text: Any) -> str:
    return html.escape(str(text))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], ours: int | None = None) -> str:
    body = "".join(
        f"<tr{' class=ours' if number == ours else ''}>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>"
        for number, row in enumerate(rows)
    )
    return f"<div class='card scroll'><table><tr>{''.join(f'<th>{_e(name)}</th>' for name in head)}</tr>{body}</table></div>"


# -- plots -------------------------------------------------------------------------------------------------------------


def _plots(drawn: Sequence[tuple[str, str]]) -> str:
    figures = "".join(
        f"<figure class=card><img alt='{_e(caption)}' src='data:image/svg+xml;base64,{base64.b64encode(picture.encode()).decode()}'>"
        f"<figcaption>{_e(caption)}</figcaption></figure>"
        for caption, picture in drawn
    )
    return f"<div class=plots>{figures}</div>"


def _axes(width: float = 5.2, height: float = 3.4) -> tuple[Any, Any]:
    try:
        import matplotlib as mpl
    except ImportError:
        raise MissingExtraError("a report", "eval") from None
    from matplotlib.figure import Figure as Canvas

    mpl.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "dpo_rank"})
    canvas = Canvas(figsize=(width, height), layout="constrained")
    axis = canvas.add_subplot()
    axis.spines[["top", "right"]].set_visible(False)
    return canvas, axis


def _svg(canvas: Any) -> str:
    text = io.StringIO()
    canvas.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    return text.getvalue()


def _bars(names: Sequence[str], figures: Sequence[Figure], colours: Sequence[str]) -> str:
    canvas, axis = _axes(height=0.7 + 0.27 * len(names))
    places = np.arange(len(names))[::-1]
    for place, found, colour in zip(places, figures, colours, strict=True):
        axis.plot([found.low, found.high], [place, place], color=colour, linewidth=2)
        axis.plot([found.value], [place], "o", color=colour, markersize=5)
    axis.axvline(0.5, color=RED, linewidth=0.8, linestyle=":")
    axis.set_ylim(-0.7, len(names) - 0.3)
    axis.set_yticks(places, [name if len(name) < 34 else name[:32] + "…" for name in names])
    axis.set_xlabel("share of pairs in the labels' order (dotted: a coin)")
    return _svg(canvas)


def _of_rankers(found: Evaluation) -> tuple[str, str]:
    names = [report.name for report in found.reports]
    picture = _bars(names, [report.agreement for report in found.reports], [OURS] + [GREY] * (len(names) - 1))
    return "Agreement with 95 % intervals, clustered by prompt", picture


def _of_slices(key: str, groups: dict[str, Figure]) -> tuple[str, str]:
    names = [f"{value} ({found.num_prompts})" for value, found in groups.items()]
    return f"Agreement by {key} (prompts)", _bars(names, list(groups.values()), [OURS] * len(names))


def _of_curve(found: Evaluation) -> tuple[str, str]:
    canvas, axis = _axes()
    shown = [found.reports[0], *(r for r in found.reports[1:] if r.name in ("longest", "shortest", "random"))]
    for report, colour, dash in zip(shown, (OURS, GREY, GREY, GREY), ("-", "-", "--", ":"), strict=False):
        axis.plot(range(1, len(report.curve) + 1), [ours for ours, _ in report.curve], dash, color=colour, label=report.name)
    perfect = [best for _, best in found.reports[0].curve]
    axis.plot(range(1, len(perfect) + 1), perfect, color=RED, linewidth=0.8, label="a perfect choice")
    axis.set_xlabel("answers to choose from")
    axis.set_ylabel("expected label of the chosen one")
    axis.legend(frameon=False, fontsize=8)
    return "What choosing the best of N is worth, over all subsets of N answers", _svg(canvas)


def _of_reliability(found: Evaluation) -> tuple[str, str]:
    canvas, axis = _axes()
    axis.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.8)
    if found.sureness:
        for name, item, colour in (("stored", found.sureness.stored, OURS), ("best for these rows", found.sureness.fitted, GREY)):
            label = f"{name} temperature ({item.temperature:.3g})"
            axis.plot([b.confidence for b in item.bins], [b.right for b in item.bins], "o-", color=colour, markersize=4, label=label)
    axis.set_xlabel("probability said")
    axis.set_ylabel("share in the right order")
    axis.legend(frameon=False, fontsize=8)
    return "Reliability: pairs in ten bins of equal mass", _svg(canvas)


def _of_risk(found: Evaluation) -> tuple[str, str]:
    canvas, axis = _axes()
    if found.sureness:
        kept, risk = zip(*found.sureness.risk, strict=True)
        axis.step(kept, risk, where="post", color=OURS)
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("share of rankings kept, largest margins first")
    axis.set_ylabel("share of them that are wrong")
    return "Risk against coverage: what abstaining would save", _svg(canvas)


def _of_length(found: Evaluation) -> tuple[str, str]:
    canvas, axis = _axes()
    x, y = [], []
    for example, scores in zip(found.examples, found.scores, strict=True):
        sizes = np.array([len(c.text) for c in example.candidates], dtype=float)
        x.append(sizes - sizes.mean())
        y.append(np.asarray(scores, dtype=float) - float(np.mean(scores)))
    sizes, rewards = np.concatenate(x), np.concatenate(y)
    keep = np.random.default_rng(0).permutation(len(sizes))[:1500]
    axis.plot(sizes[keep], rewards[keep], ".", color=OURS, markersize=3, alpha=0.4)
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set_xlabel("characters, against the prompt's mean")
    axis.set_ylabel("score, against the prompt's mean")
    return f"Score against length within prompts (correlation of margin and gap {found.length.correlation:+.2f})", _svg(canvas)
