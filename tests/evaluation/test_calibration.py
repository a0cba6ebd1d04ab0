"""The temperature maximises the likelihood."""

import numpy as np
import pytest

from dpo_rank import DataError
from dpo_rank.data.formats import parse
from dpo_rank.evaluation.calibration import MAX_TEMPERATURE, MIN_TEMPERATURE, calibrate, fit_temperature, nll


def test_it_is_the_optimum_that_scipy_finds():
    optimize = pytest.importorskip("scipy.optimize", reason="the dev extra installs scipy")
    rng = np.random.default_rng(0)
    margins, weights = rng.normal(0.4, 1.5, 300), rng.random(300)
    found = fit_temperature(margins, weights)
    theirs = optimize.minimize_scalar(
        lambda log: nll(margins, np.exp(log), weights), bounds=(-6, 9), method="bounded", options={"xatol": 1e-9}
    )
    assert found == pytest.approx(np.exp(theirs.x), rel=1e-3)


def test_a_known_case():
    # Three of four pairs right at margin 1: sigmoid(1 / T) = 0.75.
    assert fit_temperature(np.array([1.0, 1.0, 1.0, -1.0])) == pytest.approx(1 / np.log(3), rel=1e-6)


def test_the_ends():
    assert fit_temperature(np.array([1.0, 2.0])) == MIN_TEMPERATURE
    assert fit_temperature(np.array([-1.0, 0.5])) == MAX_TEMPERATURE
    with pytest.raises(DataError):
        fit_temperature(np.array([]))


def rows(*margins_of_a_prompt):
    """One row a prompt: a preferred candidate and, for each margin, one that scores so much lower."""
    for margins in margins_of_a_prompt:
        row = {"prompt": "x", "completions": ["a", *("b" for _ in margins)], "scores": [1, *(0 for _ in margins)]}
        yield parse(row), np.array([0.0, *(-m for m in margins)], dtype=np.float32)


def fitted(*margins_of_a_prompt):
    examples, scores = zip(*rows(*margins_of_a_prompt), strict=True)
    return calibrate(examples, scores)


def test_every_prompt_weighs_the_same():
    report = fitted([1.0] * 50, [-0.5], [0.7], [])
    assert report.num_prompts == 3
    assert report.num_pairs == 52
    assert report.agreement == pytest.approx(2 / 3)
    assert report.temperature == pytest.approx(fitted([1.0], [-0.5], [0.7]).temperature)
    assert report.nll_after <= report.nll_before
