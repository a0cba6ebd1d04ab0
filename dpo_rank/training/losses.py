"""Losses over the rewards of one prompt's candidates. All share one signature, so that a new one is a function here.

    loss(rewards [B, N], mask [B, N], targets [B, N], **options) -> [B]

``rewards`` are ``beta`` times the sum (or the mean) of a candidate's log-ratios, in nats; ``mask`` is True where a candidate stands
(the rest is padding); ``targets`` are the labels: higher is better. Pairs and orders use the order of the targets alone; graded
losses and soft labels use their size; losses on single answers take a target above 0 as good and any other as bad.

sigma is the logistic function, r the rewards, y the targets, and a sum over ``i > j`` goes over the pairs with ``y_i > y_j``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from dpo_rank.errors import DataError
from dpo_rank.scoring.engine import RewardForm

Loss = Callable[..., Tensor]


# Pairs. A row of several candidates gives the mean over its pairs, a row without any gives 0.


def sigmoid(
    rewards: Tensor, mask: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, margin: float = 0.0, soft: bool = False
) -> Tensor:
    """Sigmoid DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7): ``-log sigma(r_i - r_j)``.

    Args:
        rewards, mask, targets: see the module.
        label_smoothing: conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences", equation 3): the chance that a
            label is turned, ``-(1 - e) log sigma(d) - e log sigma(-d)``.
        margin: offset DPO (Amini et al. 2024, arXiv 2402.10571, equation 8): ``d = r_i - r_j - margin * (y_i - y_j)``.
        soft: targets are the shares that preferred each; a pair's label is ``y_i / (y_i + y_j)`` instead of 1.

    """
    difference = _differences(rewards) - margin * _differences(targets)
    right = 1.0 - label_smoothing
    likely = right if not soft else right * _share(targets) + label_smoothing * (1.0 - _share(targets))
    return _mean_of_pairs(-likely * logsigmoid(difference) - (1.0 - likely) * logsigmoid(-difference), mask, targets)


def robust(rewards: Tensor, mask: Tensor, targets: Tensor, *, label_smoothing: float = 0.1) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409, equation 10), unbiased where a share ``e`` of the labels is turned:
    ``(-(1 - e) log sigma(d) + e log sigma(-d)) / (1 - 2 e)``.
    """
    difference = _differences(rewards)
    losses = -(1 - label_smoothing) * logsigmoid(difference) + label_smoothing * logsigmoid(-difference)
    return _mean_of_pairs(losses / (1 - 2 * label_smoothing), mask, targets)


def hinge(rewards: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """Hinge (SLiC, Zhao et al. 2023, arXiv 2305.10425, equation 4, on rewards): ``max(0, 1 - (r_i - r_j))``."""
    return _mean_of_pairs(torch.relu(1 - _differences(rewards)), mask, targets)


def ipo(rewards: Tensor, mask: Tensor, targets: Tensor, *, beta: float = 0.1) -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, equation 17) on mean log-ratios: ``((r_i - r_j) / beta - 1 / (2 beta)) ** 2``."""
    return _mean_of_pairs((_differences(rewards) / beta - 1 / (2 * beta)) ** 2, mask, targets)


# Lists.


def softmax(
    rewards: Tensor, mask: Tensor, targets: Tensor, *, temperature: float = 1.0, label_smoothing: float = 0.0, soft: bool = False
) -> Tensor:
    """Cross-entropy of the preferred candidate under its share of all: ``-log p_best``, ``p = softmax (r / temperature)``.

    Of two candidates it is sigmoid DPO.

    The first choice of Plackett and Luce (Rafailov et al. 2023, appendix A.3; InfoNCA, Chen et al. 2024, arXiv 2402.05369). Several
    best candidates share the probability; with ``soft`` the targets are the shares themselves. A row whose targets are all equal is 0.
    """
    scores = (rewards / temperature).masked_fill(~mask, -torch.inf)
    wanted = torch.where(mask, targets, 0.0) if soft else (mask & (targets == _top(targets, mask))).to(rewards.dtype)
    wanted = wanted / wanted.sum(dim=1, keepdim=True).clamp(min=1e-12)
    count = mask.sum(dim=1, keepdim=True).to(rewards.dtype)
    wanted = torch.where(mask, (1 - label_smoothing) * wanted + label_smoothing / count.clamp(min=1), 0.0)
    log_probs = torch.where(mask, torch.log_softmax(scores, dim=1), 0.0)  # a masked place is -inf: 0 times it would be NaN
    return torch.where(_tells_apart(mask, targets), -(wanted * log_probs).sum(dim=1), 0.0)


def plackett_luce(rewards: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """Minus the log-likelihood of an order (Plackett 1975; Rafailov et al. 2023, equation 18), over its number of choices:
    ``-sum_i log(exp r_i / (exp r_i + sum_{y_j < y_i} exp r_j))``.

    Equal targets are not compared with each other, so a partial order says nothing about what it leaves open. For two candidates
    sigmoid DPO.
    """
    better = labelled_pairs(mask, targets)
    behind = torch.where(better, rewards[:, None, :], -torch.inf).logsumexp(dim=2)
    choices = better.any(dim=2)
    losses = softplus(torch.where(choices, behind, 0.0) - rewards)
    return torch.where(choices, losses, 0.0).sum(dim=1) / choices.sum(dim=1).clamp(min=1)


def listnet(rewards: Tensor, mask: Tensor, targets: Tensor, *, temperature: float = 1.0, target_temperature: float = 1.0) -> Tensor:
    """ListNet (Cao et al. 2007, section 4.2): the cross-entropy of two top-one distributions,
    ``-sum_i softmax(y / target_temperature)_i log softmax(r / temperature)_i``.
    """
    wanted = torch.softmax((targets / target_temperature).masked_fill(~mask, -torch.inf), dim=1)
    log_probs = torch.log_softmax((rewards / temperature).masked_fill(~mask, -torch.inf), dim=1)
    return -(wanted * torch.where(mask, log_probs, 0.0)).sum(dim=1)


def lambda_ndcg(rewards: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """LiPO-lambda (Liu et al. 2024, arXiv 2402.01878, equations 10 and 11): pairs weighted by what their exchange costs in NDCG,
    ``sum_{i > j} |2^y_i - 2^y_j| * |1 / log2(1 + rank_i) - 1 / log2(1 + rank_j)| * -log sigma(r_i - r_j)``.

    Ranks are those of the current rewards, from 1; weights carry no gradient. Equal rewards take the mean over all ways to break the
    tie: a run begins with every reward at 0.
    """
    weights = _differences(torch.exp2(torch.where(mask, targets, 0.0))).abs() * _discount_gaps(
        rewards.detach().masked_fill(~mask, -torch.inf)
    )
    better = labelled_pairs(mask, targets)
    return torch.where(better, -weights * logsigmoid(_differences(rewards)), 0.0).sum(dim=(1, 2))


def _discount_gaps(scores: Tensor) -> Tensor:
    """``[B, N, N]``: ``|1 / log2(1 + rank_i) - 1 / log2(1 + rank_j)|``, its mean over the orders of equal scores."""
    ranks = torch.arange(1, scores.shape[1] + 1, dtype=scores.dtype, device=scores.device)
    discounts = 1 / torch.log2(1 + ranks)
    sums, weighted = (torch.nn.functional.pad(values.cumsum(0), (1, 0)) for values in (discounts, ranks * discounts))
    before = (scores[:, None, :] > scores[:, :, None]).sum(dim=2)
    level = scores[:, None, :] == scores[:, :, None]
    size = level.sum(dim=2)
    total = sums[before + size] - sums[before]  # of the ranks that a candidate and its equals share
    apart = _differences(total / size).abs()
    # The sum of d_a - d_b over a < b among k ranks from s is sum_t (k - 1 - 2 t) d_(s + t).
    steps = weighted[before + size] - weighted[before] - (before + 1) * total
    within = 2 * ((size - 1) * total - 2 * steps) / (size * (size - 1)).clamp(min=1)
    return torch.where(level, within[:, :, None], apart)


# Single answers with a label. A row of several gives the mean.


def pointwise(rewards: Tensor, mask: Tensor, targets: Tensor, *, soft: bool = False) -> Tensor:
    """Cross-entropy of each answer's label (Yuan et al. 2024, arXiv 2412.01981, equation 5):
    ``-l log sigma(r) - (1 - l) log sigma(-r)``, ``l`` 1 where the target is above 0; with ``soft`` the target itself.
    """
    label = targets if soft else (targets > 0).to(rewards.dtype)
    losses = -label * logsigmoid(rewards) - (1 - label) * logsigmoid(-rewards)
    return _mean_of_candidates(losses, mask)


def kto(
    rewards: Tensor,
    mask: Tensor,
    targets: Tensor,
    *,
    reference_point: Tensor | float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306, equation 8): ``w_d (1 - sigma(r - z))`` for good answers and
    ``w_u (1 - sigma(z - r))`` for bad ones.

    Args:
        rewards, mask, targets: see the module.
        reference_point: ``z``, ``beta`` times the divergence of policy and reference, which the trainer estimates on answers to
            other prompts of the step; without gradient, at least 0.
        desirable_weight, undesirable_weight: where one kind is rare.

    """
    good = desirable_weight * torch.sigmoid(reference_point - rewards)
    bad = undesirable_weight * torch.sigmoid(rewards - reference_point)
    return _mean_of_candidates(torch.where(targets > 0, good, bad), mask)


def nll_of_the_best(sums: Tensor, lengths: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """``[B]``: nats a token of a row's best answer, the mean over several best ones: language modelling, and the second term of RPO
    (Pang et al. 2024, arXiv 2404.19733, equation 1).

    Args:
        sums: ``[B, N]``, summed log-probs of a candidate's tokens under the policy, nats.
        lengths: ``[B, N]``, tokens of a candidate.
        mask, targets: see the module.

    """
    means = (sums / lengths.clamp(min=1)).float()
    return _mean_of_candidates(-means, mask & (targets == _top(targets, mask)))


def labelled_pairs(mask: Tensor, targets: Tensor) -> Tensor:
    """``[B, N, N]``: True where both candidates stand and the first has the higher label."""
    return (targets[:, :, None] > targets[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def _differences(values: Tensor) -> Tensor:
    """``[B, N, N]``: the first candidate's value less the second's."""
    return values[:, :, None] - values[:, None, :]


def _share(targets: Tensor) -> Tensor:
    """``[B, N, N]``: of those who preferred one of the two, the share that preferred the first."""
    both = (targets[:, :, None] + targets[:, None, :]).clamp(min=1e-12)
    return (targets[:, :, None] / both).clamp(0, 1)


def _mean_of_pairs(losses: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    better = labelled_pairs(mask, targets)
    return torch.where(better, losses, 0.0).sum(dim=(1, 2)) / better.sum(dim=(1, 2)).clamp(min=1)


def _mean_of_candidates(losses: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, losses, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _top(targets: Tensor, mask: Tensor) -> Tensor:
    return targets.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True)


def _tells_apart(mask: Tensor, targets: Tensor) -> Tensor:
    """``[B]``: whether a row's targets differ."""
    return labelled_pairs(mask, targets).any(dim=2).any(dim=1)


@dataclass(frozen=True, slots=True)
class LossKind:
    """A loss and what it asks of its rows.

    Attributes:
        function: see the module.
        reward: the form of the rewards that it compares, where it prescribes one.
        single: whether one answer with a label is enough for a row.

    """

    function: Loss
    reward: RewardForm | None = None
    single: bool = False

    def options(self) -> frozenset[str]:
        """Names of the options it takes."""
        return frozenset(name for name, given in inspect.signature(self.function).parameters.items() if given.kind is given.KEYWORD_ONLY)


LOSSES: dict[str, LossKind] = {
    "sigmoid": LossKind(sigmoid),
    "sigmoid_norm": LossKind(sigmoid, reward="mean"),
    "robust": LossKind(robust),
    "hinge": LossKind(hinge),
    "ipo": LossKind(ipo, reward="mean"),
    "softmax": LossKind(softmax),
    "plackett_luce": LossKind(plackett_luce),
    "listnet": LossKind(listnet),
    "lambda_ndcg": LossKind(lambda_ndcg),
    "pointwise": LossKind(pointwise, single=True),
    "kto": LossKind(kto, single=True),
}
"""By name; the names that TRL has too mean the same here."""
LossName = Literal[
    "sigmoid",
    "sigmoid_norm",
    "robust",
    "hinge",
    "ipo",
    "softmax",
    "plackett_luce",
    "listnet",
    "lambda_ndcg",
    "pointwise",
    "kto",
]


def check_options(name: str, options: dict[str, Any]) -> None:
    """Refuse what a loss does not take.

    Raises:
        DataError: an unknown loss or option, or one out of its range; the message says what there is.

    """
    if name not in LOSSES:
        raise DataError(f"loss {name!r} is unknown; there are {', '.join(LOSSES)}")
    for option, value in options.items():
        if option not in LOSSES[name].options():
            raise DataError(f"loss {name!r} takes no {option}; it takes {', '.join(sorted(LOSSES[name].options())) or 'no option'}")
        if option == "label_smoothing" and not 0 <= value < 0.5:
            raise DataError(f"label_smoothing is the share of turned labels, from 0 to below 0.5, not {value}")
        if option in ("temperature", "target_temperature", "beta") and not value > 0:
            raise DataError(f"{option} must be above 0, not {value}")
