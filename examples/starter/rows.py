"""Stage 2 of the starter: preference rows, whole answers against broken ones beside the human pairs.

    python examples/starter/rows.py --output runs/starter

writes ``train.jsonl`` and ``held_out.jsonl`` (prompts that the hash holds out). A training row sets a whole answer against several
broken ones, which costs the prompt and the whole answer once; a held-out row is a pair and names in ``subset`` what was done to the
worse answer. Length says as little as possible: where damage shortens an answer, as many are made in which the worse one is the longer.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from texts import Row, load

from dpo_rank.data.formats import held_out

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot assist with this request.",
    "Sorry, I'm not able to answer that question.",
    "As an AI language model, I am unable to help you with this.",
    "I don't feel comfortable answering that. Is there anything else I can help you with?",
    "I'm afraid I can't do that. Please ask me something else.",
    "Unfortunately I am not able to provide an answer to this. I apologize for any inconvenience.",
)


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?\n])\s+", text) if part.strip()]


def ends_in_a_list(text: str) -> bool:
    """Whether the last sentence is the number of a list's next item: not whole."""
    return re.search(r"(^|\s)\d+\.$", text) is not None


def ended(rng: random.Random, text: str, answer: str) -> str:
    """``text`` with the final punctuation of ``answer``, three times in four: damage must not be told by the last character alone."""
    end = re.search(r"[.!?]+$", answer)
    text = text.rstrip(" .!?,;:\n")
    return text + end.group() if end and rng.random() < 0.75 else text


def cut_off(rng: random.Random, prompt: str, answer: str, other: str) -> tuple[str, str] | None:
    """The worse answer stops inside a word or sentence; half of the time it is the longer one all the same."""
    parts = sentences(answer)
    if len(answer) < 40:
        return None
    if len(parts) >= 3 and rng.random() < 0.6:
        keep = rng.randrange(1, len(parts) - 1)
        whole = " ".join(parts[:keep])
        if len(parts[keep]) > 12:
            return whole, whole + " " + parts[keep][: rng.randrange(5, len(parts[keep]) - 4)]
    cut = answer[: rng.randrange(len(answer) // 4, len(answer) - 8)].rstrip(" .!?\n")
    return answer, cut


def looping(rng: random.Random, prompt: str, answer: str, other: str) -> tuple[str, str] | None:
    """The worse answer begins well and then repeats a sentence or phrase up to about the whole one's length."""
    words = answer.split()
    if len(words) < 6:
        return None
    start = rng.randrange(1, max(2, len(words) // 2))
    size = rng.choice((1, 2, 4, 8, 12))
    phrase = words[start : start + size]
    total = max(start + 3 * size, int(len(words) * rng.uniform(0.7, 1.3)))
    looped = words[:start]
    while len(looped) < total:
        looped += phrase
    return answer, ended(rng, " ".join(looped), answer)


def off_topic(rng: random.Random, prompt: str, answer: str, other: str) -> tuple[str, str] | None:
    """The worse answer belongs to another prompt."""
    return answer, other


def shuffled(rng: random.Random, prompt: str, answer: str, other: str) -> tuple[str, str] | None:
    """The worse answer has the same words in another order, often with a capital in front and a full stop at the end."""
    words = [word.rstrip(".!?") if rng.random() < 0.8 else word for word in answer.split()]
    if len(words) < 5:
        return None
    size = rng.choice((1, 1, 2, 3)) if len(words) >= 9 else 1
    chunks = [words[i : i + size] for i in range(0, len(words), size)]
    rng.shuffle(chunks)
    mixed = " ".join(word for chunk in chunks for word in chunk)
    if rng.random() < 0.75:
        first, *rest = mixed.lower().split(" ") if len(words) < 40 else mixed.split(" ")
        mixed = " ".join([first.capitalize(), *rest])
    return answer, ended(rng, mixed, answer)


def echoed(rng: random.Random, prompt: str, answer: str, other: str) -> tuple[str, str] | None:
    """The worse answer repeats the prompt, alone or in front of the answer's beginning."""
    if len(prompt) < 20:
        return None
    if rng.random() < 0.5:
        return answer, prompt
    return answer, prompt + " " + " ".join(sentences(answer)[:1])


def refused(rng: random.Random, prompt: str, answer: str, other: str) -> tuple[str, str] | None:
    """The worse answer refuses a harmless request."""
    refusal = rng.choice(REFUSALS)
    if rng.random() < 0.3:
        refusal += " " + rng.choice(REFUSALS)
    return answer, refusal


def garbled(rng: random.Random, prompt: str, answer: str, other: str) -> tuple[str, str] | None:
    """The worse answer has many of its characters exchanged."""
    characters = list(answer[:-1])
    places = rng.sample(range(len(characters)), max(3, int(len(characters) * rng.uniform(0.1, 0.4))))
    for place in places:
        characters[place] = chr(rng.randrange(33, 127)) if rng.random() < 0.7 else rng.choice("�□ßø¿§")
    return answer, "".join(characters) + answer[-1]


DAMAGE: dict[str, Callable[[random.Random, str, str, str], tuple[str, str] | None]] = {
    "cut off": cut_off,
    "looping": looping,
    "answer to another prompt": off_topic,
    "shuffled": shuffled,
    "prompt echoed": echoed,
    "needless refusal": refused,
    "garbled": garbled,
}
SHARES = {
    "cut off": (1, 1),
    "looping": (1, 1),
    "answer to another prompt": (1, 1, 1),
    "shuffled": (1, 1),
    "prompt echoed": (1,),
    "needless refusal": (0.7,),
    "garbled": (0.4,),
}
"""How likely a training row has another broken answer of each kind."""


@dataclass
class Whole:
    """Whole answers, and others of like length to put in their place."""

    pairs: list[tuple[str, str]]
    rng: random.Random
    short: float
    """Share of the answers that are cut down to their first sentences: whole all the same."""

    def __post_init__(self) -> None:
        self.general = [pair for pair in self.pairs if "####" not in pair[1]]

    def draw(self) -> tuple[str, str, Callable[[], str]]:
        """A prompt, its answer (20 characters at least), and a source of answers to other prompts."""
        while True:
            source = self.general if self.rng.random() < 0.75 else self.pairs
            prompt, answer = self.rng.choice(source)
            if self.rng.random() < self.short:
                answer = " ".join(sentences(answer)[: self.rng.choice((1, 1, 2, 3))])
            if len(answer) >= 20:
                return prompt, answer, partial(self._other, source, prompt, answer)

    def _other(self, source: list[tuple[str, str]], prompt: str, answer: str) -> str:
        near = sorted(self.rng.sample(source, min(40, len(source))), key=lambda pair: abs(len(pair[1]) - len(answer)))
        other = next(text for question, text in near if question != prompt)
        if len(other) > 1.5 * len(answer):
            other = " ".join(sentences(other)[: max(1, len(sentences(answer)))])
        return other


def whole_answers(rows: dict[str, list[Row]], held: bool, longest: int, seed: int, short: float) -> Whole:
    answers = [
        (row["prompt"], row["completion"].strip())
        for name in ("halueval_general.sft", "gsm8k.sft")
        for row in rows[name]
        if held_out(row["prompt"]) == held and 20 <= len(row["completion"]) <= longest
    ]
    return Whole(answers, random.Random(seed), short)


def pairs(whole: Whole, count: int) -> Iterator[Row]:
    """A whole answer and a damaged one, spread evenly over the kinds of damage."""
    kinds = list(DAMAGE)
    made = 0
    while made < count:
        kind = kinds[made % len(kinds)]
        prompt, answer, other = whole.draw()
        pair = DAMAGE[kind](whole.rng, prompt, answer, other())
        if pair is None or pair[0] == pair[1] or not pair[1].strip():
            continue
        made += 1
        yield {"prompt": prompt, "chosen": pair[0], "rejected": pair[1], "subset": kind}


def lists(whole: Whole, count: int) -> Iterator[Row]:
    """A whole answer (now and then its beginning too, which is as whole) and broken ones of every kind."""
    for _ in range(count):
        prompt, answer, other = whole.draw()
        scores = {answer: 1.0}
        for kind, shares in SHARES.items():
            for share in shares:
                if whole.rng.random() < share and (pair := DAMAGE[kind](whole.rng, prompt, answer, other())):
                    scores.setdefault(pair[1], 0.0)
                    scores[pair[0]] = 1.0
        scores = {text: score for text, score in scores.items() if text.strip()}
        if min(scores.values()) < 1.0 and not any(score and ends_in_a_list(text) for text, score in scores.items()):
            yield {"prompt": prompt, "completions": list(scores), "scores": list(scores.values()), "subset": "whole or broken"}


def of_any_length(whole: Whole, count: int) -> Iterator[Row]:
    """A whole answer and its first sentences, which is better by lot: the margin that fits such rows best is 0 at every length."""
    made = 0
    while made < count:
        prompt, answer = whole.rng.choice(whole.general)
        parts = sentences(answer)
        if len(parts) < 2:
            continue
        both = [answer, " ".join(parts[: whole.rng.randrange(1, len(parts))])]
        if ends_in_a_list(both[1]):
            continue
        made += 1
        whole.rng.shuffle(both)
        yield {"prompt": prompt, "chosen": both[0], "rejected": both[1], "subset": "length alone"}


def over_passages(rows: dict[str, list[Row]], held: bool, seed: int) -> Iterator[Row]:
    """A right answer against another question's right answer of like length: in this source, length alone gives labels away."""
    rng = random.Random(seed)
    right = [
        (row, next(text for text, score in zip(row["completions"], row["scores"], strict=True) if score > 0))
        for row in rows["halueval_qa.train"]
        if held_out(row["prompt"]) == held and any(score > 0 for score in row["scores"])
    ]
    for row, answer in right:
        others = sorted((abs(len(text) - len(answer)), rng.random(), text) for _, text in right if text != answer)
        asked = {
            "prompt": row["prompt"],
            "passages": [{"text": passage["text"]} for passage in row["passages"]],
            "subset": "answer over passages",
        }
        if held:
            for _, _, other in others[:2]:
                yield asked | {"chosen": answer, "rejected": other}
        else:
            near = list(dict.fromkeys(text for _, _, text in others[:5]))
            yield asked | {"completions": [answer, *near], "scores": [1.0] + [0.0] * len(near)}


def human(rows: dict[str, list[Row]], held: bool) -> Iterator[Row]:
    for row in rows["hh_harmless.train"]:
        if held_out(row["prompt"]) == held:
            yield {name: row[name] for name in ("prompt", "chosen", "rejected")} | {"subset": "human: harmless"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=None, help="folder of the jsonl.gz files, or 'hub' for the public datasets")
    parser.add_argument("--output", type=Path, default=Path("runs/starter"))
    parser.add_argument("--lists", type=int, default=3000)
    parser.add_argument("--of-any-length", type=int, default=800, help="training rows that differ in length alone")
    parser.add_argument("--longest", type=int, default=700, help="characters of a training row's whole answer")
    parser.add_argument("--held-out-damaged", type=int, default=420)
    parser.add_argument("--short", type=float, default=0.45, help="share of the whole answers that are their first sentences")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    source = load(args.data)
    args.output.mkdir(parents=True, exist_ok=True)
    whole = whole_answers(source, False, args.longest, args.seed, args.short)
    train = [
        *lists(whole, args.lists),
        *of_any_length(whole, args.of_any_length),
        *over_passages(source, False, args.seed),
        *human(source, False),
    ]
    held = [
        *pairs(whole_answers(source, True, 1500, args.seed, args.short), args.held_out_damaged),
        *over_passages(source, True, args.seed),
        *human(source, True),
    ]
    for name, made in (("train", train), ("held_out", held)):
        random.Random(args.seed).shuffle(made)
        with (args.output / f"{name}.jsonl").open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        print(f"{name}: {len(made)} rows")


if __name__ == "__main__":
    main()
