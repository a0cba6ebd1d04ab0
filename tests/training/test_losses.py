"""Losses against a direct float64 computation, and what must not change them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_rank.training.losses import LOSSES, sigmoid

floats = st.floats(-30, 30, width=32)


@given(floats, floats)
def test_a_pair_is_minus_log_sigmoid_of_the_margin(a, b):
    loss = sigmoid(torch.tensor([[a, b]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1.0, 0.0]]))
    assert float(loss) == pytest.approx(
        math.log1p(math.exp(-(a - b))) if a > b else math.log1p(math.exp(a - b)) - (a - b), rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize("name", LOSSES)
@given(values=st.lists(st.tuples(floats, st.integers(0, 3)), min_size=2, max_size=6), data=st.data())
def test_order_and_padding_change_nothing(name, values, data):
    loss = LOSSES[name]
    rewards, targets = (torch.tensor([[float(v[i]) for v in values]]) for i in (0, 1))
    mask = torch.ones_like(rewards, dtype=torch.bool)
    whole = loss(rewards, mask, targets)
    order = data.draw(st.permutations(range(len(values))))
    torch.testing.assert_close(loss(rewards[:, order], mask, targets[:, order]), whole)
    padded = [torch.cat([x, torch.tensor([[pad]], dtype=x.dtype)], dim=1) for x, pad in ((rewards, 7.0), (mask, False), (targets, 9.0))]
    torch.testing.assert_close(loss(*padded), whole)


def test_a_row_without_labelled_pairs_costs_nothing_and_has_no_gradient():
    rewards = torch.tensor([[1.0, 2.0]], requires_grad=True)
    loss = sigmoid(rewards, torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2))
    loss.sum().backward()
    assert float(loss.detach()) == 0
    assert rewards.grad is not None
    assert not rewards.grad.any()


def test_a_list_is_the_mean_over_its_pairs():
    rewards, targets = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[2.0, 1.0, 1.0]])
    mask = torch.ones_like(rewards, dtype=torch.bool)
    pairs = [sigmoid(rewards[:, [0, other]], mask[:, :2], torch.tensor([[1.0, 0.0]])) for other in (1, 2)]
    torch.testing.assert_close(sigmoid(rewards, mask, targets), (pairs[0] + pairs[1]) / 2)
