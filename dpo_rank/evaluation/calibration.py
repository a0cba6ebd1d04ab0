"""How sure a ranker may be: probabilities from margins, their reliability, and when it had better abstain.

numpy only: a ranker in production can be recalibrated.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_rank.artifact import Manifest
from dpo_rank.confidence import Confidence, Familiarity, LengthCorrection, Level, features
from dpo_rank.data.formats import Example, prompt_hash
from dpo_rank.errors import DataError
from dpo_rank.evaluation.intervals import Figure, resampled
from dpo_rank.scoring.engine import TokenScores

FloatArray = npt.NDArray[np.float64]
Scores = Sequence[npt.NDArray[Any]]
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e4
COVERAGES = tuple(round(share / 10, 1) for share in range(1, 11))
_BINS, _LEAST_ROWS = 10, 10  # bins at most, and rows that a bin has at least
_DRAWS = 300


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What fitting found.

    Attributes:
        temperature: the fitted one; at `MAX_TEMPERATURE` the margins carry no information, at `MIN_TEMPERATURE` every pair is right.
        num_prompts, num_pairs: what it was fitted on.
        agreement: share of pairs in the right order, ties half.
        nll_before, nll_after: mean negative log-likelihood of the labels in nats, at the old and the new temperature
            (0.693 is a coin).
        confidence: how often the best is wrong at which margin.
        familiarity: how the candidates read; None where log-probs were not given.
        correction: for length, where it was asked for.

    """

    temperature: float
    num_prompts: int
    num_pairs: int
    agreement: float
    nll_before: float
    nll_after: float
    confidence: Confidence | None = None
    familiarity: Familiarity | None = None
    correction: LengthCorrection | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Labelled pairs of several prompts, every prompt weighing the same.

    Attributes:
        margins: score of the preferred minus score of the other candidate.
        weights: of each pair; they add up to the number of rows.
        rows: which row each pair is of.
        clusters: which prompt each pair is of.

    """

    margins: FloatArray
    weights: FloatArray
    rows: npt.NDArray[np.intp]
    clusters: tuple[Hashable, ...]

    @property
    def right(self) -> FloatArray:
        """1 where the order is the labels', 0 where not, a half for equal scores."""
        return np.asarray((self.margins > 0) + 0.5 * (self.margins == 0))

    def confidence(self, temperature: float) -> FloatArray:
        """Probability that the candidate scored higher is the preferred one, at least a half."""
        return sigmoid(np.abs(self.margins) / temperature)


def pairs_of(examples: Sequence[Example], scores: Scores) -> Pairs:
    """The labelled pairs of rows.

    Raises:
        DataError: there is none.

    """
    margins: list[float] = []
    weights: list[float] = []
    rows: list[int] = []
    clusters: list[int] = []
    for row, (example, s) in enumerate(zip(examples, scores, strict=True)):
        found = example.pairs()
        margins += [float(s[a]) - float(s[b]) for a, b in found]
        weights += [1 / max(1, len(found))] * len(found)
        rows += [row] * len(found)
        clusters += [prompt_hash(example.prompt)] * len(found)
    if not margins:
        raise DataError("no labelled pair to fit a temperature on")
    return Pairs(np.array(margins), np.array(weights), np.array(rows), tuple(clusters))


def fit_temperature(margins: FloatArray, weights: FloatArray | None = None) -> float:
    """The temperature ``T`` that maximises the likelihood ``sum w log sigmoid(margin / T)`` (Guo et al. 2017, arXiv 1706.04599).

    Args:
        margins: score of the preferred minus score of the other candidate, one a pair.
        weights: weight of each pair.

    The likelihood is concave in ``1 / T``; its slope is bisected.

    """
    if not len(margins):
        raise DataError("no labelled pair to fit a temperature on")
    weight = np.ones_like(margins) if weights is None else weights

    def slope(inverse: float) -> float:
        return float((weight * margins * sigmoid(-inverse * margins)).sum())

    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    if slope(low) <= 0:
        return MAX_TEMPERATURE
    if slope(high) >= 0:
        return MIN_TEMPERATURE
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 1 / low


def nll(margins: FloatArray, temperature: float, weights: FloatArray | None = None) -> float:
    """Mean negative log-likelihood in nats of preferences with these margins."""
    return float(np.average(np.logaddexp(0.0, -margins / temperature), weights=weights))


def calibrate(examples: Sequence[Example], scores: Scores, temperature: float = 1.0) -> CalibrationReport:
    """Fit a temperature on the labelled pairs of several prompts, every prompt weighing the same, and measure the confidence.

    Args:
        examples: labelled rows.
        scores: one array an example, in the order of its candidates.
        temperature: the one in use so far.

    Raises:
        DataError: no pair that the labels tell apart.

    """
    found = pairs_of(examples, scores)
    fitted = fit_temperature(found.margins, found.weights)
    return CalibrationReport(
        temperature=fitted,
        num_prompts=len(set(found.rows.tolist())),
        num_pairs=len(found.margins),
        agreement=float(np.average(found.right, weights=found.weights)),
        nll_before=nll(found.margins, temperature, found.weights),
        nll_after=nll(found.margins, fitted, found.weights),
        confidence=fit_confidence(examples, scores),
    )


def fit(
    manifest: Manifest, examples: Sequence[Example], scores: Sequence[Sequence[TokenScores]], *, correction: bool = False
) -> tuple[Manifest, CalibrationReport]:
    """Everything that a ranker says of its own scores, from labelled rows and the log-probs of their candidates.

    Returns:
        the manifest with it, and what was found.

    """
    from dpo_rank.evaluation.style import fit_correction

    rewards = [np.array([item.reward(manifest.beta, manifest.reward) for item in items]) for items in scores]
    report = calibrate(examples, rewards, manifest.temperature)
    report = replace(report, familiarity=fit_familiarity(scores))
    if correction:
        tokens = [np.array([len(item.policy) for item in items]) for items in scores]
        report = replace(report, correction=fit_correction(examples, rewards, tokens))
    fitted = replace(
        manifest,
        temperature=report.temperature,
        calibrated=True,
        confidence=report.confidence,
        familiarity=report.familiarity,
        correction=report.correction,
    )
    return fitted, report


# -- reliability -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of like confidence: their mean confidence, the share in the right order, and their share of the weight."""

    confidence: float
    right: float
    weight: float


@dataclass(frozen=True, slots=True)
class Reliability:
    """How far probabilities can be taken at their word.

    Attributes:
        temperature: that they were made with.
        ece: expected calibration error over ten bins of equal mass, fewer below 100 rows (Naeini et al. 2015), a probability.
        ece_of_perfect: what a model whose probabilities are exactly right would show on average at this number of pairs.
        brier: mean squared difference of probability and outcome (a coin: 0.25).
        nll: nats (a coin: 0.693).
        bins: the least confident first.

    """

    temperature: float
    ece: Figure
    ece_of_perfect: float
    brier: float
    nll: float
    bins: tuple[Bin, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def reliability(found: Pairs, temperature: float, seed: int = 0) -> Reliability:
    """Reliability of the pairs' probabilities at a temperature."""
    confidence, right, weights = found.confidence(temperature), found.right, found.weights
    clusters = sorted(set(found.clusters), key=repr)
    members: dict[Hashable, list[int]] = {cluster: [] for cluster in clusters}
    for place, cluster in enumerate(found.clusters):
        members[cluster].append(place)
    places = [np.array(members[cluster]) for cluster in clusters]

    def redrawn(draws: npt.NDArray[np.intp]) -> FloatArray:
        picked = (np.concatenate([places[which] for which in draw]) for draw in draws)
        return np.array([_ece(_bins(confidence[rows], right[rows], weights[rows])) for rows in picked])

    bins = _bins(confidence, right, weights)
    draws = resampled(redrawn, len(places), seed, _DRAWS)
    # Resampling adds noise to every bin, and noise only raises this error: what it adds on average is taken off the interval.
    low, high = np.maximum(0.0, np.quantile(draws, [0.025, 0.975]) - (draws.mean() - _ece(bins)))
    rng = np.random.default_rng(seed)
    ideal = [_ece(_bins(confidence, (rng.random(len(right)) < confidence).astype(np.float64), weights)) for _ in range(_DRAWS)]
    return Reliability(
        temperature=temperature,
        ece=Figure(_ece(bins), float(low), float(high), len(places)),
        ece_of_perfect=float(np.mean(ideal)),
        brier=float(np.average((confidence - right) ** 2, weights=weights)),
        nll=nll(found.margins, temperature, weights),
        bins=tuple(bins),
    )


def _bins(confidence: FloatArray, right: FloatArray, weights: FloatArray) -> list[Bin]:
    """Ten bins of equal mass, fewer where there are few rows; equal confidences stay together."""
    count = int(np.clip(round(float(weights.sum())) // _LEAST_ROWS, 1, _BINS))
    order = np.argsort(confidence, kind="stable")
    mass = np.cumsum(weights[order])
    which = np.minimum((count * (mass - weights[order] / 2) / mass[-1]).astype(int), count - 1)
    values, first = np.unique(confidence[order], return_index=True)
    which = which[first][np.searchsorted(values, confidence[order])]
    found = []
    for number in np.unique(which):
        rows = order[which == number]
        mean = [float(np.average(values, weights=weights[rows])) for values in (confidence[rows], right[rows])]
        found.append(Bin(mean[0], mean[1], float(weights[rows].sum() / mass[-1])))
    return found


def _ece(bins: Sequence[Bin]) -> float:
    return sum(item.weight * abs(item.confidence - item.right) for item in bins)


# -- abstention --------------------------------------------------------------------------------------------------------


def outcomes(examples: Sequence[Example], scores: Scores) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Of each labelled row: the margin of the best over the runner-up, and whether the best is not among those with the top label."""
    margins, wrong = [], []
    for example, s in zip(examples, scores, strict=True):
        if example.pairs():
            order = np.argsort(-np.asarray(s, dtype=np.float64), kind="stable")
            labels = example.scores or ()
            margins.append(float(s[order[0]]) - float(s[order[1]]))
            wrong.append(labels[order[0]] < max(labels))
    return np.array(margins), np.array(wrong, dtype=bool)


def fit_confidence(examples: Sequence[Example], scores: Scores) -> Confidence:
    """How many of the rankings with at least a margin were wrong, at ten fixed coverages.

    Raises:
        DataError: no row has labels that tell its candidates apart.

    """
    margins, wrong = outcomes(examples, scores)
    if not len(margins):
        raise DataError("no row has labels that tell its candidates apart")
    ranked = -np.sort(-margins)
    thresholds = sorted({float(ranked[math.ceil(share * len(ranked)) - 1]) for share in COVERAGES}, reverse=True)
    levels = tuple(Level(least, int((margins >= least).sum()), int(wrong[margins >= least].sum())) for least in thresholds)
    sizes = [len(example.candidates) for example in examples if example.pairs()]
    return Confidence(levels, len(margins), int(np.median(sizes)))


def risk_coverage(examples: Sequence[Example], scores: Scores) -> list[tuple[float, float]]:
    """Share of rankings kept, and share of them that are wrong, from the largest margin to all (equal margins together)."""
    margins, wrong = outcomes(examples, scores)
    order = np.argsort(-margins, kind="stable")
    kept = np.arange(1, len(order) + 1)
    risk = np.cumsum(wrong[order]) / kept
    last = np.append(margins[order][1:] < margins[order][:-1], True)
    return [(float(k / len(order)), float(r)) for k, r in zip(kept[last], risk[last], strict=True)]


def fit_familiarity(scores: Sequence[Sequence[TokenScores]]) -> Familiarity:
    """The 1 and 99 % quantiles of how rows' candidates read under the reference.

    Raises:
        DataError: there are no tokens.

    """
    found = np.array([features([item.reference for item in items]) for items in scores if sum(len(item.reference) for item in items)])
    if not len(found):
        raise DataError("no tokens to learn from what is familiar")
    (mean_low, spread_low, _), (mean_high, spread_high, rare_high) = np.quantile(found, [0.01, 0.99], axis=0)
    return Familiarity((float(mean_low), float(mean_high)), (float(spread_low), float(spread_high)), float(rare_high), len(found))


def sigmoid(x: FloatArray) -> FloatArray:
    """Logistic function, without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)))
