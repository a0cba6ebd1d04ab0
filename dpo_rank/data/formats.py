"""Rows of preferences, from every format that people keep them in, as one type.

| format                | keys                                                         |
|-----------------------|--------------------------------------------------------------|
| pair (TRL)            | ``prompt``, ``chosen``, ``rejected``: texts or chat messages |
| pair, implicit prompt | ``chosen``, ``rejected`` that begin alike                    |
| list                  | ``prompt``, ``completions`` and ``scores`` or ``ranks``      |
| single answer (TRL)   | ``prompt``, ``completion``, ``label``: true or false         |
| reranking             | ``query``, ``positive``, ``negative`` (each a text or a list)|

A pair may have ``score_chosen`` and ``score_rejected``. Any row may have ``passages`` and a ``weight``; other keys are kept.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from dpo_rank.errors import DataError, MissingExtraError
from dpo_rank.ranking import Candidate

OnError = Literal["raise", "skip"]
Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its candidates and, where people (or a rule) judged them, a score each.

    Attributes:
        prompt: a text or chat messages.
        candidates: at least one.
        scores: higher is better; only their order within the row counts. None where the row has no labels.
        passages: texts (or mappings with ``text``) the answers should rest on.
        where: ``file:line`` of the row, for messages.
        raw: the row as read.
        weight: how much the row counts in training.

    """

    prompt: Prompt
    candidates: tuple[Candidate, ...]
    scores: tuple[float, ...] | None = None
    passages: tuple[Any, ...] = ()
    where: str = "row"
    raw: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    def pairs(self) -> list[tuple[int, int]]:
        """``(better, worse)`` candidate indices of every pair that the scores tell apart."""
        if self.scores is None:
            return []
        count = range(len(self.scores))
        return [(a, b) for a in count for b in count if self.scores[a] > self.scores[b]]


@dataclass(frozen=True, slots=True)
class JsonLines:
    """JSON lines from an open text stream, as a source for `read`."""

    lines: Iterable[str]
    name: str


Source = str | os.PathLike[str] | JsonLines | Iterable[Mapping[str, Any]]


@dataclass(slots=True)
class Problems:
    """Bad rows that were skipped, by message."""

    messages: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.messages)

    def __str__(self) -> str:
        shown = "".join(f"\n  {message}" for message in self.messages[:5])
        more = f"\n  ... and {len(self.messages) - 5} more" if len(self.messages) > 5 else ""
        return f"{len(self.messages)} bad row(s) skipped:{shown}{more}"


def read(
    source: Source,
    *,
    labelled: bool = True,
    on_error: OnError = "raise",
    problems: Problems | None = None,
) -> Iterator[Example]:
    """The examples of a file, a ``datasets`` dataset, any iterable of mappings, or a hub id.

    Args:
        source: ``.jsonl``, ``.jsonl.gz``, ``.json`` (a list) or ``.parquet``; a path that does not exist and looks like
            ``owner/name`` (optionally ``owner/name:split``) is read from the hub with ``datasets``.
        labelled: whether a row must say which candidates are better.
        on_error: raise at the first bad row, or skip it and note it in ``problems``.
        problems: collects what was skipped.

    Raises:
        DataError: a bad row (its message names file, line and field), or a source that is not there.
        MissingExtraError: parquet or hub rows without ``datasets``.

    """
    for where, row in raw_rows(source):
        try:
            if isinstance(row, DataError):
                raise row
            yield parse(row, where, labelled=labelled)
        except DataError as error:
            if on_error == "raise":
                raise
            if problems is not None:
                problems.messages.append(str(error))


def raw_rows(source: Source) -> Iterator[tuple[str, Any]]:
    """``(where, row)`` for each row; a line that is no JSON object comes as a `DataError` in the row's place."""
    if isinstance(source, JsonLines):
        yield from json_lines(source.lines, source.name)
        return
    if not isinstance(source, (str, os.PathLike)):
        for index, row in enumerate(source):
            yield f"row {index}", row
        return
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{path} is a directory: name a file of rows")
    if not path.exists():
        if isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/", "~")) and not path.suffix:
            yield from _hub_rows(source)
            return
        raise DataError(f"{path}: no such file")
    if path.suffix == ".parquet":
        yield from ((f"{path}:{index + 1}", row) for index, row in enumerate(_load_dataset("parquet", data_files=str(path), split="train")))
        return
    with _opened(path) as lines:
        yield from json_lines(lines, str(path))


def json_lines(lines: Iterable[str], name: str) -> Iterator[tuple[str, Any]]:
    """``(where, row)`` of JSON lines, blank ones left out."""
    number = 0
    iterator = iter(lines)
    while True:
        number += 1
        where = f"{name}:{number}"
        try:
            line = next(iterator)
        except StopIteration:
            return
        except (OSError, EOFError, UnicodeDecodeError) as error:
            yield where, DataError(f"{where}: cannot be read: {error}")
            return
        if line.strip():
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield where, DataError(f"{where}: no JSON object: {error}")


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    name, _, split = source.partition(":")
    for index, row in enumerate(_load_dataset(name, split=split or "train")):
        yield f"{source}[{index}]", row


def _load_dataset(*args: Any, **kwargs: Any) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtraError("reading parquet files and hub datasets", "train") from None
    try:
        return load_dataset(*args, **kwargs)
    except Exception as error:  # datasets raises its own errors, OSError and ValueError alike
        raise DataError(f"{args[0] if args[0] != 'parquet' else kwargs['data_files']}: datasets cannot read it: {error}") from error


def parse(row: Any, where: str = "row", *, labelled: bool = True) -> Example:
    """A row of any known format as an `Example`.

    Raises:
        DataError: the message names ``where`` and the field.

    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with fields, got {type(row).__name__}")
    passages = row.get("passages") or ()
    if isinstance(passages, str) or not isinstance(passages, Sequence):
        raise DataError(f"{where}: field 'passages': expected a list of texts")
    try:
        prompt, completions, scores = _fields(row, labelled)
        candidates = tuple(_candidate(item, index) for index, item in enumerate(completions))
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    weight = row.get("weight")
    if weight is None:
        weight = 1.0
    if not _is_number(weight) or weight < 0:
        raise DataError(f"{where}: field 'weight': expected a number of at least 0, got {weight!r}")
    return Example(prompt, candidates, scores, tuple(passages), where, row, float(weight))


def _fields(row: Mapping[str, Any], labelled: bool) -> tuple[Prompt, list[Any], tuple[float, ...] | None]:
    if "chosen" in row or "rejected" in row:
        prompt, chosen, rejected = _pair(row)
        return prompt, [chosen, rejected], _pair_scores(row)
    if "query" in row and ("positive" in row or "negative" in row):
        positive, negative = _texts(row, "positive"), _texts(row, "negative")
        if labelled and not (positive and negative):
            raise DataError("fields 'positive' and 'negative': both need at least one text")
        return _prompt(row, "query"), [*positive, *negative], (1.0,) * len(positive) + (0.0,) * len(negative)
    if "completions" in row:
        completions = row["completions"]
        if isinstance(completions, (str, Mapping)) or not isinstance(completions, Sequence):
            raise DataError("field 'completions': expected a list")
        if not completions:
            raise DataError("field 'completions': is empty")
        return _prompt(row, "prompt"), list(completions), _scores(row, len(completions), labelled)
    if "completion" in row:
        label = row.get("label")
        if labelled and not isinstance(label, bool):
            raise DataError(f"field 'label': expected true or false, got {label!r}")
        return _prompt(row, "prompt"), [row["completion"]], (float(label),) if isinstance(label, bool) else None
    known = "'chosen' and 'rejected'; 'prompt' and 'completions'; or 'query', 'positive' and 'negative'"
    raise DataError(f"fields {sorted(map(str, row))}: a row has {known}")


def _prompt(row: Mapping[str, Any], name: str) -> Prompt:
    prompt = row.get(name)
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence) and prompt and all(isinstance(turn, Mapping) for turn in prompt):
        for index, turn in enumerate(prompt):
            if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), (str, list)):
                raise DataError(f"field {name!r}: message {index} needs a 'role' and a 'content'")
        return [dict(turn) for turn in prompt]
    raise DataError(f"field {name!r}: expected a text or a non-empty list of chat messages, got {type(prompt).__name__}")


def _pair(row: Mapping[str, Any]) -> tuple[Prompt, Any, Any]:
    """Prompt, chosen and rejected, the prompt taken from what both begin with where the row does not name it."""
    answers: list[Any] = []
    for name in ("chosen", "rejected"):
        if name not in row:
            raise DataError(f"field {name!r}: is missing")
        value = row[name]
        if not isinstance(value, (str, Mapping)) and not (isinstance(value, Sequence) and value):
            raise DataError(f"field {name!r}: expected a text or chat messages, got {type(value).__name__}")
        answers.append(value)
    chosen, rejected = answers
    conversations = [isinstance(answer, Sequence) and not isinstance(answer, str) for answer in answers]
    if conversations[0] != conversations[1]:
        raise DataError("fields 'chosen' and 'rejected': one is a conversation, the other is not")
    if conversations[0] and ("prompt" not in row or (len(chosen) > 1 and len(rejected) > 1)):
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        given = row.get("prompt")
        head = list(chosen[:shared])
        prompt = head if not isinstance(given, Sequence) or isinstance(given, str) else [*given, *head]
        if not prompt:
            raise DataError("field 'prompt': is missing, and 'chosen' and 'rejected' do not begin with the same turns")
        return _prompt({"prompt": prompt}, "prompt"), chosen[shared:], rejected[shared:]
    if "prompt" in row:
        return _prompt(row, "prompt"), chosen, rejected
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise DataError("field 'prompt': is missing")
    shared = _shared_text(chosen, rejected)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _pair_scores(row: Mapping[str, Any]) -> tuple[float, float]:
    """The scores of chosen and rejected, 1 and 0 where the row has none."""
    given = [row.get("score_chosen"), row.get("score_rejected")]
    if given == [None, None]:
        return 1.0, 0.0
    for name, value in zip(("score_chosen", "score_rejected"), given, strict=True):
        if not _is_number(value):
            raise DataError(f"field {name!r}: is {value!r}, expected a finite number")
    chosen, rejected = (float(value) for value in given if value is not None)
    if chosen < rejected:
        raise DataError(f"fields 'score_chosen' and 'score_rejected' contradict 'chosen': {chosen:g} is below {rejected:g}")
    return chosen, rejected


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shared_text(a: str, b: str) -> int:
    """Length of the prompt that two texts share, as TRL's ``extract_prompt`` splits them: a space before an answer is the answer's."""
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return shared - 1 if shared and a[shared - 1] == " " else shared


def _texts(row: Mapping[str, Any], name: str) -> list[Any]:
    value = row.get(name, [])
    if isinstance(value, (str, Mapping)):
        return [value]
    if not isinstance(value, Sequence):
        raise DataError(f"field {name!r}: expected a text or a list of texts, got {type(value).__name__}")
    return list(value)


def _scores(row: Mapping[str, Any], count: int, labelled: bool) -> tuple[float, ...] | None:
    name = "scores" if row.get("scores") is not None else "ranks"
    values = row.get(name)
    if values is None:
        if labelled:
            raise DataError("field 'scores' (or 'ranks'): is missing, and only labelled rows can be used here")
        return None
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count:
        found = f"{len(values)} values" if isinstance(values, Sequence) else type(values).__name__
        raise DataError(f"field {name!r}: expected {count} numbers, one for each completion, got {found}")
    for index, value in enumerate(values):
        if not _is_number(value):
            raise DataError(f"field {name!r}: item {index} is {value!r}, expected a finite number")
    sign = 1.0 if name == "scores" else -1.0
    return tuple(sign * float(value) for value in values)


def _candidate(value: Any, index: int) -> Candidate:
    """A candidate given as text, mapping, or a conversation that consists of the assistant's turn."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 1:
            raise DataError(f"candidate {index}: has {len(value)} turns where one assistant turn is expected")
        value = value[0]
    if isinstance(value, Mapping) and value.get("role") is not None:
        if value["role"] != "assistant":
            raise DataError(f"candidate {index}: is a turn of {value['role']!r}, expected the assistant's")
        value = {key: item for key, item in value.items() if key != "role"}
        if isinstance(value.get("content"), list):
            from dpo_rank.scoring.encode import message

            value["content"] = message({"role": "assistant", "content": value["content"]}, index)["content"]
    return Candidate.of(value, index)


def prompt_hash(prompt: Prompt) -> int:
    """64 bits of a hash that a text and the same text as a single user turn share."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    key = json.dumps([[turn["role"], turn["content"]] for turn in turns], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def held_out(prompt: Prompt, share: float = 0.05) -> bool:
    """Whether a hash of ``prompt`` puts it among the ``share`` that is kept out of training."""
    return prompt_hash(prompt) < share * 2**64
