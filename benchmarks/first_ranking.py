"""What the starter costs: import, first ranking in a fresh process, later rankings, memory.

    python benchmarks/first_ranking.py

Run on an otherwise idle machine. Prints a table; writes docs/results/first_ranking.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

FRESH = """
import json, resource, sys, time
start = time.perf_counter()
import numpy
loaded_numpy = time.perf_counter()
import dpo_rank
imported = time.perf_counter()
from dpo_rank import Ranker
ranker = Ranker.load("starter")
loaded = time.perf_counter()
answers = ["Blot it with a cloth, cover it with salt or baking soda, wait ten minutes, rinse with cold water and wash the shirt as usual. " * 2] * 4
answers = [f"{n}. {text}" for n, text in enumerate(answers)]
prompt = "How do I get a red wine stain out of a cotton shirt?"
tokens = ranker.rank(prompt, answers)[0].num_tokens
first = time.perf_counter()
later = []
for _ in range(30):
    begin = time.perf_counter()
    ranker.rank(prompt, answers)
    later.append(time.perf_counter() - begin)
assert "torch" not in sys.modules
print(json.dumps({
    "import over numpy": imported - loaded_numpy,
    "load": loaded - imported,
    "import to first ranking": first - loaded_numpy + (loaded_numpy - start),
    "later ranking, 4 candidates": sorted(later)[len(later) // 2],
    "tokens a candidate": tokens,
    "peak memory MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""


def main() -> None:
    runs = []
    for _ in range(7):
        done = subprocess.run([sys.executable, "-c", FRESH], check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout))
    table = Table(title=f"starter, {os.cpu_count()} CPUs, median of {len(runs)} fresh processes (range)", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    results = {}
    for key in runs[0]:
        values = [run[key] for run in runs]
        scale, unit = (1, "") if key.startswith(("tokens", "peak")) else (1000, " ms")
        results[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        table.add_row(key, f"{scale * statistics.median(values):.1f}{unit} ({scale * min(values):.1f} to {scale * max(values):.1f})")
    Console().print(table)
    Path("docs/results").mkdir(parents=True, exist_ok=True)
    Path("docs/results/first_ranking.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
