"""Between stages 2 and 3 of the starter: one policy from the checkpoints of its two rounds, the mean of their weights.

    python examples/starter/average.py --ranker runs/starter/second --held-out runs/starter/held_out.jsonl --output runs/starter/mean \\
        --checkpoints runs/starter/first.run/dpo/checkpoint-1180 runs/starter/first.run/dpo/checkpoint-1411 runs/starter/second.run/dpo/checkpoint-1411

The second round starts from the first's policy and has the same reference, so that their mean is a policy of that reference too ("model
soups", Wortsman et al. 2022, https://arxiv.org/abs/2203.05482). Tokenizer, prompt format, reference and limits are the ranker's.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from dpo_rank import artifact
from dpo_rank.data.formats import read
from dpo_rank.export.pair import export_pair
from dpo_rank.scoring.encode import Encoder, load_tokenizer
from dpo_rank.scoring.pair import load_from_artifact
from dpo_rank.training.prepare import encode_row


def mean(checkpoints: list[Path]) -> dict[str, torch.Tensor]:
    weights = [load_file(path / "model.safetensors") for path in checkpoints]
    return {name: torch.stack([each[name].float() for each in weights]).mean(dim=0) for name in weights[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description="The mean of several checkpoints' weights as a ranker.")
    parser.add_argument("--ranker", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, required=True, help="int8 is compared with fp32 on its first 200 rows")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    source = artifact.load(args.ranker)
    manifest = source.manifest
    policy, reference = load_from_artifact(source.root, dtype=torch.float32)
    policy.load_state_dict({**policy.state_dict(), **mean(args.checkpoints)})  # the head is tied, and stored once
    encoder = Encoder(
        load_tokenizer(source.tokenizer()), manifest.prompt_format, manifest.limits, manifest.passage_format, manifest.boundary
    )
    facts = {
        key: value for key, value in manifest.training.items() if key not in ("export", "held_out", "best_step", "best_while_training")
    }
    averaged = replace(manifest, training={**facts, "mean_of_checkpoints": len(args.checkpoints)})
    sample = [encode_row(encoder, row).group for row in list(read(args.held_out))[:200]]
    export_pair((policy, reference), encoder, averaged, args.output, sample=sample, overwrite=True)


if __name__ == "__main__":
    main()
