"""Agreement among people, against Krippendorff's own example and cases by hand."""

import math

import numpy as np
import pytest

from dpo_rank import DataError
from dpo_rank.data.formats import parse
from dpo_rank.evaluation.annotators import krippendorff_alpha, measure

N = None
# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: four observers, twelve units, missing data.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
    [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
]


def test_alpha_is_the_papers():
    assert krippendorff_alpha(list(zip(*OBSERVERS, strict=True))) == pytest.approx(0.743, abs=5e-4)


def test_alpha_at_its_ends():
    assert krippendorff_alpha([[1, 1], [2, 2], [1, 1]]) == 1
    assert math.isnan(krippendorff_alpha([[1, 1], [1, 1]]))
    assert krippendorff_alpha([["a", "b"], ["b", "a"]]) < 0


def row(annotations, prompt="p"):
    return parse({"prompt": prompt, "completions": ["one", "two"], "scores": [1, 0], "annotations": annotations})


def test_by_hand():
    rows = [row([[1, 0], [1, 0], [0, 1]], "a"), row([[1, 0], [1, 1], None], "b")]
    found = measure(rows, [np.array([2.0, 1.0]), np.array([1.0, 2.0])])
    assert found.majority.value == 0.5  # right on the first row, wrong on the second
    assert found.each.value == pytest.approx(2 / 4)  # two of three, and none of one: a tie is no choice
    # Row 1: each of the first two sees one against one (no majority of the others), the third sees two against it.
    # Row 2: the first sees a tie (nothing), the second, who calls it a tie, gets half for the first's choice.
    assert found.ceiling.value == pytest.approx((0 + 0.5) / 2)


def test_bad_annotations_are_named():
    with pytest.raises(DataError, match="annotations.*entry 0"):
        measure([row([[1, 2, 3]])], [np.array([1.0, 0.0])])
    with pytest.raises(DataError, match="annotations"):
        measure([row("yes")], [np.array([1.0, 0.0])])
    with pytest.raises(DataError, match="no row has annotations"):
        measure([parse({"prompt": "p", "chosen": "a", "rejected": "b"})], [np.array([1.0, 0.0])])
