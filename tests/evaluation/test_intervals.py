"""Intervals, paired and clustered, and McNemar's test, against scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_rank import DataError
from dpo_rank.evaluation.intervals import difference, figure, mcnemar


def test_the_interval_is_the_bootstrap_of_scipy():
    stats = pytest.importorskip("scipy.stats", reason="the dev extra installs scipy")
    sample = np.random.default_rng(3).random(80)
    ours = figure(list(sample))
    theirs = stats.bootstrap((sample,), np.mean, method="percentile", n_resamples=5000, random_state=1).confidence_interval
    assert ours.value == pytest.approx(sample.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_rows_of_one_prompt_are_drawn_together():
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 2, 60).astype(float)
    rows = np.repeat(prompts, 9)
    clusters = np.repeat(np.arange(60), 9)
    one, many, naive = figure(prompts), figure(rows, clusters=clusters), figure(rows)
    assert many.value == pytest.approx(one.value)
    assert many.num_prompts == 60
    assert many.high - many.low == pytest.approx(one.high - one.low, abs=0.02)
    assert naive.high - naive.low < 0.5 * (many.high - many.low)  # nine copies of a prompt are no new evidence


def test_clusters_of_unequal_size_weigh_by_their_rows():
    found = figure([1, 1, 1, 0], clusters=["a", "a", "a", "b"])
    assert found.value == 0.75
    assert found.num_prompts == 2
    assert (found.low, found.high) == (0.0, 1.0)


def test_a_paired_interval_is_narrower_than_the_two_rankers_own():
    rng = np.random.default_rng(1)
    hard = rng.random(400)
    ours, theirs = (hard > 0.4).astype(float), (hard > 0.45).astype(float)
    gap = difference(ours, theirs)
    assert gap.value == pytest.approx(ours.mean() - theirs.mean())
    assert gap.excludes_zero
    assert figure(ours).low < figure(theirs).high  # their own intervals overlap


def test_few_prompts_are_said_to_be_few():
    found = figure([1.0] * 5)
    assert found.few
    assert not found.excludes_zero
    assert "few" in str(found)
    with pytest.raises(DataError):
        figure([])


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_scipys_exact_binomial(pairs):
    stats = pytest.importorskip("scipy.stats", reason="the dev extra installs scipy")
    found = mcnemar([a for a, _ in pairs], [b for _, b in pairs])
    discordant = found.only_first + found.only_second
    assert found.only_first == sum(a and not b for a, b in pairs)
    expected = 1.0 if discordant == 0 else stats.binomtest(found.only_first, discordant).pvalue
    assert found.p_value == pytest.approx(expected)
