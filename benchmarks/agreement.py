"""How far a ranker agrees with the labels of each data set, beside the rules that could embarrass it.

    python benchmarks/agreement.py --ranker starter

Reads the ``.test`` files of the folder that DPO_RANK_DATA names. Prints a table; writes JSON and Markdown to docs/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dpo_rank import Ranker
from dpo_rank.data.formats import read
from dpo_rank.evaluation.agreement import BASELINES, Report, evaluate_scores, score_examples

FILES = ("hh_harmless.test", "mtbench_human.test", "llmbar.test", "halueval_qa.test", "gsm8k_solutions.test", "alpacaeval_16.test")


def main() -> None:
    parser = argparse.ArgumentParser(description="Agreement of a ranker with the labels of several data sets.")
    parser.add_argument("--ranker", default="starter")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("DPO_RANK_DATA", "../shared/data")))
    parser.add_argument("--most", type=int, default=None, help="rows of each file at most")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    ranker = Ranker.load(args.ranker)
    results = {}
    for name in FILES:
        examples = [example for example in read(args.data / f"{name}.jsonl.gz") if example.pairs()][: args.most]
        start = time.perf_counter()
        scores = score_examples(ranker, examples)
        seconds = time.perf_counter() - start
        reports = [evaluate_scores(ranker.name, examples, scores, "subset")]
        reports += [evaluate_scores(rule, examples, rule_scores(examples), "subset") for rule, rule_scores in BASELINES.items()]
        results[name] = {"reports": [report.to_dict() for report in reports], "ms_a_prompt": round(1000 * seconds / len(examples), 2)}
        show(name, reports, 1000 * seconds / len(examples))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    results["machine"] = {"peak_memory_mib": round(peak), "threads": os.cpu_count(), "ranker": repr(ranker)}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "agreement.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.output / "agreement.md").write_text(markdown(results), encoding="utf-8")


def show(name: str, reports: list[Report], milliseconds: float) -> None:
    table = Table(title=f"{name}: {milliseconds:.1f} ms a prompt", title_justify="left")
    for column in ("ranker", "pairs in order", "label of the best of N"):
        table.add_column(column)
    for report in reports:
        table.add_row(report.name, str(report.agreement), str(report.best_of_n or ""))
    Console().print(table)


def markdown(results: dict[str, dict]) -> str:  # type: ignore[type-arg]
    """One line a data set: the ranker, its interval, and the rules."""
    lines = [
        "| rows | prompts | starter (95 % interval) | shorter | longer | random | best of N: starter / longer / random | ms a prompt |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in FILES:
        by_name = {report["name"]: report for report in results[name]["reports"]}
        mine = results[name]["reports"][0]
        figure = mine["agreement"]
        best = (
            " / ".join(f"{by_name[key]['best_of_n']['value']:.3f}" for key in (mine["name"], "longest", "random"))
            if mine["best_of_n"]
            else ""
        )
        rules = " | ".join(f"{by_name[key]['agreement']['value']:.3f}" for key in ("shortest", "longest", "random"))
        lines.append(
            f"| {name} | {figure['num_prompts']} | {figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f}) | {rules} | {best} "
            f"| {results[name]['ms_a_prompt']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
