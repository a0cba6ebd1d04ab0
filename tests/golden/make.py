"""Write a golden artifact: `python -m tests.golden.make`. One a format version; a committed one is never written again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from dpo_rank import Ranker
from dpo_rank.artifact import FORMAT_VERSION
from dpo_rank.export.pair import export_pair
from dpo_rank.scoring.prompt_format import PassageFormat
from tests.artifacts import tiny_pair
from tests.cases import ANSWERS, MESSAGES, PROMPT

ROOT = Path(__file__).parent / f"format-{FORMAT_VERSION}"


def main() -> None:
    policy, reference, tokenizer = tiny_pair("llama", hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    ranker = Ranker.from_models(policy, reference, tokenizer=tokenizer, beta=0.2)
    manifest = replace(ranker.manifest, name="golden", temperature=0.7, calibrated=True, passage_format=PassageFormat())
    path = export_pair((policy, reference), ranker._encoder, manifest, ROOT / "artifact")
    scores = {}
    for precision in ("fp32", "int8"):
        loaded = Ranker.load(path, precision=precision)
        scores[precision] = {
            "plain": loaded.score(PROMPT, ANSWERS).tolist(),
            "messages": loaded.score(MESSAGES, ANSWERS).tolist(),
            "passages": loaded.score(PROMPT, ANSWERS, passages=["Boil it."]).tolist(),
        }
    (ROOT / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
