"""Which candidates need not be read to their end.

A reward is a sum of log-ratios over tokens. What a candidate has got so far, the number of its tokens that are left, and the spread
of the log-ratios seen for this prompt say how plausible it is that it still comes to the front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo_rank.scoring.engine import FloatArray, RewardForm

FIRST_PIECE = 16
"""Tokens of every candidate that are read before the first one is dropped; each later piece is as long as all before it."""
CORRELATION = 2.0
"""Variance of a sum of log-ratios over that of as many independent ones: neighbours are alike (1.3 to 2.6, by sums of 16 to 128)."""


@dataclass(frozen=True, slots=True)
class Partial:
    """A candidate that was read in part.

    Attributes:
        ratios: log-ratios in nats of the tokens read, policy - reference.
        num_tokens: of the whole candidate.
        offset: added to the reward once it is read, whatever its tokens are.

    """

    ratios: FloatArray
    num_tokens: int
    offset: float = 0.0

    @property
    def left(self) -> int:
        """Tokens not yet read."""
        return self.num_tokens - len(self.ratios)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the candidates' rewards will be, as far as one can tell.

    Attributes:
        rewards: expected, exact where no token is left.
        weights: reward a nat of the tokens left, times their number.
        counts: tokens left.
        common: standard deviation of the mean log-ratio of all tokens left, in nats.
        between: variance of a candidate's own mean around it.
        within: variance of a token around that.

    """

    rewards: list[float]
    weights: list[float]
    counts: list[int]
    common: float
    between: float
    within: float

    def first(self, count: int) -> list[int]:
        """Indices of the ``count`` highest expected rewards, best first."""
        return sorted(range(len(self.rewards)), key=lambda index: -self.rewards[index])[:count]

    def chance(self, index: int, other: int) -> float:
        """Probability that a candidate's reward will be at least that of another one."""
        variance = (self.weights[index] - self.weights[other]) ** 2 * self.common**2
        variance += sum(self.weights[i] ** 2 * (self.between + self.within / max(1, self.counts[i])) for i in (index, other))
        margin = self.rewards[index] - self.rewards[other]
        return float(margin >= 0) if variance == 0 else 0.5 * math.erfc(-margin / math.sqrt(2 * variance))


def forecast(partials: Sequence[Partial], beta: float, form: RewardForm) -> Forecast:
    """Expected rewards once all tokens are read, and how sure they are.

    The tokens left are taken to have the mean log-ratio of the second halves of what was read: the first tokens of an answer are
    unlike the rest. That mean may change again by as much as it did from the first halves to the second, for all candidates alike, which
    counts where they differ in length. A candidate's own mean varies around it by what the candidates' means vary beyond what their
    tokens explain (the method of moments of a one-way random-effects model, the variance of few means taken two standard errors higher).
    """
    seen = [partial.ratios.astype(np.float64) for partial in partials if len(partial.ratios)]
    within = float(np.mean([part.var(ddof=1) for part in seen if len(part) > 1] or [0.0]))
    mean, common = _common_mean(seen, within)
    between = 0.0
    if len(seen) > 1:
        safe = 1 + 2 * math.sqrt(2 / (len(seen) - 1))
        explained = within * float(np.mean([1 / len(part) for part in seen]))
        between = max(0.0, safe * float(np.var([part.mean() for part in seen], ddof=1)) - explained)
    scales = [beta if form == "sum" else beta / max(1, partial.num_tokens) for partial in partials]
    return Forecast(
        [scale * (float(p.ratios.sum(dtype=np.float64)) + p.left * mean) + p.offset for p, scale in zip(partials, scales, strict=True)],
        [scale * p.left for p, scale in zip(partials, scales, strict=True)],
        [p.left for p in partials],
        common,
        between,
        CORRELATION * within,
    )


def _common_mean(seen: Sequence[npt.NDArray[np.float64]], within: float) -> tuple[float, float]:
    """Mean of the second halves of what was read, and how far it lies from that of the first ones, its standard error included."""
    if not seen:
        return 0.0, 0.0
    early = np.concatenate([part[: len(part) // 2] for part in seen])
    late = np.concatenate([part[len(part) // 2 :] for part in seen])
    if not len(early):
        return float(late.mean()), abs(float(late.mean()))
    change = float(late.mean() - early.mean())
    return float(late.mean()), math.hypot(change, math.sqrt(within * (1 / len(early) + 1 / len(late))))


def plausible(found: Forecast, top_k: int, least: float) -> list[int]:
    """Candidates that may still be among the first ``top_k``.

    Each of them, with probability ``least`` or more, beats the one that is expected to hold the last of these places.
    """
    best = found.first(top_k)
    return sorted({*best, *(index for index in range(len(found.rewards)) if found.chance(index, best[-1]) >= least)})
