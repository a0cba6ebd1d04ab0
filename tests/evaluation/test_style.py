"""What style explains, agreement at equal length, the correction, and both traps in the data."""

import os
from pathlib import Path

import numpy as np
import pytest

from dpo_rank import DataError
from dpo_rank.data.formats import parse, read
from dpo_rank.evaluation import style
from dpo_rank.evaluation.baselines import longest, shortest
from dpo_rank.evaluation.style import (
    corrected,
    correction_effect,
    explained,
    features,
    fit_correction,
    length_controlled,
    logistic,
    style_of_labels,
)

DATA = Path(os.environ.get("DPO_RANK_DATA", "../shared/data"))


def words(rng, count):
    return " ".join("w" * int(rng.integers(2, 9)) for _ in range(count))


def rows(count, right_when, seed=0):
    """Pairs; ``right_when(gap, rng)`` says with which probability a score is right."""
    rng = np.random.default_rng(seed)
    examples, scores = [], []
    for number in range(count):
        chosen, rejected = words(rng, int(rng.integers(5, 60))), words(rng, int(rng.integers(5, 60)))
        examples.append(parse({"prompt": f"p{number}", "chosen": chosen, "rejected": rejected}))
        right = rng.random() < right_when(len(chosen) - len(rejected), rng)
        scores.append(np.array([1.0, 0.0]) if right else np.array([0.0, 1.0]))
    return examples, scores


def test_features_count_what_they_say():
    text = "# Title\n\n- one\n- two\n1. three\n**bold** I'm sorry, perhaps I cannot say which river."
    [found] = features(parse({"prompt": "Which river?", "completions": [text], "scores": [1]}))
    assert dict(zip(style.STYLES, found, strict=True)) == {
        "length": len(text), "lists": 3, "headers": 1, "bold": 1, "refusal": 2, "hedges": 1, "overlap": 1.0,
    }  # fmt: skip


def test_a_ranker_that_counts_words_is_a_coin_at_equal_length():
    examples, scores = rows(800, lambda gap, rng: 0.9 if gap < 0 else 0.1)
    found = length_controlled(examples, scores)
    assert found.controlled.low <= 0.5 <= found.controlled.high
    assert "no better than a coin" in found.verdict


def test_a_ranker_that_reads_keeps_its_agreement():
    examples, scores = rows(800, lambda gap, rng: 0.75)
    found = length_controlled(examples, scores)
    assert found.controlled.value == pytest.approx(0.75, abs=0.05)
    assert found.matched is not None
    assert "stays" in found.verdict


def test_agreement_that_length_made_falls():
    examples, _ = rows(1, lambda gap, rng: 1)
    rng = np.random.default_rng(5)
    examples, scores = [], []
    for number in range(600):  # shorter answers are mostly the better ones, and the ranker likes short ones
        long_one, short_one = words(rng, int(rng.integers(30, 60))), words(rng, int(rng.integers(5, 25)))
        turned = rng.random() < 0.2
        chosen, rejected = (long_one, short_one) if turned else (short_one, long_one)
        examples.append(parse({"prompt": f"p{number}", "chosen": chosen, "rejected": rejected}))
        right = rng.random() < (0.1 if turned else 0.9)
        scores.append(np.array([1.0, 0.0]) if right else np.array([0.0, 1.0]))
    found = length_controlled(examples, scores)
    assert found.raw.value > 0.7
    assert found.controlled.value < 0.6
    assert "falls" in found.verdict


def test_logistic_is_sklearns():
    linear = pytest.importorskip("sklearn.linear_model", reason="the dev extra installs scikit-learn")
    rng = np.random.default_rng(2)
    columns = rng.normal(size=(300, 2))
    outcome = (rng.random(300) < 1 / (1 + np.exp(-(0.4 + columns @ [1.0, -0.5])))).astype(float)
    theirs = linear.LogisticRegression(C=1 / (1e-3 * 300), tol=1e-8).fit(columns, outcome)
    ours = logistic(columns, outcome)
    assert ours[0] == pytest.approx(theirs.intercept_[0], abs=1e-3)
    assert ours[1:] == pytest.approx(theirs.coef_[0], abs=1e-3)


def lists_of(count, lean, noise, seed=0):
    """Lists whose rewards are a curve of length plus what the labels say plus noise."""
    rng = np.random.default_rng(seed)
    examples, rewards, tokens = [], [], []
    for number in range(count):
        sizes = rng.integers(5, 200, 4)
        labels = rng.permutation(4).astype(float)
        examples.append(parse({"prompt": f"p{number}", "completions": ["x" * int(n) for n in sizes], "scores": labels.tolist()}))
        rewards.append(lean(sizes) + labels + noise * rng.normal(size=4) + 100 * rng.normal())
        tokens.append(sizes)
    return examples, rewards, tokens


@pytest.mark.parametrize("lean", [lambda n: -0.05 * n, lambda n: -3 * np.sqrt(n)])
def test_the_correction_takes_off_a_lean_and_wins_back_the_agreement(lean):
    examples, rewards, tokens = lists_of(300, lean, 0.5)
    effect = correction_effect(examples, rewards, corrected(examples, rewards, tokens))
    assert effect.gain.excludes_zero
    assert effect.after.value > 0.85 > effect.before.value
    assert effect.explained_before > 0.5
    assert effect.explained_after < 0.05
    correction = fit_correction(examples, rewards, tokens)
    sizes = np.array([20.0, 100.0, 180.0])
    assert np.diff(correction.of(sizes)) == pytest.approx(np.diff(lean(sizes)), abs=0.6)


def test_the_correction_leaves_what_does_not_lean():
    examples, rewards, tokens = lists_of(300, lambda n: 0 * n, 0.5)
    effect = correction_effect(examples, rewards, corrected(examples, rewards, tokens))
    assert abs(effect.gain.value) < 0.02


def test_the_correction_looks_at_prompts_one_by_one():
    examples, rewards, tokens = lists_of(100, lambda n: -0.05 * n, 0.1)
    shifted = [r + 1000 * number for number, r in enumerate(rewards)]
    assert fit_correction(examples, shifted, tokens).reward == pytest.approx(fit_correction(examples, rewards, tokens).reward, abs=1e-6)


def test_equally_long_answers_cannot_be_corrected():
    examples, rewards, _ = lists_of(10, lambda n: 0 * n, 1.0)
    with pytest.raises(DataError, match="equally long"):
        fit_correction(examples, rewards, [np.array([7, 7, 7, 7])] * 10)


def test_explained_variance_of_a_pure_length_rule_is_all_of_it():
    examples, _ = rows(100, lambda gap, rng: 1)
    assert explained(examples, longest(examples))["length"] == pytest.approx(1, abs=1e-6)
    rng = np.random.default_rng(1)
    noise = [rng.normal(size=2) for _ in examples]
    assert explained(examples, noise)["length"] < 0.1


def test_labels_without_a_lean_raise_no_warning():
    examples, _ = rows(200, lambda gap, rng: 1)
    found = style_of_labels(examples)
    assert found.warnings() == []
    assert 0.35 < found.together.value < 0.65


def test_labels_that_are_a_rule_are_caught():
    rng = np.random.default_rng(0)
    examples = [parse({"prompt": f"p{n}", "chosen": "yes", "rejected": "no, " + words(rng, 9)}) for n in range(60)]
    [warning] = style_of_labels(examples).warnings()
    assert "less length" in warning
    assert style_of_labels(examples).strongest == ("less length", 1.0)


@pytest.mark.skipif(not DATA.is_dir(), reason="the preference data lies outside the repository (DPO_RANK_DATA)")
def test_both_traps_of_the_data_are_caught():
    halu = [row for row in read(DATA / "halueval_qa.test.jsonl.gz") if row.pairs()]
    found = style_of_labels(halu)
    assert found.strongest[0] == "less length"
    assert found.strongest[1] > 0.95
    assert "nearly a rule of style" in found.warnings()[0]
    ranked = length_controlled(halu, shortest(halu))
    assert ranked.raw.value > 0.95
    alpaca = [row for row in read(DATA / "alpacaeval_16.test.jsonl.gz") if row.pairs()][:120]
    [warning] = style_of_labels(alpaca).warnings()
    assert "the longer answer is the better one" in warning
