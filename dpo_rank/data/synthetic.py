"""Preferences with exact ground truth: instructions whose constraints a program can check.

For tests and examples. A prompt asks for some words under constraints (a word to use, a word to avoid, a number of words,
an ending); an answer is worth the share of the constraints that it keeps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

WORDS = [
    "river",
    "stone",
    "amber",
    "quiet",
    "orchard",
    "lantern",
    "silver",
    "meadow",
    "harbor",
    "winter",
    "copper",
    "garden",
    "violet",
    "canyon",
    "maple",
    "thunder",
    "pebble",
    "willow",
    "ember",
    "island",
    "feather",
    "marble",
    "summit",
    "cedar",
    "autumn",
    "velvet",
    "hollow",
    "beacon",
    "prairie",
    "granite",
]
ENDINGS = (".", "!", "?")


@dataclass(frozen=True, slots=True)
class Instruction:
    """Constraints on an answer of single-spaced words.

    Attributes:
        use: a word that must occur.
        avoid: a word that must not.
        count: the number of words.
        ending: the last character.

    """

    use: str
    avoid: str
    count: int
    ending: str

    @property
    def prompt(self) -> str:
        """The instruction in words."""
        return f"Write {self.count} words. Use '{self.use}'. Do not use '{self.avoid}'. End with '{self.ending}'."

    def score(self, answer: str) -> float:
        """Share of the four constraints that ``answer`` keeps, 0 to 1."""
        words = answer.rstrip("".join(ENDINGS)).split()
        kept = (self.use in words, self.avoid not in words, len(words) == self.count, answer.endswith(self.ending))
        return sum(kept) / len(kept)


def instructions(count: int, seed: int = 0) -> Iterator[tuple[Instruction, list[str]]]:
    """Instructions, each with a perfect answer and one for each way to break a single constraint, in random order."""
    rng = random.Random(seed)
    for _ in range(count):
        use, avoid, *others = rng.sample(WORDS, 12)
        size = rng.randrange(3, 8)
        instruction = Instruction(use, avoid, size, rng.choice(ENDINGS))
        words = [use, *others[: size - 1]]
        rng.shuffle(words)
        without = [word if word != use else others[-1] for word in words]
        spoiled = [word if word == use else avoid for word in words]
        other_end = rng.choice([mark for mark in ENDINGS if mark != instruction.ending])
        answers = [" ".join(kept) + instruction.ending for kept in (words, without, spoiled, [*words, others[-2]])]
        answers.append(" ".join(words) + other_end)
        rng.shuffle(answers)
        yield instruction, answers


def lists(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Listwise rows: five answers with their exact scores."""
    for instruction, answers in instructions(count, seed):
        yield {"prompt": instruction.prompt, "completions": answers, "scores": [instruction.score(answer) for answer in answers]}


def pairs(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Pairs: the perfect answer against one that breaks a constraint."""
    rng = random.Random(seed + 1)
    for row in lists(count, seed):
        best = max(range(len(row["scores"])), key=row["scores"].__getitem__)
        worse = rng.choice([index for index in range(len(row["scores"])) if index != best])
        yield {"prompt": row["prompt"], "chosen": row["completions"][best], "rejected": row["completions"][worse]}
