"""Means over prompts with their bootstrap intervals, and whether two rankers differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from dpo_rank.confidence import log_binomial_tail
from dpo_rank.errors import DataError

FloatArray = npt.NDArray[np.float64]
RESAMPLES = 2000
FEW = 20
"""With fewer prompts a bootstrap interval is too narrow to be believed (`Figure.few`)."""
_CHUNK = 2**21  # indices drawn at once


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over rows with its 95 % interval (percentile bootstrap, clustered by prompt: rows of one prompt are drawn together).

    Attributes:
        value: the mean; every row weighs the same.
        low, high: the interval.
        num_prompts: prompts it is a mean of.

    """

    value: float
    low: float
    high: float
    num_prompts: int

    @property
    def few(self) -> bool:
        """Whether there are too few prompts for the interval to be believed."""
        return self.num_prompts < FEW

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is one: its interval excludes 0, and there are enough prompts to say so."""
        return not self.few and (self.low > 0 or self.high < 0)

    def to_dict(self) -> dict[str, float | int]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})" + (f", n={self.num_prompts} is few" if self.few else "")


def figure(values: Sequence[float] | FloatArray, seed: int = 0, clusters: Sequence[Hashable] | None = None) -> Figure:
    """Mean of one value a row, with its interval.

    Args:
        values: at least one.
        seed: of the resampling.
        clusters: the prompt of each row; None: each row is a prompt of its own.

    Raises:
        DataError: there is no value.

    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise DataError("no value to take a mean of")
    sums, counts = _by_cluster(array[None], clusters)
    low, high = np.quantile(resampled(lambda draw: sums[0][draw].sum(axis=1) / counts[draw].sum(axis=1), len(counts), seed), [0.025, 0.975])
    return Figure(float(array.mean()), float(low), float(high), len(counts))


def difference(
    ours: Sequence[float] | FloatArray, theirs: Sequence[float] | FloatArray, seed: int = 0, clusters: Sequence[Hashable] | None = None
) -> Figure:
    """Mean of ``ours - theirs``, row by row: the interval of a paired comparison."""
    return figure(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64), seed, clusters)


def resampled(statistic: Callable[[npt.NDArray[np.intp]], FloatArray], count: int, seed: int = 0, resamples: int = RESAMPLES) -> FloatArray:
    """``statistic`` of bootstrap samples: it gets indices ``[draws, count]`` and returns one value a draw."""
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // count)
    parts = [statistic(rng.integers(0, count, (min(step, resamples - start), count))) for start in range(0, resamples, step)]
    return np.concatenate(parts)


def _by_cluster(values: FloatArray, clusters: Sequence[Hashable] | None) -> tuple[FloatArray, FloatArray]:
    """Sums ``[K, clusters]`` of the rows of ``values`` ``[K, rows]``, and rows of each cluster."""
    if clusters is None:
        return values, np.ones(values.shape[1])
    places: dict[Hashable, int] = {}
    which = np.array([places.setdefault(cluster, len(places)) for cluster in clusters])
    counts = np.bincount(which).astype(np.float64)
    return np.stack([np.bincount(which, weights=row) for row in values]), counts


@dataclass(frozen=True, slots=True)
class McNemar:
    """Two rankers on the same pairs: where only one of them is right.

    Attributes:
        only_first, only_second: pairs that only one of them has in order.
        p_value: two-sided, exact (McNemar 1947; binomial on the discordant pairs).

    """

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Sequence[bool] | npt.NDArray[np.bool_], second: Sequence[bool] | npt.NDArray[np.bool_]) -> McNemar:
    """Whether two rankers are right equally often, on independent pairs."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    total, least = only_first + only_second, min(only_first, only_second)
    p = 1.0 if total == 0 else min(1.0, 2 * math.exp(log_binomial_tail(least, total, 0.5)))
    return McNemar(only_first, only_second, p)
