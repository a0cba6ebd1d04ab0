"""A tokenizer's chat template as a `PromptFormat`, found by probing and proved equal on conversations.

Used where transformers is there (training, export, `from_models`); an artifact holds the result and no template code.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from dpo_rank.errors import DpoRankError, EncodingError
from dpo_rank.scoring.encode import common_prefix
from dpo_rank.scoring.prompt_format import STRIPS, Message, PromptFormat, StringPrompt

Render = Callable[[Sequence[Message], bool], str]
"""``render(messages, add_generation_prompt)`` -> text; raises what the template raises."""

SYSTEM, USER, ANSWER, USER_2 = "QZsystemQZ", "QZuserQZ", "QZanswerQZ", "QZagainQZ"


class CannotExpressError(DpoRankError):
    """A chat template that no `PromptFormat` equals; the message is the reason."""


class TemplateRenderer:
    """The tokenizer's own template through transformers' sandbox: for templates that no `PromptFormat` equals.

    Torch engine only; never stored in an artifact. ``reason`` says why it is needed.
    """

    chat = True

    def __init__(self, tokenizer: Any, string: StringPrompt = "user_turn", reason: str = "") -> None:
        self.string: StringPrompt = string
        self.reason = reason
        self._render = template_render(tokenizer)

    def prompt(self, messages: Sequence[Message]) -> str:
        """See `Renderer.prompt`."""
        return self._rendered(messages, True)

    def completion(self, messages: Sequence[Message], answer: str, finished: bool) -> str:
        """What the template writes behind what prompt and whole conversation share, as TRL splits them."""
        prompt = self.prompt(messages)
        full = self._rendered([*messages, {"role": "assistant", "content": answer}], False)
        shared = common_prefix(prompt, full)
        text = full[shared:]
        if not finished:
            at = text.rfind(answer.strip()) if answer.strip() else -1
            text = text[: at + len(answer.strip())] if at >= 0 else answer
        return text

    def _rendered(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        try:
            return self._render(messages, generation_prompt)
        except Exception as error:  # whatever a template raises is about this conversation
            raise EncodingError(f"the tokenizer's chat template refuses this conversation: {error}") from error


def template_render(tokenizer: Any) -> Render:
    """The tokenizer's template as a function."""

    def render(messages: Sequence[Message], generation_prompt: bool) -> str:
        turns = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt))

    return render


def prompt_format(tokenizer: Any, string: StringPrompt | None = None) -> PromptFormat:
    """The format of ``tokenizer``: chat where it has a template, else plain text ended by its EOS token.

    Raises:
        CannotExpressError: the template is no table of joints; the message says what differs.

    """
    if not getattr(tokenizer, "chat_template", None):
        if tokenizer.eos_token is None:
            raise CannotExpressError("the tokenizer has neither a chat template nor an EOS token: an answer would have no end")
        return PromptFormat(chat=False, string=string or "verbatim", answer_suffix=tokenizer.eos_token, special_tokens=True)
    form = derive(template_render(tokenizer), string or "user_turn")
    writes_date = "strftime_now" in str(tokenizer.chat_template)
    return replace(form, frozen_date=datetime.date.today().isoformat() if writes_date else None)


def derive(render: Render, string: StringPrompt = "user_turn") -> PromptFormat:
    """The `PromptFormat` that writes what ``render`` writes, or `CannotExpressError`."""
    user, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
    system, again = {"role": "system", "content": SYSTEM}, {"role": "user", "content": USER_2}
    try:
        prompt = render([user], True)
        full = render([user, answer], False)
    except Exception as error:  # a template's own refusal of the simplest conversation
        raise CannotExpressError(f"the template refuses a single user turn: {error}") from error
    start, end = _split(prompt, USER)
    joints = {"start>user": start, "user>answer": end}
    if not full.startswith(prompt):
        raise CannotExpressError("its generation prompt is not how it begins the assistant's turn")
    prefix, suffix = _split(full[len(prompt) :], ANSWER)
    form = PromptFormat(chat=True, string=string, answer_prefix=prefix, answer_suffix=suffix)
    if earlier := _try(render, [user, answer, again]):
        joints["user>assistant"] = _between(earlier, USER, ANSWER)
        joints["assistant>user"] = _between(earlier, ANSWER, USER_2)
    if with_system := _try(render, [system, user]):
        joints["start>system"] = _split(with_system, SYSTEM)[0]
        joints["system>user"] = _between(with_system, SYSTEM, USER)
    if repeated := _try(render, [user, again]):
        joints["user>user"] = _between(repeated, USER, USER_2)
    second = {"role": "assistant", "content": USER_2}
    if repeated := _try(render, [user, answer, second, {"role": "user", "content": SYSTEM}]):
        joints["assistant>assistant"] = _between(repeated, ANSWER, USER_2)
    form = replace(form, joints=joints)
    form = _with_strips(render, form)
    form = _with_thinking(render, form)
    if difference := _first_difference(render, form):
        form = replace(form, drop_empty_system=True)
        if _first_difference(render, form):
            raise CannotExpressError(difference)
    return form


def conversations(form: PromptFormat) -> Iterator[tuple[str, list[Message], str]]:
    """Named conversations and an answer each that a format is proved on: those it has joints for."""
    contents = {
        "plain": ("Be brief.", "What is 2 + 2?", "It is 4."),
        "empty": ("", "", ""),
        "unicode": ("Réponds «vite».", "日本語で? 🙂 e\u0301", "はい — 🙂\u200d"),
        "spaces": ("  lead", "\n\nwhat \n", " yes\n\n"),
        "markup": ("{{ x }} {% if %}", "<b>a & b</b> '\"\\ [x]", "```py\nprint({'a': 1})\n```"),
        "long": ("a b " * 40, "c\td\r\n" * 30, "e. " * 50),
    }
    for name, (system, user, answer) in contents.items():
        turns = {"system": system, "user": user, "assistant": answer}
        for shape in ("u", "su", "uau", "suau", "uauau", "uu", "uaau"):
            roles = [{"s": "system", "u": "user", "a": "assistant"}[letter] for letter in shape]
            if all(f"{a}>{b}" in form.joints for a, b in itertools.pairwise(["start", *roles, "answer"])):
                yield f"{name} content, turns {shape}", [{"role": role, "content": turns[role]} for role in roles], answer


def _first_difference(render: Render, form: PromptFormat) -> str | None:
    for name, messages, answer in conversations(form):
        try:
            prompt = render(messages, True)
            full = render([*messages, {"role": "assistant", "content": answer}], False)
        except Exception as error:
            return f"it refuses a conversation that its table allows ({name}): {error}"
        if (ours := form.prompt(messages)) != prompt:
            return f"no table of joints writes its prompt ({name}): {_where(ours, prompt)}"
        if (ours := form.prompt(messages) + form.completion(messages, answer, True)) != full:
            return f"no table of joints writes its answer ({name}): {_where(ours, full)}"
    return None


def _with_strips(render: Render, form: PromptFormat) -> PromptFormat:
    """Find what the template does to white space around each role's text."""
    padded = "\n \n{}\n \n"
    strips: dict[str, str] = {}
    for role, shape in (("user", "u"), ("system", "su"), ("assistant", "uau"), ("answer", "u")):
        roles = [{"s": "system", "u": "user", "a": "assistant"}[letter] for letter in shape]
        if any(f"{a}>{b}" not in form.joints for a, b in itertools.pairwise(["start", *roles, "answer"])):
            continue
        messages: list[Message] = [
            {"role": r, "content": (padded if r == role else "{}").format(f"QZ{place}QZ")} for place, r in enumerate(roles)
        ]
        last = padded.format(ANSWER) if role == "answer" else ANSWER
        full = render([*messages, {"role": "assistant", "content": last}], False)
        for name in STRIPS:
            trial = replace(form, strip={**strips, role: name})
            if trial.prompt(messages) + trial.completion(messages, last, True) == full:
                strips[role] = name
                break
        else:
            raise CannotExpressError(f"it changes the text of a {role} turn in a way no table says: {full!r:.200}")
    return replace(form, strip=strips)


def _with_thinking(render: Render, form: PromptFormat) -> PromptFormat:
    """Does the template treat ``</think>`` in an assistant's text? Then the format must do just the same."""
    user: Message = {"role": "user", "content": USER}
    thoughtful = f"<think>\nhm\n\nwell\n</think>\n\n{ANSWER}"
    bare = f"hm</think>{ANSWER}"
    cases: list[list[Message]] = [[user]]
    if "user>assistant" in form.joints and "assistant>user" in form.joints:
        cases.append([user, {"role": "assistant", "content": thoughtful}, user])
    for trial in (form, replace(form, thinking=True)):
        if all(
            trial.prompt(case) + trial.completion(case, answer, True)
            == _try(render, [*case, {"role": "assistant", "content": answer}], generation_prompt=False)
            for case in cases
            for answer in (thoughtful, bare)
        ):
            return trial
    raise CannotExpressError("it rewrites answers that hold </think> in a way no table says")


def _try(render: Render, messages: list[Message], generation_prompt: bool = True) -> str | None:
    """The rendering, or None where the template refuses the conversation."""
    try:
        return render(messages, generation_prompt)
    except Exception:  # templates raise their own TemplateError, or whatever their code runs into
        return None


def _split(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise CannotExpressError(f"it does not write a turn's text once, as it is: {text!r:.200}")
    return before, after


def _between(text: str, first: str, second: str) -> str:
    return _split(_split(text, first)[1], second)[0]


def _where(ours: str, theirs: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"{theirs[max(0, at - 20) : at + 30]!r} would be {ours[max(0, at - 20) : at + 30]!r}"
