"""Mean |log-ratio| per token of a true pair, and of the same policy with references that are not its own.

    python benchmarks/misfit.py --ranker my-ranker      # a ranker that keeps its models

The threshold of the warning (dpo_rank.ranker.MISFIT_NATS) lies between the two. Writes docs/results/misfit.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dpo_rank import artifact
from dpo_rank.data.formats import read
from dpo_rank.ranker import MISFIT_NATS
from dpo_rank.scoring.encode import Encoder, load_tokenizer
from dpo_rank.scoring.engine import score
from dpo_rank.scoring.pair import load_from_artifact
from dpo_rank.scoring.torch_engine import TorchEngine


def main() -> None:
    parser = argparse.ArgumentParser(description="Mean |log-ratio| per token with right and wrong references.")
    parser.add_argument("--ranker", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("DPO_RANK_DATA", "../shared/data")) / "hh_harmless.test.jsonl.gz")
    args = parser.parse_args()
    loaded = artifact.load(args.ranker)
    manifest = loaded.manifest
    encoder = Encoder(load_tokenizer(loaded.tokenizer()), manifest.prompt_format, manifest.limits, manifest.passage_format)
    examples = list(read(args.data))[:60]
    groups = [encoder.encode(example.prompt, [c.text for c in example.candidates]).group for example in examples]
    policy, reference = load_from_artifact(loaded.root)
    torch.manual_seed(0)
    noisy = copy.deepcopy(reference)
    reordered = copy.deepcopy(reference)
    layers = reordered.model.layers
    layers[1], layers[2] = layers[2], layers[1]
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.5)
    references = {
        "its own reference": reference,
        "half a standard deviation of noise on every weight": noisy,
        "two layers exchanged": reordered,
        "random weights of the same shape": AutoModelForCausalLM.from_config(reference.config).eval(),
    }
    results: dict[str, float] = {"threshold": MISFIT_NATS}
    for name, other in references.items():
        ratios = [np.abs(item.policy - item.reference) for items in score(TorchEngine(policy, other), groups) for item in items]
        results[name] = round(float(np.concatenate(ratios).mean()), 3)
    print(json.dumps(results, indent=1))
    Path("docs/results").mkdir(parents=True, exist_ok=True)
    Path("docs/results/misfit.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
