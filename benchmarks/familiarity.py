"""Would the prompt's own perplexity tell unfamiliar prompts better than the candidates' log-probs, which scoring has anyway?

    python benchmarks/familiarity.py

Quantiles are taken on half of hh_harmless.test (the starter was trained on its kind); flagged are the other half and every other file of
the folder that DPO_RANK_DATA names. The prompt's end (600 characters) is read as an answer to a full stop. Writes docs/results/familiarity.json.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dpo_rank import Ranker
from dpo_rank.confidence import features
from dpo_rank.data.formats import Example, prompt_hash, read
from dpo_rank.evaluation.agreement import log_probs_of
from dpo_rank.evaluation.style import text_of

DATA = Path(os.environ.get("DPO_RANK_DATA", "../shared/data"))
HOME = "hh_harmless.test"
AWAY = ("mtbench_human.test", "llmbar.test", "halueval_qa.test", "gsm8k_solutions.test", "alpacaeval_16.test")
Array = npt.NDArray[np.float64]


def of_candidates(ranker: Ranker, rows: Sequence[Example]) -> Array:
    """``[rows, 3]``: mean, spread and rare share of the candidates' tokens under the reference."""
    return np.array([features([item.reference for item in items]) for items in log_probs_of(ranker, rows)])


def of_prompts(ranker: Ranker, rows: Sequence[Example]) -> Array:
    """``[rows, 3]``: the same of the prompt's end."""
    found: list[tuple[float, float, float]] = []
    for start in range(0, len(rows), 64):
        ends = [[text_of(row.prompt)[-600:]] for row in rows[start : start + 64]]
        found += [features([item.reference for item in items]) for items in ranker.log_probs_many(["."] * len(ends), ends)]
    return np.array(found)


def beyond(values: Array, low: Array, high: Array) -> npt.NDArray[np.bool_]:
    """Rows with a feature beyond its quantiles."""
    return np.asarray(((values < low) | (values > high)).any(axis=1))


def main() -> None:
    ranker = Ranker.load("starter")
    home = [row for row in read(DATA / f"{HOME}.jsonl.gz") if row.pairs()]
    fitted = np.array([prompt_hash(row.prompt) % 2 == 0 for row in home])
    ways = {"candidates": of_candidates, "prompt": of_prompts}
    values = {name: of(ranker, home) for name, of in ways.items()}
    results: dict[str, dict[str, float]] = {}
    # Each way alone, and both, are given the quantiles at which about one in twenty of the fitted rows is flagged.
    chosen = {"candidates": ("candidates",), "prompt": ("prompt",), "both": ("candidates", "prompt")}
    bounds = {}
    for name, parts in chosen.items():
        every = np.concatenate([values[part] for part in parts], axis=1)
        joined = every[fitted]
        tails = np.linspace(0.001, 0.05, 50)
        quantiles = [np.quantile(joined, [tail, 1 - tail], axis=0) for tail in tails]
        bounds[name] = min(quantiles, key=lambda pair: abs(beyond(joined, pair[0], pair[1]).mean() - 0.05))
        results.setdefault(HOME, {})[name] = float(beyond(every[~fitted], *bounds[name]).mean())
    for file in AWAY:
        rows = [row for row in read(DATA / f"{file}.jsonl.gz") if row.pairs()][:100]
        start = time.perf_counter()
        away = {"candidates": of_candidates(ranker, rows)}
        middle = time.perf_counter()
        away["prompt"] = of_prompts(ranker, rows)
        end = time.perf_counter()
        for name, parts in chosen.items():
            flagged = beyond(np.concatenate([away[part] for part in parts], axis=1), *bounds[name])
            results.setdefault(file, {})[name] = float(flagged.mean())
        results[file] |= {"ms_scoring": 1000 * (middle - start) / len(rows), "ms_prompt": 1000 * (end - middle) / len(rows)}
    rounded = {file: {name: round(value, 3) for name, value in found.items()} for file, found in results.items()}
    print(json.dumps(rounded, indent=1))
    Path("docs/results/familiarity.json").write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
