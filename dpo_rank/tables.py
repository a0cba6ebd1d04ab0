"""Results as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dpo_rank.evaluation.agreement import Report
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


def of_reports(reports: list[Report], source: str) -> Table:
    """Rankers and rules, one a row."""
    first = reports[0]
    table = Table(title=f"agreement with the labels of {source} (95 % interval over prompts)", title_justify="left")
    table.add_column("ranker")
    table.add_column(f"pairs in order (n={first.agreement.num_prompts})", justify="right")
    if first.best_of_n:
        table.add_column(f"label of the best of N (n={first.best_of_n.num_prompts})", justify="right")
    for key, figure in first.slices.items():
        table.add_column(f"{key} (n={figure.num_prompts})", justify="right")
    for report in reports:
        best = [str(report.best_of_n)] if report.best_of_n else []
        table.add_row(report.name, str(report.agreement), *best, *(f"{report.slices[key].value:.3f}" for key in first.slices))
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
