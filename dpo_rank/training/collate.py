"""Encoded rows as the batches of a trainer: packed rows within a token budget, their labels, and where each candidate's tokens lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_rank.scoring.pack import Group, Layout, pack
from dpo_rank.training.prepare import TrainingGroup

Slice = dict[str, Any]
"""One packed row: see `packed`."""


@dataclass(frozen=True, slots=True)
class Collator:
    """Cuts a step's rows into packed rows. A prompt's candidates stay together: a loss compares them.

    Args:
        token_budget: tokens of a packed row; a prompt whose candidates need more has a row of its own.
        mismatched: also give each prompt the answer to another one, from which KTO estimates its reference point.

    """

    token_budget: int
    mismatched: bool = False

    def __call__(self, items: Sequence[TrainingGroup]) -> dict[str, Any]:
        """A batch.

        Returns:
            ``slices`` (see `packed`), ``rows`` (their number, which divides the loss) and, where asked for, ``mismatched`` slices.

        """
        batch: dict[str, Any] = {"slices": self.slices(items), "rows": len(items)}
        if self.mismatched:
            batch["mismatched"] = self.slices(with_next_answer(items))
        return batch

    def slices(self, items: Sequence[TrainingGroup]) -> list[Slice]:
        """The packed rows of ``items``."""
        return [packed(members) for members in within_budget(items, self.token_budget)]


def within_budget(items: Sequence[TrainingGroup], token_budget: int) -> Iterator[list[TrainingGroup]]:
    """Cut ``items`` into runs of at most ``token_budget`` tokens, those of like length together: their padded views waste less."""
    members: list[TrainingGroup] = []
    tokens = 0
    for item in sorted(items, key=lambda item: len(item.group.prompt) + max(map(len, item.group.candidates))):
        size = num_tokens(item.group)
        if members and tokens + size > token_budget:
            yield members
            members, tokens = [], 0
        members.append(item)
        tokens += size
    if members:
        yield members


def num_tokens(group: Group) -> int:
    """Tokens that a packed row reads of ``group``."""
    return len(group.prompt) + sum(len(candidate) - 1 for candidate in group.candidates)


def with_next_answer(items: Sequence[TrainingGroup]) -> list[TrainingGroup]:
    """Each prompt with the first answer of the row after it."""
    answers = [item.group.candidates[0] for item in items]
    pairs = zip(items, answers[1:] + answers[:1], strict=True)
    return [TrainingGroup(Group(item.group.prompt, [answer]), (0.0,), where=item.where) for item, answer in pairs]


def packed(items: Sequence[TrainingGroup]) -> Slice:
    """One packed row.

    Returns:
        The fields of `Layout` (prefixed ``layout_``), ``candidate`` [M] (which of the B * N places each target belongs to), ``lengths``
        [B, N] (targets of each candidate, 0 for padding), ``targets`` [B, N], ``mask`` [B, N], ``weights`` [B], ``where`` (B texts) and,
        where all items have them, ``reference`` [B, N].

    """
    row = pack([item.group for item in items])
    width = max(len(item.targets) for item in items)
    lengths = np.zeros((len(items), width), dtype=np.int64)
    targets = np.zeros((len(items), width), dtype=np.float32)
    for b, item in enumerate(items):
        lengths[b, : len(item.targets)] = [len(candidate) for candidate in item.group.candidates]
        targets[b, : len(item.targets)] = item.targets
    places = [b * width + n for b, item in enumerate(items) for n in range(len(item.targets))]
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "candidate": np.repeat(places, row.lengths),
        "lengths": lengths,
        "targets": targets,
        "mask": lengths > 0,
        "weights": np.array([item.weight for item in items], dtype=np.float32),
        **{f"layout_{name}": field for name, field in zip(Layout._fields, row.layout, strict=True)},
    }
    if all(item.reference is not None for item in items):
        arrays["reference"] = np.zeros((len(items), width))
        for b, item in enumerate(items):
            arrays["reference"][b, : len(item.targets)] = item.reference
    return {**{name: torch.from_numpy(array) for name, array in arrays.items()}, "where": [item.where for item in items]}


def layout_of(part: Slice) -> Layout[Tensor]:
    """The layout of a packed row, as tensors."""
    return Layout(*(part[f"layout_{name}"] for name in Layout._fields))


def per_candidate(values: Tensor, part: Slice) -> Tensor:
    """Sums ``[B, N]`` of per-token ``values`` [M], in float64: at thousands of nats the spacing of float32 is wider than many margins."""
    lengths = part["lengths"]
    sums = torch.zeros(lengths.numel(), dtype=torch.float64, device=values.device).index_add(0, part["candidate"], values.double())
    return sums.view_as(lengths)
