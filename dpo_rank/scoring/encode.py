"""Prompts and candidates as token ids: rendering, tokenisation as a continuation, explicit truncation. No torch here."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Encoding, Tokenizer

from dpo_rank.errors import ArtifactError, DataError, EncodingError
from dpo_rank.scoring.pack import Group
from dpo_rank.scoring.prompt_format import Message, PassageFormat, Renderer

logger = logging.getLogger(__name__)

Boundary = Literal["split", "joint"]
Prompt = str | Sequence[Mapping[str, Any]]
Passage = str | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """Tokens that are read at most. They are the same for every list, so that no candidate changes another's prompt."""

    max_prompt_tokens: int
    max_completion_tokens: int

    @classmethod
    def of_positions(cls, positions: int) -> Limits:
        """Half of a model's positions for the prompt, half for the answer."""
        return cls(positions - positions // 2, positions // 2)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt and its candidates as token ids, and what did not fit.

    Attributes:
        group: the ids.
        truncated: for each candidate, whether its tail was cut (no end token is scored then).
        prompt_truncated: whether the prompt lost passages, turns or tokens.
        dropped_passages: indices of the passages that were left out.

    """

    group: Group
    truncated: tuple[bool, ...]
    prompt_truncated: bool = False
    dropped_passages: tuple[int, ...] = ()


class Encoder:
    """Encodes with one tokenizer and one prompt format.

    Args:
        tokenizer: the tokenizer, truncation and padding off.
        renderer: how prompts and answers are written.
        limits: tokens read at most.
        passage_format: how passages are written; None where the ranker was not trained with any.
        boundary: ``"split"`` tokenises an answer on its own, as a continuation; ``"joint"`` tokenises prompt and answer
            together and splits at their common prefix, as TRL does (for pairs that others trained so).

    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        renderer: Renderer,
        limits: Limits,
        passage_format: PassageFormat | None = None,
        boundary: Boundary = "split",
    ) -> None:
        self.tokenizer, self.renderer, self.limits = tokenizer, renderer, limits
        self.passage_format, self.boundary = passage_format, boundary
        self.num_truncated = 0
        self._lock = threading.Lock()
        self._continuation = continuation(tokenizer)

    def encode(
        self,
        prompt: Prompt,
        answers: Sequence[str],
        finished: Sequence[bool] | None = None,
        passages: Sequence[Passage] | None = None,
    ) -> Encoded:
        """Token ids of ``prompt`` and each of ``answers``.

        Raises:
            DataError: a prompt, passage or answer cannot be encoded; the message names it by index.

        """
        ends = [True] * len(answers) if finished is None else list(finished)
        if passages is not None and (isinstance(passages, (str, bytes, Mapping)) or not isinstance(passages, Sequence)):
            raise DataError(f"passages are a list of texts, not {type(passages).__name__}")
        texts = [passage_text(passage, index) for index, passage in enumerate(passages or ())]
        if texts and self.passage_format is None:
            raise DataError(
                "this ranker has no passage format: it was not trained on prompts with passages. Train one on rows with "
                "'passages', or write the passages into the prompt as the pair's training data had them"
            )
        for index, answer in enumerate(answers):
            check_text(answer, f"candidate {index}")
        conversation = self._conversation(prompt)
        conversation, prompt_ids, kept_passages, cut = self._fit_prompt(conversation, texts)
        completions = self._completions(conversation, prompt_ids, answers, ends)
        if self.boundary == "joint":
            shared = min((common_prefix(prompt_ids, joint) for joint in completions), default=len(prompt_ids))
            prompt_ids, completions = prompt_ids[:shared], [joint[shared:] for joint in completions]
        if not prompt_ids:
            raise DataError("the prompt is empty and this format begins with no token: there is nothing to condition on")
        truncated = []
        for index, ids in enumerate(completions):
            if not ids:
                raise DataError(f"candidate {index} is empty and unfinished: it has no token to score")
            truncated.append(len(ids) > self.limits.max_completion_tokens)
            completions[index] = ids[: self.limits.max_completion_tokens]
        if cut or any(truncated):
            self._count_truncated(cut, sum(truncated))
        return Encoded(Group(prompt_ids, completions), tuple(truncated), cut, tuple(range(kept_passages, len(texts))))

    def boundary_differs(self, prompt: Prompt, answer: str) -> bool:
        """Whether tokenising prompt and answer together would give other ids than the split at the boundary does."""
        conversation = self._conversation(prompt)
        prompt_text = self._render(conversation, "")
        text = self.renderer.completion(_messages(conversation), answer, True)
        split = self._prompt_ids(prompt_text) + self._continuation.encode(text, add_special_tokens=False).ids
        return self._joint_ids(prompt_text + text) != split

    # -- prompt ----------------------------------------------------------------------------------------------------

    def _conversation(self, prompt: Prompt) -> str | list[Message]:
        """A verbatim text, or checked chat messages."""
        if isinstance(prompt, str):
            check_text(prompt, "the prompt")
            if self.renderer.chat and self.renderer.string == "user_turn":
                return [{"role": "user", "content": prompt}]
            return prompt
        if not self.renderer.chat:
            raise EncodingError("this ranker reads plain text: give the prompt as a str, not as chat messages")
        return [message(item, index) for index, item in enumerate(_sequence(prompt))]

    def _render(self, conversation: str | list[Message], passages: str) -> str:
        if isinstance(conversation, str):
            return passages + conversation
        turns = list(conversation)
        if passages:
            users = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
            if not users:
                raise EncodingError("passages go before the last user turn, and the prompt has none")
            turns[users[-1]] = {"role": "user", "content": passages + turns[users[-1]]["content"]}
        return self.renderer.prompt(turns)

    def _fit_prompt(self, conversation: str | list[Message], passages: list[str]) -> tuple[str | list[Message], list[int], int, bool]:
        """Conversation, ids, passages kept and whether anything was cut: passages go first, from the last, then whole turns
        from the oldest (never a system text), then tokens from the left, behind a leading special token.
        """
        limit = self.limits.max_prompt_tokens

        def ids(turns: str | list[Message], kept: int) -> list[int]:
            block = self.passage_format.render(passages[:kept]) if self.passage_format else ""
            return self._prompt_ids(self._render(turns, block))

        found = ids(conversation, len(passages))
        if len(found) <= limit:
            return conversation, found, len(passages), False
        kept = _largest(len(passages), lambda n: len(ids(conversation, n)) <= limit)
        if isinstance(conversation, list):
            starts = self._possible_starts(conversation)
            droppable = len(starts) - 1
            dropped = droppable - _largest(droppable, lambda n: len(ids(starts[droppable - n], kept)) <= limit)
            conversation = starts[dropped]
        found = ids(conversation, kept)
        if len(found) > limit:
            lead = found[:1] if self._is_special(found[0]) else []
            found = lead + found[len(found) - (limit - len(lead)) :]
        return conversation, found, kept, True

    def _possible_starts(self, conversation: list[Message]) -> list[list[Message]]:
        """The conversation, and what is left of it as whole turns are dropped: each begins with a user turn."""
        head = [turn for turn in conversation[:1] if turn["role"] == "system"]
        body = conversation[len(head) :]
        later = [head + body[place:] for place in range(1, len(body)) if body[place]["role"] == "user"]
        return [conversation, *later]

    def _prompt_ids(self, text: str) -> list[int]:
        return _without_added_tail(self.tokenizer.encode(text, add_special_tokens=not self.renderer.chat))

    def _is_special(self, token: int) -> bool:
        added = self.tokenizer.get_added_tokens_decoder().get(token)
        return bool(added and added.special)

    # -- completions -----------------------------------------------------------------------------------------------

    def _completions(
        self, conversation: str | list[Message], prompt_ids: list[int], answers: Sequence[str], finished: Sequence[bool]
    ) -> list[list[int]]:
        """Ids of each completion; with ``boundary="joint"`` those of prompt and completion together."""
        messages = _messages(conversation)
        texts = [self.renderer.completion(messages, answer, end) for answer, end in zip(answers, finished, strict=True)]
        if self.boundary == "split":
            return [found.ids for found in self._continuation.encode_batch(texts, add_special_tokens=False)]
        prompt = self._render(conversation, "")
        if self._prompt_ids(prompt) != prompt_ids:
            raise DataError("boundary='joint' cannot score a prompt that was cut or has passages: shorten the prompt")
        return [self._joint_ids(prompt + text) for text in texts]

    def _joint_ids(self, text: str) -> list[int]:
        return _without_added_tail(self.tokenizer.encode(text, add_special_tokens=not self.renderer.chat))

    def _count_truncated(self, prompt_cut: bool, answers_cut: int) -> None:
        with self._lock:
            self.num_truncated += 1
            first = self.num_truncated == 1
        if first:
            what = " and ".join(["the prompt"] * prompt_cut + [f"{answers_cut} answer(s)"] * bool(answers_cut))
            logger.warning(
                "%s longer than this ranker reads (%d prompt and %d answer tokens) and cut; see 'truncated' in the result. "
                "This is said once; later cuts are counted in num_truncated.",
                what,
                self.limits.max_prompt_tokens,
                self.limits.max_completion_tokens,
            )


def load_tokenizer(text: str) -> Tokenizer:
    """A tokenizer from the text of a ``tokenizer.json``, without truncation or padding.

    Raises:
        ArtifactError: the text is no tokenizer.

    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except BaseException as error:  # the Rust core panics on some inputs, and a panic is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ArtifactError(f"tokenizer.json cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def continuation(tokenizer: Tokenizer) -> Tokenizer:
    """``tokenizer`` without the dummy space that it would put before a text: what continues a prompt begins as it is."""
    data = json.loads(tokenizer.to_str())
    data["normalizer"] = _without_prefix(data.get("normalizer"))
    data["pre_tokenizer"] = _without_prefix(data.get("pre_tokenizer"))
    return load_tokenizer(json.dumps(data))


def _without_prefix(part: Any) -> Any:
    """A normalizer's or pre-tokenizer's JSON with its prefix space switched off."""
    if not isinstance(part, dict):
        return part
    part = dict(part)
    if part.get("type") == "Prepend":
        return None
    if part.get("type") == "Metaspace":
        part["prepend_scheme"] = "never"
        part.pop("add_prefix_space", None)
    elif "add_prefix_space" in part:
        part["add_prefix_space"] = False
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            part[name] = [kept for kept in map(_without_prefix, part[name]) if kept is not None]
    return part


def _without_added_tail(encoding: Encoding) -> list[int]:
    """Ids without special tokens that the tokenizer itself appended: an EOS after a prompt would end it."""
    ids, added = encoding.ids, encoding.special_tokens_mask
    end = len(ids)
    while end and added[end - 1] and any(not mark for mark in added[:end]):
        end -= 1
    return list(ids[:end])


def _largest(count: int, fits: Callable[[int], bool]) -> int:
    """The largest ``n <= count`` that fits, by bisection; 0 where none does."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Number of leading items (ids, characters) that two sequences share."""
    for place, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return place
    return min(len(a), len(b))


def _messages(conversation: str | list[Message]) -> list[Message]:
    return [] if isinstance(conversation, str) else conversation


def _sequence(prompt: Any) -> Sequence[Any]:
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise DataError(f"the prompt is a str or a list of chat messages, not {type(prompt).__name__}")
    if not prompt:
        raise DataError("the prompt is an empty list of messages")
    return prompt


def message(item: Any, index: int) -> Message:
    """A chat message with its text parts joined.

    Raises:
        DataError: no role, no text, or a part that is no text; the message says which.

    """
    where = f"message {index}"
    if not isinstance(item, Mapping):
        raise DataError(f"{where} is {type(item).__name__}: expected a mapping with 'role' and 'content'")
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or not role:
        raise DataError(f"{where} has no 'role'")
    if item.get("tool_calls"):
        raise DataError(f"{where} holds tool calls: only text can be scored")
    if isinstance(content, list):
        texts = []
        for part in content:
            if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise DataError(f"{where} ({role}) holds a part of type {kind!r}: only text parts can be scored")
            texts.append(part["text"])
        content = "".join(texts)
    if not isinstance(content, str):
        raise DataError(f"{where} ({role}): 'content' is {type(content).__name__}, expected a str or a list of text parts")
    check_text(content, f"{where} ({role})")
    return {"role": role, "content": content}


def passage_text(passage: Any, index: int) -> str:
    """The text of a passage given as a str or as a mapping with ``text``."""
    text = passage.get("text") if isinstance(passage, Mapping) else passage
    if not isinstance(text, str):
        raise DataError(f"passage {index}: expected a str or a mapping with 'text', got {type(passage).__name__}")
    check_text(text, f"passage {index}")
    return text


def check_text(text: Any, where: str) -> None:
    """Raise a `DataError` that names ``where`` unless ``text`` is a str that UTF-8 can hold."""
    if not isinstance(text, str):
        raise DataError(f"{where}: expected a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: character {error.start} is a lone surrogate, which is no text") from None
