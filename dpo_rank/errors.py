"""The package's errors. Every error that it raises on purpose derives from `DpoRankError`."""

from __future__ import annotations


class DpoRankError(Exception):
    """Base of all errors of this package."""


class ArtifactError(DpoRankError):
    """A ranker on disk is missing, damaged, unsafe or of a newer format; the message names the file."""


class DataError(DpoRankError, ValueError):
    """Input that cannot be used: a prompt, a candidate, a row; the message says which and why."""


class EncodingError(DataError):
    """A conversation that the artifact's prompt format has no place for."""


class ModelError(DpoRankError):
    """A model, or a pair of models, that cannot be scored or exported; the message says why."""


class NonFiniteScoreError(DpoRankError, ArithmeticError):
    """A score came out as NaN or infinite: the weights or the precision are broken. It is never turned into a rank."""


class EmptyRankingError(DpoRankError, IndexError):
    """``.best`` of a ranking without candidates."""


class UnavailableError(DpoRankError):
    """A device, provider, precision or engine asked for by name that cannot be used here."""


class MissingExtraError(DpoRankError, ImportError):
    """An optional dependency is not installed; the message holds the pip line that installs it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs packages that are not installed. Install them with: pip install 'dpo-rank[{extra}]'")


class TrainingError(DpoRankError):
    """A run that cannot go on: a loss or gradient that is not finite, or a checkpoint that does not belong to it."""
