"""How long a pair takes to export, and how much memory: a 134 M shape (SmolLM-135M's) with random weights.

    python benchmarks/export.py

Writes docs/results/export.json.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_rank import Ranker

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def main() -> None:
    pair = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        pair.append(LlamaForCausalLM(LlamaConfig(**SHAPE)).eval())
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(SHAPE["vocab_size"])} | {"</s>": 0}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="w1")
    ranker = Ranker.from_models(*pair, tokenizer=fast, device="cpu")
    results = {"parameters_millions": round(pair[0].num_parameters() / 1e6, 1)}
    with tempfile.TemporaryDirectory() as directory:
        for precisions in (("fp32",), ("fp32", "int8")):
            start = time.perf_counter()
            path = ranker.export(Path(directory) / "-".join(precisions), precisions)
            name = " and ".join(precisions)
            results[f"seconds, {name}"] = round(time.perf_counter() - start, 1)
            results[f"mib, {name}"] = round(sum(file.stat().st_size for file in path.rglob("*.onnx*")) / 2**20)
    results["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(results, indent=1))
    Path("docs/results").mkdir(parents=True, exist_ok=True)
    Path("docs/results/export.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
