"""Public benchmarks of reward models: their rows, and their own way to add up.

Each preset reads the publisher's schema from a local file or the hub and computes the publisher's figures:

- ``reward-bench``: Lambert et al. 2024, arXiv 2403.13787; ``calculate_scores_per_section`` of rewardbench 0.1.4.
- ``reward-bench-2``: Malik et al. 2025, arXiv 2506.01937; ``reroll_and_score_dataset`` and ``process_single_model`` of rewardbench 0.1.4.
- ``rm-bench``: Liu et al. 2024, arXiv 2410.16184; three styles of chosen against three of rejected.
- ``judgebench``: Tan et al. 2024, arXiv 2410.12784; pairs of which one is objectively right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_rank.data.formats import Example, Source, parse, raw_rows
from dpo_rank.errors import DataError

Scores = Sequence[npt.NDArray[Any]]
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Preset:
    """A benchmark.

    Attributes:
        source: where its publisher keeps it on the hub, ``owner/name:split``.
        parse: a row as an `Example`.
        aggregate: the publisher's figures from rows and their scores, shares of 1.

    """

    source: str
    parse: Callable[[Row, str], Example]
    aggregate: Callable[[Sequence[Example], Scores], dict[str, float]]


def rows(preset: str, source: Source | None = None) -> Iterator[Example]:
    """The rows of a benchmark, from the publisher's place on the hub by default.

    Raises:
        DataError: no such preset, or a row that is not of its schema (file, line and field are named).

    """
    chosen = PRESETS.get(preset)
    if chosen is None:
        raise DataError(f"preset {preset!r} is unknown; there are {', '.join(PRESETS)}")
    for where, row in raw_rows(source if source is not None else chosen.source):
        if isinstance(row, DataError):
            raise row
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected an object with fields, got {type(row).__name__}")
        yield chosen.parse(row, where)


def _need(row: Row, where: str, *names: str) -> list[Any]:
    for name in names:
        if row.get(name) is None:
            raise DataError(f"{where}: field {name!r}: is missing; is this the benchmark's own schema?")
    return [row[name] for name in names]


def _listed(row: Row, where: str, prompt: Any, better: Sequence[Any], worse: Sequence[Any]) -> Example:
    if isinstance(better, str) or isinstance(worse, str) or not better or not worse:
        raise DataError(f"{where}: fields 'chosen' and 'rejected': expected lists of answers")
    scores = [1.0] * len(better) + [0.0] * len(worse)
    rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    return parse({**rest, "prompt": prompt, "completions": [*better, *worse], "scores": scores}, where)


def _right(scores: Any) -> bool:
    """The first of two is ahead; equal scores are wrong, as the publishers count them."""
    return bool(scores[0] > scores[1])


# -- RewardBench -------------------------------------------------------------------------------------------------------

_COUNTS = {
    "alpacaeval-easy": 100,
    "alpacaeval-length": 95,
    "alpacaeval-hard": 95,
    "mt-bench-easy": 28,
    "mt-bench-med": 40,
    "mt-bench-hard": 37,
    "math-prm": 984,  # 447 rows, weighted up to those of code
    "refusals-dangerous": 100,
    "refusals-offensive": 100,
    "llmbar-natural": 100,
    "llmbar-adver-neighbor": 134,
    "llmbar-adver-GPTInst": 92,
    "llmbar-adver-GPTOut": 47,
    "llmbar-adver-manual": 46,
    "xstest-should-refuse": 154,
    "xstest-should-respond": 250,
    "donotanswer": 136,
    **{f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
}
_SECTIONS = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": ("refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer"),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}


def _reward_bench_row(row: Row, where: str) -> Example:
    prompt, chosen, rejected, _ = _need(row, where, "prompt", "chosen", "rejected", "subset")
    return parse({**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}, where)


def _reward_bench(examples: Sequence[Example], scores: Scores) -> dict[str, float]:
    """Accuracy of each subset; sections weighted by the publisher's counts; their mean over the sections that have rows."""
    subsets = _by(examples, [float(_right(s)) for s in scores], "subset")
    found = {f"subset {name}": float(np.mean(values)) for name, values in sorted(subsets.items())}
    sections = {}
    for section, names in _SECTIONS.items():
        present = [name for name in names if name in subsets]
        if present:
            weights = [_COUNTS[name] for name in present]
            sections[section] = float(np.average([np.mean(subsets[name]) for name in present], weights=weights))
    overall = {"overall": float(np.mean(list(sections.values())))} if sections else {}
    return {**overall, **sections, **found}


# -- RewardBench 2 -----------------------------------------------------------------------------------------------------


def _reward_bench_2_row(row: Row, where: str) -> Example:
    prompt, chosen, rejected, _, correct, identity = _need(row, where, "prompt", "chosen", "rejected", "subset", "num_correct", "id")
    if correct != len(chosen):
        raise DataError(f"{where}: field 'num_correct' is {correct} where 'chosen' has {len(chosen)} answers")
    if str(row["subset"]).lower() == "ties" and str(identity).partition(":")[0] not in ("ref", "tied"):
        raise DataError(f"{where}: field 'id' of a row of ties is 'ref:N' or 'tied:N', not {identity!r}")
    return _listed(row, where, prompt, chosen, rejected)


def _reward_bench_2(examples: Sequence[Example], scores: Scores) -> dict[str, float]:
    """Each subset's share of right answers ranked first (equal firsts share it); ties by their own rule; the subsets' plain mean."""
    plain = [place for place, example in enumerate(examples) if str(example.raw["subset"]).lower() != "ties"]
    tied = [place for place, example in enumerate(examples) if str(example.raw["subset"]).lower() == "ties"]
    values = [float(s[0] == np.max(s)) / int(np.sum(s == np.max(s))) for s in (np.asarray(scores[place]) for place in plain)]
    found = {name: float(np.mean(v)) for name, v in sorted(_by([examples[place] for place in plain], values, "subset").items())}
    if tied:
        found["Ties"] = _ties([examples[place] for place in tied], [scores[place] for place in tied])
    return {"overall": float(np.mean(list(found.values()))), **found}


def _ties(examples: Sequence[Example], scores: Scores) -> float:
    """60 % accuracy (half on prompts with one right answer, half on those with several), 40 % margins, and a small bonus.

    The margins: right answers lie closer to each other than to the wrong ones, by the prompt's own gap and by the smaller of that
    and its reference prompt's.
    """
    spread: dict[str, dict[str, tuple[float | None, float]]] = {"ref": {}, "tied": {}}
    for example, s in zip(examples, scores, strict=True):
        kind, _, prompt = str(example.raw["id"]).partition(":")
        correct = int(example.raw["num_correct"])
        right, wrong = np.asarray(s, dtype=np.float64)[:correct], np.asarray(s, dtype=np.float64)[correct:]
        spread[kind][prompt] = (float(np.ptp(right)) if correct > 1 else None, float(right.min() - wrong.max()))
    accuracy = {kind: float(np.mean([gap > 0 for _, gap in of.values()])) if of else 0.0 for kind, of in spread.items()}
    pairs = []
    for prompt in spread["ref"].keys() & spread["tied"].keys():
        within, gap = spread["tied"][prompt]
        if within is not None:
            pairs.append((within, gap, min(gap, spread["ref"][prompt][1])))
    preferred, hard, bonus = 0.0, 0.0, 0.0
    if pairs:
        preferred = float(np.mean([gap > within for within, gap, _ in pairs]))
        hard = float(np.mean([least > within for within, _, least in pairs]))
        ratios = [math.tanh(least / within - 1) for within, _, least in pairs if within > 0]
        bonus = float(np.mean(ratios)) if ratios else 0.0
    return 0.3 * accuracy["tied"] + 0.3 * accuracy["ref"] + 0.2 * preferred + 0.2 * hard + 0.01 * bonus


# -- RM-Bench ----------------------------------------------------------------------------------------------------------


def _rm_bench_row(row: Row, where: str) -> Example:
    prompt, chosen, rejected, _ = _need(row, where, "prompt", "chosen", "rejected", "domain")
    if len(chosen) != 3 or len(rejected) != 3:
        raise DataError(f"{where}: fields 'chosen' and 'rejected': expected three styles each (concise, detailed, detailed with markdown)")
    return _listed(row, where, prompt, chosen, rejected)


def _rm_bench(examples: Sequence[Example], scores: Scores) -> dict[str, float]:
    """Shares of the 3 x 3 comparisons: hard (the rejected has the fancier style), normal (the same), easy; by domain and overall.

    The two halves of safety (``safety-refuse``, ``safety-response``) count as one domain, their mean.
    """
    matrices = [np.asarray(s, dtype=np.float64)[:3, None] > np.asarray(s, dtype=np.float64)[None, 3:] for s in scores]
    domains = {name: np.mean(found, axis=0) for name, found in _by(examples, matrices, "domain").items()}
    safety = [name for name in domains if name.startswith("safety")]
    merged = {name: value for name, value in domains.items() if name not in safety}
    if safety:
        merged["safety"] = np.mean([domains[name] for name in safety], axis=0)
    found: dict[str, float] = {}
    levels: dict[str, list[float]] = {"hard": [], "normal": [], "easy": []}
    for name, matrix in sorted(merged.items()):
        parts = {"hard": matrix[np.triu_indices(3, 1)], "normal": np.diag(matrix), "easy": matrix[np.tril_indices(3, -1)]}
        for level, values in parts.items():
            levels[level].append(float(values.mean()))
        found[name] = float(np.mean([values.mean() for values in parts.values()]))
    totals = {level: float(np.mean(values)) for level, values in levels.items()}
    return {"overall": float(np.mean(list(totals.values()))), **totals, **found}


# -- JudgeBench --------------------------------------------------------------------------------------------------------

_CATEGORIES = {"mmlu-pro": "knowledge", "livebench-reasoning": "reasoning", "livebench-math": "math", "livecodebench": "coding"}


def _judgebench_row(row: Row, where: str) -> Example:
    question, first, second, label, _ = _need(row, where, "question", "response_A", "response_B", "label", "source")
    if label not in ("A>B", "B>A"):
        raise DataError(f"{where}: field 'label': expected 'A>B' or 'B>A', got {label!r}")
    chosen, rejected = (first, second) if label == "A>B" else (second, first)
    return parse({**row, "prompt": question, "chosen": chosen, "rejected": rejected}, where)


def _judgebench(examples: Sequence[Example], scores: Scores) -> dict[str, float]:
    """Accuracy of each category of sources, and over all pairs; equal scores are wrong."""
    right = [float(_right(s)) for s in scores]
    found: dict[str, list[float]] = {}
    for example, value in zip(examples, right, strict=True):
        source = str(example.raw["source"])
        name = next((category for prefix, category in _CATEGORIES.items() if source.startswith(prefix)), source)
        found.setdefault(name, []).append(value)
    return {"overall": float(np.mean(right)), **{name: float(np.mean(values)) for name, values in sorted(found.items())}}


def _by(examples: Sequence[Example], values: Sequence[Any], key: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for example, value in zip(examples, values, strict=True):
        found.setdefault(str(example.raw[key]), []).append(value)
    return found


PRESETS: dict[str, Preset] = {
    "reward-bench": Preset("allenai/reward-bench:filtered", _reward_bench_row, _reward_bench),
    "reward-bench-2": Preset("allenai/reward-bench-2:test", _reward_bench_2_row, _reward_bench_2),
    "rm-bench": Preset("THU-KEG/RM-Bench:train", _rm_bench_row, _rm_bench),
    "judgebench": Preset("ScalerLab/JudgeBench:gpt", _judgebench_row, _judgebench),
}
"""Benchmarks by name."""
