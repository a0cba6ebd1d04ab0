"""Stage 3 of the starter: the trained ranker as the artifact that the wheel carries.

    python examples/starter/finish.py --ranker runs/starter/ranker --held-out runs/starter/held_out.jsonl --output dpo_rank/starter

Keeps the int8 graphs only, fits the temperature and the thresholds of `ranking.confident` on pairs of two *whole* answers that were held
out of training (so that between two good answers the probability stays near 0.5), what is familiar on all held-out rows, and writes the model card with what the int8 graphs reach on held-out rows.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from dpo_rank import Ranker, artifact
from dpo_rank.data.formats import read
from dpo_rank.evaluation.agreement import held_out_table, log_probs_of
from dpo_rank.evaluation.calibration import fit, fit_familiarity
from dpo_rank.export.card import model_card

WHOLE_PAIRS = "human: harmless"
DESCRIPTION = [
    "**For:** telling whole answers from broken ones (cut off, looping, shuffled, garbled, an echo of the prompt, an answer to another prompt, a "
    "needless refusal) and, a little, harmless from harmful ones, in English. It lets `Ranker.load()` work out of the box and `--model starter` train a first "
    "ranker in minutes on a CPU.",
    "**Not for:** choosing between two good answers, facts, reasoning, code, other languages, or any decision that matters. Its human pairs are about "
    "harmlessness alone. Where the length rules in the table come near its own figure, it may have learned little more than length. It leans on how an answer ends: "
    "outside the held-out rows, a fluent answer to another prompt, or shuffled words that end in a full stop, can come first.",
    "**Data:** Anthropic/hh-rlhf harmless-base (MIT), openai/gsm8k (MIT), RUCAIBox/HaluEval (MIT); prompts held out by a hash. "
    "**Recipe:** `examples/starter/README.md`.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="The trained ranker as the embedded starter.")
    parser.add_argument("--ranker", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    held = list(read(args.held_out))
    ranker = Ranker.load(args.ranker, precision="int8")
    tokens = log_probs_of(ranker, held)
    scores = [np.array([ranker.reward(item) for item in items]) for items in tokens]
    whole = [(example, items) for example, items in zip(held, tokens, strict=True) if example.raw["subset"] == WHOLE_PAIRS]
    source = artifact.load(args.ranker)
    fitted, _ = fit(source.manifest, *zip(*whole, strict=True), correction=True)
    kept = {name for name in source.manifest.files if name.startswith("onnx/int8/") or name == artifact.TOKENIZER}
    facts = {
        **source.manifest.training,
        "description": DESCRIPTION,
        "license": "apache-2.0",
        "base_model": "models/starter-base",
        "temperature_fitted_on": f"{WHOLE_PAIRS} (held out, two whole answers)",
        "held_out": held_out_table(held, scores),
    }
    final = replace(
        fitted,
        name="starter",
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
