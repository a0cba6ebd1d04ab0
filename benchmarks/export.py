"""How long a pair takes to export, and how much memory: a 134 M shape (SmolLM-135M's) with random weights.

    python benchmarks/export.py

Writes docs/results/export.json; the ranker stays in ``--cache`` for benchmarks/latency.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from pathlib import Path

from shapes import artifact, pair


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of an export.")
    parser.add_argument("--shape", default="134M")
    parser.add_argument("--cache", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    pair(args.shape, args.cache)
    results: dict[str, float] = {}
    for precisions in (("fp32",), ("fp32", "int8")):
        shutil.rmtree(args.cache / args.shape / f"ranker-{'-'.join(precisions)}", ignore_errors=True)
        start = time.perf_counter()
        path = artifact(args.shape, args.cache, precisions)
        name = " and ".join(precisions)
        results[f"seconds, {name}"] = round(time.perf_counter() - start, 1)
        results[f"mib, {name}"] = round(sum(file.stat().st_size for file in path.rglob("*.onnx*")) / 2**20)
    results["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(results, indent=1))
    Path("docs/results").mkdir(parents=True, exist_ok=True)
    Path("docs/results/export.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
