"""How much scores move when nothing that matters changes: order of the candidates, the batch, whitespace, markdown, a paraphrase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from dpo_rank.data.formats import Example
from dpo_rank.errors import DataError
from dpo_rank.evaluation.agreement import Scorer, score_examples
from dpo_rank.ranking import Candidate

WRAPPINGS: dict[str, Callable[[str], str]] = {
    "line breaks around": lambda text: f"\n{text}\n\n",
    "a bold lead": lambda text: f"**Answer:** {text}",
    "as a quotation": lambda text: "\n".join(f"> {line}" for line in text.splitlines()),
}
"""Ways to dress an answer that leave what it says."""


@dataclass(frozen=True, slots=True)
class Movement:
    """What one change did.

    Attributes:
        name: the change.
        moved: mean |change of a score| of one changed candidate, in standard deviations of its prompt's scores.
        promoted: share of changed candidates whose place rose minus that whose place fell: a change that pays.
        same_best: share of prompts whose best candidate stayed the best when all candidates were changed.
        num_prompts: prompts it was tried on.

    """

    name: str
    moved: float
    promoted: float
    same_best: float
    num_prompts: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def robustness(ranker: Scorer, examples: Sequence[Example], limit: int = 40) -> list[Movement]:
    """Try every change on the first rows with two candidates or more.

    A row may bring paraphrases of its candidates under ``paraphrases``: one text a candidate.

    Raises:
        DataError: paraphrases of another number than candidates.

    """
    rows = [example for example in examples if len(example.candidates) > 1][:limit]
    before = score_examples(ranker, rows)
    turned = [replace(row, candidates=row.candidates[::-1]) for row in rows]
    shuffled = [np.asarray(s)[::-1] for s in score_examples(ranker, turned)]
    alone = [score_examples(ranker, [row])[0] for row in rows]
    found = [_movement("order of the candidates", before, shuffled), _movement("scored alone, not in a batch", before, alone)]
    for name, wrap in WRAPPINGS.items():
        found.append(
            _movement(name, before, score_examples(ranker, [_changed(row, [wrap(c.text) for c in row.candidates]) for row in rows]))
        )
    told = [place for place, row in enumerate(rows) if "paraphrases" in row.raw]
    for place in told:
        given, where = rows[place].raw["paraphrases"], rows[place].where
        texts = isinstance(given, Sequence) and not isinstance(given, str) and all(isinstance(text, str) for text in given)
        if not texts or len(given) != len(rows[place].candidates):
            raise DataError(f"{where}: field 'paraphrases': expected {len(rows[place].candidates)} texts, one for each candidate")
    if told:
        after = score_examples(ranker, [_changed(rows[place], rows[place].raw["paraphrases"]) for place in told])
        found.append(_movement("a paraphrase", [before[place] for place in told], after))
    return found


def _changed(row: Example, texts: Sequence[str]) -> Example:
    return replace(row, candidates=tuple(Candidate(text, finished=c.finished) for text, c in zip(texts, row.candidates, strict=True)))


def _movement(name: str, before: Sequence[Any], after: Sequence[Any]) -> Movement:
    moved, promoted, same = [], [], []
    for old, new in zip(before, after, strict=True):
        a, b = np.asarray(old, dtype=np.float64), np.asarray(new, dtype=np.float64)
        spread = float(a.std()) or 1.0
        moved.append(float(np.abs(b - a).mean()) / spread)
        ahead = np.array([int((a > a[i]).sum()) for i in range(len(a))])
        now = np.array([int((np.delete(a, i) > b[i]).sum()) for i in range(len(a))])
        promoted.append(float(np.sign(ahead - now).mean()))
        same.append(float(a.argmax() == b.argmax()))
    return Movement(name, float(np.mean(moved)), float(np.mean(promoted)), float(np.mean(same)), len(moved))
