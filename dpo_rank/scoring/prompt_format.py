"""The prompt format as data: how a conversation becomes text, without template code.

A chat format is a table of *joints*, the text that stands between one turn and the next. Every prompt template that is
regular (what it writes between two turns depends on their roles alone) is such a table: where BOS, a default system text,
role prefixes, a system text folded into the first user turn or a frozen date appear is only a matter of what the joints say::

    {"start>user": "<s>[INST] ", "user>assistant": " [/INST] ", "assistant>user": " </s><s>[INST] ", "user>answer": " [/INST]"}

`dpo_rank.scoring.derive` finds the table of a tokenizer's chat template and proves it equal on conversations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from dpo_rank.errors import ArtifactError, EncodingError

Message = Mapping[str, str]
StringPrompt = Literal["user_turn", "verbatim"]

STRIPS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "both": lambda text: text.strip(),
    "left": lambda text: text.lstrip(),
    "right": lambda text: text.rstrip(),
    "newlines": lambda text: text.strip("\n"),
    "left_newlines": lambda text: text.lstrip("\n"),
}
"""What a template may do to the white space around a turn's text, by name."""

THINK_END = "</think>"


class Renderer(Protocol):
    """Turns prompts and answers into text; a `PromptFormat` or a tokenizer's own template."""

    @property
    def string(self) -> StringPrompt:
        """What a ``str`` prompt is."""
        ...

    @property
    def chat(self) -> bool:
        """Turns with roles, or plain text."""
        ...

    def prompt(self, messages: Sequence[Message]) -> str:
        """Text of the conversation, generation prompt included."""
        ...

    def completion(self, messages: Sequence[Message], answer: str, finished: bool) -> str:
        """Everything written for the assistant's turn after the generation prompt; without its end if not ``finished``."""
        ...


@dataclass(frozen=True)
class PromptFormat:
    """How prompts and answers are written; the ``prompt_format`` of an artifact.

    Attributes:
        chat: turns with roles (True) or plain text (False).
        string: what a ``str`` prompt is: one user turn, or the text as it is.
        joints: chat only: text between two turns, ``"<role>>role"`` with ``start`` before the first and ``answer`` for the
            generation prompt.
        strip: chat only: name of a `STRIPS` entry for each role and for ``answer``.
        answer_prefix: written before every answer (inside the completion).
        answer_suffix: written after every finished answer: the end token and what follows it.
        answer_lead: what nearly all training answers begin with (a space); added where an answer lacks it.
        special_tokens: plain only: let the tokenizer add its special tokens (BOS) to the prompt.
        drop_empty_system: an empty system turn is left out.
        thinking: earlier assistant turns lose what stands before ``</think>``, and an answer that brings its own
            thoughts has them written as the template writes them.
        frozen_date: the day a template that writes the current date was derived, ISO form.

    """

    chat: bool
    string: StringPrompt
    joints: Mapping[str, str] = field(default_factory=dict)
    strip: Mapping[str, str] = field(default_factory=dict)
    answer_prefix: str = ""
    answer_suffix: str = ""
    answer_lead: str = ""
    special_tokens: bool = False
    drop_empty_system: bool = False
    thinking: bool = False
    frozen_date: str | None = None

    def prompt(self, messages: Sequence[Message]) -> str:
        """Text of the conversation, generation prompt included.

        Raises:
            EncodingError: a role stands where the format has no place for it.

        """
        if not self.chat:
            raise EncodingError("this ranker reads plain text: give the prompt as a str, not as chat messages")
        parts: list[str] = []
        before = "start"
        for index, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role == "system" and not content and self.drop_empty_system:
                continue
            parts.append(self._joint(before, role, index))
            parts.append(self._stripped(role, self._without_thoughts(content) if role == "assistant" else content))
            before = role
        parts.append(self._joint(before, "answer", len(messages)))
        return "".join(parts)

    def completion(self, messages: Sequence[Message], answer: str, finished: bool) -> str:
        """The answer as the template writes it after the generation prompt; ``messages`` make no difference."""
        prefix, text = self.answer_prefix, answer
        if self.thinking and THINK_END in answer:
            thoughts, text = answer.split(THINK_END, maxsplit=1)[0], answer.rsplit(THINK_END, maxsplit=1)[-1]
            thoughts = thoughts.rstrip("\n").split("<think>")[-1].lstrip("\n").strip("\n")
            prefix = f"<think>\n{thoughts}\n{THINK_END}\n\n"
        text = self._stripped("answer", text)
        if self.answer_lead and not text.startswith(self.answer_lead):
            text = self.answer_lead + text
        suffix = self.answer_suffix if finished and not (self.answer_suffix and not self.chat and text.endswith(self.answer_suffix)) else ""
        return prefix + text + suffix

    def _joint(self, before: str, after: str, index: int) -> str:
        try:
            return self.joints[f"{before}>{after}"]
        except KeyError:
            where = "at the start" if before == "start" else f"after a {before} turn"
            what = "the answer" if after == "answer" else f"a {after} turn"
            raise EncodingError(f"message {index}: the prompt format has no place for {what} {where}") from None

    def _stripped(self, role: str, text: str) -> str:
        return STRIPS[self.strip.get(role, "none")](text)

    def _without_thoughts(self, text: str) -> str:
        return text.rsplit(THINK_END, maxsplit=1)[-1].lstrip("\n") if self.thinking and THINK_END in text else text

    def to_dict(self) -> dict[str, Any]:
        """As plain data for a manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PromptFormat:
        """Read back from a manifest; unknown keys are ignored.

        Raises:
            ArtifactError: a field is missing or has a value that this version does not know.

        """
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        try:
            form = cls(**known)
        except TypeError as error:
            raise ArtifactError(f"dpo_rank.json: prompt_format: {error}") from None
        texts = [form.answer_prefix, form.answer_suffix, form.answer_lead, *form.joints.values()]
        if form.string not in ("user_turn", "verbatim") or not all(isinstance(text, str) for text in texts):
            raise ArtifactError("dpo_rank.json: prompt_format: 'string' is user_turn or verbatim, and every text is a string")
        if unknown := set(form.strip.values()) - set(STRIPS):
            raise ArtifactError(f"dpo_rank.json: prompt_format: strip {sorted(unknown)} is unknown to this version")
        return form


@dataclass(frozen=True)
class PassageFormat:
    """How passages are written in front of the question; the ``passage_format`` of an artifact.

    ``{index}`` (1-based) and ``{text}`` in ``item`` are replaced; nothing in a passage's own text is.
    """

    header: str = "Use these passages.\n"
    item: str = "[{index}] {text}\n"
    footer: str = "\n"

    def render(self, texts: Sequence[str]) -> str:
        """The passages as one text, empty for none."""
        if not texts:
            return ""
        before_text, _, after_text = self.item.partition("{text}")
        items = (before_text.replace("{index}", str(n)) + text + after_text.replace("{index}", str(n)) for n, text in enumerate(texts, 1))
        return self.header + "".join(items) + self.footer

    def to_dict(self) -> dict[str, str]:
        """As plain data for a manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PassageFormat:
        """Read back from a manifest; unknown keys are ignored."""
        return cls(**{name: str(data[name]) for name in cls.__dataclass_fields__ if name in data})
