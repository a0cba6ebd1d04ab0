"""What an engine is, and scoring with one: groups -> rows -> log-probs -> rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from dpo_rank.errors import NonFiniteScoreError
from dpo_rank.scoring.pack import DEFAULT_TOKEN_BUDGET, Group, Row, rows

FloatArray = npt.NDArray[np.float32]
RewardForm = Literal["sum", "mean"]


class Engine(Protocol):
    """Runs a pair of models over a packed row.

    Attributes:
        name: ``"onnx"`` or ``"torch"``.
        device: ``"cpu"``, ``"cuda:0"``, ...
        precision: ``"fp32"``, ``"int8"``, ``"bf16"``, ...

    """

    name: str
    device: str
    precision: str

    def logps(self, row: Row) -> tuple[FloatArray, FloatArray]:
        """Log-probs in nats of the row's targets under policy and reference, float32 ``[M]`` each."""
        ...


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probs in nats of one candidate's tokens, float32 ``[n]`` each."""

    policy: FloatArray
    reference: FloatArray

    def reward(self, beta: float, form: RewardForm) -> float:
        """``beta`` times the sum or the mean of the log-ratios (Rafailov et al. 2023, arXiv 2305.18290, equation 5).

        The log-ratios are summed in float64: at thousands of nats the spacing of float32 is wider than many margins.
        """
        ratios = self.policy.astype(np.float64) - self.reference.astype(np.float64)
        return beta * float(ratios.sum() if form == "sum" else ratios.mean())


def score(
    engine: Engine,
    groups: Sequence[Group],
    token_budget: int = DEFAULT_TOKEN_BUDGET,
    progress: Callable[[int], None] | None = None,
) -> list[list[TokenScores]]:
    """Log-probs of every candidate of every group, in the order given.

    Args:
        engine: what runs the models.
        groups: prompts with candidates; groups without candidates give empty lists.
        token_budget: bound on a row, see `dpo_rank.scoring.pack.rows`.
        progress: told how many candidates each finished row held.

    Raises:
        NonFiniteScoreError: a log-prob is NaN or infinite.

    """
    results: list[list[TokenScores | None]] = [[None] * len(group.candidates) for group in groups]
    filled = [g for g, group in enumerate(groups) if group.candidates]
    for row in rows([groups[g] for g in filled], token_budget):
        policy, reference = engine.logps(row)
        ends = np.cumsum(row.lengths)
        for (g, c), length, end in zip(row.owners, row.lengths, ends, strict=True):
            scores = TokenScores(policy[end - length : end], reference[end - length : end])
            if not (np.isfinite(scores.policy).all() and np.isfinite(scores.reference).all()):
                raise NonFiniteScoreError(
                    f"candidate {c} of prompt {filled[g]} has a log-prob that is not finite ({engine.name}, {engine.precision}): "
                    "the weights are damaged, or this precision is too narrow for them"
                )
            results[filled[g]][c] = scores
        if progress:
            progress(len(row.lengths))
    return [[item for item in group if item is not None] for group in results]
