"""Agreement and its interval, against scipy and hand-computed cases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_rank import DataError
from dpo_rank.data.formats import parse
from dpo_rank.evaluation.agreement import (
    compare,
    evaluate_scores,
    held_out_table,
    leakage,
    pair_agreement,
    slices_of,
    tie_aware,
)
from dpo_rank.evaluation.baselines import RULES
from dpo_rank.evaluation.lists import best_of_n

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


ROWS = [
    parse({"prompt": "a", "chosen": "long answer", "rejected": "x", "subset": "one"}),
    parse({"prompt": "b", "chosen": "y", "rejected": "long answer", "subset": "two"}),
    parse({"prompt": "c", "completions": ["1", "22", "333"], "scores": [0, 1, 5], "subset": "two"}),
    parse({"prompt": "d", "completions": ["1", "22"], "scores": [1, 1]}),
]


def test_a_report_has_slices_and_best_of_n():
    report = evaluate_scores("longest", ROWS, RULES["longest"](ROWS), ("subset",))
    assert report.agreement.num_prompts == 3
    assert report.agreement.value == pytest.approx(2 / 3)
    assert {key: value.value for key, value in report.slices["subset"].items()} == {"one": 1.0, "two": 0.5}
    assert report.best_of_n is not None
    assert report.best_of_n.value == 5
    shortest = evaluate_scores("shortest", ROWS, RULES["shortest"](ROWS))
    assert shortest.agreement.value == pytest.approx(1 / 3)


def test_the_table_of_a_card():
    table = held_out_table(ROWS, RULES["longest"](ROWS))
    assert table["all"]["agreement"] == table["all"]["longest"] == 0.6667
    assert table["two"]["num_prompts"] == 2


def test_rows_without_labels_are_an_error():
    with pytest.raises(DataError):
        evaluate_scores("x", ROWS[3:], [np.zeros(2)])


def test_scores_that_are_no_numbers_are_named():
    with pytest.raises(DataError, match=r"foreign: row: the score of candidate 1 is nan"):
        evaluate_scores("foreign", ROWS[:1], [np.array([1.0, np.nan])])
    with pytest.raises(DataError, match="1 scores for 2 candidates"):
        evaluate_scores("foreign", ROWS[:1], [np.array([1.0])])


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 2)), min_size=2, max_size=7))
def test_tie_aware_is_the_best_of_all_thresholds(pairs):
    scores, labels = ([float(p[i]) for p in pairs] for i in (0, 1))
    share, threshold = tie_aware([np.array(scores)], [labels])
    count = len(scores)
    found = {}
    for epsilon in {0.0, *(abs(a - b) for a in scores for b in scores)}:
        right = 0
        for a in range(count):
            for b in range(a + 1, count):
                margin = scores[a] - scores[b]
                said = 0 if abs(margin) <= epsilon else np.sign(margin)
                right += said == np.sign(labels[a] - labels[b])
        found[epsilon] = right / (count * (count - 1) / 2)
    assert share == pytest.approx(max(found.values()))
    assert found[threshold] == pytest.approx(share)


def pairs_in(subset, right, wrong):
    examples = [parse({"prompt": f"{subset}{n}", "chosen": "a", "rejected": "b", "subset": subset}) for n in range(right + wrong)]
    return examples, [np.array([1.0, 0.0])] * right + [np.array([0.0, 1.0])] * wrong


def test_simpsons_paradox_is_said():
    # By subset the first is ahead in both; it met the hard one more often, so on the whole it is behind. Classic kidney stones.
    def made(parts):
        examples, scores = [], []
        for name, right, wrong in parts:
            e, s = pairs_in(name, right, wrong)
            examples, scores = examples + e, scores + s
        return examples, scores

    rows, ours = made([("easy", 9, 1), ("hard", 30, 70)])
    # The second is right on 8 of the 10 easy rows and on 35 of 100 hard ones, but loses nothing where the first does.
    theirs = [np.array([1.0, 0.0])] * 8 + [np.array([0.0, 1.0])] * 2 + [np.array([1.0, 0.0])] * 35 + [np.array([0.0, 1.0])] * 65
    first, second = (evaluate_scores(name, rows, s, ("subset",)) for name, s in (("A", ours), ("B", theirs)))
    found = compare(first, second)
    assert found.agreement.value == pytest.approx((39 - 43) / 110)
    assert found.mcnemar is not None
    by_kind = [r for r in found.reversals if "'subset'" in r]
    assert by_kind == []  # one slice for, one against: no majority says the opposite
    third = evaluate_scores("C", rows, [np.array([1.0, 0.0])] * 110, ("subset",))
    assert compare(third, first).reversals == ()
    other = [dict(row.raw, subset=name) for row, name in zip(rows, ["x"] * 5 + ["y"] * 5 + ["z"] * 100, strict=True)]
    relabelled = [parse(row) for row in other]
    mixed = [np.array([0.0, 1.0])] * 10 + [np.array([1.0, 0.0])] * 100
    ahead, behind = (evaluate_scores(name, relabelled, s, ("subset",)) for name, s in (("D", mixed), ("A", ours)))
    [text] = [r for r in compare(ahead, behind).reversals if "'subset'" in r]
    assert text == "D is ahead of A on the whole, and behind it in 2 of 3 slices by 'subset'"


def test_only_the_same_rows_compare():
    one, two = (evaluate_scores("x", rows, RULES["longest"](rows)) for rows in (ROWS[:2], ROWS[1:3]))
    with pytest.raises(DataError, match="other rows"):
        compare(one, two)


def test_slices_cover_every_row_once():
    rows = [parse({"prompt": "p" * n, "chosen": "a" * (n % 7 + 1), "rejected": "b" * (n % 5 + 1), "source": n % 3}) for n in range(1, 61)]
    for key, groups in slices_of(rows, ("source",)).items():
        together = sorted(row for group in groups.values() for row in group)
        expected = [
            n for n, row in enumerate(rows) if key != "better answer is" or len(row.candidates[0].text) != len(row.candidates[1].text)
        ]
        assert together == expected, key


def test_leaked_prompts_are_found_in_either_form():
    train = [parse({"prompt": [{"role": "user", "content": "b"}], "chosen": "x", "rejected": "y"})]
    assert leakage(train, ROWS) == ["row"]
    assert leakage([], ROWS) == []
