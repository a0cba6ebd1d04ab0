"""The forecast of a candidate's reward from the tokens read so far."""

import numpy as np
import pytest

from dpo_rank.prune import Partial, forecast, plausible


def test_what_is_read_to_its_end_is_certain():
    ratios = np.array([0.5, -1.0, 0.25], dtype=np.float32)
    means, deviations = forecast([Partial(ratios, 3), Partial(ratios[:2], 2)], 0.1, "sum")
    assert means == pytest.approx([-0.025, -0.05])
    assert deviations == [0.0, 0.0]
    means, _ = forecast([Partial(ratios, 3), Partial(ratios[:2], 2)], 0.1, "mean")
    assert means == pytest.approx([-0.025 / 3, -0.025])


def test_the_deviation_is_that_of_a_random_walk_with_its_own_drift():
    """10,000 candidates drawn from the model behind the formula: the errors of the forecasts have the deviations that it gives."""
    rng = np.random.default_rng(0)
    own = rng.normal(-0.2, 0.3, 10_000)[:, None]
    tokens = rng.normal(own, 1.0, (10_000, 40)).astype(np.float32)
    partials = [Partial(line[:10], 40) for line in tokens]
    means, deviations = forecast(partials, 1.0, "sum")
    errors = tokens.sum(1) - np.array(means)
    assert np.std(errors) == pytest.approx(deviations[0], rel=0.03)
    assert abs(np.mean(errors)) < 0.3


def test_only_a_hopeless_candidate_is_dropped():
    good, bad = np.full(16, 0.5, dtype=np.float32), np.full(16, -5.0, dtype=np.float32)
    noise = np.tile(np.array([0.1, -0.1], dtype=np.float32), 8)
    assert plausible([Partial(good + noise, 20), Partial(bad + noise, 17), Partial(good - noise, 20)], 0.1, "sum", 1, 0.01) == [0, 2]
    assert plausible([Partial(good + noise, 20), Partial(bad + noise, 17)], 0.1, "sum", 2, 0.01) == [0, 1]
    one = [Partial(good, 16), Partial(good, 16)]
    assert plausible(one, 0.1, "sum", 1, 0.01) == [0, 1]
