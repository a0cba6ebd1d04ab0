"""The value types that a caller sees: candidates in, a ranking out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_rank.confidence import Confidence
from dpo_rank.errors import DataError, EmptyRankingError

NEAR_TIE = 0.55
"""`Ranking.near_tie`: the best beats the runner-up with a probability below this."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer to rank.

    Attributes:
        text: the answer.
        id: anything the caller recognises it by.
        metadata: carried to the result untouched.
        finished: False for an answer cut off by a token limit: no end token is scored then.

    """

    text: str
    id: str | None = field(default=None, kw_only=True)
    metadata: Mapping[str, Any] | None = field(default=None, kw_only=True)
    finished: bool = field(default=True, kw_only=True)

    @classmethod
    def of(cls, value: Any, index: int = 0) -> Candidate:
        """A candidate from a str, a `Candidate` or a mapping.

        A mapping has ``text`` (or ``content``), optionally ``id`` and ``finished`` (or ``finish_reason``, finished unless it is
        ``"length"``); its other keys become metadata.

        Raises:
            DataError: it is none of these; the message names the candidate by ``index``.

        """
        if isinstance(value, Candidate):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise DataError(f"candidate {index}: expected a str, a Candidate or a mapping with 'text', got {type(value).__name__}")
        rest = dict(value)
        name = "text" if "text" in rest else "content"
        text = rest.pop(name, None)
        if not isinstance(text, str):
            raise DataError(f"candidate {index}: {name!r} is {type(text).__name__}, expected a str")
        reason = rest.pop("finish_reason", None)
        finished = rest.pop("finished", reason != "length")
        if not isinstance(finished, bool):
            raise DataError(f"candidate {index}: 'finished' is {type(finished).__name__}, expected true or false")
        identity = rest.pop("id", None)
        own = rest.pop("metadata", None)
        metadata = {**own, **rest} if isinstance(own, Mapping) else ({"metadata": own, **rest} if own is not None else rest)
        return cls(text, id=None if identity is None else str(identity), metadata=metadata or None, finished=finished)


@dataclass(frozen=True, slots=True)
class RankedCandidate:
    """A candidate in its place.

    Attributes:
        index: its place in the input, 0-based.
        id, text, metadata, finished: as given.
        score: raw reward: ``beta`` times its log-ratio, unbounded; compares candidates of one prompt only.
        probability: softmax of score / temperature over all candidates given.
        num_tokens: tokens that were scored.
        truncated: its tail was too long for the ranker and was not read.

    """

    index: int
    id: str | None
    text: str
    metadata: Mapping[str, Any] | None
    score: float
    probability: float
    num_tokens: int
    truncated: bool
    finished: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Ranking(Sequence[RankedCandidate]):
    """Candidates of one prompt, best first; ties keep the input's order.

    Attributes:
        candidates: the ranked candidates (the first ``top_k``).
        calibrated: whether the temperature behind the probabilities was fitted on held-out preferences.
        near_tie: the best is barely ahead: it beats the runner-up with a probability below `NEAR_TIE`, or by a margin within the
            measured noise of the precision that scored it.
        prompt_truncated: the prompt was too long for the ranker and was cut.
        dropped_passages: indices of passages that did not fit.
        margin: score of the best minus that of the runner-up; infinite where there is none.
        unfamiliar: the candidates read unlike those that the ranker was fitted on: its order may mean little. None where the
            ranker does not know what it was fitted on (`Ranker.calibrate` finds out).
        confidence: what the ranker knows of its errors, behind `confident`.

    """

    candidates: tuple[RankedCandidate, ...]
    calibrated: bool = False
    near_tie: bool = False
    prompt_truncated: bool = False
    dropped_passages: tuple[int, ...] = ()
    margin: float = math.inf
    unfamiliar: bool | None = None
    confidence: Confidence | None = field(default=None, repr=False)

    @property
    def best(self) -> RankedCandidate:
        """The first candidate.

        Raises:
            EmptyRankingError: there is none.

        """
        if not self.candidates:
            raise EmptyRankingError("the ranking is empty: no candidates were given")
        return self.candidates[0]

    def confident(self, max_risk: float = 0.1) -> bool:
        """Whether the margin is one at which the best candidate was wrong in at most ``max_risk`` of held-out rankings.

        False too where no margin is enough: ``ranking.confidence.smallest_risk`` is the least that the ranker's held-out rows can
        promise. The promise is about prompts and candidates like those; see `Confidence`.

        Raises:
            DataError: the ranker was never measured so, or ``max_risk`` is not between 0 and 1.

        """
        if self.confidence is None:
            raise DataError(
                "this ranker does not know how often it is wrong: Ranker.calibrate(rows) or `dpo-rank calibrate` measures it on "
                "held-out preferences"
            )
        least = self.confidence.threshold(max_risk)
        return least is not None and self.margin >= least

    @property
    def order(self) -> list[int]:
        """Input indices, best first."""
        return [candidate.index for candidate in self.candidates]

    def __len__(self) -> int:
        return len(self.candidates)

    def __getitem__(self, place: Any) -> Any:
        return self.candidates[place]

    def __iter__(self) -> Iterator[RankedCandidate]:
        return iter(self.candidates)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return {
            "order": self.order,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "calibrated": self.calibrated,
            "near_tie": self.near_tie,
            "margin": self.margin if math.isfinite(self.margin) else None,
            "unfamiliar": self.unfamiliar,
            "prompt_truncated": self.prompt_truncated,
            "dropped_passages": list(self.dropped_passages),
        }


def preference(margin: float, temperature: float) -> float:
    """Probability that a candidate ahead by ``margin`` is preferred (Bradley & Terry 1952) at ``temperature``."""
    scaled = margin / temperature
    if scaled >= 0:
        return 1.0 / (1.0 + math.exp(-scaled))
    return math.exp(scaled) / (1.0 + math.exp(scaled))


def softmax(scores: Sequence[float], temperature: float) -> list[float]:
    """Softmax of ``scores / temperature``, in float64."""
    if not len(scores):
        return []
    scaled = np.asarray(scores, dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return [float(weight) for weight in weights / weights.sum()]


def make_ranking(
    candidates: Sequence[Candidate],
    scores: Sequence[float],
    num_tokens: Sequence[int],
    truncated: Sequence[bool],
    *,
    temperature: float,
    calibrated: bool,
    noise: float = 0.0,
    top_k: int | None = None,
    prompt_truncated: bool = False,
    dropped_passages: tuple[int, ...] = (),
    unfamiliar: bool | None = None,
    confidence: Confidence | None = None,
) -> Ranking:
    """Sort ``candidates`` by ``scores`` and wrap them up; ``noise`` is a margin's standard deviation from its fp32 value."""
    order = sorted(range(len(candidates)), key=lambda index: -scores[index])
    probabilities = softmax(scores, temperature)
    margin = scores[order[0]] - scores[order[1]] if len(order) > 1 else math.inf
    near_tie = margin <= noise or preference(margin, temperature) < NEAR_TIE
    ranked = tuple(
        RankedCandidate(
            index=index,
            id=candidates[index].id,
            text=candidates[index].text,
            metadata=candidates[index].metadata,
            score=float(scores[index]),
            probability=probabilities[index],
            num_tokens=num_tokens[index],
            truncated=truncated[index],
            finished=candidates[index].finished,
        )
        for index in order[:top_k]
    )
    return Ranking(ranked, calibrated, near_tie, prompt_truncated, dropped_passages, float(margin), unfamiliar, confidence)
