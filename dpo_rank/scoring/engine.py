"""What an engine is, and scoring with one: groups -> rows -> log-probs -> rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from dpo_rank.errors import NonFiniteScoreError
from dpo_rank.scoring.pack import DEFAULT_TOKEN_BUDGET, Group, IntArray, Row, fits_one_row, pack, pieces, plan, rows

FloatArray = npt.NDArray[np.float32]
RewardForm = Literal["sum", "mean"]


class KeyValues:
    """Keys and values of tokens that were read, under each of an engine's models; grows in place.

    Args:
        empty: makes an uninitialised array of a shape: numpy's or torch's.
        capacity: tokens that there is room for at first.

    """

    def __init__(self, empty: Callable[[tuple[int, ...]], Any], capacity: int = 256) -> None:
        self._empty, self._capacity = empty, capacity
        self._stores: list[Any] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def arrays(self) -> list[Any]:
        """One a model: ``[len(self), layers, 2, kv_heads, head_dim]``."""
        return [store[: self._length] for store in self._stores]

    def append(self, kept: Sequence[Any]) -> None:
        """Add the keys and values ``[K, layers, 2, kv_heads, head_dim]`` of K more tokens, one array a model."""
        end = self._length + len(kept[0])
        if not self._stores or end > self._capacity:
            self._capacity = max(end, self._capacity if not self._stores else 2 * self._capacity)
            larger = [self._empty((self._capacity, *part.shape[1:])) for part in kept]
            for new, old in zip(larger, self._stores, strict=False):
                new[: self._length] = old[: self._length]
            self._stores = larger
        for store, part in zip(self._stores, kept, strict=True):
            store[self._length : end] = part
        self._length = end


class Engine(Protocol):
    """Runs a pair of models over a packed row.

    Attributes:
        name: ``"onnx"`` or ``"torch"``.
        device: ``"cpu"``, ``"cuda:0"``, ...
        precision: ``"fp32"``, ``"int8"``, ``"bf16"``, ...
        takes_past: whether it is a `ContinuingEngine`.

    """

    name: str
    device: str
    precision: str

    @property
    def takes_past(self) -> bool: ...  # noqa: D102

    def logps(self, row: Row) -> tuple[FloatArray, FloatArray]:
        """Log-probs in nats of the row's targets under policy and reference, float32 ``[M]`` each."""
        ...


class ContinuingEngine(Engine, Protocol):
    """An engine whose rows can stand behind tokens that were read before."""

    def memory(self, capacity: int) -> KeyValues:
        """Where keys and values of this engine are kept."""
        ...

    def continued(self, row: Row, past: KeyValues, keep: IntArray | None = None) -> tuple[FloatArray, FloatArray]:
        """`logps` of a row behind ``past``; the keys and values of the row's places ``keep`` are appended to ``past``."""
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
        progress: told of finished candidates.

    Raises:
        NonFiniteScoreError: a log-prob is NaN or infinite.

    """
    results: list[list[TokenScores | None]] = [[None] * len(group.candidates) for group in groups]
    filled = [g for g, group in enumerate(groups) if group.candidates]
    large = {g for g in filled if engine.takes_past and not fits_one_row(groups[g], token_budget)}
    small = [g for g in filled if g not in large]

    def note(g: int, c: int, scores: TokenScores) -> None:
        check_finite(scores, engine, f"candidate {c} of prompt {g}")
        results[g][c] = scores
        if progress:
            progress(1)

    for row in rows([groups[g] for g in small], token_budget):
        for (place, c), scores in zip(row.owners, _split(row, engine.logps(row)), strict=True):
            note(small[place], c, scores)
    for g in sorted(large):  # its prompt is read once, and its candidates behind it
        continuing = cast("ContinuingEngine", engine)
        prompt, past = groups[g].prompt, read(continuing, groups[g].prompt[:-1], token_budget)
        behind = Group(prompt[-1:], groups[g].candidates, past=range(len(past)))
        for (_, c), scores, _ in score_behind(continuing, past, [behind], token_budget):
            note(g, c, scores)
    return [[item for item in group if item is not None] for group in results]


def check_finite(scores: TokenScores, engine: Engine, what: str) -> None:
    """Raise a `NonFiniteScoreError` that names ``what`` if a log-prob is NaN or infinite."""
    if not (np.isfinite(scores.policy).all() and np.isfinite(scores.reference).all()):
        raise NonFiniteScoreError(
            f"{what} has a log-prob that is not finite ({engine.name}, {engine.precision}): "
            "the weights are damaged, or this precision is too narrow for them"
        )


def read(engine: ContinuingEngine, prompt: Sequence[int], token_budget: int = DEFAULT_TOKEN_BUDGET) -> KeyValues:
    """The keys and values of ``prompt``, piece by piece within the budget."""
    past = engine.memory(len(prompt))
    for part in pieces(len(prompt), token_budget):
        # No candidate is asked for: a row has one all the same.
        row = pack([Group(prompt[part], [[prompt[part][-1]]], past=range(len(past)))], num_past=len(past))
        engine.continued(row, past, keep=np.arange(part.stop - part.start))
    return past


def score_behind(
    engine: ContinuingEngine,
    past: KeyValues,
    groups: Sequence[Group],
    token_budget: int,
    keep: Callable[[int, int], bool] = lambda g, c: False,
) -> Iterator[tuple[tuple[int, int], TokenScores, range]]:
    """Score groups whose prompts continue ``past``.

    Args:
        engine, past: the engine and what it has read.
        groups: their ``past`` names places in ``past``.
        token_budget: see `score`.
        keep: whether the keys and values of a candidate's tokens are added to ``past``.

    Yields:
        Group and candidate, its scores, and where ``past`` now holds the last token of the group's prompt and the candidate's
        tokens but the last (empty unless kept).

    """
    for members, owners in plan(groups, token_budget):
        row = pack(members, owners, num_past=len(past))
        # What predicts a candidate's tokens is the prompt's last token and the candidate's own but the last.
        wanted = [
            part if keep(*owner) else part[:0]
            for owner, part in zip(row.owners, np.split(row.layout.source, np.cumsum(row.lengths)[:-1]), strict=True)
        ]
        first = len(past)
        places = np.concatenate(wanted)
        logps = engine.continued(row, past, places if len(places) else None)
        for owner, scores, part in zip(row.owners, _split(row, logps), wanted, strict=True):
            yield owner, scores, range(first, first + len(part))
            first += len(part)


def _split(row: Row, logps: tuple[FloatArray, FloatArray]) -> Iterator[TokenScores]:
    """The scores of each candidate of a row."""
    policy, reference = logps
    for length, end in zip(row.lengths, np.cumsum(row.lengths), strict=True):
        yield TokenScores(policy[end - length : end], reference[end - length : end])
