"""Rows of preferences as what a trainer reads: token ids with labels, every row that cannot be trained on named."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from dpo_rank.data.formats import Example, OnError, Problems, prompt_hash
from dpo_rank.errors import DataError
from dpo_rank.scoring.encode import Encoder
from dpo_rank.scoring.pack import Group
from dpo_rank.scoring.prompt_format import PassageFormat, PromptFormat


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """A prompt's candidates as ids with their labels.

    Attributes:
        group: the ids.
        targets: a label for each candidate; higher is better.
        weight: how much the row counts.
        where: the row's place, for messages.
        reference: summed log-probs of the candidates under the reference, in nats, where they are known.
        prompt_cut, answers_cut: whether the prompt, and how many answers, were too long.

    """

    group: Group
    targets: tuple[float, ...]
    weight: float = 1.0
    where: str = "row"
    reference: tuple[float, ...] | None = None
    prompt_cut: bool = False
    answers_cut: int = 0


def trainable(rows: Iterable[Example], *, single: bool, on_error: OnError = "raise", problems: Problems | None = None) -> list[Example]:
    """The rows that a loss can learn from; rows whose labels are all equal say nothing and are left out.

    Args:
        rows: labelled examples.
        single: whether one answer with a label is enough.
        on_error: raise at the first bad row, or skip it and note it in ``problems``.
        problems: collects what was skipped.

    Raises:
        DataError: a row with an empty answer, with equal answers and different labels, or (unless ``single``) with one candidate.

    """
    kept = []
    for row in rows:
        try:
            _check(row, single)
        except DataError as error:
            if on_error == "raise":
                raise
            if problems is not None:
                problems.messages.append(str(error))
            continue
        if single or row.pairs():
            kept.append(row)
    return kept


def _check(row: Example, single: bool) -> None:
    assert row.scores is not None
    seen: dict[str, int] = {}
    for index, candidate in enumerate(row.candidates):
        if not candidate.text.strip():
            raise DataError(f"{row.where}: candidate {index} is empty")
        other = seen.setdefault(candidate.text, index)
        if row.scores[other] != row.scores[index]:
            raise DataError(f"{row.where}: candidates {other} and {index} are the same text with different labels")
    if len(row.candidates) == 1 and not single:
        raise DataError(f"{row.where}: has one candidate; this loss compares several (losses on single answers: pointwise, kto)")


def contradictions(rows: Sequence[Example]) -> list[tuple[str, str]]:
    """Places of rows that order the same two answers to the same prompt in opposite ways, each with the row before it."""
    seen: dict[tuple[int, str, str], str] = {}
    found = []
    for row in rows:
        key = prompt_hash(row.prompt)
        for better, worse in row.pairs():
            a, b = row.candidates[better].text, row.candidates[worse].text
            seen.setdefault((key, a, b), row.where)
            if (turned := seen.get((key, b, a))) is not None and (turned, row.where) not in found:
                found.append((turned, row.where))
    return found


def encode_row(encoder: Encoder, row: Example) -> TrainingGroup:
    """A row as ids.

    Raises:
        DataError: the message names the row.

    """
    try:
        encoded = encoder.encode(row.prompt, [c.text for c in row.candidates], [c.finished for c in row.candidates], row.passages or None)
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from None
    assert row.scores is not None
    return TrainingGroup(
        encoded.group, row.scores, row.weight, row.where, prompt_cut=encoded.prompt_truncated, answers_cut=sum(encoded.truncated)
    )


def best_only(item: TrainingGroup) -> TrainingGroup:
    """The best candidate alone, for language modelling."""
    best = max(range(len(item.targets)), key=item.targets.__getitem__)
    return replace(item, group=replace(item.group, candidates=[item.group.candidates[best]]), targets=(item.targets[best],))


def fingerprint(groups: Sequence[TrainingGroup]) -> str:
    """SHA-256 of ids, labels and weights in their order: two data sets with one fingerprint train alike."""
    digest = hashlib.sha256()
    for item in groups:
        for ids in (item.group.prompt, *item.group.candidates):
            digest.update(np.asarray(ids, dtype=np.int64).tobytes() + b"|")
        digest.update(np.asarray([*item.targets, item.weight], dtype=np.float64).tobytes() + b"\n")
    return digest.hexdigest()


def passage_format(rows: Iterable[Example], given: PassageFormat | None) -> PassageFormat | None:
    """The given format, or the usual one where a row has passages."""
    return given or (PassageFormat() if any(row.passages for row in rows) else None)


def with_answer_lead(form: PromptFormat, rows: Sequence[Example]) -> PromptFormat:
    """A plain format whose answers nearly all begin with a space stores that space."""
    if form.chat:
        return form
    texts = [candidate.text for row in rows for candidate in row.candidates]
    spaced = sum(text.startswith(" ") for text in texts) >= 0.95 * len(texts)
    return replace(form, answer_lead=" ") if spaced else form


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What a run would train on.

    Attributes:
        rows, candidates, pairs: how many.
        rows_a_step: of all processes and accumulated batches.
        tokens_a_step, tokens: of packed rows, every prompt once.
        prompt_tokens, completion_tokens: 50th and 95th percentile and the largest.
        prompts_cut, answers_cut: what was too long.
        boundary_differs: share of a sample whose joint tokenisation differs at the boundary.
        tied: pairs of candidates that the labels leave open.
        contradictions: rows that turn another row's order.
        longer_is_better: share of labelled pairs whose better answer has more characters (equal ones half).
        steps: optimizer steps.

    """

    rows: int
    candidates: int
    pairs: int
    rows_a_step: int
    tokens_a_step: float
    tokens: int
    prompt_tokens: tuple[int, int, int]
    completion_tokens: tuple[int, int, int]
    prompts_cut: int
    answers_cut: int
    boundary_differs: float
    tied: int
    contradictions: int
    longer_is_better: float
    steps: int

    def to_dict(self) -> dict[str, object]:
        """As plain data."""
        return asdict(self)


def describe(rows: Sequence[Example], groups: Sequence[TrainingGroup], encoder: Encoder, batch_size: int, steps: int) -> DataFacts:
    """Count what stands in ``rows`` and their ids ``groups``."""
    prompts = [len(item.group.prompt) for item in groups]
    completions = [len(candidate) for item in groups for candidate in item.group.candidates]
    tokens = sum(prompts) + sum(completions)
    lengths = [[len(candidate.text) for candidate in row.candidates] for row in rows]
    gaps = [size[a] - size[b] for row, size in zip(rows, lengths, strict=True) for a, b in row.pairs()]
    possible = sum(len(size) * (len(size) - 1) // 2 for size in lengths)
    sample = rows[:: max(1, len(rows) // 200)]
    return DataFacts(
        rows=len(rows),
        candidates=len(completions),
        pairs=len(gaps),
        rows_a_step=batch_size,
        tokens_a_step=tokens / max(1, len(rows)) * batch_size,
        tokens=tokens,
        prompt_tokens=_spread(prompts),
        completion_tokens=_spread(completions),
        prompts_cut=sum(item.prompt_cut for item in groups),
        answers_cut=sum(item.answers_cut for item in groups),
        boundary_differs=sum(encoder.boundary_differs(row.prompt, row.candidates[0].text) for row in sample) / max(1, len(sample)),
        tied=possible - len(gaps),
        contradictions=len(contradictions(rows)),
        longer_is_better=float(np.mean([(gap > 0) + 0.5 * (gap == 0) for gap in gaps])) if gaps else 0.5,
        steps=steps,
    )


def _spread(values: Sequence[int]) -> tuple[int, int, int]:
    p50, p95 = np.percentile(values, [50, 95])
    return round(float(p50)), round(float(p95)), max(values)
