"""How long a ranker takes on its user's own prompts, with every engine and precision that can run here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dpo_rank.data.formats import Example
from dpo_rank.errors import DpoRankError
from dpo_rank.ranker import Ranker


@dataclass(frozen=True, slots=True)
class LatencyReport:
    """One engine in one precision, a prompt at a time.

    Attributes:
        engine, precision: what ran.
        load_seconds: opening the ranker, its checksums included.
        first_ms: the first ranking.
        median_ms, p90_ms: of all later ones, each prompt's median over the repeats first.
        ms_per_candidate: median over prompts.
        tokens_per_second: real tokens of prompts and candidates.
        same_best: share of prompts with the best candidate of the first engine measured.
        problem: why it did not run, or None.

    """

    engine: str
    precision: str
    load_seconds: float = 0.0
    first_ms: float = 0.0
    median_ms: float = 0.0
    p90_ms: float = 0.0
    ms_per_candidate: float = 0.0
    tokens_per_second: float = 0.0
    same_best: float = 1.0
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def ways(ranker: Ranker) -> list[tuple[str, str]]:
    """Engine and precision of everything that the artifact of ``ranker`` can run in, installed or not."""
    manifest = ranker.manifest
    found = [("onnx", name) for name in sorted(manifest.precisions, key=lambda name: name != "fp32")]
    if "fp32" in manifest.precisions:
        found += [("openvino", "fp32"), ("openvino", "bf16")]
    if manifest.has_models:
        found += [("torch", "fp32"), ("torch", "bf16")]
    return found or [(ranker.engine, ranker.precision)]


def measure(
    load: Callable[[str, str], Ranker], which: Sequence[tuple[str, str]], examples: Sequence[Example], repeats: int = 3
) -> Iterator[LatencyReport]:
    """Rank every example ``repeats`` times with ``load(engine, precision)``, one way after the other.

    What cannot be loaded here is reported with its `LatencyReport.problem`.
    """
    best: list[int] | None = None
    for engine, precision in which:
        start = time.perf_counter()
        try:
            ranker = load(engine, precision)
        except DpoRankError as error:
            yield LatencyReport(engine, precision, problem=str(error))
            continue
        load_seconds = time.perf_counter() - start
        start = time.perf_counter()
        _rank(ranker, examples[0])
        first = time.perf_counter() - start
        seconds = np.empty((len(examples), repeats))
        chosen = []
        for row, example in enumerate(examples):
            for repeat in range(repeats):
                start = time.perf_counter()
                found = _rank(ranker, example)
                seconds[row, repeat] = time.perf_counter() - start
            chosen.append(found)
        best = best or chosen
        each = np.median(seconds, axis=1)
        counts = np.array([len(example.candidates) for example in examples])
        yield LatencyReport(
            engine,
            precision,
            load_seconds=load_seconds,
            first_ms=1000 * first,
            median_ms=1000 * float(np.median(each)),
            p90_ms=1000 * float(np.quantile(each, 0.9)),
            ms_per_candidate=1000 * float(np.median(each / counts)),
            tokens_per_second=sum(_tokens(ranker, example) for example in examples) / float(each.sum()),
            same_best=float(np.mean(np.array(chosen) == np.array(best))),
        )


def _rank(ranker: Ranker, example: Example) -> int:
    return ranker.rank(example.prompt, example.candidates, passages=example.passages or None).best.index


def _tokens(ranker: Ranker, example: Example) -> int:
    group = ranker.encode(example.prompt, example.candidates, example.passages or None).group
    return len(group.prompt) + sum(map(len, group.candidates))
