"""One prompt, read once, and candidates that arrive or grow later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dpo_rank.errors import DataError
from dpo_rank.prune import FIRST_PIECE, Partial, forecast, plausible
from dpo_rank.ranking import Candidate, Ranking
from dpo_rank.scoring.encode import Passage, Prompt, common_prefix
from dpo_rank.scoring.engine import ContinuingEngine, Engine, KeyValues, TokenScores, check_finite, read, score, score_behind
from dpo_rank.scoring.pack import Group

if TYPE_CHECKING:
    from dpo_rank.ranker import Ranker

_EMPTY = np.zeros(0, dtype=np.float32)


@dataclass(slots=True, eq=False)
class _Entry:
    """A candidate and what is known of it.

    Attributes:
        candidate: as it stands now.
        ids: its tokens.
        truncated: its tail was not read.
        scores: log-probs of the first tokens of ``ids``.
        places: where the keys and values of its first tokens lie in the session's memory.

    """

    candidate: Candidate
    ids: list[int]
    truncated: bool
    scores: TokenScores = field(default_factory=lambda: TokenScores(_EMPTY, _EMPTY))
    places: list[int] = field(default_factory=list)


class Session:
    """Made by `Ranker.session`. Not for several threads at once; several sessions of one ranker are.

    Candidates are scored when a ranking is asked for. Where the engine can continue a prompt, the prompt's keys and values are
    computed once and a candidate that has grown costs its new tokens; elsewhere it is scored anew, with the same result.
    """

    def __init__(self, ranker: Ranker, engine: Engine, prompt: Prompt, passages: Sequence[Passage] | None = None) -> None:
        self._ranker, self._engine, self._prompt, self._passages = ranker, engine, prompt, passages
        encoded = ranker.encode(prompt, [], passages)
        self._prompt_ids = list(encoded.group.prompt)
        self._prompt_truncated, self._dropped_passages = encoded.prompt_truncated, encoded.dropped_passages
        self._entries: list[_Entry] = []
        self._memory: KeyValues | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._memory = None

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, candidates: Iterable[Any]) -> list[int]:
        """Add candidates (texts, `Candidate` objects or mappings); returns their indices.

        One with ``finished=False`` can be extended.

        Raises:
            DataError: a candidate that cannot be scored; none is added then.

        """
        if isinstance(candidates, (str, bytes)) or not isinstance(candidates, Iterable):
            raise DataError(f"candidates are a list of answers, not {type(candidates).__name__}")
        made = [self._entry(Candidate.of(value, index)) for index, value in enumerate(candidates)]
        self._entries += made
        return list(range(len(self._entries) - len(made), len(self._entries)))

    def extend(self, index: int, more_text: str) -> None:
        """Candidate ``index`` goes on with ``more_text``.

        Raises:
            DataError: there is no such candidate, or it is finished.

        """
        entry = self._unfinished(index)
        if not isinstance(more_text, str):
            raise DataError(f"more_text is a str, not {type(more_text).__name__}")
        self._change(index, replace(entry.candidate, text=entry.candidate.text + more_text))

    def finish(self, index: int) -> None:
        """Candidate ``index`` is complete: its end is scored too.

        Raises:
            DataError: there is no such candidate, or it is finished.

        """
        self._change(index, replace(self._unfinished(index).candidate, finished=True))

    def rank(self, top_k: int | None = None, prune: float | None = None) -> Ranking:
        """The candidates as they stand now, best first, as `Ranker.rank` would rank them.

        Args:
            top_k: keep the first so many.
            prune: read a candidate no further once the probability that it is among the first ``top_k`` falls below this (0.05, say),
                by the spread of the log-ratios seen so far. The first ``top_k`` are read to their end; the probabilities count a
                dropped candidate by its expected score. None: read all. Not every engine can: one that cannot reads all.

        Raises:
            DataError: ``prune`` without ``top_k``, or not between 0 and 0.5.

        """
        if prune is not None:
            if isinstance(prune, bool) or not isinstance(prune, (int, float)) or not 0 < prune < 0.5:
                raise DataError(f"prune is a probability between 0 and 0.5, not {prune!r}")
            if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
                raise DataError("prune needs top_k: how many of the first places are wanted")
        ranker = self._ranker
        if prune is None or top_k is None or not self._engine.takes_past:
            self._score([len(entry.ids) for entry in self._entries])
            rewards = [ranker.reward(entry.scores) for entry in self._entries]
        else:
            rewards = self._score_plausible(top_k, prune)
        return ranker.conclude(
            [entry.candidate for entry in self._entries],
            rewards,
            [entry.scores for entry in self._entries],
            [len(entry.ids) for entry in self._entries],
            [entry.truncated for entry in self._entries],
            top_k=top_k,
            prompt_truncated=self._prompt_truncated,
            dropped_passages=self._dropped_passages,
        )

    # -- inside ----------------------------------------------------------------------------------------------------

    def _entry(self, candidate: Candidate) -> _Entry:
        encoded = self._ranker.encode(self._prompt, [candidate], self._passages)
        if list(encoded.group.prompt) != self._prompt_ids:
            raise DataError("this ranker tokenises prompt and answer jointly (boundary='joint'): a session cannot share its prompt")
        return _Entry(candidate, list(encoded.group.candidates[0]), encoded.truncated[0])

    def _unfinished(self, index: int) -> _Entry:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self._entries):
            raise DataError(f"there is no candidate {index!r}: the session has {len(self._entries)}")
        entry = self._entries[index]
        if entry.candidate.finished:
            raise DataError(f"candidate {index} is finished: add it with finished=False to extend it")
        return entry

    def _change(self, index: int, candidate: Candidate) -> None:
        """Put ``candidate`` in the place of an entry; what the longer text left as it was stays known."""
        old, new = self._entries[index], self._entry(candidate)
        same = common_prefix(old.ids, new.ids)
        new.scores = TokenScores(old.scores.policy[:same], old.scores.reference[:same])
        new.places = old.places[:same]
        self._entries[index] = new

    def _score_plausible(self, top_k: int, least: float) -> list[float]:
        """Read candidates piece by piece and drop the implausible; expected rewards, exact for those that were read to their end."""
        beta, form = self._ranker.beta, self._ranker.manifest.reward
        upto = FIRST_PIECE
        alive = list(range(len(self._entries)))
        while True:
            stops = [len(entry.scores.policy) for entry in self._entries]
            for index in alive:
                stops[index] = max(stops[index], min(upto, len(self._entries[index].ids)))
            self._score(stops)
            partials = [
                Partial(entry.scores.policy - entry.scores.reference, len(entry.ids), self._ranker.offset(len(entry.ids)))
                for entry in self._entries
            ]
            found = forecast(partials, beta, form)
            if not partials:
                return []
            alive = plausible(found, min(top_k, len(partials)), least)
            if all(partials[index].left == 0 for index in alive):
                return found.rewards
            upto *= 2

    def _score(self, stops: Sequence[int]) -> None:
        """Read each candidate as far as the token that ``stops`` says."""
        stop = {id(entry): end for entry, end in zip(self._entries, stops, strict=True)}
        pending = [entry for entry in self._entries if len(entry.scores.policy) < stop[id(entry)]]
        if not pending:
            return
        budget = self._ranker.token_budget
        if not self._engine.takes_past:
            [found] = score(self._engine, [Group(self._prompt_ids, [entry.ids for entry in pending])], budget)
            for entry, scores in zip(pending, found, strict=True):
                entry.scores = scores
            return
        continuing = cast("ContinuingEngine", self._engine)
        if self._memory is None:
            self._memory = read(continuing, self._prompt_ids, budget)
        # Candidates of which nothing is known share one group: their runs meet the prompt's keys as one product.
        fresh = [entry for entry in pending if not len(entry.scores.policy)]
        batches = [[entry] for entry in pending if len(entry.scores.policy)] + ([fresh] if fresh else [])
        groups = [self._group(batch, [stop[id(entry)] for entry in batch]) for batch in batches]

        def growing(g: int, c: int) -> bool:
            entry = batches[g][c]
            return not entry.candidate.finished or stop[id(entry)] < len(entry.ids)

        for (g, c), scores, places in score_behind(continuing, self._memory, groups, budget, growing):
            entry = batches[g][c]
            check_finite(scores, self._engine, f"candidate {self._entries.index(entry)}")
            known = len(entry.scores.policy)
            entry.places = [*entry.places[: known - 1], *places] if known else list(places[1:])
            entry.scores = TokenScores(
                np.concatenate([entry.scores.policy, scores.policy]), np.concatenate([entry.scores.reference, scores.reference])
            )

    def _group(self, batch: Sequence[_Entry], stops: Sequence[int]) -> Group:
        """What is to be read of entries that stand at the same place: behind the prompt, or one behind its own tokens."""
        prompt, known = self._prompt_ids, len(batch[0].scores.policy)
        if not known:
            return Group(prompt[-1:], [entry.ids[:stop] for entry, stop in zip(batch, stops, strict=True)], past=range(len(prompt) - 1))
        [entry], [stop] = batch, stops
        past = [*range(len(prompt)), *entry.places[: known - 1]]
        return Group(entry.ids[known - 1 : known], [entry.ids[known:stop]], past=past)
