"""Everything that one evaluation measures: a ranker on labelled rows, beside what could embarrass it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo_rank.artifact import manifest_bytes, sha256
from dpo_rank.confidence import Confidence
from dpo_rank.data.formats import Example, prompt_hash
from dpo_rank.errors import DataError
from dpo_rank.evaluation import agreement, annotators, baselines, calibration, style
from dpo_rank.evaluation.agreement import Comparison, Report, Scores
from dpo_rank.evaluation.annotators import Annotators
from dpo_rank.evaluation.baselines import Scored
from dpo_rank.evaluation.calibration import Reliability
from dpo_rank.evaluation.robustness import Movement, robustness
from dpo_rank.evaluation.style import CorrectionEffect, LengthControlled, StyleOfLabels
from dpo_rank.ranker import Ranker
from dpo_rank.scoring.engine import TokenScores

BY = ("subset", "source", "domain", "language")
"""Keys of rows that figures are sliced by."""


@dataclass(frozen=True, slots=True)
class Sureness:
    """How far the ranker's probabilities and margins can be trusted on these rows.

    Attributes:
        stored: at the temperature that the ranker has.
        fitted: at the one that these rows themselves would give: the best that any temperature can do here.
        by_slice: the temperature that each slice alone would give.
        risk: share of rankings kept, and share of them that are wrong, by falling margin.
        promised: at some risks: what the ranker's own thresholds (measured on its held-out rows) kept here, and how much of that was
            wrong; None where it has none.
        unfamiliar: share of the rows that the ranker calls unfamiliar; None where it cannot tell.

    """

    stored: Reliability
    fitted: Reliability
    by_slice: dict[str, float]
    risk: list[tuple[float, float]]
    promised: dict[float, tuple[float, float]] | None
    unfamiliar: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        source: where the rows are from.
        examples: the rows used.
        scores: the ranker's, one array a row.
        reports: the ranker's first, then every baseline's.
        scored: the same rankers' times, and what was not run.
        comparisons: the ranker against each baseline, in the order of ``reports[1:]``.
        labels: how far style predicts the labels.
        length: the ranker with length held equal.
        explained: share of the variance of the ranker's scores that style explains.
        correction: what the correction for length would do; None where the tokens' log-probs are not known.
        sureness: reliability and abstention; None for rankings read from a file.
        people: where rows bring annotations.
        movements: what changes that do not matter did to the scores.
        leaked: places of rows whose prompts were trained on.
        published: a benchmark's own figures.
        facts: versions, hashes, counts: what reproduces this.
        warnings: what a reader must know first, in words.

    """

    source: str
    examples: Sequence[Example]
    scores: Scores
    reports: list[Report]
    scored: list[Scored]
    comparisons: list[Comparison]
    labels: StyleOfLabels
    length: LengthControlled
    explained: dict[str, float]
    correction: CorrectionEffect | None = None
    sureness: Sureness | None = None
    people: Annotators | None = None
    movements: list[Movement] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    published: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The ranker's."""
        return self.reports[0].name

    def to_dict(self) -> dict[str, Any]:
        """As plain data; scores of each row stand in a file of their own."""
        sure = self.sureness
        times = {item.name: {"ms_a_prompt": item.ms_a_prompt, "not_run": item.problem} for item in self.scored}
        return {
            "source": self.source,
            "facts": self.facts,
            "warnings": self.warnings,
            "reports": [report.to_dict() for report in self.reports],
            "times": times,
            "comparisons": [
                {
                    "against": c.second,
                    "difference": c.agreement.to_dict(),
                    "mcnemar": None if c.mcnemar is None else c.mcnemar.p_value,
                    "reversals": list(c.reversals),
                }
                for c in self.comparisons
            ],
            "published": self.published,
            "labels": self.labels.to_dict(),
            "length": self.length.to_dict(),
            "explained_by_style": self.explained,
            "correction": self.correction.to_dict() if self.correction else None,
            "calibration": None
            if sure is None
            else {
                "stored": sure.stored.to_dict(),
                "fitted": sure.fitted.to_dict(),
                "temperature_by_slice": sure.by_slice,
                "promised": None
                if sure.promised is None
                else [{"max_risk": risk, "kept": kept, "wrong": wrong} for risk, (kept, wrong) in sure.promised.items()],
                "unfamiliar": sure.unfamiliar,
            },
            "annotators": self.people.to_dict() if self.people else None,
            "robustness": [movement.to_dict() for movement in self.movements],
            "leaked": self.leaked,
        }


def evaluate(
    ranker: Ranker,
    examples: Sequence[Example],
    source: str,
    *,
    by: Sequence[str] = BY,
    others: Sequence[str | Scored] = (),
    train: Sequence[Example] = (),
    perturb: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Measure a ranker on labelled rows.

    Args:
        ranker: what to measure.
        examples: labelled rows; those whose labels tell nothing apart are left out.
        source: where they are from, for the report.
        by: keys to slice by.
        others: more baselines: names as of `baselines.by_name`, or scores of the rows whose labels tell candidates apart.
        train: rows it was trained on, to find prompts on both sides.
        perturb: also score changed answers of some rows.
        progress: told of finished rows.

    Raises:
        DataError: no row can be used; the message says why.

    """
    used = [example for example in examples if example.pairs()]
    if not used:
        raise DataError(f"{source}: {_why_unusable(examples)}")
    tokens: list[list[TokenScores]] = []

    def score() -> Scores:
        tokens.extend(agreement.log_probs_of(ranker, used, progress))
        return [np.array([ranker.reward(item) for item in items]) for items in tokens]

    mine = baselines.timed(ranker.name or "the ranker", used, score)
    *parts, corrected = baselines.by_parts(used, tokens, ranker.beta, ranker.manifest.reward)
    scored = [mine, *baselines.by_rules(used), *parts, corrected, *baselines.beside(others, used)]
    plain = ranker.correction is None and corrected.problem is None
    correction = style.correction_effect(used, mine.scores, corrected.scores) if plain else None
    manifest = ranker.manifest
    facts = {
        "ranker": ranker.name,
        "artifact": hashlib.sha256(manifest_bytes(manifest, manifest.files)).hexdigest(),
        "engine": f"{ranker.engine}, {ranker.precision}, {ranker.device}",
        "temperature": ranker.temperature,
        "correction": ranker.correction is not None,
    }
    found = assemble(mine, scored[1:], used, source, by=by, facts=facts, train=train)
    familiar = manifest.familiarity
    strange = None if familiar is None else float(np.mean([familiar.unfamiliar([item.reference for item in items]) for items in tokens]))
    sure = _sureness(used, mine.scores, ranker.temperature, ranker.confidence, strange, found.reports[0])
    moved = robustness(ranker, used) if perturb else []
    return replace(found, correction=correction, sureness=sure, movements=moved)


def assemble(
    mine: Scored,
    others: Sequence[Scored],
    used: Sequence[Example],
    source: str,
    *,
    by: Sequence[str] = BY,
    facts: Mapping[str, Any] | None = None,
    train: Sequence[Example] = (),
) -> Evaluation:
    """What scores alone can tell: agreement beside other scores, style, annotators, leakage.

    Args:
        mine: scores to evaluate.
        others: scores of baselines on the same rows; those with a problem are listed and left out.
        used: labelled rows, one for each array of scores.
        source: where they are from.
        by: keys to slice by.
        facts: what else the report says.
        train: see `evaluate`.

    Raises:
        DataError: no row can be used, or a score is not finite.

    """
    if not any(example.pairs() for example in used):
        raise DataError(f"{source}: {_why_unusable(used)}")
    reports = [agreement.evaluate_scores(item.name, used, item.scores, by) for item in (mine, *others) if item.problem is None]
    labels = style.style_of_labels(used)
    length = style.length_controlled(used, mine.scores)
    leaked = agreement.leakage(train, used)
    people = annotators.measure(used, mine.scores) if any("annotations" in example.raw for example in used) else None
    comparisons = [agreement.compare(reports[0], other) for other in reports[1:]]
    warnings = [*labels.warnings(), *(text for c in comparisons if c.agreement.excludes_zero for text in c.reversals)]
    if leaked:
        warnings.insert(0, f"{len(leaked)} of {len(used)} rows have a prompt that was trained on (first: {leaked[0]})")
    if reports[0].agreement.few:
        warnings.insert(0, f"{reports[0].agreement.num_prompts} prompts are too few for an interval to be believed")
    better = [c for c in comparisons if c.second in baselines.RULES and c.agreement.value <= 0]
    if better:
        warnings.append(f"A rule that reads no meaning does as well or better: {', '.join(c.second for c in better)}")
    rows = {
        "rows": len(used),
        "prompts": len({prompt_hash(example.prompt) for example in used}),
        "candidates": sum(len(example.candidates) for example in used),
        "labelled_pairs": sum(len(example.pairs()) for example in used),
        "data_sha256": _hash(source),
        "versions": _versions(),
    }
    explained = style.explained(used, mine.scores)
    return Evaluation(
        source,
        used,
        mine.scores,
        reports,
        [mine, *others],
        comparisons,
        labels,
        length,
        explained,
        people=people,
        leaked=leaked,
        facts={**(facts or {}), **rows},
        warnings=warnings,
    )


def _sureness(
    used: Sequence[Example],
    scores: Scores,
    temperature: float,
    confidence: Confidence | None,
    unfamiliar: float | None,
    report: Report,
) -> Sureness:
    pairs = calibration.pairs_of(used, scores)
    fitted = calibration.fit_temperature(pairs.margins, pairs.weights)
    margins, wrong = calibration.outcomes(used, scores)
    promised = None
    if confidence is not None:
        promised = {}
        for risk in (0.05, 0.1, 0.2, 0.3, 0.4):
            least = confidence.threshold(risk)
            kept = margins >= (np.inf if least is None else least)
            promised[risk] = (float(kept.mean()), float(wrong[kept].mean()) if kept.any() else 0.0)
    by_slice = {}
    for key, groups in agreement.slices_of(used, tuple(report.slices)).items():
        for value, rows in groups.items():
            if len(rows) >= 20 and key != "better answer is":  # that slice looks at the labels
                part = calibration.pairs_of([used[row] for row in rows], [scores[row] for row in rows])
                by_slice[f"{key}: {value}"] = calibration.fit_temperature(part.margins, part.weights)
    return Sureness(
        calibration.reliability(pairs, temperature),
        calibration.reliability(pairs, fitted),
        by_slice,
        calibration.risk_coverage(used, scores),
        promised,
        unfamiliar,
    )


def _why_unusable(examples: Sequence[Example]) -> str:
    if not examples:
        return "no rows"
    if all(len(example.candidates) == 1 for example in examples):
        return "every row is a single answer: scores of different prompts do not compare; rows need two candidates of one prompt"
    return "no row has labels that tell its candidates apart: all are tied"


def _hash(source: str) -> str | None:
    if not os.path.isfile(source):  # noqa: PTH113
        return None
    return sha256(Path(source))


def _versions() -> dict[str, str]:
    from dpo_rank.environment import describe

    return {name: version for name, version in describe()["packages"].items() if version}
