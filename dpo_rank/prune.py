"""Which candidates need not be read to their end.

A reward is a sum of log-ratios over tokens. What a candidate has got so far, the number of its tokens that are left, and the spread
of the log-ratios seen for this prompt say how plausible it is that it still comes to the front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_rank.scoring.engine import FloatArray, RewardForm

FIRST_PIECE = 16
"""Tokens of every candidate that are read before the first one is dropped; each later piece is as long as all before it."""


@dataclass(frozen=True, slots=True)
class Partial:
    """A candidate that was read in part.

    Attributes:
        ratios: log-ratios in nats of the tokens read, policy - reference.
        num_tokens: of the whole candidate.

    """

    ratios: FloatArray
    num_tokens: int

    @property
    def left(self) -> int:
        """Tokens not yet read."""
        return self.num_tokens - len(self.ratios)


def forecast(partials: Sequence[Partial], beta: float, form: RewardForm) -> tuple[list[float], list[float]]:
    """Expected rewards and their standard deviations once all tokens are read.

    The tokens left are taken to have the mean log-ratio of all tokens seen. A candidate's own mean varies around it by ``between``
    (what the candidates' means vary beyond what their tokens explain: the method of moments of a one-way random-effects model), so
    ``n`` tokens left add the variance ``n * within + n ** 2 * between``.
    """
    seen = [partial.ratios.astype(np.float64) for partial in partials if len(partial.ratios)]
    everything = np.concatenate(seen) if seen else np.zeros(1)
    mean = float(everything.mean())
    within = float(np.mean([part.var(ddof=1) for part in seen if len(part) > 1] or [0.0]))
    between = max(0.0, float(np.var([part.mean() for part in seen], ddof=1)) - within * float(np.mean([1 / len(part) for part in seen])))
    means, deviations = [], []
    for partial in partials:
        scale = beta if form == "sum" else beta / partial.num_tokens
        means.append(scale * (float(partial.ratios.sum(dtype=np.float64)) + partial.left * mean))
        deviations.append(scale * math.sqrt(partial.left * within + partial.left**2 * between))
    return means, deviations


def plausible(partials: Sequence[Partial], beta: float, form: RewardForm, top_k: int, least: float) -> list[int]:
    """Candidates that may still be among the first ``top_k``.

    Each of them, with probability ``least`` or more, beats the one that is expected to hold the last of these places.
    """
    means, deviations = forecast(partials, beta, form)
    last = sorted(range(len(means)), key=lambda index: -means[index])[top_k - 1]

    def chance(index: int) -> float:
        spread = math.hypot(deviations[index], deviations[last])
        margin = means[index] - means[last]
        return float(margin >= 0) if spread == 0 else 0.5 * math.erfc(-margin / spread / math.sqrt(2))

    return [index for index in range(len(means)) if index == last or means[index] >= means[last] or chance(index) >= least]
