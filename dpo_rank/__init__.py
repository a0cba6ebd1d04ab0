"""Inference-time preference ranking: put the answer that people would prefer first.

from dpo_rank import Ranker

ranker = Ranker.load()
ranking = ranker.rank("How do I boil an egg?", ["In water, 7 minutes.", "No."])
print(ranking.best.text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dpo_rank.errors import (
    ArtifactError,
    DataError,
    DpoRankError,
    EmptyRankingError,
    EncodingError,
    MissingExtraError,
    ModelError,
    NonFiniteScoreError,
    UnavailableError,
)

if TYPE_CHECKING:
    from dpo_rank.ranker import Ranker, TokenContribution
    from dpo_rank.ranking import Candidate, RankedCandidate, Ranking
    from dpo_rank.session import Session

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "Candidate",
    "DataError",
    "DpoRankError",
    "EmptyRankingError",
    "EncodingError",
    "MissingExtraError",
    "ModelError",
    "NonFiniteScoreError",
    "RankedCandidate",
    "Ranker",
    "Ranking",
    "Session",
    "TokenContribution",
    "UnavailableError",
]

_HOMES = {
    "Candidate": "dpo_rank.ranking",
    "RankedCandidate": "dpo_rank.ranking",
    "Ranking": "dpo_rank.ranking",
    "Ranker": "dpo_rank.ranker",
    "Session": "dpo_rank.session",
    "TokenContribution": "dpo_rank.ranker",
}


def __getattr__(name: str) -> Any:
    """Import what is heavy (numpy, onnxruntime) when it is first used."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
