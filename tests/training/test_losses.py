"""Losses against direct float64 computations and TRL's formulas, and what must not change them."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dpo_rank.errors import DataError
from dpo_rank.training.losses import LOSSES, check_options

floats = st.floats(-8, 8, width=32)
rows = st.lists(st.tuples(floats, st.integers(0, 3)), min_size=2, max_size=5)
OPTIONS = [
    ("sigmoid", {"label_smoothing": 0.1}),
    ("sigmoid", {"margin": 0.5}),
    ("sigmoid", {"soft": True}),
    ("softmax", {"temperature": 0.5}),
    ("softmax", {"soft": True}),
    ("softmax", {"label_smoothing": 0.2}),
    ("listnet", {"temperature": 2.0, "target_temperature": 0.5}),
    ("pointwise", {"soft": True}),
    ("kto", {"reference_point": 0.7, "desirable_weight": 2.0}),
    *((name, {}) for name in LOSSES),
]
CASES = pytest.mark.parametrize(("name", "options"), OPTIONS, ids=lambda value: value if isinstance(value, str) else ",".join(value))


def loss_of(name, rewards, targets, options):
    rewards, targets = (torch.tensor([values], dtype=torch.float64) for values in (rewards, targets))
    return float(LOSSES[name].function(rewards, torch.ones_like(rewards, dtype=torch.bool), targets, **options))


def direct(name, r, y, options):
    """The same numbers from the written formulas, one pair or candidate at a time."""
    sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    nlog = lambda x: -math.log(sigma(x))  # noqa: E731
    pairs = [(i, j) for i in range(len(r)) for j in range(len(r)) if y[i] > y[j]]
    mean = lambda values: sum(values) / len(values) if values else 0.0  # noqa: E731
    e = options.get("label_smoothing", 0.1 if name == "robust" else 0.0)
    soft = options.get("soft", False)
    if name in ("sigmoid", "sigmoid_norm"):

        def pair(i, j):
            d = r[i] - r[j] - options.get("margin", 0.0) * (y[i] - y[j])
            p = y[i] / (y[i] + y[j]) if soft else 1.0
            p = (1 - e) * p + e * (1 - p)
            return p * nlog(d) + (1 - p) * nlog(-d)

        return mean([pair(i, j) for i, j in pairs])
    if name == "robust":
        return mean([((1 - e) * nlog(r[i] - r[j]) - e * nlog(r[j] - r[i])) / (1 - 2 * e) for i, j in pairs])
    if name == "hinge":
        return mean([max(0.0, 1 - (r[i] - r[j])) for i, j in pairs])
    if name == "ipo":
        return mean([((r[i] - r[j]) / 0.1 - 5.0) ** 2 for i, j in pairs])
    if name in ("softmax", "listnet"):
        t = options.get("temperature", 1.0)
        total = math.log(sum(math.exp(value / t) for value in r))
        if name == "listnet":
            u = options.get("target_temperature", 1.0)
            weights = [math.exp(value / u) for value in y]
        elif not pairs:
            return 0.0
        else:
            weights = list(y) if soft else [float(value == max(y)) for value in y]
        weights = [(1 - e) * w / sum(weights) + e / len(y) for w in weights]
        return -sum(w * (value / t - total) for w, value in zip(weights, r, strict=True))
    if name == "plackett_luce":
        worse = {i: [math.exp(r[j]) for a, j in pairs if a == i] for i, _ in pairs}
        return mean([-math.log(math.exp(r[i]) / (math.exp(r[i]) + sum(rest))) for i, rest in worse.items()])
    if name == "lambda_ndcg":
        orders = [order for order in itertools.permutations(range(len(r))) if all(r[a] >= r[b] for a, b in itertools.pairwise(order))]

        def weight(i, j):
            gaps = [abs(1 / math.log2(2 + order.index(i)) - 1 / math.log2(2 + order.index(j))) for order in orders]
            return abs(2 ** y[i] - 2 ** y[j]) * mean(gaps)

        return sum(weight(i, j) * nlog(r[i] - r[j]) for i, j in pairs)
    if name == "pointwise":
        labels = y if soft else [float(value > 0) for value in y]
        return mean([label * nlog(a) + (1 - label) * nlog(-a) for a, label in zip(r, labels, strict=True)])
    assert name == "kto"
    z, w = options.get("reference_point", 0.0), options.get("desirable_weight", 1.0)
    return mean([w * (1 - sigma(a - z)) if label > 0 else 1 - sigma(z - a) for a, label in zip(r, y, strict=True)])


def scaled(values, options):
    """Labels as the loss wants them: shares where they are soft."""
    r, y = ([float(value[i]) for value in values] for i in (0, 1))
    if options.get("soft"):
        y = [value / 3 for value in y]
    return r, y


@CASES
@given(values=rows)
def test_equal_the_written_formula(name, options, values):
    r, y = scaled(values, options)
    assert loss_of(name, r, y, options) == pytest.approx(direct(name, r, y, options), rel=1e-9, abs=1e-9)


@CASES
@given(values=rows, data=st.data())
def test_order_and_padding_change_nothing(name, options, values, data):
    r, y = scaled(values, options)
    whole = loss_of(name, r, y, options)
    order = data.draw(st.permutations(range(len(r))))
    assert loss_of(name, [r[i] for i in order], [y[i] for i in order], options) == pytest.approx(whole, rel=1e-9, abs=1e-12)
    rewards, targets = torch.tensor([[*r, 7.0]], dtype=torch.float64, requires_grad=True), torch.tensor([[*y, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * len(r) + [False]])
    padded = LOSSES[name].function(rewards, mask, targets, **options).sum()
    assert float(padded.detach()) == pytest.approx(whole, rel=1e-9, abs=1e-12)
    padded.backward()
    assert rewards.grad is not None
    assert torch.isfinite(rewards.grad).all()
    assert rewards.grad[0, -1] == 0


@CASES
def test_gradients(name, options):
    torch.manual_seed(0)
    rewards = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, True, True, False], [True, True, False, False]])
    targets = torch.tensor([[0.1, 0.9, 0.4, 0.4], [0.0, 0.2, 0.8, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r: LOSSES[name].function(r, mask, targets, **options), (rewards,))


@pytest.mark.parametrize("name", ["softmax", "plackett_luce"])
@given(a=floats, b=floats)
def test_a_list_of_two_is_sigmoid_dpo(name, a, b):
    assert loss_of(name, [a, b], [1.0, 0.0], {}) == pytest.approx(loss_of("sigmoid", [a, b], [1.0, 0.0], {}), rel=1e-9, abs=1e-12)


@given(values=st.lists(floats, min_size=3, max_size=5, unique=True), data=st.data())
def test_plackett_luce_probabilities_of_all_orders_add_up_to_one(values, data):
    total = 0.0
    for order in itertools.permutations(range(len(values))):
        targets = [float(len(values) - order.index(i)) for i in range(len(values))]
        total += math.exp(-loss_of("plackett_luce", values, targets, {}) * (len(values) - 1))
    assert total == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("pointwise", "kto")])
def test_a_run_can_begin_at_equal_rewards(name):
    rewards = torch.zeros(1, 4, requires_grad=True)
    LOSSES[name].function(rewards, torch.ones(1, 4, dtype=torch.bool), torch.tensor([[3.0, 1.0, 2.0, 0.0]])).sum().backward()
    assert rewards.grad is not None
    assert rewards.grad[0, 0] < -1e-3
    assert rewards.grad[0, 3] > 1e-3


@given(margin=floats, e=st.floats(0.01, 0.4))
def test_robust_is_unbiased_under_turned_labels(margin, e):
    right, turned = (loss_of("robust", [margin, 0.0], labels, {"label_smoothing": e}) for labels in ([1.0, 0.0], [0.0, 1.0]))
    assert (1 - e) * right + e * turned == pytest.approx(loss_of("sigmoid", [margin, 0.0], [1.0, 0.0], {}), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", [name for name in LOSSES if not LOSSES[name].single and name != "listnet"])
def test_a_row_whose_labels_are_equal_costs_nothing_and_has_no_gradient(name):
    rewards = torch.tensor([[1.0, 2.0]], requires_grad=True)
    loss = LOSSES[name].function(rewards, torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2))
    loss.sum().backward()
    assert float(loss.detach()) == 0
    assert rewards.grad is not None
    assert not rewards.grad.any()


@given(a=floats, b=floats, share=st.floats(0.51, 1.0))
def test_the_best_margin_under_soft_labels_is_their_log_odds(a, b, share):
    assume(share < 0.999)
    best = math.log(share / (1 - share))
    options = {"soft": True}
    for name in ("sigmoid", "softmax"):
        at_best = loss_of(name, [best, 0.0], [share, 1 - share], options)
        assert at_best <= loss_of(name, [a, b], [share, 1 - share], options) + 1e-9


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpo", {}, "'dpo' is unknown"),
        ("hinge", {"label_smoothing": 0.1}, "takes no label_smoothing"),
        ("robust", {"label_smoothing": 0.5}, "below 0.5"),
        ("softmax", {"temperature": 0.0}, "above 0"),
    ],
)
def test_what_a_loss_does_not_take_is_refused(name, options, message):
    with pytest.raises(DataError, match=message):
        check_options(name, options)
