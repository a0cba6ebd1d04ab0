"""What a run is measured by on its held-out rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

# A run is chosen by the same agreement that an evaluation reports afterwards.
from dpo_rank.evaluation.agreement import pair_agreement
from dpo_rank.evaluation.intervals import figure
from dpo_rank.evaluation.style import through_origin
from dpo_rank.training.collate import Slice

FloatArray = npt.NDArray[np.float64]


@dataclass
class HeldOut:
    """Losses, and of each row rewards, labels and lengths of its candidates."""

    losses: list[float] = field(default_factory=list)
    rewards: list[FloatArray] = field(default_factory=list)
    targets: list[FloatArray] = field(default_factory=list)
    lengths: list[FloatArray] = field(default_factory=list)

    def add(self, losses: Tensor, rewards: Tensor | None, part: Slice) -> None:
        """The rows of one packed row; without rewards (language modelling) only their losses."""
        self.losses += losses.tolist()
        if rewards is None:
            return
        for row, mask in enumerate(part["mask"].cpu()):
            for store, values in ((self.rewards, rewards), (self.targets, part["targets"]), (self.lengths, part["lengths"])):
                store.append(values[row].cpu()[mask].double().numpy())


def measure(found: HeldOut) -> dict[str, float]:
    """Figures of the held-out rows.

    Returns:
        ``loss`` and, where rows have labelled pairs, ``agreement`` (ties half) with ``agreement_low`` and ``agreement_high`` (95 %,
        bootstrap over prompts), TRL's ``rewards/...`` and ``margin_length_correlation``: Pearson's, of a pair's margin and the
        difference of its answers' tokens, over all pairs of a prompt's candidates. Where rows are single answers,
        ``accuracy``: the share whose reward has the sign of its label.

    """
    metrics = {"loss": float(np.mean(found.losses))}
    if not found.rewards:
        return metrics
    pairs = [_pairs(targets) for targets in found.targets]
    with_pairs = [row for row, (better, _) in enumerate(pairs) if len(better)]
    if not with_pairs:
        right = [(reward > 0) == (target > 0) for reward, target in zip(found.rewards, found.targets, strict=True)]
        return {**metrics, "accuracy": float(np.concatenate(right).mean())}
    agreement = figure([pair_agreement(found.rewards[row].tolist(), found.targets[row].tolist()) for row in with_pairs])
    chosen, rejected, margins, gaps = [], [], [], []
    for row in with_pairs:
        rewards, (better, worse) = found.rewards[row], pairs[row]
        chosen.append(rewards[np.unique(better)].mean())
        rejected.append(rewards[np.unique(worse)].mean())
        margins.append((rewards[better] - rewards[worse]).mean())
        first, second = np.triu_indices(len(rewards), 1)
        gaps.append(np.stack([rewards[first] - rewards[second], found.lengths[row][first] - found.lengths[row][second]]))
    return {
        **metrics,
        "agreement": agreement.value,
        "agreement_low": agreement.low,
        "agreement_high": agreement.high,
        "rewards/chosen": float(np.mean(chosen)),
        "rewards/rejected": float(np.mean(rejected)),
        "rewards/margins": float(np.mean(margins)),
        "margin_length_correlation": through_origin(np.concatenate(gaps, axis=1)),
    }


def _pairs(targets: FloatArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    better, worse = np.nonzero(targets[:, None] > targets[None, :])
    return better, worse
