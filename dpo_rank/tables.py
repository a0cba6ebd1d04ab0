"""Results as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dpo_rank.evaluation.calibration import CalibrationReport
    from dpo_rank.evaluation.evaluate import Evaluation
    from dpo_rank.evaluation.latency import LatencyReport
    from dpo_rank.ranker import Ranker
    from dpo_rank.ranking import Ranking
    from dpo_rank.training.run import DryRun


def of_ranking(ranking: Ranking, ranker: Ranker) -> Table:
    """Candidates, best first."""
    table = Table(title=f"ranker: {ranker.name} ({ranker.engine}, {ranker.precision}, {ranker.device})", title_justify="left")
    for name in ("#", "index", "probability", "score"):
        table.add_column(name, justify="right")
    table.add_column("answer", overflow="fold")
    for place, candidate in enumerate(ranking, 1):
        mark = " [yellow](cut)[/]" if candidate.truncated else ""
        table.add_row(
            str(place), str(candidate.index), f"{candidate.probability:.3f}", f"{candidate.score:.3f}", escape(candidate.text) + mark
        )
    return table


def of_evaluation(found: Evaluation) -> Table:
    """Rankers and rules, one a row."""
    first = found.reports[0]
    table = Table(title=f"agreement with the labels of {found.source} (95 % interval over prompts)", title_justify="left")
    table.add_column("ranker")
    table.add_column(f"pairs in order (n={first.agreement.num_prompts})", justify="right", no_wrap=True)
    table.add_column("the ranker's lead", justify="right", no_wrap=True)
    if first.best_of_n:
        table.add_column(f"label of the best of N (n={first.best_of_n.num_prompts})", justify="right")
    table.add_column("ms a prompt", justify="right")
    reports = {report.name: report for report in found.reports}
    leads = {c.second: c.agreement for c in found.comparisons}
    for item in found.scored:
        if item.problem is not None:
            table.add_row(escape(item.name), f"[dim]not run: {escape(item.problem)}[/]")
            continue
        report, lead = reports[item.name], leads.get(item.name)
        best = [str(report.best_of_n)] if report.best_of_n else []
        shown = "" if lead is None else f"{lead.value:+.3f} ({lead.low:+.3f} to {lead.high:+.3f})"
        table.add_row(escape(item.name), str(report.agreement), shown, *best, "" if item.ms_a_prompt is None else f"{item.ms_a_prompt:.2f}")
    return table


def of_slices(found: Evaluation) -> Table:
    """The ranker's agreement by slice."""
    table = Table(title="where", title_justify="left")
    for name in ("by", "value", "prompts", "pairs in order"):
        table.add_column(name, justify="left" if name in ("by", "value") else "right")
    for key, groups in found.reports[0].slices.items():
        for value, figure in groups.items():
            table.add_row(
                escape(key), escape(value), str(figure.num_prompts), f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"
            )
    return table


def of_published(found: Mapping[str, float], name: str) -> Table:
    """A benchmark's own figures."""
    table = Table(title=f"{name}: the publisher's aggregation", title_justify="left")
    table.add_column("part")
    table.add_column("figure", justify="right")
    for key, value in found.items():
        table.add_row(escape(key), f"{value:.4f}")
    return table


def of_calibration(report: CalibrationReport) -> Table:
    """What calibrating found."""
    table = Table(title="calibration", title_justify="left", show_header=False)
    rows = [
        ("temperature", f"{report.temperature:.4g}, on {report.num_pairs} pairs of {report.num_prompts} prompts"),
        ("agreement", f"{report.agreement:.3f}"),
        ("nll", f"{report.nll_before:.4f} -> {report.nll_after:.4f} nats (a coin: 0.6931)"),
    ]
    sure = report.confidence
    if sure is not None:
        rows.append(("least risk", f"{sure.smallest_risk:.2f} of the rankings wrong: no margin promises less on these rows"))
        for risk in (0.05, 0.1, 0.2, 0.3, 0.4):
            least = sure.threshold(risk)
            if least is not None:
                rows.append((f"confident({risk:g})", f"margins from {least:.3g}: {sure.coverage(risk):.0%} of the rankings"))
    if report.correction is not None:
        knots = report.correction
        rows.append(
            (
                "correction",
                f"takes off {knots.reward[0]:+.3f} at {knots.tokens[0]:.0f} tokens to {knots.reward[-1]:+.3f} at {knots.tokens[-1]:.0f}",
            )
        )
    for name, value in rows:
        table.add_row(name, value)
    return table


def of_held_out(held_out: dict[str, dict[str, Any]], name: str) -> Table:
    """Kinds of held-out rows, one a row."""
    table = Table(title=f"{name}: held-out agreement", title_justify="left")
    for column in ("rows", "prompts", "agreement", "95 % interval", "shorter is better", "longer is better"):
        table.add_column(column, justify="left" if column == "rows" else "right")
    for key, row in held_out.items():
        low, high = row["interval"]
        table.add_row(
            key,
            str(row["num_prompts"]),
            f"{row['agreement']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{row['shortest']:.3f}",
            f"{row['longest']:.3f}",
        )
    return table


def of_latency(reports: Sequence[LatencyReport], name: str, num_prompts: int, threads: int) -> Table:
    """Engines and precisions, one a row."""
    table = Table(title=f"{name}: a prompt at a time, {num_prompts} prompts, {threads} threads", title_justify="left")
    for column in ("engine", "precision", "load s", "first ms", "median ms", "p90 ms", "ms a candidate", "tokens/s", "same best"):
        table.add_column(column, justify="left" if column in ("engine", "precision") else "right")
    for report in reports:
        if report.problem:
            table.add_row(report.engine, report.precision, f"[dim]not run: {escape(report.problem)}[/]")
            continue
        figures = (report.load_seconds, report.first_ms, report.median_ms, report.p90_ms, report.ms_per_candidate)
        table.add_row(
            report.engine,
            report.precision,
            *(f"{value:.2f}" for value in figures),
            f"{report.tokens_per_second:,.0f}",
            f"{report.same_best:.1%}",
        )
    return table


def of_run(facts: Mapping[str, Any]) -> Table:
    """What a training run was."""
    table = Table(title="training run", title_justify="left", show_header=False)
    for name in ("base_model", "loss", "rows", "held_out_rows", "epochs", "batch_size", "learning_rate", "best_step", "rows_truncated"):
        table.add_row(name.replace("_", " "), str(facts.get(name, "")))
    return table


def of_dry_run(report: DryRun) -> Table:
    """What a training run would read, and how long it would take."""
    data, seconds = report.data, report.seconds_a_step
    table = Table(title="dry run: nothing was written", title_justify="left", show_header=False)
    spread = "{} / {} / {} tokens (median, 95 %, longest)".format
    total = sum(report.memory.values())
    parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in report.memory.items())
    for name, value in (
        ("rows", f"{data.rows:,} with {data.candidates:,} answers, {data.pairs:,} labelled pairs; {report.held_out_rows} held out"),
        ("loss", report.loss),
        ("prompts", spread(*data.prompt_tokens)),
        ("answers", spread(*data.completion_tokens)),
        ("too long", f"{data.prompts_cut} prompts and {data.answers_cut} answers are cut"),
        ("boundary", f"joint tokenisation would differ in {data.boundary_differs:.1%} of the rows"),
        ("tied", f"{data.tied:,} pairs of answers that the labels leave open"),
        ("contradictions", f"{data.contradictions} rows turn another row's order"),
        ("length", f"the longer answer is the better one in {data.longer_is_better:.1%} of the labelled pairs"),
        ("steps", f"{data.steps:,} of {data.rows_a_step} rows and about {data.tokens_a_step:,.0f} tokens"),
        ("time", f"about {seconds * data.steps / 60:,.1f} minutes ({seconds:.2f} s a step, one measured), held-out rows and export apart"),
        ("memory", f"about {total / 2**20:,.0f} MiB ({parts})"),
    ):  # fmt: skip
        table.add_row(name, value)
    for message in report.problems.messages[:5]:
        table.add_row("[yellow]bad row[/]", escape(message))
    return table
