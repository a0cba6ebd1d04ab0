"""List measures against scipy, scikit-learn and every subset counted one by one."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_rank.evaluation import lists

values = st.lists(st.tuples(st.integers(-2, 3), st.integers(0, 3)), min_size=2, max_size=6)


def split(pairs):
    return [float(s) for s, _ in pairs], [float(y) for _, y in pairs]


def orders(scores):
    """Every order that the scores allow."""
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            yield order


@settings(deadline=None)
@given(values)
def test_the_curve_is_the_mean_over_all_subsets(pairs):
    scores, labels = split(pairs)
    curve = lists.best_of_n_curve(scores, labels)
    for n in range(1, len(scores) + 1):
        found = []
        for subset in itertools.combinations(range(len(scores)), n):
            top = max(scores[i] for i in subset)
            found.append(np.mean([labels[i] for i in subset if scores[i] == top]))
        assert curve[n - 1] == pytest.approx(np.mean(found))
    assert curve[-1] == pytest.approx(lists.best_of_n(scores, labels))
    assert (lists.regret_curve(scores, labels) >= -1e-9).all()


@settings(deadline=None)
@given(values)
def test_correlations_are_scipys(pairs):
    stats = pytest.importorskip("scipy.stats", reason="the dev extra installs scipy")
    scores, labels = split(pairs)
    if len(set(scores)) == 1 or len(set(labels)) == 1:
        assert lists.kendall_tau(scores, labels) == lists.spearman(scores, labels) == 0
        return
    assert lists.kendall_tau(scores, labels) == pytest.approx(stats.kendalltau(scores, labels).statistic)
    assert lists.spearman(scores, labels) == pytest.approx(stats.spearmanr(scores, labels).statistic)


@settings(deadline=None)
@given(values, st.integers(1, 6))
def test_ndcg_is_sklearns(pairs, k):
    metrics = pytest.importorskip("sklearn.metrics", reason="the dev extra installs scikit-learn")
    scores, labels = split(pairs)
    if max(labels) > 0:
        assert lists.ndcg(scores, labels, k) == pytest.approx(metrics.ndcg_score([labels], [scores], k=k))
    else:
        assert lists.ndcg(scores, labels, k) == 1


def test_ndcg_of_ranks():
    assert lists.ndcg([3, 2, 1], [-1, -2, -3]) == pytest.approx(1)
    assert lists.ndcg([1, 2, 3], [-1, -2, -3]) == pytest.approx((1 / math.log2(3) + 2 / 2) / (2 + 1 / math.log2(3)))


@settings(deadline=None)
@given(values)
def test_average_precision_is_sklearns(pairs):
    metrics = pytest.importorskip("sklearn.metrics", reason="the dev extra installs scikit-learn")
    scores, labels = split(pairs)
    best = np.array(labels) == max(labels)
    assert lists.average_precision(scores, labels) == pytest.approx(metrics.average_precision_score(best, scores))


@settings(deadline=None)
@given(values, st.integers(1, 4))
def test_hits_and_reciprocal_ranks_are_means_over_the_orders_of_equal_scores(pairs, k):
    scores, labels = split(pairs)
    best = [y == max(labels) for y in labels]
    hits, ranks = [], []
    for order in orders(scores):
        hits.append(any(best[i] for i in order[:k]))
        ranks.append(1 / (1 + next(place for place, i in enumerate(order) if best[i])))
    assert lists.hit(scores, labels, k) == pytest.approx(np.mean(hits))
    assert lists.reciprocal_rank(scores, labels) == pytest.approx(np.mean(ranks))


@given(values, st.randoms(use_true_random=False))
def test_the_order_of_candidates_changes_nothing(pairs, rng):
    turned = list(pairs)
    rng.shuffle(turned)
    from dpo_rank.evaluation.agreement import LIST_MEASURES

    for of in LIST_MEASURES.values():
        assert of(*split(pairs)) == pytest.approx(of(*split(turned)))
