"""Stage 3 of the starter: the trained ranker as the artifact that the wheel carries.

    python examples/starter/finish.py --ranker runs/starter/ranker --held-out runs/starter/more/held_out.jsonl --output dpo_rank/starter

Keeps the int8 graphs only and fits on held-out rows: the temperature, as high as a calibration error of at most 0.05 above a perfect model's
allows on all of them, for the higher it is the nearer to 0.5 stays the probability between two *whole* answers, about which the starter
knows little; the thresholds of `ranking.confident` on two whole answers alone, where it is easily wrong; and what is familiar on all.
The model card says what the int8 graphs reach on these rows, and which goals they miss.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo_rank import Ranker, artifact
from dpo_rank.data.formats import Example, read
from dpo_rank.evaluation.agreement import Scores, compare, evaluate_scores, held_out_table, log_probs_of, score_examples
from dpo_rank.evaluation.baselines import RULES
from dpo_rank.evaluation.calibration import Pairs, Reliability, fit, fit_familiarity, fit_temperature, pairs_of, reliability
from dpo_rank.evaluation.style import explained
from dpo_rank.export.card import model_card

WHOLE_PAIRS = "human: harmless"
DESCRIPTION = [
    "**For:** telling whole answers from broken ones (cut off, looping, shuffled, garbled, an echo of the prompt, an answer to another prompt, a "
    "needless refusal) and, a little, harmless from harmful ones, in English. It lets `Ranker.load()` work out of the box and `--model starter` train a first "
    "ranker in minutes on a CPU.",
    "**Not for:** telling a stub from an answer ('No.' or 'I do not know.' comes before a whole answer four times in five: no such rows were trained on, and a "
    "sum leans to the short), choosing between two good answers, facts, reasoning, code, other languages, or any decision that matters. Its human pairs are about "
    "harmlessness alone. Its probabilities are right for broken answers beside whole ones and too bold between two whole ones: fit them on rows of "
    "yours (`ranker.calibrate`).",
    "**Data:** Anthropic/hh-rlhf harmless-base (MIT), openai/gsm8k (MIT), RUCAIBox/HaluEval (MIT); prompts held out by a hash. "
    "**Recipe:** `examples/starter/README.md`.",
]
GOALS = {
    **dict.fromkeys(("shuffled", "garbled", "needless refusal", "looping", "prompt echoed"), 0.97),
    **dict.fromkeys(("cut off", "answer to another prompt"), 0.85),
}
"""Agreement that was aimed at, by what was done to the worse answer."""
MISCALIBRATION = 0.05
"""Calibration error above a perfect model's that was aimed at."""


def modest_temperature(pairs: Pairs) -> float:
    """The highest of 60 temperatures, from the likeliest to eight times it, at which the calibration error is near a perfect model's;
    the likeliest where none is.
    """
    temperatures = fit_temperature(pairs.margins, pairs.weights) * np.geomspace(1, 8, 60)

    def near(temperature: float) -> bool:
        found = reliability(pairs, temperature)
        return found.ece.value <= found.ece_of_perfect + MISCALIBRATION

    return float(next(filter(near, temperatures[::-1]), temperatures[0]))


def measured(held: list[Example], scores: Scores, sure: Reliability, table: dict[str, dict[str, Any]]) -> list[str]:
    """What the card says of goals and calibration, from the rows themselves."""
    missed = [f"{kind} {table[kind]['agreement']:.3f} (goal {goal})" for kind, goal in GOALS.items() if table[kind]["agreement"] < goal]
    return [
        f"**Measured** on {len(held)} held-out rows, which also chose between three versions of it: goals missed of the seven kinds of damage: "
        f"{', '.join(missed) or 'none'}. Calibration error {sure.ece.value:.3f} (a perfectly "
        f"calibrated model: {sure.ece_of_perfect:.3f}); length explains {explained(held, scores)['length']:.0%} of the scores' variance."
    ]


def on_public_rows(ranker: Ranker, path: Path) -> str:
    """Agreement on labelled rows that no stage has read, beside the rule that its sum leans to."""
    rows = list(read(path))
    ours = evaluate_scores("starter", rows, score_examples(ranker, rows))
    rule = evaluate_scores("shorter", rows, RULES["shortest"](rows))
    return (
        f"**On {path.name.partition('.jsonl')[0]}:** {ours.agreement}; the shorter answer alone gets {rule.agreement.value:.3f}, a paired difference of "
        f"{compare(ours, rule).agreement}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The trained ranker as the embedded starter.")
    parser.add_argument("--ranker", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--public", type=Path, help="labelled rows that no stage has read, for the card")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    held = list(read(args.held_out))
    ranker = Ranker.load(args.ranker, precision="int8")
    tokens = log_probs_of(ranker, held)
    scores = [np.array([ranker.reward(item) for item in items]) for items in tokens]
    whole = [(example, items) for example, items in zip(held, tokens, strict=True) if example.raw["subset"] == WHOLE_PAIRS]
    source = artifact.load(args.ranker)
    fitted, _ = fit(source.manifest, *zip(*whole, strict=True), correction=True)
    pairs = pairs_of(held, scores)
    temperature = modest_temperature(pairs)
    table = held_out_table(held, scores)
    kept = {name for name in source.manifest.files if name.startswith("onnx/int8/") or name == artifact.TOKENIZER}
    facts = {
        **source.manifest.training,
        "description": [
            *DESCRIPTION,
            *measured(held, scores, reliability(pairs, temperature), table),
            *([on_public_rows(ranker, args.public)] if args.public else []),
        ],
        "license": "apache-2.0",
        "base_model": "models/starter-base",
        "temperature_fitted_on": "held-out rows: the highest with a calibration error of at most 0.05 above a perfect model's",
        "held_out": table,
    }
    final = replace(
        fitted,
        name="starter",
        temperature=temperature,
        familiarity=fit_familiarity(tokens),
        training=facts,
        default_precision="int8",
        default_precision_reason="the only one here",
        files={name: source.manifest.files[name] for name in kept},
    )

    def write(root: Path) -> None:
        source.copy_files(root, skip=frozenset(source.manifest.files) - kept)
        (root / "README.md").write_text(model_card(final, final.precisions), encoding="utf-8")

    artifact.save(args.output, final, write, overwrite=True)


if __name__ == "__main__":
    main()
