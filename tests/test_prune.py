"""The forecast of a candidate's reward from the tokens read so far."""

import numpy as np
import pytest

from dpo_rank.prune import FIRST_PIECE, Partial, forecast, plausible


def test_what_is_read_to_its_end_is_certain():
    ratios = np.array([0.5, -1.0, 0.25], dtype=np.float32)
    found = forecast([Partial(ratios, 3), Partial(ratios[:2], 2)], 0.1, "sum")
    assert found.rewards == pytest.approx([-0.025, -0.05])
    assert found.chance(0, 1) == 1
    assert found.chance(1, 0) == 0
    found = forecast([Partial(ratios, 3), Partial(ratios[:2], 2)], 0.1, "mean")
    assert found.rewards == pytest.approx([-0.025 / 3, -0.025])


def test_a_longer_rest_is_less_sure():
    rng = np.random.default_rng(0)
    near, far = (Partial(rng.normal(0, 1, 16).astype(np.float32), total) for total in (20, 200))
    ahead = Partial(np.full(16, 0.3, dtype=np.float32), 16)
    found = forecast([near, far, ahead], 1.0, "sum")
    assert found.first(1) == [2]
    assert found.chance(0, 2) < found.chance(1, 2) < 0.5


def test_nothing_read_is_no_error():
    empty = np.zeros(0, dtype=np.float32)
    assert plausible(forecast([Partial(empty, 0), Partial(empty, 0)], 0.1, "mean"), 1, 0.01) == [0, 1]


def best_survives(rng: np.random.Generator, least: float) -> tuple[bool, float]:
    """Prune 8 drawn candidates of unlike length, whose first tokens are unlike the rest; whether the best is found, and the share read."""
    lengths = rng.integers(20, 400, 8)
    tokens = [-0.05 - 0.4 * np.exp(-np.arange(n) / 16) + rng.normal(0, 0.03) + rng.normal(0, 0.4, n) for n in lengths]
    upto, alive, read = FIRST_PIECE, list(range(8)), np.zeros(8, dtype=int)
    while True:
        read[alive] = np.maximum(read[alive], np.minimum(upto, lengths[alive]))
        found = forecast([Partial(t[:r].astype(np.float32), len(t)) for t, r in zip(tokens, read, strict=True)], 1.0, "sum")
        alive = plausible(found, 1, least)
        if all(read[i] == lengths[i] for i in alive):
            break
        upto *= 2
    return found.first(1)[0] == int(np.argmax([t.sum() for t in tokens])), read.sum() / lengths.sum()


@pytest.mark.parametrize("least", [0.05, 0.2])
def test_the_best_is_lost_no_more_often_than_was_asked_for(least):
    rng = np.random.default_rng(1)
    survived, share = zip(*(best_survives(rng, least) for _ in range(300)), strict=True)
    assert np.mean(survived) >= 1 - least - 2 * np.sqrt(least * (1 - least) / 300)
    assert np.mean(share) < 0.95


def test_only_a_hopeless_candidate_is_dropped():
    good, bad = np.full(16, 0.5, dtype=np.float32), np.full(16, -5.0, dtype=np.float32)
    noise = np.tile(np.array([0.1, -0.1], dtype=np.float32), 8)
    lines = [Partial(good + noise, 17), Partial(bad + noise, 17), Partial(good - noise, 17)]
    assert plausible(forecast(lines, 0.1, "sum"), 1, 0.01) == [0, 2]
    assert plausible(forecast(lines[:2], 0.1, "sum"), 2, 0.01) == [0, 1]
    assert plausible(forecast([Partial(good, 16), Partial(good, 16)], 0.1, "sum"), 1, 0.01) == [0, 1]
