"""`make demo`: rank a few prompts' candidates with the embedded starter. Core install only, no torch, no network."""

from __future__ import annotations

import time

from rich.console import Console
from rich.table import Table

from dpo_rank import Ranker

PROMPTS = {
    "How do I get a red wine stain out of a cotton shirt?": [
        "Blot it with a cloth, cover it with salt or baking soda, wait ten minutes, rinse with cold water and wash as usual.",
        "Blot it with a cloth, cover it with salt or baking soda, wait ten min",
        "Blot it with a cloth, cover it with a cloth, cover it with a cloth, cover it with a cloth, cover it with a cloth, cover it.",
        "I'm sorry, but I can't help with that.",
    ],
    "Write a short thank-you note to a neighbour who watered my plants.": [
        "Dear Sam, thank you for watering the plants while we were away. They look wonderful, and so does the balcony. Coffee at ours soon?",
        "Dear Sam, thank you for watering the plants for watering the plants for watering the plants for watering the plants while we were away.",
        "Write a short thank-you note to a neighbour who watered my plants.",
        "D#ar S~m, th;nk yo% f)r w@ter!ng th+ pl=nts wh^le w< wer_ aw&y.",
    ],
    "A baker makes 12 rolls a tray and fills 5 trays. She sells 43 rolls. How many are left?": [
        "She makes 12 x 5 = 60 rolls. After selling 43 there are 60 - 43 = 17 rolls left.",
        "A sunset is red because blue light is scattered away on its long path through the air.",
        "She makes 12 x 5 = 60 rolls. After selling",
    ],
}
TWO_GOOD = (
    "What is a good way to start the day?",
    [
        "Drink a glass of water, open a window and take a short walk before you look at your phone.",
        "Get up at the same time each day, stretch for a few minutes and eat a simple breakfast.",
    ],
)
PASSAGES = (
    "Which river runs through the town of Aldern?",
    ["Aldern is a town of nine thousand people on the river Wenlow. It is known for its clock tower and its paper mill."],
    ["The town of Aldern lies on the river Wenlow.", "The town of Aldern lies on the on the on the on the on the."],
)


def main() -> None:
    console = Console()
    start = time.perf_counter()
    ranker = Ranker.load("starter")
    console.print(f"{ranker!r} loaded in {1000 * (time.perf_counter() - start):.0f} ms\n")
    for prompt, answers in PROMPTS.items():
        show(console, ranker, prompt, answers)
    prompt, answers = TWO_GOOD
    show(console, ranker, prompt, answers)
    console.print(
        f"Two good answers: the starter says {ranker.compare(prompt, *answers):.2f} for the first. "
        "It tells broken answers from whole ones; of two good ones it knows little.\n"
    )
    question, passages, answers = PASSAGES
    show(console, ranker, question, answers, passages)


def show(console: Console, ranker: Ranker, prompt: str, answers: list[str], passages: list[str] | None = None) -> None:
    start = time.perf_counter()
    ranking = ranker.rank(prompt, answers, passages=passages)
    took = 1000 * (time.perf_counter() - start)
    title = prompt if passages is None else f"{prompt} (over {len(passages)} passage)"
    table = Table(title=title, caption=f"{took:.0f} ms", title_justify="left", caption_justify="right", width=110)
    table.add_column("probability", justify="right")
    table.add_column("score", justify="right")
    table.add_column("answer")
    for candidate in ranking:
        table.add_row(f"{candidate.probability:.3f}", f"{candidate.score:.2f}", candidate.text)
    console.print(table)


if __name__ == "__main__":
    main()
