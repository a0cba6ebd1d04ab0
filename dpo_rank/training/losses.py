"""Losses over the rewards of one prompt's candidates. All share one signature, so that a new one is a function here.

    loss(rewards [B, N], mask [B, N], targets [B, N]) -> [B]

``rewards`` are ``beta`` times the log-ratios, ``mask`` is True where a candidate stands (the rest is padding) and
``targets`` are the labels: higher is better, and only their order within a row counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def sigmoid(rewards: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """Sigmoid DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7): minus the log-probability of the right order.

    A row of several candidates gives the mean over the pairs that its targets tell apart; a row without any gives 0.
    """
    better = labelled_pairs(mask, targets)
    losses = -functional.logsigmoid(rewards[:, :, None] - rewards[:, None, :])
    return torch.where(better, losses, 0.0).sum(dim=(1, 2)) / better.sum(dim=(1, 2)).clamp(min=1)


def labelled_pairs(mask: Tensor, targets: Tensor) -> Tensor:
    """``[B, N, N]``: True where both candidates stand and the first has the higher label."""
    return (targets[:, :, None] > targets[:, None, :]) & mask[:, :, None] & mask[:, None, :]


LOSSES: dict[str, Loss] = {"sigmoid": sigmoid}
LossName = Literal["sigmoid"]
