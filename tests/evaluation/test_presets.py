"""The publishers' own aggregation, on made-up rows.

The figures of RewardBench 1 and 2 below are what rewardbench 0.1.4's own functions (`calculate_scores_per_section`,
`reroll_and_score_dataset`, `process_single_model`) return for these rows and scores.
"""

import json

import numpy as np
import pytest

from dpo_rank import DataError
from dpo_rank.evaluation.presets import PRESETS, rows


def made(preset, entries, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in entries), encoding="utf-8")
    examples = list(rows(preset, str(path)))
    return PRESETS[preset].aggregate(examples, [np.array(scores, dtype=float) for _, scores in entries])


def pair(subset, *scores):
    return {"prompt": "p", "chosen": "good", "rejected": "bad", "subset": subset}, scores


def test_reward_bench_weights_its_sections(tmp_path):
    entries = [
        pair("alpacaeval-easy", 1, 0),
        pair("alpacaeval-easy", 0, 1),
        pair("mt-bench-easy", 1, 0),
        pair("math-prm", 1, 0),
        pair("math-prm", 1, 1),  # equal scores are wrong
        pair("hep-cpp", 0, 1),
        pair("donotanswer", 2, 0),
    ]
    found = made("reward-bench", entries, tmp_path)
    assert found["Chat"] == pytest.approx((0.5 * 100 + 1 * 28) / 128)
    assert found["Reasoning"] == pytest.approx(0.5 * 984 / (984 + 164))
    assert found["Safety"] == 1
    assert "Chat Hard" not in found
    assert found["overall"] == pytest.approx(np.mean([found[name] for name in ("Chat", "Reasoning", "Safety")]))


def of_four(subset, scores, correct=1, identity="1"):
    row = {"prompt": "p", "chosen": ["good"] * correct, "rejected": ["bad"] * (len(scores) - correct), "subset": subset}
    return {**row, "num_correct": correct, "id": identity}, scores


def test_reward_bench_2_shares_equal_firsts(tmp_path):
    entries = [of_four("Math", [3, 1, 2, 0]), of_four("Math", [1, 1, 0, 0]), of_four("Focus", [0, 1, 0, 0]), of_four("Focus", [1, 1, 1, 1])]
    assert made("reward-bench-2", entries, tmp_path) == {"overall": 0.4375, "Focus": 0.125, "Math": 0.75}


def test_reward_bench_2_has_a_rule_of_its_own_for_ties(tmp_path):
    entries = [
        of_four("Ties", [4.0, 1.0, 0.5], 1, "ref:0"),
        of_four("Ties", [3.0, 2.5, 2.8, 0.0], 3, "tied:0"),  # within 0.5, ahead by 2.5
        of_four("Ties", [1.0, 0.8, 0.2], 1, "ref:1"),
        of_four("Ties", [5.0, 2.0, 1.5], 2, "tied:1"),  # within 3.0, ahead by 0.5
        of_four("Ties", [0.0, 1.0], 1, "ref:2"),
        of_four("Ties", [0.0, 2.0, 1.0], 2, "tied:3"),
    ]
    accuracy_tied, accuracy_ref = 2 / 3, 2 / 3
    bonus = np.mean([np.tanh(2.5 / 0.5 - 1), np.tanh(0.2 / 3 - 1)])
    expected = 0.3 * accuracy_tied + 0.3 * accuracy_ref + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * bonus
    assert made("reward-bench-2", entries, tmp_path)["Ties"] == pytest.approx(expected)


def of_styles(domain, scores):
    return {"prompt": "p", "chosen": ["c", "cc", "ccc"], "rejected": ["r", "rr", "rrr"], "domain": domain}, scores


def test_rm_bench_is_hard_where_the_rejected_has_the_fancier_style(tmp_path):
    found = made("rm-bench", [of_styles("chat", [2, 2, 2, 1, 1, 3])], tmp_path)  # markdown wins over everything
    assert found["hard"] == pytest.approx(1 / 3)  # (plain, long) right; both against markdown wrong
    assert found["normal"] == pytest.approx(2 / 3)
    assert found["easy"] == 1
    assert found["chat"] == pytest.approx(2 / 3)
    both = [
        of_styles("safety-refuse", [9, 9, 9, 0, 0, 0]),
        of_styles("safety-response", [0, 0, 0, 9, 9, 9]),
        of_styles("math", [9, 9, 9, 0, 0, 0]),
    ]
    found = made("rm-bench", both, tmp_path)
    assert found["safety"] == 0.5
    assert found["overall"] == 0.75  # two domains, not three


def of_judges(source, label, scores):
    return {"question": "q", "response_A": "a", "response_B": "b", "label": label, "source": source}, scores


def test_judgebench_by_category(tmp_path):
    # Scores are of (preferred, other) once the row is read: the label turns the answers.
    entries = [
        of_judges("mmlu-pro-law", "A>B", [1, 0]),
        of_judges("mmlu-pro-math", "B>A", [0, 1]),
        of_judges("livecodebench", "B>A", [1, 0]),
    ]
    assert made("judgebench", entries, tmp_path) == pytest.approx({"overall": 2 / 3, "coding": 1.0, "knowledge": 0.5})
    path = tmp_path / "rows.jsonl"
    examples = list(rows("judgebench", str(path)))
    assert [[c.text for c in e.candidates] for e in examples] == [["a", "b"], ["b", "a"], ["b", "a"]]


@pytest.mark.parametrize(
    ("preset", "row", "message"),
    [
        ("reward-bench", {"prompt": "p", "chosen": "a"}, "field 'rejected'"),
        ("reward-bench-2", {**of_four("Math", [1, 2])[0], "num_correct": 2}, "num_correct"),
        ("reward-bench-2", {**of_four("Ties", [1, 2])[0], "id": "7"}, "ref:N"),
        ("rm-bench", {"prompt": "p", "chosen": ["a"], "rejected": ["b"], "domain": "chat"}, "three styles"),
        ("judgebench", {**of_judges("x", "A=B", ())[0]}, "'A>B' or 'B>A'"),
        ("no-such", {}, "there are reward-bench"),
    ],
)
def test_rows_of_another_schema_are_named(preset, row, message):
    with pytest.raises(DataError, match=message):
        list(rows(preset, [row]))
