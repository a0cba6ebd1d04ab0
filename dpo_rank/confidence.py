"""What a ranker knows of its own errors, as an artifact stores it: when it is sure enough, what it has seen, how it leans on length.

Fitted by `dpo_rank.evaluation.calibration` and `dpo_rank.evaluation.style`; applied at every ranking.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_rank.errors import DataError

CHANCE_OF_A_WRONG_BOUND = 0.1
"""A risk that `Confidence` promises is exceeded with at most this probability over the held-out rows that it was fitted on."""
RARE_NATS = -8.0
"""A token less likely than this under the reference counts as rare."""


@dataclass(frozen=True, slots=True)
class Level:
    """Of the held-out rankings whose margin is at least ``threshold``: how many, and how many put a wrong candidate first."""

    threshold: float
    accepted: int
    wrong: int


@dataclass(frozen=True, slots=True)
class Confidence:
    """How the margin of the best over the runner-up tells right from wrong, on held-out rankings.

    A margin is trusted for a risk when an exact binomial test says so: at each of the fixed coverages (10 %, 20 %, ...) the
    hypothesis "the accepted are wrong more often than ``max_risk``" is tested at `CHANCE_OF_A_WRONG_BOUND` divided by the number
    of coverages ("learn then test", Angelopoulos et al. 2021, arXiv 2110.01052; the bound is that of selective classification,
    Geifman & El-Yaniv 2017, arXiv 1705.08500). It holds for prompts and candidates like the held-out ones, drawn as they were.

    Attributes:
        levels: one for each coverage, the most confident first.
        num_prompts: held-out rankings.
        num_candidates: of the median ranking: with other numbers the promise is another one.

    """

    levels: tuple[Level, ...]
    num_prompts: int
    num_candidates: int

    def threshold(self, max_risk: float) -> float | None:
        """The smallest margin at which the best is wrong in at most ``max_risk`` of rankings; None where no margin is enough.

        Raises:
            DataError: ``max_risk`` is not between 0 and 1.

        """
        if not 0 < max_risk < 1:
            raise DataError(f"max_risk is a share between 0 and 1, not {max_risk!r}")
        limit = math.log(CHANCE_OF_A_WRONG_BOUND / len(self.levels))
        enough = [level.threshold for level in self.levels if log_binomial_tail(level.wrong, level.accepted, max_risk) <= limit]
        return min(enough) if enough else None

    def coverage(self, max_risk: float) -> float:
        """Share of the held-out rankings that are confident at ``max_risk``; 0 where none is."""
        least = self.threshold(max_risk)
        return 0.0 if least is None else max(level.accepted for level in self.levels if level.threshold >= least) / self.num_prompts

    @property
    def smallest_risk(self) -> float:
        """The smallest risk that these rows can promise at any margin."""
        share = CHANCE_OF_A_WRONG_BOUND / len(self.levels)
        return min(upper_bound(level.wrong, level.accepted, share) for level in self.levels)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        levels = [[level.threshold, level.accepted, level.wrong] for level in self.levels]
        return {"levels": levels, "num_prompts": self.num_prompts, "num_candidates": self.num_candidates}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Confidence:
        """From `to_dict`."""
        levels = tuple(Level(float(threshold), int(accepted), int(wrong)) for threshold, accepted, wrong in data["levels"])
        if not levels or not all(0 <= level.wrong <= level.accepted and math.isfinite(level.threshold) for level in levels):
            raise ValueError("'confidence' (levels of a finite threshold, accepted and wrong)")
        return cls(levels, int(data["num_prompts"]), int(data["num_candidates"]))


@dataclass(frozen=True, slots=True)
class Familiarity:
    """How the reference reads the candidates of a prompt like those that the ranker was fitted on: 1 and 99 % quantiles.

    Attributes:
        mean: mean log-prob of a token, nats: lowest and highest usual value.
        spread: standard deviation of the tokens' log-probs, nats.
        rare: share of tokens below `RARE_NATS`; the highest usual one.
        num_prompts: what the quantiles are of.

    """

    mean: tuple[float, float]
    spread: tuple[float, float]
    rare: float
    num_prompts: int

    def unfamiliar(self, reference: Sequence[npt.NDArray[np.float32]]) -> bool:
        """Whether candidates with these log-probs under the reference (one array each) lie beyond what is usual."""
        if not sum(map(len, reference)):
            return False
        mean, spread, rare = features(reference)
        return not (self.mean[0] <= mean <= self.mean[1] and self.spread[0] <= spread <= self.spread[1] and rare <= self.rare)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"mean": list(self.mean), "spread": list(self.spread), "rare": self.rare, "num_prompts": self.num_prompts}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Familiarity:
        """From `to_dict`."""
        (low, high), (least, most) = ([float(v) for v in data[name]] for name in ("mean", "spread"))
        return cls((low, high), (least, most), float(data["rare"]), int(data["num_prompts"]))


def features(reference: Sequence[npt.NDArray[np.float32]]) -> tuple[float, float, float]:
    """Mean and standard deviation of all candidates' token log-probs in nats, and the share below `RARE_NATS`."""
    tokens = np.concatenate([np.asarray(part, dtype=np.float64) for part in reference])
    return float(tokens.mean()), float(tokens.std()), float((tokens < RARE_NATS).mean())


@dataclass(frozen=True, slots=True)
class LengthCorrection:
    """The reward to be expected from an answer's length alone, which ``correction=True`` takes off every score.

    Attributes:
        tokens, reward: knots of a piecewise linear curve, constant beyond its ends.
        temperature: fitted on corrected scores.
        confidence: of rankings by corrected scores, where it was measured.

    """

    tokens: tuple[float, ...]
    reward: tuple[float, ...]
    temperature: float
    confidence: Confidence | None = None

    def of(self, num_tokens: float | npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """What is taken off the score of an answer of ``num_tokens``."""
        return np.asarray(np.interp(num_tokens, self.tokens, self.reward))

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        confidence = self.confidence.to_dict() if self.confidence else None
        return {"tokens": list(self.tokens), "reward": list(self.reward), "temperature": self.temperature, "confidence": confidence}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LengthCorrection:
        """From `to_dict`."""
        tokens, reward = (tuple(float(v) for v in data[name]) for name in ("tokens", "reward"))
        rising = all(a < b for a, b in itertools.pairwise(tokens))
        temperature = float(data["temperature"])
        if not tokens or len(tokens) != len(reward) or not rising or not np.isfinite([*tokens, *reward]).all() or not temperature > 0:
            raise ValueError("'correction' (rising tokens, as many finite rewards, a temperature above 0)")
        confidence = data.get("confidence")
        return cls(tokens, reward, temperature, Confidence.from_dict(confidence) if confidence else None)


def log_binomial_tail(successes: int, trials: int, probability: float) -> float:
    """Log of P(Binomial(trials, probability) <= successes)."""
    if successes >= trials:
        return 0.0
    if not 0 < probability < 1:
        return 0.0 if probability <= 0 else -math.inf
    whole = math.lgamma(trials + 1)
    odds, rest = math.log(probability), math.log1p(-probability)
    terms = [whole - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * odds + (trials - k) * rest for k in range(successes + 1)]
    top = max(terms)
    return min(0.0, top + math.log(sum(math.exp(term - top) for term in terms)))


def upper_bound(successes: int, trials: int, chance: float) -> float:
    """The share that a binomial's true one exceeds with at most ``chance`` (Clopper & Pearson 1934)."""
    if successes >= trials:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if log_binomial_tail(successes, trials, middle) > math.log(chance) else (low, middle)
    return high
