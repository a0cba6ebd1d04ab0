"""Several annotators a row: how far they agree with each other, and a ranker with them.

A row brings its annotators' judgments under ``annotations``: one list of scores (one a candidate, null where one was not
judged) for each annotator, in the same places in every row; null for an annotator who did not see the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_rank.data.formats import Example
from dpo_rank.errors import DataError
from dpo_rank.evaluation.intervals import Figure, figure

Choices = list[int | None]  # per annotator: 1 (the first of the pair), -1, 0 (a tie), None (not judged)


@dataclass(frozen=True, slots=True)
class Annotators:
    """A ranker among annotators, over all pairs of a row's candidates; ties give half credit.

    Attributes:
        majority: agreement with what most annotators prefer (pairs without a majority left out).
        each: agreement with one annotator after the other, their mean.
        ceiling: agreement of each annotator with the majority of the others: what a person reaches.
        alpha: Krippendorff's, nominal, of the annotators' choices; 1 is perfect, 0 chance. NaN where all chose alike.

    """

    majority: Figure
    each: Figure
    ceiling: Figure | None
    alpha: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def measure(examples: Sequence[Example], scores: Sequence[npt.NDArray[np.float32]]) -> Annotators:
    """Measure scores (one array an example) against every annotator of the rows that have ``annotations``.

    Raises:
        DataError: no row has annotations, or one has them in another form.

    """
    majority: list[tuple[float, int]] = []
    each: list[tuple[float, int]] = []
    ceiling: list[tuple[float, int]] = []
    units: list[Choices] = []
    for row, (example, values) in enumerate(zip(examples, scores, strict=True)):
        if "annotations" not in example.raw:
            continue
        for a, b, choices in pairs(example):
            order = int(np.sign(float(values[a]) - float(values[b])))
            units.append(choices)
            given = [choice for choice in choices if choice is not None]
            majority += [(_credit(order, most), row) for most in _majority(given)]
            each += [(_credit(order, choice), row) for choice in given if choice]
            for place, choice in enumerate(given):
                others = given[:place] + given[place + 1 :]
                ceiling += [(_credit(choice, most), row) for most in _majority(others)]
    if not majority or not each:
        raise DataError("no row has annotations that tell its candidates apart")
    return Annotators(_mean(majority), _mean(each), _mean(ceiling) if ceiling else None, krippendorff_alpha(units))


def pairs(example: Example) -> list[tuple[int, int, Choices]]:
    """Every pair of candidates with each annotator's choice.

    Raises:
        DataError: the annotations have another form.

    """
    given, count = example.raw["annotations"], len(example.candidates)
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise DataError(f"{example.where}: field 'annotations': expected a list with one entry an annotator")
    for place, judged in enumerate(given):
        numbers = isinstance(judged, Sequence) and len(judged) == count
        if judged is not None and not (numbers and all(v is None or isinstance(v, (int, float)) for v in judged)):
            raise DataError(f"{example.where}: field 'annotations': entry {place}: expected {count} numbers (or null)")
    return [
        (a, b, [None if j is None or j[a] is None or j[b] is None else int(np.sign(j[a] - j[b])) for j in given])
        for a in range(count)
        for b in range(a + 1, count)
    ]


def krippendorff_alpha(units: Sequence[Sequence[Any]]) -> float:
    """Krippendorff's alpha for nominal data (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    Args:
        units: the values that the annotators gave each unit; None where one gave none.

    Returns:
        1 for perfect agreement, 0 for chance; NaN where there is one value only, or no unit with two values.

    """
    values = sorted({repr(v) for unit in units for v in unit if v is not None})
    place = {value: index for index, value in enumerate(values)}
    coincidences = np.zeros((len(values), len(values)))
    for unit in units:
        given = [place[repr(v)] for v in unit if v is not None]
        if len(given) > 1:
            counts = np.bincount(given, minlength=len(values)).astype(np.float64)
            coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(given) - 1)
    totals = coincidences.sum(axis=1)
    total = totals.sum()
    expected = total * total - float(totals @ totals)
    if not expected:
        return float("nan")
    observed = total - float(np.trace(coincidences))
    return float(1 - (total - 1) * observed / expected)


def _majority(choices: Sequence[int]) -> list[int]:
    """What most choices say: one value, or none."""
    lean = int(np.sign(sum(choices)))
    return [lean] if lean else []


def _credit(order: int, choice: int) -> float:
    return 0.5 if order == 0 else float(order == choice)


def _mean(found: Sequence[tuple[float, int]]) -> Figure:
    return figure([value for value, _ in found], clusters=[row for _, row in found])
