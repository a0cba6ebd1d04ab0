"""Agreement and its interval, against scipy and hand-computed cases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_rank import DataError
from dpo_rank.data.formats import parse
from dpo_rank.evaluation.agreement import BASELINES, best_of_n, evaluate_scores, figure, held_out_table, pair_agreement

values = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3)), min_size=2, max_size=8)


@given(values)
def test_agreement_is_the_area_of_somers(pairs):
    stats = pytest.importorskip("scipy.stats", reason="the dev extra installs scipy")
    scores, labels = ([p[i] for p in pairs] for i in (0, 1))
    if len(set(scores)) == 1 and len(set(labels)) > 1:
        assert pair_agreement(scores, labels) == 0.5  # scipy has no answer where every score is the same
    elif len(set(labels)) == 1:
        with pytest.raises(DataError):
            pair_agreement(scores, labels)
    else:  # Somers' D(score | label) = 2 * agreement - 1
        assert pair_agreement(scores, labels) == pytest.approx((stats.somersd(labels, scores).statistic + 1) / 2)


def test_hand_computed():
    assert pair_agreement([3, 2, 1], [1, 0, 0]) == 1
    assert pair_agreement([1, 1], [1, 0]) == 0.5
    assert pair_agreement([1, 2, 3], [2, 1, 0]) == 0
    assert best_of_n([1, 5, 5], [0, 1, 0]) == 0.5


def test_the_interval_is_the_bootstrap_of_scipy():
    stats = pytest.importorskip("scipy.stats", reason="the dev extra installs scipy")
    sample = np.random.default_rng(3).random(80)
    ours = figure(list(sample))
    theirs = stats.bootstrap((sample,), np.mean, method="percentile", n_resamples=5000, random_state=1).confidence_interval
    assert ours.value == pytest.approx(sample.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


ROWS = [
    parse({"prompt": "a", "chosen": "long answer", "rejected": "x", "subset": "one"}),
    parse({"prompt": "b", "chosen": "y", "rejected": "long answer", "subset": "two"}),
    parse({"prompt": "c", "completions": ["1", "22", "333"], "scores": [0, 1, 5], "subset": "two"}),
    parse({"prompt": "d", "completions": ["1", "22"], "scores": [1, 1]}),
]


def test_a_report_has_slices_and_best_of_n():
    report = evaluate_scores("longest", ROWS, BASELINES["longest"](ROWS), "subset")
    assert report.agreement.num_prompts == 3
    assert report.agreement.value == pytest.approx(2 / 3)
    assert {key: value.value for key, value in report.slices.items()} == {"one": 1.0, "two": 0.5}
    assert report.best_of_n is not None
    assert report.best_of_n.value == 5
    shortest = evaluate_scores("shortest", ROWS, BASELINES["shortest"](ROWS))
    assert shortest.agreement.value == pytest.approx(1 / 3)


def test_the_table_of_a_card():
    table = held_out_table(ROWS, BASELINES["longest"](ROWS))
    assert table["all"]["agreement"] == table["all"]["longest"] == 0.6667
    assert table["two"]["num_prompts"] == 2


def test_rows_without_labels_are_an_error():
    with pytest.raises(DataError):
        evaluate_scores("x", ROWS[3:], [np.zeros(2)])
