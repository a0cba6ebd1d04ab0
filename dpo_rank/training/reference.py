"""Log-probs of training rows under the frozen reference, computed once and kept beside the run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dpo_rank import __version__
from dpo_rank.scoring.logps import TokenLogProbs
from dpo_rank.training.checkpoint import weights_digest
from dpo_rank.training.collate import layout_of, packed, per_candidate, within_budget
from dpo_rank.training.prepare import TrainingGroup, fingerprint

logger = logging.getLogger(__name__)


def with_reference(
    reference: TokenLogProbs,
    items: Sequence[TrainingGroup],
    token_budget: int,
    cache: Path,
    precision: str = "",
    progress: Callable[[int], None] = lambda _: None,
) -> list[TrainingGroup]:
    """``items`` with the reference's summed log-probs of each candidate.

    Args:
        reference: the frozen model.
        items: rows as ids.
        token_budget: tokens of a packed row.
        cache: directory of earlier results. A result's name is a hash of the model's weights and precision, the rows' ids and this
            package's version, so none is ever taken for another's.
        precision: of mixed precision, in words.
        progress: told of finished rows.

    """
    parts = {
        "weights": weights_digest(reference.model.named_parameters()),
        "rows": fingerprint(items),
        "precision": f"{reference.model.dtype} {precision}",
        "version": __version__,
    }
    file = cache / f"reference-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.safetensors"
    if file.is_file():
        logger.info("reference log-probs from %s", file)
        sums = load_file(file)["sums"].tolist()
        progress(len(items))
    else:
        sums = _sums(reference, items, token_budget, progress)
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        save_file({"sums": torch.tensor(sums, dtype=torch.float64)}, partial)
        partial.replace(file)
    numbers = iter(sums)
    return [replace(item, reference=tuple(next(numbers) for _ in item.targets)) for item in items]


def _sums(reference: TokenLogProbs, items: Sequence[TrainingGroup], token_budget: int, progress: Callable[[int], None]) -> list[float]:
    """Of every candidate, row after row."""
    device = reference.model.device
    place = {id(item): index for index, item in enumerate(items)}
    found: list[list[float]] = [[] for _ in items]
    with torch.no_grad():
        for members in within_budget(items, token_budget):
            part = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in packed(members).items()}
            sums = per_candidate(reference(layout_of(part)), part).cpu()
            for row, item in enumerate(members):
                found[place[id(item)]] = sums[row, : len(item.targets)].tolist()
            progress(len(members))
    return [value for row in found for value in row]
