"""What a lower precision does to a trained ranker's order, on real rows.

    python benchmarks/precision.py --ranker my-ranker --data $DPO_RANK_DATA/alpacaeval_16.test.jsonl.gz $DPO_RANK_DATA/hh_harmless.test.jsonl.gz

For every precision that the ranker holds beside fp32 (and OpenVINO's bf16 where it is installed): Spearman with fp32 within a prompt, the same
best candidate, agreement with the labels beside that of fp32, and how often a pair's order turned, by the size of its fp32 margin.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

from dpo_rank import Ranker, UnavailableError
from dpo_rank.data.formats import Example, read
from dpo_rank.errors import MissingExtraError
from dpo_rank.evaluation.agreement import evaluate_scores, score_examples


def compared(name: str, examples: Sequence[Example], exact: Sequence[Any], other: Sequence[Any]) -> dict[str, Any]:
    """``other``'s scores against ``exact``'s."""
    several = [(a, b) for a, b in zip(exact, other, strict=True) if len(a) > 1]
    margins = np.array([(a[i] - a[j], b[i] - b[j]) for a, b in several for i, j in itertools.combinations(range(len(a)), 2)])
    size = np.abs(margins[:, 0])
    turned = np.sign(margins[:, 0]) != np.sign(margins[:, 1])
    edges = np.quantile(size, [0, 0.25, 0.5, 0.75, 1])
    report = evaluate_scores(name, examples, other)
    return {
        "precision": name,
        "prompts": len(several),
        "spearman": float(np.mean([spearmanr(a, b).statistic for a, b in several])),
        "same_best": float(np.mean([a.argmax() == b.argmax() for a, b in several])),
        "agreement": report.agreement.value,
        "agreement_interval": [report.agreement.low, report.agreement.high],
        "margin_noise": float(np.sqrt(np.mean((margins[:, 1] - margins[:, 0]) ** 2))),
        "margin_slope": float((margins[:, 0] * margins[:, 1]).sum() / (margins[:, 0] ** 2).sum()),
        "turned_by_quartile_of_margin": [
            float(turned[(size >= low) & (size <= high)].mean()) for low, high in itertools.pairwise(edges)
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Lower precisions against fp32 on real rows.")
    parser.add_argument("--ranker", required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=Path("docs/results/precision.json"))
    args = parser.parse_args()
    exact = Ranker.load(args.ranker, engine="onnx", precision="fp32")
    others = [("onnx", name) for name in exact.manifest.precisions if name != "fp32"] + [("openvino", "bf16")]
    facts: dict[str, Any] = {"ranker": exact.name}
    for path in args.data:
        examples = [example for example in itertools.islice(read(str(path)), args.limit) if example.pairs()]
        reference = score_examples(exact, examples)
        rows = [compared("fp32", examples, reference, reference)]
        for engine, precision in others:
            try:
                other = Ranker.load(args.ranker, engine=engine, precision=precision)
            except (UnavailableError, MissingExtraError) as error:
                rows.append({"precision": f"{engine} {precision}", "not_run": str(error)})
                continue
            rows.append(compared(f"{engine} {precision}", examples, reference, score_examples(other, examples)))
        facts[path.name] = rows
        Console().print_json(data={path.name: rows})
    args.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
