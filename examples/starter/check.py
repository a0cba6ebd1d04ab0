"""The starter on questions of no data set: a whole answer beside the same answer damaged, by kind of damage, and beside a stub.

    python examples/starter/check.py

Answers were written for this check; every answer to another question is one of them. Prints the share of pairs in the right order.
"""

from __future__ import annotations

import argparse
import random

from rich.console import Console
from rich.table import Table
from rows import DAMAGE

from dpo_rank import Ranker
from dpo_rank.data.formats import prompt_hash
from dpo_rank.evaluation.intervals import figure

WRITTEN = {
    "How do I get a red wine stain out of a cotton shirt?": "Blot it with a cloth, cover it with salt, wait ten minutes and rinse it with cold water. "
    "Then wash the shirt as usual.",
    "What is the capital of Portugal?": "The capital of Portugal is Lisbon, on the mouth of the river Tagus.",
    "How long should I boil an egg for a soft yolk?": "About six minutes from the time the water boils. Put the egg into cold water at once, or it goes on cooking.",
    "Why do leaves turn red in autumn?": "In autumn a tree stops making the green pigment in its leaves. The yellow and red pigments that remain become visible.",
    "Can you suggest a name for a small bakery?": "How about Crumb and Crust? It is short, easy to remember, and it says what you sell.",
    "How can I sleep better at night?": "Go to bed at the same time every day and keep the room dark and cool. Avoid coffee in the afternoon and screens in the last hour.",
    "What is the difference between a lake and a pond?": "A pond is small and so shallow that light reaches its bottom. A lake is larger and deeper.",
    "Write a short message to thank a colleague for her help with a report.": "Hi Ana, thank you for your help with the report. Your notes on the second part "
    "saved me a whole day.",
    "How do I tie my shoes so that they stay tied?": "Tie a double knot: make the usual bow, then cross the two loops once more and pull them tight.",
    "What should I pack for a weekend in the mountains?": "Pack warm layers, a rain jacket, good boots, a water bottle and a map. Bring some food and a small first aid kit.",
    "Who wrote Pride and Prejudice?": "Pride and Prejudice was written by Jane Austen and published in 1813.",
    "How do plants make their food?": "Plants use sunlight to turn water and carbon dioxide into sugar and oxygen. This is called photosynthesis.",
    "What is a good gift for a friend who likes gardening?": "A good pair of pruning shears is a gift that a gardener uses for years. Seeds of an old tomato variety go well with it.",
    "How can I save money on groceries?": "Plan your meals for the week, write a list and buy only what stands on it. Cook large portions and freeze half.",
    "Why is the sky blue?": "Air scatters the blue part of sunlight more than the red part, so blue light reaches us from every direction.",
    "How do I start running as a beginner?": "Start with three short runs a week and walk whenever you are out of breath. Add a few minutes each week.",
    "What does a heart do?": "The heart pumps blood through the body. The blood carries oxygen and food to every organ and takes waste away.",
    "How do I write a good cover letter?": "Say in the first sentence which job you want and why. Then give two examples of work that shows you can do it.",
    "How many days are there in a leap year?": "A leap year has 366 days: February has 29 days instead of 28.",
    "What is the best way to clean a wooden table?": "Wipe it with a damp cloth and a little mild soap, then dry it at once. Rub in some oil twice a year.",
    "How do I calm a dog that is afraid of thunder?": "Close the windows, turn on some music and stay near your dog. Do not scold it, and let it hide where it feels safe.",
    "Explain what inflation is.": "Inflation is a general rise of prices over time. The same amount of money then buys fewer goods than before.",
    "How can I learn to cook?": "Choose three simple dishes and cook each of them until you no longer need the recipe. Then add a new one every week.",
    "What should I do when my phone gets wet?": "Switch it off at once and dry it with a towel. Leave it in a dry place for two days before you turn it on again.",
}
STUBS = ("No.", "Yes.", "I do not know.", "Good question!", "Because it is.")


def main() -> None:
    parser = argparse.ArgumentParser(description="The starter on answers written for the purpose.")
    parser.add_argument("--ranker", default="starter")
    parser.add_argument("--correction", action="store_true", help="take off what length alone lets expect")
    parser.add_argument("--times", type=int, default=3, help="how often each answer is damaged in each way")
    args = parser.parse_args()
    ranker = Ranker.load(args.ranker, correction=args.correction)
    answers = list(WRITTEN.values())
    table = Table("the worse answer is", "pairs in order (95 %)", title=f"{args.ranker}: {len(WRITTEN)} questions written for the purpose")
    for kind, damage in DAMAGE.items():
        rng, found = random.Random(0), []
        for prompt, answer in WRITTEN.items():
            for _ in range(args.times):
                other = rng.choice([text for text in answers if text != answer])
                made = damage(rng, prompt, answer, other)
                if made is not None:
                    whole, worse = ranker.score(prompt, list(made))
                    found.append((float(whole > worse), prompt_hash(prompt)))
        if found:
            table.add_row(kind, str(figure([right for right, _ in found], clusters=[prompt for _, prompt in found])))
    stubs = [(float(ranker.rank(prompt, [stub, answer]).best.index == 1), prompt) for prompt, answer in WRITTEN.items() for stub in STUBS]
    table.add_row("a stub: " + " ".join(STUBS), str(figure([right for right, _ in stubs], clusters=[prompt for _, prompt in stubs])))
    Console().print(table)


if __name__ == "__main__":
    main()
