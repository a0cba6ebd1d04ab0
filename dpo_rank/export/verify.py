"""Does an exported graph score as the models it came from?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from dpo_rank.errors import ModelError
from dpo_rank.scoring.engine import Engine, FloatArray, RewardForm, score
from dpo_rank.scoring.pack import Group, pack

TOLERANCE_NATS = 1e-4


@dataclass(frozen=True, slots=True)
class PrecisionReport:
    """How a lower precision orders candidates, against fp32 on the same rows.

    Attributes:
        num_prompts, num_candidates: what was scored.
        spearman: mean rank correlation within a prompt.
        same_best: share of prompts with the same best candidate.
        median_difference: median |score - fp32 score|.
        margin_noise: standard deviation of a margin's difference from its fp32 value, over all pairs of a prompt's candidates.

    """

    num_prompts: int
    num_candidates: int
    spearman: float
    same_best: float
    median_difference: float
    margin_noise: float

    def to_dict(self) -> dict[str, float | int]:
        """As plain data."""
        return asdict(self)


def check_against(exact: Engine, exported: Engine, vocabulary: int, max_tokens: int) -> float:
    """Compare two engines on ragged rows: every axis at size 1, at odd sizes, and large, and on prompts read in pieces before
    their candidates; the largest difference in nats.

    Raises:
        ModelError: they differ by more than `TOLERANCE_NATS`.

    """
    found: list[tuple[FloatArray, FloatArray]] = []
    for groups in check_groups(vocabulary, max_tokens):
        row = pack(groups)
        found += zip(exact.logps(row), exported.logps(row), strict=True)
        if sum(len(group.prompt) for group in groups) >= 50:
            continue  # a long prompt in small pieces would take long
        whole = list(itertools.chain.from_iterable(score(exact, groups)))
        for budget in (7, 64):
            cut = itertools.chain.from_iterable(score(exported, groups, budget))
            for a, b in zip(whole, cut, strict=True):
                found += [(a.policy, b.policy), (a.reference, b.reference)]
    worst = float(np.max([np.abs(left - right).max() for left, right in found]))  # numpy's, which does not lose a NaN
    if not worst <= TOLERANCE_NATS:
        raise ModelError(f"the exported graph differs from the models by {worst:.2g} nats (more than {TOLERANCE_NATS}): not accepted")
    return worst


def check_groups(vocabulary: int, max_tokens: int, seed: int = 0) -> list[list[Group]]:
    """Rows to verify with: random ids, sizes that an export could have frozen."""
    rng = np.random.default_rng(seed)
    long = max(2, min(max_tokens // 2 - 1, 384))
    medium = min(long, 30)

    def tokens(count: int) -> list[int]:
        return [int(token) for token in rng.integers(0, vocabulary, count)]

    ragged = Group(tokens(12), [tokens(9), tokens(1), tokens(4)])
    return [
        [Group(tokens(1), [tokens(1)])],
        [Group(tokens(1), [tokens(2)])],
        [ragged, Group(tokens(1), [tokens(3)]), Group(tokens(7), [tokens(1), tokens(1)])],
        [Group(tokens(long), [tokens(long), tokens(1), *(tokens(5) for _ in range(40))])],
        [Group(tokens(3), [tokens(2)]) for _ in range(17)],
        [Group(tokens(medium), [tokens(medium), tokens(2), tokens(medium)])],
    ]


def compare_precisions(
    exact: Engine, other: Engine, groups: Sequence[Group], beta: float, form: RewardForm, token_budget: int
) -> PrecisionReport:
    """Score ``groups`` with both engines and compare the orders."""
    left, right = (
        [np.array([item.reward(beta, form) for item in items]) for items in score(engine, groups, token_budget)]
        for engine in (exact, other)
    )
    several = [(a, b) for a, b in zip(left, right, strict=True) if len(a) > 1]
    errors = [a - b for a, b in several]
    correlations = [float(np.corrcoef(_ranks(a), _ranks(b))[0, 1]) for a, b in several]
    return PrecisionReport(
        num_prompts=len(several),
        num_candidates=sum(len(a) for a, _ in several),
        spearman=float(np.mean(correlations)),
        same_best=float(np.mean([a.argmax() == b.argmax() for a, b in several])),
        median_difference=float(np.median(np.abs(np.concatenate(errors)))),
        # A margin is a difference of two scores of one prompt: twice the variance around the prompt's mean.
        margin_noise=float(np.sqrt(2 * np.mean(np.concatenate([error - error.mean() for error in errors]) ** 2))),
    )


def _ranks(values: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return np.argsort(np.argsort(values)).astype(np.float64)
