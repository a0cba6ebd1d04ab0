"""Is it only counting words? How far style explains scores and labels, agreement at equal length, and a correction for length.

numpy only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_rank.confidence import LengthCorrection
from dpo_rank.data.formats import Example, Prompt, prompt_hash
from dpo_rank.errors import DataError
from dpo_rank.evaluation.intervals import Figure, difference, figure, resampled

FloatArray = npt.NDArray[np.float64]
Scores = Sequence[npt.NDArray[Any]]
STYLES = ("length", "lists", "headers", "bold", "refusal", "hedges", "overlap")
"""What is counted of an answer: characters; list items, headers and bold passages of markdown; phrases of refusing and of hedging;
share of the prompt's words that it uses."""
MATCHED = 0.1
"""Answers whose lengths differ by at most this share count as equally long."""
GIVEN_AWAY = 0.9
"""Labels that a rule of style alone gets right this often tell a ranker little."""
_KNOTS = 12
_DRAWS = 300
_PATTERNS = {
    "lists": re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s+\S", re.MULTILINE),
    "headers": re.compile(r"^\s{0,3}#{1,6}\s+\S", re.MULTILINE),
    "bold": re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
    "refusal": re.compile(
        r"\b(?:i(?:'m| am) (?:sorry|unable|not able)|i (?:cannot|can't|can not|won't|will not)|as an ai|i(?:'m| am) just an ai)\b",
        re.IGNORECASE,
    ),
    "hedges": re.compile(
        r"\b(?:perhaps|maybe|might|possibly|probably|it seems|seems to|i think|i believe|could be|not sure|likely|generally)\b",
        re.IGNORECASE,
    ),
}
_WORD = re.compile(r"\w+", re.UNICODE)


def features(example: Example) -> FloatArray:
    """`STYLES` of each candidate, float64 ``[N, len(STYLES)]``."""
    asked = {word for word in _WORD.findall(text_of(example.prompt).lower()) if len(word) > 3}
    rows = []
    for candidate in example.candidates:
        text = candidate.text
        used = set(_WORD.findall(text.lower()))
        counts = [float(len(pattern.findall(text))) for pattern in _PATTERNS.values()]
        rows.append([float(len(text)), *counts, len(asked & used) / len(asked) if asked else 0.0])
    return np.array(rows)


def text_of(prompt: Prompt) -> str:
    """A prompt as one text: its turns' contents."""
    return prompt if isinstance(prompt, str) else "\n".join(str(turn["content"]) for turn in prompt)


# -- what style explains -----------------------------------------------------------------------------------------------


def explained(examples: Sequence[Example], scores: Scores) -> dict[str, float]:
    """Share of the variance of scores within prompts that each of `STYLES` explains alone, and ``"all"`` of them together.

    Adjusted R squared of a linear regression on what is left after each prompt's mean is taken off; length enters as characters
    and as their logarithm. 0 where there is nothing to explain or to explain it with.
    """
    y = np.concatenate([_centred(np.asarray(s, dtype=np.float64)[:, None]) for s in scores])[:, 0]
    found = [features(example) for example in examples]
    columns = np.concatenate([_centred(np.column_stack([part, np.log1p(part[:, 0])])) for part in found])
    last = columns.shape[1] - 1
    freedom = len(y) - len(examples)
    parts = {name: [place, last] if name == "length" else [place] for place, name in enumerate(STYLES)}
    parts["all"] = list(range(columns.shape[1]))
    return {name: _adjusted_r2(columns[:, places], y, freedom) for name, places in parts.items()}


def _centred(values: FloatArray) -> FloatArray:
    return np.asarray(values - values.mean(axis=0))


def _adjusted_r2(columns: FloatArray, y: FloatArray, freedom: int) -> float:
    total = float(y @ y)
    used = columns[:, np.abs(columns).max(axis=0) > 0] if len(columns) else columns
    if not total or not used.shape[1] or freedom <= used.shape[1] + 1:
        return 0.0
    used = used / np.abs(used).max(axis=0)
    coefficients, *_ = np.linalg.lstsq(used, y, rcond=None)
    left = float(((y - used @ coefficients) ** 2).sum())
    return float(max(0.0, 1 - (left / (freedom - used.shape[1])) / (total / freedom)))


@dataclass(frozen=True, slots=True)
class StyleOfLabels:
    """How far style alone predicts labels.

    Attributes:
        rules: for each of `STYLES` the share of labelled pairs whose better answer has more of it, ties half: 1 or 0 is a rule.
        together: share of pairs that a logistic regression on all of them gets right, fitted on other prompts.
        num_prompts: rows it was measured on.

    """

    rules: dict[str, Figure]
    together: Figure | None
    num_prompts: int

    @property
    def strongest(self) -> tuple[str, float]:
        """The rule that is right most often, and how often (``"less length"`` where less is better)."""
        name = max(self.rules, key=lambda key: abs(self.rules[key].value - 0.5))
        value = self.rules[name].value
        return ("more " if value >= 0.5 else "less ") + name, max(value, 1 - value)

    def warnings(self) -> list[str]:
        """What a reader of figures on these rows must know, in words."""
        name, right = self.strongest
        if right >= GIVEN_AWAY:
            return [
                f"The labels are nearly a rule of style: '{name}' alone gets {right:.2f} of the pairs right. Agreement on these rows "
                "shows little, and a ranker trained on them learns the rule."
            ]
        length = self.rules["length"]
        if not length.few and (length.low > 0.6 or length.high < 0.4):
            kind = "longer" if length.value > 0.5 else "shorter"
            share = max(length.value, 1 - length.value)
            return [f"The labels lean on length: the {kind} answer is the better one in {share:.2f} of the pairs."]
        return []

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def style_of_labels(examples: Sequence[Example]) -> StyleOfLabels:
    """Measure the labels of rows, before anything is trained on them.

    Raises:
        DataError: no row has labels that tell its candidates apart.

    """
    gaps, rows, clusters = _gaps(examples)
    credit = (gaps > 0) + 0.5 * (gaps == 0)
    means = np.stack([np.bincount(rows, weights=column) / np.bincount(rows) for column in credit.T])
    prompts = [clusters[row] for row in range(len(clusters))]
    rules = {name: figure(values, clusters=prompts) for name, values in zip(STYLES, means, strict=True)}
    side = np.array([cluster % 2 for cluster in clusters])[rows]
    together = None
    if len(set(side.tolist())) == 2:
        scale = np.where(gaps.std(axis=0) > 0, gaps.std(axis=0), 1.0)
        shape = np.tanh(gaps / scale)
        right = np.empty(len(gaps))
        for fold in (0, 1):
            inside = side == fold
            weights = logistic(shape[~inside], np.ones((~inside).sum()), intercept=False, symmetric=True)
            lean = shape[inside] @ weights
            right[inside] = (lean > 0) + 0.5 * (lean == 0)
        together = figure(np.bincount(rows, weights=right) / np.bincount(rows), clusters=prompts)
    return StyleOfLabels(rules, together, len(prompts))


def _gaps(examples: Sequence[Example]) -> tuple[FloatArray, npt.NDArray[np.intp], list[int]]:
    """Style of the better minus that of the worse answer for every labelled pair, its row (of the used ones), and each row's prompt."""
    gaps: list[FloatArray] = []
    rows: list[int] = []
    clusters: list[int] = []
    for example in examples:
        pairs = example.pairs()
        if pairs:
            found = features(example)
            gaps += [found[a] - found[b] for a, b in pairs]
            rows += [len(clusters)] * len(pairs)
            clusters.append(prompt_hash(example.prompt))
    if not gaps:
        raise DataError("no row has labels that tell its candidates apart")
    return np.array(gaps), np.array(rows), clusters


# -- agreement at equal length -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """Agreement if the better answer were as long as the worse one.

    Attributes:
        raw: agreement over all pairs.
        controlled: predicted at a length gap of 0 by a logistic regression of "right" on the gap.
        matched: over the pairs whose lengths differ by at most `MATCHED`, their mean a prompt; None where there is none.
        correlation: of a pair's margin and its gap in length, through the origin, over all pairs of a prompt's candidates.

    """

    raw: Figure
    controlled: Figure
    matched: Figure | None
    correlation: float

    @property
    def verdict(self) -> str:
        """In words."""
        raw, held = self.raw.value, self.controlled.value
        if abs(raw - held) < 0.02:
            change = f"agreement stays at {held:.2f} (from {raw:.2f}) when length is held equal"
        else:
            change = f"agreement {'falls' if held < raw else 'rises'} from {raw:.2f} to {held:.2f} when length is held equal"
        if self.controlled.low <= 0.5 <= self.controlled.high:
            return change + ": no better than a coin there, as far as these rows can tell"
        return change + ("" if held > 0.5 else ": worse than a coin there")

    def to_dict(self) -> dict[str, Any]:
        """As plain data, the verdict included."""
        return {**asdict(self), "verdict": self.verdict}


def length_controlled(examples: Sequence[Example], scores: Scores, seed: int = 0) -> LengthControlled:
    """Agreement with length held equal.

    As in length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475): ``logit P(right) = a + b tanh(gap / sd(gap))``, with
    the gap in characters of the better minus the worse answer; the figure is ``sigmoid(a)``. Interval by a bootstrap over prompts.

    Raises:
        DataError: no row has labels that tell its candidates apart.

    """
    gaps: list[float] = []
    right: list[float] = []
    near: list[bool] = []
    rows: list[int] = []
    prompts: list[int] = []
    sides: list[FloatArray] = []
    for example, s in zip(examples, scores, strict=True):
        pairs = example.pairs()
        if not pairs:
            continue
        size = [len(c.text) for c in example.candidates]
        for a, b in pairs:
            gaps.append(float(size[a] - size[b]))
            right.append(float(s[a] > s[b]) + 0.5 * float(s[a] == s[b]))
            near.append(abs(size[a] - size[b]) <= MATCHED * max(size[a], size[b]))
            rows.append(len(prompts))
        first, second = np.triu_indices(len(size), 1)
        margins = np.asarray(s, dtype=np.float64)
        sides.append(np.stack([margins[first] - margins[second], np.array(size, dtype=float)[first] - np.array(size, dtype=float)[second]]))
        prompts.append(prompt_hash(example.prompt))
    if not gaps:
        raise DataError("no row has labels that tell its candidates apart")
    row, outcome = np.array(rows), np.array(right)
    counts = np.bincount(row)
    gap = np.array(gaps)
    shape = np.tanh(gap / gap.std()) if gap.std() > 0 else np.zeros(len(gap))
    weights = 1.0 / counts[row]
    value = _at_zero(shape, outcome, weights)

    def redrawn(draws: npt.NDArray[np.intp]) -> FloatArray:
        times = (np.bincount(draw, minlength=len(counts)) for draw in draws)
        return np.array([_at_zero(shape, outcome, weights * drawn[row]) for drawn in times])

    low, high = np.quantile(resampled(redrawn, len(counts), seed, _DRAWS), [0.025, 0.975])
    matched = np.array(near)
    equal = None
    if matched.any():
        used, place = np.unique(row[matched], return_inverse=True)
        means = np.bincount(place, weights=outcome[matched]) / np.bincount(place)
        equal = figure(means, clusters=[prompts[index] for index in used])
    correlation = through_origin(np.concatenate(sides, axis=1))
    raw = figure(np.bincount(row, weights=outcome) / counts, clusters=prompts)
    return LengthControlled(raw, Figure(value, float(low), float(high), raw.num_prompts), equal, correlation)


def through_origin(both: FloatArray) -> float:
    """Pearson's correlation of ``[2, n]`` through the origin: which of a pair stands first says nothing. 0 where one side is all 0."""
    products = both @ both.T
    return float(products[0, 1] / np.sqrt(products[0, 0] * products[1, 1])) if (np.diag(products) > 0).all() else 0.0


def _at_zero(shape: FloatArray, right: FloatArray, weights: FloatArray) -> float:
    intercept = logistic(shape[:, None], right, weights)[0]
    return float(1 / (1 + math.exp(-intercept)))


def logistic(
    columns: FloatArray, outcome: FloatArray, weights: FloatArray | None = None, *, intercept: bool = True, symmetric: bool = False
) -> FloatArray:
    """Weights of a logistic regression with a ridge of 1e-3 an observation's weight, by Newton's method; the intercept first, without.

    Args:
        columns: float64 ``[n, k]``.
        outcome: 0 to 1.
        weights: of each row.
        intercept: whether there is one.
        symmetric: count every row also turned round (columns negated, outcome exchanged).

    """
    if symmetric:
        columns, outcome = np.concatenate([columns, -columns]), np.concatenate([outcome, 1 - outcome])
    design = np.column_stack([np.ones(len(columns)), columns]) if intercept else columns
    weight = np.ones(len(design)) if weights is None else weights
    ridge = np.full(design.shape[1], 1e-3 * max(1.0, float(weight.sum())))
    if intercept:
        ridge[0] = 1e-6
    found = np.zeros(design.shape[1])
    for _ in range(25):
        mean = 1 / (1 + np.exp(-np.clip(design @ found, -30, 30)))
        slope = design.T @ (weight * (outcome - mean)) - ridge * found
        curvature = (design * (weight * mean * (1 - mean))[:, None]).T @ design + np.diag(ridge)
        step = np.linalg.solve(curvature, slope)
        found = np.clip(found + np.clip(step, -4, 4), -30, 30)
        if np.abs(step).max() < 1e-8:
            break
    return np.asarray(found)


# -- a correction for length -------------------------------------------------------------------------------------------


def fit_correction(examples: Sequence[Example], rewards: Scores, tokens: Scores) -> LengthCorrection:
    """The reward that an answer's number of tokens alone lets expect, by least squares within prompts; labels are not looked at.

    After the post-hoc calibration of Huang et al. 2024 (arXiv 2409.17407), which takes a locally weighted regression of reward on
    length off the reward. Ours is piecewise linear between quantiles of length, and compares answers of one prompt only: rewards of
    different prompts have no common zero. The temperature and the confidence are fitted to the corrected rewards.

    Args:
        examples: labelled rows.
        rewards: uncorrected, one array an example.
        tokens: of each candidate, likewise.

    Raises:
        DataError: all answers are equally long, or no labels.

    """
    from dpo_rank.evaluation.calibration import fit_confidence, fit_temperature, pairs_of

    knots, values = _curve_of_length(rewards, tokens)
    corrected = [np.asarray(r, dtype=np.float64) - np.interp(n, knots, values) for r, n in zip(rewards, tokens, strict=True)]
    pairs = pairs_of(examples, corrected)
    temperature = fit_temperature(pairs.margins, pairs.weights)
    return LengthCorrection(tuple(knots.tolist()), tuple(values.tolist()), temperature, fit_confidence(examples, corrected))


def _curve_of_length(rewards: Scores, tokens: Scores) -> tuple[FloatArray, FloatArray]:
    every = np.concatenate([np.asarray(n, dtype=np.float64) for n in tokens])
    knots = np.unique(np.quantile(every, np.linspace(0.02, 0.98, _KNOTS)).round())
    if len(knots) < 2:
        raise DataError("all answers are equally long: there is no lean on length to correct")
    hats = np.eye(len(knots))
    design, wanted = [], []
    for r, n in zip(rewards, tokens, strict=True):
        if len(n) > 1:
            basis = np.stack([np.interp(n, knots, hat) for hat in hats], axis=1)
            design.append(_centred(basis))
            wanted.append(_centred(np.asarray(r, dtype=np.float64)[:, None])[:, 0])
    columns, y = np.concatenate(design), np.concatenate(wanted)
    # A bend between neighbouring pieces costs a little, so that few rows give a line and many a curve.
    slopes = np.diff(hats, axis=0) / np.diff(knots)[:, None]
    bends = np.diff(slopes, axis=0) * float(np.ptp(knots))
    system = columns.T @ columns + 1.0 * bends.T @ bends + 1e-6 * len(y) * np.eye(len(knots)) / len(knots)
    values = np.linalg.solve(system, columns.T @ y)
    return knots, values - np.interp(np.median(every), knots, values)


@dataclass(frozen=True, slots=True)
class CorrectionEffect:
    """What the correction does on rows that it was not fitted on (two folds of prompts).

    Attributes:
        before, after: agreement.
        gain: the paired difference.
        explained_before, explained_after: share of the scores' variance that length explains.

    """

    before: Figure
    after: Figure
    gain: Figure
    explained_before: float
    explained_after: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def corrected(examples: Sequence[Example], rewards: Scores, tokens: Scores) -> list[FloatArray]:
    """Rewards corrected for length, each prompt by a curve fitted on the other half of the prompts."""
    side = [prompt_hash(example.prompt) % 2 for example in examples]
    found: list[FloatArray] = [np.asarray(r, dtype=np.float64) for r in rewards]
    for fold in (0, 1):
        rest = [row for row, own in enumerate(side) if own != fold]
        if not rest:
            continue
        knots, values = _curve_of_length([rewards[row] for row in rest], [tokens[row] for row in rest])
        for row, own in enumerate(side):
            if own == fold:
                found[row] = found[row] - np.interp(tokens[row], knots, values)
    return found


def correction_effect(examples: Sequence[Example], rewards: Scores, after: Scores) -> CorrectionEffect:
    """What it changed that rewards became those ``after`` (see `corrected`).

    Raises:
        DataError: no labels.

    """
    from dpo_rank.evaluation.agreement import pair_agreement

    used = [row for row, example in enumerate(examples) if example.pairs()]
    clusters = [prompt_hash(examples[row].prompt) for row in used]
    old, new = ([pair_agreement(scores[row], examples[row].scores or ()) for row in used] for scores in (rewards, after))
    return CorrectionEffect(
        figure(old, clusters=clusters),
        figure(new, clusters=clusters),
        difference(new, old, clusters=clusters),
        explained(examples, rewards)["length"],
        explained(examples, after)["length"],
    )
