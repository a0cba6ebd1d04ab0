"""Agreement with labels: pairs in the right order, lists by what their first places are worth, slices, and two rankers compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dpo_rank.data.formats import Example, prompt_hash
from dpo_rank.errors import DataError
from dpo_rank.evaluation import lists
from dpo_rank.evaluation.intervals import Figure, McNemar, difference, figure, mcnemar
from dpo_rank.scoring.engine import TokenScores

if TYPE_CHECKING:
    from dpo_rank.ranker import Ranker

Scores = Sequence[npt.NDArray[np.float32]]
LIST_MEASURES: dict[str, Callable[[lists.Values, lists.Values], float]] = {
    "label of the best": lists.best_of_n,
    "regret": lambda s, y: float(lists.regret_curve(s, y)[-1]),
    "best is first": lists.hit,
    "best is in the first 3": lambda s, y: lists.hit(s, y, 3),
    "NDCG@10": lambda s, y: lists.ndcg(s, y, 10),
    "MRR": lists.reciprocal_rank,
    "MAP": lists.average_precision,
    "Kendall tau-b": lists.kendall_tau,
    "Spearman": lists.spearman,
}
"""Measures of lists of three candidates or more, by name."""
_THIRDS = ("short", "middle", "long")


class Scorer(Protocol):
    """Anything with the signature of `Ranker.score_many`."""

    def score_many(self, prompts: Any, candidate_lists: Any, *, passages: Any = None) -> Scores:
        """One array of scores a prompt."""
        ...


@dataclass(frozen=True, slots=True)
class Report:
    """How one ranker (or rule) does on labelled rows.

    Attributes:
        name: the ranker.
        agreement: share of a row's labelled pairs in the right order, ties half.
        measures: of `LIST_MEASURES`, over rows with three candidates or more.
        tie_aware: see `tie_aware`; None where no labels tie.
        curve: expected label of the best of n = 1, 2, ... candidates, and of a perfect choice, over the lists that are long enough.
        slices: agreement by each key and each of its values.
        values: agreement of each row, in the order of ``rows``.
        rows: places of the rows used, among all that were given.
        clusters: each used row's prompt, as a hash.

    """

    name: str
    agreement: Figure
    measures: dict[str, Figure] = field(default_factory=dict)
    tie_aware: float | None = None
    curve: list[tuple[float, float]] = field(default_factory=list)
    slices: dict[str, dict[str, Figure]] = field(default_factory=dict)
    values: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    rows: tuple[int, ...] = ()
    clusters: tuple[int, ...] = ()

    @property
    def best_of_n(self) -> Figure | None:
        """Mean label of the candidate ranked first, over rows with three candidates or more."""
        return self.measures.get("label of the best")

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without the figures of each row."""
        return {
            "name": self.name,
            "agreement": self.agreement.to_dict(),
            "best_of_n": self.best_of_n.to_dict() if self.best_of_n else None,
            "measures": {name: found.to_dict() for name, found in self.measures.items()},
            "tie_aware": self.tie_aware,
            "curve": [{"n": n, "label": label, "perfect": perfect} for n, (label, perfect) in enumerate(self.curve, 1)],
            "slices": {key: {value: found.to_dict() for value, found in by.items()} for key, by in self.slices.items()},
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two rankers on the same rows, row by row.

    Attributes:
        first, second: their names.
        agreement: difference of their agreement, paired by row: positive where the first is ahead.
        mcnemar: where every row is a pair without equal scores and has a prompt of its own, as the test asks; else None.
        reversals: where slices say the opposite of the whole, in words (Simpson 1951).

    """

    first: str
    second: str
    agreement: Figure
    mcnemar: McNemar | None
    reversals: tuple[str, ...] = ()


def pair_agreement(scores: lists.Values, labels: Sequence[float]) -> float:
    """Share of the pairs that ``labels`` tell apart whose scores have the same order; equal scores count half.

    Raises:
        DataError: the labels tell no pair apart.

    """
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    better = y[:, None] > y[None, :]
    if not better.any():
        raise DataError("the labels tell no pair apart")
    credit = (s[:, None] > s[None, :]) + 0.5 * (s[:, None] == s[None, :])
    return float(credit[better].mean())


def tie_aware(scores: Scores, labels: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Share of *all* pairs, tied ones among them, that scores get right when margins up to a threshold count as a tie.

    Pairwise accuracy with tie calibration (Deutsch et al. 2023, arXiv 2305.14324): the threshold is the best one for these
    pairs, so the figure compares rankers on the same rows and is no estimate for new ones.

    Returns:
        the share, and the threshold in units of the scores.

    """
    margins, wanted = [], []
    for s, y in zip(scores, labels, strict=True):
        a, b = np.triu_indices(len(y), 1)
        values, truth = np.asarray(s, dtype=np.float64), np.asarray(y, dtype=np.float64)
        margins.append(values[a] - values[b])
        wanted.append(np.sign(truth[a] - truth[b]))
    margin, want = np.concatenate(margins), np.concatenate(wanted)
    if not len(margin):
        raise DataError("no pair of candidates")
    order = np.argsort(np.abs(margin), kind="stable")
    size, tied = np.abs(margin)[order], want[order] == 0
    right = np.sign(margin[order]) == want[order]
    # With the first k margins (in order of size) called ties: the tied among them are right, and of the others what was right.
    totals = np.concatenate([[0], np.cumsum(tied)]) + np.concatenate([np.cumsum(right[::-1])[::-1], [0]])
    allowed = np.concatenate([[True], size[1:] > size[:-1], [True]])  # equal margins are on one side
    best = int(np.flatnonzero(allowed)[np.argmax(totals[allowed])])
    return float(totals[best] / len(margin)), float(size[best - 1]) if best else 0.0


def evaluate_scores(name: str, examples: Sequence[Example], scores: Scores, by: Sequence[str] = ()) -> Report:
    """Measure ``scores`` (one array an example) against the examples' labels.

    Args:
        name: whose scores they are.
        examples: labelled rows; those whose labels tell nothing apart are left out.
        scores: in the order of ``examples``.
        by: keys of the rows to slice by, where they have them.

    Raises:
        DataError: no row can be used, or a score is not a finite number.

    """
    places = [place for place, example in enumerate(examples) if example.pairs()]
    if not places:
        raise DataError("no row has labels that tell its candidates apart")
    used = [(examples[place], _checked(scores[place], examples[place], name)) for place in places]
    clusters = tuple(prompt_hash(example.prompt) for example, _ in used)
    values = np.array([pair_agreement(s, example.scores or ()) for example, s in used])
    measures = {}
    longer = [(example.scores or (), s, cluster) for (example, s), cluster in zip(used, clusters, strict=True) if len(s) > 2]
    if longer:
        prompts = [cluster for *_, cluster in longer]
        measures = {key: figure([of(s, y) for y, s, _ in longer], clusters=prompts) for key, of in LIST_MEASURES.items()}
    tied = None
    if any(len(set(example.scores or ())) < len(s) for example, s in used):
        tied, _ = tie_aware([s for _, s in used], [example.scores or () for example, _ in used])
    slices = {}
    for key, groups in slices_of([example for example, _ in used], by).items():
        slices[key] = {value: figure(values[rows], clusters=[clusters[row] for row in rows]) for value, rows in groups.items()}
    agreement = figure(values, clusters=clusters)
    return Report(name, agreement, measures, tied, _curve([(s, y) for y, s, _ in longer]), slices, values, tuple(places), clusters)


def _checked(scores: npt.NDArray[np.float32], example: Example, name: str) -> npt.NDArray[np.float32]:
    if len(scores) != len(example.candidates):
        raise DataError(f"{name}: {example.where}: {len(scores)} scores for {len(example.candidates)} candidates")
    if not np.isfinite(np.asarray(scores, dtype=np.float64)).all():
        bad = int(np.flatnonzero(~np.isfinite(np.asarray(scores, dtype=np.float64)))[0])
        raise DataError(f"{name}: {example.where}: the score of candidate {bad} is {scores[bad]}, not a finite number")
    return scores


def _curve(found: list[tuple[lists.Values, Sequence[float]]]) -> list[tuple[float, float]]:
    """Best of n against n, up to the length that four of five lists have, over those lists."""
    if not found:
        return []
    longest = int(np.quantile([len(s) for s, _ in found], 0.2))
    long_enough = [(s, y) for s, y in found if len(s) >= longest]
    ours = np.mean([lists.best_of_n_curve(s, y)[:longest] for s, y in long_enough], axis=0)
    perfect = np.mean([lists.best_of_n_curve(y, y)[:longest] for _, y in long_enough], axis=0)
    return list(zip(ours.tolist(), perfect.tolist(), strict=True))


def slices_of(examples: Sequence[Example], by: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """Rows by the values of each key in ``by`` that rows have, by thirds of their prompts' length, and of the gap in length.

    The gap is of the better minus the worse answer, in characters, its mean over the row's pairs.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for key in by:
        groups: dict[str, list[int]] = {}
        for row, example in enumerate(examples):
            if key in example.raw:
                groups.setdefault(str(example.raw[key]), []).append(row)
        if groups:
            found[key] = {value: groups[value] for value in sorted(groups)}
    if len(examples) >= 30:
        prompts = [len(p) if isinstance(p, str) else sum(len(str(turn["content"])) for turn in p) for p in (e.prompt for e in examples)]
        gaps = []
        for example in examples:
            size = [len(c.text) for c in example.candidates]
            gaps.append(np.mean([size[a] - size[b] for a, b in example.pairs()]))
        found["length of the prompt"] = _thirds(prompts, _THIRDS)
        found["better answer is"] = {
            "shorter": [row for row, gap in enumerate(gaps) if gap < 0],
            "longer": [row for row, gap in enumerate(gaps) if gap > 0],
        }
    return {key: {value: rows for value, rows in groups.items() if rows} for key, groups in found.items()}


def _thirds(values: Sequence[float], names: Sequence[str]) -> dict[str, list[int]]:
    edges = np.quantile(values, [1 / 3, 2 / 3])
    which = np.searchsorted(edges, values, side="left")
    return {name: np.flatnonzero(which == place).tolist() for place, name in enumerate(names)}


def compare(first: Report, second: Report) -> Comparison:
    """Two reports on the same rows.

    Raises:
        DataError: they are of other rows.

    """
    if first.rows != second.rows or first.clusters != second.clusters:
        raise DataError(f"{first.name} and {second.name} were measured on other rows: a paired comparison needs the same")
    whole = difference(first.values, second.values, clusters=first.clusters)
    pairs = np.isin(first.values, (0.0, 1.0)) & np.isin(second.values, (0.0, 1.0))
    independent = pairs.all() and len(set(first.clusters)) == len(first.clusters)
    test = mcnemar(first.values > 0.5, second.values > 0.5) if independent else None
    return Comparison(first.name, second.name, whole, test, tuple(_reversals(first, second, whole.value)))


def _reversals(first: Report, second: Report, whole: float) -> list[str]:
    found = []
    for key, groups in first.slices.items():
        gaps = {value: ours.value - second.slices[key][value].value for value, ours in groups.items()}
        against = [value for value, gap in gaps.items() if gap * whole < 0]
        if len(gaps) > 1 and 2 * len(against) > len(gaps):
            ahead, behind = (first.name, second.name) if whole > 0 else (second.name, first.name)
            found.append(f"{ahead} is ahead of {behind} on the whole, and behind it in {len(against)} of {len(gaps)} slices by {key!r}")
    return found


def score_examples(ranker: Scorer, examples: Sequence[Example], progress: Callable[[int], None] = lambda _: None) -> Scores:
    """Scores of every example's candidates, some prompts at a time."""
    return _in_parts(ranker.score_many, examples, progress)


def log_probs_of(ranker: Ranker, examples: Sequence[Example], progress: Callable[[int], None] = lambda _: None) -> list[list[TokenScores]]:
    """Token log-probs of every example's candidates, some prompts at a time."""
    return _in_parts(ranker.log_probs_many, examples, progress)


def _in_parts(score: Callable[..., Sequence[Any]], examples: Sequence[Example], progress: Callable[[int], None]) -> list[Any]:
    found: list[Any] = []
    for start in range(0, len(examples), 64):
        part = examples[start : start + 64]
        found += score(
            [example.prompt for example in part],
            [example.candidates for example in part],
            passages=[example.passages or None for example in part],
        )
        progress(len(part))
    return found


def leakage(train: Iterable[Example], test: Sequence[Example]) -> list[str]:
    """Where the rows of ``test`` stand whose prompt is also in ``train``: a figure on them says little about new prompts."""
    known = {prompt_hash(example.prompt) for example in train}
    return [example.where for example in test if prompt_hash(example.prompt) in known]


def held_out_table(examples: Sequence[Example], scores: Scores, by: str = "subset") -> dict[str, dict[str, Any]]:
    """Agreement of ``scores`` (one array an example) by slice beside the length rules, as plain data for a model card."""
    from dpo_rank.evaluation.baselines import RULES

    found = evaluate_scores("", examples, scores, (by,))
    rules = {name: evaluate_scores(name, examples, RULES[name](examples), (by,)) for name in ("shortest", "longest")}
    table: dict[str, dict[str, Any]] = {}
    for key, mine in {"all": found.agreement, **found.slices.get(by, {})}.items():
        theirs = {name: report.agreement if key == "all" else report.slices[by][key] for name, report in rules.items()}
        table[key] = {
            "num_prompts": mine.num_prompts,
            "agreement": round(mine.value, 4),
            "interval": [round(mine.low, 4), round(mine.high, 4)],
            **{name: round(rule.value, 4) for name, rule in theirs.items()},
        }
    return table
