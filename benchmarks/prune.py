"""What early stopping saves and what it costs: the best of N with ``session.rank(top_k=1, prune=p)`` against reading every candidate.

    python benchmarks/prune.py --data $DPO_RANK_DATA/alpacaeval_16.test.jsonl.gz

Prints, for each ``p``: the share of candidate tokens read, how often the best is the same, the mean regret (full score of the best minus full
score of the one chosen, in units of the score and of its standard deviation within a prompt) and the time beside full scoring.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from dpo_rank import Ranker
from dpo_rank.data.formats import Example, read

DATA = Path(os.environ.get("DPO_RANK_DATA", "../shared/data")) / "alpacaeval_16.test.jsonl.gz"


def ranked(ranker: Ranker, example: Example, prune: float | None) -> tuple[int, float, float]:
    """The best candidate, the share of candidate tokens read, and seconds."""
    start = time.perf_counter()
    with ranker.session(example.prompt) as session:
        session.add(example.candidates)
        best = session.rank(top_k=1, prune=prune).best.index
        seconds = time.perf_counter() - start
        entries = session._entries
    return best, sum(len(e.scores.policy) for e in entries) / sum(len(e.ids) for e in entries), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Regret and savings of pruning.")
    parser.add_argument("--ranker", default="starter")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("docs/results/prune.json"))
    args = parser.parse_args()
    ranker = Ranker.load(args.ranker)
    examples = list(itertools.islice(read(str(args.data)), args.limit))
    full: list[Any] = [ranker.score(example.prompt, example.candidates) for example in track(examples, "scoring all")]
    rows = []
    for prune in (None, 0.001, 0.01, 0.05, 0.2):
        found = [ranked(ranker, example, prune) for example in track(examples, f"prune={prune}")]
        regrets = [float(scores.max() - scores[best]) for scores, (best, _, _) in zip(full, found, strict=True)]
        spreads = [float(scores.std()) for scores in full]
        rows.append(
            {
                "prune": prune,
                "tokens_read": float(np.mean([share for _, share, _ in found])),
                "same_best": float(np.mean([regret == 0 for regret in regrets])),
                "regret": float(np.mean(regrets)),
                "regret_in_deviations": float(np.mean(np.array(regrets) / np.maximum(spreads, 1e-9))),
                "seconds": sum(seconds for _, _, seconds in found),
            }
        )
        Console().print_json(data=rows[-1])
    facts = {"ranker": ranker.name, "precision": ranker.precision, "data": args.data.name, "prompts": len(examples), "rows": rows}
    args.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
