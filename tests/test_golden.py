"""Every format since 1 loads and scores as it did when it was written."""

import json
from pathlib import Path

import numpy as np
import pytest

from dpo_rank import Ranker
from tests.cases import ANSWERS, MESSAGES, PROMPT

FORMATS = sorted(path for path in (Path(__file__).parent / "golden").glob("format-*"))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("path", FORMATS, ids=lambda path: path.name)
def test_scores_are_those_recorded(path, precision):
    ranker = Ranker.load(path / "artifact", precision=precision)
    expected = json.loads((path / "scores.json").read_text())[precision]
    found = {
        "plain": ranker.score(PROMPT, ANSWERS),
        "messages": ranker.score(MESSAGES, ANSWERS),
        "passages": ranker.score(PROMPT, ANSWERS, passages=["Boil it."]),
    }
    for name, scores in found.items():  # 8-bit kernels differ from processor to processor in the last bits of a product
        np.testing.assert_allclose(scores, expected[name], atol=1e-4 if precision == "fp32" else 2e-2)
    assert ranker.calibrated
    assert ranker.temperature == 0.7


@pytest.mark.parametrize("path", FORMATS, ids=lambda path: path.name)
def test_sessions_and_small_budgets_work_on_every_format(path):
    ranker = Ranker.load(path / "artifact", token_budget=20)
    expected = json.loads((path / "scores.json").read_text())["fp32"]["plain"]
    np.testing.assert_allclose(ranker.score(PROMPT, ANSWERS), expected, atol=1e-4)
    with ranker.session(PROMPT) as session:
        session.add(ANSWERS)
        found = {candidate.index: candidate.score for candidate in session.rank()}
    np.testing.assert_allclose([found[index] for index in range(len(ANSWERS))], expected, atol=1e-4)


def test_there_is_one():
    assert FORMATS
