"""Stage 2 of the starter: preference rows, whole answers against broken ones beside the human pairs.

    python examples/starter/rows.py --output runs/starter

writes ``train.jsonl`` and ``held_out.jsonl`` (prompts that the hash holds out). Every row names its ``subset``: where it is from
or what was done to the worse answer. Length says as little as possible: where damage shortens an answer, as many rows are made
in which the worse one is the longer.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
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
WEIGHTS = {
    "cut off": 6,
    "looping": 2,
    "answer to another prompt": 8,
    "shuffled": 2,
    "prompt echoed": 4,
    "needless refusal": 1,
    "garbled": 1,
}


def damaged(rows: dict[str, list[Row]], count: int, weights: dict[str, int] | None, held: bool, seed: int, short: float) -> Iterator[Row]:
    """``count`` rows of a whole answer and a damaged one, spread over the kinds of damage by ``weights``, or evenly.

    A share ``short`` of the whole answers is cut down to its first sentences.
    """
    rng = random.Random(seed)
    whole = [
        (row["prompt"], row["completion"].strip())
        for name in ("halueval_general.sft", "gsm8k.sft")
        for row in rows[name]
        if held_out(row["prompt"]) == held and 20 <= len(row["completion"]) <= 1500
    ]
    general = [pair for pair in whole if "####" not in pair[1]]
    kinds = list(DAMAGE)
    made = 0
    while made < count:
        kind = rng.choices(kinds, [weights[kind] for kind in kinds])[0] if weights else kinds[made % len(kinds)]
        source = general if rng.random() < 0.75 else whole
        prompt, answer = rng.choice(source)
        if rng.random() < short:  # whole all the same: its first sentences
            answer = " ".join(sentences(answer)[: rng.choice((1, 1, 2, 3))])
            if len(answer) < 20:
                continue
        near = sorted(rng.sample(source, min(40, len(source))), key=lambda pair: abs(len(pair[1]) - len(answer)))
        other = next(text for question, text in near if question != prompt)
        if len(other) > 1.5 * len(answer):
            other = " ".join(sentences(other)[: max(1, len(sentences(answer)))])
        pair = DAMAGE[kind](rng, prompt, answer, other)
        if pair is None or pair[0] == pair[1] or not pair[1].strip():
            continue
        made += 1
        yield {"prompt": prompt, "chosen": pair[0], "rejected": pair[1], "subset": kind}


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
        for _, _, other in others[:2]:
            passages = [{"text": passage["text"]} for passage in row["passages"]]
            yield {"prompt": row["prompt"], "passages": passages, "chosen": answer, "rejected": other, "subset": "answer over passages"}


def human(rows: dict[str, list[Row]], held: bool) -> Iterator[Row]:
    for row in rows["hh_harmless.train"]:
        if held_out(row["prompt"]) == held:
            yield {name: row[name] for name in ("prompt", "chosen", "rejected")} | {"subset": "human: harmless"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=None, help="folder of the jsonl.gz files, or 'hub' for the public datasets")
    parser.add_argument("--output", type=Path, default=Path("runs/starter"))
    parser.add_argument("--damaged", type=int, default=7000)
    parser.add_argument("--held-out-damaged", type=int, default=420)
    parser.add_argument("--refusals", type=int, default=WEIGHTS["needless refusal"], help="weight of needless refusals (see WEIGHTS)")
    parser.add_argument("--human-times", type=int, default=2, help="how often each human pair is trained on")
    parser.add_argument("--short", type=float, default=0.45, help="share of the whole answers that are their first sentences")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    source = load(args.data)
    args.output.mkdir(parents=True, exist_ok=True)
    weights = {**WEIGHTS, "needless refusal": args.refusals}
    for name, held, count in (("train", False, args.damaged), ("held_out", True, args.held_out_damaged)):
        made = [*damaged(source, count, None if held else weights, held, args.seed, args.short), *over_passages(source, held, args.seed)]
        rng = random.Random(args.seed)
        made += list(human(source, held)) * (1 if held else args.human_times)
        rng.shuffle(made)
        with (args.output / f"{name}.jsonl").open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        print(f"{name}: {len(made)} rows")


if __name__ == "__main__":
    main()
