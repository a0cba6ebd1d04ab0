"""Several rankers (adapters, seeds) as one: a cautious score, and their disagreement as uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_rank.errors import DataError
from dpo_rank.ranker import Ranker


class Ensemble:
    """Scores candidates by the members' mean minus ``k`` standard deviations (Coste et al. 2024, arXiv 2310.02743).

    Each member's scores are divided by its temperature and centred within the prompt first: rewards have no common unit or zero.

    Args:
        members: two or more rankers.
        k: how much disagreement costs; 0 is the mean.

    Raises:
        DataError: fewer than two members, or ``k`` below 0.

    """

    def __init__(self, members: Sequence[Ranker], k: float = 1.0) -> None:
        if len(members) < 2:
            raise DataError("an ensemble has at least two members")
        if not k >= 0:
            raise DataError(f"k is at least 0, not {k}")
        self.members, self.k = tuple(members), k

    @property
    def name(self) -> str:
        """The members' names."""
        return " + ".join(member.name for member in self.members)

    def score_many(self, prompts: Any, candidate_lists: Any, *, passages: Any = None) -> list[npt.NDArray[np.float32]]:
        """Cautious scores, float32 ``[N]`` a prompt, in units of the members' temperatures."""
        found = self._scores(prompts, candidate_lists, passages)
        return [(each.mean(axis=0) - self.k * each.std(axis=0)).astype(np.float32) for each in found]

    def disagreement_many(self, prompts: Any, candidate_lists: Any, *, passages: Any = None) -> list[npt.NDArray[np.float32]]:
        """Standard deviation of the members' scores of each candidate, float32 ``[N]`` a prompt, in the same units."""
        return [each.std(axis=0).astype(np.float32) for each in self._scores(prompts, candidate_lists, passages)]

    def _scores(self, prompts: Any, candidate_lists: Any, passages: Any) -> list[npt.NDArray[np.float64]]:
        of_members = [member.score_many(prompts, candidate_lists, passages=passages) for member in self.members]
        found = []
        for scores in zip(*of_members, strict=True):
            scaled = np.stack([s.astype(np.float64) / member.temperature for s, member in zip(scores, self.members, strict=True)])
            found.append(scaled - scaled.mean(axis=1, keepdims=True))
        return found
