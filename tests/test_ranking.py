"""Value types."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_rank import Candidate
from dpo_rank.ranking import make_ranking, preference, softmax

scores = st.lists(st.floats(-500, 500), min_size=1, max_size=9)


@given(scores, st.floats(0.05, 50))
def test_softmax_and_order(values, temperature):
    ranking = make_ranking(
        [Candidate(str(v)) for v in values], values, [1] * len(values), [False] * len(values), temperature=temperature, calibrated=True
    )
    assert sum(candidate.probability for candidate in ranking) == pytest.approx(1)
    assert [candidate.score for candidate in ranking] == sorted(values, reverse=True)
    equal = [a.index < b.index for a, b in itertools.pairwise(ranking) if a.score == b.score]
    assert all(equal)
    if len(values) == 2:
        a, _ = softmax(values, temperature)
        assert a == pytest.approx(preference(values[0] - values[1], temperature))


def test_a_near_tie():
    def near(margin, temperature):
        return make_ranking(
            [Candidate("a"), Candidate("b")], [margin, 0.0], [1, 1], [False] * 2, temperature=temperature, calibrated=True
        ).near_tie

    assert near(0.1, 1.0)
    assert not near(0.1, 0.1)
    assert not make_ranking([Candidate("a")], [0.0], [1], [False], temperature=1.0, calibrated=True).near_tie


def test_a_margin_within_the_noise_of_the_precision_is_a_near_tie():
    def near(margin, noise):
        candidates = [Candidate("a"), Candidate("b")]
        return make_ranking(candidates, [margin, 0.0], [1, 1], [False] * 2, temperature=0.01, calibrated=True, noise=noise).near_tie

    assert near(0.1, 0.2)
    assert not near(0.3, 0.2)
    assert not near(0.1, 0.0)


def test_extreme_margins_do_not_overflow():
    assert preference(1e6, 1e-3) == 1.0
    assert preference(-1e6, 1e-3) == 0.0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("x", Candidate("x")),
        ({"text": "x", "id": 1}, Candidate("x", id="1")),
        ({"content": "x", "finish_reason": "stop"}, Candidate("x")),
        ({"content": "x", "finish_reason": "length"}, Candidate("x", finished=False)),
        ({"text": "x", "metadata": {"a": 1}, "b": 2}, Candidate("x", metadata={"a": 1, "b": 2})),
    ],
)
def test_candidates(value, expected):
    assert Candidate.of(value) == expected
