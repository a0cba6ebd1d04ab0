"""What a ranker must beat: rules that read no meaning, its own models' parts, and other people's rankers."""

from __future__ import annotations

import importlib
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dpo_rank.data.formats import Example
from dpo_rank.errors import DataError, DpoRankError, MissingExtraError
from dpo_rank.evaluation.agreement import Scorer, Scores, score_examples
from dpo_rank.evaluation.style import corrected, text_of
from dpo_rank.scoring.engine import RewardForm, TokenScores

ScoreArray = npt.NDArray[np.float32]
_WORD = re.compile(r"\w+", re.UNICODE)


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of every row's candidates by one ranker or rule.

    Attributes:
        name: whose they are.
        scores: one array a row.
        ms_a_prompt: what scoring took, milliseconds a row; None where it was not timed on its own.
        problem: why it was not run; there are no scores then.

    """

    name: str
    scores: Scores
    ms_a_prompt: float | None = None
    problem: str | None = None


# -- rules -------------------------------------------------------------------------------------------------------------


def longest(examples: Iterable[Example]) -> list[ScoreArray]:
    """The rule "longer is better", in characters."""
    return [np.array([len(c.text) for c in example.candidates], dtype=np.float32) for example in examples]


def shortest(examples: Iterable[Example]) -> list[ScoreArray]:
    """The rule "shorter is better"."""
    return [-lengths for lengths in longest(examples)]


def at_random(examples: Iterable[Example], seed: int = 0) -> list[ScoreArray]:
    """A coin."""
    rng = random.Random(seed)
    return [np.array([rng.random() for _ in example.candidates], dtype=np.float32) for example in examples]


def bm25(examples: Iterable[Example], k1: float = 1.5, b: float = 0.75) -> list[ScoreArray]:
    """Okapi BM25 of each answer for its prompt (Robertson & Zaragoza 2009, equation 3.15), answers of all rows as the collection."""
    rows = [(_words(text_of(example.prompt)), [_words(c.text) for c in example.candidates]) for example in examples]
    documents = [words for _, answers in rows for words in answers]
    frequency = Counter(word for words in documents for word in set(words))
    mean_length = max(1.0, float(np.mean([len(words) for words in documents] or [1])))

    def score(asked: set[str], words: list[str]) -> float:
        counts = Counter(words)
        total = 0.0
        for word in asked & counts.keys():
            rarity = math.log(1 + (len(documents) - frequency[word] + 0.5) / (frequency[word] + 0.5))
            total += rarity * counts[word] * (k1 + 1) / (counts[word] + k1 * (1 - b + b * len(words) / mean_length))
        return total

    return [np.array([score(set(asked), words) for words in answers], dtype=np.float32) for asked, answers in rows]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


RULES: dict[str, Callable[[Iterable[Example]], list[ScoreArray]]] = {
    "longest": longest,
    "shortest": shortest,
    "random": at_random,
    "BM25 with the prompt": bm25,
}
"""Rules that could embarrass a ranker, by name."""


def by_rules(examples: Sequence[Example]) -> list[Scored]:
    """Scores by every rule."""
    return [timed(name, examples, lambda rule=rule: rule(examples)) for name, rule in RULES.items()]  # type: ignore[misc]


# -- parts of a pair ---------------------------------------------------------------------------------------------------


def by_parts(examples: Sequence[Example], tokens: Sequence[Sequence[TokenScores]], beta: float, form: RewardForm) -> list[Scored]:
    """Scores from the same log-probs as the reward: the policy alone, the reference alone, and the reward corrected for length."""
    parts: list[tuple[str, Callable[[TokenScores], float]]] = [
        ("policy log-prob, sum", lambda item: float(item.policy.sum(dtype=np.float64))),
        ("policy log-prob, mean", lambda item: float(item.policy.mean(dtype=np.float64))),
        ("reference log-prob, sum", lambda item: float(item.reference.sum(dtype=np.float64))),
        ("reference log-prob, mean", lambda item: float(item.reference.mean(dtype=np.float64))),
    ]
    found = [Scored(name, [np.array([of(item) for item in items]) for items in tokens]) for name, of in parts]
    rewards = [np.array([item.reward(beta, form) for item in items]) for items in tokens]
    lengths = [np.array([len(item.policy) for item in items]) for items in tokens]
    try:
        scores = corrected(examples, rewards, lengths)
    except DataError as error:
        return [*found, Scored("reward, corrected for length", [], problem=str(error))]
    return [*found, Scored("reward, corrected for length", cast("Scores", scores))]


# -- other rankers -----------------------------------------------------------------------------------------------------


def by_name(spec: str, examples: Sequence[Example], progress: Callable[[int], None] = lambda _: None) -> Scored:
    """Scores by another ranker; one that cannot run here comes with its `Scored.problem`.

    Args:
        spec: ``cross-encoder:PATH_OR_ID`` (sentence-transformers), ``reward-model:PATH_OR_ID`` (a transformers sequence classifier
            with one output), ``ranker:PATH_OR_ID`` (one of ours), ``ensemble:PATH_OR_ID,PATH_OR_ID,...`` (several of ours as one
            cautious `Ensemble`), or ``module:function`` with the signature of `Ranker.score_many`.
        examples: what to score.
        progress: told of finished rows.

    Raises:
        DataError: ``spec`` has another form.

    """
    kind, _, name = spec.partition(":")
    if not name:
        raise DataError(f"baseline {spec!r}: expected cross-encoder:ID, reward-model:ID, ranker:ID, ensemble:ID,ID or module:function")
    return by_scorer(spec, lambda: _OPENERS[kind](name) if kind in _OPENERS else _function(kind, name), examples, progress)


def by_scorer(
    name: str, opened: Callable[[], Scorer], examples: Sequence[Example], progress: Callable[[int], None] = lambda _: None
) -> Scored:
    """Scores by what ``opened`` returns; one that cannot be opened or cannot score these rows comes with its `Scored.problem`."""
    try:
        scorer = opened()
        score_examples(scorer, examples[:1])  # what is loaded lazily is loaded now
        return timed(name, examples, lambda: score_examples(scorer, examples, progress))
    except (DpoRankError, ImportError, OSError, ValueError) as error:
        return Scored(name, [], problem=str(error).splitlines()[0] if str(error) else type(error).__name__)


def beside(others: Sequence[str | Scored], examples: Sequence[Example]) -> list[Scored]:
    """Scores by others: those that are named are scored now, scores that are there are taken as they are."""
    return [by_name(other, examples) if isinstance(other, str) else other for other in others]


def timed(name: str, examples: Sequence[Example], run: Callable[[], Scores]) -> Scored:
    """What ``run`` returns, with what it took a row."""
    start = time.perf_counter()
    scores = run()
    return Scored(name, scores, 1000 * (time.perf_counter() - start) / max(1, len(examples)))


def _function(module: str, name: str) -> Scorer:
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DataError(f"{module}:{name} cannot be imported: {error}") from None
    return _Function(function)


@dataclass(frozen=True)
class _Function:
    """A function with the signature of `Ranker.score_many` as a `Scorer`."""

    function: Callable[..., Scores]

    def score_many(self, prompts: Any, candidate_lists: Any, *, passages: Any = None) -> Scores:
        lists = [[candidate.text for candidate in candidates] for candidates in candidate_lists]
        return [np.asarray(scores, dtype=np.float64) for scores in self.function(prompts, lists, passages=passages)]


class CrossEncoderScorer:
    """A sentence-transformers cross-encoder as a `Scorer`: it reads the prompt (and passages) with each answer."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def score_many(self, prompts: Any, candidate_lists: Any, *, passages: Any = None) -> Scores:
        """One array of scores a prompt."""
        texts = with_passages(prompts, passages)
        pairs = [(text, c.text) for text, candidates in zip(texts, candidate_lists, strict=True) for c in candidates]
        return cut(np.asarray(self.model.predict(pairs, show_progress_bar=False), dtype=np.float64), candidate_lists)


class ClassifierScorer:
    """A transformers sequence classifier with one output (a Bradley-Terry reward model) as a `Scorer`.

    Prompt and answer are rendered by the tokenizer's chat template where it has one, else joined by a line break.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 8, max_tokens: int = 1024) -> None:
        if model.config.num_labels != 1:
            raise DataError(f"the classifier has {model.config.num_labels} outputs: a reward model has one")
        self.model, self.tokenizer, self.batch_size, self.max_tokens = model, tokenizer, batch_size, max_tokens

    def score_many(self, prompts: Any, candidate_lists: Any, *, passages: Any = None) -> Scores:
        """One array of scores a prompt."""
        import torch

        texts = [
            self.render(prompt, c.text)
            for prompt, candidates in zip(with_passages(prompts, passages), candidate_lists, strict=True)
            for c in candidates
        ]
        found = np.empty(len(texts))
        order = np.argsort([len(text) for text in texts])
        for start in range(0, len(texts), self.batch_size):
            places = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [texts[place] for place in places], padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = self.model(**{key: value.to(self.model.device) for key, value in batch.items()}).logits
            found[places] = logits[:, 0].float().cpu().numpy()
        return cut(found, candidate_lists)

    def render(self, prompt: str, answer: str) -> str:
        """Prompt and answer as the model reads them."""
        if getattr(self.tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        return f"{prompt}\n{answer}"


def with_passages(prompts: Sequence[Any], passages: Any) -> list[str]:
    """Prompts as texts, each behind its passages."""
    found = []
    for row, prompt in enumerate(prompts):
        texts = [p["text"] if isinstance(p, Mapping) else p for p in (passages[row] or ())] if passages is not None else []
        found.append("\n".join([*texts, text_of(prompt)]))
    return found


def cut(flat: npt.NDArray[Any], candidate_lists: Sequence[Sequence[Any]]) -> Scores:
    """One array a row out of all rows' scores."""
    edges = np.cumsum([len(candidates) for candidates in candidate_lists])[:-1]
    return np.split(flat, edges)


def _cross_encoder(name: str) -> Scorer:
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        raise MissingExtraError("a cross-encoder", "student") from None
    return CrossEncoderScorer(CrossEncoder(name, trust_remote_code=False))


def _reward_model(name: str) -> Scorer:
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError:
        raise MissingExtraError("a reward model", "torch") from None
    return ClassifierScorer(AutoModelForSequenceClassification.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name))


def _ranker(name: str) -> Scorer:
    from dpo_rank.ranker import Ranker

    return Ranker.load(name)


def _ensemble(names: str) -> Scorer:
    from dpo_rank.evaluation.ensemble import Ensemble
    from dpo_rank.ranker import Ranker

    return Ensemble([Ranker.load(name) for name in names.split(",")])


_OPENERS: dict[str, Callable[[str], Scorer]] = {
    "cross-encoder": _cross_encoder,
    "reward-model": _reward_model,
    "ranker": _ranker,
    "ensemble": _ensemble,
}
