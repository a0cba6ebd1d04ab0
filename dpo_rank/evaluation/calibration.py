"""One temperature that turns margins into probabilities. numpy only: a ranker in production can be recalibrated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_rank.data.formats import Example
from dpo_rank.errors import DataError

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e4


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What fitting a temperature found.

    Attributes:
        temperature: the fitted one; at `MAX_TEMPERATURE` the margins carry no information, at `MIN_TEMPERATURE` every pair is right.
        num_prompts, num_pairs: what it was fitted on.
        agreement: share of pairs in the right order, ties half.
        nll_before, nll_after: mean negative log-likelihood of the labels in nats, at the old and the new temperature
            (0.693 is a coin).

    """

    temperature: float
    num_prompts: int
    num_pairs: int
    agreement: float
    nll_before: float
    nll_after: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def fit_temperature(margins: npt.NDArray[np.float64], weights: npt.NDArray[np.float64] | None = None) -> float:
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
        return float((weight * margins * _sigmoid(-inverse * margins)).sum())

    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    if slope(low) <= 0:
        return MAX_TEMPERATURE
    if slope(high) >= 0:
        return MIN_TEMPERATURE
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 1 / low


def nll(margins: npt.NDArray[np.float64], temperature: float, weights: npt.NDArray[np.float64] | None = None) -> float:
    """Mean negative log-likelihood in nats of preferences with these margins."""
    return float(np.average(np.logaddexp(0.0, -margins / temperature), weights=weights))


def calibrate(examples: Sequence[Example], scores: Sequence[npt.NDArray[np.float32]], temperature: float = 1.0) -> CalibrationReport:
    """Fit a temperature on the labelled pairs of several prompts, every prompt weighing the same.

    Args:
        examples: labelled rows.
        scores: one array an example, in the order of its candidates.
        temperature: the one in use so far.

    Raises:
        DataError: no pair that the labels tell apart.

    """
    used = [np.array([float(s[a]) - float(s[b]) for a, b in example.pairs()]) for example, s in zip(examples, scores, strict=True)]
    used = [margins for margins in used if len(margins)]
    if not used:
        raise DataError("no labelled pair to fit a temperature on")
    margins = np.concatenate(used)
    weights = np.concatenate([np.full(len(m), 1 / len(m)) for m in used])
    fitted = fit_temperature(margins, weights)
    right = (margins > 0) + 0.5 * (margins == 0)
    return CalibrationReport(
        temperature=fitted,
        num_prompts=len(used),
        num_pairs=len(margins),
        agreement=float(np.average(right, weights=weights)),
        nll_before=nll(margins, temperature, weights),
        nll_after=nll(margins, fitted, weights),
    )


def _sigmoid(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.exp(-np.logaddexp(0.0, -x))
