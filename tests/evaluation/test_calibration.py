"""The temperature maximises the likelihood; probabilities, promises and what is unfamiliar, against simulations with a known truth."""

import numpy as np
import pytest

from dpo_rank import DataError
from dpo_rank.confidence import Confidence, Familiarity, log_binomial_tail, upper_bound
from dpo_rank.data.formats import parse
from dpo_rank.evaluation.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    Pairs,
    calibrate,
    fit_confidence,
    fit_familiarity,
    fit_temperature,
    nll,
    outcomes,
    reliability,
    risk_coverage,
)
from dpo_rank.scoring.engine import TokenScores


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


# -- reliability -------------------------------------------------------------------------------------------------------


def simulated(count, temperature, said, seed=0):
    """Pairs whose order is right with the probability that ``temperature`` gives their margins, said at ``said``."""
    rng = np.random.default_rng(seed)
    size = np.abs(rng.normal(0, 2, count))
    right = rng.random(count) < 1 / (1 + np.exp(-size / temperature))
    margins = np.where(right, size, -size)
    pairs = Pairs(margins, np.ones(count), np.arange(count), tuple(range(count)))
    return reliability(pairs, said)


def test_probabilities_that_are_right_show_the_error_of_a_perfect_model():
    found = simulated(4000, 1.0, 1.0)
    assert found.ece.value < found.ece_of_perfect + 0.01
    assert found.ece.low <= found.ece.value <= found.ece.high
    assert len(found.bins) == 10
    assert sum(item.weight for item in found.bins) == pytest.approx(1)


def test_overconfidence_shows():
    found = simulated(4000, 4.0, 0.5)
    assert found.ece.low > found.ece_of_perfect + 0.1
    assert found.brier > simulated(4000, 4.0, 4.0).brier


def test_by_hand():
    pairs = Pairs(np.array([1.0, -1.0]), np.ones(2), np.arange(2), (0, 1))
    found = reliability(pairs, 1.0)
    p = 1 / (1 + np.exp(-1))
    assert found.ece.value == pytest.approx(p - 0.5)
    assert found.brier == pytest.approx(((1 - p) ** 2 + p**2) / 2)


def test_the_perfect_models_error_falls_with_the_pairs():
    assert simulated(4000, 1.0, 1.0).ece_of_perfect < simulated(200, 1.0, 1.0).ece_of_perfect


# -- abstention --------------------------------------------------------------------------------------------------------


def ranked(count, risk_of, seed):
    rng = np.random.default_rng(seed)
    margins = rng.random(count)
    wrong = rng.random(count) < risk_of(margins)
    examples = [parse({"prompt": f"{n}", "chosen": "a", "rejected": "b"}) for n in range(count)]
    return examples, [np.array([-m, 0.0]) if w else np.array([m, 0.0]) for m, w in zip(margins, wrong, strict=True)]


@pytest.mark.parametrize("risk_of", [lambda m: 0.4 * (1 - m), lambda m: 0.25 + 0 * m, lambda m: 0.2 + 0 * m])
def test_the_promised_risk_is_kept_on_new_rankings(risk_of):
    """Over many calibration sets, the true risk beyond the threshold exceeds the promise in at most a tenth of them."""
    grid = np.linspace(0, 1, 2001)
    for max_risk in (0.1, 0.2):
        broken = 0
        for seed in range(60):
            least = fit_confidence(*ranked(300, risk_of, seed)).threshold(max_risk)
            if least is not None:
                broken += risk_of(grid[grid >= least]).mean() > max_risk
        assert broken <= 6 + 4  # a tenth of 60, and two standard deviations


def test_an_informative_margin_is_used():
    found = fit_confidence(*ranked(1000, lambda m: 0.5 * (1 - m), 0))
    assert found.coverage(0.2) > 0.3
    assert found.threshold(0.2) > found.threshold(0.3)
    assert found.threshold(0.001) is None
    assert found.coverage(0.001) == 0
    assert 0 < found.smallest_risk < 0.1
    assert found.threshold(found.smallest_risk + 1e-6) is not None
    assert found.threshold(found.smallest_risk - 1e-3) is None
    with pytest.raises(DataError, match="between 0 and 1"):
        found.threshold(1.0)
    assert Confidence.from_dict(found.to_dict()) == found


def test_the_binomial_bound_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="the dev extra installs scipy")
    for successes, trials, p in ((0, 10, 0.1), (3, 50, 0.2), (40, 300, 0.1), (7, 7, 0.5)):
        assert np.exp(log_binomial_tail(successes, trials, p)) == pytest.approx(stats.binom.cdf(successes, trials, p))
        theirs = stats.beta.ppf(0.95, successes + 1, trials - successes) if successes < trials else 1.0
        assert upper_bound(successes, trials, 0.05) == pytest.approx(theirs, abs=1e-9)


def test_risk_against_coverage_ends_at_the_share_that_is_wrong():
    examples, scores = ranked(200, lambda m: 0.5 * (1 - m), 1)
    curve = risk_coverage(examples, scores)
    wrong = np.mean([s[0] < s[1] for s in scores])
    assert curve[-1] == (1.0, pytest.approx(wrong))
    assert curve[len(curve) // 5][1] < wrong
    tied = risk_coverage(examples[:3], [np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([3.0, 0.0])])
    assert tied == [(pytest.approx(1 / 3), 0.0), (1.0, pytest.approx(1 / 3))]  # equal margins come together


def test_of_equal_labels_either_best_is_right():
    example = parse({"prompt": "x", "completions": ["a", "b", "c"], "scores": [1, 1, 0]})
    margins, wrong = outcomes([example, example], [np.array([1.0, 3.0, 0.0]), np.array([0.0, 0.5, 2.0])])
    assert margins.tolist() == [2.0, 1.5]
    assert wrong.tolist() == [False, True]


# -- the unfamiliar ----------------------------------------------------------------------------------------------------


def reads(mean, count, seed):
    rng = np.random.default_rng(seed)
    return [[TokenScores(*(rng.normal(mean, 2, 40).astype(np.float32),) * 2) for _ in range(3)] for _ in range(count)]


def test_what_reads_otherwise_is_unfamiliar():
    familiar = fit_familiarity(reads(-3, 400, 0))
    flagged = [np.mean([familiar.unfamiliar([t.reference for t in items]) for items in reads(mean, 200, 1)]) for mean in (-3, -6, -1)]
    assert flagged[0] < 0.1
    assert min(flagged[1:]) > 0.9
    assert not familiar.unfamiliar([])
    assert Familiarity.from_dict(familiar.to_dict()) == familiar
