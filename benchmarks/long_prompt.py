"""Peak memory and time of long prompts and of many candidates, each in a process of its own.

    python benchmarks/long_prompt.py            # prompts of 16,000 and 32,000 tokens, N = 64 and 256; at 134 M on two cores about half an hour

A prompt is read in pieces within the token budget, so no array grows with its length squared: memory should grow no faster than the keys
and values do. Time per candidate at N = 256 should be that of N = 64.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from latency import measure, seconds_of
from rich.console import Console
from shapes import artifact

from dpo_rank.scoring.graph_engine import available_cpus

CASES = (("16,000 tokens", 16_000, 4), ("32,000 tokens", 32_000, 4), ("N = 64", 512, 64), ("N = 256", 512, 256))


def main() -> None:
    parser = argparse.ArgumentParser(description="Long prompts and many candidates.")
    parser.add_argument("--shape", default="15M")
    parser.add_argument("--ways", nargs="+", default=["dpo_rank, onnx fp32", "dpo_rank, onnx int8"])
    parser.add_argument("--cache", type=Path, default=Path("runs/bench"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/long_prompt.json"))
    args = parser.parse_args()
    artifact(args.shape, args.cache, ("fp32", "int8"))
    results: dict[str, Any] = {"shape": args.shape, "results": {}}
    for way in args.ways:
        for name, prompt, count in CASES:
            cell = {"shape": args.shape, "prompt": prompt, "candidates": count, "kind": "ragged", "lengths": [[128] * count]}
            found = measure(way, cell, args.cache, available_cpus())
            results["results"].setdefault(way, {})[name] = found
            seconds = seconds_of(found)
            text = found.get("not_run") or f"{seconds[0]:.2f} s, {1000 * seconds[0] / count:.1f} ms a candidate, {found['peak_mib']} MiB"
            Console().print(f"{way}, {name}: {text}", highlight=False)
            args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
