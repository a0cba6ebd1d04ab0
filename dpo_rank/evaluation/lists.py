"""What a ranking of N labelled candidates is worth: one number a prompt, from its scores and labels.

Equal scores count as an order drawn at random: every measure but `average_precision` is its expectation over such orders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Values = Sequence[float] | npt.NDArray[np.float32] | FloatArray


def best_of_n_curve(scores: Values, labels: Values) -> FloatArray:
    """Expected label of the highest-scored of n candidates drawn without replacement, for n = 1..N: unbiased, from all subsets at once.

    The candidate in place i (0-based) is the best of a random n-subset with probability ``C(N-1-i, n-1) / C(N, n)``.

    Returns:
        float64 ``[N]``; the first is the mean label, the last the label of the candidate ranked first.

    """
    s, y = _arrays(scores, labels)
    order = np.argsort(-s, kind="stable")
    mean_of_tied = _tied_means(s[order], y[order])
    count = len(s)
    weights = np.array([[math.comb(count - 1 - place, n - 1) / math.comb(count, n) for place in range(count)] for n in range(1, count + 1)])
    return np.asarray(weights @ mean_of_tied)


def regret_curve(scores: Values, labels: Values) -> FloatArray:
    """What the best of n loses against a perfect choice of the same n, for n = 1..N, in units of the labels."""
    return best_of_n_curve(labels, labels) - best_of_n_curve(scores, labels)


def best_of_n(scores: Values, labels: Values) -> float:
    """Mean label of the candidates with the highest score."""
    s, y = _arrays(scores, labels)
    return float(y[s == s.max()].mean())


def ndcg(scores: Values, labels: Values, k: int | None = None) -> float:
    """Normalised discounted cumulative gain of the first ``k`` (Järvelin & Kekäläinen 2002), gain = label, discount ``log2(place + 1)``.

    Labels below 0 (ranks) are raised so that the lowest is 0. With all gains 0 it is 1: nothing can be lost.
    """
    s, y = _arrays(scores, labels)
    gains = y - min(0.0, float(y.min()))
    discounts = 1 / np.log2(np.arange(len(s)) + 2)
    discounts[k if k is not None else len(s) :] = 0
    order = np.argsort(-s, kind="stable")
    ideal = float(np.sort(gains)[::-1] @ discounts)
    return float(_tied_means(s[order], gains[order]) @ discounts) / ideal if ideal > 0 else 1.0


def reciprocal_rank(scores: Values, labels: Values) -> float:
    """1 / place of the first candidate with the highest label."""
    s, y = _arrays(scores, labels)
    best = y == y.max()
    first = s[best].max()
    ahead, tied = int((s > first).sum()), s == first
    size, good = int(tied.sum()), int((tied & best).sum())
    chances = [math.comb(size - 1 - place, good - 1) / math.comb(size, good) for place in range(size - good + 1)]
    return float(sum(chance / (ahead + place + 1) for place, chance in enumerate(chances)))


def average_precision(scores: Values, labels: Values) -> float:
    """Mean, over the candidates with the highest label, of the share of such candidates among those scored no lower."""
    s, y = _arrays(scores, labels)
    best = y == y.max()
    return float(np.mean([(best & (s >= value)).sum() / (s >= value).sum() for value in s[best]]))


def hit(scores: Values, labels: Values, k: int = 1) -> float:
    """Whether a candidate with the highest label is among the first ``k``."""
    s, y = _arrays(scores, labels)
    best = y == y.max()
    if k >= len(s):
        return 1.0
    edge = np.sort(s)[::-1][k - 1]
    if (best & (s > edge)).any():
        return 1.0
    tied = s == edge
    size, good, drawn = int(tied.sum()), int((tied & best).sum()), k - int((s > edge).sum())
    return 1 - math.comb(size - good, drawn) / math.comb(size, drawn)


def kendall_tau(scores: Values, labels: Values) -> float:
    """Kendall's tau-b; 0 where either side is all one value."""
    s, y = _arrays(scores, labels)
    a, b = np.sign(s[:, None] - s[None]), np.sign(y[:, None] - y[None])
    scale = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / scale if scale else 0.0


def spearman(scores: Values, labels: Values) -> float:
    """Spearman's rank correlation, tied values sharing their mean rank; 0 where either side is all one value."""
    s, y = _arrays(scores, labels)
    a, b = mean_ranks(s), mean_ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else 0.0


def mean_ranks(values: FloatArray) -> FloatArray:
    """Ranks from 1, lowest first; tied values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse])


def _arrays(scores: Values, labels: Values) -> tuple[FloatArray, FloatArray]:
    return np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)


def _tied_means(sorted_scores: FloatArray, values: FloatArray) -> FloatArray:
    """``values`` with those of equal scores replaced by their mean."""
    _, inverse = np.unique(sorted_scores, return_inverse=True)
    return np.asarray((np.bincount(inverse, weights=values) / np.bincount(inverse))[inverse])
