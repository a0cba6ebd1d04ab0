"""Encoded examples as the batches of a trainer: one packed row, its labels, and where each candidate's tokens lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_rank.scoring.pack import Group, Layout, pack


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """A prompt's candidates as ids with their labels (higher is better)."""

    group: Group
    targets: tuple[float, ...]


def collate(items: Sequence[TrainingGroup]) -> dict[str, Tensor]:
    """One batch.

    Returns:
        The fields of `Layout` (prefixed ``layout_``), ``candidate`` [M] (which of the B * N places each target belongs to),
        ``lengths`` [B, N] (targets of each candidate, 0 for padding), ``targets`` [B, N] and ``mask`` [B, N].

    """
    row = pack([item.group for item in items])
    width = max(len(item.targets) for item in items)
    lengths = np.zeros((len(items), width), dtype=np.int64)
    targets = np.zeros((len(items), width), dtype=np.float32)
    for b, item in enumerate(items):
        lengths[b, : len(item.targets)] = [len(candidate) for candidate in item.group.candidates]
        targets[b, : len(item.targets)] = item.targets
    places = [b * width + n for b, item in enumerate(items) for n in range(len(item.targets))]
    arrays = {
        "candidate": np.repeat(places, row.lengths),
        "lengths": lengths,
        "targets": targets,
        "mask": lengths > 0,
        **{f"layout_{name}": field for name, field in zip(Layout._fields, row.layout, strict=True)},
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def layout_of(batch: dict[str, Tensor]) -> Layout[Tensor]:
    """The layout of a batch, as tensors."""
    return Layout(*(batch[f"layout_{name}"] for name in Layout._fields))


def per_candidate(values: Tensor, batch: dict[str, Tensor], mean: bool) -> Tensor:
    """Sums (or means) ``[B, N]`` of per-token ``values`` [M]."""
    lengths = batch["lengths"]
    sums = torch.zeros(lengths.numel(), dtype=values.dtype, device=values.device).index_add(0, batch["candidate"], values)
    sums = sums.view_as(lengths)
    return sums / lengths.clamp(min=1) if mean else sums
