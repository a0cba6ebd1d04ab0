"""Agreement with labels: pairs in the right order, and what the best of N is worth, with intervals clustered by prompt."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dpo_rank.data.formats import Example
from dpo_rank.errors import DataError

Scores = Sequence[npt.NDArray[np.float32]]
RESAMPLES = 2000


class Scorer(Protocol):
    """Anything with the signature of `Ranker.score_many`."""

    def score_many(self, prompts: Any, candidate_lists: Any, *, passages: Any = None) -> Scores:
        """One array of scores a prompt."""
        ...


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over prompts with its 95 % interval (percentile bootstrap over prompts).

    Attributes:
        value: the mean; every prompt weighs the same.
        low, high: the interval.
        num_prompts: prompts it is a mean of.

    """

    value: float
    low: float
    high: float
    num_prompts: int

    def to_dict(self) -> dict[str, float | int]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, slots=True)
class Report:
    """How one ranker (or rule) does on labelled rows.

    Attributes:
        name: the ranker.
        agreement: share of a prompt's labelled pairs in the right order, ties half.
        best_of_n: mean label of the candidate ranked first, over prompts with graded lists (three candidates or more).
        slices: agreement by the value of a row's key.

    """

    name: str
    agreement: Figure
    best_of_n: Figure | None
    slices: dict[str, Figure]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "agreement": self.agreement.to_dict(),
            "best_of_n": self.best_of_n.to_dict() if self.best_of_n else None,
            "slices": {name: figure.to_dict() for name, figure in self.slices.items()},
        }


def pair_agreement(scores: Sequence[float] | npt.NDArray[np.float32], labels: Sequence[float]) -> float:
    """Share of the pairs that ``labels`` tell apart whose scores have the same order; equal scores count half.

    Raises:
        DataError: the labels tell no pair apart.

    """
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    better = y[:, None] > y[None, :]
    if not better.any():
        raise DataError("the labels tell no pair apart")
    credit = (s[:, None] > s[None, :]) + 0.5 * (s[:, None] == s[None, :])
    return float(credit[better].mean())


def best_of_n(scores: Sequence[float] | npt.NDArray[np.float32], labels: Sequence[float]) -> float:
    """Mean label of the candidates with the highest score."""
    s = np.asarray(scores, dtype=np.float64)
    return float(np.asarray(labels, dtype=np.float64)[s == s.max()].mean())


def figure(values: Sequence[float], seed: int = 0) -> Figure:
    """Mean and bootstrap interval of one value a prompt."""
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = array[rng.integers(0, len(array), (RESAMPLES, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Figure(float(array.mean()), float(low), float(high), len(array))


def evaluate_scores(name: str, examples: Sequence[Example], scores: Scores, by: str | None = None) -> Report:
    """Measure ``scores`` (one array an example) against the examples' labels.

    Args:
        name: whose scores they are.
        examples: labelled rows; those whose labels tell nothing apart are left out.
        scores: in the order of ``examples``.
        by: a key of the rows to slice by, where they have it.

    """
    used = [(example, s) for example, s in zip(examples, scores, strict=True) if example.pairs()]
    if not used:
        raise DataError("no row has labels that tell its candidates apart")
    agreements = [pair_agreement(s, example.scores or ()) for example, s in used]
    lists = [best_of_n(s, example.scores or ()) for example, s in used if len(example.candidates) > 2]
    slices: dict[str, list[float]] = {}
    for (example, _), agreement in zip(used, agreements, strict=True):
        if by is not None and by in example.raw:
            slices.setdefault(str(example.raw[by]), []).append(agreement)
    return Report(name, figure(agreements), figure(lists) if lists else None, {key: figure(slices[key]) for key in sorted(slices)})


def score_examples(ranker: Scorer, examples: Sequence[Example], progress: Callable[[int], None] = lambda _: None) -> Scores:
    """Scores of every example's candidates, some hundred prompts at a time."""
    found: list[npt.NDArray[np.float32]] = []
    for start in range(0, len(examples), 64):
        part = examples[start : start + 64]
        found += ranker.score_many(
            [example.prompt for example in part],
            [example.candidates for example in part],
            passages=[example.passages or None for example in part],
        )
        progress(len(part))
    return found


def longest(examples: Iterable[Example]) -> list[npt.NDArray[np.float32]]:
    """The rule "longer is better", in characters."""
    return [np.array([len(c.text) for c in example.candidates], dtype=np.float32) for example in examples]


def shortest(examples: Iterable[Example]) -> list[npt.NDArray[np.float32]]:
    """The rule "shorter is better"."""
    return [-lengths for lengths in longest(examples)]


def at_random(examples: Iterable[Example], seed: int = 0) -> list[npt.NDArray[np.float32]]:
    """A coin."""
    rng = random.Random(seed)
    return [np.array([rng.random() for _ in example.candidates], dtype=np.float32) for example in examples]


BASELINES: dict[str, Callable[[Iterable[Example]], list[npt.NDArray[np.float32]]]] = {
    "longest": longest,
    "shortest": shortest,
    "random": at_random,
}
"""Rules that could embarrass a ranker, by name."""


def held_out_table(examples: Sequence[Example], scores: Scores, by: str = "subset") -> dict[str, dict[str, Any]]:
    """Agreement of ``scores`` (one array an example) by slice beside the length rules, as plain data for a model card."""
    found = evaluate_scores("", examples, scores, by)
    rules = {name: evaluate_scores(name, examples, BASELINES[name](examples), by) for name in ("shortest", "longest")}
    table: dict[str, dict[str, Any]] = {}
    for key, mine in {"all": found.agreement, **found.slices}.items():
        theirs = {name: report.agreement if key == "all" else report.slices[key] for name, report in rules.items()}
        table[key] = {
            "num_prompts": mine.num_prompts,
            "agreement": round(mine.value, 4),
            "interval": [round(mine.low, 4), round(mine.high, 4)],
            **{name: round(rule.value, 4) for name, rule in theirs.items()},
        }
    return table
